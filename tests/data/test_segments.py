"""Recordings are cut into segments of speech, independently of the sizes of their blocks."""

import numpy as np
import pytest
import torch
from tiny_corpora import RATE, make_speech

from las_fast.config import FeatureConfig
from las_fast.data.features import add_deltas, compute_features, speech_features
from las_fast.data.normalisation import Statistics, model_input, normalise
from las_fast.data.segments import _parts, chunks, log_mel, segments
from las_fast.data.silence import band_energy, find_speech

CONFIG = FeatureConfig(kind="logmel", size=23)


def blocks(samples, size):
    return (samples[i : i + size] for i in range(0, len(samples), size))


def hiss(seconds, seed=9):
    return 1e-3 * np.random.default_rng(seed).normal(size=int(seconds * RATE)).astype(np.float32)


def joined(*parts):
    return np.concatenate(parts).astype(np.float32)


@pytest.mark.parametrize("seconds", [0.001, 0.024, 0.025, 3.0, 20.02, 20.025, 20.035, 41.0])
@pytest.mark.parametrize("size", [160, 16_000, 320_400, 10**9])
def test_frames_computed_in_blocks_equal_frames_computed_at_once(seconds, size):
    samples = make_speech(seconds)
    if not len(samples):
        samples = make_speech(0.01)[:16]
    frames = torch.cat(list(log_mel(blocks(samples, size), CONFIG)))
    torch.testing.assert_close(frames, compute_features([samples], CONFIG)[0], rtol=1e-3, atol=1e-3)


def test_no_blocks_give_no_frames():
    assert list(log_mel([], CONFIG)) == []


def test_frames_come_as_soon_as_there_are_twenty_seconds():
    taken = []
    frames = log_mel((taken.append(len(block)) or block for block in blocks(hiss(45), 400)), CONFIG)
    assert len(next(frames)) == 2001 and sum(taken) == 20 * RATE + 400
    assert len(next(frames)) == 2002 and sum(taken) == 40 * RATE + 800


@pytest.mark.parametrize("seconds", [19.99, 20.0, 20.01, 20.1, 20.5, 39.9, 61.0, 130.0])
def test_chunks_are_short_enough_and_nothing_is_lost(seconds):
    frames = torch.randn(int(100 * seconds), 23)
    actual = list(chunks([frames], CONFIG))
    assert torch.equal(torch.cat([chunk for _, chunk in actual]), frames)
    assert [first for first, _ in actual] == np.cumsum([0, *(len(chunk) for _, chunk in actual[:-1])]).tolist()
    assert all(10 <= len(chunk) <= 2000 for _, chunk in actual) and len(actual) >= seconds / 20
    assert len(actual) == 1 or seconds > 20


def test_chunks_do_not_depend_on_block_sizes():
    frames = torch.randn(7000, 23)
    whole = [first for first, _ in chunks([frames], CONFIG)]
    for size in (1, 999, 2001):
        assert [first for first, _ in chunks(frames.split(size), CONFIG)] == whole


@pytest.mark.parametrize("at", [12.0, 17.3])
def test_a_chunk_ends_in_the_middle_of_a_pause(at):
    frames = torch.zeros(3000, 23)
    frames[round(100 * at) - 12 : round(100 * at) + 12] = -9
    assert [first / 100 for first, _ in chunks([frames], CONFIG)] == [0, pytest.approx(at, abs=0.02)]


def with_dips(length: int, *places: int, depth: float = 9.0, level: float = 0.0):
    frames = torch.full((length, 23), level)
    for place in places:
        frames[place - 10 : place + 10] -= depth
    return frames


@pytest.mark.parametrize(("length", "dip", "cut"), [
    (5000, 1460, 1460), (5000, 1000, 1000), (5000, 995, 1000), (5000, 2000, 2000), (5000, 2005, 2000),
    (2020, 2000, 2000), (2010, 1990, 1990), (2010, 1995, 1990), (2001, 1981, 1981), (2001, 1000, 1000),
])  # fmt: skip
def test_a_cut_is_in_the_second_half_of_a_chunk_and_leaves_no_tiny_rest(length, dip, cut):
    assert [first for first, _ in chunks([with_dips(length, dip)], CONFIG)][1] == cut


def test_the_cut_is_in_the_quieter_of_two_pauses():
    frames = with_dips(5000, 1200, 1700, depth=12.0, level=21.0)
    frames[1690:1710] -= 4.0
    assert [first for first, _ in chunks([frames], CONFIG)][1] == 1700


def test_chunks_at_other_rates_have_twenty_seconds_too():
    config = FeatureConfig(size=23, sample_rate=11_025)  # 110 samples per frame
    assert [first for first, _ in chunks([with_dips(5000, 2005)], config)][1] == 2005


@pytest.mark.parametrize(("rate", "min_frames"), [(16_000, 10), (11_025, 10), (8000, 10)])
def test_a_tenth_of_a_second_of_speech_makes_a_segment(rate, min_frames):
    speech = torch.zeros(1000, dtype=torch.bool)
    speech[100 : 100 + min_frames - 1] = speech[500 : 500 + min_frames] = True
    frames, config = torch.randn(1000, 23), FeatureConfig(size=23, sample_rate=rate, trim_silence=False)
    ((times, first, segment_frames),) = _parts(frames, speech, config)
    reach = round(0.5 * rate / round(0.01 * rate))
    assert times == (500, 500 + min_frames) and first == 500 - reach
    assert torch.equal(segment_frames, frames[500 - reach : 500 + min_frames + reach])


def test_times_include_a_tenth_of_a_second_around_the_speech():
    for before, after in ((2.0, 2.0), (0.0, 2.0), (2.0, 0.0)):
        samples = joined(hiss(before), make_speech(3), hiss(after, seed=8))
        frames = compute_features([samples], CONFIG)[0]
        places = find_speech(band_energy(frames, CONFIG), CONFIG).nonzero()[:, 0].tolist()
        (segment,) = segments(blocks(samples, 4000), CONFIG)
        assert segment.start == pytest.approx(max(0.0, places[0] / 100 - 0.1))
        assert segment.end == pytest.approx(min(places[-1] / 100 + 0.11, len(frames) / 100))


def test_segments_cover_the_speech():
    parts = [hiss(8), make_speech(4), hiss(9), make_speech(3, seed=1), hiss(25), make_speech(2, seed=2)]
    samples, at = joined(*parts), np.cumsum([0, *(len(part) / RATE for part in parts)])
    actual = list(segments(blocks(samples, 5000), CONFIG))
    assert len(actual) == 3
    for segment, start, end in zip(actual, at[1::2], at[2::2], strict=True):
        assert segment.start == pytest.approx(start, abs=0.3) and segment.end == pytest.approx(end, abs=0.4)
        assert len(segment.frames) == pytest.approx(100 * (end - start) + 100, abs=60)


@pytest.mark.parametrize("rate", [11_025, 16_000, 22_050])
def test_times_do_not_drift_and_stay_within_the_recording(rate):
    speech = [make_speech(3, rate=rate, seed=seed) for seed in (1, 2)]
    samples = np.concatenate([speech[0], np.zeros(120 * rate, np.float32), speech[1]])
    first, last = segments(blocks(samples, rate), FeatureConfig(size=23, sample_rate=rate))
    assert last.start == pytest.approx(123, abs=0.3) and 125.7 < last.end <= 126.01
    assert 0 <= first.start < 0.3


def test_segments_of_continuous_speech_do_not_overlap():
    actual = list(segments([make_speech(50)], CONFIG))
    assert len(actual) > 2 and all(a.end <= b.start for a, b in zip(actual, actual[1:], strict=False))


def test_a_short_pause_ends_no_segment():
    for pause, count in ((0.6, 1), (2.0, 2)):
        assert len(list(segments([joined(make_speech(3), hiss(pause), make_speech(3))], CONFIG))) == count


def test_segments_do_not_depend_on_blocks():
    samples = joined(*(part for k in range(6) for part in (make_speech(6, seed=k), hiss(1.5))))
    whole = list(segments([samples], CONFIG))
    for size in (777, 48_000):
        actual = list(segments(blocks(samples, size), CONFIG))
        assert [(s.start, s.end) for s in actual] == [(s.start, s.end) for s in whole]
        for a, b in zip(actual, whole, strict=True):
            inputs = (model_input(one.frames, CONFIG) for one in (a, b))
            torch.testing.assert_close(*inputs, rtol=1e-2, atol=1e-2)


def test_a_segment_keeps_no_more_memory_than_its_frames():
    samples = joined(hiss(8.0), make_speech(1.0), hiss(8.0))
    for config in (CONFIG, FeatureConfig(kind="mfcc", size=13, mel_bins=40)):
        (segment,) = segments([samples], config)
        assert segment.frames.untyped_storage().nbytes() == 4 * segment.frames.numel()


@pytest.mark.parametrize(
    "samples", [np.zeros(RATE), hiss(5), 0.3 + hiss(5), np.full(300, 0.5)], ids=["zeros", "noise", "offset", "click"]
)
def test_noise_has_no_segments(samples):
    assert list(segments([samples.astype(np.float32)], CONFIG)) == []


@pytest.mark.parametrize("deltas", [0, 2])
@pytest.mark.parametrize("normalisation", ["utterance", "global", "none"])
@pytest.mark.parametrize("kind", [{"kind": "logmel", "size": 23}, {"kind": "mfcc", "size": 13, "mel_bins": 40}])
def test_a_short_recording_has_the_same_frames_as_in_training(deltas, normalisation, kind):
    config = FeatureConfig(deltas=deltas, normalisation=normalisation, **kind)
    statistics = Statistics(torch.randn(config.size), torch.rand(config.size) + 1)
    samples = joined(hiss(0.4), make_speech(3), hiss(0.6))
    (segment,) = segments(blocks(samples, 4000), config)
    frames = add_deltas(normalise(speech_features([samples], config)[0][0], config, statistics), deltas)
    torch.testing.assert_close(model_input(segment.frames, config, statistics), frames, rtol=1e-3, atol=1e-3)


def test_without_trimming_silence_keeps_its_level():
    samples = joined(np.zeros(RATE // 2), make_speech(3), np.zeros(RATE // 2))
    lowest = [
        next(segments([samples], FeatureConfig(size=23, normalisation="none", trim_silence=trim))).frames.min()
        for trim in (False, True)
    ]
    assert lowest[0] == pytest.approx(np.log(2**-23), abs=1e-3) and lowest[1] > lowest[0] + 5
