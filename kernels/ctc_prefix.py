"""CTC prefix scores on a GPU. las_fast/ops/ctc_prefix.py defines the operation.

A program takes one hypothesis and BLOCK_V of its continuations. Both recursions over frames are linear and of first
order, x_t = factor_t x_(t-1) + term_t, so each is an associative scan over a block of frames, in logarithms:

    n_t = p_t(token) (n_(t-1) + f_(t-1)),   a_t = p_t(blank) a_(t-1) + n_t

The sums over frames combine a_t with frames t+1 and t+2, so that no value moves between lanes. Bytes: log-probabilities
are read once per hypothesis, mostly from the cache; states are read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T = 128  # frames per iteration
BLOCK_V = 32  # continuations per program


@triton.jit
def _finite(x):
    """Return x with 0 for -inf: -inf - -inf would be NaN."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def _add(x, y):
    """Return log(exp(x) + exp(y))."""
    larger = tl.maximum(x, y)
    return larger + tl.log(1.0 + tl.exp(tl.minimum(x, y) - _finite(larger)))


@triton.jit
def _compose(factor, term, next_factor, next_term):
    """Compose two steps of a recursion: the operator of the scans."""
    return factor + next_factor, _add(term + next_factor, next_term)


@triton.jit
def _sum(x, top, total):
    """Add the sum of exp(x) over its first dimension to total * exp(top); return the new (top, total)."""
    larger = tl.maximum(top, tl.max(x, 0))
    finite = _finite(larger)
    return larger, total * tl.exp(top - finite) + tl.sum(tl.exp(x - finite), 0)


@triton.jit
def prefix_kernel(
    ctc_log_probs, forward_log_probs, prefix_log_probs, next_log_probs, tokens, parents, chosen,
    out_forward_log_probs, out_prefix_log_probs, out_next_log_probs,
    K, T, V, eos, BLANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute the state of hypothesis (b, k) and its next_log_probs for BLOCK_V tokens."""
    row = tl.program_id(0).to(tl.int64)
    writes = tl.program_id(1) == 0  # all programs of a hypothesis compute the same state: one writes it
    parent = tl.minimum(tl.maximum(tl.load(parents + row), 0), K - 1)  # a kernel cannot raise: clamp
    token = tl.minimum(tl.maximum(tl.load(chosen + row), 0), V - 1)
    source = row // K * K + parent
    repeats = tl.load(tokens + source) == token
    ctc_log_probs += row // K * T * V
    before = forward_log_probs + source * (T + 1)
    after = out_forward_log_probs + row * (T + 1)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    lane = tl.arange(0, BLOCK_T)  # (BLOCK_T,)
    newest = tl.full([], -float("inf"), tl.float32)
    alpha = tl.full([], -float("inf"), tl.float32)
    # (BLOCK_V,): running maximum and sum of psi
    top = tl.full([BLOCK_V], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    # (): the same for psi of the repeated token, which needs a blank in between
    repeat_top = tl.full([], -float("inf"), tl.float32)
    repeat_total = tl.zeros([], tl.float32)
    tl.store(after, alpha, mask=writes)
    for start in range(0, T, BLOCK_T):
        # (BLOCK_T,)
        t = start + lane
        at = ctc_log_probs + t.to(tl.int64) * V
        blanks = at + BLANK
        inside = t < T
        label = tl.load(at + token, mask=inside, other=0.0)
        blank = tl.load(blanks, mask=inside, other=0.0)  # 0 past the end, so that alpha is carried
        # f: a repeated token must follow a blank; any other token may follow every state of the parent
        from_any = tl.load(before + t, mask=inside & (repeats == 0), other=-float("inf"))
        repeated = inside & repeats & (t > 0)
        from_blank = tl.load(before + t - 1, mask=repeated, other=-float("inf"))
        from_blank += tl.load(blanks - V, mask=repeated, other=-float("inf"))
        begun = tl.where(repeats, from_blank, from_any)
        factor, term = tl.associative_scan((label, begun + label), 0, _compose)
        new = tl.where(inside, _add(newest + factor, term), -float("inf"))
        factor, term = tl.associative_scan((blank, new), 0, _compose)
        now = _add(alpha + factor, term)
        tl.store(after + t + 1, now, mask=inside & writes)
        newest = tl.max(tl.where(lane == BLOCK_T - 1, new, -float("inf")), 0)
        alpha = tl.max(tl.where(lane == BLOCK_T - 1, now, -float("inf")), 0)
        # (BLOCK_T, BLOCK_V)
        follows = (t + 1 < T)[:, None] & (v < V)[None, :]
        x = tl.load(at[:, None] + V + v[None, :], mask=follows, other=-float("inf"))
        top, total = _sum(now[:, None] + x, top, total)
        # (BLOCK_T,)
        later = t + 2 < T
        next_blank = tl.load(blanks + V, mask=later, other=-float("inf"))
        y = tl.load(at + 2 * V + token, mask=later, other=-float("inf"))
        repeat_top, repeat_total = _sum(now + next_blank + y, repeat_top, repeat_total)
    prefix = tl.load(prefix_log_probs + source) + tl.load(next_log_probs + source * V + token)
    # (BLOCK_V,)
    psi = tl.where(v == token, repeat_top + tl.log(repeat_total), top + tl.log(total))
    psi = tl.where(v == BLANK, -float("inf"), tl.where(v == eos, alpha, psi))
    log_probs = tl.where(prefix == -float("inf"), prefix, psi - prefix)
    tl.store(out_next_log_probs + row * V + v, log_probs, mask=v < V)
    tl.store(out_prefix_log_probs + row, prefix, mask=writes)


def ctc_prefix(
    ctc_log_probs: Tensor, forward_log_probs: Tensor, prefix_log_probs: Tensor, next_log_probs: Tensor,
    tokens: Tensor, parents: Tensor, chosen: Tensor, eos: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the kernel; the implementation of las_fast::ctc_prefix_triton."""
    inputs = [
        x.contiguous()
        for x in (ctc_log_probs, forward_log_probs, prefix_log_probs, next_log_probs, tokens, parents, chosen)
    ]
    outputs = tuple(torch.empty_like(x) for x in inputs[1:4])
    _, T, V = ctc_log_probs.shape
    prefix_kernel[tokens.numel(), triton.cdiv(V, BLOCK_V)](
        *inputs, *outputs, tokens.shape[1], T, V, eos, BLANK=0, BLOCK_T=BLOCK_T, BLOCK_V=BLOCK_V, num_warps=4
    )
    return outputs
