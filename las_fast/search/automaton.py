"""From the levels of a back-off model to the automaton that the search follows, see las_fast.ops.ngram_scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from las_fast.search.kneser_ney import Level, find
from las_fast.text import SOS

if TYPE_CHECKING:  # importing torch would slow down --help
    from las_fast.ops import NgramModel

MASK_BITS = 32  # tokens per mask


def build_automaton(levels: tuple[Level, ...], V: int) -> NgramModel:
    """Build the automaton of a model of V tokens. Its states are the contexts of all levels, shortest first."""
    import torch

    from las_fast.ops import NgramModel

    sizes = [len(level.contexts) for level in levels]
    first_states = np.cumsum([0, *sizes])
    first_arcs = np.cumsum([0, *(len(level.ngrams) for level in levels)])
    rows = np.concatenate(
        [_rows(levels, k, V, first_arcs[k], first_states[k - 1] if k else 0) for k in range(len(levels))]
    )
    arcs = np.empty((first_arcs[-1], 2), np.int32)
    arcs[:, 0] = np.concatenate([level.log_probs for level in levels]).view(np.int32)
    arcs[:, 1] = np.concatenate(_next_states(levels, V, first_states))
    start = _start(levels, V, first_states)
    return NgramModel(torch.from_numpy(rows), torch.from_numpy(arcs), V, len(levels), start)


def _rows(levels: tuple[Level, ...], k: int, V: int, first_arc: int, first_lower: int) -> np.ndarray:
    """Return the rows of the contexts of levels[k], which have k tokens."""
    level, masks_per_row = levels[k], -(-V // MASK_BITS)
    contexts, tokens = len(level.contexts), level.ngrams % V
    mask_index = np.searchsorted(level.contexts, level.ngrams // V) * masks_per_row + tokens // MASK_BITS
    rows = np.zeros((contexts, 2 * masks_per_row + 2), np.int32)
    masks = np.bincount(
        mask_index, 2.0 ** (tokens % MASK_BITS), contexts * masks_per_row
    )  # exact: distinct powers of 2 below 2 ** 32
    arcs = np.bincount(mask_index, minlength=contexts * masks_per_row)
    rows[:, 0:-2:2] = masks.astype(np.uint32).view(np.int32).reshape(contexts, masks_per_row)
    rows[:, 1:-2:2] = (first_arc + np.cumsum(arcs) - arcs).reshape(contexts, masks_per_row)
    if k:
        rows[:, -2] = first_lower + np.searchsorted(levels[k - 1].contexts, level.contexts % V ** (k - 1))
    rows[:, -1] = level.backoffs.view(np.int32)
    return rows


def _next_states(levels: tuple[Level, ...], V: int, first_states: np.ndarray) -> list[np.ndarray]:
    """Return the state after each n-gram: the longest of its ends that is a context."""
    nexts: list[np.ndarray] = []
    for k, level in enumerate(levels, 1):
        states = np.zeros(len(level.ngrams), np.int64)
        if k > 1:
            states = nexts[-1][np.searchsorted(levels[k - 2].ngrams, level.ngrams % V ** (k - 1))]
        if k < len(levels):
            is_context, index = find(levels[k].contexts, level.ngrams)
            states = np.where(is_context, first_states[k] + index, states)
        nexts.append(states)
    return nexts


def _start(levels: tuple[Level, ...], V: int, first_states: np.ndarray) -> int:
    """Return the state of the longest context that is <sos>, once or repeated."""
    start, context = 0, 0
    for k, level in enumerate(levels[1:], 1):
        context = context * V + SOS
        is_context, index = find(level.contexts, np.array([context]))
        if is_context[0]:
            start = int(first_states[k] + index[0])
    return start
