"""The processes of las_fast.data.kokoro: each opens a synthesiser and records the utterances that it gets."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from las_fast.errors import InputError

if TYPE_CHECKING:
    from las_fast.data.kokoro import PlannedUtterance, Studio


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
        for pipe, process in workers:
            pipe.close()
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    with contextlib.suppress(EOFError, OSError):
        try:
            synthesiser = studio.synthesiser()
            while True:
                pipe.send(studio.record(synthesiser, pipe.recv()))
        except InputError as error:
            pipe.send(error)


def _send(pipe: Any, utterance: PlannedUtterance) -> None:
    with contextlib.suppress(OSError):  # the process has ended; _receive says so
        pipe.send(utterance)


def _receive(utterance: PlannedUtterance, pipe: Any, process: Any) -> tuple[PlannedUtterance, np.ndarray]:
    """Receive the samples of an utterance; raise InputError if the process failed."""
    try:
        result = pipe.recv()
    except (EOFError, OSError):
        process.join()
        raise InputError(f"a speech process ended early (exit status {process.exitcode}); free some memory, or give "
                         "fewer --jobs, and run again to continue") from None  # fmt: skip
    if isinstance(result, InputError):
        raise result
    return utterance, result
