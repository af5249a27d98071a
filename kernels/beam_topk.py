"""One step of beam search on a GPU. las_fast/ops/beam_topk.py defines the operation.

Each candidate's rank and flat index are packed into one integer key, so that the largest key is also the lower index
among equal ranks:

    key = ordered(rank) << 32 | (2^31 - 1 - (k * V + v)),   ordered(x) = bits of x as an integer, mirrored below zero

Small vocabularies: one program holds the K x V candidates of an utterance as one tile, computes their log-softmax and
takes the largest key K times. Large vocabularies: one program per hypothesis makes two passes over its row in blocks,
one for the log-softmax and one for the K best of the row, which skips blocks without a better candidate. A second
kernel merges the K best of all rows. Bytes: logits and scores are read once (twice above MAX_TILE entries), results are
written once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TILE = 8192  # largest tile BLOCK_K * BLOCK_V of a program; larger ones take one program per hypothesis
BLOCK = 1024  # entries of a row per iteration, above MAX_TILE
NO_KEY = tl.constexpr(-9223372036854775808)  # below every key


@triton.jit
def _keys(ranks, flat):
    """Pack float32 ranks and their flat indices k * V + v into keys; NaN must not occur."""
    bits = ranks.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # -0.0 equals 0.0
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - flat).to(tl.int64)


@triton.jit
def _flat_index(key):
    """Return k * V + v of a key."""
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def _rank_of(key):
    """Return the float32 rank of a key."""
    ordered = (key >> 32).to(tl.int32)
    magnitude = tl.where(ordered < 0, -ordered, ordered).to(tl.float32, bitcast=True)
    return tl.where(ordered < 0, -magnitude, magnitude)


@triton.jit
def _finite(x):
    """Return x with 0 for -inf: -inf - -inf would be NaN."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def _power(tokens, length_penalty, PENALTY: tl.constexpr):
    """Return tokens ** length_penalty. PENALTY is 1 for a length_penalty of 1, 2 for any other but 0."""
    if PENALTY == 2:
        tokens = tl.exp2(length_penalty * tl.log2(tokens))
    return tokens


@triton.jit
def _rank(candidates, lengths, finished, coverage, length_penalty, COVERAGE: tl.constexpr, PENALTY: tl.constexpr):
    """Rank the candidates (R, BLOCK_V) of R beams. PENALTY is 0 for a length_penalty of 0; see _power."""
    if PENALTY != 0:
        tokens = _power(tl.maximum(lengths + tl.where(finished, 0, 1), 1).to(tl.float32), length_penalty, PENALTY)
        # div_rn rounds as on a CPU. fdiv is approximate, and the compiler would fold the multiplication into it.
        candidates = candidates * tl.div_rn(1.0, tokens)[:, None]
    if COVERAGE:
        candidates = candidates + coverage[:, None]
    return candidates


@triton.jit
def _eos_rules(eos_score, best_other, lengths, b, minimum, maximum, threshold,
               MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr, THRESHOLD: tl.constexpr):  # fmt: skip
    """Return whether eos is denied and whether it is forced, (R,) each, for beams of utterance b."""
    denied = lengths < 0
    if THRESHOLD:
        denied = eos_score <= threshold * best_other
    if MINIMUM:
        denied = denied | (lengths < tl.load(minimum + b))
    forced = lengths < 0
    if MAXIMUM:
        forced = lengths >= tl.load(maximum + b)
    return denied & (forced == 0), forced


@triton.jit
def _candidates(steps, row, v, V, eos, score, finished, denied, forced, ngram_log_probs, ngram_weight,
                ctc_next_log_probs, ctc_weight, inside, NGRAM: tl.constexpr, CTC: tl.constexpr):  # fmt: skip
    """Return the scores (R, BLOCK_V) of the continuations with log-probabilities `steps`; -inf where not allowed."""
    # (R, BLOCK_V)
    is_eos = (v == eos)[None, :]
    if CTC:
        log_probs = tl.load(ctc_next_log_probs + row[:, None] * V + v[None, :], mask=inside, other=0.0)
        mixed = (1.0 - ctc_weight) * steps + ctc_weight * log_probs
        steps = tl.where(steps == -float("inf"), steps, mixed)  # 0 * -inf would be NaN
    if NGRAM:
        log_probs = tl.load(ngram_log_probs + row[:, None] * V + v[None, :], mask=inside, other=0.0)
        steps = steps + ngram_weight * log_probs
    steps = tl.where((is_eos & denied[:, None]) | ((is_eos == 0) & forced[:, None]), -float("inf"), steps)
    steps = tl.where(finished[:, None], tl.where(is_eos, 0.0, -float("inf")), steps)
    return score[:, None] + steps


@triton.jit
def _take_best(
    keys, candidates, b, K, V, eos, finished, lengths, length_penalty, beam_threshold,
    out_scores, out_tokens, out_parents, out_finished, out_lengths, PENALTY: tl.constexpr, PRUNE: tl.constexpr,
):  # fmt: skip
    """Write the beams of the K largest keys (N,) of utterance b, one after another."""
    if PRUNE:
        best_rank = _rank_of(tl.max(keys, 0))
    for j in range(K):
        best = tl.max(keys, 0)
        score = tl.max(tl.where(keys == best, candidates, -float("inf")), 0)
        keys = tl.where(keys == best, NO_KEY, keys)
        index = _flat_index(best)
        parent, token = index // V, index % V
        ended = tl.load(finished + b * K + parent)
        ends = ended | (token == eos)
        at = b * K + j
        if PRUNE:
            gap = best_rank - _rank_of(best)  # NaN, and so not above the threshold, if no beam exists
            if PENALTY != 0:
                gap *= _power((tl.load(lengths + b * K + parent) + 1).to(tl.float32), length_penalty, PENALTY)
            score = tl.where((ends == 0) & (gap > beam_threshold), -float("inf"), score)
        tl.store(out_scores + at, score)
        tl.store(out_tokens + at, token)
        tl.store(out_parents + at, parent)
        tl.store(out_finished + at, ends)
        tl.store(out_lengths + at, tl.load(lengths + b * K + parent) + tl.where(ended, 0, 1))


@triton.jit
def topk_kernel(
    logits, scores, finished, lengths, minimum, maximum, coverage, ngram_log_probs, ctc_next_log_probs,
    out_scores, out_tokens, out_parents, out_finished, out_lengths,
    K, V, eos, logits_b, logits_k, length_penalty, threshold, ngram_weight, ctc_weight, beam_threshold,
    MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr, COVERAGE: tl.constexpr, NGRAM: tl.constexpr,
    CTC: tl.constexpr, THRESHOLD: tl.constexpr, PENALTY: tl.constexpr, PRUNE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Take the whole step for utterance b, with its (K, V) candidates in one tile."""
    b = tl.program_id(0).to(tl.int64)
    k, v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    exists = k < K
    row = b * K + k
    # (BLOCK_K, BLOCK_V)
    inside = exists[:, None] & (v < V)[None, :]
    x = tl.load(logits + b * logits_b + k[:, None] * logits_k + v[None, :], mask=inside, other=-float("inf"))
    x = x.to(tl.float32)
    # (BLOCK_K,)
    top = tl.max(x, 1)
    finite = _finite(top)
    log_sum = tl.log(tl.sum(tl.exp(x - finite[:, None]), 1))
    has_softmax = tl.abs(top + log_sum) < float("inf")  # False for NaN too
    # (BLOCK_K, BLOCK_V)
    steps = tl.where(has_softmax[:, None], (x - finite[:, None]) - log_sum[:, None], -float("inf"))
    is_eos = (v == eos)[None, :]
    # (BLOCK_K,)
    score = tl.load(scores + row, mask=exists, other=0.0)
    done = tl.load(finished + row, mask=exists, other=0)
    count = tl.load(lengths + row, mask=exists, other=0)
    denied, forced = _eos_rules(
        tl.max(tl.where(is_eos, steps, -float("inf")), 1), tl.max(tl.where(is_eos, -float("inf"), steps), 1), count,
        b, minimum, maximum, threshold, MINIMUM, MAXIMUM, THRESHOLD,
    )  # fmt: skip
    # (BLOCK_K, BLOCK_V)
    candidates = _candidates(
        steps, row, v, V, eos, score, done, denied, forced, ngram_log_probs, ngram_weight,
        ctc_next_log_probs, ctc_weight, inside, NGRAM, CTC,
    )  # fmt: skip
    covered = tl.load(coverage + row, mask=exists, other=0.0) if COVERAGE else score
    ranks = _rank(candidates, count, done, covered, length_penalty, COVERAGE, PENALTY)
    keys = tl.where(inside, _keys(ranks, k[:, None] * V + v[None, :]), NO_KEY)
    _take_best(
        tl.reshape(keys, [BLOCK_K * BLOCK_V]), tl.reshape(candidates, [BLOCK_K * BLOCK_V]), b, K, V, eos, finished,
        lengths, length_penalty, beam_threshold, out_scores, out_tokens, out_parents, out_finished, out_lengths,
        PENALTY, PRUNE,
    )  # fmt: skip


@triton.jit
def row_kernel(
    logits, scores, finished, lengths, minimum, maximum, coverage, ngram_log_probs, ctc_next_log_probs,
    row_keys, row_scores,
    K, V, eos, logits_b, logits_k, length_penalty, threshold, ngram_weight, ctc_weight,
    MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr, COVERAGE: tl.constexpr, NGRAM: tl.constexpr,
    CTC: tl.constexpr, THRESHOLD: tl.constexpr, PENALTY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the K best continuations of hypothesis (b, k), best first, as keys and scores (B, K, K)."""
    b, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = b * K + k + tl.arange(0, 1)  # (1,)
    line = logits + b * logits_b + k * logits_k
    local = tl.arange(0, BLOCK_V)
    # (1,): running maximum and sum of the log-softmax, the logit of eos and the best other logit
    top = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    eos_logit = tl.full([1], -float("inf"), tl.float32)
    best_other = tl.full([1], -float("inf"), tl.float32)
    for start in range(0, V, BLOCK_V):
        # (1, BLOCK_V)
        v = start + local
        inside = (v < V)[None, :]
        x = tl.load(line + v[None, :], mask=inside, other=-float("inf")).to(tl.float32)
        is_eos = (v == eos)[None, :]
        eos_logit = tl.maximum(eos_logit, tl.max(tl.where(is_eos, x, -float("inf")), 1))
        best_other = tl.maximum(best_other, tl.max(tl.where(is_eos, -float("inf"), x), 1))
        top_new = tl.maximum(top, tl.max(x, 1))
        finite = _finite(top_new)
        total = total * tl.exp(top - finite) + tl.sum(tl.exp(x - finite[:, None]), 1)
        top = top_new
    # (1,)
    log_sum = tl.log(total)
    has_softmax = tl.abs(top + log_sum) < float("inf")  # False for NaN too
    score = tl.load(scores + row)
    done = tl.load(finished + row)
    count = tl.load(lengths + row)
    denied, forced = _eos_rules(
        (eos_logit - top) - log_sum, (best_other - top) - log_sum, count,
        b, minimum, maximum, threshold, MINIMUM, MAXIMUM, THRESHOLD,
    )  # fmt: skip
    covered = tl.load(coverage + row) if COVERAGE else score
    # (BLOCK_K,): the best keys so far, unordered until the last merge, with their scores
    slots = tl.arange(0, BLOCK_K)
    best = tl.full([BLOCK_K], NO_KEY, tl.int64)
    best_scores = tl.full([BLOCK_K], -float("inf"), tl.float32)
    worst = tl.full([], NO_KEY, tl.int64)  # the K-th best so far
    for start in range(0, V, BLOCK_V):
        # (1, BLOCK_V)
        v = start + local
        inside = (v < V)[None, :]
        x = tl.load(line + v[None, :], mask=inside, other=-float("inf")).to(tl.float32)
        steps = tl.where(has_softmax[:, None], (x - top[:, None]) - log_sum[:, None], -float("inf"))
        candidates = _candidates(
            steps, row, v, V, eos, score, done, denied, forced, ngram_log_probs, ngram_weight,
            ctc_next_log_probs, ctc_weight, inside, NGRAM, CTC,
        )  # fmt: skip
        ranks = _rank(candidates, count, done, covered, length_penalty, COVERAGE, PENALTY)
        keys = tl.reshape(tl.where(inside, _keys(ranks, k * V + v[None, :]), NO_KEY), [BLOCK_V])
        block_scores = tl.reshape(candidates, [BLOCK_V])  # (BLOCK_V,), like keys
        if tl.max(keys, 0) > worst:
            # (BLOCK_K,)
            merged, merged_scores = best, best_scores
            for j in range(K):
                largest = tl.maximum(tl.max(best, 0), tl.max(keys, 0))
                old_score = tl.max(tl.where(best == largest, best_scores, -float("inf")), 0)
                new_score = tl.max(tl.where(keys == largest, block_scores, -float("inf")), 0)
                merged = tl.where(slots == j, largest, merged)
                merged_scores = tl.where(slots == j, tl.maximum(old_score, new_score), merged_scores)
                best = tl.where(best == largest, NO_KEY, best)
                keys = tl.where(keys == largest, NO_KEY, keys)
                worst = largest
            best = merged
            best_scores = merged_scores
    tl.store(row_keys + row * K + slots, best, mask=slots < K)
    tl.store(row_scores + row * K + slots, best_scores, mask=slots < K)


@triton.jit
def merge_kernel(
    row_keys, row_scores, finished, lengths,
    out_scores, out_tokens, out_parents, out_finished, out_lengths,
    K, V, eos, length_penalty, beam_threshold, PENALTY: tl.constexpr, PRUNE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the K best of the K * K candidates that row_kernel wrote for utterance b."""
    b = tl.program_id(0).to(tl.int64)
    # (BLOCK,)
    i = tl.arange(0, BLOCK)
    inside = i < K * K
    keys = tl.load(row_keys + b * K * K + i, mask=inside, other=NO_KEY)
    candidates = tl.load(row_scores + b * K * K + i, mask=inside, other=-float("inf"))
    _take_best(
        keys, candidates, b, K, V, eos, finished, lengths, length_penalty, beam_threshold,
        out_scores, out_tokens, out_parents, out_finished, out_lengths, PENALTY, PRUNE,
    )  # fmt: skip


def beam_topk(
    logits: Tensor, scores: Tensor, finished: Tensor, lengths: Tensor, eos: int, minimum: Tensor | None,
    maximum: Tensor | None, length_penalty: float, eos_threshold: float, coverage: Tensor | None,
    ngram_log_probs: Tensor | None, ngram_weight: float, ctc_next_log_probs: Tensor | None, ctc_weight: float,
    beam_threshold: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launch the kernels; the implementation of las_fast::beam_topk_triton."""
    B, K, V = logits.shape
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    beams = [logits, *(x.contiguous() for x in (scores, finished, lengths))]
    options = (minimum, maximum, coverage, ngram_log_probs, ctc_next_log_probs)
    options = tuple(None if x is None else x.contiguous() for x in options)
    types = (torch.float32, torch.int64, torch.int64, torch.bool, torch.int64)
    out = [scores.new_empty(B, K, dtype=dtype) for dtype in types]
    if K == 0:
        return tuple(out)
    factors = tuple(map(float, (length_penalty, eos_threshold, ngram_weight, ctc_weight)))
    scalars = (K, V, eos, *logits.stride()[:2], *factors)
    blocks = {"BLOCK_K": triton.next_power_of_2(K), "BLOCK_V": triton.next_power_of_2(V)}
    flags = {
        "MINIMUM": minimum is not None,
        "MAXIMUM": maximum is not None,
        "COVERAGE": coverage is not None,
        "NGRAM": ngram_log_probs is not None,
        "CTC": ctc_next_log_probs is not None,
        "THRESHOLD": eos_threshold != 0.0,
        "PENALTY": {0.0: 0, 1.0: 1}.get(length_penalty, 2),
    }
    prune = beam_threshold != math.inf
    entries = blocks["BLOCK_K"] * blocks["BLOCK_V"]
    if entries <= MAX_TILE:
        warps = min(4, max(1, entries // 256))
        scalars = (*scalars, float(beam_threshold))
        topk_kernel[B,](*beams, *options, *out, *scalars, **flags, PRUNE=prune, **blocks, num_warps=warps)
        return tuple(out)
    row_keys, row_scores = (scores.new_empty(B, K, K, dtype=dtype) for dtype in (torch.int64, torch.float32))
    blocks["BLOCK_V"] = BLOCK
    row_kernel[B, K](*beams, *options, row_keys, row_scores, *scalars, **flags, **blocks, num_warps=4)
    merge_kernel[B,](
        row_keys, row_scores, *beams[2:], *out, K, V, eos, float(length_penalty), float(beam_threshold),
        PENALTY=flags["PENALTY"], PRUNE=prune, BLOCK=triton.next_power_of_2(K * K), num_warps=4,
    )  # fmt: skip
    return tuple(out)
