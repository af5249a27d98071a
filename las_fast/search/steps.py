"""Beam search step by step: the inputs and the state of a step, chunks of steps, and the loop over chunks.

The state of B utterances times K beams stays in (B, K, ...) tensors. Keys and values stay (B, T, ...): all beams share
them. Every step has the same shapes and copies nothing to the host, so a chunk of steps can be enqueued without
waiting, or captured as a CUDA graph. A finished beam is frozen: it takes <eos> at an unchanged score and is ranked with
the others, so steps past the end change nothing.

Each chunk stacks tokens and back-pointers. The flag that says whether all beams have ended is copied to the host after
each chunk and read while the next chunk runs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from las_fast.config import DecodingConfig
from las_fast.model.attention import Memory
from las_fast.ops import (
    Ctc,
    CtcState,
    Ngram,
    NgramModel,
    NgramScores,
    Steps,
    beam_gather,
    beam_topk,
    ctc_log_probabilities,
    ctc_prefix,
    ctc_start,
    ngram_scores,
    ngram_start,
)
from las_fast.ops.speller_search import coverage
from las_fast.search.bf16 import Bf16Steps
from las_fast.text import EOS, SOS

STEPS_PER_CHUNK = 16  # between two checks of whether all beams have ended
SHORT_TEXT = 256  # maximum tokens of a text that is searched in shorter chunks on CUDA


@dataclass(frozen=True)
class Search:
    """How to search: the model, the settings and the backend, without the utterances."""

    model: Any  # see beam_search
    config: DecodingConfig
    ngram: NgramModel | None
    backend: str  # passed to the ops
    packed: Tensor | None = None  # weights packed for the native search, see packed_weights


class TokenLimits(NamedTuple):
    """Minimum and maximum number of tokens of each utterance, without <eos>; (B,) int64."""

    minimum: Tensor
    maximum: Tensor


class Inputs(NamedTuple):
    """Tensors that every step reads and none changes."""

    memory: Any  # see beam_search
    limits: TokenLimits
    ctc_log_probs: Tensor | None  # (B, T', V)


class Beams(NamedTuple):
    """K hypotheses per utterance between two steps, best first."""

    tokens: Tensor  # (B, K) int64, the last token of each
    scores: Tensor  # (B, K) float32
    finished: Tensor  # (B, K) bool
    lengths: Tensor  # (B, K) int64 tokens, <eos> counted
    ngram: NgramScores | None
    attention: Tensor | None  # (B, K, T) float32 weight of each frame, summed over tokens; 1 past the length
    ctc: CtcState | None
    state: Any  # of the model


def search_by_steps(search: Search, memory, limits: TokenLimits) -> Steps:
    """Run the search op by op, on any device; (L, B, K)."""

    def chunks() -> Iterator[tuple[Steps, Tensor]]:
        inputs, beams = begin(search, memory, limits)
        while True:
            beams, chunk = advance(search, inputs, beams)
            yield chunk

    return run_chunks(chunks(), max_chunks(search, memory), chunks_in_flight(memory))


def stepping_model(search: Search) -> Any:
    """Return the object whose start and step the search calls: the model, or for precision bf16 a Bf16Steps of it."""
    return Bf16Steps(search.model) if search.config.precision == "bf16" else search.model


def begin(search: Search, memory, limits: TokenLimits) -> tuple[Inputs, Beams]:
    """Make the inputs of all steps, and the beams before the first step."""
    if search.config.precision == "bf16":
        memory = memory._replace(keys=memory.keys.bfloat16(), values=memory.values.bfloat16())
    B, K, device = memory.lengths.shape[0], search.config.beam, memory.lengths.device
    scores = torch.full((B, K), -torch.inf, device=device)
    scores[:, 0] = 0.0  # the other beams do not exist yet
    zeros = torch.zeros(B, K, dtype=torch.int64, device=device)
    attention = None
    if search.config.coverage_weight:
        # Padding counts as covered. Uncovered, it would add a large constant to the ranks and cost them precision.
        attention = memory.padding[:, None].expand(-1, K, -1).float()
    ngram = None if search.ngram is None else ngram_start(search.ngram, B, K, backend=search.backend)
    finished, state = torch.zeros_like(zeros, dtype=torch.bool), stepping_model(search).start(memory, K)
    log_probs = ctc_log_probs(search.config, memory)
    ctc = None if log_probs is None else ctc_start(log_probs, K, eos=EOS)
    if isinstance(memory, Memory):
        memory = memory._replace(ctc_logits=None, ctc_lengths=None)  # no step reads them, and a graph would copy them
    beams = Beams(zeros + SOS, scores, finished, zeros, ngram, attention, ctc, state)
    return Inputs(memory, limits, log_probs), beams


def ctc_log_probs(config: DecodingConfig, memory) -> Tensor | None:
    """Return the CTC head's log-probabilities (B, T', V) without <sos> and <eos>; None if config.ctc_weight is 0."""
    if not config.ctc_weight:
        return None
    return ctc_log_probabilities(memory.ctc_logits, memory.ctc_lengths, (SOS, EOS))


def advance(search: Search, inputs: Inputs, beams: Beams) -> tuple[Beams, tuple[Steps, Tensor]]:
    """Take the steps of a chunk; return the new beams, the steps, and a () bool: whether all beams have ended."""
    taken = []
    for _ in range(steps_per_chunk(search, inputs.memory)):
        beams, one_step = step(search, inputs, beams)
        taken.append(one_step)
    chunk = Steps(*(torch.stack(parts) for parts in zip(*taken, strict=True)))
    return beams, (chunk, (beams.finished | beams.scores.isneginf()).all())


def beam_threshold(config: DecodingConfig) -> float:
    """Return the threshold of the ops, in which infinity drops no beam."""
    return config.beam_threshold or math.inf


def step(search: Search, inputs: Inputs, beams: Beams) -> tuple[Beams, Steps]:
    """Take one step; the tensors of Steps are (B, K)."""
    config, backend, attention, ctc = search.config, search.backend, beams.attention, beams.ctc
    (memory, limits, log_probs), ngram = inputs, beams.ngram
    logits, attended, state = stepping_model(search).step(
        beams.tokens, beams.state, memory, weights=attention is not None, backend=backend
    )
    if attention is not None:
        attention = torch.where(beams.finished.unsqueeze(-1), attention, attention + attended.weights)
    best = beam_topk(
        logits,
        beams.scores,
        beams.finished,
        eos=EOS,
        lengths=beams.lengths,
        minimum=limits.minimum if config.minimum_share else None,
        maximum=limits.maximum,
        length_penalty=config.length_penalty,
        eos_threshold=config.eos_threshold,
        coverage=None if attention is None else config.coverage_weight * coverage(attention, memory.lengths),
        ngram=None if ngram is None else Ngram(ngram.log_probs, config.ngram_weight),
        ctc=None if ctc is None else Ctc(ctc.next_log_probs, config.ctc_weight),
        beam_threshold=beam_threshold(config),
        backend=backend,
    )
    if attention is not None:
        (attention,) = beam_gather((attention,), best.parents, backend=backend)
    if ctc is not None and log_probs is not None:
        ctc = ctc_prefix(log_probs, ctc, beams.tokens, best.parents, best.tokens, eos=EOS, backend=backend)
    if ngram is not None and search.ngram is not None:
        ngram = ngram_scores(search.ngram, ngram.states, parents=best.parents, tokens=best.tokens, backend=backend)
    state = state.gather(best.parents, backend=backend)
    after = Beams(best.tokens, best.scores, best.finished, best.lengths, ngram, attention, ctc, state)
    return after, Steps(best.tokens, best.parents, best.scores, attended.peaks)


# -------------------------------------------------------------------------------------------------------------- chunks


def steps_per_chunk(search: Search, memory) -> int:
    """Return the number of steps in a chunk.

    On CUDA a search notices its end late, and takes up to 2 * chunk - 1 steps that are not needed. Shorter chunks waste
    less, but each costs a dozen launches, so only short texts get them.
    """
    short = memory.lengths.is_cuda and longest_text(search, memory) <= SHORT_TEXT
    return STEPS_PER_CHUNK // 2 if short else STEPS_PER_CHUNK


def max_chunks(search: Search, memory) -> int:
    """Return how many chunks the longest possible text needs."""
    return -(-longest_text(search, memory) // steps_per_chunk(search, memory))


def longest_text(search: Search, memory) -> int:
    """Return the maximum tokens of a text, <eos> counted. Reads only shapes: reading lengths would synchronise."""
    frames = memory.padding.shape[1] * search.model.time_reduction
    return max(math.ceil(frames * search.config.maximum_share) + search.config.maximum_extra, 1) + 1


def chunks_in_flight(memory) -> int:
    """Return how many chunks to enqueue before reading the first flag: two on CUDA, so that one runs meanwhile."""
    return 2 if memory.lengths.is_cuda else 1


class PendingFlag:
    """A boolean on its way from the device to the host."""

    def __init__(self, flag: Tensor):
        self.host = torch.empty((), dtype=torch.bool, pin_memory=flag.is_cuda)
        self.host.copy_(flag, non_blocking=True)
        self.arrived = None
        if flag.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(flag.device))  # by default the stream of the current device

    def read(self) -> bool:
        """Wait for the copy, if necessary, and return the flag. Work enqueued after the copy keeps running."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.host.numpy())  # reads host memory directly: no torch op


def run_chunks(chunks: Iterator[tuple[Steps, Tensor]], limit: int, in_flight: int) -> Steps:
    """Concatenate the steps of chunks until a flag says that all beams have ended, at most `limit` chunks.

    Chunk i + in_flight is requested only after the flag of chunk i has been read.
    """
    taken: list[Steps] = []
    flags: deque[PendingFlag] = deque()
    for _ in range(limit):
        if len(flags) == in_flight and flags.popleft().read():
            break
        chunk, ended = next(chunks)
        taken.append(chunk)
        flags.append(PendingFlag(ended))
    return Steps(*(torch.cat(parts) for parts in zip(*taken, strict=True)))
