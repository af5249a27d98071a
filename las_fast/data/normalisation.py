"""Normalise feature frames to mean 0 and standard deviation 1."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from las_fast.config import FeatureConfig
from las_fast.data.features import add_deltas
from las_fast.errors import InputError


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of the raw frames of the training split, for normalisation "global"."""

    mean: torch.Tensor  # (F,) float32
    std: torch.Tensor  # (F,) float32


def normalise(frames: torch.Tensor, features: FeatureConfig, statistics: Statistics | None = None) -> torch.Tensor:
    """Shift and scale frames (T, F) to mean 0 and standard deviation 1, as features.normalisation says.

    A coefficient that is constant over the utterance becomes 0. "global" needs the statistics of the training split.
    """
    if features.normalisation == "none":
        return frames
    if features.normalisation == "global":
        if statistics is None:
            raise InputError("features.normalisation global needs the statistics of the training data; got none")
        return (frames - statistics.mean) / statistics.std
    std, mean = torch.std_mean(frames, dim=0, correction=0)
    return (frames - mean) / _safe_std(std, mean)


def model_input(frames: torch.Tensor, features: FeatureConfig, statistics: Statistics | None = None) -> torch.Tensor:
    """Return the input (T, features.input_size) of a model for raw frames (T, F): normalised, and with deltas."""
    return add_deltas(normalise(frames, features, statistics), features.deltas)


def _safe_std(std: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Replace standard deviations that are only rounding errors by infinity, so that dividing by them gives 0."""
    return torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.inf)


def statistics_of(utterances: Iterable[torch.Tensor]) -> Statistics:
    """Return mean and standard deviation over all frames of utterances (T, F), of which there is at least one.

    Sums are in float64, around the first frame for precision.
    """
    origin = total = squares = torch.zeros((), dtype=torch.float64)
    count = 0
    for frames in utterances:
        if not count:
            origin = frames[0].double()
        shifted = frames.double() - origin
        total = total + shifted.sum(0)
        squares = squares + shifted.square().sum(0)
        count += len(frames)
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return Statistics((mean + origin).float(), _safe_std(std, mean + origin).float())
