"""AU, CAF and W64: one header, then samples."""

from __future__ import annotations

import struct

from las_fast.data.containers.magic import container_at
from las_fast.data.containers.riff import is_unknown
from las_fast.data.containers.streams import MAX_CHUNKS, Layout, Source, Stream, add_headless, read_struct

W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"


def _append_plain(source: Source, layout: Layout, start: int, begin: int, claimed: int | None, count: range) -> int:
    """Add the stream whose samples begin at `begin`; claimed is the header's count of bytes (None: unknown).

    count is the places of that count in the header, to be put right where it is wrong.
    """
    there = max(0, source.size - begin)
    if claimed is not None and claimed <= 0 and there:  # it was never filled in
        claimed = None
    end = begin + (there if claimed is None else min(claimed, there))
    if claimed is not None and claimed <= there:
        layout.streams.append(Stream(((start, end),)))
        return end
    number = struct.pack(">q", end - begin) if len(count) == 8 else b"\xff" * 4  # in 4 bytes: all that there is
    header = source.read(start, count.start - start) + number + source.read(count.stop, begin - count.stop)
    layout.streams.append(Stream((header, (begin, end)), lacking=0 if claimed is None else claimed - there))
    return end


def walk_au(source: Source, start: int, layout: Layout) -> int:
    offset, claimed = read_struct(source, start + 4, ">II")
    known = None if is_unknown(claimed) and start + offset + claimed > source.size else claimed
    return _append_plain(source, layout, start, start + max(24, offset), known, range(start + 8, start + 12))


def walk_caf(source: Source, start: int, layout: Layout) -> int:
    place = start + 8
    for _ in range(MAX_CHUNKS):
        name, length = read_struct(source, place, ">4sq")
        if name == b"data":
            claimed = None if length < 4 else length
            # The count of edits, four bytes, belongs to the chunk
            return _append_caf(source, layout, start, place, claimed)
        place += 12 + length
    return add_headless(source, start, layout)


def _append_caf(source: Source, layout: Layout, start: int, place: int, claimed: int | None) -> int:
    begin = place + 12
    end = _append_plain(source, layout, start, begin, claimed, range(place + 4, place + 12))
    following = end
    for _ in range(MAX_CHUNKS):
        name, length = read_struct(source, following, ">4sq")
        if not all(32 <= byte < 127 for byte in name) or not 0 <= length <= source.size - following - 12:
            break
        following += 12 + length
    if following > end:  # chunks behind the sound, as ALAC's packet table
        layout.streams[-1] = Stream(((start, following),))
    return following


def walk_w64(source: Source, start: int, layout: Layout) -> int:
    place = start + 40
    for _ in range(MAX_CHUNKS):
        name, length = read_struct(source, place, "<16sq")
        if name == W64_DATA:
            claimed = length - 24 if 24 < length < 2**62 else None
            there = source.size - place - 24
            if claimed is not None and claimed <= there:
                end = place + 24 + claimed + -claimed % 8
                end = end if container_at(source, end) else source.size
                layout.streams.append(Stream(((start, end),)))
                return end
            header = source.read(start, place - start + 16) + struct.pack("<q", 24 + there)
            lacking = claimed - there if claimed is not None else 0
            layout.streams.append(Stream((header, (place + 24, source.size)), lacking=lacking))
            return source.size
        place += length + -length % 8
    return add_headless(source, start, layout)
