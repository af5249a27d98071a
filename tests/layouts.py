"""Helpers of the container tests: files in memory, and the streams that las_fast.data.containers finds in them."""

from __future__ import annotations

import struct

from las_fast.data.containers import FileLayout, Stream, find_streams


class Bytes:
    """A Source in memory. size: size of the file, if larger than the data."""

    def __init__(self, data: bytes, size: int | None = None):
        self.data, self.size = data, len(data) if size is None else size

    def read(self, start: int, count: int) -> bytes:
        return self.data[start : start + count] if start >= 0 else b""


def layout_of(data: bytes, size: int | None = None) -> FileLayout:
    return find_streams(Bytes(data, size))


def streams_of(data: bytes, size: int | None = None) -> list[Stream]:
    """The streams of a file; asserts that all of it is read."""
    layout = layout_of(data, size)
    assert layout.unread == []
    return layout.streams


def chunk(name: bytes, content: bytes = b"", size: int | None = None, *, pad: bool = True, order: str = "<") -> bytes:
    odd = b"\0" if pad and len(content) % 2 else b""
    return name + struct.pack(order + "I", len(content) if size is None else size) + content + odd


def riff_file(*chunks: bytes, size: int | None = None, name: bytes = b"RIFF", form: bytes = b"WAVE", order: str = "<"):
    content = form + b"".join(chunks)
    return name + struct.pack(order + "I", len(content) if size is None else size) + content
