"""Validation: loss and greedy transcripts of the whole dev set, scores, the attention monitor, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from las_fast.config import Config, DecodingConfig
from las_fast.data.batch import Batch, make_loader
from las_fast.data.batch_plan import sorted_batches
from las_fast.data.dataset import SpeechDataset
from las_fast.errors import show
from las_fast.files import write_atomically
from las_fast.model.attention import Memory
from las_fast.model.las import LAS
from las_fast.output.faults import describe_fault
from las_fast.output.figures import attention_picture
from las_fast.output.metrics import Scores, score
from las_fast.progress import track
from las_fast.search.beam import greedy_search
from las_fast.text import Vocabulary
from las_fast.training import monitor
from las_fast.training.losses import token_loss
from las_fast.training.runs import frame_seconds

MAX_ID_BYTES = 120  # longer utterance ids are cut in the file names of pictures
MAX_TITLE = 60  # characters of a hypothesis in the title of a picture


@dataclass(frozen=True)
class Sample:
    """A dev utterance whose attention a validation has drawn."""

    id: str
    reference: str
    hypothesis: str
    picture: Path  # PNG


@dataclass(frozen=True)
class Validation:
    """Results of one validation."""

    loss: float  # cross-entropy, nats per token, teacher-forced
    scores: Scores  # of the greedy transcripts, over all utterances
    alignment: monitor.Alignment
    hypotheses: list[str]  # in dataset order
    fault: str = ""  # what is wrong with the hypotheses in general, such as "28 of 30 texts are blank"
    samples: tuple[Sample, ...] = ()


@torch.inference_mode()
def validate(
    model: LAS,
    data: SpeechDataset,
    vocabulary: Vocabulary,
    config: Config,
    device: torch.device,
    out: Path,
    epoch: float,
    check_stop: Callable[[], None] = lambda: None,
) -> Validation:
    """Score the model on every utterance of data; save attention pictures of a few in out/attention.

    Args:
        model:      on `device`; it is set to evaluation mode.
        data:       utterances with transcripts.
        out:        run folder.
        epoch:      for the names of the pictures.
        check_stop: called before each batch; may raise.

    Raises:
        InputError: a picture cannot be written.
        RuntimeError, MemoryError: a batch does not fit in memory.
    """
    model.eval()
    pictures = AttentionPictures(data, config.training.pictures, frame_seconds(config))
    sums, search, hypotheses = _Sums(), _greedy_settings(config), [""] * len(data)
    pin = device.type == "cuda"
    for batch in track(_batches(data, vocabulary, config, pin=pin), "validating", "batches"):
        check_stop()
        batch = batch.to(device)
        memory = model.listen(batch.features, batch.feature_lengths)
        weights = sums.add(model, memory, *batch.targets)
        pictures.collect(batch.indices, weights, batch.targets[1], memory.lengths)
        for i, best in zip(batch.indices.tolist(), greedy_search(model, memory, search), strict=True):
            hypotheses[i] = vocabulary.decode(best[0].text_tokens)
    samples = pictures.save(out / "attention", epoch, hypotheses)
    scores = score([text or "" for text in data.texts], hypotheses)
    return Validation(sums.loss(), scores, sums.alignment(), hypotheses, describe_fault(hypotheses), samples)


def _batches(data: SpeechDataset, vocabulary: Vocabulary, config: Config, *, pin: bool) -> Iterable[Batch]:
    batches = sorted_batches(
        data.frame_counts,
        frames_per_batch=config.decoding.frames_per_batch,
        utterances_per_batch=config.data.utterances_per_batch,
    )
    return make_loader(data, batches, vocabulary, augment=None, seed=0, epoch=0, workers=0, pin=pin)


def _greedy_settings(config: Config) -> DecodingConfig:
    """Return settings with attention alone: the monitor judges it, and CER stays comparable between trainings."""
    settings = config.decoding.attention_only()
    if settings.precision == "int8":  # not on every device
        settings = replace(settings, precision="auto")
    return settings


class _Sums:
    """Sums over the batches of a validation."""

    def __init__(self):
        self._loss, self._tokens = 0.0, 0
        self._swapped_rise, self._swapped_tokens = 0.0, 0
        self._alignments: list[monitor.Alignment] = []

    def add(self, model: LAS, memory: Memory, tokens: Tensor, token_lengths: Tensor) -> Tensor:
        """Add a batch with the targets tokens (B, U) and token_lengths (B,); return the attention weights (B, U, T)."""
        logits, weights = model.speller(memory, tokens)
        loss, count = float(token_loss(logits, tokens)), int(token_lengths.sum())
        self._loss, self._tokens = self._loss + loss, self._tokens + count
        self._alignments.append(monitor.measure(weights, token_lengths, memory.lengths))
        if len(tokens) > 1:
            swapped, _ = model.speller(swap_audio(memory), tokens)
            self._swapped_rise += float(token_loss(swapped, tokens)) - loss
            self._swapped_tokens += count
        return weights

    def loss(self) -> float:
        """Return the cross-entropy, nats per token."""
        return self._loss / self._tokens

    def alignment(self) -> monitor.Alignment:
        audio_gain = self._swapped_rise / self._swapped_tokens if self._swapped_tokens else None
        return replace(monitor.combine(self._alignments), audio_gain=audio_gain)


def swap_audio(memory: Memory) -> Memory:
    """Shift the memory of a batch by one utterance, so that each is paired with the audio of another."""
    rolled = (part.roll(-1, 0) for part in (memory.keys, memory.values, memory.lengths, memory.padding))
    return Memory(*rolled)


class AttentionPictures:
    """The attention of a few dev utterances: `count` of them from the median length upwards, always the same.

    frame_seconds: seconds per encoder frame.
    """

    def __init__(self, data: SpeechDataset, count: int, frame_seconds: float):
        by_length = np.argsort(data.frame_counts, kind="stable")
        middle = len(by_length) // 2
        self.wanted = [int(i) for i in by_length[middle : middle + count]]
        self.data, self.frame_seconds = data, frame_seconds
        self.weights: dict[int, np.ndarray] = {}  # (U, T) per utterance index, without padding

    def collect(self, indices: Tensor, weights: Tensor, token_lengths: Tensor, lengths: Tensor) -> None:
        """Keep the attention weights (B, U, T) of those utterances of a batch that are drawn."""
        for row, i in enumerate(indices.tolist()):
            if i in self.wanted:
                self.weights[i] = weights[row, : token_lengths[row], : lengths[row]].float().cpu().numpy()

    def save(self, folder: Path, epoch: float, hypotheses: Sequence[str]) -> tuple[Sample, ...]:
        """Write epoch-EPOCH-ID.png for each utterance, and the weights of all to epoch-EPOCH.npz.

        hypotheses: greedy transcripts in dataset order.
        """
        folder.mkdir(exist_ok=True)
        name = f"epoch-{epoch:07.2f}"
        arrays = {"ids": np.array([self.data.ids[i] for i in self.weights])}
        samples: list[Sample] = []
        for n, (i, weights) in enumerate(self.weights.items()):
            utterance, text = self.data.ids[i], self.data.texts[i] or ""
            arrays |= {f"weights_{n}": weights, f"text_{n}": np.array(text)}
            picture = folder / f"{name}-{_file_name(utterance)}.png"
            if picture in {earlier.picture for earlier in samples}:  # another id may have the same safe characters
                picture = picture.with_name(f"{picture.stem}-{n}.png")
            sample = Sample(utterance, text, hypotheses[i], picture)
            write_atomically(sample.picture, partial(self._draw, sample=sample, weights=weights, epoch=epoch))
            samples.append(sample)
        write_atomically(folder / f"{name}.npz", lambda path: save_npz(path, arrays))
        return tuple(samples)

    def _draw(self, path: Path, sample: Sample, weights: np.ndarray, epoch: float) -> None:
        cer = score([sample.reference], [sample.hypothesis]).cer
        hypothesis = sample.hypothesis
        hypothesis = hypothesis if len(hypothesis) <= MAX_TITLE else f"{hypothesis[:MAX_TITLE]}..."
        title = f"{show(sample.id)}, epoch {epoch:g}, CER {cer:.0f}%\nhypothesis: {show(hypothesis)}"
        text, seconds = sample.reference, self.frame_seconds
        attention_picture(path, weights=weights, text=text, title=title, frame_seconds=seconds)


def _file_name(utterance: str) -> str:
    """Return an utterance's id cut to MAX_ID_BYTES, with _ for characters that are not safe in file names."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in utterance)
    return safe.encode()[:MAX_ID_BYTES].decode(errors="ignore")


def save_npz(path: Path, arrays: dict) -> None:
    """Write arrays by name as a compressed .npz; the suffix of the path does not matter."""
    with path.open("wb") as file:  # a file object: numpy would add .npz to a name
        np.savez_compressed(file, **arrays)
