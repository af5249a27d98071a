"""Batches of utterances of similar length, with a limit on their padded frames, and the loader that makes them.

All randomness is a function of (seed, epoch, utterance), so an epoch and a batch number suffice to resume training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from las_fast.config import Config
from las_fast.data.augment import (
    Augment,
    change_speed,
    frame_counts_at_speed,
    join_pairs,
    random_stream,
    silence_frames,
    speed_factors,
)
from las_fast.data.dataset import SpeechDataset
from las_fast.data.degrade import Degrade, degrades
from las_fast.data.features import seconds_of
from las_fast.data.loader import Loader
from las_fast.data.splice import Splice
from las_fast.data.warp import warp_frequencies
from las_fast.errors import InputError
from las_fast.system import stream_for
from las_fast.text import EOS, PAD, Vocabulary

# Candidate widths of a length class, as longest over shortest utterance; the first that meets PADDING_TARGET is taken.
CLASS_RATIOS = (1.5, 1.35, 1.25, 1.2, 1.15, 1.1, 1.07, 1.05, 1.03, 1.02, 1.01)
FrameCounts = Sequence[int] | np.ndarray  # (N,) feature frames of each utterance
# Maximum share of padding to the longest utterance; wide classes shuffle better, but pad more.
PADDING_TARGET = 0.08
# The padded length of a training batch is a multiple of this. The batches of two epochs of 17 hours of speech then have
# 145 shapes instead of 1128. On the CPU, oneDNN compiles kernels for each shape that is not among the latest 200 (see
# las_fast.system.tune_memory), which takes about 5% of a step.
TRAINING_FRAME_MULTIPLE = 32


@dataclass
class Batch:
    features: torch.Tensor  # (B, T, F) float32, 0 past the length
    feature_lengths: torch.Tensor  # (B,) int64
    tokens: torch.Tensor | None  # (B, U) int64: characters, EOS, then PAD; None if a transcript is unknown
    token_lengths: torch.Tensor | None  # (B,) int64, including EOS
    indices: torch.Tensor  # (B,) int64 into the dataset; the first of two joined utterances

    def to(self, device: str | torch.device) -> Batch:
        """Copy the batch to a device.

        On CUDA the copies run on a separate stream, in parallel with the work enqueued so far; work enqueued later
        waits for them. The host does not wait if the batch is in pinned memory, as the batches of a loader are.
        """
        if torch.device(device).type != "cuda":
            return self._moved(device)
        copying, main = stream_for("copies", device), torch.cuda.current_stream(device)
        with torch.cuda.stream(copying):
            batch = self._moved(device)
        main.wait_stream(copying)
        for x in vars(batch).values():
            if x is not None:
                x.record_stream(main)  # the allocator must not reuse the memory while the main stream reads it
        return batch

    def _moved(self, device: str | torch.device) -> Batch:
        fields = vars(self).items()
        moved: dict[str, Any] = {name: None if x is None else x.to(device, non_blocking=True) for name, x in fields}
        return Batch(**moved)

    def rows(self, start: int, end: int) -> Batch:
        """Return some of the utterances, with the padding of the whole batch."""
        fields: dict[str, Any] = {name: None if x is None else x[start:end] for name, x in vars(self).items()}
        return Batch(**fields)

    @property
    def targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their lengths; the batch must have transcripts."""
        assert self.tokens is not None and self.token_lengths is not None
        return self.tokens, self.token_lengths


class BucketBatches:
    """Batches for training: different in every epoch, but always the same number.

    Each epoch sorts utterances into classes of similar length and shuffles within each class. It cuts batches in that
    order, as if every utterance were as long as the longest of its class, and shuffles the batches. The classes are as
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
        for ratio in CLASS_RATIOS:
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
        generator = random_stream("classes", seed=self._seed, epoch=epoch)
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
    padded = sum(len(batch) * _round_up(int(lengths[batch].max()), frame_multiple) for batch in batches)
    return 1 - sum(int(lengths[batch].sum()) for batch in batches) / padded if padded else 0.0


def _round_up(count: int, multiple: int) -> int:
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


def make_loader(
    dataset: SpeechDataset,
    batches: list[list[int]],
    vocabulary: Vocabulary,
    *,
    augment: Augment | None,
    splice: Splice | None = None,
    seed: int,
    epoch: int,
    start: int = 0,
    workers: int,
    frame_multiple: int = 1,
    pin: bool = False,
    poll: Callable[[], None] = lambda: None,
) -> Iterable[Batch]:
    """Return a sized iterable with a Batch for each of batches[start:], in that order.

    The padded length T is a multiple of frame_multiple. With `augment` and `splice`, as many utterances as
    augment.splice says get words of others. pin: into pinned memory, for a model on CUDA.

    Batches do not depend on workers or start: augmentation is a function of (seed, epoch, utterance). A worker that
    dies or hangs costs only time; see las_fast.data.loader. poll is called repeatedly while waiting for a batch; it may
    raise.
    """
    items = _Batches(dataset, batches, vocabulary, augment, splice, seed, epoch, frame_multiple)
    return _Loader(Loader(items, range(start, len(batches)), workers=workers, poll=poll, pin=pin))


class _Loader:
    """A Loader whose items are Batches."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        items: Generator[dict[str, Any], None, None] = iter(self.loader)
        with contextlib.closing(items):
            for fields in items:
                yield Batch(**fields)


class _Batches:
    """Dataset for the Loader: item b is the collated batch b, a dict with the fields of Batch."""

    def __init__(self, dataset, batches, vocabulary, augment, splice, seed, epoch, frame_multiple):
        self.dataset, self.batches, self.vocabulary = dataset, batches, vocabulary
        self.frame_multiple = frame_multiple
        self.augment, self.splice, self.seed, self.epoch = augment, splice, seed, epoch
        speed = augment.config.speed if augment else 0.0
        self.factors = speed_factors(speed, seed=seed, epoch=epoch, count=len(dataset)) if speed else None
        self.degrade: Degrade | None = None
        if augment and degrades(augment.config):
            self.degrade = Degrade(augment.config, dataset.features, dataset.raw, len(dataset))
            counts = dataset.frame_counts if not speed else frame_counts_at_speed(dataset.frame_counts, self.factors)
            self.silences = silence_frames(counts, augment.config.silence, seed=seed, epoch=epoch)

    def __getitem__(self, b: int) -> dict[str, torch.Tensor | None]:
        indices = self.batches[b]
        epoch = self.epoch + b / len(self.batches)
        features, texts = map(list, zip(*(self._utterance(i, epoch) for i in indices), strict=True))
        if self._joins(b, epoch):
            (features, texts), indices = join_pairs(features, texts), indices[::2]
        tokens = None
        if not any(text is None or self.vocabulary.unknown(text) for text in texts):
            tokens = [torch.tensor([*self.vocabulary.encode(text), EOS]) for text in texts]
        lengths = torch.tensor([len(f) for f in features])
        frames = _round_up(int(lengths.max()), self.frame_multiple)
        features[0] = torch.nn.functional.pad(features[0], (0, 0, 0, frames - len(features[0])))
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "features": pad(features, batch_first=True),
            "feature_lengths": lengths,
            "tokens": None if tokens is None else pad(tokens, batch_first=True, padding_value=PAD),
            "token_lengths": None if tokens is None else torch.tensor([len(t) for t in tokens]),
            "indices": torch.tensor(indices),
        }

    def _joins(self, b: int, epoch: float) -> bool:
        if self.augment is None or epoch < self.augment.config.start_epoch:
            return False
        drawn = random_stream("joins", seed=self.seed, epoch=self.epoch, utterance=b).random()
        return drawn < self.augment.config.join

    def _utterance(self, i: int, epoch: float) -> tuple[torch.Tensor, str | None]:
        """Return the features and the text of utterance i, augmented."""
        if self.augment is None:
            return self.dataset[i], self.dataset.texts[i]
        raw, text = self.dataset.raw(i), self.dataset.texts[i]
        if self.splice is not None:
            generator = random_stream("splice", seed=self.seed, epoch=self.epoch, utterance=i)
            if generator.random() < self.augment.config.splice:
                raw, text = self.splice(i, raw, generator)
        return self._features(i, epoch, raw), text

    def _features(self, i: int, epoch: float, raw: torch.Tensor) -> torch.Tensor:
        """Return the augmented features of raw frames (T, F) of utterance i."""
        generator = random_stream("masks", seed=self.seed, epoch=self.epoch, utterance=i)
        factor, blocks = None if self.factors is None else self.factors[i], self.dataset.blocks
        raw = self._warped(i, epoch, raw)
        if self.degrade and epoch >= self.augment.config.start_epoch:
            degraded = self._degraded(self.degrade, i, raw, factor)
            if degraded is not None:
                return self.augment.mask(degraded, generator, blocks=blocks)
        return self.augment(self.dataset.prepare(raw), epoch, generator, blocks=blocks, factor=factor)

    def _warped(self, i: int, epoch: float, raw: torch.Tensor) -> torch.Tensor:
        """Warp the frequency axis of the raw frames (T, F) of utterance i, if that is on."""
        most = self.augment.config.warp
        if not most or epoch < self.augment.config.start_epoch:
            return raw
        generator = random_stream("warp", seed=self.seed, epoch=self.epoch, utterance=i)
        return warp_frequencies(raw, generator.uniform(1 - most, 1 + most), self.dataset.features)

    def _degraded(self, degrade: Degrade, i: int, raw: torch.Tensor, factor: float | None) -> torch.Tensor | None:
        """Return the features of raw frames (T, F) at a speed, with rooms, noise and silence; None if utterance i gets
        none of them.

        The speed is changed first, so that noise keeps its texture, and normalisation comes last, as in decoding.
        """
        generator = random_stream("degrade", seed=self.seed, epoch=self.epoch, utterance=i)
        kinds, silence = degrade.draw(generator), self.silences[i].tolist()
        if not kinds and not any(silence):
            return None
        raw = raw if factor is None else change_speed(raw, factor)
        return self.dataset.prepare(degrade(raw, kinds, generator, silence=silence))
