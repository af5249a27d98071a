"""The words of hypotheses, with their times and confidences.

Times. With a CTC head, the time of a token is the mean frame of its posterior, given the hypothesis
(ops.ctc_token_times). Without one it is the attended frame, or the latest attended frame of the tokens before it if
that is later. A word starts near the time of its first character and ends near that of its last. After a pause, CTC's
peak precedes the sound; elsewhere it follows. Therefore Calibration (las_fast/search/confidence.py) has a constant for
each case. A word follows a pause if the space before it comes more than PAUSE seconds after the last character of the
previous word.

Confidences. See las_fast/search/confidence.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from las_fast.model.attention import Memory
from las_fast.ops import ctc_token_times
from las_fast.output.transcripts import Word
from las_fast.search.beam import TokenHypothesis
from las_fast.search.confidence import Calibration, word_features
from las_fast.text import SPECIAL, Vocabulary

PAUSE = 0.12  # seconds
MIN_WORD = 0.06  # seconds of a word, unless the next word starts earlier
MIN_GAP = 0.01  # seconds between the starts of two words
NEAR = 1.0  # seconds; equal words of two hypotheses whose attended frames are closer than this are the same word


class TokenEvidence(NamedTuple):
    """Values of the CTC head for the tokens of a hypothesis, (U,) each; see token_evidence."""

    times: np.ndarray  # in CTC frames
    log_probs: np.ndarray


class WordFinder:
    """Finds the words of hypotheses.

    Args:
        model:         its time_reduction is read, and with a CTC head its ctc_time_reduction.
        vocabulary:    of the model.
        calibration:   of the model.
        frame_shift:   seconds between feature frames.
        greedy:        whether the search has a beam of 1.
    """

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        calibration: Calibration,
        *,
        frame_shift: float,
        greedy: bool = False,
    ):
        self.model, self.calibration, self.frame_shift = model, calibration, frame_shift
        self.weights = calibration.greedy if greedy else calibration.beam
        self.characters = [*["?"] * len(SPECIAL), *vocabulary.characters]

    @torch.inference_mode()
    def __call__(
        self, hypotheses: list[list[TokenHypothesis]], memory: Memory, feature_lengths: Sequence[int], nbest: int
    ) -> list[list[TokenHypothesis]]:
        """Return the best hypotheses of each utterance with their words, whose times count from its first frame.

        Args:
            hypotheses:      all of the search, which vote on the words: a list per utterance, best first.
            memory:          of these utterances, from model.listen.
            feature_lengths: feature frames of each utterance.
            nbest:           maximum hypotheses returned per utterance; fewer if the search found fewer.
        """
        results: list[list[TokenHypothesis]] = [[] for _ in hypotheses]
        votes = [Votes([self._spell(h) for h in beam], beam) for beam in hypotheses]
        for rank in range(nbest):
            texts = [beam[rank].text_tokens if rank < len(beam) else [] for beam in hypotheses]
            evidence = token_evidence(memory, texts)
            for i, beam in enumerate(hypotheses):
                if rank < len(beam):
                    limit = feature_lengths[i] * self.frame_shift
                    words = self._words(votes[i], rank, beam[rank], evidence[i], limit)
                    results[i].append(dataclasses.replace(beam[rank], words=words))
        return results

    def _spell(self, hypothesis: TokenHypothesis) -> str:
        """Return the text with one character per token, so that indices of characters are those of tokens."""
        return "".join(map(self.characters.__getitem__, hypothesis.text_tokens))

    def _words(
        self, votes: Votes, rank: int, hypothesis: TokenHypothesis, evidence: TokenEvidence | None, limit: float
    ) -> tuple[Word, ...]:
        texts, spans = votes.texts[rank], votes.spans[rank]
        if not spans:
            return ()
        times = self._token_seconds(hypothesis, evidence)
        starts, ends = word_times(times, spans, limit, self.calibration)
        eos_score = hypothesis.score - sum(hypothesis.token_scores)
        scores = np.array([*hypothesis.token_scores, eos_score])
        shares = votes.shares(rank, NEAR / (self.model.time_reduction * self.frame_shift))
        features = word_features(spans, scores, evidence and evidence.log_probs, shares)
        if self.calibration.known:
            features["known"] = np.array([text in self.calibration.known for text in texts], float)
        return tuple(map(Word, texts, starts.tolist(), ends.tolist(), self.weights(features).tolist()))

    def _token_seconds(self, hypothesis: TokenHypothesis, evidence: TokenEvidence | None) -> np.ndarray:
        """Return the time of each token in seconds, (U,)."""
        if evidence is not None:
            return evidence.times * (self.model.ctc_time_reduction * self.frame_shift)
        frames = np.maximum.accumulate(np.array(hypothesis.attended_frames, float))
        return frames * (self.model.time_reduction * self.frame_shift)


def token_evidence(memory: Memory, texts: list[list[int]]) -> list[TokenEvidence | None]:
    """Return CTC's time of each token, and the highest log-probability of the token in that frame or a frame beside it.

    Args:
        memory: of a batch of B utterances, from model.listen.
        texts:  B lists of tokens without <sos> and <eos>.

    Returns:
        B results; None for an utterance whose text has more tokens than the CTC head has frames, and for all
        utterances without a CTC head.
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
    gaps = times[np.maximum(firsts - 1, 0)] - times[np.append(0, lasts[:-1])]  # from the word before to the space
    after_pause = gaps > PAUSE
    after_pause[0] = True
    starts = times[firsts] + np.where(after_pause, calibration.start_after_pause, calibration.start)
    return put_in_order(starts, times[lasts] + calibration.end, 0.0, limit)


def put_in_order(starts: np.ndarray, ends: np.ndarray, begin: float, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Move the starts and ends (N,) of words so that begin <= start < end <= next start, and end <= limit.

    Starts are at least MIN_GAP apart, or less if the words would not fit.
    """
    N, gap = len(starts), min(MIN_GAP, (limit - begin) / (len(starts) + 1))
    earliest = begin + gap * np.arange(N)
    starts = np.maximum.accumulate(np.maximum(starts, begin) - earliest) + earliest
    starts = np.minimum(starts, limit - gap * N + earliest - begin)
    ends = np.maximum(ends, starts + MIN_WORD)
    return starts, np.minimum(ends, np.append(starts[1:], limit))


def shift_words(words: Sequence[Word], seconds: float, begin: float, limit: float) -> tuple[Word, ...]:
    """Return copies of words that are `seconds` later, moved to lie in order between begin and limit."""
    if not words:
        return ()
    starts, ends = np.array([[word.start, word.end] for word in words]).T + seconds
    pairs = zip(words, *(x.tolist() for x in put_in_order(starts, ends, begin, limit)), strict=True)
    return tuple(dataclasses.replace(word, start=start, end=end) for word, start, end in pairs)


class Votes:
    """The words of all hypotheses of an utterance, and the probabilities of the hypotheses.

    Args:
        spelled:    text of each hypothesis, with one character per token.
        hypotheses: of one utterance.
    """

    def __init__(self, spelled: list[str], hypotheses: list[TokenHypothesis]):
        matches = [list(re.finditer(r"\S+", text)) for text in spelled]
        self.texts = [[match[0] for match in words] for words in matches]  # words of each hypothesis
        self.spans = [[match.span() for match in words] for words in matches]  # (first, last + 1) of their tokens
        scores = np.array([h.score for h in hypotheses])
        weights = np.exp(scores - scores.max()) if np.isfinite(scores.max()) else np.ones(len(scores))
        self.probabilities = (weights / weights.sum()).tolist()
        self.frames: list[dict[str, list[int]]] = [{} for _ in hypotheses]  # word -> attended frames of its occurrences
        for frames, texts, spans, hypothesis in zip(self.frames, self.texts, self.spans, hypotheses, strict=True):
            for text, (first, _) in zip(texts, spans, strict=True):
                frames.setdefault(text, []).append(hypothesis.attended_frames[first])

    def shares(self, rank: int, near: float) -> np.ndarray:
        """Return, for each word of hypothesis `rank`, the total probability of the hypotheses that have it, (N,).

        near: encoder frames; equal words whose attended frames are closer than this are the same word.
        """
        occurrences: Counter[str] = Counter()  # so far
        shares = []
        for text in self.texts[rank]:
            frame = self.frames[rank][text][occurrences[text]]
            occurrences[text] += 1
            shares.append(sum(
                probability for probability, frames in zip(self.probabilities, self.frames, strict=True)
                if any(abs(other - frame) < near for other in frames.get(text, ()))
            ))  # fmt: skip
        return np.minimum(np.array(shares), 1.0)
