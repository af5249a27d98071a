"""The speed of a training, and a forecast of how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from las_fast.progress import format_duration

if TYPE_CHECKING:
    from las_fast.data.batch import Batch

KNOWN_SECONDS, KNOWN_STEPS = 20.0, 5  # the pace is known after both
LONG_SECONDS = 300.0  # a shorter rest of the training has no forecast
DAY = 86400.0  # seconds


class Pace:
    """Throughput, share of time spent waiting for data, and losses of a training since this object was made."""

    def __init__(self):
        self.started, self.audio_seconds, self.wait_seconds = time.perf_counter(), 0.0, 0.0
        self.steps = 0
        self.losses: list[float] = []  # per token, of the logged steps

    def add_step(self, audio_seconds: float) -> None:
        """Count a step over `audio_seconds` seconds of audio, padding excluded."""
        self.steps += 1
        self.audio_seconds += audio_seconds

    def exclude(self, seconds: float) -> None:
        """Leave out the latest seconds, which were not spent on training."""
        self.started += seconds

    def next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """Return the next batch, or None after the last one, and count the time it takes as waiting."""
        start = time.perf_counter()
        batch = next(batches, None)
        self.wait_seconds += time.perf_counter() - start
        return batch

    def seconds(self) -> float:
        """Return the seconds since this object was made."""
        return time.perf_counter() - self.started

    def speed(self) -> float:
        """Return the seconds of audio per second."""
        return self.audio_seconds / self.seconds()

    def waiting(self) -> float:
        """Return the share of the time spent waiting for data, 0 to 1."""
        return self.wait_seconds / self.seconds()

    def is_known(self) -> bool:
        """Return whether there were enough steps and seconds for a forecast."""
        return self.steps >= KNOWN_STEPS and self.seconds() >= KNOWN_SECONDS

    def forecast(self, steps: int) -> str:
        """Return a sentence on how long `steps` more steps will take; "" if that is short."""
        per_step = self.seconds() / self.steps
        if (left := steps * per_step) < LONG_SECONDS:
            return ""
        hint = "; --data.hours 1 in a run of its own tries settings on an hour of the data" if left > DAY else ""
        return (
            f"at {per_step:.2g} s per step, {self.speed():.0f} x real time, the other {steps} steps take about "
            f"{format_duration(left)}, validations not included{hint}"
        )

    def summary(self) -> str:
        """Return a clause with the mean loss, the speed and the share of waiting; "" before the first step."""
        if not self.steps:
            return ""
        loss = f"training loss {sum(self.losses) / len(self.losses):.3f}, " if self.losses else ""
        return f"; {loss}trained at {self.speed():.0f} x real time, {self.waiting():.1%} of the time waiting for data"
