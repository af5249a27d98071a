"""SpecAugment (Park et al. 2019) and joins, on normalised features, and changes of speed, on any frames.

Masks never cover all features.

What changes the frames before normalisation is in las_fast.data.splice (words), warp (the frequency axis) and degrade
(rooms, noise and silence); las_fast.data.augmented applies all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from las_fast.config import AugmentConfig

STREAMS = ("speed", "buckets", "order", "masks", "joins", "silence", "degrade", "warp", "splice")
MOST_SILENCE = 100  # feature frames added before an utterance, and after it


def random_stream(name: str, *, seed: int, epoch: int, utterance: int = 0) -> np.random.Generator:
    """Return the random generator of a purpose (one of STREAMS), epoch and utterance, independent of all others."""
    # The purpose comes before the epoch and is never 0: NumPy treats seeds [seed, epoch] and [seed, epoch, 0] alike.
    return np.random.default_rng([seed, 1 + STREAMS.index(name), epoch, utterance])


@dataclass(frozen=True)
class Augment:
    """Changes the speed of features (T, F) and masks them (SpecAugment); deterministic for a given generator state.

    The other settings of AugmentConfig are applied by las_fast.data.augmented and las_fast.data.batch.
    """

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
        """Change the speed, then mask; returns new features (T', F).

        Args:
            features:  (T, F) float32, T >= 1, normalised, so that masked values become the mean, 0.
            epoch:     epochs done so far; masks start at config.start_epoch, speed changes at once.
            generator: source of every random choice.
            blocks:    number of equal parts of F (features, then deltas); a mask covers a bin in all of them.
            factor:    speed drawn by speed_factors; None: it stays.
        """
        if factor is not None:
            features = change_speed(features, factor)
        return self.mask(features, generator, blocks=blocks) if epoch >= self.config.start_epoch else features

    def mask(self, features: torch.Tensor, generator: np.random.Generator, *, blocks: int = 1) -> torch.Tensor:
        """Copy features (T, F) with random spans of frames and of bins set to 0."""
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
    """Concatenate consecutive pairs: frames (T + T', F), texts with a space between; an odd last one stays alone.

    The audio of a batch stays the same, but its texts are new: a speller that memorised texts must use the audio.
    """
    pairs = range(0, len(features), 2)
    return [torch.cat(features[i : i + 2]) for i in pairs], [" ".join(texts[i : i + 2]) for i in pairs]


def speed_factors(speed: float, *, seed: int, epoch: int, count: int) -> np.ndarray:
    """Draw the speed of each utterance in an epoch, (count,) float64; the i-th does not depend on count."""
    return random_stream("speed", seed=seed, epoch=epoch).uniform(1 - speed, 1 + speed, count)


def frame_counts_at_speed(frame_counts, factor):
    """Return frame counts after change_speed; frame_counts and factor are numbers or arrays."""
    return np.maximum(1, np.rint(frame_counts / factor)).astype(np.int64)


def change_speed(features: torch.Tensor, factor: float) -> torch.Tensor:
    """Speed features (T, F) up by `factor`, by linear interpolation to about T / factor frames, at least 1."""
    frames = int(frame_counts_at_speed(len(features), factor))
    if frames == len(features):
        return features
    return torch.nn.functional.interpolate(features.T[None], size=frames, mode="linear")[0].T.contiguous()


def silence_frames(frame_counts: np.ndarray, share: float, *, seed: int, epoch: int) -> np.ndarray:
    """Draw the frames of silence to add before and after each utterance in an epoch, (N, 2) int64.

    An utterance gets some with probability `share`: at each end at most MOST_SILENCE frames, and at most a quarter as
    many as it has. More would be trimmed (features.trim_silence). Row i does not depend on other utterances.
    """
    drawn = random_stream("silence", seed=seed, epoch=epoch).random((len(frame_counts), 3))
    most = np.minimum(MOST_SILENCE, np.asarray(frame_counts) // 4)[:, None]
    return np.where(drawn[:, :1] < share, drawn[:, 1:] * (most + 1), 0).astype(np.int64)


def _spans(size: int, count: int, width: int, share: float, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Draw `count` spans in range(size), each at most `width`, in total at most `share` of size and less than size."""
    left = min(int(size * share), size - 1)
    spans = []
    for _ in range(count):
        length = int(generator.integers(0, min(width, left) + 1))
        start = int(generator.integers(0, size - length + 1))
        spans.append((start, start + length))
        left -= length
    return spans
