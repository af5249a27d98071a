"""FLAC."""

from __future__ import annotations

import re

from las_fast.data.containers.streams import Layout, Source, Stream, find_pattern
from las_fast.data.containers.tags import without_trailing_tags

NEXT_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22|RIFF....WAVEfmt |OggS\x00\x02\x00{8}", re.DOTALL)


def walk_flac(source: Source, start: int, layout: Layout) -> int:
    place, last = start + 4, False
    while not last and len(block := source.read(place, 4)) == 4:
        last = block[0] >= 128
        place += 4 + int.from_bytes(block[1:], "big")
    end = find_pattern(source, NEXT_START, place)
    sound_end = end if end < source.size else without_trailing_tags(source, start, source.size)
    frames, headless = flac_sample_count(source, start), not last or place >= source.size
    layout.streams.append(Stream(((start, sound_end),), frames, headless=headless, resumable=True))
    return end


def flac_sample_count(source: Source, start: int) -> int | None:
    """Return the number of samples per channel that a FLAC stream claims, if it does."""
    return int.from_bytes(source.read(start + 21, 5), "big") & (1 << 36) - 1 or None
