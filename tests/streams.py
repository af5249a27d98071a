"""A stand-in for CUDA streams on the CPU that detects missing synchronisation.

Every op counts as work on the current stream. An op may only read memory that its own stream has written, or that
another stream wrote before the current one waited for it. Memory used on another stream than that of its allocation
must be recorded for the allocator (Tensor.record_stream).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Race(AssertionError):
    """A stream reads memory that another one may still write."""


class Stream:
    """Stands in for torch.cuda.Stream. `seen[other]` counts the ops of `other` that end before this one's next op."""

    def __init__(self, name: str, heeds_waits: bool = True):
        self.name, self.heeds_waits = name, heeds_waits
        self.seen: dict[Stream, int] = defaultdict(int)

    def wait_stream(self, other: Stream) -> None:
        if self.heeds_waits:
            for stream, time in other.seen.items():
                self.seen[stream] = max(self.seen[stream], time)


class Streams(TorchDispatchMode):
    """Checks the ops inside the block. Patches torch.cuda through `monkeypatch`, which undoes it.

    heeds_waits: False makes wait_stream do nothing, to show that a missing wait is detected.
    """

    def __init__(self, monkeypatch, *, heeds_waits: bool = True):
        super().__init__()
        self.heeds_waits = heeds_waits
        self.main = self.current = Stream("main", heeds_waits)
        self.written: dict[int, tuple[Stream, int]] = {}  # by address of the memory
        self.used: dict[int, set[Stream]] = defaultdict(set)
        self.recorded: dict[int, set[Stream]] = defaultdict(set)
        self.kept: list[Tensor] = []  # so that no memory is used twice
        for name, stand_in in (
            ("Stream", lambda device=None: Stream("side", heeds_waits)),
            ("current_stream", lambda device=None: self.current),
            ("stream", self._on),
        ):
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: self.recorded[_address(x)].add(stream))

    @contextlib.contextmanager
    def _on(self, stream: Stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        read = {_address(x) for x in tree_leaves((arguments, named)) if isinstance(x, Tensor)}
        for address in read & self.written.keys():
            writer, time = self.written[address]
            if writer is not self.current and self.current.seen[writer] < time:
                raise Race(f"{function.name()} on {self.current.name} reads memory of {writer.name} without a wait")
            if writer is not self.current:
                self.used[address].add(self.current)
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and _address(x) not in read:
                self._write(x, self.current)
        return result

    def _write(self, x: Tensor, stream: Stream) -> None:
        stream.seen[stream] += 1
        self.written[_address(x)] = (stream, stream.seen[stream])
        self.kept.append(x)

    def unrecorded(self) -> list[tuple[int, ...]]:
        """Return the shapes of tensors used on a stream without record_stream."""
        missing = {address for address, streams in self.used.items() if streams - self.recorded[address]}
        return [tuple(x.shape) for x in self.kept if _address(x) in missing]


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
