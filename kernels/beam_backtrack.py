"""Hypotheses from back-pointers on a GPU: the Triton twin of las_fast/ops/beam_backtrack.py, which says what it means.

One program follows the K hypotheses of one utterance from the last step to the first, a lane each. Bytes: each token,
pointer, score and frame on a hypothesis is read once (a score twice), each result written once; the wait for one
pointer after another, not their bytes, is what it costs, once a batch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def backtrack_kernel(
    tokens, parents, scores, frames, found, lengths, token_scores, attended,
    L, B, K, eos,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Follow the hypotheses of utterance b through (L, B, K) pointers into (B, K, L) rows."""
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    exists = k < K
    row = b * K + k
    beam = k.to(tl.int64)
    length = tl.full([BLOCK_K], 0, tl.int64) + L
    for i in range(L):
        t = tl.cast(L - 1 - i, tl.int64)
        step = (t * B + b) * K
        token = tl.load(tokens + step + beam, mask=exists, other=0)
        score = tl.load(scores + step + beam, mask=exists, other=0.0)
        beam = tl.load(parents + step + beam, mask=exists, other=0)
        beam = tl.minimum(tl.maximum(beam, 0), K - 1)  # nobody can be told here; never read outside
        before = tl.load(scores + step - B * K + beam, mask=exists & (t > 0), other=0.0)
        frame = tl.load(frames + step + beam, mask=exists, other=0)
        each = tl.where(score == before, 0.0, score - before)  # also where both are -inf
        length = tl.where(token == eos, t, length)
        tl.store(found + row * L + t, token, mask=exists)
        tl.store(token_scores + row * L + t, each, mask=exists)
        tl.store(attended + row * L + t, frame, mask=exists)
    tl.store(lengths + row, length, mask=exists)
    tl.debug_barrier()  # the same elements are written again, by other threads
    for start in range(0, L, BLOCK_L):
        t = start + tl.arange(0, BLOCK_L)
        over = exists[:, None] & (t[None, :] > length[:, None]) & (t[None, :] < L)
        tl.store(found + row[:, None] * L + t[None, :], tl.zeros([BLOCK_K, BLOCK_L], tl.int64) + eos, mask=over)


def beam_backtrack(
    tokens: Tensor, parents: Tensor, scores: Tensor, frames: Tensor, eos: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch; return tokens, lengths, token_scores and frames as las_fast::beam_backtrack_triton."""
    L, B, K = tokens.shape
    found, attended = tokens.new_empty(B, K, L), tokens.new_empty(B, K, L)
    token_scores, lengths = scores.new_empty(B, K, L), tokens.new_empty(B, K)
    if B and K:
        backtrack_kernel[B,](
            *(x.contiguous() for x in (tokens, parents, scores, frames)), found, lengths, token_scores, attended,
            L, B, K, eos, BLOCK_K=triton.next_power_of_2(K), BLOCK_L=64, num_warps=1,
        )  # fmt: skip
    return found, lengths, token_scores, attended
