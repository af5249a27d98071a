"""Confidences of words: a logistic regression on features of the search.

    confidence = 1 / (1 + exp(-(bias + sum over features of weight * (value - mean))))

A word is right if the Levenshtein alignment of the words pairs it with an equal word of the reference. The weights are
fitted on a development set by `python -m benchmarks.words fit`, separately for beam search and for greedy search, and
lie next to a checkpoint as NAME.words.json. Other checkpoints use default.words.json, fitted on the model speech13h of
version 0.3. A feature that is not available, such as CTC's without a CTC head, takes its mean.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from las_fast.errors import InputError
from las_fast.files import unreadable, write_text_atomically

FORMAT = "las_fast words 1"
DEFAULT = Path(__file__).parents[1] / "checkpoints" / "default.words.json"
FEATURES = {  # of a word; scores are in nats
    "mean_score": "mean score of its characters",
    "min_score": "lowest score of a character",
    "probability": "exp(mean_score)",
    "end": "probability that the word ends after its last character",
    "complete": "probability * end",
    "ctc": "mean log-probability of its characters under the CTC head, in or beside their CTC frames",
    "share": "share of the n-best hypotheses, weighted by probability, that have the word at this place",
    "letters": "log of the number of its characters",
    "hypothesis": "mean score of all tokens of the hypothesis",
    "before": "mean_score of the word before, or `hypothesis`",
    "after": "mean_score of the word after, or `hypothesis`",
    "known": "1 if the word is in the model's word list, else 0",
}
MIN_SCORE, MIN_CTC = -20.0, -8.0  # smaller scores and CTC log-probabilities are clamped to these


@dataclass(frozen=True)
class LogisticRegression:
    """A fitted logistic regression. `weights` and `means` have an entry for each feature that it uses."""

    bias: float
    weights: dict[str, float]
    means: dict[str, float]

    def __call__(self, features: dict[str, np.ndarray]) -> np.ndarray:
        """Return the confidences of words, (N,), from their features, (N,) each; a missing one counts as its mean."""
        count = len(next(iter(features.values())))
        total = np.full(count, self.bias)
        for name, weight in self.weights.items():
            if name in features:
                total += weight * (features[name] - self.means[name])
        return 1 / (1 + np.exp(-np.clip(total, -30, 30)))


@dataclass(frozen=True)
class Calibration:
    """Weights of the confidences, known words, and constants of word times; see las_fast.search.words."""

    beam: LogisticRegression  # of beam search
    greedy: LogisticRegression  # of greedy search, which has one hypothesis
    known: frozenset[str] = field(default=frozenset())  # words of the feature `known`; empty: the feature is not used
    start: float = -0.02  # seconds from the time of the first character to the start of the word
    start_after_pause: float = 0.015  # the same for the first word, and for a word after a pause
    end: float = 0.05  # seconds from the time of the last character to the end of the word

    def save(self, path: Path) -> None:
        """Write the calibration as JSON."""
        values = {"format": FORMAT} | asdict(self) | {"known": " ".join(sorted(self.known))}
        write_text_atomically(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


def calibration_path_for(checkpoint: Path) -> Path:
    """Return the path of a checkpoint's calibration: NAME.words.json next to NAME.safetensors."""
    return checkpoint.with_suffix(".words.json")


def is_calibration(path: Path) -> bool:
    """Return whether a file looks like a calibration, from its first lines."""
    with path.open("rb") as file:
        return FORMAT.encode() in file.read(len(FORMAT) + 20)


def load_calibration(checkpoint: Path) -> Calibration:
    """Load the calibration of a checkpoint, or the default one if it has none.

    Raises:
        InputError: the file cannot be read or is damaged.
    """
    path = calibration_path_for(checkpoint)
    return read_calibration(path if os.path.lexists(path) else DEFAULT)


def read_calibration(path: Path) -> Calibration:
    """Read a NAME.words.json; errors are those of load_calibration."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError
        beam, greedy = (_regression(**values.pop(name)) for name in ("beam", "greedy"))
        known = frozenset(values.pop("known").split())
        return Calibration(beam, greedy, known, **_finite(values))
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise InputError(f"{path} is not a calibration of word confidences; copy it again or delete it") from None


def _regression(bias: float, weights: dict, means: dict) -> LogisticRegression:
    """Return the regression of a JSON object; raise ValueError or TypeError if its values are not those of one."""
    if not weights.keys() <= means.keys():
        raise ValueError
    return LogisticRegression(_finite({"bias": bias})["bias"], _finite(weights), _finite(means))


def _finite(values: dict) -> dict[str, float]:
    numbers = {name: float(value) for name, value in values.items()}
    if not all(map(math.isfinite, numbers.values())):
        raise ValueError
    return numbers


def word_features(
    spans: list[tuple[int, int]], scores: np.ndarray, ctc: np.ndarray | None, shares: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the features of the N words of a hypothesis, except `known`, (N,) float64 each.

    Args:
        spans:  (first, last + 1) of the tokens of each word; at least one.
        scores: (U + 1,) score of each token, <eos> included.
        ctc:    (U,) log-probability of each token under the CTC head, or None.
        shares: (N,) feature `share`.
    """
    edges = np.array(spans).ravel()
    firsts, ends = edges[::2], edges[1::2]
    counts = ends - firsts
    scores = np.clip(scores, MIN_SCORE, 0)
    means = np.add.reduceat(scores, edges)[::2] / counts
    mean = scores.mean()
    features = {"mean_score": means, "min_score": np.minimum.reduceat(scores, edges)[::2], "share": shares,
                "probability": np.exp(means), "end": np.exp(scores[ends]), "letters": np.log(counts),
                "complete": np.exp(means + scores[ends]), "hypothesis": np.full(len(spans), mean),
                "before": np.concatenate([[mean], means[:-1]]), "after": np.append(means[1:], mean)}  # fmt: skip
    if ctc is not None:
        sums = np.add.reduceat(np.append(np.maximum(ctc, MIN_CTC), 0.0), edges)[::2]
        features["ctc"] = sums / counts
    return features
