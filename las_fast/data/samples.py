"""Recordings in memory: an array is checked, then written to a temporary file that is read like any recording."""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile

from las_fast.errors import InputError

RATES = (1000, 768_000)  # Hz; other rates mean a damaged header
MAX_CHANNELS = 64  # more columns are probably features
BLOCK = 1 << 20  # samples per channel converted at a time
SUBTYPES = {"int16": "PCM_16", "int32": "PCM_32", "float32": "FLOAT"}  # dtype -> lossless subtype of libsndfile


@dataclass(frozen=True, eq=False)
class Samples:
    """A recording in memory: array (N, C) of float from -1 to 1, int16 or int32, N >= 1; rate in Hz."""

    array: np.ndarray
    rate: int

    def write(self, descriptor: int) -> None:
        """Write the samples to a file; other floats are converted to float32."""
        count, channels = self.array.shape
        dtype = self.array.dtype.name if self.array.dtype.name in SUBTYPES else "float32"
        options = {"format": "W64", "subtype": SUBTYPES[dtype]}
        with soundfile.SoundFile(os.dup(descriptor), "w", self.rate, channels, **options) as file:
            for start in range(0, count, BLOCK):
                with np.errstate(over="ignore"):  # an overflow becomes infinite, which is an error on reading
                    file.write(np.ascontiguousarray(self.array[start : start + BLOCK], dtype))


def to_samples(array: Any, rate: Any) -> Samples:
    """Make Samples from a numpy array or torch tensor: (N,) for one channel, (N, C) for several.

    Raises:
        InputError: the array is empty, or its shape, dtype or rate is not that of a recording.
    """
    if rate is None:
        raise InputError("an array has no sample rate of its own; give its rate in Hz, such as sample_rate=16000")
    array = to_numpy(array)
    if array.dtype.kind != "f" and array.dtype.name not in SUBTYPES:
        raise InputError(f"the samples must be float, int16 or int32; got {array.dtype}; convert them")
    if array.ndim not in (1, 2):
        raise InputError(f"the samples must have shape (N,) or (N, channels); got {array.shape}")
    if not array.size:
        raise InputError(f"the array has no samples: its shape is {array.shape}; give at least one sample")
    columns = array.reshape(len(array), -1)
    if columns.shape[1] > min(len(columns), MAX_CHANNELS):
        advice = "give array.T" if columns.shape[1] > len(columns) else f"give at most {MAX_CHANNELS} channels"
        raise InputError(f"the samples must have shape (N,) or (N, channels); got {array.shape}; {advice}")
    return Samples(columns, to_rate(rate))


def to_rate(rate: Any) -> int:
    """Return a sample rate in Hz as an int; raise InputError if it is not a whole number in RATES."""
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
    """Convert a torch tensor on any device and of any float type to a numpy array; return numpy arrays as they are."""
    if not _is_tensor(array):
        return array
    array = array.detach().cpu()
    return (array.float() if array.dtype.is_floating_point and array.dtype.itemsize < 4 else array).numpy()


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")
