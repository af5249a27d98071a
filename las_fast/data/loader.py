"""Batches made ahead of their use by worker processes, which may die, hang or run out of memory without harm.

A worker is a fork of this process that writes its batches as plain bytes into a pipe; a thread here reads them. Shared
memory is not used: containers often have little of it. What a worker fails to deliver is made in this process instead,
so that the batches are the same in any case.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import queue
import signal
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from las_fast.progress import write

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the parent answers them, and then ends its workers
AHEAD = 4  # batches of each worker that wait for their use
SILENT = 300.0  # seconds after which a worker that delivers nothing is given up
LOOK_EVERY = 0.3  # seconds between two looks up while a batch is waited for
PIPE_BYTES = 1 << 20  # of a pipe's buffer, where the system allows it: few switches between the processes
LENGTH = struct.Struct("<i")
FAILED = -1  # length of a head that is not there: the batch could not be made

Fields = dict[str, "Tensor | None"]


class Batches(Protocol):
    """What a loader takes its batches from: item b as named tensors, on the CPU and contiguous."""

    def __getitem__(self, b: int) -> Fields: ...


class Loader:
    """Sized iterable over batches[b] for b in order, each a dict of tensors.

    Args:
        batches: makes a batch, the same one in whatever process and whenever it is asked.
        order:   numbers of the batches.
        workers: processes that make them ahead; 0 makes each when it is asked for, in this process.
        pin:     copy the tensors to pinned memory.
        look_up: called again and again while a batch is waited for; it may raise.
    """

    def __init__(
        self,
        batches: Batches,
        order: Sequence[int],
        *,
        workers: int,
        pin: bool = False,
        look_up: Callable[[], None] = lambda: None,
    ):
        self.batches, self.order, self.pin, self.look_up = batches, order, pin, look_up
        self.workers = min(workers, len(order)) if can_fork() else 0

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Generator[Fields, None, None]:
        ahead: _Workers | None = None
        try:
            ahead = self._start()
            for place, b in enumerate(self.order):
                fields = None
                if ahead is not None:
                    try:
                        fields = ahead.take(place, self.look_up)
                    except WorkerLost as error:
                        _tell(f"{error}; from here on batches are made in the training process")
                        ahead.close()
                        ahead = None
                yield fields if fields is not None else self._make(b)
        finally:
            if ahead is not None:
                ahead.close()

    def _start(self) -> _Workers | None:
        if not self.workers:
            return None
        try:
            return _Workers(self.batches, self.order, self.workers, self.pin)
        except OSError as error:  # no process or no file handle is to be had
            _tell(f"no loader process could be started ({error.strerror}); batches are made in the training process")
            return None

    def _make(self, b: int) -> Fields:
        fields = self.batches[b]
        return {name: x.pin_memory() if self.pin and x is not None else x for name, x in fields.items()}


def can_fork() -> bool:
    """Return whether a process may be forked safely after libraries have started threads."""
    return sys.platform == "linux"


def _tell(what: str) -> None:
    write(f"warning: {what}", file=sys.stderr)


class WorkerLost(Exception):
    """A worker has ended or is silent; the text says what happened."""


class _Workers:
    """Worker k makes the batches at places k, k + workers, ... of the order."""

    def __init__(self, batches: Batches, order: Sequence[int], workers: int, pin: bool):
        self._children: list[_Child] = []
        try:
            for k in range(workers):
                self._children.append(_Child(batches, order[k::workers], pin))
        except BaseException:
            self.close()
            raise

    def take(self, place: int, look_up: Callable[[], None]) -> Fields | None:
        """Return the batch at a place, asked for in order; None where its worker could not make it."""
        return self._children[place % len(self._children)].take(look_up)

    def close(self) -> None:
        """End the workers and the threads that read from them."""
        for child in self._children:
            child.kill()
        for child in self._children:
            child.join()
        self._children = []


class _Child:
    """A worker process, and the thread that moves its batches to a short queue."""

    def __init__(self, batches: Batches, order: Sequence[int], pin: bool):
        self._ready: queue.Queue[Fields | Exception | None] = queue.Queue(maxsize=AHEAD)
        self._pid, self._pipe = _fork(batches, order)
        self._thread = threading.Thread(target=self._receive, args=(len(order), pin), daemon=True)
        self._thread.start()

    def take(self, look_up: Callable[[], None]) -> Fields | None:
        answer = self._wait(look_up)
        if isinstance(answer, EOFError):
            raise WorkerLost(f"a loader process ended early ({self._how_it_ended()})")
        if isinstance(answer, Exception):
            raise WorkerLost(f"a loader process cannot be understood ({type(answer).__name__}: {answer})")
        return answer

    def _wait(self, look_up: Callable[[], None]) -> Fields | Exception | None:
        deadline = time.monotonic() + SILENT
        while time.monotonic() < deadline:
            look_up()
            with contextlib.suppress(queue.Empty):
                return self._ready.get(timeout=LOOK_EVERY)
        raise WorkerLost(f"a loader process was silent for {SILENT:.0f} s and is given up")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def join(self) -> None:
        """Wait for the end of the killed process and of the thread."""
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):  # it may wait for room
                self._ready.get_nowait()
            self._thread.join(0.01)
        self._pipe.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def _receive(self, count: int, pin: bool) -> None:
        try:
            for _ in range(count):
                self._ready.put(_read(self._pipe, pin))
        except Exception as error:  # whatever it was, the reader of the queue must hear of it
            self._ready.put(error)

    def _how_it_ended(self) -> str:
        """Return what ended the process, whose pipe is closed; leave it to be waited for."""
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None  # as it may be with WNOHANG alone
            if ended.si_code == os.CLD_EXITED:
                return f"exit status {ended.si_status}"
            name = signal.Signals(ended.si_status).name
            return f"{name}, as where memory does not suffice" if name == "SIGKILL" else name
        return "unknown exit status"


def _fork(batches: Batches, order: Sequence[int]) -> tuple[int, io.FileIO]:
    """Start a worker; return its number and the pipe that its batches come from."""
    reading, writing = os.pipe()
    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # a handler of this process must not run in the worker
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: none is used in the worker
            pid = os.fork()
        if pid == 0:
            os.close(reading)
            _work(batches, order, writing, before)
    except OSError:
        os.close(reading)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(writing)
    return pid, os.fdopen(reading, "rb", buffering=0)


def _work(batches: Batches, order: Sequence[int], pipe: int, mask: set) -> None:
    """Be a worker: write the batches into the pipe, and never return."""
    status = 1
    try:
        for s in STOPPING:
            signal.signal(s, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        torch.set_num_threads(1)
        for b in order:
            _send(batches, b, pipe)
        status = 0
    except BrokenPipeError:  # the parent has ended, or wants no more
        status = 0
    finally:
        os._exit(status)  # nothing of the parent's may be cleaned up here


def _send(batches: Batches, b: int, pipe: int) -> None:
    """Write batch b as a length, a head of names, types and shapes, and the numbers; or that it cannot be made."""
    try:
        fields = batches[b]
    except Exception:  # the parent makes it again and meets the same error, or none
        _write(pipe, memoryview(LENGTH.pack(FAILED)))
        return
    head = {name: None if x is None else [str(x.dtype).removeprefix("torch."), *x.shape] for name, x in fields.items()}
    text = json.dumps(head).encode()
    _write(pipe, memoryview(LENGTH.pack(len(text)) + text))
    for x in fields.values():
        if x is not None:
            _write(pipe, _bytes_of(x))


def _read(pipe: io.FileIO, pin: bool) -> Fields | None:
    """Read what _send wrote; raise EOFError where it ends too early."""
    (length,) = LENGTH.unpack(_read_bytes(pipe, LENGTH.size))
    if length == FAILED:
        return None
    fields: Fields = {}
    for name, described in json.loads(_read_bytes(pipe, length)).items():
        if described is None:
            fields[name] = None
            continue
        kind, *shape = described
        fields[name] = x = torch.empty(shape, dtype=getattr(torch, kind), pin_memory=pin)
        _fill(pipe, _bytes_of(x))
    return fields


def _bytes_of(x: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return x.numpy().reshape(-1).view("uint8").data


def _write(pipe: int, content: memoryview) -> None:
    while content:
        content = content[os.write(pipe, content) :]


def _read_bytes(pipe: io.FileIO, count: int) -> bytes:
    content = bytearray(count)
    _fill(pipe, memoryview(content))
    return bytes(content)


def _fill(pipe: io.FileIO, content: memoryview) -> None:
    while content:
        count = pipe.readinto(content)
        if not count:
            raise EOFError
        content = content[count:]
