"""FLAC: metadata blocks, then frames up to the end of the file or the start of an appended file."""

from __future__ import annotations

import re

from las_fast.data.containers.streams import FileLayout, Source, Stream, find_pattern
from las_fast.data.containers.tags import without_trailing_tags

NEXT_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22|RIFF....WAVEfmt |OggS\x00\x02\x00{8}", re.DOTALL)


def walk_flac(source: Source, start: int, layout: FileLayout) -> int:
    """Add the stream of a FLAC file; return its end."""
    position, last = start + 4, False
    while not last and len(block := source.read(position, 4)) == 4:
        last = block[0] >= 128
        position += 4 + int.from_bytes(block[1:], "big")
    end = find_pattern(source, NEXT_START, position)
    audio_end = end if end < source.size else without_trailing_tags(source, start, source.size)
    samples, truncated_header = flac_sample_count(source, start), not last or position >= source.size
    layout.streams.append(Stream(((start, audio_end),), samples, truncated_header=truncated_header, resumable=True))
    return end


def flac_sample_count(source: Source, start: int) -> int | None:
    """Return the number of samples per channel that the header of a FLAC stream states; None if it is unknown (0)."""
    return int.from_bytes(source.read(start + 21, 5), "big") & (1 << 36) - 1 or None
