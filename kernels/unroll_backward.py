"""The backward kernels of speller_unroll, and the gradients that are one matmul over all steps.

bind_input_gradient and bind_attend_gradient return a kernel's launch with all arguments but `position`.
bind_cell_gradients returns a launch per cell, from the last to the first, with all arguments but `position` and
`next_position`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from las_fast.kernels.tiles import load, matmul, tanh
from las_fast.kernels.unroll_layout import (
    UNITS,
    Layout,
    attention_options,
    bmm,
    folded_keys,
    matmul_grid,
    matmul_options,
    mm,
    output_layer,
    part,
    recurrent,
)
from torch import Tensor


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
        depth = tl.where(u + 1 < U, 4 * H, 0)  # no step follows the last
        total = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        for k0 in range(0, depth, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            w = load(weight, n, k, 4 * H, E + H, 4 * H)
            total += tl.dot(load(after, b, k, row_size, B, 4 * H), tl.trans(w), input_precision=PRECISION)
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
            v_tile = load(values + b * T * E, t, e, E, length, E)
            dw = tl.sum(v_tile.to(tl.float32) * dc[None, :], 1)
            if WEIGHTS:
                dw += tl.load(weights_gradient + step * T + t, mask=t < length, other=0.0)
            delta += tl.sum(dw * tl.load(weights + step * T + t, mask=t < length, other=0.0), 0)
            tl.store(score_gradients + step * T + t, dw, mask=t < length)
        tl.debug_barrier()  # these are read by other threads than those that wrote them
        # (BLOCK_H,)
        total = tl.load(readout_gradient + step * (H + E) + h, mask=h < H, other=0.0)
        for t0 in range(0, T, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            dw = tl.load(score_gradients + step * T + t, mask=t < length, other=0.0)
            ds = tl.load(weights + step * T + t, mask=t < length, other=0.0) * (dw - delta) * scale
            tl.debug_barrier()  # several threads load a number, one of them overwrites it
            tl.store(score_gradients + step * T + t, ds, mask=t < T)
            k_tile = load(keys + b * T * H, t, h, H, length, H)
            total += tl.sum(ds[:, None] * k_tile.to(tl.float32), 0)
        tl.store(output_gradient + b * H + h, total, mask=h < H)


@triton.jit(do_not_specialize=["B", "U"])
def cell_gradient_kernel(
    gates_gradient, states, weight, weight_above, output_gradient, hidden_gradient, cell_gradient, masks,
    B, U, row_size, state_size, cell_at, gates_at, gradient_at, above_at, below_size, H, H_ABOVE,
    position, next_position,
    FIRST: tl.constexpr, LAST: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the gates of a cell at step u, and its cell state's gradient for step u - 1.

    weight is (below_size + H, 4H) of this cell, weight_above (H + H_ABOVE, 4 * H_ABOVE) of the cell above. The LAST
    cell takes the gradient of its output from attend_gradient_kernel, the FIRST that of its hidden state from
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
            gradient = load(output_gradient, b, n, H, B, H)
        else:
            above = gates_gradient + first * row_size + above_at
            gradient = matmul(above, weight_above, b, n, row_size, B, H, 4 * H_ABOVE, PRECISION, BLOCK_K)
        if MASKED:
            gradient *= load(masks, b, n, H, B, H)
        if FIRST:
            gradient += load(hidden_gradient, b, n, H, B, H)
        else:
            after = gates_gradient + (first + B) * row_size + gradient_at
            rows = tl.where(u + 1 < U, B, 0)  # no step follows the last
            recurrent = weight + tl.cast(below_size, tl.int64) * 4 * H
            gradient += matmul(after, recurrent, b, n, row_size, rows, H, 4 * H, PRECISION, BLOCK_K)
        row = first + b[:, None]
        state = states + row * state_size + n[None, :]
        i = tl.load(state + gates_at, mask=inside, other=0.0)
        f = tl.load(state + gates_at + H, mask=inside, other=0.0)
        g = tl.load(state + gates_at + 2 * H, mask=inside, other=0.0)
        o = tl.load(state + gates_at + 3 * H, mask=inside, other=0.0)
        tanh_cell = tanh(tl.load(state + cell_at, mask=inside, other=0.0))
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


def bind_input_gradient(weights, readout, gates, contexts, hidden) -> Callable[..., None]:
    (U, B, row_size), E, H = gates.shape, contexts.shape[2], hidden.shape[1]
    weight = recurrent(weights, 0, gates.dtype).t().contiguous()
    return partial(
        input_gradient_kernel[matmul_grid(B, E + H)], gates, weight, readout, contexts,
        hidden, B, U, row_size, 0, E, H, weights.query.shape[1], BLOCK_N=UNITS, **matmul_options(B, gates.dtype),
    )  # fmt: skip


def bind_attend_gradient(
    weights, keys, values, lengths, attention_gradient, attention, readout, contexts, scores, output, dtype
) -> Callable[..., None]:
    (U, B, T), H, E = attention.shape, output.shape[1], values.shape[2]
    upstream = None if attention_gradient is None else attention_gradient.transpose(0, 1).contiguous()
    return partial(
        attend_gradient_kernel[B,], contexts, upstream, readout, folded_keys(weights, keys, dtype),
        values.to(dtype).contiguous(), lengths.contiguous(), attention, scores, output, B, U, T,
        keys.shape[2] ** -0.5, H, E, WEIGHTS=upstream is not None, **attention_options(H, E, dtype),
    )  # fmt: skip


def bind_cell_gradients(
    weights, masks, gates, states, output, hidden, layout: Layout, starts: list[int]
) -> list[Callable[..., None]]:
    """Return the launches of the cells' gradients, from the last cell to the first."""
    (U, B, _), sizes = gates.shape, weights.cell_sizes
    transposed = [recurrent(weights, n, gates.dtype).t().contiguous() for n in range(len(sizes))]
    launches = []
    for n, H in reversed(list(enumerate(sizes))):
        above = min(n + 1, len(sizes) - 1)  # not read for the last cell
        launches.append(partial(
            cell_gradient_kernel[matmul_grid(B, H)],
            gates, states, transposed[n], transposed[above], output, hidden, states.new_empty(B, H),
            masks[n].contiguous() if masks else None, B, U, starts[-1], layout.states, layout.cell[n], layout.gates[n],
            starts[n], starts[above], layout.below_size[n], H, sizes[above],
            FIRST=n == 0, LAST=n + 1 == len(sizes), MASKED=bool(masks), BLOCK_H=UNITS,
            **matmul_options(B, gates.dtype),
        ))  # fmt: skip
    return launches


def output_layer_gradients(gradient, weights, operands, layout: Layout) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of the output layer's input (U B, H + E), and of embedding, project, its bias and bias."""
    (U, B, _), P, dtype = operands.shape, weights.project.shape[1], operands.dtype
    if gradient is None:
        trained = (weights.embedding, weights.project, weights.project_bias, weights.bias)
        none = [torch.zeros_like(x) for x in trained]
        return operands.new_zeros(U * B, P, dtype=torch.float32), none
    gradient = gradient.transpose(0, 1).reshape(U * B, -1)
    hidden, features, _ = output_layer(weights, operands, layout)
    hidden_gradient = torch.ops.aten.gelu_backward(mm(gradient, weights.embedding, dtype), hidden)
    x = part(operands, layout.readout, P)
    weight_gradients = [
        mm(gradient.t(), features, dtype), mm(hidden_gradient.t(), x, dtype), hidden_gradient.sum(0), gradient.sum(0)
    ]  # fmt: skip
    return mm(hidden_gradient, weights.project, dtype), weight_gradients


def memory_gradients(weights, keys, attention, operands, contexts, scores, layout: Layout) -> tuple[Tensor, ...]:
    """Return the gradients of query, its bias, keys and values."""
    H, dtype = weights.query.shape[1], operands.dtype
    outputs = operands[..., layout.readout : layout.readout + H].transpose(0, 1)
    folded = bmm(scores.permute(1, 2, 0), outputs, dtype).flatten(0, 1)  # (B T, H)
    bias = scores.sum(0).flatten()  # (B T,)
    keys_gradient = mm(folded, weights.query.t(), dtype) + bias[:, None] * weights.query_bias
    query = mm(keys.flatten(0, 1).t(), folded, dtype)
    values_gradient = bmm(attention.permute(1, 2, 0), contexts.transpose(0, 1), dtype)
    return query, torch.mv(keys.flatten(0, 1).t(), bias), keys_gradient.view(keys.shape), values_gradient


def gates_gradients(weights, tokens_read, operands, gates, layout: Layout, starts: list[int]) -> list[Tensor]:
    """Return the gradients of the embedding as input of cell 1, and of the weights and biases of each cell."""
    embedding, dtype, gradients = weights.embedding, operands.dtype, []
    for n, H in enumerate(weights.cell_sizes):
        cell_gates = part(gates, starts[n], 4 * H)
        weight = mm(cell_gates.t(), part(operands, layout.operand[n], layout.below_size[n] + H), dtype)
        gradients += [weight, cell_gates.float().sum(0)]
    first = part(gates, starts[0], len(weights.gate_biases[0])).float()
    table = torch.ops.aten.embedding_dense_backward(first, tokens_read.flatten(), len(embedding), -1, False)  # (V, 4H)
    gradients[0] = torch.cat((mm(table.t(), embedding, dtype), gradients[0]), 1)
    return [mm(table, weights.gates[0][:, : embedding.shape[1]], dtype), *gradients]
