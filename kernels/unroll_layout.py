"""Shared by both passes of speller_unroll: the layout of their buffers, the tiles of their launches, and matmuls."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from las_fast.kernels.tiles import float32_precision
from torch import Tensor
from torch.nn import functional as F

from las_fast.ops import SpellerWeights

ALIGNMENT = 32  # numbers: parts of a row of operands or states start at a multiple, so that loads are wide
ROWS, UNITS = 32, 16  # utterances and units per program: many small programs, since a step waits for the previous one
DEPTH = {torch.bfloat16: 64, torch.float32: 32}  # numbers of a row that one iteration of a matmul takes
TILE = {torch.bfloat16: 8192, torch.float32: 4096}  # elements per tile of keys or values


class Layout(NamedTuple):
    """Where the parts of a row of operands (inputs of each layer) and of states begin, in numbers."""

    operand: tuple[int, ...]  # of each cell: [context or output of the cell below, hidden state]
    below_size: tuple[int, ...]  # size of the first part of each operand
    readout: int  # operand of the output layer: [output of the last cell, context]
    operands: int  # numbers in a row of operands
    cell: tuple[int, ...]  # of each cell: cell state
    gates: tuple[int, ...]  # of each cell: input, forget, candidate and output gate
    states: int  # numbers in a row of states


def make_layout(sizes: list[int], E: int) -> Layout:
    """Return the layout for cells of these sizes and contexts of E numbers."""
    below = (E, *sizes[:-1])
    *operand, readout, operands = part_starts([*(b + h for b, h in zip(below, sizes, strict=True)), sizes[-1] + E])
    starts = part_starts([size for h in sizes for size in (h, 4 * h)])
    return Layout(tuple(operand), below, readout, operands, tuple(starts[:-1:2]), tuple(starts[1::2]), starts[-1])


def part_starts(sizes: list[int]) -> list[int]:
    """Return the start of each part, then the total size."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return starts


def part(rows: Tensor, start: int, size: int) -> Tensor:
    """Return part of each row of operands or of gates (U, B, *), as (U B, size)."""
    return rows[..., start : start + size].flatten(0, 1)


def recurrent(weights: SpellerWeights, n: int, dtype: torch.dtype) -> Tensor:
    """Return the weights of cell n without the columns of the embedding, (4H, below_size + H), in that dtype."""
    return weights.gates[n][:, weights.embedding.shape[1] if n == 0 else 0 :].to(dtype).contiguous()


def matmul_options(B: int, dtype: torch.dtype) -> dict:
    return {"PRECISION": float32_precision(), "BLOCK_B": 16 if B <= 16 else ROWS, "BLOCK_K": DEPTH[dtype]}


def matmul_grid(B: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(B, ROWS), triton.cdiv(columns, UNITS)


def attention_options(H: int, E: int, dtype: torch.dtype) -> dict:
    """Return the tiles of the attention kernels, at most TILE numbers of keys or values."""
    h, e = triton.next_power_of_2(H), triton.next_power_of_2(E)
    return {"BLOCK_T": max(1, min(64, TILE[dtype] // max(h, e))), "BLOCK_H": h, "BLOCK_E": e, "num_warps": 8}


def mm(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x @ y in float32, computed in that dtype."""
    return torch.mm(x.to(dtype), y.to(dtype)).float()


def bmm(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.bmm(x.to(dtype), y.to(dtype)).float()


def folded_keys(weights: SpellerWeights, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return keys @ W_q, (B, T, H), so that scores are dot products with the last cell's output, not with the query."""
    return mm(keys.flatten(0, 1), weights.query, dtype).to(dtype).view(*keys.shape[:2], weights.query.shape[1])


def output_layer(weights: SpellerWeights, operands: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input of the gelu and its output (U B, M), and the logits (U B, V), all float32."""
    x = part(operands, layout.readout, weights.project.shape[1])
    hidden = mm(x, weights.project.t(), operands.dtype) + weights.project_bias
    features = F.gelu(hidden)
    return hidden, features, mm(features, weights.embedding.t(), operands.dtype) + weights.bias
