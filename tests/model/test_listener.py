"""The listener: exact lengths, no effect of padding, LSTMs by ops.bilstm."""

import contextlib
import copy
import dataclasses
import importlib
from types import SimpleNamespace

import pytest
import torch
from streams import Race, Streams
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from las_fast.config import ListenerConfig, load_config
from las_fast.model import listener as listener_module
from las_fast.model.layers import locked_dropout, on_cuda
from las_fast.model.listener import CUDNN_ROWS, BiLSTM, ConvFrontEnd, Listener, convolve, halve_time
from las_fast.ops import backends
from las_fast.system import stream_for

bilstm_module = importlib.import_module("las_fast.ops.bilstm")  # las_fast.ops.bilstm is the function

SMALL = ListenerConfig(conv_channels=(8,), conv_kernels=(3,), conv_strides=(2,), lstm_size=6, pyramids=2, dropout=0.0)


def ragged(lengths, size=5, fill=0.0, seed=0):
    torch.manual_seed(seed)
    x = torch.full((len(lengths), max(lengths), size), fill)
    for row, length in enumerate(lengths):
        x[row, :length] = torch.randn(length, size)
    return x, torch.tensor(lengths)


def gradients(module, output, *leaves):
    """Return the gradients of a fixed weighting of the output, in leaves and in all parameters."""
    torch.manual_seed(1)
    module.zero_grad()
    (output * torch.randn(output.shape)).sum().backward()
    return [x.grad.clone() for x in (*leaves, *module.parameters()) if x.grad is not None]


@pytest.fixture
def like_cuda(monkeypatch):
    """Let CPU tensors take the paths of CUDA; returns the Streams that their ops run on."""
    streams = Streams(monkeypatch)
    monkeypatch.setattr(listener_module, "on_cuda", lambda x: True)
    stream_for.cache_clear()
    yield streams
    stream_for.cache_clear()


@pytest.mark.parametrize("lengths", [[7, 3, 1], [1], [4, 4], [0, 5]])
def test_a_layer_on_cuda_equals_the_op_in_value_and_gradient(lengths, monkeypatch, request):
    x, lengths = ragged(lengths)
    layer, results = BiLSTM(5, 6), []
    for device in ("cpu", "cuda"):
        if device == "cuda":
            request.getfixturevalue("like_cuda")
        leaf = x.clone().requires_grad_()
        output = layer(leaf, lengths)
        results.append([output, *gradients(layer, output, leaf)])
    assert len(results[0]) == 10
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [[33, 12, 5], [9] * 8, [21, 20, 19, 18, 17, 16, 15, 14, 13]])  # 3, 8, 9 rows
@pytest.mark.parametrize("taps", [(), (0, 1)])
def test_a_listener_on_cuda_that_pads_to_eight_utterances_equals_one_on_the_cpu(lengths, taps, request):
    torch.manual_seed(0)
    listener, results, seen = Listener(SMALL, 5), [], []
    listener.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(len(inputs[0])))
    for device in ("cpu", "cuda"):
        if device == "cuda":
            request.getfixturevalue("like_cuda")
        output, frames, tapped = listener(*ragged(lengths, fill=1e3), taps)
        outputs = [output, *(tapped[i][0] for i in taps)]
        results.append([*outputs, frames, *gradients(listener, torch.cat(outputs, 1))])
    assert seen == [len(lengths), 16 if len(lengths) == 9 else len(lengths)]
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=5e-5)


def test_the_two_directions_wait_for_each_other_and_record_their_streams(like_cuda):
    layer, (x, lengths) = BiLSTM(5, 6), ragged([7, 3, 1])
    with like_cuda:
        x, lengths = x + 0, lengths + 0
        for _ in range(2):
            output = layer(x, lengths)
            assert (output + 0).isfinite().all()
    assert like_cuda.used, "nothing crossed streams"
    assert like_cuda.unrecorded() == []


def test_a_missing_wait_or_record_is_detected(like_cuda, monkeypatch):
    layer, (x, lengths) = BiLSTM(5, 6), ragged([7, 3, 1])
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: None)
    with like_cuda:
        layer(x + 0, lengths + 0)
    assert (3, 7, 5) in like_cuda.unrecorded() and (3, 7, 6) in like_cuda.unrecorded()
    like_cuda.main.heeds_waits = False
    with like_cuda, pytest.raises(Race, match="cat on main reads memory of side"):
        layer(x + 0, lengths + 0)


def test_each_directions_weights_are_one_buffer_after_a_move_and_after_a_copy(monkeypatch):
    """Unless a call's weights are one buffer in cuDNN's order, cuDNN copies them at every call and PyTorch warns."""
    flattened = []
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", lambda *arguments: flattened.append(arguments))
    monkeypatch.setattr(torch, "_use_cudnn_rnn_flatten_weight", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda x: True)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "get_cudnn_mode", lambda mode: mode)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    lstm = BiLSTM(5, 6).lstm

    def check(module):
        (*_, forwards, backwards) = flattened
        for call, weights in ((forwards, module.all_weights[0]), (backwards, module.all_weights[1])):
            assert all(x is y for x, y in zip(call[0], weights, strict=True))
            assert call[1:] == (4, 5, "LSTM", 6, 0, 1, True, False)  # weights, input, mode, size, ..., one direction
        assert module.bidirectional and len(module._flat_weights) == 8

    check(lstm)
    flattened.clear()
    check(lstm.to(torch.float32))
    flattened.clear()
    check(copy.deepcopy(lstm))


def test_the_layer_keeps_the_names_of_a_bidirectional_lstm():
    names = nn.LSTM(5, 6, bidirectional=True).state_dict().keys()
    assert BiLSTM(5, 6).lstm.state_dict().keys() == names


def test_a_reversal_is_its_own_gradient():
    x, lengths = ragged([7, 3, 0, 1])
    x = x.double().requires_grad_()
    index = bilstm_module._reversal(lengths, 7)
    assert torch.autograd.gradcheck(bilstm_module._Reverse.apply, (x, index))
    assert torch.equal(bilstm_module._Reverse.apply(x, index), bilstm_module.reverse_within_lengths(x, lengths))


@pytest.mark.skipif(backends.unavailable("bilstm", "cpp") is not None, reason="the extension is not built")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_listener_uses_the_bilstm_op_forward_and_backward(precision):
    listener, x = Listener(SMALL, 5), ragged([40, 9, 1])
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output, _, _ = listener(*x)
        output.float().sum().backward()
    called = [event.name for event in profiled.events()]
    for op in ("las_fast::bilstm_cpp", "las_fast::bilstm_backward_cpp"):
        assert called.count(op) == len(listener.layers) == 3
    assert "aten::lstm" not in called


def test_a_convolution_on_cuda_is_the_same(like_cuda):
    conv, x = nn.Conv1d(3, 5, 3, 2, padding=1), torch.randn(2, 9, 3)
    torch.testing.assert_close(convolve(conv, x), conv(x.transpose(1, 2)).transpose(1, 2))


def test_only_cuda_tensors_take_the_paths_for_cuda():
    assert not on_cuda(torch.zeros(1)) and on_cuda(SimpleNamespace(device=torch.device("cuda", 0)))


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
    output, lengths, tapped = listener(*ragged([40, 9, 1]), taps=[3])
    assert lengths.tolist() == tapped[3][1].tolist() == [10, 3, 1] and output.shape == tapped[3][0].shape == (3, 10, 12)
    assert len(listener.layers) == 4 and listener.layers[3].lstm.input_size == 12


def test_an_utterance_shorter_than_the_pyramid_gives_one_frame():
    listener = Listener(ListenerConfig(conv_channels=(4,), lstm_size=3, pyramids=5), 5)
    output, lengths, _ = listener(*ragged([1]))
    assert output.shape[1] == lengths.item() == 1 and output.isfinite().all()


def test_padding_is_zero_after_training_too():
    listener = Listener(SMALL, 5).eval()
    for norm in listener.norms:
        nn.init.constant_(norm.bias, 0.5)  # zeros from a BiLSTM do not stay zeros
    output, lengths, tapped = listener(*ragged([33, 5]), taps=[1])
    inner, inner_lengths = tapped[1]
    assert not output[1, lengths[1] :].any() and not inner[1, inner_lengths[1] :].any()
    assert output[1, : lengths[1]].all()


@pytest.mark.parametrize("fill", [0.0, 1e3])
def test_padding_does_not_change_the_output(fill):
    torch.manual_seed(0)  # the front end rounds differently for another shape, by about 5e-7 before the LSTMs
    listener = Listener(SMALL, 5).eval()
    together, lengths, tapped = listener(*ragged([33, 12, 5, 1], fill=fill), taps=[1])
    inner, inner_lengths = tapped[1]
    x, frames = ragged([33, 12, 5, 1], fill=fill)
    for row, length in enumerate(frames.tolist()):
        alone, alone_length, alone_tapped = listener(x[row : row + 1, :length], frames[row : row + 1], taps=[1])
        assert alone_length == lengths[row]
        torch.testing.assert_close(together[row, : lengths[row]], alone[0], rtol=1e-5, atol=4e-6)
        torch.testing.assert_close(inner[row, : inner_lengths[row]], alone_tapped[1][0][0], rtol=1e-5, atol=4e-6)
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
    output, _, tapped = listener(*x, taps=[2])
    dropped = (output[0] == 0).all(0)
    assert 10 < dropped.sum() < 54 and ((output[0] == 0) == dropped).all()
    torch.testing.assert_close(output[0][:, ~dropped], 2 * tapped[2][0][0][:, ~dropped])
    assert not torch.equal(*(listener(*x, taps=[0])[2][0][0] for _ in range(2)))
    listener.eval()
    output, _, tapped = listener(*x, taps=[2])
    assert torch.equal(output, tapped[2][0])


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


def test_the_default_listener_reduces_time_eightfold():
    _, lengths, _ = Listener(ListenerConfig(conv_channels=(8,), lstm_size=4), 5)(*ragged([800]))
    assert lengths.item() == 100


@pytest.mark.parametrize(
    ("preset", "persistent"),
    [
        ("tiny", [True, True]),
        ("speech13h", [True] * 4),
        ("english", [True] * 5),
        ("librispeech100", [True] * 3),
        ("an4", [False] * 4),  # lstm_size 192
        ("hw4p2", [True] * 4),
    ],
)
def test_cudnn_may_use_persistent_kernels_for_these_layers_of_a_preset(preset, persistent):
    """PyTorch asks cuDNN for them if the sizes are multiples of 128, in float16 and with a batch of 8, 16, ..., 128."""
    config = load_config(preset)
    with torch.device("meta"):
        listener = Listener(config.model.listener, 28)
    lstms = [layer.lstm for layer in listener.layers]
    assert [x.hidden_size % 128 == x.input_size % 128 == 0 and x.hidden_size <= 1024 for x in lstms] == persistent
    assert config.data.utterances_per_batch <= 128 and CUDNN_ROWS == 8
