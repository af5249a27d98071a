"""Speller: embedding, LSTM cells and attention, one token after another; the output shares the embedding's weights.

Training takes all tokens at once, by ops.speller_unroll; a search takes one after another, by Speller.step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from las_fast.config import SpellerConfig
from las_fast.model.attention import Attended, Attention, Memory
from las_fast.model.layers import dropout_mask, initialise_lstm
from las_fast.ops import SpellerWeights, beam_gather, speller_unroll
from las_fast.ops.speller_unroll import PRECISIONS
from las_fast.text import PAD, SOS

NEVER = -1e4  # logit of <pad> and <sos>: their probability is exactly 0 in float32, and finite in half precision


class Prepared(NamedTuple):
    """What every step of one search reads and none changes."""

    bias: Tensor  # (V,) of the output, NEVER included
    token_gates: Tensor | None  # (V, 4H) on CUDA: what each token adds to the gates of the first cell
    zeros: tuple[Tensor, ...]  # (4H,) a cell on CUDA: the second bias that the fused kernel takes


class SpellerState(NamedTuple):
    """What the speller carries from token to token, for K hypotheses of each of B utterances."""

    hidden: tuple[Tensor, ...]  # (B, K, H) a cell
    cell: tuple[Tensor, ...]  # (B, K, H) a cell, float32
    context: Tensor  # (B, K, E)
    prepared: Prepared

    def gather(self, parents: Tensor, *, backend: str = "auto") -> SpellerState:
        """Return the state in which hypothesis k continues parents[b, k]; parents (B, K) int64."""
        n = len(self.hidden)
        moved = beam_gather((*self.hidden, *self.cell, self.context), parents, backend=backend)
        return SpellerState(moved[:n], moved[n:-1], moved[-1], self.prepared)


class LSTMCell(nn.Module):
    """One step of an LSTM, input and state in one product; the cell state stays in float32."""

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
        """Return the new hidden and cell state."""
        i, f, g, o = self.gates(torch.cat((*inputs, hidden), -1)).float().chunk(4, -1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell

    def fused(
        self, inputs: tuple[Tensor, ...], hidden: Tensor, cell: Tensor, *, zeros: Tensor, multiplied: bool
    ) -> tuple[Tensor, Tensor]:
        """forward with one kernel after the products; `multiplied`: the first input has been through its own."""
        first, rest = inputs[0], hidden if len(inputs) == 1 else torch.cat((*inputs[1:], hidden), -1)
        weight, size = self.gates.weight, self.gates.in_features
        if not multiplied:
            first = F.linear(first, weight.narrow(1, 0, first.shape[-1]))
        rest = F.linear(rest, weight.narrow(1, size - rest.shape[-1], rest.shape[-1]))
        rows = (x.float().flatten(0, 1) for x in (first, rest, cell))
        after = fused_gates(*rows, self.gates.bias, zeros)
        return after[0].view(cell.shape), after[1].view(cell.shape)


# What torch.lstm_cell calls on CUDA after its two products: (gates, gates, cell, bias, bias) -> (hidden, cell, _).
fused_gates = torch.ops.aten._thnn_fused_lstm_cell


class Speller(nn.Module):
    """Decoder. Cell 1 reads the token before and the context before; the last cell asks the attention for the next
    context; state and context together give the logits."""

    never: Tensor  # (V,) NEVER for <pad> and <sos>, else 0

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
        never = torch.zeros(vocabulary_size)
        never[[PAD, SOS]] = NEVER
        self.register_buffer("never", never, persistent=False)
        # Tied weights serve as input and as output: this scale gives logits of about unit variance at the start.
        nn.init.normal_(self.embedding.weight, std=config.embedding_size**-0.5)

    def weights(self) -> SpellerWeights:
        """Return all that ops.speller_search and ops.speller_unroll read."""
        gates = [cell.gates for cell in self.cells]
        return SpellerWeights(
            self.embedding.weight,
            self.attention.query.weight,
            self.attention.query.bias,
            self.project.weight,
            self.project.bias,
            self.bias + self.never,
            tuple(layer.weight for layer in gates),
            tuple(layer.bias for layer in gates),
        )

    def start(self, memory: Memory, beam: int = 1) -> SpellerState:
        """Return the state before the first token, with what all steps after it share."""
        batch, token_gates = memory.keys.shape[0], None
        zeros: tuple[Tensor, ...] = ()
        if self._fuses(memory):
            first = self.cells[0].gates.weight.narrow(1, 0, self.embedding.embedding_dim)
            token_gates = F.linear(self.embedding.weight, first)
            zeros = tuple(torch.zeros_like(cell.gates.bias) for cell in self.cells)
        silence = tuple(memory.keys.new_zeros(batch, beam, cell.size, dtype=torch.float32) for cell in self.cells)
        context = memory.values.new_zeros(batch, beam, memory.values.shape[2])
        return SpellerState(silence, silence, context, Prepared(self.bias + self.never, token_gates, zeros))

    @staticmethod
    def _fuses(memory: Memory) -> bool:
        """Say whether steps take fewer and larger kernels; on a CPU one product a cell is faster."""
        return memory.keys.is_cuda and not torch.is_grad_enabled()

    def step(
        self, tokens: Tensor, state: SpellerState, memory: Memory, *, weights: bool = False, backend: str = "auto"
    ) -> tuple[Tensor, Attended, SpellerState]:
        """Return logits (B, K, V), where each listened, and the next state, of a state that `start` began.

        See LAS.step.
        """
        prepared, hiddens, cells = state.prepared, [], []
        table = self.embedding.weight if prepared.token_gates is None else prepared.token_gates
        inputs: tuple[Tensor, ...] = (F.embedding(tokens, table), state.context)
        for i, layer in enumerate(self._layers(prepared)):
            hidden, cell = layer(inputs, state.hidden[i], state.cell[i])
            hiddens.append(hidden)
            cells.append(cell)
            inputs = (hidden,)
        query = self.attention.query(hidden)
        context, attended = self.attention(query, memory, weights=weights, backend=backend)
        features = F.gelu(self.project(torch.cat((hidden, context), -1)))
        logits = F.linear(features, self.embedding.weight, prepared.bias)
        return logits, attended, SpellerState(tuple(hiddens), tuple(cells), context, prepared)

    def _layers(self, prepared: Prepared) -> list[Callable[..., tuple[Tensor, Tensor]]]:
        """Return what takes (inputs, hidden, cell) of each cell to its new hidden and cell state."""
        if prepared.token_gates is None:
            return list(self.cells)
        return [partial(c.fused, zeros=prepared.zeros[i], multiplied=i == 0) for i, c in enumerate(self.cells)]

    def forward(
        self, memory: Memory, tokens: Tensor, teacher_forcing: float = 1.0, *, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """Spell tokens (B, U) with the true or, by chance, the spelled token before each; see LAS.forward.

        The products are in the precision of autocast where that is on; backend is of ops.speller_unroll.
        """
        before = F.pad(tokens[:, :-1], (1, 0), value=SOS)
        # One draw for every utterance and step; the first step reads <sos> whatever the draw.
        sampled = torch.rand(before.shape, device=before.device) >= teacher_forcing
        return speller_unroll(
            self.weights(), *memory[:3], before, sampled, self.masks(memory),
            precision=autocast_precision(memory.keys.device.type), backend=backend,
        )  # fmt: skip

    def masks(self, memory: Memory) -> list[Tensor] | None:
        """One locked dropout mask (B, H) a cell, the same at every token; None where nothing is dropped."""
        if not self.training or self.dropout == 0:
            return None
        batch = memory.keys.shape[0]
        return [dropout_mask(memory.keys.new_empty(batch, cell.size), self.dropout) for cell in self.cells]


def autocast_precision(device_type: str) -> str:
    """Return the name of what torch.autocast multiplies in on that type of device, fp32 where it is off."""
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else torch.float32
    return next(name for name, kind in PRECISIONS.items() if kind == dtype)
