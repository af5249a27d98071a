"""Time an LSTM layer: packed or padded, in two directions or one, by size and precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.device.parts import Options
from benchmarks.device.record import Record
from benchmarks.device.timing import backends_for, median_seconds
from las_fast.model.listener import BiLSTM
from las_fast.ops import bilstm


class Shape(NamedTuple):
    T: int
    B: int
    I: int  # noqa: E741 (size of the input)
    H: int

    def __str__(self) -> str:
        return " ".join(f"{name}{value}" for name, value in self._asdict().items())


SHAPES = (
    Shape(1290, 48, 256, 384),  # the first layer of hw4p2
    Shape(1290, 48, 256, 256),  # the same with a size for which cuDNN has a persistent kernel
    Shape(645, 48, 1024, 256),
    Shape(1290, 49, 256, 256),  # cuDNN's persistent kernel needs a multiple of 8 utterances
    Shape(1, 48, 256, 256),  # the cost of a call besides its steps
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Layer = Callable[[Tensor, Tensor], Tensor]  # (B, T, I), lengths -> (B, T, directions * H)


def run(options: Options, record: Record) -> None:
    shapes, dtypes = (SHAPES, DTYPES) if not options.quick else ([Shape(20, 4, 8, 16)], DTYPES[2:])
    layers = [(shape, dtype, path) for shape in shapes for dtype in dtypes for path in PATHS]
    # float16 is what a training in bfloat16 uses; whether its two directions overlap is the question.
    ours = list(las_fast_paths(options.device))
    layers[:0] = [(shape, dtype, ours[0]) for shape in shapes for dtype in dtypes[::2]]
    layers += [(shape, torch.float32, path) for shape in shapes[:1] for path in ours[1:]]
    for shape, dtype, path in record.while_time_remains(layers, "LSTM layer"):
        labels = {"shape": str(shape), "dtype": str(dtype), "path": path}
        with record.attempt("LSTM layer", **labels):
            make = {**PATHS, **las_fast_paths(options.device)}[path]
            forward, total = measure(make, shape, dtype, options)
            record.row("LSTM layer, forward", 1e3 * forward, "ms", **labels)
            record.row("LSTM layer", 1e3 * total, "ms", **labels)


def measure(
    make: Callable[[Shape], tuple[nn.Module, Layer]], shape: Shape, dtype: torch.dtype, options: Options
) -> tuple[float, float]:
    """Return the seconds of a forward pass, and of a forward and a backward pass."""
    device, rounds = options.device, 1 if options.quick else 5
    module, layer = make(shape)
    module.to(device, dtype)
    x = torch.randn(shape.B, shape.T, shape.I, device=device).to(dtype).requires_grad_()
    lengths = torch.linspace(max(1, shape.T // 2), shape.T, shape.B).long().to(device)

    def forward_and_backward() -> None:
        output = layer(x, lengths)
        output.backward(torch.ones_like(output))
        module.zero_grad()
        x.grad = None

    with torch.no_grad():
        forward = median_seconds(lambda: layer(x, lengths), device, rounds=rounds, warmups=1, max_seconds=0.5)
    return forward, median_seconds(forward_and_backward, device, rounds=rounds, warmups=1, max_seconds=0.5)


def torch_lstm(shape: Shape, *, directions: int, packed: bool) -> tuple[nn.Module, Layer]:
    lstm = nn.LSTM(shape.I, shape.H, batch_first=True, bidirectional=directions == 2)

    def layer(x: Tensor, lengths: Tensor) -> Tensor:
        if not packed:
            return lstm(x)[0]
        sequence = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(lstm(sequence)[0], batch_first=True, total_length=x.shape[1])[0]

    return lstm, layer


def listener_layer(shape: Shape) -> tuple[nn.Module, Layer]:
    module = BiLSTM(shape.I, shape.H)
    return module, module


def op_layer(shape: Shape, *, backend: str) -> tuple[nn.Module, Layer]:
    module = BiLSTM(shape.I, shape.H)
    return module, lambda x, lengths: bilstm(x, lengths, *module.lstm.all_weights, backend=backend)


PATHS: dict[str, Callable[[Shape], tuple[nn.Module, Layer]]] = {
    "packed, two directions": lambda shape: torch_lstm(shape, directions=2, packed=True),
    "padded, two directions": lambda shape: torch_lstm(shape, directions=2, packed=False),
    "padded, one direction": lambda shape: torch_lstm(shape, directions=1, packed=False),
}


def las_fast_paths(device: str) -> dict[str, Callable[[Shape], tuple[nn.Module, Layer]]]:
    """Return makers of las_fast's layer, and of its op on each available backend."""
    ops = {
        f"ops.bilstm, {backend}": lambda shape, backend=backend: op_layer(shape, backend=backend)
        for backend in backends_for("bilstm", device, torch.float32)
    }
    return {"las_fast": listener_layer, **ops}
