"""The feature cache: every split is read, checked and turned into frames once, then mapped into memory.

An entry is a folder with features.f32 (the raw frames of all good utterances, one after another, float32) and
index.json (ids, texts, frames, seconds, and the bad utterances with the reason). Its name holds a hash of all that it
depends on. It is built under a hidden name and renamed when complete, so an interrupt leaves nothing that could be
taken for one. Workers are plain child processes that run work(): they need neither fork nor a guarded main module, and
end with their parent.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import pickle
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from las_fast.cli import cores, expand
from las_fast.config import FeatureConfig
from las_fast.data.corpus import Corpus, Utterance
from las_fast.data.hw4p2 import LOAD_ERRORS, load_problem, read_transcript
from las_fast.errors import InputError
from las_fast.progress import Progress

VERSION = 2  # raise it when the meaning of the stored frames or of the index changes
CHUNK = 16  # utterances that a worker takes at a time
ANSWER_BYTES = 8 << 20  # frames in one answer of a worker, or one utterance
GROUP_SECONDS = 120.0  # of audio that are turned into frames at once, or one recording
SHORT_SECONDS, SHORT_SHARE = 0.1, 0.02  # a recording may be so much shorter than the manifest says, whichever is more
LONG_SECONDS, LONG_SHARE = 1.0, 0.2  # and so much longer
UNUSED = 30 * 24 * 3600  # seconds after which an earlier entry of the same split goes, when a new one is built
SMALL = 64  # a split of so few utterances is done in this process: workers take a second to start
ABANDONED = 48 * 3600  # seconds after which a build by another host is taken for dead
OR_SKIP = "; or leave such utterances out with --on-bad skip"
DROP_BYTES = 32 << 20  # mapped pages are let go after so many bytes read, or they count as this process's memory


@dataclass(frozen=True)
class Item:
    """What one utterance became: frames (T, F) float32, or the reason why there are none."""

    id: str
    text: str | None = None
    seconds: float = 0.0
    frames: np.ndarray | None = None
    spans: tuple[tuple[int, int], ...] = ()  # (start, end) of the recording's frames that these are; none: its first
    problem: str = ""


@dataclass
class CacheEntry:
    """A finished entry; frames(i) are read from the map when asked for."""

    folder: Path
    size: int  # values per frame
    ids: list[str]
    texts: list[str | None]
    lengths: np.ndarray  # (N,) int64 frames
    seconds: np.ndarray  # (N,) float64
    places: np.ndarray  # (N,) int64 place in the split, bad utterances counted
    spans: list[list[tuple[int, int]]]  # (start, end) of the recording's frames that were kept; empty: its first ones
    bad: list[tuple[str, str, int]]  # id, reason, place

    def __post_init__(self):
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._read = 0

    @cached_property
    def _map(self) -> mmap.mmap:
        with (self.folder / "features.f32").open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def frames(self, i: int) -> np.ndarray:
        """Return a copy of the frames (T, F) float32 of utterance i."""
        count = int(self.lengths[i]) * self.size
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
    except RuntimeError:  # no HOME, and no entry in the list of users
        raise InputError(
            "no home folder is known, so the feature cache has no place; set XDG_CACHE_HOME to a folder that may be "
            "written (in training also --data.cache)"
        ) from None


def open_cache(
    corpus: Corpus,
    split: str,
    utterances: Sequence[Utterance],
    features: FeatureConfig,
    *,
    folder: str = "",
    refuse: Callable[[Utterance, str | None], str] | None = None,
    progress: bool = True,
    workers: int | None = None,
) -> CacheEntry:
    """Return the cache entry of a split, building it where there is none.

    Args:
        utterances: of the split, as corpus.utterances gives them.
        folder:     of the cache; empty: the user's.
        refuse:     with it the first bad utterance is an error; it is also asked what is wrong with an utterance and
                    its text ("" when nothing is). Without it bad utterances are recorded.
        workers:    processes that build; default one a core.

    Raises:
        InputError: a bad utterance, or the cache cannot be written.
    """
    cache = cache_folder(folder)
    target = cache / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', split)[:40]}-{_key(corpus, utterances, features)}"
    entry = _read_entry(target)
    if entry is None:
        try:
            _build(target, corpus, split, utterances, features, refuse, progress, workers)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise InputError(
                f"the feature cache {cache} cannot be written ({reason}); make room there, or set XDG_CACHE_HOME to "
                "another folder (in training also --data.cache)"
            ) from None
        entry = _read_entry(target)
        if entry is None:
            raise InputError(f"the feature cache {target} was removed or damaged while it was opened; run again")
        _remove_unused(target, corpus, split)
        if progress:
            size = (target / "features.f32").stat().st_size / 1e6
            print(f"feature cache of {split}: {target} ({size:.1f} MB)", file=sys.stderr)
    with suppress(OSError):  # a cache may be read-only
        os.utime(target / "index.json")  # when it was last used
    if refuse and entry.bad:
        raise InputError(f"{entry.bad[0][1]}{OR_SKIP}")
    return entry


def _key(corpus: Corpus, utterances: Sequence[Utterance], features: FeatureConfig) -> str:
    """Hash what the entry depends on: the files by path, size and time, the texts, and the settings that matter."""
    settings: list[Any] = [VERSION, corpus.kind, corpus.transposed, corpus.feature_size]
    settings.append(features.shift_ms)
    if corpus.kind == "audio":
        settings += [features.kind, features.size, features.sample_rate, features.window_ms]
        settings += [features.mel_bins if features.kind == "mfcc" else 0, features.trim_silence]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for u in utterances:
        text = [u.transcript] if not isinstance(u.transcript, Path) else _stamp(u.transcript)
        what = [u.seconds, u.start, u.is_part] if corpus.kind == "audio" else []
        digest.update(json.dumps([u.id, *_stamp(u.path), *text, *what, u.problem]).encode())
    return digest.hexdigest()[:20]


def _stamp(path: Path) -> list:
    try:
        facts = path.stat()
    except (OSError, ValueError):
        return [os.path.abspath(path), -1, 0]
    return [os.path.abspath(path), facts.st_size, facts.st_mtime_ns]


def _read_entry(target: Path) -> CacheEntry | None:
    """Return the entry, or None when it is not there or its parts do not fit together."""
    try:
        index = json.loads((target / "index.json").read_text(encoding="utf-8"))
        stored = (target / "features.f32").stat().st_size
        entry = CacheEntry(
            folder=target,
            size=index["size"],
            ids=index["ids"],
            texts=index["texts"],
            lengths=np.array(index["frames"], np.int64),
            seconds=np.array(index["seconds"], np.float64),
            places=np.array(index["places"], np.int64),
            spans=[[tuple(span) for span in row] for row in index["spans"]],
            bad=[tuple(row) for row in index["bad"]],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return entry if stored == int(entry.lengths.sum()) * entry.size * 4 else None


def _build(target, corpus, split, utterances, features, refuse, progress, workers) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent)
    unique = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    scratch = target.parent / f".building-{target.name}-{unique}"
    scratch.mkdir()
    try:
        items = _process(corpus, utterances, features, scratch, workers or cores())
        bar = Progress(len(utterances), f"reading {split}", "utterances", show=progress)
        with closing(items), bar:  # closing ends the workers, whatever happens
            index = _write_features(scratch / "features.f32", items, utterances, refuse, bar)
        size = features.size if corpus.kind == "audio" else corpus.feature_size
        index = {"root": os.path.abspath(corpus.root), "split": split, "size": size, **index}
        (scratch / "index.json").write_text(json.dumps(index), encoding="utf-8")
        if target.exists() and _read_entry(target) is None:
            target.rename(scratch / "damaged")
        with suppress(OSError):  # another process may have finished the same entry first: theirs serves as well
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(target / "damaged", ignore_errors=True)


def _write_features(path: Path, items, utterances: Sequence[Utterance], refuse, bar: Progress) -> dict:
    index: dict[str, list] = {name: [] for name in ("ids", "texts", "frames", "seconds", "places", "spans", "bad")}
    seconds = 0.0
    started = time.monotonic()
    with path.open("wb") as file:
        for place, item in enumerate(items):
            bar.note(f"{seconds / max(time.monotonic() - started, 1e-3):.0f} x real time")
            bar.update()
            problem = item.problem or (refuse(utterances[place], item.text) if refuse else "")
            if problem:
                if refuse:
                    raise InputError(f"{problem}{OR_SKIP}")
                index["bad"].append((item.id, problem, place))
                continue
            file.write(np.ascontiguousarray(item.frames, np.float32).data)
            row = (item.id, item.text, len(item.frames), item.seconds, place, item.spans)
            for name, value in zip(("ids", "texts", "frames", "seconds", "places", "spans"), row, strict=True):
                index[name].append(value)
            seconds += item.seconds
    return index


def _remove_abandoned(cache: Path) -> None:
    """Remove what builders that no longer run have left."""
    ours = re.compile(rf"\.building-.*-{re.escape(socket.gethostname())}-(\d+)-[^-]*")
    for path in cache.glob(".building-*"):
        dead = False
        if found := ours.fullmatch(path.name):
            dead = not _is_running(int(found[1]))
        else:
            with suppress(OSError):
                dead = time.time() - path.stat().st_mtime > ABANDONED
        if dead:
            shutil.rmtree(path, ignore_errors=True)


def _remove_unused(target: Path, corpus: Corpus, split: str) -> None:
    """Remove entries of the same root and split that nothing has opened for long: their files or settings are past."""
    for path in target.parent.glob(f"{target.name.rpartition('-')[0]}-*/index.json"):
        try:
            if path.parent == target or time.time() - path.stat().st_mtime < UNUSED:
                continue
            index = json.loads(path.read_text(encoding="utf-8"))
            ours = (index["root"], index["split"]) == (os.path.abspath(corpus.root), split)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if ours:
            shutil.rmtree(path.parent, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _process(corpus, utterances, features: FeatureConfig, scratch: Path, workers: int) -> Generator[Item, None, None]:
    """Yield an Item an utterance, in order, from this process or from `workers` others."""
    chunks = [list(utterances[i : i + CHUNK]) for i in range(0, len(utterances), CHUNK)]
    task = (corpus.kind, corpus.feature_size, corpus.transposed, features)
    if workers <= 1 or len(utterances) <= SMALL:
        for chunk in chunks:
            yield from _process_chunk(task, chunk)
        return
    workers = min(workers, len(chunks))
    children: list[subprocess.Popen] = []
    try:
        queues: list[queue.Queue] = []
        for k in range(workers):
            (scratch / f"task-{k}.pickle").write_bytes(pickle.dumps((task, chunks[k::workers])))
            children.append(_start_worker(scratch / f"task-{k}.pickle"))
            queues.append(queue.Queue(maxsize=2))
            threading.Thread(target=_receive, args=(children[-1], queues[-1]), daemon=True).start()
        for i, chunk in enumerate(chunks):
            missing = len(chunk)
            while missing:
                answer = queues[i % workers].get()
                if isinstance(answer, str):
                    raise InputError(
                        f"a process that reads recordings ended early ({answer}), near {chunk[-missing].path}; "
                        "free some memory and run again, or leave that recording out"
                    )
                yield from answer
                missing -= len(answer)
    finally:
        for k, child in enumerate(children):
            child.kill()
            child.wait()
            (scratch / f"task-{k}.pickle").unlink()


def _start_worker(task: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    package_root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([package_root, environment["PYTHONPATH"]])
    command = [sys.executable, "-c", "from las_fast.data.cache import work; work()", str(task)]
    # A session of its own: an interrupt reaches the parent alone, which ends its workers without a noise of tracebacks.
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True)


def _receive(child: subprocess.Popen, answers: queue.Queue) -> None:
    """Move a worker's answers to a short queue; a text in it says that the worker has ended."""
    stdout: Any = child.stdout  # a pipe
    try:
        while True:
            answers.put(pickle.load(stdout))
    except Exception as error:  # whatever it was, the reader of the queue must hear of it or it waits for ever
        answers.put(f"exit status {child.wait()}, {type(error).__name__} {error}")


def work() -> None:
    """Be a worker: write the Items of each chunk of the task file, some at a time, to standard output; a closed pipe
    ends it."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library might print must not get between the answers
    task, chunks = pickle.loads(Path(sys.argv[1]).read_bytes())
    if task[0] == "audio":
        import torch  # only here: it takes longer to import than many a feature archive to read

        torch.set_num_threads(1)
    with suppress(BrokenPipeError), answers:
        for chunk in chunks:
            for answer in _groups(_process_chunk(task, chunk)):
                answers.write(pickle.dumps(answer, protocol=5))
                answers.flush()


def _groups(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Yield the items in lists of at most ANSWER_BYTES of frames, or of one item."""
    group: list[Item] = []
    size = 0
    for item in items:
        own = 0 if item.frames is None else item.frames.nbytes
        if group and size + own > ANSWER_BYTES:
            yield group
            group, size = [], 0
        group.append(item)
        size += own
    if group:
        yield group


def _process_chunk(task, chunk: Sequence[Utterance]) -> Iterator[Item]:
    kind, size, transposed, features = task
    read = _read_audio if kind == "audio" else _read_arrays
    yield from (_checked(item, chunk[i]) for i, item in enumerate(read(chunk, size, transposed, features)))


def _checked(item: Item, utterance: Utterance) -> Item:
    """Add the transcript, or turn the item into a problem: nothing bad passes here."""
    if item.problem:
        return item
    if item.frames is None or not len(item.frames):
        return Item(item.id, problem=f"{utterance.path} has no frames; remove it or make it again")
    if not np.isfinite(item.frames).all():
        return Item(item.id, problem=f"{utterance.path} holds NaN or infinite values; make it again")
    try:
        source = utterance.transcript
        text = read_transcript(source) if isinstance(source, Path) else source
    except InputError as error:
        return Item(item.id, problem=str(error))
    return replace(item, text=text)


def _read_arrays(chunk, size: int, transposed: bool, features: FeatureConfig) -> Iterator[Item]:
    for u in chunk:
        if u.problem:
            yield Item(u.id, problem=u.problem)
            continue
        try:
            array = np.load(u.path, allow_pickle=False)
        except LOAD_ERRORS as error:
            missing = isinstance(error, FileNotFoundError) and isinstance(u.transcript, Path)
            what = f"{u.transcript} has no features: {u.path} is missing; add it or remove the transcript"
            yield Item(u.id, problem=what if missing else f"{u.path} is not a feature file: {load_problem(error)}")
            continue
        shape = f"({size}, frames)" if transposed else f"(frames, {size})"
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.ndim != 2:
            got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive of arrays"
            yield Item(u.id, problem=f"{u.path} must hold numbers of shape {shape}; got {got}; make it again")
        elif array.shape[0 if transposed else 1] != size:
            got = f"got {array.shape}; make it again"
            yield Item(u.id, problem=f"{u.path} must have shape {shape} like its neighbours; {got}")
        else:
            with np.errstate(over="ignore"):
                frames = np.ascontiguousarray(array.T if transposed else array, np.float32)
            yield Item(u.id, None, len(frames) * features.shift_ms / 1000, frames)


def _read_audio(chunk, size, transposed, features: FeatureConfig) -> Iterator[Item]:
    """Yield items in order, holding little audio at a time: recordings can be hours long."""
    waveforms: list[np.ndarray] = []
    items: list[Item] = []
    held = 0.0
    for u in chunk:
        waveform, item = _read_recording(u, features.sample_rate)
        if items and held + item.seconds > GROUP_SECONDS:
            yield from _with_frames(items, waveforms, features)
            waveforms, items, held = [], [], 0.0
        items.append(item)
        if waveform is not None:
            waveforms.append(waveform)
        held += item.seconds
    yield from _with_frames(items, waveforms, features)


def _read_recording(u: Utterance, rate: int) -> tuple[np.ndarray | None, Item]:
    from las_fast.audio import load_audio

    if u.problem:
        return None, Item(u.id, problem=u.problem)
    try:
        waveform = load_audio(u.path, rate, start=u.start, seconds=u.seconds if u.is_part else None, whole=True)
    except InputError as error:
        return None, Item(u.id, problem=str(error))
    seconds = len(waveform) / rate
    if problem := _wrong_length(u, seconds):
        return None, Item(u.id, problem=problem)
    return waveform, Item(u.id, None, seconds)


def _wrong_length(u: Utterance, seconds: float) -> str:
    """Say how the length of a recording differs from what the data say, or ""; load_audio judges parts."""
    if u.is_part or not u.seconds:
        return ""
    held = f"{u.path} holds {seconds:.2f} s, the manifest says {u.seconds:.2f} s"
    if u.seconds - seconds > max(SHORT_SECONDS, SHORT_SHARE * u.seconds):
        return f"{held}; copy it again or correct that"
    if seconds - u.seconds > max(LONG_SECONDS, LONG_SHARE * u.seconds):
        return f"{held}; correct that, or say in a column 'offset' which part is meant (0 for the first seconds)"
    return ""


def _with_frames(items: list[Item], waveforms: list[np.ndarray], features: FeatureConfig) -> Iterator[Item]:
    """Yield the items, the good ones with their frames; empties the waveforms."""
    from las_fast.features import speech_features

    found = iter(speech_features(waveforms, features))
    waveforms.clear()
    for item in items:
        if item.problem:
            yield item
            continue
        frames, spans = next(found)
        moved = len(spans) > 1 or spans[0][0] > 0
        yield replace(item, frames=frames.numpy(), spans=tuple(spans) if moved else ())
