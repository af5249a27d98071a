"""Vocal tract length perturbation (Jaitly and Hinton 2013): stretch or compress the frequency axis of feature frames.

A speaker with a shorter vocal tract has higher formants, so an utterance with a warped frequency axis sounds as if
somebody else had said it. The feature cache has no waveforms, so the log energies are interpolated between the filters.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from las_fast.config import FeatureConfig
from las_fast.data.features import cepstrum_matrix, filter_centres

BOUNDARY = 0.6  # share of half the sample rate up to which frequencies, old and new, are multiplied by the factor


def warp_frequencies(frames: Tensor, factor: float, config: FeatureConfig) -> Tensor:
    """Move what is at f Hz in frames (T, F) to factor * f Hz.

    The factor holds while old and new frequency are below BOUNDARY. Above, the map is linear up to half the sample
    rate, which stays.

    Args:
        frames: raw log-mel or MFCC frames, as config.kind says.
        factor: from 0.5 to 1.5.
        config: kind, size, mel_bins, lifter and sample_rate are used; for an archive, they describe its features.
    """
    bins = config.size if config.kind == "logmel" else config.mel_bins
    matrix = _interpolation(_sources(filter_centres(bins, config.sample_rate).numpy(), factor, config.sample_rate / 2))
    if config.kind == "mfcc":
        to_cepstra, to_logmel = _cepstrum_and_inverse(config)
        matrix = to_logmel @ matrix @ to_cepstra
    return frames @ matrix.float()


def _sources(centres: np.ndarray, factor: float, top: float) -> np.ndarray:
    """Return the position among the filters (F,) from which each filter takes its energy, from 0 to F - 1."""
    knee = BOUNDARY * top * min(factor, 1.0)  # new frequency at which the map bends; the old one is knee / factor
    old = np.interp(centres, [0.0, knee, top], [0.0, knee / factor, top])
    return np.interp(old, centres, np.arange(len(centres)))


def _interpolation(sources: np.ndarray) -> Tensor:
    """Return the matrix (F, F) float64 by which frames (T, F) are multiplied to interpolate them at sources (F,)."""
    places = np.arange(len(sources))
    return torch.from_numpy(np.maximum(0.0, 1.0 - np.abs(places[:, None] - sources[None, :])))


@lru_cache(maxsize=2)
def _cepstrum_and_inverse(config: FeatureConfig) -> tuple[Tensor, Tensor]:
    """Return the MFCC matrix (bins, size) and its pseudo-inverse, which gives smooth log-mel frames, both float64."""
    matrix = cepstrum_matrix(config)
    return matrix, torch.linalg.pinv(matrix)
