"""SpecAugment and speed: some frames always survive, and frames and bins are not swapped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from las_fast.config import AugmentConfig
from las_fast.data.augment import (
    STREAMS,
    Augment,
    change_speed,
    frame_counts_at_speed,
    join_pairs,
    random_stream,
    speed_factors,
)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


STRONG = AugmentConfig(
    time_masks=20, time_width=1000, time_share=1.0, frequency_masks=20, frequency_width=1000, frequency_share=1.0
)


@pytest.mark.parametrize("shape", [(1, 1), (1, 80), (80, 1), (2, 2), (37, 13)])
def test_masks_never_wipe_an_utterance(shape):
    for seed in range(50):
        out = Augment(STRONG)(torch.ones(shape), 0.0, generator(seed))
        assert out.shape == shape
        assert out.any()


def test_masks_together_stay_below_their_shares():
    config = AugmentConfig(
        time_masks=10, time_width=40, time_share=0.2, frequency_masks=10, frequency_width=10, frequency_share=0.5
    )
    for seed in range(50):
        out = Augment(config)(torch.ones(100, 40), 0.0, generator(seed))
        assert (out == 0).all(1).sum() <= 20
        assert (out == 0).all(0).sum() <= 20


def test_a_time_mask_covers_frames_and_a_frequency_mask_bins():
    time = Augment(AugmentConfig(time_masks=2, frequency_masks=0))
    frequency = Augment(AugmentConfig(time_masks=0, frequency_masks=2))
    for seed in range(20):
        by_frame = time(torch.ones(200, 40), 0.0, generator(seed)) == 0
        assert (by_frame.all(1) == by_frame.any(1)).all()
        by_bin = frequency(torch.ones(200, 40), 0.0, generator(seed)) == 0
        assert (by_bin.all(0) == by_bin.any(0)).all()
    assert by_frame.any() and by_bin.any()


def test_every_frame_and_bin_is_masked_sometimes_and_none_always():
    augment = Augment(AugmentConfig(time_masks=1, time_width=3, time_share=1.0, frequency_masks=1, frequency_width=2))
    masked = [augment(torch.ones(6, 5), 0.0, generator(seed)) == 0 for seed in range(300)]
    frames = torch.stack([one.all(1) for one in masked]).sum(0)
    bins = torch.stack([one.all(0) for one in masked]).sum(0)
    for counts in (frames, bins):
        assert counts.min() > 20 and counts.max() < 250
    widths = {int(one.all(1).sum()) for one in masked}, {int(one.all(0).sum()) for one in masked}
    assert widths == ({0, 1, 2, 3}, {0, 1, 2})


def test_masks_may_use_their_whole_share_and_leave_one_frame():
    wide = AugmentConfig(time_masks=9, time_width=99, time_share=0.5, frequency_masks=0)
    longest = max(int((Augment(wide)(torch.ones(10, 3), 0.0, generator(seed)) == 0).all(1).sum()) for seed in range(99))
    assert longest == 5
    whole = AugmentConfig(time_masks=9, time_width=99, time_share=1.0, frequency_masks=0)
    longest = max(
        int((Augment(whole)(torch.ones(10, 3), 0.0, generator(seed)) == 0).all(1).sum()) for seed in range(99)
    )
    assert longest == 9


def test_mask_defaults_to_one_block():
    assert Augment(AugmentConfig()).mask(torch.ones(30, 3), generator()).shape == (30, 3)


def test_a_frequency_mask_covers_the_same_bins_in_every_delta():
    augment = Augment(AugmentConfig(time_masks=0, frequency_masks=2, frequency_width=5))
    for seed in range(20):
        out = augment(torch.ones(30, 39), 0.0, generator(seed), blocks=3)
        first, second, third = (out == 0).all(0).view(3, 13)
        assert torch.equal(first, second) and torch.equal(first, third)


def test_masks_wait_for_their_epoch():
    augment = Augment(AugmentConfig(start_epoch=2.5))
    features = torch.ones(100, 80)
    assert augment(features, 2.4, generator()) is features
    assert (augment(features, 2.5, generator()) == 0).any()


def test_the_input_is_not_modified_and_equal_seeds_agree():
    features = torch.ones(100, 80)
    augment = Augment(AugmentConfig())
    a, b = (augment(features, 1.0, generator(3), factor=0.9) for _ in range(2))
    assert torch.equal(a, b)
    assert (features == 1).all()
    assert not torch.equal(a[:50], augment(features, 1.0, generator(4), factor=0.9)[:50])


def test_speeds_fill_their_range_and_do_not_depend_on_the_count():
    factors = speed_factors(0.2, seed=1, epoch=0, count=2000)
    assert 0.8 <= factors.min() < 0.801 and 1.199 < factors.max() <= 1.2
    assert np.array_equal(speed_factors(0.2, seed=1, epoch=0, count=5), factors[:5])
    for changed in ({"seed": 2}, {"epoch": 1}):
        assert not np.isin(speed_factors(0.2, **{"seed": 1, "epoch": 0, "count": 5} | changed), factors[:5]).any()


@pytest.mark.parametrize(("factor", "frames"), [(0.8, 125), (2.0, 50), (None, 100)])
def test_a_speed_changes_the_length(factor, frames):
    augment = Augment(AugmentConfig(time_masks=0, frequency_masks=0, speed=0.5))
    assert len(augment(torch.ones(100, 2), 0.0, generator(), factor=factor)) == frames


def test_no_two_random_streams_share_numbers():
    places = [(use, epoch, utterance) for use in STREAMS for epoch in range(5) for utterance in range(5)]
    draws = [random_stream(u, seed=1, epoch=e, utterance=i).integers(1 << 62) for u, e, i in places]
    assert len(set(draws)) == len(places)
    for use in STREAMS:
        streams = random_stream(use, seed=1, epoch=2), random_stream(use, seed=1, epoch=2, utterance=0)
        assert len({stream.integers(1 << 62) for stream in streams}) == 1
        assert random_stream(use, seed=2, epoch=2).integers(1 << 62) not in draws


def test_pairs_of_neighbours_are_joined_and_an_odd_last_one_stays():
    features = [torch.full((n, 2), float(n)) for n in range(1, 6)]
    joined, texts = join_pairs(features, ["A", "B", "C", "D", "E"])
    assert texts == ["A B", "C D", "E"]
    assert [frames[:, 0].tolist() for frames in joined] == [[1] + 2 * [2], 3 * [3] + 4 * [4], 5 * [5]]


@pytest.mark.parametrize(("frames", "factor", "left"), [(100, 0.8, 125), (100, 3.0, 33), (100, 1.5, 67), (2, 9.0, 1)])
def test_frame_counts_at_a_speed_are_rounded_and_at_least_one(frames, factor, left):
    assert frame_counts_at_speed(frames, factor) == left == len(change_speed(torch.ones(frames, 1), factor))
    assert frame_counts_at_speed(np.array([frames, 1]), factor).tolist() == [left, 1]


def test_speed_is_linear_in_time_and_keeps_bins_apart():
    line = torch.arange(100.0)[:, None] * torch.tensor([[1.0, -3.0]])
    fast = change_speed(line, 2.0)
    assert fast.shape == (50, 2)
    torch.testing.assert_close(fast[:, 1], -3 * fast[:, 0])
    torch.testing.assert_close(fast.diff(dim=0)[:, 0], torch.full((49,), 2.0))
    slow = change_speed(line, 0.8)
    torch.testing.assert_close(slow.diff(dim=0)[1:-1, 0], torch.full((122,), 0.8), atol=1e-4, rtol=0)
    assert change_speed(torch.ones(1, 2), 5.0).shape == (1, 2)
