"""A share of the training data is held out as the dev set, recording by recording."""

from dataclasses import replace

import pytest
import torch
from tiny_checkpoints import small
from tiny_corpora import make_archive, make_kaldi

from las_fast.data.dataset import load_dataset
from las_fast.data.holdout import hold_out
from las_fast.data.layouts import open_corpus
from las_fast.data.overlap import count_overlap
from las_fast.errors import InputError


def load(root, splits=("train",), **features):
    config = small()
    features = replace(config.features, **features)
    return load_dataset(open_corpus(root), splits, features=features, data=config.data, need_text=True)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("data"), "F23", utterances=10)


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.1, 2), (0.11, 3), (0.5, 10)])
def test_the_parts_are_disjoint_and_complete_and_the_same_each_time(archive, share, count):
    data = load(archive)
    train, dev = hold_out(data, share)
    assert len(dev) == count and sorted([*train.ids, *dev.ids]) == sorted(data.ids)
    assert hold_out(load(archive), share)[1].ids == dev.ids
    for part in (train, dev):
        for i, name in enumerate(part.ids):
            k = data.ids.index(name)
            assert torch.equal(part[i], data[k]) and part.texts[i] == data.texts[k]
            assert part.frame_counts[i] == data.frame_counts[k] == len(part[i])


def test_utterances_of_a_recording_stay_together(tmp_path):
    root = make_kaldi(tmp_path, recordings=4)
    train, dev = hold_out(load(root, size=13, kind="mfcc"), 0.2)
    assert len(dev) and count_overlap(train, dev) == (0, 0)


def test_a_single_recording_cannot_be_divided(tmp_path):
    root = make_kaldi(tmp_path, recordings=1)
    with pytest.raises(InputError, match="data.dev_share is 0.2, but all training data is from one recording"):
        hold_out(load(root, size=13, kind="mfcc"), 0.2)


def test_statistics_are_those_of_the_training_part(archive):
    train, dev = hold_out(load(archive, normalisation="global"), 0.5, progress=False)
    frames = torch.cat([train.raw(i) for i in range(len(train))]).double()
    torch.testing.assert_close(train.statistics.mean.double(), frames.mean(0), rtol=1e-5, atol=1e-5)
    assert dev.statistics is train.statistics


def test_skipped_files_are_reported_once(archive):
    data = load(archive)
    data.skipped = [("a", "b")]
    train, dev = hold_out(data, 0.2)
    assert (train.skipped, dev.skipped) == ([("a", "b")], [])
