"""The steps of a LAS with bfloat16 matmuls, for searches by steps and by CUDA graphs.

Weights, keys, values, hidden states and contexts are bfloat16. Sums of products, gates, cell states, attention scores
and logits are float32. A step launches as many kernels as one in float32: the copy that puts a hidden state or context
into the joined state also converts it, and one matmul computes the part of all gates that depends on the previous
joined state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from las_fast.model.attention import AttentionRead, Memory
from las_fast.model.las import LAS
from las_fast.model.speller import fused_gates
from las_fast.ops import SpellerWeights, beam_gather, masked_attention


class Bf16Weights(NamedTuple):
    """The weights of a speller with n cells of sizes H_i, bfloat16 unless noted.

    N = H_1 + ... + H_n + E; see Bf16State.
    """

    token_gates: Tensor  # (V, 4 * H_1) float32, contribution of each token to the gates of the first cell
    recurrent: Tensor  # (4 * H_1 + ... + 4 * H_n, N) from the previous joined state to the gates of all cells
    below: tuple[Tensor, ...]  # (4 * H_i, H_(i-1)) from the output of the cell below, for each cell but the first
    gate_biases: tuple[Tensor, ...]  # (4 * H_i,) float32
    zeros: tuple[Tensor, ...]  # (4 * H_i,) float32, second bias of the fused kernel
    query: Tensor  # (D, H_n)
    query_bias: Tensor  # (D,)
    project: Tensor  # (M, H_n + E)
    project_bias: Tensor  # (M,)
    embedding: Tensor  # (V, M)
    bias: Tensor  # (V,) float32


class Bf16State(NamedTuple):
    """The recurrent state of K hypotheses of each of B utterances, with the weights that every step reads."""

    joined: Tensor  # (B, K, N) bfloat16: the hidden states of all cells, then the context
    cell: tuple[Tensor, ...]  # (B, K, H_i) float32
    weights: Bf16Weights

    def gather(self, parents: Tensor, *, backend: str = "auto") -> Bf16State:
        """Reorder the state so that hypothesis k of utterance b continues parents[b, k]; parents (B, K) int64."""
        joined, *cell = beam_gather((self.joined, *self.cell), parents, backend=backend)
        return Bf16State(joined, tuple(cell), self.weights)


class Bf16Steps:
    """The methods start and step of a LAS, as beam_search calls them, for a memory with bfloat16 keys and values."""

    def __init__(self, model: LAS):
        self.speller = model.speller

    def start(self, memory: Memory, beam: int) -> Bf16State:
        """Return the state before the first token: zeros for `beam` hypotheses per utterance."""
        sizes, rows = [cell.size for cell in self.speller.cells], (memory.keys.shape[0], beam)
        joined = memory.keys.new_zeros(*rows, sum(sizes) + memory.values.shape[2])
        cell = tuple(memory.keys.new_zeros(*rows, size, dtype=torch.float32) for size in sizes)
        return Bf16State(joined, cell, convert(self.speller.weights()))

    def step(
        self, tokens: Tensor, state: Bf16State, memory: Memory, *, weights: bool = False, backend: str = "auto"
    ) -> tuple[Tensor, AttentionRead, Bf16State]:
        """Advance every hypothesis by one token; see LAS.step."""
        w, joined = state.weights, torch.empty_like(state.joined)
        parts = joined.flatten(0, 1).split([*(cell.shape[2] for cell in state.cell), memory.values.shape[2]], 1)
        cells = _advance_cells(tokens, state, parts[:-1])
        query = torch.addmm(w.query_bias, parts[-2], w.query.t()).view(*tokens.shape, -1)
        context, *read = masked_attention(
            query, *memory[:3], weights=weights, peaks=True, padding=memory.padding, backend=backend
        )
        parts[-1].copy_(context.flatten(0, 1))
        size = w.project.shape[1]
        last = joined.flatten(0, 1).narrow(1, joined.shape[2] - size, size)  # hidden state of the last cell, context
        features = F.gelu(torch.addmm(w.project_bias, last, w.project.t()))
        logits = matmul(features, w.embedding, w.bias).view(*tokens.shape, -1)
        return logits, AttentionRead(*read), Bf16State(joined, cells, w)


def _advance_cells(tokens: Tensor, state: Bf16State, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Write the new hidden states (B*K, H_i) into `hidden`; return the new cell states."""
    w, cells = state.weights, []
    recurrent = matmul(state.joined.flatten(0, 1), w.recurrent).split([len(bias) for bias in w.gate_biases], 1)
    for i, cell in enumerate(state.cell):
        below = matmul(hidden[i - 1], w.below[i - 1]) if i > 0 else F.embedding(tokens, w.token_gates).flatten(0, 1)
        new_hidden, new_cell = lstm(below, recurrent[i], cell.flatten(0, 1), w.gate_biases[i], w.zeros[i])
        hidden[i].copy_(new_hidden)
        cells.append(new_cell.view(cell.shape))
    return tuple(cells)


def convert(weights: SpellerWeights) -> Bf16Weights:
    """Convert the weights of a speller to the form that the steps read."""
    M, biases, bf16 = weights.embedding.shape[1], weights.gate_biases, torch.bfloat16
    sizes = [len(bias) // 4 for bias in biases]
    token, context, hidden = weights.gates[0].split((M, weights.gates[0].shape[1] - M - sizes[0], sizes[0]), 1)
    later = [gates.split((gates.shape[1] - H, H), 1) for gates, H in zip(weights.gates[1:], sizes[1:], strict=True)]
    from_hidden = torch.block_diag(hidden, *(recurrent for _, recurrent in later))
    from_context = F.pad(context, (0, 0, 0, len(from_hidden) - len(context)))  # only the first cell reads it
    return Bf16Weights(
        F.linear(weights.embedding, token),
        torch.cat((from_hidden, from_context), 1).to(bf16),
        tuple(below.to(bf16) for below, _ in later),
        biases,
        tuple(map(torch.zeros_like, biases)),
        weights.query.to(bf16),
        weights.query_bias.to(bf16),
        weights.project.to(bf16),
        weights.project_bias.to(bf16),
        weights.embedding.to(bf16),
        weights.bias,
    )


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight^T + bias, (R, N) float32; x (R, M) and weight (N, M) are bfloat16, bias (N,) is float32."""
    if not x.is_cuda:
        return F.linear(x.float(), weight.float(), bias)
    if bias is None:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return torch.addmm(bias, x, weight.t(), out_dtype=torch.float32)


def lstm(first: Tensor, second: Tensor, cell: Tensor, bias: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Return the new hidden and cell state (R, H) of a cell whose gates are first + second + bias, (R, 4H) float32."""
    if first.is_cuda:
        return fused_gates(first, second, cell, bias, zeros)[:2]
    i, f, g, o = (first + second + bias).chunk(4, -1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell
