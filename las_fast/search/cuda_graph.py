"""Beam search by CUDA graphs: a chunk of steps is captured once and then replayed, instead of launched op by op.

Memory is padded to a few sizes, so that batches share graphs. A graph reads and writes fixed buffers. A search copies
its inputs and first beams into them. Each replay leaves the beams where the next one reads them, and the steps of a
chunk are copied out before the next replay overwrites them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from las_fast.model.attention import Memory
from las_fast.ops import Steps, backends
from las_fast.ops.beam_topk import triton_problem as too_many_candidates
from las_fast.ops.masked_attention import triton_problem as too_wide
from las_fast.search.steps import Search, TokenLimits, advance, begin, chunks_in_flight, max_chunks, run_chunks
from las_fast.system import stream_for

MAX_GRAPHS = 16  # per model, enough for the sizes of a sorted test set; each holds a copy of a batch's keys and values
FRAMES_MULTIPLE = 64  # encoder frames are padded to a multiple of it

_graphs: WeakKeyDictionary[Any, OrderedDict[Hashable, GraphedChunk]] = WeakKeyDictionary()
_lock = threading.Lock()


def can_capture(search: Search, memory) -> bool:
    """Return whether a search can be captured: on CUDA, without autocast, if the Triton ops take its sizes."""
    device = memory.lengths.device
    if device.type != "cuda" or torch.is_autocast_enabled("cuda"):  # a graph would outlive autocast's cached weights
        return False
    problems = {"beam_topk": too_many_candidates(search.config.beam, search.model.vocabulary_size)}
    if isinstance(memory, Memory):
        problems["masked_attention"] = too_wide(memory.keys, memory.keys, memory.values)
    optional = {"ctc_prefix": search.config.ctc_weight, "ngram_scores": search.ngram}
    ops = ("masked_attention", "beam_topk", "beam_gather", *(op for op, used in optional.items() if used))
    return all(
        backends.choose(op, search.backend, device, unsupported={"triton": problems.get(op)}) == "triton" for op in ops
    )


def search_by_graph(search: Search, memory, limits: TokenLimits) -> Steps:
    """Run the search by replaying CUDA graphs; (L, B, K)."""
    B = memory.lengths.shape[0]
    memory = memory.padded(*bucket(*memory.padding.shape))
    added = memory.lengths.shape[0] - B
    inputs, beams = begin(search, memory, TokenLimits(*(F.pad(x, (0, added)) for x in limits)))
    beams.finished[B:] = True  # utterances added as padding have ended, so their limits have no effect
    # The graph reads the n-gram model in place. The key keeps the model alive as long as the graph.
    settings = (search.config, search.ngram, search.backend, torch.backends.cuda.matmul.fp32_precision)
    with graphed_chunks(search.model, settings, partial(advance, search), inputs, beams) as chunks:
        steps = run_chunks(chunks, max_chunks(search, memory), chunks_in_flight(memory))
    return Steps(*(x[:, :B].contiguous() for x in steps))


def bucket(batch: int, frames: int) -> tuple[int, int]:
    """Return the padded size, (utterances, encoder frames), of a memory of this size."""
    return 1 << max(batch - 1, 0).bit_length(), -(-frames // FRAMES_MULTIPLE) * FRAMES_MULTIPLE


def has_graphs() -> bool:
    """Return whether any graph is kept."""
    return any(_graphs.values())


def clear_graphs() -> None:
    """Free the memory of all graphs."""
    with _lock:
        _graphs.clear()


# -------------------------------------------------------------------------------------------------------------- graphs


class CudaGraph:
    """torch.cuda.CUDAGraph, reduced to capture and replay."""

    def capture(self, function: Callable[[], Any]) -> Any:
        """Record the work that function enqueues; return its results, which each replay overwrites."""
        stream = stream_for("search graphs", torch.device("cuda", torch.cuda.current_device()))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # warm-up: kernels must not compile, nor workspaces be allocated, during a capture
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as one that pins a batch, must not invalidate the capture.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        self.graph.replay()


class GraphedChunk:
    """One chunk, captured over its own buffers.

    Args:
        advance: (inputs, beams) -> (beams, chunk): enqueues a chunk; not stored. All are nested tuples of tensors.
        inputs:  tensors that a chunk only reads; copied.
        beams:   tensors that a chunk reads and updates; copied.
    """

    def __init__(self, advance: Callable[[Any, Any], tuple[Any, Any]], inputs: Any, beams: Any):
        # Clones: before the first step some tensors are the same object, but each needs its own buffer.
        self.inputs, self.beams = tree_map_only(Tensor, torch.clone, (inputs, beams))

        def advance_in_place() -> Any:
            after, chunk = advance(self.inputs, self.beams)
            _copy(self.beams, after)
            return chunk

        self.graph = CudaGraph()
        self.chunk = self.graph.capture(advance_in_place)
        self.last_use: torch.cuda.Event | None = None  # after all enqueued work on the buffers

    def run(self, inputs: Any, beams: Any) -> Iterator[Any]:
        """Yield chunks without end. Each is enqueued when it is requested."""
        if self.last_use is not None:
            self.last_use.wait()  # the last search may have used another stream
        _copy(self.inputs, inputs)
        _copy(self.beams, beams)
        while True:
            self.graph.replay()
            yield tree_map_only(Tensor, torch.clone, self.chunk)

    def release(self) -> None:
        """Record an event, so that the next user of the buffers waits for this one."""
        if any(x.is_cuda for x in tree_leaves(self.beams) if isinstance(x, Tensor)):
            self.last_use = torch.cuda.Event()
            self.last_use.record()


@contextmanager
def graphed_chunks(
    model: Any, settings: Hashable, advance: Callable[[Any, Any], tuple[Any, Any]], inputs: Any, beams: Any
) -> Iterator[Iterator[Any]]:
    """Yield the chunks of a search (see GraphedChunk.run), from a graph of the same sizes and settings if there is one.

    One thread at a time: searches of the same sizes share buffers.

    Args:
        model:    the model that advance calls; its graphs are freed with it.
        settings: everything that advance depends on besides model, inputs and beams; kept alive with the graph.
    """
    with _lock:
        graphs = _graphs.setdefault(model, OrderedDict())
        key = (settings, _addresses(model), _sizes(inputs), _sizes(beams))
        if key not in graphs:
            if len(graphs) == MAX_GRAPHS:
                graphs.popitem(last=False)  # the least recently used one, before the new one needs its memory
            graphs[key] = GraphedChunk(advance, inputs, beams)
        graphs.move_to_end(key)
        try:
            yield graphs[key].run(inputs, beams)
        finally:
            graphs[key].release()


def _copy(buffers: Any, tensors: Any) -> None:
    for buffer, tensor in zip(tree_leaves(buffers), tree_leaves(tensors), strict=True):
        if isinstance(buffer, Tensor) and buffer is not tensor:
            buffer.copy_(tensor)


def _addresses(model: Any) -> Hashable:
    """Return the addresses and layouts of the weights, which a graph reads in place."""
    if not isinstance(model, torch.nn.Module):
        return ()
    return tuple((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in (*model.parameters(), *model.buffers()))


def _sizes(tree: Any) -> Hashable:
    """Return the shape, dtype and device of each tensor: a graph's buffers must have the same."""
    return tuple((tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else x for x in tree_leaves(tree))
