"""From encoder memory to text: batched beam search that looks at the host only every few steps.

The state of B utterances times K beams stays in (B, K, ...) tensors; keys and values stay (B, T, ...), once for all
beams. Each step keeps a token and a back-pointer a beam in buffers made before the loop; hypotheses are read off the
pointers at the end. A finished beam is frozen: it goes on with <eos> at an unchanged score, ranked with the living.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from las_fast.config import DecodingConfig
from las_fast.data.batching import Batch, make_loader, sorted_batches
from las_fast.errors import InputError
from las_fast.ops import beam_backtrack, beam_topk
from las_fast.text import EOS, PAD, SOS, Vocabulary

LOOK_EVERY = 16  # steps between two looks at "all finished": each one waits for the device
UTTERANCES_PER_BATCH = 128  # at most, however short they are
BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}, {rate_fmt}]"


@dataclass(frozen=True)
class Hypothesis:
    """One reading of an utterance."""

    text_tokens: list[int]  # without <sos> or <eos>
    score: float  # sum of natural-log probabilities, that of <eos> included
    normalised: float  # score / tokens ** length_penalty, <eos> counted: what hypotheses are ranked by
    frames: list[int]  # the encoder frame that each token attended to most
    token_scores: list[float]  # log-probability of each token
    finished: bool  # False where <eos> came only because the maximum length was reached


class Limits(NamedTuple):
    """Tokens that an utterance may have, <eos> not counted; (B,) int64."""

    minimum: Tensor
    maximum: Tensor


class Steps(NamedTuple):
    """What the search keeps of each step, (L, B, K)."""

    tokens: Tensor
    parents: Tensor
    scores: Tensor  # float32, of the hypothesis so far
    frames: Tensor


def greedy_search(model, memory, config: DecodingConfig) -> list[list[Hypothesis]]:
    """Take the most probable token at each step; a list of one hypothesis an utterance. See beam_search."""
    return beam_search(model, memory, dataclasses.replace(config, beam=1))


@torch.inference_mode()
def beam_search(
    model, memory, config: DecodingConfig, *, nbest: int = 1, backend: str = "auto"
) -> list[list[Hypothesis]]:
    """Return up to `nbest` hypotheses an utterance, best first.

    Hypotheses do not depend on the batch that an utterance is in. At the maximum length they take <eos>.

    Args:
        model:   has start(memory, beam), step(tokens (B, K), state, memory) and time_reduction, as las_fast.model.LAS.
        memory:  what model.listen returned; lengths (B,) int64 encoder frames.
        config:  beam, length limits and penalties.
        nbest:   hypotheses to return; no more than config.beam exist.
        backend: of the ops.

    Where the model's outputs are not numbers, an utterance's one hypothesis is empty with score -inf.
    """
    limits = length_limits(memory.lengths * model.time_reduction, config)
    steps, lengths = _search(model, memory, limits, config, backend)
    return _read_off(steps, lengths, limits, config, nbest, backend)


def length_limits(lengths: Tensor, config: DecodingConfig) -> Limits:
    """Return the tokens allowed for (B,) int64 feature frames; the maximum is at least 1 and the minimum no more."""
    maximum = (lengths * config.maximum_share).long().add(config.maximum_extra).clamp(min=1)
    return Limits(torch.minimum((lengths * config.minimum_share).long(), maximum), maximum)


def _search(model, memory, limits: Limits, config: DecodingConfig, backend: str) -> tuple[Steps, Tensor]:
    """Return the steps taken and the tokens of each beam (B, K), <eos> counted; beams are sorted, best first."""
    B, K, device = memory.lengths.shape[0], config.beam, memory.lengths.device
    longest = int(limits.maximum.max()) + 1  # the one look before the loop; + 1 for <eos>
    steps = _buffers(longest, B, K, device)
    scores = torch.full((B, K), -torch.inf, dtype=torch.float32, device=device)
    scores[:, 0] = 0.0  # the other beams do not exist yet
    finished = torch.zeros(B, K, dtype=torch.bool, device=device)
    lengths = torch.zeros(B, K, dtype=torch.int64, device=device)
    tokens = torch.full((B, K), SOS, device=device)
    state = model.start(memory, K)
    for t in range(longest):
        logits, weights, state = model.step(tokens, state, memory)
        scores, tokens, parents = beam_topk(
            logits,
            scores,
            finished,
            eos=EOS,
            lengths=lengths,
            allow_eos=limits.minimum <= t if config.minimum_share else None,
            force_eos=limits.maximum <= t,
            length_penalty=config.length_penalty,
            eos_threshold=config.eos_threshold,
            backend=backend,
        )
        frames = weights.argmax(-1)
        if K > 1:  # otherwise every beam continues itself
            state, frames = state.gather(parents), frames.gather(1, parents)
            finished, lengths = finished.gather(1, parents), lengths.gather(1, parents)
        lengths = lengths + ~finished
        finished = finished | (tokens == EOS)
        for buffer, kept in zip(steps, (tokens, parents, scores, frames), strict=True):
            buffer[t] = kept
        if t % LOOK_EVERY == LOOK_EVERY - 1 and bool((finished | scores.isneginf()).all()):
            break
    return Steps(*(buffer[: t + 1] for buffer in steps)), lengths


def _buffers(longest: int, B: int, K: int, device: torch.device) -> Steps:
    whole = [torch.empty(longest, B, K, dtype=torch.int64, device=device) for _ in range(3)]
    return Steps(whole[0], whole[1], torch.empty(longest, B, K, dtype=torch.float32, device=device), whole[2])


def _read_off(
    steps: Steps, lengths: Tensor, limits: Limits, config: DecodingConfig, nbest: int, backend: str
) -> list[list[Hypothesis]]:
    """Follow the back-pointers and bring everything to the host at once."""
    tokens, text_lengths, paths = beam_backtrack(steps.tokens, steps.parents, eos=EOS, paths=True, backend=backend)
    running = steps.scores.permute(1, 2, 0).gather(1, paths)  # (B, K, L)
    each = running.diff(dim=-1, prepend=torch.zeros_like(running[..., :1]))
    frames = steps.frames.permute(1, 2, 0).gather(1, paths)
    scores = steps.scores[-1]
    normalised = scores / lengths.clamp(min=1).float() ** config.length_penalty
    finished = text_lengths < limits.maximum[:, None]
    columns = [column.tolist() for column in (tokens, scores, normalised, frames, each, finished, text_lengths)]
    return [_hypotheses(*utterance, nbest) for utterance in zip(*columns, strict=True)]


def _hypotheses(tokens, scores, normalised, frames, each, finished, lengths, nbest: int) -> list[Hypothesis]:
    """Return the real hypotheses of one utterance, of lists over its beams."""
    found = []
    for k, n in enumerate(lengths):
        # Where there are fewer readings than beams, impossible ones fill up: score -inf, or special tokens in the text.
        if math.isfinite(scores[k]) and not {PAD, SOS} & set(tokens[k][:n]):
            found.append(Hypothesis(tokens[k][:n], scores[k], normalised[k], frames[k][:n], each[k][:n], finished[k]))
    return found[:nbest] or [Hypothesis([], -math.inf, -math.inf, [], [], False)]


def decode_dataset(
    model,
    dataset,
    vocabulary: Vocabulary,
    config: DecodingConfig,
    *,
    nbest: int = 1,
    progress: bool = True,
    device: str | torch.device,
) -> list[list[Hypothesis]]:
    """Beam-search every utterance; return their hypotheses in the dataset's order.

    Utterances are batched by length under config.frames_per_batch. A batch that does not fit in memory is halved and
    tried again, and those after it are kept as small.

    Raises:
        InputError: one utterance alone does not fit in memory, or the model's outputs are not numbers.
    """
    batches = sorted_batches(
        dataset.frames, frames_per_batch=config.frames_per_batch, utterances_per_batch=UTTERANCES_PER_BATCH
    )
    untold = copy.copy(dataset)
    untold.texts = [None] * len(dataset)  # transcripts may hold characters that the vocabulary lacks
    loader = make_loader(untold, batches, vocabulary, augment=None, seed=0, epoch=0, workers=0)
    results: list[list[Hypothesis]] = [[] for _ in range(len(dataset))]
    limit = math.inf  # padded frames that are known to be too many
    with tqdm(total=float(dataset.seconds.sum()), unit="s", bar_format=BAR, disable=not progress) as bar:
        for batch in loader:
            waiting = [batch]
            while waiting:
                part = waiting.pop()
                size = part.features.shape[0] * part.features.shape[1]
                worth_trying = size < limit or len(part.indices) == 1
                found = _try(model, part, config, nbest, device) if worth_trying else None
                if found is None:
                    limit = min(limit, size)
                    waiting += reversed(_halves(part, dataset))
                    continue
                for i, hypotheses in zip(part.indices.tolist(), found, strict=True):
                    results[i] = _checked(hypotheses, dataset.ids[i])
                seconds = float(dataset.seconds[part.indices.numpy()].sum())
                bar.update(min(seconds, bar.total - bar.n))  # sums of floats must not pass the total
    return results


def _try(model, batch: Batch, config: DecodingConfig, nbest: int, device) -> list[list[Hypothesis]] | None:
    """Decode one batch; return None if memory does not suffice."""
    try:
        batch = batch.to(device)
        with torch.inference_mode():
            memory = model.listen(batch.features, batch.feature_lengths)
        return beam_search(model, memory, config, nbest=nbest)
    except (MemoryError, RuntimeError) as error:
        lacks = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not lacks:
            raise
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
        raise InputError(f"the model's outputs for {name} are not numbers; use a checkpoint from before it diverged")
    return hypotheses
