"""One interface to every data layout: open_corpus recognises a root, load_dataset loads frames and transcripts."""

from __future__ import annotations

import os
import sys
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from las_fast.config import DataConfig, FeatureConfig
from las_fast.data import hw4p2, kaldi, librispeech, manifest, old_editions
from las_fast.data.cache import CacheEntry, open_cache
from las_fast.data.corpus import Corpus, Utterance, role_of
from las_fast.data.features import add_deltas, check_settings
from las_fast.data.folders import list_folder, subfolders
from las_fast.data.readers import SKIP_HINT
from las_fast.data.symbols import are_phonemes
from las_fast.errors import InputError, show
from las_fast.files import expand, nearest_path_hint
from las_fast.progress import track
from las_fast.text import DIGITS, Vocabulary, has_lost_digits, normalise_text

__all__ = ["Corpus", "SpeechDataset", "Statistics", "Utterance", "load_dataset", "normalise", "open_corpus",
           "count_shared_recordings", "count_overlapping"]  # fmt: skip

OVERLAP_TOLERANCE = 0.25  # seconds that adjacent parts of a recording may share
ARCHIVE_SUFFIXES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"}
MAX_FOLDERS = 100  # folders per level that are searched for data
MAX_SHOWN = 10  # skipped utterances that are listed; the rest are counted


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of the raw frames of the training split, for normalisation "global"."""

    mean: torch.Tensor  # (F,) float32
    std: torch.Tensor  # (F,) float32


def open_corpus(root: str | Path) -> Corpus:
    """Recognise a data root.

    Known layouts: an HW4P2 archive of any edition, LibriSpeech, Kaldi, Common Voice and Hugging Face audio folders, and
    manifests. The data may lie up to two folders below the root, and the root may be a single split. Raises InputError
    if the root is missing or empty, or has no known layout or several corpora.
    """
    root = expand(root)
    if root.name in ("", ".."):  # the layouts need the folder's name and parent
        root = Path(os.path.abspath(root))
    try:
        root.stat()
    except (OSError, ValueError) as error:
        raise InputError(_root_problem(root, error)) from None
    if root.is_file():
        return _open_file(root)
    if not root.is_dir():
        raise InputError(f"{root} is neither a folder nor a file; give the folder with the data")
    openers = _recognise(root)
    if not openers and len(manifest.find_tables(root)) < 2:
        openers = _recognise_below(root)
    if len(openers) > 1:
        raise InputError(f"{root} contains several archives or corpora; give one of {', '.join(openers)}")
    if not openers:
        raise InputError(_unrecognised(root))
    return next(iter(openers.values()))()


def _recognise(root: Path, *, strict: bool = False) -> dict[str, Callable[[], Corpus]]:
    """Map the path of each corpus in a folder to a function that opens it; only HW4P2 archives can be several.

    strict: accept a .tsv or .jsonl only if it has the columns of a manifest; otherwise opening it reports missing ones.
    """
    if archives := hw4p2.find_archives(root):
        return {str(archive): partial(hw4p2.open_archive, archive) for archive in archives}
    if folder := librispeech.find_librispeech(root):
        return {str(folder): partial(librispeech.open_librispeech, folder)}
    if folder := kaldi.find_kaldi(root):
        return {str(folder): partial(kaldi.open_kaldi, folder)}
    tables = manifest.find_tables(root)
    if strict and not all(manifest.has_path_column(table.path) for table in tables):
        return {}
    if len(tables) == 1 or (tables and all(table.split for table in tables)):
        return {str(tables[0].path.parent): partial(manifest.open_tables, tables)}
    return {}


def _recognise_below(root: Path) -> dict[str, Callable[[], Corpus]]:
    """Recognise the subfolders of a folder or, if none is a known layout, their subfolders."""
    level = [root]
    for _ in range(2):
        children = [child for folder in level for child in subfolders(folder)][:MAX_FOLDERS]
        distinct = {os.path.realpath(child): child for child in reversed(children)}  # count a link and its target once
        level = list(distinct.values())[::-1]
        openers: dict[str, Callable[[], Corpus]] = {}
        for folder in level:
            openers |= _recognise(folder, strict=True)
        if openers:
            return openers
    return {}


def _open_file(path: Path) -> Corpus:
    if path.suffix.lower() in manifest.SUFFIXES:
        return manifest.open_manifest(path)
    if (folder := kaldi.find_kaldi(path.parent)) and path.name in kaldi.FILES:
        return kaldi.open_kaldi(folder)
    if path.suffix.lower() == ".npy" and (advice := old_editions.advice(path.parent)):
        raise InputError(advice)
    endings = ", ".join(manifest.SUFFIXES)
    raise InputError(f"{path} is a file; expected a folder, or a manifest ending in {endings}")


def _root_problem(root: Path, error: Exception) -> str:
    """Return why a root cannot be opened; if it names a split of the corpus in its parent, how to select that split."""
    if role_of(root.name) and isinstance(error, (FileNotFoundError, NotADirectoryError)):
        with suppress(InputError):
            splits = "+".join(open_corpus(root.parent).resolve(root.name))
            return (
                f"{root} does not exist, but {root.parent} has a split {splits}; give {root.parent}, and the split "
                "with --split (in training --data.train and --data.dev)"
            )
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    what = "does not exist" if missing else f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    return f"{root} {what}; give the folder with the data{nearest_path_hint(root) if missing else ''}"


def _unrecognised(root: Path) -> str:
    """Return the error for a folder of no known layout: what was expected and what is there."""
    entries, tables = list_folder(root), manifest.find_tables(root)
    if advice := old_editions.advice(root):
        return advice
    layouts = ", ".join((hw4p2.LAYOUT, librispeech.LAYOUT, kaldi.LAYOUT))
    if len(tables) > 1:
        names = ", ".join(table.path.name for table in tables[:5])
        return (
            f"{root} has {len(tables)} manifests ({names}); give one of them, or name each after its split, such as "
            "train.tsv and dev.tsv"
        )
    closed = next((path for path in entries if path.is_dir() and not os.access(path, os.R_OK | os.X_OK)), None)
    if closed is not None:
        return f"{closed} cannot be listed: Permission denied; check its permissions"
    what = "has no known layout" if entries else "is empty"
    return f"{root} {what}; expected {layouts}, or {manifest.LAYOUT}{_hint(entries)}"


def _hint(entries: list[Path]) -> str:
    """Return advice for data in an unsupported form, as a clause that starts with "; ", or ""."""
    if table := next((path for path in entries if path.suffix.lower() in manifest.SUFFIXES), None):
        if not os.access(table, os.R_OK):
            return f"; {table.name} cannot be read; check its permissions"
        return f"; {table.name} has no column 'path' (or {', '.join(manifest.NAMES['path'][1:6])})"
    kinds = {path.suffix.lower() for path in entries}
    if suffixes := sorted(kinds & ARCHIVE_SUFFIXES):
        return f"; it has {', '.join(suffixes)} files; unpack them first"
    if suffixes := sorted(kinds & {".parquet", ".arrow"}):
        advice = "extract the recordings to files, with a metadata.csv in the same folder"
        return f"; it has {', '.join(suffixes)} files; {advice}"
    if kinds & librispeech.audio_suffixes():
        return "; it has recordings but no transcripts; write a manifest"
    return ""


class SpeechDataset(torch.utils.data.Dataset):
    """Utterances of one or more splits, in the order of the corpus; item i is (T, features.input_size) float32.

    Attributes:
        ids:          utterance ids.
        paths:        feature files or recordings.
        spans:        (start, end) in the recording, in seconds.
        texts:        transcripts, or None.
        frame_counts: (N,) int64 feature frames of each utterance, before augmentation.
        seconds:      (N,) float64 durations.
        positions:    (N,) int64 position of each utterance in the splits, skipped ones included.
        skipped:      (id, reason) of utterances that were left out.
        statistics:   for normalisation "global", else None.
    """

    def __init__(self, parts: list[tuple[CacheEntry, np.ndarray]], features: FeatureConfig):
        """parts: cache entries, each with the indices of the utterances to keep."""
        self.features = features
        self.ids: list[str] = []
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

    def __getitem__(self, i: int) -> torch.Tensor:
        return add_deltas(normalise(self.raw(i), self.features, self.statistics), self.features.deltas)


def normalise(frames: torch.Tensor, features: FeatureConfig, statistics: Statistics | None = None) -> torch.Tensor:
    """Shift and scale frames (T, F) to mean 0 and standard deviation 1, as features.normalisation says.

    A coefficient that is constant over the utterance becomes 0. "global" needs the statistics of the training split.
    """
    if features.normalisation == "none":
        return frames
    if features.normalisation == "global":
        if statistics is None:
            raise InputError("features.normalisation global needs the statistics of the training data; got none")
        return (frames - statistics.mean) / statistics.std
    std, mean = torch.std_mean(frames, dim=0, correction=0)
    return (frames - mean) / _safe_std(std, mean)


def _safe_std(std: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Replace standard deviations that are only rounding errors by infinity, so that dividing by them gives 0."""
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
    """Load splits through the feature cache, which is built if needed.

    Args:
        splits:     names, or anything else that corpus.resolve takes.
        features:   how to compute frames; if the corpus has features, their size must equal features.size.
        data:       characters, normalise_text, on_bad, max_seconds, hours and cache are used.
        statistics: of the training data, for normalisation "global"; None: compute them from these splits.
        need_text:  require a transcript within the vocabulary for every utterance; apply max_seconds and hours.

    Raises:
        InputError: an utterance is bad and data.on_bad is "error" (the message names its file), no utterance is left,
                    the frame size is wrong, or there are fewer hours than data.hours.
    """
    _check_size(corpus, features)
    if not splits:
        raise InputError(f"{corpus.root}: expected at least one split; it has {', '.join(corpus.splits)}")
    splits = tuple(dict.fromkeys(name for split in splits for name in corpus.resolve(split)))
    check = _TextCheck(Vocabulary(data.characters), data.normalise_text, need_text)
    parts, skipped, listings = [], [], []
    for split in splits:
        listings.append(corpus.utterances(split))
        part, left_out = _load_split(corpus, split, listings[-1], features, data, check, progress)
        parts.append(part)
        skipped.append(left_out)
    names = _unique_names(splits, parts)
    if need_text and data.hours:
        parts = _draw_hours(parts, data.hours, "+".join(splits))
    dataset = SpeechDataset([(entry, kept) for entry, kept in parts], features)
    for k, ((entry, kept), utterances) in enumerate(zip(parts, listings, strict=True)):
        dataset.ids += [names(k, entry.ids[i]) for i in kept]
        dataset.paths += [utterances[position].path for position in entry.positions[kept].tolist()]
        dataset.spans += [utterances[position].span for position in entry.positions[kept].tolist()]
        dataset.texts += [check.text(entry.texts[i]) for i in kept]
        dataset.skipped += [(names(k, name), reason) for name, reason in skipped[k]]
    _report_skipped(corpus, splits, dataset)
    if features.normalisation == "global":
        dataset.statistics = statistics or _statistics(dataset, progress)
    return dataset


def count_overlapping(first: SpeechDataset, second: SpeechDataset) -> int:
    """Count the utterances of `second` that overlap in time with an utterance of `first` from the same recording."""
    spans: dict[tuple, list[tuple[float, float]]] = {}
    for path, span in zip(first.paths, first.spans, strict=True):
        spans.setdefault(_file_identity(path), []).append(span)
    starts, ends = {}, {}
    for file, intervals in spans.items():
        intervals.sort()
        starts[file] = [start for start, _ in intervals]
        ends[file] = list(accumulate((end for _, end in intervals), max))
    overlapping = 0
    for path, (start, end) in zip(second.paths, second.spans, strict=True):
        file = _file_identity(path)
        margin = min(OVERLAP_TOLERANCE, (end - start) / 4)  # adjacent parts may touch
        before = bisect_left(starts.get(file, []), end - margin)
        overlapping += before > 0 and ends[file][before - 1] > start + margin
    return overlapping


def count_shared_recordings(first: SpeechDataset, second: SpeechDataset) -> int:
    """Count the recordings that have utterances in both datasets."""
    return len(set(map(_file_identity, first.paths)) & set(map(_file_identity, second.paths)))


def _file_identity(path: Path) -> tuple:
    """Return a key that is equal for a file and all links to it."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return (os.path.abspath(path),)
    return stat.st_dev, stat.st_ino


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
                f"{' '.join(map(repr, unknown))}; map them with --data.normalise-text True, or give --data.characters"
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
        total = len(dataset) + len(skipped)
        print(f"{'+'.join(splits)}: left out {len(skipped)} of {total} utterances", file=sys.stderr)
        for name, reason in skipped[:MAX_SHOWN]:
            print(f"  {show(name)}: {show(reason)}", file=sys.stderr)
        if len(skipped) > MAX_SHOWN:
            print(f"  and {len(skipped) - MAX_SHOWN} more", file=sys.stderr)
    if not len(dataset):
        first = f"; the first reason: {skipped[0][1]}" if skipped else ""
        raise InputError(f"{corpus.root}: no utterance of {'+'.join(splits)} is usable{first}")


def _statistics(dataset: SpeechDataset, progress: bool) -> Statistics:
    """Return mean and standard deviation over all frames, summed in float64 around the first frame for precision."""
    origin = dataset.raw(0)[0].double()
    total, squares = torch.zeros_like(origin), torch.zeros_like(origin)
    for i in track(range(len(dataset)), "statistics", "utterances", show=progress):
        frames = dataset.raw(i).double() - origin
        total += frames.sum(0)
        squares += frames.square().sum(0)
    count = int(dataset.frame_counts.sum())
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return Statistics((mean + origin).float(), _safe_std(std, mean + origin).float())
