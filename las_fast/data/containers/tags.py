"""Tags before the audio (ID3v2) and after it (ID3v1, APE)."""

from __future__ import annotations

from las_fast.data.containers.streams import Source, read_struct


def skip_tags(source: Source, position: int) -> int:
    """Return the position after any ID3v2 tags."""
    while (head := source.read(position, 10))[:3] == b"ID3" and len(head) == 10:
        size = sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        position += 10 + size + (10 if head[5] & 16 else 0)
    return position


def without_trailing_tags(source: Source, start: int, end: int) -> int:
    """Return the end of the audio in [start, end), without ID3v1 and APE tags after it."""
    while True:
        before = end
        if source.read(end - 128, 3) == b"TAG" and end - 128 >= start:
            end -= 128
        name, size, flags = read_struct(source, end - 32, "<8s4xI4xI")
        if name == b"APETAGEX":
            end -= min(size + (32 if flags & 1 << 31 else 0), end - start)
        if end == before:
            return end
