"""wav and AIFF: containers of chunks."""

from __future__ import annotations

import struct

from las_fast.data.containers.magic import container_at
from las_fast.data.containers.mpeg import walk_mpeg
from las_fast.data.containers.streams import MAX_CHUNKS, Layout, Source, Stream, add_headless, read_struct

UNKNOWN = (1 << 31, 1 << 32)  # a recorder that writes to a pipe claims about so many bytes, or none
NEARLY = 1 << 16  # bytes


def _is_chunk(source: Source, place: int, order: str) -> bool:
    """Return whether a chunk may begin here: a name in ASCII, and a length that the file has room for."""
    head = source.read(place, 8)
    if len(head) < 8 or not all(32 <= byte < 127 for byte in head[:4]):
        return False
    (length,) = struct.unpack(order + "I", head[4:])
    return head[:4] in (b"data", b"SSND", b"BODY") or place + 8 + length <= source.size + 1


def _behind_chunk(source: Source, place: int, length: int, order: str) -> tuple[int, bool]:
    """Return where the next chunk begins, and whether that is where it should: a pad byte may have been forgotten."""
    end = place + 8 + length
    if length % 2 and _is_chunk(source, end, order) and not _is_chunk(source, end + 1, order):
        return end, False
    return end + length % 2, True


def _chunks(source: Source, start: int, order: str, wanted: bytes):
    """Return {name: (place, length)} of the chunks up to the wanted one, and whether all lay where they should."""
    found: dict[bytes, tuple[int, int]] = {}
    place, regular = start + 12, True
    for _ in range(MAX_CHUNKS):
        if place + 8 > source.size or wanted in found:
            break
        name, length = read_struct(source, place, order + "4sI")
        found.setdefault(name, (place, length))
        place, right = _behind_chunk(source, place, length, order)
        regular &= right
    return found, regular


def walk_wav(source: Source, start: int, layout: Layout) -> int:
    """wav, big-endian wav, RF64 and its twin BW64, which libsndfile does not know."""
    form = source.read(start, 4)
    order = ">" if form == b"RIFX" else "<"
    chunks, regular = _chunks(source, start, order, b"data")
    if b"data" not in chunks or b"fmt " not in chunks:
        return add_headless(source, start, layout)
    place, claimed = chunks[b"data"]
    if form in (b"RF64", b"BW64") and claimed == 0xFFFFFFFF and b"ds64" in chunks:
        (claimed,) = read_struct(source, chunks[b"ds64"][0] + 16, "<Q")
    begin, there = place + 8, source.size - place - 8
    length = true_length(source, begin, claimed, order)
    more, after = _chunks_behind(source, place, length, order)
    format_place, format_length = chunks[b"fmt "]
    content = source.read(format_place + 8, min(format_length, 4096))
    if content[:2] in (b"\x55\0", b"\x50\0") and order == "<":
        walk_mpeg(source, begin, layout, begin + min(length, there))
    elif regular and length == claimed <= there and form != b"BW64":
        layout.streams.append(Stream(((start, more[0][0] if more else after),)))
    else:
        layout.streams.append(_bare_riff(source, place, length, order, content))
    layout.streams += [_bare_riff(source, place, length, order, content) for place, length in more if length]
    return after


def _bare_riff(source: Source, place: int, length: int, order: str, content: bytes) -> Stream:
    """Return the stream of a chunk of sound under a header of its own."""
    begin, end = place + 8, min(place + 8 + length, source.size)
    return Stream((_riff_header(order, content, end - begin), (begin, end)), lacking=begin + length - end)


def true_length(source: Source, begin: int, claimed: int, order: str) -> int:
    """Return how many bytes of sound there should be, given the length by the header."""
    there = source.size - begin
    if claimed > there:
        return there if is_unknown(claimed) else claimed
    if claimed == 0 and not _is_chunk(source, begin, order):
        return there
    return there if there - claimed >= 2**32 - NEARLY else claimed  # more than 4 GiB, counted with 32 bits


def is_unknown(claimed: int) -> bool:
    return claimed >= 1 << 62 or any(abs(claimed - number) <= NEARLY for number in UNKNOWN)


def _riff_header(order: str, content: bytes, length: int) -> bytes:
    head = struct.pack(order + "4sI", b"fmt ", len(content)) + content + b"\0" * (len(content) % 2)
    if length < 0xFFFFFF00 or order == ">":
        size = min(4 + len(head) + 8 + length, 0xFFFFFFFF)
        name = b"RIFX" if order == ">" else b"RIFF"
        tail = struct.pack(order + "4sI", b"data", min(length, 0xFFFFFFFF))
        return struct.pack(order + "4sI4s", name, size, b"WAVE") + head + tail
    sizes = struct.pack("<4sIQQQI", b"ds64", 28, 4 + 36 + len(head) + 8 + length, length, 0, 0)
    tail = struct.pack("<4sI", b"data", 0xFFFFFFFF)
    return struct.pack("<4sI4s", b"RF64", 0xFFFFFFFF, b"WAVE") + sizes + head + tail


def _chunks_behind(source: Source, place: int, length: int, order: str) -> tuple[list[tuple[int, int]], int]:
    """Return (place, length) of the data chunks behind a chunk of sound, and where the chunks end.

    They end where another file begins, which may have been appended without the pad byte, or with one too many.
    """
    found, end = [], place + 8 + length
    following = next((p for p in (end, end + 1) if container_at(source, p)), None)
    place = _behind_chunk(source, place, length, order)[0] if following is None else following
    for _ in range(MAX_CHUNKS):
        if not _is_chunk(source, place, order) or container_at(source, place):
            break
        name, length = read_struct(source, place, order + "4sI")
        if name == b"data":
            found.append((place, length))
        place = _behind_chunk(source, place, length, order)[0]
    return found, min(place, source.size)


def walk_aiff(source: Source, start: int, layout: Layout) -> int:
    """AIFF, AIFF-C and Amiga IFF."""
    sound = b"SSND" if source.read(start + 8, 3) == b"AIF" else b"BODY"
    chunks, _ = _chunks(source, start, ">", sound)
    if sound not in chunks:
        return add_headless(source, start, layout)
    place, claimed = chunks[sound]
    begin = place + 8
    length = true_length(source, begin, claimed, ">")
    end = min(begin + length, source.size)
    if length == claimed <= source.size - begin:
        after = _chunks_behind(source, place, length, ">")[1]
        layout.streams.append(Stream(((start, after),)))
        return after
    header = source.read(start, begin - 4 - start) + struct.pack(">I", min(end - begin, 0xFFFFFFFF))
    layout.streams.append(Stream((header, (begin, end)), lacking=begin + length - end))
    return end
