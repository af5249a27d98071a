"""Where the sound lies in a file: the streams of a container, told from its bytes before anything is decoded.

libsndfile reads the first stream of a file and believes its header. Real files have several streams (chained Ogg,
joined mp3 or FLAC), headers that were written before the length was known, and ends that are missing. `find_streams`
walks the container, and says for each stream which bytes to decode, with a header that is right, and how much ought to
be there.
"""

from __future__ import annotations

import os
import re
import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any

UNKNOWN = (1 << 31, 1 << 32)  # a recorder that writes to a pipe claims about so many bytes, or none
NEARLY = 1 << 16  # bytes
BEHIND = 1 << 16  # bytes behind the sound that may be anything
PREROLL = 0.5  # seconds, for lossy codecs
CHUNKS = 10_000  # in a container; more are damage
WINDOW = 1 << 16  # bytes read at once
ARCHIVES = (b"PK\x03\x04", b"Rar!", b"7z\xbc\xaf")  # that may hold an mp3 as it is
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


def _length(span: Span) -> int:
    return len(span) if isinstance(span, bytes) else span[1] - span[0]


class View:
    """Spans one after another as the file that libsndfile is given; no call raises."""

    def __init__(self, source: Source, spans: tuple[Span, ...]):
        self.source, self.spans = source, spans
        self.starts = [0, *accumulate(map(_length, spans))]
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
        return sum(map(_length, self.spans))


@dataclass
class Layout:
    """What a file holds: its streams in order, and sentences on what is left behind."""

    streams: list[Stream] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def find_streams(source: Source) -> Layout:
    """Return the streams of a file. A file of no known kind is one stream, for libsndfile to judge."""
    layout = Layout()
    place = 0
    while place < source.size:
        place = _skip_tags(source, place)
        walk = _walker(source, place)
        if walk is None:
            if layout.streams and not layout.streams[-1].padding:
                _note_behind(source, place, layout)
            break
        before = len(layout.streams)
        place = max(walk(source, place, layout), place + 1)
        if len(layout.streams) == before:
            break
    if not layout.streams and not foreign_format(source) and source.read(0, 4) not in ARCHIVES:
        start = _skip_tags(source, 0)
        _walk_mpeg(source, start, source.size, layout)
    if not layout.streams:
        _walk_htk(source, layout)
    if not layout.streams:
        layout.streams.append(Stream(((0, source.size),)))
    _note_uncounted(layout)
    return layout


def _note_uncounted(layout: Layout) -> None:
    """Note sound beyond the 4 GiB that a format can count; only streams of unknown length have it."""
    for stream in layout.streams:
        head, size = stream.spans[0], _length(stream.spans[-1])
        if size > 0xFFFFFFFF and isinstance(head, bytes) and head[:4] in (b"FORM", b"RIFX", b".snd"):
            layout.unread.append(f"holds {size} bytes of sound, of which no more than 4 GiB can be read in its format")


def _note_behind(source: Source, place: int, layout: Layout) -> None:
    """Note many bytes behind the sound that are neither tags nor zeros."""
    end = _without_tags_behind(source, place, source.size)
    if end - place > BEHIND and _find(source, re.compile(rb"[^\x00]"), place) < end:
        layout.unread.append(
            f"has {end - place} bytes behind its sound, of an unknown kind; if they are sound, its header is wrong"
        )


FOREIGN = (
    (4, b"ftyp", "MPEG-4 (m4a, mp4, mov)"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska (webm, mkv)"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "Windows Media (wma, asf)"),
    (0, b"#!AMR", "AMR"),
    (0, b"\xff\xf1", "AAC"),
    (0, b"\xff\xf9", "AAC"),
    (0, b"\x0b\x77", "AC-3"),
    (8, b"AVI ", "AVI"),
    (0, b"FLV\x01", "Flash video"),
    (0, b"wvpk", "WavPack"),
    (0, b"MAC ", "Monkey's Audio"),
    (0, b"TTA1", "True Audio"),
    (0, b"MPCK", "Musepack"),
    (0, b"MP+", "Musepack"),
    (0, b".RMF", "RealMedia"),
    (0, b"DSD ", "DSD"),
    (0, b"\x00\x00\x01\xba", "MPEG video"),
    (0, b"\x00\x00\x01\xb3", "MPEG video"),
)


def foreign_format(source: Source) -> str:
    """Return the name of a format of sound or video that is known but not read here, or ""."""
    head = source.read(_skip_tags(source, 0), 377)
    for place, magic, what in FOREIGN:
        if head[place:].startswith(magic):
            return what
    if len(head) == 377 and head[0] == head[188] == head[376] == 0x47:
        return "an MPEG transport stream"
    return "Ogg without Vorbis, Opus or FLAC" if head.startswith(b"OggS") else ""


def _walker(source: Source, place: int):
    """Return the function that walks the container which begins here, or None."""
    head = source.read(place, 16)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _walk_riff
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC", b"8SVX", b"16SV"):
        return _walk_form
    walkers = {b"OggS": _walk_ogg, b"fLaC": _walk_flac, b".snd": _walk_au, b"caff": _walk_caf, b"riff": _walk_w64}
    if head[:4] in walkers:
        return walkers[head[:4]]
    for magic, claimed_end in CLAIMS.items():
        if head.startswith(magic):
            return lambda source, start, layout: _walk_claimed(source, start, layout, claimed_end)
    if _mpeg_frame(head[:4]):
        return lambda source, start, layout: _walk_mpeg(source, start, source.size, layout)
    return None


def _skip_tags(source: Source, place: int) -> int:
    """Return where the sound begins behind ID3v2 tags."""
    while (head := source.read(place, 10))[:3] == b"ID3" and len(head) == 10:
        size = sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        place += 10 + size + (10 if head[5] & 16 else 0)
    return place


def _without_tags_behind(source: Source, start: int, end: int) -> int:
    """Return the end of the sound before ID3v1 and APE tags."""
    while True:
        before = end
        if source.read(end - 128, 3) == b"TAG" and end - 128 >= start:
            end -= 128
        name, size, flags = _numbers(source, end - 32, "<8s4xI4xI")
        if name == b"APETAGEX":
            end -= min(size + (32 if flags & 1 << 31 else 0), end - start)
        if end == before:
            return end


def _headless(source: Source, start: int, layout: Layout) -> int:
    """Add the rest of the file as a stream that ends within its header."""
    layout.streams.append(Stream(((start, source.size),), headless=True))
    return source.size


# ------------------------------------------------------------------------------------------------- chunks: wav, AIFF


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
    for _ in range(CHUNKS):
        if place + 8 > source.size or wanted in found:
            break
        name, length = _numbers(source, place, order + "4sI")
        found.setdefault(name, (place, length))
        place, right = _behind_chunk(source, place, length, order)
        regular &= right
    return found, regular


def _walk_riff(source: Source, start: int, layout: Layout) -> int:
    """wav, big-endian wav, RF64 and its twin BW64, which libsndfile does not know."""
    form = source.read(start, 4)
    order = ">" if form == b"RIFX" else "<"
    chunks, regular = _chunks(source, start, order, b"data")
    if b"data" not in chunks or b"fmt " not in chunks:
        return _headless(source, start, layout)
    place, claimed = chunks[b"data"]
    if form in (b"RF64", b"BW64") and claimed == 0xFFFFFFFF and b"ds64" in chunks:
        (claimed,) = _numbers(source, chunks[b"ds64"][0] + 16, "<Q")
    begin, there = place + 8, source.size - place - 8
    length = _true_length(source, begin, claimed, order)
    more, after = _chunks_behind(source, place, length, order)
    format_place, format_length = chunks[b"fmt "]
    content = source.read(format_place + 8, min(format_length, 4096))
    if content[:2] in (b"\x55\0", b"\x50\0") and order == "<":
        _walk_mpeg(source, begin, begin + min(length, there), layout)
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


def _true_length(source: Source, begin: int, claimed: int, order: str) -> int:
    """Return how many bytes of sound there should be, given the length by the header."""
    there = source.size - begin
    if claimed > there:
        return there if _is_unknown(claimed) else claimed
    if claimed == 0 and not _is_chunk(source, begin, order):
        return there
    return there if there - claimed >= 2**32 - NEARLY else claimed  # more than 4 GiB, counted with 32 bits


def _is_unknown(claimed: int) -> bool:
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
    following = next((p for p in (end, end + 1) if _walker(source, p)), None)
    place = _behind_chunk(source, place, length, order)[0] if following is None else following
    for _ in range(CHUNKS):
        if not _is_chunk(source, place, order) or _walker(source, place):
            break
        name, length = _numbers(source, place, order + "4sI")
        if name == b"data":
            found.append((place, length))
        place = _behind_chunk(source, place, length, order)[0]
    return found, min(place, source.size)


def _walk_form(source: Source, start: int, layout: Layout) -> int:
    """AIFF, AIFF-C and Amiga IFF."""
    sound = b"SSND" if source.read(start + 8, 3) == b"AIF" else b"BODY"
    chunks, _ = _chunks(source, start, ">", sound)
    if sound not in chunks:
        return _headless(source, start, layout)
    place, claimed = chunks[sound]
    begin = place + 8
    length = _true_length(source, begin, claimed, ">")
    end = min(begin + length, source.size)
    if length == claimed <= source.size - begin:
        after = _chunks_behind(source, place, length, ">")[1]
        layout.streams.append(Stream(((start, after),)))
        return after
    header = source.read(start, begin - 4 - start) + struct.pack(">I", min(end - begin, 0xFFFFFFFF))
    layout.streams.append(Stream((header, (begin, end)), lacking=begin + length - end))
    return end


# ------------------------------------------------------------------------- plain containers: one header, then samples


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


def _walk_au(source: Source, start: int, layout: Layout) -> int:
    offset, claimed = _numbers(source, start + 4, ">II")
    known = None if _is_unknown(claimed) and start + offset + claimed > source.size else claimed
    return _append_plain(source, layout, start, start + max(24, offset), known, range(start + 8, start + 12))


def _walk_caf(source: Source, start: int, layout: Layout) -> int:
    place = start + 8
    for _ in range(CHUNKS):
        name, length = _numbers(source, place, ">4sq")
        if name == b"data":
            claimed = None if length < 4 else length
            # The count of edits, four bytes, belongs to the chunk
            return _append_caf(source, layout, start, place, claimed)
        place += 12 + length
    return _headless(source, start, layout)


def _append_caf(source: Source, layout: Layout, start: int, place: int, claimed: int | None) -> int:
    begin = place + 12
    end = _append_plain(source, layout, start, begin, claimed, range(place + 4, place + 12))
    following = end
    for _ in range(CHUNKS):
        name, length = _numbers(source, following, ">4sq")
        if not all(32 <= byte < 127 for byte in name) or not 0 <= length <= source.size - following - 12:
            break
        following += 12 + length
    if following > end:  # chunks behind the sound, as ALAC's packet table
        layout.streams[-1] = Stream(((start, following),))
    return following


W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"


def _walk_w64(source: Source, start: int, layout: Layout) -> int:
    place = start + 40
    for _ in range(CHUNKS):
        name, length = _numbers(source, place, "<16sq")
        if name == W64_DATA:
            claimed = length - 24 if 24 < length < 2**62 else None
            there = source.size - place - 24
            if claimed is not None and claimed <= there:
                end = place + 24 + claimed + -claimed % 8
                end = end if _walker(source, end) else source.size
                layout.streams.append(Stream(((start, end),)))
                return end
            header = source.read(start, place - start + 16) + struct.pack("<q", 24 + there)
            lacking = claimed - there if claimed is not None else 0
            layout.streams.append(Stream((header, (place + 24, source.size)), lacking=lacking))
            return source.size
        place += length + -length % 8
    return _headless(source, start, layout)


def _walk_claimed(source: Source, start: int, layout: Layout, claimed_end) -> int:
    """A rare format, whose header tells its length."""
    end = claimed_end(source, start)
    layout.streams.append(Stream(((start, source.size),), lacking=max(0, end - source.size)))
    if end > start and _walker(source, end):
        layout.streams[-1] = Stream(((start, end),))
        return end
    return source.size


def _numbers(source: Source, start: int, form: str) -> tuple:
    size = struct.calcsize(form)
    return struct.unpack(form, source.read(start, size).ljust(size, b"\0"))


def _nist_end(source: Source, start: int) -> int:
    """NIST SPHERE: a header of text."""
    text = source.read(start, 1024).decode("latin-1")
    numbers = {name: int(value) for name, value in re.findall(r"^(\w+) -i ([0-9]{1,15})\s*$", text, re.MULTILINE)}
    length = re.match(r" *([0-9]{1,7})\n", text[8:])
    size = numbers.get("channel_count", 1) * numbers.get("sample_n_bytes", 2)
    return start + (int(length[1]) if length else 1024) + numbers.get("sample_count", 0) * size


def _avr_end(source: Source, start: int) -> int:
    stereo, bits, frames = _numbers(source, start + 12, ">HH10xI")
    return start + 128 + frames * (2 if stereo else 1) * bits // 8


def _mpc_end(source: Source, start: int) -> int:
    stereo, frames = _numbers(source, start + 21, "<B8xI")
    return start + 42 + frames * (1 + stereo) * 2


def _wve_end(source: Source, start: int) -> int:
    return start + 32 + _numbers(source, start + 18, ">I")[0]


def _sds_end(source: Source, start: int) -> int:
    """MIDI sample dump: packets of 127 bytes, 120 of them samples of 7 bits a byte."""
    bits, *length = _numbers(source, start + 6, "<B3xBBB")
    frames = sum(byte << shift for byte, shift in zip(length, (0, 7, 14), strict=True))
    return start + 21 + -(-frames // (120 // max(1, (bits + 6) // 7))) * 127


def _voc_end(source: Source, start: int) -> int:
    place = start + _numbers(source, start + 20, "<H")[0]
    for _ in range(CHUNKS):
        head = source.read(place, 4)
        if len(head) < 4 or not head[0]:
            break
        place += 4 + int.from_bytes(head[1:], "little")
    return place + 1 if source.read(place, 1) == b"\0" else place


def _mat4_end(source: Source, start: int) -> int:
    place, order = start, ">" if source.read(start, 4) == b"\0\0\x03\xe8" else "<"
    for _ in range(2):  # the sample rate, the samples
        kind, rows, columns, imaginary, name = _numbers(source, place, order + "5I")
        size = (8, 4, 4, 2, 2, 1)[min(kind % 100 // 10, 5)]
        place += 20 + name + rows * columns * size * (1 + imaginary)
    return place


def _mat5_end(source: Source, start: int) -> int:
    place, order = start + 128, "<" if source.read(start + 126, 2) == b"IM" else ">"
    for _ in range(CHUNKS):
        if place + 8 > source.size:
            break
        place += 8 + _numbers(source, place, order + "4xI")[0]
    return place


CLAIMS = {
    b"NIST_1A": _nist_end,
    b"2BIT": _avr_end,
    b"\x01\x04": _mpc_end,
    b"ALawSoundFile**": _wve_end,
    b"\xf0\x7e": _sds_end,
    b"Creative Voice": _voc_end,
    b"\0\0\0\0\1\0\0\0\1\0\0\0": _mat4_end,
    b"\0\0\x03\xe8\0\0\0\1\0\0\0\1": _mat4_end,
    b"MATLAB 5.0 MAT": _mat5_end,
}


def _walk_htk(source: Source, layout: Layout) -> None:
    """HTK waveforms have no magic number, and libsndfile wants the length to be right."""
    frames, period, size, kind = _numbers(source, 0, ">IIHH")
    if kind == 0 and size == 2 and 10 <= period <= 10_000 and frames * 2 + 12 > source.size > 12:
        header = struct.pack(">IIHH", (source.size - 12) // 2, period, size, kind)
        end = 12 + (source.size - 12) // 2 * 2
        layout.streams.append(Stream((header, (12, end)), lacking=frames * 2 + 12 - source.size))


# -------------------------------------------------------------------------------------------------------------- FLAC

NEXT_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22|RIFF....WAVEfmt |OggS\x00\x02\x00{8}", re.DOTALL)


def _walk_flac(source: Source, start: int, layout: Layout) -> int:
    place, last = start + 4, False
    while not last and len(block := source.read(place, 4)) == 4:
        last = block[0] >= 128
        place += 4 + int.from_bytes(block[1:], "big")
    end = _find(source, NEXT_START, place)
    sound_end = end if end < source.size else _without_tags_behind(source, start, source.size)
    frames, headless = _flac_frames(source, start), not last or place >= source.size
    layout.streams.append(Stream(((start, sound_end),), frames, headless=headless, resumable=True))
    return end


def _flac_frames(source: Source, start: int) -> int | None:
    """Return the number of samples per channel that a FLAC stream claims, if it does."""
    return int.from_bytes(source.read(start + 21, 5), "big") & (1 << 36) - 1 or None


def _find(source: Source, pattern: re.Pattern, place: int) -> int:
    """Return where the pattern, of 16 bytes at most, is found from place on, or the size of the file."""
    while place < source.size:
        if match := pattern.search(source.read(place, WINDOW)):
            return place + match.start()
        place += WINDOW - 15
    return source.size


# --------------------------------------------------------------------------------------------------------------- Ogg


@dataclass
class _Logical:
    """A logical stream of an Ogg file."""

    codec: str
    spans: list[list[int]]
    sequence: int  # of its last page
    begun: bool = False  # whether it has more than its first page
    ended: bool = False
    lost: int = 0  # pages


OGG_PAGE = re.compile(rb"OggS\x00")
OGG_CODECS = {b"\x01vorbis": "Vorbis", b"OpusHead": "Opus", b"\x7fFLAC": "FLAC"}
OGG_OTHERS = {b"Speex   ": "Speex", b"\x80theora": "Theora", b"fishead\0": "", b"BBCD": "Dirac", b"OVP80": "VP8"}


@dataclass(frozen=True)
class _Page:
    """A page of an Ogg file: bytes from place to after, of which the packets begin at body."""

    place: int
    body: int
    after: int
    flags: int  # 2: the first page of its logical stream, 4: the last
    serial: bytes
    sequence: int


def _ogg_page(source: Source, place: int) -> _Page | None:
    """Return the page that begins here, or None where there is none or not all of it."""
    head = source.read(place, 27 + 255)
    if head[:5] != b"OggS\0" or len(head) < 27:
        return None
    body = place + 27 + head[26]
    after = body + sum(head[27 : 27 + head[26]])
    if after > source.size:
        return None
    if after < source.size and source.read(after, 4) != b"OggS" and b"OggS\0" in source.read(body, after - body):
        return None  # it is cut, and another begins before its end
    return _Page(place, body, after, head[5], head[14:18], int.from_bytes(head[18:22], "little"))


def _walk_ogg(source: Source, start: int, layout: Layout) -> int:
    """Each link of a chain is a stream; of a link's streams that run side by side the first of a known codec is one."""
    links: list[dict[bytes, _Logical]] = []
    place, broken = start, False
    damaged = set()  # links with bytes within that are no pages
    while place < source.size:
        page = _ogg_page(source, place)
        if page is not None:
            _add_page(source, links, page)
            place = page.after
            continue
        following = _find(source, OGG_PAGE, place + 1)
        if following == source.size:
            broken = source.read(place, 4) == b"OggS"
            break
        damaged.add(len(links))
        place = following
    for number, link in enumerate(links, 1):
        last = number == len(links)
        _append_link(source, link, layout, broken=last and broken, endless=not last and number not in damaged)
    return (source.size if broken else place) if links else start


def _add_page(source: Source, links: list[dict[bytes, _Logical]], page: _Page) -> None:
    if page.flags & 2:
        # First pages come before all others of their link
        if not links or page.serial in links[-1] or any(logical.begun for logical in links[-1].values()):
            links.append({})
        links[-1][page.serial] = _Logical(_codec(source.read(page.body, 8)), [], page.sequence)
    logical = links[-1].get(page.serial) if links else None
    if logical is None:
        return
    logical.begun |= not page.flags & 2
    logical.ended |= bool(page.flags & 4)
    logical.lost += max(0, page.sequence - logical.sequence - 1)
    logical.sequence = page.sequence
    begin = page.place
    if logical.codec == "FLAC":  # taken out of its pages, since not every libsndfile has FLAC in Ogg
        begin = page.body + (9 if page.flags & 2 else 0)
    if logical.spans and logical.spans[-1][1] == begin:
        logical.spans[-1][1] = page.after
    else:
        logical.spans.append([begin, page.after])


def _codec(packet: bytes) -> str:
    for names, readable in ((OGG_CODECS, True), (OGG_OTHERS, False)):
        for magic, name in names.items():
            if packet.startswith(magic):
                return name if readable else f"-{name}"
    return "-a stream of an unknown kind"


def _append_link(source: Source, link: dict[bytes, _Logical], layout: Layout, *, broken: bool, endless: bool) -> None:
    """Add a link of a chain; broken: its last page is incomplete; endless: it may lack the mark of its end."""
    readable = [logical for logical in link.values() if not logical.codec.startswith("-")]
    if not readable:
        others = ", ".join(filter(None, (logical.codec[1:] for logical in link.values())))
        layout.unread.append(f"holds a part in Ogg of {others or 'an unknown kind'}, which is not read")
        return
    if len(readable) > 1:
        layout.unread.append(f"holds {len(readable)} streams of sound side by side, of which only the first is read")
    first = readable[0]
    layout.streams.append(
        Stream(
            tuple((a, b) for a, b in first.spans),
            frames=_flac_frames(source, first.spans[0][0]) if first.codec == "FLAC" else None,
            cut=broken or not (first.ended or endless),
            preroll=0.0 if first.codec == "FLAC" else PREROLL,
            counted=False,
            resumable=first.codec == "FLAC",
            hole=f"pages of Ogg are missing or damaged ({first.lost})" if 0 < first.lost < 1 << 20 else "",
        )
    )


# -------------------------------------------------------------------------------------------------------------- MPEG

KBPS = {  # by version 1 or 2, and layer: of index 1 to 14
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
ENCODERS = (b"LAME", b"Lavf", b"Lavc")  # that note their delay behind the count
ENCODER_DELAY = (576 << 12).to_bytes(3, "big")  # in samples, as LAME notes it; no padding at the end
MPEG_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


@dataclass(frozen=True)
class _Frame:
    length: int  # bytes
    samples: int
    kind: tuple  # version, layer, rate, whether mono: what stays the same within a stream
    info: int  # offset of a Xing header, if this frame is one


@lru_cache(maxsize=4096)
def _mpeg_frame(head: bytes) -> _Frame | None:
    """Return what the header of an MPEG audio frame says, or None where these four bytes are none."""
    if len(head) < 4 or head[0] != 255 or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    rate_index, kbps_index, pad = head[2] >> 2 & 3, head[2] >> 4, head[2] >> 1 & 1
    if version == 1 or layer == 4 or rate_index == 3 or kbps_index in (0, 15) or head[3] & 3 == 2:
        return None
    rate, bits = MPEG_RATES[version][rate_index], KBPS[1 if version == 3 else 2, layer][kbps_index - 1] * 1000
    mono = head[3] >> 6 == 3
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    length = (12 * bits // rate + pad) * 4 if layer == 1 else samples // 8 * bits // rate + pad
    side = (17 if mono else 32) if version == 3 else (9 if mono else 17)
    return _Frame(length, samples, (version, layer, rate, mono), 4 + side)  # a checksum moves no Xing header


def _frame_at(head: bytes) -> _Frame:
    """Return the frame of a header that is known to be one."""
    frame = _mpeg_frame(head)
    assert frame is not None
    return frame


@dataclass
class _Mpeg:
    """A run of MPEG frames of one kind."""

    start: int
    first: bytes  # header of the first frame
    kind: tuple
    spans: list[list[int]]
    info: bytes = b""  # the frame that counts the others, if there is one
    frames: int = 0
    lost: int = 0  # bytes in the middle that are no frames
    cut: bool = False


def _walk_mpeg(source: Source, start: int, end: int, layout: Layout) -> int:
    """mp3 and its elders. Frames are counted one by one, since headers that count them are missing or wrong."""
    end = _without_tags_behind(source, start, end)
    runs: list[_Mpeg] = []
    place, skipped = _first_frame(source, start, min(end, start + (1 << 20)), end), 0
    while place < end:
        head = source.read(place, 4)
        frame = _mpeg_frame(head)
        if frame is None or (runs and frame.kind != runs[-1].kind and not _chain(source, place, end, 2)):
            after = _skip_tags(source, place)
            if after == place:
                after = _first_frame(source, place, end, end)
                skipped += after - place
            place = after
            continue
        if place + frame.length > end:
            runs[-1].cut = True
            break
        _add_frame(source, runs, place, head, frame, skipped)
        skipped, place = 0, place + frame.length
    layout.streams += [_mpeg_stream(run) for run in runs]
    return runs[-1].spans[-1][1] if runs and runs[-1].spans else end


def _add_frame(source: Source, runs: list[_Mpeg], place: int, head: bytes, frame: _Frame, skipped: int) -> None:
    counts = _counting_frame(source, place, frame)
    if counts or not runs or frame.kind != runs[-1].kind:
        info = source.read(place, frame.length) if counts else b""
        runs.append(_Mpeg(place, head, frame.kind, [], info))
    if counts:
        return
    run = runs[-1]
    if run.spans and run.spans[-1][1] == place:
        run.spans[-1][1] = place + frame.length
    else:
        run.lost += skipped if run.spans else 0
        run.spans.append([place, place + frame.length])
    run.frames += 1


def _counting_frame(source: Source, place: int, frame: _Frame) -> bool:
    if frame.kind[1] != 3:
        return False
    head = source.read(place, 40)
    return head[frame.info : frame.info + 4] in (b"Xing", b"Info") or head[36:] == b"VBRI"


def _chain(source: Source, place: int, end: int, count: int) -> bool:
    """Return whether `count` frames of one kind follow each other here, or fewer that end with the file."""
    kind = None
    for _ in range(count):
        frame = _mpeg_frame(source.read(place, 4))
        if frame is None or kind not in (None, frame.kind):
            return False
        kind, place = frame.kind, place + frame.length
        if place >= end:
            return place == end
    return True


SYNC = re.compile(rb"\xff(?=[\xe2-\xff][^\xf0-\xff])")  # three bytes that may begin a frame


def _first_frame(source: Source, place: int, until: int, end: int) -> int:
    """Return where frames begin between place and until, or end."""
    while place < until:
        window = source.read(place, WINDOW)
        for match in SYNC.finditer(window[: until - place]):
            if _chain(source, place + match.start(), end, 4):
                return place + match.start()
        place += WINDOW - 2
    return end


def _mpeg_stream(run: _Mpeg) -> Stream:
    frame = _frame_at(run.first)
    claimed, size = _counted(run.info, frame)
    spans = [(a, b) for a, b in run.spans]
    sound: tuple[Span, ...] = tuple(spans)
    length = sum(b - a for a, b in spans)
    if size and size <= length + len(run.info) + 256:  # all bytes are there: the count lies
        claimed = min(claimed, run.frames)
    frames = max(run.frames, claimed) * frame.samples
    lost_seconds = run.lost / max(1, length) * run.frames * frame.samples / run.kind[2]
    hole = f"{run.lost} bytes in the middle are no sound" if lost_seconds > 0.1 else ""
    options: dict[str, Any] = {"frames": frames, "cut": run.cut and not claimed, "hole": hole, "preroll": PREROLL}
    if run.kind[1] != 3:
        return Stream(sound, **options)
    if claimed == run.frames and 100 * abs(size - length - len(run.info)) <= length:
        whole = (run.start, spans[0][1]) if spans and run.start + len(run.info) == spans[0][0] else None
        sound = (whole, *spans[1:]) if whole else (run.info, *spans)
        return Stream(sound, **options, padding=_padding(run))
    info = _info_frame(run, length)
    return Stream((info, *sound), **options, padding=_padding(run))


def _padding(run: _Mpeg) -> int:
    """Return the samples that a decoder may take off at both ends, by the encoder's note, or a frame without one."""
    place = _frame_at(run.first).info + 120 + 21
    numbers = int.from_bytes(run.info[place : place + 3], "big") if len(run.info) >= place + 3 else 0
    return (numbers >> 12) + (numbers & 0xFFF) + 1152


def _counted(info: bytes, frame: _Frame) -> tuple[int, int]:
    """Return the frames and bytes that a counting frame gives, or 0; info is b"" where there is none."""
    xing = info[frame.info : frame.info + 16].ljust(16, b"\0")
    if xing[:4] in (b"Xing", b"Info"):
        flags, *numbers = struct.unpack(">III", xing[4:])
        found = [numbers.pop(0) if flags & bit else 0 for bit in (1, 2)]
        return found[0] if found[0] < 1 << 28 else 0, found[1]
    if len(info) >= 54:  # VBRI
        size, frames = struct.unpack(">II", info[46:54])
        return frames if frames < 1 << 28 else 0, size
    return 0, 0


def _info_frame(run: _Mpeg, length: int) -> bytes:
    """Return a frame that gives the true count, so that the decoder neither guesses nor stops early.

    Where the encoder left no note of its delay, that of LAME and most others is given, so that the sound begins where
    it would have begun with the note.
    """
    head = bytearray(run.first)
    head[1] |= 1  # no checksum
    for index in range(1, 15):
        head[2] = index << 4 | head[2] & 0x0D
        frame = _frame_at(bytes(head))
        if frame.length >= frame.info + 16 + 140:
            break
    info, at = run.info, _frame_at(run.first).info
    noted = len(info) >= at + 156 and info[at + 7] & 15 == 15 and info[at + 120 : at + 124] in ENCODERS
    notes = info[at + 16 : at + 156] if noted else bytes(104) + b"LAME".ljust(21, b"\0") + ENCODER_DELAY
    body = struct.pack(">4sIII", b"Xing", 15, run.frames, length + frame.length) + notes
    return bytes(head) + bytes(frame.info - 4) + (body + bytes(frame.length))[: frame.length - frame.info]
