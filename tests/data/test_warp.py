"""Warped frames are those of a voice whose frequencies are all higher or lower; only training hears them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_corpora import make_archive, make_speech, write_audio

from las_fast.config import AugmentConfig, Config, DataConfig, FeatureConfig, check
from las_fast.data.augment import Augment
from las_fast.data.batch import make_loader
from las_fast.data.dataset import load_dataset
from las_fast.data.features import cepstra, compute_features, filter_centres
from las_fast.data.layouts import open_corpus
from las_fast.data.warp import BOUNDARY, warp_frequencies
from las_fast.errors import InputError
from las_fast.text import Vocabulary

CONFIG, RATE = FeatureConfig(), 16000
PLAIN = AugmentConfig(time_masks=0, frequency_masks=0)


def tone(hertz: float) -> torch.Tensor:
    """Log-mel frames of a second of a sine."""
    return compute_features([np.sin(2 * np.pi * hertz / RATE * np.arange(RATE)).astype(np.float32)], CONFIG)[0]


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.1, 1.2])
@pytest.mark.parametrize("hertz", [300, 1000, 2500, 3900])
def test_a_warped_tone_peaks_where_the_tone_of_that_frequency_does(hertz, factor):
    warped = warp_frequencies(tone(hertz), factor, CONFIG)
    assert abs(int(warped.mean(0).argmax()) - int(tone(hertz * factor).mean(0).argmax())) <= 1


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.0, 1.1, 1.5])
def test_the_map_is_a_factor_up_to_the_boundary_and_then_a_line_to_half_the_rate(factor):
    centres = filter_centres(80, RATE).numpy()
    position = torch.arange(80.0, dtype=torch.float64)[None]  # a frame that says where its energy came from
    sources = warp_frequencies(position.float(), factor, CONFIG)[0].numpy()
    old = np.interp(sources, position[0].numpy(), centres)
    knee = BOUNDARY * RATE / 2 * min(factor, 1.0)
    slope = (RATE / 2 - knee / factor) / (RATE / 2 - knee)
    expected = np.where(centres <= knee, centres / factor, RATE / 2 - slope * (RATE / 2 - centres))
    np.testing.assert_allclose(old, expected.clip(centres[0], centres[-1]), rtol=5e-3)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        FeatureConfig(kind="mfcc", size=13, mel_bins=23),
        FeatureConfig(kind="mfcc", size=28, mel_bins=40, lifter=0),
    ],
)
def test_a_factor_of_one_changes_nothing(config):
    frames = torch.randn(7, config.size)
    torch.testing.assert_close(warp_frequencies(frames, 1.0, config), frames, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lifter", [0.0, 22.0])
def test_mfcc_are_warped_as_the_log_mel_frames_that_they_come_from(lifter):
    mfcc = FeatureConfig(kind="mfcc", size=80, mel_bins=80, lifter=lifter)  # nothing is lost in the transform
    frames = compute_features([make_speech(0.5)], CONFIG)[0]
    expected = cepstra(warp_frequencies(frames, 1.13, CONFIG), mfcc)
    torch.testing.assert_close(warp_frequencies(cepstra(frames, mfcc), 1.13, mfcc), expected, atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize("lifter", [0.0, 22.0])
def test_truncated_mfcc_are_warped_as_the_smooth_spectrum_that_they_describe(lifter):
    mfcc = FeatureConfig(kind="mfcc", size=13, mel_bins=40, lifter=lifter)
    logmel = FeatureConfig(size=40)
    peak = torch.exp(-0.5 * ((torch.arange(40.0) - 15) / 5) ** 2)[None]  # smooth: the first 13 cepstra describe it
    expected = cepstra(warp_frequencies(peak, 0.9, logmel), mfcc)
    torch.testing.assert_close(
        warp_frequencies(cepstra(peak, mfcc), 0.9, mfcc), expected, atol=0.01 + 0.004 * lifter, rtol=0
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warp")
    for k in range(4):
        write_audio(folder / f"{k}.wav", make_speech(1.0, seed=k))
    (folder / "manifest.tsv").write_text(
        "id\tpath\ttranscript\tsplit\n" + "".join(f"{k}\t{k}.wav\tWORD\ttrain\n" for k in range(4))
    )
    corpus = open_corpus(folder / "manifest.tsv")
    options = {"features": CONFIG, "data": DataConfig(cache=str(folder)), "need_text": True, "progress": False}
    return load_dataset(corpus, ("train",), **options)


def features_of(dataset, config: AugmentConfig, epoch: int = 0, seed: int = 1) -> list[torch.Tensor]:
    loader = make_loader(
        dataset, [[0, 1], [2, 3]], Vocabulary(), augment=Augment(config), seed=seed, epoch=epoch, workers=0
    )
    return [x[:n] for batch in loader for x, n in zip(batch.features, batch.feature_lengths, strict=True)]


def same(ours: list[torch.Tensor], others: list[torch.Tensor]) -> list[bool]:
    return [x.shape == y.shape and torch.allclose(x, y, atol=1e-4) for x, y in zip(ours, others, strict=True)]


def test_every_utterance_is_warped_anew_in_every_epoch_and_with_every_seed(dataset):
    plain, warp = features_of(dataset, PLAIN), replace(PLAIN, warp=0.2)
    first = features_of(dataset, warp)
    assert same(first, features_of(dataset, warp)) == 4 * [True]
    for others in (plain, features_of(dataset, warp, epoch=1), features_of(dataset, warp, seed=2)):
        assert same(first, others) == 4 * [False]


def test_a_warped_utterance_is_normalised_after_the_warp(dataset):
    for frames in features_of(dataset, replace(PLAIN, warp=0.2)):
        torch.testing.assert_close(frames.mean(0), torch.zeros(80), atol=1e-4, rtol=0)
        torch.testing.assert_close(frames.std(0, correction=0), torch.ones(80), atol=1e-3, rtol=0)


def test_warping_waits_for_the_start_epoch(dataset):
    late = replace(PLAIN, warp=0.2, start_epoch=1.0)
    assert same(features_of(dataset, late), features_of(dataset, PLAIN)) == 4 * [True]
    assert same(features_of(dataset, late, epoch=1), features_of(dataset, PLAIN, epoch=1)) == 4 * [False]


def test_degraded_utterances_are_warped_too(dataset):
    band = replace(PLAIN, band_limit=1.0)
    assert same(features_of(dataset, band), features_of(dataset, replace(band, warp=0.2))) == 4 * [False]


def test_the_other_random_choices_stay_the_same_with_a_warp(dataset):
    speed = replace(PLAIN, speed=0.2)
    lengths = [[len(x) for x in features_of(dataset, config)] for config in (speed, replace(speed, warp=0.2))]
    assert lengths[0] == lengths[1]


def test_mfcc_cannot_be_warped_without_the_number_of_their_filters():
    config = Config(features=FeatureConfig(kind="mfcc", size=28, mel_bins=23), augment=AugmentConfig(warp=0.1))
    with pytest.raises(
        InputError, match=r"augment.warp needs features.mel_bins \(23\) of at least features.size \(28\)"
    ):
        check(config)
    for changed in ({"kind": "logmel"}, {"mel_bins": 28}):
        check(replace(config, features=replace(config.features, **changed)))
    check(replace(config, augment=AugmentConfig()))


@pytest.mark.parametrize("lifter", [1e-310, 0.5])
def test_a_lifter_is_0_or_at_least_1(lifter):
    with pytest.raises(InputError, match="features.lifter must be 0 for none, or at least 1; got"):
        check(Config(features=FeatureConfig(lifter=lifter)))


def test_archives_of_mfcc_are_warped(tmp_path):
    config = FeatureConfig(kind="mfcc", size=13, mel_bins=23, deltas=1)
    corpus = open_corpus(make_archive(tmp_path, "S22"))
    options = {"features": config, "data": DataConfig(cache=str(tmp_path)), "need_text": True, "progress": False}
    dataset = load_dataset(corpus, ("train",), **options)
    batches = [[0, 1]]
    plain, warped = (
        next(iter(make_loader(dataset, batches, Vocabulary(), augment=Augment(setting), seed=1, epoch=0, workers=0)))
        for setting in (PLAIN, replace(PLAIN, warp=0.2))
    )
    assert warped.features.shape == plain.features.shape
    assert not torch.allclose(warped.features, plain.features, atol=1e-2)
