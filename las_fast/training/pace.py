"""How fast a training is, and how long the rest of it will take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from las_fast.progress import format_duration

if TYPE_CHECKING:
    from las_fast.data.batching import Batch

KNOWN_SECONDS, KNOWN_STEPS = 20.0, 5  # of training, after which its pace is known
LONG_SECONDS = 300.0  # of training, from which on a forecast is worth a line
DAY = 86400.0  # seconds


class Pace:
    """Throughput of a training, the share of time spent waiting for data, and its losses, since construction."""

    def __init__(self):
        self.started, self.audio_seconds, self.wait_seconds = time.perf_counter(), 0.0, 0.0
        self.steps = 0
        self.losses: list[float] = []  # per token, of the steps whose loss was read

    def add_step(self, audio_seconds: float) -> None:
        self.steps += 1
        self.audio_seconds += audio_seconds

    def next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """Return the next batch, or None after the last, and add the waiting time."""
        start = time.perf_counter()
        batch = next(batches, None)
        self.wait_seconds += time.perf_counter() - start
        return batch

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def speed(self) -> float:
        """Seconds of audio per second."""
        return self.audio_seconds / self.seconds()

    def waiting(self) -> float:
        """Share of the time spent waiting for data."""
        return self.wait_seconds / self.seconds()

    def is_known(self) -> bool:
        """Return whether enough steps were taken to forecast."""
        return self.steps >= KNOWN_STEPS and self.seconds() >= KNOWN_SECONDS

    def forecast(self, steps: int) -> str:
        """Say how long `steps` more steps will take; "" if that is short."""
        per_step = self.seconds() / self.steps
        if (left := steps * per_step) < LONG_SECONDS:
            return ""
        hint = "; --data.hours 1 in a run of its own tries settings on an hour of the data" if left > DAY else ""
        return (
            f"at {per_step:.2g} s per step, {self.speed():.0f} x real time, the other {steps} steps take about "
            f"{format_duration(left)}, validations not included{hint}"
        )

    def summary(self) -> str:
        """Mean of the losses, speed and waiting, as a clause; "" before the first step."""
        if not self.steps:
            return ""
        loss = f"training loss {sum(self.losses) / len(self.losses):.3f}, " if self.losses else ""
        return f"; {loss}trained at {self.speed():.0f} x real time, {self.waiting():.1%} of the time waiting for data"
