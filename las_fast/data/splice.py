"""Replace words of training utterances by words of other utterances: new texts, spoken by real voices.

This is the aligned data augmentation of Lam et al. (2021), without its choice of the new word by a language model. A
word is replaced by one of nearly the same length, which is stretched to exactly that length and moved to the mean frame
of the utterance, so that the channel and the level fit. An utterance keeps its number of frames.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from las_fast.data.npy import LOAD_ERRORS
from las_fast.data.silence import frames_in
from las_fast.errors import InputError
from las_fast.files import write_atomically

if TYPE_CHECKING:
    from las_fast.data.dataset import SpeechDataset

WORD_SHARE = 0.25  # words replaced in an utterance that is spliced, on average
MAX_STRETCH = 0.2  # largest difference in length between a word and its replacement, as a share of the word's
SECONDS = (0.08, 1.2)  # shortest and longest replacement; outside, the boundaries are often wrong
MIN_LOG_PROB = -1.0  # mean of the characters of a word under the CTC head, nats; below, the boundaries are unsure


@dataclass(frozen=True)
class WordTable:
    """The N words of a training set with their frames, by utterance, in the order of the transcripts.

    spans and frames are the first, and the last + 1.
    """

    utterances: np.ndarray  # (N,) int32 index into the dataset
    spans: np.ndarray  # (N, 2) int32 characters of the transcript
    frames: np.ndarray  # (N, 2) int32 feature frames
    log_probs: np.ndarray  # (N,) float32 mean log-probability of the characters under the CTC head

    def save(self, path: Path, data: str) -> None:
        """Write the table as an .npz file; data is the fingerprint of the dataset."""

        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                np.savez(file, data=data, **vars(self))

        write_atomically(path, write)

    @classmethod
    def load(cls, path: Path, data: str) -> WordTable:
        """Read a table; InputError if the file is damaged or is of a dataset with another fingerprint."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                if str(arrays["data"]) == data:
                    return cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except (OSError, MemoryError):  # explained by the command; the file may be good
            raise
        except (*LOAD_ERRORS, KeyError, AttributeError):
            raise InputError(f"{path} is damaged; delete it, and the words will be aligned again") from None
        raise InputError(f"{path} is of another training set; delete it, and the words will be aligned again")


class Splice:
    """Replaces words; the result is a function of the utterance and the state of the generator.

    Args:
        dataset: with transcripts.
        table:   its words.
    """

    def __init__(self, dataset: SpeechDataset, table: WordTable):
        self.dataset, self.table = dataset, table
        self._first = np.searchsorted(table.utterances, np.arange(len(dataset) + 1))
        self._sure = table.log_probs >= MIN_LOG_PROB
        shortest, longest = (frames_in(seconds, dataset.features) for seconds in SECONDS)
        lengths = table.frames[:, 1] - table.frames[:, 0]
        candidates = np.flatnonzero(self._sure & (lengths >= shortest) & (lengths <= longest))
        self._candidates = candidates[np.argsort(lengths[candidates], kind="stable")]
        self._lengths = lengths[self._candidates]  # ascending

    @property
    def candidates(self) -> int:
        """Words that can replace others."""
        return len(self._candidates)

    def __call__(self, i: int, raw: Tensor, generator: np.random.Generator) -> tuple[Tensor, str | None]:
        """Return frames (T, F) and text of utterance i with some of its words replaced.

        A word stays if its frames are unsure, or if there is no word of nearly its length.

        Args:
            raw: (T, F) frames of the utterance, dataset.raw(i).
        """
        frames, mean, text = raw.clone(), raw.mean(0), self.dataset.texts[i]
        rows = np.arange(self._first[i], self._first[i + 1])
        rows = rows[(generator.random(len(rows)) < WORD_SHARE) & self._sure[rows]]
        for row in rows[::-1]:  # from the end, so that the spans of the others stay valid
            start, end = self.table.frames[row].tolist()
            other = self._draw(end - start, generator)
            if other is not None and text is not None:
                frames[start:end] = self._stretched(other, end - start) + mean
                first, last = self.table.spans[row].tolist()
                text = text[:first] + self._word(other) + text[last:]
        return frames, text

    def _draw(self, length: int, generator: np.random.Generator) -> int | None:
        """Draw the row of a word of nearly `length` frames; None if there is none."""
        first = np.searchsorted(self._lengths, length * (1 - MAX_STRETCH), side="left")
        last = np.searchsorted(self._lengths, length * (1 + MAX_STRETCH), side="right")
        return int(self._candidates[generator.integers(first, last)]) if last > first else None

    def _stretched(self, row: int, length: int) -> Tensor:
        """Return the frames of a word, stretched to (length, F), less the mean frame of its utterance."""
        raw, (start, end) = self.dataset.raw(int(self.table.utterances[row])), self.table.frames[row].tolist()
        word = raw[start:end] - raw.mean(0)
        if len(word) == length:
            return word
        return torch.nn.functional.interpolate(word.T[None], size=length, mode="linear")[0].T

    def _word(self, row: int) -> str:
        first, last = self.table.spans[row].tolist()
        return (self.dataset.texts[self.table.utterances[row]] or "")[first:last]
