"""Warnings on recordings whose signal makes recognition worse: low bandwidth, low level, clipping."""

from __future__ import annotations

import numpy as np

WINDOW = 512  # samples of a spectrum
VERY_QUIET = 0.004  # peak of a recording
CLIPPED = 0.002  # share of samples that repeat their neighbour at the top of the scale
NARROW = 4e-6  # energy above 4.4 kHz, relative to that of speech below 3.4 kHz
NARROW_AT_FLOOR = 6.3e-5  # the same threshold where the upper band holds only the noise of rounding to 16 bits


class SignalQuality:
    """Measures a recording block by block.

    add takes the mixed and resampled blocks, count_clipped the decoded ones. lowest_rate (Hz) is set by the caller.
    """

    def __init__(self, sample_rate: int):
        self.sample_rate = sample_rate
        self.lowest_rate = sample_rate
        self.peak = 0.0
        self.samples = self.flat = 0
        self.low = self.high = self.floor = 0.0  # energies: of speech, of the upper band, of 16-bit rounding in it
        hertz = np.fft.rfftfreq(WINDOW, 1 / sample_rate)
        self.speech, self.above = (hertz > 300) & (hertz < 3400), (hertz > 4400) & (hertz < 7600)
        self.taper = np.hanning(WINDOW).astype(np.float32)
        # Three times the expected energy per window: rounding noise has variance 1/12 of a step of 1/32768
        self.rounding = 3 * self.above.sum() * float(np.square(self.taper).sum()) / 12 / 32768**2

    def add(self, block: np.ndarray) -> None:
        """Measure a block (n,) at sample_rate."""
        self.peak = max(self.peak, float(np.abs(block).max()))
        windows = block[: len(block) // WINDOW * WINDOW].reshape(-1, WINDOW)
        if self.sample_rate < 15_000 or not len(windows):
            return
        power = np.square(np.abs(np.fft.rfft(windows * self.taper)))
        self.low += float(power[:, self.speech].sum())
        self.high += float(power[:, self.above].sum())
        self.floor += len(windows) * self.rounding

    def count_clipped(self, block: np.ndarray) -> None:
        """Count the clipped samples of a block (n, channels) in its first channel."""
        first, second, height = block[:-1, 0], block[1:, 0], np.abs(block[:, 0])
        self.samples += len(block)
        self.flat += int(((first == second) & (height[1:] > max(0.5, 0.97 * height.max()))).sum())

    def warnings(self) -> list[str]:
        """Return one predicate per problem, such as "is very quiet: ..."."""
        warnings = []
        if self.lowest_rate < self.sample_rate:
            warnings.append(
                f"is sampled at {self.lowest_rate} Hz and the model was trained at {self.sample_rate} Hz; "
                "expect more errors"
            )
        elif self.high < (NARROW_AT_FLOOR if self.high < self.floor else NARROW) * self.low:
            warnings.append(
                "contains nothing above 4 kHz, like telephone speech sampled at 8000 Hz; the model was trained on a "
                f"band of {self.sample_rate // 2000} kHz; expect more errors"
            )
        if 0 < self.peak < VERY_QUIET:
            warnings.append(f"is very quiet: its loudest sample is {20 * np.log10(self.peak):.0f} dB of full scale")
        if self.flat > CLIPPED * self.samples:
            share = 100 * self.flat / self.samples
            warnings.append(f"is clipped: {share:.1f}% of its samples are at the top of the scale")
        return warnings
