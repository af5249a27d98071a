"""LibriSpeech folders, manifests, and roots of no known layout."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_corpora import make_archive, make_librispeech, make_manifest, make_waveform, save, write_audio

from las_fast.config import DataConfig, FeatureConfig
from las_fast.data.dataset import load_dataset
from las_fast.data.layouts import open_corpus
from las_fast.data.librispeech import read_transcripts
from las_fast.errors import InputError

LOGMEL = FeatureConfig()


def load(corpus, split, *, features=LOGMEL, need_text=True, **options):
    data = DataConfig(**options)
    return load_dataset(corpus, (split,), features=features, data=data, need_text=need_text, progress=False)


def test_librispeech_is_recognised_from_each_of_its_folders(tmp_path):
    root = make_librispeech(tmp_path)
    for place in (root, root / "LibriSpeech", root / "LibriSpeech" / "dev-clean"):
        corpus = open_corpus(place)
        assert (corpus.name, corpus.kind, corpus.root) == ("LibriSpeech", "audio", root / "LibriSpeech")
    assert corpus.roles == {
        "train": ("train-clean-100", "train-clean-360"),
        "dev": ("dev-clean",),
        "test": ("test-clean",),
    }
    assert (corpus.header, corpus.numbered) == (("id", "label"), False)


def test_librispeech_utterances_are_sorted_and_paired_by_name(tmp_path):
    root = make_librispeech(tmp_path, splits=("dev-clean",))
    dataset = load(open_corpus(root), "dev")
    assert dataset.ids == sorted(dataset.ids) and len(dataset) == 6
    lines = [line for path in root.rglob("*.trans.txt") for line in path.read_text().splitlines()]
    assert dict(zip(dataset.ids, dataset.texts, strict=True)) == dict(line.split(" ", 1) for line in lines)
    assert dataset[0].shape == (dataset.frame_counts[0], 80)


@pytest.mark.parametrize("suffix", [".flac", ".wav", ".opus", ".oga", ".aif", ".MP3"])
def test_recordings_in_the_folders_of_librispeech_may_be_of_any_format(tmp_path, suffix):
    chapter = tmp_path / "LibriSpeech" / "dev-clean" / "1" / "2"
    chapter.mkdir(parents=True)
    for name in (f"1-2-0001{suffix}", f"1-2-0000{suffix}", "notes.txt"):
        (chapter / name).touch()
    (chapter / "1-2.trans.txt").write_text("1-2-0001 A\n")
    utterances = open_corpus(tmp_path).utterances("dev-clean")
    assert [(u.id, u.path.suffix, u.transcript) for u in utterances] == [
        ("1-2-0000", suffix, None), ("1-2-0001", suffix, "A"),
    ]  # fmt: skip
    other = tmp_path / "LibriSpeech" / "test-clean" / "1" / "2"
    shutil.copytree(chapter, other)
    (other / "1-2.trans.txt").unlink()
    assert open_corpus(tmp_path).splits == ("dev-clean", "test-clean")
    (chapter / "3.trans.txt").write_text("1-2-0001 B\n")
    with pytest.raises(InputError, match="3.trans.txt has a second transcript of 1-2-0001"):
        open_corpus(tmp_path).utterances("dev-clean")


def test_whitespace_around_librispeech_transcripts_is_removed(tmp_path):
    (tmp_path / "x.trans.txt").write_text("a  HELLO  THERE \n\nb\t YES\nc \n", encoding="utf-8")
    actual = read_transcripts(tmp_path / "x.trans.txt")
    assert actual == [("a", "HELLO  THERE"), ("b", "YES"), ("c", "")]


def test_librispeech_reports_missing_recordings_and_transcripts(tmp_path):
    root = make_librispeech(tmp_path, splits=("dev-clean", "test-clean"))
    chapter = root / "LibriSpeech" / "dev-clean" / "1089" / "134686"
    (chapter / "1089-134686-0001.flac").unlink()
    with pytest.raises(InputError, match="1089-134686-0001.flac does not exist"):
        load(open_corpus(root), "dev")
    shutil.copy(chapter / "1089-134686-0000.flac", chapter / "1089-134686-0001.flac")
    shutil.copy(chapter / "1089-134686-0000.flac", chapter / "new.flac")
    with pytest.raises(InputError, match=r"new\.flac has no transcript"):
        load(open_corpus(root), "dev")
    shutil.copy(chapter / "1089-134686-0000.flac", chapter / "new.wav")
    with pytest.raises(InputError, match="same name"):
        open_corpus(root).utterances("dev-clean")
    (root / "LibriSpeech" / "test-clean" / "1090" / "134686" / "1090-134686.trans.txt").write_bytes(b"x \xff")
    with pytest.raises(InputError, match="UTF-8"):
        open_corpus(root).utterances("test-clean")


def test_a_test_set_without_transcripts_can_be_decoded(tmp_path):
    root = make_librispeech(tmp_path, splits=("dev-clean", "test-clean"))
    for path in (root / "LibriSpeech" / "test-clean").rglob("*.trans.txt"):
        path.unlink()
    assert load(open_corpus(root), "test", need_text=False).texts == [None] * 6


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl"])
def test_a_manifest_is_opened_by_its_path_or_its_folder(tmp_path, suffix):
    path = make_manifest(tmp_path, suffix=suffix)
    for root in (path, tmp_path):
        corpus = open_corpus(root)
        assert (corpus.name, corpus.kind, corpus.splits) == (f"manifest {path.name}", "audio", ("train", "dev"))
    dataset = load(corpus, "train")
    assert dataset.ids == [f"train-{i}" for i in range(4)]
    assert all(dataset.texts)


def test_a_manifest_without_splits_plays_every_role(tmp_path):
    corpus = open_corpus(make_manifest(tmp_path, split=False))
    assert corpus.splits == ("all",)
    assert corpus.resolve("train") == corpus.resolve("dev") == corpus.resolve("test") == ("all",)


def test_json_manifests_may_use_the_names_of_other_tools(tmp_path):
    write_audio(tmp_path / "a.wav", make_waveform(np.random.default_rng(0)))
    rows = [{"audio_filepath": "a.wav", "duration": 0.4, "text": "HELLO"}, {"id": 7, "audio": "a.wav", "text": "AGAIN"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    dataset = load(open_corpus(tmp_path), "train")
    assert (dataset.ids, dataset.texts) == (["a", "7"], ["HELLO", "AGAIN"])


def test_a_manifest_may_name_feature_files(tmp_path):
    save(tmp_path / "x.npy", np.ones((30, 17), np.float32))
    (tmp_path / "m.tsv").write_text("id\tpath\ttranscript\nx\tx.npy\tHI\n")
    corpus = open_corpus(tmp_path)
    assert (corpus.kind, corpus.feature_size, corpus.transposed) == ("features", 17, False)
    assert load(corpus, "train", features=FeatureConfig(size=17))[0].shape == (30, 17)
    with pytest.raises(InputError, match="--features.size 17"):
        load(corpus, "train")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("m.tsv", "id\tfile\nx\tx.wav\n", "column 'path'"),
        ("m.tsv", "id\tpath\nx\n", "line 2 has 1 columns"),
        ("m.tsv", "id\tpath\nx\t\n", "line 2 has no path"),
        ("m.tsv", "id\tpath\tsplit\nx\tx.wav\t\n", "line 2 has an empty split"),
        ("m.tsv", "id\tpath\n", "names no recordings"),
        ("m.tsv", "", "header"),
        ("m.tsv", "id\tpath\nx\tx.wav\ny\ty.npy\n", "both audio and .npy"),
        ("m.tsv", "id\tpath\nx\tx.npy\n", "none of its first .npy"),
        ("m.jsonl", '{"path": "x.wav"}\n{"path": \n', "line 2 is not JSON"),
        ("m.jsonl", "[1]\n", "JSON object"),
        ("m.jsonl", '{"path": 3}\n', "path must be text"),
        ("m.jsonl", '{"path": "a\\u0000.wav"}\n', "line 1: path contains NUL"),
        ("m.jsonl", '{"path": "x.wav", "id": "\\ud800"}\n', "line 1: id contains NUL"),
        ("m.tsv", "id\tpath\tseconds\nx\tx.wav\tlong\n", "line 2: seconds must be a number of 0 or more; got 'long'"),
    ],
)
def test_a_mistake_in_a_manifest_is_named(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=reason) as error:
        open_corpus(tmp_path)
    assert name in str(error.value)


def test_a_manifest_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "m.tsv").write_bytes(b"id\tpath\nx\t\xff\n")
    with pytest.raises(InputError, match="UTF-8"):
        open_corpus(tmp_path)


def test_seconds_may_be_missing_and_have_another_name(tmp_path):
    rows = [
        {"path": "a.wav", "duration": 2},
        {"path": "b.wav", "seconds": "1.5"},
        {"path": "c.wav"},
        {"path": "d.wav", "seconds": ""},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [u.seconds for u in open_corpus(tmp_path).utterances("all")] == [2.0, 1.5, None, None]


def test_a_recording_shorter_than_its_manifest_says_is_bad(tmp_path):
    for name, seconds in (("short", 1.96), ("near", 4.95), ("longer", 6.0)):
        write_audio(tmp_path / f"{name}.flac", make_waveform(np.random.default_rng(0), seconds))
    rows = [f"{name}.flac\t5.00\tHI" for name in ("near", "longer")]
    manifest = tmp_path / "m.tsv"
    manifest.write_text("\n".join(["path\tseconds\ttranscript", *rows]))
    dataset = load(open_corpus(manifest), "train")
    assert dataset.seconds.tolist() == pytest.approx([4.95, 6.0]) and dataset.spans == [(0.0, np.inf)] * 2
    manifest.write_text("\n".join(["path\tseconds\ttranscript", "short.flac\t5.00\tHI", *rows]))
    with pytest.raises(InputError, match=r"short.flac lasts 1\.96 s, but the manifest says 5\.00 s"):
        load(open_corpus(manifest), "train")
    assert load(open_corpus(manifest), "train", on_bad="skip").ids == ["near", "longer"]


def test_librispeech_ignores_raw_sample_files(tmp_path):
    root = make_librispeech(tmp_path, splits=("dev-clean",))
    (root / "LibriSpeech" / "dev-clean" / "1089" / "134686" / "x.raw").write_bytes(bytes(320))
    assert len(open_corpus(root).utterances("dev-clean")) == 6


def test_a_root_with_an_impossible_name_is_refused():
    for root, why in (("x" * 5000, "File name too long"), ("a\0b", "embedded null byte")):
        with pytest.raises(InputError, match=rf"cannot be opened \({why}\); give the folder with the data$"):
            open_corpus(root)


def test_a_root_that_is_neither_folder_nor_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is neither a folder nor a file"):
        open_corpus(tmp_path / "pipe")


def test_a_relative_root_stays_relative(tmp_path, monkeypatch):
    make_archive(tmp_path, "F23")
    monkeypatch.chdir(tmp_path)
    assert open_corpus("11-785-f23-hw4p2").root == Path("11-785-f23-hw4p2")


def test_an_unknown_root_names_the_known_layouts(tmp_path):
    for root, reason in ((tmp_path / "gone", "does not exist"), (tmp_path, "is empty")):
        with pytest.raises(InputError, match=reason):
            open_corpus(root)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="no known layout") as error:
        open_corpus(tmp_path)
    assert all(word in str(error.value) for word in ("HW4P2", "LibriSpeech", "Kaldi", "manifest"))
    assert str(error.value).endswith("(also Common Voice, audiofolder)")  # the hint has nothing to add
    with pytest.raises(InputError, match="is a file"):
        open_corpus(tmp_path / "notes.txt")
    (tmp_path / "a.tsv").touch()
    (tmp_path / "b.tsv").touch()
    with pytest.raises(InputError, match="2 manifests"):
        open_corpus(tmp_path)


def test_a_missing_split_lists_the_existing_ones(tmp_path):
    corpus = open_corpus(make_archive(tmp_path, "F23"))
    with pytest.raises(InputError, match=r"'dev-other'; it has dev-clean, test-clean, train-clean-100.*train \("):
        corpus.resolve("dev-clean+dev-other")
    with pytest.raises(InputError, match="no split 'x'"):
        corpus.utterances("x")
    there = r"it has dev-clean, test-clean, train-clean-100, train-clean-360, train \(train-clean-100, train-.*-360\)"
    remedy = r"give one of these \(--split, in training --data.train and --data.dev\)"
    with pytest.raises(InputError, match=rf"'tset'; {there}, .*the nearest is test\); {remedy}$"):
        corpus.resolve("tset")
    assert "listings" not in repr(corpus)
    names = {"train": ("train", "training", "TRAIN"), "dev": ("valid", "eval"), "test": ("test", "testing")}
    for role, split_names in names.items():
        assert {corpus.resolve(name) for name in split_names} == {corpus.roles[role]}
    assert corpus.resolve("dev, test") == ("dev-clean", "test-clean")


def test_librispeech_hours_name_groups_of_folders(tmp_path):
    splits = ("train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "dev-other")
    corpus = open_corpus(make_librispeech(tmp_path, splits=splits, utterances=1))
    clean = ("train-clean-100", "train-clean-360")
    for name in ("460", "train-460", "clean-460", "train-clean-460", "100+360", "train-clean-100, 360"):
        assert corpus.resolve(name) == clean, name
    for name in ("960", "train-960"):
        assert corpus.resolve(name) == (*clean, "train-other-500")
    assert corpus.resolve("500") == ("train-other-500",)
    for name in ("other", "1000", "", "train-"):
        with pytest.raises(InputError, match="has no split"):
            corpus.resolve(name)
    assert corpus.resolve("dev") == ("dev-clean",) and corpus.resolve("train") == (*clean, "train-other-500")


def test_every_row_of_the_shared_manifest_is_read(shared):
    if not (shared / "speech" / "manifest.tsv").is_file():
        pytest.skip("../shared/speech is absent")
    rows = (shared / "speech" / "manifest.tsv").read_text(encoding="utf-8").splitlines()[1:]
    splits = [row.split("\t")[4] for row in rows]
    corpus = open_corpus(shared / "speech")
    assert [len(corpus.utterances(split)) for split in ("train", "dev")] == [splits.count(s) for s in ("train", "dev")]


def test_a_missing_split_or_root_suggests_the_nearest(tmp_path):
    root = make_archive(tmp_path / "data", "F23")
    with pytest.raises(InputError, match=r"has no split 'dev-claen'; .* \(the nearest is dev-clean\); give one"):
        open_corpus(root).resolve("dev-claen")
    with pytest.raises(InputError, match=rf"daat does not exist; give the folder .*; the nearest is {tmp_path}/data$"):
        open_corpus(tmp_path / "daat")
    with pytest.raises(InputError, match=rf"does not exist; .*; {tmp_path} exists, but has no other$"):
        open_corpus(tmp_path / "other" / "deeper")
