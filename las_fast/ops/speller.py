"""The speller's weights and one step of it, which speller_search and speller_unroll share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from las_fast.ops.masked_attention import masked_attention

TINY = 1e-30  # a row whose largest magnitude is at most this is quantised to zeros: 127 / largest could overflow


class SpellerWeights(NamedTuple):
    """All weights of the speller, float32. M is the size of the embedding, H_i that of cell i."""

    embedding: Tensor  # (V, M)
    query: Tensor  # (D, H_last)
    query_bias: Tensor  # (D,)
    project: Tensor  # (M, H_last + E)
    project_bias: Tensor  # (M,)
    bias: Tensor  # (V,)
    gates: tuple[Tensor, ...]  # (4 * H_1, M + E + H_1), then (4 * H_i, H_(i-1) + H_i); input, forget, cell, output
    gate_biases: tuple[Tensor, ...]  # (4 * H_i,)

    @property
    def cell_sizes(self) -> list[int]:
        """H_i of each cell."""
        return [bias.shape[0] // 4 for bias in self.gate_biases]

    def flat(self) -> list[Tensor]:
        """Return all tensors in the order of the C++ op."""
        return [*self[:6], *(x for cell in zip(self.gates, self.gate_biases, strict=True) for x in cell)]

    @classmethod
    def from_flat(cls, tensors: Sequence[Tensor]) -> SpellerWeights:
        """Return the weights whose flat() is `tensors`."""
        embedding, query, query_bias, project, project_bias, bias, *cells = tensors
        return cls(embedding, query, query_bias, project, project_bias, bias, tuple(cells[::2]), tuple(cells[1::2]))


class State(NamedTuple):
    """The recurrent state of the speller between two tokens."""

    hidden: tuple[Tensor, ...]  # (B, K, H_i) for each cell
    cell: tuple[Tensor, ...]  # (B, K, H_i) for each cell
    context: Tensor  # (B, K, E)


def initial_state(weights: SpellerWeights, values: Tensor, beam: int) -> State:
    """Return the state before the first token: zeros."""
    zeros = tuple(values.new_zeros(values.shape[0], beam, size) for size in weights.cell_sizes)
    return State(zeros, zeros, values.new_zeros(values.shape[0], beam, values.shape[2]))


def step(
    weights: SpellerWeights, keys, values, lengths, tokens: Tensor, state: State,
    masks: Sequence[Tensor] | None = None, *, int8: bool = False,
) -> tuple[Tensor, Tensor, Tensor, State]:  # fmt: skip
    """Return logits (B, K, V), attention weights (B, K, T), their peaks (B, K) and the next state.

    masks (B, 1, H_i) multiply the output of each cell (dropout). int8: compute as speller_search with precision "int8".
    """
    below, hiddens, cells = weights.embedding[tokens], [], []
    for n, (gates, bias) in enumerate(zip(weights.gates, weights.gate_biases, strict=True)):
        parts = [below, torch.cat((state.context, state.hidden[0]), -1) if n == 0 else state.hidden[n]]
        i, f, g, o = (_gates_int8(n, parts, gates, bias) if int8 else _gates(parts, gates, bias)).chunk(4, -1)
        cells.append(torch.sigmoid(f) * state.cell[n] + torch.sigmoid(i) * torch.tanh(g))
        hiddens.append(torch.sigmoid(o) * torch.tanh(cells[-1]))
        below = hiddens[-1] if masks is None else hiddens[-1] * masks[n]
    query = F.linear(below, weights.query, weights.query_bias)
    context, attended, peaks = masked_attention(query, keys, values, lengths, peaks=True, backend="reference")
    features = F.gelu(F.linear(torch.cat((below, context), -1), weights.project, weights.project_bias))
    logits = F.linear(features, weights.embedding, weights.bias)
    return logits, attended, peaks, State(tuple(hiddens), tuple(cells), context)


def _gates(parts: list[Tensor], weights: Tensor, bias: Tensor) -> Tensor:
    return F.linear(torch.cat(parts, -1), weights, bias)


def _gates_int8(cell: int, parts: list[Tensor], weights: Tensor, bias: Tensor) -> Tensor:
    first, second = weights.split([part.shape[-1] for part in parts], 1)
    # C++ looks up the token's part of cell 0 in a table, which is not quantised.
    below = (F.linear if cell == 0 else linear_int8)(parts[0], first)
    return below + linear_int8(parts[1], second) + bias


def linear_int8(x: Tensor, weights: Tensor) -> Tensor:
    """Return x @ weights^T, (..., N), with both quantised to int8: x (..., M) and weights (N, M), one scale per row.

    Symmetric and dynamic: the largest magnitude of each row becomes 127.
    """
    (rows, scale), (columns, column_scale) = _quantise(x), _quantise(weights)
    return (F.linear(rows, columns) * (scale * column_scale[..., 0])).to(x.dtype)


def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers from -127 to 127 in float64, where matmuls of them are exact, and the scales (..., 1)."""
    largest = x.float().abs().amax(-1, keepdim=True)
    factor = torch.where(largest > TINY, 127 / largest, 0.0)
    return (x * factor).round().double(), largest.double() / 127  # not 1 / factor, which is rounded to float32


def check_memory(weights: SpellerWeights, keys: Tensor, values: Tensor) -> None:
    """Raise ValueError unless keys and values have the shapes and dtype that these weights need."""
    for name, x in (("keys", keys), ("values", values)):
        if x.ndim != 3 or x.dtype != torch.float32:
            raise ValueError(f"{name} must be (B, T, size) float32; got {tuple(x.shape)} {x.dtype}")
    (B, T, _), D = keys.shape, weights.query.shape[0]
    if keys.shape[2] != D:
        raise ValueError(f"keys must be (B, T, D) with D={D} like query; got {tuple(keys.shape)}")
    E = weights.project.shape[1] - weights.query.shape[1]
    if values.shape != (B, T, E):
        raise ValueError(f"values must be (B, T, E) with B={B}, T={T}, E={E}; got {tuple(values.shape)}")
