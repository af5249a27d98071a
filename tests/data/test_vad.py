"""Voice activity detection with silero-vad, compared with the package's own streaming model."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import soxr
import torch
from tiny_corpora import RATE, make_music, make_speech

from las_fast.config import FeatureConfig
from las_fast.data import vad
from las_fast.data.espeak import Synthesiser
from las_fast.data.segments import chunks, segments
from las_fast.data.vad import CONTEXT, WINDOW, SileroDetector, make_detector
from las_fast.errors import InputError

CONFIG = FeatureConfig(kind="logmel", size=23)


@pytest.fixture(scope="module")
def spoken():
    """Two sentences with 2 s between them and 1 s around them: samples (N,) at RATE, and (start, end) in seconds."""
    synthesiser = Synthesiser()
    voice = {"voice": "en-us+max", "rate": 150, "pitch": 50, "pitch_range": 50}
    parts, spans, time = [np.zeros(RATE)], [], 1.0
    for text in ("the quick brown fox jumps over the lazy dog", "she sells sea shells by the sea shore"):
        wave = soxr.resample(synthesiser.speak(text, **voice), synthesiser.sample_rate, RATE)
        wave = 0.1 * np.trim_zeros(np.where(np.abs(wave) < 1e-3 * np.abs(wave).max(), 0, wave)) / wave.std()
        spans.append((time, time + len(wave) / RATE))
        parts += [wave, np.zeros(2 * RATE)]
        time += len(wave) / RATE + 2.0
    synthesiser.close()
    samples = np.concatenate(parts)[:-RATE]
    return (samples + 1e-4 * np.random.default_rng(0).normal(size=len(samples))).astype(np.float32), spans


def blocks(samples, size):
    return (samples[i : i + size] for i in range(0, len(samples), size))


def listened(samples, size, config=CONFIG):
    """A detector that has heard a recording, and what it passed on."""
    detector = SileroDetector(config)
    passed = list(detector.watch(blocks(samples, size)))
    return detector, np.concatenate(passed) if passed else np.empty(0, np.float32)


def streamed(samples):
    """The probabilities of the package's model for one window at a time."""
    folder = importlib.util.find_spec("silero_vad").submodule_search_locations[0]
    network = onnxruntime.InferenceSession(Path(folder, "data", "silero_vad.onnx"))
    padded = np.pad(samples, (CONTEXT, -len(samples) % WINDOW))
    state, probabilities = np.zeros((2, 1, 128), np.float32), []
    for start in range(0, len(padded) - CONTEXT, WINDOW):
        window = padded[None, start : start + CONTEXT + WINDOW]
        output, state = network.run(None, {"input": window, "state": state, "sr": np.array(RATE)})
        probabilities.append(output.item())
    return np.array(probabilities)


@pytest.mark.parametrize("size", [333, 10**9])
def test_probabilities_are_those_of_the_streaming_model(spoken, size):
    samples = spoken[0][: 5 * RATE + 77]  # more than one block, and a window that is not full
    detector, passed = listened(samples, size)
    np.testing.assert_array_equal(passed, samples)
    np.testing.assert_allclose(detector.known, streamed(samples), atol=1e-4)
    assert 0.2 < (detector.known > 0.5).mean() < 0.9


@pytest.mark.parametrize("count", [0, 1, 300, WINDOW, WINDOW + 1, 64_000, 64_001])
def test_recordings_of_any_length_pass_unchanged(count):
    samples = make_speech(5)[:count]
    detector, passed = listened(samples, 1000)
    np.testing.assert_array_equal(passed, samples)
    assert len(detector.known) == -(-count // WINDOW)


def test_the_samples_of_each_frame_are_known_before_they_are_passed_on():
    for rate in (RATE, 11_025):
        detector, config = None, FeatureConfig(size=23, sample_rate=rate)
        detector, passed = SileroDetector(config), 0
        for block in detector.watch(blocks(make_speech(13, rate=rate), 999)):
            passed += len(block)
            assert len(detector.known) * WINDOW / RATE >= passed / rate - 1e-3


def test_each_frame_gets_the_probability_at_its_middle():
    detector = SileroDetector(CONFIG)
    detector.known = np.arange(10, dtype=np.float32)
    windows = [int((160 * frame + 200) / WINDOW) for frame in range(30)]
    assert detector.loudness(0, torch.zeros(30, 23)).tolist() == windows
    assert detector.loudness(7, torch.zeros(5, 23)).tolist() == windows[7:12]
    assert detector.loudness(31, torch.zeros(2, 23)).tolist() == [9, 9]  # beyond the last window


def test_speech_begins_at_one_half_and_goes_on_above_a_lower_limit():
    detector = SileroDetector(FeatureConfig(size=23, shift_ms=32, window_ms=32))  # frames are windows
    detector.known = np.array([0.4, 0.6, 0.4, 0.3, 0.4, 0.2, 0.5, 0.1], np.float32)
    speech = detector.speech(0, torch.zeros(8, 23))
    assert speech.tolist() == [True, True, True, False, False, False, True, False]


def test_the_past_is_forgotten_so_that_memory_is_bounded(monkeypatch):
    sizes = []
    speech = SileroDetector.speech

    def counted(self, first, frames):
        mask = speech(self, first, frames)
        sizes.append(len(self.known))
        return mask

    monkeypatch.setattr(SileroDetector, "speech", counted)
    assert list(segments(blocks(np.zeros(150 * RATE, np.float32), RATE), CONFIG, vad="silero")) == []
    assert len(sizes) > 7 and max(sizes) < 60 * RATE / WINDOW


@pytest.mark.parametrize("rate", [8000, 11_025, RATE, 44_100])
def test_segments_are_the_sentences_at_every_sample_rate(spoken, rate):
    samples, spans = spoken
    samples = samples if rate == RATE else soxr.resample(samples, RATE, rate)
    actual = list(segments(blocks(samples, 4321), FeatureConfig(size=23, sample_rate=rate), vad="silero"))
    assert len(actual) == 2
    for segment, (start, end) in zip(actual, spans, strict=True):
        assert segment.start == pytest.approx(start, abs=0.25) and segment.end == pytest.approx(end, abs=0.3)


def test_segments_do_not_depend_on_blocks(spoken):
    whole = list(segments([spoken[0]], CONFIG, vad="silero"))
    actual = list(segments(blocks(spoken[0], 777), CONFIG, vad="silero"))
    assert [(s.start, s.end) for s in actual] == [(s.start, s.end) for s in whole]


def test_music_between_sentences_is_speech_by_energy_only(spoken):
    samples, ((_, end), (start, _)) = spoken[0].copy(), spoken[1]
    first, last = int((end + 0.2) * RATE), int((start - 0.2) * RATE)
    samples[first:last] += make_music((last - first) / RATE)[: last - first]
    assert len(list(segments([samples], CONFIG, vad="energy"))) == 1
    assert len(list(segments([samples], CONFIG, vad="silero"))) == 2


def test_a_long_recording_is_cut_where_speech_is_least_likely():
    detector = SileroDetector(CONFIG)
    detector.known = np.full(2000, 0.9, np.float32)
    detector.known[15 * RATE // WINDOW - 3 : 15 * RATE // WINDOW + 3] = 0.01
    frames = torch.zeros(2500, 23)
    frames[1200:1220] = -9  # quiet, but speech
    assert [first / 100 for first, _ in chunks([frames], CONFIG, detector)] == [0, pytest.approx(15, abs=0.1)]


def test_an_unknown_name_is_one_sentence():
    with pytest.raises(InputError, match="^vad must be 'energy' or 'silero'; got 'webrtc'$"):
        make_detector("webrtc", CONFIG)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("silero_vad", "needs the package silero-vad; run: pip install silero-vad onnxruntime"),
        ("onnxruntime", "needs the package onnxruntime; run: pip install silero-vad onnxruntime"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, missing, message):
    monkeypatch.setattr(vad, "is_installed", lambda name: name != missing)
    vad.load_network.cache_clear()
    with pytest.raises(InputError, match=f"^vad 'silero' {message}$"):
        make_detector("silero", CONFIG)


def test_an_old_version_of_the_package_is_named(monkeypatch):
    monkeypatch.setattr(vad, "MODEL", "gone.onnx")
    vad.load_network.cache_clear()
    with pytest.raises(InputError, match="too old; run: pip install --upgrade 'silero-vad>=6.2.3'$"):
        make_detector("silero", CONFIG)


def test_the_package_is_not_imported_because_it_changes_torchs_threads():
    vad.load_network()
    assert "silero_vad" not in sys.modules
    assert vad.load_network().get_inputs()[0].shape[1] == CONTEXT + WINDOW
