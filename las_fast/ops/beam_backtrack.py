"""Hypotheses from back-pointers, so that a search never copies a hypothesis from step to step.

The hypothesis that ends in beam k is followed from the last step to the first, beam = k at step L-1:

    token at t                    = tokens[t, beam]
    beam at t-1                   = parents[t, beam]
    log-probability of that token = scores[t, beam] - scores[t-1, parents[t, beam]]
    frame that it attended to     = attended_frames[t, parents[t, beam]]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from las_fast.ops import backends


class Backtracked(NamedTuple):
    """The hypothesis that ends in each beam, token by token."""

    tokens: Tensor  # (B, K, L) int64; eos from the first eos on
    lengths: Tensor  # (B, K) int64, without eos
    token_scores: Tensor  # (B, K, L) float32 log-probabilities; that of eos at `lengths`, 0 after it
    attended_frames: Tensor  # (B, K, L) int64 encoder frames; past the length those of the finished beam


def beam_backtrack(
    tokens: Tensor, parents: Tensor, scores: Tensor, attended_frames: Tensor, *, eos: int, backend: str = "auto"
) -> Backtracked:
    """Return the tokens of each hypothesis, their log-probabilities and the frames they attended to.

    Args:
        tokens:  (L, B, K) int64, the token that each beam took at each step.
        parents: (L, B, K) int64 from 0 to K-1, the beam of the previous step that it continued.
        scores:  (L, B, K) float32, of the hypothesis so far; 0 before the first step.
        attended_frames: (L, B, K) int64, the frame that each beam attended to before the step's pruning.
        eos:     token id.
        backend: "auto", "reference", "triton" or "cpp".

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the named backend is not available here; on the CPU, a parent on the path is not from 0 to K-1.
            Triton clamps such a parent: a kernel cannot raise.
    """
    _check(tokens, parents, scores, attended_frames)
    chosen = backends.choose("beam_backtrack", backend, tokens.device)
    if chosen == "reference":
        return _reference(tokens, parents, scores, attended_frames, eos)
    op = getattr(torch.ops.las_fast, f"beam_backtrack_{chosen}")
    return Backtracked(*op(tokens, parents, scores, attended_frames, eos))


def _reference(tokens: Tensor, parents: Tensor, scores: Tensor, attended_frames: Tensor, eos: int) -> Backtracked:
    L, B, K = tokens.shape
    beam = torch.arange(K, device=tokens.device).expand(B, K)
    hypotheses, frames_of_tokens = tokens.new_empty(B, K, L), tokens.new_empty(B, K, L)
    running = scores.new_zeros(B, K, L + 1)
    for t in reversed(range(L)):
        hypotheses[:, :, t] = tokens[t].gather(1, beam)
        running[:, :, t + 1] = scores[t].gather(1, beam)
        beam = parents[t].gather(1, beam)
        frames_of_tokens[:, :, t] = attended_frames[t].gather(1, beam)
    ended = (hypotheses == eos).cumsum(-1) > 0
    # Equal scores differ by 0 even where both are -inf.
    token_scores = torch.where(running[..., 1:] == running[..., :-1], 0.0, running.diff(dim=-1))
    return Backtracked(hypotheses.masked_fill(ended, eos), (~ended).sum(-1), token_scores, frames_of_tokens)


def _check(tokens: Tensor, parents: Tensor, scores: Tensor, attended_frames: Tensor) -> None:
    if tokens.ndim != 3 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be (L, B, K) int64; got {tuple(tokens.shape)} {tokens.dtype}")
    others = (
        ("parents", parents, torch.int64),
        ("scores", scores, torch.float32),
        ("attended_frames", attended_frames, torch.int64),
    )
    for name, tensor, dtype in others:
        if tensor.shape != tokens.shape or tensor.dtype != dtype or tensor.device != tokens.device:
            raise ValueError(
                f"{name} must be {tuple(tokens.shape)} {dtype} on {tokens.device} like tokens; "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


def _fake(tokens: Tensor, parents: Tensor, scores: Tensor, attended_frames: Tensor, eos: int) -> tuple[Tensor, ...]:
    L, B, K = tokens.shape
    return tokens.new_empty(B, K, L), tokens.new_empty(B, K), scores.new_empty(B, K, L), tokens.new_empty(B, K, L)


backends.register(
    "beam_backtrack",
    "(Tensor tokens, Tensor parents, Tensor scores, Tensor attended_frames, int eos)"
    " -> (Tensor tokens, Tensor lengths, Tensor token_scores, Tensor attended_frames)",
    _fake,
)
