"""Beam search: from encoder memory to hypotheses.

beam_search checks its arguments, chooses one of three searches with the same result (native, cuda_graph, steps), and
follows the back-pointers of the best beams.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from las_fast.config import NEEDS_CTC_HEAD, DecodingConfig
from las_fast.errors import InputError
from las_fast.ops import Steps, beam_backtrack, speller_pack
from las_fast.search.cuda_graph import can_capture, search_by_graph
from las_fast.search.native import LOW_PRECISIONS, is_native, native_precision, search_natively
from las_fast.search.steps import Limits, Search, search_by_steps
from las_fast.text import EOS, PAD, SOS


@dataclass(frozen=True)
class Hypothesis:
    """One reading of an utterance."""

    text_tokens: list[int]  # without <sos> or <eos>
    score: float  # sum of what each token adds, <eos> included: see beam_search
    normalised: float  # score / tokens ** length_penalty, <eos> counted: the rank, but for the coverage
    frames: list[int]  # the encoder frame that each token attended to most
    token_scores: list[float]  # what each token adds to the score
    finished: bool  # False where <eos> came only because the maximum length was reached
    speech_score: float | None = None  # see speech_scores; None where it was not asked for


def greedy_search(model, memory, config: DecodingConfig) -> list[list[Hypothesis]]:
    """Take the most probable token at each step; a list of one hypothesis an utterance. See beam_search."""
    return beam_search(model, memory, dataclasses.replace(config, beam=1))


@torch.inference_mode()
def beam_search(
    model,
    memory,
    config: DecodingConfig,
    *,
    nbest: int = 1,
    ngram: Tensor | None = None,
    packed: Tensor | None = None,
    backend: str = "auto",
    capture: bool | None = None,
) -> list[list[Hypothesis]]:
    """Return up to `nbest` hypotheses an utterance, best first.

    Hypotheses do not depend on the batch that an utterance is in. At the maximum length they take <eos>. To the score
    of a hypothesis each token adds (natural logarithms; length_reward is not for <eos>)

        log p_model(token) + ngram_weight * log p_ngram(token) + length_reward

    where with config.ctc_weight the model is the weighted mean of attention and CTC: see ops.beam_topk.

    Args:
        model:   has start, step, time_reduction and vocabulary_size as las_fast.model.las.LAS; its state has gather as
            SpellerState.
        memory:  what model.listen returned; lengths (B,) int64 encoder frames. With config.ctc_weight its ctc_logits
            (B, T', V), whose blank is <pad>, and ctc_lengths (B,) are read too.
        config:  beam, length limits, penalties and weights.
        nbest:   hypotheses to return; no more than config.beam exist.
        ngram:   table of a language model as in las_fast.ops.Ngram, on the device; its weight is config.ngram_weight.
        packed:  what packed_weights made of this model, as it is, for this config and backend; None: the C++ search
            packs them itself.
        backend: of the ops.
        capture: replay a CUDA graph instead of launching kernels one by one; None: on CUDA with the Triton ops, and on
            a CPU the whole search of a LAS is one C++ op instead of steps.

    Where the model's outputs are not numbers, an utterance's one hypothesis is empty with score -inf.

    Raises:
        InputError: config.ngram_weight without an n-gram model, config.ctc_weight without a CTC head;
            precision bf16 or int8 where the search is not that in C++.
    """
    ngram, config = with_reward(ngram, config, model.vocabulary_size, memory.lengths.device)
    if config.ctc_weight and getattr(memory, "ctc_logits", None) is None:
        raise InputError(f"decoding.ctc_weight {NEEDS_CTC_HEAD}")
    limits = length_limits(memory.lengths * model.time_reduction, config)
    search = Search(model, config, ngram if config.ngram_weight else None, backend, packed)
    with _current(memory.lengths.device):
        run = choose_search(search, memory.lengths.device, capture=capture)
        return backtrack(run(search, memory, limits), limits, config, nbest, backend)


@torch.inference_mode()
def packed_weights(model, config: DecodingConfig, device: str | torch.device, backend: str = "auto") -> Tensor | None:
    """Return the model's matrices as beam_search reads them in C++, for whoever searches many batches; else None.

    They do not follow weights that change later.
    """
    if not is_native(model, backend, torch.device(device)):
        return None
    return speller_pack(model.speller.weights(), device, precision=native_precision(config))


def with_reward(ngram: Tensor | None, config: DecodingConfig, V: int, device) -> tuple[Tensor | None, DecodingConfig]:
    """Return a table that also holds config.length_reward, and the settings to use with it.

    weight * (log-probability + length_reward / weight) adds the reward to every token but <eos>. Without an n-gram
    model the table is one of order 1 that holds nothing else. Whoever searches many batches does this once. Raises
    InputError for config.ngram_weight without an n-gram model.
    """
    if config.ngram_weight and ngram is None:
        raise InputError("decoding.ngram_weight needs an n-gram model, and there is none; set it to 0")
    if not config.length_reward:
        return ngram, config
    if ngram is None or not config.ngram_weight:
        ngram, config = torch.zeros(1, V, device=device), dataclasses.replace(config, ngram_weight=1.0)
    reward = torch.full((V,), config.length_reward / config.ngram_weight, device=device)
    reward[EOS] = 0.0
    return ngram + reward, dataclasses.replace(config, length_reward=0.0)


def length_limits(lengths: Tensor, config: DecodingConfig) -> Limits:
    """Return the tokens allowed for (B,) int64 feature frames; the maximum is at least 1 and the minimum no more."""
    maximum = (lengths * config.maximum_share).long().add(config.maximum_extra).clamp(min=1)
    return Limits(torch.minimum((lengths * config.minimum_share).long(), maximum), maximum)


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a CUDA device the current one, for events, streams and Triton."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def choose_search(
    search: Search, device: torch.device, *, capture: bool | None = None
) -> Callable[[Search, Any, Limits], Steps]:
    """Return the function that runs the search: search_natively, search_by_graph or search_by_steps.

    capture is as in beam_search. Raises InputError for a precision that the search does not have.
    """
    if capture is None and is_native(search.model, search.backend, device):
        return search_natively
    if (precision := search.config.precision) in LOW_PRECISIONS:
        raise InputError(f"decoding.precision {precision} needs the C++ search of a LAS on a CPU; set it to auto")
    if capture is None:
        capture = can_capture(device, search.backend)
    return search_by_graph if capture else search_by_steps


def backtrack(steps: Steps, limits: Limits, config: DecodingConfig, nbest: int, backend: str) -> list[list[Hypothesis]]:
    """Follow the back-pointers and bring everything to the host."""
    tokens, lengths, token_scores, frames = beam_backtrack(*steps, eos=EOS, backend=backend)
    scores = steps.scores[-1]
    normalised = scores / (lengths + 1).float() ** config.length_penalty
    finished = lengths < limits.maximum[:, None]
    columns = [x.tolist() for x in (tokens, scores, normalised, frames, token_scores, finished, lengths)]
    return [_hypotheses(nbest, *utterance) for utterance in zip(*columns, strict=True)]


def _hypotheses(nbest: int, tokens, scores, normalised, frames, each, finished, lengths) -> list[Hypothesis]:
    """Return the real hypotheses of one utterance, of lists over its beams."""
    found = []
    for k, n in enumerate(lengths):
        # Where there are fewer readings than beams, impossible ones fill up: score -inf, or special tokens in the text.
        if math.isfinite(scores[k]) and not {PAD, SOS} & set(tokens[k][:n]):
            found.append(Hypothesis(tokens[k][:n], scores[k], normalised[k], frames[k][:n], each[k][:n], finished[k]))
    return found[:nbest] or [Hypothesis([], -math.inf, -math.inf, [], [], False)]
