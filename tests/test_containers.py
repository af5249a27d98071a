"""What a file holds by its bytes: lengths of every format, frames of MPEG, pages of Ogg, joined and cut files."""

from __future__ import annotations

import itertools
import os
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from las_fast import containers
from las_fast.containers import Source, View, find_streams

# Format, subtype, channels, and by how many bytes less than is cut off a file is known to lack.
FORMS = [
    *(("AVR", sub, n, 0) for sub in ("PCM_S8", "PCM_16") for n in (1, 2)),
    *(("MPC2K", "PCM_16", n, 0) for n in (1, 2)),
    ("WVE", "ALAW", 1, 0),
    *(("SDS", sub, 1, 0) for sub in ("PCM_S8", "PCM_16", "PCM_24")),
    *(("VOC", sub, n, 1) for sub in ("PCM_U8", "PCM_16") for n in (1, 2)),  # its last byte is no sound
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


def streams(path, data):
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return find_streams(Source(descriptor))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(("form", "subtype", "channels", "less"), FORMS)
def test_what_a_file_lacks_is_counted_in_bytes(tmp_path, form, subtype, channels, less):
    data = written(tmp_path / "x", form, subtype, channels)
    for cut in (0, 1, 3, 100, 1000):
        (stream,) = (layout := streams(tmp_path / "x", data[: len(data) - cut])).streams
        assert stream.lacking == max(0, cut - less) and not layout.unread
        assert not stream.cut and not stream.hole and stream.frames is None
        assert stream.spans[-1][1] in (len(data) - cut, len(data) - cut - 1)


@pytest.mark.parametrize(("form", "subtype", "channels", "less"), CLAIMED)
def test_files_that_were_joined_are_two_streams(tmp_path, form, subtype, channels, less):
    first, second = (written(tmp_path / "x", form, subtype, channels, frames=n) for n in (1001, 700))
    whole = streams(tmp_path / "x", first + second).streams
    end = len(first) + len(second)
    assert [stream.spans for stream in whole] == [((0, len(first)),), ((len(first), end),)]
    cut = streams(tmp_path / "x", (first + second)[: end - 200]).streams
    assert [stream.lacking for stream in cut] == [0, 200 - less]


def test_a_file_of_no_known_kind_is_one_stream(tmp_path):
    (stream,) = streams(tmp_path / "x", b"no sound at all").streams
    assert stream.spans == ((0, 15),) and stream.length == 15 and stream.lacking == 0
    assert streams(tmp_path / "x", b"").streams[0].spans == ((0, 0),)


# --------------------------------------------------------------------------------------------------------- bytes


def test_a_source_gives_the_bytes_that_are_there(tmp_path, monkeypatch):
    data = bytes(range(256)) * 40
    (tmp_path / "x").write_bytes(data)
    monkeypatch.setattr(containers, "WINDOW", 100)
    with (tmp_path / "x").open("rb") as file:
        source = Source(file.fileno())
        assert source.size == len(data)
        for start, count in ((0, 10), (5, 95), (5, 96), (90, 10), (90, 11), (3, 4), (10_000, 500), (10_239, 5), (0, 0)):
            assert source.read(start, count) == data[start : start + count]
        assert source.read(len(data), 4) == source.read(-1, 4) == b"" and source.error is None


def test_a_source_remembers_that_the_disk_failed(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    descriptor = os.open(tmp_path / "x", os.O_RDONLY)
    source = Source(descriptor)
    os.close(descriptor)
    assert source.read(0, 2) == b"" and isinstance(source.error, OSError)


def taken(view: View, count: int) -> bytes:
    buffer = memoryview(bytearray(count))
    return bytes(buffer[: view.readinto(buffer)])


def test_a_view_is_its_spans_as_one_file(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    with (tmp_path / "x").open("rb") as file:
        view = View(Source(file.fileno()), (b"head", (10, 20), b"", (50, 53)))
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
        short = View(Source(file.fileno()), ((90, 120),))  # the file is shorter than its header says
        assert taken(short, 30) == bytes(range(90, 100))


# ---------------------------------------------------------------------------------------------------------- MPEG

KBPS = {  # by version 1 or else, and layer: of index 1 to 14
    (True, 1): "32 64 96 128 160 192 224 256 288 320 352 384 416 448",
    (True, 2): "32 48 56 64 80 96 112 128 160 192 224 256 320 384",
    (True, 3): "32 40 48 56 64 80 96 112 128 160 192 224 256 320",
    (False, 1): "32 48 56 64 80 96 112 128 144 160 176 192 224 256",
    (False, 2): "8 16 24 32 40 48 56 64 80 96 112 128 144 160",
    (False, 3): "8 16 24 32 40 48 56 64 80 96 112 128 144 160",
}
RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
SAMPLES = {(True, 1): 384, (True, 2): 1152, (True, 3): 1152, (False, 1): 384, (False, 2): 1152, (False, 3): 576}


def header(version=3, layer=3, kbps=9, rate=0, pad=0, mode=0, crc=0, emphasis=0):
    return bytes([255, 0xE0 | version << 3 | (4 - layer) << 1 | (not crc), kbps << 4 | rate << 2 | pad << 1,
                  mode << 6 | emphasis])  # fmt: skip


@pytest.mark.parametrize(("version", "layer"), [*itertools.product(RATES, (1, 2, 3))])
def test_frames_of_mpeg_are_as_long_as_the_standard_says(version, layer):
    first = version == 3
    samples = SAMPLES[first, layer]
    for (index, kbps), rate, pad, mode, crc in itertools.product(
        enumerate(KBPS[first, layer].split(), 1), range(3), (0, 1), range(4), (0, 1)
    ):
        hertz = RATES[version][rate]
        slot = 4 if layer == 1 else 1
        length = (samples // 8 * int(kbps) * 1000 // hertz // slot + pad) * slot
        if layer == 1:
            length = (12 * int(kbps) * 1000 // hertz + pad) * 4
        frame = containers._parse_frame(header(version, layer, index, rate, pad, mode, crc))
        assert (frame.length, frame.samples) == (length, samples)
        assert frame.kind == (version, layer, hertz, mode == 3)
        side = {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[first, mode == 3]
        assert frame.info == 4 + side + 2 * crc


@pytest.mark.parametrize(
    "head",
    [
        header(version=1), header(layer=4), header(rate=3), header(kbps=0), header(kbps=15), header(emphasis=2),
        b"\xfe" + header()[1:], b"\xff\xdb" + header()[2:], header()[:3], b"",
    ],
)  # fmt: skip
def test_what_is_no_frame_of_mpeg_is_none(head):
    assert containers._mpeg_frame(head) is None
    assert containers._mpeg_frame(header(emphasis=3)) is not None


def frames(count, **fields):
    """Return so many frames of silence."""
    head = header(**fields)
    return (head + bytes(containers._parse_frame(head).length - 4)) * count


def counting(frames=None, size=None, *, tag=b"Info", note=b"", **fields):
    """Return a frame that counts the others."""
    head = header(**fields)
    frame = containers._parse_frame(head)
    flags = (frames is not None) | 2 * (size is not None)
    body = tag + struct.pack(">I", flags) + b"".join(struct.pack(">I", n) for n in (frames, size) if n is not None)
    return (head + bytes(frame.info - 4) + body + note).ljust(frame.length, b"\0")


@pytest.mark.parametrize("fields", [{}, {"mode": 3}, {"version": 2}, {"version": 0, "mode": 3}, {"layer": 2}], ids=str)
def test_frames_of_mpeg_are_counted_one_by_one(tmp_path, fields):
    samples = containers._parse_frame(header(**fields)).samples
    data = frames(20, **fields)
    (stream,) = streams(tmp_path / "x", data).streams
    assert stream.frames == 20 * samples and not stream.cut and not stream.hole and stream.preroll == 0.5
    assert stream.spans[-1] == (0, len(data))
    (stream,) = streams(tmp_path / "x", data[:-1]).streams
    assert stream.frames == 19 * samples and stream.cut
    size = len(data) // 20
    assert stream.spans[-1] == (0, 19 * size)


def test_tags_and_what_is_no_frame_lie_between_spans(tmp_path):
    size, gap = len(frames(1)), 5000
    for junk, hole in ((gap, f"{gap} bytes in the middle are no sound"), (1596, ""), (1597, "1597 bytes")):  # 0.1 s
        data = frames(8) + b"\0" * junk + frames(6)
        (stream,) = streams(tmp_path / "x", data).streams
        assert stream.spans[-2:] == ((0, 8 * size), (8 * size + junk, 14 * size + junk))
        assert stream.frames == 14 * 1152 and stream.hole.startswith(hole) and bool(stream.hole) == bool(hole)
    (stream,) = streams(tmp_path / "x", b"ID3\x04\0\0\0\0\x01\x00" + bytes(128) + frames(6)).streams
    assert stream.spans[-1] == (138, 138 + 6 * size) and stream.frames == 6 * 1152
    (stream,) = streams(tmp_path / "x", frames(6) + b"TAG" + bytes(125)).streams
    assert stream.spans[-1] == (0, 6 * size) and not stream.cut


def tag(size=125, *, ape=False, header=False):
    if not ape:
        return b"TAG" + bytes(size)
    footer = b"APETAGEX" + struct.pack("<IIII", 2000, 32 + size, 1, header << 31) + bytes(8)
    return (footer if header else b"") + bytes(size) + footer


@pytest.mark.parametrize(
    "tags", [b"", tag(), tag(50, ape=True), tag(50, ape=True, header=True), tag(9, ape=True) + tag(), tag() + tag()]
)
def test_tags_behind_the_sound_are_no_sound(tmp_path, tags):
    begin = b"x" * 300
    (tmp_path / "x").write_bytes(begin + tags)
    with (tmp_path / "x").open("rb") as file:
        source = Source(file.fileno())
        assert containers._without_tags_behind(source, 0, source.size) == 300
        assert containers._without_tags_behind(source, 290, source.size) >= 290


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
def test_tags_before_the_sound_are_skipped(tmp_path, tags, begin):
    (tmp_path / "x").write_bytes(tags + b"sound" * 9 if len(tags) != 4 else tags)
    with (tmp_path / "x").open("rb") as file:
        assert containers._skip_tags(Source(file.fileno()), 0) == begin


@pytest.mark.parametrize(
    ("claimed", "there", "true"),
    [
        (1000, 1000, 1000),
        (1000, 2000, 1000),
        (2000, 1000, 2000),
        (0, 1000, 1000),
        (1 << 31, 1000, 1000),
        ((1 << 31) - 65536, 1000, 1000),
        ((1 << 31) - 65537, 1000, (1 << 31) - 65537),
        ((1 << 31) + 65537, 1000, (1 << 31) + 65537),
        ((1 << 32) - 1, 1000, 1000),
        (1 << 62, 1000, 1000),
        ((1 << 62) - 1, 1000, (1 << 62) - 1),
        (1000, (1 << 32) + 1000, (1 << 32) + 1000),
        (1000, (1 << 32) + 1000 - 65536, (1 << 32) + 1000 - 65536),
        (1000, (1 << 32) + 1000 - 65537, 1000),
        (1000, 1 << 31, 1000),
    ],
)
def test_a_length_that_no_recorder_means_is_not_believed(monkeypatch, claimed, there, true):
    source = SimpleNamespace(size=44 + there, read=lambda start, count: b"")
    assert containers._true_length(source, 44, claimed, "<") == true


def test_a_frame_of_another_kind_within_a_stream_is_damage(tmp_path):
    """One frame of another rate that no frame follows ends no stream."""
    size, odd = len(frames(1)), frames(1, rate=1)
    data = frames(8) + odd + frames(8)
    found = streams(tmp_path / "x", data).streams
    assert [stream.frames for stream in found] == [16 * 1152]
    assert found[0].spans[1:] == ((0, 8 * size), (8 * size + len(odd), 16 * size + len(odd)))


def test_flac_ends_where_another_begins_or_before_its_tags(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.zeros(3000), 16000)
    one = (tmp_path / "a.flac").read_bytes()
    whole = streams(tmp_path / "x", one + tag()).streams
    assert [(s.spans, s.frames, s.cut) for s in whole] == [(((0, len(one)),), 3000, False)]
    both = streams(tmp_path / "x", one + one + tag()).streams
    assert [s.spans for s in both] == [((0, len(one)),), ((len(one), 2 * len(one)),)]
    assert streams(tmp_path / "x", one + tag() + one).streams[0].spans == ((0, len(one) + 128),)


def test_a_page_of_ogg_needs_all_of_its_header():
    whole = page(b"OpusHead" + bytes(11), flags=2)
    for cut in range(1, len(whole)):
        source = SimpleNamespace(size=len(whole) - cut, read=lambda a, n, cut=cut: whole[: len(whole) - cut][a : a + n])
        assert containers._ogg_page(source, 0) is None
    source = SimpleNamespace(size=len(whole), read=lambda a, n: whole[a : a + n])
    found = containers._ogg_page(source, 0)
    assert (found.place, found.body, found.after, found.flags) == (0, 28, 47, 2)
    assert (found.serial, found.sequence) == (b"\1\0\0\0", 0)


@pytest.mark.parametrize("tag", [b"Info", b"Xing"])
@pytest.mark.parametrize("mode", [0, 3])
def test_a_count_of_frames_is_believed_where_bytes_lack_and_not_where_all_are_there(tmp_path, tag, mode):
    size = len(frames(1, mode=mode))
    for claimed, total, count, cut in ((20, 21 * size, 20, False), (30, 21 * size, 20, False), (10, None, 20, False)):
        data = counting(claimed, total, tag=tag, mode=mode) + frames(20, mode=mode)
        (stream,) = streams(tmp_path / "x", data).streams
        assert (stream.frames, stream.cut) == (count * 1152, cut)
    (stream,) = streams(tmp_path / "x", counting(40, 41 * size, tag=tag, mode=mode) + frames(20, mode=mode)).streams
    assert stream.frames == 40 * 1152 and not stream.cut  # told by the frames that are there
    good = counting(20, 21 * size, tag=tag, mode=mode)
    (stream,) = streams(tmp_path / "x", good + frames(20, mode=mode)).streams
    assert stream.spans == ((0, 21 * size),) and stream.padding == 1152


def test_a_count_that_is_wrong_is_replaced_by_a_true_one(tmp_path):
    size = len(frames(1))
    (stream,) = streams(tmp_path / "x", frames(20)).streams
    info = stream.spans[0]
    frame = containers._parse_frame(info[:4])
    assert frame.kind == (3, 3, 44100, False) and len(info) == frame.length
    found = struct.unpack(">4sIII", info[frame.info : frame.info + 16])
    assert found == (b"Xing", 15, 20, 20 * size + len(info))
    assert info[frame.info + 120 :][:24] == b"LAME".ljust(21, b"\0") + containers.ENCODER_DELAY
    assert containers._counted(info, frame) == (20, 20 * size + len(info))


def test_the_delay_and_padding_of_an_encoder_are_kept(tmp_path):
    size, delay, padding = len(frames(1)), 576, 1105
    note = bytes(100) + struct.pack(">I", 50) + b"LAME3.100" + bytes(12) + (delay << 12 | padding).to_bytes(3, "big")
    head = counting(20, 21 * size, note=note).replace(b"Info\0\0\0\x03", b"Info\0\0\0\x0f")
    (stream,) = streams(tmp_path / "x", head + frames(20)).streams
    assert stream.padding == delay + padding + 1152 and stream.spans == ((0, 21 * size),)
    wrong = head.replace(struct.pack(">I", 20), struct.pack(">I", 9), 1)
    (stream,) = streams(tmp_path / "x", wrong + frames(20)).streams
    at = containers._parse_frame(head[:4]).info
    assert stream.spans[0][at : at + 16] == struct.pack(">4sIII", b"Xing", 15, 20, 20 * size + len(stream.spans[0]))
    assert stream.spans[0][at + 16 : at + 156] == head[at + 16 : at + 156]


def test_vbri_counts_too():
    head = header()
    frame = containers._parse_frame(head)
    info = (head + bytes(32) + b"VBRI" + bytes(6) + struct.pack(">II", 8340, 20)).ljust(frame.length, b"\0")
    assert containers._counted(info, frame) == (20, 8340)
    assert containers._counted(frames(1), frame) == (0, 0)
    assert containers._counted(counting(1 << 28, 5), frame) == (0, 5)
    assert containers._counted(counting((1 << 28) - 1, None), frame) == ((1 << 28) - 1, 0)
    assert containers._counted(counting(None, 7), frame) == (0, 7)


def test_joined_mpeg_of_other_kinds_are_streams_of_their_own(tmp_path):
    data = frames(10) + frames(12, rate=1) + frames(9, rate=1, mode=3)
    found = streams(tmp_path / "x", data).streams
    assert [stream.frames for stream in found] == [1152 * n for n in (10, 12, 9)]
    ends = [len(frames(10)), len(frames(10) + frames(12, rate=1)), len(data)]
    assert [stream.spans[-1] for stream in found] == list(zip([0, *ends], ends, strict=False))
    twice = (counting(5, None) + frames(5)) * 2  # each begins with a count of its own
    assert [stream.frames for stream in streams(tmp_path / "x", twice).streams] == [5 * 1152] * 2


# ----------------------------------------------------------------------------------------------------------- Ogg


def page(body, serial=1, sequence=0, flags=0):
    lacing = [255] * (len(body) // 255) + [len(body) % 255]
    head = b"OggS\0" + bytes([flags]) + bytes(8) + struct.pack("<III", serial, sequence, 0) + bytes([len(lacing)])
    return head + bytes(lacing) + body


def link(pages=3, serial=1, codec=b"OpusHead", lost=0, ended=True):
    found = page(codec + bytes(11), serial, 0, flags=2)
    for n in range(1, pages + 1):
        found += page(bytes([n]) * 300, serial, n + (lost if n == pages else 0), flags=4 * (ended and n == pages))
    return found


def test_each_link_of_a_chain_is_a_stream(tmp_path):
    first, second = link(3), link(2, serial=2, codec=b"\x01vorbis")
    found = streams(tmp_path / "x", first + second)
    assert [s.spans for s in found.streams] == [((0, len(first)),), ((len(first), len(first) + len(second)),)]
    assert [(s.cut, s.hole) for s in found.streams] == [(False, "")] * 2 and not found.unread
    again = streams(tmp_path / "x", first + first).streams  # of the same number
    assert [s.spans for s in again] == [((0, len(first)),), ((len(first), 2 * len(first)),)]


@pytest.mark.parametrize("cut", [1, 200, 326, 330])
def test_an_ogg_file_that_ends_within_a_page_or_before_its_last_is_cut(tmp_path, cut):
    data = link(3)
    (stream,) = streams(tmp_path / "x", data[:-cut]).streams
    assert stream.cut and stream.spans == ((0, len(data) - (len(page(bytes(300))) * (1 + (cut > 329)))),)
    (stream,) = streams(tmp_path / "x", link(3, ended=False)).streams
    assert stream.cut
    assert [s.cut for s in streams(tmp_path / "x", link(2, ended=False) + link(2, serial=5)).streams] == [False, False]


def test_lost_pages_are_counted(tmp_path):
    (stream,) = streams(tmp_path / "x", link(3, lost=4)).streams
    assert stream.hole == "pages of Ogg are missing or damaged (4)" and not stream.cut
    (stream,) = streams(tmp_path / "x", link(3, lost=1 << 20)).streams
    assert stream.hole == ""


def test_bytes_between_pages_part_the_spans(tmp_path):
    first = page(b"OpusHead" + bytes(11), flags=2)
    last = page(b"x" * 300, sequence=1, flags=4)
    (stream,) = streams(tmp_path / "x", first + b"junk" + last).streams
    assert stream.spans == ((0, len(first)), (len(first) + 4, len(first) + 4 + len(last))) and not stream.hole


@pytest.mark.parametrize(
    ("codec", "name"),
    [(b"Speex   ", "Speex"), (b"\x80theora", "Theora"), (b"BBCD", "Dirac"), (b"OVP80", "VP8"), (b"????", "a stream")],
)
def test_streams_of_ogg_that_are_not_read_are_named(tmp_path, codec, name):
    found = streams(tmp_path / "x", link() + link(serial=2, codec=codec))
    assert len(found.streams) == 1 and found.unread[0].startswith(f"holds a part in Ogg of {name}")
    beside = page(codec + bytes(9), 7, 0, flags=2) + link()
    found = streams(tmp_path / "x", beside)
    assert len(found.streams) == 1 and not found.unread and found.streams[0].spans == ((len(beside) - len(link()),
                                                                                       len(beside)),)  # fmt: skip


def test_of_two_sounds_side_by_side_the_first_is_read(tmp_path):
    heads = page(b"\x01vorbis" + bytes(9), 1, 0, flags=2) + page(b"OpusHead" + bytes(9), 2, 0, flags=2)
    body = page(b"a" * 40, 1, 1, flags=4) + page(b"b" * 40, 2, 1, flags=4)
    found = streams(tmp_path / "x", heads + body)
    assert found.unread == ["holds 2 streams of sound side by side, of which only the first is read"]
    one = len(page(b"\x01vorbis" + bytes(9)))
    assert found.streams[0].spans == ((0, one), (len(heads), len(heads) + len(page(b"a" * 40))))


def test_flac_is_taken_out_of_its_pages(tmp_path):
    """A FLAC stream in Ogg is given without pages and without the nine bytes before its own beginning."""
    head = b"\x7fFLAC\x01\0\0\x01fLaC\0\0\0\x22" + bytes(13) + (777).to_bytes(5, "big") + bytes(16)
    first, second = page(head, flags=2), page(b"s" * 300, sequence=1, flags=4)
    (stream,) = streams(tmp_path / "x", first + second).streams
    begin = len(first) - len(head) + 9
    assert stream.spans == ((begin, len(first)), (len(first) + len(second) - 300, len(first) + len(second)))
    assert stream.frames == 777 and stream.preroll == 0.0 and not stream.cut


@pytest.mark.parametrize(
    ("data", "name"),
    [
        *((b"\0" * place + magic, name) for place, magic, name in containers.FOREIGN),
        (b"ID3\x04\0\0\0\0\0\x05" + bytes(5) + b"wvpk", "WavPack"),
        ((b"\x47" + bytes(187)) * 3, "an MPEG transport stream"),
        (b"\x47" + bytes(400), ""),
        (b"OggS", "Ogg without Vorbis, Opus or FLAC"),
        (b"RIFF", ""),
    ],
)
def test_formats_that_are_not_read_are_known_by_name(tmp_path, data, name):
    (tmp_path / "x").write_bytes(data)
    with (tmp_path / "x").open("rb") as file:
        assert containers.foreign_format(Source(file.fileno())) == name
