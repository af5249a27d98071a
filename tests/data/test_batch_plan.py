"""Batches cover every utterance with little padding, and an epoch and a batch number locate a step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from streams import Race, Streams
from tiny_corpora import make_archive

from las_fast.config import AugmentConfig, Config, DataConfig, FeatureConfig, TrainingConfig
from las_fast.data.augment import Augment
from las_fast.data.batch import Batch, make_loader
from las_fast.data.batch_plan import BUCKET_RATIOS, BucketBatches, padding_share, plan_curriculum, sorted_batches
from las_fast.data.dataset import load_dataset
from las_fast.data.layouts import open_corpus
from las_fast.errors import InputError
from las_fast.system import stream_for
from las_fast.text import EOS, PAD, Vocabulary

LENGTHS = np.random.default_rng(0).integers(20, 1600, 4000)


def bucketed(lengths=LENGTHS, *, frames=20000, utterances=64, seed=1):
    return BucketBatches(lengths, frames_per_batch=frames, utterances_per_batch=utterances, seed=seed)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    corpus = open_corpus(make_archive(tmp_path_factory.mktemp("data"), "F23", utterances=11))
    return load_dataset(
        corpus,
        ("train-clean-100",),
        features=FeatureConfig(size=28, deltas=1),
        data=DataConfig(),
        need_text=True,
        progress=False,
    )


def load(dataset, batches, **options):
    options = {"augment": Augment(AugmentConfig(speed=0.1)), "seed": 1, "epoch": 0, "workers": 0} | options
    return list(make_loader(dataset, batches, Vocabulary(), **options))


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:7], np.full(100, 30), np.array([5])], ids=len)
def test_every_epoch_covers_every_utterance_once(lengths):
    batches = bucketed(lengths)
    for epoch in range(3):
        assert sorted(sum(batches.epoch(epoch), [])) == list(range(len(lengths)))


def test_batches_keep_their_budgets():
    for batch in bucketed(frames=8000, utterances=32).epoch(3):
        assert len(batch) <= 32
        assert len(batch) * LENGTHS[batch].max() <= 8000


def test_an_utterance_over_the_budget_is_a_batch_of_its_own():
    lengths = np.array([10, 500, 12, 11, 700])
    batches = bucketed(lengths, frames=100).epoch(0)
    assert [1] in batches and [4] in batches
    assert sorted(map(len, batches)) == [1, 1, 3]
    assert sorted_batches(lengths, frames_per_batch=100, utterances_per_batch=9) == [[4], [1], [2, 3, 0]]


def test_at_most_a_tenth_is_padding():
    batches = bucketed()
    assert max(batches.padding_share(epoch) for epoch in range(4)) <= 0.1
    assert padding_share([2, 4], [[0, 1]]) == 0.25
    assert padding_share([2, 4, 3], [[0, 1], [2]]) == pytest.approx(2 / 11) and padding_share([], []) == 0.0
    assert padding_share([2, 4, 3], [[0, 1], [2]], frame_multiple=3) == pytest.approx(6 / 15)


@pytest.mark.parametrize("multiple", [1, 2, 32])
def test_frames_are_padded_with_zeros_to_a_multiple(dataset, multiple):
    batches = [[0, 1], [2], [3, 4, 5]]
    for padded, plain in zip(load(dataset, batches, frame_multiple=multiple), load(dataset, batches), strict=True):
        frames, longest = padded.features.shape[1], int(plain.feature_lengths.max())
        assert frames % multiple == 0 and longest <= frames < longest + multiple
        assert torch.equal(padded.features[:, :longest], plain.features) and not padded.features[:, longest:].any()
        assert torch.equal(padded.feature_lengths, plain.feature_lengths)


@pytest.mark.parametrize("speed", [0.0, 0.1])
@pytest.mark.parametrize("count", [1, 2, 50, 4000])
def test_the_number_of_batches_is_the_same_in_every_epoch(count, speed):
    batches = BucketBatches(LENGTHS[:count], frames_per_batch=5000, utterances_per_batch=16, seed=1, speed=speed)
    for epoch in range(8):
        formed = batches.epoch(epoch)
        assert len(formed) == len(batches)
        assert sorted(sum(formed, [])) == list(range(count))


@pytest.mark.parametrize(("seed", "count", "batches"), [(3, 100, 54), (1, 200, 119)])
def test_with_speed_there_are_as_many_batches_as_in_the_largest_of_four_epochs(seed, count, batches):
    made = BucketBatches(LENGTHS[:count], frames_per_batch=3000, utterances_per_batch=4, seed=seed, speed=0.1)
    first = [len(made._cut_epoch(epoch)) for epoch in range(5)]
    assert len(made) == max(first[:4]) == batches
    assert first.index(batches) == 3 or first[4] > batches  # the fourth epoch counts, the fifth does not


def test_an_utterance_alone_in_the_largest_batch_is_not_divided():
    batches = BucketBatches([1000, *[10] * 8], frames_per_batch=100, utterances_per_batch=8, seed=1)
    batches._count = len(batches) + 3  # as if the speed of another epoch gave more batches
    made = batches.epoch(0)
    assert len(made) == len(batches) and all(made) and sorted(sum(made, [])) == list(range(9))


def test_batches_use_the_lengths_after_the_speed_change(dataset):
    augment = Augment(AugmentConfig(speed=0.3))
    batches = BucketBatches(dataset.frame_counts, frames_per_batch=200, utterances_per_batch=4, seed=5, speed=0.3)
    for epoch in range(2):
        for batch in load(dataset, batches.epoch(epoch), augment=augment, seed=5, epoch=epoch):
            assert batch.feature_lengths.tolist() == batches.lengths(epoch)[batch.indices.numpy()].tolist()
    assert (batches.lengths(0) != dataset.frame_counts).any()


def test_at_most_a_tenth_is_padding_with_speed_too():
    batches = BucketBatches(LENGTHS, frames_per_batch=20000, utterances_per_batch=64, seed=1, speed=0.1)
    assert max(batches.padding_share(epoch) for epoch in range(4)) <= 0.1


def test_batches_depend_on_seed_and_epoch_only():
    batches = bucketed()
    assert bucketed().epoch(3) == batches.epoch(3)
    assert batches.epoch(3) != batches.epoch(4)
    assert bucketed(seed=2).epoch(3) != batches.epoch(3)


@pytest.mark.parametrize(
    ("count", "frames", "utterances", "speed", "digest"),
    [
        (4000, 20000, 64, 0.0, "0689bd412539c6e9"),
        (4000, 20000, 64, 0.1, "3becff5cb0f89842"),
        (200, 5000, 16, 0.1, "ea785b4714eb3b45"),
        (200, 3000, 4, 0.1, "4d780ce97eb57d08"),
        (60, 5000, 16, 0.0, "a5fa6494f126962a"),
    ],
)
def test_the_batches_of_a_seed_are_the_same_in_every_version(count, frames, utterances, speed, digest):
    """Training resumes at the same batch, even with a later version."""
    batches = BucketBatches(
        LENGTHS[:count], frames_per_batch=frames, utterances_per_batch=utterances, seed=1, speed=speed
    )
    formed = json.dumps([batches.epoch(epoch) for epoch in range(6)])
    assert hashlib.sha256(formed.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("count", "frames", "utterances", "ratio"),
    [
        (80, 3000, 4, 1.5), (500, 8000, 4, 1.35), (80, 8000, 4, 1.25), (300, 8000, 16, 1.2), (120, 8000, 8, 1.15),
        (120, 12000, 8, 1.1), (80, 8000, 8, 1.07), (120, 8000, 16, 1.05), (120, 12000, 16, 1.03), (80, 12000, 8, 1.02),
        (80, 8000, 16, 1.01),
    ],
)  # fmt: skip
def test_buckets_are_as_wide_as_eight_percent_of_padding_allow(count, frames, utterances, ratio):
    batches = bucketed(LENGTHS[:count], frames=frames, utterances=utterances)
    assert batches._ratio == ratio and (batches.padding_share(0) <= 0.08 or ratio == min(BUCKET_RATIOS))
    if wider := [r for r in BUCKET_RATIOS if r > ratio]:
        batches._ratio = min(wider)
        assert batches.padding_share(0) > 0.08


def test_batches_mix_other_utterances_in_every_epoch():
    batches = bucketed()
    first = {frozenset(batch) for batch in batches.epoch(0)}
    assert len(first & {frozenset(batch) for batch in batches.epoch(1)}) < len(batches) / 10


def test_lengths_are_not_in_order_within_an_epoch():
    longest = [LENGTHS[batch].max() for batch in bucketed().epoch(0)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_sorted_batches_begin_with_the_longest_and_cover_everything():
    batches = sorted_batches(LENGTHS, frames_per_batch=20000, utterances_per_batch=64)
    order = sum(batches, [])
    assert sorted(order) == list(range(len(LENGTHS)))
    assert (np.diff(LENGTHS[order]) <= 0).all()
    assert padding_share(LENGTHS, batches) < 0.02


@pytest.mark.parametrize(
    ("frames", "utterances", "batches"),
    [
        (10, 9, [[2], [0, 1], [3, 4], [5]]),
        (9, 9, [[2], [0], [1], [3], [4, 5]]),
        (15, 3, [[2, 0], [1, 3, 4], [5]]),
        (99, 2, [[2, 0], [1, 3], [4, 5]]),
        (99, 99, [[2, 0, 1, 3, 4, 5]]),
    ],
)
def test_sorted_batches_fill_their_limits_and_keep_the_order_of_equals(frames, utterances, batches):
    lengths = [5, 5, 7, 5, 4, 4]
    assert sorted_batches(lengths, frames_per_batch=frames, utterances_per_batch=utterances) == batches
    assert sorted_batches([], frames_per_batch=frames, utterances_per_batch=utterances) == []


def test_a_loader_has_the_requested_workers_and_pins_for_a_gpu(dataset, monkeypatch):
    def poll():
        raise LookupError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # --device cpu on a machine with a GPU
    for options, pin in (({"pin": True}, True), ({}, False)):
        loader = make_loader(dataset, [[0], [1], [2]], Vocabulary(), augment=None, seed=0, epoch=0, workers=2,
                             poll=poll, **options)  # fmt: skip
        made = loader.loader
        assert (made.workers, made.poll, made.pin) == (2, poll, pin) and len(loader) == 3


def test_a_dev_loader_covers_the_whole_set_and_drops_no_last_batch(dataset):
    batches = sorted_batches(dataset.frame_counts, frames_per_batch=10**6, utterances_per_batch=4)
    assert [len(b) for b in batches] == [4, 4, 3]
    loaded = load(dataset, batches, augment=None)
    assert sorted(torch.cat([b.indices for b in loaded]).tolist()) == list(range(11))
    assert len(make_loader(dataset, batches, Vocabulary(), augment=None, seed=0, epoch=0, start=1, workers=0)) == 2


def test_a_batch_equals_the_items_of_the_dataset(dataset):
    vocabulary = Vocabulary()
    batch = load(dataset, [[3, 0, 7]], augment=None)[0]
    assert batch.indices.tolist() == [3, 0, 7]
    for row, i in enumerate([3, 0, 7]):
        n, u = int(batch.feature_lengths[row]), int(batch.token_lengths[row])
        assert torch.equal(batch.features[row, :n], dataset[i])
        assert (batch.features[row, n:] == 0).all() and (batch.tokens[row, u:] == PAD).all()
        assert batch.tokens[row, u - 1] == EOS
        assert vocabulary.decode(batch.tokens[row]) == dataset.texts[i]
    assert batch.features.dtype == torch.float32
    assert {t.dtype for t in (batch.tokens, batch.token_lengths, batch.feature_lengths, batch.indices)} == {torch.int64}
    assert batch.to("cpu").tokens is not None


def test_unknown_texts_give_no_tokens(dataset, monkeypatch):
    monkeypatch.setattr(dataset, "texts", [None, "é", *dataset.texts[2:]])
    for first in (0, 1):
        batch = load(dataset, [[first, 2]])[0]
        assert batch.tokens is None and batch.token_lengths is None
        assert batch.to("cpu").tokens is None


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 2])
def test_workers_and_the_start_batch_do_not_change_the_batches(dataset, workers, start):
    batches = BucketBatches(dataset.frame_counts, frames_per_batch=120, utterances_per_batch=3, seed=1).epoch(2)
    whole = load(dataset, batches, epoch=2)
    rest = load(dataset, batches, epoch=2, start=start, workers=workers)
    assert len(rest) == len(batches) - start
    for a, b in zip(whole[start:], rest, strict=True):
        assert torch.equal(a.features, b.features) and torch.equal(a.tokens, b.tokens)


class EqualUtterances(SimpleNamespace):
    """Two utterances with equal frames."""

    def raw(self, i):
        return torch.ones(100, 28)

    def prepare(self, raw):
        return raw

    def __len__(self):
        return 2


def test_augmentation_differs_by_epoch_seed_and_utterance_only(dataset):
    def features(i, neighbours, **options):
        batch = load(dataset, [[*neighbours, i]], **options)[0]
        return batch.features[-1, : batch.feature_lengths[-1]]

    assert torch.equal(features(3, [0, 1]), features(3, [5]))
    assert not torch.equal(features(3, [], epoch=1), features(3, [], epoch=0))
    assert not torch.equal(features(3, [], seed=2), features(3, []))
    equal_utterances = EqualUtterances(frame_counts=np.array([100, 100]), blocks=1, texts=["A", "B"])
    for config in (AugmentConfig(), AugmentConfig(time_masks=0, frequency_masks=0, speed=0.3)):
        (batch,) = load(equal_utterances, [[0, 1]], augment=Augment(config))
        one, other = (x[:n] for x, n in zip(batch.features, batch.feature_lengths.tolist(), strict=True))
        assert one.shape != other.shape or not torch.equal(one, other)


def test_as_many_utterances_as_the_setting_says_are_spliced_in_any_process(dataset):
    """Of each, frames and text change together, before everything else and whatever augment.start_epoch is."""
    batches = [[i % len(dataset), (i + 1) % len(dataset)] for i in range(40)]
    config = AugmentConfig(time_masks=0, frequency_masks=0, start_epoch=5.0, splice=0.3)
    options = {"augment": Augment(config), "splice": lambda i, raw, generator: (raw * 0 + generator.random(), "ZZZ")}
    for epoch in (0, 1):
        loaded = load(dataset, batches, epoch=epoch, **options)
        spliced = []
        for batch in loaded:
            texts = [
                Vocabulary().decode(t[: n - 1].tolist()) for t, n in zip(batch.tokens, batch.token_lengths, strict=True)
            ]
            flat = [float(x[:n].std()) < 1e-6 for x, n in zip(batch.features, batch.feature_lengths, strict=True)]
            assert flat == [text == "ZZZ" for text in texts]
            spliced += flat
        assert 0.1 < np.mean(spliced) < 0.5
        again = load(dataset, batches, epoch=epoch, start=30, workers=2, **options)
        assert all(torch.equal(a.features, b.features) for a, b in zip(loaded[30:], again, strict=True))
    assert not any("ZZZ" in dataset.texts[i] for i in range(len(dataset)))


def test_the_loader_does_not_change_the_random_state_of_training(dataset):
    before = torch.get_rng_state()
    load(dataset, [[0], [1]])
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_may_begin_within_an_epoch(dataset):
    augment = Augment(AugmentConfig(start_epoch=1.5, frequency_width=20))
    batches = [[0], [1], [2], [3]]
    loaded = load(dataset, batches, augment=augment, epoch=1)
    same = [torch.equal(batch.features[0], dataset[i]) for i, batch in enumerate(loaded)]
    assert same[:2] == [True, True] and not all(same[2:])


def test_joined_batches_hold_pairs_of_neighbours(dataset):
    vocabulary = Vocabulary()
    augment = Augment(AugmentConfig(join=1.0, time_masks=0, frequency_masks=0))
    batch = load(dataset, [[3, 0, 7, 5, 1]], augment=augment)[0]
    assert batch.indices.tolist() == [3, 7, 1]
    for row, pair in enumerate([(3, 0), (7, 5), (1,)]):
        n = int(batch.feature_lengths[row])
        assert torch.equal(batch.features[row, :n], torch.cat([dataset[i] for i in pair]))
        assert vocabulary.decode(batch.tokens[row]) == " ".join(dataset.texts[i] for i in pair)


def test_the_join_rate_after_its_start_epoch_does_not_depend_on_start(dataset):
    batches = [[i, i + 1] for i in range(10)] * 20
    augment = Augment(AugmentConfig(join=0.5, start_epoch=1.5))
    joined = [len(batch.indices) == 1 for batch in load(dataset, batches, augment=augment, epoch=1)]
    assert not any(joined[:100])
    assert 30 < sum(joined[100:]) < 70
    rest = load(dataset, batches, augment=augment, epoch=1, start=120)
    assert [len(batch.indices) == 1 for batch in rest] == joined[120:]
    other = load(dataset, batches, augment=augment, epoch=1, seed=2)
    assert [len(batch.indices) == 1 for batch in other] != joined


def curriculum_of(frames, **options):
    options = {"short_epochs": 3, "short_seconds": 2.0, "frames_per_batch": 5000} | options
    return plan_curriculum(frames, Config(data=DataConfig(**options), training=TrainingConfig(epochs=5)))


def test_a_curriculum_starts_with_short_utterances_and_continues_with_all():
    curriculum = curriculum_of(LENGTHS)
    short = np.flatnonzero(LENGTHS <= 200).tolist()
    for epoch in range(7):
        covered = sorted(sum(curriculum.batches_of(epoch).epoch(epoch), []))
        assert covered == (short if epoch < 3 else list(range(len(LENGTHS))))
    assert curriculum.steps == 3 * len(curriculum.batches_of(0)) + 2 * len(curriculum.batches_of(3))


def test_a_curriculum_uses_the_settings_of_its_configuration():
    config = Config(
        data=DataConfig(short_epochs=1, short_seconds=9.0, frames_per_batch=4000, utterances_per_batch=7),
        training=TrainingConfig(epochs=3, seed=5),
        augment=AugmentConfig(speed=0.1),
        features=FeatureConfig(shift_ms=12.5),
    )
    lengths, options = LENGTHS[:300], {"frames_per_batch": 4000, "utterances_per_batch": 7, "seed": 5, "speed": 0.1}
    curriculum, short = plan_curriculum(lengths, config), np.flatnonzero(lengths <= 720)
    assert curriculum.batches_of(1).epoch(1) == BucketBatches(lengths, **options).epoch(1)
    assert curriculum.batches_of(0).epoch(0) == BucketBatches(lengths, members=short, **options).epoch(0)


def test_short_utterances_are_measured_in_frames_of_whole_samples():
    data = DataConfig(short_epochs=1, short_seconds=4.0)
    config = Config(data=data, features=FeatureConfig(sample_rate=22_050))  # 220 samples per frame
    curriculum = plan_curriculum(np.array([400, 401]), config)
    assert curriculum.batches_of(0).epoch(0) == [[0]]
    curriculum = plan_curriculum(np.array([400, 401]), replace(config, data=replace(data, short_seconds=4.002)))
    assert sorted(sum(curriculum.batches_of(0).epoch(0), [])) == [0, 1]


def test_a_curriculum_locates_every_step():
    curriculum = curriculum_of(LENGTHS[:200])
    places = [curriculum.locate(step) for step in range(curriculum.steps + 1)]
    assert places[:-1] == [(epoch, b) for epoch in range(5) for b in range(len(curriculum.batches_of(epoch)))]
    assert places[-1] == (5, 0)
    assert [curriculum.locate(curriculum.steps_before(epoch)) for epoch in range(6)] == [
        (epoch, 0) for epoch in range(6)
    ]
    epochs = [curriculum.epochs(step) for step in range(curriculum.steps + 1)]
    assert (np.diff(epochs) > 0).all() and {0, 1, 2, 3, 4, 5} <= set(epochs)


def test_a_curriculum_may_have_no_short_epochs_or_only_short_epochs():
    whole = curriculum_of(LENGTHS, short_epochs=0)
    assert len(whole.stages) == 1 and whole.steps == 5 * len(whole.batches_of(0))
    short = curriculum_of(LENGTHS, short_epochs=9)
    assert short.steps == 5 * len(short.batches_of(0)) and len(sum(short.batches_of(4).epoch(4), [])) < len(LENGTHS)
    with pytest.raises(InputError, match="shortest training utterance lasts 3.0 s, longer than .* 2; raise"):
        curriculum_of(np.array([300, 400]))


def test_short_epochs_use_the_speeds_that_their_batches_were_made_for(dataset):
    augment, members = Augment(AugmentConfig(speed=0.3)), np.array([2, 5, 6, 9])
    batches = BucketBatches(dataset.frame_counts, frames_per_batch=200, utterances_per_batch=2, seed=5, speed=0.3,
                            members=members)  # fmt: skip
    assert sorted(sum(batches.epoch(1), [])) == members.tolist()
    for batch in load(dataset, batches.epoch(1), augment=augment, seed=5, epoch=1):
        assert batch.feature_lengths.tolist() == batches.lengths(1)[batch.indices.numpy()].tolist()


@pytest.mark.parametrize("tokens", [torch.ones(2, 3, dtype=torch.int64), None])
def test_a_batch_is_copied_to_cuda_on_a_separate_stream(monkeypatch, tokens):
    streams = Streams(monkeypatch)
    stream_for.cache_clear()
    calls = []
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **options: calls.append((args, options)) or x.clone())
    batch = Batch(torch.randn(2, 5, 4), torch.tensor([5, 4]), tokens, None, torch.arange(2))
    with streams:
        streams.main.seen[streams.main] = 7  # work enqueued before, for which the copy does not wait
        moved = batch.to("cuda")
        copying = stream_for("copies", "cuda")
        assert copying.seen[streams.main] == 0 and streams.main.seen[copying] == copying.seen[copying] > 0
        assert torch.equal(moved.features + 0, batch.features) and (moved.tokens is None) == (tokens is None)
    assert calls == [(("cuda",), {"non_blocking": True})] * len(calls) and len(calls) in (3, 4)
    assert streams.used and streams.unrecorded() == []
    monkeypatch.setattr(type(streams.main), "wait_stream", lambda self, other: None)
    with streams, pytest.raises(Race, match="reads memory of side"):
        _ = batch.to("cuda").features + 0
    stream_for.cache_clear()
