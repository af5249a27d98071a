"""Recordings as people have them: all of one is read, or a sentence says what is not."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
from archives import make_waveform, write_audio

from las_fast.audio import load_audio
from las_fast.errors import InputError, show


def waveform(seconds: float = 0.7, seed: int = 0) -> np.ndarray:
    return make_waveform(np.random.default_rng(seed), seconds)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_audio_formats_are_read(tmp_path, suffix):
    samples = waveform(0.5)
    loaded = load_audio(write_audio(tmp_path / f"x.{suffix}", samples), 16000)
    assert loaded.dtype == np.float32 and loaded.ndim == 1
    assert abs(len(loaded) - len(samples)) <= 2304  # an mp3 brings its codec's delay


def test_channels_are_averaged(tmp_path):
    left = waveform(0.2)
    path = write_audio(tmp_path / "stereo.wav", np.stack([left, np.zeros_like(left)], axis=1))
    np.testing.assert_allclose(load_audio(path, 16000), left / 2, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_audio_is_resampled_and_keeps_its_pitch(tmp_path, rate):
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate).astype(np.float32)
    loaded = load_audio(write_audio(tmp_path / "tone.wav", tone, rate), 16000)
    assert abs(len(loaded) - 16000) <= 1
    assert np.abs(np.fft.rfft(loaded)).argmax() in (999, 1000, 1001)


def test_unreadable_audio_is_named(tmp_path):
    text = tmp_path / "text.flac"
    text.write_text("this is no audio")
    empty = write_audio(tmp_path / "empty.wav", np.zeros(0, np.float32))
    for path, reason in ((text, "cannot be read"), (empty, "no samples"), (tmp_path / "gone.wav", "does not exist")):
        with pytest.raises(InputError, match=reason) as error:
            load_audio(path, 16000)
        assert show(path) in str(error.value)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_are_no_sound_are_refused(tmp_path, wrong):
    samples = waveform()
    samples[100] = wrong
    soundfile.write(tmp_path / "x.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(InputError, match="x.wav holds NaN, infinite or enormous samples"):
        load_audio(tmp_path / "x.wav", 16000)


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
def test_a_rate_that_no_recording_has_is_refused(tmp_path, rate):
    soundfile.write(tmp_path / "x.wav", waveform(), rate)
    with pytest.raises(InputError, match=f"x.wav has {rate} samples per second by its header, not 1000 to 768000"):
        load_audio(tmp_path / "x.wav", 16000)


def test_what_the_system_refuses_is_named(tmp_path):
    raw = tmp_path / "x.raw"
    raw.write_bytes(bytes(3200))
    closed = tmp_path / "folder.wav"
    closed.mkdir()
    too_long = tmp_path / f"{'x' * 300}.wav"
    for path, reason in ((raw, "nothing but zeros"), (closed, "is a folder"), (too_long, "too long"),
                         (f"{tmp_path}/a\0b.wav", "cannot be opened")):
        with pytest.raises(InputError, match=reason) as error:
            load_audio(path, 16000)
        assert show(path) in str(error.value)
