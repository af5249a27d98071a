"""Hold out a part of the training data as the dev set."""

from __future__ import annotations

import numpy as np

from las_fast.data.dataset import SpeechDataset
from las_fast.data.normalisation import statistics_of
from las_fast.data.overlap import file_identity
from las_fast.errors import InputError
from las_fast.progress import track


def hold_out(data: SpeechDataset, share: float, *, progress: bool = True) -> tuple[SpeechDataset, SpeechDataset]:
    """Divide a training set at random, the same way each time, into training and dev sets.

    All utterances of a recording stay together. Statistics for normalisation "global" become those of the training set.

    Args:
        share: least share of the utterances in the dev set.

    Raises:
        InputError: the data is a single recording.
    """
    is_held = np.zeros(len(data), bool)
    is_held[_draw(_recordings(data), max(1, share * len(data)))] = True
    train, dev = data.subset(np.flatnonzero(~is_held)), data.subset(np.flatnonzero(is_held))
    if not len(train) or not len(dev):
        raise InputError(
            f"data.dev_share is {share:g}, but all training data is from one recording, so nothing can be held out; "
            "give more recordings, or a dev split"
        )
    train.skipped = data.skipped
    if data.statistics is not None:
        numbers = track(range(len(train)), "statistics", "utterances", show=progress)
        train.statistics = dev.statistics = statistics_of(train.raw(i) for i in numbers)
    return train, dev


def _recordings(data: SpeechDataset) -> list[list[int]]:
    """Return the utterances of each recording."""
    recordings: dict[tuple, list[int]] = {}
    for i, path in enumerate(data.paths):
        recordings.setdefault(file_identity(path), []).append(i)
    return list(recordings.values())


def _draw(groups: list[list[int]], count: float) -> list[int]:
    """Draw groups at random until they have `count` members; one group is never drawn."""
    drawn: list[int] = []
    for k in np.random.default_rng(0).permutation(len(groups))[:-1]:
        if len(drawn) >= count:
            break
        drawn += groups[k]
    return drawn
