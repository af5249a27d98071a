"""MPEG audio: mp3 and layers I and II.

Frames are counted one by one, because the info frames that state their number (Xing, Info, VBRI) are often missing or
wrong.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from las_fast.data.containers.streams import PREROLL, WINDOW, FileLayout, Source, Span, Stream
from las_fast.data.containers.tags import skip_tags, without_trailing_tags

KBPS = {  # (version 1 or 2, layer): bit rates of index 1 to 14
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
ENCODERS = (b"LAME", b"Lavf", b"Lavc")  # these write their delay after the frame count
ENCODER_DELAY = (576 << 12).to_bytes(3, "big")  # samples, in LAME's encoding; no padding at the end
MPEG_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
SYNC = re.compile(rb"\xff(?=[\xe2-\xff][^\xf0-\xff])")  # matches where three bytes may begin a frame


@dataclass(frozen=True)
class FrameHeader:
    """A parsed MPEG audio frame header."""

    length: int  # bytes
    samples: int  # per channel
    kind: tuple  # (version, layer, sample rate, mono): constant within a stream
    xing_offset: int  # bytes from the start of the frame to the Xing header, in a frame that has one


@lru_cache(maxsize=4096)
def frame_header(head: bytes) -> FrameHeader | None:
    """Parse the four bytes of an MPEG audio frame header; return None for other bytes."""
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
    side = (17 if mono else 32) if version == 3 else (9 if mono else 17)  # bytes of side information
    xing_offset = 4 + side  # the same in frames with a checksum
    return FrameHeader(length, samples, (version, layer, rate, mono), xing_offset)


def _valid_frame_header(head: bytes) -> FrameHeader:
    """Parse a frame header that is known to be valid."""
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
    info: bytes = b""  # the info frame, which states the frame count (Xing, Info or VBRI); b"" if there is none
    frames: int = 0
    lost: int = 0  # bytes between frames that belong to no frame
    cut: bool = False  # whether the last frame is incomplete


def walk_mpeg(source: Source, start: int, layout: FileLayout, end: int | None = None) -> int:
    """Add a stream per run of MPEG frames; return the end of the last frame."""
    end = without_trailing_tags(source, start, source.size if end is None else end)
    runs: list[_Run] = []
    position, skipped = _first_frame(source, start, min(end, start + (1 << 20)), end), 0
    while position < end:
        head = source.read(position, 4)
        frame = frame_header(head)
        if frame is None or (runs and frame.kind != runs[-1].kind and not _has_frames(source, position, end, 2)):
            after = skip_tags(source, position)
            if after == position:
                after = _first_frame(source, position, end, end)
                skipped += after - position
            position = after
            continue
        if position + frame.length > end:
            runs[-1].cut = True
            break
        _add_frame(source, runs, position, head, frame, skipped)
        skipped, position = 0, position + frame.length
    layout.streams += [_mpeg_stream(run) for run in runs]
    return runs[-1].spans[-1][1] if runs and runs[-1].spans else end


def _add_frame(source: Source, runs: list[_Run], position: int, head: bytes, frame: FrameHeader, skipped: int) -> None:
    """Add a frame to the last run, or begin a run; skipped: bytes before the frame that belong to none."""
    is_info = _is_info_frame(source, position, frame)
    if is_info or not runs or frame.kind != runs[-1].kind:
        info = source.read(position, frame.length) if is_info else b""
        runs.append(_Run(position, head, frame.kind, [], info))
    if is_info:
        return
    run = runs[-1]
    if run.spans and run.spans[-1][1] == position:
        run.spans[-1][1] = position + frame.length
    else:
        run.lost += skipped if run.spans else 0
        run.spans.append([position, position + frame.length])
    run.frames += 1


def _is_info_frame(source: Source, position: int, frame: FrameHeader) -> bool:
    """Return whether a frame is an info frame: it has a frame count (Xing, Info or VBRI) and no audio."""
    if frame.kind[1] != 3:
        return False
    head = source.read(position, 40)
    return head[frame.xing_offset : frame.xing_offset + 4] in (b"Xing", b"Info") or head[36:] == b"VBRI"


def _has_frames(source: Source, position: int, end: int, count: int) -> bool:
    """Return whether `count` consecutive frames of one kind begin at `position`, or fewer that reach `end` exactly."""
    kind = None
    for _ in range(count):
        frame = frame_header(source.read(position, 4))
        if frame is None or kind not in (None, frame.kind):
            return False
        kind, position = frame.kind, position + frame.length
        if position >= end:
            return position == end
    return True


def _first_frame(source: Source, position: int, until: int, end: int) -> int:
    """Return the first position in [position, until) where frames begin; `end` if there is none."""
    while position < until:
        window = source.read(position, WINDOW)
        for match in SYNC.finditer(window[: until - position]):
            if _has_frames(source, position + match.start(), end, 4):
                return position + match.start()
        position += WINDOW - 2
    return end


def _mpeg_stream(run: _Run) -> Stream:
    """Return the stream of a run; layer III (mp3) begins with a correct info frame."""
    frame = _valid_frame_header(run.first)
    claimed, size = _read_info_frame(run.info, frame)
    spans = [(a, b) for a, b in run.spans]
    audio: tuple[Span, ...] = tuple(spans)
    length = sum(b - a for a, b in spans)
    if size and size <= length + len(run.info) + 256:  # no bytes are missing: the count is wrong
        claimed = min(claimed, run.frames)
    samples = max(run.frames, claimed) * frame.samples
    lost_seconds = run.lost / max(1, length) * run.frames * frame.samples / run.kind[2]
    gap = f"{run.lost} bytes in the middle are not audio" if lost_seconds > 0.1 else ""
    options: dict[str, Any] = {"sample_count": samples, "cut": run.cut and not claimed, "gap": gap, "preroll": PREROLL}
    if run.kind[1] != 3:
        return Stream(audio, **options)
    if claimed == run.frames and 100 * abs(size - length - len(run.info)) <= length:
        whole = (run.start, spans[0][1]) if spans and run.start + len(run.info) == spans[0][0] else None
        audio = (whole, *spans[1:]) if whole else (run.info, *spans)
        return Stream(audio, **options, padding=_padding(run))
    info = _make_info_frame(run, length)
    return Stream((info, *audio), **options, padding=_padding(run))


def _padding(run: _Run) -> int:
    """Return how many samples per channel a decoder may remove: one frame, and the delay and padding in LAME's tag."""
    position = _valid_frame_header(run.first).xing_offset + 120 + 21
    numbers = int.from_bytes(run.info[position : position + 3], "big") if len(run.info) >= position + 3 else 0
    return (numbers >> 12) + (numbers & 0xFFF) + 1152


def _read_info_frame(info: bytes, frame: FrameHeader) -> tuple[int, int]:
    """Return the frame count and the byte count that an info frame states; 0 if unknown or if info is b""."""
    xing = info[frame.xing_offset : frame.xing_offset + 16].ljust(16, b"\0")
    if xing[:4] in (b"Xing", b"Info"):
        flags, *numbers = struct.unpack(">III", xing[4:])
        frames, size = (numbers.pop(0) if flags & bit else 0 for bit in (1, 2))
        return frames if frames < 1 << 28 else 0, size
    if len(info) >= 54:  # VBRI
        size, frames = struct.unpack(">II", info[46:54])
        return frames if frames < 1 << 28 else 0, size
    return 0, 0


def _make_info_frame(run: _Run, length: int) -> bytes:
    """Make a Xing frame with the actual frame count, so that the decoder neither guesses nor stops early.

    It keeps the encoder delay that the original info frame states. If there is none, it states the delay of LAME and
    most other encoders, so that the audio begins at the same sample.
    """
    head = bytearray(run.first)
    head[1] |= 1  # no checksum
    for index in range(1, 15):
        head[2] = index << 4 | head[2] & 0x0D
        frame = _valid_frame_header(bytes(head))
        if frame.length >= frame.xing_offset + 16 + 140:
            break
    info, at = run.info, _valid_frame_header(run.first).xing_offset
    has_delay = len(info) >= at + 156 and info[at + 7] & 15 == 15 and info[at + 120 : at + 124] in ENCODERS
    lame_tag = info[at + 16 : at + 156] if has_delay else bytes(104) + b"LAME".ljust(21, b"\0") + ENCODER_DELAY
    body = struct.pack(">4sIII", b"Xing", 15, run.frames, length + frame.length) + lame_tag
    return bytes(head) + bytes(frame.xing_offset - 4) + (body + bytes(frame.length))[: frame.length - frame.xing_offset]
