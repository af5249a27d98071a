"""A whole beam search of the speller, from encoder memory to back-pointers.

At each step, for every beam of every utterance (las_fast.model.speller says it in modules, this op in formulas):

    gates_1   = W_1 [embedding[token], context, hidden_1] + b_1         of the token and the state before
    gates_i   = W_i [hidden_(i-1), hidden_i] + b_i                      for each later cell, hidden_(i-1) the new one
    cell_i    = sigmoid(f) * cell_i + sigmoid(i) * tanh(g);   hidden_i = sigmoid(o) * tanh(cell_i)
    context   = attention of query(hidden_last) over keys and values    see masked_attention
    logits    = embedding . gelu(project([hidden_last, context])) + bias
    the beams = beam_topk of the logits, and the states follow their parents; with CTC, its gains are ctc_prefix's
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from las_fast.ops import backends
from las_fast.ops.beam_gather import beam_gather
from las_fast.ops.beam_topk import BeamStep, Ctc, Ngram, beam_topk
from las_fast.ops.ctc_prefix import CtcState, ctc_prefix, ctc_start
from las_fast.ops.masks import padding_mask
from las_fast.ops.speller import SpellerWeights, State, check_memory, silence, step

PRECISIONS = ("fp32", "bf16", "int8")
UNSEEN = 0.01  # least attention that a frame counts as having got, for a finite logarithm


class Steps(NamedTuple):
    """What a search keeps of each step, (L, B, K), as beam_backtrack takes it."""

    tokens: Tensor  # int64
    parents: Tensor  # int64
    scores: Tensor  # float32, of the hypothesis so far
    frames: Tensor  # int64, attended to by each living beam before the step's pruning


class Options(NamedTuple):
    """How to search; see speller_search."""

    beam: int
    sos: int
    eos: int
    minimum: Tensor | None
    maximum: Tensor
    length_penalty: float
    eos_threshold: float
    coverage_weight: float
    table: Tensor | None
    ngram_weight: float
    frames: Tensor | None = None
    ctc_weight: float = 0.0


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
    table: Tensor | None = None,
    ngram_weight: float = 0.0,
    frames: Tensor | None = None,
    ctc_weight: float = 0.0,
    precision: str = "fp32",
    packed: Tensor | None = None,
    backend: str = "auto",
) -> Steps:
    """Return all steps of the search of each utterance, until none has a living beam: one that exists and goes on.

    Not differentiable. In C++ an utterance has one answer, bit for bit, alone, in any batch, on any number of threads.

    Args:
        weights: of the speller.
        keys:    (B, T, D) float32.
        values:  (B, T, E) float32.
        lengths: (B,) int64 valid frames, 0 to T.
        beam:    K.
        sos:     the token before the first.
        eos:     the token that ends a beam.
        maximum: (B,) int64 tokens at which an unfinished beam must take eos.
        minimum, length_penalty, eos_threshold: as in beam_topk.
        coverage_weight: of the mean over frames of log(attention that the frame got from all tokens, at most 1), which
            is added to the ranks of a beam; 0: none.
        table, ngram_weight: of a language model as in beam_topk's Ngram, which begins after sos throughout.
        frames:  (B, T', V) float32 log-probabilities of ctc_log_probabilities, by which CTC's prefix scores are mixed
            in, on every path in float32; None: they are not.
        ctc_weight: as in beam_topk's Ctc; with 0 the frames are not read.
        precision: of the products in C++: "fp32", "bf16" with float32 sums and cell states, or "int8", which is bf16
            but for the products of context and hidden states with weights of the gates: these are of whole numbers of
            8 bits (linear_int8). The reference computes all else in float32.
        packed:  what speller_pack made of these weights, as they are, in this precision; None: it is made here. The
            reference has no use for it.
        backend: "auto", "reference" or "cpp".

    Raises:
        ValueError: shapes, dtypes or devices disagree; a name is unknown.
        RuntimeError: the named backend is not available here, or an argument of C++ is not as it says.
    """
    options = Options(
        beam, sos, eos, minimum, maximum, length_penalty, eos_threshold, coverage_weight, table, ngram_weight, frames,
        ctc_weight,
    )  # fmt: skip
    _check(weights, keys, values, lengths, options, precision)
    if not ctc_weight:
        options = options._replace(frames=None)  # 0 times what CTC rules out would be NaN
    if backends.choose("speller_search", backend, keys.device, keys.dtype) == "reference":
        return _reference(weights, keys, values, lengths, options, int8=precision == "int8")
    found = torch.ops.las_fast.speller_search_cpp(weights.flat(), keys, values, lengths, *options, precision, packed)
    return Steps(*found)


@torch.no_grad()
def speller_pack(
    weights: SpellerWeights, device: str | torch.device, *, precision: str = "fp32", backend: str = "auto"
) -> Tensor | None:
    """Return the matrices of weights as the products of a search in C++ read them, for many searches to share.

    (bytes,) uint8, which do not follow weights that change later; biases and the embedding that tokens are looked up in
    are read anew by each search. None where the search is not in C++.

    Args:
        weights, precision, backend: as in speller_search.
        device: of the search.

    Raises:
        ValueError: a name is unknown.
        RuntimeError: the named backend is not available here, or the shapes of the weights disagree.
    """
    _check_precision(precision)
    if backends.choose("speller_search", backend, torch.device(device), weights.bias.dtype) == "reference":
        return None
    return torch.ops.las_fast.speller_pack_cpp(weights.flat(), precision)


# ----------------------------------------------------------------------------------------------------------- reference


class _Beams(NamedTuple):
    """All (B, K)."""

    tokens: Tensor
    scores: Tensor
    finished: Tensor
    lengths: Tensor
    ngram_states: Tensor | None
    ctc: CtcState | None


def _reference(weights: SpellerWeights, keys, values, lengths, options: Options, *, int8: bool) -> Steps:
    beams, state = _begin(weights, keys, values, options)
    padding = padding_mask(lengths, keys.shape[1])[:, None]  # (B, 1, T)
    attention = padding.expand(-1, options.beam, -1).float()  # padding counts as covered
    steps: list[tuple[Tensor, ...]] = []
    while not steps or bool((~beams.finished & ~beams.scores.isneginf()).any()):
        logits, attended, peaks, state = step(weights, keys, values, lengths, beams.tokens, state, int8=int8)
        attention = torch.where(beams.finished[..., None], attention, attention + attended)
        missed = attention.clamp(UNSEEN, 1.0).log().sum(-1) / lengths.clamp(min=1)[:, None]
        coverage = options.coverage_weight * missed
        found = _prune(logits, beams, coverage, options)
        ctc = _ctc(beams, found, options)
        beams = _Beams(found.tokens, found.scores, found.finished, found.lengths, found.ngram_states, ctc)
        moved = beam_gather((*state.hidden, *state.cell, state.context, attention), found.parents, backend="reference")
        n = len(state.hidden)
        state, attention = State(tuple(moved[:n]), tuple(moved[n : 2 * n]), moved[-2]), moved[-1]
        steps.append((found.tokens, found.parents, found.scores, peaks))
    return Steps(*(torch.stack(parts) for parts in zip(*steps, strict=True)))


def _begin(weights: SpellerWeights, keys: Tensor, values: Tensor, options: Options) -> tuple[_Beams, State]:
    B, K = keys.shape[0], options.beam
    scores = keys.new_full((B, K), -torch.inf)
    scores[:, 0] = 0.0  # the other beams do not exist yet
    integers = torch.zeros(B, K, dtype=torch.int64, device=keys.device)
    states = None if options.table is None else integers + first_ngram_state(options.table, options.sos)
    ctc = None if options.frames is None else ctc_start(options.frames, K, eos=options.eos)
    beams = _Beams(integers + options.sos, scores, integers.bool(), integers, states, ctc)
    return beams, silence(weights, values, K)


def coverage(attention: Tensor, lengths: Tensor) -> Tensor:
    """Return (B, K), 0 where every frame got its attention and less the more frames were left out.

    The mean over frames of the logarithm of what each got, at most 1 (Wu et al. 2016 take the sum, which outweighs
    scores that are divided by the length). attention (B, K, T) is the sum over tokens, 1 past the lengths (B,).
    """
    return attention.clamp(UNSEEN, 1.0).log().sum(-1) / lengths.clamp(min=1).unsqueeze(-1)


def first_ngram_state(table: Tensor, sos: int) -> int:
    """Return the state before the first token of a table (V ** (order-1), V): sos all through."""
    states, V = table.shape
    return sos * (states - 1) // (V - 1) if V > 1 else 0


def _prune(logits: Tensor, beams: _Beams, gained: Tensor, options: Options):
    ngram = None
    if options.table is not None and beams.ngram_states is not None:
        ngram = Ngram(options.table, beams.ngram_states, options.ngram_weight)
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
        coverage=gained if options.coverage_weight else None,
        ngram=ngram,
        ctc=None if beams.ctc is None else Ctc(beams.ctc.gains, options.ctc_weight),
        backend="reference",
    )


def _ctc(before: _Beams, found: BeamStep, options: Options) -> CtcState | None:
    if before.ctc is None or options.frames is None:
        return None
    arguments = before.ctc, before.tokens, found.parents, found.tokens
    return ctc_prefix(options.frames, *arguments, eos=options.eos, backend="reference")


# -------------------------------------------------------------------------------------------------------------- checks


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")


def _check(weights: SpellerWeights, keys, values, lengths, options: Options, precision: str) -> None:
    _check_precision(precision)
    check_memory(weights, keys, values)
    B = keys.shape[0]
    for name, x in (("lengths", lengths), ("minimum", options.minimum), ("maximum", options.maximum)):
        if x is not None and (x.shape != (B,) or x.dtype != torch.int64):
            raise ValueError(f"{name} must be ({B},) int64; got {tuple(x.shape)} {x.dtype}")
    _check_options(options, B, weights.bias.shape[0])


def _check_options(options: Options, B: int, V: int) -> None:
    if options.beam < 1:
        raise ValueError(f"beam must be at least 1; got {options.beam}")
    for name, token in (("sos", options.sos), ("eos", options.eos)):
        if not 0 <= token < V:
            raise ValueError(f"{name} must be a token from 0 to {V - 1}; got {token}")
    table = options.table
    if table is not None and (table.ndim != 2 or table.shape[1] != V or table.dtype != torch.float32):
        raise ValueError(f"table must be ({V} ** n, {V}) float32; got {tuple(table.shape)} {table.dtype}")
    frames = options.frames
    if frames is not None and (
        frames.ndim != 3 or (frames.shape[0], frames.shape[2]) != (B, V) or frames.dtype != torch.float32
    ):
        got = f"{tuple(frames.shape)} {frames.dtype}"
        raise ValueError(f"frames must be (B, T', V) float32 with B={B}, V={V}; got {got}")


def _fake(weights, keys, values, lengths, beam, *options):
    steps = torch.library.get_ctx().new_dynamic_size()
    shape = (steps, keys.shape[0], beam)
    tokens, parents, frames = (keys.new_empty(shape, dtype=torch.int64) for _ in range(3))
    return tokens, parents, keys.new_empty(shape), frames


def _fake_pack(weights, precision):
    return weights[0].new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


backends.register(
    "speller_search",
    "(Tensor[] weights, Tensor keys, Tensor values, Tensor lengths, int beam, int sos, int eos, Tensor? minimum,"
    " Tensor maximum, float length_penalty, float eos_threshold, float coverage_weight, Tensor? table,"
    " float ngram_weight, Tensor? frames, float ctc_weight, str precision, Tensor? packed)"
    " -> (Tensor tokens, Tensor parents, Tensor scores, Tensor frames)",
    _fake,
)
backends.register(
    "speller_pack", "(Tensor[] weights, str precision) -> Tensor packed", _fake_pack, module="speller_search"
)
