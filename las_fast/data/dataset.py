"""One interface to every kind of data: open_corpus recognises a root, load_dataset gives normalised frames and texts."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from las_fast.config import DataConfig, FeatureConfig
from las_fast.data import hw4p2, librispeech, manifest
from las_fast.data.cache import CacheEntry, open_cache
from las_fast.data.corpus import Corpus, Utterance
from las_fast.errors import InputError
from las_fast.features import add_deltas, check_settings
from las_fast.text import Vocabulary, normalise_text

__all__ = ["Corpus", "SpeechDataset", "Statistics", "Utterance", "load_dataset", "normalise", "open_corpus"]

LISTED = 10  # skipped utterances that are named; the rest are counted


@dataclass(frozen=True)
class Statistics:
    """Of the training split's raw frames, for normalisation "global"."""

    mean: torch.Tensor  # (F,) float32
    std: torch.Tensor  # (F,) float32


def open_corpus(root: str | Path) -> Corpus:
    """Recognise a data root: an HW4P2 archive of any edition, a LibriSpeech folder, or a manifest or a folder with one.

    An archive may also lie up to two folders below the root, or the root may be one of its splits. Raises InputError
    when the root is missing or empty, or when nothing or more than one thing is found.
    """
    root = Path(root).expanduser()
    if root.is_file():
        if root.suffix.lower() not in manifest.SUFFIXES:
            raise InputError(f"{root} is a file; expected a folder, or a manifest ending in {' or '.join(manifest.SUFFIXES)}")
        return manifest.open_manifest(root)
    if not root.is_dir():
        raise InputError(f"{root} does not exist; give the folder that holds the data")
    archives = hw4p2.find_archives(root)
    if len(archives) > 1:
        raise InputError(f"{root} holds several archives; give one of {', '.join(map(str, archives))}")
    if archives:
        return hw4p2.open_archive(archives[0])
    if folder := librispeech.find_librispeech(root):
        return librispeech.open_librispeech(folder)
    manifests = manifest.find_manifests(root)
    if len(manifests) == 1:
        return manifest.open_manifest(manifests[0])
    what = "is empty" if next(root.iterdir(), None) is None else "has no layout that is known"
    if manifests:
        what = f"has {len(manifests)} manifests"
    raise InputError(f"{root} {what}; looked for {hw4p2.LAYOUT}, {librispeech.LAYOUT}, and {manifest.LAYOUT}")


class SpeechDataset(torch.utils.data.Dataset):
    """Utterances of one or more splits, in the corpus's order; item i is (T, features.input_size) float32.

    ids: names; texts: transcripts or None; frames: (N,) int64 raw frames; seconds: (N,) float64; skipped: (id, reason) of
    what was left out; positions: (N,) int64 row of each utterance, counting what was left out; statistics: for
    normalisation "global", else None.
    """

    def __init__(self, parts: list[tuple[CacheEntry, np.ndarray]], features: FeatureConfig):
        """parts: cache entries, each with the indices in it that take part."""
        self.features = features
        self.ids: list[str] = []
        self.texts: list[str | None] = []
        self.skipped: list[tuple[str, str]] = []
        self.statistics: Statistics | None = None
        self._entries = [entry for entry, _ in parts]
        self._part = np.concatenate([np.full(len(kept), k) for k, (_, kept) in enumerate(parts)])
        self._index = np.concatenate([kept for _, kept in parts]).astype(np.int64)
        self.frames = np.concatenate([entry.lengths[kept] for entry, kept in parts])
        self.seconds = np.concatenate([entry.seconds[kept] for entry, kept in parts])
        before = np.cumsum([0, *(len(entry.ids) + len(entry.bad) for entry, _ in parts)])
        self.positions = np.concatenate([entry.places[kept] + before[k] for k, (entry, kept) in enumerate(parts)])

    @property
    def feature_size(self) -> int:
        """Values per frame before deltas."""
        return self.features.size

    @property
    def blocks(self) -> int:
        """Equal blocks in a frame: the features, then each order of deltas."""
        return 1 + self.features.deltas

    def __len__(self) -> int:
        return len(self._index)

    def raw(self, i: int) -> torch.Tensor:
        """Return the frames (T, feature_size) float32 of utterance i before normalisation."""
        return torch.from_numpy(self._entries[self._part[i]].frames(int(self._index[i])))

    def __getitem__(self, i: int) -> torch.Tensor:
        return add_deltas(normalise(self.raw(i), self.features, self.statistics), self.features.deltas)


def normalise(frames: torch.Tensor, features: FeatureConfig, statistics: Statistics | None = None) -> torch.Tensor:
    """Shift and scale frames (T, F) to mean 0 and deviation 1 as features.normalisation says.

    A coefficient that is constant over the utterance becomes 0. "global" needs the statistics of the training split.
    """
    if features.normalisation == "none":
        return frames
    if features.normalisation == "global":
        if statistics is None:
            raise InputError("features.normalisation global needs the statistics of the training data, and there are none")
        return (frames - statistics.mean) / statistics.std
    std, mean = torch.std_mean(frames, dim=0, correction=0)
    return (frames - mean) / _safe(std, mean)


def _safe(std: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Replace deviations that are only rounding by infinity: dividing by it gives 0."""
    return torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.inf)


def load_dataset(
    corpus: Corpus,
    splits: tuple[str, ...],
    *,
    features: FeatureConfig,
    data: DataConfig,
    statistics: Statistics | None = None,
    need_text: bool,
    progress: bool = True,
) -> SpeechDataset:
    """Load splits through the feature cache, building it where needed.

    Args:
        splits:     names, as corpus.resolve returns them.
        features:   a frame; size must be that of the corpus where the corpus brings features.
        data:       characters, normalise_text, on_bad, max_seconds and cache are used.
        statistics: of the training data, for normalisation "global"; None computes them from these splits.
        need_text:  every utterance must have a transcript that the vocabulary covers; max_seconds applies.

    Raises:
        InputError: bad data with data.on_bad "error" (the first bad file is named), nothing left, wrong frame size.
    """
    _check_size(corpus, features)
    if not splits:
        raise InputError(f"{corpus.root}: no split was named; it has {', '.join(corpus.splits)}")
    stop = data.on_bad == "error"
    entries = [
        open_cache(corpus, split, features, folder=data.cache, stop_at_bad=stop, progress=progress) for split in splits
    ]
    names = _unique_names(splits, entries)
    parts, ids, texts, skipped = [], [], [], []
    vocabulary = Vocabulary(data.characters)
    for split, entry in zip(splits, entries, strict=True):
        skipped += [(names[split, name], reason) for name, reason, _ in entry.bad]
        kept, seen = [], set()
        for i, name in enumerate(entry.ids):
            text = entry.texts[i]
            if text is not None and data.normalise_text:
                text = normalise_text(text, data.characters)
            problem = f"{corpus.root} split {split} has utterance {name} twice; ids must differ" if name in seen else ""
            seen.add(name)
            problem = problem or (need_text and _text_problem(corpus, split, name, text, vocabulary)) or ""
            if problem and stop:
                raise InputError(f"{problem}; or leave such utterances out with --data.on-bad skip")
            if not problem and need_text and 0 < data.max_seconds < entry.seconds[i]:
                problem = f"{entry.seconds[i]:.1f} seconds are more than data.max_seconds {data.max_seconds:g}"
            if problem:
                skipped.append((names[split, name], problem))
                continue
            kept.append(i)
            ids.append(names[split, name])
            texts.append(text)
        parts.append((entry, np.array(kept, np.int64)))
    _report(corpus, splits, len(ids), skipped)
    dataset = SpeechDataset(parts, features)
    dataset.ids, dataset.texts, dataset.skipped = ids, texts, skipped
    if features.normalisation == "global":
        dataset.statistics = statistics or _statistics(dataset, progress)
    return dataset


def _check_size(corpus: Corpus, features: FeatureConfig) -> None:
    if corpus.kind == "audio":
        check_settings(features)
    elif corpus.feature_size != features.size:
        raise InputError(
            f"{corpus.root} ({corpus.name}) has {corpus.feature_size} features a frame, the settings say {features.size}; "
            f"give --features.size {corpus.feature_size}, or the data that the checkpoint was trained on"
        )


def _unique_names(splits: tuple[str, ...], entries: list[CacheEntry]) -> dict[tuple[str, str], str]:
    """Map (split, id) to a name that is unique over the splits: the id, or split/id where splits share ids."""
    per_split = [(split, {*entry.ids, *(row[0] for row in entry.bad)}) for split, entry in zip(splits, entries, strict=True)]
    counts = Counter(name for _, names in per_split for name in names)
    shared = any(count > 1 for count in counts.values())
    return {(split, name): f"{split}/{name}" if shared else name for split, names in per_split for name in names}


def _text_problem(corpus: Corpus, split: str, name: str, text: str | None, vocabulary: Vocabulary) -> str:
    where = f"{corpus.root} split {split}, utterance {name}"
    if text is None:
        return f"{where} has no transcript; add it or remove the recording"
    if not text.strip():
        return f"{where} has an empty transcript; fill it in or remove the recording"
    if unknown := vocabulary.unknown(text):
        return (
            f"{where}: transcript {text[:40]!r} has characters outside the vocabulary: {' '.join(map(repr, unknown))}; "
            "map them with --data.normalise-text True, give --data.characters"
        )
    return ""


def _report(corpus: Corpus, splits: tuple[str, ...], kept: int, skipped: list[tuple[str, str]]) -> None:
    if skipped:
        print(f"{'+'.join(splits)}: left out {len(skipped)} of {kept + len(skipped)} utterances", file=sys.stderr)
        for name, reason in skipped[:LISTED]:
            print(f"  {name}: {reason}", file=sys.stderr)
        if len(skipped) > LISTED:
            print(f"  and {len(skipped) - LISTED} more", file=sys.stderr)
    if not kept:
        first = f"; the first reason: {skipped[0][1]}" if skipped else ""
        raise InputError(f"{corpus.root}: no utterance of {'+'.join(splits)} can be used{first}")


def _statistics(dataset: SpeechDataset, progress: bool) -> Statistics:
    """Return mean and deviation over all frames; sums are float64, around the first frame so that they stay exact."""
    origin = dataset.raw(0)[0].double()
    total, squares = torch.zeros_like(origin), torch.zeros_like(origin)
    for i in tqdm(range(len(dataset)), "statistics", unit="utt", disable=not progress, leave=False):
        frames = dataset.raw(i).double() - origin
        total += frames.sum(0)
        squares += frames.square().sum(0)
    count = int(dataset.frames.sum())
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return Statistics((mean + origin).float(), _safe(std, mean + origin).float())
