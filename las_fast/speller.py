"""Speller: embedding, LSTM cells and attention, one token after another; the output shares the embedding's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from las_fast.attention import Attention, Memory
from las_fast.config import SpellerConfig
from las_fast.deferred import DeferredAttention, DeferredLinear
from las_fast.listener import dropout_mask, initialise_lstm
from las_fast.text import PAD, SOS

NEVER = -1e4  # logit of <pad> and <sos>: their probability is exactly 0 in float32, and finite in half precision


class SpellerState(NamedTuple):
    """What the speller carries from token to token, for K hypotheses of each of B utterances."""

    hidden: tuple[Tensor, ...]  # (B, K, H) a cell
    cell: tuple[Tensor, ...]  # (B, K, H) a cell, float32
    context: Tensor  # (B, K, E)

    def gather(self, parents: Tensor) -> SpellerState:
        """Return the state in which hypothesis k continues parents[b, k]; parents (B, K) int64."""

        def follow(x: Tensor) -> Tensor:
            return x.gather(1, parents[:, :, None].expand(-1, -1, x.shape[2]))

        return SpellerState(tuple(map(follow, self.hidden)), tuple(map(follow, self.cell)), follow(self.context))


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

    def forward(self, inputs: tuple[Tensor, ...], hidden: Tensor, cell: Tensor, gates=None) -> tuple[Tensor, Tensor]:
        """Return the new hidden and cell state; `gates` stands in for the layer of that name."""
        i, f, g, o = (gates or self.gates)(torch.cat((*inputs, hidden), -1)).float().chunk(4, -1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell


class Shared(NamedTuple):
    """What all steps of one pass share: layers, attention over one memory, dropout masks."""

    gates: list[Callable[[Tensor], Tensor]]  # one a cell
    query: Callable[[Tensor], Tensor]
    attend: Callable[[Tensor], tuple[Tensor, Tensor]]
    masks: list[Tensor | None]  # (B, 1, H) a cell

    @staticmethod
    def plain(speller: Speller, memory: Memory) -> Shared:
        """The layers themselves, for one step at a time."""
        gates, attention = [cell.gates for cell in speller.cells], speller.attention
        return Shared(gates, attention.query, lambda query: attention(query, memory), [None] * len(gates))

    @staticmethod
    def deferred(speller: Speller, memory: Memory, steps: int) -> Shared:
        """The same layers with gradients taken once for all steps; dropout masks when training."""
        shape = (memory.keys.shape[0], 1)
        gates = [DeferredLinear(cell.gates, steps, shape) for cell in speller.cells]
        query = DeferredLinear(speller.attention.query, steps, shape)
        return Shared(gates, query, DeferredAttention(memory, steps), speller.masks(memory))


class Speller(nn.Module):
    """Decoder. Cell 1 reads the token before and the context before; the last cell asks the attention for the next
    context; state and context together give the logits."""

    def __init__(self, config: SpellerConfig, listener_size: int, vocabulary_size: int):
        super().__init__()
        inputs = (config.embedding_size + config.value_size, *config.lstm_sizes[:-1])
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_size)
        self.cells = nn.ModuleList(LSTMCell(i, size) for i, size in zip(inputs, config.lstm_sizes, strict=True))
        self.attention = Attention(listener_size, config.lstm_sizes[-1], config.key_size, config.value_size)
        self.project = nn.Linear(config.lstm_sizes[-1] + config.value_size, config.embedding_size)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.dropout = config.dropout
        never = torch.zeros(vocabulary_size)
        never[[PAD, SOS]] = NEVER
        self.register_buffer("never", never, persistent=False)
        # Tied weights serve as input and as output: this scale gives logits of about unit variance at the start.
        nn.init.normal_(self.embedding.weight, std=config.embedding_size**-0.5)

    def start(self, memory: Memory, beam: int = 1) -> SpellerState:
        batch = memory.keys.shape[0]
        zeros = [memory.keys.new_zeros(batch, beam, cell.size, dtype=torch.float32) for cell in self.cells]
        context = memory.values.new_zeros(batch, beam, memory.values.shape[2])
        return SpellerState(tuple(zeros), tuple(zeros), context)

    def step(self, tokens: Tensor, state: SpellerState, memory: Memory) -> tuple[Tensor, Tensor, SpellerState]:
        """Return logits (B, K, V), weights (B, K, T) and the next state; see LAS.step."""
        weights, state = self._advance(self.embedding(tokens), state, Shared.plain(self, memory))
        return self._logits(state.hidden[-1], state.context), weights, state

    def forward(self, memory: Memory, tokens: Tensor, teacher_forcing: float = 1.0) -> tuple[Tensor, Tensor]:
        """Spell tokens (B, U) with the true or, by chance, the spelled token before each; see LAS.forward."""
        before = F.pad(tokens[:, :-1], (1, 0), value=SOS)
        # One draw for every utterance and step; the first step reads <sos> whatever the draw.
        sampled = torch.rand(before.shape, device=before.device) >= teacher_forcing
        sampled[:, 0] = False
        any_sampled = sampled.any(0).tolist()
        shared = Shared.deferred(self, memory, tokens.shape[1])
        state = self.start(memory)
        hidden, contexts, weights = [], [], []
        for u in range(tokens.shape[1]):
            token = before[:, u]
            if any_sampled[u]:
                token = torch.where(sampled[:, u], self._best(hidden[-1], contexts[-1]), token)
            w, state = self._advance(self.embedding(token[:, None]), state, shared)
            hidden.append(self._dropped(state.hidden[-1], shared.masks[-1]))
            contexts.append(state.context)
            weights.append(w)
        return self._logits(torch.cat(hidden, 1), torch.cat(contexts, 1)), torch.cat(weights, 1)

    def _advance(self, embedded: Tensor, state: SpellerState, shared: Shared) -> tuple[Tensor, SpellerState]:
        inputs, hiddens, cells = (embedded.float(), state.context.float()), [], []
        for i, layer in enumerate(self.cells):
            hidden, cell = layer(inputs, state.hidden[i], state.cell[i], shared.gates[i])
            hiddens.append(hidden)
            cells.append(cell)
            inputs = (self._dropped(hidden, shared.masks[i]),)
        context, weights = shared.attend(shared.query(inputs[0]))
        return weights, SpellerState(tuple(hiddens), tuple(cells), context)

    def masks(self, memory: Memory) -> list[Tensor | None]:
        """One locked dropout mask a cell, the same at every token."""
        if not self.training or self.dropout == 0:
            return [None] * len(self.cells)
        batch = memory.keys.shape[0]
        return [dropout_mask(memory.keys.new_empty(batch, 1, cell.size), self.dropout) for cell in self.cells]

    @staticmethod
    def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
        return x if mask is None else x * mask

    def _logits(self, hidden: Tensor, context: Tensor) -> Tensor:
        features = F.gelu(self.project(torch.cat((hidden.float(), context.float()), -1)))
        return F.linear(features, self.embedding.weight, self.bias) + self.never

    @torch.no_grad()
    def _best(self, hidden: Tensor, context: Tensor) -> Tensor:
        """The most probable next token, (B,)."""
        return self._logits(hidden.detach(), context.detach())[:, -1].argmax(-1)
