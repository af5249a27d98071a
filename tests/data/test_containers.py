"""Streams found in files of every format: lengths, joined and truncated files, tags, FLAC."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
import soundfile
from layouts import Bytes, chunk, layout_of, riff_file, streams_of

from las_fast.data import containers
from las_fast.data.containers import FileLayout, FileView, Source, Stream, find_streams, flac, streams
from las_fast.data.containers.magic import RARE, container_at, foreign_format
from las_fast.data.containers.tags import skip_tags, without_trailing_tags

# Format, subtype, channels, and the cut-off bytes that cannot be noticed.
FORMS = [
    *(("AVR", sub, n, 0) for sub in ("PCM_S8", "PCM_16") for n in (1, 2)),
    *(("MPC2K", "PCM_16", n, 0) for n in (1, 2)),
    ("WVE", "ALAW", 1, 0),
    *(("SDS", sub, 1, 0) for sub in ("PCM_S8", "PCM_16", "PCM_24")),
    *(("VOC", sub, n, 1) for sub in ("PCM_U8", "PCM_16") for n in (1, 2)),  # the last byte is padding
    *(("MAT4", sub, n, 0) for sub in ("PCM_16", "FLOAT", "DOUBLE") for n in (1, 2)),
    *(("AIFF", sub, n, 0) for sub in ("PCM_16", "PCM_24") for n in (1, 2)),
    *((form, "PCM_16", n, 0) for form in ("AU", "CAF", "W64", "NIST", "WAV", "RF64") for n in (1, 2)),
    *((form, "PCM_16", 1, 0) for form in ("SVX", "HTK")),
]
CLAIMED = [row for row in FORMS if row[0] in ("AVR", "MPC2K", "WVE", "SDS", "VOC", "MAT4")]


def written(path, form, subtype, channels, frames=1001):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (frames, channels))
    soundfile.write(path, sound, 8000 if form == "WVE" else 16000, format=form, subtype=subtype)
    return path.read_bytes()


def streams_in(path, data):
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return find_streams(Source(descriptor))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(("form", "subtype", "channels", "less"), FORMS)
def test_missing_bytes_are_counted(tmp_path, form, subtype, channels, less):
    data = written(tmp_path / "x", form, subtype, channels)
    for cut in (0, 1, 3, 100, 1000):
        (stream,) = (layout := streams_in(tmp_path / "x", data[: len(data) - cut])).streams
        assert stream.missing_bytes == max(0, cut - less) and not layout.unread
        assert not stream.cut and not stream.gap and stream.sample_count is None
        assert stream.spans[-1][1] in (len(data) - cut, len(data) - cut - 1)


@pytest.mark.parametrize(("form", "subtype", "channels", "less"), CLAIMED)
def test_joined_files_are_two_streams(tmp_path, form, subtype, channels, less):
    first, second = (written(tmp_path / "x", form, subtype, channels, frames=n) for n in (1001, 700))
    whole = streams_in(tmp_path / "x", first + second).streams
    end = len(first) + len(second)
    assert [stream.spans for stream in whole] == [((0, len(first)),), ((len(first), end),)]
    cut = streams_in(tmp_path / "x", (first + second)[: end - 200]).streams
    assert [stream.missing_bytes for stream in cut] == [0, 200 - less]


def test_a_file_of_very_many_streams_is_read_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MAX_STREAMS", 3)
    one = written(tmp_path / "x", "WAV", "PCM_16", 1, frames=0)
    assert streams_in(tmp_path / "x", 3 * one).unread == []
    layout = streams_in(tmp_path / "x", 9 * one)
    assert len(layout.streams) == 3 and layout.unread == ["has more than 3 recordings one after another; split it"]


def test_a_file_of_unknown_format_is_one_stream(tmp_path):
    (stream,) = streams_in(tmp_path / "x", b"no sound at all").streams
    assert stream.spans == ((0, 15),) and stream.length == 15 and stream.missing_bytes == 0
    assert streams_in(tmp_path / "x", b"").streams[0].spans == ((0, 0),)


# --------------------------------------------------------------------------------------------------------- bytes


def test_a_source_returns_only_existing_bytes(tmp_path, monkeypatch):
    data = bytes(range(256)) * 40
    (tmp_path / "x").write_bytes(data)
    monkeypatch.setattr(streams, "WINDOW", 100)
    with (tmp_path / "x").open("rb") as file:
        source = Source(file.fileno())
        assert source.size == len(data)
        for start, count in ((0, 10), (5, 95), (5, 96), (90, 10), (90, 11), (3, 4), (10_000, 500), (10_239, 5), (0, 0)):
            assert source.read(start, count) == data[start : start + count]
        assert source.read(len(data), 4) == source.read(-1, 4) == b"" and source.error is None


def test_a_source_records_a_read_error(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    descriptor = os.open(tmp_path / "x", os.O_RDONLY)
    source = Source(descriptor)
    os.close(descriptor)
    assert source.read(0, 2) == b"" and isinstance(source.error, OSError)


def taken(view: FileView, count: int) -> bytes:
    buffer = memoryview(bytearray(count))
    return bytes(buffer[: view.readinto(buffer)])


def test_a_view_presents_its_spans_as_one_file(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    with (tmp_path / "x").open("rb") as file:
        view = FileView(Source(file.fileno()), (b"head", (10, 20), b"", (50, 53)))
        whole = b"head" + bytes(range(10, 20)) + bytes(range(50, 53))
        assert view.starts == [0, 4, 14, 14, 17] and view.tell() == 0
        assert taken(view, 17) == whole and taken(view, 5) == b"" and view.tell() == 17
        for start in range(18):
            for count in (0, 1, 4, 30):
                assert view.seek(start) == start
                assert taken(view, count) == whole[start : start + count]
                assert view.tell() == min(17, start + count)
        assert view.seek(-3, os.SEEK_END) == 14 and view.seek(2, os.SEEK_CUR) == 16
        assert view.seek(-99, os.SEEK_CUR) == 0 and view.seek(99) == 99 and taken(view, 1) == b""
        short = FileView(Source(file.fileno()), ((90, 120),))  # the file is shorter than its header says
        assert taken(short, 30) == bytes(range(90, 100))


def tag(size=125, *, ape=False, header=False):
    if not ape:
        return b"TAG" + bytes(size)
    footer = b"APETAGEX" + struct.pack("<IIII", 2000, 32 + size, 1, header << 31) + bytes(8)
    return (footer if header else b"") + bytes(size) + footer


@pytest.mark.parametrize(
    "tags", [b"", tag(), tag(50, ape=True), tag(50, ape=True, header=True), tag(9, ape=True) + tag(), tag() + tag()]
)
def test_tags_after_the_audio_are_skipped(tmp_path, tags):
    begin = b"x" * 300
    (tmp_path / "x").write_bytes(begin + tags)
    with (tmp_path / "x").open("rb") as file:
        source = Source(file.fileno())
        assert without_trailing_tags(source, 0, source.size) == 300
        assert without_trailing_tags(source, 290, source.size) >= 290


@pytest.mark.parametrize(
    ("tags", "begin"),
    [
        (b"", 0),
        (b"ID3\x04\0\0\0\0\0\x05" + bytes(5), 15),
        (b"ID3\x04\0\x10\0\0\0\x05" + bytes(15), 25),
        (b"ID3\x04\0\0\0\0\x02\x01" + bytes(257), 267),
        (b"ID3\x04\0\0\x81\x80\x80\x80", 10 + (1 << 21)),
        ((b"ID3\x04\0\0\0\0\0\x05" + bytes(5)) * 2, 30),
        (b"ID3\x04", 0),
    ],
)
def test_tags_before_the_audio_are_skipped(tmp_path, tags, begin):
    (tmp_path / "x").write_bytes(tags + b"sound" * 9 if len(tags) != 4 else tags)
    with (tmp_path / "x").open("rb") as file:
        assert skip_tags(Source(file.fileno()), 0) == begin


def test_flac_ends_where_another_begins_or_before_its_tags(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.zeros(3000), 16000)
    one = (tmp_path / "a.flac").read_bytes()
    whole = streams_in(tmp_path / "x", one + tag()).streams
    assert [(s.spans, s.sample_count, s.cut) for s in whole] == [(((0, len(one)),), 3000, False)]
    both = streams_in(tmp_path / "x", one + one + tag()).streams
    assert [s.spans for s in both] == [((0, len(one)),), ((len(one), 2 * len(one)),)]
    assert streams_in(tmp_path / "x", one + tag() + one).streams[0].spans == ((0, len(one) + 128),)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x20ftypM4A ", "MPEG-4 (m4a, mp4, mov)"),
        (b"\x1a\x45\xdf\xa3", "Matroska (webm, mkv)"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "Windows Media (wma, asf)"),
        (b"#!AMR\n", "AMR"),
        (b"\xff\xf1", "AAC"),
        (b"\xff\xf9", "AAC"),
        (b"\x0b\x77", "AC-3"),
        (b"RIFF\0\1\0\0AVI ", "AVI"),
        (b"FLV\1", "Flash video"),
        (b"wvpk", "WavPack"),
        (b"MAC ", "Monkey's Audio"),
        (b"TTA1", "True Audio"),
        (b"MPCK", "Musepack"),
        (b"MP+", "Musepack"),
        (b".RMF", "RealMedia"),
        (b"DSD ", "DSD"),
        (b"\0\0\1\xba", "MPEG video"),
        (b"\0\0\1\xb3", "MPEG video"),
        (b"ID3\x04\0\0\0\0\0\x05" + bytes(5) + b"wvpk", "WavPack"),
        ((b"\x47" + bytes(187)) * 3, "an MPEG transport stream"),
        (b"\x47" + bytes(400), ""),
        (b"OggS", "Ogg without Vorbis, Opus or FLAC"),
        (b"RIFF", ""),
    ],
)
def test_unsupported_formats_are_recognised(tmp_path, data, name):
    (tmp_path / "x").write_bytes(data)
    with (tmp_path / "x").open("rb") as file:
        assert foreign_format(Source(file.fileno())) == name


# -------------------------------------------------------------------------------------- tags before and after the audio

WAV = riff_file(chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 16)), chunk(b"data", bytes(100)))
END = len(WAV)
MP3 = (b"\xff\xfb\x90\0" + bytes(413)) * 5


def test_a_stream_has_default_fields_unless_its_parser_sets_them():
    plain = Stream(((0, 1),))
    assert (plain.sample_count, plain.missing_bytes, plain.padding, plain.preroll, plain.gap) == (None, 0, 0, 0.0, "")
    assert (plain.cut, plain.truncated_header, plain.resumable, plain.length_known) == (False, False, False, True)
    assert Stream((b"head", (3, 10), b"")).length == 11


def test_small_reads_are_served_from_one_window(tmp_path, monkeypatch):
    data = bytes(range(256)) * 2
    (tmp_path / "x").write_bytes(data)
    monkeypatch.setattr(streams, "WINDOW", 100)
    reads, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, start: reads.append((start, count)) or pread(fd, count, start))
    with (tmp_path / "x").open("rb") as file:
        source = Source(file.fileno())
        for start, count in ((10, 5), (10, 100), (109, 1), (12, 98), (50, 61), (9, 5), (500, 50), (500, 12)):
            assert source.read(start, count) == data[start : start + count]
        assert reads == [(10, 100), (50, 100), (9, 100), (500, 12)]  # no more than the file has
        assert source.read(512, 1) == source.read(-5, 9) == b"" and len(reads) == 4


def test_many_bytes_after_the_audio_are_reported_unless_they_are_zeros_or_tags():
    many, few = b"\7" * 65537, b"\7" * 65536
    message = "has 65537 bytes of unknown data after its audio; remove them, or repair the header if they are audio"
    assert layout_of(WAV + many) == FileLayout([Stream(((0, END),))], [message])
    assert layout_of(WAV + bytes(65536) + b"\7").unread == layout_of(WAV + many + tag()).unread == [message]
    assert layout_of(WAV + WAV + many).unread == layout_of(MP3 + WAV + many).unread == [message]
    assert layout_of(WAV + MP3 + many).unread == layout_of(MP3 + many).unread == []  # mp3 has no fixed end
    for trailing in (few, few + tag(), few + tag(50, ape=True), bytes(65537), bytes(65537) + tag(), b""):
        assert layout_of(WAV + trailing) == FileLayout([Stream(((0, END),))])
    assert layout_of(many) == FileLayout([Stream(((0, 65537),))])


def test_audio_is_searched_for_after_tags_and_after_other_audio():
    id3 = b"ID3\4\0\0\0\0\0\5" + bytes(5)
    assert streams_of(id3 + WAV + id3 + WAV + tag()) == [Stream(((15, 15 + END),)), Stream(((30 + END, 30 + 2 * END),))]
    assert streams_of(id3 + WAV + b"junk" + WAV) == [Stream(((15, 15 + END),))]
    assert streams_of(id3) == [Stream(((0, 15),))]


def test_an_mp3_after_an_htk_header_is_an_mp3():
    assert len(streams_of(struct.pack(">IIHH", 1_000_000, 625, 2, 0) + MP3)) == 1


def test_a_parser_that_makes_no_progress_ends_the_search(monkeypatch):
    def walk(source, place, layout):
        places.append(place)
        if place < max_streams:
            layout.streams.append(Stream(((place, place + 1),)))
        return 0

    monkeypatch.setattr(containers, "_walker_at", lambda source, place: walk)
    for max_streams, expected in ((3, [0, 1, 2, 3]), (9, [0, 1, 2, 3, 4]), (0, [0])):
        places = []
        parsed = streams_of(b"12345")
        assert places == expected and len(parsed) == max(1, min(max_streams, 5))


@pytest.mark.parametrize("archive", [b"PK\3\4", b"Rar!", b"7z\xbc\xaf"])
def test_an_mp3_within_an_archive_is_not_audio(archive):
    frames = (b"\xff\xfd\x90\0" + bytes(518)) * 5  # layer II
    (stream,) = streams_of(b"1234" + frames)
    assert stream.spans == ((4, 4 + len(frames)),) and stream.sample_count == 5 * 1152
    assert streams_of(archive + frames) == [Stream(((0, 4 + len(frames)),))]
    assert streams_of(archive[:3] + b"?" + frames)[0].sample_count == 5 * 1152
    assert streams_of(b"?" + archive[:3] + frames)[0].sample_count == 5 * 1152


def test_a_transport_stream_has_three_packets_or_two_and_a_byte():
    packets = (b"\x47" + bytes(187)) * 3
    for data, name in ((packets[:377], "an MPEG transport stream"), (packets[:376], ""), (packets[1:] + b"\x47", "")):
        assert foreign_format(Bytes(data)) == name
    for place in (0, 188, 376):
        assert foreign_format(Bytes(packets[:place] + b"?" + packets[place + 1 :])) == ""


@pytest.mark.parametrize("magic", ["52494646 00000000 57415645", "464f524d 00000000 38535658", "ffe31800", "fffd9000"])
def test_a_container_is_recognised_by_its_first_bytes(magic):
    data = bytes.fromhex(magic)
    assert container_at(Bytes(b"." + data), 1) is not None
    for cut in range(1, len(data)):
        assert container_at(Bytes(data[:-cut]), 0) is None
    assert container_at(Bytes(b"\0" + data[1:]), 0) is None


@pytest.mark.parametrize("magic", RARE)
def test_a_rare_format_is_recognised_by_its_whole_magic_number(magic):
    assert container_at(Bytes(magic), 0) is not None
    assert container_at(Bytes(magic[:-1] + bytes([magic[-1] ^ 1])), 0) is None


def test_tags_before_the_audio_have_the_length_in_their_header():
    for digits, size in ((b"\1\0\0\0", 1 << 21), (b"\0\1\0\0", 1 << 14), (b"\0\0\1\0", 128), (b"\0\0\0\x7f", 127)):
        for flags, footer in ((0, 0), (16, 10), (239, 0)):
            head = b"ID3\4\0" + bytes([flags]) + digits
            assert skip_tags(Bytes(b"..." + head), 3) == 13 + size + footer
            assert skip_tags(Bytes(head[:-1]), 0) == 0


def test_a_trailing_tag_begins_after_the_start_of_the_audio():
    def end(data, start, trailing=b""):
        return without_trailing_tags(Bytes(data + trailing), start, len(data))

    sound = b"x" * 300
    assert end(sound + tag(), 300) == end(sound + tag(), 0, b"more") == 300 and end(sound + tag(), 301) == 428
    ape = tag(50, ape=True)
    for start, expected in ((300, 300), (330, 330), (0, 300)):
        assert end(sound + ape, start) == expected
    assert end(ape[1:], 0) == 0 and end(ape[-31:], 0) == 31 and end(ape[-32:], 0) == 0
    both = tag(50, ape=True, header=True)
    assert end(sound + both, 0) == 300
    for bit in range(32):  # the last start is within a header
        flagged = ape[:-12] + struct.pack("<I", 1 << bit) + ape[-8:]
        assert end(sound + flagged, 0) == (268 if bit == 31 else 300)


# -------------------------------------------------------------------------------------------------------------- FLAC


def flac_file(*blocks: bytes, count: int = 0) -> bytes:
    """Make a FLAC file of metadata blocks only; the first gives the number of samples."""
    blocks = (bytes(13) + count.to_bytes(5, "big") + bytes(16), *blocks)
    heads = [(bytes([128 * (n == len(blocks) - 1) + n]) + len(b).to_bytes(3, "big")) for n, b in enumerate(blocks)]
    return b"fLaC" + b"".join(head + block for head, block in zip(heads, blocks, strict=True))


def whole(start: int, end: int, frames: int | None = None, **fields) -> Stream:
    return Stream(((start, end),), sample_count=frames, resumable=True, **fields)


def test_the_count_of_a_flac_has_36_bits():
    for count in (1, 777, (1 << 35) + 1, (1 << 36) - 1):
        data = flac_file(count=count | 0xF << 36) + b"sound"
        assert streams_of(data) == [whole(0, len(data), count)]
        assert streams_of(b"ID3\4\0\0\0\0\0\1." + data) == [whole(11, 11 + len(data), count)]
    assert streams_of(flac_file(count=0xF << 36) + b"sound")[0].sample_count is None


def test_no_stream_starts_within_a_metadata_block_of_flac():
    start = flac_file()[:42]
    for inside in (start, b"RIFF....WAVEfmt ", b"OggS\0\2" + bytes(8)):
        data = flac_file(b"cover" + inside, bytes(66000) + inside + bytes(4000)) + b"sound"
        assert streams_of(data) == [whole(0, len(data))]
        assert streams_of(data + tag()) == [whole(0, len(data))]
    assert streams_of(flac_file(b"note") + b"sound" + WAV) == [whole(0, 55), Stream(((55, 55 + END),))]
    assert streams_of(flac_file() + b"sound" + flac_file() + b"more") == [whole(0, 47), whole(47, 93)]


def test_a_flac_that_ends_within_its_blocks_is_reported():
    data = flac_file(b"note", bytes(1000))
    assert streams_of(data + b"s") == [whole(0, len(data) + 1)]
    for cut in (0, 1, 1000, 1001, 1004):
        assert streams_of(data[: len(data) - cut]) == [whole(0, len(data) - cut, truncated_header=True)]
    assert streams_of(data[:-1004] + b"\x81\0\0\4")[0].truncated_header


def test_a_pattern_is_found_across_window_boundaries(monkeypatch):
    monkeypatch.setattr(streams, "WINDOW", 40)
    for before in range(100):
        source = Bytes(b"." * before + b"RIFF....WAVEfmt " + b"." * 50)
        for start in (0, before // 2, before):
            assert streams.find_pattern(source, flac.NEXT_START, start) == before
        assert streams.find_pattern(source, flac.NEXT_START, before + 1) == source.size
        short = Bytes(b"." * before + b"RIFF....WAVEfmt")
        assert streams.find_pattern(short, flac.NEXT_START, 0) == short.size
