"""Interpolated modified Kneser-Ney: from text to counts, and from counts to back-off levels.

las_fast.lm gives the formulas. An n-gram is a number in base V with its newest token as the last digit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from las_fast.errors import InputError
from las_fast.text import EOS, PAD, SOS, Vocabulary

MAX_ORDER = 12  # 31 ** 12 still fits in int64; 31 is the size of the default vocabulary
PRUNED_FROM = 4  # order of the shortest n-grams that pruning removes
FORBIDDEN_LOG_PROB = -1e4  # of <pad> and <sos>; exp gives 0. Not -inf: a weight of 0 times -inf is NaN
DEFAULT_DISCOUNTS = (0.5, 1.0, 1.5)  # where a text is too small, or an order too dense, for the formulas
Counts = tuple[np.ndarray, np.ndarray]  # (N,) int64 n-grams, ascending; (N,) int64 counts


@dataclass(frozen=True)
class Level:
    """The n-grams of one order k, and the contexts that they continue.

    The log-probability of token w after context h is that of the n-gram hw; if there is none, it is the back-off
    weight of h (0 if h is not a context) plus the log-probability of w after h without its oldest token.
    """

    ngrams: np.ndarray  # (N,) int64, ascending; of order 1: all tokens
    log_probs: np.ndarray  # (N,) float32; of <pad> and <sos>: FORBIDDEN_LOG_PROB
    contexts: np.ndarray  # (M,) int64, ascending: the n-grams without their newest token
    backoffs: np.ndarray  # (M,) float32, natural logarithms


# ------------------------------------------------------------------------------------------------------------- counting


def check_order(order: int, V: int) -> None:
    """Raise InputError if the order is out of range or its n-grams of V tokens exceed 64 bits."""
    if not 1 <= order <= MAX_ORDER:
        raise InputError(f"--order must be from 1 to {MAX_ORDER}; got {order}")
    if order > max_order(V):
        advice = f"train with --order {max_order(V)} or less"
        raise InputError(f"n-grams of order {order} over {V} tokens exceed 64 bits; {advice}")


def max_order(V: int) -> int:
    """Return the highest order of a model of V tokens."""
    return max(k for k in range(1, MAX_ORDER + 1) if V**k < 2**63)


def encode_sentences(sentences: list[str], characters: str) -> np.ndarray:
    """Return the tokens of the sentences, each between <sos> and <eos>, as (N,) uint8 or, if V > 256, int32."""
    vocabulary = Vocabulary(characters)
    codes = np.frombuffer("".join(sentences).encode("utf-32-le", "surrogatepass"), np.uint32)
    known = np.array([ord(c) for c in characters], np.uint32)
    order = np.argsort(known)
    nearest = order[np.minimum(np.searchsorted(known[order], codes), len(known) - 1)]
    if not np.array_equal(known[nearest], codes):
        for text in sentences:
            vocabulary.encode(text)  # raises the error
    tokens = (nearest + EOS + 1).astype(np.uint8 if len(vocabulary) <= 256 else np.int32)
    ends = np.cumsum([len(text) for text in sentences], dtype=np.int64)
    borders = np.concatenate(([0], np.repeat(ends, 2)))[: 2 * len(ends)]
    return np.insert(tokens, borders, np.tile(np.array([SOS, EOS], tokens.dtype), len(ends)))


def count_ngrams(tokens: np.ndarray, V: int, order: int) -> list[Counts]:
    """Count the n-grams of orders 1 to `order` in encoded sentences. Their last token is not <sos>."""
    position, counts = _position(tokens), []
    for k, numbers in enumerate(_ngrams_at(tokens, V, order), 1):
        ngrams = numbers[(position >= k - 1) & (tokens != SOS)]
        ngrams.sort()
        counts.append(_count_equal(ngrams))
    return counts


def _ngrams_at(tokens: np.ndarray, V: int, order: int) -> Iterator[np.ndarray]:
    """Yield, for orders 1 to `order`, the n-gram (N,) that ends at each token; it may span sentences.

    All are one array, which the next order changes.
    """
    numbers = np.zeros(len(tokens), np.int64)
    for k in range(order):
        numbers[k:] += tokens[: max(0, len(tokens) - k)] * np.int64(V**k)
        yield numbers


def _position(tokens: np.ndarray) -> np.ndarray:
    """Return the number of tokens before each token in its sentence, at most MAX_ORDER."""
    index = np.arange(len(tokens))
    start = np.maximum.accumulate(np.where(tokens == SOS, index, 0))
    return np.minimum(index - start, MAX_ORDER).astype(np.int8)


def _count_equal(ascending: np.ndarray) -> Counts:
    first = starts(ascending)
    return ascending[first], np.diff(np.append(first, len(ascending)))


def starts(ascending: np.ndarray) -> np.ndarray:
    """Return the index of the first of each run of equal values."""
    different = np.ones(len(ascending), bool)
    different[1:] = ascending[1:] != ascending[:-1]
    return np.flatnonzero(different)


def merge_counts(a: Counts, b: Counts) -> Counts:
    """Add two counts."""
    ngrams = np.concatenate((a[0], b[0]))
    order = np.argsort(ngrams, kind="stable")  # merges the two ascending runs
    ngrams, times = ngrams[order], np.concatenate((a[1], b[1]))[order]
    first = starts(ngrams)
    return ngrams[first], np.add.reduceat(times, first) if len(first) else times


def count_weighted(parts: Iterable[tuple[np.ndarray, int]], V: int, order: int) -> list[Counts]:
    """Count the n-grams of the parts of a text, each times its weight. Without parts there are no n-grams."""
    none = np.zeros(0, np.int64), np.zeros(0, np.int64)
    total: list[Counts] = [none] * order
    for tokens, weight in parts:
        counted = [(ngrams, times * weight) for ngrams, times in count_ngrams(tokens, V, order)]
        total = list(itertools.starmap(merge_counts, zip(total, counted, strict=True)))
    return total


def counts_of_all_orders(ngrams: np.ndarray, times: np.ndarray, V: int, order: int) -> list[Counts]:
    """Return the n-grams of orders 1 to `order` from those of the highest, of sentences that begin with order-1 <sos>.

    The counts of lower orders are 1. `estimate` does not use them: every such n-gram has a token before it.
    """
    counts = [(ngrams, times)]
    for k in range(order - 1, 0, -1):
        shorter = np.unique(counts[0][0] % V**k)
        counts.insert(0, (shorter, np.ones_like(shorter)))
    return counts


# ----------------------------------------------------------------------------------------------------------- estimating


def estimate(counts: list[Counts], V: int, *, prune: int = 1) -> tuple[Level, ...]:
    """Estimate a model of V tokens from the counts of orders 1, 2, ...

    prune: n-grams of order PRUNED_FROM and above that occur less often are left out of the model. Their probability
    goes to the back-off weight of their context. The discounts and c(h .) are computed before that.
    """
    levels: list[Level] = []
    for k, (ngrams, times) in enumerate(counts, 1):
        adjusted = times if k == len(counts) else _continuation_counts(ngrams, times, counts[k][0] % V**k)
        if k == 1:
            levels.append(_unigrams(ngrams, adjusted, V))
        else:
            kept = times >= prune if k >= PRUNED_FROM else np.ones(len(ngrams), bool)
            levels.append(_level(ngrams, adjusted, kept, levels[-1], k, V))
    return tuple(levels)


def _continuation_counts(ngrams: np.ndarray, times: np.ndarray, suffixes: np.ndarray) -> np.ndarray:
    """Return how many distinct tokens precede each n-gram; for one that no token precedes, how often it occurs.

    suffixes: the n-grams of the next order without their oldest token.
    """
    suffixes.sort()
    followed, distinct = _count_equal(suffixes)
    adjusted = times.copy()  # an n-gram that begins with <sos> has no token before it
    adjusted[np.searchsorted(ngrams, followed)] = distinct
    return adjusted


def _unigrams(ngrams: np.ndarray, counts: np.ndarray, V: int) -> Level:
    p = np.full(V, 1 / (V - 2))
    if len(ngrams):
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        p *= discounts.sum() / counts.sum()
        p[ngrams] += (counts - discounts) / counts.sum()
    log_probs = np.log(p).astype(np.float32)
    log_probs[[PAD, SOS]] = FORBIDDEN_LOG_PROB
    return Level(np.arange(V), log_probs, np.zeros(1, np.int64), np.zeros(1, np.float32))


def _level(ngrams: np.ndarray, counts: np.ndarray, kept: np.ndarray, below: Level, k: int, V: int) -> Level:
    first = starts(ngrams // V)
    group = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(ngrams))))  # the context of each n-gram
    total = np.bincount(group, counts, len(first))
    discounted = np.where(kept, _discounts(counts)[np.minimum(counts, 3)], counts)
    share = np.bincount(group, discounted, len(first)) / total
    ngrams, group = ngrams[kept], group[kept]
    shorter = below.log_probs[np.searchsorted(below.ngrams, ngrams % V ** (k - 1))]
    p = (counts - discounted)[kept] / total[group] + share[group] * np.exp(shorter.astype(np.float64))
    used = np.unique(group)
    backoffs = np.log(share[used]).astype(np.float32)
    return Level(ngrams, np.log(p).astype(np.float32), (ngrams // V)[starts(group)], backoffs)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Return the discounts of counts 0, 1, 2, and 3 or more."""
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        discounts = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if min(discounts) > 0:
            return np.array((0.0, *discounts))
    return np.array((0.0, *DEFAULT_DISCOUNTS))


# ----------------------------------------------------------------------------------------------------------- evaluating


def token_log_probs(levels: tuple[Level, ...], tokens: np.ndarray, V: int) -> np.ndarray:
    """Return the log-probability (M,) of each token of encoded sentences that is not <sos>, float64."""
    position, scored, values = _position(tokens), tokens != SOS, np.zeros(len(tokens))
    for k, (level, numbers) in enumerate(zip(levels, _ngrams_at(tokens, V, len(levels)), strict=True), 1):
        at = np.flatnonzero((position >= k - 1) & scored)
        found, index = find(level.ngrams, numbers[at])
        known, context = find(level.contexts, numbers[at] // V)
        values[at[known]] += level.backoffs[context[known]]
        values[at[found]] = level.log_probs[index[found]]
    return values[scored]


def find(ascending: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each value is in an ascending array, and at which index."""
    if not len(ascending):
        return np.zeros(len(values), bool), np.zeros(len(values), np.int64)
    index = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[index] == values, index


def perplexity(levels: tuple[Level, ...], tokens: np.ndarray, V: int) -> float:
    """Return exp of the mean negative log-probability per token of encoded sentences, <eos> included."""
    return float(np.exp(-token_log_probs(levels, tokens, V).mean()))
