"""Benchmark bilstm, with gradients, on the listener layers of preset speech13h, against nn.LSTM.

Paths: packed (nn.LSTM on a packed sequence, which does not use oneDNN), reference (oneDNN on padded sequences, the
backward direction on reversed utterances) and cpp. `--long` adds batches of 1, 8 and 19 utterances.
"""

import pytest
import torch
from torch import nn

from benchmarks.synthetic_speech import frame_counts
from las_fast.ops import backends, bilstm
from las_fast.system import tune_memory

LAYERS = {"bilstm": (312, 256), "pyramid 1": (156, 1024), "pyramid 2": (78, 1024)}  # frames, input size
H = 256
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@pytest.fixture(autouse=True)
def tuned_memory():
    """Use the memory settings of the training command."""
    tune_memory()


def make(B, T, I):
    """Return x (B, T, I), lengths (B,) like those of a training batch, and an nn.LSTM."""
    torch.manual_seed(0)
    neighbours = torch.from_numpy(frame_counts(4000)).sort().values[2800 : 2800 + 12 * B : 12]
    lengths = (neighbours * T // neighbours.max()).clamp(min=1)[torch.randperm(B)]
    return torch.randn(B, T, I), lengths, nn.LSTM(I, H, batch_first=True, bidirectional=True)


def layer(path, x, lengths, lstm, dtype):
    """Return a function without arguments that runs the layer by one path."""

    def packed():
        sequence = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(lstm(sequence)[0], batch_first=True, total_length=x.shape[1])[0]

    def op():
        return bilstm(x, lengths, *lstm.all_weights, backend=path)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return packed() if path == "packed" else op()

    return run


def forward_and_backward(run, leaves, cotangent):
    """Return the output and the gradients of the leaves."""
    output = run()
    return output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))


def check_and_compare(compare, name, B, dtype, paths, rounds):
    if reason := backends.unavailable("bilstm", "cpp"):
        pytest.skip(reason)
    x, lengths, lstm = make(B, *LAYERS[name])
    x = x.to(dtype).requires_grad_()
    cotangent, leaves = torch.randn(B, x.shape[1], 2 * H), [x, *lstm.parameters()]
    runs = {path: layer(path, x, lengths, lstm, dtype) for path in paths}
    results = {path: forward_and_backward(run, leaves, cotangent) for path, run in runs.items()}
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for path in paths:
        for actual, expected in zip(results[path], results["reference"], strict=True):
            scale = expected.abs().max().item()  # the error of a sum over frames scales with its largest terms
            torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance * scale, rtol=tolerance)

    def infer(run):
        with torch.inference_mode():
            run()

    for what, task in (("training", lambda run: forward_and_backward(run, leaves, cotangent)), ("inference", infer)):
        compare(
            "bilstm",
            {path: lambda run=run, task=task: task(run) for path, run in runs.items()},
            what=f"bilstm {what}",
            shape=f"B{B} T{x.shape[1]} I{x.shape[2]} H{H}",
            dtypes=dict.fromkeys(paths, DTYPES[dtype]),
            baseline="reference",
            rounds=rounds,
            per=1e-3,
            unit="ms",
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize("name", LAYERS)
def test_bilstm(compare, name, dtype):
    packed = ["packed"] if dtype == torch.float32 else []  # in bfloat16 it takes seconds
    check_and_compare(compare, name, 31, dtype, [*packed, "reference", "cpp"], rounds=5)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize("B", [1, 8, 19])
@pytest.mark.parametrize("name", LAYERS)
def test_bilstm_by_batch(compare, long, name, B, dtype):
    check_and_compare(compare, name, B, dtype, ["reference", "cpp"], rounds=9)
