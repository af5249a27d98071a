"""CTC prefix scores on a GPU: the Triton twin of las_fast/ops/ctc_prefix.py, which says what it means.

A program takes one hypothesis and some continuations of it. Both recursions over frames are of first order, in
logarithms x_t = log(exp(x_(t-1) + factor_t) + exp(term_t)), and so are two scans over a block of frames:

    n_t with factor p_t(token) and term f_(t-1) p_t(token),   a_t with factor p_t(blank) and term n_t

The sums over frames read a_t beside the frames one and two later, so that nothing need pass from lane to lane. Bytes:
the frames are read once for each hypothesis, mostly from the cache; the states are read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T = 128  # frames at a time
BLOCK_V = 32  # continuations of a program


@triton.jit
def _add(x, y):
    """log(exp(x) + exp(y))."""
    more = tl.maximum(x, y)
    seen = tl.where(more == -float("inf"), 0.0, more)  # -inf - -inf would be NaN
    return more + tl.log(1.0 + tl.exp(tl.minimum(x, y) - seen))


@triton.jit
def _then(factor, term, next_factor, next_term):
    return factor + next_factor, _add(term + next_factor, next_term)


@triton.jit
def _sum(x, top, total):
    """Add exp(x), over its first dimension, to total * exp(top); returns the new (top, total)."""
    more = tl.maximum(top, tl.max(x, 0))
    seen = tl.where(more == -float("inf"), 0.0, more)
    return more, total * tl.exp(top - seen) + tl.sum(tl.exp(x - seen), 0)


@triton.jit
def prefix_kernel(
    frames, alphas, prefixes, gains, tokens, parents, chosen, out_alphas, out_prefixes, out_gains,
    K, T, V, eos, BLANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The state of hypothesis (b, k), and its gains for BLOCK_V tokens."""
    row = tl.program_id(0).to(tl.int64)
    writes = tl.program_id(1) == 0  # the state: all programs of a hypothesis compute the same
    parent = tl.minimum(tl.maximum(tl.load(parents + row), 0), K - 1)  # nobody can be told here
    token = tl.minimum(tl.maximum(tl.load(chosen + row), 0), V - 1)
    source = row // K * K + parent
    repeats = tl.load(tokens + source) == token
    frames += row // K * T * V
    before = alphas + source * (T + 1)
    after = out_alphas + row * (T + 1)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    lane = tl.arange(0, BLOCK_T)
    newest = tl.full([], -float("inf"), tl.float32)
    alpha = tl.full([], -float("inf"), tl.float32)
    top = tl.full([BLOCK_V], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    again_top = tl.full([], -float("inf"), tl.float32)
    again_total = tl.zeros([], tl.float32)
    tl.store(after, alpha, mask=writes)
    for start in range(0, T, BLOCK_T):
        t = start + lane
        at = frames + t.to(tl.int64) * V
        inside = t < T
        label = tl.load(at + token, mask=inside, other=0.0)
        blank = tl.load(at + BLANK, mask=inside, other=0.0)
        held = tl.load(before + t, mask=inside & (repeats == 0), other=-float("inf"))
        paused = inside & repeats & (t > 0)
        ended = tl.load(before + t - 1, mask=paused, other=-float("inf"))
        ended += tl.load(at - V + BLANK, mask=paused, other=0.0)
        begun = tl.where(repeats, ended, held)
        factor, term = tl.associative_scan((label, begun + label), 0, _then)
        new = tl.where(inside, _add(newest + factor, term), -float("inf"))
        factor, term = tl.associative_scan((blank, new), 0, _then)
        now = _add(alpha + factor, term)
        tl.store(after + t + 1, now, mask=inside & writes)
        newest = tl.max(tl.where(lane == BLOCK_T - 1, new, -float("inf")), 0)
        alpha = tl.max(tl.where(lane == BLOCK_T - 1, now, -float("inf")), 0)
        follows = (t + 1 < T)[:, None] & (v < V)[None, :]
        x = tl.load(at[:, None] + V + v[None, :], mask=follows, other=-float("inf"))
        top, total = _sum(now[:, None] + x, top, total)
        later = t + 2 < T
        pause = tl.load(at + V + BLANK, mask=later, other=-float("inf"))
        y = tl.load(at + 2 * V + token, mask=later, other=-float("inf"))
        again_top, again_total = _sum(now + pause + y, again_top, again_total)
    prefix = tl.load(prefixes + source) + tl.load(gains + source * V + token)
    psi = tl.where(v == token, again_top + tl.log(again_total), top + tl.log(total))
    psi = tl.where(v == BLANK, -float("inf"), tl.where(v == eos, alpha, psi))
    found = tl.where(prefix == -float("inf"), prefix, psi - prefix)
    tl.store(out_gains + row * V + v, found, mask=v < V)
    tl.store(out_prefixes + row, prefix, mask=writes)


def ctc_prefix(
    frames: Tensor, alphas: Tensor, prefixes: Tensor, gains: Tensor, tokens: Tensor, parents: Tensor, chosen: Tensor,
    eos: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch; return alphas, prefixes and gains as las_fast::ctc_prefix_triton."""
    given = [x.contiguous() for x in (frames, alphas, prefixes, gains, tokens, parents, chosen)]
    found = tuple(torch.empty_like(x) for x in given[1:4])
    (_, T, V), rows = frames.shape, tokens.numel()
    if rows:
        block = min(BLOCK_V, triton.next_power_of_2(V))
        prefix_kernel[rows, triton.cdiv(V, block)](
            *given, *found, tokens.shape[1], T, V, eos, BLANK=0, BLOCK_T=BLOCK_T, BLOCK_V=block, num_warps=4
        )
    return found
