"""Ogg pages, chained links and parallel streams."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import pytest
from layouts import Bytes, layout_of, streams_of

from las_fast.data.containers import FileLayout, Stream, ogg

OTHER = "contains an Ogg part ({}) that cannot be read; convert it: ffmpeg -i FILE -vn -ac 1 -ar 16000 FILE.wav"
PARALLEL = (
    "contains {} parallel audio streams, of which only the first is read; keep one: ffmpeg -i FILE -map 0:a:0 FILE.wav"
)


def page(body, serial=1, sequence=0, flags=0):
    lacing = [255] * (len(body) // 255) + [len(body) % 255]
    numbers = struct.pack("<III", serial, sequence, 0x5A5A5A5A)  # a wrong checksum, which is not checked
    return b"OggS\0" + bytes([flags]) + bytes(8) + numbers + bytes([len(lacing), *lacing]) + body


def link(pages=3, serial=1, codec=b"OpusHead", lost=0, ended=True):
    """A chained Ogg stream: a header page and `pages` pages of data, with `lost` page numbers left out."""
    data = page(codec + bytes(11), serial, 0, flags=2)
    for n in range(1, pages + 1):
        data += page(bytes([n]) * 300, serial, n + (lost if n == pages else 0), flags=4 * (ended and n == pages))
    return data


def test_each_link_of_a_chain_is_a_stream():
    first, second = link(3), link(2, serial=2, codec=b"\x01vorbis")
    actual = layout_of(first + second)
    assert [s.spans for s in actual.streams] == [((0, len(first)),), ((len(first), len(first) + len(second)),)]
    assert [(s.cut, s.gap) for s in actual.streams] == [(False, "")] * 2 and not actual.unread
    again = streams_of(first + first)  # equal serial numbers
    assert [s.spans for s in again] == [((0, len(first)),), ((len(first), 2 * len(first)),)]


@pytest.mark.parametrize("cut", [1, 200, 326, 330])
def test_an_ogg_file_that_ends_within_a_page_or_before_its_last_is_cut(cut):
    data = link(3)
    (stream,) = streams_of(data[:-cut])
    assert stream.cut and stream.spans == ((0, len(data) - (len(page(bytes(300))) * (1 + (cut > 329)))),)
    (stream,) = streams_of(link(3, ended=False))
    assert stream.cut
    assert [s.cut for s in streams_of(link(2, ended=False) + link(2, serial=5))] == [False, False]


def test_lost_pages_are_counted():
    (stream,) = streams_of(link(3, lost=4))
    assert stream.gap == "Ogg pages are missing or damaged (4)" and not stream.cut
    (stream,) = streams_of(link(3, lost=1 << 20))
    assert stream.gap == ""


def test_bytes_between_pages_separate_the_spans():
    first = page(b"OpusHead" + bytes(11), flags=2)
    last = page(b"x" * 300, sequence=1, flags=4)
    (stream,) = streams_of(first + b"junk" + last)
    assert stream.spans == ((0, len(first)), (len(first) + 4, len(first) + 4 + len(last))) and not stream.gap
    middle = page(b"x" * 300, sequence=1)
    assert streams_of(first + b"." + last)[0].spans[1] == (len(first) + 1, len(first) + 1 + len(last))
    (stream,) = streams_of(first + b"junk" + middle + last)
    assert stream.spans == ((0, len(first)), (len(first) + 4, len(first) + 4 + len(middle + last)))


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        (b"Speex   ", "Speex"),
        (b"\x80theora", "Theora"),
        (b"BBCD", "Dirac"),
        (b"OVP80", "VP8"),
        (b"????", "unknown codec"),
    ],
)
def test_unsupported_ogg_streams_are_reported_by_codec(codec, name):
    actual = layout_of(link() + link(serial=2, codec=codec))
    assert len(actual.streams) == 1 and actual.unread[0].startswith(f"contains an Ogg part ({name})")
    data = page(codec + bytes(9), 7, 0, flags=2) + link()
    actual = layout_of(data)
    assert len(actual.streams) == 1 and not actual.unread and actual.streams[0].spans == ((len(data) - len(link()),
                                                                                       len(data)),)  # fmt: skip


def test_of_two_parallel_streams_the_first_is_read():
    heads = page(b"\x01vorbis" + bytes(9), 1, 0, flags=2) + page(b"OpusHead" + bytes(9), 2, 0, flags=2)
    body = page(b"a" * 40, 1, 1, flags=4) + page(b"b" * 40, 2, 1, flags=4)
    actual = layout_of(heads + body)
    assert actual.unread == [PARALLEL.format(2)]
    one = len(page(b"\x01vorbis" + bytes(9)))
    assert actual.streams[0].spans == ((0, one), (len(heads), len(heads) + len(page(b"a" * 40))))


def test_flac_is_extracted_from_its_pages():
    """The Ogg pages are removed, and the nine bytes before the FLAC header."""
    head = b"\x7fFLAC\x01\0\0\x01fLaC\0\0\0\x22" + bytes(13) + (777).to_bytes(5, "big") + bytes(16)
    first, second = page(head, flags=2), page(b"s" * 300, sequence=1, flags=4)
    (stream,) = streams_of(first + second)
    begin = len(first) - len(head) + 9
    assert stream.spans == ((begin, len(first)), (len(first) + len(second) - 300, len(first) + len(second)))
    assert stream.sample_count == 777 and stream.preroll == 0.0 and not stream.cut


def test_a_page_of_ogg_needs_all_of_its_header():
    whole = page(b"OpusHead" + bytes(11), flags=2)
    for cut in range(1, len(whole)):
        source = SimpleNamespace(size=len(whole) - cut, read=lambda a, n, cut=cut: whole[: len(whole) - cut][a : a + n])
        assert ogg._ogg_page(source, 0) is None
    source = SimpleNamespace(size=len(whole), read=lambda a, n: whole[a : a + n])
    actual = ogg._ogg_page(source, 0)
    assert (actual.position, actual.body, actual.after, actual.flags) == (0, 28, 47, 2)
    assert (actual.serial, actual.sequence) == (b"\1\0\0\0", 0)


def vorbis(*spans, **fields) -> Stream:
    """The Vorbis or Opus stream of these spans."""
    return Stream(spans, preroll=0.5, length_known=False, **fields)


def flac(*spans, **fields) -> Stream:
    return Stream(spans, length_known=False, resumable=True, **fields)


HEAD = page(b"OpusHead" + b"\7" * 40, flags=2)
LAST = page(bytes(50), sequence=1, flags=4)


def test_the_length_of_a_page_follows_from_its_lacing():
    for body in (b"", bytes(254), bytes(255), bytes(255 * 255 - 1)):
        data = page(body, serial=0x04030201, sequence=0x08070605, flags=5)
        actual = ogg._ogg_page(Bytes(b".." + data + b"OggS"), 2)
        assert (actual.position, actual.body, actual.after) == (2, 2 + len(data) - len(body), 2 + len(data))
        assert (actual.flags, actual.serial, actual.sequence) == (5, b"\1\2\3\4", 0x08070605)
    assert ogg._ogg_page(Bytes(b"OggS\1" + LAST[5:]), 0) is None
    assert ogg._ogg_page(Bytes(b"OggS\0" + bytes(21) + b"\0"), 0).after == 27


def test_a_page_interrupted_by_another_is_truncated():
    inner = page(b"OggS\0" + bytes(40))
    trailing_bytes = {b"": True, b"OggS": True, b"OggS\0": True, b"OggX": False, b"Ogg": False, b"x": False}
    for trailing, is_page in trailing_bytes.items():
        assert (ogg._ogg_page(Bytes(inner + trailing), 0) is not None) == is_page
        assert ogg._ogg_page(Bytes(page(b"OggX\0" + bytes(40)) + trailing), 0) is not None


def test_the_spans_of_a_stream_are_its_pages():
    assert streams_of(HEAD + LAST) == [vorbis((0, len(HEAD + LAST)))]
    assert streams_of(b"ID3\4\0\0\0\0\0\1." + HEAD + LAST) == [vorbis((11, 11 + len(HEAD + LAST)))]
    assert streams_of(page(b"\1vorbis", flags=2) + LAST)[0].preroll == 0.5
    one = page(b"OpusHead", flags=6)  # one page is both first and last
    assert streams_of(one + one) == [vorbis((0, len(one))), vorbis((len(one), 2 * len(one)))]


def test_pages_without_a_first_page_are_not_a_stream():
    alone = page(bytes(50), sequence=3)
    assert layout_of(alone + LAST) == FileLayout([Stream(((0, len(alone + LAST)),))])
    begin = len(alone)
    assert streams_of(alone + HEAD + LAST) == [vorbis((begin, begin + len(HEAD + LAST)))]
    other = page(bytes(50), serial=9, sequence=1)
    end = len(HEAD + other)
    assert streams_of(HEAD + other + LAST) == [vorbis((0, len(HEAD)), (end, end + len(LAST)))]


def test_a_stream_without_a_last_page_has_no_end():
    middle = page(bytes(50), sequence=1)
    assert streams_of(HEAD + middle) == [vorbis((0, len(HEAD + middle)), cut=True)]
    assert streams_of(HEAD + page(bytes(50), sequence=1, flags=1))[0].cut
    second = page(b"OpusHead" + bytes(11), serial=5, flags=2) + page(bytes(50), serial=5, sequence=1, flags=4)
    between = len(HEAD + middle)
    chain = [vorbis((0, between)), vorbis((between, between + len(second)))]
    assert streams_of(HEAD + middle + second) == chain  # a link of a chain may lack the mark


def test_foreign_bytes_in_a_link_without_an_end_mark_make_it_truncated():
    middle = page(bytes(50), sequence=1)
    second = page(b"OpusHead" + bytes(11), serial=5, flags=2) + page(bytes(50), serial=5, sequence=1, flags=4)
    begin = len(HEAD + middle) + 4
    chain = [vorbis((0, begin - 4), cut=True), vorbis((begin, begin + len(second)))]
    assert streams_of(HEAD + middle + b"junk" + second) == chain
    third = [vorbis((begin + len(second) + 4, begin + 2 * len(second) + 4))]
    with_junk = HEAD + middle + second + b"junk" + second
    assert [s.cut for s in streams_of(with_junk)] == [False, False, False]
    assert streams_of(HEAD + middle + b"junk" + second + b"junk" + second) == chain + third


def test_a_truncated_page_truncates_only_the_last_link():
    first, second = HEAD + LAST, page(b"OpusHead" + bytes(11), serial=5, flags=2)
    tail = page(bytes(50), serial=5, sequence=1, flags=4)
    for cut in (1, 50, len(tail) - 4):
        data = first + second + tail[:-cut]
        begin = len(first)
        assert streams_of(data) == [vorbis((0, begin)), vorbis((begin, begin + len(second)), cut=True)]
        assert [s.cut for s in streams_of(first + tail[:-cut])] == [True]  # although it was marked as ended


def test_bytes_after_the_last_page_are_not_part_of_it():
    data = HEAD + LAST
    assert streams_of(data + b"Ogg") == [vorbis((0, len(data)))]
    assert streams_of(data + b"junk" * 9) == [vorbis((0, len(data)))]
    wav = b"RIFF$\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x80>\0\0\0}\0\0\2\0\x10\0data\0\0\0\0"
    assert streams_of(data + wav) == [vorbis((0, len(data))), Stream(((len(data), len(data) + len(wav)),))]
    layout = FileLayout()
    assert ogg.walk_ogg(Bytes(data + b"junk"), 0, layout) == len(data)
    assert ogg.walk_ogg(Bytes(data + LAST[:-1]), 0, layout) == len(data + LAST) - 1
    assert ogg.walk_ogg(Bytes(b"." + LAST), 1, layout) == 1


def test_lost_pages_are_counted_by_page_numbers():
    def hole(*numbers):
        pages = [page(bytes(9), sequence=n, flags=4 * (n == numbers[-1])) for n in numbers]
        return streams_of(page(b"OpusHead", sequence=7, flags=2) + b"".join(pages))[0].gap

    assert hole(8, 9, 10) == hole(8, 8, 9) == ""
    assert hole(9, 10) == "Ogg pages are missing or damaged (1)"
    assert hole(9, 12) == hole(11, 12) == hole(8, 12) == "Ogg pages are missing or damaged (3)"
    assert hole(7 + (1 << 20)) == f"Ogg pages are missing or damaged ({(1 << 20) - 1})"
    assert hole(8 + (1 << 20)) == ""


def test_a_link_may_interleave_pages_of_several_streams():
    heads = page(b"\x80theora" + bytes(9), 1, flags=2) + page(b"OpusHead" + bytes(9), 2, flags=2)
    heads += page(b"fishead\0" + bytes(9), 3, flags=2)
    video, sound = page(b"v" * 40, 1, 1), page(b"s" * 40, 2, 1)
    begin = len(page(b"\x80theora" + bytes(9)))
    spans = [(begin, begin + len(page(b"OpusHead" + bytes(9)))), (len(heads + video), len(heads + video + sound))]
    ends = page(b"v", 1, 2, flags=4) + page(b"s", 2, 2, flags=4)
    last = (len(heads + video + sound + ends) - len(page(b"s")), len(heads + video + sound + ends))
    data = heads + video + sound + ends
    assert streams_of(data) == [vorbis(*spans, last)]
    moved = [tuple((a + len(data), b + len(data)) for a, b in (*spans, last))]
    assert streams_of(data + data) == [vorbis(*spans, last), vorbis(*moved[0])]  # with the same page numbers


def test_a_first_page_after_other_pages_begins_a_link():
    late = page(b"OpusHead" + bytes(11), serial=5, flags=2)
    rest = page(bytes(9), serial=5, sequence=1, flags=4)
    middle = page(bytes(9), sequence=1, flags=1)
    begin = len(HEAD + middle)
    assert streams_of(HEAD + middle + late + rest) == [vorbis((0, begin)), vorbis((begin, begin + len(late + rest)))]
    data = page(b"\x80theora" + bytes(9), 1, flags=2) + page(b"\1vorbis", 2, flags=2) + page(b"s", 2, 1, flags=4)
    again = streams_of(data + late + rest)  # a stream began before
    assert len(again) == 2 and again[1] == vorbis((len(data), len(data + late + rest)))


def test_skipped_ogg_streams_are_reported_by_codec():
    def unread(*codecs):
        return layout_of(b"".join(page(codec, n, flags=2) for n, codec in enumerate(codecs))).unread[0]

    assert unread(b"Speex   ") == OTHER.format("Speex")
    assert unread(b"fishead\0") == OTHER.format("unknown codec")
    assert unread(b"????") == OTHER.format("unknown codec")
    assert unread(b"fishead\0", b"\x80theora", b"Speex   ") == OTHER.format("Theora, Speex")
    both = layout_of(page(b"OpusHead", 1, flags=2) + page(b"OpusHead", 2, flags=2) + page(b"\1vorbis", 3, flags=6))
    assert both.unread == [PARALLEL.format(3)]


def test_flac_in_ogg_is_a_stream_of_its_packets():
    body = b"\x7fFLAC\1\0\0\1fLaC\0\0\0\x22" + bytes(13) + b"\x03" + (777).to_bytes(4, "big") + bytes(16)
    first, second = page(body, flags=2), page(b"s" * 40, sequence=1, flags=1)
    third = page(b"s" * 40, sequence=2, flags=4)
    begin, ends = len(first) - len(body) + 9, [len(first), len(first + second), len(first + second + third)]
    spans = [(begin, ends[0]), (ends[1] - 40, ends[1]), (ends[2] - 40, ends[2])]
    assert streams_of(first + second + third) == [flac(*spans, sample_count=(3 << 32) + 777)]
    assert streams_of(first + second) == [flac(*spans[:2], sample_count=(3 << 32) + 777, cut=True)]
    assert streams_of(first + third) == [
        flac(spans[0], (ends[1] - 40, ends[1]), sample_count=(3 << 32) + 777,
             gap="Ogg pages are missing or damaged (1)")
    ]  # fmt: skip
