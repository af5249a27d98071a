"""A whole beam search of the speller, from encoder memory to back-pointers.

At each step, for every beam of every utterance (las_fast.model.speller is the same computation as modules):

    gates_1   = W_1 [embedding[token], context, hidden_1] + b_1         token and state of the previous step
    gates_i   = W_i [hidden_(i-1), hidden_i] + b_i                      each later cell; hidden_(i-1) is the new one
    cell_i    = sigmoid(f) * cell_i + sigmoid(i) * tanh(g);   hidden_i = sigmoid(o) * tanh(cell_i)
    context   = attention of query(hidden_last) over keys and values    see masked_attention
    logits    = embedding . gelu(project([hidden_last, context])) + bias
    beams     = beam_topk of the logits, with CTC also of ctc_prefix, with an n-gram model also of ngram_scores; states
                are gathered by parents
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from las_fast.ops import backends
from las_fast.ops.beam_gather import beam_gather
from las_fast.ops.beam_topk import BeamStep, Ctc, Ngram, beam_topk, check_beam_threshold
from las_fast.ops.ctc_prefix import CtcState, ctc_prefix, ctc_start
from las_fast.ops.masks import padding_mask
from las_fast.ops.ngram_scores import NgramModel, NgramScores, ngram_scores, ngram_start
from las_fast.ops.speller import SpellerWeights, State, check_memory, initial_state, step

PRECISIONS = ("fp32", "bf16", "int8")
COVERAGE_FLOOR = 0.01  # lower clamp of a frame's attention, so that its logarithm is finite


class Steps(NamedTuple):
    """The outcome of each step, (L, B, K): the input of beam_backtrack."""

    tokens: Tensor  # int64
    parents: Tensor  # int64
    scores: Tensor  # float32, of the hypothesis so far
    attended_frames: Tensor  # int64, the frame that each beam attended to most; beams as before the step's pruning


class Options(NamedTuple):
    """Options of speller_search."""

    beam: int
    sos: int
    eos: int
    minimum: Tensor | None
    maximum: Tensor
    length_penalty: float
    eos_threshold: float
    coverage_weight: float
    ngram: NgramModel | None
    ngram_weight: float
    ctc_log_probs: Tensor | None = None
    ctc_weight: float = 0.0
    beam_threshold: float = math.inf


@torch.no_grad()
def speller_search(
    weights: SpellerWeights,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    beam: int,
    sos: int,
    eos: int,
    maximum: Tensor,
    minimum: Tensor | None = None,
    length_penalty: float = 0.0,
    eos_threshold: float = 0.0,
    coverage_weight: float = 0.0,
    ngram: NgramModel | None = None,
    ngram_weight: float = 0.0,
    ctc_log_probs: Tensor | None = None,
    ctc_weight: float = 0.0,
    beam_threshold: float = math.inf,
    precision: str = "fp32",
    packed: Tensor | None = None,
    backend: str = "auto",
) -> Steps:
    """Search until every beam of every utterance has finished, was dropped or does not exist; return all steps.

    Not differentiable. In C++ the result of an utterance is bit-identical in any batch and with any number of threads.

    Args:
        weights: of the speller.
        keys:    (B, T, D) float32.
        values:  (B, T, E) float32.
        lengths: (B,) int64 valid frames, 0 to T.
        beam:    K.
        sos:     token that the first step reads.
        eos:     token that ends a hypothesis.
        maximum: (B,) int64 tokens at which an unfinished beam must take eos.
        minimum, length_penalty, eos_threshold: as in beam_topk.
        coverage_weight: factor on `coverage`, which is added to the ranks of a beam; 0: none.
        ngram:   language model, see ngram_scores.
        ngram_weight: as in beam_topk's Ngram.
        ctc_log_probs: (B, T', V) float32 from ctc_log_probabilities, for CTC prefix scores (float32 in every
            precision); None: no CTC.
        ctc_weight: as in beam_topk's Ctc; with 0, ctc_log_probs is not read.
        beam_threshold: as in beam_topk. C++ computes no dropped beam.
        precision: of the matmuls in C++. "fp32"; "bf16" with float32 accumulation and cell states; "int8", which is
            bf16 except for the matmuls of context and hidden states with the gates' weights (linear_int8). In the
            reference all but those int8 matmuls are float32.
        packed:  result of speller_pack for these weights and this precision; None: pack them in this call. The
            reference ignores it.
        backend: "auto", "reference" or "cpp".

    Raises:
        ValueError: shapes, dtypes or devices disagree; a number is out of range; precision or backend is unknown.
        RuntimeError: the named backend is not available here; in C++, a value is out of range or `packed` does not fit.
    """
    options = Options(
        beam, sos, eos, minimum, maximum, length_penalty, eos_threshold, coverage_weight, ngram, ngram_weight,
        ctc_log_probs, ctc_weight, beam_threshold,
    )  # fmt: skip
    _check(weights, keys, values, lengths, options, precision)
    if not ctc_weight:
        options = options._replace(ctc_log_probs=None)  # 0 * -inf would be NaN
    if backends.choose("speller_search", backend, keys.device, keys.dtype) == "reference":
        return _reference(weights, keys, values, lengths, options, int8=precision == "int8")
    model = (None, None, 0, 0) if ngram is None else (ngram.rows, ngram.arcs, ngram.order, ngram.start)
    flat = (beam, sos, eos, minimum, maximum, length_penalty, eos_threshold, coverage_weight, *model, ngram_weight,
            options.ctc_log_probs, ctc_weight, beam_threshold, precision, packed)  # fmt: skip
    steps = torch.ops.las_fast.speller_search_cpp(weights.flat(), keys, values, lengths, *flat)
    return Steps(*steps)


@torch.no_grad()
def speller_pack(
    weights: SpellerWeights, device: str | torch.device, *, precision: str = "fp32", backend: str = "auto"
) -> Tensor | None:
    """Pack the weight matrices for the C++ search, to share between searches; None where the search is not in C++.

    The result, (bytes,) uint8, is a copy and does not track later weight updates. Each search still reads the biases
    and the embedding from `weights`.

    Args:
        weights, precision, backend: as in speller_search.
        device: of the search.

    Raises:
        ValueError: precision or backend is unknown.
        RuntimeError: the named backend is not available here, or the shapes of the weights disagree.
    """
    _check_precision(precision)
    if backends.choose("speller_search", backend, torch.device(device), weights.bias.dtype) == "reference":
        return None
    return torch.ops.las_fast.speller_pack_cpp(weights.flat(), precision)


# ----------------------------------------------------------------------------------------------------------- reference


class _Beams(NamedTuple):
    """The hypotheses of the reference search; tensors are (B, K)."""

    tokens: Tensor
    scores: Tensor
    finished: Tensor
    lengths: Tensor
    ngram: NgramScores | None
    ctc: CtcState | None


def _reference(weights: SpellerWeights, keys, values, lengths, options: Options, *, int8: bool) -> Steps:
    beams, state = _begin(weights, keys, values, options)
    padding = padding_mask(lengths, keys.shape[1])[:, None]  # (B, 1, T)
    attention = padding.expand(-1, options.beam, -1).float()  # padding counts as covered
    steps: list[tuple[Tensor, ...]] = []
    while not steps or bool((~beams.finished & ~beams.scores.isneginf()).any()):
        logits, attended, peaks, state = step(weights, keys, values, lengths, beams.tokens, state, int8=int8)
        attention = torch.where(beams.finished[..., None], attention, attention + attended)
        best = _prune(logits, beams, options.coverage_weight * coverage(attention, lengths), options)
        ngram, ctc = _advance_ngram(beams, best, options), _advance_ctc(beams, best, options)
        beams = _Beams(best.tokens, best.scores, best.finished, best.lengths, ngram, ctc)
        states = (*state.hidden, *state.cell, state.context, attention)
        gathered = beam_gather(states, best.parents, backend="reference")
        n = len(state.hidden)
        state, attention = State(tuple(gathered[:n]), tuple(gathered[n : 2 * n]), gathered[-2]), gathered[-1]
        steps.append((best.tokens, best.parents, best.scores, peaks))
    return Steps(*(torch.stack(parts) for parts in zip(*steps, strict=True)))


def _begin(weights: SpellerWeights, keys: Tensor, values: Tensor, options: Options) -> tuple[_Beams, State]:
    B, K = keys.shape[0], options.beam
    scores = keys.new_full((B, K), -torch.inf)
    scores[:, 0] = 0.0  # the other beams do not exist yet
    integers = torch.zeros(B, K, dtype=torch.int64, device=keys.device)
    ngram = None if options.ngram is None else ngram_start(options.ngram, B, K, backend="reference")
    ctc = None if options.ctc_log_probs is None else ctc_start(options.ctc_log_probs, K, eos=options.eos)
    beams = _Beams(integers + options.sos, scores, integers.bool(), integers, ngram, ctc)
    return beams, initial_state(weights, values, K)


def coverage(attention: Tensor, lengths: Tensor) -> Tensor:
    """Return the coverage (B, K) of each hypothesis: 0 where every frame was attended to, else negative.

    The mean over frames of log(clamp(attention, COVERAGE_FLOOR, 1)). Wu et al. 2016 take the sum, which would outweigh
    scores that are divided by the length. attention (B, K, T) is summed over tokens, 1 past the lengths (B,).
    """
    return attention.clamp(COVERAGE_FLOOR, 1.0).log().sum(-1) / lengths.clamp(min=1).unsqueeze(-1)


def _prune(logits: Tensor, beams: _Beams, coverage_bonus: Tensor, options: Options) -> BeamStep:
    return beam_topk(
        logits,
        beams.scores,
        beams.finished,
        eos=options.eos,
        lengths=beams.lengths,
        minimum=options.minimum,
        maximum=options.maximum,
        length_penalty=options.length_penalty,
        eos_threshold=options.eos_threshold,
        coverage=coverage_bonus if options.coverage_weight else None,
        ngram=None if beams.ngram is None else Ngram(beams.ngram.log_probs, options.ngram_weight),
        ctc=None if beams.ctc is None else Ctc(beams.ctc.next_log_probs, options.ctc_weight),
        beam_threshold=options.beam_threshold,
        backend="reference",
    )


def _advance_ngram(before: _Beams, best: BeamStep, options: Options) -> NgramScores | None:
    if before.ngram is None or options.ngram is None:
        return None
    step = {"parents": best.parents, "tokens": best.tokens}
    return ngram_scores(options.ngram, before.ngram.states, **step, backend="reference")


def _advance_ctc(before: _Beams, best: BeamStep, options: Options) -> CtcState | None:
    if before.ctc is None or options.ctc_log_probs is None:
        return None
    arguments = before.ctc, before.tokens, best.parents, best.tokens
    return ctc_prefix(options.ctc_log_probs, *arguments, eos=options.eos, backend="reference")


# -------------------------------------------------------------------------------------------------------------- checks


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")


def _check(weights: SpellerWeights, keys, values, lengths, options: Options, precision: str) -> None:
    _check_precision(precision)
    check_memory(weights, keys, values)
    tensors = {"lengths": lengths, "minimum": options.minimum, "maximum": options.maximum}
    others = {"weights": weights.flat(), "values": values, **tensors, "ctc_log_probs": options.ctc_log_probs}
    backends.check_devices("keys", keys.device, others)
    B = keys.shape[0]
    for name, x in tensors.items():
        if x is not None and (x.shape != (B,) or x.dtype != torch.int64):
            raise ValueError(f"{name} must be ({B},) int64; got {tuple(x.shape)} {x.dtype}")
    _check_options(options, B, weights.bias.shape[0])


def _check_options(options: Options, B: int, V: int) -> None:
    if options.beam < 1:
        raise ValueError(f"beam must be at least 1; got {options.beam}")
    check_beam_threshold(options.beam_threshold)
    if not 0 <= options.ctc_weight <= 1:
        raise ValueError(f"ctc_weight must be from 0 to 1; got {options.ctc_weight}")
    for name, token in (("sos", options.sos), ("eos", options.eos)):
        if not 0 <= token < V:
            raise ValueError(f"{name} must be a token from 0 to {V - 1}; got {token}")
    ngram, log_probs = options.ngram, options.ctc_log_probs
    if ngram is not None and ngram.vocabulary_size != V:
        raise ValueError(f"ngram must be a model of {V} tokens; got one of {ngram.vocabulary_size}")
    if log_probs is not None and (
        log_probs.ndim != 3 or (log_probs.shape[0], log_probs.shape[2]) != (B, V) or log_probs.dtype != torch.float32
    ):
        got = f"{tuple(log_probs.shape)} {log_probs.dtype}"
        raise ValueError(f"ctc_log_probs must be (B, T', V) float32 with B={B}, V={V}; got {got}")


def _fake(weights, keys, values, lengths, beam, *options):
    steps = torch.library.get_ctx().new_dynamic_size()
    shape = (steps, keys.shape[0], beam)
    tokens, parents, attended_frames = (keys.new_empty(shape, dtype=torch.int64) for _ in range(3))
    return tokens, parents, keys.new_empty(shape), attended_frames


def _fake_pack(weights, precision):
    return weights[0].new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


backends.register(
    "speller_search",
    "(Tensor[] weights, Tensor keys, Tensor values, Tensor lengths, int beam, int sos, int eos, Tensor? minimum,"
    " Tensor maximum, float length_penalty, float eos_threshold, float coverage_weight, Tensor? ngram_rows,"
    " Tensor? ngram_arcs, int ngram_order, int ngram_start, float ngram_weight,"
    " Tensor? ctc_log_probs, float ctc_weight, float beam_threshold, str precision, Tensor? packed)"
    " -> (Tensor tokens, Tensor parents, Tensor scores, Tensor attended_frames)",
    _fake,
)
backends.register(
    "speller_pack", "(Tensor[] weights, str precision) -> Tensor packed", _fake_pack, module="speller_search"
)
