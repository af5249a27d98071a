"""Ogg."""

from __future__ import annotations

import re
from dataclasses import dataclass

from las_fast.data.containers.flac import flac_sample_count
from las_fast.data.containers.streams import PREROLL, Layout, Source, Stream, find_pattern

OGG_PAGE = re.compile(rb"OggS\x00")
OGG_CODECS = {b"\x01vorbis": "Vorbis", b"OpusHead": "Opus", b"\x7fFLAC": "FLAC"}
OGG_OTHERS = {b"Speex   ": "Speex", b"\x80theora": "Theora", b"fishead\0": "", b"BBCD": "Dirac", b"OVP80": "VP8"}


@dataclass
class _Logical:
    """A logical stream of an Ogg file."""

    codec: str
    spans: list[list[int]]
    sequence: int  # of its last page
    begun: bool = False  # whether it has more than its first page
    ended: bool = False
    lost: int = 0  # pages


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


def walk_ogg(source: Source, start: int, layout: Layout) -> int:
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
        following = find_pattern(source, OGG_PAGE, place + 1)
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
            frames=flac_sample_count(source, first.spans[0][0]) if first.codec == "FLAC" else None,
            cut=broken or not (first.ended or endless),
            preroll=0.0 if first.codec == "FLAC" else PREROLL,
            counted=False,
            resumable=first.codec == "FLAC",
            hole=f"pages of Ogg are missing or damaged ({first.lost})" if 0 < first.lost < 1 << 20 else "",
        )
    )
