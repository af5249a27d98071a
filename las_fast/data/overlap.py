"""What two datasets share: recordings, utterances or texts. Dev scores on it say little about other speech."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from las_fast.errors import InputError
from las_fast.progress import track
from las_fast.text import normalise_text

if TYPE_CHECKING:
    from las_fast.data.dataset import SpeechDataset

TOLERANCE = 0.25  # seconds that adjacent parts of a recording may share
COMMON_WORDS = 6  # sentences with this many words in a row in common overlap


def count_overlap(first: SpeechDataset, second: SpeechDataset) -> tuple[int, int]:
    """Count what two datasets share.

    Returns:
        The number of utterances of `second` that overlap in time with an utterance of `first` from the same recording,
        and the number of recordings that have utterances in both.
    """
    spans: dict[tuple, list[tuple[float, float]]] = {}
    for path, span in zip(track(first.paths, "comparing recordings", "files"), first.spans, strict=True):
        spans.setdefault(recording_key(path), []).append(span)
    starts, ends = {}, {}
    for file, intervals in spans.items():
        intervals.sort()
        starts[file] = [start for start, _ in intervals]
        ends[file] = list(accumulate((end for _, end in intervals), max))
    overlapping = 0
    files = list(map(recording_key, second.paths))
    for file, (start, end) in zip(files, second.spans, strict=True):
        margin = min(TOLERANCE, (end - start) / 4)  # adjacent parts may touch
        before = bisect_left(starts.get(file, []), end - margin)
        overlapping += before > 0 and ends[file][before - 1] > start + margin
    return overlapping, len(spans.keys() & set(files))


def recording_key(path: Path) -> tuple:
    """Return a key that is equal for a file and all links to it."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return (os.path.abspath(path),)
    return stat.st_dev, stat.st_ino


class Excluded:
    """Sentences that other texts, such as those of a training, must not overlap with.

    Args:
        texts:      the sentences.
        characters: to which they are mapped; the other texts must be in them already.
    """

    def __init__(self, texts: Iterable[str], characters: str):
        mapped = [normalise_text(text, characters) for text in texts]
        self.sentences = set(mapped)
        self.runs = {run for text in mapped for run in word_runs(text)}

    def overlaps(self, text: str) -> bool:
        """Return whether a text is one of the sentences, or shares COMMON_WORDS words in a row with one."""
        return " ".join(text.split()) in self.sentences or not self.runs.isdisjoint(word_runs(text))


def word_runs(text: str) -> Iterator[tuple[str, ...]]:
    """Yield every COMMON_WORDS words in a row."""
    words = text.split()
    return zip(*(words[i:] for i in range(COMMON_WORDS)), strict=False)


def without_shared_texts(train: SpeechDataset, dev: SpeechDataset, characters: str) -> SpeechDataset:
    """Return `train` without the utterances whose transcripts overlap with one of dev; these are added to `skipped`.

    Statistics for normalisation "global" become those of the result, also in `dev`.

    Raises:
        InputError: none is left.
    """
    excluded = Excluded(filter(None, dev.texts), characters)
    shared = np.array([excluded.overlaps(text or "") for text in train.texts], bool)
    if shared.all():
        raise InputError(
            f"data.shared_texts drop leaves no training utterance: the transcripts of all {len(train)} overlap with "
            "those of dev; choose another dev set by --data.dev or --data.dev-share 0.1, or set data.shared_texts to "
            "keep"
        )
    kept = train.subset(np.flatnonzero(~shared))
    reason = "its transcript overlaps with one of dev (data.shared_texts)"
    kept.skipped = train.skipped + [(train.ids[i], reason) for i in np.flatnonzero(shared)]
    kept.renew_statistics(dev)
    return kept
