"""Scores of transcripts: Levenshtein distance as Kaggle takes it, character and word error rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from Levenshtein import distance


@dataclass(frozen=True)
class Scores:
    utterances: int
    ld: float  # characters per utterance: the mean of the utterances' edit distances
    cer: float  # percent: all character edits over all reference characters
    wer: float  # percent: all word edits over all reference words


def score(references: Sequence[str], hypotheses: Sequence[str]) -> Scores:
    """Compare transcripts pair by pair; words are what white space parts.

    An empty reference counts every hypothesised character or word as an edit. Where all references are empty, the rates
    are taken over one character or word.

    Raises:
        ValueError: there are not as many hypotheses as references.
    """
    pairs = list(zip(references, hypotheses, strict=True))
    characters = [distance(reference, hypothesis) for reference, hypothesis in pairs]
    words = [distance(reference.split(), hypothesis.split()) for reference, hypothesis in pairs]
    reference_words = sum(len(reference.split()) for reference in references)
    return Scores(
        utterances=len(pairs),
        ld=sum(characters) / max(1, len(pairs)),
        cer=100 * sum(characters) / max(1, sum(map(len, references))),
        wer=100 * sum(words) / max(1, reference_words),
    )
