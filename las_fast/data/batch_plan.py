"""Which utterances share a batch: similar lengths, with a limit on the padded frames.

All randomness is a function of (seed, epoch), so an epoch and a batch number suffice to resume training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from las_fast.config import Config
from las_fast.data.augment import frame_counts_at_speed, random_stream, silence_frames, speed_factors
from las_fast.data.features import seconds_of
from las_fast.errors import InputError

# Candidate widths of a bucket, as longest over shortest utterance; the first that meets PADDING_TARGET is taken.
BUCKET_RATIOS = (1.5, 1.35, 1.25, 1.2, 1.15, 1.1, 1.07, 1.05, 1.03, 1.02, 1.01)
FrameCounts = Sequence[int] | np.ndarray  # (N,) feature frames of each utterance
# Maximum share of padding to the longest utterance; wide buckets shuffle better, but pad more.
PADDING_TARGET = 0.08


class BucketBatches:
    """Batches for training: different in every epoch, but always the same number.

    Each epoch sorts utterances into buckets of similar length and shuffles within each bucket. It cuts batches in that
    order, as if every utterance were as long as the longest of its bucket, and shuffles the batches. The buckets are as
    wide as a padding share of PADDING_TARGET allows. With speed, lengths change from epoch to epoch: if an epoch has
    too few batches, its largest ones are halved; if it has too many, its limits are raised slightly.
    """

    def __init__(
        self,
        frame_counts: FrameCounts,
        *,
        frames_per_batch: int,
        utterances_per_batch: int,
        seed: int,
        speed: float = 0.0,
        silence: float = 0.0,
        members: np.ndarray | None = None,
    ):
        """
        Args:
            frame_counts:         (N,) feature frames of each utterance.
            frames_per_batch:     maximum of batch size times longest utterance; a longer utterance is a single batch.
            utterances_per_batch: maximum batch size.
            seed, speed, silence: training.seed, augment.speed, augment.silence, to predict lengths after augmentation.
            members:              indices of the utterances to use, at least one; None: all.
        """
        self._frame_counts = np.asarray(frame_counts, np.int64)
        self._members = np.arange(len(self._frame_counts)) if members is None else members
        self._seed, self._speed, self._silence = seed, speed, silence
        self._limits = (frames_per_batch, utterances_per_batch)
        for ratio in BUCKET_RATIOS:
            self._ratio = ratio
            self._count = len(self._cut_epoch(0))
            if self.padding_share(0) <= PADDING_TARGET:
                break
        if speed or silence:
            self._count = max(len(self._cut_epoch(epoch)) for epoch in range(4))

    def __len__(self) -> int:
        return self._count

    def epoch(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch, as lists of utterance indices."""
        batches = self._cut_epoch(epoch)
        slack = 1.0
        while len(batches) > self._count:
            slack *= 1.01
            batches = self._cut_epoch(epoch, slack)
        lengths = self.lengths(epoch)
        while len(batches) < self._count:  # always possible: another epoch cut the same utterances into more batches
            sizes = [len(batch) > 1 and len(batch) * lengths[batch].max() for batch in batches]
            largest = batches.pop(int(np.argmax(sizes)))
            batches += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        order = random_stream("order", seed=self._seed, epoch=epoch).permutation(len(batches))
        return [batches[i] for i in order]

    def lengths(self, epoch: int) -> np.ndarray:
        """Return frame counts (N,) int64 in an epoch, after the change of speed and with the added silence.

        Before augment.start_epoch no silence is added; it is counted all the same.
        """
        lengths, place = self._frame_counts, {"seed": self._seed, "epoch": epoch}
        if self._speed:
            lengths = frame_counts_at_speed(lengths, speed_factors(self._speed, **place, count=len(lengths)))
        return lengths + silence_frames(lengths, self._silence, **place).sum(1) if self._silence else lengths

    def padding_share(self, epoch: int, *, frame_multiple: int = 1) -> float:
        """Return the share of padding among all frames of an epoch's padded batches; see padding_share."""
        return padding_share(self.lengths(epoch), self.epoch(epoch), frame_multiple=frame_multiple)

    def _cut_epoch(self, epoch: int, slack: float = 1.0) -> list[list[int]]:
        """Cut an epoch's batches, in order of length; the limits are multiplied by `slack`."""
        lengths = self.lengths(epoch)
        order = self._members[np.argsort(lengths[self._members], kind="stable")]
        ordered = lengths[order]
        generator = random_stream("buckets", seed=self._seed, epoch=epoch)
        first = 0
        while first < len(order):
            end = max(first + 1, int(np.searchsorted(ordered, ordered[first] * self._ratio, side="right")))
            order[first:end] = generator.permutation(order[first:end])
            ordered[first:end] = ordered[end - 1]
            first = end
        cuts = _cut(ordered, *(int(limit * slack) for limit in self._limits))
        return [order[a:b].tolist() for a, b in zip(cuts, cuts[1:], strict=False)]


@dataclass
class Curriculum:
    """Batches of a whole training: some epochs on short utterances only, then on all (Bengio et al. 2009).

    Attention forms sooner on short utterances, where it has fewer frames to choose from.
    """

    stages: list[tuple[int, BucketBatches]]  # number of epochs, batches of each

    @property
    def steps(self) -> int:
        return sum(epochs * len(batches) for epochs, batches in self.stages)

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and the number of its batch in that epoch."""
        before = 0
        for epochs, batches in self.stages:
            if step < epochs * len(batches):
                break
            step, before = step - epochs * len(batches), before + epochs
        epoch, batch = divmod(step, len(batches))  # steps past the end continue the last stage
        return before + epoch, batch

    def steps_before(self, epoch: int) -> int:
        """Return the number of steps before an epoch."""
        return sum(len(self.batches_of(e)) for e in range(epoch))

    def epochs(self, step: int) -> float:
        """Return the epochs done before a step; a part of an epoch counts as a fraction."""
        epoch, batch = self.locate(step)
        return epoch + batch / len(self.batches_of(epoch))

    def batches_of(self, epoch: int) -> BucketBatches:
        """Return the batches that an epoch uses."""
        for epochs, batches in self.stages:
            if epoch < epochs:
                return batches
            epoch -= epochs
        return self.stages[-1][1]


def plan_curriculum(frame_counts: FrameCounts, config: Config) -> Curriculum:
    """Plan the batches of a training on utterances of `frame_counts` feature frames.

    Raises:
        InputError: data.short_epochs is set, but no utterance is as short as data.short_seconds.
    """
    data, epochs = config.data, config.training.epochs
    options: dict[str, Any]
    options = {"frames_per_batch": data.frames_per_batch, "utterances_per_batch": data.utterances_per_batch}
    options |= {"seed": config.training.seed, "speed": config.augment.speed, "silence": config.augment.silence}
    all_batches = BucketBatches(frame_counts, **options)
    first = min(data.short_epochs, epochs)
    if not first:
        return Curriculum([(epochs, all_batches)])
    seconds = seconds_of(np.asarray(frame_counts), config.features)
    short = np.flatnonzero(seconds <= data.short_seconds)
    if not len(short):
        raise InputError(
            f"data.short_epochs is {data.short_epochs}, but the shortest training utterance lasts {seconds.min():.1f} "
            f"s, longer than data.short_seconds {data.short_seconds:g}; raise it, or set data.short_epochs to 0"
        )
    return Curriculum([(first, BucketBatches(frame_counts, **options, members=short)), (epochs - first, all_batches)])


def padding_share(frame_counts: FrameCounts, batches: list[list[int]], *, frame_multiple: int = 1) -> float:
    """Return the share of padding among all frames of batches that are padded to a multiple of `frame_multiple`."""
    lengths = np.asarray(frame_counts)
    padded = sum(len(batch) * round_up(int(lengths[batch].max()), frame_multiple) for batch in batches)
    return 1 - sum(int(lengths[batch].sum()) for batch in batches) / padded if padded else 0.0


def round_up(count: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple


def sorted_batches(frame_counts: FrameCounts, *, frames_per_batch: int, utterances_per_batch: int) -> list[list[int]]:
    """Cut utterances into batches of indices, longest first; each is within the limits or a single utterance."""
    lengths = np.asarray(frame_counts, np.int64)
    order = np.argsort(-lengths, kind="stable")
    cuts = _cut(lengths[order], frames_per_batch, utterances_per_batch)
    return [order[a:b].tolist() for a, b in zip(cuts, cuts[1:], strict=False)]


def _cut(frame_counts: np.ndarray, frames_per_batch: int, utterances_per_batch: int) -> list[int]:
    """Return the boundaries of batches in a monotone sequence of lengths: 0, ..., len(frame_counts)."""
    cuts, longest = [0], 0
    for i, length in enumerate(frame_counts):
        count = i - cuts[-1] + 1
        longest = max(longest, length)
        if count > 1 and (count > utterances_per_batch or count * longest > frames_per_batch):
            cuts.append(i)
            longest = length
    return cuts + [len(frame_counts)] if len(frame_counts) else cuts
