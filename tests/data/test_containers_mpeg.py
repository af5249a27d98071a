"""MPEG audio: frames, their count, and the bytes between them."""

from __future__ import annotations

import itertools
import struct
from dataclasses import replace

import pytest
from layouts import Bytes, layout_of, streams_of

from las_fast.data.containers import FileLayout, Stream, mpeg

KBPS = {  # version 1 or other, and layer -> kbit/s of index 1 to 14
    (True, 1): "32 64 96 128 160 192 224 256 288 320 352 384 416 448",
    (True, 2): "32 48 56 64 80 96 112 128 160 192 224 256 320 384",
    (True, 3): "32 40 48 56 64 80 96 112 128 160 192 224 256 320",
    (False, 1): "32 48 56 64 80 96 112 128 144 160 176 192 224 256",
    (False, 2): "8 16 24 32 40 48 56 64 80 96 112 128 144 160",
    (False, 3): "8 16 24 32 40 48 56 64 80 96 112 128 144 160",
}
RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
SAMPLES = {(True, 1): 384, (True, 2): 1152, (True, 3): 1152, (False, 1): 384, (False, 2): 1152, (False, 3): 576}


def header(version=3, layer=3, kbps=9, rate=0, pad=0, mode=0, crc=0, emphasis=0, private=0):
    return bytes([255, 0xE0 | version << 3 | (4 - layer) << 1 | (not crc), kbps << 4 | rate << 2 | pad << 1 | private,
                  mode << 6 | emphasis])  # fmt: skip


@pytest.mark.parametrize(("version", "layer"), [*itertools.product(RATES, (1, 2, 3))])
def test_frame_lengths_follow_the_mpeg_standard(version, layer):
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
        frame = mpeg.frame_header(header(version, layer, index, rate, pad, mode, crc))
        assert (frame.length, frame.samples) == (length, samples)
        assert frame.kind == (version, layer, hertz, mode == 3)
        side = {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[first, mode == 3]
        assert frame.xing_offset == 4 + side


@pytest.mark.parametrize(
    "head",
    [
        header(version=1), header(layer=4), header(rate=3), header(kbps=0), header(kbps=15), header(emphasis=2),
        b"\xfe" + header()[1:], b"\xff\xdb" + header()[2:], header()[:3], b"",
    ],
)  # fmt: skip
def test_invalid_frame_headers_are_refused(head):
    assert mpeg.frame_header(head) is None
    assert mpeg.frame_header(header(emphasis=3)) is not None


def frames(count, **fields):
    """`count` frames whose content cannot be decoded."""
    head = header(**fields)
    return head.ljust(mpeg.frame_header(head).length, b"\1") * count


def counting(frames=None, size=None, *, tag=b"Info", note=b"", **fields):
    """A frame with a Xing or Info header that counts frames."""
    head = header(**fields)
    frame = mpeg.frame_header(head)
    flags = (frames is not None) | 2 * (size is not None)
    body = tag + struct.pack(">I", flags) + b"".join(struct.pack(">I", n) for n in (frames, size) if n is not None)
    return (head + bytes(frame.xing_offset - 4) + body + note).ljust(frame.length, b"\0")


@pytest.mark.parametrize("fields", [{}, {"mode": 3}, {"version": 2}, {"version": 0, "mode": 3}, {"layer": 2}], ids=str)
def test_frames_of_mpeg_are_counted_one_by_one(fields):
    samples = mpeg.frame_header(header(**fields)).samples
    data = frames(20, **fields)
    (stream,) = streams_of(data)
    assert stream.sample_count == 20 * samples and not stream.cut and not stream.gap and stream.preroll == 0.5
    assert stream.spans[-1] == (0, len(data))
    (stream,) = streams_of(data[:-1])
    assert stream.sample_count == 19 * samples and stream.cut
    size = len(data) // 20
    assert stream.spans[-1] == (0, 19 * size)


def test_tags_and_other_bytes_lie_between_spans():
    size, gap = len(frames(1)), 5000
    for junk, hole in ((gap, f"{gap} bytes in the middle are not audio"), (1596, ""), (1597, "1597 bytes")):  # 0.1 s
        data = frames(8) + b"\0" * junk + frames(6)
        (stream,) = streams_of(data)
        assert stream.spans[-2:] == ((0, 8 * size), (8 * size + junk, 14 * size + junk))
        assert stream.sample_count == 14 * 1152 and stream.gap.startswith(hole) and bool(stream.gap) == bool(hole)
    (stream,) = streams_of(b"ID3\x04\0\0\0\0\x01\x00" + bytes(128) + frames(6))
    assert stream.spans[-1] == (138, 138 + 6 * size) and stream.sample_count == 6 * 1152
    (stream,) = streams_of(frames(6) + b"TAG" + bytes(125))
    assert stream.spans[-1] == (0, 6 * size) and not stream.cut


def test_a_frame_of_another_kind_within_a_stream_is_damage():
    """A single frame of another rate does not end a stream."""
    size, odd = len(frames(1)), frames(1, rate=1)
    data = frames(8) + odd + frames(8)
    streams = streams_of(data)
    assert [stream.sample_count for stream in streams] == [16 * 1152]
    assert streams[0].spans[1:] == ((0, 8 * size), (8 * size + len(odd), 16 * size + len(odd)))


@pytest.mark.parametrize("tag", [b"Info", b"Xing"])
@pytest.mark.parametrize("mode", [0, 3])
def test_a_frame_count_is_used_only_if_bytes_are_missing(tag, mode):
    size = len(frames(1, mode=mode))
    for claimed, total, count, cut in ((20, 21 * size, 20, False), (30, 21 * size, 20, False), (10, None, 20, False)):
        data = counting(claimed, total, tag=tag, mode=mode) + frames(20, mode=mode)
        (stream,) = streams_of(data)
        assert (stream.sample_count, stream.cut) == (count * 1152, cut)
    (stream,) = streams_of(counting(40, 41 * size, tag=tag, mode=mode) + frames(20, mode=mode))
    assert stream.sample_count == 40 * 1152 and not stream.cut  # every frame present is complete
    good = counting(20, 21 * size, tag=tag, mode=mode)
    (stream,) = streams_of(good + frames(20, mode=mode))
    assert stream.spans == ((0, 21 * size),) and stream.padding == 1152


def test_a_wrong_frame_count_is_corrected():
    size = len(frames(1))
    (stream,) = streams_of(frames(20))
    info = stream.spans[0]
    frame = mpeg.frame_header(info[:4])
    assert frame.kind == (3, 3, 44100, False) and len(info) == frame.length
    fields = struct.unpack(">4sIII", info[frame.xing_offset : frame.xing_offset + 16])
    assert fields == (b"Xing", 15, 20, 20 * size + len(info))
    assert info[frame.xing_offset + 120 :][:24] == b"LAME".ljust(21, b"\0") + (576 << 12).to_bytes(3, "big")
    assert mpeg._read_info_frame(info, frame) == (20, 20 * size + len(info))


def test_the_delay_and_padding_of_an_encoder_are_kept():
    size, delay, padding = len(frames(1)), 576, 1105
    note = bytes(100) + struct.pack(">I", 50) + b"LAME3.100" + bytes(12) + (delay << 12 | padding).to_bytes(3, "big")
    head = counting(20, 21 * size, note=note).replace(b"Info\0\0\0\x03", b"Info\0\0\0\x0f")
    (stream,) = streams_of(head + frames(20))
    assert stream.padding == delay + padding + 1152 and stream.spans == ((0, 21 * size),)
    wrong = head.replace(struct.pack(">I", 20), struct.pack(">I", 9), 1)
    (stream,) = streams_of(wrong + frames(20))
    at = mpeg.frame_header(head[:4]).xing_offset
    assert stream.spans[0][at : at + 16] == struct.pack(">4sIII", b"Xing", 15, 20, 20 * size + len(stream.spans[0]))
    assert stream.spans[0][at + 16 : at + 156] == head[at + 16 : at + 156]


def test_a_vbri_header_counts_frames():
    head = header()
    frame = mpeg.frame_header(head)
    info = (head + bytes(32) + b"VBRI" + bytes(6) + struct.pack(">II", 8340, 20)).ljust(frame.length, b"\0")
    assert mpeg._read_info_frame(info, frame) == (20, 8340)
    assert mpeg._read_info_frame(b"", frame) == (0, 0)
    assert mpeg._read_info_frame(counting(1 << 28, 5), frame) == (0, 5)
    assert mpeg._read_info_frame(counting((1 << 28) - 1, None), frame) == ((1 << 28) - 1, 0)
    assert mpeg._read_info_frame(counting(None, 7), frame) == (0, 7)


def test_joined_mpeg_files_of_different_kinds_are_separate_streams():
    data = frames(10) + frames(12, rate=1) + frames(9, rate=1, mode=3)
    streams = streams_of(data)
    assert [stream.sample_count for stream in streams] == [1152 * n for n in (10, 12, 9)]
    ends = [len(frames(10)), len(frames(10) + frames(12, rate=1)), len(data)]
    assert [stream.spans[-1] for stream in streams] == list(zip([0, *ends], ends, strict=False))
    twice = (counting(5, None) + frames(5)) * 2  # each begins with its own count
    assert [stream.sample_count for stream in streams_of(twice)] == [5 * 1152] * 2


SIZE = len(frames(1))  # bytes of a frame at 128 kbit/s and 44.1 kHz
INFO = len(counting())


def mp3(*spans, **fields) -> Stream:
    """A layer III stream of these spans without encoder padding."""
    return Stream(spans, **{"preroll": 0.5, "padding": 1152} | fields)


def sound(data: bytes, size: int | None = None) -> list[Stream]:
    """The streams of a file, without the counting frames that were made in memory."""
    streams = layout_of(data, size).streams
    assert all(isinstance(stream.spans[0], bytes) for stream in streams)
    return [replace(stream, spans=stream.spans[1:]) for stream in streams]


def test_frames_are_searched_for_in_the_first_mib():
    for before in (0, 1, 4, (1 << 20) - 3):
        begin, end = before, before + 4 * SIZE
        assert sound(bytes(before) + frames(4)) == [mp3((begin, end), sample_count=4 * 1152)]
    assert sound(b"\0" + frames(3) + bytes(9) + frames(4)) == [
        mp3((10 + 3 * SIZE, 10 + 7 * SIZE), sample_count=4 * 1152)
    ]
    for before in (1 << 20, (1 << 20) + 1):
        data = bytes(before) + frames(4)
        assert streams_of(data) == [Stream(((0, len(data)),))]
    tagged = b"ID3\4\0\0\0\0\0\1." + bytes((1 << 20) - 3) + frames(4)
    assert sound(tagged) == [mp3((8 + (1 << 20), len(tagged)), sample_count=4 * 1152)]


@pytest.mark.parametrize("magic", [b"PK\3\4", b"Rar!", b"7z\xbc\xaf", b"wvpk", b"FLV\1", b"OggS"])
def test_frames_within_a_file_of_another_kind_are_not_audio(magic):
    data = magic + frames(9)
    assert streams_of(data) == [Stream(((0, len(data)),))]
    assert sound(b"????" + frames(9)) == [mp3((4, 4 + 9 * SIZE), sample_count=9 * 1152)]


@pytest.mark.parametrize("window", [8, 9, 31])
def test_the_first_frame_is_found_across_window_boundaries(monkeypatch, window):
    monkeypatch.setattr(mpeg, "WINDOW", window)
    for before in range(40):
        source = Bytes(b"\xff" * before + frames(4))
        assert mpeg._first_frame(source, 0, source.size, source.size) == before
        assert mpeg._first_frame(source, 0, before + 3, source.size) == before
        assert mpeg._first_frame(source, 0, before + 2, source.size) == source.size
    assert mpeg._first_frame(Bytes(b""), 0, 5, 9) == 9


def test_four_frames_of_one_kind_or_all_up_to_the_end_make_a_stream():
    def chain(data, count=4, end=None):
        return mpeg._has_frames(Bytes(b"." + data), 1, 1 + (len(data) if end is None else end), count)

    other = frames(1, rate=1)
    assert chain(frames(9)) and chain(frames(4)) and chain(frames(3)) and chain(frames(1))
    assert not chain(frames(3) + b"...") and not chain(frames(3)[:-1]) and not chain(b"....") and not chain(other[1:])
    assert chain(frames(4) + other) and not chain(frames(3) + other) and not chain(frames(1) + other * 3)
    assert chain(frames(2) + b"....", 2) and not chain(frames(1) + b"....", 2) and chain(frames(1), 2)
    assert chain(frames(9), end=3 * SIZE) and not chain(frames(9), end=3 * SIZE - 1)


def test_bytes_between_frames_are_counted_and_tags_are_not():
    def gap(junk, before=8, trailing=8):
        (stream,) = sound(frames(before) + junk + frames(trailing))
        assert stream.sample_count == (before + trailing) * 1152 and not stream.cut
        begin = before * SIZE + len(junk)
        assert stream.spans == ((0, before * SIZE), (begin, begin + trailing * SIZE))
        return stream.gap

    tag = b"ID3\4\0\0\0\0\x27\x08" + bytes(5000)
    assert gap(bytes(5000)) == "5000 bytes in the middle are not audio"
    assert gap(tag) == ""
    assert gap(tag + bytes(5000)) == gap(tag + tag + bytes(5000)) == "5000 bytes in the middle are not audio"
    assert gap(frames(1, rate=1) + bytes(5000)) == f"{len(frames(1, rate=1)) + 5000} bytes in the middle are not audio"


def test_a_gap_of_a_tenth_of_a_second_is_reported_by_the_rate_of_the_bytes_around_it():
    for fields in ({}, {"kbps": 14}, {"rate": 2}, {"version": 2}):
        frame = mpeg.frame_header(header(**fields))
        tolerated = frame.length * frame.kind[2] // (10 * frame.samples)
        for junk in (tolerated, tolerated + 1):
            (stream,) = sound(frames(8, **fields) + bytes(junk) + frames(8, **fields))
            assert bool(stream.gap) == (junk > tolerated)


def test_bytes_between_the_count_and_the_first_frame_are_no_gap():
    count = counting(8, INFO + 8 * SIZE)
    data = frames(4) + count + bytes(5000) + frames(8)
    begin = 4 * SIZE + INFO + 5000
    assert streams_of(data)[1:] == [mp3(count, (begin, begin + 8 * SIZE), sample_count=8 * 1152)]


def test_two_frames_of_another_kind_are_a_separate_stream():
    data = frames(8) + frames(2, rate=1) + frames(8)
    assert [stream.sample_count for stream in sound(data)] == [8 * 1152, 2 * 1152, 8 * 1152]


def test_a_file_may_hold_only_a_count_of_0_frames():
    empty = counting(0, INFO)
    assert streams_of(empty) == [mp3(empty, sample_count=0)]


def test_two_gaps_add_up():
    data = frames(8) + bytes(3000) + frames(8) + bytes(2000) + frames(8)
    assert sound(data)[0].gap == "5000 bytes in the middle are not audio"


def test_the_end_of_the_frames_is_where_another_file_begins():
    wav = b"RIFF$\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x80>\0\0\0}\0\0\2\0\x10\0data\0\0\0\0"
    for data in (frames(9), counting(9, 10 * SIZE) + frames(9)):
        streams = layout_of(data + wav).streams
        assert streams[0].sample_count == 9 * 1152 and streams[0].spans[-1][1] == len(data)
        assert streams[1:] == [Stream(((len(data), len(data) + len(wav)),))]
    for data in (frames(9) + frames(9, rate=1), frames(9) + bytes(700) + frames(9), counting(9) * 2 + frames(9)):
        assert layout_of(data + wav).streams[-1] == Stream(((len(data), len(data) + len(wav)),))
        assert len(layout_of(data + wav).streams) == len(layout_of(data).streams) + 1
    layout = FileLayout()
    data = frames(9) + b"TAG" + bytes(125)
    assert mpeg.walk_mpeg(Bytes(data), 0, layout) == 9 * SIZE
    assert mpeg.walk_mpeg(Bytes(bytes(100)), 0, layout, 90) == 90
    assert mpeg.walk_mpeg(Bytes(counting(9, 9)), 0, layout, INFO) == INFO
    assert mpeg.walk_mpeg(Bytes(b"." + frames(9)), 1, layout, 1 + 5 * SIZE) == 1 + 5 * SIZE


def test_bytes_after_frames_are_not_reported():
    assert layout_of(frames(9) + b"\7" * 100_000).unread == []


def test_a_truncated_frame_is_reported_unless_a_count_gives_more_detail():
    for cut in (1, SIZE - 4):
        assert sound(frames(9)[:-cut]) == [mp3((0, 8 * SIZE), sample_count=8 * 1152, cut=True)]
        counted = (counting(9, 10 * SIZE) + frames(9))[:-cut]
        assert sound(counted)[0].sample_count == 9 * 1152 and not sound(counted)[0].cut
        uncounted = (counting(None, 10 * SIZE) + frames(9))[:-cut]
        assert sound(uncounted)[0].sample_count == 8 * 1152 and sound(uncounted)[0].cut
    data = frames(9) + frames(9, rate=1)
    assert [stream.cut for stream in sound(data[:-1])] == [False, True]


def test_frames_of_layers_i_and_ii_are_unchanged():
    for layer, samples in ((1, 384), (2, 1152)):
        data = frames(9, layer=layer)
        assert streams_of(data) == [Stream(((0, len(data)),), sample_count=9 * samples, preroll=0.5)]
        tagged = counting(7, 7, layer=layer) + data  # only layer III has a count
        assert streams_of(tagged)[0].sample_count == 10 * samples


@pytest.mark.parametrize("near, whole", [(0, True), (1, True), (-1, True), (2, False), (-2, False)])
def test_a_correct_counting_frame_is_passed_to_the_decoder_unchanged(near, whole):
    """The number of bytes may differ by 1%."""
    length = 100 * SIZE
    off = {0: 0, 1: length // 100, 2: length // 100 + 1}[abs(near)] * (1 if near > 0 else -1)
    good = counting(100, INFO + length + off)
    (stream,) = streams_of(good + frames(100))
    if whole:
        assert stream == mp3((0, INFO + length), sample_count=100 * 1152)
        (parted,) = streams_of(good + frames(40) + b"\0" + frames(60))
        first = INFO + 40 * SIZE
        assert parted == mp3((0, first), (first + 1, first + 1 + 60 * SIZE), sample_count=100 * 1152)
    else:
        assert stream.spans[0] != good and stream == mp3(
            stream.spans[0], (INFO, INFO + length), sample_count=100 * 1152
        )


def test_a_count_is_used_if_more_than_about_a_frame_is_missing():
    length = 20 * SIZE
    for beyond, frame_count in ((256, 20), (257, 23)):
        (stream,) = streams_of(counting(23, INFO + length + beyond) + frames(20))
        assert stream.sample_count == frame_count * 1152
    assert streams_of(counting(23, None) + frames(20))[0].sample_count == 23 * 1152
    assert streams_of(counting(3, INFO + length + 999) + frames(20))[0].sample_count == 20 * 1152


def note(delay: int, padding: int, by: bytes = b"LAME") -> bytes:
    return bytes(104) + by + bytes(17) + (delay << 12 | padding).to_bytes(3, "big") + bytes(range(12)) + b"\7" * 9


@pytest.mark.parametrize("fields", [{}, {"mode": 3}, {"version": 2}, {"version": 2, "mode": 3}, {"crc": 1}], ids=str)
def test_the_encoder_padding_follows_the_count(fields):
    size, info = len(frames(1, **fields)), len(counting(**fields))
    head = counting(20, info + 20 * size, note=note(4095, 1), **fields)
    assert streams_of(head + frames(20, **fields))[0].padding == 4096 + 1152
    head = counting(20, info + 20 * size, note=note(1, 4095), **fields)
    assert streams_of(head + frames(20, **fields))[0].padding == 4096 + 1152
    run = mpeg._Run(0, head[:4], (), [], b"")
    end = mpeg.frame_header(head[:4]).xing_offset + 144
    assert mpeg._padding(replace(run, info=head[:end])) == 4096 + 1152
    assert mpeg._padding(replace(run, info=head[: end - 1])) == mpeg._padding(run) == 1152


FIELDS = [{}, {"mode": 3}, {"crc": 1}, {"version": 2}, {"version": 2, "mode": 3, "crc": 1}, {"version": 0, "rate": 2},
          {"pad": 1}, {"private": 1}, {"kbps": 1}, {"rate": 1}, {"version": 2, "rate": 1, "mode": 3},
          {"kbps": 14, "rate": 2, "mode": 2, "emphasis": 1}]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_frames_without_a_count_get_one_in_the_smallest_possible_frame(fields):
    (stream,) = layout_of(frames(20, **fields)).streams
    info, length = stream.spans[0], 20 * len(frames(1, **fields))
    plain = fields | {"crc": 0, "pad": 0}
    room = [k for k in range(1, 15) if len(frames(1, **plain | {"kbps": k})) >= side(**plain) + 16 + 140]
    body = struct.pack(">4sIII", b"Xing", 15, 20, length + len(info)) + bytes(104) + b"LAME".ljust(21, b"\0")
    body += (576 << 12).to_bytes(3, "big") + bytes(12)
    head = header(**plain | {"kbps": room[0]})
    assert info == (head + bytes(side(**plain) - 4) + body).ljust(len(frames(1, **plain | {"kbps": room[0]})), b"\0")


def side(version=3, mode=0, **_) -> int:
    """The offset of the count in its frame, which does not depend on the checksum."""
    return 4 + {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[version == 3, mode == 3]


@pytest.mark.parametrize("by", [b"LAME", b"Lavf", b"Lavc"])
@pytest.mark.parametrize("fields", [{}, {"crc": 1}, {"version": 2, "mode": 3}], ids=str)
def test_the_encoders_delay_and_padding_survive_a_corrected_count(by, fields):
    head = bytearray(counting(9, 9, note=note(500, 600, by), **fields))
    at = side(**fields)
    made_up = bytes(104) + b"LAME".ljust(21, b"\0") + b"\x24"

    def notes():
        (stream,) = layout_of(bytes(head) + frames(20, **fields)).streams
        place = side(**fields)
        assert stream.spans[0][place : place + 4] == b"Xing"
        return stream.spans[0][place + 16 :].rstrip(b"\0")

    for flags, kept in ((15, True), (31, True), (7, False), (11, False), (3, False), (14, False)):
        head[at + 7] = flags
        assert notes() == (note(500, 600, by)[:140] if kept else made_up)
    head[at + 7] = 15
    for place in (at + 120, at + 123):
        head[place] ^= 1
        assert notes() == made_up
        head[place] ^= 1
    short = mpeg._Run(0, bytes(head[:4]), (), [], bytes(head[: at + 156]), 20)
    begin = side(**fields) + 16
    assert mpeg._make_info_frame(short, 1)[begin:].rstrip(b"\0") == note(500, 600, by)[:140]
    short.info = short.info[:-1]
    assert mpeg._make_info_frame(short, 1)[begin:].rstrip(b"\0") == made_up


def test_a_count_is_read_only_if_its_flag_is_set():
    frame = mpeg.frame_header(header())

    def counted(flags, *numbers, tag=b"Xing"):
        info = header() + bytes(32) + tag + struct.pack(f">I{len(numbers)}I", flags, *numbers)
        return mpeg._read_info_frame(info, frame)

    assert counted(3, 7, 8) == counted(15, 7, 8) == counted(3, 7, 8, tag=b"Info") == (7, 8)
    assert counted(1, 7, 8) == (7, 0) and counted(2, 7, 8) == (0, 7) and counted(0, 7, 8) == counted(12, 7, 8) == (0, 0)
    assert counted(3, 7) == (7, 0) and counted(3, 7, 8, tag=b"Xinf") == (0, 0)
    assert counted(3, 1 << 28, 8) == (0, 8) and counted(3, (1 << 28) - 1, 8) == ((1 << 28) - 1, 8)
    vbri = header() + bytes(32) + b"VBRI" + bytes(6) + struct.pack(">II", 8, 7)
    assert mpeg._read_info_frame(vbri, frame) == mpeg._read_info_frame(vbri + b"...", frame) == (7, 8)
    assert mpeg._read_info_frame(vbri[:-1], frame) == (0, 0)
    for count, expected in (((1 << 28) - 1, (1 << 28) - 1), (1 << 28, 0)):
        assert mpeg._read_info_frame(vbri[:50] + struct.pack(">I", count), frame) == (expected, 8)


def test_a_frame_that_counts_by_vbri_is_not_audio():
    vbri = (header() + bytes(32) + b"VBRI" + bytes(6) + struct.pack(">II", 9 * SIZE + SIZE, 9)).ljust(SIZE, b"\0")
    assert streams_of(vbri + frames(9)) == [mp3((0, 10 * SIZE), sample_count=9 * 1152)]
    later = header() + bytes(33) + b"VBRI" + bytes(SIZE - 41)
    assert sound(later + frames(9)) == [mp3((0, 10 * SIZE), sample_count=10 * 1152)]
