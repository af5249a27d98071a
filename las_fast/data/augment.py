"""SpecAugment (Park et al. 2019), speed and joins on normalised features, bounded so that something is always left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from las_fast.config import AugmentConfig

USES = ("speed", "classes", "order", "masks", "joins")


def random_stream(use: str, *, seed: int, epoch: int, utterance: int = 0) -> np.random.Generator:
    """Return the generator of one use of chance (of USES) in an epoch; no two uses share random numbers."""
    # The use comes before the epoch and is never 0: numpy takes [seed, epoch] and [seed, epoch, 0] for the same.
    return np.random.default_rng([seed, 1 + USES.index(use), epoch, utterance])


@dataclass(frozen=True)
class Augment:
    """Change features (T, F) as the settings say; equal generators give equal results."""

    config: AugmentConfig

    def __call__(
        self,
        features: torch.Tensor,
        epoch: float,
        generator: np.random.Generator,
        *,
        blocks: int = 1,
        factor: float | None = None,
    ) -> torch.Tensor:
        """Return the features at another speed and then masked, (T', F); the input stays as it was.

        Args:
            features:  (T, F) float32, T >= 1, normalised: a masked value becomes 0, the mean.
            epoch:     epochs done so far; masks begin at config.start_epoch, speed at once.
            generator: source of every random choice.
            blocks:    equal parts of F that show the same bins (features, then deltas); a mask covers a bin in all.
            factor:    of the speed, where it was drawn before (speed_factors); None draws it here.
        """
        if self.config.speed > 0:
            drawn = generator.uniform(1 - self.config.speed, 1 + self.config.speed) if factor is None else factor
            features = change_speed(features, drawn)
        return self.mask(features, generator, blocks=blocks) if epoch >= self.config.start_epoch else features

    def mask(self, features: torch.Tensor, generator: np.random.Generator, *, blocks: int = 1) -> torch.Tensor:
        """Return a copy of features (T, F) in which spans of frames and of bins are 0."""
        c = self.config
        features = features.clone()
        frames, bins = len(features), features.shape[1] // blocks
        for start, end in _spans(frames, c.time_masks, c.time_width, c.time_share, generator):
            features[start:end] = 0
        by_block = features.view(frames, blocks, bins)
        for start, end in _spans(bins, c.frequency_masks, c.frequency_width, c.frequency_share, generator):
            by_block[:, :, start:end] = 0
        return features


def join_pairs(features: list[torch.Tensor], texts: list[str]) -> tuple[list[torch.Tensor], list[str]]:
    """Return every two neighbours as one utterance: frames (T + T', F), texts with a space between; a last one stays.

    A batch keeps its frames; a speller that has learned the training texts by heart must listen again.
    """
    pairs = range(0, len(features), 2)
    return [torch.cat(features[i : i + 2]) for i in pairs], [" ".join(texts[i : i + 2]) for i in pairs]


def speed_factors(speed: float, *, seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the speed (count,) at which each utterance is played in an epoch; the i-th does not depend on count."""
    return random_stream("speed", seed=seed, epoch=epoch).uniform(1 - speed, 1 + speed, count)


def frames_at_speed(frames, factor):
    """Return how many frames change_speed leaves of `frames` (numbers or arrays)."""
    return np.maximum(1, np.rint(frames / factor)).astype(np.int64)


def change_speed(features: torch.Tensor, factor: float) -> torch.Tensor:
    """Return features (T, F) played `factor` times as fast: about T / factor frames, at least 1, linear in between."""
    frames = int(frames_at_speed(len(features), factor))
    if frames == len(features):
        return features
    return torch.nn.functional.interpolate(features.T[None], size=frames, mode="linear")[0].T.contiguous()


def _spans(size: int, count: int, width: int, share: float, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Draw `count` spans in range(size), each at most `width`, together at most `share` of it and never all of it."""
    left = min(int(size * share), size - 1)
    spans = []
    for _ in range(count):
        length = int(generator.integers(0, min(width, left) + 1))
        start = int(generator.integers(0, size - length + 1))
        spans.append((start, start + length))
        left -= length
    return spans
