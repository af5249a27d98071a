"""Batches of similar length under a budget of padded frames, and the loader that makes them.

Everything random follows from (seed, epoch, utterance), so a place in training is just an epoch and a batch number.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from las_fast.augment import Augment
from las_fast.data.dataset import SpeechDataset
from las_fast.text import EOS, PAD, Vocabulary

CLASS_RATIOS = (1.5, 1.35, 1.25, 1.2, 1.15, 1.1, 1.07, 1.05, 1.03, 1.02, 1.01)  # longest to shortest in a length class
PADDING_AIM = 0.08  # share of padding up to which length classes are made wider, for better mixing


@dataclass
class Batch:
    features: torch.Tensor  # (B, T, F) float32, 0 past the length
    feature_lengths: torch.Tensor  # (B,) int64
    tokens: torch.Tensor | None  # (B, U) int64, characters then EOS, PAD past the length; None where texts are unknown
    token_lengths: torch.Tensor | None  # (B,) int64, EOS counted
    indices: torch.Tensor  # (B,) int64 into the dataset

    def to(self, device: str | torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change) -> Batch:
        return Batch(**{name: None if value is None else change(value) for name, value in vars(self).items()})


class BucketBatches:
    """Batches for training, new in every epoch, the same number in each.

    Utterances fall into classes of similar length. Batches are cut once from the classes in order, as if every
    utterance had the longest length of its class; each epoch shuffles who takes which place within a class, and then
    the order of the batches. So every epoch covers every utterance once, keeps the budget, and has len() batches.
    The classes are as wide as a padding share of 8% allows.
    """

    def __init__(self, frames: Sequence[int], *, frames_per_batch: int, utterances_per_batch: int, seed: int):
        """
        Args:
            frames:               of each utterance.
            frames_per_batch:     limit of a batch's size times its longest utterance; one longer than that is alone.
            utterances_per_batch: limit of a batch's size.
        """
        self._frames = np.asarray(frames, np.int64)
        self._seed = seed
        self._limits = (frames_per_batch, utterances_per_batch)
        for ratio in CLASS_RATIOS:
            self._lay_out(ratio)
            if self.padding_share(0) <= PADDING_AIM:
                break

    def _lay_out(self, ratio: float) -> None:
        order = np.argsort(self._frames, kind="stable")
        self._classes: list[np.ndarray] = []
        first = 0
        while first < len(order):
            limit = self._frames[order[first]] * ratio
            end = max(first + 1, int(np.searchsorted(self._frames[order], limit, side="right")))
            self._classes.append(order[first:end])
            first = end
        ceilings = np.concatenate([np.full(len(c), self._frames[c].max()) for c in self._classes] or [[]])
        self._cuts = _cut(ceilings, *self._limits)

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def epoch(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch as lists of utterance indices."""
        generator = np.random.default_rng([self._seed, epoch])
        places = np.concatenate([generator.permutation(c) for c in self._classes] or [np.zeros(0, np.int64)])
        batches = [places[a:b].tolist() for a, b in zip(self._cuts, self._cuts[1:], strict=False)]
        return [batches[i] for i in generator.permutation(len(batches))]

    def padding_share(self, epoch: int) -> float:
        """Return the share of an epoch's padded frames that are padding."""
        return padding_share(self._frames, self.epoch(epoch))


def padding_share(frames: Sequence[int], batches: list[list[int]]) -> float:
    frames = np.asarray(frames)
    padded = sum(len(batch) * int(frames[batch].max()) for batch in batches)
    return 1 - sum(int(frames[batch].sum()) for batch in batches) / padded if padded else 0.0


def sorted_batches(frames: Sequence[int], *, frames_per_batch: int, utterances_per_batch: int) -> list[list[int]]:
    """Return batches of utterance indices, the longest first, each under the budget or of one utterance."""
    frames = np.asarray(frames, np.int64)
    order = np.argsort(-frames, kind="stable")
    cuts = _cut(frames[order], frames_per_batch, utterances_per_batch)
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
) -> Iterable[Batch]:
    """Return a sized iterable of Batch over batches[start:], in that order, none dropped.

    The features of a batch do not depend on workers or start: augmentation is random in (seed, epoch, utterance) only.
    """
    return torch.utils.data.DataLoader(
        _Batches(dataset, batches, vocabulary, augment, seed, epoch),
        batch_size=None,
        sampler=range(start, len(batches)),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_prepare_worker if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: the loader must not draw from the state that training saves
    )


def _prepare_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers an interrupt


class _Batches(torch.utils.data.Dataset):
    """Item b is batch b, made whole in the worker."""

    def __init__(self, dataset, batches, vocabulary, augment, seed, epoch):
        self.dataset, self.batches, self.vocabulary = dataset, batches, vocabulary
        self.augment, self.seed, self.epoch = augment, seed, epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, b: int) -> Batch:
        indices = self.batches[b]
        features = [self._features(i, self.epoch + b / len(self.batches)) for i in indices]
        texts = [self.dataset.texts[i] for i in indices]
        tokens = None
        if not any(text is None or self.vocabulary.unknown(text) for text in texts):
            tokens = [torch.tensor([*self.vocabulary.encode(text), EOS]) for text in texts]
        pad = torch.nn.utils.rnn.pad_sequence
        return Batch(
            features=pad(features, batch_first=True),
            feature_lengths=torch.tensor([len(f) for f in features]),
            tokens=None if tokens is None else pad(tokens, batch_first=True, padding_value=PAD),
            token_lengths=None if tokens is None else torch.tensor([len(t) for t in tokens]),
            indices=torch.tensor(indices),
        )

    def _features(self, i: int, epoch: float) -> torch.Tensor:
        features = self.dataset[i]
        if self.augment is None:
            return features
        generator = np.random.default_rng([self.seed, self.epoch, i])
        return self.augment(features, epoch, generator, blocks=self.dataset.blocks)
