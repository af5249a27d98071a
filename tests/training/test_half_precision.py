"""Loss scaling where PyTorch runs cuDNN's LSTMs in float16: a stand-in rounds like cuDNN, which stores float16."""

import importlib
import sys
from dataclasses import replace

import pytest
import torch
from streams import Streams
from tiny_checkpoints import MODEL
from torch.autograd.function import once_differentiable

from las_fast.model import listener
from las_fast.model.las import LAS
from las_fast.training.losses import training_loss
from las_fast.training.step import needs_loss_scale

bilstm_module = importlib.import_module("las_fast.ops.bilstm")
TOKENS = 13_500  # of a batch of preset hw4p2: the loss is a mean over as many


def half(x):
    return x.half().float()


class HalfLSTM(torch.autograd.Function):
    """One direction of an LSTM: sums in float32; inputs, gates, states, outputs and gradients stored in float16."""

    @staticmethod
    def forward(ctx, x, w_ih, w_hh, b_ih, b_hh):
        x, w_ih, w_hh = half(x), half(w_ih), half(w_hh)
        before = x @ w_ih.T + half(b_ih) + half(b_hh)
        h = c = x.new_zeros(len(x), w_hh.shape[1])
        kept = []
        for t in range(x.shape[1]):
            i, f, g, o = (before[:, t] + h @ w_hh.T).chunk(4, 1)
            i, f, g, o = (half(gate) for gate in (i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()))
            last = h, c
            c = half(f * c + i * g)
            h = half(o * c.tanh())
            kept.append((i, f, g, o, *last, c, h))
        ctx.kept = kept
        ctx.save_for_backward(x, w_ih, w_hh)
        return torch.stack([step[-1] for step in kept], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x, w_ih, w_hh), gradient = ctx.saved_tensors, half(gradient)
        dh, dc, gates = 0.0, 0.0, []
        for t in reversed(range(x.shape[1])):
            i, f, g, o, _, last_c, c, _ = ctx.kept[t]
            dh = gradient[:, t] + dh
            dc = dc + dh * o * (1 - c.tanh() ** 2)
            parts = dc * g * i * (1 - i), dc * last_c * f * (1 - f), dc * i * (1 - g**2), dh * c.tanh() * o * (1 - o)
            gates.append(half(torch.cat(parts, 1)))
            dh, dc = half(gates[-1] @ w_hh), half(dc * f)
        gates = torch.stack(gates[::-1], 1)
        hidden = torch.stack([step[4] for step in ctx.kept], 1)
        bias = half(gates.sum((0, 1)))
        return (half(gates @ w_ih), half(torch.einsum("btg,bti->gi", gates, x)),
                half(torch.einsum("btg,bth->gh", gates, hidden)), bias, bias)  # fmt: skip


def lstm_gradients(model, batch, *, scaled):
    """Return the gradients of the LSTM weights of each layer; scaled: as bf16 training on CUDA scales the loss."""
    features, lengths, tokens, token_lengths = batch
    output = model(features, lengths, tokens)
    options = {"label_smoothing": 0.0, "ctc_weight": 0.0, "guided_weight": 1.0, "guided_width": 0.2}
    loss, _ = training_loss(output, tokens, token_lengths, **options)
    optimiser = torch.optim.SGD(model.parameters())
    optimiser.zero_grad()
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    scaler.scale(loss * token_lengths.sum() / TOKENS).backward()
    scaler.unscale_(optimiser)
    return [torch.cat([x.grad.flatten() for x in layer.parameters()]) for layer in model.listener.layers]


@pytest.fixture
def errors(monkeypatch):
    """A function of whether the loss is scaled: relative error of the LSTM gradients in each layer."""
    torch.manual_seed(0)
    sizes = replace(MODEL, listener=replace(MODEL.listener, lstm_size=24, pyramids=2, dropout=0.0))
    model = LAS(sizes, input_size=12, vocabulary_size=31).eval()  # without dropout
    token_lengths = torch.tensor([12, 9, 11, 10])
    tokens = torch.randint(3, 31, (4, 12)).masked_fill(torch.arange(12) >= token_lengths[:, None], 0)
    batch = torch.randn(4, 96, 12), torch.tensor([96, 80, 90, 70]), tokens, token_lengths
    exact = lstm_gradients(model, batch, scaled=False)

    def errors(scaled: bool) -> list[float]:
        gradients = lstm_gradients(model, batch, scaled=scaled)
        return [float((x - y).norm() / y.norm()) for x, y in zip(gradients, exact, strict=True)]

    Streams(monkeypatch)
    monkeypatch.setattr(listener, "on_cuda", lambda x: True)
    monkeypatch.setattr(bilstm_module, "_direction", lambda x, weights: HalfLSTM.apply(x, *weights))
    return errors


def test_scaling_the_loss_keeps_the_gradients_of_float16_lstms_accurate(errors):
    unscaled, scaled = errors(False), errors(needs_loss_scale(torch.bfloat16, torch.device("cuda")))
    for before, after in zip(unscaled, scaled, strict=True):
        assert after < 0.005 and before > 2 * after, (unscaled, scaled)


def test_the_stand_in_without_rounding_equals_the_lstm(errors, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "half", lambda x: x)
    assert max(errors(False)) < 1e-5


@pytest.mark.parametrize(
    ("precision", "device", "scaled"),
    [
        ("float32", "cuda", False), ("bfloat16", "cuda", True), ("float16", "cuda", True),
        ("float32", "cpu", False), ("bfloat16", "cpu", False), ("float16", "cpu", True),
    ],
)  # fmt: skip
def test_the_loss_is_scaled_wherever_gradients_pass_through_float16(precision, device, scaled):
    assert needs_loss_scale(getattr(torch, precision), torch.device(device)) is scaled
