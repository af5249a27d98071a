"""Validation: the whole dev set's loss, greedy transcripts and scores, attention monitor and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from las_fast.config import Config
from las_fast.data.batching import make_loader, sorted_batches
from las_fast.data.dataset import SpeechDataset
from las_fast.errors import show
from las_fast.files import write_atomically
from las_fast.model.attention import Memory
from las_fast.model.las import LAS
from las_fast.output.figures import attention_picture
from las_fast.output.metrics import Scores, score
from las_fast.search.beam import greedy_search
from las_fast.text import Vocabulary
from las_fast.training import monitor
from las_fast.training.losses import token_loss

LONGEST_NAME = 120  # bytes of an utterance's id in the name of a picture


@dataclass(frozen=True)
class Validation:
    """One look at the dev set."""

    loss: float  # cross-entropy in nats a token, true token before each
    scores: Scores  # of the greedy transcripts, over all utterances
    alignment: monitor.Alignment
    hypotheses: list[str]  # in dataset order


@torch.inference_mode()
def validate(
    model: LAS,
    data: SpeechDataset,
    vocabulary: Vocabulary,
    config: Config,
    device: torch.device,
    out: Path,
    epoch: float,
    look_up: Callable[[], None] = lambda: None,
) -> Validation:
    """Score model on every utterance of data, and draw the attention of the first few into out/attention.

    look_up is called before each batch; it may raise.
    """
    model.eval()
    batches = sorted_batches(
        data.frames,
        frames_per_batch=config.decoding.frames_per_batch,
        utterances_per_batch=config.data.utterances_per_batch,
    )
    total, count, alignments = 0.0, 0, []
    confused, compared = 0.0, 0
    hypotheses: list[str] = [""] * len(data)
    # Attention alone: what the monitor watches, and what scores of other trainings can be compared with.
    alone = replace(config.decoding, ctc_weight=0.0, ngram_weight=0.0, length_reward=0.0)
    pictured = PictureBook(data, config.training.pictures)
    for batch in make_loader(data, batches, vocabulary, augment=None, seed=0, epoch=0, workers=0):
        look_up()
        batch = batch.to(device)
        memory = model.listen(batch.features, batch.feature_lengths)
        tokens, token_lengths = batch.targets
        logits, weights = model.speller(memory, tokens)
        total += float(token_loss(logits, tokens))
        count += int(token_lengths.sum())
        alignments.append(monitor.measure(weights, token_lengths, memory.lengths))
        if len(batch.indices) > 1:
            other, _ = model.speller(of_the_next(memory), tokens)
            confused += float(token_loss(other, tokens) - token_loss(logits, tokens))
            compared += int(token_lengths.sum())
        pictured.collect(batch.indices, weights, token_lengths, memory.lengths)
        for i, best in zip(batch.indices.tolist(), greedy_search(model, memory, alone), strict=True):
            hypotheses[i] = vocabulary.decode(best[0].text_tokens)
    pictured.save(out / "attention", epoch)
    heard = confused / compared if compared else None
    alignment = replace(monitor.combine(alignments), heard=heard)
    references = [text or "" for text in data.texts]
    return Validation(total / count, score(references, hypotheses), alignment, hypotheses)


def of_the_next(memory: Memory) -> Memory:
    """Give each utterance the memory of the next in the batch, the last that of the first."""
    rolled = (part.roll(-1, 0) for part in (memory.keys, memory.values, memory.lengths, memory.padding))
    return Memory(*rolled)


class PictureBook:
    """Keeps the attention of the same few dev utterances at each validation, of middling length."""

    def __init__(self, data: SpeechDataset, pictures: int):
        by_length = np.argsort(data.frames, kind="stable")
        middle = len(by_length) // 2
        self.wanted = [int(i) for i in by_length[middle : middle + pictures]]
        self.data = data
        self.weights: dict[int, np.ndarray] = {}

    def collect(self, indices: Tensor, weights: Tensor, token_lengths: Tensor, lengths: Tensor) -> None:
        for row, i in enumerate(indices.tolist()):
            if i in self.wanted:
                self.weights[i] = weights[row, : token_lengths[row], : lengths[row]].float().cpu().numpy()

    def save(self, folder: Path, epoch: float) -> None:
        """Write epoch-EPOCH-ID.png for each utterance, and their numbers to epoch-EPOCH.npz."""
        folder.mkdir(exist_ok=True)
        name = f"epoch-{epoch:07.2f}"
        arrays = {"ids": np.array([self.data.ids[i] for i in self.weights])}
        for n, (i, weights) in enumerate(self.weights.items()):
            text = self.data.texts[i]
            arrays |= {f"weights_{n}": weights, f"text_{n}": np.array(text)}
            safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in self.data.ids[i])
            safe = safe.encode()[:LONGEST_NAME].decode(errors="ignore")
            title = f"{show(self.data.ids[i])}, epoch {epoch:g}"
            picture = partial(attention_picture, weights=weights, text=text or "", title=title)
            write_atomically(folder / f"{name}-{safe}.png", picture)
        write_atomically(folder / f"{name}.npz", lambda path: save_npz(path, arrays))


def save_npz(path: Path, arrays: dict) -> None:
    with path.open("wb") as file:  # a file object: numpy would add .npz to a name
        np.savez_compressed(file, **arrays)
