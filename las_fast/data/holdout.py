"""Hold out a part of the training data as the dev set."""

from __future__ import annotations

import numpy as np

from las_fast.data.dataset import SpeechDataset
from las_fast.data.overlap import recording_key
from las_fast.errors import InputError


def hold_out(data: SpeechDataset, share: float, *, progress: bool = True) -> tuple[SpeechDataset, SpeechDataset]:
    """Divide a training set at random into a training and a dev set; the same data is always divided in the same way.

    All utterances of a recording stay together. Statistics for normalisation "global" become those of the training set.

    Args:
        share: of the utterances, above 0 and below 1. The dev set gets at least as many, unless that is all recordings.

    Returns:
        train, dev: what was left out of `data` is reported in train.skipped.

    Raises:
        InputError: all utterances are from a single recording.
    """
    in_dev = np.zeros(len(data), bool)
    in_dev[_draw(_recordings(data), max(1, share * len(data)))] = True
    train, dev = data.subset(np.flatnonzero(~in_dev)), data.subset(np.flatnonzero(in_dev))
    if not len(train) or not len(dev):
        raise InputError(
            f"data.dev_share is {share:g}, but all training data is from one recording, so nothing can be held out; "
            "give more recordings, or a dev split"
        )
    train.skipped = data.skipped
    train.renew_statistics(dev, progress=progress)
    return train, dev


def _recordings(data: SpeechDataset) -> list[list[int]]:
    """Return the indices of the utterances of each recording."""
    recordings: dict[tuple, list[int]] = {}
    for i, path in enumerate(data.paths):
        recordings.setdefault(recording_key(path), []).append(i)
    return list(recordings.values())


def _draw(groups: list[list[int]], count: float) -> list[int]:
    """Draw groups at random until they have `count` members or one group is left; return the members."""
    drawn: list[int] = []
    for k in np.random.default_rng(0).permutation(len(groups))[:-1]:
        if len(drawn) >= count:
            break
        drawn += groups[k]
    return drawn
