"""The decoder pass of training on a GPU. las_fast/ops/speller_unroll.py defines the operation.

Everything that does not depend on the step before is a large matmul outside the loop. Each token then takes one launch
per cell and one for the attention, and one more if tokens are sampled; backward one per cell, one for the attention
and one for the gradient of the first cell's input:

    forward:   cell 1, ..., cell n, attend, [choose]
    backward:  input_gradient, attend_gradient, cell n, ..., cell 1

The query is folded into the keys once per batch: scale (W_q h + b_q) . k = scale (h . (W_q^T k) + b_q . k). The
embedding's part of cell 1 is a table with a row per token.

Kernels write where the next one reads: a cell stores its hidden state into its own row of `operands` for the next step
and its output (after dropout) into the row of the cell above, attention its context into that of cell 1. So `operands`
holds the inputs of each layer at every step, and the gradient of a weight is one matmul over all of them.

The number of the token is read from `position`, two cells of device memory that are used in turn: the attention of
token u reads one and writes u + 1 to the other. So each pass captures a CUDA graph of CHUNK tokens, an even number, and
replays it to the end: that costs the host 16 tokens instead of all. Launches past the last token do nothing.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from las_fast.kernels.masked_attention import LOG2_E, _precision
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 32  # numbers: parts of a row of operands or states start at a multiple, so that loads are wide
CHUNK = 16  # tokens of a CUDA graph
ROWS, UNITS = 32, 16  # utterances and units of a program: many small programs, since each step waits for the last
DEPTH = {torch.bfloat16: 64, torch.float32: 32}  # numbers of a row that one iteration of a matmul takes
TILE = {torch.bfloat16: 8192, torch.float32: 4096}  # numbers of a tile of keys or values


# The latest graphs: the device may still run one when its pass has returned.
_graphs: collections.deque[torch.cuda.CUDAGraph] = collections.deque(maxlen=8)


class Layout(NamedTuple):
    """Where the parts of a row of operands (inputs of each layer) and of states begin, in numbers."""

    operand: tuple[int, ...]  # of each cell: [context or output of the cell below, hidden state]
    below: tuple[int, ...]  # size of the first part of each operand
    readout: int  # operand of the output layer: [output of the last cell, context]
    operands: int  # numbers in a row of operands
    cell: tuple[int, ...]  # of each cell: cell state
    gates: tuple[int, ...]  # of each cell: input, forget, candidate and output gate
    states: int  # numbers in a row of states


def layout(sizes: tuple[int, ...], E: int) -> Layout:
    """Return the layout for cells of these sizes and contexts of E numbers."""
    below = (E, *sizes[:-1])
    *operand, readout, operands = _starts([*(b + h for b, h in zip(below, sizes, strict=True)), sizes[-1] + E])
    starts = _starts([size for h in sizes for size in (h, 4 * h)])
    return Layout(tuple(operand), below, readout, operands, tuple(starts[:-1:2]), tuple(starts[1::2]), starts[-1])


def _starts(sizes: list[int]) -> list[int]:
    """Return where each part begins, and the whole."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return starts


# ------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _load(pointer, rows, columns, stride, row_count, column_count):
    """Load the tile (rows, columns), rows `stride` apart; zeros outside."""
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    return tl.load(pointer + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _matmul(
    x, weight, rows, columns, stride, row_count, column_count, depth, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return x[rows] @ weight[columns]^T, (rows, columns) float32; rows of x lie `stride` apart, of weight `depth`."""
    total = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x_tile = _load(x, rows, k, stride, row_count, depth)
        w_tile = _load(weight, columns, k, depth, column_count, depth)
        total += tl.dot(x_tile, tl.trans(w_tile), input_precision=PRECISION)
    return total


@triton.jit
def _tanh(x):
    """Return tanh(x); exp of a large number may be infinite, which gives 1 or -1."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


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


@triton.jit(do_not_specialize=["B", "U"])
def cell_kernel(
    operands, states, weight, offsets, tokens, masks, B, U, V, row_size, state_size,
    operand_at, below, output_at, cell_at, gates_at, H, position,
    FIRST: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step of a cell for BLOCK_B utterances and BLOCK_H units.

    weight is (4H, below + H); offsets the table (V, 4H) of what each token adds to the gates if FIRST, else (4H,).
    """
    u = tl.load(position)
    if u < U:
        b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        n = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        first = tl.cast(u, tl.int64) * B  # of the rows of this step
        depth = below + H
        # (BLOCK_B, BLOCK_H)
        i = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        f, g, o = i, i, i
        for k0 in range(0, depth, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            # (BLOCK_B, BLOCK_K)
            x = _load(operands + first * row_size + operand_at, b, k, row_size, B, depth)
            i += tl.dot(x, tl.trans(_load(weight, n, k, depth, H, depth)), input_precision=PRECISION)
            f += tl.dot(x, tl.trans(_load(weight + H * depth, n, k, depth, H, depth)), input_precision=PRECISION)
            g += tl.dot(x, tl.trans(_load(weight + 2 * H * depth, n, k, depth, H, depth)), input_precision=PRECISION)
            o += tl.dot(x, tl.trans(_load(weight + 3 * H * depth, n, k, depth, H, depth)), input_precision=PRECISION)
        token = tl.load(tokens + first + b, mask=b < B, other=0) if FIRST else tl.zeros([BLOCK_B], tl.int64)
        i = _sigmoid(i + _load(offsets, token, n, 4 * H, V, H))
        f = _sigmoid(f + _load(offsets + H, token, n, 4 * H, V, H))
        g = _tanh(g + _load(offsets + 2 * H, token, n, 4 * H, V, H))
        o = _sigmoid(o + _load(offsets + 3 * H, token, n, 4 * H, V, H))
        inside = (b[:, None] < B) & (n[None, :] < H)
        row = first + b[:, None]
        before = states + (row - B) * state_size + cell_at + n[None, :]
        cell = f * tl.load(before, mask=inside & (u > 0), other=0.0) + i * g
        hidden = o * _tanh(cell)
        tl.store(states + row * state_size + cell_at + n[None, :], cell, mask=inside)
        gates = states + row * state_size + gates_at + n[None, :]
        tl.store(gates, i, mask=inside)
        tl.store(gates + H, f, mask=inside)
        tl.store(gates + 2 * H, g, mask=inside)
        tl.store(gates + 3 * H, o, mask=inside)
        dtype = operands.dtype.element_ty
        after = operands + (row + B) * row_size + operand_at + below + n[None, :]
        tl.store(after, hidden.to(dtype), mask=inside & (u + 1 < U))
        if MASKED:
            hidden *= _load(masks, b, n, H, B, H)
        tl.store(operands + row * row_size + output_at + n[None, :], hidden.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["B", "U", "T"])
def attend_kernel(
    operands, keys, key_bias, values, lengths, weights, B, U, T, scale, row_size, readout, context_at, H, E,
    position, next_position,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Attend with the output of the last cell of utterance b; scale includes log2(e)."""
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
        query = tl.load(row + readout + h, mask=h < H, other=0.0).to(tl.float32)
        m, l = -float("inf"), 0.0
        for t0 in range(0, length, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            # (BLOCK_T,)
            k_tile = _load(keys + b * T * H, t, h, H, length, H)
            s = tl.sum(k_tile.to(tl.float32) * query[None, :], 1)
            s = (s + tl.load(key_bias + b * T + t, mask=t < length, other=0.0)) * scale
            s = tl.where(t < length, s, -float("inf"))
            tl.store(at + t, s, mask=t < length)
            m_new = tl.maximum(m, tl.max(s, 0))
            l = l * tl.exp2(m - m_new) + tl.sum(tl.exp2(s - m_new), 0)
            m = m_new
        tl.debug_barrier()  # other threads read these scores; the sums above may synchronise them too
        m = tl.where(length > 0, m, 0.0)  # -inf - -inf and 0 / 0 would be NaN
        l = tl.where(length > 0, l, 1.0)
        # (BLOCK_E,)
        context = tl.zeros([BLOCK_E], tl.float32)
        for t0 in range(0, T, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            s = tl.load(at + t, mask=t < length, other=-float("inf"))
            w = tl.where(t < length, tl.exp2(s - m) / l, 0.0)
            tl.debug_barrier()  # several threads load a score, one of them overwrites it
            tl.store(at + t, w, mask=t < T)
            v_tile = _load(values + b * T * E, t, e, E, length, E)
            context += tl.sum(w[:, None] * v_tile.to(tl.float32), 0)
        dtype = operands.dtype.element_ty
        tl.store(row + readout + H + e, context.to(dtype), mask=e < E)
        tl.store(row + tl.cast(B, tl.int64) * row_size + context_at + e, context.to(dtype), mask=(e < E) & (u + 1 < U))


@triton.jit(do_not_specialize=["B", "U"])
def choose_kernel(
    operands, project, project_bias, embedding, bias, features, sampled, tokens, B, U, V, M, row_size, readout, P,
    position,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Replace token u + 1 of the utterances that sample it by the first of the best tokens of step u."""
    u = tl.load(position)
    if u + 1 < U:
        b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        row = operands + tl.cast(u, tl.int64) * B * row_size + readout
        for n0 in range(0, M, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            # (BLOCK_B, BLOCK_N)
            x = _matmul(row, project, b, n, row_size, B, M, P, PRECISION, BLOCK_K)
            x += tl.load(project_bias + n, mask=n < M, other=0.0)[None, :]
            x = 0.5 * x * (1.0 + _erf(x * 0.7071067811865476))
            at = features + b[:, None].to(tl.int64) * M + n[None, :]
            tl.store(at, x.to(features.dtype.element_ty), mask=(b[:, None] < B) & (n[None, :] < M))
        tl.debug_barrier()  # features are read by other threads than wrote them
        # (BLOCK_B,)
        best = tl.full([BLOCK_B], -float("inf"), tl.float32)
        token = tl.zeros([BLOCK_B], tl.int32)
        for v0 in range(0, V, BLOCK_N):
            v = v0 + tl.arange(0, BLOCK_N)
            # (BLOCK_B, BLOCK_N)
            x = _matmul(features, embedding, b, v, M, B, V, M, PRECISION, BLOCK_K)
            x += tl.load(bias + v, mask=v < V, other=0.0)[None, :]
            x = tl.where(v[None, :] < V, x, -float("inf"))
            top = tl.max(x, 1)
            first = tl.min(tl.where(x == top[:, None], v[None, :], 2147483647), 1)
            token = tl.where(top > best, first, token)
            best = tl.maximum(best, top)
        at = (tl.cast(u, tl.int64) + 1) * B + b
        chosen = tl.load(sampled + at, mask=b < B, other=0) != 0
        tl.store(tokens + at, token.to(tl.int64), mask=(b < B) & chosen)


# ------------------------------------------------------------------------------------------------------------ backward


@triton.jit(do_not_specialize=["B", "U"])
def input_gradient_kernel(
    gates_gradient, weight, readout_gradient, context_gradients, hidden_gradient, B, U, row_size, gates_at,
    E, H, H_LAST, position,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of context u and of hidden state u of cell 1 as the input of step u + 1.

    weight is (E + H, 4H). The gradient of the context is complete: that of the output layer is added.
    """
    u = tl.load(position)
    if u >= 0:
        b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        after = gates_gradient + (tl.cast(u, tl.int64) + 1) * B * row_size + gates_at
        depth = tl.where(u + 1 < U, 4 * H, 0)  # the last step has no step after it
        total = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        for k0 in range(0, depth, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            w = _load(weight, n, k, 4 * H, E + H, 4 * H)
            total += tl.dot(_load(after, b, k, row_size, B, 4 * H), tl.trans(w), input_precision=PRECISION)
        inside = (b[:, None] < B) & (n[None, :] < E)
        row = tl.cast(u, tl.int64) * B + b[:, None]
        upstream = readout_gradient + row * (H_LAST + E) + H_LAST + n[None, :]
        context = total + tl.load(upstream, mask=inside, other=0.0)
        tl.store(context_gradients + row * E + n[None, :], context, mask=inside)
        inside = (b[:, None] < B) & (n[None, :] >= E) & (n[None, :] < E + H)
        tl.store(hidden_gradient + b[:, None].to(tl.int64) * H + n[None, :] - E, total, mask=inside)


@triton.jit(do_not_specialize=["B", "U", "T"])
def attend_gradient_kernel(
    context_gradients, weights_gradient, readout_gradient, keys, values, lengths, weights, score_gradients,
    output_gradient, B, U, T, scale, H, E, position,
    WEIGHTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the scores of step u, and of the last cell's output, of utterance b.

    WEIGHTS: whether the attention weights have a gradient themselves.
    """
    u = tl.load(position)
    if u >= 0:
        b = tl.program_id(0).to(tl.int64)
        h, e = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_E)
        length = tl.minimum(tl.load(lengths + b), T).to(tl.int32)
        step = tl.cast(u, tl.int64) * B + b
        # (BLOCK_E,)
        dc = tl.load(context_gradients + step * E + e, mask=e < E, other=0.0)
        delta = 0.0
        for t0 in range(0, length, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            # (BLOCK_T,)
            v_tile = _load(values + b * T * E, t, e, E, length, E)
            dw = tl.sum(v_tile.to(tl.float32) * dc[None, :], 1)
            if WEIGHTS:
                dw += tl.load(weights_gradient + step * T + t, mask=t < length, other=0.0)
            delta += tl.sum(dw * tl.load(weights + step * T + t, mask=t < length, other=0.0), 0)
            tl.store(score_gradients + step * T + t, dw, mask=t < length)
        tl.debug_barrier()  # these are read by other threads than wrote them
        # (BLOCK_H,)
        total = tl.load(readout_gradient + step * (H + E) + h, mask=h < H, other=0.0)
        for t0 in range(0, T, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            dw = tl.load(score_gradients + step * T + t, mask=t < length, other=0.0)
            ds = tl.load(weights + step * T + t, mask=t < length, other=0.0) * (dw - delta) * scale
            tl.debug_barrier()  # several threads load a number, one of them overwrites it
            tl.store(score_gradients + step * T + t, ds, mask=t < T)
            k_tile = _load(keys + b * T * H, t, h, H, length, H)
            total += tl.sum(ds[:, None] * k_tile.to(tl.float32), 0)
        tl.store(output_gradient + b * H + h, total, mask=h < H)


@triton.jit(do_not_specialize=["B", "U"])
def cell_gradient_kernel(
    gates_gradient, states, weight, weight_above, output_gradient, hidden_gradient, cell_gradient, masks,
    B, U, row_size, state_size, cell_at, gates_at, gradient_at, above_at, below, H, H_ABOVE,
    position, next_position,
    FIRST: tl.constexpr, LAST: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the gates of a cell at step u, and its cell state's gradient for step u - 1.

    weight is (below + H, 4H) of this cell, weight_above (H + H_ABOVE, 4 * H_ABOVE) of the cell above. The LAST cell
    takes the gradient of its output from attend_gradient_kernel, the FIRST that of its hidden state from
    input_gradient_kernel.
    """
    u = tl.load(position)
    if FIRST and (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(next_position, u - 1)
    if u >= 0:
        b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        n = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        first = tl.cast(u, tl.int64) * B  # of the rows of this step
        inside = (b[:, None] < B) & (n[None, :] < H)
        # (BLOCK_B, BLOCK_H)
        if LAST:
            gradient = _load(output_gradient, b, n, H, B, H)
        else:
            above = gates_gradient + first * row_size + above_at
            gradient = _matmul(above, weight_above, b, n, row_size, B, H, 4 * H_ABOVE, PRECISION, BLOCK_K)
        if MASKED:
            gradient *= _load(masks, b, n, H, B, H)
        if FIRST:
            gradient += _load(hidden_gradient, b, n, H, B, H)
        else:
            after = gates_gradient + (first + B) * row_size + gradient_at
            rows = tl.where(u + 1 < U, B, 0)  # the last step has no step after it
            recurrent = weight + tl.cast(below, tl.int64) * 4 * H
            gradient += _matmul(after, recurrent, b, n, row_size, rows, H, 4 * H, PRECISION, BLOCK_K)
        row = first + b[:, None]
        state = states + row * state_size + n[None, :]
        i = tl.load(state + gates_at, mask=inside, other=0.0)
        f = tl.load(state + gates_at + H, mask=inside, other=0.0)
        g = tl.load(state + gates_at + 2 * H, mask=inside, other=0.0)
        o = tl.load(state + gates_at + 3 * H, mask=inside, other=0.0)
        tanh_cell = _tanh(tl.load(state + cell_at, mask=inside, other=0.0))
        before = tl.load(state + cell_at - tl.cast(B, tl.int64) * state_size, mask=inside & (u > 0), other=0.0)
        carried = cell_gradient + b[:, None].to(tl.int64) * H + n[None, :]
        dc = gradient * o * (1.0 - tanh_cell * tanh_cell) + tl.load(carried, mask=inside & (u + 1 < U), other=0.0)
        tl.store(carried, dc * f, mask=inside)
        dtype = gates_gradient.dtype.element_ty
        at = gates_gradient + row * row_size + gradient_at + n[None, :]
        tl.store(at, (dc * g * i * (1.0 - i)).to(dtype), mask=inside)
        tl.store(at + H, (dc * before * f * (1.0 - f)).to(dtype), mask=inside)
        tl.store(at + 2 * H, (dc * i * (1.0 - g * g)).to(dtype), mask=inside)
        tl.store(at + 3 * H, (gradient * tanh_cell * o * (1.0 - o)).to(dtype), mask=inside)


# ----------------------------------------------------------------------------------------------------------- launchers


def speller_unroll(
    weights: list[Tensor], keys: Tensor, values: Tensor, lengths: Tensor, tokens: Tensor, sampled: Tensor,
    masks: list[Tensor], bf16: bool, gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the forward pass; the implementation of las_fast::speller_unroll_triton.

    Args:
        sampled: (B, U), or empty if no token is sampled: one launch per token less.
        gradients: ignored; C++ keeps less without them.

    Returns:
        logits (B, U, V), attention (B, U, T), the tokens read (U, B), operands (U, B, *) and states (U, B, *).
    """
    (B, U), V, T, E = tokens.shape, len(weights[0]), keys.shape[1], values.shape[2]
    where = layout(_sizes(weights), E)
    # zeros: the first step's hidden states and context, and the gaps, which torch's checks of the op compare
    operands = keys.new_zeros(U, B, where.operands, dtype=torch.bfloat16 if bf16 else torch.float32)
    states, attention = keys.new_zeros(U, B, where.states), keys.new_empty(U, B, T)
    if B == 0:
        return keys.new_empty(U, B, V).transpose(0, 1), attention.transpose(0, 1), tokens.t().clone(), operands, states
    torch._assert_async(((tokens >= 0) & (tokens < V)).all(), f"tokens must be at least 0 and less than V={V}")
    read = tokens.t().clamp(0, V - 1).contiguous()  # the assertion may stop the program later than the kernels read
    cells = _bind_cells(weights, masks, read, operands, states, where)
    attend = _bind_attend(weights, keys, values, lengths, operands, attention, where)
    choose = _bind_choose(weights, sampled, read, operands, where) if sampled.numel() else None
    position = _positions(keys, 0)

    def spell(u: int) -> None:
        now, after = position[u % 2], position[(u + 1) % 2]
        for cell in cells:
            cell(position=now)
        attend(position=now, next_position=after)
        if choose:
            choose(position=now)

    _repeat(spell, U, keys.device)
    logits = _output_layer(weights, operands, where)[-1]
    return logits.view(U, B, V).transpose(0, 1), attention.transpose(0, 1), read, operands, states


def speller_unroll_backward(
    logits_gradient: Tensor | None, attention_gradient: Tensor | None, weights: list[Tensor], keys: Tensor,
    values: Tensor, lengths: Tensor, masks: list[Tensor], attention: Tensor, read: Tensor, operands: Tensor,
    states: Tensor, bf16: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Launch the backward pass: the gradients of weights, keys and values."""
    (U, B), E = read.shape, values.shape[2]
    if B == 0:
        return [torch.zeros_like(x) for x in weights], torch.zeros_like(keys), torch.zeros_like(values)
    where, starts = layout(_sizes(weights), E), _starts([len(bias) for bias in weights[7::2]])
    readout, output_gradients = _output_layer_gradients(logits_gradient, weights, operands, where)
    gates = operands.new_empty(U, B, starts[-1])
    attention = attention.transpose(0, 1).contiguous()  # (U, B, T)
    contexts, scores = values.new_empty(U, B, E), torch.empty_like(attention)
    output, hidden = (keys.new_empty(B, size) for size in (weights[1].shape[1], _sizes(weights)[0]))
    enter = _bind_input_gradient(weights, readout, gates, contexts, hidden)
    attend = _bind_attend_gradient(
        weights, keys, values, lengths, attention_gradient, attention, readout, contexts, scores, output,
        operands.dtype,
    )  # fmt: skip
    cells = _bind_cell_gradients(weights, masks, gates, states, output, hidden, where, starts)
    position = _positions(keys, U - 1)

    def differentiate(i: int) -> None:
        now, after = position[i % 2], position[(i + 1) % 2]
        enter(position=now)
        attend(position=now)
        for cell in cells:  # the last of them is cell 1, which lowers the position
            cell(position=now, next_position=after)

    _repeat(differentiate, U, keys.device)
    query, query_bias, *memory = _memory_gradients(weights, keys, attention, operands, contexts, scores, where)
    embedding, *of_gates = _gates_gradients(weights, read, operands, gates, where, starts)
    output_gradients[0] += embedding
    return [output_gradients[0], query, query_bias, *output_gradients[1:], *of_gates], *memory


def _positions(like: Tensor, start: int) -> Tensor:
    """Return two cells with the number of the first token, 16 bytes apart: Triton compiles by alignment."""
    return like.new_full((2, 4), start, dtype=torch.int32)


def _repeat(launch: Callable[[int], None], tokens: int, device: torch.device) -> None:
    """Launch token 0, 1, ..., tokens - 1: the first by itself, which compiles the kernels, the others by a graph."""
    if not _captures(tokens, device):
        for i in range(tokens):
            launch(i)
        return
    launch(0)
    graph = _capture(launch)
    for _ in range(triton.cdiv(tokens - 1, CHUNK)):
        graph.replay()
    _graphs.append(graph)


def _captures(tokens: int, device: torch.device) -> bool:
    """Return whether a graph pays: not if it is replayed once, nor inside the capture of a graph of the caller's."""
    return device.type == "cuda" and tokens > 1 + CHUNK and not torch.cuda.is_current_stream_capturing()


def _capture(launch: Callable[[int], None]) -> torch.cuda.CUDAGraph:
    """Return a graph of CHUNK tokens. Unlike torch.cuda.graph this neither waits for the device nor frees memory."""
    current, stream, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        # thread_local: other threads, such as one that pins a batch, must not invalidate the capture.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for i in range(1, 1 + CHUNK):
                launch(i)
        finally:
            graph.capture_end()
    current.wait_stream(stream)
    return graph


def _sizes(weights: list[Tensor]) -> tuple[int, ...]:
    """Return the number of units of each cell."""
    return tuple(len(bias) // 4 for bias in weights[7::2])


def _recurrent(weights: list[Tensor], n: int, dtype: torch.dtype) -> Tensor:
    """Return the weights of cell n (4H, below + H) in that type: without the part of the embedding."""
    return weights[6 + 2 * n][:, weights[0].shape[1] if n == 0 else 0 :].to(dtype).contiguous()


def _mm(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x @ y float32, computed in that type."""
    return torch.mm(x.to(dtype), y.to(dtype)).float()


def _bmm(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.bmm(x.to(dtype), y.to(dtype)).float()


def _matmul_options(B: int, dtype: torch.dtype) -> dict:
    return {"PRECISION": _precision(), "BLOCK_B": 16 if B <= 16 else ROWS, "BLOCK_K": DEPTH[dtype]}


def _matmul_grid(B: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(B, ROWS), triton.cdiv(columns, UNITS)


def _attention_options(H: int, E: int, dtype: torch.dtype) -> dict:
    """Return the tiles of the attention kernels, at most TILE numbers of keys or values."""
    h, e = triton.next_power_of_2(H), triton.next_power_of_2(E)
    return {"BLOCK_T": max(1, min(64, TILE[dtype] // max(h, e))), "BLOCK_H": h, "BLOCK_E": e, "num_warps": 8}


def _bind_cells(weights, masks, read, operands, states, where: Layout) -> list[Callable[..., None]]:
    (U, B, _), (V, M), sizes = operands.shape, weights[0].shape, _sizes(weights)
    table = _mm(weights[0], weights[6][:, :M].t(), operands.dtype) + weights[7]  # (V, 4H)
    launches = []
    for n, H in enumerate(sizes):
        output = where.readout if n + 1 == len(sizes) else where.operand[n + 1]
        launches.append(partial(
            cell_kernel[_matmul_grid(B, H)],
            operands, states, _recurrent(weights, n, operands.dtype), table if n == 0 else weights[7 + 2 * n], read,
            masks[n].contiguous() if masks else None, B, U, V, where.operands, where.states,
            where.operand[n], where.below[n], output, where.cell[n], where.gates[n], H,
            FIRST=n == 0, MASKED=bool(masks), BLOCK_H=UNITS, **_matmul_options(B, operands.dtype),
        ))  # fmt: skip
    return launches


def _folded_keys(weights: list[Tensor], keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return keys @ query, (B, T, H): scores are products with the last cell's output instead of with the query."""
    return _mm(keys.flatten(0, 1), weights[1], dtype).to(dtype).view(*keys.shape[:2], weights[1].shape[1])


def _bind_attend(weights, keys, values, lengths, operands, attention, where: Layout) -> Callable[..., None]:
    (U, B, T), H, E, dtype = attention.shape, weights[1].shape[1], values.shape[2], operands.dtype
    bias = torch.mv(keys.flatten(0, 1), weights[2])  # (B T,)
    return partial(
        attend_kernel[B,], operands, _folded_keys(weights, keys, dtype), bias, values.to(dtype).contiguous(),
        lengths.contiguous(), attention, B, U, T, LOG2_E * keys.shape[2] ** -0.5, where.operands, where.readout,
        where.operand[0], H, E, **_attention_options(H, E, dtype),
    )  # fmt: skip


def _bind_choose(weights, sampled, read, operands, where: Layout) -> Callable[..., None]:
    (U, B, _), (V, M), dtype = operands.shape, weights[0].shape, operands.dtype
    embedding, _, _, project, project_bias, bias = weights[:6]
    return partial(
        choose_kernel[triton.cdiv(B, 16),], operands, project.to(dtype).contiguous(), project_bias,
        embedding.to(dtype).contiguous(), bias, operands.new_empty(B, M), sampled.t().contiguous(), read, B, U, V, M,
        where.operands, where.readout, project.shape[1], BLOCK_N=32, **_matmul_options(16, dtype),
    )  # fmt: skip


def _output_layer(weights: list[Tensor], operands: Tensor, where: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input of the gelu and its output (U B, M), and the logits (U B, V), all float32."""
    embedding, _, _, project, project_bias, bias = weights[:6]
    x = _part(operands, where.readout, project.shape[1])
    hidden = _mm(x, project.t(), operands.dtype) + project_bias
    features = F.gelu(hidden)
    return hidden, features, _mm(features, embedding.t(), operands.dtype) + bias


def _output_layer_gradients(gradient, weights, operands, where: Layout) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of the output layer's input (U B, H + E), and of embedding, project, its bias and bias."""
    embedding, _, _, project, project_bias, bias = weights[:6]
    (U, B, _), P, dtype = operands.shape, project.shape[1], operands.dtype
    if gradient is None:
        none = [torch.zeros_like(x) for x in (embedding, project, project_bias, bias)]
        return operands.new_zeros(U * B, P, dtype=torch.float32), none
    gradient = gradient.transpose(0, 1).reshape(U * B, -1)
    hidden, features, _ = _output_layer(weights, operands, where)
    hidden_gradient = torch.ops.aten.gelu_backward(_mm(gradient, embedding, dtype), hidden)
    x = _part(operands, where.readout, P)
    of_weights = [
        _mm(gradient.t(), features, dtype), _mm(hidden_gradient.t(), x, dtype), hidden_gradient.sum(0), gradient.sum(0)
    ]  # fmt: skip
    return _mm(hidden_gradient, project, dtype), of_weights


def _part(rows: Tensor, start: int, size: int) -> Tensor:
    """Return part of each row of operands or of gates (U, B, *), as (U B, size)."""
    return rows[..., start : start + size].flatten(0, 1)


def _bind_input_gradient(weights, readout, gates, contexts, hidden) -> Callable[..., None]:
    (U, B, row_size), E, H = gates.shape, contexts.shape[2], hidden.shape[1]
    weight = _recurrent(weights, 0, gates.dtype).t().contiguous()
    return partial(
        input_gradient_kernel[_matmul_grid(B, E + H)], gates, weight, readout, contexts,
        hidden, B, U, row_size, 0, E, H, weights[1].shape[1], BLOCK_N=UNITS, **_matmul_options(B, gates.dtype),
    )  # fmt: skip


def _bind_attend_gradient(
    weights, keys, values, lengths, attention_gradient, attention, readout, contexts, scores, output, dtype
) -> Callable[..., None]:
    (U, B, T), H, E = attention.shape, output.shape[1], values.shape[2]
    upstream = None if attention_gradient is None else attention_gradient.transpose(0, 1).contiguous()
    return partial(
        attend_gradient_kernel[B,], contexts, upstream, readout, _folded_keys(weights, keys, dtype),
        values.to(dtype).contiguous(), lengths.contiguous(), attention, scores, output, B, U, T,
        keys.shape[2] ** -0.5, H, E, WEIGHTS=upstream is not None, **_attention_options(H, E, dtype),
    )  # fmt: skip


def _bind_cell_gradients(
    weights, masks, gates, states, output, hidden, where: Layout, starts: list[int]
) -> list[Callable[..., None]]:
    """Return the launches of the cells' gradients, from the last cell to the first."""
    (U, B, _), sizes = gates.shape, _sizes(weights)
    transposed = [_recurrent(weights, n, gates.dtype).t().contiguous() for n in range(len(sizes))]
    launches = []
    for n, H in reversed(list(enumerate(sizes))):
        above = min(n + 1, len(sizes) - 1)  # of the last cell: never read
        launches.append(partial(
            cell_gradient_kernel[_matmul_grid(B, H)],
            gates, states, transposed[n], transposed[above], output, hidden, states.new_empty(B, H),
            masks[n].contiguous() if masks else None, B, U, starts[-1], where.states, where.cell[n], where.gates[n],
            starts[n], starts[above], where.below[n], H, sizes[above],
            FIRST=n == 0, LAST=n + 1 == len(sizes), MASKED=bool(masks), BLOCK_H=UNITS,
            **_matmul_options(B, gates.dtype),
        ))  # fmt: skip
    return launches


def _memory_gradients(weights, keys, attention, operands, contexts, scores, where: Layout) -> tuple[Tensor, ...]:
    """Return the gradients of query, its bias, keys and values."""
    H, dtype = weights[1].shape[1], operands.dtype
    outputs = operands[..., where.readout : where.readout + H].transpose(0, 1)
    folded = _bmm(scores.permute(1, 2, 0), outputs, dtype).flatten(0, 1)  # (B T, H)
    bias = scores.sum(0).flatten()  # (B T,)
    keys_gradient = _mm(folded, weights[1].t(), dtype) + bias[:, None] * weights[2]
    query = _mm(keys.flatten(0, 1).t(), folded, dtype)
    values_gradient = _bmm(attention.permute(1, 2, 0), contexts.transpose(0, 1), dtype)
    return query, torch.mv(keys.flatten(0, 1).t(), bias), keys_gradient.view(keys.shape), values_gradient


def _gates_gradients(weights, read, operands, gates, where: Layout, starts: list[int]) -> list[Tensor]:
    """Return the gradients of the embedding as input of cell 1, and of the weights and biases of each cell."""
    embedding, dtype, gradients = weights[0], operands.dtype, []
    for n, H in enumerate(_sizes(weights)):
        of_gates = _part(gates, starts[n], 4 * H)
        weight = _mm(of_gates.t(), _part(operands, where.operand[n], where.below[n] + H), dtype)
        gradients += [weight, of_gates.float().sum(0)]
    first = _part(gates, starts[0], len(weights[7])).float()
    table = torch.ops.aten.embedding_dense_backward(first, read.flatten(), len(embedding), -1, False)  # (V, 4H)
    gradients[0] = torch.cat((_mm(table.t(), embedding, dtype), gradients[0]), 1)
    return [_mm(table, weights[6][:, : embedding.shape[1]], dtype), *gradients]
