"""Hypotheses from back-pointers, so that a search never copies a hypothesis from step to step.

    beam at step L-1 is k; token = tokens[t, beam]; beam at step t-1 is parents[t, beam]
"""

from __future__ import annotations

import torch
from torch import Tensor

from las_fast.ops import backends


def beam_backtrack(
    tokens: Tensor, parents: Tensor, *, eos: int, paths: bool = False, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """Return the hypothesis that ends in each beam.

    Args:
        tokens:  (L, B, K) int64, the token that each beam took at each step.
        parents: (L, B, K) int64, the beam of the step before that it continued; those of step 0 are not followed.
        eos:     token id; what follows the first eos of a hypothesis is eos too.
        paths:   True also returns the beam in which each hypothesis stood, which gathers whatever was kept per step.
        backend: "auto", "reference", "triton" or "cpp".

    Returns:
        hypotheses (B, K, L) int64, lengths (B, K) int64 without eos and, if asked for, paths (B, K, L) int64.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: a parent on the way is not from 0 to K-1, or the named backend is not available here.
    """
    _check(tokens, parents)
    if backends.choose("beam_backtrack", backend, tokens.device) == "cpp":
        results = torch.ops.las_fast.beam_backtrack(tokens, parents, eos)
    else:
        results = _reference(tokens, parents, eos)
    return results if paths else results[:2]


def _reference(tokens: Tensor, parents: Tensor, eos: int) -> tuple[Tensor, Tensor, Tensor]:
    L, B, K = tokens.shape
    beam = torch.arange(K, device=tokens.device).expand(B, K)
    paths = tokens.new_empty(B, K, L)
    for t in reversed(range(L)):
        paths[:, :, t] = beam
        if t > 0:
            beam = parents[t].gather(1, beam)
    hypotheses = tokens.permute(1, 2, 0).gather(1, paths)
    ended = (hypotheses == eos).cumsum(-1) > 0
    return hypotheses.masked_fill(ended, eos), (~ended).sum(-1), paths


def _check(tokens: Tensor, parents: Tensor) -> None:
    for name, tensor in (("tokens", tokens), ("parents", parents)):
        if tensor.ndim != 3 or tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be (L, B, K) int64; got {tuple(tensor.shape)} {tensor.dtype}")
    if tokens.shape != parents.shape or tokens.device != parents.device:
        raise ValueError(
            f"parents must be like tokens, {tuple(tokens.shape)} on {tokens.device}; "
            f"got {tuple(parents.shape)} on {parents.device}"
        )


if "cpp" in backends.IMPLEMENTED["beam_backtrack"] and backends.EXTENSION_PROBLEM is None:

    @torch.library.register_fake("las_fast::beam_backtrack")
    def _(tokens: Tensor, parents: Tensor, eos: int) -> tuple[Tensor, Tensor, Tensor]:
        L, B, K = tokens.shape
        return tokens.new_empty(B, K, L), tokens.new_empty(B, K), tokens.new_empty(B, K, L)
