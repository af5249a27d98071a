"""Loads, matmuls and functions of tiles, which several kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


def float32_precision() -> str:
    """Return Triton's name of torch's float32 matmul precision; this setting reflects all of torch's ways to set it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def load(pointer, rows, columns, stride, row_count, column_count):
    """Load the tile (rows, columns), rows `stride` apart; zeros outside."""
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    return tl.load(pointer + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def matmul(
    x, weight, rows, columns, stride, row_count, column_count, depth, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return x[rows] @ weight[columns]^T, (rows, columns) float32; rows of x lie `stride` apart, of weight `depth`."""
    total = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x_tile = load(x, rows, k, stride, row_count, depth)
        w_tile = load(weight, columns, k, depth, column_count, depth)
        total += tl.dot(x_tile, tl.trans(w_tile), input_precision=PRECISION)
    return total


@triton.jit
def tanh(x):
    """Return tanh(x); exp of a large number may be infinite, which gives 1 or -1."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
