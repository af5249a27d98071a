"""Hypotheses from back-pointers, so that a search never copies a hypothesis from step to step.

beam at step L-1 is k; token = tokens[t, beam]; beam at step t-1 is parents[t, beam]
log-probability of that token = scores[t, beam] - scores[t-1, parents[t, beam]]
frame it attended to          = frames[t, parents[t, beam]]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from las_fast.ops import backends


class Backtracked(NamedTuple):
    """What beam_backtrack returns of the hypothesis that ends in each beam."""

    tokens: Tensor  # (B, K, L) int64; what follows the first eos is eos too
    lengths: Tensor  # (B, K) int64, without eos
    token_scores: Tensor  # (B, K, L) float32 log-probabilities; at `lengths` that of eos, 0 after it
    frames: Tensor  # (B, K, L) int64 encoder frames; past the length those of the frozen beam


def beam_backtrack(
    tokens: Tensor, parents: Tensor, scores: Tensor, frames: Tensor, *, eos: int, backend: str = "auto"
) -> Backtracked:
    """Return the tokens of each hypothesis with their log-probabilities and the frames that they attended to.

    Args:
        tokens:  (L, B, K) int64, the token that each beam took at each step.
        parents: (L, B, K) int64 from 0 to K-1, the beam of the step before that it continued.
        scores:  (L, B, K) float32, of the hypothesis so far; 0 before the first step.
        frames:  (L, B, K) int64, the frame that each beam attended to before the step's pruning.
        eos:     token id.
        backend: "auto", "reference", "triton" or "cpp".

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the named backend is not available here, or, on the CPU, a parent on the way is not from 0 to
            K-1. Triton cannot raise without waiting for the device: there it is taken for the nearest that exists.
    """
    _check(tokens, parents, scores, frames)
    chosen = backends.choose("beam_backtrack", backend, tokens.device)
    if chosen == "reference":
        return _reference(tokens, parents, scores, frames, eos)
    return Backtracked(*getattr(torch.ops.las_fast, f"beam_backtrack_{chosen}")(tokens, parents, scores, frames, eos))


def _reference(tokens: Tensor, parents: Tensor, scores: Tensor, frames: Tensor, eos: int) -> Backtracked:
    L, B, K = tokens.shape
    beam = torch.arange(K, device=tokens.device).expand(B, K)
    found, attended = tokens.new_empty(B, K, L), tokens.new_empty(B, K, L)
    running = scores.new_zeros(B, K, L + 1)
    for t in reversed(range(L)):
        found[:, :, t] = tokens[t].gather(1, beam)
        running[:, :, t + 1] = scores[t].gather(1, beam)
        beam = parents[t].gather(1, beam)
        attended[:, :, t] = frames[t].gather(1, beam)
    ended = (found == eos).cumsum(-1) > 0
    # Equal scores are a difference of 0 also where both are -inf.
    each = torch.where(running[..., 1:] == running[..., :-1], 0.0, running.diff(dim=-1))
    return Backtracked(found.masked_fill(ended, eos), (~ended).sum(-1), each, attended)


def _check(tokens: Tensor, parents: Tensor, scores: Tensor, frames: Tensor) -> None:
    if tokens.ndim != 3 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be (L, B, K) int64; got {tuple(tokens.shape)} {tokens.dtype}")
    others = (("parents", parents, torch.int64), ("scores", scores, torch.float32), ("frames", frames, torch.int64))
    for name, tensor, dtype in others:
        if tensor.shape != tokens.shape or tensor.dtype != dtype or tensor.device != tokens.device:
            raise ValueError(
                f"{name} must be {tuple(tokens.shape)} {dtype} on {tokens.device} like tokens; "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


def _fake(tokens: Tensor, parents: Tensor, scores: Tensor, frames: Tensor, eos: int) -> tuple[Tensor, ...]:
    L, B, K = tokens.shape
    return tokens.new_empty(B, K, L), tokens.new_empty(B, K), scores.new_empty(B, K, L), tokens.new_empty(B, K, L)


backends.register(
    "beam_backtrack",
    "(Tensor tokens, Tensor parents, Tensor scores, Tensor frames, int eos)"
    " -> (Tensor tokens, Tensor lengths, Tensor token_scores, Tensor frames)",
    _fake,
)
