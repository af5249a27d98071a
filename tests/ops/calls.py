"""Helpers of the tests of ops: call an op on a backend's device, record its torch ops, compile it, set threads."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from las_fast.ops import backends

# Without a GPU, tests/gpu_proof checks the Triton kernels; hundreds of skips here would hide others.
# Only speller_unroll has a fused form, and its tests name it.
TESTED_BACKENDS = [n for n in backends.BACKENDS if n != "fused" and (n != "triton" or torch.cuda.is_available())]


# Copies of (B, N, M) tensors that are not contiguous.
LAYOUTS = {
    "dimensions 0 and 1 transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "dimensions 1 and 2 transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "expanded": lambda x: x[:1].expand_as(x),
}


def call(op, *arguments, backend, **options):
    """Call `op` on the device of a backend; return its results on the CPU."""
    device = backends.DEVICES.get(backend, "cpu")
    arguments, options = tree_map_only(Tensor, lambda x: x.to(device), (arguments, options))
    return tree_map_only(Tensor, lambda x: x.cpu(), op(*arguments, **options, backend=backend))


def ops_called(function) -> list[str]:
    """Names of the torch ops that reach a device during function()."""
    names = []

    class RecordNames(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with RecordNames():
        function()
    return names


def compile_and_count(function):
    """Compile a function without graph breaks. Returns it and a list that gets each of its graphs."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=count), graphs


@contextlib.contextmanager
def threads(number: int):
    """Set the number of threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def setting(op, value):
    """Call op(value), which returns the previous value, and restore that after the block."""
    before = op(value)
    try:
        yield
    finally:
        op(before)


def lanes(limit: int):
    """Limit C++ vectors to this many floats inside the block, as on an older processor."""
    return setting(torch.ops.las_fast.limit_lanes, limit)


def tiles(allowed: bool):
    """Allow C++ to use AMX inside the block, or not, as on a processor without it."""
    return setting(torch.ops.las_fast.allow_tiles, allowed)


def digests(check_and_digest) -> set[str]:
    """The distinct results of check_and_digest() with vectors limited to 4, 8 and 16 floats, and with AMX tiles."""
    results = set()
    for limit, allowed in ((4, False), (8, False), (16, False), (16, True)):
        with lanes(limit), tiles(allowed):
            results.add(check_and_digest())
    return results


def assert_as_accurate_as_plain(names, actual, exact, baseline, dtype) -> None:
    """Compare results, by name, with the float64 ones.

    The RMS error may be twice that of the plain formula in the same dtype, and the largest error four times, because a
    single value varies more. Each may exceed that by a rounding of the largest result.
    """
    for name, a, b, c in zip(names, actual, exact, baseline, strict=True):
        rounding = torch.finfo(dtype).eps * b.abs().max()
        for error, baseline_error, factor in zip(errors(a, b), errors(c, b), (2, 4), strict=True):
            allowed = factor * baseline_error + rounding
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def errors(actual, exact):
    """The RMS error and the largest error."""
    error = (actual - exact).abs()
    return error.square().mean().sqrt(), error.max()
