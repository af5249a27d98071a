"""How good confidences are: calibration and discrimination."""

from __future__ import annotations

import numpy as np

BINS = 10  # of the expected calibration error
DRAWS = 2000  # of the simulation of perfect confidences


def quality_of(values: np.ndarray, right: np.ndarray) -> tuple[float, float, float, float]:
    """Return ECE and AUC of confidences (N,), and the mean and 95th percentile of the ECE of perfect ones."""
    return expected_calibration_error(values, right), area_under_roc(values, right), *perfect_calibration_error(values)


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the mean over words of |mean confidence - share of right words| in a word's bin, of BINS equal bins."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    differences = np.bincount(bins, confidence - right, minlength=BINS)
    return float(np.abs(differences).sum() / len(confidence))


def perfect_calibration_error(confidence: np.ndarray) -> tuple[float, float]:
    """Return the mean and the 95th percentile of the error if the confidences are the true probabilities."""
    rng = np.random.default_rng(0)
    size = len(confidence)
    errors = [expected_calibration_error(confidence, rng.random(size) < confidence) for _ in range(DRAWS)]
    return float(np.mean(errors)), float(np.quantile(errors, 0.95))


def area_under_roc(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the probability that a right word has a higher confidence than a wrong one; ties count half.

    It is NaN if all words are right, or all wrong.
    """
    _, ranks, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2  # rank from 1, equal values share their mean
    positive = int(right.sum())
    if positive in (0, len(right)):
        return float("nan")
    return float((middle[ranks][right].sum() - positive * (positive + 1) / 2) / (positive * (len(right) - positive)))
