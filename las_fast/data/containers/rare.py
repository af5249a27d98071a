"""Rare formats. Their end is computed from the header, so that joined and truncated files are noticed."""

from __future__ import annotations

import re
import struct

from las_fast.data.containers.magic import container_at
from las_fast.data.containers.streams import MAX_CHUNKS, FileLayout, Source, Stream, read_struct


def walk_by_header_length(source: Source, start: int, layout: FileLayout, header_end) -> int:
    """Add the stream of a file whose end, according to its header, is header_end(source, start); return its end."""
    end = header_end(source, start)
    layout.streams.append(Stream(((start, source.size),), missing_bytes=max(0, end - source.size)))
    if end > start and container_at(source, end):
        layout.streams[-1] = Stream(((start, end),))
        return end
    return source.size


def _nist_end(source: Source, start: int) -> int:
    """NIST SPHERE: a text header."""
    text = source.read(start, 1024).decode("latin-1")
    numbers = {name: int(value) for name, value in re.findall(r"^(\w+) -i ([0-9]{1,15})\s*$", text, re.MULTILINE)}
    length = re.match(r" *([0-9]{1,7})\n", text[8:])
    size = numbers.get("channel_count", 1) * numbers.get("sample_n_bytes", 2)
    return start + (int(length[1]) if length else 1024) + numbers.get("sample_count", 0) * size


def _avr_end(source: Source, start: int) -> int:
    """Audio Visual Research."""
    stereo, bits, samples = read_struct(source, start + 12, ">HH10xI")
    return start + 128 + samples * (2 if stereo else 1) * bits // 8


def _mpc_end(source: Source, start: int) -> int:
    """Akai MPC 2000."""
    stereo, samples = read_struct(source, start + 21, "<B8xI")
    return start + 42 + samples * (1 + stereo) * 2


def _wve_end(source: Source, start: int) -> int:
    """Psion."""
    return start + 32 + read_struct(source, start + 18, ">I")[0]


def _sds_end(source: Source, start: int) -> int:
    """MIDI sample dump: packets of 127 bytes; 120 of these are samples, with 7 bits per byte."""
    bits, *length = read_struct(source, start + 6, "<B3xBBB")
    samples = sum(byte << shift for byte, shift in zip(length, (0, 7, 14), strict=True))
    return start + 21 + -(-samples // (120 // max(1, (bits + 6) // 7))) * 127


def _voc_end(source: Source, start: int) -> int:
    """Creative Voice: blocks up to one of type 0."""
    position = start + read_struct(source, start + 20, "<H")[0]
    for _ in range(MAX_CHUNKS):
        head = source.read(position, 4)
        if len(head) < 4 or not head[0]:
            break
        position += 4 + int.from_bytes(head[1:], "little")
    return position + 1 if source.read(position, 1) == b"\0" else position


def _mat4_end(source: Source, start: int) -> int:
    """MATLAB 4: a matrix with the sample rate, then a matrix of samples."""
    position, order = start, ">" if source.read(start, 4) == b"\0\0\x03\xe8" else "<"
    for _ in range(2):
        kind, rows, columns, imaginary, name = read_struct(source, position, order + "5I")
        size = (8, 4, 4, 2, 2, 1)[min(kind % 100 // 10, 5)]
        position += 20 + name + rows * columns * size * (1 + imaginary)
    return position


def _mat5_end(source: Source, start: int) -> int:
    """MATLAB 5: elements up to the end of the file."""
    position, order = start + 128, "<" if source.read(start + 126, 2) == b"IM" else ">"
    for _ in range(MAX_CHUNKS):
        if position + 8 > source.size:
            break
        position += 8 + read_struct(source, position, order + "4xI")[0]
    return position


HEADER_ENDS = {
    "nist": _nist_end,
    "avr": _avr_end,
    "mpc": _mpc_end,
    "wve": _wve_end,
    "sds": _sds_end,
    "voc": _voc_end,
    "mat4": _mat4_end,
    "mat5": _mat5_end,
}


def walk_htk(source: Source, layout: FileLayout) -> None:
    """Add the stream of a truncated HTK waveform under a header with its actual length: libsndfile requires it.

    HTK has no magic number, so a file counts as HTK if its header is plausible.
    """
    samples, period, size, kind = read_struct(source, 0, ">IIHH")
    if kind == 0 and size == 2 and 10 <= period <= 10_000 and samples * 2 + 12 > source.size > 12:
        header = struct.pack(">IIHH", (source.size - 12) // 2, period, size, kind)
        end = 12 + (source.size - 12) // 2 * 2
        layout.streams.append(Stream((header, (12, end)), missing_bytes=samples * 2 + 12 - source.size))
