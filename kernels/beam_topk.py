"""One pruning step on a GPU: the Triton twin of las_fast/ops/beam_topk.py, which says what it means.

A candidate's rank and place are packed into one integer, so that a maximum also keeps the lower index of equal ranks:

    key = ordered(rank) << 32 | (2^31 - 1 - (k * V + v)),   ordered(x) = bits of x as an integer, mirrored below zero

Small vocabularies: one program takes the K x V candidates of an utterance as one tile, makes their log-softmax, and
takes the largest key K times. Large ones: a program a hypothesis walks over its row in blocks, once for the
log-softmax and once for its own K best, skipping each block that holds nothing better; a second kernel takes the K
best of the K rows' bests. Bytes: logits and scores are read once (twice above SMALL entries), results written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALL = 8192  # entries of one utterance's tile, padding included: K * V that one program takes at once
BLOCK = 1024  # entries of a row taken at once above that
NOTHING = tl.constexpr(-9223372036854775808)  # below every key


@triton.jit
def _keys(ranks, flat):
    """Pack float32 ranks and their places in the (K, V) table; NaN must not occur."""
    bits = ranks.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # so -0.0 is the equal of 0.0
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - flat).to(tl.int64)


@triton.jit
def _place(key):
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def _state(pointer, table_rows, exists):
    """Load n-gram states; one outside the table is taken for the nearest: nobody can be told here."""
    state = tl.load(pointer, mask=exists, other=0)
    return tl.minimum(tl.maximum(state, 0), table_rows - 1)


@triton.jit
def _rank(candidates, lengths, finished, coverage, length_penalty, COVERAGE: tl.constexpr, PENALTY: tl.constexpr):
    """Rank (R, V) candidates of R beams: PENALTY is 0 or 1 for that length_penalty, 2 for any other."""
    if PENALTY != 0:
        tokens = tl.maximum(lengths + tl.where(finished, 0, 1), 1).to(tl.float32)
        if PENALTY == 2:
            tokens = tl.exp2(length_penalty * tl.log2(tokens))
        # As a CPU rounds it: fdiv is approximate on a GPU, and takes the product with it.
        candidates = candidates * tl.div_rn(1.0, tokens)[:, None]
    if COVERAGE:
        candidates = candidates + coverage[:, None]
    return candidates


@triton.jit
def _ends(eos_score, best_other, lengths, minimum, maximum, threshold,
          MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr, THRESHOLD: tl.constexpr):  # fmt: skip
    """Return of R beams whether eos is denied and whether it is forced."""
    denied = lengths < 0
    if THRESHOLD:
        denied = eos_score <= threshold * best_other
    if MINIMUM:
        denied = denied | (lengths < minimum)
    forced = lengths < 0
    if MAXIMUM:
        forced = lengths >= maximum
    return denied & (forced == 0), forced


@triton.jit
def _candidates(steps, row, v, V, eos, score, finished, denied, forced, table, state, weight, gains, ctc_weight, exists,
                NGRAM: tl.constexpr, CTC: tl.constexpr):  # fmt: skip
    """Return the scores (R, V) of the continuations, of log-probabilities `steps`; -inf where there is none."""
    is_eos = (v == eos)[None, :]
    inside = exists[:, None] & (v < V)[None, :]
    if CTC:
        gain = tl.load(gains + row[:, None] * V + v[None, :], mask=inside, other=0.0)
        mixed = (1.0 - ctc_weight) * steps + ctc_weight * gain
        steps = tl.where(steps == -float("inf"), steps, mixed)  # which 0 times it would make NaN
    if NGRAM:
        steps = steps + weight * tl.load(table + state[:, None] * V + v[None, :], mask=inside, other=0.0)
    steps = tl.where((is_eos & denied[:, None]) | ((is_eos == 0) & forced[:, None]), -float("inf"), steps)
    steps = tl.where(finished[:, None], tl.where(is_eos, 0.0, -float("inf")), steps)
    return score[:, None] + steps


@triton.jit
def _take_best(
    keys, candidates, b, K, V, eos, finished, lengths, states, table_rows,
    out_scores, out_tokens, out_parents, out_finished, out_lengths, out_states, NGRAM: tl.constexpr,
):  # fmt: skip
    """Write the K largest keys of utterance b, one after another, and what becomes of their beams."""
    for j in range(K):
        best = tl.max(keys, 0)
        score = tl.max(tl.where(keys == best, candidates, -float("inf")), 0)
        keys = tl.where(keys == best, NOTHING, keys)
        place = _place(best)
        parent, token = place // V, place % V
        ended = tl.load(finished + b * K + parent) != 0
        at = b * K + j
        tl.store(out_scores + at, score)
        tl.store(out_tokens + at, token)
        tl.store(out_parents + at, parent)
        tl.store(out_finished + at, (ended | (token == eos)).to(tl.int8))
        tl.store(out_lengths + at, tl.load(lengths + b * K + parent) + tl.where(ended, 0, 1))
        if NGRAM:
            state = _state(states + b * K + parent, table_rows, parent < K)
            tl.store(out_states + at, tl.where(ended, state, (state * V + token) % table_rows))


@triton.jit
def topk_kernel(
    logits, scores, finished, lengths, minimum, maximum, coverage, table, states, gains,
    out_scores, out_tokens, out_parents, out_finished, out_lengths, out_states,
    K, V, eos, logits_b, logits_k, length_penalty, threshold, weight, ctc_weight, table_rows,
    MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr, COVERAGE: tl.constexpr, NGRAM: tl.constexpr,
    CTC: tl.constexpr, THRESHOLD: tl.constexpr, PENALTY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The whole step for utterance b, its (K, V) candidates in one tile."""
    b = tl.program_id(0).to(tl.int64)
    k, v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    exists = k < K
    row = b * K + k
    inside = exists[:, None] & (v < V)[None, :]
    x = tl.load(logits + b * logits_b + k[:, None] * logits_k + v[None, :], mask=inside, other=-float("inf"))
    x = x.to(tl.float32)
    top = tl.max(x, 1)
    seen = tl.where(top == -float("inf"), 0.0, top)  # -inf - -inf would be NaN
    log_sum = tl.log(tl.sum(tl.exp(x - seen[:, None]), 1))
    alive = tl.abs(top + log_sum) < float("inf")  # False for NaN too
    steps = tl.where(alive[:, None], (x - seen[:, None]) - log_sum[:, None], -float("inf"))
    is_eos = (v == eos)[None, :]
    score = tl.load(scores + row, mask=exists, other=-float("inf"))
    done = tl.load(finished + row, mask=exists, other=0) != 0
    count = tl.load(lengths + row, mask=exists, other=0)
    denied, forced = _ends(
        tl.max(tl.where(is_eos, steps, -float("inf")), 1), tl.max(tl.where(is_eos, -float("inf"), steps), 1), count,
        tl.load(minimum + b) if MINIMUM else 0, tl.load(maximum + b) if MAXIMUM else 0, threshold,
        MINIMUM, MAXIMUM, THRESHOLD,
    )  # fmt: skip
    state = _state(states + row, table_rows, exists) if NGRAM else row
    candidates = _candidates(
        steps, row, v, V, eos, score, done, denied, forced, table, state, weight, gains, ctc_weight, exists, NGRAM, CTC
    )  # fmt: skip
    covered = tl.load(coverage + row, mask=exists, other=0.0) if COVERAGE else score
    ranks = _rank(candidates, count, done, covered, length_penalty, COVERAGE, PENALTY)
    keys = tl.where(inside, _keys(ranks, k[:, None] * V + v[None, :]), NOTHING)
    _take_best(
        tl.reshape(keys, [BLOCK_K * BLOCK_V]), tl.reshape(candidates, [BLOCK_K * BLOCK_V]), b, K, V, eos, finished,
        lengths, states, table_rows, out_scores, out_tokens, out_parents, out_finished, out_lengths, out_states, NGRAM,
    )  # fmt: skip


@triton.jit
def row_kernel(
    logits, scores, finished, lengths, minimum, maximum, coverage, table, states, gains, row_keys, row_scores,
    K, V, eos, logits_b, logits_k, length_penalty, threshold, weight, ctc_weight, table_rows,
    MINIMUM: tl.constexpr, MAXIMUM: tl.constexpr, COVERAGE: tl.constexpr, NGRAM: tl.constexpr,
    CTC: tl.constexpr, THRESHOLD: tl.constexpr, PENALTY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The K best continuations of hypothesis (b, k) alone, best first, as keys and scores (B, K, K)."""
    b, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = b * K + k
    line = logits + b * logits_b + k * logits_k
    one = tl.arange(0, 1)
    local = tl.arange(0, BLOCK_V)
    top = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    eos_logit = tl.full([1], -float("inf"), tl.float32)
    best_other = tl.full([1], -float("inf"), tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + local
        x = tl.load(line + v[None, :], mask=(v < V)[None, :], other=-float("inf")).to(tl.float32)
        is_eos = (v == eos)[None, :]
        eos_logit = tl.maximum(eos_logit, tl.max(tl.where(is_eos, x, -float("inf")), 1))
        best_other = tl.maximum(best_other, tl.max(tl.where(is_eos, -float("inf"), x), 1))
        top_new = tl.maximum(top, tl.max(x, 1))
        seen = tl.where(top_new == -float("inf"), 0.0, top_new)  # -inf - -inf would be NaN
        total = total * tl.exp(top - seen) + tl.sum(tl.exp(x - seen[:, None]), 1)
        top = top_new
    log_sum = tl.log(total)
    alive = tl.abs(top + log_sum) < float("inf")  # False for NaN too
    score = tl.load(scores + row + one)
    done = tl.load(finished + row + one) != 0
    count = tl.load(lengths + row + one)
    denied, forced = _ends(
        (eos_logit - top) - log_sum, (best_other - top) - log_sum, count,
        tl.load(minimum + b) if MINIMUM else 0, tl.load(maximum + b) if MAXIMUM else 0, threshold,
        MINIMUM, MAXIMUM, THRESHOLD,
    )  # fmt: skip
    state = _state(states + row + one, table_rows, one < 1) if NGRAM else one
    covered = tl.load(coverage + row + one) if COVERAGE else score
    places = tl.arange(0, BLOCK_K)
    best = tl.full([BLOCK_K], NOTHING, tl.int64)
    best_scores = tl.full([BLOCK_K], -float("inf"), tl.float32)
    worst = tl.full([], NOTHING, tl.int64)  # the K-th best so far
    for start in range(0, V, BLOCK_V):
        v = start + local
        x = tl.load(line + v[None, :], mask=(v < V)[None, :], other=-float("inf")).to(tl.float32)
        steps = tl.where(alive[:, None], (x - top[:, None]) - log_sum[:, None], -float("inf"))
        exists = one < 1
        candidates = _candidates(
            steps, row + one, v, V, eos, score, done, denied, forced, table, state, weight, gains, ctc_weight, exists,
            NGRAM, CTC,
        )  # fmt: skip
        ranks = _rank(candidates, count, done, covered, length_penalty, COVERAGE, PENALTY)
        keys = tl.reshape(tl.where((v < V)[None, :], _keys(ranks, k * V + v[None, :]), NOTHING), [BLOCK_V])
        block_scores = tl.reshape(candidates, [BLOCK_V])
        if tl.max(keys, 0) > worst:
            merged = tl.full([BLOCK_K], NOTHING, tl.int64)
            merged_scores = tl.full([BLOCK_K], -float("inf"), tl.float32)
            for j in range(K):
                largest = tl.maximum(tl.max(best, 0), tl.max(keys, 0))
                of_old = tl.max(tl.where(best == largest, best_scores, -float("inf")), 0)
                of_new = tl.max(tl.where(keys == largest, block_scores, -float("inf")), 0)
                merged = tl.where(places == j, largest, merged)
                merged_scores = tl.where(places == j, tl.maximum(of_old, of_new), merged_scores)
                best = tl.where(best == largest, NOTHING, best)
                keys = tl.where(keys == largest, NOTHING, keys)
                worst = largest
            best = merged
            best_scores = merged_scores
    tl.store(row_keys + row * K + places, best, mask=places < K)
    tl.store(row_scores + row * K + places, best_scores, mask=places < K)


@triton.jit
def merge_kernel(
    row_keys, row_scores, finished, lengths, states,
    out_scores, out_tokens, out_parents, out_finished, out_lengths, out_states,
    K, V, eos, table_rows, NGRAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The K best of the K * K continuations that the rows of utterance b left."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    keys = tl.load(row_keys + b * K * K + i, mask=i < K * K, other=NOTHING)
    candidates = tl.load(row_scores + b * K * K + i, mask=i < K * K, other=-float("inf"))
    _take_best(
        keys, candidates, b, K, V, eos, finished, lengths, states, table_rows,
        out_scores, out_tokens, out_parents, out_finished, out_lengths, out_states, NGRAM,
    )  # fmt: skip


def beam_topk(
    logits: Tensor, scores: Tensor, finished: Tensor, lengths: Tensor, eos: int, minimum: Tensor | None,
    maximum: Tensor | None, length_penalty: float, eos_threshold: float, coverage: Tensor | None,
    table: Tensor | None, states: Tensor | None, weight: float, gains: Tensor | None, ctc_weight: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launch; return scores, tokens, parents, finished, lengths and states as las_fast::beam_topk_triton."""
    B, K, V = logits.shape
    logits = logits if logits.stride(2) == 1 or V == 1 else logits.contiguous()
    scores, lengths, finished = scores.contiguous(), lengths.contiguous(), _bytes(finished.contiguous())
    options = (minimum, maximum, coverage, table, states, gains)
    minimum, maximum, coverage, table, states, gains = (None if x is None else x.contiguous() for x in options)
    out = [torch.empty_like(scores)]
    out += [scores.new_empty(B, K, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.bool, torch.int64)]
    out += [scores.new_empty((0, 0) if table is None else (B, K), dtype=torch.int64)]
    if B == 0 or K == 0:
        return tuple(out)
    results = [_bytes(x) for x in out]
    beams = (logits, scores, finished, lengths, minimum, maximum, coverage, table, states, gains)
    rows = 1 if table is None else table.shape[0]
    factors = tuple(map(float, (length_penalty, eos_threshold, weight, ctc_weight)))
    numbers = (K, V, eos, *logits.stride()[:2], *factors, rows)
    blocks = {"BLOCK_K": triton.next_power_of_2(K), "BLOCK_V": triton.next_power_of_2(V)}
    choices = {
        "MINIMUM": minimum is not None,
        "MAXIMUM": maximum is not None,
        "COVERAGE": coverage is not None,
        "NGRAM": table is not None,
        "CTC": gains is not None,
        "THRESHOLD": eos_threshold != 0.0,
        "PENALTY": {0.0: 0, 1.0: 1}.get(length_penalty, 2),
    }
    entries = blocks["BLOCK_K"] * blocks["BLOCK_V"]
    if entries <= SMALL:
        warps = min(4, max(1, entries // 256))
        topk_kernel[B,](*beams, *results, *numbers, **choices, **blocks, num_warps=warps)
        return tuple(out)
    row_keys, row_scores = (scores.new_empty(B, K, K, dtype=dtype) for dtype in (torch.int64, torch.float32))
    blocks["BLOCK_V"] = min(BLOCK, blocks["BLOCK_V"])
    row_kernel[B, K](*beams, row_keys, row_scores, *numbers, **choices, **blocks, num_warps=4)
    merge_kernel[B,](
        row_keys, row_scores, finished, lengths, states, *results, K, V, eos, rows, NGRAM=table is not None,
        BLOCK=triton.next_power_of_2(K * K), num_warps=4,
    )  # fmt: skip
    return tuple(out)


def _bytes(x: Tensor) -> Tensor:
    """Triton keeps a bool in a byte; so does torch."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x
