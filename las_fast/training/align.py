"""Find the frames of all words of a training set with the CTC head of a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from las_fast.config import DataConfig
from las_fast.data.batch import TRAINING_FRAME_MULTIPLE, make_loader
from las_fast.data.batch_plan import sorted_batches
from las_fast.data.features import frame_sizes
from las_fast.data.splice import WordTable
from las_fast.ops.ctc_loss import min_frames
from las_fast.progress import track
from las_fast.search.confidence import DEFAULT, Calibration, read_calibration
from las_fast.search.words import TokenEvidence, token_evidence, word_times

if TYPE_CHECKING:
    from las_fast.data.dataset import SpeechDataset
    from las_fast.model.las import LAS
    from las_fast.text import Vocabulary

MARGIN = 0.06  # seconds of the pause beside a word that are taken with it, at most
NO_WORDS = (np.empty((0, 2)), np.empty((0, 2)), np.empty(0))  # spans, seconds and log-probabilities


@torch.inference_mode()
def align_words(
    model: LAS,
    dataset: SpeechDataset,
    vocabulary: Vocabulary,
    *,
    data: DataConfig,
    precision: torch.dtype,
    check_stop: Callable[[], None] = lambda: None,
) -> WordTable:
    """Return the words of all utterances with their frames.

    An utterance has no words in the table if its transcript needs more frames than the CTC head has.

    Args:
        model:      with a CTC head; it is set to evaluation mode.
        dataset:    with transcripts.
        data:       frames_per_batch and utterances_per_batch are used: what fits in training fits here.
        precision:  of matmuls, as in training.
        check_stop: called before each batch; may raise.
    """
    model.eval()
    device, calibration = next(model.parameters()).device, read_calibration(DEFAULT)
    shift = frame_sizes(dataset.features)[1] / dataset.features.sample_rate  # seconds
    counts = dataset.frame_counts
    batches = sorted_batches(
        counts, frames_per_batch=data.frames_per_batch, utterances_per_batch=data.utterances_per_batch
    )
    loader = make_loader(dataset, batches, vocabulary, augment=None, seed=0, epoch=0, workers=0,
                         frame_multiple=TRAINING_FRAME_MULTIPLE)  # fmt: skip
    found = {}
    for batch in track(loader, "aligning words", "batches"):
        check_stop()
        batch = batch.to(device)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            memory = model.listen(batch.features, batch.feature_lengths)
        texts = {i: dataset.texts[i] or "" for i in batch.indices.tolist()}
        evidence = token_evidence(memory, [vocabulary.encode(text) for text in texts.values()])
        assert memory.ctc_lengths is not None  # augment.splice needs a CTC head
        lengths = memory.ctc_lengths.tolist()
        for (i, text), tokens, length in zip(texts.items(), evidence, lengths, strict=True):
            if tokens is not None and min_frames(text) <= length and text.strip():
                tokens = TokenEvidence(tokens.times * (model.ctc_time_reduction * shift), tokens.log_probs)
                found[i] = locate_words(text, tokens, float(counts[i]) * shift, calibration)
    return _table(found, shift)


def locate_words(
    text: str, tokens: TokenEvidence, limit: float, calibration: Calibration
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the W words of a transcript: spans (W, 2) of characters, seconds (W, 2), and log-probabilities (W,).

    A word gets half of the pause on each side, at most MARGIN.

    Args:
        tokens: of the characters, with times in seconds.
        limit:  seconds of the utterance.
    """
    spans = np.array([word.span() for word in re.finditer(r"\S+", text)])
    starts, ends = word_times(tokens.times, spans.tolist(), limit, calibration)
    middles = (ends[:-1] + starts[1:]) / 2
    seconds = np.stack(
        [np.maximum(starts - MARGIN, np.append(0.0, middles)), np.minimum(ends + MARGIN, np.append(middles, limit))], 1
    )
    return spans, seconds, np.array([tokens.log_probs[first:last].mean() for first, last in spans])


def _table(found: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]], shift: float) -> WordTable:
    """Return the table of the words of each utterance; shift is seconds per frame."""
    order = sorted(found)
    columns = [np.concatenate([empty, *(found[i][k] for i in order)]) for k, empty in enumerate(NO_WORDS)]
    spans, seconds, log_probs = columns
    utterances = np.repeat(np.array(order, np.int32), [len(found[i][0]) for i in order])
    frames = np.rint(seconds / shift).astype(np.int32)
    return WordTable(utterances, spans.astype(np.int32), frames, log_probs.astype(np.float32))
