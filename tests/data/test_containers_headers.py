"""Streams by the headers of wav, AIFF, AU, CAF, W64, NIST and rarer formats."""

from __future__ import annotations

import struct

import pytest
from layouts import Bytes, chunk, layout_of, riff_file, streams_of

from las_fast.data.containers import FileLayout, Stream, magic, plain, rare, riff


def big(name: bytes, content: bytes = b"", size: int | None = None) -> bytes:
    return chunk(name, content, size, order=">")


FORMAT = chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 16))
BIG_FORMAT = big(b"fmt ", struct.pack(">HHIIHH", 1, 1, 16000, 32000, 2, 16))
SOUND = bytes(range(1, 101))
NOTE = chunk(b"LIST", b"INFO")
WAV = riff_file(FORMAT, chunk(b"data", SOUND))


def intact_streams(*ends: int) -> list[Stream]:
    """Consecutive streams with unchanged headers that end at `ends`."""
    return [Stream(((start, end),)) for start, end in zip((0, *ends), ends, strict=False)]


def bare(sound: tuple[int, int], content: bytes = FORMAT[8:], **fields) -> Stream:
    """The stream of (start, end) in the file under a new wav header."""
    length = sound[1] - sound[0]
    size = 20 + len(content) + len(content) % 2 + length
    return Stream((riff_file(chunk(b"fmt ", content), b"data" + struct.pack("<I", length), size=size), sound), **fields)


# ------------------------------------------------------------------------------------------------------------ chunks


@pytest.mark.parametrize(
    ("data", "size", "is_one"),
    [
        (b"LIST\4\0\0\0", 12, True),
        (b"LIST\5\0\0\0", 12, True),  # a missing pad byte
        (b"LIST\6\0\0\0", 12, False),
        (b"data\6\0\0\0", 12, True),
        (b"SSND\6\0\0\0", 12, True),
        (b"BODY\6\0\0\0", 12, True),
        (b"LIST\4\0\0", 12, False),
        (b"a ~b\4\0\0\0", 12, True),
        (b"a\x1f~b\4\0\0\0", 12, False),
        (b"a \x7fb\4\0\0\0", 12, False),
        (b"abc\x80\4\0\0\0", 12, False),
        (b"abcd\x80\0\0\0", 136, True),
    ],
)
def test_a_chunk_has_a_name_in_ascii_and_a_length_within_the_file(data, size, is_one):
    assert bool(riff._is_chunk(Bytes(data, size), 0, "<")) == is_one
    big_endian = data[:4] + data[:3:-1]
    assert bool(riff._is_chunk(Bytes(b"..." + big_endian, 3 + size), 3, ">")) == is_one


@pytest.mark.parametrize(
    ("trailing", "length", "expected"),
    [
        (NOTE, 6, (14, True)),
        (b"\0" + NOTE, 5, (14, True)),
        (NOTE, 5, (13, False)),
        (b"??" + NOTE, 5, (14, True)),
        (b"", 5, (14, True)),
        (b"\0", 5, (14, True)),
        (b"\0?", 5, (14, True)),
        (b"LIST", 5, (14, True)),
        (b"x" + NOTE + bytes(2000), 5, (14, True)),  # at its offset, the name would read xLIS
    ],
)
def test_a_pad_byte_may_be_missing(trailing, length, expected):
    source = Bytes(chunk(b"abcd", bytes(length), pad=False) + trailing)
    assert riff._after_chunk(source, 0, length, "<") == expected


# --------------------------------------------------------------------------------------------------------------- wav


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
        ((1 << 32) - 1, 5 << 30, 5 << 30),
        ((1 << 32) - 2, 5 << 30, (1 << 32) - 2),
        (1 << 62, 1000, 1000),
        ((1 << 62) - 1, 1000, (1 << 62) - 1),
        (1000, (1 << 32) + 1000, (1 << 32) + 1000),
        (1000, (1 << 32) + 1000 - 65536, (1 << 32) + 1000 - 65536),
        (1000, (1 << 32) + 1000 - 65537, 1000),
        (1000, 1 << 31, 1000),
    ],
)
def test_an_implausible_length_is_ignored(claimed, there, true):
    source = Bytes(b"", 44 + there)
    assert riff.true_length(source, 44, claimed, "<") == true


@pytest.mark.parametrize(
    "data",
    [
        WAV,
        riff_file(NOTE, FORMAT, NOTE, chunk(b"data", SOUND), NOTE, NOTE),
        riff_file(FORMAT, chunk(b"data", SOUND[:99])),
        riff_file(FORMAT, chunk(b"data", SOUND[:99], pad=False)),
        riff_file(FORMAT, chunk(b"note", b"odd"), chunk(b"data", SOUND[:99]), NOTE),
        riff_file(BIG_FORMAT, big(b"data", SOUND), big(b"LIST", b"I" * 6), name=b"RIFX", order=">"),
        riff_file(FORMAT, chunk(b"data", SOUND), name=b"RF64"),
        riff_file(FORMAT, chunk(b"data")),
        riff_file(FORMAT, chunk(b"data"), NOTE),
        riff_file(FORMAT, chunk(b"data", SOUND), chunk(b"note", b"odd", pad=False), NOTE),
    ],
)  # fmt: skip
def test_a_wav_with_a_correct_header_is_unchanged(data):
    assert streams_of(data) == intact_streams(len(data))
    assert streams_of(b"ID3\4\0\0\0\0\0\1." + data) == [Stream(((11, 11 + len(data)),))]  # at an odd offset


def test_bytes_after_the_chunks_of_a_wav_are_ignored():
    for trailing in (b"\0", b"junk", NOTE[:7]):
        assert streams_of(WAV + trailing) == intact_streams(len(WAV))
    assert streams_of(WAV + NOTE + b"junk") == intact_streams(len(WAV) + len(NOTE))


@pytest.mark.parametrize("lacking", [1, 2, 50, 99])
def test_a_truncated_wav_gets_a_header_with_its_actual_length(lacking):
    assert streams_of(WAV[:-lacking]) == [bare((44, 144 - lacking), missing_bytes=lacking)]
    odd = FORMAT[8:] + b"\0\0\7"
    data = riff_file(NOTE, chunk(b"fmt ", odd), chunk(b"data", SOUND))
    place = data.index(SOUND)
    assert streams_of(data[:-lacking]) == [bare((place, place + 100 - lacking), odd, missing_bytes=lacking)]


def test_a_wav_of_unknown_length_ends_with_the_file():
    for size in (0, 0x7FFFFFFF, 0xFFFFFFFF):
        assert streams_of(riff_file(FORMAT, chunk(b"data", b"\xff" + SOUND, size))) == [bare((44, 146))]


def test_a_wav_with_misaligned_chunks_gets_a_new_header():
    data = riff_file(FORMAT, chunk(b"note", b"odd", pad=False), chunk(b"data", SOUND), NOTE)
    assert streams_of(data) == [bare((55, 155))]


def test_a_wav_without_samples_ends_within_its_header():
    headers = [riff_file(FORMAT), riff_file(FORMAT, NOTE), riff_file(chunk(b"data", SOUND)), riff_file()]
    for data in (*headers, riff_file(FORMAT, b"data\0\0\0")):
        assert streams_of(data) == [Stream(((0, len(data)),), truncated_header=True)]
        assert streams_of(WAV + data)[1] == Stream(((len(WAV), len(WAV) + len(data)),), truncated_header=True)


def test_a_form_of_riff_that_is_not_audio_is_left_to_libsndfile():
    data = riff_file(FORMAT, chunk(b"data", SOUND), NOTE, form=b"AVI ")
    assert streams_of(data) == intact_streams(len(data)) and magic.container_at(Bytes(data), 0) is None
    assert magic.container_at(Bytes(b"LIST" + data[4:8] + b"WAVE"), 0) is None


@pytest.mark.parametrize("name", [b"RF64", b"BW64"])
def test_the_length_of_an_rf64_comes_from_its_ds64_chunk(name):
    def file(claimed, sound=SOUND, size=0xFFFFFFFF, sizes=b"ds64"):
        sizes = chunk(sizes, struct.pack("<QQQI", 7, claimed, 9, 0))
        return riff_file(sizes, FORMAT, chunk(b"data", sound, size), name=name, size=0xFFFFFFFF)

    place = len(file(0)) - 100
    taken = [bare((place, place + 100))]
    assert streams_of(file(100)) == (taken if name == b"BW64" else intact_streams(place + 100))
    assert streams_of(file(100, SOUND[:60])) == [bare((place, place + 60), missing_bytes=40)]
    # ds64 is used only for a size of -1
    assert streams_of(file(60, size=100)) == (taken if name == b"BW64" else intact_streams(place + 100))
    assert streams_of(file(60, sizes=b"note")) == taken
    plain = riff_file(chunk(b"ds64", struct.pack("<QQQI", 7, 60, 9, 0)), FORMAT, chunk(b"data", SOUND, 0xFFFFFFFF))
    assert streams_of(plain) == taken
    short = riff_file(FORMAT, chunk(b"data", SOUND, 0xFFFFFFFF), name=name)
    assert streams_of(short) == [bare((44, 144))]


def test_a_wav_of_4_gib_or_more_gets_an_rf64_header():
    content = FORMAT[8:]
    for length in (0, 1, 0xFFFFFEFF):
        size = struct.pack("<I", 36 + length)
        head = b"RIFF" + size + b"WAVE" + FORMAT + b"data" + struct.pack("<I", length)
        assert riff._riff_header("<", content, length) == head
    for length in (0xFFFFFF00, 1 << 33):
        sizes = chunk(b"ds64", struct.pack("<QQQI", 72 + length, length, 0, 0))
        head = riff_file(sizes, FORMAT, b"data\xff\xff\xff\xff", name=b"RF64", size=0xFFFFFFFF)
        assert riff._riff_header("<", content, length) == head
    size = riff._riff_header("<", bytes(65000), 0xFFFFFEFF)[4:8]
    assert size == b"\xff\xff\xff\xff"


@pytest.mark.parametrize("length", [100, 0xFFFFFF00, 0xFFFFFFFF, 1 << 33])
def test_a_big_endian_wav_of_any_length_gets_a_header(length):
    data = riff_file(BIG_FORMAT, chunk(b"data", b"\xff", 0, pad=False, order=">"), name=b"RIFX", order=">")
    size, claimed = (struct.pack(">I", min(n, 0xFFFFFFFF)) for n in (36 + length, length))
    head = b"RIFX" + size + b"WAVE" + BIG_FORMAT + b"data" + claimed
    assert layout_of(data, 44 + length).streams == [Stream((head, (44, 44 + length)))]


def test_a_fmt_chunk_is_kept_up_to_4096_bytes():
    for length in (18, 4096, 5000):
        data = riff_file(chunk(b"fmt ", FORMAT[8:] + bytes(length - 16)), chunk(b"data", SOUND))[:-1]
        start = 28 + length
        assert streams_of(data) == [
            bare((start, start + 99), FORMAT[8:] + bytes(min(length, 4096) - 16), missing_bytes=1)
        ]


@pytest.mark.parametrize("code", [0x50, 0x55])
def test_mpeg_audio_in_a_wav_is_extracted(code):
    frame = bytes([255, 0xFD, 0x90, 0]) + bytes(518)  # layer II, 160 kbit/s, 44.1 kHz
    form = chunk(b"fmt ", struct.pack("<HHIIHH", code, 1, 44100, 20000, 1, 0))
    data = riff_file(form, chunk(b"data", frame * 5), NOTE)
    expected = [Stream(((44, 44 + 5 * 522),), sample_count=5 * 1152, preroll=0.5)]
    assert streams_of(data) == expected
    assert streams_of(data + WAV) == [*expected, Stream(((len(data), len(data) + len(WAV)),))]
    assert streams_of(riff_file(form, chunk(b"data", frame * 5, 9999))) == expected
    assert streams_of(riff_file(form, chunk(b"data", frame * 5, 522 * 3), NOTE))[0].sample_count == 3 * 1152
    (cut,) = streams_of(data[: 44 + 5 * 522 - 1])
    assert cut.sample_count == 4 * 1152 and cut.cut
    big = chunk(b"fmt ", form[8:], order=">")
    other = riff_file(big, chunk(b"data", frame * 5, order=">"), name=b"RIFX", order=">")
    assert streams_of(other) == intact_streams(len(other))
    for near in (code + 1, code + 256):
        other = riff_file(chunk(b"fmt ", struct.pack("<H", near) + form[10:]), chunk(b"data", frame * 5))
        assert streams_of(other) == intact_streams(len(other))


@pytest.mark.parametrize("first", [SOUND, SOUND[:99]])
@pytest.mark.parametrize("note", [b"", NOTE])
def test_each_further_data_chunk_is_a_stream_with_its_own_header(first, note):
    head = riff_file(FORMAT, chunk(b"data", first), note)
    data = head + chunk(b"data", SOUND[:7]) + chunk(b"data") + NOTE + chunk(b"data", SOUND) + NOTE
    second, third = len(head) + 8, len(data) - len(NOTE) - 100
    expected = [*intact_streams(len(head)), bare((second, second + 7)), bare((third, third + 100))]
    assert streams_of(data) == expected
    assert streams_of(data + WAV) == [*expected, Stream(((len(data), len(data) + len(WAV)),))]
    cut = data[: third + 30]
    assert streams_of(cut) == [*expected[:2], bare((third, third + 30), missing_bytes=70)]


@pytest.mark.parametrize(
    ("length", "trailing"),
    [(100, b""), (100, b"\0"), (99, b""), (99, b"\0"), (100, NOTE), (99, NOTE), (99, b"\0" + NOTE)],
)
def test_a_wav_may_follow_another_at_once_or_after_a_pad_byte(length, trailing):
    data = riff_file(FORMAT, chunk(b"data", SOUND[:length], pad=False)) + trailing
    end = len(data)
    first = bare((44, 143)) if length == 99 and trailing[:1] != b"\0" else Stream(((0, end),))
    assert streams_of(data + WAV) == [first, Stream(((end, end + len(WAV)),))]
    unknown = riff_file(FORMAT, chunk(b"data", b"\xff" + SOUND, 0), size=0xFFFFFFFF)
    assert streams_of(data + unknown)[1:] == [bare((end + 44, end + 146))]


def test_a_wav_of_length_0_before_another_is_empty():
    empty = riff_file(FORMAT, chunk(b"data"))
    assert streams_of(empty + WAV) == intact_streams(44, 44 + len(WAV))


def test_the_number_of_chunks_is_limited(monkeypatch):
    monkeypatch.setattr(riff, "MAX_CHUNKS", 4)
    few = riff_file(NOTE, NOTE, FORMAT, chunk(b"data", SOUND), NOTE, NOTE, NOTE, NOTE)
    assert streams_of(few) == intact_streams(len(few))
    assert streams_of(few + NOTE) == intact_streams(len(few))
    many = riff_file(NOTE, NOTE, NOTE, FORMAT, chunk(b"data", SOUND))
    assert streams_of(many) == [Stream(((0, len(many)),), truncated_header=True)]


# -------------------------------------------------------------------------------------------------------------- AIFF


def form(*chunks: bytes, kind: bytes = b"AIFF") -> bytes:
    return riff_file(*chunks, name=b"FORM", form=kind, order=">")


COMM = big(b"COMM", bytes(18))


@pytest.mark.parametrize(
    ("kind", "sound"), [(b"AIFF", b"SSND"), (b"AIFC", b"SSND"), (b"8SVX", b"BODY"), (b"16SV", b"BODY")]
)
def test_the_length_of_aiff_and_iff_comes_from_the_chunk(kind, sound):
    def file(content, size=None, *trailing):
        return form(COMM, big(sound, content, size), *trailing, kind=kind)

    start = len(file(b""))
    for data in (file(SOUND), file(SOUND[:99]), file(SOUND, None, big(b"NAME", b"a")), file(b"", None, big(b"NAME"))):
        assert streams_of(data) == intact_streams(len(data))
        twice = [Stream(((len(data), 2 * len(data)),))]
        assert streams_of(data + data) == intact_streams(len(data)) + twice
        assert streams_of(data + b"junk") == intact_streams(len(data))
    for cut in (1, 99):
        head = file(SOUND, 100 - cut)[:start]
        assert streams_of(file(SOUND)[:-cut]) == [Stream((head, (start, start + 100 - cut)), missing_bytes=cut)]
        trailing = b"ID3\4\0\0\0\0\0\0" + file(SOUND)[:-cut]
        assert streams_of(trailing) == [Stream((head, (start + 10, start + 110 - cut)), missing_bytes=cut)]
    for unknown in (0, 0xFFFFFFFF):
        data = file(b"\xff" + SOUND, unknown)[:-1]
        head = data[: start - 4] + struct.pack(">I", 101)
        assert streams_of(data) == [Stream((head, (start, start + 101)))]
        head = data[: start - 4] + b"\xff" * 4
        assert layout_of(data, 1 << 33).streams == [Stream((head, (start, 1 << 33)))]
    for data in (form(COMM, kind=kind), form(COMM, big(b"BODY" if sound == b"SSND" else b"SSND", SOUND), kind=kind)):
        assert streams_of(data) == [Stream(((0, len(data)),), truncated_header=True)]
        assert streams_of(WAV + data)[1] == Stream(((len(WAV), len(WAV) + len(data)),), truncated_header=True)


def test_a_form_of_iff_that_is_not_audio_is_left_to_libsndfile():
    assert magic.container_at(Bytes(form(COMM, kind=b"ILBM")), 0) is None
    assert magic.container_at(Bytes(b"LIST" + form(COMM)[4:]), 0) is None


# ---------------------------------------------------------------------------------------------------------------- AU


def au(sound: bytes, claimed: int, offset: int = 24) -> bytes:
    return b".snd" + struct.pack(">IIIII", offset, claimed, 3, 16000, 1) + bytes(max(0, offset - 24)) + sound


@pytest.mark.parametrize("offset", [0, 24, 28])
@pytest.mark.parametrize("before", [b"", b"ID3\4\0\0\0\0\0\1."])
def test_the_length_of_au_comes_from_the_header(offset, before):
    at, begin = len(before), len(before) + max(24, offset)
    assert streams_of(before + au(SOUND, 100, offset)) == [Stream(((at, begin + 100),))]
    twice = before + au(SOUND, 100, offset) + WAV
    assert streams_of(twice)[1] == Stream(((begin + 100, begin + 100 + len(WAV)),))
    head = au(b"", 0xFFFFFFFF, offset)
    for unknown in (0, 0xFFFFFFFF, 0x7FFFFFFF):
        assert streams_of(before + au(SOUND, unknown, offset)) == [Stream((head, (begin, begin + 100)))]
    for cut in (1, 99):
        lacks = [Stream((head, (begin, begin + 100 - cut)), missing_bytes=cut)]
        assert streams_of(before + au(SOUND, 100, offset)[:-cut]) == lacks
    assert streams_of(before + au(b"", 0, offset)) == [Stream(((at, begin),))]
    assert streams_of(before + au(b"\1", 1, offset)) == [Stream(((at, begin + 1),))]
    assert streams_of(before + au(b"", 7, offset)) == [Stream((head, (begin, begin)), missing_bytes=7)]


def test_an_au_of_2_gib_with_a_correct_length_is_complete():
    for claimed in ((1 << 31) - 65536, 1 << 31, 0xFFFFFFFF):
        assert streams_of(au(SOUND, claimed), 24 + claimed) == intact_streams(24 + claimed)
        known = streams_of(au(SOUND, claimed), 23 + claimed)
        assert known == [Stream((au(b"", 0xFFFFFFFF), (24, 23 + claimed)))]
    longer = streams_of(au(SOUND, 0x80000000), 25 + 0x80000000)
    assert longer == intact_streams(24 + 0x80000000)


def test_an_au_of_more_than_4_gib_whose_length_is_unknown_ends_with_the_file():
    assert layout_of(au(SOUND, 0xFFFFFFFF), 5 << 30).streams == [Stream((au(b"", 0xFFFFFFFF), (24, 5 << 30)))]


def test_audio_beyond_the_length_that_a_format_can_store_is_reported():
    aiff = form(COMM, big(b"SSND", b"", 0))
    rifx = riff_file(BIG_FORMAT, big(b"data"), name=b"RIFX", order=">")
    for data in (aiff, rifx, au(b"", 0)):
        assert layout_of(data + b"\xff", len(data) + 0xFFFFFFFF).unread == []
        sentence = "contains 4294967296 bytes of audio, of which only 4 GiB can be read in its format; "
        message = sentence + "convert it to FLAC or W64"
        assert layout_of(data + b"\xff", len(data) + (1 << 32)).unread == [message]
    for data in (riff_file(FORMAT, chunk(b"data")), caf(DESC, (b"data", 0, b"")), w64(FMT, (b"data", 0, b""))):
        assert layout_of(data + b"\xff", len(data) + (1 << 33)).unread == []


# --------------------------------------------------------------------------------------------------------------- CAF


def caf(*chunks: tuple[bytes, int, bytes]) -> bytes:
    return b"caff\0\1\0\0" + b"".join(name + struct.pack(">q", size) + content for name, size, content in chunks)


DESC = (b"desc", 32, bytes(32))


@pytest.mark.parametrize("before", [b"", b"ID3\4\0\0\0\0\0\1."])
def test_the_length_of_caf_comes_from_the_chunk(before):
    at, begin = len(before), len(before) + 64
    for trailing in ([], [(b"note", 0, b"")], [(b"pakt", 5, bytes(5))], [(b"a ~b", 0, b""), (b"info", 1, b"\0")]):
        data = before + caf(DESC, (b"data", 100, SOUND), *trailing)
        assert streams_of(data) == [Stream(((at, len(data)),))]
        assert streams_of(data + WAV) == [Stream(((at, len(data)),)), Stream(((len(data), len(data) + len(WAV)),))]
        assert streams_of(WAV + data)[1:] == [Stream(((at + len(WAV), len(WAV + data)),))]
        assert streams_of(WAV + data)[0] == Stream(((0, len(WAV)),))
        assert streams_of(data + b"\xff" * 20) == [Stream(((at, len(data)),))]
    free = before + caf(DESC, (b"free", 0, b""), (b"data", 4, SOUND[:4]))
    assert streams_of(free) == [Stream(((at, begin + 16),))]
    for unknown in (-1, 0, 3):
        head = caf(DESC, (b"data", 100, b""))
        assert streams_of(before + caf(DESC, (b"data", unknown, SOUND))) == [Stream((head, (begin, begin + 100)))]
    for cut in (1, 99):
        head = caf(DESC, (b"data", 100 - cut, b""))
        lacks = [Stream((head, (begin, begin + 100 - cut)), missing_bytes=cut)]
        assert streams_of(before + caf(DESC, (b"data", 100, SOUND))[:-cut]) == lacks


@pytest.mark.parametrize(
    "junk",
    [b"a\x1f~b" + bytes(8), b"a \x7fb" + bytes(8), b"note" + struct.pack(">q", 1), b"note" + struct.pack(">q", -1),
     b"note" + bytes(7)],
)  # fmt: skip
def test_bytes_after_the_chunks_of_a_caf_are_ignored(junk):
    data = caf(DESC, (b"data", 100, SOUND))
    assert streams_of(data + junk) == intact_streams(len(data))
    note = b"note" + struct.pack(">q", 1) + b"."
    assert streams_of(data + note) == streams_of(data + note + junk) == intact_streams(len(data) + len(note))


@pytest.mark.parametrize(
    "data", [caf(DESC), caf((b"desc", -12, bytes(32)), (b"data", 4, SOUND)), caf(), caf(DESC)[:30]]
)
def test_a_caf_without_samples_ends_within_its_header(data):
    assert streams_of(data) == [Stream(((0, len(data)),), truncated_header=True)]
    assert streams_of(WAV + data)[1] == Stream(((len(WAV), len(WAV) + len(data)),), truncated_header=True)


def test_a_caf_with_too_many_chunks_is_damaged(monkeypatch):
    monkeypatch.setattr(plain, "MAX_CHUNKS", 3)
    sound = (b"data", 100, SOUND)
    assert not streams_of(caf(DESC, DESC, sound))[0].truncated_header
    assert streams_of(caf(DESC, DESC, DESC, sound))[0].truncated_header


# --------------------------------------------------------------------------------------------------------------- W64

GUID = bytes.fromhex("f3acd3118cd100c04f8edb8a")


def w64(*chunks: tuple[bytes, int, bytes], pad: bool = True) -> bytes:
    data = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000") + bytes(8) + b"wave" + GUID
    for name, size, content in chunks:
        data += name + GUID + struct.pack("<q", size) + content + bytes(-len(content) % 8 if pad else 0)
    return data


FMT = (b"fmt ", 40, FORMAT[8:])


@pytest.mark.parametrize("before", [b"", b"ID3\4\0\0\0\0\0\1."])
@pytest.mark.parametrize("length", [96, 97, 100])
def test_the_length_of_w64_comes_from_the_chunk(before, length):
    at, sound = len(before), SOUND[:length]
    data = before + w64(FMT, (b"fact", 29, b"odd.."), (b"data", 24 + length, sound))
    begin = len(before) + 40 + 40 + 32 + 24
    assert streams_of(data) == [Stream(((at, len(data)),))]
    assert streams_of(data + WAV) == [Stream(((at, len(data)),)), Stream(((len(data), len(data) + len(WAV)),))]
    assert streams_of(data[: begin + length]) == [Stream(((at, begin + length),))]
    trailing = data + b"note" + GUID + bytes(20)
    assert streams_of(trailing) == [Stream(((at, len(trailing)),))]
    for cut in (1, 90):
        head = data[at : begin - 8] + struct.pack("<q", 24 + length - cut)
        lacks = [Stream((head, (begin, begin + length - cut)), missing_bytes=cut)]
        assert streams_of(data[: begin + length - cut]) == lacks
    for unknown in (0, -1, 24, 1 << 62):
        unfilled = before + w64(FMT, (b"fact", 29, b"odd.."), (b"data", unknown, sound), pad=True)[: begin - at] + sound
        head = data[at : begin - 8] + struct.pack("<q", 24 + length)
        assert streams_of(unfilled) == [Stream((head, (begin, begin + length)))]
    huge = before + w64(FMT, (b"fact", 29, b"odd.."), (b"data", (1 << 62) - 1, b"")) + sound
    assert streams_of(huge)[0].missing_bytes == (1 << 62) - 25 - length
    smallest = before + w64(FMT, (b"fact", 29, b"odd.."), (b"data", 25, b"")) + sound
    assert streams_of(smallest) == [Stream(((at, len(smallest)),))]


@pytest.mark.parametrize("data", [w64(FMT), w64((b"fmt ", 0, b""), (b"data", 124, SOUND)), w64(), w64(FMT)[:50]])
def test_a_w64_without_samples_ends_within_its_header(data):
    assert streams_of(data) == [Stream(((0, len(data)),), truncated_header=True)]
    assert streams_of(WAV + data)[1] == Stream(((len(WAV), len(WAV) + len(data)),), truncated_header=True)


def test_chunks_of_w64_may_be_empty_and_are_limited_in_number(monkeypatch):
    monkeypatch.setattr(plain, "MAX_CHUNKS", 3)
    empty, sound = (b"note", 24, b""), (b"data", 124, SOUND)
    assert not streams_of(w64(empty, empty, sound))[0].truncated_header
    assert streams_of(w64(empty, empty, empty, sound))[0].truncated_header


# ------------------------------------------------------------------------------------------------------ rare formats


def ends(header_end, data: bytes, size: int | None = None) -> int:
    """The end that a header claims; asserts that it moves with the header."""
    actual = header_end(Bytes(data, size), 0)
    for before in (1, 1000):
        assert header_end(Bytes(b"\7" * before + data, size and size + before), before) == actual + before
    return actual


def sphere(**numbers) -> bytes:
    lines = "".join(f"{name} -i {value}\n" for name, value in numbers.items())
    return b"NIST_1A\n   1024\n" + lines.encode() + b"end_head\n"


def test_a_nist_header_gives_its_own_length_and_the_audios():
    data = sphere(channel_count=3, sample_n_bytes=4, sample_count=50)
    assert ends(rare._nist_end, data) == 1024 + 600
    assert ends(rare._nist_end, data.replace(b"   1024", b"   2048")) == 2048 + 600
    assert ends(rare._nist_end, data.replace(b"   1024", b"1234567")) == 1234567 + 600
    assert ends(rare._nist_end, data.replace(b"   1024", b"   102x")) == 1024 + 600
    assert ends(rare._nist_end, sphere(sample_count=50)) == 1024 + 100  # one channel of 16 bits
    assert ends(rare._nist_end, sphere(channel_count=3)) == 1024
    late = sphere(channel_count=2).ljust(1001, b" ") + b"\nsample_count -i 9\n"
    assert len(late) == 1020 and ends(rare._nist_end, late) == 1024 + 36
    assert ends(rare._nist_end, sphere() + bytes(1000) + b"\nsample_count -i 9\n") == 1024


@pytest.mark.parametrize(("stereo", "bits", "size"), [(0, 8, 1), (0, 16, 2), (0xFFFF, 8, 2), (0xFFFF, 16, 4)])
def test_an_avr_header_counts_frames(stereo, bits, size):
    assert ends(rare._avr_end, b"2BIT" + bytes(8) + struct.pack(">HH10xI", stereo, bits, 50)) == 128 + 50 * size


def test_an_mpc_header_counts_frames():
    for stereo in (0, 1):
        head = b"\1\4" + bytes(19) + struct.pack("<B8xI", stereo, 1000)
        assert ends(rare._mpc_end, head) == 42 + 2000 * (1 + stereo)


def test_a_psion_header_counts_bytes():
    assert ends(rare._wve_end, b"ALawSoundFile**\0\x0f\x10" + struct.pack(">I", 1234)) == 32 + 1234


@pytest.mark.parametrize(("bits", "a_packet"), [(1, 120), (7, 120), (8, 60), (14, 60), (15, 40), (21, 40), (0, 120)])
def test_a_midi_sample_dump_is_full_packets(bits, a_packet):
    for packets in (1, 2, 400):
        for frames in (packets * a_packet, (packets - 1) * a_packet + 1):
            length = bytes([frames & 127, frames >> 7 & 127, frames >> 14])
            head = b"\xf0\x7e" + bytes(4) + bytes([bits, 0, 0, 0]) + length
            assert ends(rare._sds_end, head) == 21 + 127 * packets


def test_the_blocks_of_a_voc_are_followed(monkeypatch):
    head = b"Creative Voice File\x1a" + struct.pack("<HHH", 26, 0x10A, 0x1129)
    block = b"\1" + (300).to_bytes(3, "little") + bytes(300)
    assert ends(rare._voc_end, head + block * 2 + b"\0") == 26 + 608 + 1
    assert ends(rare._voc_end, head + block * 2) == 26 + 608
    assert ends(rare._voc_end, head + block * 2 + b"\0more") == 26 + 608 + 1
    assert ends(rare._voc_end, head + b"\1" + (70000).to_bytes(3, "little")) == 26 + 4 + 70000
    assert ends(rare._voc_end, head + block + b"\1\1\1") == 26 + 304
    assert ends(rare._voc_end, head.replace(b"\x1a\0", b"\x20\0") + bytes(6) + block) == 32 + 304
    monkeypatch.setattr(rare, "MAX_CHUNKS", 3)
    assert ends(rare._voc_end, head + block * 5) == 26 + 3 * 304


@pytest.mark.parametrize(
    ("kind", "size"), [(0, 8), (9, 8), (10, 4), (20, 4), (30, 2), (40, 2), (50, 1), (90, 1), (110, 4)]
)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("imaginary", [0, 1])
def test_a_mat4_is_two_matrices(kind, size, order, imaginary):
    thousand = 1000 * (order == ">")
    data = struct.pack(order + "5I", thousand, 1, 1, 0, 11) + b"samplerate\0" + bytes(8)
    data += struct.pack(order + "5I", thousand + kind, 2, 300, imaginary, 9) + b"wavedata\0"
    assert ends(rare._mat4_end, data) == len(data) + 600 * size * (1 + imaginary)


def test_a_mat5_is_elements_to_the_end_of_the_file(monkeypatch):
    for order, mark in (("<", b"IM"), (">", b"MI")):
        head = b"MATLAB 5.0 MAT".ljust(126) + mark
        element = struct.pack(order + "II", 14, 300) + bytes(300)
        assert ends(rare._mat5_end, head) == 128
        assert ends(rare._mat5_end, head + element * 2) == 128 + 616
        assert ends(rare._mat5_end, head + element * 2 + bytes(7)) == 128 + 616
        assert ends(rare._mat5_end, head + element * 2 + bytes(8)) == 128 + 624
        assert ends(rare._mat5_end, (head + element)[:-299]) == 128 + 308
    monkeypatch.setattr(rare, "MAX_CHUNKS", 1)
    assert ends(rare._mat5_end, head + element * 2) == 128 + 308


MAT4_NUMBERS = struct.pack("<5I", 0, 1, 1, 0, 11) + b"samplerate\0" + bytes(8) + struct.pack("<5I", 30, 2, 50, 0, 9)
RARE_FILES = {
    "nist": sphere(channel_count=1, sample_n_bytes=2, sample_count=50).ljust(1024) + bytes(100),
    "avr": b"2BIT" + bytes(8) + struct.pack(">HH10xI", 0, 16, 50) + bytes(98 + 100),
    "mpc": b"\1\4" + bytes(19) + struct.pack("<B8xI", 0, 50) + bytes(8 + 100),
    "wve": b"ALawSoundFile**\0\x0f\x10" + struct.pack(">I", 100) + bytes(10 + 100),
    "sds": b"\xf0\x7e" + bytes(4) + bytes([16, 0, 0, 0, 40, 0, 0]) + bytes(8 + 127),
    "voc": b"Creative Voice File\x1a" + struct.pack("<HHH", 26, 0x10A, 0x1129) + b"\1\x64\0\0" + bytes(100) + b"\0",
    "mat4": MAT4_NUMBERS + b"wavedata\0" + bytes(200),
}


@pytest.mark.parametrize("kind", RARE_FILES)
def test_another_file_may_follow_one_of_a_rare_format(kind):
    data = RARE_FILES[kind]
    assert magic.container_at(Bytes(data), 0) == kind
    assert streams_of(data + WAV) == intact_streams(len(data), len(data) + len(WAV))


def test_elements_of_mat5_are_followed_to_the_end_of_the_file():
    data = b"MATLAB 5.0 MAT".ljust(126) + b"IM" + struct.pack("<II", 14, 300) + bytes(100)
    assert streams_of(data) == [Stream(((0, len(data)),), missing_bytes=200)]


def test_a_file_shorter_than_its_claimed_length_is_reported():
    def walk(size, end, start=2):
        layout = FileLayout()
        source = Bytes(b"..." + bytes(40) + WAV, size)
        return rare.walk_by_header_length(source, start, layout, lambda *_: end), layout.streams

    assert walk(300, 43) == (43, [Stream(((2, 43),))])  # a wav begins here
    assert walk(300, 42) == (300, [Stream(((2, 300),))])
    assert walk(300, 300) == (300, [Stream(((2, 300),))])
    assert walk(300, 301) == (300, [Stream(((2, 300),), missing_bytes=1)])
    assert walk(300, 43, start=43) == (300, [Stream(((43, 300),))])
    layout = FileLayout([Stream(((0, 2),))])
    rare.walk_by_header_length(Bytes(b"..." + bytes(40) + WAV), 2, layout, lambda *_: 43)
    assert layout.streams == [Stream(((0, 2),)), Stream(((2, 43),))]


def htk(frames: int, period: int = 625, size: int = 2, kind: int = 0) -> bytes:
    return struct.pack(">IIHH", frames, period, size, kind) + SOUND


def test_a_truncated_htk_waveform_is_recognised_by_its_plausible_header():
    for period in (10, 625, 10_000):
        for frames in (51, 90):
            there = Stream((htk(50, period)[:12], (12, 112)), missing_bytes=2 * frames - 100)
            assert streams_of(htk(frames, period)) == [there]
    assert streams_of(htk(51)[:-1]) == [Stream((htk(49)[:12], (12, 110)), missing_bytes=3)]
    assert streams_of(htk(51)[:13]) == [Stream((htk(0)[:12], (12, 12)), missing_bytes=101)]
    for data in (htk(50), htk(49), htk(51, 9), htk(51, 10_001), htk(51, size=4), htk(51, kind=1), htk(51)[:12]):
        assert streams_of(data) == intact_streams(len(data))
