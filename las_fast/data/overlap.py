"""Counts the recordings and utterances that two datasets share: dev scores on them say nothing about new speech."""

from __future__ import annotations

import os
from bisect import bisect_left
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from las_fast.data.dataset import SpeechDataset

TOLERANCE = 0.25  # seconds that adjacent parts of a recording may share


def count_overlapping(first: SpeechDataset, second: SpeechDataset) -> int:
    """Count the utterances of `second` that overlap in time with an utterance of `first` from the same recording."""
    spans: dict[tuple, list[tuple[float, float]]] = {}
    for path, span in zip(first.paths, first.spans, strict=True):
        spans.setdefault(file_identity(path), []).append(span)
    starts, ends = {}, {}
    for file, intervals in spans.items():
        intervals.sort()
        starts[file] = [start for start, _ in intervals]
        ends[file] = list(accumulate((end for _, end in intervals), max))
    overlapping = 0
    for path, (start, end) in zip(second.paths, second.spans, strict=True):
        file = file_identity(path)
        margin = min(TOLERANCE, (end - start) / 4)  # adjacent parts may touch
        before = bisect_left(starts.get(file, []), end - margin)
        overlapping += before > 0 and ends[file][before - 1] > start + margin
    return overlapping


def count_shared_recordings(first: SpeechDataset, second: SpeechDataset) -> int:
    """Count the recordings that have utterances in both datasets."""
    return len(set(map(file_identity, first.paths)) & set(map(file_identity, second.paths)))


def file_identity(path: Path) -> tuple:
    """Return a key that is equal for a file and all links to it."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return (os.path.abspath(path),)
    return stat.st_dev, stat.st_ino
