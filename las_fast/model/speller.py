"""Speller: the decoder. It has an embedding, LSTM cells, attention and an output layer tied to the embedding.

Training computes all tokens in one call of ops.speller_unroll. A search computes one token at a time with Speller.step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from las_fast.config import SpellerConfig
from las_fast.model.attention import Attention, AttentionRead, Memory
from las_fast.model.layers import draw_rows, dropout_mask, initialise_lstm
from las_fast.ops import SpellerWeights, beam_gather, speller_unroll
from las_fast.ops.speller_unroll import PRECISIONS
from las_fast.text import PAD, SOS

FORBIDDEN_LOGIT = -1e4  # of <pad> and <sos>: finite in half precision, and its softmax is exactly 0 in float32


class StepConstants(NamedTuple):
    """Tensors computed once per search and read at every step."""

    bias: Tensor  # (V,) output bias, FORBIDDEN_LOGIT included
    token_gates: Tensor | None  # (V, 4H) on CUDA: contribution of each token to the gates of the first cell
    zeros: tuple[Tensor, ...]  # (4H,) per cell on CUDA: second bias of the fused kernel


class SpellerState(NamedTuple):
    """Recurrent state of the speller for K hypotheses of each of B utterances."""

    hidden: tuple[Tensor, ...]  # (B, K, H) per cell
    cell: tuple[Tensor, ...]  # (B, K, H) per cell, float32
    context: Tensor  # (B, K, E)
    constants: StepConstants

    def gather(self, parents: Tensor, *, backend: str = "auto") -> SpellerState:
        """Reorder the state so that hypothesis k of utterance b continues parents[b, k]; parents (B, K) int64."""
        n = len(self.hidden)
        gathered = beam_gather((*self.hidden, *self.cell, self.context), parents, backend=backend)
        return SpellerState(gathered[:n], gathered[n:-1], gathered[-1], self.constants)


class LSTMCell(nn.Module):
    """One step of an LSTM with a single matmul for inputs and state; the cell state stays in float32."""

    def __init__(self, input_size: int, size: int):
        super().__init__()
        self.size = size
        self.gates = nn.Linear(input_size + size, 4 * size)  # input, forget, cell, output, as in nn.LSTM
        with torch.no_grad():
            weight_ih, weight_hh = self.gates.weight.split((input_size, size), 1)
            initialise_lstm("weight_ih", weight_ih)
            initialise_lstm("weight_hh", weight_hh)
            initialise_lstm("bias_ih", self.gates.bias)

    def forward(self, inputs: tuple[Tensor, ...], hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new hidden and cell state (B, K, H) for inputs (B, K, ...), which are concatenated."""
        i, f, g, o = self.gates(torch.cat((*inputs, hidden), -1)).float().chunk(4, -1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell

    def fused(
        self, inputs: tuple[Tensor, ...], hidden: Tensor, cell: Tensor, *, zeros: Tensor, projected: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute forward with one fused kernel after the matmuls.

        Args:
            zeros: (4H,), the kernel's second bias.
            projected: whether the first input is already multiplied by its part of the weights.
        """
        first, rest = inputs[0], hidden if len(inputs) == 1 else torch.cat((*inputs[1:], hidden), -1)
        weight, size = self.gates.weight, self.gates.in_features
        if not projected:
            first = F.linear(first, weight.narrow(1, 0, first.shape[-1]))
        rest = F.linear(rest, weight.narrow(1, size - rest.shape[-1], rest.shape[-1]))
        rows = (x.float().flatten(0, 1) for x in (first, rest, cell))
        new_hidden, new_cell, _ = fused_gates(*rows, self.gates.bias, zeros)
        return new_hidden.view(cell.shape), new_cell.view(cell.shape)


# The kernel of torch.lstm_cell on CUDA after its two matmuls: (gates, gates, cell, bias, bias) -> (hidden, cell, _).
fused_gates = torch.ops.aten._thnn_fused_lstm_cell


class Speller(nn.Module):
    """Attention decoder.

    The first cell reads the previous token and context. The last cell's state queries the attention for the next
    context. State and context together give the logits.
    """

    forbidden: Tensor  # (V,) FORBIDDEN_LOGIT for <pad> and <sos>, else 0

    def __init__(self, config: SpellerConfig, listener_size: int, vocabulary_size: int):
        super().__init__()
        inputs = (config.embedding_size + config.value_size, *config.lstm_sizes[:-1])
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_size)
        cells = nn.ModuleList(LSTMCell(i, size) for i, size in zip(inputs, config.lstm_sizes, strict=True))
        self.cells = cast("Sequence[LSTMCell]", cells)
        self.attention = Attention(listener_size, config.lstm_sizes[-1], config.key_size, config.value_size)
        self.project = nn.Linear(config.lstm_sizes[-1] + config.value_size, config.embedding_size)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.dropout = config.dropout
        forbidden = torch.zeros(vocabulary_size)
        forbidden[[PAD, SOS]] = FORBIDDEN_LOGIT
        self.register_buffer("forbidden", forbidden, persistent=False)
        # The weights are tied to the output layer: this scale gives initial logits of about unit variance.
        nn.init.normal_(self.embedding.weight, std=config.embedding_size**-0.5)

    def weights(self) -> SpellerWeights:
        """Collect the weights for ops.speller_search and ops.speller_unroll."""
        gates = [cell.gates for cell in self.cells]
        return SpellerWeights(
            self.embedding.weight,
            self.attention.query.weight,
            self.attention.query.bias,
            self.project.weight,
            self.project.bias,
            self.bias + self.forbidden,
            tuple(layer.weight for layer in gates),
            tuple(layer.bias for layer in gates),
        )

    def start(self, memory: Memory, beam: int = 1) -> SpellerState:
        """Return the state before the first token: zeros for `beam` hypotheses per utterance, and the constants."""
        batch, token_gates = memory.keys.shape[0], None
        zeros: tuple[Tensor, ...] = ()
        if self._uses_fused_kernel(memory):
            first = self.cells[0].gates.weight.narrow(1, 0, self.embedding.embedding_dim)
            token_gates = F.linear(self.embedding.weight, first)
            zeros = tuple(torch.zeros_like(cell.gates.bias) for cell in self.cells)
        initial = tuple(memory.keys.new_zeros(batch, beam, cell.size, dtype=torch.float32) for cell in self.cells)
        context = memory.values.new_zeros(batch, beam, memory.values.shape[2])
        return SpellerState(initial, initial, context, StepConstants(self.bias + self.forbidden, token_gates, zeros))

    @staticmethod
    def _uses_fused_kernel(memory: Memory) -> bool:
        """Return whether steps use the fused LSTM kernel. On a CPU, one matmul per cell is faster."""
        return memory.keys.is_cuda and not torch.is_grad_enabled()

    def step(
        self, tokens: Tensor, state: SpellerState, memory: Memory, *, weights: bool = False, backend: str = "auto"
    ) -> tuple[Tensor, AttentionRead, SpellerState]:
        """Advance every hypothesis by one token; see LAS.step."""
        constants, hiddens, cells = state.constants, [], []
        table = self.embedding.weight if constants.token_gates is None else constants.token_gates
        inputs: tuple[Tensor, ...] = (F.embedding(tokens, table), state.context)
        for i, layer in enumerate(self._cell_steps(constants)):
            hidden, cell = layer(inputs, state.hidden[i], state.cell[i])
            hiddens.append(hidden)
            cells.append(cell)
            inputs = (hidden,)
        query = self.attention.query(hidden)
        context, read = self.attention(query, memory, weights=weights, backend=backend)
        features = F.gelu(self.project(torch.cat((hidden, context), -1)))
        logits = F.linear(features, self.embedding.weight, constants.bias)
        return logits, read, SpellerState(tuple(hiddens), tuple(cells), context, constants)

    def _cell_steps(self, constants: StepConstants) -> list[Callable[..., tuple[Tensor, Tensor]]]:
        """Return one function per cell: (inputs, hidden, cell) -> (new hidden, new cell)."""
        if constants.token_gates is None:
            return list(self.cells)
        return [partial(c.fused, zeros=constants.zeros[i], projected=i == 0) for i, c in enumerate(self.cells)]

    def forward(
        self, memory: Memory, tokens: Tensor, teacher_forcing: float = 1.0, *, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """Run a training pass over tokens (B, U); see LAS.forward.

        Matmuls use autocast's precision if it is on. `backend` is passed to ops.speller_unroll.

        Returns:
            logits (B, U, V) and attention weights (B, U, T) float32.
        """
        previous = F.pad(tokens[:, :-1], (1, 0), value=SOS)
        # One draw per utterance and step; the first step reads <sos> in any case.
        draws = draw_rows(len(previous), lambda rows: torch.rand(rows, previous.shape[1], device=previous.device))
        return speller_unroll(
            self.weights(), *memory[:3], previous, draws >= teacher_forcing if teacher_forcing < 1 else None,
            self.dropout_masks(memory),
            precision=autocast_precision(memory.keys.device.type), backend=backend,
        )  # fmt: skip

    def dropout_masks(self, memory: Memory) -> list[Tensor] | None:
        """Draw one locked dropout mask (B, H) per cell, the same at every token; None without dropout."""
        if not self.training or self.dropout == 0:
            return None
        batch = memory.keys.shape[0]
        return [dropout_mask(memory.keys.new_empty(batch, cell.size), self.dropout) for cell in self.cells]


def autocast_precision(device_type: str) -> str:
    """Return the precision of matmuls under torch.autocast on that device type, such as "bf16"; "fp32" if it is off."""
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else torch.float32
    return next(name for name, value in PRECISIONS.items() if value == dtype)
