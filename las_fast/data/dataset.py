"""A dataset: utterances of some splits with their frames and transcripts, loaded through the feature cache."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from las_fast.config import DataConfig, FeatureConfig
from las_fast.data.cache import CacheEntry, open_cache
from las_fast.data.corpus import Corpus, Utterance
from las_fast.data.features import check_settings
from las_fast.data.layouts import open_corpus as open_corpus  # scripts import it from here
from las_fast.data.normalisation import Statistics, model_input, statistics_of
from las_fast.data.readers import SKIP_HINT
from las_fast.data.symbols import are_phonemes
from las_fast.errors import InputError, show
from las_fast.progress import track
from las_fast.text import DIGITS, Vocabulary, has_lost_digits, normalise_text, training_remedy

MAX_SHOWN = 10  # skipped utterances that are listed; the rest are counted


class SpeechDataset(torch.utils.data.Dataset):
    """Utterances of one or more splits, in the order of the corpus; item i is (T, features.input_size) float32.

    Attributes:
        ids:          utterance ids.
        paths:        feature files or recordings.
        spans:        (start, end) in the recording, in seconds.
        texts:        transcripts, or None.
        frame_counts: (N,) int64 feature frames of each utterance, before augmentation.
        seconds:      (N,) float64 durations.
        listing:      (split, id) of every utterance of the splits, skipped ones included, in submission order.
        positions:    (N,) int64 position of each utterance in `listing`.
        skipped:      (id, reason) of utterances that were left out.
        statistics:   for normalisation "global", else None.
    """

    def __init__(self, parts: list[tuple[CacheEntry, np.ndarray]], features: FeatureConfig):
        """parts: cache entries, each with the indices of the utterances to keep."""
        self.features = features
        self.ids: list[str] = []
        self.listing: list[tuple[str, str]] = []
        self.paths: list[Path] = []
        self.spans: list[tuple[float, float]] = []
        self.texts: list[str | None] = []
        self.skipped: list[tuple[str, str]] = []
        self.statistics: Statistics | None = None
        self._entries = [entry for entry, _ in parts]
        self._part = np.concatenate([np.full(len(kept), k) for k, (_, kept) in enumerate(parts)])
        self._index = np.concatenate([kept for _, kept in parts]).astype(np.int64)
        self.frame_counts = np.concatenate([entry.frame_counts[kept] for entry, kept in parts])
        self.seconds = np.concatenate([entry.seconds[kept] for entry, kept in parts])
        before = np.cumsum([0, *(len(entry.ids) + len(entry.bad) for entry, _ in parts)])
        self.positions = np.concatenate([entry.positions[kept] + before[k] for k, (entry, kept) in enumerate(parts)])

    @property
    def feature_size(self) -> int:
        """Values per frame before deltas."""
        return self.features.size

    @property
    def blocks(self) -> int:
        """Equal blocks of a frame: the features, then each order of deltas."""
        return 1 + self.features.deltas

    def __len__(self) -> int:
        return len(self._index)

    def raw(self, i: int) -> torch.Tensor:
        """Load the frames (T, feature_size) float32 of utterance i before normalisation and deltas."""
        return torch.from_numpy(self._entries[self._part[i]].frames(int(self._index[i])))

    def recording_frame(self, i: int, frame: int) -> int:
        """Convert a frame number of utterance i to one of the recording, which has the trimmed silence too."""
        spans = self._entries[self._part[i]].spans[int(self._index[i])]
        for start, end in spans:
            if frame < end - start:
                return start + frame
            frame -= end - start
        return spans[-1][1] + frame if spans else frame

    def subset(self, indices: np.ndarray) -> SpeechDataset:
        """Return the utterances at `indices` as a dataset of their own, which has skipped none."""
        part = copy.copy(self)
        for name in ("ids", "paths", "spans", "texts"):
            setattr(part, name, [getattr(self, name)[i] for i in indices])
        for name in ("_part", "_index", "frame_counts", "seconds", "positions"):
            setattr(part, name, getattr(self, name)[indices])
        part.skipped = []
        return part

    def joined(self, other: SpeechDataset) -> SpeechDataset:
        """Return these utterances followed by those of another dataset with frames of the same kind.

        The statistics are still those of this dataset.
        """
        whole = copy.copy(self)
        for name in ("ids", "listing", "paths", "spans", "texts", "skipped", "_entries"):
            setattr(whole, name, getattr(self, name) + getattr(other, name))
        offsets = {"_part": len(self._entries), "positions": len(self.listing)}
        for name in ("_part", "_index", "frame_counts", "seconds", "positions"):
            added = getattr(other, name) + offsets.get(name, 0)
            setattr(whole, name, np.concatenate([getattr(self, name), added]))
        return whole

    def set_statistics(self, *, progress: bool = True) -> None:
        """Set `statistics` to those of all frames of these utterances."""
        numbers = track(range(len(self)), "statistics", "utterances", show=progress)
        self.statistics = statistics_of(self.raw(i) for i in numbers)

    def renew_statistics(self, dev: SpeechDataset, *, progress: bool = True) -> None:
        """Compute the statistics again, if there are any, for changed training data; dev gets them too."""
        if self.statistics is not None:
            self.set_statistics(progress=progress)
            dev.statistics = self.statistics

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.prepare(self.raw(i))

    def prepare(self, raw: torch.Tensor) -> torch.Tensor:
        """Normalise raw frames (T, feature_size) and append deltas."""
        return model_input(raw, self.features, self.statistics)


def load_dataset(
    corpus: Corpus,
    splits: tuple[str, ...],
    *,
    features: FeatureConfig,
    data: DataConfig,
    statistics: Statistics | None = None,
    need_text: bool,
    text_remedy: Callable[[list[str]], str] = training_remedy,
    progress: bool = True,
) -> SpeechDataset:
    """Load splits through the feature cache, which is built if needed.

    Args:
        splits:      names, or anything else that corpus.resolve takes.
        features:    how to compute frames; if the corpus has features, their size must equal features.size.
        data:        characters, normalise_text, on_bad, max_seconds, hours and cache are used.
        statistics:  of the training data, for normalisation "global"; None: compute them from these splits.
        need_text:   require a transcript within the vocabulary for every utterance; apply max_seconds and hours.
        text_remedy: returns what to do about characters outside the vocabulary, for the error.

    Raises:
        InputError: an utterance is bad and data.on_bad is "error" (the message names its file), no utterance is left,
                    the frame size is wrong, or there are fewer hours than data.hours.
    """
    _check_size(corpus, features)
    if not splits:
        raise InputError(f"{corpus.root}: expected at least one split; it has {', '.join(corpus.splits)}")
    splits = tuple(dict.fromkeys(name for split in splits for name in corpus.resolve(split)))
    check = _TextCheck(Vocabulary(data.characters), data.normalise_text, need_text, text_remedy)
    parts, skipped, listings = [], [], []
    for split in splits:
        listings.append(corpus.utterances(split))
        part, left_out = _load_split(corpus, split, listings[-1], features, data, check, progress)
        parts.append(part)
        skipped.append(left_out)
    names = _unique_names(splits, parts)
    if need_text and data.hours:
        parts = _draw_hours(parts, data.hours, "+".join(splits))
    dataset = SpeechDataset(parts, features)
    for k, ((entry, kept), utterances) in enumerate(zip(parts, listings, strict=True)):
        dataset.listing += [(splits[k], utterance.id) for utterance in utterances]
        dataset.ids += [names(k, entry.ids[i]) for i in kept]
        dataset.paths += [utterances[position].path for position in entry.positions[kept].tolist()]
        dataset.spans += [utterances[position].span for position in entry.positions[kept].tolist()]
        dataset.texts += [check.text(entry.texts[i]) for i in kept]
        dataset.skipped += [(names(k, name), reason) for name, reason in skipped[k]]
    _report_skipped(corpus, splits, dataset)
    if features.normalisation == "global":
        dataset.statistics = statistics
        if statistics is None:
            dataset.set_statistics(progress=progress)
    return dataset


def _check_size(corpus: Corpus, features: FeatureConfig) -> None:
    if corpus.kind == "audio":
        check_settings(features)
    elif corpus.feature_size != features.size:
        raise InputError(
            f"{corpus.root} ({corpus.name}) has {corpus.feature_size} features per frame, but the settings say "
            f"{features.size}; give --features.size {corpus.feature_size}, or data like that of the checkpoint"
        )


@dataclass(frozen=True)
class _TextCheck:
    """Checks a transcript; calling it returns the problem as a sentence that names the file, or ""."""

    vocabulary: Vocabulary
    normalise: bool
    needed: bool  # whether an utterance with a bad transcript is unusable
    remedy: Callable[[list[str]], str]  # what to do about characters outside the vocabulary

    def text(self, text: str | None) -> str | None:
        """Normalise a transcript for training or scoring; None if there is no text to score against."""
        if text is None or not self.normalise:
            return text if self.needed or (text and text.strip()) else None
        # Keep digits in references: they count as errors of a model that cannot write them.
        characters = self.vocabulary.characters + ("" if self.needed else DIGITS)
        return normalise_text(text, characters) or ("" if self.needed else None)

    def __call__(self, utterance: Utterance, text: str | None) -> str:
        if not self.needed:
            return ""
        raw, text = text, self.text(text)
        if raw is None or text is None:
            return f"{utterance.path} has no transcript; add it or remove the recording"
        source = utterance.transcript if isinstance(utterance.transcript, Path) else utterance.path
        if are_phonemes(raw.split()):
            return f"{source}: transcript {raw[:40]!r} contains phonemes, not letters; give data with spelled words"
        if self.normalise and has_lost_digits(raw, self.vocabulary.characters):
            return f"{source}: transcript {raw[:40]!r} contains digits, which are not in the vocabulary; spell them out"
        if not text.strip():
            return f"{source} has an empty transcript; fill it in or remove it"
        if unknown := self.vocabulary.unknown(text):
            return (
                f"{source}: transcript {text[:40]!r} has characters outside the vocabulary: "
                f"{' '.join(map(repr, unknown))}; {self.remedy(unknown)}"
            )
        return ""


def _load_split(
    corpus: Corpus,
    split: str,
    utterances: list[Utterance],
    features: FeatureConfig,
    data: DataConfig,
    check: _TextCheck,
    progress: bool,
) -> tuple[tuple[CacheEntry, np.ndarray], list[tuple[str, str]]]:
    """Load a split: its cache entry with the indices to keep, and (id, reason) of the other utterances."""
    if not utterances:
        raise InputError(f"{corpus.root}: split {split!r} has no recordings; expected at least one")
    if check.needed and not any(u.transcript or u.problem for u in utterances):
        raise InputError(f"{corpus.root}: split {split!r} has no transcripts; expected {corpus.expected_texts}")
    stop = data.on_bad == "error"
    duplicates = _duplicates(utterances)
    if stop:  # report known problems first: reading may take hours
        for position, u in enumerate(utterances):
            problem = u.problem or duplicates.get(position)
            problem = problem or ("" if isinstance(u.transcript, Path) else check(u, u.transcript))
            if problem:
                raise InputError(f"{problem}{SKIP_HINT}")
    entry = open_cache(
        corpus, split, utterances, features, folder=data.cache, check=check if stop else None, progress=progress
    )
    kept, skipped = [], [(name, reason) for name, reason, _ in entry.bad]
    for i, position in enumerate(entry.positions.tolist()):
        problem = duplicates.get(position) or check(utterances[position], entry.texts[i])
        if problem and stop:
            raise InputError(f"{problem}{SKIP_HINT}")
        if not problem and check.needed and 0 < data.max_seconds < entry.seconds[i]:
            problem = f"lasts {entry.seconds[i]:.1f} s, longer than data.max_seconds {data.max_seconds:g}"
        if problem:
            skipped.append((entry.ids[i], problem))
        else:
            kept.append(i)
    return (entry, np.array(kept, np.int64)), skipped


def _draw_hours(
    parts: list[tuple[CacheEntry, np.ndarray]], hours: float, splits: str
) -> list[tuple[CacheEntry, np.ndarray]]:
    """Draw random utterances of `hours` in total, at least one; a larger subset contains every smaller one."""
    seconds = np.concatenate([entry.seconds[kept] for entry, kept in parts])
    if hours * 3600 > seconds.sum():
        raise InputError(
            f"data.hours is {hours:g}, but {splits} has {seconds.sum() / 3600:.3g}; lower it, or set it to 0 for all"
        )
    order = np.random.default_rng(0).permutation(len(seconds))
    drawn = np.zeros(len(seconds), bool)
    drawn[order[: max(1, np.searchsorted(np.cumsum(seconds[order]), hours * 3600, side="right"))]] = True
    ends = np.cumsum([len(kept) for _, kept in parts])[:-1]
    return [(entry, kept[mask]) for (entry, kept), mask in zip(parts, np.split(drawn, ends), strict=True)]


def _duplicates(utterances: list[Utterance]) -> dict[int, str]:
    """Map the position of each utterance with the id of an earlier one to its problem."""
    first: dict[str, Utterance] = {}
    problems = {}
    for position, u in enumerate(utterances):
        if first.setdefault(u.id, u) is not u:
            both = dict.fromkeys((first[u.id].path, u.path))  # name a path once if both are the same
            problems[position] = f"the id {u.id!r} occurs twice ({', '.join(map(str, both))}); make ids distinct"
    return problems


def _unique_names(splits: tuple[str, ...], parts: list[tuple[CacheEntry, np.ndarray]]) -> Callable[[int, str], str]:
    """Return a function of (split index, id) that returns the id, or split/id if splits share ids."""
    all_ids = [name for entry, _ in parts for name in {*entry.ids, *(name for name, _, _ in entry.bad)}]
    shared = len(set(all_ids)) < len(all_ids)
    return lambda k, name: f"{splits[k]}/{name}" if shared else name


def _report_skipped(corpus: Corpus, splits: tuple[str, ...], dataset: SpeechDataset) -> None:
    skipped = dataset.skipped
    if skipped:
        print(f"{'+'.join(splits)}: left out {len(skipped)} of {len(dataset.listing)} utterances", file=sys.stderr)
        for name, reason in skipped[:MAX_SHOWN]:
            print(f"  {show(name)}: {show(reason)}", file=sys.stderr)
        if len(skipped) > MAX_SHOWN:
            print(f"  and {len(skipped) - MAX_SHOWN} more", file=sys.stderr)
    if not len(dataset):
        first = f"; the first reason: {skipped[0][1]}" if skipped else ""
        raise InputError(f"{corpus.root}: no utterance of {'+'.join(splits)} is usable{first}")
