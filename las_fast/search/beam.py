"""From encoder memory to text: batched beam search in which the device never waits for the host.

The state of B utterances times K beams stays in (B, K, ...) tensors; keys and values stay (B, T, ...), once for all
beams. Steps come in chunks of fixed shape, and nothing in a chunk depends on a number that the host would have to read:
each beam's own length says when it may and must end. Tokens and back-pointers of a chunk are stacked; hypotheses are
read off the pointers at the end. A finished beam is frozen: it goes on with <eos> at an unchanged score, ranked with
the living, so that steps past the end change nothing.

Whether all have finished is sent to the host after each chunk and read there while the next one runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from las_fast.config import NEEDS_CTC_HEAD, DecodingConfig
from las_fast.errors import InputError
from las_fast.model.attention import Memory
from las_fast.model.las import LAS
from las_fast.ops import (
    Ctc,
    CtcState,
    Ngram,
    Steps,
    backends,
    beam_backtrack,
    beam_gather,
    beam_topk,
    ctc_log_probabilities,
    ctc_prefix,
    ctc_start,
    speller_pack,
    speller_search,
)
from las_fast.ops.speller_search import coverage, first_ngram_state
from las_fast.search.cuda_graph import bucket, captured
from las_fast.text import EOS, PAD, SOS

REDUCED = ("bf16", "int8")  # precisions of decoding in which the listener's products are bfloat16
LOOK_EVERY = 16  # steps in a chunk, after which the host learns whether all have finished


@dataclass(frozen=True)
class Hypothesis:
    """One reading of an utterance."""

    text_tokens: list[int]  # without <sos> or <eos>
    score: float  # sum of what each token adds, <eos> included: see beam_search
    normalised: float  # score / tokens ** length_penalty, <eos> counted: the rank, but for the coverage
    frames: list[int]  # the encoder frame that each token attended to most
    token_scores: list[float]  # what each token adds to the score
    finished: bool  # False where <eos> came only because the maximum length was reached
    speech_score: float | None = None  # see speech_scores; None where it was not asked for


class Limits(NamedTuple):
    """Tokens that an utterance may have, <eos> not counted; (B,) int64."""

    minimum: Tensor
    maximum: Tensor


class Inputs(NamedTuple):
    """What every step of a search reads and none changes."""

    memory: Any
    limits: Limits
    frames: Tensor | None  # (B, T', V) log-probabilities of CTC


class Beams(NamedTuple):
    """Where the search stands: K hypotheses of each utterance, best first."""

    tokens: Tensor  # (B, K) int64, the last of each
    scores: Tensor  # (B, K) float32
    finished: Tensor  # (B, K) bool
    lengths: Tensor  # (B, K) int64 tokens, <eos> counted
    ngram_states: Tensor | None  # (B, K) int64
    attention: Tensor | None  # (B, K, T) float32 got by each frame from all tokens; 1 past the length
    ctc: CtcState | None
    state: Any  # of the model


def greedy_search(model, memory, config: DecodingConfig) -> list[list[Hypothesis]]:
    """Take the most probable token at each step; a list of one hypothesis an utterance. See beam_search."""
    return beam_search(model, memory, dataclasses.replace(config, beam=1))


@torch.inference_mode()
def beam_search(
    model,
    memory,
    config: DecodingConfig,
    *,
    nbest: int = 1,
    ngram: Tensor | None = None,
    packed: Tensor | None = None,
    backend: str = "auto",
    capture: bool | None = None,
) -> list[list[Hypothesis]]:
    """Return up to `nbest` hypotheses an utterance, best first.

    Hypotheses do not depend on the batch that an utterance is in. At the maximum length they take <eos>. To the score
    of a hypothesis each token adds (natural logarithms; length_reward is not for <eos>)

        log p_model(token) + ngram_weight * log p_ngram(token) + length_reward

    where with config.ctc_weight the model is the weighted mean of attention and CTC: see ops.beam_topk.

    Args:
        model:   has start, step, time_reduction and vocabulary_size as las_fast.model.las.LAS; its state has gather as
            SpellerState.
        memory:  what model.listen returned; lengths (B,) int64 encoder frames. With config.ctc_weight its ctc_logits
            (B, T', V), whose blank is <pad>, and ctc_lengths (B,) are read too.
        config:  beam, length limits, penalties and weights.
        nbest:   hypotheses to return; no more than config.beam exist.
        ngram:   table of a language model as in las_fast.ops.Ngram, on the device; its weight is config.ngram_weight.
        packed:  what packed_weights made of this model, as it is, for this config and backend; None: the C++ search
            packs them itself.
        backend: of the ops.
        capture: replay a CUDA graph instead of launching kernels one by one; None: on CUDA with the Triton ops, and on
            a CPU the whole search of a LAS is one C++ op instead of steps.

    Where the model's outputs are not numbers, an utterance's one hypothesis is empty with score -inf.

    Raises:
        InputError: config.ngram_weight without an n-gram model, config.ctc_weight without a CTC head;
            precision bf16 or int8 where the search is not that in C++.
    """
    ngram, config = with_reward(ngram, config, model.vocabulary_size, memory.lengths.device)
    if config.ctc_weight and getattr(memory, "ctc_logits", None) is None:
        raise InputError(f"decoding.ctc_weight {NEEDS_CTC_HEAD}")
    limits = length_limits(memory.lengths * model.time_reduction, config)
    search = _Search(model, config, ngram if config.ngram_weight else None, backend, packed)
    with _on(memory.lengths.device):
        return _read_off(search.steps(memory, limits, capture), limits, config, nbest, backend)


@torch.inference_mode()
def packed_weights(model, config: DecodingConfig, device: str | torch.device, backend: str = "auto") -> Tensor | None:
    """Return the model's matrices as beam_search reads them in C++, for whoever searches many batches; else None.

    They do not follow weights that change later.
    """
    if not _is_native(model, backend, torch.device(device)):
        return None
    return speller_pack(model.speller.weights(), device, precision=_native_precision(config))


def with_reward(ngram: Tensor | None, config: DecodingConfig, V: int, device) -> tuple[Tensor | None, DecodingConfig]:
    """Return a table that also holds config.length_reward, and the settings to use with it.

    weight * (log-probability + length_reward / weight) adds the reward to every token but <eos>. Without an n-gram
    model the table is one of order 1 that holds nothing else. Whoever searches many batches does this once. Raises
    InputError for config.ngram_weight without an n-gram model.
    """
    if config.ngram_weight and ngram is None:
        raise InputError("decoding.ngram_weight needs an n-gram model, and there is none; set it to 0")
    if not config.length_reward:
        return ngram, config
    if ngram is None or not config.ngram_weight:
        ngram, config = torch.zeros(1, V, device=device), dataclasses.replace(config, ngram_weight=1.0)
    reward = torch.full((V,), config.length_reward / config.ngram_weight, device=device)
    reward[EOS] = 0.0
    return ngram + reward, dataclasses.replace(config, length_reward=0.0)


def length_limits(lengths: Tensor, config: DecodingConfig) -> Limits:
    """Return the tokens allowed for (B,) int64 feature frames; the maximum is at least 1 and the minimum no more."""
    maximum = (lengths * config.maximum_share).long().add(config.maximum_extra).clamp(min=1)
    return Limits(torch.minimum((lengths * config.minimum_share).long(), maximum), maximum)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a CUDA device the current one, for events, streams and Triton."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _captures(device: torch.device, backend: str) -> bool:
    if device.type != "cuda" or torch.is_autocast_enabled("cuda"):  # autocast keeps weights that a graph would outlive
        return False
    return all(backends.choose(op, backend, device) == "triton" for op in ("masked_attention", "beam_topk"))


def _is_native(model, backend: str, device: torch.device) -> bool:
    """Say whether one op makes the whole search: that of LAS itself, in float32, by C++."""
    if type(model) is not LAS or backend not in ("auto", "cpp") or torch.is_autocast_enabled("cpu"):
        return False
    return backends.choose("speller_search", "auto", device) == "cpp"


def _native_precision(config: DecodingConfig) -> str:
    return config.precision if config.precision in REDUCED else "fp32"


@dataclass(frozen=True)
class _Search:
    """A search of one batch, whose chunks are enqueued one by one or replayed."""

    model: Any
    config: DecodingConfig
    ngram: Tensor | None
    backend: str
    packed: Tensor | None = None

    def steps(self, memory, limits: Limits, capture: bool | None) -> Steps:
        """Return all steps of the search, (L, B, K), the fastest way there is; see beam_search."""
        if capture is None:
            if _is_native(self.model, self.backend, memory.lengths.device):
                return self.native(memory, limits)
            capture = _captures(memory.lengths.device, self.backend)
        if (precision := self.config.precision) in REDUCED:
            raise InputError(f"decoding.precision {precision} needs the C++ search of a LAS on a CPU; set it to auto")
        return self.captured(memory) if capture else self.plain(memory)

    def native(self, memory, limits: Limits) -> Steps:
        """Return all steps of the search by one op."""
        config = self.config
        return speller_search(
            self.model.speller.weights(),
            *memory[:3],
            beam=config.beam,
            sos=SOS,
            eos=EOS,
            minimum=limits.minimum if config.minimum_share else None,
            maximum=limits.maximum,
            length_penalty=config.length_penalty,
            eos_threshold=config.eos_threshold,
            coverage_weight=config.coverage_weight,
            table=self.ngram,
            ngram_weight=config.ngram_weight,
            frames=self.frames(memory),
            ctc_weight=config.ctc_weight,
            precision=_native_precision(config),
            packed=self.packed,
            backend="cpp",
        )

    def frames(self, memory) -> Tensor | None:
        """Return the log-probabilities that CTC is scored by, if it is; <sos> and <eos> it never writes."""
        if not self.config.ctc_weight:
            return None
        return ctc_log_probabilities(memory.ctc_logits, memory.ctc_lengths, (SOS, EOS))

    def plain(self, memory) -> Steps:
        """Return all steps of the search, (L, B, K)."""

        def chunks() -> Iterator[tuple[Steps, Tensor]]:
            inputs, beams = self.begin(memory)
            while True:
                beams, found = self.advance(inputs, beams)
                yield found

        return collect(chunks(), self.most(memory), _ahead(memory))

    def captured(self, memory) -> Steps:
        """Return the same by CUDA graphs."""
        batch = memory.lengths.shape[0]
        memory = memory.padded(*bucket(*memory.padding.shape))
        inputs, beams = self.begin(memory)
        beams.finished[batch:] = True  # the utterances that only pad: nobody waits for them
        # The table itself is read by the graph: no copy, and as the settings hold it, it stays.
        settings = (self.config, self.ngram, self.backend, torch.backends.cuda.matmul.fp32_precision)
        with captured(self.model, settings, self.advance, inputs, beams) as chunks:
            steps = collect(chunks, self.most(memory), _ahead(memory))
        return Steps(*(x[:, :batch].contiguous() for x in steps))

    def begin(self, memory) -> tuple[Inputs, Beams]:
        """Return what all chunks read, and the beams before the first step."""
        B, K, device = memory.lengths.shape[0], self.config.beam, memory.lengths.device
        scores = torch.full((B, K), -torch.inf, device=device)
        scores[:, 0] = 0.0  # the other beams do not exist yet
        integers = torch.zeros(B, K, dtype=torch.int64, device=device)
        attention = None
        if self.config.coverage_weight:
            # Padding counts as covered: as a large constant in the ranks it would cost them digits.
            attention = memory.padding[:, None].expand(-1, K, -1).float()
        ngram_states = None if self.ngram is None else integers + first_ngram_state(self.ngram, SOS)
        finished, state = torch.zeros_like(integers, dtype=torch.bool), self.model.start(memory, K)
        frames = self.frames(memory)
        ctc = None if frames is None else ctc_start(frames, K, eos=EOS)
        if isinstance(memory, Memory):
            memory = memory._replace(ctc_logits=None, ctc_lengths=None)  # a graph would copy them for nothing
        limits = length_limits(memory.lengths * self.model.time_reduction, self.config)
        beams = Beams(integers + SOS, scores, finished, integers, ngram_states, attention, ctc, state)
        return Inputs(memory, limits, frames), beams

    def most(self, memory) -> int:
        """Return the chunks after which every beam has ended, by what the host knows."""
        frames = memory.padding.shape[1] * self.model.time_reduction
        longest = max(math.ceil(frames * self.config.maximum_share) + self.config.maximum_extra, 1) + 1  # 1: <eos>
        return -(-longest // LOOK_EVERY)

    def advance(self, inputs: Inputs, beams: Beams) -> tuple[Beams, tuple[Steps, Tensor]]:
        """Take LOOK_EVERY steps; return where that leads, the steps, and whether all beams have finished, ()."""
        taken = []
        for _ in range(LOOK_EVERY):
            beams, step = self.step(inputs, beams)
            taken.append(step)
        steps = Steps(*(torch.stack(parts) for parts in zip(*taken, strict=True)))
        return beams, (steps, (beams.finished | beams.scores.isneginf()).all())

    def step(self, inputs: Inputs, beams: Beams) -> tuple[Beams, Steps]:
        """Take one step; its tensors are (B, K)."""
        config, backend, attention, ctc = self.config, self.backend, beams.attention, beams.ctc
        (memory, limits, frames), states = inputs, beams.ngram_states
        logits, attended, state = self.model.step(
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
            ngram=None if self.ngram is None or states is None else Ngram(self.ngram, states, config.ngram_weight),
            ctc=None if ctc is None else Ctc(ctc.gains, config.ctc_weight),
            backend=backend,
        )
        if attention is not None:
            (attention,) = beam_gather((attention,), best.parents, backend=backend)
        if ctc is not None and frames is not None:
            ctc = ctc_prefix(frames, ctc, beams.tokens, best.parents, best.tokens, eos=EOS, backend=backend)
        state = state.gather(best.parents, backend=backend)
        after = Beams(best.tokens, best.scores, best.finished, best.lengths, best.ngram_states, attention, ctc, state)
        return after, Steps(best.tokens, best.parents, best.scores, attended.peaks)


def _ahead(memory) -> int:
    """Return the chunks enqueued before the first is looked at: on CUDA one is to run while the host looks."""
    return 2 if memory.lengths.is_cuda else 1


class Look:
    """A boolean on its way from the device to the host."""

    def __init__(self, flag: Tensor):
        self.host = torch.empty((), dtype=torch.bool, pin_memory=flag.is_cuda)
        self.host.copy_(flag, non_blocking=True)
        self.arrived = None
        if flag.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> bool:
        """Return it, after waiting for it if it must be; what is enqueued behind it runs on."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.host.numpy())  # the memory itself: no torch op


def collect(chunks: Iterator[tuple[Steps, Tensor]], most: int, ahead: int) -> Steps:
    """Return the steps of all chunks until one says that everything has finished, or of `most`.

    Chunk i + ahead is not asked for before chunk i has been looked at.
    """
    taken: list[Steps] = []
    looks: deque[Look] = deque()
    for _ in range(most):
        if len(looks) == ahead and looks.popleft().read():
            break
        steps, done = next(chunks)
        taken.append(steps)
        looks.append(Look(done))
    return Steps(*(torch.cat(parts) for parts in zip(*taken, strict=True)))


def _read_off(steps: Steps, limits: Limits, config: DecodingConfig, nbest: int, backend: str) -> list[list[Hypothesis]]:
    """Follow the back-pointers and bring everything to the host."""
    tokens, lengths, token_scores, frames = beam_backtrack(*steps, eos=EOS, backend=backend)
    scores = steps.scores[-1]
    normalised = scores / (lengths + 1).float() ** config.length_penalty
    finished = lengths < limits.maximum[:, None]
    columns = [x.tolist() for x in (tokens, scores, normalised, frames, token_scores, finished, lengths)]
    return [_hypotheses(nbest, *utterance) for utterance in zip(*columns, strict=True)]


def _hypotheses(nbest: int, tokens, scores, normalised, frames, each, finished, lengths) -> list[Hypothesis]:
    """Return the real hypotheses of one utterance, of lists over its beams."""
    found = []
    for k, n in enumerate(lengths):
        # Where there are fewer readings than beams, impossible ones fill up: score -inf, or special tokens in the text.
        if math.isfinite(scores[k]) and not {PAD, SOS} & set(tokens[k][:n]):
            found.append(Hypothesis(tokens[k][:n], scores[k], normalised[k], frames[k][:n], each[k][:n], finished[k]))
    return found[:nbest] or [Hypothesis([], -math.inf, -math.inf, [], [], False)]
