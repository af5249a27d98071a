"""AU, CAF and W64: one header, then samples."""

from __future__ import annotations

import struct

from las_fast.data.containers.magic import container_at
from las_fast.data.containers.riff import is_unknown
from las_fast.data.containers.streams import MAX_CHUNKS, FileLayout, Source, Stream, add_truncated_header, read_struct

W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"


def _append_plain(source: Source, layout: FileLayout, start: int, begin: int, claimed: int | None, field: range) -> int:
    """Add the stream whose samples begin at `begin`; return its end.

    Args:
        claimed: length of the samples in bytes according to the header; None: unknown.
        field:   bytes of the file that hold this length; they are replaced if it is wrong.
    """
    available = max(0, source.size - begin)
    if claimed is not None and claimed <= 0 and available:  # the recorder did not fill it in
        claimed = None
    end = begin + (available if claimed is None else min(claimed, available))
    if claimed is not None and claimed <= available:
        layout.streams.append(Stream(((start, end),)))
        return end
    number = struct.pack(">q", end - begin) if len(field) == 8 else b"\xff" * 4  # AU: up to the end of the file
    header = source.read(start, field.start - start) + number + source.read(field.stop, begin - field.stop)
    layout.streams.append(Stream((header, (begin, end)), missing_bytes=0 if claimed is None else claimed - available))
    return end


def walk_au(source: Source, start: int, layout: FileLayout) -> int:
    """Add the stream of an AU file; return its end."""
    offset, claimed = read_struct(source, start + 4, ">II")
    end = start + offset + claimed
    # In the standard 0xFFFFFFFF means an unknown length. So do other lengths near 2 or 4 GiB if the file is shorter.
    unknown = end != source.size if claimed == 0xFFFFFFFF else end > source.size
    length = None if unknown and is_unknown(claimed) else claimed
    return _append_plain(source, layout, start, start + max(24, offset), length, range(start + 8, start + 12))


def walk_caf(source: Source, start: int, layout: FileLayout) -> int:
    """Add the stream of a Core Audio file; return its end."""
    position = start + 8
    for _ in range(MAX_CHUNKS):
        name, length = read_struct(source, position, ">4sq")
        if name == b"data":
            claimed = None if length < 4 else length  # the chunk includes an edit count of 4 bytes
            return _append_caf(source, layout, start, position, claimed)
        position += 12 + length
    return add_truncated_header(source, start, layout)


def _append_caf(source: Source, layout: FileLayout, start: int, position: int, claimed: int | None) -> int:
    begin = position + 12
    end = _append_plain(source, layout, start, begin, claimed, range(position + 4, position + 12))
    following = end
    for _ in range(MAX_CHUNKS):
        name, length = read_struct(source, following, ">4sq")
        if not all(32 <= byte < 127 for byte in name) or not 0 <= length <= source.size - following - 12:
            break
        following += 12 + length
    if following > end:  # chunks after the audio, such as ALAC's packet table
        layout.streams[-1] = Stream(((start, following),))
    return following


def walk_w64(source: Source, start: int, layout: FileLayout) -> int:
    """Add the stream of a Sony Wave64 file; return its end."""
    position = start + 40
    for _ in range(MAX_CHUNKS):
        name, length = read_struct(source, position, "<16sq")
        if name == W64_DATA:
            claimed = length - 24 if 24 < length < 2**62 else None
            available = source.size - position - 24
            if claimed is not None and claimed <= available:
                end = position + 24 + claimed + -claimed % 8
                end = end if container_at(source, end) else source.size
                layout.streams.append(Stream(((start, end),)))
                return end
            header = source.read(start, position - start + 16) + struct.pack("<q", 24 + available)
            missing_bytes = claimed - available if claimed is not None else 0
            layout.streams.append(Stream((header, (position + 24, source.size)), missing_bytes=missing_bytes))
            return source.size
        position += length + -length % 8
    return add_truncated_header(source, start, layout)
