"""The decoder pass of training on a GPU. las_fast/ops/speller_unroll.py defines the operation.

Everything that does not depend on the previous step is a large matmul outside the loop. In the forward pass a token
then takes one launch per cell, one for the attention, and one more if tokens are sampled. In the backward pass it takes
one launch per cell, one for the attention, and one for the gradient of the first cell's input:

    forward:   cell 1, ..., cell n, attend, [choose]
    backward:  input_gradient, attend_gradient, cell n, ..., cell 1

The query is folded into the keys once per batch: scale (W_q h + b_q) . k = scale (h . (W_q^T k) + b_q . k). The
embedding's part of cell 1 is a table with a row per token.

Each kernel writes its result where the next one reads it. A cell stores its hidden state in its own part of `operands`
for the next step, and its output (after dropout) in the part of the cell above. The attention stores its context in the
part of cell 1. So `operands` holds the inputs of each layer at every step, and the gradient of a weight is one matmul
over all of them.

The number of the token is read from `position`, two integers in device memory that are used in turn: the attention of
token u reads one and writes u + 1 to the other; in the backward pass cell 1 writes u - 1. So each pass launches one
token, captures a CUDA graph of the next CHUNK tokens, an even number, and replays it to the end: the host launches
1 + CHUNK tokens instead of all. Launches past the last token do nothing.

This file launches the kernels of unroll_forward.py and unroll_backward.py, which share unroll_layout.py.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

import torch
import triton
from las_fast.kernels.unroll_backward import (
    bind_attend_gradient,
    bind_cell_gradients,
    bind_input_gradient,
    gates_gradients,
    memory_gradients,
    output_layer_gradients,
)
from las_fast.kernels.unroll_forward import bind_attend, bind_cells, bind_choose
from las_fast.kernels.unroll_layout import make_layout, output_layer, part_starts
from torch import Tensor

from las_fast.ops import SpellerWeights
from las_fast.system import stream_for

CHUNK = 16  # tokens of a CUDA graph

# The latest graphs are kept, because the device may still run one after its pass has returned.
_graphs: collections.deque[torch.cuda.CUDAGraph] = collections.deque(maxlen=8)


def speller_unroll(
    weights: list[Tensor], keys: Tensor, values: Tensor, lengths: Tensor, tokens: Tensor, sampled: Tensor,
    masks: list[Tensor], bf16: bool, gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the forward pass; the implementation of las_fast::speller_unroll_triton.

    Args:
        sampled: (B, U), or empty if no token is sampled, which saves a launch per token.
        gradients: ignored; the C++ op saves less without gradients.

    Returns:
        logits (B, U, V), attention (B, U, T), the tokens read (U, B), operands (U, B, *) and states (U, B, *).
    """
    speller = SpellerWeights.from_flat(weights)
    (B, U), V, T, E = tokens.shape, len(speller.embedding), keys.shape[1], values.shape[2]
    layout = make_layout(speller.cell_sizes, E)
    # Zeros: the first step reads its hidden states and context here, and opcheck compares the gaps between the parts.
    operands = keys.new_zeros(U, B, layout.operands, dtype=torch.bfloat16 if bf16 else torch.float32)
    states, attention = keys.new_zeros(U, B, layout.states), keys.new_empty(U, B, T)
    if B == 0:
        return keys.new_empty(U, B, V).transpose(0, 1), attention.transpose(0, 1), tokens.t().clone(), operands, states
    torch._assert_async(((tokens >= 0) & (tokens < V)).all(), f"tokens must be at least 0 and less than V={V}")
    tokens_read = tokens.t().clamp(0, V - 1).contiguous()  # the kernels may read before the assertion stops the program
    cells = bind_cells(speller, masks, tokens_read, operands, states, layout)
    attend = bind_attend(speller, keys, values, lengths, operands, attention, layout)
    choose = bind_choose(speller, sampled, tokens_read, operands, layout) if sampled.numel() else None
    position = _positions(keys, 0)

    def spell(u: int) -> None:
        now, after = position[u % 2], position[(u + 1) % 2]
        for cell in cells:
            cell(position=now)
        attend(position=now, next_position=after)
        if choose:
            choose(position=now)

    _repeat(spell, U, keys.device)
    logits = output_layer(speller, operands, layout)[-1]
    return logits.view(U, B, V).transpose(0, 1), attention.transpose(0, 1), tokens_read, operands, states


def speller_unroll_backward(
    logits_gradient: Tensor | None, attention_gradient: Tensor | None, weights: list[Tensor], keys: Tensor,
    values: Tensor, lengths: Tensor, masks: list[Tensor], attention: Tensor, tokens_read: Tensor, operands: Tensor,
    states: Tensor, bf16: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Launch the backward pass: the gradients of weights, keys and values."""
    (U, B), E = tokens_read.shape, values.shape[2]
    if B == 0:
        return [torch.zeros_like(x) for x in weights], torch.zeros_like(keys), torch.zeros_like(values)
    speller = SpellerWeights.from_flat(weights)
    layout, starts = make_layout(speller.cell_sizes, E), part_starts([len(bias) for bias in speller.gate_biases])
    readout, output_gradients = output_layer_gradients(logits_gradient, speller, operands, layout)
    gates = operands.new_empty(U, B, starts[-1])
    attention = attention.transpose(0, 1).contiguous()  # (U, B, T)
    contexts, scores = values.new_empty(U, B, E), torch.empty_like(attention)
    output, hidden = (keys.new_empty(B, size) for size in (speller.query.shape[1], speller.cell_sizes[0]))
    enter = bind_input_gradient(speller, readout, gates, contexts, hidden)
    attend = bind_attend_gradient(
        speller, keys, values, lengths, attention_gradient, attention, readout, contexts, scores, output,
        operands.dtype,
    )  # fmt: skip
    cells = bind_cell_gradients(speller, masks, gates, states, output, hidden, layout, starts)
    position = _positions(keys, U - 1)

    def differentiate(i: int) -> None:
        now, after = position[i % 2], position[(i + 1) % 2]
        enter(position=now)
        attend(position=now)
        for cell in cells:  # the last of them is cell 1, which lowers the position
            cell(position=now, next_position=after)

    _repeat(differentiate, U, keys.device)
    query, query_bias, *memory = memory_gradients(speller, keys, attention, operands, contexts, scores, layout)
    embedding, *cell_weights = gates_gradients(speller, tokens_read, operands, gates, layout, starts)
    output_gradients[0] += embedding
    return [output_gradients[0], query, query_bias, *output_gradients[1:], *cell_weights], *memory


def _positions(like: Tensor, start: int) -> Tensor:
    """Return two integers with the number of the first token, 16 bytes apart, as Triton specialises on alignment."""
    return like.new_full((2, 4), start, dtype=torch.int32)


def _repeat(launch: Callable[[int], None], tokens: int, device: torch.device) -> None:
    """Launch tokens 0 to tokens - 1: the first directly, which compiles the kernels, the rest by replaying a graph."""
    if not _captures(tokens, device):
        for i in range(tokens):
            launch(i)
        return
    launch(0)
    graph = _capture(launch, device)
    for _ in range(triton.cdiv(tokens - 1, CHUNK)):
        graph.replay()
    _graphs.append(graph)


def _captures(tokens: int, device: torch.device) -> bool:
    """Return whether to use a graph: not for a single replay, and not while the caller captures a graph."""
    return device.type == "cuda" and tokens > 1 + CHUNK and not torch.cuda.is_current_stream_capturing()


def _capture(launch: Callable[[int], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """Return a graph of CHUNK tokens. Unlike torch.cuda.graph this neither waits for the device nor frees memory."""
    current, stream, graph = torch.cuda.current_stream(), stream_for("speller graphs", device), torch.cuda.CUDAGraph()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        # thread_local: other threads, such as one that pins a batch, must not invalidate the capture.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for i in range(1, 1 + CHUNK):
                launch(i)
        finally:
            graph.capture_end()
    current.wait_stream(stream)
    return graph
