"""A function in a process of its own: how a process treats its memory can be chosen but once, and changes the times."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from unittest.mock import patch

from benchmarks.paired import Clocked, clocked
from las_fast.system import tune_memory


class Elsewhere:
    """Calls make(*arguments)() in another process, and returns how long that took there.

    Args:
        make:      returns the function to be timed; importable, as its arguments must be picklable.
        tuned:     the process treats its memory as the commands of las_fast do, not as PyTorch and glibc do by default.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *arguments, tuned: bool):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, tuned, make, arguments), daemon=True)
        with patch.dict(os.environ, {"THP_MEM_ALLOC_ENABLE": "01"[tuned]}):  # before PyTorch's first tensor there
            self.process.start()
        theirs.close()

    def __call__(self) -> Clocked:
        self.pipe.send("run")
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join()


@contextlib.contextmanager
def each_elsewhere(steps: dict[str, Elsewhere]) -> Iterator[dict[str, Elsewhere]]:
    """Yield the steps, and end their processes."""
    try:
        yield steps
    finally:
        for step in steps.values():
            step.close()


def _serve(pipe: Connection, tuned: bool, make: Callable, arguments: tuple) -> None:
    if tuned:
        tune_memory()
    function = make(*arguments)
    while True:
        try:
            pipe.recv()
        except EOFError:  # the other side has closed
            return
        function()  # another process has had the caches meanwhile
        pipe.send(clocked(function))
