"""Decode a data set in batches, halving a batch that does not fit in memory."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from operator import eq
from typing import Any

import torch
from torch import Tensor

from las_fast.config import DecodingConfig
from las_fast.data.batching import Batch, make_loader, sorted_batches
from las_fast.errors import InputError, is_out_of_memory
from las_fast.model.attention import Memory
from las_fast.ops import (
    ctc_loss,
)
from las_fast.progress import Progress
from las_fast.search.beam import Hypothesis, beam_search, packed_weights, with_reward
from las_fast.search.cuda_graph import forget
from las_fast.search.native import LOW_PRECISIONS
from las_fast.text import PAD, Vocabulary

UTTERANCES_PER_BATCH = 128  # at most, however short they are


def decode_dataset(
    model,
    dataset,
    vocabulary: Vocabulary,
    config: DecodingConfig,
    *,
    nbest: int = 1,
    ngram: Tensor | None = None,
    packed: Tensor | None = None,
    speech_scores: bool = False,
    progress: bool = True,
    device: str | torch.device,
) -> list[list[Hypothesis]]:
    """Beam-search every utterance; return their hypotheses in the dataset's order.

    nbest, ngram and packed are as in beam_search. With speech_scores each utterance's best hypothesis has its score.
    Utterances are batched by length under config.frames_per_batch. A batch that does not fit in memory is halved and
    tried again, and those after it are kept as small.

    Raises:
        InputError: one utterance alone does not fit in memory, or the model's outputs are not numbers.
    """
    ngram, config = with_reward(ngram, config, len(vocabulary), device)
    packed = packed_weights(model, config, device) if packed is None else packed
    options: dict[str, Any] = {"nbest": nbest, "ngram": ngram, "packed": packed}
    decode = partial(_decode, model=model, config=config, device=device, scored=speech_scores, **options)
    results: list[list[Hypothesis]] = [[] for _ in range(len(dataset))]
    limit = math.inf  # padded frames that are known to be too many
    with Progress(float(dataset.seconds.sum()), "decoding", "s of audio", show=progress) as bar:
        for batch in batches_to_decode(dataset, vocabulary, config):
            waiting = [batch]
            while waiting:
                part = waiting.pop()
                size = part.features.shape[0] * part.features.shape[1]
                # The longest utterances come first, so that a single one is always below a limit that a batch has set.
                found = _try(decode, part) if size < limit else None
                if found is None:
                    limit = min(limit, size)
                    waiting += _halves(part, dataset)
                    continue
                for i, hypotheses in zip(part.indices.tolist(), found, strict=True):
                    results[i] = _checked(hypotheses, dataset.ids[i])
                bar.update(float(dataset.seconds[part.indices.numpy()].sum()))
    return results


def batches_to_decode(dataset, vocabulary: Vocabulary, config: DecodingConfig) -> Iterable[Batch]:
    """Return the dataset's batches by length, the longest utterances first, without their transcripts."""
    batches = sorted_batches(
        dataset.frames, frames_per_batch=config.frames_per_batch, utterances_per_batch=UTTERANCES_PER_BATCH
    )
    untold = copy.copy(dataset)
    untold.texts = [None] * len(dataset)  # transcripts may hold characters that the vocabulary lacks
    return make_loader(untold, batches, vocabulary, augment=None, seed=0, epoch=0, workers=0)


@torch.inference_mode()
def listen(model, batch: Batch, config: DecodingConfig):
    """Return the encoder memory of a batch, in float32, by products in bfloat16 where config.precision is reduced."""
    with torch.autocast(batch.features.device.type, torch.bfloat16, enabled=config.precision in LOW_PRECISIONS):
        return model.listen(batch.features, batch.feature_lengths)


@torch.inference_mode()
def speech_scores(memory: Memory, texts: list[list[int]]) -> list[float | None]:
    """Return how much likelier each text is than silence by the CTC head, in nats per token.

    This is (log p(text) - log p(only blanks)) / tokens. Speech has 2 to 9; below 1 lie texts made out of noise.

    Args:
        memory: of a batch of B utterances, as model.listen returned it.
        texts:  B lists of tokens without <sos> and <eos>.

    Returns:
        B scores; None where there is no CTC head or the text is empty, -inf where it has more tokens than the head has
        frames.
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
    repeated = torch.tensor([sum(map(eq, text, text[1:])) for text in texts], device=device)  # a blank parts these
    ratios = ratios.masked_fill(counts + repeated > lengths, -math.inf)  # the loss of what cannot be aligned is 0
    return [ratio if text else None for ratio, text in zip(ratios.tolist(), texts, strict=True)]


def _decode(batch: Batch, *, model, config: DecodingConfig, device, scored: bool, **options) -> list[list[Hypothesis]]:
    memory = listen(model, batch.to(device), config)
    found = beam_search(model, memory, config, **options)
    if not scored:
        return found
    scores = speech_scores(memory, [best.text_tokens for best, *_ in found])
    best = [dataclasses.replace(best, speech_score=x) for (best, *_), x in zip(found, scores, strict=True)]
    return [[first, *others] for first, (_, *others) in zip(best, found, strict=True)]


def _try(decode: Callable[[Batch], list[list[Hypothesis]]], batch: Batch) -> list[list[Hypothesis]] | None:
    """Decode one batch; return None if memory does not suffice."""
    try:
        return decode(batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    forget()
    torch.cuda.empty_cache()
    return None


def _halves(batch: Batch, dataset) -> list[Batch]:
    """Return the two halves of a batch that is too big, each padded no further than it needs."""
    count = batch.features.shape[0]
    if count == 1:
        i = int(batch.indices[0])
        raise InputError(
            f"utterance {dataset.ids[i]} ({dataset.seconds[i]:.0f} s) alone does not fit in memory; "
            "lower --decoding.beam, decode on a machine with more memory, or cut the recording"
        )
    halves = []
    for rows in (slice(0, count // 2), slice(count // 2, count)):
        frames = int(batch.feature_lengths[rows].max())
        features = batch.features[rows, :frames]
        halves.append(Batch(features, batch.feature_lengths[rows], None, None, batch.indices[rows]))
    return halves


def _checked(hypotheses: list[Hypothesis], name: str) -> list[Hypothesis]:
    if not math.isfinite(hypotheses[0].score):
        raise InputError(
            f"no hypothesis for {name} has a finite score: the model's outputs are not numbers (use a checkpoint from "
            "before it diverged), or a setting under --decoding is beyond all measure"
        )
    return hypotheses
