"""The utterances of a training with their augmentations. Joins of utterances are made per batch, in batch.py.

The steps of an utterance that gets a room, noise or silence:

    splice -> warp -> speed -> room, noise, silence -> normalisation and deltas -> masks

and of any other:

    splice -> warp -> normalisation and deltas -> speed -> masks

All randomness is a function of (seed, epoch, utterance).
"""

from __future__ import annotations

import numpy as np
import torch

from las_fast.data.augment import (
    Augment,
    change_speed,
    frame_counts_at_speed,
    random_stream,
    silence_frames,
    speed_factors,
)
from las_fast.data.dataset import SpeechDataset
from las_fast.data.degrade import Degrade, degrades
from las_fast.data.splice import Splice
from las_fast.data.warp import warp_frequencies


class AugmentedUtterances:
    """The utterances of a dataset as an epoch of a training gets them.

    Args:
        dataset: the utterances.
        augment: what to change.
        splice:  makes utterances with words of others; None: off.
        seed:    training.seed.
        epoch:   number of the epoch, from 0.
    """

    def __init__(self, dataset: SpeechDataset, augment: Augment, splice: Splice | None, *, seed: int, epoch: int):
        self.dataset, self.augment, self.config, self.splice = dataset, augment, augment.config, splice
        self.seed, self.epoch = seed, epoch
        speed = self.config.speed
        self.factors = speed_factors(speed, seed=seed, epoch=epoch, count=len(dataset)) if speed else None
        self.degrade: Degrade | None = None
        if degrades(self.config):
            self.degrade = Degrade(self.config, dataset.features, dataset.raw, len(dataset))
            counts = dataset.frame_counts if not speed else frame_counts_at_speed(dataset.frame_counts, self.factors)
            self.silences = silence_frames(counts, self.config.silence, seed=seed, epoch=epoch)

    def __call__(self, i: int, epochs_done: float) -> tuple[torch.Tensor, str | None]:
        """Return the features (T, F) float32 and the text of utterance i.

        epochs_done: so far, with a fraction; below augment.start_epoch only splice and speed apply.
        """
        raw, text = self.dataset.raw(i), self.dataset.texts[i]
        if self.splice is not None:
            generator = self._stream("splice", i)
            if generator.random() < self.config.splice:
                raw, text = self.splice(i, raw, generator)
        return self._features(i, epochs_done, raw), text

    def _stream(self, name: str, i: int) -> np.random.Generator:
        return random_stream(name, seed=self.seed, epoch=self.epoch, utterance=i)

    def _features(self, i: int, epochs_done: float, raw: torch.Tensor) -> torch.Tensor:
        """Return the augmented features of raw frames (T, F) of utterance i."""
        factor, blocks = None if self.factors is None else self.factors[i], self.dataset.blocks
        if epochs_done >= self.config.start_epoch:
            raw = self._warped(i, raw)
            if self.degrade and (degraded := self._degraded(self.degrade, i, raw, factor)) is not None:
                return self.augment.mask(degraded, self._stream("masks", i), blocks=blocks)
        features, generator = self.dataset.prepare(raw), self._stream("masks", i)
        return self.augment(features, epochs_done, generator, blocks=blocks, factor=factor)

    def _warped(self, i: int, raw: torch.Tensor) -> torch.Tensor:
        """Warp the frequency axis of the raw frames (T, F) of utterance i, if that is on."""
        if not (most := self.config.warp):
            return raw
        return warp_frequencies(raw, self._stream("warp", i).uniform(1 - most, 1 + most), self.dataset.features)

    def _degraded(self, degrade: Degrade, i: int, raw: torch.Tensor, factor: float | None) -> torch.Tensor | None:
        """Return the features of raw frames (T, F) at a speed, with rooms, noise and silence; None if utterance i gets
        none of them.

        The speed is changed first, so that noise keeps its texture, and normalisation comes last, as in decoding.
        """
        generator = self._stream("degrade", i)
        kinds, silence = degrade.draw(generator), self.silences[i].tolist()
        if not kinds and not any(silence):
            return None
        raw = raw if factor is None else change_speed(raw, factor)
        return self.dataset.prepare(degrade(raw, kinds, generator, silence=silence))
