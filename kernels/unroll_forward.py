"""The forward kernels of speller_unroll: step u of one cell, of the attention, and of the choice of sampled tokens.

bind_choose returns a kernel's launch with all arguments but `position`, bind_cells such a launch per cell, and
bind_attend a launch with all arguments but `position` and `next_position`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from las_fast.kernels.tiles import LOG2_E, load, matmul, tanh
from las_fast.kernels.unroll_layout import (
    UNITS,
    Layout,
    attention_options,
    folded_keys,
    matmul_grid,
    matmul_options,
    mm,
    recurrent,
)

CHOOSE_ROWS = 16  # utterances per program of choose_kernel


@triton.jit(do_not_specialize=["B", "U"])
def cell_kernel(
    operands, states, weight, offsets, tokens, masks, B, U, V, row_size, state_size,
    operand_at, below_size, output_at, cell_at, gates_at, H, position,
    FIRST: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step of a cell for BLOCK_B utterances and BLOCK_H units.

    weight is (4H, below_size + H). offsets is the bias (4H,) or, if FIRST, each token's contribution to the gates
    (V, 4H).
    """
    u = tl.load(position)
    if u < U:
        b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        n = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        first = tl.cast(u, tl.int64) * B  # of the rows of this step
        depth = below_size + H
        # (BLOCK_B, BLOCK_H)
        i = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        f, g, o = i, i, i
        for k0 in range(0, depth, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            # (BLOCK_B, BLOCK_K)
            x = load(operands + first * row_size + operand_at, b, k, row_size, B, depth)
            i += _gate(x, weight, 0, n, k, H, depth, PRECISION)
            f += _gate(x, weight, 1, n, k, H, depth, PRECISION)
            g += _gate(x, weight, 2, n, k, H, depth, PRECISION)
            o += _gate(x, weight, 3, n, k, H, depth, PRECISION)
        token = tl.load(tokens + first + b, mask=b < B, other=0) if FIRST else tl.zeros([BLOCK_B], tl.int64)
        i = _sigmoid(i + load(offsets, token, n, 4 * H, V, H))
        f = _sigmoid(f + load(offsets + H, token, n, 4 * H, V, H))
        g = tanh(g + load(offsets + 2 * H, token, n, 4 * H, V, H))
        o = _sigmoid(o + load(offsets + 3 * H, token, n, 4 * H, V, H))
        inside = (b[:, None] < B) & (n[None, :] < H)
        row = first + b[:, None]
        before = states + (row - B) * state_size + cell_at + n[None, :]
        cell = f * tl.load(before, mask=inside & (u > 0), other=0.0) + i * g
        hidden = o * tanh(cell)
        tl.store(states + row * state_size + cell_at + n[None, :], cell, mask=inside)
        gates = states + row * state_size + gates_at + n[None, :]
        tl.store(gates, i, mask=inside)
        tl.store(gates + H, f, mask=inside)
        tl.store(gates + 2 * H, g, mask=inside)
        tl.store(gates + 3 * H, o, mask=inside)
        dtype = operands.dtype.element_ty
        after = operands + (row + B) * row_size + operand_at + below_size + n[None, :]
        tl.store(after, hidden.to(dtype), mask=inside & (u + 1 < U))
        if MASKED:
            hidden *= load(masks, b, n, H, B, H)
        tl.store(operands + row * row_size + output_at + n[None, :], hidden.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["B", "U", "T"])
def attend_kernel(
    operands, keys, key_bias, values, lengths, weights, B, U, T, scale, row_size, readout_at, context_at, H, E,
    position, next_position,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Attend with the output of the last cell of utterance b; scale includes log2(e).

    keys (B, T, H) are folded, see folded_keys: scores are dot products with that output. weights (U, B, T) holds the
    scores first; the second loop replaces them by the attention weights.
    """
    u = tl.load(position)
    b = tl.program_id(0).to(tl.int64)
    if b == 0:
        tl.store(next_position, u + 1)
    if u < U:
        h, e = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_E)
        length = tl.minimum(tl.load(lengths + b), T).to(tl.int32)
        step = tl.cast(u, tl.int64) * B + b
        row = operands + step * row_size
        at = weights + step * T
        query = tl.load(row + readout_at + h, mask=h < H, other=0.0).to(tl.float32)
        m, l = -float("inf"), 0.0
        for t0 in range(0, length, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            # (BLOCK_T,)
            k_tile = load(keys + b * T * H, t, h, H, length, H)
            s = tl.sum(k_tile.to(tl.float32) * query[None, :], 1)
            s = (s + tl.load(key_bias + b * T + t, mask=t < length, other=0.0)) * scale
            s = tl.where(t < length, s, -float("inf"))
            tl.store(at + t, s, mask=t < length)
            m_new = tl.maximum(m, tl.max(s, 0))
            l = l * tl.exp2(m - m_new) + tl.sum(tl.exp2(s - m_new), 0)
            m = m_new
        tl.debug_barrier()  # other threads read these scores; the sums above may synchronise them too
        # (BLOCK_E,)
        context = tl.zeros([BLOCK_E], tl.float32)
        for t0 in range(0, T, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            s = tl.load(at + t, mask=t < length, other=0.0)
            w = tl.where(t < length, tl.exp2(s - m) / l, 0.0)
            tl.debug_barrier()  # several threads load a score, one of them overwrites it
            tl.store(at + t, w, mask=t < T)
            v_tile = load(values + b * T * E, t, e, E, length, E)
            context += tl.sum(w[:, None] * v_tile.to(tl.float32), 0)
        dtype = operands.dtype.element_ty
        tl.store(row + readout_at + H + e, context.to(dtype), mask=e < E)
        tl.store(row + tl.cast(B, tl.int64) * row_size + context_at + e, context.to(dtype), mask=(e < E) & (u + 1 < U))


@triton.jit(do_not_specialize=["B", "U"])
def choose_kernel(
    operands, project, project_bias, embedding, bias, features, sampled, tokens, B, U, V, M, row_size, readout_at, P,
    position,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Replace token u + 1 of the utterances that sample it by the first of the best tokens of step u."""
    u = tl.load(position)
    if u + 1 < U:
        b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        row = operands + tl.cast(u, tl.int64) * B * row_size + readout_at
        for n0 in range(0, M, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            # (BLOCK_B, BLOCK_N)
            x = matmul(row, project, b, n, row_size, B, M, P, PRECISION, BLOCK_K)
            x += tl.load(project_bias + n, mask=n < M, other=0.0)[None, :]
            x = 0.5 * x * (1.0 + _erf(x * 0.7071067811865476))
            at = features + b[:, None].to(tl.int64) * M + n[None, :]
            tl.store(at, x.to(features.dtype.element_ty), mask=(b[:, None] < B) & (n[None, :] < M))
        tl.debug_barrier()  # features are read by other threads than those that wrote them
        # (BLOCK_B,)
        best = tl.full([BLOCK_B], -float("inf"), tl.float32)
        token = tl.zeros([BLOCK_B], tl.int32)
        for v0 in range(0, V, BLOCK_N):
            v = v0 + tl.arange(0, BLOCK_N)
            # (BLOCK_B, BLOCK_N)
            x = matmul(features, embedding, b, v, M, B, V, M, PRECISION, BLOCK_K)
            x += tl.load(bias + v, mask=v < V, other=0.0)[None, :]
            x = tl.where(v[None, :] < V, x, -float("inf"))
            top = tl.max(x, 1)
            first = tl.min(tl.where(x == top[:, None], v[None, :], 2147483647), 1)
            token = tl.where(top > best, first, token)
            best = tl.maximum(best, top)
        at = (tl.cast(u, tl.int64) + 1) * B + b
        chosen = tl.load(sampled + at, mask=b < B, other=False)
        tl.store(tokens + at, token.to(tl.int64), mask=(b < B) & chosen)


@triton.jit
def _gate(x, weight, gate: tl.constexpr, n, k, H, depth, PRECISION: tl.constexpr):
    """Return x @ w^T; w is rows n and columns k of the weight (4H, depth) of a gate."""
    w = load(weight + gate * H * depth, n, k, depth, H, depth)
    return tl.dot(x, tl.trans(w), input_precision=PRECISION)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _erf(x):
    """Return erf(x) within 1.5e-7 without a branch (Abramowitz and Stegun 1964, 7.1.26)."""
    t = 1.0 / (1.0 + 0.3275911 * tl.abs(x))
    series = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    magnitude = 1.0 - t * series * tl.exp(-x * x)
    return tl.where(x < 0.0, -magnitude, magnitude)


def bind_cells(weights, masks, tokens_read, operands, states, layout: Layout) -> list[Callable[..., None]]:
    (U, B, _), (V, M), sizes = operands.shape, weights.embedding.shape, weights.cell_sizes
    table = mm(weights.embedding, weights.gates[0][:, :M].t(), operands.dtype) + weights.gate_biases[0]  # (V, 4H)
    launches = []
    for n, H in enumerate(sizes):
        output = layout.readout if n + 1 == len(sizes) else layout.operand[n + 1]
        launches.append(partial(
            cell_kernel[matmul_grid(B, H)],
            operands, states, recurrent(weights, n, operands.dtype), table if n == 0 else weights.gate_biases[n],
            tokens_read, masks[n].contiguous() if masks else None, B, U, V, layout.operands, layout.states,
            layout.operand[n], layout.below_size[n], output, layout.cell[n], layout.gates[n], H,
            FIRST=n == 0, MASKED=bool(masks), BLOCK_H=UNITS, **matmul_options(B, operands.dtype),
        ))  # fmt: skip
    return launches


def bind_attend(weights, keys, values, lengths, operands, attention, layout: Layout) -> Callable[..., None]:
    (U, B, T), H, E, dtype = attention.shape, weights.query.shape[1], values.shape[2], operands.dtype
    bias = torch.mv(keys.flatten(0, 1), weights.query_bias)  # (B T,)
    return partial(
        attend_kernel[B,], operands, folded_keys(weights, keys, dtype), bias, values.to(dtype).contiguous(),
        lengths.contiguous(), attention, B, U, T, LOG2_E * keys.shape[2] ** -0.5, layout.operands, layout.readout,
        layout.operand[0], H, E, **attention_options(H, E, dtype),
    )  # fmt: skip


def bind_choose(weights, sampled, tokens_read, operands, layout: Layout) -> Callable[..., None]:
    (U, B, _), (V, M), dtype = operands.shape, weights.embedding.shape, operands.dtype
    return partial(
        choose_kernel[triton.cdiv(B, CHOOSE_ROWS),], operands, weights.project.to(dtype).contiguous(),
        weights.project_bias, weights.embedding.to(dtype).contiguous(), weights.bias, operands.new_empty(B, M),
        sampled.t().contiguous(), tokens_read, B, U, V, M, layout.operands, layout.readout, weights.project.shape[1],
        BLOCK_N=32, **matmul_options(CHOOSE_ROWS, dtype),
    )  # fmt: skip
