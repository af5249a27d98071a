"""Run code for CUDA on the CPU, to find wrong names, arguments and shapes. Results and times mean nothing."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.device import checks, decoding
from las_fast import checkpoint
from las_fast.search import cuda_graph


class OnTheCpu(TorchFunctionMode):
    """Replaces the device "cuda" by "cpu" in every call of torch."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        def on_cpu(x):
            is_cuda = x == "cuda" if isinstance(x, str) else isinstance(x, torch.device) and x.type == "cuda"
            return "cpu" if is_cuda else x

        arguments, named = tree_map(on_cpu, (tuple(arguments), dict(named or {})))
        return function(*arguments, **named)


class Event:
    def __init__(self, enable_timing=False):
        assert enable_timing, "elapsed_time needs an event with enable_timing"
        self.time = None

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        assert self.time is not None, "the event was not recorded"

    def elapsed_time(self, end):
        return max(1e3 * (end.time - self.time), 1e-3)


class Graph:
    """Stands for torch.cuda.CUDAGraph. A replay does nothing: the Python code that it captured ran already."""

    def replay(self):
        pass


class CapturedFunction:
    """Stands for las_fast's CudaGraph. A replay calls the function again and overwrites the captured results."""

    def capture(self, function):
        self.function, self.results = function, function()
        return self.results

    def replay(self):
        for old, new in zip(tree_leaves(self.results), tree_leaves(self.function()), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)


@contextlib.contextmanager
def pretend_cuda():
    """Let "cuda" be the CPU inside the block."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": lambda graph: contextlib.nullcontext(),
        "Stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda: stream,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "make_graphed_callables": graphed,
        "max_memory_allocated": lambda: 2**30,
        "reset_peak_memory_stats": lambda: None,
        "get_device_name": lambda: "a pretended GPU",
        "device": lambda device: contextlib.nullcontext(),
    }

    def load_model(name, device="cpu"):
        return checkpoint.load_model(name)

    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        for module in (checks, decoding):
            stack.enter_context(mock.patch.object(module, "load_model", load_model))
        stack.enter_context(mock.patch.object(cuda_graph, "CudaGraph", CapturedFunction))
        stack.enter_context(OnTheCpu())
        yield


def graphed(function, samples):
    """Stands for torch.cuda.make_graphed_callables, and checks the arguments as it does."""
    assert not torch.is_autocast_enabled("cuda") and all(isinstance(x, Tensor) and x.is_leaf for x in samples)
    outputs = function(*samples)
    torch.autograd.grad([x for x in outputs if x.requires_grad], [x for x in samples if x.requires_grad],
                        [torch.ones_like(x) for x in outputs if x.requires_grad])  # fmt: skip

    def call(*arguments):
        for x, sample in zip(arguments, samples, strict=True):
            assert (x.shape, x.dtype, x.requires_grad) == (sample.shape, sample.dtype, sample.requires_grad)
        return function(*arguments)

    return call
