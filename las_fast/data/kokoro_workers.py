"""The processes of las_fast.data.kokoro: each opens a synthesiser and records the utterances that it gets."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from las_fast.errors import STOP_SIGNALS, InputError, explain_error

if TYPE_CHECKING:
    from las_fast.data.kokoro import PlannedUtterance, Studio

GRACE = 20.0  # seconds to end in; Kokoro needs 14 for an utterance of 20 seconds


def record_all(
    utterances: Iterable[PlannedUtterance], studio: Studio, jobs: int
) -> Generator[tuple[PlannedUtterance, np.ndarray], None, None]:
    """Yield each utterance and its samples, in order, from `jobs` processes at a time; 1 is this process."""
    if jobs == 1:
        synthesiser = studio.synthesiser()
        for utterance in utterances:
            yield utterance, studio.record(synthesiser, utterance)
        return
    workers: list[tuple[Any, Any]] = []  # pipe, process
    try:
        for _ in range(jobs):
            workers.append(_start(studio))
        waiting: deque[tuple[PlannedUtterance, Any, Any]] = deque()
        for utterance, (pipe, process) in zip(utterances, itertools.cycle(workers)):  # noqa: B905 (endless)
            if len(waiting) == 2 * jobs:
                yield _receive(*waiting.popleft())
            waiting.append((utterance, pipe, process))
            _send(pipe, utterance)
        while waiting:
            yield _receive(*waiting.popleft())
    finally:
        _end(workers)


def _end(workers: list[tuple[Any, Any]]) -> None:
    """Let the processes finish their utterances and end; kill those that take longer than GRACE.

    A killed process leaves the temporary files of its synthesiser, such as phonemizer's copies of eSpeak NG.
    """
    for pipe, _ in workers:
        pipe.close()
    deadline = time.monotonic() + GRACE
    for _, process in workers:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()


def _start(studio: Studio) -> tuple[Any, Any]:
    """Start a process that records the utterances that it gets; return its pipe and the process."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_serve, args=(other, studio), daemon=True)
    process.start()
    other.close()  # so that the end of the process ends the pipe
    return pipe, process


def _serve(pipe: Any, studio: Studio) -> None:
    """Record utterances until the pipe ends, which it also does if the main process is killed."""
    for stop in STOP_SIGNALS:  # handled by the main process, which then closes the pipes
        signal.signal(stop, signal.SIG_IGN)
    try:
        synthesiser = studio.synthesiser()
        while True:
            with _exit_at_the_end():
                utterance = pipe.recv()
            samples = studio.record(synthesiser, utterance)
            with _exit_at_the_end():
                pipe.send(samples)
    except Exception as error:
        sentence = explain_error(error)
        if sentence is None:  # a bug: its traceback is printed
            raise
        with _exit_at_the_end():
            pipe.send(InputError(sentence))


@contextlib.contextmanager
def _exit_at_the_end() -> Iterator[None]:
    """Exit if the main process has closed the pipe; an OSError of the synthesiser must not count as that."""
    try:
        yield
    except (EOFError, OSError):
        sys.exit()


def _send(pipe: Any, utterance: PlannedUtterance) -> None:
    with contextlib.suppress(OSError):  # the process has ended; _receive says so
        pipe.send(utterance)


def _receive(utterance: PlannedUtterance, pipe: Any, process: Any) -> tuple[PlannedUtterance, np.ndarray]:
    """Receive the samples of an utterance; raise InputError if the process failed."""
    try:
        result = pipe.recv()
    except (EOFError, OSError):
        process.join()
        killed = process.exitcode == -signal.SIGKILL  # as the system does if memory runs out
        advice = "free some memory, or give fewer --jobs" if killed else "correct what it printed above, if anything"
        raise InputError(f"a speech process ended early (exit status {process.exitcode}); {advice}, and run again to "
                         "continue") from None  # fmt: skip
    if isinstance(result, InputError):
        raise result
    return utterance, result
