"""The bytes of a file, and the streams of sound that a container holds."""

from __future__ import annotations

import os
import re
import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

PREROLL = 0.5  # seconds, for lossy codecs
MAX_CHUNKS = 10_000  # in a container; more are damage
WINDOW = 1 << 16  # bytes read at once
Span = bytes | tuple[int, int]  # bytes made up here, or (start, end) in the file


class Source:
    """The bytes of an open file, read by position; a failing disk ends the file and is remembered."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self.error: OSError | None = None
        self._start, self._window = 0, b""

    def read(self, start: int, count: int) -> bytes:
        """Return up to count bytes from start on."""
        offset = start - self._start
        if offset >= 0 and offset + count <= len(self._window):
            return self._window[offset : offset + count]
        self._start, self._window = start, self._pread(start, max(count, WINDOW))
        return self._window[:count]

    def _pread(self, start: int, count: int) -> bytes:
        try:
            return os.pread(self.descriptor, min(count, self.size - start), start) if 0 <= start < self.size else b""
        except OSError as error:
            self.error = error
            return b""


def span_length(span: Span) -> int:
    return len(span) if isinstance(span, bytes) else span[1] - span[0]


class View:
    """Spans one after another as the file that libsndfile is given; no call raises."""

    def __init__(self, source: Source, spans: tuple[Span, ...]):
        self.source, self.spans = source, spans
        self.starts = [0, *accumulate(map(span_length, spans))]
        self.place = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.starts[-1]}[whence]
        self.place = max(0, base + offset)
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer) -> int:
        done, room = 0, len(buffer)
        while self.place < self.starts[-1]:
            number = bisect_right(self.starts, self.place) - 1
            span, offset = self.spans[number], self.place - self.starts[number]
            count = min(room - done, self.starts[number + 1] - self.place)
            in_memory = isinstance(span, bytes)
            data = span[offset : offset + count] if in_memory else self.source.read(span[0] + offset, count)
            if not data:
                break
            buffer[done : done + len(data)] = data
            done, self.place = done + len(data), self.place + len(data)
        return done


@dataclass(frozen=True)
class Stream:
    """One stream: the bytes to decode, and what should be there."""

    spans: tuple[Span, ...]
    frames: int | None = None  # samples per channel by the header
    lacking: int = 0  # bytes by which the file is shorter than the header says
    cut: bool = False  # the end is missing, by an unknown amount
    headless: bool = False  # no sound was found behind the header
    hole: str = ""  # what is missing in the middle
    preroll: float = 0.0  # seconds to decode before a part, until the decoder has what it needs of the past
    resumable: bool = False  # decoding can go on behind damage
    counted: bool = True  # the decoder knows how many samples it will give
    padding: int = 0  # samples per channel that an mp3 encoder added, and a decoder may take off

    @property
    def length(self) -> int:
        return sum(map(span_length, self.spans))


@dataclass
class Layout:
    """What a file holds: its streams in order, and sentences on what is left behind."""

    streams: list[Stream] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def add_headless(source: Source, start: int, layout: Layout) -> int:
    """Add the rest of the file as a stream that ends within its header."""
    layout.streams.append(Stream(((start, source.size),), headless=True))
    return source.size


def read_struct(source: Source, start: int, form: str) -> tuple:
    size = struct.calcsize(form)
    return struct.unpack(form, source.read(start, size).ljust(size, b"\0"))


def find_pattern(source: Source, pattern: re.Pattern, place: int) -> int:
    """Return where the pattern, of 16 bytes at most, is found from place on, or the size of the file."""
    while place < source.size:
        if match := pattern.search(source.read(place, WINDOW)):
            return place + match.start()
        place += WINDOW - 15
    return source.size
