"""The bytes of a file, and the streams in it."""

from __future__ import annotations

import os
import re
import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

PREROLL = 0.5  # seconds decoded before a part and dropped, so that a lossy codec has settled
MAX_CHUNKS = 10_000  # per container; more are a sign of damage
WINDOW = 1 << 16  # bytes per read
Span = bytes | tuple[int, int]  # bytes in memory, or (start, end) in the file


class Source:
    """The bytes of an open file, read by position. After a read error the file appears to end, and `error` is set."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self.error: OSError | None = None
        self._start, self._window = 0, b""

    def read(self, start: int, count: int) -> bytes:
        """Return up to `count` bytes from `start`; fewer at the end of the file, none outside it."""
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


class FileView:
    """Spans joined into one virtual file for libsndfile. Its methods, called from C, do not raise."""

    def __init__(self, source: Source, spans: tuple[Span, ...]):
        self.source, self.spans = source, spans
        self.starts = [0, *accumulate(map(span_length, spans))]
        self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.starts[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        done, room = 0, len(buffer)
        while self._position < self.starts[-1]:
            number = bisect_right(self.starts, self._position) - 1
            span, offset = self.spans[number], self._position - self.starts[number]
            count = min(room - done, self.starts[number + 1] - self._position)
            in_memory = isinstance(span, bytes)
            data = span[offset : offset + count] if in_memory else self.source.read(span[0] + offset, count)
            if not data:
                break
            buffer[done : done + len(data)] = data
            done, self._position = done + len(data), self._position + len(data)
        return done


@dataclass(frozen=True)
class Stream:
    """One stream: the bytes to decode, and how much audio they should contain."""

    spans: tuple[Span, ...]
    sample_count: int | None = None  # samples per channel according to the header
    missing_bytes: int = 0  # bytes that lie beyond the end of the file, according to the header
    cut: bool = False  # the end is missing, and its length is unknown
    truncated_header: bool = False  # the file ends within the header
    gap: str = ""  # describes audio missing in the middle
    preroll: float = 0.0  # seconds to decode before a part; see PREROLL
    resumable: bool = False  # decoding can resume after damage
    length_known: bool = True  # libsndfile knows the number of samples in advance
    padding: int = 0  # samples per channel that an mp3 encoder added and a decoder may remove

    @property
    def length(self) -> int:
        """Bytes to decode."""
        return sum(map(span_length, self.spans))


@dataclass
class FileLayout:
    """The audio streams of a file, in order.

    unread has a clause with advice for each stretch of audio that is not read, such as "contains 2 parallel audio
    streams, ...; keep one: ...".
    """

    streams: list[Stream] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def add_truncated_header(source: Source, start: int, layout: FileLayout) -> int:
    """Add the rest of the file as a stream that ends within its header; return the end of the file."""
    layout.streams.append(Stream(((start, source.size),), truncated_header=True))
    return source.size


def read_struct(source: Source, start: int, form: str) -> tuple:
    """Unpack a struct format; bytes after the end of the file count as zeros."""
    size = struct.calcsize(form)
    return struct.unpack(form, source.read(start, size).ljust(size, b"\0"))


def find_pattern(source: Source, pattern: re.Pattern, position: int) -> int:
    """Return the position of the first match of a pattern of at most 16 bytes, or the size of the file."""
    while position < source.size:
        if match := pattern.search(source.read(position, WINDOW)):
            return position + match.start()
        position += WINDOW - 15
    return source.size
