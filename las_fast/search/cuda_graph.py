"""A chunk of a search as a CUDA graph: what the host would enqueue call by call is recorded once and then replayed.

Memory is padded to a few sizes, so that batches share graphs. A graph reads and writes fixed buffers: a search copies
its memory and its first beams in, each replay leaves the beams as the next one takes them up, and what a chunk found is
copied out before the next replay writes over it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

GRAPHS = 4  # kept for a model; each holds a copy of a batch's keys and values
FRAMES = 64  # encoder frames are padded to a multiple of it

_kept: WeakKeyDictionary[Any, OrderedDict[Hashable, Captured]] = WeakKeyDictionary()
_lock = threading.Lock()


def bucket(batch: int, frames: int) -> tuple[int, int]:
    """Return the size that memory of (batch, frames) is padded to."""
    return 1 << max(batch - 1, 0).bit_length(), -(-frames // FRAMES) * FRAMES


class CudaGraph:
    """torch.cuda.CUDAGraph behind the two calls that are needed of it."""

    def capture(self, function: Callable[[], Any]) -> Any:
        """Record what function enqueues; return its results, which each replay writes again."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # once for real: a capture must not compile kernels or make workspaces
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do meanwhile, such as pinning a batch, must not spoil the capture.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        self.graph.replay()


class Captured:
    """One chunk over buffers of its own.

    Args:
        advance: (inputs, beams) -> (beams, found): enqueues a chunk; not kept. All are nested tuples of tensors.
        inputs:  what a chunk only reads; copied.
        beams:   what it takes up and hands on; copied.
    """

    def __init__(self, advance: Callable[[Any, Any], tuple[Any, Any]], inputs: Any, beams: Any):
        # Clones: tensors that are one and the same before the first step part ways after it.
        self.inputs, self.beams = tree_map_only(Tensor, torch.clone, (inputs, beams))

        def chunk() -> Any:
            after, found = advance(self.inputs, self.beams)
            _copy(self.beams, after)
            return found

        self.graph = CudaGraph()
        self.found = self.graph.capture(chunk)
        self.used: torch.cuda.Event | None = None  # comes after everything enqueued so far that touches the buffers

    def run(self, inputs: Any, beams: Any) -> Iterator[Any]:
        """Yield what each chunk finds, endlessly; a chunk is enqueued when it is asked for."""
        if self.used is not None:
            self.used.wait()  # the current stream may be another than the last user's
        _copy(self.inputs, inputs)
        _copy(self.beams, beams)
        while True:
            self.graph.replay()
            yield tree_map_only(Tensor, torch.clone, self.found)

    def leave(self) -> None:
        """Let whoever comes next wait until all that is enqueued has run."""
        if any(x.is_cuda for x in tree_leaves(self.beams) if isinstance(x, Tensor)):
            self.used = torch.cuda.Event()
            self.used.record()


def _copy(buffers: Any, tensors: Any) -> None:
    for buffer, tensor in zip(tree_leaves(buffers), tree_leaves(tensors), strict=True):
        if isinstance(buffer, Tensor) and buffer is not tensor:
            buffer.copy_(tensor)


@contextmanager
def captured(
    model: Any, settings: Hashable, advance: Callable[[Any, Any], tuple[Any, Any]], inputs: Any, beams: Any
) -> Iterator[Iterator[Any]]:
    """Give the chunks of a search (Captured.run) by a graph of its sizes and settings, captured if it is a new one.

    Until the block ends, no other thread gets one: they share buffers.

    Args:
        model:    what advance calls; its graphs end with it.
        settings: all that advance depends on besides model, inputs and beams. They are kept alive with the graph.
    """
    with _lock:
        graphs = _kept.setdefault(model, OrderedDict())
        key = (settings, _places(model), _sizes(inputs), _sizes(beams))
        if key not in graphs:
            if len(graphs) == GRAPHS:
                graphs.popitem(last=False)  # before the new one takes its memory
            graphs[key] = Captured(advance, inputs, beams)
        graphs.move_to_end(key)
        try:
            yield graphs[key].run(inputs, beams)
        finally:
            graphs[key].leave()


def forget() -> None:
    """Free the memory of all graphs."""
    with _lock:
        _kept.clear()


def _places(model: Any) -> Hashable:
    """Return where the weights lie: a graph reads them there."""
    if not isinstance(model, torch.nn.Module):
        return ()
    return tuple((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in (*model.parameters(), *model.buffers()))


def _sizes(tree: Any) -> Hashable:
    """Return what copying into a graph's buffers takes for granted."""
    return tuple((tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else x for x in tree_leaves(tree))
