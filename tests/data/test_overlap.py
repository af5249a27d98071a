"""Training utterances whose transcripts overlap with those of dev, and data.shared_texts, which drops them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_checkpoints import small
from tiny_corpora import make_archive, text_array

from las_fast.config import DataConfig
from las_fast.data.layouts import open_corpus
from las_fast.errors import InputError
from las_fast.train import load_data

DEV = ("ONE TWO THREE FOUR FIVE SIX SEVEN", "HELLO THERE")
TRAIN = {  # text: whether it overlaps with one of DEV
    "HELLO THERE": True,
    "HELLO THERE HELLO THERE": False,
    "ZERO TWO THREE FOUR FIVE SIX SEVEN": True,
    "TWO THREE FOUR FIVE SIX": False,
    "TWO THREE FOUR FIVE SIX EIGHT SEVEN": False,
    "ONE TWO THREE FOUR FIVE SIX": True,
}


def load(root, train, *, shared_texts="drop", features=None, **data):
    archive = make_archive(root, "F23", utterances={"train-clean-100": len(train), "dev-clean": len(DEV)})
    for split, texts in (("train-clean-100", train), ("dev-clean", DEV)):
        for path, text in zip(sorted((archive / split / "transcripts").glob("*.npy")), texts, strict=True):
            np.save(path, text_array(text, stored_ends=True))
    config = small()
    data = replace(config.data, shared_texts=shared_texts, **data)
    config = replace(config, data=data, features=features or config.features)
    return load_data(config, open_corpus(archive))


def test_utterances_with_texts_of_dev_are_left_out(tmp_path, capsys):
    train, dev = load(tmp_path, list(TRAIN))
    assert train.texts == [text for text, overlaps in TRAIN.items() if not overlaps]
    assert sorted(dev.texts) == sorted(DEV)
    assert len(train.skipped) == 3 and "overlaps with one of dev (data.shared_texts)" in train.skipped[0][1]
    out = capsys.readouterr().out
    assert "train-clean-100: 3 utterances left out, whose transcripts overlap with those of dev\n" in out
    assert "train-clean-100: 3 utterances, 0.00 hours, 3 left out\n" in out
    assert [len(train.raw(i)) for i in range(3)] == train.frame_counts.tolist()


def test_by_default_they_are_kept(tmp_path):
    assert DataConfig().shared_texts == "keep"
    assert load(tmp_path, list(TRAIN), shared_texts="keep")[0].texts == list(TRAIN)


def test_it_is_an_error_if_none_is_left(tmp_path):
    message = "data.shared_texts drop leaves no training utterance: the transcripts of all 2 overlap"
    message += " with those of dev; choose another dev set by --data.dev or --data.dev-share 0.1, or set"
    with pytest.raises(InputError, match=message):
        load(tmp_path, ["HELLO THERE", "HELLO THERE"])


def test_the_texts_of_a_held_out_dev_set_count_too(tmp_path):
    train, dev = load(tmp_path, ["HELLO THERE"] * 5 + ["GOOD DAY"], dev="", dev_share=0.3)
    assert (train.texts, set(dev.texts), len(train.skipped)) == (["GOOD DAY"], {"HELLO THERE"}, 3)


def test_statistics_are_those_of_what_is_left(tmp_path):
    features = replace(small().features, normalisation="global")
    train, dev = load(tmp_path, list(TRAIN), features=features)
    frames = torch.cat([train.raw(i) for i in range(len(train))]).double()
    torch.testing.assert_close(train.statistics.mean.double(), frames.mean(0), rtol=1e-5, atol=1e-5)
    assert dev.statistics is train.statistics
