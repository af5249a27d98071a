"""Finding speech in silence and noise, and trimming silence."""

import numpy as np
import pytest
import torch
from tiny_corpora import RATE, make_speech

from las_fast.config import FeatureConfig
from las_fast.data.features import compute_features, speech_features
from las_fast.data.normalisation import normalise
from las_fast.data.silence import (
    MARGIN,
    band_energy,
    find_speech,
    frames_in,
    has_usual_silence,
    level_silence,
    near_speech,
    noise_floor,
    trim_silence,
    true_runs,
)

CONFIG = FeatureConfig()
SPEECH = make_speech(2.0)


def log_mel(samples, config=CONFIG):
    return compute_features([np.asarray(samples, np.float32)], config)[0]


def speech_in(samples):
    return find_speech(band_energy(log_mel(samples), CONFIG), CONFIG)


def noise(seconds, level, seed=0):
    return level * np.random.default_rng(seed).normal(size=int(seconds * RATE))


def padded(before, after):
    return np.concatenate([before, SPEECH, after])


@pytest.mark.parametrize("level", [0.0, 2e-4, 2e-3])
@pytest.mark.parametrize("seconds", [0.5, 4.0, 60.0])
def test_speech_is_located(level, seconds):
    speech = speech_in(padded(noise(seconds, level), noise(seconds, level, 1)))
    actual = speech.nonzero()[:, 0]
    assert actual[0] == pytest.approx(100 * seconds, abs=20) and actual[-1] == pytest.approx(
        100 * seconds + 200, abs=20
    )


@pytest.mark.parametrize("db", [-60, -40, -20])
@pytest.mark.parametrize("kind", ["white", "tone", "hum", "zeros", "offset"])
def test_steady_sound_has_no_speech(kind, db):
    t = np.arange(5 * RATE) / RATE
    sounds = {
        "white": np.random.default_rng(3).normal(size=len(t)),
        "tone": np.sin(2 * np.pi * 1000 * t),
        "hum": sum(np.sin(2 * np.pi * 50 * k * t) / k for k in range(1, 20)),
        "zeros": np.zeros(len(t)),
        "offset": np.ones(len(t)),
    }
    assert not speech_in(10 ** (db / 20) * sounds[kind]).any()


@pytest.mark.parametrize("seconds", [0.01, 0.025, 0.03, 0.1])
def test_recordings_of_a_few_frames_have_a_mask_of_their_length(seconds):
    frames = log_mel(SPEECH[: int(seconds * RATE)])
    assert speech_in(SPEECH[: int(seconds * RATE)]).shape == (len(frames),)
    kept, where = trim_silence(frames, CONFIG)
    assert len(kept) == sum(end - start for start, end in where) >= 1


def test_a_constant_offset_does_not_change_the_speech_found():
    speech, with_offset = (speech_in(SPEECH + offset) for offset in (0.0, 0.3))
    assert (speech == with_offset).float().mean() > 0.99


def test_a_louder_recording_has_the_same_speech():
    quiet, loud = (speech_in(SPEECH * gain) for gain in (0.05, 2.0))
    assert (quiet == loud).float().mean() > 0.99


def test_only_the_voice_band_counts_as_energy():
    t = np.arange(RATE) / RATE
    low, inside, high = (band_energy(log_mel(0.1 * np.sin(2 * np.pi * f * t)), CONFIG).mean() for f in (60, 1000, 7000))
    assert inside > low + 20 and inside > high + 20


def test_frames_near_speech_are_kept_and_no_others():
    speech = torch.zeros(200, dtype=torch.bool)
    speech[[60, 170]] = True
    reach = round(100 * MARGIN)
    expected = [(60 - reach, 61 + reach), (170 - reach, 200)]
    assert true_runs(near_speech(speech, CONFIG)) == expected
    assert true_runs(near_speech(speech, CONFIG, 1.5)) == [(0, 200)]


@pytest.mark.parametrize(("rate", "frames"), [(16_000, 2000), (11_025, 2005), (22_050, 2005)])
def test_seconds_are_converted_to_frames_of_whole_samples(rate, frames):
    config = FeatureConfig(sample_rate=rate)
    assert frames_in(20.0, config) == frames
    assert frames_in(0.001, config) == 1


ONE_BIN = FeatureConfig(size=1, sample_rate=96_000)  # all bins are above the voice band, so all of them count


def test_energy_is_in_decibels_averaged_over_two_frames_on_either_side():
    frames = torch.zeros(11, 1)
    frames[5] = 1.0
    expected = torch.zeros(11)
    expected[3:8] = 10 / np.log(10) / 5
    torch.testing.assert_close(band_energy(frames, ONE_BIN), expected)
    torch.testing.assert_close(band_energy(torch.full((4, 1), 2.0), ONE_BIN), torch.full((4,), 20 / np.log(10)))


def test_energy_is_the_sum_of_the_bins_from_150_to_4000_hz():
    low, high = (1127 * np.log1p(f / 700) for f in (20, 8000))
    centres = 700 * np.expm1(np.linspace(low, high, 82)[1:-1] / 1127)
    inside = torch.from_numpy((centres > 150) & (centres < 4000))
    frames = torch.where(inside, 1.0, 9.0).expand(3, -1)
    expected = 10 * np.log10(np.e * int(inside.sum()))
    torch.testing.assert_close(band_energy(frames, CONFIG), torch.full((3,), expected, dtype=torch.float32))


@pytest.mark.parametrize("count", [1, 10, 25, 26, 777])
def test_the_noise_floor_of_a_steady_sound_is_its_energy(count):
    assert noise_floor(torch.full((count,), 7.0), CONFIG).tolist() == pytest.approx([7.0] * count)


def test_the_noise_floor_is_a_low_percentile_of_nearby_quiet_frames():
    rising = torch.arange(25.0)
    assert noise_floor(rising, CONFIG).tolist() == pytest.approx([4.8] * 25)
    both = torch.cat([rising, 100 + rising.flip(0)])
    assert noise_floor(both, CONFIG).tolist() == pytest.approx([4.8] * 25 + [84.8] * 25)
    assert noise_floor(both[:26], CONFIG).tolist() == pytest.approx([4.8] * 25 + [4.8 + 0.8 * 119.2])


def test_the_noise_floor_follows_three_seconds_on_either_side():
    energy = torch.where(torch.arange(60 * 25) < 30 * 25, 0.0, 100.0)
    floor = noise_floor(energy, CONFIG)
    assert floor[::25].tolist() == pytest.approx([0.0] * 32 + [60.0] + [100.0] * 27)
    assert floor.shape == energy.shape and (floor.view(60, 25) == floor[::25, None]).all()


@pytest.mark.parametrize(("frames", "height", "actual"), [(4, 60.0, 0), (5, 60.0, 5), (5, 4.0, 0), (5, 4.5, 5)])
def test_five_frames_4_db_above_the_noise_floor_are_speech(frames, height, actual):
    energy = torch.zeros(1000)
    energy[500 : 500 + frames] = height
    speech = find_speech(energy, CONFIG)
    assert speech.dtype == torch.bool and speech.sum() == speech[500 : 500 + frames].sum() == actual


def test_speech_is_at_most_50_db_below_its_level():
    energy = torch.zeros(2000)
    energy[500:600], energy[700:720], energy[800:820] = 60.0, 10.0, 10.5
    assert true_runs(find_speech(energy, CONFIG)) == [(500, 600), (800, 820)]


def test_true_runs_are_the_runs_of_true_in_a_mask():
    assert true_runs(torch.tensor([True, False, True, True])) == [(0, 1), (2, 4)]
    assert true_runs(torch.tensor([False, True, False])) == [(1, 2)]
    assert true_runs(torch.zeros(3, dtype=torch.bool)) == []


@pytest.mark.parametrize(("depth", "frames", "is_usual"), [(70.5, 4, True), (70.5, 5, False), (70.0, 50, True)])
def test_five_frames_more_than_70_db_below_speech_are_not_usual(depth, frames, is_usual):
    speech = torch.arange(300) < 250
    energy = torch.where(speech, 100.0, 60.0)
    energy[300 - frames :] = 100.0 - depth
    assert has_usual_silence(energy, speech, near_speech(speech, CONFIG), CONFIG) is is_usual


@pytest.mark.parametrize(("silent", "is_usual"), [(39, True), (40, True), (41, False)])
def test_silence_of_up_to_40_percent_is_usual(silent, is_usual):
    speech = torch.zeros(100, dtype=torch.bool)
    speech[: 100 - silent - round(100 * MARGIN)] = True
    frames = torch.where(speech[:, None], 9.0, 0.0).expand(-1, 23)
    assert has_usual_silence(band_energy(frames, CONFIG), speech, near_speech(speech, CONFIG), CONFIG) == is_usual


@pytest.mark.parametrize(("zeros", "is_usual"), [(0, True), (2, True), (20, False)])
def test_digital_zeros_are_not_usual(zeros, is_usual):
    speech = torch.arange(300) < 280
    frames = torch.where(speech[:, None], 9.0, 0.0).repeat(1, 23)
    frames[len(frames) - zeros :] = -15.9
    assert has_usual_silence(band_energy(frames, CONFIG), speech, near_speech(speech, CONFIG), CONFIG) == is_usual


def test_silence_is_raised_to_the_quietest_speech_and_speech_stays():
    frames = torch.tensor([[0.0, 9.0], [5.0, 6.0], [7.0, 4.0]])
    speech = torch.tensor([False, True, True])
    assert level_silence(frames, speech).tolist() == [[5.0, 9.0], [5.0, 6.0], [7.0, 4.0]]
    assert level_silence(frames, torch.zeros(3, dtype=torch.bool)) is frames


def normalised_speech(samples, start, **settings):
    """The normalised frames of SPEECH, which starts at `start` seconds of the samples."""
    config = FeatureConfig(**settings)
    ((frames, where),) = speech_features([samples.astype(np.float32)], config)
    places = torch.cat([torch.arange(first, last) for first, last in where])
    inside = (places >= 100 * start) & (places < 100 * start + 195)
    return normalise(frames, config)[inside]


@pytest.mark.parametrize("settings", [{}, {"kind": "mfcc", "size": 13, "mel_bins": 40}])
@pytest.mark.parametrize(("seconds", "level"), [(0.5, 0.0), (4.0, 0.0), (4.0, 2e-4)])
def test_surrounding_silence_hardly_changes_the_frames_of_speech(settings, seconds, level):
    bare = normalised_speech(padded(noise(0.4, 1e-3), noise(0.4, 1e-3, 1)), 0.4, **settings)
    quiet = padded(noise(seconds, level), noise(seconds, level, 1))
    apart, untrimmed = (
        float((normalised_speech(quiet, seconds, trim_silence=trim, **settings) - bare).abs().mean())
        for trim in (True, False)
    )
    assert untrimmed > 1.5 * apart


def test_without_trimming_all_frames_are_kept():
    samples = padded(np.zeros(RATE), np.zeros(RATE)).astype(np.float32)
    ((frames, where),) = speech_features([samples], FeatureConfig(trim_silence=False))
    assert where == [(0, len(frames))] and torch.equal(frames, log_mel(samples))


def test_the_runs_of_kept_frames_are_returned():
    samples = padded(np.zeros(4 * RATE), np.zeros(4 * RATE)).astype(np.float32)
    ((frames, where),) = speech_features([samples], CONFIG)
    whole = log_mel(samples)
    kept = torch.cat([whole[start:end] for start, end in where])
    assert len(where) == 1 and 340 < where[0][0] < 370 and len(kept) == len(frames)
    assert torch.equal(torch.maximum(kept, whole[speech_in(samples)].amin(0)), frames)


def test_mfcc_are_computed_from_the_trimmed_log_mel():
    settings = {"kind": "mfcc", "size": 13, "mel_bins": 40}
    ((frames, _),) = speech_features([SPEECH], FeatureConfig(**settings))
    untrimmed = compute_features([SPEECH], FeatureConfig(**settings))[0]
    assert frames.shape[1] == 13 and len(frames) <= len(untrimmed)
    ((same, _),) = speech_features([noise(1, 0.1).astype(np.float32)], FeatureConfig(**settings))
    torch.testing.assert_close(same, compute_features([noise(1, 0.1).astype(np.float32)], FeatureConfig(**settings))[0],
                               rtol=1e-4, atol=1e-4)  # fmt: skip
