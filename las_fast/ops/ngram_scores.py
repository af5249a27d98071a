"""Log-probabilities of an n-gram model for the tokens that may follow each hypothesis.

The model is a back-off automaton. A state is a context, and state 0 is the empty one, which has an arc for every token:

    follow(s, v)    = the next state of the arc of v in s; without such an arc: follow(lower(s), v)
    log p(v | s)    = the log_prob of the arc of v in s; without such an arc: backoff(s) + log p(v | lower(s))

The back-off weights are added in the order of the states, then the log_prob: ((b1 + b2) + b3) + log_prob. So all
backends give the same bits. With the beams of a step of beam_topk:

    states[k]       = follow(states[parents[k]], tokens[k])
    log_probs[k, v] = log p(v | states[k])
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from las_fast.ops import backends

MASK_BITS = 32  # tokens per mask


@dataclass(frozen=True, eq=False)
class NgramModel:
    """A back-off automaton; its values are not checked.

    With W = ceil(V / 32), a row is [mask, first arc] * W, lower state, back-off weight. Bit v % 32 of mask v // 32 says
    whether the state has an arc of token v. `first arc` is the arc of the mask's lowest bit; the arcs of its other bits
    follow in order. Arcs are log_prob, next state. float32 values are stored as their bits.
    """

    rows: Tensor  # (S, 2 * W + 2) int32; lower(s) < s
    arcs: Tensor  # (A, 2) int32
    vocabulary_size: int
    order: int  # every state reaches state 0 by at most order-1 back-offs
    start: int  # state before the first token

    def to(self, device: torch.device | str) -> NgramModel:
        """Return the model on a device."""
        return replace(self, rows=self.rows.to(device), arcs=self.arcs.to(device))

    def add_to_all_but(self, token: int, value: float) -> NgramModel:
        """Return the model with `value` added to the log-probabilities of all tokens but one."""
        mask_index, bit = token // MASK_BITS, token % MASK_BITS
        masks, first = self.rows[:, 2 * mask_index].long(), self.rows[:, 2 * mask_index + 1].long()
        A = len(self.arcs)
        arc_of_token = torch.where((masks >> bit & 1).bool(), first + _bit_count(masks & ((1 << bit) - 1)), A)
        unchanged = torch.zeros(A + 1, dtype=torch.bool, device=masks.device).scatter_(0, arc_of_token, True)[:A]
        log_probs = self.arcs[:, 0].view(torch.float32)
        added = torch.where(unchanged, log_probs, log_probs + value)
        return replace(self, arcs=torch.stack((added.view(torch.int32), self.arcs[:, 1]), -1))


class NgramScores(NamedTuple):
    """The states of K hypotheses per utterance and the scores of their continuations."""

    states: Tensor  # (B, K) int64
    log_probs: Tensor  # (B, K, V) float32, natural logarithms


def table_model(table: Tensor, sos: int) -> NgramModel:
    """Return the model of a table of log-probabilities (V ** (order-1), V) float32, without back-off.

    The row of a context is its last order-1 tokens as a number in base V, the newest token as the last digit. The
    first context is sos repeated. Raises ValueError for another number of rows.
    """
    S, V = table.shape
    order, rows = 1, 1
    while rows < S and V > 1:
        order, rows = order + 1, rows * V
    if rows != S or table.dtype != torch.float32:
        raise ValueError(f"a table must be ({V} ** n, {V}) float32; got {tuple(table.shape)} {table.dtype}")
    device, masks_per_row = table.device, -(-V // MASK_BITS)
    states, tokens = torch.arange(S, device=device), torch.arange(V, device=device)
    begins = torch.arange(masks_per_row, device=device) * MASK_BITS
    masks = (1 << (V - begins).clamp(max=MASK_BITS)) - 1
    first = states[:, None] * V + begins
    rows_of_masks = torch.stack((masks.expand(S, masks_per_row), first), -1).flatten(1)
    packed = torch.cat((rows_of_masks, torch.zeros(S, 2, dtype=torch.int64, device=device)), 1)
    following = (states[:, None] * V + tokens) % S
    arcs = torch.stack((table.contiguous().view(torch.int32), following.int()), -1).reshape(S * V, 2)
    start = sos * (S - 1) // (V - 1) if V > 1 else 0
    return NgramModel(_wrapped(packed), arcs, V, order, start)


def _wrapped(x: Tensor) -> Tensor:
    """Convert integers below 2 ** 32 to int32 with the same bits."""
    return torch.where(x >= 1 << 31, x - (1 << 32), x).int()


def ngram_start(model: NgramModel, B: int, K: int, *, backend: str = "auto") -> NgramScores:
    """Return the scores of the first tokens."""
    states = torch.full((B, K), model.start, dtype=torch.int64, device=model.rows.device)
    return ngram_scores(model, states, backend=backend)


def ngram_scores(
    model: NgramModel,
    states: Tensor,
    *,
    parents: Tensor | None = None,
    tokens: Tensor | None = None,
    backend: str = "auto",
) -> NgramScores:
    """Follow the tokens of a step, and return the new states and the scores of their continuations.

    Not differentiable.

    Args:
        model:   the automaton.
        states:  (B, K) int64 before the step, 0 to S-1.
        parents: (B, K) int64, the beams continued, 0 to K-1; None: each continues itself.
        tokens:  (B, K) int64, the tokens taken, 0 to V-1; None: no token is taken.
        backend: "auto", "reference", "triton" or "cpp".

    Raises:
        ValueError: shapes, dtypes or devices disagree, or only one of parents and tokens is given.
        RuntimeError: the named backend is not available here; in C++, a state, parent or token is out of range. Triton
            clamps them, because a kernel cannot raise; the reference does not check them.
    """
    _check(model, states, parents, tokens)
    chosen = backends.choose("ngram_scores", backend, states.device)
    op: Any = _reference if chosen == "reference" else getattr(torch.ops.las_fast, f"ngram_scores_{chosen}")
    return NgramScores(*op(model.rows, model.arcs, model.vocabulary_size, model.order, states, parents, tokens))


def _check(model: NgramModel, states: Tensor, parents: Tensor | None, tokens: Tensor | None) -> None:
    masks_per_row = -(-model.vocabulary_size // MASK_BITS)
    for name, part, width in (("rows", model.rows, 2 * masks_per_row + 2), ("arcs", model.arcs, 2)):
        if part.ndim != 2 or part.shape[1] != width or part.dtype != torch.int32 or not len(part):
            raise ValueError(f"model.{name} must be (N, {width}) int32; got {tuple(part.shape)} {part.dtype}")
    if states.ndim != 2 or states.dtype != torch.int64:
        raise ValueError(f"states must be (B, K) int64; got {tuple(states.shape)} {states.dtype}")
    if (parents is None) != (tokens is None):
        got = "tokens" if parents is None else "parents"
        raise ValueError(f"parents and tokens must be given together; got only {got}")
    for name, x in (("parents", parents), ("tokens", tokens)):
        if x is not None and (x.shape != states.shape or x.dtype != torch.int64):
            shape = tuple(states.shape)
            raise ValueError(f"{name} must be {shape} int64 like states; got {tuple(x.shape)} {x.dtype}")
    others = {"model.rows": model.rows, "model.arcs": model.arcs, "parents": parents, "tokens": tokens}
    backends.check_devices("states", states.device, others)


def _reference(rows, arcs, V, order, states, parents, tokens) -> tuple[Tensor, Tensor]:
    if parents is not None:
        _, states = _walk(rows, arcs, order, states.gather(1, parents), tokens)
    every_token = torch.arange(V, device=states.device).expand(*states.shape, V)
    log_probs, _ = _walk(rows, arcs, order, states[..., None].expand_as(every_token), every_token)
    return states.clone(), log_probs


def _walk(rows: Tensor, arcs: Tensor, order: int, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability and the next state of each token in its state; all of one shape."""
    mask_index, bit = tokens // MASK_BITS, tokens % MASK_BITS
    arc, total = torch.zeros_like(states), torch.zeros(states.shape, device=states.device)
    found = torch.zeros_like(states, dtype=torch.bool)
    for _ in range(order):
        masks, first = (rows[states, 2 * mask_index + i].long() for i in (0, 1))
        arc = torch.where(found, arc, first + _bit_count(masks & ((1 << bit) - 1)))
        found = found | (masks >> bit & 1).bool()
        total = torch.where(found, total, total + rows[states, -1].view(torch.float32))
        states = torch.where(found, states, rows[states, -2].long())
    return total + arcs[arc, 0].view(torch.float32), arcs[arc, 1].long()


def _bit_count(x: Tensor) -> Tensor:
    """Return the number of set bits among the lowest 32."""
    x = x - (x >> 1 & 0x55555555)
    x = (x & 0x33333333) + (x >> 2 & 0x33333333)
    return ((x + (x >> 4) & 0x0F0F0F0F) * 0x01010101 & 0xFFFFFFFF) >> 24


def _fake(rows, arcs, V, order, states, parents, tokens):
    return torch.empty_like(states), states.new_empty((*states.shape, V), dtype=torch.float32)


backends.register(
    "ngram_scores",
    "(Tensor rows, Tensor arcs, int vocabulary_size, int order, Tensor states, Tensor? parents, Tensor? tokens)"
    " -> (Tensor states, Tensor log_probs)",
    _fake,
)
