"""Where the sound lies in a file: the streams of a container, told from its bytes before anything is decoded.

libsndfile reads the first stream of a file and believes its header. Real files have several streams (chained Ogg,
joined mp3 or FLAC), headers that were written before the length was known, and ends that are missing. `find_streams`
walks the container, and says for each stream which bytes to decode, with a header that is right, and how much ought to
be there.
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
from las_fast.data.containers.rare import CLAIMED_ENDS, walk_claimed, walk_htk
from las_fast.data.containers.riff import walk_aiff, walk_wav
from las_fast.data.containers.streams import Layout, Source, Stream, View, find_pattern, span_length
from las_fast.data.containers.tags import skip_tags, without_trailing_tags

__all__ = ["OGG_CODECS", "Layout", "Source", "Stream", "View", "find_streams", "foreign_format"]

BEHIND = 1 << 16  # bytes behind the sound that may be anything
Walker = Callable[[Source, int, Layout], int]  # adds the streams of the container at a place, returns its end
WALKERS: dict[str, Walker] = {
    "wav": walk_wav,
    "aiff": walk_aiff,
    "au": walk_au,
    "caf": walk_caf,
    "w64": walk_w64,
    "flac": walk_flac,
    "ogg": walk_ogg,
    "mpeg": walk_mpeg,
    **{name: partial(walk_claimed, claimed_end=end) for name, end in CLAIMED_ENDS.items()},
}


def find_streams(source: Source) -> Layout:
    """Return the streams of a file. A file of no known kind is one stream, for libsndfile to judge."""
    layout = Layout()
    place = 0
    while place < source.size:
        place = skip_tags(source, place)
        walk = _walker_at(source, place)
        if walk is None:
            if layout.streams and not layout.streams[-1].padding:
                _note_behind(source, place, layout)
            break
        before = len(layout.streams)
        place = max(walk(source, place, layout), place + 1)
        if len(layout.streams) == before:
            break
    if not layout.streams and not foreign_format(source) and source.read(0, 4) not in ARCHIVES:
        start = skip_tags(source, 0)
        walk_mpeg(source, start, layout)
    if not layout.streams:
        walk_htk(source, layout)
    if not layout.streams:
        layout.streams.append(Stream(((0, source.size),)))
    _note_uncounted(layout)
    return layout


def _walker_at(source: Source, place: int) -> Walker | None:
    name = container_at(source, place)
    return WALKERS[name] if name else None


def _note_uncounted(layout: Layout) -> None:
    """Note sound beyond the 4 GiB that a format can count; only streams of unknown length have it."""
    for stream in layout.streams:
        head, size = stream.spans[0], span_length(stream.spans[-1])
        if size > 0xFFFFFFFF and isinstance(head, bytes) and head[:4] in (b"FORM", b"RIFX", b".snd"):
            layout.unread.append(f"holds {size} bytes of sound, of which no more than 4 GiB can be read in its format")


def _note_behind(source: Source, place: int, layout: Layout) -> None:
    """Note many bytes behind the sound that are neither tags nor zeros."""
    end = without_trailing_tags(source, place, source.size)
    if end - place > BEHIND and find_pattern(source, re.compile(rb"[^\x00]"), place) < end:
        layout.unread.append(
            f"has {end - place} bytes behind its sound, of an unknown kind; if they are sound, its header is wrong"
        )
