"""Ogg: a chain of one or more links, each with the pages of one or more logical streams."""

from __future__ import annotations

import re
from dataclasses import dataclass

from las_fast.data.containers.flac import flac_sample_count
from las_fast.data.containers.streams import PREROLL, FileLayout, Source, Stream, find_pattern

OGG_PAGE = re.compile(rb"OggS\x00")
OGG_CODECS = {b"\x01vorbis": "Vorbis", b"OpusHead": "Opus", b"\x7fFLAC": "FLAC"}
UNSUPPORTED_CODECS = {
    b"Speex   ": "Speex",
    b"\x80theora": "Theora",
    b"fishead\0": "",
    b"BBCD": "Dirac",
    b"OVP80": "VP8",
}


@dataclass
class _LogicalStream:
    """A logical stream of an Ogg file."""

    codec: str  # name; "-" before it means that the codec is not supported
    spans: list[list[int]]
    sequence: int  # number of the last page
    begun: bool = False  # a page after the first was read
    ended: bool = False  # a page marked as the last was read
    lost: int = 0  # missing pages


@dataclass(frozen=True)
class _Page:
    """A page of an Ogg file: the bytes [position, after); its packets begin at body."""

    position: int
    body: int
    after: int
    flags: int  # 2: first page of its logical stream, 4: last
    serial: bytes
    sequence: int


def _ogg_page(source: Source, position: int) -> _Page | None:
    """Return the page that begins at a position; None if there is none or it is incomplete."""
    head = source.read(position, 27 + 255)
    if head[:5] != b"OggS\0" or len(head) < 27:
        return None
    body = position + 27 + head[26]
    after = body + sum(head[27 : 27 + head[26]])
    if after > source.size:
        return None
    if after < source.size and source.read(after, 4) != b"OggS" and b"OggS\0" in source.read(body, after - body):
        return None  # truncated: another page begins before its end
    return _Page(position, body, after, head[5], head[14:18], int.from_bytes(head[18:22], "little"))


def walk_ogg(source: Source, start: int, layout: FileLayout) -> int:
    """Add one stream per link of a chain: the first of its parallel logical streams with a supported codec."""
    links: list[dict[bytes, _LogicalStream]] = []
    position, truncated = start, False
    damaged = set()  # numbers of the links that contain bytes between pages
    while position < source.size:
        page = _ogg_page(source, position)
        if page is not None:
            _add_page(source, links, page)
            position = page.after
            continue
        following = find_pattern(source, OGG_PAGE, position + 1)
        if following == source.size:
            truncated = source.read(position, 4) == b"OggS"
            break
        damaged.add(len(links))
        position = following
    for number, link in enumerate(links, 1):
        last = number == len(links)
        _append_link(
            source, link, layout, truncated=last and truncated, may_lack_end=not last and number not in damaged
        )
    return (source.size if truncated else position) if links else start


def _add_page(source: Source, links: list[dict[bytes, _LogicalStream]], page: _Page) -> None:
    """Add a page to its logical stream in the last link, or begin a new link."""
    if page.flags & 2:
        # All first pages of a link come before its other pages
        if not links or page.serial in links[-1] or any(logical.begun for logical in links[-1].values()):
            links.append({})
        links[-1][page.serial] = _LogicalStream(_codec(source.read(page.body, 8)), [], page.sequence)
    logical = links[-1].get(page.serial) if links else None
    if logical is None:
        return
    logical.begun |= not page.flags & 2
    logical.ended |= bool(page.flags & 4)
    logical.lost += max(0, page.sequence - logical.sequence - 1)
    logical.sequence = page.sequence
    begin = page.position
    if logical.codec == "FLAC":  # strip the page headers: some builds of libsndfile cannot read FLAC in Ogg
        begin = page.body + (9 if page.flags & 2 else 0)
    if logical.spans and logical.spans[-1][1] == begin:
        logical.spans[-1][1] = page.after
    else:
        logical.spans.append([begin, page.after])


def _codec(packet: bytes) -> str:
    """Return the codec of a stream's first packet, with "-" before it if it is not supported."""
    for names, readable in ((OGG_CODECS, True), (UNSUPPORTED_CODECS, False)):
        for magic, name in names.items():
            if packet.startswith(magic):
                return name if readable else f"-{name}"
    return "-unknown codec"


def _append_link(
    source: Source, link: dict[bytes, _LogicalStream], layout: FileLayout, *, truncated: bool, may_lack_end: bool
) -> None:
    """Add a link of a chain.

    truncated:    its last page is incomplete.
    may_lack_end: a missing end-of-stream mark is no sign of missing audio.
    """
    readable = [logical for logical in link.values() if not logical.codec.startswith("-")]
    if not readable:
        others = ", ".join(filter(None, (logical.codec[1:] for logical in link.values())))
        layout.unread.append(
            f"contains an Ogg part ({others or 'unknown codec'}) that cannot be read; "
            "convert it: ffmpeg -i FILE -vn -ac 1 -ar 16000 FILE.wav"
        )
        return
    if len(readable) > 1:
        layout.unread.append(
            f"contains {len(readable)} parallel audio streams, of which only the first is read; "
            "keep one: ffmpeg -i FILE -map 0:a:0 FILE.wav"
        )
    first = readable[0]
    layout.streams.append(
        Stream(
            tuple((a, b) for a, b in first.spans),
            sample_count=flac_sample_count(source, first.spans[0][0]) if first.codec == "FLAC" else None,
            cut=truncated or not (first.ended or may_lack_end),
            preroll=0.0 if first.codec == "FLAC" else PREROLL,
            length_known=False,
            resumable=first.codec == "FLAC",
            gap=f"Ogg pages are missing or damaged ({first.lost})" if 0 < first.lost < 1 << 20 else "",
        )
    )
