"""MPEG audio: mp3 and its elders."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from las_fast.data.containers.streams import PREROLL, WINDOW, Layout, Source, Span, Stream
from las_fast.data.containers.tags import skip_tags, without_trailing_tags

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
SYNC = re.compile(rb"\xff(?=[\xe2-\xff][^\xf0-\xff])")  # three bytes that may begin a frame


@dataclass(frozen=True)
class FrameHeader:
    length: int  # bytes
    samples: int
    kind: tuple  # version, layer, rate, whether mono: what stays the same within a stream
    info: int  # offset of a Xing header, if this frame is one


@lru_cache(maxsize=4096)
def frame_header(head: bytes) -> FrameHeader | None:
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
    return FrameHeader(length, samples, (version, layer, rate, mono), 4 + side)  # a checksum moves no Xing header


def _frame_at(head: bytes) -> FrameHeader:
    """Return the frame of a header that is known to be one."""
    frame = frame_header(head)
    assert frame is not None
    return frame


@dataclass
class _Run:
    """A run of MPEG frames of one kind."""

    start: int
    first: bytes  # header of the first frame
    kind: tuple
    spans: list[list[int]]
    info: bytes = b""  # the frame that counts the others, if there is one
    frames: int = 0
    lost: int = 0  # bytes in the middle that are no frames
    cut: bool = False


def walk_mpeg(source: Source, start: int, layout: Layout, end: int | None = None) -> int:
    """mp3 and its elders. Frames are counted one by one, since headers that count them are missing or wrong."""
    end = without_trailing_tags(source, start, source.size if end is None else end)
    runs: list[_Run] = []
    place, skipped = _first_frame(source, start, min(end, start + (1 << 20)), end), 0
    while place < end:
        head = source.read(place, 4)
        frame = frame_header(head)
        if frame is None or (runs and frame.kind != runs[-1].kind and not _chain(source, place, end, 2)):
            after = skip_tags(source, place)
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


def _add_frame(source: Source, runs: list[_Run], place: int, head: bytes, frame: FrameHeader, skipped: int) -> None:
    counts = _counting_frame(source, place, frame)
    if counts or not runs or frame.kind != runs[-1].kind:
        info = source.read(place, frame.length) if counts else b""
        runs.append(_Run(place, head, frame.kind, [], info))
    if counts:
        return
    run = runs[-1]
    if run.spans and run.spans[-1][1] == place:
        run.spans[-1][1] = place + frame.length
    else:
        run.lost += skipped if run.spans else 0
        run.spans.append([place, place + frame.length])
    run.frames += 1


def _counting_frame(source: Source, place: int, frame: FrameHeader) -> bool:
    if frame.kind[1] != 3:
        return False
    head = source.read(place, 40)
    return head[frame.info : frame.info + 4] in (b"Xing", b"Info") or head[36:] == b"VBRI"


def _chain(source: Source, place: int, end: int, count: int) -> bool:
    """Return whether `count` frames of one kind follow each other here, or fewer that end with the file."""
    kind = None
    for _ in range(count):
        frame = frame_header(source.read(place, 4))
        if frame is None or kind not in (None, frame.kind):
            return False
        kind, place = frame.kind, place + frame.length
        if place >= end:
            return place == end
    return True


def _first_frame(source: Source, place: int, until: int, end: int) -> int:
    """Return where frames begin between place and until, or end."""
    while place < until:
        window = source.read(place, WINDOW)
        for match in SYNC.finditer(window[: until - place]):
            if _chain(source, place + match.start(), end, 4):
                return place + match.start()
        place += WINDOW - 2
    return end


def _mpeg_stream(run: _Run) -> Stream:
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


def _padding(run: _Run) -> int:
    """Return the samples that a decoder may take off at both ends, by the encoder's note, or a frame without one."""
    place = _frame_at(run.first).info + 120 + 21
    numbers = int.from_bytes(run.info[place : place + 3], "big") if len(run.info) >= place + 3 else 0
    return (numbers >> 12) + (numbers & 0xFFF) + 1152


def _counted(info: bytes, frame: FrameHeader) -> tuple[int, int]:
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


def _info_frame(run: _Run, length: int) -> bytes:
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
