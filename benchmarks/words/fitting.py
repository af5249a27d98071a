"""Fit the logistic regression of word confidences."""

from __future__ import annotations

import numpy as np

from las_fast.search.confidence import LogisticRegression

MIN_RARE = 10  # wrong words (or right ones, if fewer) per weight; with less only a bias and a scale are fitted
FOLDS = 5  # of the cross-validation
DEFAULT_STRENGTH, PRIOR_STRENGTH = 3.0, 10.0  # precision of the prior on standardised weights, without --prior and with


def cross_validated(
    features: dict[str, np.ndarray],
    right: np.ndarray,
    utterance: np.ndarray,
    prior: LogisticRegression | None,
    seed: int,
) -> np.ndarray:
    """Return the confidence of each word (N,) from a fit to the utterances of the other folds."""
    _, index = np.unique(utterance, return_inverse=True)
    fold = (np.random.default_rng(seed).permutation(index.max() + 1) % FOLDS)[index]
    values = np.empty(len(right))
    for k in range(FOLDS):
        inside = fold == k
        weights = fit_sparingly({name: x[~inside] for name, x in features.items()}, right[~inside], prior)
        values[inside] = weights({name: x[inside] for name, x in features.items()})
    return values


def fit_sparingly(
    features: dict[str, np.ndarray], right: np.ndarray, prior: LogisticRegression | None
) -> LogisticRegression:
    """Fit all weights; with a prior and fewer than MIN_RARE rare words per weight, only its bias and scale."""
    rare = min(int(right.sum()), int((~right).sum()))
    if prior is not None and rare < MIN_RARE * len(features):
        return fit_scale(features, right, prior)
    return fit(features, right, prior, PRIOR_STRENGTH if prior else DEFAULT_STRENGTH)


def fit_scale(features: dict[str, np.ndarray], right: np.ndarray, prior: LogisticRegression) -> LogisticRegression:
    """Fit a bias and a factor of all weights of the prior (Platt scaling); it keeps its means."""
    confidence = prior(features)
    logits = np.log(confidence) - np.log1p(-confidence)
    fitted = fit({"logit": logits}, right, LogisticRegression(0.0, {"logit": 1.0}, {}), 1.0)
    factor = fitted.weights["logit"]
    weights = {name: round(factor * weight, 5) for name, weight in prior.weights.items() if name in features}
    bias = fitted.bias + factor * (prior.bias - fitted.means["logit"])
    return LogisticRegression(round(bias, 5), weights, {name: prior.means[name] for name in weights})


def fit(
    features: dict[str, np.ndarray],
    right: np.ndarray,
    prior: LogisticRegression | None = None,
    strength: float = DEFAULT_STRENGTH,
) -> LogisticRegression:
    """Fit a logistic regression by Newton's method, with a Gaussian prior on the standardised weights.

    Args:
        features: (N,) each; constant ones are left out.
        right:    (N,) bool.
        prior:    mean of the prior; by default all weights are 0.
        strength: precision of the prior.
    """
    names = [name for name, x in features.items() if x.std() > 1e-9]
    columns = np.stack([features[name] for name in names], 1)
    means, scales = columns.mean(0), columns.std(0)
    x = np.concatenate([np.ones((len(right), 1)), (columns - means) / scales], 1)
    prior_weights = {} if prior is None else prior.weights
    centre = np.append(0.0, [prior_weights.get(name, 0.0) for name in names] * scales)
    precision = np.append(0.0, np.full(len(names), strength))
    w = np.zeros_like(centre)
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (p - right) + precision * (w - centre)
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + np.diag(precision), gradient)
        w = w - step / max(1.0, np.abs(step).max())
        if np.abs(step).max() < 1e-9:
            break
    weights = {name: round(float(v), 5) for name, v in zip(names, w[1:] / scales, strict=True)}
    return LogisticRegression(
        round(float(w[0]), 5), weights, {n: round(float(m), 5) for n, m in zip(names, means, strict=True)}
    )
