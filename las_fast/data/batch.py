"""A batch of padded utterances, and the loader that makes batches from a dataset."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from las_fast.data.augment import Augment, join_pairs, random_stream
from las_fast.data.augmented import AugmentedUtterances
from las_fast.data.batch_plan import round_up
from las_fast.data.dataset import SpeechDataset
from las_fast.data.loader import Loader
from las_fast.data.splice import Splice
from las_fast.system import stream_for
from las_fast.text import EOS, PAD, Vocabulary

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

    The padded length T is a multiple of frame_multiple. splice: replaces words in a share augment.splice of the
    utterances; only with augment. pin: into pinned memory, for a model on CUDA.

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
        self.augment, self.seed, self.epoch, self.frame_multiple = augment, seed, epoch, frame_multiple
        self.augmented = AugmentedUtterances(dataset, augment, splice, seed=seed, epoch=epoch) if augment else None

    def __getitem__(self, b: int) -> dict[str, torch.Tensor | None]:
        indices, epoch = self.batches[b], self.epoch + b / len(self.batches)
        features, texts = map(list, zip(*(self._utterance(i, epoch) for i in indices), strict=True))
        if self._joins(b, epoch):
            (features, texts), indices = join_pairs(features, texts), indices[::2]
        tokens = None
        if not any(text is None or self.vocabulary.unknown(text) for text in texts):
            tokens = [torch.tensor([*self.vocabulary.encode(text), EOS]) for text in texts]
        lengths = torch.tensor([len(f) for f in features])
        frames = round_up(int(lengths.max()), self.frame_multiple)
        features[0] = torch.nn.functional.pad(features[0], (0, 0, 0, frames - len(features[0])))
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "features": pad(features, batch_first=True),
            "feature_lengths": lengths,
            "tokens": None if tokens is None else pad(tokens, batch_first=True, padding_value=PAD),
            "token_lengths": None if tokens is None else torch.tensor([len(t) for t in tokens]),
            "indices": torch.tensor(indices),
        }

    def _utterance(self, i: int, epoch: float) -> tuple[torch.Tensor, str | None]:
        """Return the features and the text of utterance i, augmented."""
        return self.augmented(i, epoch) if self.augmented else (self.dataset[i], self.dataset.texts[i])

    def _joins(self, b: int, epoch: float) -> bool:
        if self.augment is None or epoch < self.augment.config.start_epoch:
            return False
        drawn = random_stream("joins", seed=self.seed, epoch=self.epoch, utterance=b).random()
        return drawn < self.augment.config.join
