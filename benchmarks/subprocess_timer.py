"""Time a function in its own process, because memory settings change times and are fixed once a process starts."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from unittest.mock import patch

from benchmarks.interleaved import CallTime, time_call
from las_fast.system import tune_memory


class SubprocessTimer:
    """Each call runs make(*arguments)() in another process and returns the time measured there.

    Args:
        make:      called once in the process; returns the function to time. It must be importable.
        arguments: of `make`; they must be picklable.
        tuned:     use the memory settings of the las_fast commands, instead of the defaults of PyTorch and glibc.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *arguments, tuned: bool):
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_pipe, tuned, make, arguments), daemon=True)
        with patch.dict(os.environ, {"THP_MEM_ALLOC_ENABLE": str(int(tuned))}):  # read at the child's first allocation
            self.process.start()
        child_pipe.close()

    def __call__(self) -> CallTime:
        self.pipe.send("run")
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join()


@contextlib.contextmanager
def closing_all(timers: dict[str, SubprocessTimer]) -> Iterator[dict[str, SubprocessTimer]]:
    """Yield the timers, then end their processes."""
    try:
        yield timers
    finally:
        for timer in timers.values():
            timer.close()


def _serve(pipe: Connection, tuned: bool, make: Callable, arguments: tuple) -> None:
    if tuned:
        tune_memory()
    function = make(*arguments)
    while True:
        try:
            pipe.recv()
        except EOFError:  # the parent closed the pipe
            return
        function()  # warm up: another process has used the caches since the last call
        pipe.send(time_call(function))
