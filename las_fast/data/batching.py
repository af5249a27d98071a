"""Batches of similar length under a budget of padded frames, and the loader that makes them.

Everything random follows from (seed, epoch, utterance), so a place in training is just an epoch and a batch number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from las_fast.config import Config
from las_fast.data.augment import Augment, frames_at_speed, join_pairs, random_stream, speed_factors
from las_fast.data.dataset import SpeechDataset
from las_fast.data.features import seconds_of
from las_fast.data.loader import Loader
from las_fast.errors import InputError
from las_fast.text import EOS, PAD, Vocabulary

CLASS_RATIOS = (1.5, 1.35, 1.25, 1.2, 1.15, 1.1, 1.07, 1.05, 1.03, 1.02, 1.01)  # longest to shortest in a length class
Lengths = Sequence[int] | np.ndarray  # frames of each utterance
PADDING_AIM = 0.08  # share of padding up to which length classes are made wider, for better mixing


@dataclass
class Batch:
    features: torch.Tensor  # (B, T, F) float32, 0 past the length
    feature_lengths: torch.Tensor  # (B,) int64
    tokens: torch.Tensor | None  # (B, U) int64, characters then EOS, PAD past the length; None where texts are unknown
    token_lengths: torch.Tensor | None  # (B,) int64, EOS counted
    indices: torch.Tensor  # (B,) int64 into the dataset; of two that were joined, the first

    def to(self, device: str | torch.device) -> Batch:
        fields = vars(self).items()
        moved: dict[str, Any] = {name: None if x is None else x.to(device, non_blocking=True) for name, x in fields}
        return Batch(**moved)

    @property
    def targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens and their lengths, of a batch whose texts are known."""
        assert self.tokens is not None and self.token_lengths is not None
        return self.tokens, self.token_lengths


class BucketBatches:
    """Batches for training, new in every epoch, the same number in each.

    Utterances fall into classes of similar length, are shuffled within them, and batches are cut from the classes in
    order, as if every utterance had the longest length of its class; then the order of the batches is shuffled. The
    classes are as wide as a padding share of 8% allows. With speed, lengths differ from epoch to epoch: an epoch that
    comes to fewer batches than others has its largest ones halved, one that comes to more gets a little more budget.
    """

    def __init__(
        self, frames: Lengths, *, frames_per_batch: int, utterances_per_batch: int, seed: int, speed: float = 0.0,
        members: np.ndarray | None = None,
    ):  # fmt: skip
        """
        Args:
            frames:               of each utterance.
            frames_per_batch:     limit of a batch's size times its longest utterance; one longer than that is alone.
            utterances_per_batch: limit of a batch's size.
            seed, speed:          as the loader gets them (speed: augment.speed), to know the lengths that it will make.
            members:              indices of the utterances that take part, at least one; None: all.
        """
        self._frames = np.asarray(frames, np.int64)
        self._members = np.arange(len(self._frames)) if members is None else members
        self._seed, self._speed = seed, speed
        self._limits = (frames_per_batch, utterances_per_batch)
        for ratio in CLASS_RATIOS:
            self._ratio = ratio
            self._count = len(self._form(0))
            if self.padding_share(0) <= PADDING_AIM:
                break
        if speed:
            self._count = max(len(self._form(epoch)) for epoch in range(4))

    def __len__(self) -> int:
        return self._count

    def epoch(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch as lists of utterance indices."""
        batches = self._form(epoch)
        slack = 1.0
        while len(batches) > self._count:
            slack *= 1.01
            batches = self._form(epoch, slack)
        lengths = self.lengths(epoch)
        while len(batches) < self._count:  # there is one to halve: more batches were cut from as many utterances
            sizes = [len(batch) > 1 and len(batch) * lengths[batch].max() for batch in batches]
            largest = batches.pop(int(np.argmax(sizes)))
            batches += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        order = random_stream("order", seed=self._seed, epoch=epoch).permutation(len(batches))
        return [batches[i] for i in order]

    def lengths(self, epoch: int) -> np.ndarray:
        """Return the frames (N,) int64 of the utterances as they are played in an epoch."""
        if not self._speed:
            return self._frames
        factors = speed_factors(self._speed, seed=self._seed, epoch=epoch, count=len(self._frames))
        return frames_at_speed(self._frames, factors)

    def padding_share(self, epoch: int) -> float:
        """Return the share of an epoch's padded frames that are padding."""
        return padding_share(self.lengths(epoch), self.epoch(epoch))

    def _form(self, epoch: int, slack: float = 1.0) -> list[list[int]]:
        """Cut an epoch's batches, in order of length; `slack` widens the limits."""
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
class Course:
    """The batches of a whole training: for some epochs of its short utterances alone, then of all.

    Attention forms sooner where it has little to choose from (a curriculum, Bengio et al. 2009).
    """

    stages: list[tuple[int, BucketBatches]]  # epochs, and the batches of each

    @property
    def steps(self) -> int:
        return sum(epochs * len(batches) for epochs, batches in self.stages)

    def place(self, step: int) -> tuple[int, int]:
        """Return the epoch that a step is in, and the number of its batch there."""
        before = 0
        for epochs, batches in self.stages:
            if step < epochs * len(batches):
                break
            step, before = step - epochs * len(batches), before + epochs
        epoch, batch = divmod(step, len(batches))  # after the last stage its epochs go on
        return before + epoch, batch

    def steps_before(self, epoch: int) -> int:
        """Return the number of steps before an epoch."""
        return sum(len(self.of(e)) for e in range(epoch))

    def epochs(self, step: int) -> float:
        """Return how many epochs are done before a step."""
        epoch, batch = self.place(step)
        return epoch + batch / len(self.of(epoch))

    def of(self, epoch: int) -> BucketBatches:
        """Return what makes the batches of an epoch."""
        for epochs, batches in self.stages:
            if epoch < epochs:
                return batches
            epoch -= epochs
        return self.stages[-1][1]


def plan_course(frames: Lengths, config: Config) -> Course:
    """Return the course of a training on utterances of `frames` feature frames each.

    Raises:
        InputError: data.short_epochs is set, and no utterance is as short as data.short_seconds.
    """
    data, epochs = config.data, config.training.epochs
    options: dict[str, Any]
    options = {"frames_per_batch": data.frames_per_batch, "utterances_per_batch": data.utterances_per_batch,
               "seed": config.training.seed, "speed": config.augment.speed}  # fmt: skip
    everything = BucketBatches(frames, **options)
    first = min(data.short_epochs, epochs)
    if not first:
        return Course([(epochs, everything)])
    seconds = seconds_of(np.asarray(frames), config.features)
    short = np.flatnonzero(seconds <= data.short_seconds)
    if not len(short):
        raise InputError(
            f"data.short_epochs is {data.short_epochs}, but the shortest training utterance has {seconds.min():.1f} "
            f"seconds, more than data.short_seconds {data.short_seconds:g}; raise that, or set short_epochs to 0"
        )
    return Course([(first, BucketBatches(frames, **options, members=short)), (epochs - first, everything)])


def padding_share(frames: Lengths, batches: list[list[int]]) -> float:
    """Return the share of the batches' padded frames that are padding."""
    lengths = np.asarray(frames)
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - sum(int(lengths[batch].sum()) for batch in batches) / padded if padded else 0.0


def sorted_batches(frames: Lengths, *, frames_per_batch: int, utterances_per_batch: int) -> list[list[int]]:
    """Return batches of utterance indices, the longest first, each under the budget or of one utterance."""
    lengths = np.asarray(frames, np.int64)
    order = np.argsort(-lengths, kind="stable")
    cuts = _cut(lengths[order], frames_per_batch, utterances_per_batch)
    return [order[a:b].tolist() for a, b in zip(cuts, cuts[1:], strict=False)]


def _cut(frames: np.ndarray, frames_per_batch: int, utterances_per_batch: int) -> list[int]:
    """Return where to cut a monotone sequence of lengths into batches: 0, ..., len(frames)."""
    cuts, longest = [0], 0
    for i, length in enumerate(frames):
        count = i - cuts[-1] + 1
        longest = max(longest, length)
        if count > 1 and (count > utterances_per_batch or count * longest > frames_per_batch):
            cuts.append(i)
            longest = length
    return cuts + [len(frames)] if len(frames) else cuts


def make_loader(
    dataset: SpeechDataset,
    batches: list[list[int]],
    vocabulary: Vocabulary,
    *,
    augment: Augment | None,
    seed: int,
    epoch: int,
    start: int = 0,
    workers: int,
    look_up: Callable[[], None] = lambda: None,
) -> Iterable[Batch]:
    """Return a sized iterable of Batch over batches[start:], in that order, none dropped.

    The features of a batch do not depend on workers or start: augmentation is random in (seed, epoch, utterance) only.
    A worker that dies or hangs costs time alone; see las_fast.data.loader. look_up is called again and again while a
    batch is waited for; it may raise.
    """
    made = _Batches(dataset, batches, vocabulary, augment, seed, epoch)
    order, pin = range(start, len(batches)), torch.cuda.is_available()
    return _Loader(Loader(made, order, workers=workers, look_up=look_up, pin=pin))


class _Loader:
    """What a Loader gives, as batches."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        made: Generator[dict[str, Any], None, None] = iter(self.loader)
        with contextlib.closing(made):
            for fields in made:
                yield Batch(**fields)


class _Batches:
    """Item b is batch b, as the fields of a Batch."""

    def __init__(self, dataset, batches, vocabulary, augment, seed, epoch):
        self.dataset, self.batches, self.vocabulary = dataset, batches, vocabulary
        self.augment, self.seed, self.epoch = augment, seed, epoch
        speed = augment.config.speed if augment else 0.0
        self.factors = speed_factors(speed, seed=seed, epoch=epoch, count=len(dataset)) if speed else None

    def __getitem__(self, b: int) -> dict[str, torch.Tensor | None]:
        indices = self.batches[b]
        epoch = self.epoch + b / len(self.batches)
        features = [self._features(i, epoch) for i in indices]
        texts = [self.dataset.texts[i] for i in indices]
        if self._joins(b, epoch):
            (features, texts), indices = join_pairs(features, texts), indices[::2]
        tokens = None
        if not any(text is None or self.vocabulary.unknown(text) for text in texts):
            tokens = [torch.tensor([*self.vocabulary.encode(text), EOS]) for text in texts]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "features": pad(features, batch_first=True),
            "feature_lengths": torch.tensor([len(f) for f in features]),
            "tokens": None if tokens is None else pad(tokens, batch_first=True, padding_value=PAD),
            "token_lengths": None if tokens is None else torch.tensor([len(t) for t in tokens]),
            "indices": torch.tensor(indices),
        }

    def _joins(self, b: int, epoch: float) -> bool:
        if self.augment is None or epoch < self.augment.config.start_epoch:
            return False
        drawn = random_stream("joins", seed=self.seed, epoch=self.epoch, utterance=b).random()
        return drawn < self.augment.config.join

    def _features(self, i: int, epoch: float) -> torch.Tensor:
        features = self.dataset[i]
        if self.augment is None:
            return features
        generator = random_stream("masks", seed=self.seed, epoch=self.epoch, utterance=i)
        factor = None if self.factors is None else self.factors[i]
        return self.augment(features, epoch, generator, blocks=self.dataset.blocks, factor=factor)
