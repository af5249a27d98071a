"""The feature cache: each split is read, checked and converted to frames once, then memory-mapped.

An entry is a folder with features.f32 (the raw frames of all good utterances, concatenated, float32) and index.json
(ids, texts, frame counts, seconds, and the bad utterances with reasons). Its name contains a hash of everything it
depends on. It is built under a hidden name and renamed when complete, so an interrupt leaves no incomplete entry.

An utterance may be bad for a reason outside its file: a package is missing, or a permission. Bad utterances are
therefore read again whenever their entry is opened. If one is good now, a new entry is built as NAME.1, NAME.2, ...
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from las_fast.config import FeatureConfig
from las_fast.data.corpus import Corpus, Utterance
from las_fast.data.readers import SKIP_HINT, read_utterance, read_utterances
from las_fast.errors import InputError
from las_fast.files import expand, try_lock
from las_fast.progress import ProgressBar, track
from las_fast.system import cores

VERSION = 2  # increment when the meaning of the stored frames or of the index changes
UNUSED_SECONDS = 30 * 24 * 3600  # time without use after which the next build of the split removes an entry
ABANDONED_SECONDS = 48 * 3600  # age at which an unfinished build by another host counts as dead
DROP_BYTES = 32 << 20  # bytes read between releases of mapped pages, which count towards the memory of this process


@dataclass
class CacheEntry:
    """A complete entry; frames(i) reads from the memory map on demand."""

    folder: Path
    size: int  # F, values per frame
    ids: list[str]
    texts: list[str | None]
    frame_counts: np.ndarray  # (N,) int64
    seconds: np.ndarray  # (N,) float64
    positions: np.ndarray  # (N,) int64 index in the split, bad utterances included
    spans: list[list[tuple[int, int]]]  # (start, end) of the frames kept from the recording; empty if none were trimmed
    bad: list[tuple[str, str, int]]  # id, reason, position

    def __post_init__(self):
        self._starts = np.concatenate([[0], np.cumsum(self.frame_counts)])
        self._read = 0

    @cached_property
    def _map(self) -> mmap.mmap:
        with (self.folder / "features.f32").open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def frames(self, i: int) -> np.ndarray:
        """Return a copy of the frames (T, F) float32 of utterance i."""
        count = int(self.frame_counts[i]) * self.size
        frames = np.frombuffer(self._map, np.float32, count, int(self._starts[i]) * self.size * 4).copy()
        self._read += count * 4
        if self._read > DROP_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read = 0
        return frames.reshape(-1, self.size)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_map"}  # a map cannot be pickled


def cache_folder(setting: str) -> Path:
    """Return the folder of the cache: the setting, or las_fast in the user's cache folder."""
    if setting:
        return expand(setting)
    try:
        return expand(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "las_fast"
    except RuntimeError:  # neither HOME nor an entry in the user database
        raise InputError(
            "the feature cache needs a folder, but no home folder is known; set XDG_CACHE_HOME to a writable folder "
            "(in training also --data.cache)"
        ) from None


def open_cache(
    corpus: Corpus,
    split: str,
    utterances: Sequence[Utterance],
    features: FeatureConfig,
    *,
    folder: str = "",
    check: Callable[[Utterance, str | None], str] | None = None,
    progress: bool = True,
    workers: int | None = None,
) -> CacheEntry:
    """Open the cache entry of a split; build it if there is none, or if a bad utterance of it is good now.

    Args:
        utterances: of the split, from corpus.utterances.
        folder:     of the cache; empty: the user's cache folder.
        check:      function of an utterance and its text that returns a problem or "". If given, the first bad
                    utterance raises; if None, bad utterances are recorded in the entry.
        workers:    processes that read and compute; default: one per core.

    Raises:
        InputError: an utterance is bad and check is given, or the cache cannot be written.
    """
    cache = cache_folder(folder)
    name = f"{re.sub(r'[^A-Za-z0-9.-]+', '-', split)[:40]}-{_key(corpus, utterances, features)}"
    target, following = _newest(cache / name)
    entry = _read_entry(target)
    if entry and entry.bad:
        again = _first_still_bad if check else _all_still_bad
        entry = again(entry, _present_problems(entry, corpus, utterances, features))  # None: build it again
        target = target if entry else following
    if entry is None:
        entry = _new_entry(target, corpus, split, utterances, features, check, progress, workers)
    with suppress(OSError):  # a cache may be read-only
        os.utime(target / "index.json")  # time of last use
    if check and entry.bad:
        raise InputError(f"{entry.bad[0][1]}{SKIP_HINT}")
    return entry


def _newest(first: Path) -> tuple[Path, Path]:
    """Return the newest of the entries FIRST, FIRST.1, FIRST.2, ..., and the one after it.

    Each has its own name, because a running command may still read the one before.
    """
    suffixes = [path.suffix[1:] for path in first.parent.glob(f"{first.name}.*")]
    last = max((int(suffix) for suffix in suffixes if suffix.isdecimal()), default=0)
    return first.with_name(f"{first.name}.{last}") if last else first, first.with_name(f"{first.name}.{last + 1}")


def _present_problems(
    entry: CacheEntry, corpus: Corpus, utterances: Sequence[Utterance], features: FeatureConfig
) -> Iterator[tuple[str, str, int]]:
    """Read the bad utterances of an entry again; yield each with its present problem, "" if it can be used now."""
    for name, _, position in track(entry.bad, "reading bad utterances again", "utterances"):
        yield name, read_utterance(corpus, utterances[position], features).problem, position


def _first_still_bad(entry: CacheEntry, problems: Iterable[tuple[str, str, int]]) -> CacheEntry | None:
    """Return the entry with its first utterance that is still bad, which ends the command; None if there is none."""
    first = next((bad for bad in problems if bad[1]), None)
    return replace(entry, bad=[first]) if first else None


def _all_still_bad(entry: CacheEntry, problems: Iterable[tuple[str, str, int]]) -> CacheEntry | None:
    """Return the entry with the present problems of all its bad utterances; None if one of them can be used now."""
    bad = list(takewhile(lambda bad: bad[1], problems))
    return replace(entry, bad=bad) if len(bad) == len(entry.bad) else None


def _new_entry(target: Path, corpus, split, utterances, features, check, progress, workers) -> CacheEntry:
    try:
        _build(target, corpus, split, utterances, features, check, progress, workers)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(
            f"the feature cache {target.parent} cannot be written ({reason}); free some space, or set XDG_CACHE_HOME "
            "to another folder (in training also --data.cache)"
        ) from None
    entry = _read_entry(target)
    if entry is None:
        raise InputError(f"the feature cache {target} was removed or damaged while in use; run again")
    _remove_unused(target, corpus, split)
    if progress:
        size = (target / "features.f32").stat().st_size / 1e6
        print(f"feature cache of {split}: {target} ({size:.1f} MB)", file=sys.stderr)
    return entry


def _key(corpus: Corpus, utterances: Sequence[Utterance], features: FeatureConfig) -> str:
    """Return a hash of what an entry depends on: path, size and mtime of each file, texts, and relevant settings."""
    settings: list[Any] = [VERSION, corpus.kind, corpus.transposed, corpus.feature_size]
    settings.append(features.shift_ms)
    if corpus.kind == "audio":
        settings += [features.kind, features.size, features.sample_rate, features.window_ms]
        settings += [features.mel_bins if features.kind == "mfcc" else 0, features.trim_silence]
        settings += [features.lifter] if features.kind == "mfcc" else []
    digest = hashlib.sha256(json.dumps(settings).encode())
    real_folder = lru_cache(maxsize=1024)(os.path.realpath)
    for u in utterances:
        text = [u.transcript] if not isinstance(u.transcript, Path) else _stamp(u.transcript, real_folder)
        span = [u.seconds, u.start, u.is_part] if corpus.kind == "audio" else []
        digest.update(json.dumps([u.id, *_stamp(u.path, real_folder), *text, *span, u.problem]).encode())
    return digest.hexdigest()[:20]


def _stamp(path: Path, real_folder: Callable[[str], str]) -> list:
    """Return the path, size and mtime of a file. Links to folders are resolved, because their targets may change."""
    folder, name = os.path.split(path)
    full = os.path.join(real_folder(folder), name)
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return [full, -1, 0]
    return [full, stat.st_size, stat.st_mtime_ns]


def _read_entry(target: Path) -> CacheEntry | None:
    """Read an entry; None if it is missing, damaged or inconsistent."""
    try:
        index = json.loads((target / "index.json").read_text(encoding="utf-8"))
        size = (target / "features.f32").stat().st_size
        entry = CacheEntry(
            folder=target,
            size=index["size"],
            ids=index["ids"],
            texts=index["texts"],
            frame_counts=np.array(index["frames"], np.int64),
            seconds=np.array(index["seconds"], np.float64),
            positions=np.array(index["places"], np.int64),
            spans=[[tuple(span) for span in row] for row in index["spans"]],
            bad=[tuple(row) for row in index["bad"]],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return entry if size == int(entry.frame_counts.sum()) * entry.size * 4 else None


def _build(target, corpus, split, utterances, features, check, progress, workers) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent)
    unique = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    scratch = target.parent / f".building-{target.name}-{unique}"
    scratch.mkdir()
    try:
        with _locked(scratch / "features.f32"):
            items = read_utterances(corpus, utterances, features, scratch, workers or cores())
            bar = ProgressBar(len(utterances), f"reading {split}", "utterances", show=progress)
            with closing(items), bar:  # closing items ends the workers
                index = _write_features(scratch / "features.f32", items, utterances, check, bar)
            size = features.size if corpus.kind == "audio" else corpus.feature_size
            index = {"root": os.path.abspath(corpus.root), "split": split, "size": size, **index}
            (scratch / "index.json").write_text(json.dumps(index), encoding="utf-8")
            if target.exists() and _read_entry(target) is None:
                target.rename(scratch / "damaged")
            with suppress(OSError):  # another process may have finished the same entry first: use that one
                scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(target / "damaged", ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Create a file and keep it locked, so that _remove_abandoned of another container sees that this build runs."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        try_lock(file.fileno())  # nobody else knows the file yet
        new.rename(path)  # only now, so that nobody finds it unlocked
        yield


def _is_locked(path: Path) -> bool | None:
    """Return whether a process has locked a file; None if there is no such file or the file system has no locks."""
    try:
        with path.open("rb+") as file:  # NFS locks only files that are open for writing
            could_lock = try_lock(file.fileno())
    except OSError:
        return None
    return None if could_lock is None else not could_lock


def _write_features(path: Path, items, utterances: Sequence[Utterance], check, bar: ProgressBar) -> dict:
    index: dict[str, list] = {name: [] for name in ("ids", "texts", "frames", "seconds", "places", "spans", "bad")}
    seconds = 0.0
    started = time.monotonic()
    with path.open("wb") as file:
        for position, item in enumerate(items):
            bar.note(f"{seconds / max(time.monotonic() - started, 1e-3):.0f} x real time")
            bar.update()
            problem = item.problem or (check(utterances[position], item.text) if check else "")
            if problem:
                if check:
                    raise InputError(f"{problem}{SKIP_HINT}")
                index["bad"].append((item.id, problem, position))
                continue
            file.write(np.ascontiguousarray(item.frames, np.float32).data)
            row = (item.id, item.text, len(item.frames), item.seconds, position, item.spans)
            for name, value in zip(("ids", "texts", "frames", "seconds", "places", "spans"), row, strict=True):
                index[name].append(value)
            seconds += item.seconds
    return index


def _remove_abandoned(cache: Path) -> None:
    """Remove unfinished builds whose process no longer runs.

    A process number alone proves nothing: another container can have the same host name.
    """
    local = re.compile(rf"\.building-.*-{re.escape(socket.gethostname())}-(\d+)-[^-]*")
    for path in cache.glob(".building-*"):
        dead = False
        locked = _is_locked(path / "features.f32")
        if locked:
            continue
        if locked is False and (match := local.fullmatch(path.name)):
            dead = not _is_running(int(match[1]))
        else:
            with suppress(OSError):
                dead = time.time() - path.stat().st_mtime > ABANDONED_SECONDS
        if dead:
            shutil.rmtree(path, ignore_errors=True)


def _remove_unused(target: Path, corpus: Corpus, split: str) -> None:
    """Remove entries of the same root and split not used for UNUSED_SECONDS: their files or settings have changed."""
    for path in target.parent.glob(f"{target.name.rpartition('-')[0]}-*/index.json"):
        try:
            if path.parent == target or time.time() - path.stat().st_mtime < UNUSED_SECONDS:
                continue
            index = json.loads(path.read_text(encoding="utf-8"))
            same_split = (index["root"], index["split"]) == (os.path.abspath(corpus.root), split)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if same_split:
            shutil.rmtree(path.parent, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
