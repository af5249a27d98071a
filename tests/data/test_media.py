"""PyAV reads the audio of m4a, mp4, webm and other files that libsndfile does not read."""

import itertools
import sys

import av
import numpy as np
import pytest

from las_fast.data import media
from las_fast.data.audio import load_audio, open_recording
from las_fast.data.containers import Source, magic
from las_fast.errors import InputError

RATE, SECONDS = 48000, 3.0


def tone(hertz=440.0, seconds=SECONDS, rate=RATE):
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def encode(path, samples, codec, channels=1, video=False):
    """Write samples (N,) to a file with FFmpeg; with video, after a video track."""
    with av.open(str(path), "w") as container:
        if video:
            picture = container.add_stream("mpeg4", rate=5)
            picture.width = picture.height = 64
            picture.pix_fmt = "yuv420p"
        track = container.add_stream(codec, rate=RATE, layout="mono" if channels == 1 else "stereo")
        if video:
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        both = np.ascontiguousarray(np.stack([samples] * channels, 1).reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(both, format="flt", layout="mono" if channels == 1 else "stereo")
        frame.sample_rate = RATE
        resampler = av.AudioResampler(format=track.format.name, layout=track.layout, rate=RATE, frame_size=1024)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(track.encode(part))
        container.mux(track.encode(None))
    return path


def strength(samples, hertz, rate=16000):
    """Return the share of the energy at a frequency: the squared correlation with its sine and cosine."""
    angle = 2 * np.pi * hertz * np.arange(len(samples)) / rate
    pair = np.stack([np.sin(angle), np.cos(angle)]) @ samples
    return 2 * float((pair**2).sum()) / len(samples) / float((samples**2).sum())


@pytest.mark.parametrize(("name", "codec"), [
    ("a.m4a", "aac"), ("a.mp4", "aac"), ("a.webm", "libopus"), ("a.mkv", "pcm_s16le"), ("a.aac", "aac"),
    ("a.mov", "pcm_s16le"),
])  # fmt: skip
def test_the_audio_is_read_at_the_models_rate(tmp_path, name, codec):
    samples = load_audio(encode(tmp_path / name, tone(), codec), 16000)
    assert len(samples) / 16000 == pytest.approx(SECONDS, abs=0.1)
    assert strength(samples[4000:-4000], 440) > 0.99


def test_the_audio_of_a_film_is_read(tmp_path):
    samples = load_audio(encode(tmp_path / "film.mp4", tone(), "aac", channels=2, video=True), 16000)
    assert strength(samples[4000:-4000], 440) > 0.99


def test_a_part_has_the_samples_of_the_whole(tmp_path):
    path = encode(tmp_path / "a.m4a", np.concatenate([tone(440.0, 1.0), tone(880.0, 1.0), tone(1320.0, 1.0)]), "aac")
    part = load_audio(path, 48000, start=1.2, seconds=0.5)
    assert len(part) == 24000 and strength(part, 880, 48000) > 0.99
    np.testing.assert_array_equal(part, load_audio(path, 48000)[57600 : 57600 + 24000])


def test_the_guessed_duration_of_a_raw_stream_is_not_expected(tmp_path):
    quiet_first = np.concatenate([np.zeros(6 * RATE, np.float32), 0.2 * np.random.default_rng(0).normal(size=2 * RATE)])
    path = encode(tmp_path / "a.aac", quiet_first.astype(np.float32), "aac")
    assert len(load_audio(path, 16000, strict=True)) / 16000 == pytest.approx(8, abs=0.1)


def test_channels_may_change_within_a_file(tmp_path):
    mono = encode(tmp_path / "mono.aac", tone(440), "aac")
    stereo = encode(tmp_path / "stereo.aac", tone(880), "aac", channels=2)
    (tmp_path / "joined.aac").write_bytes(mono.read_bytes() + stereo.read_bytes() + mono.read_bytes())
    with open_recording(tmp_path / "joined.aac", 16000) as recording:
        samples = np.concatenate(list(recording))
    assert len(samples) / 16000 == pytest.approx(3 * SECONDS, abs=0.3)
    assert not any("cut off" in warning for warning in recording.warnings)
    for part, hertz in enumerate((440, 880, 440)):
        middle = round((part + 0.5) * len(samples) / 3)
        assert strength(samples[middle - 8000 : middle + 8000], hertz) > 0.99


def test_a_file_cut_off_in_the_middle_gives_its_first_part_and_a_warning(tmp_path):
    path = encode(tmp_path / "a.mkv", tone(), "pcm_s16le")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with open_recording(path, 16000) as recording:
        samples = np.concatenate(list(recording))
    assert 0.5 < len(samples) / 16000 < 2.5
    assert any("cut off" in warning for warning in recording.warnings)


@pytest.mark.parametrize("keep", [20, 200])
def test_a_file_cut_off_in_its_header_is_refused(tmp_path, keep):
    path = encode(tmp_path / "a.m4a", tone(), "aac")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"is MPEG-4 \(m4a, mp4, mov\), which cannot be decoded \(.*\); copy it again"):
        load_audio(path, 16000)


def test_a_film_without_sound_is_refused(tmp_path):
    with av.open(str(tmp_path / "mute.mp4"), "w") as container:
        picture = container.add_stream("mpeg4", rate=5)
        picture.width = picture.height = 64
        container.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(picture.encode(None))
    with pytest.raises(InputError, match="it has no audio track"):
        load_audio(tmp_path / "mute.mp4", 16000)


def test_an_unknown_codec_is_refused(tmp_path):
    path = encode(tmp_path / "a.mkv", tone(), "pcm_s16le")
    path.write_bytes(path.read_bytes().replace(b"A_PCM/INT/LIT", b"A_XYZ/INT/LIT"))
    with pytest.raises(InputError, match=r"cannot be decoded \(the codec of its audio track is unknown\)"):
        load_audio(path, 16000)


class GrowingContainer:
    """A container in which another track begins after five packets; PyAV raises an IndexError there."""

    def __init__(self, container):
        self.container, self.calls = container, 0

    def demux(self, track):
        self.calls += 1
        yield from itertools.islice(self.container.demux(track), 5 if self.calls == 1 else None)
        if self.calls == 1:
            raise IndexError("list index out of range")


def test_a_track_that_begins_later_loses_nothing(tmp_path):
    path = encode(tmp_path / "a.mkv", tone(), "pcm_s16le")
    with path.open("rb") as file, media.MediaStream(Source(file.fileno()), "matroska") as whole:
        expected = whole.read(whole.frames)
    with path.open("rb") as file, media.MediaStream(Source(file.fileno()), "matroska") as sound:
        sound._container = GrowingContainer(sound._container)
        np.testing.assert_array_equal(sound.read(sound.frames), expected)
        assert sound._container.calls == 2


def test_a_damaged_packet_before_a_part_does_not_move_the_part(tmp_path):
    path = encode(tmp_path / "a.mkv", tone(), "pcm_s16le")
    with path.open("rb") as file, media.MediaStream(Source(file.fileno()), "matroska") as sound:
        samples = np.arange(300, dtype=np.float32)[:, None].repeat(sound.channels, 1)
        sound._blocks = iter([samples[:100], RuntimeError("damaged"), samples[100:200], samples[200:]])
        assert sound.seek(150) == 150
        np.testing.assert_array_equal(sound.read(50), samples[150:200])


def test_without_pyav_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.m4a", tone(), "aac")
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(media, "is_installed", lambda name: False)
    with pytest.raises(InputError, match=r"is MPEG-4 \(m4a, mp4, mov\), which needs PyAV; run: pip install av"):
        load_audio(path, 16000)


def test_each_demuxer_exists_and_belongs_to_a_known_format():
    names = {name for *_, name in magic.FOREIGN} | {"an MPEG transport stream"}
    assert media.DEMUXERS.keys() <= names and set(media.DEMUXERS.values()) <= set(av.formats_available)


def test_only_the_format_of_the_first_bytes_is_tried(tmp_path):
    encode(tmp_path / "a.mp4", tone(), "aac")
    playlist = b"\x00\x00\x00\x20ftypM4A " + b"\n#EXTM3U\n#EXTINF:3,\na.mp4\n"
    (tmp_path / "list.m4a").write_bytes(playlist)
    with pytest.raises(InputError, match="which cannot be decoded"):
        load_audio(tmp_path / "list.m4a", 16000)
