"""One step of beam search: the K best continuations of each utterance's K hypotheses.

    model[k, v]     = log_softmax(logits[k])[v]
                      with CTC: (1 - ctc.weight) * log_softmax(logits[k])[v] + ctc.weight * ctc.next_log_probs[k, v]
    step[k, v]      = model[k, v]; with an n-gram model + ngram.weight * ngram.log_probs[k, v]
    candidate[k, v] = scores[k] + step[k, v]; a finished beam has one candidate: eos at an unchanged score
    rank[k, v]      = candidate[k, v] * (1 / length[k] ** length_penalty) + coverage[k]

The result is the K highest ranks; among equal ranks the lower flat index k * V + v comes first. With a beam threshold,
an unfinished beam of the result is dropped (its score becomes -inf) if it is too far below the best one:

    (best rank - rank) * length ** length_penalty > beam_threshold

where `length` is the number of tokens of a beam after the step, eos counted. This is the threshold pruning of Lowerre
1976 (Harpy) and of Freitag and Al-Onaizan 2017, in nats. In a search all unfinished beams have the same length: without
coverage, the left side is the difference of their scores. The score of a finished beam is scaled to the length of the
other one, so a search ends as soon as all others are far below a finished beam.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from las_fast.ops import backends

MAX_BEAMS = 128  # a Triton program holds K * K candidates at once


class Ngram(NamedTuple):
    """Log-probabilities of the continuations, from ngram_scores."""

    log_probs: Tensor  # (B, K, V) float32; not NaN
    weight: float


class Ctc(NamedTuple):
    """CTC log-probabilities of the continuations, from ctc_prefix."""

    next_log_probs: Tensor  # (B, K, V) float32; not NaN
    weight: float  # 0 to 1; the logits have 1 - weight. A token at -inf in the logits stays at -inf even with 1


class BeamStep(NamedTuple):
    """The state of each beam after a step; all (B, K), best rank first."""

    scores: Tensor  # float32; -inf for a dropped beam, and where fewer than K candidates exist
    tokens: Tensor  # int64, the token taken
    parents: Tensor  # int64, the beam continued
    finished: Tensor  # bool
    lengths: Tensor  # int64 tokens, eos counted


def beam_topk(
    logits: Tensor,
    scores: Tensor,
    finished: Tensor,
    *,
    eos: int,
    lengths: Tensor,
    minimum: Tensor | None = None,
    maximum: Tensor | None = None,
    length_penalty: float = 0.0,
    eos_threshold: float = 0.0,
    coverage: Tensor | None = None,
    ngram: Ngram | None = None,
    ctc: Ctc | None = None,
    beam_threshold: float = math.inf,
    backend: str = "auto",
) -> BeamStep:
    """Return the K best continuations of each utterance, best first. Not differentiable.

    Args:
        logits:    (B, K, V) of any float type; float32 inside. A row with NaN or +inf, or with only -inf, has no
                   continuation.
        scores:    (B, K) float32 sums of log-probabilities; -inf marks a beam that does not exist.
        finished:  (B, K) bool, beams that have ended with eos.
        eos:       token id.
        lengths:   (B, K) int64 tokens of each beam so far, its eos counted.
        minimum:   (B,) int64 tokens that a beam must have before it may take eos; None: 0.
        maximum:   (B,) int64 tokens at which an unfinished beam must take eos (wins over minimum and threshold).
        length_penalty: candidates are ranked by score / length ** length_penalty; 0 ranks by score.
        eos_threshold:  eos is allowed only if its log-probability exceeds this factor times the best other one, both
                   from the logits alone; 0: always allowed.
        coverage:  (B, K) float32, finite; added to the rank of every candidate of a beam (Wu et al. 2016); None: 0.
        ngram:     language model whose weighted log-probabilities are added to each step.
        ctc:       CTC log-probabilities to interpolate with those of the logits.
        beam_threshold: 0 or more nats; unfinished beams further below the best one are dropped; infinity: none is.
        backend:   "auto", "reference", "triton" or "cpp".

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a weight or threshold is out of range.
        RuntimeError: the named backend is not available here, or K or V is too large for it (Triton: 128 beams).
    """
    _check(logits, scores, finished, lengths, minimum, maximum, coverage, ngram, ctc, eos)
    check_beam_threshold(beam_threshold)
    unsupported = {"triton": triton_problem(*logits.shape[1:])}
    chosen = backends.choose("beam_topk", backend, logits.device, logits.dtype, unsupported)
    op: Any = _reference if chosen == "reference" else getattr(torch.ops.las_fast, f"beam_topk_{chosen}")
    options: tuple[Any, ...] = (eos, minimum, maximum, length_penalty, eos_threshold, coverage)
    options += (None, 0.0) if ngram is None else (backends.detached(ngram.log_probs), ngram.weight)
    options += (None, 0.0) if ctc is None else (backends.detached(ctc.next_log_probs), ctc.weight)
    options += (beam_threshold,)
    return BeamStep(*op(backends.detached(logits), backends.detached(scores), finished, lengths, *options))


def triton_problem(K: int, V: int) -> str | None:
    """Return why the Triton kernels cannot take K beams of V tokens, or None."""
    if K <= MAX_BEAMS and K * V < 2**31:
        return None
    return f"takes at most {MAX_BEAMS} beams and 2^31 candidates per utterance; got {K} beams of {V} tokens"


def _reference(
    logits, scores, finished, lengths, eos, minimum, maximum, length_penalty, eos_threshold, coverage,
    ngram_log_probs, ngram_weight, ctc_next_log_probs, ctc_weight, beam_threshold,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, K, V = logits.shape
    is_eos = torch.arange(V, device=logits.device) == eos
    steps = _log_probabilities(logits, lengths, eos, is_eos, minimum, maximum, eos_threshold)
    if ctc_next_log_probs is not None:
        impossible = steps.isneginf()  # 0 * -inf would be NaN
        steps = ((1 - ctc_weight) * steps).masked_fill(impossible, -torch.inf) + ctc_weight * ctc_next_log_probs
    if ngram_log_probs is not None:
        steps = steps + ngram_weight * ngram_log_probs
    # masked_fill_, not only_eos[eos] = 0.0: on CUDA that copies a number from the host, which a graph cannot capture.
    only_eos = torch.full((V,), -torch.inf, device=steps.device).masked_fill_(is_eos, 0.0)
    steps = torch.where(finished[..., None], only_eos, steps)
    candidates = scores[..., None] + steps  # (B, K, V)
    token_counts = (lengths + ~finished).clamp(min=1).float()
    ranks = candidates * (1 / token_counts**length_penalty)[..., None]
    if coverage is not None:
        ranks = ranks + coverage[..., None]
    best = ranks.flatten(1).sort(stable=True, dim=-1, descending=True).indices[:, :K]
    tokens, parents = best % V, best // V
    ended = finished.gather(1, parents)
    new_scores, new_finished = candidates.flatten(1).gather(1, best), ended | (tokens == eos)
    new_lengths = lengths.gather(1, parents) + ~ended
    if beam_threshold != math.inf:
        best_ranks = ranks.flatten(1).gather(1, best)
        gaps = (best_ranks[:, :1] - best_ranks) * new_lengths.float() ** length_penalty  # NaN if no beam exists
        new_scores = new_scores.masked_fill(~new_finished & (gaps > beam_threshold), -torch.inf)
    return new_scores, tokens, parents, new_finished, new_lengths


def _log_probabilities(logits, lengths, eos, is_eos, minimum, maximum, eos_threshold) -> Tensor:
    """Return the log-softmax (B, K, V) float32, -inf for tokens that are not allowed."""
    logits = logits.float()
    undefined = ~logits.logsumexp(-1, keepdim=True).isfinite()  # log_softmax would be NaN
    steps = logits.log_softmax(-1).masked_fill(undefined, -torch.inf)
    denied = torch.zeros_like(steps[..., 0], dtype=torch.bool)  # (B, K)
    if eos_threshold != 0.0:
        denied = steps[..., eos] <= eos_threshold * steps.masked_fill(is_eos, -torch.inf).amax(-1)
    if minimum is not None:
        denied = denied | (lengths < minimum[:, None])
    if maximum is not None:
        forced = lengths >= maximum[:, None]
        denied = denied & ~forced
        steps = steps.masked_fill(forced[..., None] & ~is_eos, -torch.inf)
    return steps.masked_fill(denied[..., None] & is_eos, -torch.inf)


def _check(logits, scores, finished, lengths, minimum, maximum, coverage, ngram, ctc, eos) -> None:
    if logits.ndim != 3 or not logits.is_floating_point():
        raise ValueError(f"logits must be (B, K, V) of a float type; got {tuple(logits.shape)} {logits.dtype}")
    B, K, V = logits.shape
    expected: list[tuple[str, Any, tuple[int, ...], torch.dtype]]
    expected = [("scores", scores, (B, K), torch.float32), ("finished", finished, (B, K), torch.bool)]
    expected += [("lengths", lengths, (B, K), torch.int64), ("coverage", coverage, (B, K), torch.float32)]
    expected += [("minimum", minimum, (B,), torch.int64), ("maximum", maximum, (B,), torch.int64)]
    if ngram is not None:
        expected += [("ngram.log_probs", ngram.log_probs, (B, K, V), torch.float32)]
    if ctc is not None:
        expected += [("ctc.next_log_probs", ctc.next_log_probs, (B, K, V), torch.float32)]
        if not 0 <= ctc.weight <= 1:
            raise ValueError(f"ctc.weight must be from 0 to 1; got {ctc.weight}")
    for name, tensor, shape, dtype in expected:
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {shape} {dtype} like logits; got {tuple(tensor.shape)} {tensor.dtype}")
        if tensor.device != logits.device:
            raise ValueError(f"{name} must be on {logits.device} like logits; got {tensor.device}")
    if not 0 <= eos < V:
        raise ValueError(f"eos must be a token from 0 to {V - 1}; got {eos}")


def check_beam_threshold(threshold: float) -> None:
    """Raise ValueError unless threshold is 0 or more; infinity is allowed."""
    if not threshold >= 0:
        raise ValueError(f"beam_threshold must be 0 or more, or infinity for none; got {threshold}")


def _fake(
    logits, scores, finished, lengths, eos, minimum, maximum, length_penalty, eos_threshold, coverage,
    ngram_log_probs, ngram_weight, ctc_next_log_probs, ctc_weight, beam_threshold,
):  # fmt: skip
    new = [scores.new_empty(scores.shape, dtype=dtype) for dtype in (torch.float32, torch.int64, torch.int64)]
    new += [scores.new_empty(scores.shape, dtype=dtype) for dtype in (torch.bool, torch.int64)]
    return tuple(new)


backends.register(
    "beam_topk",
    "(Tensor logits, Tensor scores, Tensor finished, Tensor lengths, int eos, Tensor? minimum, Tensor? maximum,"
    " float length_penalty, float eos_threshold, Tensor? coverage, Tensor? ngram_log_probs, float ngram_weight,"
    " Tensor? ctc_next_log_probs, float ctc_weight, float beam_threshold)"
    " -> (Tensor scores, Tensor tokens, Tensor parents, Tensor finished, Tensor lengths)",
    _fake,
)
