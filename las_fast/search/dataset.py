"""Decode a dataset in batches; halve a batch that does not fit in memory."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from las_fast.config import DecodingConfig, FeatureConfig
from las_fast.data.augment import frame_counts_at_speed
from las_fast.data.batch import Batch, make_loader
from las_fast.data.batch_plan import sorted_batches
from las_fast.data.normalisation import Statistics, model_input
from las_fast.errors import DoesNotFit, NotFinite, is_out_of_memory
from las_fast.model.attention import Memory
from las_fast.ops import NgramModel, ctc_loss
from las_fast.ops.ctc_loss import min_frames
from las_fast.progress import ProgressBar
from las_fast.search.beam import TokenHypothesis, beam_search, fold_length_reward, packed_weights
from las_fast.search.cuda_graph import clear_graphs
from las_fast.search.native import LOW_PRECISIONS
from las_fast.search.views import View, is_sure, keep_better, viewed, views_of
from las_fast.search.words import WordFinder
from las_fast.text import PAD, Vocabulary

MAX_UTTERANCES_PER_BATCH = 128  # however short they are
Result = TypeVar("Result")


class Utterances:
    """Utterances in memory, with the interface that decode_dataset needs.

    Args:
        frames:     of each utterance, (T, F) float32 before normalisation and deltas.
        ids:        names, for errors.
        seconds:    durations.
        features:   of the model.
        statistics: of the model, for normalisation "global".
    """

    def __init__(
        self,
        frames: list[Tensor],
        ids: list[str],
        seconds: Sequence[float],
        features: FeatureConfig,
        statistics: Statistics | None = None,
    ):
        self.frames, self.ids, self.seconds = frames, ids, np.asarray(seconds, np.float64)
        self.features, self.statistics = features, statistics
        self.frame_counts = np.array([len(x) for x in frames], np.int64)

    def __len__(self) -> int:
        return len(self.frames)

    def raw(self, i: int) -> Tensor:
        """Return the frames (T, F) of utterance i before normalisation and deltas."""
        return self.frames[i]

    def prepare(self, raw: Tensor) -> Tensor:
        """Normalise raw frames (T, F) and append deltas."""
        return model_input(raw, self.features, self.statistics)

    def __getitem__(self, i: int) -> Tensor:
        return self.prepare(self.raw(i))


def decode_dataset(
    model,
    dataset,
    vocabulary: Vocabulary,
    config: DecodingConfig,
    *,
    nbest: int = 1,
    ngram: NgramModel | None = None,
    packed: Tensor | None = None,
    speech_scores: bool = False,
    words: WordFinder | None = None,
    progress: bool = True,
    device: str | torch.device,
) -> list[list[TokenHypothesis]]:
    """Run beam_search on every utterance.

    With several config.speeds or config.warps, each utterance is decoded in several views (las_fast/search/views.py),
    and the hypotheses of the view with the highest score are kept; their frames and times are those of the utterance.

    Utterances are batched by length, up to config.frames_per_batch padded frames. A batch that does not fit in memory
    is halved and tried again, and later batches of that size are halved at once.

    Args:
        model:         see beam_search; it also has LAS.listen.
        dataset:       las_fast.data.dataset.SpeechDataset or Utterances.
        vocabulary:    of the model.
        config:        see beam_search.
        nbest:         maximum hypotheses per utterance, as in beam_search.
        ngram, packed: see beam_search.
        speech_scores: whether to compute the speech_score of each utterance's best hypothesis.
        words:         finds the words of all nbest hypotheses; None: they have none.
        progress:      whether to show a progress bar.
        device:        of the model.

    Returns:
        The hypotheses of each utterance, best first, in the order of the dataset.

    Raises:
        InputError: one utterance alone does not fit in memory, or the model's outputs are not finite.
    """
    ngram, config = fold_length_reward(ngram, config, len(vocabulary), device)
    packed = packed_weights(model, config, device) if packed is None else packed
    options: dict[str, Any] = {"nbest": nbest, "ngram": ngram, "packed": packed}
    views = views_of(config)
    decode = partial(
        _decode_batch,
        model=model,
        config=config.one_view(),
        device=device,
        with_speech_scores=speech_scores,
        words=words,
        **options,
    )
    results: list[list[TokenHypothesis]] = [[] for _ in range(len(dataset))]
    waiting = dict.fromkeys(range(len(dataset)))
    with ProgressBar(float(dataset.seconds.sum()), "decoding", "s of audio", show=progress) as bar:
        batches = decode_batches(decode, dataset, views, vocabulary, config, waiting=waiting, device=device)
        for view, indices, decoded in batches:
            for i, hypotheses in zip(indices.tolist(), decoded, strict=True):
                frames = int(dataset.frame_counts[i])
                counts = {"frames": frames, "view_frames": int(frame_counts_at_speed(frames, view.speed))}
                results[i] = keep_better(results[i], hypotheses, **counts, reduction=model.time_reduction)
                if is_sure(results[i][0], config):
                    del waiting[i]
                elif view == views[-1]:
                    check_finite(results[i][0].score, dataset.ids[i])
            left = len(views) - views.index(view)  # views that are done for an utterance that is sure
            done = [dataset.seconds[i] * (1 if i in waiting else left) for i in indices.tolist()]
            bar.update(float(sum(done)) / len(views))
    return results


def decode_batches(
    decode: Callable[[Batch, View], Result],
    dataset,
    views: Iterable[View],
    vocabulary: Vocabulary,
    config: DecodingConfig,
    *,
    waiting: Collection[int] | None = None,
    device: str | torch.device,
) -> Iterator[tuple[View, Tensor, Result]]:
    """Decode utterances of a dataset in each view, in batches, longest first.

    A batch that does not fit in memory is halved and tried again, and later batches of that size are halved at once.
    waiting: indices of the utterances to decode, ascending, read at the start of each view; None: all.
    device:  of the model; for CUDA, batches are put into pinned memory.

    Yields:
        The view, the indices of the utterances, and decode(batch, view).

    Raises:
        InputError: one utterance alone does not fit in memory.
    """
    failed_size = math.inf  # padded frames of the smallest batch that did not fit
    pin = torch.device(device).type == "cuda"
    for view in views:
        for batch in batches_to_decode(viewed(dataset, view), vocabulary, config, indices=waiting, pin=pin):
            parts = [batch]
            while parts:
                part = parts.pop()
                rows, frames = part.features.shape[:2]
                # One utterance of a slow view can be larger than a batch that failed in an earlier view.
                if (rows * frames < failed_size or rows == 1) and (decoded := _try_decode(decode, part, view)):
                    yield view, part.indices, decoded[0]  # not the batch, which would stay in memory beside the next
                else:
                    failed_size = min(failed_size, rows * frames)
                    parts += _split_in_half(part, dataset)


def batches_to_decode(
    dataset,
    vocabulary: Vocabulary,
    config: DecodingConfig,
    *,
    indices: Collection[int] | None = None,
    pin: bool = False,
) -> Iterable[Batch]:
    """Return batches of similar lengths, longest utterances first, without transcripts.

    indices: of the utterances, ascending; None: all.
    """
    chosen = np.arange(len(dataset)) if indices is None else np.array([*indices], np.int64)
    places = sorted_batches(
        dataset.frame_counts[chosen],
        frames_per_batch=config.frames_per_batch,
        utterances_per_batch=MAX_UTTERANCES_PER_BATCH,
    )
    batches = [chosen[batch].tolist() for batch in places]
    without_text = copy.copy(dataset)
    without_text.texts = [None] * len(dataset)  # transcripts may have characters outside the vocabulary
    return make_loader(without_text, batches, vocabulary, augment=None, seed=0, epoch=0, workers=0, pin=pin)


@torch.inference_mode()
def listen(model, batch: Batch, config: DecodingConfig):
    """Encode a batch; return the float32 memory. Matmuls are in bfloat16 if config.precision is in LOW_PRECISIONS."""
    with torch.autocast(batch.features.device.type, torch.bfloat16, enabled=config.precision in LOW_PRECISIONS):
        return model.listen(batch.features, batch.feature_lengths)


@torch.inference_mode()
def speech_scores(memory: Memory, texts: list[list[int]]) -> list[float | None]:
    """Return how much more likely each text is than silence under the CTC head, in nats per token.

    The score is (log p(text) - log p(only blanks)) / tokens. Speech scores 2 to 9; most texts hallucinated from noise
    score below 1.

    Args:
        memory: of a batch of B utterances, from model.listen.
        texts:  B lists of tokens without <sos> and <eos>.

    Returns:
        B scores: None without a CTC head or for an empty text, -inf for a text too long for the frames of the head.
    """
    if memory.ctc_logits is None or memory.ctc_lengths is None:
        return [None] * len(texts)
    device, lengths = memory.ctc_logits.device, memory.ctc_lengths
    counts = torch.tensor([len(text) for text in texts], device=device)
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(text, dtype=torch.int64) for text in texts], True)
    losses = ctc_loss(memory.ctc_logits, lengths, tokens.to(device), counts)
    blanks = torch.log_softmax(memory.ctc_logits.float(), -1)[..., PAD]
    valid = torch.arange(blanks.shape[1], device=device) < lengths[:, None]
    ratios = (-losses - blanks.masked_fill(~valid, 0).sum(1)) / counts
    needed = torch.tensor([min_frames(text) for text in texts], device=device)
    ratios = ratios.masked_fill(needed > lengths, -math.inf)  # where ctc_loss is 0 instead of infinite
    return [ratio if text else None for ratio, text in zip(ratios.tolist(), texts, strict=True)]


def _decode_batch(
    batch: Batch,
    _view: View,
    *,
    model,
    config: DecodingConfig,
    device,
    nbest: int,
    with_speech_scores: bool,
    words: WordFinder | None,
    **options,
) -> list[list[TokenHypothesis]]:
    lengths = batch.feature_lengths.tolist()
    memory = listen(model, batch.to(device), config)
    # All hypotheses vote on the words.
    hypotheses = beam_search(model, memory, config, nbest=config.beam if words else nbest, **options)
    if words:
        hypotheses = words(hypotheses, memory, lengths, nbest)
    if not with_speech_scores:
        return hypotheses
    scores = speech_scores(memory, [best.text_tokens for best, *_ in hypotheses])
    return [
        [dataclasses.replace(best, speech_score=score), *others]
        for (best, *others), score in zip(hypotheses, scores, strict=True)
    ]


def _try_decode(decode: Callable[[Batch, View], Result], batch: Batch, view: View) -> list[Result]:
    """Return [decode(batch, view)]; if memory runs out, free caches and return []."""
    try:
        return [decode(batch, view)]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    clear_graphs()
    torch.cuda.empty_cache()
    return []


def _split_in_half(batch: Batch, dataset) -> list[Batch]:
    """Return the two halves of a batch, each padded to its own longest utterance.

    Raises InputError for a batch of one utterance.
    """
    count = batch.features.shape[0]
    if count == 1:
        i = int(batch.indices[0])
        raise DoesNotFit(
            f"utterance {dataset.ids[i]} ({dataset.seconds[i]:.0f} s) alone does not fit in memory; "
            "lower the beam, decode on a machine with more memory, or cut the recording"
        )
    halves = []
    for rows in (slice(0, count // 2), slice(count // 2, count)):
        frames = int(batch.feature_lengths[rows].max())
        features = batch.features[rows, :frames]
        halves.append(Batch(features, batch.feature_lengths[rows], None, None, batch.indices[rows]))
    return halves


def check_finite(score: float, name: str) -> None:
    """Raise NotFinite if the best score of the utterance `name` is not finite."""
    if not math.isfinite(score):
        raise NotFinite(
            f"no hypothesis for {name} has a finite score: the model's outputs are NaN or infinite (use a checkpoint "
            "from before it diverged), or a --decoding setting is far out of range"
        )
