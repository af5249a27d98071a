"""Building blocks that the listener and the speller share: LSTM initialisation, dropout and the choice of device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def on_cuda(x: Tensor) -> bool:
    """Return whether x takes the paths for CUDA."""
    return x.device.type == "cuda"


def initialise_lstm(name: str, parameter: Tensor) -> None:
    """Initialise an LSTM parameter gate by gate.

    Recurrent weights are orthogonal and input weights Xavier-uniform. Biases are 0, except that the forget gate's
    input bias is 1 (Jozefowicz et al. 2015).

    Args:
        name: name in nn.LSTM, such as weight_ih_l0 or bias_hh_l0.
        parameter: (4H, ...), changed in place.
    """
    size = parameter.shape[0] // 4
    with torch.no_grad():
        if "weight_hh" in name:
            for gate in parameter.split(size):
                nn.init.orthogonal_(gate)
        elif "weight_ih" in name:
            for gate in parameter.split(size):
                nn.init.xavier_uniform_(gate)
        else:
            parameter.zero_()
            if "bias_ih" in name:
                parameter[size : 2 * size] = 1.0


@dataclass(frozen=True)
class BatchPart:
    """Some rows of a batch that is run in parts, because it does not fit in memory."""

    first_row: int
    batch_rows: int  # of the whole batch


_part: ContextVar[BatchPart | None] = ContextVar("_part", default=None)


@contextlib.contextmanager
def running_part(part: BatchPart) -> Iterator[None]:
    """Inside the block, random values are drawn for the whole batch, and the part uses those of its own rows.

    If all parts start from the same seed, they get the dropout masks and sampled tokens of the whole batch.
    On CUDA that holds for batches of a multiple of 8 rows, because the listener pads every batch to a multiple of 8.
    """
    token = _part.set(part)
    try:
        yield
    finally:
        _part.reset(token)


def draw_rows(rows: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Return draw(rows), random values for that many rows. Inside running_part: those of the part's rows."""
    part = _part.get()
    if part is None:
        return draw(rows)
    end = part.first_row + rows
    return draw(max(part.batch_rows, end))[part.first_row : end]


def dropout_mask(like: Tensor, p: float) -> Tensor:
    """Draw a mask with the shape of `like`: 0 with probability p, otherwise 1 / (1 - p)."""
    return draw_rows(len(like), lambda rows: like.new_empty(rows, *like.shape[1:]).bernoulli_(1 - p).div_(1 - p))


def locked_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Drop values of x (B, T, F) with one mask per utterance, the same in every frame (Gal and Ghahramani 2016)."""
    if not training or p == 0:
        return x
    return x * dropout_mask(x[:, :1], p)
