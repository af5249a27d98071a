"""Recordings are read whole, or a warning or error says what is missing."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
import soundfile
import soxr
from layouts import chunk, riff_file
from recordings import (
    FLAC,
    FORMAT,
    MP3,
    OPUS,
    RATE,
    VORBIS,
    WAV,
    encoded,
    pcm,
    put,
    read,
    refusal,
    waveform,
)
from tiny_corpora import write_audio

from las_fast.data import audio, opening
from las_fast.data.audio import load_audio, open_recording
from las_fast.data.containers import FileView
from las_fast.data.decoder import SoundStream
from las_fast.errors import InputError, show

# ------------------------------------------------------------------------------------------------------ plain reading


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_audio_formats_are_read(tmp_path, suffix):
    samples = waveform(0.5)
    loaded = load_audio(write_audio(tmp_path / f"x.{suffix}", samples), RATE)
    assert loaded.dtype == np.float32 and loaded.ndim == 1
    assert abs(len(loaded) - len(samples)) <= 2304  # an mp3 starts with its codec's delay


@pytest.mark.parametrize("options", [WAV, FLAC, VORBIS, OPUS, MP3], ids=lambda o: "-".join(o.values()))
def test_mono_at_the_models_rate_equals_libsndfile(tmp_path, options):
    path = put(tmp_path, encoded(waveform(3.3), **options))
    np.testing.assert_array_equal(load_audio(path, RATE, strict=True), soundfile.read(path, dtype="float32")[0])


@pytest.mark.parametrize("rate, channels", [(8000, 1), (16000, 2), (44100, 2), (48000, 1)])
def test_streamed_and_loaded_samples_are_the_same(tmp_path, rate, channels):
    path = put(tmp_path, encoded(np.stack([waveform(3.7, c) for c in range(channels)], 1), rate, **FLAC))
    streamed, _ = read(path)
    np.testing.assert_array_equal(streamed, load_audio(path, RATE, strict=True))
    mono = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1, dtype=np.float32)
    np.testing.assert_allclose(streamed, mono if rate == RATE else soxr.resample(mono, rate, RATE), atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_audio_is_resampled_and_keeps_its_pitch(tmp_path, rate):
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate).astype(np.float32)
    loaded = load_audio(write_audio(tmp_path / "tone.wav", tone, rate), RATE)
    assert abs(len(loaded) - RATE) <= 1
    assert np.abs(np.fft.rfft(loaded)).argmax() in (999, 1000, 1001)


def test_a_recording_is_read_once(tmp_path):
    recording = open_recording(put(tmp_path, encoded(waveform(), **WAV)), RATE)
    list(recording)
    with pytest.raises(ValueError, match="only once"):
        list(recording)


def test_a_long_recording_needs_little_memory(tmp_path):
    path = tmp_path / "long.wav"
    second = np.stack([waveform(1.0, 1), waveform(1.0, 2)], 1).repeat(3, axis=0)
    with soundfile.SoundFile(path, "w", 48000, 2) as file:
        for _ in range(200):
            file.write(second)
    program = (
        "import resource, sys; from las_fast.data.audio import open_recording\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "blocks = iter(open_recording(sys.argv[1], 16000)); n = len(next(blocks)); before = peak()\n"
        "n += sum(map(len, blocks)); print(n, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    samples, kib = map(int, done.stdout.split())
    assert samples == 200 * RATE
    assert kib < 8 * 1024  # 77 MB when decoded


# --------------------------------------------------------------------------------------------------- wav headers


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFF000])
@pytest.mark.parametrize("note", [b"", chunk(b"LIST", b"INFOISFT\x0e\0\0\0Lavf58.29.100\0")], ids=["bare", "noted"])
def test_a_wav_of_unknown_length_is_read_to_its_end(tmp_path, size, note):
    path = put(tmp_path, riff_file(FORMAT, note, chunk(b"data", pcm(), size), size=size))
    samples, warnings = read(path)
    assert len(samples) == len(load_audio(path, RATE, strict=True)) == 2 * RATE
    assert not warnings


def test_an_empty_wav_with_a_chunk_after_holds_no_samples(tmp_path):
    path = put(tmp_path, riff_file(FORMAT, chunk(b"data", b""), chunk(b"LIST", b"INFO" + bytes(4000))))
    assert "has no samples" in refusal(path)


@pytest.mark.parametrize("size", [0, 2**64 - 1], ids=["zero", "largest"])
def test_an_rf64_of_unknown_length_is_read_to_its_end(tmp_path, size):
    sizes = chunk(b"ds64", struct.pack("<QQQI", size, size, 0, 0))
    path = put(tmp_path, riff_file(sizes, FORMAT, chunk(b"data", pcm(), 0xFFFFFFFF), name=b"RF64", size=0xFFFFFFFF))
    assert len(load_audio(path, RATE, strict=True)) == 2 * RATE


@pytest.mark.parametrize("bytes_short", [1, 16, 44, 3000])
def test_a_few_missing_bytes_are_not_reported(tmp_path, bytes_short):
    path = put(tmp_path, riff_file(FORMAT, chunk(b"data", pcm(), 4 * RATE + bytes_short)))
    samples, warnings = read(path)
    assert len(samples) == len(load_audio(path, RATE, strict=True)) == 2 * RATE
    assert not warnings


@pytest.mark.parametrize("pad", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("where", ["before", "after", "both"])
def test_chunks_of_odd_size_are_padded(tmp_path, pad, where):
    note = chunk(b"LIST", b"INFOICMT\x07\0\0\0a note\0", pad=pad)
    chunks = [*([note] if where != "after" else []), FORMAT, *([note] if where != "after" else []),
              chunk(b"data", pcm()), *([note] if where != "before" else [])]  # fmt: skip
    samples, warnings = read(put(tmp_path, riff_file(*chunks)))
    np.testing.assert_array_equal(samples, np.frombuffer(pcm(), "<i2") / np.float32(32768))
    assert not warnings
    assert len(load_audio(tmp_path / "x.audio", RATE, strict=True)) == 2 * RATE


def test_a_wav_of_more_than_4_gib_has_the_right_length(tmp_path):
    claimed = 4 * RATE
    path = put(tmp_path, riff_file(FORMAT, chunk(b"data", pcm(), claimed)))
    with path.open("r+b") as file:
        file.truncate(44 + claimed + 2**32)  # a sparse file
    samples = load_audio(path, RATE, start=(claimed + 2**32) / 2 / RATE - 1, seconds=1.0, strict=True)
    assert len(samples) == RATE
    assert "lasts" in refusal(path, start=(claimed + 2**32) / 2 / RATE, seconds=1.0)


@pytest.mark.parametrize("form, size", [("AU", 24), ("AIFF", 54)])
def test_a_long_recording_of_unknown_length_is_read_beyond_2_gib(tmp_path, form, size):
    data = bytearray(encoded(waveform(2.0), format=form))
    place = 8 if form == "AU" else data.index(b"SSND") + 4
    data[place : place + 4] = bytes(4)
    path = put(tmp_path, bytes(data))
    with path.open("r+b") as file:
        file.truncate(size + 3 * 2**30)  # a sparse file
    assert len(load_audio(path, RATE, start=3 * 2**30 / 2 / RATE - 1, seconds=1.0, strict=True)) == RATE


def test_a_second_data_chunk_is_read(tmp_path):
    path = put(tmp_path, riff_file(FORMAT, chunk(b"data", pcm()), chunk(b"LIST", b"note"), chunk(b"data", pcm(1.0))))
    assert len(load_audio(path, RATE, strict=True)) == 3 * RATE


def test_bw64_is_read_as_rf64(tmp_path):
    sizes = chunk(b"ds64", struct.pack("<QQQI", 4 * RATE + 72, 4 * RATE, 2 * RATE, 0))
    path = put(tmp_path, riff_file(sizes, FORMAT, chunk(b"data", pcm(), 0xFFFFFFFF), name=b"BW64", size=0xFFFFFFFF))
    assert len(load_audio(path, RATE, strict=True)) == 2 * RATE


def test_a_big_endian_wav_of_unknown_length_is_read(tmp_path):
    data = bytearray(encoded(waveform(2.0), format="WAV", endian="BIG"))
    whole = load_audio(put(tmp_path, bytes(data)), RATE)
    place = data.index(b"data") + 4
    data[place : place + 4] = b"\0" * 4
    np.testing.assert_array_equal(load_audio(put(tmp_path, bytes(data)), RATE, strict=True), whole)


@pytest.mark.parametrize("form, place, size", [("AIFF", b"SSND", ">I"), ("AU", None, ">I"), ("CAF", b"data", ">q"),
                                               ("W64", b"data\xf3\xac", "<q")])  # fmt: skip
@pytest.mark.parametrize("unknown", [0, -1])
def test_other_containers_of_unknown_length_are_read_to_the_end(tmp_path, form, place, size, unknown):
    data = bytearray(encoded(waveform(2.0), format=form))
    whole = load_audio(put(tmp_path, bytes(data)), RATE)
    at = 8 if place is None else data.index(place) + (16 if form == "W64" else 4)
    data[at : at + struct.calcsize(size)] = struct.pack(size.lower(), unknown)
    samples, warnings = read(put(tmp_path, bytes(data)))
    np.testing.assert_array_equal(samples, whole)
    assert not warnings


def test_a_wav_cut_off_whose_header_states_3_gib_is_reported(tmp_path):
    path = put(tmp_path, riff_file(FORMAT, chunk(b"data", pcm(), 3 << 30)))
    assert "is cut off" in read(path)[1][0]


def test_an_mp3_in_a_wav_is_read(tmp_path):
    form = chunk(b"fmt ", struct.pack("<HHIIHHH", 0x55, 1, RATE, 4000, 1, 0, 0))
    path = put(tmp_path, riff_file(form, chunk(b"data", encoded(waveform(2.0), **MP3))))
    assert len(load_audio(path, RATE, strict=True)) == 2 * RATE


def test_many_unknown_bytes_after_the_audio_are_reported(tmp_path):
    path = put(tmp_path, riff_file(FORMAT, chunk(b"data", pcm())) + b"\x07" * 100_000)
    samples, warnings = read(path)
    assert len(samples) == 2 * RATE
    assert "100000 bytes of unknown data" in warnings[0]


# ------------------------------------------------------------------------------------------------------ cut off

COUNTED = ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "MP3", "NIST", "VOC", "AVR", "SVX", "HTK",
           "MAT4", "MAT5", "MPC2K"]  # fmt: skip


@pytest.mark.parametrize("form", [*COUNTED, "OGG", "OPUS"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_the_missing_end_of_a_recording_is_reported_in_every_format(tmp_path, form, share):
    options = OPUS if form == "OPUS" else {"format": form}
    data = encoded(waveform(8.0), **options)
    path = put(tmp_path, data)
    whole = load_audio(path, RATE, strict=True)
    assert abs(len(whole) - 8 * RATE) < 10
    assert not read(path)[1]
    put(tmp_path, data[: int(len(data) * share)])
    samples, warnings = read(path)
    assert len(warnings) == 1 and show(path) in warnings[0] and "cut off" in warnings[0]
    assert (share - 0.25) * 8 * RATE < len(samples) < (share + 0.1) * 8 * RATE
    assert refusal(path, strict=True).startswith(warnings[0])
    np.testing.assert_allclose(load_audio(path, RATE)[: len(samples) // 2], whole[: len(samples) // 2], atol=1e-4)


def test_an_ogg_file_without_its_last_page_is_cut_off(tmp_path):
    data = encoded(waveform(5.0), **OPUS)
    path = put(tmp_path, data[: data.rindex(b"OggS")])
    assert "without an end-of-stream mark" in refusal(path, strict=True)


def test_lost_pages_of_ogg_are_reported(tmp_path):
    data = encoded(waveform(20.0), **OPUS)
    pages = [b"OggS" + page for page in data.split(b"OggS")[1:]]
    path = put(tmp_path, b"".join(pages[:4] + pages[6:]))
    assert "Ogg pages are missing or damaged (2)" in read(path)[1][0]
    assert "Ogg pages are missing or damaged (2)" in refusal(path, strict=True)


def test_a_damaged_flac_is_read_beyond_the_damage(tmp_path):
    data = bytearray(encoded(waveform(5.0), **FLAC))
    whole = load_audio(put(tmp_path, bytes(data)), RATE)
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    samples, warnings = read(put(tmp_path, bytes(data)))
    assert len(samples) == len(whole)
    assert 1000 < (samples != whole).sum() < 0.6 * RATE
    np.testing.assert_array_equal(samples[-RATE:], whole[-RATE:])
    assert len(warnings) == 1 and "is damaged: 0." in warnings[0]
    assert "is damaged" in refusal(tmp_path / "x.audio", strict=True)


# ------------------------------------------------------------------------------------------------- several streams


@pytest.mark.parametrize("options", [VORBIS, OPUS, FLAC, MP3, WAV, {"format": "RF64"}, {"format": "W64"},
                                     {"format": "AIFF"}, {"format": "AU"}, {"format": "CAF"}, {"format": "NIST"}],
                         ids=lambda o: "-".join(o.values()))  # fmt: skip
@pytest.mark.parametrize("count", [2, 5])
def test_joined_recordings_are_read_to_the_end(tmp_path, options, count):
    parts = [encoded(waveform(1.0 + 0.3 * k, k), **options) for k in range(count)]
    alone = [load_audio(put(tmp_path, part, f"{k}"), RATE) for k, part in enumerate(parts)]
    path = put(tmp_path, b"".join(parts))
    samples, warnings = read(path)
    np.testing.assert_array_equal(samples, np.concatenate(alone))
    assert not warnings
    np.testing.assert_array_equal(samples, load_audio(path, RATE, strict=True))


def test_a_recording_joined_to_itself_is_read_twice(tmp_path):
    for options in (VORBIS, OPUS, MP3, FLAC):
        data = encoded(waveform(1.0), **options)
        once = load_audio(put(tmp_path, data), RATE)
        np.testing.assert_array_equal(load_audio(put(tmp_path, data + data), RATE, strict=True), np.tile(once, 2))


@pytest.mark.parametrize("first", [VORBIS, FLAC, MP3, WAV], ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("second", [OPUS, FLAC, WAV], ids=lambda o: "-".join(o.values()))
def test_joined_recordings_of_different_formats_are_read(tmp_path, first, second):
    parts = [encoded(waveform(1.0, k), **options) for k, options in enumerate((first, second))]
    alone = [load_audio(put(tmp_path, part, f"{k}"), RATE) for k, part in enumerate(parts)]
    path = put(tmp_path, b"".join(parts))
    np.testing.assert_array_equal(load_audio(path, RATE, strict=True), np.concatenate(alone))


def test_a_truncated_link_before_another_is_reported(tmp_path):
    first = encoded(waveform(8.0), **OPUS)
    path = put(tmp_path, first[: len(first) // 2] + encoded(waveform(1.0), **OPUS))
    samples, warnings = read(path)
    assert 3.5 * RATE < len(samples) < 5.5 * RATE
    assert "part 1 of 2" in warnings[0] and "cut off" in warnings[0]


def test_joined_streams_may_differ_in_codec_rate_and_channels(tmp_path):
    stereo = np.stack([waveform(1.0, 1), waveform(1.0, 2)], 1)
    parts = [encoded(waveform(2.0), **VORBIS), encoded(waveform(1.0), 48000, **OPUS), encoded(stereo, 44100, **VORBIS)]
    samples = load_audio(put(tmp_path, b"".join(parts)), RATE, strict=True)
    seconds = 2 + RATE / 48000 + RATE / 44100
    assert abs(len(samples) - seconds * RATE) < 4


def test_the_missing_end_of_a_chained_ogg_is_reported(tmp_path):
    data = encoded(waveform(1.0), **OPUS) + encoded(waveform(8.0), **OPUS)[:-8000]
    samples, warnings = read(put(tmp_path, data))
    assert len(samples) > 3 * RATE
    assert "part 2 of 2" in warnings[0] and "cut off" in warnings[0]


def muxed(first: bytes, second: bytes) -> bytes:
    """Interleave the pages of two Ogg streams, their first pages first, each with its own serial number."""
    a, b = ([b"OggS" + page for page in data.split(b"OggS")[1:]] for data in (first, second))
    assert a[0][14:18] != b[0][14:18]
    mixed = [a[0], b[0]]
    for k in range(1, max(len(a), len(b))):
        mixed += a[k : k + 1] + b[k : k + 1]
    return b"".join(mixed)


def test_of_parallel_streams_the_first_is_read_and_the_second_reported(tmp_path):
    first, second = encoded(waveform(3.0, 1), **VORBIS), encoded(waveform(3.0, 2), **VORBIS)
    alone = load_audio(put(tmp_path, first), RATE)
    samples, warnings = read(put(tmp_path, muxed(first, second)))
    np.testing.assert_array_equal(samples, alone)
    assert "only the first" in warnings[0]


def test_the_audio_of_a_video_in_ogg_is_read(tmp_path):
    sound = encoded(waveform(3.0), **VORBIS)
    video = encoded(waveform(3.0, 2), **OPUS).replace(b"OpusHead", b"\x80theora\x03")
    alone = load_audio(put(tmp_path, sound), RATE)
    samples, warnings = read(put(tmp_path, muxed(video, sound)))
    np.testing.assert_array_equal(samples, alone)
    assert not warnings
    assert "ffmpeg" in refusal(put(tmp_path, video))


def in_ogg(flac: bytes, serial: int = 7) -> bytes:
    """Wrap a FLAC stream in Ogg pages, without their checksums."""
    bodies = [b"\x7fFLAC\1\0\0\1" + flac[:42], *(flac[k : k + 20_000] for k in range(42, len(flac), 20_000))]
    pages = b""
    for sequence, body in enumerate(bodies):
        flags = 2 * (sequence == 0) + 4 * (sequence == len(bodies) - 1)
        segments = [255] * (len(body) // 255) + [len(body) % 255]
        pages += b"OggS\0" + struct.pack("<BqIII", flags, 0, serial, sequence, 0)
        pages += bytes([len(segments), *segments]) + body
    return pages


def test_flac_in_ogg_is_read_and_may_be_chained_or_cut(tmp_path):
    flac = encoded(waveform(3.0), **FLAC)
    alone = load_audio(put(tmp_path, flac), RATE)
    np.testing.assert_array_equal(load_audio(put(tmp_path, in_ogg(flac)), RATE, strict=True), alone)
    chained = load_audio(put(tmp_path, in_ogg(flac) + in_ogg(flac, serial=8)), RATE, strict=True)
    np.testing.assert_array_equal(chained, np.tile(alone, 2))
    assert "cut off" in refusal(put(tmp_path, in_ogg(flac)[:40_000]), strict=True)


# --------------------------------------------------------------------------------------------------------- FLAC, mp3


def of_unknown_length(flac: bytes) -> bytes:
    data = bytearray(flac)
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    return bytes(data)


def test_a_flac_of_unknown_length_is_read_to_its_end(tmp_path):
    data = of_unknown_length(encoded(waveform(5.0), **FLAC))
    path = put(tmp_path, data)
    samples, warnings = read(path)
    assert len(samples) == 5 * RATE and not warnings
    assert len(load_audio(path, RATE, strict=True)) == 5 * RATE
    assert len(load_audio(path, RATE, start=3.0, seconds=1.5)) == 1.5 * RATE
    samples, warnings = read(put(tmp_path, data[: len(data) // 2]))
    assert RATE < len(samples) < 3 * RATE and "cut off" in warnings[0]


def id3(size: int) -> bytes:
    digits = bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\x04\0\0" + digits + np.random.default_rng(1).integers(0, 256, size, np.uint8).tobytes()


APE = b"".join(
    b"APETAGEX" + struct.pack("<IIII", 2000, 232, 1, flags) + bytes(8 + size)
    for flags, size in ((0xA0000000, 200), (0x80000000, 0))
)


def mp3_frames(data: bytes) -> list[bytes]:
    """Split an MPEG-2 layer III file at 16 kHz into its frames."""
    kbps = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
    frames = []
    while data:
        size = 72 * kbps[data[2] >> 4] * 1000 // RATE + (data[2] >> 1 & 1)
        frames.append(data[:size])
        data = data[size:]
    return frames


TAGS = (b"", id3(300_000), id3(100) + id3(200))


@pytest.mark.parametrize("trailing", [b"", b"TAG" + bytes(125), APE, APE + b"TAG" + bytes(125), bytes(500)])
@pytest.mark.parametrize(
    ("options", "before"),
    [*((MP3, tag) for tag in (*TAGS, bytes(700))), *((FLAC, tag) for tag in TAGS)],
    ids=lambda value: f"{len(value)}" if isinstance(value, bytes) else value["format"],
)
def test_tags_are_not_audio(tmp_path, before, trailing, options):
    data = encoded(waveform(3.0), **options)
    alone = load_audio(put(tmp_path, data), RATE)
    samples, warnings = read(put(tmp_path, before + data + trailing))
    np.testing.assert_array_equal(samples, alone)
    assert not warnings
    assert len(load_audio(tmp_path / "x.audio", RATE, strict=True)) == len(alone)


def quiet_then_loud() -> np.ndarray:
    return np.concatenate([1e-4 * waveform(4.0, 1), waveform(4.0, 2)])


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
def test_an_mp3_without_a_count_of_its_frames_is_read_to_its_end(tmp_path, mode):
    data = encoded(quiet_then_loud(), bitrate_mode=mode, compression_level=0.3, **MP3)
    counted, *others = mp3_frames(data)
    assert b"Xing" in counted or b"Info" in counted
    path = put(tmp_path, b"".join(others))
    samples = load_audio(path, RATE, strict=True)
    assert len(samples) == 576 * len(others) - 529 - 576  # without the delays of decoder and encoder
    begun = load_audio(put(tmp_path, data, "counted"), RATE)
    np.testing.assert_allclose(samples[5000 : len(begun)], begun[5000:], atol=1e-4)
    assert read(path)[1] == []


@pytest.mark.parametrize("claimed", [0, 5, 100_000])
def test_an_mp3_with_a_wrong_count_is_read_to_its_end(tmp_path, claimed):
    data = bytearray(encoded(waveform(3.0), **MP3))
    place = max(data.find(b"Xing"), data.find(b"Info"))
    struct.pack_into(">I", data, place + 8, claimed)
    assert 3 * RATE <= len(load_audio(put(tmp_path, bytes(data)), RATE, strict=True)) < 3.2 * RATE


def test_an_mp3_without_a_count_that_ends_within_a_frame_is_reported_as_cut(tmp_path):
    data = b"".join(mp3_frames(encoded(waveform(3.0), **MP3))[1:])
    path = put(tmp_path, data[: len(data) // 2 + 11])
    assert "without an end-of-stream mark" in read(path)[1][0]
    assert "without an end-of-stream mark" in refusal(path, strict=True)


def test_joined_mp3_of_several_rates_without_counts_are_read_to_the_end(tmp_path):
    parts = [encoded(waveform(2.0), rate, **MP3) for rate in (16000, 22050, 44100)]
    stripped = []
    for part in parts:  # the second frame differs from the first only in its bit rate
        place = next(k for k in range(60, len(part)) if part[k : k + 2] == part[:2] and part[k + 3] == part[3])
        stripped.append(part[place:])
    samples = load_audio(put(tmp_path, b"".join(stripped)), RATE, strict=True)
    seconds = sum(2.0 * 16000 / rate for rate in (16000, 22050, 44100))
    assert seconds * RATE <= len(samples) < (seconds + 0.4) * RATE


def test_an_mp3_whose_count_is_right_may_end_in_part_of_a_frame(tmp_path):
    data = encoded(waveform(3.0), **MP3)
    path = put(tmp_path, data + data[:4] + bytes(20))
    assert len(load_audio(path, RATE, strict=True)) == 3 * RATE


def test_bytes_between_mp3_frames_are_reported(tmp_path):
    frames = mp3_frames(encoded(waveform(3.0), **MP3))
    path = put(tmp_path, b"".join(frames[:40]) + bytes(6000) + b"".join(frames[40:]))
    samples, warnings = read(path)
    assert len(samples) == 3 * RATE
    assert "6000 bytes" in warnings[0]


# -------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("options", [WAV, FLAC, VORBIS, OPUS, MP3], ids=lambda o: "-".join(o.values()))
def test_a_part_equals_a_slice_of_the_whole_recording(tmp_path, options):
    path = put(tmp_path, encoded(waveform(6.0), **options))
    whole = load_audio(path, RATE)
    for start, seconds in ((0.0, 2.5), (2.5, 1.25), (3.1, None), (5.5, 0.5)):
        end = None if seconds is None else round((start + seconds) * RATE)
        part, expected = load_audio(path, RATE, start=start, seconds=seconds), whole[round(start * RATE) : end]
        assert len(part) == len(expected)
        np.testing.assert_allclose(part, expected, atol=0 if options in (WAV, FLAC) else 1e-3)
        np.testing.assert_array_equal(part, read(path, start=start, seconds=seconds)[0])


@pytest.mark.parametrize("options", [WAV, FLAC, VORBIS, OPUS, MP3], ids=lambda o: "-".join(o.values()))
def test_a_part_of_a_long_recording_is_read_without_the_rest(tmp_path, monkeypatch, options):
    path = put(tmp_path, encoded(waveform(30.0), **options))
    whole = load_audio(path, RATE)
    load_audio(path, RATE, start=1.0, seconds=1.0)
    decoded, read_sound = [], SoundStream.read
    monkeypatch.setattr(SoundStream, "read", lambda self, out: decoded.append(len(out)) or read_sound(self, out=out))
    monkeypatch.setattr(audio, "find_streams", None)  # the layout found for the first part is cached
    part = load_audio(path, RATE, start=25.0, seconds=1.0)
    assert sum(decoded) <= 1.5 * RATE
    np.testing.assert_allclose(part, whole[25 * RATE : 26 * RATE], atol=1e-3)


def test_consecutive_parts_leave_no_sample_out(tmp_path):
    path = put(tmp_path, encoded(waveform(3.0), **WAV))
    edges = [0.0, 0.3333, 1.00004, 2.2, 3.0]
    parts = [load_audio(path, RATE, start=a, seconds=b - a) for a, b in zip(edges, edges[1:], strict=False)]
    np.testing.assert_array_equal(np.concatenate(parts), load_audio(path, RATE))


def test_a_part_may_reach_over_joined_streams(tmp_path):
    path = put(tmp_path, b"".join(encoded(waveform(2.0, k), **WAV) for k in range(4)))
    whole = load_audio(path, RATE)
    np.testing.assert_array_equal(load_audio(path, RATE, start=3.5, seconds=3.0), whole[56000:104000])


def test_a_part_of_a_recording_at_another_rate_has_its_length(tmp_path):
    path = put(tmp_path, encoded(waveform(9.0), 48000, **FLAC))  # three seconds
    assert abs(len(load_audio(path, RATE, start=1.0, seconds=1.5)) - 24000) <= 1


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("start, seconds", [(0.0, 2.2), (1.5, 1.0), (2.5, None), (2.5, 1.0), (1e9, 1.0)])
def test_a_part_past_the_end_is_refused_with_the_numbers(tmp_path, start, seconds, whole):
    path = put(tmp_path, encoded(waveform(2.0), **WAV))
    message = refusal(path, start=start, seconds=seconds, strict=whole)
    assert "lasts 2.00 s" in message and f"from {start:g}" in message


def test_a_part_that_ends_slightly_past_the_end_is_read(tmp_path):
    path = put(tmp_path, encoded(waveform(2.0), **WAV))
    assert len(load_audio(path, RATE, start=1.0, seconds=1.09, strict=True)) == RATE


def test_a_part_before_a_missing_end_is_complete(tmp_path):
    data = encoded(waveform(4.0), **WAV)
    path = put(tmp_path, data[: len(data) // 2])
    assert len(load_audio(path, RATE, start=0.5, seconds=1.0, strict=True)) == RATE
    assert "lasts 2.00 s" in refusal(path, start=1.5, seconds=1.0, strict=True)


@pytest.mark.parametrize("start, seconds", [(-1.0, 1.0), (0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0),
                                            (float("inf"), None), (0.0, float("nan"))])  # fmt: skip
def test_an_impossible_part_is_refused(tmp_path, start, seconds):
    path = put(tmp_path, encoded(waveform(2.0), **WAV))
    assert "a part of" in refusal(path, start=start, seconds=seconds)


# -------------------------------------------------------------------------------------------- names, pipes, not a file


@pytest.mark.parametrize("name", [b"mod\xe0.wav", b"two\nlines.wav", "\uac15\uc758 \U0001f399.wav".encode(),
                                  b"x" * 251 + b".wav", b"-dash [1] 'a' \"b\" %20.WAV"])  # fmt: skip
def test_a_file_of_any_name_is_read_and_named_on_one_line(tmp_path, name):
    path = os.path.join(tmp_path, os.fsdecode(name))
    with open(path, "wb") as file:
        file.write(encoded(waveform(), **WAV)[:-8000])
    assert len(load_audio(path, RATE)) > 1000
    message = refusal(path, strict=True)
    assert show(path) in message
    message.encode("utf-8")


def test_show_accepts_any_name():
    assert show("a/\uac15.wav") == "a/\uac15.wav"
    assert show(os.fsdecode(b"mod\xe0.wav")) == show(b"mod\xe0.wav") == "mod\\xe0.wav"
    assert show("two\nlines\x1b[31m") == "two\\nlines\\x1b[31m"
    assert show("\ud800.wav") == "\\ud800.wav"


def test_unreadable_audio_is_named(tmp_path):
    text = tmp_path / "text.flac"
    text.write_text("this is no audio")
    none = write_audio(tmp_path / "none.wav", np.zeros(0, np.float32))
    empty = put(tmp_path, b"")
    for path, reason in ((text, "cannot be read"), (none, "no samples"), (tmp_path / "gone.wav", "does not exist"),
                         (empty, "is empty")):  # fmt: skip
        assert reason in (message := refusal(path)) and show(path) in message


NEEDS_FFMPEG = {
    "m4a": b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(1000), "webm": b"\x1a\x45\xdf\xa3" + bytes(1000),
    "wma": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(1000),
    "aac": b"\xff\xf1\x50\x80" + bytes(1000), "ts": (b"\x47" + bytes(187)) * 9,
    "tagged.aac": b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + b"\xff\xf1\x50\x80" + bytes(1000),
    "avi": b"RIFF\0\1\0\0AVI LIST" + bytes(1000),
}  # fmt: skip


@pytest.mark.parametrize("suffix", NEEDS_FFMPEG)
def test_formats_that_ffmpeg_reads_are_refused_with_the_command(tmp_path, suffix):
    assert "ffmpeg -i" in refusal(put(tmp_path, NEEDS_FFMPEG[suffix], f"x.{suffix}"))


@pytest.mark.parametrize("magic", [b"PK\x03\x04", b"RIFF\0\1\0\0AVI LIST", b"\0\0\0\x20ftypmp42", b"\x1a\x45\xdf\xa3"])
def test_an_mp3_within_a_file_of_another_kind_is_not_read(tmp_path, magic):
    message = refusal(put(tmp_path, magic + bytes(50) + encoded(waveform(2.0), **MP3)))
    assert "unpack it" in message or "ffmpeg" in message


@pytest.mark.parametrize("data, what", [(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
                                        (b"<!DOCTYPE html><html>", "web page"),
                                        (bytes(3200), "with zeros only")])  # fmt: skip
def test_files_that_are_not_audio_are_named_by_kind(tmp_path, data, what):
    assert what in refusal(put(tmp_path, data, "x.wav"))


@pytest.mark.parametrize("form, keep", [("WAV", 30), ("WAV", 44), ("AIFF", 40), ("FLAC", 60), ("OGG", 60), ("CAF", 40),
                                        ("W64", 60)])  # fmt: skip
def test_a_recording_truncated_within_its_header_is_reported(tmp_path, form, keep):
    message = refusal(put(tmp_path, encoded(waveform(2.0), format=form)[:keep]))
    assert "is cut off" in message and "copy it again" in message


def test_names_that_the_system_refuses_are_reported(tmp_path):
    folder = tmp_path / "folder.wav"
    folder.mkdir()
    too_long = tmp_path / f"{'x' * 300}.wav"
    for path, reason in ((folder, "is a folder"), (too_long, "too long"), (f"{tmp_path}/a\0b.wav", "cannot be opened"),
                         (f"{tmp_path}/\ud800.wav", "cannot be opened"), ("/dev/zero", "is a device"),
                         ("/dev/null", "is a device")):  # fmt: skip
        assert reason in (message := refusal(path)) and show(path) in message


NOBODY_UID = 65534


def test_a_file_without_permission_is_named(tmp_path):
    path = put(tmp_path, encoded(waveform(), **WAV))
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # root may read every file
        os.seteuid(NOBODY_UID)
    try:
        assert "Permission denied" in refusal(path)
    finally:
        os.seteuid(user)


def test_a_socket_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s.wav")
        assert "is a socket" in refusal("s.wav")


def test_a_named_pipe_is_read_once_and_refused_in_training(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert "is a pipe" in refusal(path, strict=True)  # does not wait for a writer
    data = of_unknown_length(encoded(waveform(3.0), **FLAC))
    writer = threading.Thread(target=path.write_bytes, args=(data,))
    writer.start()
    samples = load_audio(path, RATE)
    writer.join()
    assert len(samples) == 3 * RATE


def from_standard_input(data: bytes | None, **options) -> str:
    program = (
        "from las_fast.data.audio import open_recording; from las_fast.errors import InputError\n"
        "try: recording = open_recording('-', 16000); print(sum(map(len, recording)), recording.warnings)\n"
        "except InputError as error: print('refused:', error)"
    )
    command = [sys.executable, "-c", program]
    return subprocess.run(command, input=data, capture_output=True, check=True, **options).stdout.decode()


@pytest.mark.parametrize("options", [WAV, VORBIS, FLAC, MP3], ids=lambda o: "-".join(o.values()))
def test_standard_input_is_read_from_a_pipe(options):
    assert from_standard_input(encoded(waveform(3.0), **options)) == "48000 []\n"


def test_standard_input_is_read_from_a_file(tmp_path):
    with put(tmp_path, encoded(waveform(3.0), **WAV)).open("rb") as file:
        assert from_standard_input(None, stdin=file) == "48000 []\n"


@pytest.mark.parametrize("data, reason", [(b"", "is empty"), (b"no audio", "cannot be read as audio")])
def test_standard_input_that_is_not_audio_is_refused(data, reason):
    assert from_standard_input(data).startswith("refused: standard input") and reason in from_standard_input(data)


def test_a_closed_standard_input_is_refused():
    assert "standard input is closed" in from_standard_input(None, preexec_fn=lambda: os.close(0))


def test_a_pipe_is_read_where_temporary_files_cannot_be_made(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(opening.tempfile, "TemporaryFile", refuse)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(encoded(waveform(3.0), **WAV),))
    writer.start()
    assert len(load_audio(path, RATE)) == 3 * RATE
    writer.join()


@pytest.mark.parametrize("calls", [0, 3, 9])
def test_ctrl_c_during_libsndfile_is_not_lost(tmp_path, monkeypatch, calls, capfd):
    path = put(tmp_path, b"".join(encoded(waveform(4.0, k), **VORBIS) for k in range(2)))
    done, readinto = [], FileView.readinto

    def interrupted(self, buffer):
        done.append(1)
        if len(done) > calls:
            raise KeyboardInterrupt
        return readinto(self, buffer)

    monkeypatch.setattr(FileView, "readinto", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_audio(path, RATE)
    assert capfd.readouterr().err == ""


def test_no_file_descriptor_is_left_open(tmp_path):
    path = put(tmp_path, encoded(waveform(), **WAV))
    text = put(tmp_path, b"no audio", "text")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        load_audio(path, RATE)
        refusal(text)
        open_recording(path, RATE).close()
        next(iter(open_recording(path, RATE)))
    assert len(os.listdir("/proc/self/fd")) == before


# ----------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("form", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "MP3", "OGG", "OPUS", "NIST"])
def test_damaged_files_give_samples_or_a_one_sentence_error(tmp_path, form):
    options = OPUS if form == "OPUS" else {"format": form}
    data = encoded(np.stack([waveform(1.0, 1), waveform(1.0, 2)], 1), **options)
    generator = np.random.default_rng(0)
    for k in range(30):
        damaged = bytearray(data)
        reach = 200 if k % 2 else len(data)
        for place in generator.integers(0, min(reach, len(data)), 1 + k % 7):
            damaged[place] = generator.integers(0, 256)
        if k % 3 == 0:
            del damaged[generator.integers(1, len(data)) :]
        path = put(tmp_path, bytes(damaged))
        for whole in (False, True):
            try:
                samples = load_audio(path, RATE, strict=whole)
                assert len(samples) and np.isfinite(samples).all()
            except InputError as error:
                assert "x.audio" in str(error) and "\n" not in str(error)
