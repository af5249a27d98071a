"""The words of hypotheses: when each was said, and how likely it is right.

Times. With a CTC head, the time of a token is the mean frame of its posterior, given the hypothesis
(ops.ctc_token_times). Without one it is the attended frame, made monotone. A word starts near the time of its first
character and ends near that of its last. CTC's peaks precede the sound after a pause and follow it otherwise, so the
two have different constants in las_fast/search/confidence.py. There is a pause where CTC places the space more than
PAUSE after the last character.

Confidence: see las_fast/search/confidence.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from las_fast.model.attention import Memory
from las_fast.ops import ctc_token_times
from las_fast.output.transcripts import Word
from las_fast.search.beam import Hypothesis
from las_fast.search.confidence import Calibration, word_features
from las_fast.text import SPECIAL, Vocabulary

PAUSE = 0.12  # seconds
SHORTEST = 0.06  # seconds of a word, unless the next starts earlier
APART = 0.01  # seconds between the starts of two words, at least
NEAR = 1.0  # seconds: equal words of two hypotheses are the same word if they attend to frames closer than this


class TokenEvidence(NamedTuple):
    """What CTC says about the tokens of a hypothesis, (U,) each."""

    times: np.ndarray  # CTC frames
    log_probs: np.ndarray


class WordFinder:
    """Find the words of hypotheses.

    Args:
        model:         see las_fast.search.beam.beam_search; with a CTC head it also has ctc_time_reduction.
        vocabulary:    of the model.
        calibration:   of the model.
        frame_seconds: seconds between feature frames.
        greedy:        whether the search has a beam of 1.
    """

    def __init__(
        self, model, vocabulary: Vocabulary, calibration: Calibration, *, frame_seconds: float, greedy: bool = False
    ):
        self.model, self.calibration, self.frame_seconds = model, calibration, frame_seconds
        self.weights = calibration.greedy if greedy else calibration.beam
        self.characters = [*["?"] * len(SPECIAL), *vocabulary.characters]

    @torch.inference_mode()
    def __call__(
        self, hypotheses: list[list[Hypothesis]], memory: Memory, feature_lengths: Sequence[int], nbest: int
    ) -> list[list[Hypothesis]]:
        """Return the first nbest hypotheses of each utterance with their words; times in seconds of the features.

        Args:
            hypotheses:      of each utterance, best first: all that the search has, because they vote on the words.
            memory:          of these utterances, from model.listen.
            feature_lengths: feature frames of each utterance.
        """
        results: list[list[Hypothesis]] = [[] for _ in hypotheses]
        votes = [Votes([self._spell(h) for h in of_one], of_one) for of_one in hypotheses]
        for rank in range(nbest):
            ranked = [of_one[rank].text_tokens if rank < len(of_one) else [] for of_one in hypotheses]
            evidence = token_evidence(memory, ranked)
            for i, of_one in enumerate(hypotheses):
                if rank < len(of_one):
                    limit = feature_lengths[i] * self.frame_seconds
                    words = self._words(votes[i], rank, of_one[rank], evidence[i], limit)
                    results[i].append(dataclasses.replace(of_one[rank], words=words))
        return results

    def _spell(self, hypothesis: Hypothesis) -> str:
        """Return the text, with one character per token."""
        return "".join(map(self.characters.__getitem__, hypothesis.text_tokens))

    def _words(
        self, votes: Votes, rank: int, hypothesis: Hypothesis, evidence: TokenEvidence | None, limit: float
    ) -> tuple[Word, ...]:
        texts, spans = votes.texts[rank], votes.spans[rank]
        if not spans:
            return ()
        times = self._token_seconds(hypothesis, evidence)
        starts, ends = word_times(times, spans, limit, self.calibration)
        scores = np.array([*hypothesis.token_scores, hypothesis.score - sum(hypothesis.token_scores)])
        shares = votes.shares(rank, NEAR / (self.model.time_reduction * self.frame_seconds))
        features = word_features(spans, scores, evidence and evidence.log_probs, shares)
        if self.calibration.known:
            features["known"] = np.array([text in self.calibration.known for text in texts], float)
        return tuple(map(Word, texts, starts.tolist(), ends.tolist(), self.weights(features).tolist()))

    def _token_seconds(self, hypothesis: Hypothesis, evidence: TokenEvidence | None) -> np.ndarray:
        if evidence is not None:
            return evidence.times * (self.model.ctc_time_reduction * self.frame_seconds)
        frames = np.maximum.accumulate(np.array(hypothesis.attended_frames, float))
        return frames * (self.model.time_reduction * self.frame_seconds)


def token_evidence(memory: Memory, texts: list[list[int]]) -> list[TokenEvidence | None]:
    """Return the CTC frame of each token, and its highest log-probability in that frame or a frame beside it.

    Args:
        memory: of a batch of B utterances, from model.listen.
        texts:  B lists of tokens without <sos> and <eos>.

    Returns:
        B results: None without a CTC head or for a text with more tokens than the head has frames.
    """
    logits, lengths = getattr(memory, "ctc_logits", None), getattr(memory, "ctc_lengths", None)
    if logits is None or lengths is None:
        return [None] * len(texts)
    counts = torch.tensor([len(text) for text in texts])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(text, dtype=torch.int64) for text in texts], True)
    tokens, on_device = tokens.to(logits.device), counts.to(logits.device)
    times = ctc_token_times(logits, lengths, tokens, on_device)
    frames, last = times.round().long(), (lengths[:, None] - 1).clamp(min=0)
    log_probs, rows = logits.float().log_softmax(-1), torch.arange(len(texts), device=logits.device)[:, None]
    beside = [log_probs[rows, (frames + shift).clamp(min=0).minimum(last), tokens] for shift in (-1, 0, 1)]
    results = torch.stack([times.float(), torch.stack(beside).amax(0)]).cpu().double().numpy()
    fits = (counts <= lengths.cpu()).tolist()
    return [TokenEvidence(*results[:, i, : len(text)]) if fits[i] else None for i, text in enumerate(texts)]


def word_times(
    times: np.ndarray, spans: list[tuple[int, int]], limit: float, calibration: Calibration
) -> tuple[np.ndarray, np.ndarray]:
    """Return the starts and ends (N,) of words in seconds: 0 <= start < end <= next start, and end <= limit.

    Args:
        times: (U,) seconds of each token.
        spans: (first, last + 1) of the tokens of each word; at least one.
        limit: seconds of the utterance.
    """
    edges = np.array(spans)
    firsts, lasts = edges[:, 0], edges[:, 1] - 1
    gaps = times[np.maximum(firsts - 1, 0)] - times[np.append(0, lasts[:-1])]  # from a word to the next space
    after_pause = gaps > PAUSE
    after_pause[0] = True
    starts = times[firsts] + np.where(after_pause, calibration.start_after_pause, calibration.start)
    return in_order(starts, times[lasts] + calibration.end, 0.0, limit)


def in_order(starts: np.ndarray, ends: np.ndarray, begin: float, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Move the starts and ends (N,) of words as little as needed: begin <= start < end <= next start, end <= limit."""
    N, apart = len(starts), min(APART, (limit - begin) / (len(starts) + 1))
    earliest = begin + apart * np.arange(N)
    starts = np.maximum.accumulate(np.maximum(starts, begin) - earliest) + earliest
    starts = np.minimum(starts, limit - apart * N + earliest - begin)
    ends = np.maximum(ends, starts + SHORTEST)
    return starts, np.minimum(ends, np.append(starts[1:], limit))


def moved(words: Sequence[Word], seconds: float, begin: float, limit: float) -> tuple[Word, ...]:
    """Return words that are `seconds` later and lie between begin and limit."""
    if not words:
        return ()
    starts, ends = np.array([[word.start, word.end] for word in words]).T + seconds
    pairs = zip(words, *(x.tolist() for x in in_order(starts, ends, begin, limit)), strict=True)
    return tuple(dataclasses.replace(word, start=start, end=end) for word, start, end in pairs)


class Votes:
    """The words of all hypotheses of an utterance, which vote on each other's words."""

    def __init__(self, spelled: list[str], hypotheses: list[Hypothesis]):
        matches = [list(re.finditer(r"\S+", text)) for text in spelled]
        self.texts = [[match[0] for match in of_one] for of_one in matches]
        self.spans = [[match.span() for match in of_one] for of_one in matches]
        scores = np.array([h.score for h in hypotheses])
        weights = np.exp(scores - scores.max()) if np.isfinite(scores.max()) else np.ones(len(scores))
        self.probabilities = (weights / weights.sum()).tolist()
        self.places: list[dict[str, list[int]]] = [{} for _ in hypotheses]  # word -> attended frames
        for places, texts, spans, one in zip(self.places, self.texts, self.spans, hypotheses, strict=True):
            for text, (first, _) in zip(texts, spans, strict=True):
                places.setdefault(text, []).append(one.attended_frames[first])

    def shares(self, rank: int, near: float) -> np.ndarray:
        """Return the probability of the hypotheses that have each word of hypothesis `rank`, (N,).

        near: a word is the same one if it attends to a frame closer than this many encoder frames.
        """
        positions: dict[str, int] = {}
        shares = []
        for text in self.texts[rank]:
            n = positions[text] = positions.get(text, -1) + 1
            frame = self.places[rank][text][n]
            shares.append(sum(
                probability for probability, places in zip(self.probabilities, self.places, strict=True)
                if any(abs(other - frame) < near for other in places.get(text, ()))
            ))  # fmt: skip
        return np.minimum(np.array(shares), 1.0)
