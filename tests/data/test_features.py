"""Features agree with kaldi-native-fbank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_corpora import make_waveform

from las_fast.config import FeatureConfig
from las_fast.data.audio import load_audio
from las_fast.data.features import (
    add_deltas,
    check_settings,
    compute_features,
    filter_centres,
    frame_sizes,
    seconds_of,
    speech_features,
)
from las_fast.errors import InputError

LOGMEL = FeatureConfig()
MFCC = FeatureConfig(kind="mfcc", size=28)


def waveform(seconds: float = 0.7, seed: int = 0) -> np.ndarray:
    return make_waveform(np.random.default_rng(seed), seconds)


def kaldi(samples: np.ndarray, config: FeatureConfig) -> np.ndarray:
    knf = pytest.importorskip("kaldi_native_fbank", reason="kaldi-native-fbank is not installed")
    options = knf.FbankOptions() if config.kind == "logmel" else knf.MfccOptions()
    options.frame_opts.samp_freq = config.sample_rate
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = config.size if config.kind == "logmel" else config.mel_bins
    if config.kind == "mfcc":
        options.num_ceps, options.use_energy, options.cepstral_lifter = config.size, False, config.lifter
    reader = knf.OnlineFbank(options) if config.kind == "logmel" else knf.OnlineMfcc(options)
    reader.accept_waveform(config.sample_rate, (samples * 32768).tolist())
    reader.input_finished()
    return np.stack([reader.get_frame(i) for i in range(reader.num_frames_ready)])


@pytest.mark.parametrize(
    "config",
    [
        LOGMEL,
        FeatureConfig(size=40),
        FeatureConfig(size=23, sample_rate=8000),
        MFCC,
        FeatureConfig(kind="mfcc", size=13, mel_bins=23),
        FeatureConfig(kind="mfcc", size=13, mel_bins=23, lifter=0),
        FeatureConfig(kind="mfcc", size=13, mel_bins=23, lifter=10),
    ],
    ids=["80 bins", "40 bins", "8 kHz", "28 MFCC", "13 MFCC", "13 MFCC, no lifter", "13 MFCC, lifter 10"],
)
@pytest.mark.parametrize("offset", [0.0, 0.1], ids=["centred", "with an offset"])
def test_features_equal_kaldis(config, offset):
    samples = waveform() + np.float32(offset)
    ours = compute_features([samples], config)[0].numpy()
    theirs = kaldi(samples, config)
    assert ours.shape == theirs.shape
    # both are float32; values reach 25, and an MFCC is a sum of 80 of them
    assert np.abs(ours - theirs).max() < (0.01 if config.kind == "mfcc" else 2e-3)


def test_features_of_real_speech_equal_kaldis(shared):
    path = next((shared / "speech" / "audio").rglob("*.ogg"), None)
    if path is None:
        pytest.skip("../shared has no recordings")
    samples = load_audio(path, 16000)
    for config in (LOGMEL, MFCC):
        difference = np.abs(compute_features([samples], config)[0].numpy() - kaldi(samples, config))
        # in near-silent bands both lose digits when the mean is subtracted; elsewhere they agree much better
        assert difference.max() < 0.1
        assert difference.mean() < 1e-3


def test_a_waveform_gives_the_same_frames_alone_and_in_a_batch():
    samples = [waveform(s, seed) for seed, s in enumerate((0.31, 1.7, 0.02, 0.5, 3.3))]
    for config in (LOGMEL, MFCC):
        together = compute_features(samples, config)
        for one, frames in zip(samples, together, strict=True):
            torch.testing.assert_close(compute_features([one], config)[0], frames, rtol=0, atol=1e-3)


def test_a_batch_may_be_a_tensor():
    batch = torch.from_numpy(np.stack([waveform(0.5, 1), waveform(0.5, 2)]))
    frames = compute_features(batch, LOGMEL)
    assert [f.shape for f in frames] == [(48, 80), (48, 80)]
    assert frames[0].dtype == torch.float32


@pytest.mark.parametrize("extra", [0, 1, 159, 160, 161, 320])
def test_only_whole_windows_are_frames(extra):
    window, shift = frame_sizes(LOGMEL)
    assert (window, shift) == (400, 160)
    frames = compute_features([waveform(1.0)[: window + extra]], LOGMEL)[0]
    assert len(frames) == 1 + extra // shift


def test_samples_after_the_last_whole_window_are_ignored():
    config = FeatureConfig(window_ms=32.0)  # 512 samples, the size of the FFT
    samples = waveform(0.1)
    expected = compute_features([samples[:512], samples[512:1024]], config)
    actual = compute_features([samples[:671], samples[512:1024]], config)
    assert [len(frames) for frames in actual] == [1, 1]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch.equal(compute_features([samples[:671]], config)[0], expected[0])


@pytest.mark.parametrize(("rate", "samples"), [(16_000, 160), (11_025, 110), (22_050, 220)])
def test_a_shift_is_a_whole_number_of_samples(rate, samples):
    config = FeatureConfig(sample_rate=rate)
    assert frame_sizes(config)[1] == samples and seconds_of(1, config) == samples / rate
    assert seconds_of(np.array([0, 57]), config).tolist() == [0, 57 * samples / rate]


@pytest.mark.parametrize("samples", [1, 100, 399])
def test_a_recording_shorter_than_a_window_is_one_padded_frame(samples):
    short = waveform(1.0)[:samples]
    padded = np.concatenate([short, np.zeros(400 - samples, np.float32)])
    frames = compute_features([short], LOGMEL)[0]
    assert frames.shape == (1, 80)
    np.testing.assert_allclose(frames.numpy(), kaldi(padded, LOGMEL), atol=0.05)


def test_silence_is_finite():
    frames = compute_features([np.zeros(1600, np.float32)], LOGMEL)[0]
    assert torch.isfinite(frames).all()


def test_no_samples_are_refused():
    with pytest.raises(InputError, match="at least one sample"):
        compute_features([np.zeros(0, np.float32)], LOGMEL)
    assert compute_features([], LOGMEL) == []


@pytest.mark.parametrize("config", [FeatureConfig(kind="mfcc", size=81), FeatureConfig(window_ms=0.0),
                                    FeatureConfig(window_ms=10.0, shift_ms=20.0)])  # fmt: skip
@pytest.mark.parametrize("trim", [True, False])
def test_settings_that_make_no_frames_are_refused(config, trim):
    with pytest.raises(InputError, match="features"):
        compute_features([waveform()], config)
    with pytest.raises(InputError, match="features"):
        speech_features([waveform()], replace(config, trim_silence=trim))


def test_a_waveform_has_one_channel():
    for shape in ((2, 4000), ()):
        with pytest.raises(InputError, match="in one channel; got shape"):
            compute_features([np.zeros(shape, np.float32)], LOGMEL)


@pytest.mark.parametrize("config", [LOGMEL, MFCC])
def test_samples_of_any_type_give_frames_in_float32(config):
    samples = waveform()
    expected = compute_features([samples], config)[0]
    for kind in (np.float64, np.float16):
        frames = compute_features([samples.astype(np.float16).astype(kind)], config)[0]
        assert frames.dtype == torch.float32 and (frames - expected).abs().mean() < 0.5


def test_filters_are_centred_evenly_in_mel_from_20_hz_to_half_the_rate():
    low, high = (1127 * np.log1p(f / 700) for f in (20, 4000))
    expected = 700 * np.expm1(np.linspace(low, high, 25)[1:-1] / 1127)
    centres = filter_centres(23, 8000)
    assert centres.dtype == torch.float64
    np.testing.assert_allclose(centres.numpy(), expected, rtol=1e-9)


def test_frames_across_internal_blocks_equal_those_of_shorter_inputs():
    samples = waveform(4.0)
    together = compute_features([samples], LOGMEL)[0]
    for frame in (0, 254, 255, 256, 257, len(together) - 1):
        alone = compute_features([samples[160 * frame : 160 * frame + 400]], LOGMEL)[0]
        torch.testing.assert_close(alone, together[frame : frame + 1], rtol=0, atol=1e-3)


def test_without_trimming_all_frames_are_kept_of_each_waveform():
    actual = speech_features([waveform(0.5), waveform(0.3)], replace(LOGMEL, trim_silence=False))
    assert [where for _, where in actual] == [[(0, 48)], [(0, 28)]] and [len(frames) for frames, _ in actual] == [
        48,
        28,
    ]


def test_deltas_are_the_slope_of_a_line():
    line = torch.arange(10.0)[:, None] * torch.tensor([[1.0, -2.0]])
    out = add_deltas(line, 2)
    assert out.shape == (10, 6)
    torch.testing.assert_close(out[:, :2], line)
    torch.testing.assert_close(out[2:-2, 2:4], torch.tensor([[1.0, -2.0]]).expand(6, 2))
    torch.testing.assert_close(out[4:-4, 4:], torch.zeros(2, 2), atol=1e-6, rtol=0)


def test_deltas_at_the_edges_repeat_the_first_and_the_last_frame():
    x = torch.tensor([[3.0], [5.0], [4.0], [8.0]])

    def slope(x, t):
        at = [x[min(max(i, 0), len(x) - 1)] for i in range(t - 2, t + 3)]
        return (at[3] - at[1] + 2 * (at[4] - at[0])) / 10

    first = torch.stack([slope(x, t) for t in range(4)])
    second = torch.stack([slope(first, t) for t in range(4)])
    torch.testing.assert_close(add_deltas(x, 2), torch.cat([x, first, second], 1))


def test_deltas_of_one_frame_are_zero():
    out = add_deltas(torch.ones(1, 3), 2)
    assert out.tolist() == [[1.0] * 3 + [0.0] * 6]
    assert add_deltas(torch.ones(1, 3), 0).shape == (1, 3)


def test_a_window_has_at_least_two_samples_and_a_shift_at_least_one():
    smallest = FeatureConfig(sample_rate=1000, window_ms=2.0, shift_ms=1.0)
    assert frame_sizes(smallest) == (2, 1)
    check_settings(smallest)
    for fields in ({"window_ms": 1.0}, {"shift_ms": 0.4}):
        with pytest.raises(InputError, match="give at least 2 and 1"):
            check_settings(replace(smallest, **fields))
    check_settings(FeatureConfig(kind="mfcc", size=23, mel_bins=23))
    with pytest.raises(InputError):
        check_settings(FeatureConfig(kind="mfcc", size=24, mel_bins=23))
