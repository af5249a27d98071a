"""Hypotheses from back-pointers on a GPU. las_fast/ops/beam_backtrack.py defines the operation.

One program follows the K hypotheses of one utterance from the last step to the first, one lane per hypothesis. Bytes:
each token, back-pointer, score and frame of a hypothesis is read once (a score twice) and each result is written once.
Bytes do not limit the time: each step waits for the back-pointer of the step after it. The kernel runs once per batch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def backtrack_kernel(
    tokens, parents, scores, attended_frames, out_tokens, lengths, token_scores, out_frames,
    L, B, K, eos,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Follow the hypotheses of utterance b through (L, B, K) back-pointers; write (B, K, L) rows."""
    b = tl.program_id(0).to(tl.int64)
    # (BLOCK_K,), until the loop over blocks of steps
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
        beam = tl.minimum(tl.maximum(beam, 0), K - 1)  # a kernel cannot raise: clamp
        before = tl.load(scores + step - B * K + beam, mask=exists & (t > 0), other=0.0)
        frame = tl.load(attended_frames + step + beam, mask=exists, other=0)
        token_score = tl.where(score == before, 0.0, score - before)  # 0 even where both are -inf
        length = tl.where(token == eos, t, length)
        tl.store(out_tokens + row * L + t, token, mask=exists)
        tl.store(token_scores + row * L + t, token_score, mask=exists)
        tl.store(out_frames + row * L + t, frame, mask=exists)
    tl.store(lengths + row, length, mask=exists)
    tl.debug_barrier()  # below, other threads overwrite elements stored above
    for start in range(0, L, BLOCK_L):
        # (BLOCK_K, BLOCK_L)
        t = start + tl.arange(0, BLOCK_L)
        after = exists[:, None] & (t[None, :] > length[:, None]) & (t[None, :] < L)
        tl.store(out_tokens + row[:, None] * L + t[None, :], eos, mask=after)


def beam_backtrack(
    tokens: Tensor, parents: Tensor, scores: Tensor, attended_frames: Tensor, eos: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel; the implementation of las_fast::beam_backtrack_triton."""
    L, B, K = tokens.shape
    out_tokens, out_frames = tokens.new_empty(B, K, L), tokens.new_empty(B, K, L)
    token_scores, lengths = scores.new_empty(B, K, L), tokens.new_empty(B, K)
    if K:
        backtrack_kernel[B,](
            *(x.contiguous() for x in (tokens, parents, scores, attended_frames)),
            out_tokens, lengths, token_scores, out_frames, L, B, K, eos,
            BLOCK_K=triton.next_power_of_2(K), BLOCK_L=64, num_warps=1,
        )  # fmt: skip
    return out_tokens, lengths, token_scores, out_frames
