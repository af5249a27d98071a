"""Warnings about recordings that are hard to recognise: low bandwidth, low level, clipping."""

from __future__ import annotations

import numpy as np

WINDOW = 512  # samples of a spectrum
VERY_QUIET = 0.004  # peak of a recording, relative to full scale
CLIPPED = 0.002  # share of samples at the top of the scale that equal the previous sample
NARROW = 4e-6  # energy above 4.4 kHz, relative to that of speech below 3.4 kHz
NARROW_AT_FLOOR = 6.3e-5  # the same threshold if the upper band has only the noise of rounding to 16 bits


class SignalQuality:
    """The quality of a recording, measured block by block.

    `add` takes the mixed and resampled blocks, `count_clipped` the decoded ones. The caller sets lowest_rate: the
    lowest sample rate of the streams, in Hz.
    """

    def __init__(self, sample_rate: int):
        self.sample_rate = sample_rate
        self.lowest_rate = sample_rate
        self.peak = 0.0
        self.samples = self.clipped = 0
        self.low = self.high = 0.0  # energy of the speech band and of the upper band
        self.floor = 0.0  # energy of 16-bit rounding in the upper band
        frequencies = np.fft.rfftfreq(WINDOW, 1 / sample_rate)
        self.speech_bins = (frequencies > 300) & (frequencies < 3400)
        self.upper_bins = (frequencies > 4400) & (frequencies < 7600)
        self.taper = np.hanning(WINDOW).astype(np.float32)
        # Three times the expected energy per window: rounding to steps of 1/32768 has a variance of step**2 / 12
        self.rounding = 3 * self.upper_bins.sum() * float(np.square(self.taper).sum()) / 12 / 32768**2

    def add(self, block: np.ndarray) -> None:
        """Measure a block (n,), n >= 1, at sample_rate."""
        self.peak = max(self.peak, float(np.abs(block).max()))
        windows = block[: len(block) // WINDOW * WINDOW].reshape(-1, WINDOW)
        if self.sample_rate < 15_000 or not len(windows):
            return
        power = np.square(np.abs(np.fft.rfft(windows * self.taper)))
        self.low += float(power[:, self.speech_bins].sum())
        self.high += float(power[:, self.upper_bins].sum())
        self.floor += len(windows) * self.rounding

    def count_clipped(self, block: np.ndarray) -> None:
        """Count the clipped samples in the first channel of a block (n, channels), n >= 1."""
        first, second, height = block[:-1, 0], block[1:, 0], np.abs(block[:, 0])
        self.samples += len(block)
        self.clipped += int(((first == second) & (height[1:] > max(0.5, 0.97 * height.max()))).sum())

    def warnings(self) -> list[str]:
        """Return one clause per problem, such as "is very quiet: ..."; the caller puts the name before it."""
        warnings = []
        if self.lowest_rate < self.sample_rate:
            warnings.append(
                f"is sampled at {self.lowest_rate} Hz, but the model was trained at {self.sample_rate} Hz; "
                "expect more errors"
            )
        elif self.high < (NARROW_AT_FLOOR if self.high < self.floor else NARROW) * self.low:
            warnings.append(
                "contains nothing above 4 kHz, like telephone speech sampled at 8000 Hz; the model was trained on a "
                f"band of {self.sample_rate // 2000} kHz; expect more errors"
            )
        if 0 < self.peak < VERY_QUIET:
            warnings.append(f"is very quiet: its loudest sample is {20 * np.log10(self.peak):.0f} dB of full scale")
        if self.clipped > CLIPPED * self.samples:
            share = 100 * self.clipped / self.samples
            warnings.append(f"is clipped: {share:.1f}% of its samples are at the top of the scale")
        return warnings
