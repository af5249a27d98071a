"""--extra-data: the training splits of further corpora, which are trained on too."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_checkpoints import small
from tiny_corpora import make_archive, make_manifest

from las_fast import train as train_command
from las_fast.config import FeatureConfig
from las_fast.data.layouts import open_corpus
from las_fast.errors import InputError
from las_fast.train import load_data
from las_fast.training.adapt import check_extra


@pytest.fixture
def corpora(tmp_path):
    """A corpus of four training and four dev utterances, and one of three utterances without splits."""
    main = open_corpus(make_manifest(tmp_path / "main"))
    extra = make_manifest(tmp_path / "extra", utterances=3, seed=1, split=False)
    extra.write_text(extra.read_text().replace("	0.4	", "		"))  # their lengths are others
    return main, open_corpus(extra)


def settings(**fields):
    config = small(features=FeatureConfig(kind="logmel", size=40))
    fields["data"] = {"train": (), "dev": ""} | fields.get("data", {})
    return replace(config, **{name: replace(getattr(config, name), **value) for name, value in fields.items()})


def test_utterances_follow_those_of_the_corpus(corpora, capsys):
    alone, extra = load_data(settings(), corpora[0])[0], load_data(settings(data={"dev": "all"}), corpora[1])[0]
    both, dev = load_data(settings(), corpora[0], corpora[1:])
    assert (both.ids, both.texts) == (alone.ids + extra.ids, alone.texts + extra.texts)
    assert (both.paths, both.spans) == (alone.paths + extra.paths, alone.spans + extra.spans)
    assert both.frame_counts.tolist() == [*alone.frame_counts, *extra.frame_counts]
    assert both.seconds.tolist() == [*alone.seconds, *extra.seconds] and both.positions.tolist() == list(range(7))
    for i in range(7):
        assert torch.equal(both[i], alone[i] if i < 4 else extra[i - 4])
        assert len(both[i]) == both.frame_counts[i] == both.recording_frame(i, len(both[i]))
    assert dev.ids == ["dev-0", "dev-1", "dev-2", "dev-3"]
    out = capsys.readouterr().out
    assert f"all of {corpora[1].root}: 3 utterances, 0.00 hours\n" in out
    assert "train with extra data: 7 utterances" in out


def test_a_subset_of_joined_data_has_the_frames_of_its_utterances(corpora):
    both, _ = load_data(settings(), corpora[0], corpora[1:])
    part = both.subset(np.array([5, 1]))
    assert part.ids == [both.ids[5], both.ids[1]]
    assert torch.equal(part.raw(0), both.raw(5)) and torch.equal(part.raw(1), both.raw(1))


def test_a_corpus_may_be_joined_with_several(corpora):
    both, _ = load_data(settings(), corpora[0], [corpora[1], corpora[0]])
    assert both.ids == [f"train-{i}" for i in range(4)] + ["x-0", "x-1", "x-2"] + [f"train-{i}" for i in range(4)]
    assert torch.equal(both.raw(9), both.raw(2)) and both.positions.tolist() == [*range(7), *range(7, 11)]


def test_statistics_are_those_of_all_training_data(corpora):
    train, dev = load_data(settings(features={"normalisation": "global"}), corpora[0], corpora[1:])
    frames = torch.cat([train.raw(i) for i in range(len(train))]).double()
    torch.testing.assert_close(train.statistics.mean.double(), frames.mean(0), rtol=1e-5, atol=1e-5)
    assert dev.statistics is train.statistics


def test_hours_and_the_held_out_part_are_those_of_the_corpus_alone(corpora):
    hours = settings(data={"hours": 0.0002})  # 0.7 s
    assert len(load_data(hours, corpora[0])[0]) < 4
    assert load_data(hours, corpora[0], corpora[1:])[0].ids[-3:] == ["x-0", "x-1", "x-2"]
    held_out = settings(data={"dev": "", "dev_share": 0.5})
    train, dev = load_data(held_out, corpora[0], corpora[1:])
    assert (len(train), len(dev)) == (5, 2) and not any(name.startswith("x") for name in dev.ids)


def test_texts_of_dev_are_left_out_of_extra_data_too(corpora, tmp_path):
    dev = load_data(settings(), corpora[0])[1]
    lines = (tmp_path / "extra/manifest.tsv").read_text().splitlines()
    lines[2] = "\t".join([*lines[2].split("\t")[:-1], dev.texts[0]])
    (tmp_path / "extra/manifest.tsv").write_text("\n".join(lines) + "\n")
    corpus = open_corpus(tmp_path / "extra")
    train, _ = load_data(settings(data={"shared_texts": "drop"}), corpora[0], [corpus])
    assert train.ids[-2:] == ["x-0", "x-2"] and train.skipped[-1][0] == "x-1"


def test_a_path_that_names_a_split_means_that_split(tmp_path, corpora):
    archive = make_archive(tmp_path, "S22")
    main = open_corpus(archive)
    config = settings(features={"size": main.feature_size})
    split = open_corpus(archive / main.resolve("dev")[0])
    train, dev = load_data(config, main, [split])
    assert train.ids[-len(dev) :] == dev.ids


def test_corpora_of_other_kinds_are_refused(tmp_path, corpora):
    archives = [open_corpus(make_archive(tmp_path, edition)) for edition in ("S22", "F23")]
    check_extra(corpora[0], corpora[1:])
    check_extra(archives[0], archives[:1])
    with pytest.raises(InputError, match=r"has 13 mfcc per frame, but --data .* has recordings; give corpora of the"):
        check_extra(corpora[0], archives[:1])
    with pytest.raises(InputError, match="--extra-data .* has recordings"):
        check_extra(archives[0], corpora[1:])
    same_size = replace(archives[0], feature_kind="logmel")
    with pytest.raises(InputError, match="has 13 logmel per frame, but"):
        check_extra(archives[0], [same_size])
    check_extra(archives[0], [replace(archives[0], feature_kind=None)])
    with pytest.raises(InputError, match="--extra-data .* has 28 mfcc per frame, but --data .* has 13 mfcc per frame"):
        check_extra(archives[0], archives[1:])


def test_the_command_trains_on_them_and_resumes_with_them_alone(tmp_path, corpora, capsys):
    words = ["--config", "tiny", "--features.kind", "logmel", "--features.size", "40", "--training.epochs", "1"]
    words += ["--data", str(corpora[0].root), "--out", str(tmp_path / "run"), "--device", "cpu"]
    extra = ["--extra-data", *[str(corpora[1].root)] * 2]
    train_command.main([*words, *extra])
    assert "train with extra data: 10 utterances" in capsys.readouterr().out
    train_command.main([*words, *extra, "--resume"])
    assert "this training is complete" in capsys.readouterr().out
    with pytest.raises(InputError, match="other utterances; resume with the same --data and --extra-data"):
        train_command.main([*words, *extra[:-1], "--resume"])


def test_the_command_refuses_corpora_of_other_kinds(tmp_path, corpora):
    words = ["--config", "tiny", "--data", str(corpora[0].root), "--out", str(tmp_path / "run")]
    with pytest.raises(InputError, match="give corpora of the same kind"):
        train_command.main([*words, "--extra-data", str(make_archive(tmp_path, "S22"))])
