"""Read utterances and convert them to frames for the feature cache, in worker processes.

Workers are child processes that call run_worker(). They need neither fork nor a main module that is safe to
import, and end when their parent ends.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from las_fast.config import FeatureConfig
from las_fast.data.corpus import Utterance
from las_fast.data.hw4p2 import read_transcript
from las_fast.data.npy import LOAD_ERRORS, load_problem
from las_fast.errors import InputError
from las_fast.system import OUT_OF_MEMORY, exit_reason

CHUNK_SIZE = 16  # utterances per unit of work
MAX_RESULT_BYTES = 8 << 20  # bytes of frames that a worker sends at once; a larger utterance is sent alone
GROUP_SECONDS = 120.0  # maximum seconds of audio converted to frames at once; a longer recording is converted alone
# How much shorter or longer a recording may be than the manifest says: seconds or a share, whichever is more.
SHORT_SECONDS, SHORT_SHARE = 0.1, 0.02
LONG_SECONDS, LONG_SHARE = 1.0, 0.2
MAX_UTTERANCES_IN_PROCESS = 64  # smaller splits need no workers, which take a second to start
SKIP_HINT = "; or leave such utterances out with --on-bad skip"  # appended to the problem of an utterance


@dataclass(frozen=True)
class Item:
    """The frames of one utterance, or the problem with it."""

    id: str
    text: str | None = None
    seconds: float = 0.0
    frames: np.ndarray | None = None  # (T, F) float32
    spans: tuple[tuple[int, int], ...] = ()  # (start, end) of the frames kept from the recording; empty: untrimmed
    problem: str = ""


def read_utterance(corpus, utterance: Utterance, features: FeatureConfig) -> Item:
    """Read one utterance in this process."""
    (item,) = _process_chunk((corpus.kind, corpus.feature_size, corpus.transposed, features), [utterance])
    return item


def read_utterances(
    corpus, utterances, features: FeatureConfig, scratch: Path, workers: int
) -> Generator[Item, None, None]:
    """Yield one Item per utterance, in order; large splits are read by `workers` processes.

    Raises:
        InputError: a worker ended early, for example because memory ran out.
    """
    chunks = [list(utterances[i : i + CHUNK_SIZE]) for i in range(0, len(utterances), CHUNK_SIZE)]
    task = (corpus.kind, corpus.feature_size, corpus.transposed, features)
    if workers <= 1 or len(utterances) <= MAX_UTTERANCES_IN_PROCESS:
        for chunk in chunks:
            yield from _process_chunk(task, chunk)
        return
    workers = min(workers, len(chunks))
    children: list[subprocess.Popen] = []
    queues: list[queue.Queue] = []
    threads: list[threading.Thread] = []
    try:
        for k in range(workers):
            (scratch / f"task-{k}.pickle").write_bytes(pickle.dumps((task, chunks[k::workers])))
            children.append(_start_worker(scratch / f"task-{k}.pickle"))
            queues.append(queue.Queue(maxsize=2))
            threads.append(threading.Thread(target=_receive, args=(children[-1], queues[-1]), daemon=True))
            threads[-1].start()
        for i, chunk in enumerate(chunks):
            missing = len(chunk)
            while missing:
                result = queues[i % workers].get()
                if isinstance(result, str):
                    advice = "its error is above, or remove that recording"
                    if OUT_OF_MEMORY in result or "MemoryError" in result:
                        advice = "free some memory and run again, or remove that recording"
                    raise InputError(
                        f"a process that reads recordings ended early ({result}) near {chunk[-missing].path}; {advice}"
                    )
                yield from result
                missing -= len(result)
    finally:
        for k, child in enumerate(children):
            child.kill()
            child.wait()
            (scratch / f"task-{k}.pickle").unlink()
        for child, results, thread in zip(children, queues, threads, strict=False):  # fewer if a start failed
            _end_receiver(child, results, thread)


def _start_worker(task: Path) -> subprocess.Popen:
    # Without the current folder, also by -P: a file in it must not replace a module.
    folders = [str(Path(__file__).resolve().parents[2]), *(path for path in sys.path if path not in ("", os.getcwd()))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", "from las_fast.data.readers import run_worker; run_worker()", str(task)]
    # In a new session an interrupt reaches only the parent, which ends the workers without tracebacks from each.
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True)
    except OSError as error:
        raise InputError(
            f"a process that reads recordings cannot be started ({error.strerror}); free some memory, or raise the "
            "limit of processes (ulimit -u)"
        ) from None


def _receive(child: subprocess.Popen, results: queue.Queue) -> None:
    """Move the lists of Items from a worker into a bounded queue; at the end, put a str that says how it ended."""
    stdout: Any = child.stdout  # a pipe
    try:
        while True:
            results.put(pickle.load(stdout))
    except Exception as error:  # forward any error, or the consumer waits forever
        results.put(f"{exit_reason(child.wait())}, {type(error).__name__} {error}")


def _end_receiver(child: subprocess.Popen, results: queue.Queue, thread: threading.Thread) -> None:
    """End the thread that reads from a killed worker, which may be waiting for room in its queue."""
    while thread.is_alive():
        with suppress(queue.Empty):
            results.get(timeout=0.01)  # no wait for the end mark: read_utterances may have taken it already
    stdout: Any = child.stdout
    stdout.close()


def run_worker() -> None:
    """Run in a worker: read the task file, write the Items of its chunks to standard output in pickled lists.

    Ends when the parent closes the pipe.
    """
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that output printed by libraries does not mix with the results
    task, chunks = pickle.loads(Path(sys.argv[1]).read_bytes())
    if task[0] == "audio":
        import torch  # only for audio: the import can take longer than reading an archive of features

        torch.set_num_threads(1)
    with suppress(BrokenPipeError), results:
        for chunk in chunks:
            for result in _groups(_process_chunk(task, chunk)):
                results.write(pickle.dumps(result, protocol=5))
                results.flush()


def _groups(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Group items into lists of at most MAX_RESULT_BYTES of frames, or a single item."""
    group: list[Item] = []
    size = 0
    for item in items:
        nbytes = 0 if item.frames is None else item.frames.nbytes
        if group and size + nbytes > MAX_RESULT_BYTES:
            yield group
            group, size = [], 0
        group.append(item)
        size += nbytes
    if group:
        yield group


def _process_chunk(task, chunk: Sequence[Utterance]) -> Iterator[Item]:
    kind, size, transposed, features = task
    read = _read_audio if kind == "audio" else _read_arrays
    yield from (_check(item, chunk[i]) for i, item in enumerate(read(chunk, size, transposed, features)))


def _check(item: Item, utterance: Utterance) -> Item:
    """Check the frames and add the transcript; returns an Item with a problem if either is bad."""
    if item.problem:
        return item
    if item.frames is None or not len(item.frames):
        return Item(item.id, problem=f"{utterance.path} has no frames; remove it or create it again")
    if not np.isfinite(item.frames).all():
        return Item(item.id, problem=f"{utterance.path} contains NaN or infinite values; create it again")
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
            problem = f"{u.transcript} has no features: {u.path} is missing; add it or remove the transcript"
            yield Item(u.id, problem=problem if missing else f"{u.path} is not a feature file: {load_problem(error)}")
            continue
        shape = f"({size}, frames)" if transposed else f"(frames, {size})"
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.ndim != 2:
            got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive of arrays"
            yield Item(u.id, problem=f"{u.path} must have numbers of shape {shape}; got {got}; create it again")
        elif array.shape[0 if transposed else 1] != size:
            got = f"got {array.shape}; create it again"
            yield Item(u.id, problem=f"{u.path} must have shape {shape} like the other files; {got}")
        else:
            with np.errstate(over="ignore"):
                frames = np.ascontiguousarray(array.T if transposed else array, np.float32)
            # Not features.seconds_of: it rounds the shift to whole samples at features.sample_rate, but these frames
            # were computed elsewhere, at an unknown sample rate.
            yield Item(u.id, None, len(frames) * features.shift_ms / 1000, frames)


def _read_audio(chunk, size, transposed, features: FeatureConfig) -> Iterator[Item]:
    """Yield items in order, with at most GROUP_SECONDS of audio in memory: recordings can be hours long."""
    waveforms: list[np.ndarray] = []
    items: list[Item] = []
    seconds = 0.0
    for u in chunk:
        waveform, item = _read_recording(u, features.sample_rate)
        if items and seconds + item.seconds > GROUP_SECONDS:
            yield from _with_frames(items, waveforms, features)
            waveforms, items, seconds = [], [], 0.0
        items.append(item)
        if waveform is not None:
            waveforms.append(waveform)
        seconds += item.seconds
    yield from _with_frames(items, waveforms, features)


def _read_recording(u: Utterance, rate: int) -> tuple[np.ndarray | None, Item]:
    from las_fast.data.audio import load_utterance

    try:
        waveform = load_utterance(u, rate, strict=True)
    except InputError as error:
        return None, Item(u.id, problem=str(error))
    seconds = len(waveform) / rate
    if problem := _duration_problem(u, seconds):
        return None, Item(u.id, problem=problem)
    return waveform, Item(u.id, None, seconds)


def _duration_problem(u: Utterance, seconds: float) -> str:
    """Return the problem with the duration of a whole recording, or ""; load_audio checks parts."""
    if u.is_part or not u.seconds:
        return ""
    message = f"{u.path} lasts {seconds:.2f} s, but the manifest says {u.seconds:.2f} s"
    if u.seconds - seconds > max(SHORT_SECONDS, SHORT_SHARE * u.seconds):
        return f"{message}; copy it again or correct the manifest"
    if seconds - u.seconds > max(LONG_SECONDS, LONG_SHARE * u.seconds):
        return f"{message}; correct the manifest, or add a column 'offset' to read a part (0 for the first seconds)"
    return ""


def _with_frames(items: list[Item], waveforms: list[np.ndarray], features: FeatureConfig) -> Iterator[Item]:
    """Yield the items, the good ones with frames; clear `waveforms`, which use most of the memory."""
    from las_fast.data.features import speech_features

    results = iter(speech_features(waveforms, features))
    waveforms.clear()
    for item in items:
        if item.problem:
            yield item
            continue
        frames, spans = next(results)
        trimmed = len(spans) > 1 or spans[0][0] > 0
        yield replace(item, frames=frames.numpy(), spans=tuple(spans) if trimmed else ())
