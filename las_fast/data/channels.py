"""Mix the channels of a recording to one, and find the scale of floating-point samples."""

from __future__ import annotations

import contextlib

import numpy as np

from las_fast.data.decoder import READ_ERRORS, SoundStream
from las_fast.data.media import MediaStream
from las_fast.errors import InputError

MAX_SAMPLE = 1e6  # absolute value; full scale is 1
INTEGER_LEVEL = 4.0  # floating-point samples above this may be integers that were not scaled to full scale 1
PROBE = 4096  # samples per channel read at each position where a file is probed for such integers
# Energy of the mean of the channels, relative to what uncorrelated channels would give. Below CANCEL_BELOW they cancel.
CANCEL_BELOW = 0.1
CANCEL_ENDS_ABOVE = 0.5
AUDIBLE = 1e-5  # RMS relative to full scale, below which channels are not compared


def check_samples(name: str, samples: np.ndarray) -> None:
    """Raise InputError if a block has NaN, infinite or huge samples."""
    if not np.maximum(-samples.min(), samples.max()) <= MAX_SAMPLE:  # also true for NaN
        raise InputError(
            f"{name} contains NaN, infinite or enormous samples; expected numbers from -1 to 1: export it again"
        )


def unscaled_integer_bits(sound: SoundStream | MediaStream) -> int:
    """Return the bits (16, 24 or 32) of integer samples that are stored as floating point without scaling, or 0.

    Long files are probed at 256 positions.
    """
    if sound.subtype not in ("FLOAT", "DOUBLE"):
        return 0
    over, total, peak = 0, 0, 0.0
    with contextlib.suppress(*READ_ERRORS):
        for position in range(0, sound.frames, max(PROBE, sound.frames // 256)):
            sound.seek(position)
            block = np.abs(sound.read(PROBE))
            over += int((block > INTEGER_LEVEL).sum())
            total += int(np.count_nonzero(block))
            peak = max(peak, float(block.max(initial=0)))
    if over <= 0.01 * total or peak < 25 * INTEGER_LEVEL:
        return 0
    return next((bits for bits in (16, 24, 32) if peak <= 2 ** (bits + 1)), 0)


class Mixer:
    """Turns blocks (n, channels) into (n,): the mean of the channels, or the loudest where they cancel each other out.

    Cancellation is judged per block, below 2 kHz (lossy codecs do not keep the phase above) and on differences of
    consecutive samples, which offsets and hum hardly affect. A decision holds until a later block contradicts it.

    Args:
        channels: number of channels.
        rate:     Hz.
        bits:     unscaled_integer_bits of the stream; scaled() divides by the full scale of such integers.
    """

    def __init__(self, channels: int, rate: int, bits: int):
        self.channels, self.bits = channels, bits
        self.stride = max(1, rate // 4000)
        self.chosen: int | None = None  # channel, or None for the mean
        self.cancelled = self.total = 0.0  # energies

    def warnings(self) -> list[str]:
        """Return warnings about the scale and the channels; call it after all blocks."""
        warnings = []
        if self.bits:
            full_scale = 1 << self.bits - 1
            warnings.append(
                f"its samples are {self.bits}-bit numbers stored as floating point; they were divided by {full_scale}"
            )
        if self.cancelled > 0.01 * self.total:
            warnings.append("its channels cancel each other out (opposite phase); only the loudest is used there")
        return warnings

    def scaled(self, block: np.ndarray) -> np.ndarray:
        """Return a block scaled to full scale 1."""
        return block * np.float32(2.0 ** (1 - self.bits)) if self.bits else block

    def __call__(self, block: np.ndarray) -> np.ndarray:
        if self.channels == 1:
            return np.ascontiguousarray(block[:, 0])
        self._choose(block)
        return block.mean(axis=1) if self.chosen is None else block[:, self.chosen].copy()

    def _choose(self, block: np.ndarray) -> None:
        count = len(block) // self.stride
        low = block[: count * self.stride].reshape(count, self.stride, self.channels).mean(axis=1)
        slopes = np.diff(low, axis=0)
        energies = np.einsum("nc,nc->c", slopes, slopes)
        uncorrelated = energies.sum() / self.channels**2  # energy of the mean, if the channels were uncorrelated
        if uncorrelated <= count * AUDIBLE**2:
            return
        mean = slopes.mean(axis=1)
        share = float(np.dot(mean, mean)) / uncorrelated
        self.total += uncorrelated
        if share < CANCEL_BELOW:
            self.cancelled += uncorrelated
            if self.chosen is None or energies[self.chosen] < 0.1 * energies.max():
                self.chosen = int(np.argmax(energies > 0.9 * energies.max()))
        elif share > CANCEL_ENDS_ABOVE:
            self.chosen = None
