"""Benchmark masked_attention, one decoder step with gradients, against torch's SDPA, which returns no weights."""

import pytest
import torch

from benchmarks.library_calls import SDPA, sdpa
from las_fast.ops import backends, masked_attention, padding_mask

SHAPES = {
    "search": (16, 8, 200, 256, 256),
    "training": (32, 1, 200, 256, 256),
    "one utterance": (1, 8, 400, 256, 256),
    "greedy": (1, 1, 400, 256, 256),
    "long": (1, 8, 8192, 256, 256),
}
PATHS = ["reference", "cpp", SDPA]


def make(name, dtype):
    B, K, T, D, E = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in ((B, K, D), (B, T, D), (B, T, E))]
    return *tensors, torch.linspace(T, T // 2, B).long()


def attention(path, lengths, T, weights=False):
    """Return a function (query, keys, values) -> context; the masks are computed once, outside of it."""
    padding = padding_mask(lengths, T)
    valid = ~padding
    if path == SDPA:
        return lambda *x: sdpa(*x, valid)
    if reason := backends.unavailable("masked_attention", path):
        pytest.skip(reason)
    return lambda *x: masked_attention(*x, lengths, padding=padding, weights=weights, backend=path)[0]


def shape_of(name):
    return " ".join(f"{letter}{size}" for letter, size in zip("BKTDE", SHAPES[name], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SHAPES)
def test_masked_attention(measure, name, path, dtype):
    *tensors, lengths = make(name, dtype)
    T = tensors[1].shape[1]
    run, reference = attention(path, lengths, T), attention("reference", lengths, T)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(run(*tensors), reference(*tensors), atol=tolerance, rtol=tolerance)
    measure(lambda: run(*tensors), op="masked_attention", backend=path, shape=shape_of(name), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["training"])
def test_masked_attention_with_gradients(measure, name, path, dtype):
    *tensors, lengths = make(name, dtype)
    T = tensors[1].shape[1]
    leaves = [x.requires_grad_() for x in tensors]

    def gradients(function):
        with torch.inference_mode(False), torch.enable_grad():
            context = function(*leaves)
            return torch.autograd.grad(context, leaves, torch.ones_like(context))

    run, reference = (attention(x, lengths, T, weights=True) for x in (path, "reference"))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for actual, expected in zip(gradients(run), gradients(reference), strict=True):
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    measure(lambda: gradients(run), op="masked_attention gradients", backend=path, shape=shape_of(name), dtype=dtype)
