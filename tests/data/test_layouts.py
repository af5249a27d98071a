"""Manifests of other tools, parts of recordings, Common Voice, Kaldi and audio folders."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_corpora import (
    RATE,
    make_audio_folder,
    make_common_voice,
    make_kaldi,
    make_librispeech,
    make_manifest,
    make_waveform,
    write_audio,
)

from las_fast.config import DataConfig, FeatureConfig
from las_fast.data import manifest as manifests
from las_fast.data import manifest_lines, tables
from las_fast.data.audio import load_audio, load_utterance
from las_fast.data.cache import open_cache
from las_fast.data.corpus import assign_roles
from las_fast.data.dataset import load_dataset
from las_fast.data.features import compute_features
from las_fast.data.layouts import open_corpus
from las_fast.data.manifest import rows_by_id, split_of
from las_fast.data.overlap import count_overlap
from las_fast.data.texts import read_texts
from las_fast.errors import InputError, show

LOGMEL = FeatureConfig(normalisation="none")


def load(root, split="train", *, need_text=True, **options):
    data = DataConfig(**options)
    return load_dataset(open_corpus(root), (split,), features=LOGMEL, data=data, need_text=need_text, progress=False)


def write_table(path, rows):
    """Write dicts as .jsonl, .json, .csv or .tsv."""
    if path.suffix in (".jsonl", ".json"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        part = "," if path.suffix == ".csv" else "\t"
        text = "".join(part.join(map(str, line)) + "\n" for line in (list(rows[0]), *(row.values() for row in rows)))
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def long(tmp_path):
    """A recording of 3 s in an otherwise empty folder."""
    return write_audio(tmp_path / "long.wav", make_waveform(np.random.default_rng(0), 3.0))


# -------------------------------------------------------------------------------------------------- parts of recordings

PARTS = {
    "NeMo": ({"offset": 1.0, "duration": 0.5}, {"offset": 0, "duration": 0.5}),
    "start and end": ({"start": 1.0, "end": 1.5}, {"start": 0, "end": 0.5}),
    "begin and end": ({"begin": 1.0, "end": 1.5}, {"begin": 0, "end": 0.5}),
    "start_time and end_time": ({"start_time": "1.0", "end_time": "1.5"}, {"start_time": "", "end_time": "0.5"}),
    "milliseconds": ({"Start (ms)": 1000, "end_ms": 1500}, {"Start (ms)": 0, "end_ms": 500}),
    "all three": ({"start": 1.0, "end": 1.5, "duration": 0.5}, {"start": 0, "end": 0.5, "duration": 0.5}),
    "samples": ({"offset": 1.0, "num_samples": 8000}, {"offset": 0, "num_samples": 8000}),
    "samples and rate": (
        {"offset": 1.0, "num_samples": 4000, "sample_rate": 8000},
        {"offset": 0, "num_samples": 4000, "sample_rate": 8000},
    ),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("names", PARTS)
def test_a_part_is_read_under_every_known_column_name(tmp_path, long, names, suffix):
    rows = [{"audio_filepath": "long.wav", **part, "text": "HI"} for part in PARTS[names]]
    dataset = load(write_table(tmp_path / f"m{suffix}", rows))
    samples = load_audio(long, RATE)
    assert dataset.ids == ["long-1.000", "long-0.000"] and dataset.spans == [(1.0, 1.5), (0.0, 0.5)]
    for i, first in enumerate((RATE, 0)):
        expected = compute_features([samples[first : first + RATE // 2]], LOGMEL)[0]
        np.testing.assert_allclose(dataset[i], expected, atol=1e-4)


def test_a_part_without_an_end_goes_to_the_end(tmp_path, long):
    dataset = load(write_table(tmp_path / "m.jsonl", [{"path": "long.wav", "offset": 2.25, "text": "HI"}]))
    assert dataset.seconds.tolist() == [0.75] and dataset.spans == [(2.25, np.inf)]


@pytest.mark.parametrize(
    ("part", "start", "seconds"),
    [
        ({"end": 1.5}, 0.0, 1.5),
        ({"end": 1.5, "duration": 1.45}, 0.0, 1.5),
        ({"start": 0, "end": 0.2, "duration": 0.1}, 0.0, 0.2),  # they may differ by 0.1 s
        ({"start": 1, "end": 2, "duration": 0}, 1.0, 1.0),
        ({"start": 1, "end": 2.5}, 1.0, 1.5),
        ({"start": 1, "num_samples": 8000, "sample_rate": 0}, 1.0, None),
        ({"end_time": 500, "begin": None}, 0.0, 500.0),
        ({"duration_ms": 3000}, 0.0, 3.0),
    ],
)
def test_times_of_a_line_select_its_part(tmp_path, long, part, start, seconds):
    (u,) = open_corpus(write_table(tmp_path / "m.jsonl", [{"path": "long.wav", **part}])).utterances("all")
    assert (u.id, u.start, u.seconds, u.is_part) == ("long", start, seconds, "duration_ms" not in part)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"offset": 4.0, "duration": 0.5}, r"lasts 3\.00 s, too short for a part from 4 to 4\.5 s"),
        ({"offset": 2.0, "duration": 2.0}, r"lasts 3\.00 s, too short for a part from 2 to 4 s"),
        ({"duration": 1.5}, r"lasts 3\.00 s, but the manifest says 1\.50 s; .*'offset'"),
        ({"num_samples": 24000}, r"lasts 3\.00 s, but the manifest says 1\.50 s"),
    ],
)
def test_a_part_or_a_duration_that_does_not_fit_the_recording_is_bad(tmp_path, long, part, message):
    good = {"path": "long.wav", "offset": 0.5, "duration": 0.5, "text": "HI"}
    manifest = write_table(tmp_path / "m.jsonl", [{"path": "long.wav", **part, "text": "HI"}, good])
    with pytest.raises(InputError, match=message):
        load(manifest)
    assert len(load(manifest, on_bad="skip")) == 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"offset": -1, "duration": 2}, "line 1: offset must be a number of 0 or more; got -1"),
        ({"offset": "inf"}, "line 1: offset must be a number of 0 or more; got 'inf'"),
        ({"offset": "soon"}, "line 1: offset must be a number of 0 or more; got 'soon'"),
        ({"offset": True}, "line 1: offset must be a number of 0 or more; got True"),
        ({"offset": [1]}, r"line 1: offset must be a number of 0 or more; got \[1\]"),
        ({"offset": 10**400}, "line 1: offset must be a number of 0 or more; got 1000"),
        ({"id": 1.5}, "line 1: id must be text; got 1.5"),
        ({"id": True}, "line 1: id must be text; got True"),
        ({"start": 0, "end": 2, "duration": 1.85}, "line 1: start to end is 2 s, but the duration is 1.85 s"),
        ({"start": 0, "end": 1, "duration": 2}, "line 1: start to end is 1 s, but the duration is 2 s"),
        ({"audio_channel": "left"}, "column 'audio_channel' names channels"),
        ({"start": 2, "end": 1}, "line 1: the part lasts -1 seconds"),
        ({"start": 0, "duration": 0}, "line 1: the part lasts 0 seconds"),
        ({"start": 0, "end": 2, "duration": 1}, "line 1: start to end is 2 s, but the duration is 1 s"),
        ({"channel": 1}, "column 'channel' names channels \\(1\\).*a separate file"),
        ({"stop": 16000}, "column 'stop' \\(16000\\) is unknown"),
        ({"end_frame": 5}, "column 'end_frame' \\(5\\) is unknown"),
        ({"begin_sample": 5}, "column 'begin_sample' \\(5\\) is unknown"),
        ({"frame_offset": 5}, "column 'frame_offset' \\(5\\) is unknown"),
        ({"onset": 5}, "column 'onset' \\(5\\) is unknown"),
        ({"to": 5}, "column 'to' \\(5\\) is unknown"),
        ({"start_frame": 5}, "column 'start_frame' \\(5\\) is unknown"),
        ({"from": 5}, "column 'from' \\(5\\) is unknown"),
        ({"from_ms": 5}, "column 'from_ms' \\(5\\) is unknown"),
        ({"tmin": 5}, "column 'tmin' \\(5\\) is unknown"),
        ({"xmax (s)": 5}, r"column 'xmax \(s\)' \(5\) is unknown"),
        ({"path": "/"}, "line 1: / names no file"),
    ],
)
def test_unknown_columns_that_select_a_part_are_refused(tmp_path, long, columns, message):
    with pytest.raises(InputError, match=f"m.jsonl:? ?{message}"):
        open_corpus(write_table(tmp_path / "m.jsonl", [{"path": "long.wav", **columns, "text": "HI"}]))


@pytest.mark.parametrize(
    "column",
    [
        "lang",
        "Lang",
        "language",
        "locale",
        "subset",
        "partition",
        "fold",
        "take",
        "use",
        "keep",
        "skip",
        "ignore",
        "include",
        "exclude",
        "discard",
    ],
)
def test_columns_that_select_lines_are_refused_if_their_values_differ(tmp_path, long, column):
    rows = [{"id": i, "path": "long.wav", column: value, "text": "HI"} for i, value in enumerate("ab")]
    with pytest.raises(InputError, match=rf"column '{column}' has different values \(a, b\)"):
        open_corpus(write_table(tmp_path / "m.tsv", rows))
    for row in rows:
        row[column] = "a"
    assert len(open_corpus(write_table(tmp_path / "m.tsv", rows)).utterances("all")) == 2


def test_the_error_quotes_three_values_of_a_refused_column(tmp_path, long):
    rows = [{"path": "long.wav", "fold": value} for value in "edcbaedc"]
    with pytest.raises(InputError, match=r"column 'fold' has different values \(a, b, c\)"):
        open_corpus(write_table(tmp_path / "m.jsonl", rows))


def test_blank_and_missing_values_of_json_are_ignored(tmp_path, long):
    blanks = {"id": None, "split": None, "seconds": None, "start": "  ", "end": None, "num_samples": " ", "stop": None,
              "onset": " ", "lang": " en", "text": " HI "}  # fmt: skip
    rows = [{"path": " long.wav ", **blanks}, {"path": "other.wav", "lang": "en", "num_samples": "", "seconds": " "}]
    corpus = open_corpus(write_table(tmp_path / "m.jsonl", rows))
    first, second = corpus.utterances("all")
    assert (first.id, first.path, first.transcript, first.seconds) == ("long", long, "HI", None)
    assert (first.start, first.is_part, first.span) == (0.0, False, (0.0, np.inf))
    assert (second.id, second.transcript, second.seconds) == ("other", None, None)


def test_unrelated_columns_are_allowed(tmp_path, long):
    row = {"path": "long.wav", "text": "HI", "speaker": "s", "age": 7, "gender": "f", "channels": 1, "trend": "up",
           "stop_": "", "sample_rate": 16000, "lang": "en"}  # fmt: skip
    assert len(load(write_table(tmp_path / "m.tsv", [row]))) == 1


@pytest.mark.parametrize("name", ["x.npy", "x.NPY"])
def test_a_part_of_a_feature_file_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=f"a part of {name} cannot be read"):
        open_corpus(write_table(tmp_path / "m.jsonl", [{"path": name, "offset": 1, "text": "HI"}]))


def test_parts_of_one_recording_have_their_own_cache_entries(tmp_path, long):
    folders = set()
    for part in ({}, {"offset": 0}, {"offset": 1}, {"offset": 1, "duration": 1}, {"offset": 1, "duration": 2}):
        corpus = open_corpus(write_table(tmp_path / "m.jsonl", [{"id": "x", "path": "long.wav", **part, "text": "A"}]))
        entry = open_cache(corpus, "all", corpus.utterances("all"), LOGMEL, folder=str(tmp_path / "c"), progress=False)
        folders.add(entry.folder)
    assert len(folders) == 5


@pytest.mark.parametrize(
    ("train", "dev", "shared", "divided"),
    [
        ((0, 1), (1, 2), 0, 1),  # adjacent
        ((0, 1), (0.9, 2), 0, 1),  # overlap within the tolerance
        ((0, 1), (0.5, 1.5), 1, 1),
        ((0, 3), (1, 1.5), 1, 1),
        ((1, 1.5), (0, 3), 1, 1),
        ((2, 3), (0, 1), 0, 1),
        ((0, 1), None, 1, 1),  # the whole recording
    ],
)
def test_parts_of_one_recording_in_train_and_dev_are_counted(tmp_path, long, train, dev, shared, divided):
    (tmp_path / "link.wav").symlink_to(long)
    write_audio(tmp_path / "other.wav", make_waveform(np.random.default_rng(1), 3.0))
    rows = [{"path": "long.wav", "split": "train", "start": train[0], "end": train[1], "text": "A"}]
    rows.append({"path": "other.wav", "split": "train", "text": "A"})
    rows.append({"path": "link.wav", "split": "dev", "text": "A"})
    rows[-1] |= dict(zip(("start", "end"), dev, strict=True)) if dev else {}
    manifest = write_table(tmp_path / "m.jsonl", rows)
    sets = load(manifest, "train"), load(manifest, "dev")
    assert count_overlap(*sets) == (shared, divided)


# ------------------------------------------------------------------------------------------------------------ manifests


def test_a_missing_recording_is_identified_by_its_path():
    gone, other = (SimpleNamespace(paths=[Path(f"gone/{x}.wav")], spans=[(0.0, np.inf)]) for x in "ab")
    assert count_overlap(gone, gone) == (1, 1)
    assert count_overlap(gone, other) == (0, 0)


def test_a_manifest_may_have_an_upper_case_suffix(tmp_path, long):
    write_table(tmp_path / "m.tsv", [{"path": "long.wav", "text": "HI"}]).rename(tmp_path / "M.TSV")
    assert len(load(tmp_path / "M.TSV")) == len(load(tmp_path)) == 1


def test_ids_from_the_manifest_stay_beside_generated_ids(tmp_path, long):
    rows = [{"path": "long.wav"}, {"path": "other.wav", "id": "long"}, {"path": "a/long.wav"}]
    utterances = open_corpus(write_table(tmp_path / "m.jsonl", rows)).utterances("all")
    assert [u.id for u in utterances] == [f"{tmp_path.name}/long", "long", "a/long"]


def test_lines_without_ids_get_distinct_ones(tmp_path, long):
    (tmp_path / "a").mkdir()
    for name in ("a/long.wav", "other.wav"):
        write_audio(tmp_path / name, make_waveform(np.random.default_rng(1), 3.0))
    rows = [("a/long.wav", ""), ("long.wav", 0.5), ("long.wav", 1.5), ("other.wav", ""), ("other.wav", "")]
    manifest = write_table(tmp_path / "m.tsv", [{"path": p, "offset": o, "text": "HI", "n": "1"} for p, o in rows])
    corpus = open_corpus(manifest)
    ids = [u.id for u in corpus.utterances("all")]
    folder = tmp_path.name
    assert ids == ["a/long", f"{folder}/long-0.500", f"{folder}/long-1.500", "other-0001", "other-0002"]
    assert list(rows_by_id(manifest)) == ids and rows_by_id(manifest)["a/long"]["n"] == "1"
    assert load(manifest).ids == ids


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_the_columns_of_other_tools_are_known(tmp_path, long, suffix):
    paths = [
        "path",
        "audio",
        "audio_filepath",
        "audio_path",
        "audio_file",
        "file_name",
        "filename",
        "wav_filename",
        "wav",
        "Path",
        "AUDIO",
    ]
    texts = ["transcript", "text", "sentence", "transcription", "wrd", "Text"]
    ids = ["id", "utt_id", "utterance_id", "ID"]
    for i, path in enumerate(paths):
        row = {path: "long.wav", texts[i % len(texts)]: "HELLO", ids[i % len(ids)]: "x", "wav_filesize": 96044}
        (u,) = open_corpus(write_table(tmp_path / f"m{suffix}", [row])).utterances("all")
        assert (u.id, u.path, u.transcript) == ("x", long, "HELLO")


def test_the_first_preferred_column_that_is_not_blank_is_used(tmp_path, long):
    rows = [{"id": x, "text": "B", "transcript": x, "path": "long.wav"} for x in ("A", " ")]
    texts = [u.transcript for u in open_corpus(write_table(tmp_path / "m.jsonl", rows)).utterances("all")]
    assert texts == ["A", "B"]


@pytest.mark.parametrize("rate", ["sample_rate", "sampling_rate", "samplerate"])
def test_a_count_of_samples_is_a_duration(tmp_path, long, rate):
    rows = [{"path": "long.wav", "num_samples": 6000, rate: 2000}, {"path": "long.wav", "n_samples": "48000"},
            {"path": "long.wav", "num_samples": None}, {"path": "gone.wav", "num_samples": 5}]  # fmt: skip
    seconds = [u.seconds for u in open_corpus(write_table(tmp_path / "m.jsonl", rows)).utterances("all")]
    assert seconds == [3.0, 3.0, None, None]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", 'path,text\n"long.wav","WELL, ""HI"" "\n'),
        ("m.csv", 'path;text\n long.wav ; "WELL, ""HI"""\n'),
        ("m.csv", ',path,text\n0,long.wav,"WELL, ""HI"""\n'),
        ("m.csv", 'path|text\nlong.wav|WELL, "HI"\n'),
        ("m.csv", 'path,text\nlong.wav, "WELL, ""HI"""\n'),
        ("m.csv", 'path,text,\nlong.wav,"WELL, ""HI""",\n,,\n'),
        ("m.tsv", 'path\ttext\n"long.wav"\t"WELL, ""HI"""\n'),
        ("m.tsv", ' path \ttext\n long.wav \tWELL, "HI"\n\t\n\n'),
        ("m.tsv", 'path\ttext\tn\t\nlong.wav\tWELL, "HI"\t1\t\n'),
        ("m.tsv", 'path\ttext\t\t\n"long.wav" \t "WELL, ""HI""" \n'),
        ("m.csv", '"path";"text"\n"long.wav";" WELL, ""HI"" "\n'),
        ("M.CSV", '"path","text"\nlong.wav,"WELL, ""HI"""\n'),
        ("M.JSONL", '\n{"path": "long.wav", "text": "WELL, \\"HI\\""}\n  \n'),
        ("M.JSON", ' [{"path": "long.wav", "text": "WELL, \\"HI\\""}]\n'),
        ("m.json", '[{"path": "long.wav",\n  "text": "WELL, \\"HI\\""}]\n'),
        ("m.json", '\n \n[{"path": "long.wav",\n  "text": "WELL, \\"HI\\""}]\n'),
    ],
)
def test_quotes_spaces_and_empty_columns_of_tables(tmp_path, long, name, text):
    (tmp_path / name).write_text(text)
    (u,) = open_corpus(tmp_path).utterances("all")
    assert (u.path, u.transcript) == (long, 'WELL, "HI"')


def test_quotes_of_a_value_in_csv_are_text(tmp_path, long):
    (tmp_path / "m.csv").write_text('path,text\nlong.wav,"""YES."""\n')
    (u,) = open_corpus(tmp_path).utterances("all")
    assert u.transcript == '"YES."'


@pytest.mark.parametrize("text", ['"', '"A" B "C"', '"A', 'A"', '""', "A ' B", '""A"', '"A""'])
@pytest.mark.parametrize("name", ["m.tsv", "m.csv"])
def test_quotes_inside_a_value_are_text(tmp_path, long, name, text):
    (tmp_path / name).write_text(f"path{'|' if name == 'm.csv' else chr(9)}text\nlong.wav{chr(9)}{text}\n")
    if name == "m.csv":
        (tmp_path / name).write_text(f"path|text\nlong.wav|{text}\n")
    (u,) = open_corpus(tmp_path).utterances("all")
    assert u.transcript == (None if text == '""' else text)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "a,b\n1,2\n", "header line that has a column 'path' .*got \\['a', 'b'\\]"),
        ("m.csv", "path|text\na.wav|A\na.wav\n", "line 3 has 1 columns"),
        ("m.jsonl", '{"text": "HI"}\n', "line 1 has no path"),
        ("m.json", '[{"path": "a.wav"},\n 5]', "line 2 must be a JSON object"),
        ("m.json", '[\n  {\n    "path": "a.wav"\n  } ,\n  5\n]\n', "line 5 must be a JSON object .*; got 5"),
        ("m.json", '[\n{"path": "a.wav"},\n{"text": "\\n"}]', "line 3 has no path"),
        ("m.json", '[\n  {\n    "path" "a.wav"\n  }\n]\n', "line 3 is not JSON: Expecting ':' delimiter"),
        ("m.json", '[{"path": "a.wav"}, 5]', "line 1 must be a JSON object"),
        ("m.json", '\n\n[{"path": "a.wav"},\n5]', "line 4 must be a JSON object"),
        ("m.json", '[{"path": "a.wav"}', "line 1 is not JSON: .*; correct it"),
        ("m.jsonl", '{"path": ' + "1" * 5000 + "}", "line 1 is not JSON: Exceeds"),
        ("m.tsv", "path\tpath\na\tb\n", "two columns named 'path'"),
        ("m.tsv", "path\ttext\na.wav\tA\tB\n", "line 2 has 3 columns, but its header has 2"),
        ("m.csv", 'path,text\na.wav,"A\n', "line 2 has a field that spans several lines"),
        ("m.csv", 'path,text\na.wav,A\n\nb.wav,"A\nB"\n', "line 4 has a field that spans several lines"),
        ("m.csv", "path,text\na.wav,A\n\nb.wav\n", "line 4 has 1 columns, but its header has 2"),
        ("m.csv", f"path,text\na.wav,{'A' * 200_000}\n", "line 2 is not valid CSV"),
        ("m.csv", f"path,{'A' * 200_000}\na.wav,A\n", "line 1 is not valid CSV"),
        ("M.CSV", "a,b\n1,2\n", "header line that has a column 'path'"),
        ("m.jsonl", '[{"path": "a.wav"}]', r"line 1 must be a JSON object with a key 'path'; got \[{"),
        ("m.jsonl", '{"path": \n', "line 1 is not JSON: Expecting value; write one"),
        ("m.tsv", "text\tpath\tpath\na\tb\tc\n", "two columns named 'path'"),
        ("m.json", "[1]", "line 1 must be a JSON object"),
        ("m.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("m.tsv", "path\nhttps://x.org/a.wav\n", "line 2: .* is a URL"),
        ("m.tsv", "path\nC:\\data\\a.wav\n", "line 2: .* Windows path"),
    ],
)
def test_a_mistake_in_a_table_is_named_with_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}.* {message}") as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row", ['"\\ud800"', '{"path": "\\ud800"}', '{"path": "a", "lang": "\\ud800"}\n{"path": "a", "lang": "b"}']
)
def test_an_error_on_a_lone_surrogate_can_be_printed(tmp_path, row):
    (tmp_path / "m.jsonl").write_text(row)
    with pytest.raises(InputError) as error:
        open_corpus(tmp_path)
    assert show(str(error.value)).encode()


def test_paths_may_be_absolute_or_urls_or_use_tilde_or_backslashes(tmp_path, long, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").mkdir()
    for name in ("50%25.wav", "a\\b.wav"):
        write_audio(tmp_path / "sub" / name, make_waveform(np.random.default_rng(0), 0.5))
    names = [{"path": "50%25.wav"}, {"path": "a\\b.wav"}]  # used literally if such files exist
    utterances = open_corpus(write_table(tmp_path / "sub" / "odd.jsonl", names)).utterances("all")
    assert all(u.path.exists() for u in utterances)
    gone = open_corpus(write_table(tmp_path / "gone.jsonl", [{"path": "~/gone.wav"}])).utterances("all")
    assert gone[0].path == tmp_path / "gone.wav"
    (tmp_path / "a b.wav").symlink_to(long)
    paths = [
        (tmp_path / "a b.wav").as_uri(),
        str(long),
        "~/long.wav",
        ".\\..\\long.wav",
        "..\\long.wav",
        f"file://{long}",
    ]
    rows = [{"id": i, "path": path, "text": "HI"} for i, path in enumerate(paths)]
    dataset = load(write_table(tmp_path / "sub" / "m.tsv", rows))
    assert len(dataset) == 6 and all(os.path.samefile(path, long) for path in dataset.paths)


@pytest.mark.parametrize(
    "name",
    [
        "Dev",
        "DEV",
        "val",
        "Val",
        "valid",
        "validation",
        "eval",
        "dev_clean",
        "dev93",
        "devel",
        "development",
        "evaluation",
    ],
)
def test_splits_have_many_names(tmp_path, long, name):
    rows = [{"id": i, "path": "long.wav", "split": s, "text": "HI"} for i, s in enumerate(("Train", name))]
    corpus = open_corpus(write_table(tmp_path / "m.tsv", rows))
    assert corpus.resolve("train") == corpus.resolve("Train") == ("train",)
    assert corpus.resolve("dev") == corpus.resolve(name) == corpus.resolve("validation") == (name.lower(),)
    with pytest.raises(InputError, match="no split 'test'; it has .*--data.dev.*column 'split'"):
        corpus.resolve("test")


def test_a_split_may_be_named_with_space_around_it():
    assert assign_roles((" Dev ", "train")) == {"train": ("train",), "dev": (" Dev ",)}


def test_roles_without_a_split_are_left_out():
    assert assign_roles(("dev-other", "x")) == {"dev": ("dev-other",)}
    assert assign_roles(("dev-a", "dev-b", "train-a", "train-b")) == {"train": ("train-a", "train-b")}
    assert assign_roles(("train", "train-b", "test_clean")) == {"train": ("train",), "test": ("test_clean",)}
    assert assign_roles(("eval", "dev", "val")) == {"dev": ("dev",)}
    assert assign_roles(("training", "train-b")) == {"train": ("training",)}
    assert assign_roles(("test-other", "test-clean", "test-a")) == {"test": ("test-clean",)}
    assert assign_roles(("testing", "test-a")) == {"test": ("testing",)}
    espnet = ("train_nodev", "train_dev", "test")
    assert assign_roles(espnet) == {"train": ("train_nodev",), "dev": ("train_dev",), "test": ("test",)}
    assert assign_roles(("train_no_dev", "train_dev_5h")) == {"train": ("train_no_dev", "train_dev_5h")}
    assert assign_roles(("train_clean_100", "trainset")) == {"train": ("train_clean_100", "trainset")}


def test_librispeech_hours_name_its_folders(tmp_path):
    splits = ("train-clean-100", "train-clean-360", "train-other-500", "dev-clean")
    corpus = open_corpus(make_librispeech(tmp_path, utterances=1, splits=splits))
    assert corpus.resolve("960") == corpus.resolve("train-960") == splits[:3]
    assert corpus.resolve("460") == splits[:2] and corpus.resolve("500") == splits[2:3]


def test_a_path_of_a_split_means_that_split_alone(tmp_path):
    splits = ("train-clean-100", "train-clean-360", "dev-clean", "dev-other")
    root = make_librispeech(tmp_path, utterances=1, splits=splits) / "LibriSpeech"
    whole, other = open_corpus(root), open_corpus(root / "dev-other")
    assert whole.choose(None) == whole.choose("dev") == ("dev-clean",)
    assert whole.choose(None, "train") == whole.choose("train") == splits[:2]
    assert other.choose(None) == other.choose(None, "train") == other.choose("dev-other") == ("dev-other",)
    assert other.choose("dev-clean+dev-other") == splits[2:]
    assert open_corpus(root / "train-clean-360").choose("train") == ("train-clean-360",)
    with pytest.raises(
        InputError, match=r"/dev-other is the split dev-other, but 'dev' is asked for; give /.*, or the "
    ):
        other.choose("dev")
    with pytest.raises(InputError, match="has no split 'test'"):
        other.choose("test")


def test_the_folder_of_a_split_may_be_in_upper_case(tmp_path, long):
    for name in ("Train", "Dev"):
        (tmp_path / name).mkdir()
        write_table(tmp_path / name / "metadata.csv", [{"file_name": "../long.wav", "transcription": name.upper()}])
    assert open_corpus(tmp_path / "Train").named_split == "train" and open_corpus(tmp_path / "Dev").choose(None) == (
        "dev",
    )


def test_of_splits_that_differ_only_in_case_the_first_is_taken(tmp_path, long):
    rows = [{"id": i, "path": "long.wav", "split": s} for i, s in enumerate(("Mine", "MINE"))]
    corpus = open_corpus(write_table(tmp_path / "m.tsv", rows))
    assert (corpus.resolve("mine"), corpus.resolve("MINE")) == (("Mine",), ("MINE",))


def test_a_split_named_twice_is_read_once(tmp_path, long):
    rows = [{"id": i, "path": "long.wav", "split": s, "text": "HI"} for i, s in enumerate(("train", "dev"))]
    manifest = write_table(tmp_path / "m.tsv", rows)
    assert open_corpus(manifest).resolve("dev+dev,val") == ("dev",)
    assert load(manifest, "dev+dev").ids == ["1"]


def test_a_manifest_for_each_split_makes_one_corpus(tmp_path, long):
    for name in ("train_manifest.json", "val-manifest.json", "test.jsonl"):
        write_table(tmp_path / name, [{"audio_filepath": "long.wav", "text": name}])
    write_table(tmp_path / "speakers.tsv", [{"speaker": "x"}])
    corpus = open_corpus(tmp_path)
    assert corpus.splits == ("test", "train", "val")
    assert corpus.utterances(*corpus.resolve("dev"))[0].transcript == "val-manifest.json"
    write_table(tmp_path / "more.tsv", [{"path": "long.wav"}])
    make_common_voice(tmp_path / "inside")
    with pytest.raises(InputError, match=r"has 4 manifests \(more.tsv, .*train.tsv and dev.tsv"):
        open_corpus(tmp_path)


def test_a_single_manifest_of_any_name_plays_every_role(tmp_path, long):
    write_table(tmp_path / "train.tsv", [{"path": "long.wav", "text": "HI"}])
    assert open_corpus(tmp_path).splits == ("all",)
    write_table(tmp_path / "dev.tsv", [{"path": "long.wav", "text": "HI"}])
    corpus = open_corpus(tmp_path)
    assert (corpus.splits, corpus.name) == (("dev", "train"), "manifest dev.tsv, train.tsv")


def test_two_manifests_of_one_split_are_an_error(tmp_path, long):
    for name in ("train.tsv", "train_manifest.csv"):
        write_table(tmp_path / name, [{"path": "long.wav", "text": "HI"}])
    with pytest.raises(InputError, match=r"has 2 manifests \(train.tsv, train_manifest.csv\)"):
        open_corpus(tmp_path)


def test_a_folder_named_like_a_manifest_is_not_one(tmp_path):
    (tmp_path / "x.tsv").mkdir()
    with pytest.raises(InputError, match="no known layout"):
        open_corpus(tmp_path)
    (tmp_path / "A.TSV").touch()
    with pytest.raises(InputError, match="A.TSV must begin with a header line"):
        open_corpus(tmp_path)


def test_a_limited_number_of_files_is_checked_for_manifests(tmp_path, long, monkeypatch):
    monkeypatch.setattr(manifests, "MAX_FILES", 2)
    for name in ("dev.tsv", "train.tsv", "zzz.tsv"):
        write_table(tmp_path / name, [{"path": "long.wav", "text": "HI"}])
    assert open_corpus(tmp_path).splits == ("dev", "train")


def test_each_manifest_is_read_once_and_on_demand(tmp_path, long, monkeypatch):
    write_table(tmp_path / "dev.tsv", [{"path": "long.wav", "text": "HI"}])
    (tmp_path / "train.tsv").write_text("path\ttext\nlong.wav\n")
    read, rows = [], manifest_lines.read_rows
    monkeypatch.setattr(manifest_lines, "read_rows", lambda path: read.append(path.name) or rows(path))
    corpus = open_corpus(tmp_path)
    assert corpus.utterances("dev") == corpus.utterances("dev") and read == ["dev.tsv"]
    with pytest.raises(InputError, match="train.tsv line 2 has 1 columns"):
        corpus.utterances("train")


def test_empty_manifests_are_refused(tmp_path):
    for name in ("dev.tsv", "train.tsv"):
        (tmp_path / name).write_text("path\ttext\n")
    with pytest.raises(InputError, match="dev.tsv names no recordings; expected one line per recording"):
        open_corpus(tmp_path)


def test_if_all_manifests_have_a_mistake_the_first_is_named(tmp_path):
    for name in ("dev.tsv", "train.tsv"):
        (tmp_path / name).write_text("path\ttext\nlong.wav\n")
    with pytest.raises(InputError, match="dev.tsv line 2 has 1 columns"):
        open_corpus(tmp_path)


def test_a_split_that_mixes_audio_and_features_is_refused_on_demand(tmp_path, long):
    write_table(tmp_path / "dev.tsv", [{"path": "long.wav", "text": "HI"}])
    write_table(tmp_path / "train.tsv", [{"path": name, "text": "HI"} for name in ("long.wav", "x.npy")])
    corpus = open_corpus(tmp_path)
    with pytest.raises(InputError, match="train.tsv names both audio and .npy files"):
        corpus.utterances("train")


def test_the_split_is_read_from_a_manifests_name():
    names = {"train_manifest": "train", "manifest.dev": "dev", "train-clean-100": "train-clean-100", "Test": "test",
             "librispeech_train": "train", "cv-valid-train": "train", "speakers": None, "metadata": None,
             "train_dev": "dev", "train-a-train-b": "train-a-train-b"}  # fmt: skip
    assert {name: split_of(name) for name in names} == names
    for word in ("manifest", "metadata", "audio", "asr", "cv", "data", "set"):
        assert split_of(f"{word}_train_100") == "train-100", word


# --------------------------------------------------------------------------------------- Common Voice, Kaldi and others


def test_common_voice_is_recognised_with_its_splits(tmp_path):
    root = make_common_voice(tmp_path)
    for place in (root, root / "clips"):
        corpus = open_corpus(place)
        assert (corpus.name, corpus.kind, corpus.root) == ("Common Voice", "audio", root)
        assert corpus.splits == ("dev", "test", "train", "validated")
        assert corpus.roles == {"train": ("train",), "dev": ("dev",), "test": ("test",)}
    assert [len(corpus.utterances(split)) for split in corpus.splits] == [2, 2, 2, 6]
    dataset = load(root, "dev")
    assert dataset.paths[0] == root / "clips" / "common_voice_en_dev0.wav" and all(dataset.texts)
    assert load(root / "train.tsv", "all").ids == load(root, "train").ids  # a single manifest of the corpus
    with pytest.raises(InputError, match="does not exist, but .* has a split dev; give .* with --split"):
        open_corpus(root / "dev")


def test_a_corpus_may_be_two_folders_below_and_several_are_an_error(tmp_path):
    for layout in (make_common_voice, make_audio_folder, make_manifest):
        root = layout(tmp_path / layout.__name__ / "corpus" / "en")
        assert len(load(tmp_path / layout.__name__, "dev")) == len(load(root, "dev"))
    write_table(tmp_path / "make_common_voice" / "corpus" / "log.jsonl", [{"step": 1}])
    (tmp_path / "make_common_voice" / "corpus" / "newest").symlink_to("en")
    corpus = open_corpus(tmp_path / "make_common_voice")
    assert (corpus.name, corpus.root.name) == ("Common Voice", "en")
    make_common_voice(tmp_path / "make_common_voice" / "corpus" / "de")
    with pytest.raises(InputError, match="no known layout"):  # three folders below
        open_corpus(tmp_path)
    with pytest.raises(InputError, match="several archives or corpora; give one of .*/corpus/de, .*/corpus/en"):
        open_corpus(tmp_path / "make_common_voice")


def test_a_folder_named_clips_alone_is_not_common_voice(tmp_path):
    (tmp_path / "clips").mkdir()
    write_table(tmp_path / "other.tsv", [{"path": "b", "text": "HI"}])
    write_table(tmp_path / "clips" / "m.tsv", [{"path": "a", "text": "HI"}])
    corpus = open_corpus(tmp_path / "clips")
    assert (corpus.root, corpus.splits) == (tmp_path / "clips" / "m.tsv", ("all",))
    assert corpus.utterances("all")[0].path == tmp_path / "clips" / "a"


def test_a_folder_beside_the_clips_of_common_voice_is_not_common_voice(tmp_path):
    make_common_voice(tmp_path)
    (tmp_path / "mine").mkdir()
    write_table(tmp_path / "mine" / "m.tsv", [{"path": "a.wav", "text": "HI"}])
    assert open_corpus(tmp_path / "mine").root == tmp_path / "mine" / "m.tsv"


def test_other_tables_in_a_common_voice_folder_are_ignored(tmp_path):
    make_common_voice(tmp_path)
    write_table(tmp_path / "other.csv", [{"path": "b", "text": "HI"}])
    assert (
        open_corpus(tmp_path).splits == open_corpus(tmp_path / "clips").splits == ("dev", "test", "train", "validated")
    )


def test_an_empty_split_of_common_voice_is_an_error_when_requested(tmp_path):
    make_common_voice(tmp_path)
    header = (tmp_path / "dev.tsv").read_text().splitlines()[0]
    (tmp_path / "dev.tsv").write_text(header + "\n")
    (tmp_path / "test.tsv").write_text(header + "\nx\n")
    assert len(load(tmp_path)) == 2
    with pytest.raises(InputError, match="split 'dev' has no recordings"):
        load(tmp_path, "dev")
    with pytest.raises(InputError, match="test.tsv line 2 has 1 columns"):
        load(tmp_path, "test")


def test_the_current_folder_may_be_a_split(tmp_path, monkeypatch):
    data = make_kaldi(tmp_path)
    monkeypatch.chdir(data / "dev")
    assert open_corpus(".").root == data
    monkeypatch.chdir(data / "dev")
    assert open_corpus("..").splits == ("dev", "train")


def test_old_common_voice_names_clips_without_a_suffix(tmp_path):
    (tmp_path / "clips").mkdir()
    write_table(tmp_path / "train.tsv", [{"client_id": 0, "path": "a1b2", "sentence": "HI"},
                                         {"client_id": 0, "path": "clips/c.mp3", "sentence": "HI"}])  # fmt: skip
    assert [u.path for u in open_corpus(tmp_path).utterances("train")] == [
        tmp_path / "clips" / name for name in ("a1b2.mp3", "c.mp3")
    ]


def test_kaldi_folders_are_recognised_from_each_of_their_folders(tmp_path):
    data = make_kaldi(tmp_path)
    (data / "lang").mkdir()
    files = [data / "train" / name for name in ("wav.scp", "text", "segments")]
    for place in (tmp_path, data, data / "train", *files):
        corpus = open_corpus(place)
        assert (corpus.name, corpus.root, corpus.splits) == ("Kaldi", data, ("dev", "train"))
        assert (corpus.header, corpus.numbered, corpus.transposed) == (("id", "label"), False, False)
    dataset = load(tmp_path)
    assert dataset.ids == ["train0-0", "train0-1", "train1-0", "train1-1"] and all(dataset.texts)
    samples = load_audio(tmp_path / "wav" / "train1.wav", RATE)
    expected = compute_features([samples[RATE // 2 : round(0.95 * RATE)]], LOGMEL)[0]
    np.testing.assert_allclose(dataset[3], expected, atol=1e-4)
    assert list(read_texts(data / "train" / "text")) == dataset.texts
    with pytest.raises(InputError, match="has a split dev; give"):
        open_corpus(data / "validation")


def test_a_single_kaldi_folder_without_segments_plays_every_role(tmp_path):
    data = make_kaldi(tmp_path, splits=("train",))
    (data / "train").rename(data / "mine")
    for name in ("segments", "text"):
        (data / "mine" / name).unlink()
    (data / "mine" / "text").write_text("train1\tGOOD  DAY\ntrain0 HI\n")
    corpus = open_corpus(data / "mine")
    assert [(u.id, u.transcript, u.is_part) for u in corpus.utterances("all")] == [
        ("train0", "HI", False), ("train1", "GOOD  DAY", False),
    ]  # fmt: skip
    assert load(data / "mine", "dev").ids == ["train0", "train1"]
    assert corpus.roles == {"train": ("all",), "dev": ("all",), "test": ("all",)}


def test_kaldi_data_take_precedence_over_other_files_of_a_recipe(tmp_path):
    make_kaldi(tmp_path)
    make_kaldi(tmp_path / "old")
    assert open_corpus(tmp_path).root == tmp_path / "data"


def test_a_single_kaldi_folder_is_split_all_and_one_without_a_role_stays_single(tmp_path):
    data = make_kaldi(tmp_path, splits=("train",))
    (data / "lang").mkdir()
    corpus = open_corpus(data / "train")
    assert (corpus.root, corpus.splits) == (data / "train", ("all",)) and corpus.resolve("dev") == ("all",)
    (data / "train").rename(data / "mine")
    make_kaldi(tmp_path)
    assert open_corpus(data / "mine").root == data / "mine"
    assert open_corpus(data / "train").splits == ("dev", "mine", "train")


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("wav.scp", "train0 sph2pipe -f wav x.sph |", "line 1: train0 is a command .*write the recordings to files"),
        ("wav.scp", "train0 raw.ark:1234", "line 1: train0 lies in an archive"),
        ("wav.scp", "train0", "line 1: train0 names no file"),
        ("segments", "train0-0 other 0 1", "line 1: wav.scp has no other"),
        ("text", "new-0 HELLO", "has a text of new-0, which .*segments lacks"),
    ],
)
def test_unusable_lines_of_a_kaldi_folder_are_reported_or_skipped(tmp_path, name, line, message):
    data = make_kaldi(tmp_path)
    lines = (data / "train" / name).read_text().splitlines()
    (data / "train" / name).write_text("\n".join([line, *lines[name != "text" :]]))
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path)
    assert name in str(error.value)
    assert len(load(tmp_path, on_bad="skip")) >= 2


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("segments", "train0-0 train0 0.5", "must have an id, a recording, and start and end"),
        ("segments", "train0-0 train0 0.5 0.2", "must have an id"),
        ("segments", "train0-0 train0 inf -1", "must have an id"),
        ("segments", "train0-0 train0 0.5 inf", "must have an id"),
        ("segments", "train0-0 train0 -0.5 0.5", "must have an id"),
        ("segments", "train0-0 train0 0.5 0.5", "must have an id"),
        ("segments", "train0-0 train0 0.5 -2", "must have an id"),
        ("segments", "train0-0", "must have an id"),
        ("segments", "train0-0 train0 0.5 0.9 A", "must have an id"),
        ("text", "train0-1 HELLO", "line 2 repeats the id train0-1"),
    ],
)
def test_a_mistake_in_a_kaldi_file_is_named(tmp_path, name, line, message):
    data = make_kaldi(tmp_path)
    lines = (data / "train" / name).read_text().splitlines()
    (data / "train" / name).write_text("\n".join([line, *lines[1:]]))
    with pytest.raises(InputError, match=f"{name} line . ?{message.removeprefix('line 2 ')}"):
        load(tmp_path)


def test_lines_of_kaldi_may_be_blank_or_end_in_space_and_are_counted(tmp_path):
    data = make_kaldi(tmp_path, splits=("train",))
    (data / "train" / "text").write_text("train0-0 A  B \t\n \n\ntrain0-1\n")
    (data / "train" / "segments").write_text("train0-0 train0 0 0.4\ntrain0-1 train0 0.5 -1\n")
    first, second = open_corpus(data).utterances("train")
    assert (first.transcript, first.start, first.seconds, first.is_part) == ("A  B", 0.0, 0.4, True)
    assert (second.transcript, second.start, second.seconds, second.is_part) == ("", 0.5, None, True)
    (data / "train" / "text").write_text("train0-0 A\n\ntrain0-0 B\n")
    with pytest.raises(InputError, match="text line 3 repeats the id train0-0"):
        open_corpus(data).utterances("train")


@pytest.mark.parametrize("root", ["m.tsv", "../kaldi"])
def test_a_recording_named_dash_is_not_standard_input(tmp_path, monkeypatch, root):
    recording = write_audio(tmp_path / "here" / "x.wav", make_waveform(np.random.default_rng(0), 0.5))
    expected = load_audio(recording, RATE)
    recording.rename(tmp_path / "here" / "-")
    (tmp_path / "here" / "m.tsv").write_text("path\n-\n")
    (tmp_path / "kaldi").mkdir()
    (tmp_path / "kaldi" / "wav.scp").write_text("x -\n")
    monkeypatch.chdir(tmp_path / "here")
    (u,) = open_corpus(Path(root)).utterances("all")
    assert np.array_equal(load_utterance(u, RATE), expected)


@pytest.mark.parametrize(("folder", "actual"), [("p", True), ("p/q/r", True), ("p/q/r/s", False)])
def test_kaldi_recordings_are_searched_for_up_to_three_folders_above(tmp_path, folder, actual):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "x.wav").touch()
    (tmp_path / folder / "wav.scp").write_text("x x.wav\n")
    (u,) = open_corpus(tmp_path / folder).utterances("all")
    assert u.path == (tmp_path if actual else tmp_path / folder) / "x.wav"


def test_a_missing_first_recording_does_not_move_the_others(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "b.wav").touch()
    (tmp_path / "data" / "train" / "wav.scp").write_text("a a.wav\nb b.wav\n")
    assert [u.path for u in open_corpus(tmp_path).utterances("train")] == [tmp_path / "a.wav", tmp_path / "b.wav"]


def test_a_kaldi_folder_named_data_has_every_role(tmp_path):
    make_kaldi(tmp_path, splits=("train",))
    (tmp_path / "data" / "train").rename(tmp_path / "x")
    (tmp_path / "data").rmdir()
    (tmp_path / "x").rename(tmp_path / "data")
    corpus = open_corpus(tmp_path)
    assert (corpus.root, corpus.splits) == (tmp_path / "data", ("all",)) and corpus.resolve("train") == ("all",)


def test_a_file_named_text_belongs_to_kaldi_only_beside_wav_scp(tmp_path):
    train = make_kaldi(tmp_path) / "train"
    for path in (tmp_path / "text", train / "notes.txt"):
        path.write_text("GOOD DAY\n")
        assert list(read_texts(path)) == ["GOOD DAY"]


def test_errors_quote_the_first_forty_characters_of_a_kaldi_command(tmp_path):
    data = make_kaldi(tmp_path, splits=("train",))
    (data / "train" / "wav.scp").write_text(f"train0 {'x' * 50} |\n")
    (data / "train" / "segments").unlink()
    with pytest.raises(InputError, match=rf"train0 is a command \({'x' * 40}\.\.\.\)"):
        load(data / "train")


def test_a_kaldi_folder_with_only_commands_is_refused(tmp_path):
    data = make_kaldi(tmp_path, splits=("train",))
    for name in ("text", "segments"):
        (data / "train" / name).unlink()
    (data / "train" / "wav.scp").write_text("a cat a.wav |\nb cat b.wav |\n")
    with pytest.raises(InputError, match="line 1: a is a command"):
        load(data)


def test_other_files_of_a_kaldi_folder_cannot_be_opened(tmp_path):
    with pytest.raises(InputError, match="utt2spk is a file; expected a folder, or a manifest ending in .tsv"):
        open_corpus(make_kaldi(tmp_path) / "train" / "utt2spk")


def test_a_kaldi_segment_may_end_with_its_recording(tmp_path):
    data = make_kaldi(tmp_path)
    (data / "train" / "segments").write_text("train0-0 train0 0.5 -1\n")
    (data / "train" / "text").write_text("train0-0 HI\n")
    assert load(tmp_path).seconds.tolist() == [0.5]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("folder", ["", "data"])
def test_audio_folders_are_recognised_with_their_splits(tmp_path, suffix, folder):
    root = make_audio_folder(tmp_path / folder, suffix=suffix)
    for place in (tmp_path, root / "train"):
        corpus = open_corpus(place)
        assert corpus.splits == ("train", "validation") and corpus.resolve("dev") == ("validation",)
        assert corpus.root == root
    assert load(tmp_path).ids == ["train-0", "train-1"]


def test_split_folders_of_an_audio_folder_may_be_capitalised(tmp_path):
    root = make_audio_folder(tmp_path, splits=("Train", "Val"))
    assert open_corpus(root).roles == {"train": ("train",), "dev": ("val",)}
    assert load(root, "Val").ids == ["Val-0", "Val-1"]


def test_folders_in_the_metadata_of_an_audio_folder_are_its_splits(tmp_path):
    make_audio_folder(tmp_path)
    rows = [{"file_name": f"{s}/{s}-0.wav", "text": "HI"} for s in ("train", "validation")]
    for split in ("train", "validation"):
        (tmp_path / split / "metadata.csv").unlink()
    write_table(tmp_path / "metadata.csv", rows)
    assert open_corpus(tmp_path).splits == ("train", "validation")
    assert load(tmp_path, "dev").ids == ["validation-0"]


def test_folders_in_paths_are_splits_only_in_metadata_files(tmp_path):
    rows = [{"file_name": f"data/{split}/x/a.wav", "text": "HI"} for split in ("train", "dev")]
    write_table(tmp_path / "list.csv", rows)
    assert open_corpus(tmp_path).splits == ("all",)
    (tmp_path / "list.csv").rename(tmp_path / "metadata.csv")
    assert open_corpus(tmp_path).splits == ("train", "dev")
    write_table(tmp_path / "metadata.csv", [{"file_name": "/elsewhere/train/a.wav", "text": "HI"}])
    assert open_corpus(tmp_path).splits == ("all",)


def test_a_split_column_in_the_metadata_overrides_folders(tmp_path):
    rows = [{"file_name": "train/a.wav", "split": "test"}, {"file_name": "dev/b.wav", "split": "x"}]
    assert open_corpus(write_table(tmp_path / "metadata.jsonl", rows)).splits == ("test", "x")


def test_a_line_without_a_split_beside_lines_with_one_is_refused(tmp_path):
    rows = [{"path": f"{name}.wav", "split": split} for name, split in (("a", "train"), ("b", "dev"), ("c", None))]
    message = "line 3 has no split, unlike other lines; give train, dev or test in a column 'split'"
    with pytest.raises(InputError, match=message):
        open_corpus(write_table(tmp_path / "m.jsonl", rows))
    del rows[2]["split"]
    with pytest.raises(InputError, match=message):
        open_corpus(write_table(tmp_path / "m.jsonl", rows))


def test_a_recording_beside_the_split_folders_of_an_audio_folder_is_refused(tmp_path):
    rows = [{"file_name": f"{name}/{name}.wav", "text": "HI"} for name in ("train", "extra", "test")]
    with pytest.raises(InputError, match=r"metadata.csv line 3 is in none of the folders train, dev and test, unlike"):
        open_corpus(write_table(tmp_path / "metadata.csv", rows))
    assert open_corpus(write_table(tmp_path / "metadata.csv", rows[1:])).splits == ("all",)  # perhaps a speaker "test"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_different_transcripts_of_one_whole_recording_are_refused(tmp_path, long, suffix):
    rows = [{"path": "long.wav", "text": text} for text in ("A", "A", "B")]
    lines = "2 and 4" if suffix == ".csv" else "1 and 3"
    message = f"m{suffix} lines {lines} have different transcripts of the same recording, .*long.wav; remove one, give"
    with pytest.raises(InputError, match=message):
        open_corpus(write_table(tmp_path / f"m{suffix}", rows))
    rows = [{**row, "start": i} for i, row in enumerate(rows)]
    assert len(open_corpus(write_table(tmp_path / f"m{suffix}", rows)).utterances("all")) == 3


def test_folders_with_other_manifests_are_not_an_audio_folder(tmp_path):
    make_audio_folder(tmp_path / "a", splits=("train", "dev", "test"))
    write_table(tmp_path / "a" / "train" / "more.csv", [{"path": "train-0.wav", "text": "HI"}])
    with pytest.raises(InputError, match=r"has 2 manifests \(metadata.csv, more.csv\)"):
        open_corpus(tmp_path / "a" / "train")
    make_audio_folder(tmp_path / "b", splits=("train", "dev"))
    (tmp_path / "b" / "dev" / "metadata.csv").rename(tmp_path / "b" / "dev" / "list.csv")
    assert open_corpus(tmp_path / "b" / "train").splits == ("all",)


def test_files_named_like_splits_are_not_splits_of_an_audio_folder(tmp_path):
    for name in ("train.wav", "dev.wav"):
        write_audio(tmp_path / name, make_waveform(np.random.default_rng(0), 0.5))
    write_table(tmp_path / "metadata.csv", [{"file_name": name, "text": "HI"} for name in ("train.wav", "dev.wav")])
    assert open_corpus(tmp_path).splits == ("all",)


def test_a_single_folder_of_an_audio_folder_is_split_all(tmp_path):
    root = make_audio_folder(tmp_path / "a", splits=("train",))
    assert open_corpus(root / "train").splits == ("all",)
    make_audio_folder(tmp_path / "a", splits=("extra", "dev"))
    assert open_corpus(root / "extra").splits == ("all",) and open_corpus(root / "train").splits == ("dev", "train")
    shutil.rmtree(root / "dev")
    (root / "test").mkdir()  # without transcripts
    assert open_corpus(root).splits == ("train",)


def test_manifests_in_folders_named_like_splits_are_opened_separately(tmp_path, long):
    for split in ("train", "dev"):
        (tmp_path / split).mkdir()
        write_table(tmp_path / split / "list.tsv", [{"path": str(long), "text": "HI"}])
    assert open_corpus(tmp_path / "train").splits == ("all",)
    assert open_corpus(tmp_path).splits == ("dev", "train")


def test_a_split_column_overrides_the_names_of_manifests(tmp_path, long):
    for name, split in (("train", "dev"), ("dev", "test")):
        write_table(tmp_path / f"{name}.tsv", [{"path": "long.wav", "text": "HI", "split": split}])
    corpus = open_corpus(tmp_path)
    assert set(corpus.splits) == {"dev", "test"} and corpus.root == tmp_path
    write_table(tmp_path / "train.tsv", [{"path": "long.wav", "text": "HI"}])  # only one has the column
    assert set(open_corpus(tmp_path).splits) == {"test", "train"}


def test_two_manifests_are_not_ignored_for_data_in_a_subfolder(tmp_path):
    for name in "ab":
        write_table(tmp_path / f"{name}.tsv", [{"path": "x.wav"}])
    make_manifest(tmp_path / "inside")
    with pytest.raises(InputError, match=r"has 2 manifests \(a.tsv, b.tsv\)"):
        open_corpus(tmp_path)
    for name in "cdef":
        write_table(tmp_path / f"{name}.tsv", [{"path": "x.wav"}])
    with pytest.raises(InputError, match=r"has 6 manifests \(a.tsv, b.tsv, c.tsv, d.tsv, e.tsv\); give"):
        open_corpus(tmp_path)


def test_a_limited_number_of_folders_is_searched(tmp_path, monkeypatch):
    monkeypatch.setattr("las_fast.data.layouts.MAX_FOLDERS", 2)
    for name in "ab":
        (tmp_path / name).mkdir()
    make_kaldi(tmp_path / "b", splits=("dev",))
    assert open_corpus(tmp_path).root == tmp_path / "b" / "data"
    (tmp_path / "a2").mkdir()
    with pytest.raises(InputError, match="no known layout"):
        open_corpus(tmp_path)


@pytest.mark.parametrize("names", [("m",), ("dev", "train")], ids=len)
def test_the_frame_size_comes_from_the_first_readable_of_eight_arrays(tmp_path, names):
    np.save(tmp_path / "0.npy", np.ones(3))
    (tmp_path / "1.npy").write_bytes(b"no array")
    np.save(tmp_path / "7.NPY", np.ones((30, 17)))
    (tmp_path / "7.NPY.npy").rename(tmp_path / "7.NPY")
    paths = [*(f"{i}.npy" for i in range(7)), "7.NPY"]
    for name in names:
        write_table(tmp_path / f"{name}.tsv", [{"path": path, "text": "HI"} for path in paths])
    corpus = open_corpus(tmp_path)
    assert (corpus.kind, corpus.feature_size) == ("features", 17)
    for name in names:
        write_table(tmp_path / f"{name}.tsv", [{"path": path, "text": "HI"} for path in ["gone.npy", *paths]])
    with pytest.raises(InputError, match=f"{names[0]}.tsv: none of its first .npy files is a readable array"):
        open_corpus(tmp_path)


@pytest.mark.parametrize("layout", [make_librispeech, make_kaldi, make_common_voice, make_audio_folder])
def test_corpora_are_never_written_to(tmp_path, layout):
    layout(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    load(tmp_path, "dev")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "message"),
    [("X.ZIP", r"\.zip files; unpack"), ("x.arrow", r"\.arrow files; extract"),
     ("x.zip", r"\.zip files; unpack them"), ("x.parquet", r"\.parquet files; extract the recordings"),
     ("x.wav", "recordings but no transcripts")],
)  # fmt: skip
def test_errors_on_unsupported_forms_of_data_say_what_to_do(tmp_path, name, message):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=message):
        open_corpus(tmp_path)
    (tmp_path / "METADATA.CSV").write_text("LJ001|Printing|Printing\n")
    names = r"\(or audio, audio_filepath, audio_path, audio_file, file_name\)$"
    with pytest.raises(InputError, match=rf"METADATA.CSV has no column 'path' {names}"):
        open_corpus(tmp_path)


def test_a_json_file_beside_packed_files_is_not_taken_for_a_manifest(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{"features": {}}\n')
    with pytest.raises(InputError, match="dataset_info.json has no column 'path'"):
        open_corpus(tmp_path)
    (tmp_path / "data.arrow").touch()
    with pytest.raises(InputError, match=r"it has \.arrow files; extract"):
        open_corpus(tmp_path)


def test_all_kinds_of_packed_files_are_named_in_order(tmp_path):
    for name in ("a.zip", "b.tar", "c.7z"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"it has \.7z, \.tar, \.zip files; unpack them first"):
        open_corpus(tmp_path)


def test_files_without_permission_are_named(tmp_path, monkeypatch):
    def access(path, mode):
        accesses.append((Path(path).name, mode))
        return Path(path).name not in ("closed", "x.csv")

    accesses = []
    monkeypatch.setattr("las_fast.data.layouts.os.access", access)
    (tmp_path / "x.csv").touch()
    with pytest.raises(InputError, match="x.csv cannot be read; check its permissions"):
        open_corpus(tmp_path)
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"/closed cannot be listed: Permission denied; check its permissions"):
        open_corpus(tmp_path)
    assert accesses == [("x.csv", os.R_OK), ("closed", os.R_OK | os.X_OK)]


def test_other_folders_beside_librispeech_splits_are_ignored(tmp_path):
    root = make_librispeech(tmp_path, utterances=1, splits=("dev-clean",))
    (root / "LibriSpeech" / "notes" / "a" / "b").mkdir(parents=True)
    (root / "LibriSpeech" / "notes" / "a" / "b" / "x.txt").touch()
    assert open_corpus(root).splits == ("dev-clean",)
    for path in (root / "LibriSpeech").rglob("*.flac"):
        new = root / "LibriSpeech" / "dev-other" / "1" / "2" / path.name
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)
    with pytest.raises(InputError, match="'dev-other' has no transcripts; expected SPEAKER-CHAPTER.trans.txt"):
        load(root, "dev-other")
    with pytest.raises(InputError, match=r"1089-134686-0000\.flac does not exist"):
        load(root, "dev-clean")


def test_a_manifest_without_transcripts_says_which_columns_hold_them(tmp_path, long):
    with pytest.raises(InputError, match=r"expected a column 'transcript' \(or text, sentence, transcription, wrd\)"):
        load(write_table(tmp_path / "m.tsv", [{"path": "long.wav", "other": "HI"}]))


def test_a_split_without_transcripts_says_where_they_belong(tmp_path):
    data = make_kaldi(tmp_path)
    (data / "train" / "text").unlink()
    with pytest.raises(InputError, match="split 'train' has no transcripts; expected a file 'text'"):
        load(tmp_path)
    assert len(load(tmp_path, need_text=False)) == 4


def test_quotes_and_commas_within_a_tsv_are_text(tmp_path):
    (tmp_path / "x.tsv").write_text('id\ttext\na\tSAY "A", B\nb\t"WHOLE, QUOTED"\n')
    (tmp_path / "x.csv").write_text('id,text\na,"SAY ""A"", B"\nb,WHOLE\n')
    assert [row["text"] for _, row in tables.read_rows(tmp_path / "x.tsv")] == ['SAY "A", B', "WHOLE, QUOTED"]
    assert [row["text"] for _, row in tables.read_rows(tmp_path / "x.csv")] == ['SAY "A", B', "WHOLE"]


def test_an_unnamed_column_is_named_by_its_number(tmp_path):
    (tmp_path / "x.csv").write_text(",id,,text\n0,a,1,HI\n")
    ((line, row),) = tables.read_rows(tmp_path / "x.csv")
    assert line == 2 and row == {"column 1": "0", "id": "a", "column 3": "1", "text": "HI"}


def test_null_in_json_means_no_transcript_and_a_number_is_refused(tmp_path):
    write_audio(tmp_path / "a.wav", make_waveform(np.random.default_rng(0), 0.4))
    write_table(tmp_path / "m.jsonl", [{"id": "a", "path": "a.wav", "text": None}])
    (utterance,) = open_corpus(tmp_path / "m.jsonl").utterances("all")
    assert utterance.transcript is None
    write_table(tmp_path / "m.jsonl", [{"id": 7, "path": "a.wav", "text": 5}])
    with pytest.raises(InputError, match="line 1: text must be text; got 5"):
        open_corpus(tmp_path / "m.jsonl").utterances("all")
    write_table(tmp_path / "m.jsonl", [{"id": 7, "path": "a.wav", "text": "A"}])
    assert open_corpus(tmp_path / "m.jsonl").utterances("all")[0].id == "7"
