"""Scores of an n-gram model on a GPU. las_fast/ops/ngram_scores.py defines the operation and the layout of the model.

One program per hypothesis follows its token and scores its continuations. Each lane has one token, and walks from state
to state until one has an arc of it. Lanes in the same state load the same row. Bytes: at most `order` rows of the model
per hypothesis, an arc per token, and the log-probabilities, which are written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 512  # tokens per iteration


@triton.jit
def _bit_count(x):
    """Return the number of set bits of int64 numbers below 2^32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) & 0xFFFFFFFF) >> 24


@triton.jit
def _clamp(x, end):
    """Clamp to 0 to end-1: a kernel cannot raise."""
    return tl.minimum(tl.maximum(x, 0), end - 1)


@triton.jit
def _walk(rows, arcs, state, v, exists, width, state_count, arc_count, order):
    """Return the log-probability and the next state of each token v in its state, (N,) each."""
    # (N,)
    index, bit = v // 32, v % 32
    total = tl.zeros_like(v).to(tl.float32)
    arc = tl.zeros_like(v)
    missing = exists
    for _ in range(order):
        row = rows + state * width
        mask = tl.load(row + 2 * index, mask=missing, other=0).to(tl.int64)
        first = tl.load(row + 2 * index + 1, mask=missing, other=0)
        lower = tl.load(row + width - 2, mask=missing, other=0)
        backoff = tl.load(row + width - 1, mask=missing, other=0).to(tl.float32, bitcast=True)
        below = _bit_count(mask & ((tl.zeros_like(bit) + 1 << bit) - 1))
        arc = tl.where(missing, first + below, arc)
        missing = missing & (((mask >> bit) & 1) == 0)
        total = tl.where(missing, total + backoff, total)
        state = tl.where(missing, _clamp(lower.to(tl.int64), state_count), state)
    arc = _clamp(arc, arc_count)
    log_prob = tl.load(arcs + 2 * arc, mask=exists, other=0).to(tl.float32, bitcast=True)
    following = tl.load(arcs + 2 * arc + 1, mask=exists, other=0).to(tl.int64)
    return total + log_prob, _clamp(following, state_count)


@triton.jit
def scores_kernel(
    rows, arcs, states, parents, tokens, out_states, out_log_probs,
    K, V, width, state_count, arc_count, order, FOLLOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the state of one hypothesis and the log-probabilities (V,) of its continuations."""
    i = tl.program_id(0).to(tl.int64)  # b * K + k
    one = tl.arange(0, 1)
    # (1,)
    at = i + one
    if FOLLOW:
        parent = _clamp(tl.load(parents + at), K)
        token = _clamp(tl.load(tokens + at), V)
        before = _clamp(tl.load(states + i // K * K + parent), state_count)
        log_prob, state = _walk(rows, arcs, before, token, one == 0, width, state_count, arc_count, order)
    else:
        state = _clamp(tl.load(states + at), state_count)
    tl.store(out_states + at, state)
    for start in range(0, V, BLOCK):
        # (BLOCK,)
        v = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = v < V
        begin = tl.zeros_like(v) + state
        log_probs, following = _walk(rows, arcs, begin, v, inside, width, state_count, arc_count, order)
        tl.store(out_log_probs + i * V + v, log_probs, mask=inside)


def ngram_scores(
    rows: Tensor, arcs: Tensor, vocabulary_size: int, order: int, states: Tensor, parents: Tensor | None,
    tokens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernel; the implementation of las_fast::ngram_scores_triton."""
    B, K = states.shape
    V = vocabulary_size
    rows, arcs, states = (x.contiguous() for x in (rows, arcs, states))
    parents, tokens = (None if x is None else x.contiguous() for x in (parents, tokens))
    out_states, out_log_probs = torch.empty_like(states), states.new_empty((B, K, V), dtype=torch.float32)
    if B * K == 0:
        return out_states, out_log_probs
    block = min(MAX_BLOCK, triton.next_power_of_2(V))
    scores_kernel[B * K,](
        rows, arcs, states, parents, tokens, out_states, out_log_probs,
        K, V, rows.shape[1], len(rows), len(arcs), order,
        FOLLOW=tokens is not None, BLOCK=block, num_warps=max(1, min(4, block // 64)),
    )  # fmt: skip
    return out_states, out_log_probs
