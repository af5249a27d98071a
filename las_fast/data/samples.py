"""Samples in memory: checked, and written to a file without a name, which is then read as any recording is."""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile

from las_fast.errors import InputError

RATES = (1000, 768_000)  # Hz of a recording; others are a damaged header
CHANNELS = 64  # more are no recording, but features perhaps
BLOCK = 1 << 20  # numbers converted at once
SUBTYPES = {"int16": "PCM_16", "int32": "PCM_32", "float32": "FLOAT"}  # in which libsndfile keeps each dtype exactly


@dataclass(frozen=True, eq=False)
class Samples:
    """A recording as an array: (N, C) float, int16 or int32, N >= 1; floats are from -1 to 1, rate is in Hz."""

    array: np.ndarray
    rate: int

    def write(self, descriptor: int) -> None:
        """Write the samples to a file, as float32 where they are of another float type."""
        count, channels = self.array.shape
        dtype = self.array.dtype.name if self.array.dtype.name in SUBTYPES else "float32"
        options = {"format": "W64", "subtype": SUBTYPES[dtype]}
        with soundfile.SoundFile(os.dup(descriptor), "w", self.rate, channels, **options) as file:
            for place in range(0, count, BLOCK):
                with np.errstate(over="ignore"):  # what float32 cannot hold is refused when it is read
                    file.write(np.ascontiguousarray(self.array[place : place + BLOCK], dtype))


def to_samples(array: Any, rate: Any) -> Samples:
    """Return Samples of a numpy array or torch tensor of one channel, (N,), or several, (N, C).

    Raises:
        InputError: the shape, the dtype or the rate is none of a recording, or there are no samples.
    """
    if rate is None:
        raise InputError("an array does not say its sample rate; give sample_rate=16000 or whatever it is")
    array = to_numpy(array)
    if array.dtype.kind != "f" and array.dtype.name not in SUBTYPES:
        raise InputError(f"the samples must be float, int16 or int32; got {array.dtype}; convert them")
    if array.ndim not in (1, 2):
        raise InputError(f"the samples must have shape (N,) or (N, channels); got {array.shape}")
    if not array.size:
        raise InputError(f"the array holds no samples: its shape is {array.shape}")
    columns = array.reshape(len(array), -1)
    if columns.shape[1] > min(len(columns), CHANNELS):
        advice = "give array.T" if columns.shape[1] > len(columns) else f"give at most {CHANNELS} channels"
        raise InputError(f"the samples must have shape (N,) or (N, channels); got {array.shape}; {advice}")
    return Samples(columns, to_rate(rate))


def to_rate(rate: Any) -> int:
    """Return a sample rate in Hz as an int; raise InputError where it is none."""
    low, high = RATES
    try:
        whole = operator.index(int(rate) if isinstance(rate, float) and rate.is_integer() else rate)
    except TypeError:
        whole = 0
    if isinstance(rate, bool) or not low <= whole <= high:
        raise InputError(f"sample_rate must be a whole number of Hz from {low} to {high}; got {rate!r}")
    return whole


def is_array(value: Any) -> bool:
    """Return whether a value is a numpy array or a torch tensor."""
    return isinstance(value, np.ndarray) or _is_tensor(value)


def to_numpy(array: Any) -> np.ndarray:
    """Return a numpy array or a torch tensor, on whatever device and of whatever float type, as a numpy array."""
    if not _is_tensor(array):
        return array
    array = array.detach().cpu()
    return (array.float() if array.dtype.is_floating_point and array.dtype.itemsize < 4 else array).numpy()


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")
