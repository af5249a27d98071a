"""Scores of transcripts: mean Levenshtein distance (the Kaggle score), character and word error rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scores:
    """Scores of a set of utterances."""

    utterances: int
    ld: float  # mean edit distance, in characters per utterance
    cer: float  # percent: total character edits / total reference characters
    wer: float  # percent: total word edits / total reference words


def score(references: Sequence[str], hypotheses: Sequence[str]) -> Scores:
    """Score hypotheses against their references; words are separated by white space.

    If all references are empty, the rates are relative to one character and one word.

    Raises:
        ValueError: the numbers of hypotheses and references differ.
    """
    from Levenshtein import distance  # here: decoding without transcripts works without the package

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
