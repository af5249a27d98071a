"""Formats made of chunks: wav, RF64, AIFF and Amiga IFF. Padding and stated lengths may be wrong."""

from __future__ import annotations

import struct

from las_fast.data.containers.magic import container_at
from las_fast.data.containers.mpeg import walk_mpeg
from las_fast.data.containers.streams import MAX_CHUNKS, FileLayout, Source, Stream, add_truncated_header, read_struct

UNKNOWN_LENGTHS = (1 << 31, 1 << 32)  # bytes; recorders that write to a pipe state one of these, or 0
UNKNOWN_TOLERANCE = 1 << 16  # bytes by which a stated length may differ from these


def _is_chunk(source: Source, position: int, order: str) -> bool:
    """Return whether a chunk may begin here: an ASCII name, and a length that fits into the file."""
    head = source.read(position, 8)
    if len(head) < 8 or not all(32 <= byte < 127 for byte in head[:4]):
        return False
    (length,) = struct.unpack(order + "I", head[4:])
    return head[:4] in (b"data", b"SSND", b"BODY") or position + 8 + length <= source.size + 1


def _after_chunk(source: Source, position: int, length: int, order: str) -> tuple[int, bool]:
    """Return the position of the next chunk, and whether the pad byte before it follows the standard."""
    end = position + 8 + length
    if length % 2 and _is_chunk(source, end, order) and not _is_chunk(source, end + 1, order):
        return end, False
    return end + length % 2, True


def _chunks(source: Source, start: int, order: str, wanted: bytes):
    """Return {name: (position, length)} of the chunks up to `wanted`, and whether all are padded correctly."""
    chunks: dict[bytes, tuple[int, int]] = {}
    position, regular = start + 12, True
    for _ in range(MAX_CHUNKS):
        if position + 8 > source.size or wanted in chunks:
            break
        name, length = read_struct(source, position, order + "4sI")
        chunks.setdefault(name, (position, length))
        position, padded = _after_chunk(source, position, length, order)
        regular &= padded
    return chunks, regular


def walk_wav(source: Source, start: int, layout: FileLayout) -> int:
    """Add the streams of a wav, RIFX (big-endian wav), RF64 or BW64 (RF64 by another name, unknown to libsndfile)."""
    form = source.read(start, 4)
    order = ">" if form == b"RIFX" else "<"
    chunks, regular = _chunks(source, start, order, b"data")
    if b"data" not in chunks or b"fmt " not in chunks:
        return add_truncated_header(source, start, layout)
    position, claimed = chunks[b"data"]
    if form in (b"RF64", b"BW64") and claimed == 0xFFFFFFFF and b"ds64" in chunks:
        (claimed,) = read_struct(source, chunks[b"ds64"][0] + 16, "<Q")
    begin, available = position + 8, source.size - position - 8
    length = true_length(source, begin, claimed, order)
    more, after = _chunks_after(source, position, length, order)
    format_position, format_length = chunks[b"fmt "]
    content = source.read(format_position + 8, min(format_length, 4096))
    if content[:2] in (b"\x55\0", b"\x50\0") and order == "<":
        walk_mpeg(source, begin, layout, begin + min(length, available))
    elif regular and length == claimed <= available and form != b"BW64":
        layout.streams.append(Stream(((start, more[0][0] if more else after),)))
    else:
        layout.streams.append(_with_new_header(source, position, length, order, content))
    layout.streams += [
        _with_new_header(source, position, length, order, content) for position, length in more if length
    ]
    return after


def _with_new_header(source: Source, position: int, length: int, order: str, content: bytes) -> Stream:
    """Return the stream of a data chunk with a new header."""
    begin, end = position + 8, min(position + 8 + length, source.size)
    return Stream((_riff_header(order, content, end - begin), (begin, end)), missing_bytes=begin + length - end)


def true_length(source: Source, begin: int, claimed: int, order: str) -> int:
    """Return the likely length in bytes of the audio at `begin`; claimed: its length according to the header."""
    available = source.size - begin
    if claimed > available:
        return available if is_unknown(claimed) else claimed
    if claimed == 0xFFFFFFFF or (claimed == 0 and not _is_chunk(source, begin, order)):  # the length is unknown
        return available
    overflowed = available - claimed >= 2**32 - UNKNOWN_TOLERANCE  # a length of more than 4 GiB modulo 2**32
    return available if overflowed else claimed


def is_unknown(claimed: int) -> bool:
    """Return whether a length in a header stands for an unknown length."""
    return claimed >= 1 << 62 or any(abs(claimed - number) <= UNKNOWN_TOLERANCE for number in UNKNOWN_LENGTHS)


def _riff_header(order: str, content: bytes, length: int) -> bytes:
    """Return a header for `length` bytes of audio (RF64 from 4 GiB on); content: of the fmt chunk."""
    head = struct.pack(order + "4sI", b"fmt ", len(content)) + content + b"\0" * (len(content) % 2)
    if length < 0xFFFFFF00 or order == ">":
        size = min(4 + len(head) + 8 + length, 0xFFFFFFFF)
        name = b"RIFX" if order == ">" else b"RIFF"
        tail = struct.pack(order + "4sI", b"data", min(length, 0xFFFFFFFF))
        return struct.pack(order + "4sI4s", name, size, b"WAVE") + head + tail
    sizes = struct.pack("<4sIQQQI", b"ds64", 28, 4 + 36 + len(head) + 8 + length, length, 0, 0)
    tail = struct.pack("<4sI", b"data", 0xFFFFFFFF)
    return struct.pack("<4sI4s", b"RF64", 0xFFFFFFFF, b"WAVE") + sizes + head + tail


def _chunks_after(source: Source, position: int, length: int, order: str) -> tuple[list[tuple[int, int]], int]:
    """Return (position, length) of the data chunks after a data chunk, and the end of the chunks.

    The chunks end where an appended file begins. The pad byte before it may be missing, or be one too many.
    """
    data_chunks, end = [], position + 8 + length
    following = next((p for p in (end, end + 1) if container_at(source, p)), None)
    position = _after_chunk(source, position, length, order)[0] if following is None else following
    for _ in range(MAX_CHUNKS):
        if not _is_chunk(source, position, order) or container_at(source, position):
            break
        name, length = read_struct(source, position, order + "4sI")
        if name == b"data":
            data_chunks.append((position, length))
        position = _after_chunk(source, position, length, order)[0]
    return data_chunks, min(position, source.size)


def walk_aiff(source: Source, start: int, layout: FileLayout) -> int:
    """Add the stream of an AIFF, AIFF-C or Amiga IFF file (8SVX, 16SV)."""
    sound = b"SSND" if source.read(start + 8, 3) == b"AIF" else b"BODY"
    chunks, _ = _chunks(source, start, ">", sound)
    if sound not in chunks:
        return add_truncated_header(source, start, layout)
    position, claimed = chunks[sound]
    begin = position + 8
    length = true_length(source, begin, claimed, ">")
    end = min(begin + length, source.size)
    if length == claimed <= source.size - begin:
        after = _chunks_after(source, position, length, ">")[1]
        layout.streams.append(Stream(((start, after),)))
        return after
    header = source.read(start, begin - 4 - start) + struct.pack(">I", min(end - begin, 0xFFFFFFFF))
    layout.streams.append(Stream((header, (begin, end)), missing_bytes=begin + length - end))
    return end
