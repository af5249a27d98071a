"""Prefetch batches in worker processes, which may die, hang or run out of memory without harm.

A worker is a fork of this process that writes its batches as raw bytes to a pipe; a thread of this process reads them.
Shared memory is not used, because containers often have little of it. Batches that a worker fails to deliver are made
in this process, so that the result is always the same.
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

from las_fast.errors import STOP_SIGNALS
from las_fast.progress import write
from las_fast.system import exit_reason

QUEUE_SIZE = 4  # finished batches per worker
TIMEOUT = 300.0  # seconds without a batch after which a worker counts as hung
POLL_SECONDS = 0.3  # seconds between calls of poll while waiting for a batch
PIPE_BYTES = 1 << 20  # buffer of a pipe, if the system allows it: fewer context switches
HEAD_LENGTH = struct.Struct("<i")  # length in bytes of the head that follows
FAILED = -1  # instead of that length: the worker could not make the batch

Fields = dict[str, "Tensor | None"]


class Batches(Protocol):
    """Source of a loader: item b is batch b, as named contiguous tensors on the CPU."""

    def __getitem__(self, b: int) -> Fields: ...


class Loader:
    """Sized iterable over batches[b] for b in order, each a dict of tensors.

    Args:
        batches: source; batch b must be the same in any process and at any time.
        order:   the numbers b.
        workers: processes that prefetch; 0 makes each batch on demand in this process.
        pin:     copy the tensors to pinned memory.
        poll:    called repeatedly while waiting for a batch; it may raise.
    """

    def __init__(
        self,
        batches: Batches,
        order: Sequence[int],
        *,
        workers: int,
        pin: bool = False,
        poll: Callable[[], None] = lambda: None,
    ):
        self.batches, self.order, self.pin, self.poll = batches, order, pin, poll
        self.workers = min(workers, len(order)) if can_fork() else 0

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Generator[Fields, None, None]:
        prefetch: _Workers | None = None
        try:
            prefetch = self._start()
            for position, b in enumerate(self.order):
                fields = None
                if prefetch is not None:
                    try:
                        fields = prefetch.take(position, self.poll)
                    except WorkerLost as error:
                        _warn(f"{error}; from here on batches are made in the training process")
                        prefetch.close()
                        prefetch = None
                yield fields if fields is not None else self._make(b)
        finally:
            if prefetch is not None:
                prefetch.close()

    def _start(self) -> _Workers | None:
        if not self.workers:
            return None
        try:
            return _Workers(self.batches, self.order, self.workers, self.pin)
        except OSError as error:  # out of processes or file handles
            _warn(f"no loader process could be started ({error.strerror}); batches are made in the training process")
            return None

    def _make(self, b: int) -> Fields:
        fields = self.batches[b]
        return {name: x.pin_memory() if self.pin and x is not None else x for name, x in fields.items()}


def can_fork() -> bool:
    """Return whether forking is safe after libraries have started threads."""
    return sys.platform == "linux"


def _warn(message: str) -> None:
    write(f"warning: {message}", file=sys.stderr)


class WorkerLost(Exception):
    """A worker has ended or hangs; the message says which."""


class _Workers:
    """The worker processes; worker k makes batches order[k], order[k + workers], ..."""

    def __init__(self, batches: Batches, order: Sequence[int], workers: int, pin: bool):
        self._children: list[_Child] = []
        try:
            for k in range(workers):
                self._children.append(_Child(batches, order[k::workers], pin))
        except BaseException:
            self.close()
            raise

    def take(self, position: int, poll: Callable[[], None]) -> Fields | None:
        """Return batch order[position], for positions in order; None if its worker could not make it."""
        return self._children[position % len(self._children)].take(poll)

    def close(self) -> None:
        """Kill the workers and join the threads that read from them."""
        for child in self._children:
            child.kill()
        for child in self._children:
            child.join()
        self._children = []


class _Child:
    """A worker process, and the thread that moves its batches into a short queue."""

    def __init__(self, batches: Batches, order: Sequence[int], pin: bool):
        self._ready: queue.Queue[Fields | Exception | None] = queue.Queue(maxsize=QUEUE_SIZE)
        self._pid, self._pipe = _fork(batches, order)
        self._thread = threading.Thread(target=self._receive, args=(len(order), pin), daemon=True)
        self._thread.start()

    def take(self, poll: Callable[[], None]) -> Fields | None:
        item = self._wait(poll)
        if isinstance(item, EOFError):
            raise WorkerLost(f"a loader process ended early ({self._exit_reason()})")
        if isinstance(item, Exception):
            raise WorkerLost(f"a loader process sent invalid data ({type(item).__name__}: {item})")
        return item

    def _wait(self, poll: Callable[[], None]) -> Fields | Exception | None:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            poll()
            with contextlib.suppress(queue.Empty):
                return self._ready.get(timeout=POLL_SECONDS)
        raise WorkerLost(f"a loader process sent nothing for {TIMEOUT:.0f} s")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def join(self) -> None:
        """Wait until the killed process and the thread have ended."""
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):  # the thread may be blocked on a full queue
                self._ready.get_nowait()
            self._thread.join(0.01)
        self._pipe.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def _receive(self, count: int, pin: bool) -> None:
        try:
            for _ in range(count):
                self._ready.put(_read(self._pipe, pin))
        except Exception as error:  # forward any error, or the consumer waits forever
            self._ready.put(error)

    def _exit_reason(self) -> str:
        """Return why the process ended, after its pipe was closed; join still reaps it."""
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None  # only WNOHANG gives None
            return exit_reason(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)
        return "unknown exit status"


def _fork(batches: Batches, order: Sequence[int]) -> tuple[int, io.FileIO]:
    """Start a worker; return its pid and the pipe to read from."""
    reading, writing = os.pipe()
    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # our handlers must not run in the worker
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads: the worker uses none
            pid = os.fork()
        if pid == 0:
            os.close(reading)
            _work(batches, order, writing, mask)
    except OSError:
        os.close(reading)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(writing)
    return pid, os.fdopen(reading, "rb", buffering=0)


def _work(batches: Batches, order: Sequence[int], pipe: int, mask: set) -> None:
    """Run in the worker: write the batches to the pipe, then exit; never returns."""
    status = 1
    try:
        for s in STOP_SIGNALS:  # handled by the parent, which ends its workers
            signal.signal(s, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        torch.set_num_threads(1)
        for b in order:
            _send(batches, b, pipe)
        status = 0
    except BrokenPipeError:  # the parent has ended or closed the pipe
        status = 0
    finally:
        os._exit(status)  # skip the parent's cleanup


def _send(batches: Batches, b: int, pipe: int) -> None:
    """Write batch b: length of the head, head (JSON of names, dtypes, shapes), raw data; or FAILED."""
    try:
        fields = batches[b]
    except Exception:  # the parent makes the batch and raises the error, if it persists
        _write(pipe, memoryview(HEAD_LENGTH.pack(FAILED)))
        return
    head = {name: None if x is None else [str(x.dtype).removeprefix("torch."), *x.shape] for name, x in fields.items()}
    text = json.dumps(head).encode()
    _write(pipe, memoryview(HEAD_LENGTH.pack(len(text)) + text))
    for x in fields.values():
        if x is not None:
            _write(pipe, _bytes_of(x))


def _read(pipe: io.FileIO, pin: bool) -> Fields | None:
    """Read a batch that _send wrote, None for FAILED; EOFError if the pipe ends inside it."""
    (length,) = HEAD_LENGTH.unpack(_read_bytes(pipe, HEAD_LENGTH.size))
    if length == FAILED:
        return None
    fields: Fields = {}
    for name, description in json.loads(_read_bytes(pipe, length)).items():
        if description is None:
            fields[name] = None
            continue
        dtype, *shape = description
        fields[name] = x = torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=pin)
        _fill(pipe, _bytes_of(x))
    return fields


def _bytes_of(x: Tensor) -> memoryview:
    """View a contiguous tensor as bytes."""
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
