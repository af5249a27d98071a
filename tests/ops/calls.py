"""Ways to call an op that its tests share: on the device of a backend, watched, compiled, and with more threads."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from las_fast.ops import backends

# Without a GPU the Triton kernels have proofs of their own (gpu_proof), and hundreds of skips here would hide others.
# speller_unroll alone has a fused form, and its tests name it.
COVERED = [n for n in backends.BACKENDS if n != "fused" and (n != "triton" or torch.cuda.is_available())]


# Ways to lay (B, N, M) tensors out other than one row after another.
LAYOUTS = {
    "dimensions 0 and 1 swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "dimensions 1 and 2 swapped": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "cut": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "expanded": lambda x: x[:1].expand_as(x),
}


def call(op, *arguments, backend, **options):
    """Return what `op` gives on the device that the backend takes, as tensors on the CPU."""
    device = backends.DEVICES.get(backend, "cpu")
    arguments, options = tree_map_only(Tensor, lambda x: x.to(device), (arguments, options))
    return tree_map_only(Tensor, lambda x: x.cpu(), op(*arguments, **options, backend=backend))


def ops_called(function) -> list[str]:
    """Return the names of the registered torch ops that reach a device while function() runs."""
    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Watch():
        function()
    return names


def compile_and_count(function):
    """Return function compiled without graph breaks, and the list that its graphs are added to."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=count), graphs


@contextlib.contextmanager
def threads(number: int):
    """Run the block on that number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def lanes(most: int):
    """Run the block with vectors of at most that many floats, as an older processor would."""
    before = torch.ops.las_fast.limit_lanes(most)
    try:
        yield
    finally:
        torch.ops.las_fast.limit_lanes(before)


def digests(check_and_digest) -> set[str]:
    """Return what check_and_digest() gives with vectors of 4, of 8 and of 16 floats, or as many as there are here."""
    found = set()
    for most in (4, 8, 16):
        with lanes(most):
            found.add(check_and_digest())
    return found
