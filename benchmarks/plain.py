"""Implementations of the model in PyTorch alone, for any device: the baselines that las_fast is compared with.

    Usual   LAS as most repositories write it: packed bidirectional nn.LSTM; per token an nn.LSTMCell, a mask and an
            output projection; encoder outputs repeated over the beam; hypotheses copied at every step.
    Plain   as fast as PyTorch's own eager calls allow on a CPU: channels-last convolutions; padded LSTMs, the backward
            direction on reversed utterances; one matmul for the gates of a cell; mask and scaled keys computed once and
            shared by the beam; one output projection for all tokens; back-pointers. In bfloat16 it trains under
            torch.autocast and decodes with bfloat16 weights. On CUDA its cells are separate calls, without torch's
            fused LSTM kernel.
    PlainPacked   Plain with the packed LSTM of Usual.
    PlainGraphed  Plain whose decoder loop is a CUDA graph, forward and backward.

All copy the weights of a las_fast.model.LAS. Their logits, losses and hypotheses equal those of las_fast.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from las_fast.model.las import LAS, Output
from las_fast.model.listener import convolve
from las_fast.text import EOS, SOS

# Shared by all


class Baseline(nn.Module):
    """LAS with a copy of the weights of `model`.

    Subclasses define the convolutions, the LSTM layers, the decoder loop and the search.
    """

    def __init__(self, model: LAS):
        super().__init__()
        listener, speller = model.listener, model.speller
        self.convs = copy.deepcopy(listener.front.convs)
        self.conv_norms = copy.deepcopy(listener.front.norms)
        self.layers = nn.ModuleList(self.bilstm(layer.lstm) for layer in listener.layers)
        self.norms = copy.deepcopy(listener.norms)
        self.pyramids = listener.pyramids
        self.ctc_layer, self.ctc = model.ctc_layer, copy.deepcopy(model.ctc)
        self.embedding = copy.deepcopy(speller.embedding)  # tied to the output layer
        self.cells = nn.ModuleList(self.lstm_cell(cell) for cell in speller.cells)
        attention = speller.attention
        self.key, self.value, self.query = map(copy.deepcopy, (attention.key, attention.value, attention.query))
        self.project, self.bias = copy.deepcopy(speller.project), copy.deepcopy(speller.bias)
        self.register_buffer("forbidden", speller.forbidden.clone())  # (V,), added to the logits
        self.sizes = [cell.size for cell in speller.cells]
        self.listener_dropout, self.speller_dropout = listener.dropout, speller.dropout

    def forward(self, features: Tensor, lengths: Tensor, tokens: Tensor, teacher_forcing: float = 1.0) -> Output:
        """Return the outputs for features (B, T, F) and tokens (B, U), with full teacher forcing only."""
        assert teacher_forcing == 1.0
        listened, lengths, ctc_input = self.listen(features, lengths)
        logits, weights = self.spell(listened, lengths, tokens)
        if ctc_input is None:
            return Output(logits, weights, lengths, None, None)
        return Output(logits, weights, lengths, self.ctc(ctc_input[0]), ctc_input[1])

    def listen(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, tuple | None]:
        """Return the encoder output, its lengths, and (output, lengths) of the layer with the CTC head, or None."""
        x, ctc_input = x * valid(lengths, x), None
        for conv, norm in zip(self.convs, self.conv_norms, strict=True):
            lengths = (lengths - 1) // conv.stride[0] + 1
            x = F.gelu(norm(self.convolve(conv, x)))
            x = x * valid(lengths, x)
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            if 1 <= i <= self.pyramids:  # concatenate pairs of frames
                x = F.pad(x, (0, 0, 0, x.shape[1] % 2))
                x = x.reshape(x.shape[0], x.shape[1] // 2, 2 * x.shape[2])
                lengths = (lengths + 1) // 2
            x = norm(layer(self.locked_dropout(x), lengths))
            x = x * valid(lengths, x)
            if i == self.ctc_layer:
                ctc_input = (x, lengths)
        return self.locked_dropout(x), lengths, ctc_input

    def locked_dropout(self, x: Tensor) -> Tensor:
        """Apply dropout with one mask per utterance, shared by all its frames."""
        if not self.training or not self.listener_dropout:
            return x
        return x * F.dropout(torch.ones_like(x[:, :1]), self.listener_dropout)

    def masks(self, like: Tensor) -> list[Tensor | None]:
        """Return a dropout mask (B, H) per cell, shared by all tokens; None without dropout."""
        if not self.training or not self.speller_dropout:
            return [None] * len(self.sizes)
        return [F.dropout(like.new_ones(like.shape[0], size), self.speller_dropout) for size in self.sizes]

    def output(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Return logits (..., V)."""
        features = F.gelu(self.project(torch.cat((hidden, context), -1)))
        return F.linear(features, self.embedding.weight, self.bias) + self.forbidden

    def eos_mask(self, *, last: bool) -> Tensor:
        """Return (V,) to add to log-probabilities: it forces <eos> at the last step and forbids it before."""
        is_eos = torch.arange(len(self.bias), device=self.bias.device) == EOS
        return torch.zeros(is_eos.shape, device=is_eos.device).masked_fill(~is_eos if last else is_eos, -torch.inf)


def valid(lengths: Tensor, like: Tensor) -> Tensor:
    """Return (B, T, 1) bool, True for the frames within each length."""
    return (torch.arange(like.shape[1], device=lengths.device) < lengths[:, None])[:, :, None]


def shift_right(tokens: Tensor) -> Tensor:
    """Return the previous token of each of tokens (B, U); <sos> comes first."""
    return F.pad(tokens[:, :-1], (1, 0), value=SOS)


# As most repositories write it


class PackedBiLSTM(nn.Module):
    def __init__(self, lstm: nn.LSTM):
        super().__init__()
        self.lstm = copy.deepcopy(lstm)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        output, _ = self.lstm(packed)
        return nn.utils.rnn.pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])[0]


class Usual(Baseline):
    bilstm = PackedBiLSTM

    @staticmethod
    def convolve(conv: nn.Conv1d, x: Tensor) -> Tensor:
        return conv(x.transpose(1, 2)).transpose(1, 2)

    @staticmethod
    def lstm_cell(cell: nn.Module) -> nn.LSTMCell:
        """Copy a las_fast cell to nn.LSTMCell; freeze the second bias at 0, or the bias would learn twice as fast."""
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
        state, masks, previous = self.initial_state(values), self.masks(values), shift_right(tokens)
        logits, weights = [], []
        for u in range(tokens.shape[1]):
            token_logits, token_weights, state = self.step(previous[:, u], state, keys, values, lengths, masks)
            logits.append(token_logits)
            weights.append(token_weights)
        return torch.stack(logits, 1), torch.stack(weights, 1)

    def initial_state(self, values: Tensor) -> tuple:
        zeros = [values.new_zeros(values.shape[0], size) for size in self.sizes]
        return zeros, zeros, values.new_zeros(values.shape[0], values.shape[2])

    def step(self, token, state, keys, values, lengths, masks) -> tuple[Tensor, Tensor, tuple]:
        """Return logits (B, V), attention weights (B, T) and the new state, after the tokens (B,)."""
        hidden, cells, context = list(state[0]), list(state[1]), state[2]
        x = torch.cat((self.embedding(token), context), 1)
        for i, cell in enumerate(self.cells):
            hidden[i], cells[i] = cell(x, (hidden[i], cells[i]))
            x = hidden[i] if masks[i] is None else hidden[i] * masks[i]
        scores = torch.bmm(keys, self.query(x)[:, :, None]).squeeze(2) / math.sqrt(keys.shape[2])
        mask = torch.arange(keys.shape[1], device=lengths.device) >= lengths[:, None]
        weights = F.softmax(scores.masked_fill(mask, -torch.inf), 1)
        context = torch.bmm(weights[:, None], values).squeeze(1)
        return self.output(x, context), weights, (hidden, cells, context)

    @torch.inference_mode()
    def search(self, listened: Tensor, lengths: Tensor, beam: int, steps: int) -> tuple[Tensor, Tensor]:
        """Return tokens (B, K, steps), best first, and scores (B, K); only the last token is <eos>."""
        B, device = listened.shape[0], listened.device
        keys, values = (layer(listened).repeat_interleave(beam, 0) for layer in (self.key, self.value))
        lengths, state = lengths.repeat_interleave(beam), self.initial_state(values)
        first = (torch.arange(B, device=device) * beam)[:, None]  # beam 0 of each utterance
        tokens = torch.full((B * beam, 1), SOS, device=device)
        scores = torch.full((B, beam), -torch.inf, device=device)
        scores[:, 0] = 0.0
        for u in range(steps):
            logits, _, state = self.step(tokens[:, -1], state, keys, values, lengths, self.masks(values))
            log_probs = F.log_softmax(logits.float(), -1) + self.eos_mask(last=u == steps - 1)
            scores, best = (scores.view(-1, 1) + log_probs).view(B, -1).topk(beam)
            parents = (first + best // log_probs.shape[1]).flatten()
            tokens = torch.cat((tokens[parents], (best % log_probs.shape[1]).view(-1, 1)), 1)
            hidden, cells, context = state
            state = [x[parents] for x in hidden], [x[parents] for x in cells], context[parents]
        return tokens[:, 1:].view(B, beam, -1), scores


# As fast as PyTorch's own calls allow


class ReversedBiLSTM(nn.Module):
    """A bidirectional LSTM of two LSTMs on padded sequences; the second reads each utterance reversed."""

    def __init__(self, lstm: nn.LSTM):
        super().__init__()
        self.forwards, self.backwards = one_direction(lstm, ""), one_direction(lstm, "_reverse")

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        time = torch.arange(x.shape[1], device=x.device)
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
        return copy.deepcopy(cell.gates)  # on input and hidden state, concatenated

    def project_memory(self, listened: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scaled keys (B, D, T), values (B, T, E) and a mask (B, 1, T) to add to the scores, for all tokens."""
        keys, values = self.key(listened), self.value(listened)
        mask = keys.new_zeros(keys.shape[0], 1, keys.shape[1])
        mask.masked_fill_(torch.arange(keys.shape[1], device=keys.device) >= lengths[:, None, None], -torch.inf)
        return (keys / math.sqrt(keys.shape[2])).transpose(1, 2).contiguous(), values, mask

    def spell(self, listened: Tensor, lengths: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.project_memory(listened, lengths)
        values, embedded = memory[1], self.embedding(shift_right(tokens))
        state = self.initial_state(values, 1)
        dropout = [None if mask is None else mask[:, None] for mask in self.masks(values)]
        hidden, contexts, weights = [], [], []
        for u in range(tokens.shape[1]):
            last_hidden, token_weights, state = self.step(embedded[:, u : u + 1], state, memory, dropout)
            hidden.append(last_hidden)
            contexts.append(state[2])
            weights.append(token_weights)
        return self.output(torch.cat(hidden, 1), torch.cat(contexts, 1)), torch.cat(weights, 1)

    def initial_state(self, values: Tensor, beam: int) -> tuple:
        zeros = [values.new_zeros(values.shape[0], beam, size) for size in self.sizes]
        return zeros, zeros, values.new_zeros(values.shape[0], beam, values.shape[2])

    def step(self, embedded: Tensor, state: tuple, memory: tuple, dropout: list) -> tuple[Tensor, Tensor, tuple]:
        """Return the last cell's hidden state (B, K, H), attention weights (B, K, T) and the new state.

        `embedded` are the embeddings (B, K, M) of the previous tokens.
        """
        (keys, values, mask), (hidden, cells, context) = memory, state
        x, new_hidden, new_cells = torch.cat((embedded, context), 2), [], []
        for gates, h, c, drop in zip(self.cells, hidden, cells, dropout, strict=True):
            i, f, g, o = gates(torch.cat((x, h), 2)).chunk(4, 2)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            new_hidden.append(h)
            new_cells.append(c)
            x = h if drop is None else h * drop
        weights = F.softmax(torch.bmm(self.query(x), keys) + mask, -1)
        return x, weights, (new_hidden, new_cells, torch.bmm(weights, values))

    @torch.inference_mode()
    def search(self, listened: Tensor, lengths: Tensor, beam: int, steps: int) -> tuple[Tensor, Tensor]:
        """Return tokens (B, K, steps), best first, and scores (B, K); only the last token is <eos>."""
        B, V, device = listened.shape[0], len(self.bias), listened.device
        memory, dropout = self.project_memory(listened, lengths), self.masks(listened)
        state = self.initial_state(memory[1], beam)
        row = torch.arange(B, device=device)[:, None]
        tokens = torch.full((B, beam), SOS, device=device)
        scores = torch.full((B, beam), -torch.inf, device=device)
        scores[:, 0] = 0.0
        eos_masks = self.eos_mask(last=False), self.eos_mask(last=True)
        token_steps, parent_steps = [], []
        for u in range(steps):
            hidden, _, (h, c, context) = self.step(self.embedding(tokens), state, memory, dropout)
            log_probs = F.log_softmax(self.output(hidden, context).float(), -1) + eos_masks[u == steps - 1]
            scores, best = (scores[:, :, None] + log_probs).view(B, -1).topk(beam)
            parents, tokens = best // V, best % V
            state = [x[row, parents] for x in h], [x[row, parents] for x in c], context[row, parents]
            token_steps.append(tokens)
            parent_steps.append(parents)
        beams, path = torch.arange(beam, device=device).expand(B, -1), []
        for tokens, parents in zip(reversed(token_steps), reversed(parent_steps), strict=True):
            path.append(tokens.gather(1, beams))
            beams = parents.gather(1, beams)
        return torch.stack(path[::-1], 2), scores


# Variants for GPUs


class PlainPacked(Plain):
    bilstm = PackedBiLSTM


class PlainGraphed(Plain):
    """Plain whose decoder loop is one CUDA graph forward and one backward, captured anew for each batch shape.

    capture: False runs the same loop op by op, on any device.
    """

    def __init__(self, model: LAS, *, capture: bool = True):
        super().__init__(model)
        self.capture, self.graphs = capture, {}

    def spell(self, listened: Tensor, lengths: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        keys, values, mask = self.project_memory(listened, lengths)
        dtype, layers = keys.dtype, (*self.cells, self.query)
        embedded = self.embedding(shift_right(tokens)).to(dtype)
        dropout = [
            values.new_ones(len(values), 1, size) if mask is None else mask[:, None].to(dtype)
            for mask, size in zip(self.masks(values), self.sizes, strict=True)
        ]
        # Converted here, once, because autocast would convert them again for each token.
        weights = [x.to(dtype) for layer in layers for x in (layer.weight, layer.bias)]
        arguments = (embedded, keys, values, mask, *dropout, *weights)
        with torch.autocast(keys.device.type, enabled=False):
            hidden, contexts, attention = self.loop(arguments)(*arguments)
        return self.output(hidden, contexts), attention

    def loop(self, arguments: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        """Return decoder_loop, as CUDA graphs for the shapes of these arguments if gradients are needed."""
        if not self.capture or not torch.is_grad_enabled():
            return decoder_loop
        key = tuple((x.shape, x.dtype, x.requires_grad) for x in arguments)
        if key not in self.graphs:
            samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in arguments)
            self.graphs[key] = torch.cuda.make_graphed_callables(decoder_loop, samples)
        return self.graphs[key]


def decoder_loop(
    embedded: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run Plain.step over all tokens; return the outputs (B, U, H), contexts (B, U, E) and attention weights (B, U, T).

    Args:
        embedded:           (B, U, M) embeddings of the previous tokens.
        keys, values, mask: from Plain.project_memory.
        others:             a dropout mask (B, 1, H) per cell, then weight and bias of each cell and of the query.
    """
    count = (len(others) - 2) // 3  # cells
    dropout, weights = others[:count], list(zip(others[count::2], others[count + 1 :: 2], strict=True))
    hidden = [values.new_zeros(len(values), 1, x.shape[2]) for x in dropout]
    cells, context = list(hidden), values.new_zeros(len(values), 1, values.shape[2])
    outputs, contexts, attention = [], [], []
    for token in embedded.split(1, 1):
        x = torch.cat((token, context), 2)
        for n in range(count):
            i, f, g, o = F.linear(torch.cat((x, hidden[n]), 2), *weights[n]).chunk(4, 2)
            cells[n] = torch.sigmoid(f) * cells[n] + torch.sigmoid(i) * torch.tanh(g)
            hidden[n] = torch.sigmoid(o) * torch.tanh(cells[n])
            x = hidden[n] * dropout[n]
        attended = F.softmax((torch.bmm(F.linear(x, *weights[count]), keys) + mask).float(), -1)
        context = torch.bmm(attended.to(values.dtype), values)
        outputs.append(x)
        contexts.append(context)
        attention.append(attended)
    return torch.cat(outputs, 1), torch.cat(contexts, 1), torch.cat(attention, 1)
