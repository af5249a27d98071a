"""Degraded log-mel frames are close to those of a degraded waveform, and only what is asked for is changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_corpora import make_archive, make_speech, make_waveform, write_audio

from benchmarks import robustness
from las_fast.config import AugmentConfig, Config, DataConfig, FeatureConfig, check
from las_fast.data import degrade
from las_fast.data.augment import Augment, silence_frames
from las_fast.data.batch import make_loader
from las_fast.data.batch_plan import BucketBatches, plan_curriculum
from las_fast.data.dataset import load_dataset
from las_fast.data.degrade import KINDS, Degrade, add_room, limit_band, noise_bank, wave_power
from las_fast.data.features import compute_features, speech_features
from las_fast.data.layouts import open_corpus
from las_fast.data.normalisation import normalise
from las_fast.data.silence import band_energy, find_speech, trim_silence
from las_fast.errors import InputError
from las_fast.text import Vocabulary

CONFIG, RATE = FeatureConfig(), 16000
BANK = noise_bank(CONFIG)
WAVES = [make_speech(2.5, seed=seed) for seed in range(4)]
ALL = AugmentConfig(silence=1.0, room=1.0, noise=1.0, babble=1.0, band_limit=1.0)
QUIET = AugmentConfig(time_masks=0, frequency_masks=0)


def logmel(samples) -> torch.Tensor:
    return compute_features([np.asarray(samples, np.float32)], CONFIG)[0]


def as_decoded(samples) -> torch.Tensor:
    """The features that the model gets from samples: silence trimmed and normalised."""
    return normalise(speech_features([np.asarray(samples, np.float32)], CONFIG)[0][0], CONFIG)


def error(approximate: torch.Tensor, changed, clean) -> float:
    """Mean difference of approximate raw frames from a changed waveform, relative to that of the clean waveform."""
    truth = as_decoded(changed)
    frames = len(truth)
    ours = normalise(trim_silence(approximate[:frames], CONFIG)[0], CONFIG)
    return float((ours - truth).abs().mean() / (as_decoded(clean)[:frames] - truth).abs().mean())


def roughness(frames: torch.Tensor) -> float:
    return float(frames.diff(dim=0).abs().mean())


def degrader(others=(), **settings) -> Degrade:
    frames = [logmel(wave) for wave in others]
    return Degrade(AugmentConfig(**settings), CONFIG, lambda i: frames[i], len(frames))


# Closeness to the waveform


@pytest.mark.parametrize("snr", [20.0, 5.0])
@pytest.mark.parametrize("exponent", [0.0, 2.0])
def test_powers_of_speech_and_noise_add(snr, exponent):
    for seed, wave in enumerate(WAVES):
        noise = robustness.coloured_noise(len(wave), RATE, exponent, np.random.default_rng(seed))
        noise *= np.sqrt(robustness.speech_power(wave, RATE)) * 10 ** (-snr / 20)
        added = (logmel(wave).exp() + logmel(noise).exp()).log()
        assert error(added, wave + noise, wave) < 0.45


def test_noise_of_the_bank_has_the_level_spectrum_and_texture_of_noise_at_that_snr():
    wave, generator = WAVES[0], np.random.default_rng(5)
    power, spectra, textures = robustness.speech_power(wave, RATE), [], []
    degraded = degrader(snr_low=10.0, snr_high=10.0)
    level = wave_power(logmel(wave)[find_speech(band_energy(logmel(wave), CONFIG), CONFIG)].exp(), BANK)
    for _ in range(8):
        noise = np.sqrt(power / 10) * generator.standard_normal(len(wave))
        made = degraded._at_snr(degraded._noise(len(logmel(wave)), generator) * BANK.white, level, generator)
        for frames in (logmel(noise), made.log()):
            spectra.append(frames.mean(0))
            textures.append(roughness(frames))
    torch.testing.assert_close(sum(spectra[1::2]) / 8, sum(spectra[::2]) / 8, atol=0.2, rtol=0)
    assert np.mean(textures[1::2]) == pytest.approx(np.mean(textures[::2]), rel=0.03)


def test_the_power_of_speech_is_found_from_its_frames():
    for wave in WAVES:
        speech = find_speech(band_energy(logmel(wave), CONFIG), CONFIG)
        found = wave_power(logmel(wave)[speech].exp(), BANK)
        assert 10 * np.log10(found / robustness.speech_power(wave, RATE)) == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize("snr", [0.0, 20.0])
def test_noise_is_at_the_drawn_snr(snr):
    clean = logmel(WAVES[0])
    speech = find_speech(band_energy(clean, CONFIG), CONFIG)
    for seed in range(5):
        noisy = degrader(snr_low=snr, snr_high=snr)(clean, ["noise"], np.random.default_rng(seed))
        noise = wave_power(noisy.double().exp() - clean.double().exp(), replace_dtype(BANK))
        assert 10 * np.log10(wave_power(clean[speech].exp(), BANK) / noise) == pytest.approx(snr, abs=0.2)


def replace_dtype(bank):
    return replace(bank, weights=bank.weights.double())


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_the_power_of_coloured_noise_falls_with_the_frequency_from_20_hz_on(monkeypatch, exponent):
    monkeypatch.setattr(degrade, "COLOURS", (exponent, exponent))
    monkeypatch.setattr(degrade, "BUMP_DB", 0.0)
    centres = np.array([5.0, 10.0, 20.0, 40.0, 1000.0, 8000.0])
    expected = (np.array([20.0, 20.0, 20.0, 40.0, 1000.0, 8000.0]) / 1000) ** -exponent
    np.testing.assert_allclose(degrade.draw_colour(centres, np.random.default_rng(0)), expected, rtol=1e-5)


def test_coloured_noise_has_eight_random_levels_and_lines_between_them(monkeypatch):
    monkeypatch.setattr(degrade, "COLOURS", (0.0, 0.0))
    decibels = 10 * degrade.draw_colour(np.full(15, 1000.0), np.random.default_rng(1)).log10().numpy()
    generator = np.random.default_rng(1)
    generator.uniform()
    np.testing.assert_allclose(decibels[::2], generator.normal(0, 4, 8), atol=1e-4)
    np.testing.assert_allclose(decibels[1::2], (decibels[:-2:2] + decibels[2::2]) / 2, atol=1e-4)


def test_babble_is_close_to_the_sum_of_the_waveforms(monkeypatch):
    monkeypatch.setattr(degrade, "TALKERS", (1, 1))
    # Whispered: the harmonics of two synthetic voices interfere more than those of people.
    wave, other = WAVES[0][:RATE], WAVES[1].std() * np.abs(WAVES[1]) * np.random.default_rng(0).standard_normal(40000)
    babbled = degrader([other], snr_low=5.0, snr_high=5.0)
    starts = [(seed, draw_start(len(logmel(other)), seed) * 160) for seed in range(20)]
    inside = [(seed, start) for seed, start in starts if start + len(wave) <= len(other)]
    assert len(inside) >= 3
    for seed, start in inside[:3]:
        frames = babbled(logmel(wave), ["babble"], np.random.default_rng(seed))
        part = other[start : start + len(wave)]
        gain = np.sqrt(robustness.speech_power(wave, RATE) / np.mean(part**2) * 10**-0.5)
        assert error(frames, wave + gain * part, wave) < 0.5


def draw_start(frames: int, seed: int) -> int:
    """The frame at which Degrade starts the only talker, after the draws before that."""
    generator = np.random.default_rng(seed)
    generator.integers(1, 2), generator.integers(1), generator.normal(0, degrade.TALKER_DB)
    return int(generator.integers(frames))


def test_a_room_is_as_close_as_another_room_of_the_same_size():
    for seed, wave in enumerate(WAVES):
        generator = np.random.default_rng(seed)
        true, other = (
            robustness.convolve(wave, robustness.impulse_response(RATE, 0.5, 0.0, generator)) for _ in range(2)
        )
        fluctuation = degrader()._noise(len(logmel(wave)), generator)
        made = add_room(logmel(wave).exp(), torch.full((80,), 0.5), 1.0, fluctuation, 0.01).log()
        assert error(made, true, wave) < 1.1 * error(logmel(other), true, wave)


def spread(values) -> tuple[float, float]:
    """The smallest and the largest value."""
    first, *_, last = sorted(map(float, values))
    return first, last


def test_rooms_differ_in_size_slope_and_distance():
    rooms = [degrade.draw_room(3, np.random.default_rng(seed)) for seed in range(500)]
    assert spread(t60[0] for t60, _ in rooms) == pytest.approx((0.2, 0.8), abs=0.01)  # seconds
    assert spread(t60[2] / t60[0] for t60, _ in rooms) == pytest.approx((0.4, 1.0), abs=0.01)
    assert all(t60[1] == pytest.approx(float(t60[0] + t60[2]) / 2) for t60, _ in rooms)
    direct = [-10 * np.log10(energy) for _, energy in rooms]
    assert spread(direct) == pytest.approx((-4, 8), abs=0.1)  # dB over the reverberation


def test_bands_are_those_of_telephones_or_anything_between_60_and_7500_hz():
    bands = [degrade.draw_band(np.random.default_rng(seed)) for seed in range(1000)]
    others = [band for band in bands if band != (300, 3400)]
    assert 650 <= len(others) <= 750
    assert spread(low for low, _ in others) == pytest.approx((60, 500), abs=5)
    assert spread(high for _, high in others) == pytest.approx((2500, 7500), abs=50)


def test_the_tail_of_a_room_decays_by_60_db_within_t60():
    pulse = torch.zeros(100, 2)
    pulse[10] = 1.0
    t60 = torch.tensor([0.3, 0.6])
    out = add_room(pulse, t60, 0.5, torch.ones(100, 2), 0.01)
    assert not out[:10].any()
    fall = 10 * torch.log10(out[12] / out[27])  # over 0.15 s
    torch.testing.assert_close(fall, 60 * 0.15 / t60)
    torch.testing.assert_close(out.sum(0), torch.full((2,), 1.5), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("low", "high"), [(300.0, 3400.0), (100.0, 5000.0)])
def test_a_limited_band_leaves_what_leaks_through_the_window(low, high):
    for wave in WAVES:
        limited = limit_band(logmel(wave).exp(), low, high, BANK).clamp(min=degrade.FLOOR).log()
        truth = logmel(robustness.band_pass(wave, RATE, low, high))
        away = (BANK.centres < low - 150) | (BANK.centres > high + 600)
        assert (limited - truth)[:, away].mean().abs() < 0.8 and (limited - truth)[:, away].abs().mean() < 1.5
        assert (logmel(wave) - truth)[:, away].mean() > 8
        inside = (BANK.centres > low + 150) & (BANK.centres < high - 300)
        assert (limited - truth)[:, inside].abs().mean() < 0.05


def test_flat_silence_is_what_trimming_leaves_of_zeros(monkeypatch):
    monkeypatch.setattr(degrade, "FLAT_SHARE", 1.0)
    wave = WAVES[0]
    made = degrader()(logmel(wave), (), np.random.default_rng(0), silence=(49, 49))
    zeros = np.zeros(RATE, np.float32)
    left, _ = trim_silence(logmel(np.concatenate([zeros, wave, zeros])), CONFIG)
    assert len(left) < len(logmel(wave)) + 120
    for frames in (made[:40], made[-40:]):
        assert (frames == frames[0]).all() and (left[:40] == left[0]).all()
        torch.testing.assert_close(frames, left[:40], atol=3.0, rtol=0)  # the frames of zeros are 20 lower
    torch.testing.assert_close(made[49:-49], logmel(wave), atol=1e-4, rtol=1e-5)


def test_other_silence_is_noise_far_below_the_speech(monkeypatch):
    monkeypatch.setattr(degrade, "FLAT_SHARE", 0.0)
    clean = logmel(WAVES[0])
    speech = wave_power(clean[find_speech(band_energy(clean, CONFIG), CONFIG)].exp(), BANK)
    for seed in range(20):
        made = degrader()(clean, (), np.random.default_rng(seed), silence=(60, 0))
        assert len(made) == len(clean) + 60 and torch.allclose(made[60:], clean, atol=1e-4)
        below = 10 * np.log10(speech / wave_power(made[:60].exp(), BANK))
        assert 24 < below < 76 and roughness(made[:60]) > 0.3


def test_the_level_of_a_recording_does_not_matter_to_normalised_features():
    noisy = WAVES[0] + 0.01 * np.random.default_rng(0).standard_normal(len(WAVES[0]))
    torch.testing.assert_close(as_decoded(0.1 * noisy), as_decoded(noisy), atol=2e-3, rtol=0)


# Settings and the loader


def test_every_frame_count_and_level_gives_finite_frames():
    everything = Degrade(ALL, CONFIG, lambda i: torch.full((3, 80), -15.9), 1)
    for frames in (torch.zeros(1, 80), torch.full((2, 80), -15.9), torch.full((700, 80), 25.0)):
        for seed in range(5):
            out = everything(frames, KINDS, np.random.default_rng(seed), silence=(2, 0))
            assert out.shape == (len(frames) + 2, 80) and out.isfinite().all()


def test_kinds_are_drawn_as_often_as_set_and_independently():
    drawn = Degrade(AugmentConfig(room=0.5, noise=1.0, band_limit=0.25), CONFIG, lambda i: None, 0)
    kinds = [drawn.draw(np.random.default_rng(seed)) for seed in range(1000)]
    shares = {kind: np.mean([kind in one for one in kinds]) for kind in KINDS}
    assert shares["noise"] == 1 and shares["babble"] == 0
    assert shares["room"] == pytest.approx(0.5, abs=0.05) and shares["band_limit"] == pytest.approx(0.25, abs=0.05)
    assert np.mean([{"room", "band_limit"} <= {*one} for one in kinds]) == pytest.approx(0.125, abs=0.04)


@pytest.mark.parametrize("size", [1, 13, 500])
def test_the_bank_is_finite_for_any_number_of_filters(size):
    bank = noise_bank(FeatureConfig(size=size))
    for x in (bank.powers, bank.white, bank.weights, bank.leakage):
        assert x.isfinite().all() and (x >= 0).all()
    torch.testing.assert_close(bank.powers.mean(0), torch.ones(size), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    lines = ["id\tpath\tsplit\ttranscript"]
    for i in range(12):
        write_audio(folder / f"{i}.wav", make_waveform(generator, 0.6 + 0.1 * i))
        lines.append(f"{i}\t{i}.wav\ttrain\tSOME TEXT")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return open_corpus(folder / "manifest.tsv")


@pytest.fixture(scope="module")
def dataset(corpus):
    return load_dataset(corpus, ("train",), features=CONFIG, data=DataConfig(), need_text=True, progress=False)


def load(dataset, batches, config, **options):
    options = {"seed": 1, "epoch": 0, "workers": 0} | options
    return list(make_loader(dataset, batches, Vocabulary(), augment=Augment(config), **options))


def features(batches):
    return [x[:n] for batch in batches for x, n in zip(batch.features, batch.feature_lengths.tolist(), strict=True)]


SINGLE = [[i] for i in range(12)]


@pytest.mark.parametrize("setting", degrade.SETTINGS)
def test_each_setting_changes_its_share_of_the_utterances(dataset, setting):
    for share in (0.0, 0.5, 1.0):
        config = replace(QUIET, **{setting: share})
        changed = [not torch.equal(x, dataset[i]) for e in range(2)
                   for i, x in enumerate(features(load(dataset, SINGLE, config, epoch=e)))]  # fmt: skip
        assert (4 < sum(changed) < 20) if share == 0.5 else sum(changed) == 24 * share


def test_without_these_settings_the_speed_masks_and_joins_are_those_of_before(dataset):
    plain = AugmentConfig(speed=0.2, join=0.5)
    on = replace(plain, noise=1e-12, silence=1e-12, babble=1e-12)  # on, but never drawn
    for one, other in zip(*(features(load(dataset, [[0, 1, 2], [3, 4]], c)) for c in (plain, on)), strict=True):
        assert torch.equal(one, other)


def test_degraded_batches_depend_on_seed_epoch_and_utterance_only(dataset):
    config = replace(ALL, speed=0.2)
    whole = load(dataset, [[0, 1], [2, 3], [4, 5]], config)
    (rest,) = load(dataset, [[0, 1], [2, 3], [4, 5]], config, start=2)
    assert torch.equal(rest.features, whole[2].features)
    assert torch.equal(features(load(dataset, [[5]], config))[0], features(whole)[5])
    workers = load(dataset, [[0, 1], [2, 3], [4, 5]], config, workers=2)
    assert all(torch.equal(a.features, b.features) for a, b in zip(whole, workers, strict=True))
    for options in ({"seed": 2}, {"epoch": 1}):
        other = features(load(dataset, [[5]], config, **options))[0]
        assert other.shape != features(whole)[5].shape or not torch.equal(other, features(whole)[5])


def test_rooms_and_noise_wait_for_the_start_epoch(dataset):
    config = replace(ALL, start_epoch=1.5, time_masks=0, frequency_masks=0)
    loaded = features(load(dataset, [[0], [1], [2], [3]], config, epoch=1))
    same = [len(x) == len(dataset[i]) and torch.equal(x, dataset[i]) for i, x in enumerate(loaded)]
    assert same == [True, True, False, False]


def test_batches_are_planned_with_the_added_silence(dataset):
    config = Config(data=DataConfig(frames_per_batch=400), augment=AugmentConfig(silence=0.7, speed=0.2))
    batches = plan_curriculum(dataset.frame_counts, config).batches_of(0)
    for epoch in range(3):
        for batch in load(dataset, batches.epoch(epoch), config.augment, epoch=epoch):
            assert batch.feature_lengths.tolist() == batches.lengths(epoch)[batch.indices.numpy()].tolist()
            assert batch.features.shape[0] * batch.features.shape[1] <= 400
    options = {"frames_per_batch": 400, "utterances_per_batch": 64, "seed": 1}
    still = BucketBatches(dataset.frame_counts, **options)
    longer = BucketBatches(dataset.frame_counts, **options, silence=1.0)
    assert (longer.lengths(0) > still.lengths(0)).sum() >= 10 and len(longer) == len(longer.epoch(7))


def test_silence_is_at_most_a_second_and_a_quarter_of_the_utterance_at_each_end():
    counts = np.repeat([1, 40, 4000], 500)
    added = silence_frames(counts, 1.0, seed=1, epoch=0)
    assert [added[counts == n].max() for n in (1, 40, 4000)] == [0, 10, 100] and added.min() == 0
    assert np.array_equal(silence_frames(counts[:7], 1.0, seed=1, epoch=0), added[:7])
    assert np.mean(silence_frames(counts[1000:], 0.3, seed=1, epoch=0).any(1)) == pytest.approx(0.3, abs=0.07)


def test_speed_comes_before_noise_so_that_noise_keeps_its_texture(dataset):
    config = replace(QUIET, noise=1.0, snr_low=-20.0, snr_high=-20.0)
    slow = np.mean([roughness(x) for x in features(load(dataset, SINGLE, replace(config, speed=0.4)))])
    assert slow == pytest.approx(np.mean([roughness(x) for x in features(load(dataset, SINGLE, config))]), rel=0.05)


def test_other_features_are_refused_with_advice(tmp_path, corpus):
    from las_fast import train

    with pytest.raises(
        InputError, match=r"augment.room and augment.noise: frames must be log-mel, .* got mfcc computed"
    ):
        degrade.check_logmel(AugmentConfig(room=0.1, noise=1.0), FeatureConfig(kind="mfcc", size=13), "audio")
    with pytest.raises(InputError, match="frames must be log-mel"):
        Degrade(AugmentConfig(noise=1.0), FeatureConfig(kind="mfcc", size=13), lambda i: None, 0)
    degrade.check_logmel(AugmentConfig(), FeatureConfig(kind="mfcc", size=13), "features")
    archive = make_archive(tmp_path / "archive", "F24")
    arguments = ["--config", "tiny", "--data", str(archive), "--out", str(tmp_path / "run"), "--augment.noise", "0.5"]
    with pytest.raises(InputError, match="augment.noise: frames must .* got an archive of features; leave"):
        train.main(arguments)
    assert not (tmp_path / "run").exists()


def test_the_lowest_snr_must_not_exceed_the_highest():
    check(Config(augment=AugmentConfig(snr_low=5.0, snr_high=5.0)))
    with pytest.raises(InputError, match="augment.snr_low must be at most augment.snr_high; got 9 and 5 dB"):
        check(Config(augment=AugmentConfig(snr_low=9.0, snr_high=5.0)))
