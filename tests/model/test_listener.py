"""The listener: exact lengths, no effect of padding, LSTMs by ops.bilstm."""

import dataclasses
import importlib

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from las_fast.config import ListenerConfig
from las_fast.model.layers import locked_dropout
from las_fast.model.listener import BiLSTM, ConvFrontEnd, Listener, convolve, halve_time
from las_fast.ops import backends

SMALL = ListenerConfig(conv_channels=(8,), conv_kernels=(3,), conv_strides=(2,), lstm_size=6, pyramids=2, dropout=0.0)


def ragged(lengths, size=5, fill=0.0, seed=0):
    torch.manual_seed(seed)
    x = torch.full((len(lengths), max(lengths), size), fill)
    for row, length in enumerate(lengths):
        x[row, :length] = torch.randn(length, size)
    return x, torch.tensor(lengths)


@pytest.mark.parametrize("lengths", [[7, 3, 1], [1], [4, 4]])
def test_bilstm_without_packing_equals_a_packed_lstm_in_value_and_gradient(lengths):
    x, lengths = ragged(lengths)
    layer = BiLSTM(5, 6)
    torch.manual_seed(1)
    weight = torch.randn(len(lengths), x.shape[1], 12)
    results = []
    for run in (layer, layer._packed):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        output = run(leaf, lengths)
        (output * weight).sum().backward()
        results.append([output, leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for ours, packed in zip(*results, strict=True):
        torch.testing.assert_close(ours, packed, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(backends.unavailable("bilstm", "cpp") is not None, reason="the extension is not built")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_listener_uses_the_bilstm_op_forward_and_backward(monkeypatch, precision):
    monkeypatch.setattr(importlib.import_module("las_fast.ops.bilstm"), "HAS_AMX", False)
    listener, x = Listener(SMALL, 5), ragged([40, 9, 1])
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output, _, _ = listener(*x)
        output.float().sum().backward()
    called = [event.name for event in profiled.events()]
    for op in ("las_fast::bilstm_cpp", "las_fast::bilstm_backward_cpp"):
        assert called.count(op) == len(listener.layers) == 3
    assert "aten::lstm" not in called


class OnCuda(Tensor):
    """A CPU tensor whose device is reported as CUDA."""

    device = torch.device("cuda")


def test_the_cuda_path_gives_the_same_result():
    conv, x = nn.Conv1d(3, 5, 3, 2, padding=1), torch.randn(2, 9, 3)
    torch.testing.assert_close(convolve(conv, x.as_subclass(OnCuda)).as_subclass(Tensor), convolve(conv, x))
    layer, lengths, packed = BiLSTM(3, 4), torch.tensor([9, 4]), []

    def pack(x, lengths):
        packed.append(1)
        return BiLSTM._packed(layer, x.as_subclass(Tensor), lengths)

    layer._packed = pack
    actual = layer(x.as_subclass(OnCuda), lengths)
    assert packed == [1]
    torch.testing.assert_close(actual, layer(x, lengths))
    assert packed == [1]


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 2, 2, 1), (2, 0, 1, 2), (3, 1, 1, 4)])
def test_convolve_equals_conv1d_on_a_cpu(stride, padding, dilation, groups):
    conv = nn.Conv1d(4, 8, 3, stride, padding, dilation, groups)
    x = torch.randn(2, 11, 4)
    torch.testing.assert_close(convolve(conv, x), conv(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("kernel,stride", [(3, 1), (5, 2), (7, 3), (1, 2)])
def test_front_end_lengths_are_exact_and_never_zero(kernel, stride):
    config = ListenerConfig(conv_channels=(4,), conv_kernels=(kernel,), conv_strides=(stride,))
    front = ConvFrontEnd(config, 5)
    for frames in range(1, 12):
        output, lengths = front(*ragged([frames]))
        assert lengths.item() == output.shape[1] == -(-frames // stride)


def test_an_odd_last_frame_is_kept():
    x = torch.arange(3.0).view(1, 3, 1)
    halved, lengths = halve_time(x, torch.tensor([3]))
    assert halved.tolist() == [[[0.0, 1.0], [2.0, 0.0]]] and lengths.tolist() == [2]


def test_lengths_are_halved_individually():
    listener = Listener(SMALL, 5)
    _, lengths, _ = listener(*ragged([40, 9, 1]))
    assert lengths.tolist() == [5, 2, 1]


def test_layers_above_the_pyramid_keep_the_length_and_can_be_tapped():
    listener = Listener(dataclasses.replace(SMALL, pyramids=1, top_layers=2), 5)
    output, lengths, tapped = listener(*ragged([40, 9, 1]), tap=3)
    assert lengths.tolist() == tapped[1].tolist() == [10, 3, 1] and output.shape == tapped[0].shape == (3, 10, 12)
    assert len(listener.layers) == 4 and listener.layers[3].lstm.input_size == 12


def test_an_utterance_shorter_than_the_pyramid_gives_one_frame():
    listener = Listener(ListenerConfig(conv_channels=(4,), lstm_size=3, pyramids=5), 5)
    output, lengths, _ = listener(*ragged([1]))
    assert output.shape[1] == lengths.item() == 1 and output.isfinite().all()


@pytest.mark.parametrize("fill", [0.0, 1e3])
def test_padding_does_not_change_the_output(fill):
    torch.manual_seed(0)  # the front end rounds differently for another shape, by about 5e-7 before the LSTMs
    listener = Listener(SMALL, 5).eval()
    together, lengths, tapped = listener(*ragged([33, 12, 5, 1], fill=fill), tap=1)
    x, frames = ragged([33, 12, 5, 1], fill=fill)
    for row, length in enumerate(frames.tolist()):
        alone, alone_length, alone_tapped = listener(x[row : row + 1, :length], frames[row : row + 1], tap=1)
        assert alone_length == lengths[row]
        torch.testing.assert_close(together[row, : lengths[row]], alone[0], rtol=1e-5, atol=4e-6)
        torch.testing.assert_close(tapped[0][row, : tapped[1][row]], alone_tapped[0][0], rtol=1e-5, atol=4e-6)
        assert (together[row, lengths[row] :] == 0).all()


def test_padding_between_two_convolutions_does_not_change_the_output():
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, conv_channels=(8, 8), conv_kernels=(3, 5), conv_strides=(1, 2), pyramids=0)
    listener = Listener(config, 5).eval()
    x, frames = ragged([21, 12, 5, 1], fill=1e3)
    together, lengths, _ = listener(x, frames)
    for row, length in enumerate(frames.tolist()):
        alone, _, _ = listener(x[row : row + 1, :length], frames[row : row + 1])
        torch.testing.assert_close(together[row, : lengths[row]], alone[0], rtol=1e-5, atol=4e-6)


def test_locked_dropout_is_shared_over_time_and_not_over_the_batch():
    dropped = locked_dropout(torch.ones(8, 5, 64), 0.5, True) == 0
    assert (dropped == dropped[:, :1]).all()
    assert not (dropped == dropped[:1]).all()
    assert locked_dropout(torch.ones(2, 3, 4), 0.5, False).eq(1).all()


def test_locked_dropout_keeps_the_mean():
    torch.manual_seed(0)
    assert locked_dropout(torch.ones(400, 1, 400), 0.3, True).mean().sub(1).abs() < 0.01


def test_a_listener_in_training_drops_its_inputs_and_its_output():
    torch.manual_seed(0)
    listener, x = Listener(dataclasses.replace(SMALL, lstm_size=32, dropout=0.5), 5), ragged([40])
    output, _, tapped = listener(*x, tap=2)
    dropped = (output[0] == 0).all(0)
    assert 10 < dropped.sum() < 54 and ((output[0] == 0) == dropped).all()
    torch.testing.assert_close(output[0][:, ~dropped], 2 * tapped[0][0][:, ~dropped])
    assert not torch.equal(listener(*x, tap=0)[2][0], listener(*x, tap=0)[2][0])
    listener.eval()
    output, _, tapped = listener(*x, tap=2)
    assert torch.equal(output, tapped[0])


def test_each_gate_is_initialised_within_its_own_xavier_bound():
    torch.manual_seed(0)
    lstm = BiLSTM(5, 6).lstm
    bound = (6 / (5 + 6)) ** 0.5
    for gate in lstm.weight_ih_l0.split(6):
        assert 0.8 * bound < gate.abs().max() <= bound


def test_forget_biases_start_at_1_and_recurrence_orthogonal():
    lstm = BiLSTM(5, 6).lstm
    assert (lstm.bias_ih_l0[6:12] == 1).all() and lstm.bias_hh_l0_reverse.eq(0).all()
    gate = lstm.weight_hh_l0[:6]
    torch.testing.assert_close(gate @ gate.T, torch.eye(6), atol=1e-5, rtol=0)
    assert isinstance(lstm, nn.LSTM)


def test_default_reduces_time_eight_fold():
    _, lengths, _ = Listener(ListenerConfig(conv_channels=(8,), lstm_size=4), 5)(*ragged([800]))
    assert lengths.item() == 100
