"""The model of las_fast in PyTorch alone, written twice: what its speed is compared with.

    Usual   as LAS is mostly written: packed bidirectional nn.LSTM, nn.LSTMCell and an output a token, the mask made at
            every token, everything of an utterance repeated over the beam, hypotheses copied at every step.
    Plain   the fastest that PyTorch's own calls allow: convolutions with channels last, padded LSTMs, the backward one
            over reversed utterances, one product for the gates of a cell, mask and scaled keys made once and shared by
            the beam, one output projection for all tokens, back-pointers. In bfloat16: under torch.autocast in
            training, all weights in decoding.

Both are made from a las_fast.model.las.LAS and hold copies of its weights; logits, losses and hypotheses are the same.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from las_fast.model.las import LAS, Output
from las_fast.model.listener import convolve
from las_fast.text import EOS, SOS

# What both share


class Baseline(nn.Module):
    """LAS with the weights of `model`; a subclass brings convolutions, LSTM layers, the decoder's loop and search."""

    def __init__(self, model: LAS):
        super().__init__()
        listener, speller = model.listener, model.speller
        self.convs = copy.deepcopy(listener.front.convs)
        self.conv_norms = copy.deepcopy(listener.front.norms)
        self.layers = nn.ModuleList(self.bilstm(layer.lstm) for layer in listener.layers)
        self.norms = copy.deepcopy(listener.norms)
        self.pyramids = listener.pyramids
        self.ctc_layer, self.ctc = model.ctc_layer, copy.deepcopy(model.ctc)
        self.embedding = copy.deepcopy(speller.embedding)  # also the output's weight
        self.cells = nn.ModuleList(self.lstm_cell(cell) for cell in speller.cells)
        attention = speller.attention
        self.key, self.value, self.query = map(copy.deepcopy, (attention.key, attention.value, attention.query))
        self.project, self.bias = copy.deepcopy(speller.project), copy.deepcopy(speller.bias)
        self.register_buffer("never", speller.never.clone())
        self.sizes = [cell.size for cell in speller.cells]
        self.listener_dropout, self.speller_dropout = listener.dropout, speller.dropout

    def forward(self, features: Tensor, lengths: Tensor, tokens: Tensor, teacher_forcing: float = 1.0) -> Output:
        """Spell tokens (B, U) with the true token before each; it can do no other."""
        assert teacher_forcing == 1.0
        listened, lengths, tapped = self.listen(features, lengths)
        logits, weights = self.spell(listened, lengths, tokens)
        if tapped is None:
            return Output(logits, weights, lengths, None, None)
        return Output(logits, weights, lengths, self.ctc(tapped[0]), tapped[1])

    def listen(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, tuple | None]:
        """Return the encoder's output, its lengths, and (output, lengths) of the layer with the CTC head."""
        x, tapped = x * valid(lengths, x), None
        for conv, norm in zip(self.convs, self.conv_norms, strict=True):
            lengths = (lengths - 1) // conv.stride[0] + 1
            x = F.gelu(norm(self.convolve(conv, x)))
            x = x * valid(lengths, x)
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            if 1 <= i <= self.pyramids:  # the pyramid: neighbouring frames become one
                x = F.pad(x, (0, 0, 0, x.shape[1] % 2))
                x = x.reshape(x.shape[0], x.shape[1] // 2, 2 * x.shape[2])
                lengths = (lengths + 1) // 2
            x = norm(layer(self.locked_dropout(x), lengths))
            x = x * valid(lengths, x)
            if i == self.ctc_layer:
                tapped = (x, lengths)
        return self.locked_dropout(x), lengths, tapped

    def locked_dropout(self, x: Tensor) -> Tensor:
        """One mask for all frames of an utterance."""
        if not self.training or not self.listener_dropout:
            return x
        return x * F.dropout(torch.ones_like(x[:, :1]), self.listener_dropout)

    def masks(self, like: Tensor) -> list[Tensor | None]:
        """One mask a cell for all tokens of an utterance, (B, H)."""
        if not self.training or not self.speller_dropout:
            return [None] * len(self.sizes)
        return [F.dropout(like.new_ones(like.shape[0], size), self.speller_dropout) for size in self.sizes]

    def output(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Return logits (..., V)."""
        features = F.gelu(self.project(torch.cat((hidden, context), -1)))
        return F.linear(features, self.embedding.weight, self.bias) + self.never

    def barred(self, *, last: bool) -> Tensor:
        """Return (V,) with -inf where a token may not follow: <eos> is the last one and no other."""
        is_eos = torch.arange(len(self.bias)) == EOS
        return torch.zeros(len(self.bias)).masked_fill(~is_eos if last else is_eos, -torch.inf)


def valid(lengths: Tensor, like: Tensor) -> Tensor:
    """Return (B, T, 1) bool, False past the lengths."""
    return (torch.arange(like.shape[1]) < lengths[:, None])[:, :, None]


def before(tokens: Tensor) -> Tensor:
    """Return the token before each of tokens (B, U)."""
    return F.pad(tokens[:, :-1], (1, 0), value=SOS)


# As it is mostly written


class PackedBiLSTM(nn.Module):
    def __init__(self, lstm: nn.LSTM):
        super().__init__()
        self.lstm = copy.deepcopy(lstm)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, _ = self.lstm(packed)
        return nn.utils.rnn.pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])[0]


class Usual(Baseline):
    bilstm = PackedBiLSTM

    @staticmethod
    def convolve(conv: nn.Conv1d, x: Tensor) -> Tensor:
        return conv(x.transpose(1, 2)).transpose(1, 2)

    @staticmethod
    def lstm_cell(cell: nn.Module) -> nn.LSTMCell:
        """Return the las_fast cell as torch's, whose second bias stays 0: two would learn twice as fast as one."""
        inputs = cell.gates.in_features - cell.size
        new = nn.LSTMCell(inputs, cell.size)
        weight_ih, weight_hh = cell.gates.weight.detach().split((inputs, cell.size), 1)
        new.load_state_dict(
            {
                "weight_ih": weight_ih,
                "weight_hh": weight_hh,
                "bias_ih": cell.gates.bias.detach(),
                "bias_hh": torch.zeros_like(cell.gates.bias),
            }
        )
        new.bias_hh.requires_grad_(False)
        return new

    def spell(self, listened: Tensor, lengths: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.key(listened), self.value(listened)
        state, masks, previous = self.silence(values), self.masks(values), before(tokens)
        logits, weights = [], []
        for u in range(tokens.shape[1]):
            token_logits, token_weights, state = self.step(previous[:, u], state, keys, values, lengths, masks)
            logits.append(token_logits)
            weights.append(token_weights)
        return torch.stack(logits, 1), torch.stack(weights, 1)

    def silence(self, values: Tensor) -> tuple:
        zeros = [values.new_zeros(values.shape[0], size) for size in self.sizes]
        return zeros, zeros, values.new_zeros(values.shape[0], values.shape[2])

    def step(self, token, state, keys, values, lengths, masks) -> tuple[Tensor, Tensor, tuple]:
        """Read (B,) tokens; return logits (B, V), attention weights (B, T) and the new state."""
        hidden, cells, context = list(state[0]), list(state[1]), state[2]
        x = torch.cat((self.embedding(token), context), 1)
        for i, cell in enumerate(self.cells):
            hidden[i], cells[i] = cell(x, (hidden[i], cells[i]))
            x = hidden[i] if masks[i] is None else hidden[i] * masks[i]
        scores = torch.bmm(keys, self.query(x)[:, :, None]).squeeze(2) / math.sqrt(keys.shape[2])
        mask = torch.arange(keys.shape[1]) >= lengths[:, None]
        weights = F.softmax(scores.masked_fill(mask, -torch.inf), 1)
        context = torch.bmm(weights[:, None], values).squeeze(1)
        return self.output(x, context), weights, (hidden, cells, context)

    @torch.inference_mode()
    def search(self, listened: Tensor, lengths: Tensor, beam: int, steps: int) -> tuple[Tensor, Tensor]:
        """Return tokens (B, K, steps), best first, and scores (B, K); only the last token is <eos>."""
        B = listened.shape[0]
        keys, values = (layer(listened).repeat_interleave(beam, 0) for layer in (self.key, self.value))
        lengths, state = lengths.repeat_interleave(beam), self.silence(values)
        first = (torch.arange(B) * beam)[:, None]  # beam 0 of each utterance
        tokens = torch.full((B * beam, 1), SOS)
        scores = torch.full((B, beam), -torch.inf)
        scores[:, 0] = 0.0
        for u in range(steps):
            logits, _, state = self.step(tokens[:, -1], state, keys, values, lengths, self.masks(values))
            logs = F.log_softmax(logits.float(), -1) + self.barred(last=u == steps - 1)
            scores, best = (scores.view(-1, 1) + logs).view(B, -1).topk(beam)
            parents = (first + best // logs.shape[1]).flatten()
            tokens = torch.cat((tokens[parents], (best % logs.shape[1]).view(-1, 1)), 1)
            hidden, cells, context = state
            state = [x[parents] for x in hidden], [x[parents] for x in cells], context[parents]
        return tokens[:, 1:].view(B, beam, -1), scores


# As fast as PyTorch's own calls allow


class ReversedBiLSTM(nn.Module):
    """Two LSTMs over padded sequences, the second over each utterance reversed within its own length."""

    def __init__(self, lstm: nn.LSTM):
        super().__init__()
        self.forwards, self.backwards = one_direction(lstm, ""), one_direction(lstm, "_reverse")

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        time = torch.arange(x.shape[1])
        mirror = torch.where(time < lengths[:, None], lengths[:, None] - 1 - time, time)[:, :, None]
        backwards, _ = self.backwards(x.gather(1, mirror.expand_as(x)))
        forwards, _ = self.forwards(x)
        return torch.cat((forwards, backwards.gather(1, mirror.expand_as(backwards))), 2)


def one_direction(both: nn.LSTM, suffix: str) -> nn.LSTM:
    """Return one direction of a bidirectional LSTM layer."""
    lstm = nn.LSTM(both.input_size, both.hidden_size, batch_first=True)
    lstm.load_state_dict({name: getattr(both, name + suffix).detach() for name, _ in lstm.named_parameters()})
    return lstm


class Plain(Baseline):
    bilstm = ReversedBiLSTM
    convolve = staticmethod(convolve)

    @staticmethod
    def lstm_cell(cell: nn.Module) -> nn.Linear:
        return copy.deepcopy(cell.gates)  # of input and state together

    def remember(self, listened: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what all tokens share: scaled keys (B, D, T), values (B, T, E) and the mask to add (B, 1, T)."""
        keys, values = self.key(listened), self.value(listened)
        past = torch.zeros(keys.shape[0], 1, keys.shape[1], dtype=keys.dtype)
        past.masked_fill_(torch.arange(keys.shape[1]) >= lengths[:, None, None], -torch.inf)
        return (keys / math.sqrt(keys.shape[2])).transpose(1, 2).contiguous(), values, past

    def spell(self, listened: Tensor, lengths: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.remember(listened, lengths)
        values, embedded = memory[1], self.embedding(before(tokens))
        state = self.silence(values, 1)
        masks = [None if mask is None else mask[:, None] for mask in self.masks(values)]
        hidden, contexts, weights = [], [], []
        for u in range(tokens.shape[1]):
            last, attended, state = self.step(embedded[:, u : u + 1], state, memory, masks)
            hidden.append(last)
            contexts.append(state[2])
            weights.append(attended)
        return self.output(torch.cat(hidden, 1), torch.cat(contexts, 1)), torch.cat(weights, 1)

    def silence(self, values: Tensor, beam: int) -> tuple:
        zeros = [values.new_zeros(values.shape[0], beam, size) for size in self.sizes]
        return zeros, zeros, values.new_zeros(values.shape[0], beam, values.shape[2])

    def step(self, embedded: Tensor, state: tuple, memory: tuple, masks: list) -> tuple[Tensor, Tensor, tuple]:
        """Read (B, K, N) embedded tokens; return the last hidden state, attention weights (B, K, T), the new state."""
        (keys, values, past), (hidden, cells, context) = memory, state
        x, new_hidden, new_cells = torch.cat((embedded, context), 2), [], []
        for gates, h, c, mask in zip(self.cells, hidden, cells, masks, strict=True):
            i, f, g, o = gates(torch.cat((x, h), 2)).chunk(4, 2)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            new_hidden.append(h)
            new_cells.append(c)
            x = h if mask is None else h * mask
        weights = F.softmax(torch.bmm(self.query(x), keys) + past, -1)
        return x, weights, (new_hidden, new_cells, torch.bmm(weights, values))

    @torch.inference_mode()
    def search(self, listened: Tensor, lengths: Tensor, beam: int, steps: int) -> tuple[Tensor, Tensor]:
        """Return tokens (B, K, steps), best first, and scores (B, K); only the last token is <eos>."""
        B, V = listened.shape[0], len(self.bias)
        memory, masks = self.remember(listened, lengths), self.masks(listened)
        state = self.silence(memory[1], beam)
        row = torch.arange(B)[:, None]
        tokens = torch.full((B, beam), SOS)
        scores = torch.full((B, beam), -torch.inf)
        scores[:, 0] = 0.0
        barred = self.barred(last=False), self.barred(last=True)
        spelled, pointers = [], []
        for u in range(steps):
            hidden, _, (h, c, context) = self.step(self.embedding(tokens), state, memory, masks)
            logs = F.log_softmax(self.output(hidden, context).float(), -1) + barred[u == steps - 1]
            scores, best = (scores[:, :, None] + logs).view(B, -1).topk(beam)
            parents, tokens = best // V, best % V
            state = [x[row, parents] for x in h], [x[row, parents] for x in c], context[row, parents]
            spelled.append(tokens)
            pointers.append(parents)
        beams, found = torch.arange(beam).expand(B, -1), []
        for tokens, parents in zip(reversed(spelled), reversed(pointers), strict=True):
            found.append(tokens.gather(1, beams))
            beams = parents.gather(1, beams)
        return torch.stack(found[::-1], 2), scores
