"""Find the audio streams of a file by parsing its container, before anything is decoded.

libsndfile reads the first stream of a file and trusts its header. Real files may have several streams (chained Ogg,
joined mp3 or FLAC), a header written before the length was known, or a missing end. `find_streams` returns the bytes to
decode for each stream, with a corrected header if needed, and the expected length.

Each format family has a module with a walk_FORMAT function, which adds the streams of the container at a position to a
FileLayout and returns the end of the container.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from las_fast.data.containers.flac import walk_flac
from las_fast.data.containers.magic import ARCHIVES, container_at, foreign_format
from las_fast.data.containers.mpeg import walk_mpeg
from las_fast.data.containers.ogg import OGG_CODECS, walk_ogg
from las_fast.data.containers.plain import walk_au, walk_caf, walk_w64
from las_fast.data.containers.rare import HEADER_ENDS, walk_by_header_length, walk_htk
from las_fast.data.containers.riff import walk_aiff, walk_wav
from las_fast.data.containers.streams import FileLayout, FileView, Source, Stream, find_pattern, span_length
from las_fast.data.containers.tags import skip_tags, without_trailing_tags

__all__ = ["OGG_CODECS", "FileLayout", "FileView", "Source", "Stream", "find_streams", "foreign_format"]

MAX_STREAMS = 5000  # per file; opening one takes about a millisecond
MAX_TRAILING = 1 << 16  # bytes after the audio that are ignored, whatever they are
Walker = Callable[[Source, int, FileLayout], int]
WALKERS: dict[str, Walker] = {
    "wav": walk_wav,
    "aiff": walk_aiff,
    "au": walk_au,
    "caf": walk_caf,
    "w64": walk_w64,
    "flac": walk_flac,
    "ogg": walk_ogg,
    "mpeg": walk_mpeg,
    **{name: partial(walk_by_header_length, header_end=end) for name, end in HEADER_ENDS.items()},
}


def find_streams(source: Source) -> FileLayout:
    """Return the streams of a file. A file of unknown format is one stream, which libsndfile accepts or refuses."""
    layout = FileLayout()
    position = 0
    while position < source.size:
        position = skip_tags(source, position)
        walk = _walker_at(source, position)
        if walk is None:
            if layout.streams and not layout.streams[-1].padding:
                _report_trailing_bytes(source, position, layout)
            break
        before = len(layout.streams)
        position = max(walk(source, position, layout), position + 1)
        if len(layout.streams) == before:
            break
        if len(layout.streams) > MAX_STREAMS:
            del layout.streams[MAX_STREAMS:]
            layout.unread.append(f"has more than {MAX_STREAMS} recordings one after another; split it")
            break
    if not layout.streams and not foreign_format(source) and source.read(0, 4) not in ARCHIVES:
        start = skip_tags(source, 0)
        walk_mpeg(source, start, layout)
    if not layout.streams:
        walk_htk(source, layout)
    if not layout.streams:
        layout.streams.append(Stream(((0, source.size),)))
    _report_oversized(layout)
    return layout


def _walker_at(source: Source, position: int) -> Walker | None:
    name = container_at(source, position)
    return WALKERS[name] if name else None


def _report_oversized(layout: FileLayout) -> None:
    """Report streams of more than 4 GiB in formats with 32-bit lengths: only 4 GiB of them can be read."""
    for stream in layout.streams:
        head, size = stream.spans[0], span_length(stream.spans[-1])
        if size > 0xFFFFFFFF and isinstance(head, bytes) and head[:4] in (b"FORM", b"RIFX", b".snd"):
            layout.unread.append(
                f"contains {size} bytes of audio, of which only 4 GiB can be read in its format; "
                "convert it to FLAC or W64"
            )


def _report_trailing_bytes(source: Source, position: int, layout: FileLayout) -> None:
    """Report more than MAX_TRAILING bytes after the audio that are neither tags nor zeros."""
    end = without_trailing_tags(source, position, source.size)
    if end - position > MAX_TRAILING and find_pattern(source, re.compile(rb"[^\x00]"), position) < end:
        layout.unread.append(
            f"has {end - position} bytes of unknown data after its audio; "
            "remove them, or repair the header if they are audio"
        )
