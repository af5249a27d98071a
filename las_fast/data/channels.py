"""Mix the channels of a recording to one, and find the scale of floating-point samples."""

from __future__ import annotations

import contextlib

import numpy as np

from las_fast.data.decoder import READ_ERRORS, SoundStream
from las_fast.errors import InputError

MAX_SAMPLE = 1e6  # absolute value; full scale is 1
INTEGER_LEVEL = 4.0  # floating-point samples above this may be integers that nobody divided by their full scale
PROBE = 4096  # samples per channel at each place where a file is searched for such integers
CANCEL_BELOW = 0.1  # channels cancel where their mean has less than this share of the energy of unrelated channels
CANCEL_ENDS_ABOVE = 0.5  # of the same share
AUDIBLE = 1e-5  # RMS relative to full scale, below which channels are not compared


def check_samples(name: str, samples: np.ndarray) -> None:
    """Raise InputError where a block has NaN, infinite or huge samples."""
    if not np.maximum(-samples.min(), samples.max()) <= MAX_SAMPLE:  # also true for NaN
        raise InputError(
            f"{name} contains NaN, infinite or enormous samples; expected numbers from -1 to 1: export it again"
        )


def undivided_bits(sound: SoundStream) -> int:
    """Return the bits (16, 24 or 32) of integer samples stored as floating point without scaling, or 0.

    Long files are probed in 256 places.
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

    Cancellation is judged per block, below 2 kHz (lossy codecs lose the phase above) and on differences of neighbouring
    samples, which offsets and hum hardly affect. A decision holds until a later block contradicts it.

    Args:
        channels: number of channels.
        rate:     Hz.
        bits:     undivided_bits of the stream; scaled() divides by their full scale.
    """

    def __init__(self, channels: int, rate: int, bits: int):
        self.channels, self.bits = channels, bits
        self.stride = max(1, rate // 4000)
        self.chosen: int | None = None  # channel, or None for the mean
        self.cancelled = self.total = 0.0  # energies

    def warnings(self) -> list[str]:
        """Return warnings on the scale and the channels, once all blocks are mixed."""
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
        """Return a block with full scale 1."""
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
        unrelated = energies.sum() / self.channels**2  # energy of the mean, if the channels were unrelated
        if unrelated <= count * AUDIBLE**2:
            return
        mean = slopes.mean(axis=1)
        share = float(np.dot(mean, mean)) / unrelated
        self.total += unrelated
        if share < CANCEL_BELOW:
            self.cancelled += unrelated
            if self.chosen is None or energies[self.chosen] < 0.1 * energies.max():
                self.chosen = int(np.argmax(energies > 0.9 * energies.max()))
        elif share > CANCEL_ENDS_ABOVE:
            self.chosen = None
