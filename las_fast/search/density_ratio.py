"""Density ratio (McDermott, Sak and Variani 2019, "A density ratio approach to language model fusion in end-to-end
automatic speech recognition"): subtract the internal language model of a speller.

A speller learns an internal language model from its training transcripts. Let p be a language model of a large text,
and q a language model of those transcripts. Adding log p(w | h) would count their language twice, so the search adds

    score(w | h) = log p(w | h) - weight * log q(w | h).

Both are back-off models, so the score is one too: its n-grams are those of p and q, and the back-off weight of
a context is that of p minus weight times that of q.
"""

from __future__ import annotations

import numpy as np

from las_fast.search.kneser_ney import FORBIDDEN_LOG_PROB, Level, find

NO_LEVEL = Level(*(np.zeros(0, dtype) for dtype in (np.int64, np.float32, np.int64, np.float32)))


def subtract(model: tuple[Level, ...], transcripts: tuple[Level, ...], weight: float, V: int) -> tuple[Level, ...]:
    """Return the levels of the scores of a model of V tokens, from those of p (`model`) and q (`transcripts`)."""
    levels = []
    for k in range(1, max(len(model), len(transcripts)) + 1):
        p, q = (levels_of[k - 1] if k <= len(levels_of) else NO_LEVEL for levels_of in (model, transcripts))
        ngrams = np.union1d(p.ngrams, q.ngrams)
        contexts = np.union1d(p.contexts, q.contexts)
        scores = ngram_log_probs(model, ngrams, k, V) - weight * ngram_log_probs(transcripts, ngrams, k, V)
        backoffs = _backoffs(p, contexts) - weight * _backoffs(q, contexts)
        if k == 1:
            scores = np.where(p.log_probs > FORBIDDEN_LOG_PROB, scores, FORBIDDEN_LOG_PROB)
        levels.append(Level(ngrams, scores.astype(np.float32), contexts, backoffs.astype(np.float32)))
    return tuple(levels)


def ngram_log_probs(levels: tuple[Level, ...], ngrams: np.ndarray, k: int, V: int) -> np.ndarray:
    """Return the log-probability of the newest token of n-grams (N,) of k tokens after the others, (N,) float64."""
    values, left = np.zeros(len(ngrams)), np.arange(len(ngrams))
    for size in range(min(k, len(levels)), 0, -1):
        level, shorter = levels[size - 1], ngrams[left] % V**size
        found, index = find(level.ngrams, shorter)
        values[left[found]] += level.log_probs[index[found]]
        left, shorter = left[~found], shorter[~found]
        values[left] += _backoffs(level, shorter // V)
    return values


def _backoffs(level: Level, contexts: np.ndarray) -> np.ndarray:
    """Return the back-off weights of contexts (N,), 0 where the level has none, float64."""
    known, index = find(level.contexts, contexts)
    return np.where(known, level.backoffs[index], 0.0) if len(level.contexts) else np.zeros(len(contexts))
