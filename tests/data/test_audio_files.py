"""Opening recordings, and the exact texts of warnings and errors."""

from __future__ import annotations

import errno
import os
import stat
import threading

import numpy as np
import pytest
import soundfile
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

from las_fast.data import audio, decoder, opening
from las_fast.data.audio import load_audio, open_recording
from las_fast.data.decoder import SoundStream, decoder_message
from las_fast.errors import InputError, show

GOOD = encoded(waveform(2.0), **WAV)
HEADLESS = riff_file(chunk(b"data", pcm()))  # without the chunk that describes the samples


def warns(path, sentence: str, **options) -> None:
    """Assert that reading a file gives one warning, `sentence`; X stands for its name."""
    assert [warning.replace(show(path), "X") for warning in read(path, **options)[1]] == [sentence]


def refused(path, sentence: str, **options) -> None:
    assert refusal(path, **options).replace(show(path), "X") == sentence


# ------------------------------------------------------------------------------------------------------- missing audio


def test_a_tenth_of_a_second_may_be_missing(tmp_path):
    warns(put(tmp_path, riff_file(FORMAT, chunk(b"data", pcm(), 4 * RATE + 3300))),
         "X is cut off: it has 2.00 of the 2.10 s that its header states")  # fmt: skip
    assert not read(put(tmp_path, overstate_samples(encoded(waveform(2.0), **FLAC), RATE // 10)))[1]
    warns(put(tmp_path, overstate_samples(encoded(waveform(2.0), **FLAC), RATE // 10 + 1)),
         "X is cut off: it has 2.00 of the 2.10 s that its header states")  # fmt: skip


def overstate_samples(flac: bytes, more: int) -> bytes:
    """Raise the number of samples in the header of a FLAC file by `more`."""
    total = int.from_bytes(flac[21:26], "big") + more
    return flac[:21] + total.to_bytes(5, "big") + flac[26:]


def test_the_warning_says_how_much_of_a_truncated_recording_is_left(tmp_path):
    warns(put(tmp_path, GOOD[: 44 + 2 * RATE]), "X is cut off: it has 1.00 of the 2.00 s that its header states")
    flac = encoded(waveform(4.0), **FLAC)
    warns(put(tmp_path, flac[: len(flac) // 2]),
         "X is cut off or damaged: after 1.79 s of 4.00 s it cannot be read (flac decoder lost sync)")  # fmt: skip
    opus = encoded(waveform(4.0), **OPUS)
    warns(
        put(tmp_path, opus[: opus.rindex(b"OggS")]), "X is cut off: it ends after 2.97 s without an end-of-stream mark"
    )
    refused(put(tmp_path, GOOD[:44]), "X is cut off: its header announces audio, but none follows; "
            "copy it again, repair it or remove it")  # fmt: skip


def test_a_missing_end_is_reported_with_the_number_of_the_part(tmp_path):
    warns(put(tmp_path, GOOD + HEADLESS), "X: part 2 of 2 is cut off or damaged within its header, before any sound; "
         "copy it again")  # fmt: skip
    unknown = chunk(b"fmt ", struct_format(0x9999))
    warns(put(tmp_path, riff_file(unknown, chunk(b"data", pcm())) + GOOD),
         "X: part 1 of 2 cannot be read as audio (Error in WAV/W64/RF64 file. Malformed 'fmt ' chunk): its header is "
         "damaged, or its codec is unknown; convert it: ffmpeg -i FILE -ac 1 -ar 16000 FILE.wav")  # fmt: skip
    warns(put(tmp_path, GOOD + GOOD[: 44 + 2 * RATE]), "part 2 of 2 of X is cut off: it has 1.00 of the 2.00 s that "
         "its header states")  # fmt: skip


def struct_format(coding: int) -> bytes:
    return coding.to_bytes(2, "little") + FORMAT[10:]


def test_gaps_and_damage_are_reported_by_the_part_that_has_them(tmp_path):
    data = encoded(waveform(6.0), **OPUS)
    pages = [b"OggS" + page for page in data.split(b"OggS")[1:]]
    lossy = b"".join(pages[:3] + pages[4:])
    warns(put(tmp_path, lossy), "X has a gap: Ogg pages are missing or damaged (1)")
    warns(put(tmp_path, lossy + GOOD), "part 1 of 2 of X has a gap: Ogg pages are missing or damaged (1)")
    flac = encoded(waveform(3.0), **FLAC)
    damaged = flac[: len(flac) // 2] + bytes(200) + flac[len(flac) // 2 + 200 :]
    warns(put(tmp_path, damaged), "X is damaged: 0.26 s cannot be read (flac decoder lost sync)")
    warns(put(tmp_path, GOOD + damaged), "part 2 of 2 of X is damaged: 0.26 s cannot be read (flac decoder lost sync)")


@pytest.mark.parametrize("magic", ["AU", "AIFF", "RIFX"])
def test_audio_beyond_4_gib_of_its_format_is_refused_with_a_format_that_holds_it(tmp_path, magic):
    unknown = (0xFFFFFFFF).to_bytes(4, "big")
    options = {"format": "WAV", "endian": "BIG"} if magic == "RIFX" else {"format": magic}
    data = encoded(waveform(1.0), subtype="PCM_16", **options)
    length = len(pcm(1.0)) + 8 * (magic == "AIFF")  # AIFF counts eight bytes before the samples as well
    place = data.rindex(length.to_bytes(4, "big"), 0, 80)
    path = put(tmp_path, data[:place] + unknown + data[place + 4 :])
    os.truncate(path, len(data) - len(pcm(1.0)) + (5 << 30))
    size = (5 << 30) + 8 * (magic == "AIFF")
    refused(path, f"X contains {size} bytes of audio, of which only 4 GiB can be read in its format; "
            "convert it to FLAC or W64", seconds=0.5, strict=True)  # fmt: skip
    assert len(read(path, seconds=0.5)[0]) == RATE // 2


def test_unsupported_audio_is_refused_with_specific_advice(tmp_path):
    speex = b"OggS\0\2" + bytes(20) + b"\1\x08Speex   "
    refused(put(tmp_path, encoded(waveform(1.0), **VORBIS) + speex), "X contains an Ogg part (Speex) that cannot be "
            "read; convert it: ffmpeg -i FILE -vn -ac 1 -ar 16000 FILE.wav", strict=True)  # fmt: skip


@pytest.mark.parametrize(("longest", "ends"), [(0.5, True), (2 * 4096 / RATE, False)])
def test_damage_that_lasts_too_long_ends_the_recording(tmp_path, monkeypatch, longest, ends):
    monkeypatch.setattr(decoder, "MAX_DAMAGE", longest)
    flac = encoded(waveform(4.0), **FLAC)
    twice = bytearray(flac)
    for share in (0.3, 0.6):
        twice[int(share * len(flac)) : int(share * len(flac)) + 200] = bytes(200)
    samples, warnings = read(put(tmp_path, bytes(twice)))
    if ends:
        assert 2 * RATE < len(samples) < 3 * RATE and len(warnings) == 2
        assert "is damaged: 0.26 s" in warnings[0] and "cut off or damaged: after" in warnings[1]
    else:
        assert len(samples) == 4 * RATE and len(warnings) == 1 and "is damaged: 0.51 s" in warnings[0]


def test_damage_of_the_last_samples_is_a_missing_end(tmp_path):
    flac = encoded(waveform(6 * 4096 / RATE), **FLAC)  # six blocks
    warns(put(tmp_path, flac[:-2000] + bytes(2000)),
         "X is cut off or damaged: after 1.28 s of 1.54 s it cannot be read (flac decoder lost sync)")  # fmt: skip


def test_a_part_reaches_over_damage_without_holding_more_than_it(tmp_path):
    flac = encoded(waveform(3.0), **FLAC)
    damaged = flac[: len(flac) // 2] + bytes(200) + flac[len(flac) // 2 + 200 :]
    path, before = put(tmp_path, damaged), len(os.listdir("/proc/self/fd"))
    whole = load_audio(path, RATE)
    assert len(os.listdir("/proc/self/fd")) == before
    zeros = np.flatnonzero(whole == 0)
    start = (zeros[0] - 1000) / RATE
    np.testing.assert_array_equal(load_audio(path, RATE, start=start, seconds=0.5),
                                  whole[round(start * RATE) : round((start + 0.5) * RATE)])  # fmt: skip


def test_a_part_past_the_end_is_refused_with_the_requested_times(tmp_path):
    path = put(tmp_path, GOOD)
    refused(path, "X lasts 2.00 s, too short for a part from 2.5 s; correct the times", start=2.5)
    refused(path, "X lasts 2.00 s, too short for a part from 1.5 to 2.5 s; correct the times", start=1.5, seconds=1.0)
    refused(path, "X lasts 2.00 s, too short for a part from 0 to 2.11 s; correct the times", seconds=2.11)
    assert len(load_audio(path, RATE, seconds=2.1)) == 2 * RATE


def test_a_part_is_read_without_what_follows_it(tmp_path):
    path = put(tmp_path, GOOD + HEADLESS)
    assert read(path, seconds=2.0)[1] == read(path, start=0.5, seconds=1.0)[1] == []
    assert len(read(path, start=0.5)[1]) == 1


@pytest.mark.parametrize("rate", [1000, 768_000])
def test_the_lowest_and_the_highest_rate_are_read(tmp_path, rate):
    soundfile.write(tmp_path / "x.wav", waveform(0.1), rate)
    assert len(load_audio(tmp_path / "x.wav", RATE)) == pytest.approx(1600 * RATE / rate, abs=1)


def test_a_read_error_of_the_disk_is_reported(tmp_path, monkeypatch):
    path = put(tmp_path, 4 * GOOD)
    size, pread = path.stat().st_size, os.pread

    def failing(descriptor, count, start):
        if failing.from_here <= start:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, count, start)

    monkeypatch.setattr(os, "pread", failing)
    failing.from_here = size // 2
    assert f"{show(path)} cannot be read to its end (Input/output error)" in read(path)[1]
    failing.from_here = 0
    refused(put(tmp_path, JUNK), "X cannot be read (Input/output error)")


class FailingDecoder:
    """A decoder that fails at the listed calls, each after decoding `some` samples."""

    def __init__(self, monkeypatch, calls: set[int], some: int = 0):
        self.calls, self.some, self.count, self.read = calls, some, 0, SoundStream.read
        monkeypatch.setattr(SoundStream, "read", lambda sound, out: self(sound, out))

    def __call__(self, sound, out):
        self.count += 1
        if self.count not in self.calls:
            return self.read(sound, out=out)
        self.read(sound, out=out[: self.some])
        raise soundfile.LibsndfileError(2)


def test_a_decoder_may_fail_twice_in_a_row_and_not_three_times(tmp_path, monkeypatch):
    path = put(tmp_path, GOOD)
    with monkeypatch.context() as patch:
        FailingDecoder(patch, {1, 2, 4, 5})
        warns(path, "X is cut off or damaged: after 2.00 s it cannot be read (System error)")
    with monkeypatch.context() as patch:
        FailingDecoder(patch, {2, 3, 4})
        warns(path, "X is cut off or damaged: after 1.00 s it cannot be read (System error)")


def test_samples_before_a_decoder_failure_are_kept(tmp_path, monkeypatch):
    whole = load_audio(put(tmp_path, GOOD), RATE)
    FailingDecoder(monkeypatch, {1, 2, 3, 4}, some=1000)
    np.testing.assert_array_equal(load_audio(put(tmp_path, GOOD), RATE), whole)


# ----------------------------------------------------------------------------------------------------- not audio

JUNK = bytes(range(1, 255)) * 8


@pytest.mark.parametrize(("magic", "what"), [
    (b"PK\x03\x04", "a zip archive; unpack it"), (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"Rar!", "a rar archive; unpack it"), (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"<HTML>", "a web page, perhaps an error page of a download; download it again"),
    (b"<!doctype html>", "a web page, perhaps an error page of a download; download it again"),
    (b"ID3\x04\0\0\0\0\0\x0a" + bytes(10), "an ID3 tag without any known audio after it; copy it again"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run git lfs pull"),
])  # fmt: skip
def test_files_of_another_kind_are_refused_by_name(tmp_path, magic, what):
    refused(put(tmp_path, magic + JUNK), f"X is {what}")


@pytest.mark.parametrize("magic", [b"RIFF", b"RIFX", b"RF64", b"FORM"])
def test_a_header_that_is_damaged_is_distinguished_from_other_data(tmp_path, magic):
    refused(put(tmp_path, magic + JUNK),
            "X cannot be read as audio (Format not recognised): its header is damaged, or its codec is unknown; "
            "convert it: ffmpeg -i FILE -ac 1 -ar 16000 FILE.wav")  # fmt: skip
    refused(put(tmp_path, magic[:3] + JUNK),
            "X cannot be read as audio (Format not recognised); give a wav, flac, ogg or mp3 file")  # fmt: skip


@pytest.mark.parametrize(("form", "place", "value"), [("NIST", 0, b"NIST_1A\n   9999\nx"), ("CAF", 28, b"none"),
                                                      ("FLAC", 18, bytes(2))])  # fmt: skip
def test_a_damaged_header_of_other_formats_is_reported(tmp_path, form, place, value):
    data = bytearray(encoded(waveform(0.5), format=form))
    data[place : place + len(value)] = value
    message = refusal(put(tmp_path, bytes(data)))
    assert "): its header is damaged, or its codec is unknown; convert it: ffmpeg" in message


def test_an_ogg_whose_first_pages_are_damaged_is_reported(tmp_path):
    data = bytearray(encoded(waveform(1.0), **VORBIS))
    data[60:200] = bytes(140)
    message = refusal(put(tmp_path, bytes(data)))
    assert message.endswith(
        " cannot be read as audio (Supported file format but file is malformed): its first pages are damaged; "
        "copy it again"
    )
    for count in (4, 58):  # 58 bytes: also the name of the codec
        data[:count] = b"x" * count
        message = refusal(put(tmp_path, bytes(data)))
        assert message.endswith("(Format not recognised); give a wav, flac, ogg or mp3 file")


def test_a_file_of_only_zeros_is_not_taken_for_silence(tmp_path):
    refused(put(tmp_path, bytes(3200)), "X begins with zeros only, as after a crash or an interrupted copy; "
            "copy it again")  # fmt: skip


@pytest.mark.parametrize(("zeros", "message"), [(63, "give a wav, flac, ogg or mp3 file"), (64, "with zeros only")])
def test_64_leading_zeros_are_reported_as_a_failed_copy(tmp_path, zeros, message):
    assert message in refusal(put(tmp_path, bytes(zeros) + b"text " * 300))


def test_a_format_that_ffmpeg_reads_is_named_with_the_command(tmp_path):
    message = refusal(put(tmp_path, b"wvpk" + bytes(100)))
    assert "is WavPack, which cannot be decoded (" in message
    assert message.endswith("); copy it again or convert it: ffmpeg -i FILE -vn -ac 1 -ar 16000 FILE.wav")


@pytest.mark.parametrize(("error", "reason"), [
    (soundfile.LibsndfileError(1, "Error opening x: "), "Format not recognised"),
    (ValueError("Error in x.wav: a: b."), "a: b"), (ValueError("alone"), "alone"), (TypeError(), "TypeError"),
])  # fmt: skip
def test_the_reason_in_an_error_is_short(error, reason):
    assert decoder_message(error) == reason


def test_an_mp3_without_any_frame_that_decodes_is_reported(tmp_path, monkeypatch):
    error = soundfile.LibsndfileError(2)
    monkeypatch.setattr(type(error), "error_string", "Error : File does not exist or is not a regular file.")
    assert decoder_message(error) == "no frame can be decoded"


# ------------------------------------------------------------------------------------------- parts, found once


def seen_twice(path, other) -> None:
    """Read a part of one file, then the same part of another, and check both."""
    load_audio(path, RATE, start=1.2, seconds=0.1)
    expected = load_audio(other, RATE)[round(1.2 * RATE) : round(1.3 * RATE)]
    np.testing.assert_array_equal(load_audio(other, RATE, start=1.2, seconds=0.1), expected)


def test_the_cached_layout_of_a_file_is_not_used_for_another(tmp_path):
    one, two = encoded(waveform(1.0, 1), **WAV), encoded(waveform(1.0, 2), **WAV)
    joined = one + two
    whole = encoded(waveform(2.0, 3), **WAV)
    whole += bytes(len(joined) - len(whole))
    a, b = put(tmp_path, joined, "a"), put(tmp_path, whole, "b")
    os.utime(a, ns=(0, 0))
    os.utime(b, ns=(0, 0))
    seen_twice(a, b)  # a new inode
    put(tmp_path, joined, "b")
    os.utime(b, ns=(0, 9))
    seen_twice(b, b)  # a new mtime
    put(tmp_path, whole, "b")
    os.utime(b, ns=(0, 10))
    seen_twice(b, b)
    put(tmp_path, joined + two, "b")
    os.utime(b, ns=(0, 10))
    assert len(load_audio(b, RATE, start=2.2, seconds=0.5)) == RATE // 2  # a new size


def test_the_layouts_of_the_last_eight_files_are_cached(tmp_path, monkeypatch):
    paths = [put(tmp_path, GOOD, f"{k}") for k in range(12)]
    for path in paths:
        load_audio(path, RATE, start=0.5)
    assert len(audio._layouts) == 8
    monkeypatch.setattr(audio, "find_streams", None)
    for path in paths[4:]:
        assert len(load_audio(path, RATE, start=0.5)) == 1.5 * RATE
        assert len(load_audio(path, RATE, seconds=0.5)) == 0.5 * RATE


def test_reading_a_whole_recording_does_not_cache_its_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "_cached_layout", None)
    assert len(load_audio(put(tmp_path, GOOD), RATE)) == 2 * RATE


def test_a_file_of_one_stream_is_read_by_libsndfile_only(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "FileView", None)
    assert len(load_audio(put(tmp_path, GOOD), RATE)) == 2 * RATE


# ------------------------------------------------------------------------------------------------ descriptors and pipes


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_file_is_closed_after_iteration_after_the_block_and_on_deletion(tmp_path):
    path, before = put(tmp_path, GOOD), open_files()
    with open_recording(path, RATE) as unread:
        assert unread is not None and open_files() == before + 1
    assert open_files() == before
    done = open_recording(path, RATE)
    list(done)
    assert open_files() == before
    done.close()
    forgotten = open_recording(path, RATE)
    del forgotten
    assert open_files() == before


@pytest.mark.parametrize(("kind", "what"), [(stat.S_IFDIR, "folder"), (stat.S_IFCHR, "device"),
                                            (stat.S_IFBLK, "device")])  # fmt: skip
def test_files_without_a_recording_are_refused_by_kind(kind, what):
    with pytest.raises(InputError, match=f"^X is a {what}; give a wav, flac, ogg or mp3 file$"):
        opening._check_kind("X", kind | 0o644)
    opening._check_kind("X", stat.S_IFREG | 0o644)


@pytest.fixture
def standard_input():
    """A function that makes a descriptor standard input, which is restored after the test."""
    stdin_copy = os.dup(0)
    yield lambda descriptor: (os.dup2(descriptor, 0), os.close(descriptor))
    os.dup2(stdin_copy, 0)
    os.close(stdin_copy)


def test_standard_input_without_a_recording_is_refused_and_closed(standard_input, tmp_path):
    master, terminal = os.openpty()
    for descriptor, message in (
        (os.open(os.devnull, os.O_RDONLY), "standard input is a device; give a wav, flac, ogg or mp3 file"),
        (os.open(tmp_path, os.O_RDONLY), "standard input is a folder; give a wav, flac, ogg or mp3 file"),
        (terminal, "standard input is a terminal; give a file, or send a recording through a pipe"),
    ):
        standard_input(descriptor)
        before = open_files()
        assert refusal("-") == message
        assert open_files() == before
    os.close(master)


def test_a_file_at_standard_input_is_read_from_its_beginning(standard_input, tmp_path):
    descriptor = os.open(put(tmp_path, GOOD), os.O_RDONLY)
    os.lseek(descriptor, 1000, os.SEEK_SET)
    standard_input(descriptor)
    np.testing.assert_array_equal(load_audio("-", RATE), load_audio(tmp_path / "x.audio", RATE))


def through_pipe(folder, data: bytes) -> np.ndarray:
    path = folder / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(data,))
    writer.start()
    try:
        return load_audio(path, RATE)
    finally:
        path.unlink()
        writer.join()


def test_a_pipe_is_copied_completely_despite_short_writes(tmp_path, monkeypatch):
    write, before = os.write, open_files()
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:30_000]))
    assert len(through_pipe(tmp_path, encoded(waveform(5.0), **WAV))) == 5 * RATE
    assert open_files() == before


@pytest.mark.parametrize(("error", "raised"), [(OSError(errno.ENOSPC, "No space left on device"), InputError),
                                               (KeyboardInterrupt(), KeyboardInterrupt)])  # fmt: skip
def test_a_pipe_that_cannot_be_copied_is_reported_and_leaves_nothing_open(tmp_path, monkeypatch, error, raised):
    def failing(descriptor, data):
        raise error

    before = open_files()
    monkeypatch.setattr(os, "write", failing)
    with pytest.raises(raised) as caught:
        through_pipe(tmp_path, b"x" * 100)
    assert open_files() == before
    if raised is InputError:
        assert str(caught.value) == (
            f"{show(tmp_path / 'pipe')} could not be copied to a temporary file (No space left on device); "
            "free some space, or set TMPDIR to another folder"
        )


def test_errors_of_the_system_are_reported(tmp_path):
    for path, message in (
        (tmp_path / "gone.wav", "X does not exist"),
        (f"{tmp_path}/a\0b", "X cannot be opened (embedded null byte)"),
        (tmp_path / ("x" * 300), "X cannot be opened (File name too long)"),
        (put(tmp_path, b""), "X is empty (0 bytes); remove it or record it again"),
        (put(tmp_path, encoded(np.zeros(0), **WAV), "none"), "X has no samples; remove it or record it again"),
    ):
        refused(path, message)


def test_encoder_padding_of_an_mp3_is_removed_and_not_reported_as_missing(tmp_path):
    assert not read(put(tmp_path, encoded(waveform(2.0), **MP3)))[1]
