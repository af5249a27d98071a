"""A bidirectional LSTM layer of preset speech13h's listener and its gradients, beside what PyTorch offers on a CPU.

Paths: packed (nn.LSTM over a packed sequence, which misses oneDNN), reference (oneDNN over padding, one direction over
reversed utterances), cpp. Times are in ms; `--long` also takes batches of 8 and 19 utterances.
"""

import pytest
import torch
from torch import nn

from benchmarks.made import frame_counts
from las_fast.ops import backends, bilstm
from las_fast.system import tune_memory

LAYERS = {"bilstm": (312, 256), "pyramid 1": (156, 1024), "pyramid 2": (78, 1024)}  # frames, inputs
H = 256
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@pytest.fixture(autouse=True)
def as_in_training():
    tune_memory()


def made(B, T, I):
    """Return x (B, T, I), lengths as of a bucket of utterances, and an nn.LSTM."""
    torch.manual_seed(0)
    near = torch.from_numpy(frame_counts(4000)).sort().values[2800 : 2800 + 12 * B : 12]
    lengths = (near * T // near.max()).clamp(min=1)[torch.randperm(B)]
    return torch.randn(B, T, I), lengths, nn.LSTM(I, H, batch_first=True, bidirectional=True)


def layer(path, x, lengths, lstm, dtype):
    """Return the layer by that path, as a function of nothing."""

    def packed():
        rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(lstm(rows)[0], batch_first=True, total_length=x.shape[1])[0]

    def op():
        return bilstm(x, lengths, *lstm.all_weights, backend=path)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return packed() if path == "packed" else op()

    return run


def trained(run, leaves, cotangent):
    output = run()
    return output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))


def check_and_compare(compare, name, B, dtype, paths, rounds):
    if reason := backends.unavailable("bilstm", "cpp"):
        pytest.skip(reason)
    x, lengths, lstm = made(B, *LAYERS[name])
    x = x.to(dtype).requires_grad_()
    cotangent, leaves = torch.randn(B, x.shape[1], 2 * H), [x, *lstm.parameters()]
    runs = {path: layer(path, x, lengths, lstm, dtype) for path in paths}
    found = {path: trained(run, leaves, cotangent) for path, run in runs.items()}
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for path in paths:
        for a, b in zip(found[path], found["reference"], strict=True):
            scale = b.abs().max().item()  # a sum over all frames errs with its largest parts
            torch.testing.assert_close(a.float(), b.float(), atol=tolerance * scale, rtol=tolerance)

    def infer(run):
        with torch.inference_mode():
            run()

    for what, timed in (("training", lambda run: trained(run, leaves, cotangent)), ("inference", infer)):
        compare(
            "bilstm",
            {path: lambda run=run, timed=timed: timed(run) for path, run in runs.items()},
            what=f"bilstm {what}",
            shape=f"B{B} T{x.shape[1]} I{x.shape[2]} H{H}",
            dtypes=dict.fromkeys(paths, NAMES[dtype]),
            baseline="reference",
            rounds=rounds,
            per=1e-3,
            unit="ms",
        )


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("name", LAYERS)
def test_bilstm(compare, name, dtype):
    packed = ["packed"] if dtype == torch.float32 else []  # in bfloat16 it takes seconds
    check_and_compare(compare, name, 31, dtype, [*packed, "reference", "cpp"], rounds=5)


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("B", [1, 8, 19])
@pytest.mark.parametrize("name", LAYERS)
def test_bilstm_by_batch(compare, long, name, B, dtype):
    check_and_compare(compare, name, B, dtype, ["reference", "cpp"], rounds=9)
