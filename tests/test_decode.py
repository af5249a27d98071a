"""The decode command on tiny archives with an untrained model: everything except accuracy."""

import csv
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_checkpoints import MODEL, make_checkpoint
from tiny_corpora import EDITIONS, make_archive, make_manifest

from las_fast import decode as command
from las_fast.checkpoint import build_model
from las_fast.cli import run
from las_fast.config import Config, DataConfig, FeatureConfig
from las_fast.data.layouts import open_corpus
from las_fast.decode import main
from las_fast.errors import InputError
from las_fast.output import faults
from las_fast.output.metrics import score
from las_fast.output.transcripts import Word
from las_fast.recogniser import Recogniser
from las_fast.search.beam import TokenHypothesis
from las_fast.text import Vocabulary


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with an F23 archive and a checkpoint for it."""
    folder = tmp_path_factory.mktemp("decode")
    make_archive(folder, "F23", utterances=5)
    make_checkpoint(folder)
    return folder


def decode(
    workspace, *argv, split="dev-clean", data="11-785-f23-hw4p2", checkpoint="untrained-28.safetensors", out=None
):
    arguments = ["--checkpoint", str(workspace / checkpoint), "--data", str(workspace / data), "--split", split]
    main([*arguments, "--out", str(out or workspace / "out.csv"), "--device", "cpu", *argv])


def rows(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def fails(workspace, capsys, *argv, **options):
    """Run the command with errors handled; return its one-sentence error."""
    out = workspace / "never" / "out.csv"
    with pytest.raises(SystemExit) as end:
        run(lambda _: decode(workspace, *argv, out=options.pop("out", out), **options))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert not out.exists()
    return err


def test_the_last_line_is_json_with_scores_and_speed(workspace, capsys, tmp_path):
    decode(workspace, "--jsonl", str(tmp_path / "rows.jsonl"))
    result = last_line(capsys)
    assert list(result) == ["utterances", "ld", "cer", "wer", "seconds", "audio_seconds", "rtfx"]
    actual = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    scores = score([row["reference"] for row in actual], [row["text"] for row in actual])
    assert result["utterances"] == 5 and result["ld"] == pytest.approx(scores.ld, abs=1e-3)
    assert result["cer"] == pytest.approx(scores.cer, abs=1e-3) and result["audio_seconds"] > 0


def test_texts_that_ignore_the_audio_are_warned_of(workspace, capsys, monkeypatch):
    decode(workspace, "--beam", "1")
    assert "follow" not in capsys.readouterr().err  # texts of an untrained model, too short to judge
    monkeypatch.setattr(faults, "MIN_REPEATED", 5)
    decode(workspace, "--beam", "1")
    assert re.search(r"warning: \d of 5 texts repeat one piece, such as", err := capsys.readouterr().err), err
    assert "untrained-28.safetensors does not follow this audio: look at its attention lines" in err


def test_long_utterances_are_warned_of(workspace, capsys, monkeypatch):
    decode(workspace)
    assert "longer than" not in capsys.readouterr().err
    monkeypatch.setattr(command, "LONG_SECONDS", 0.1)
    decode(workspace)
    expected = (
        r"warning: 5 of 5 utterances are longer than 0.1 s, the longest is \S+ \(\d+ s\); models invent text in long"
    )
    assert re.search(expected, err := capsys.readouterr().err), err


def test_the_edition_and_a_table_are_printed(workspace, capsys):
    decode(workspace)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data: HW4P2 F23"
    assert [line.split()[0] for line in lines[1:-1]] == ["utterances", "LD", "CER", "WER", "speed", "written"]


def test_a_test_split_without_transcripts_has_no_scores(workspace, capsys):
    decode(workspace, split="test")
    assert list(last_line(capsys)) == ["utterances", "seconds", "audio_seconds", "rtfx"]


@pytest.mark.parametrize("edition", EDITIONS)
def test_each_edition_gets_its_own_header_and_order(edition, tmp_path, capsys):
    layout = EDITIONS[edition]
    archive = make_archive(tmp_path, edition, utterances=4)
    checkpoint = make_checkpoint(tmp_path, layout.size)
    out, jsonl = tmp_path / "out.csv", tmp_path / "rows.jsonl"
    decode(tmp_path, "--jsonl", str(jsonl), split="test", data=archive, checkpoint=checkpoint.name, out=out)
    header, *body = rows(out)
    assert tuple(header) == layout.header
    texts = {row["id"]: row["text"] for row in map(json.loads, jsonl.read_text().splitlines())}
    corpus = open_corpus(archive)
    ids = [utterance.id for utterance in corpus.utterances(corpus.roles["test"][0])]
    assert [text for _, text in body] == [texts[i] for i in ids]
    assert [first for first, _ in body] == ([str(i) for i in range(4)] if corpus.numbered else ids)
    assert all(text == text.upper() and "<" not in text for _, text in body)


def test_json_lines_hold_scores_frames_and_the_n_best(workspace, tmp_path):
    decode(workspace, "--jsonl", str(tmp_path / "deep" / "rows.jsonl"), "--nbest", "3", "--beam", "4")
    actual = [json.loads(line) for line in (tmp_path / "deep" / "rows.jsonl").read_text().splitlines()]
    for row in actual:
        assert list(row) == ["id", "text", "score", "words", "frames", "nbest", "reference"]
        assert len(row["frames"]) == len(row["text"]) and len(row["nbest"]) == 3
        assert row["nbest"][0] == {name: row[name] for name in ("text", "score", "words")} and row["score"] < 0
        for one in row["nbest"]:
            assert [word["word"] for word in one["words"]] == one["text"].split()
            assert all(list(word) == ["word", "start", "end", "confidence"] for word in one["words"])
            assert all(0 <= word["start"] <= word["end"] and 0 <= word["confidence"] <= 1 for word in one["words"])


@pytest.mark.parametrize("option", ["--beam-threshold", "--decoding.beam-threshold"])
def test_a_beam_threshold_leaves_fewer_hypotheses_than_nbest(workspace, tmp_path, option):
    decode(workspace, "--jsonl", str(tmp_path / "rows.jsonl"), "--nbest", "4", "--beam", "4", option, "0.001")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(1 <= len(row["nbest"]) <= 4 for row in rows) and min(len(row["nbest"]) for row in rows) < 4


def test_nbest_may_be_the_whole_beam(workspace, tmp_path):
    decode(workspace, "--jsonl", str(tmp_path / "rows.jsonl"), "--nbest", "2", "--beam", "2")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [len(row["nbest"]) for row in rows] == [2] * 5


def test_results_do_not_depend_on_the_batch(workspace, tmp_path):
    decode(workspace, out=tmp_path / "one.csv", split="train")
    decode(workspace, "--decoding.frames-per-batch", "1", out=tmp_path / "two.csv", split="train")
    assert rows(tmp_path / "one.csv") == rows(tmp_path / "two.csv")


def test_decoding_fields_reach_the_search(workspace, tmp_path):
    settings = ["--decoding.maximum-share", "0.0", "--decoding.maximum-extra", "2", "--decoding.minimum-share", "1.0"]
    decode(workspace, *settings, out=tmp_path / "short.csv")
    assert all(len(text) == 2 for _, text in rows(tmp_path / "short.csv")[1:])


def test_the_folder_of_the_output_is_made(workspace, tmp_path):
    decode(workspace, out=tmp_path / "a" / "b" / "out.csv")
    assert os.listdir(tmp_path / "a" / "b") == ["out.csv"]


def test_a_skipped_utterance_still_has_a_row(tmp_path, capsys):
    archive = make_archive(tmp_path, "F23", utterances=5)
    make_checkpoint(tmp_path)
    bad = sorted((archive / "test-clean" / "mfcc").iterdir())[2]
    bad.write_bytes(b"")
    assert bad.name in fails(tmp_path, capsys, split="test")
    decode(tmp_path, "--on-bad", "skip", split="test")
    assert [row[0] for row in rows(tmp_path / "out.csv")] == ["index", "0", "1", "2", "3", "4"]
    assert rows(tmp_path / "out.csv")[3][1] == "" and last_line(capsys)["utterances"] == 4


def test_files_added_or_removed_during_decoding_move_no_text(workspace, monkeypatch, tmp_path):
    archive = make_archive(tmp_path, "S25", utterances=4)
    make_checkpoint(tmp_path, 80)
    decode(tmp_path, data=archive.name, checkpoint="untrained-80.safetensors", split="test")
    expected, folder = rows(tmp_path / "out.csv"), archive / "test-clean" / "fbank"
    whole = Recogniser.decode_dataset

    def decode_dataset(*arguments, **options):
        hypotheses = whole(*arguments, **options)
        first, *_ = sorted(folder.iterdir())
        shutil.copy(first, folder / "0.npy")
        first.unlink()
        return hypotheses

    monkeypatch.setattr(Recogniser, "decode_dataset", decode_dataset)
    decode(tmp_path, data=archive.name, checkpoint="untrained-80.safetensors", split="test")
    assert rows(tmp_path / "out.csv") == expected and len(expected) == 5


def test_a_manifest_of_features_may_have_another_name_than_that_of_the_training(tmp_path, capsys):
    archive = make_archive(tmp_path, "F23", utterances=3)
    lines = "".join(f"{path}\n" for path in sorted((archive / "dev-clean" / "mfcc").iterdir()))
    (tmp_path / "dev.tsv").write_text(f"path\n{lines}")
    info = {"data": {"kind": "features", "name": "manifest train.tsv"}}
    decode(tmp_path, data="dev.tsv", split="dev", checkpoint=make_checkpoint(tmp_path, info=info).name)
    assert "warning: checkpoint" not in capsys.readouterr().err


def test_audio_is_decoded_with_the_checkpoints_features(tmp_path, capsys):
    manifest = make_manifest(tmp_path / "data")
    checkpoint = make_checkpoint(tmp_path, 20, mel_bins=23)
    decode(tmp_path, split="dev", data=manifest, checkpoint=checkpoint.name)
    assert rows(tmp_path / "out.csv")[0] == ["id", "label"] and last_line(capsys)["utterances"] == 4


def test_features_of_another_size_are_an_error_that_names_both(workspace, capsys):
    make_checkpoint(workspace, 13)
    message = fails(workspace, capsys, checkpoint="untrained-13.safetensors")
    assert "HW4P2 F23 has 28 values per frame" in message and "untrained-13.safetensors was trained on 13" in message


AUDIO = {"data": {"kind": "audio", "name": "LibriSpeech"}}


def archive(edition):
    return {"data": {"kind": "features", "name": f"HW4P2 {edition}"}}


def test_an_archive_is_not_decoded_with_a_checkpoint_of_audio(tmp_path, capsys):
    root = make_archive(tmp_path, "F24")
    options = {"data": root, "checkpoint": make_checkpoint(tmp_path, 80, info=AUDIO).name}
    message = fails(tmp_path, capsys, **options)
    assert "trained on frames computed from audio (LibriSpeech), but HW4P2 F24 has precomputed frames" in message
    assert "--any-features" in message
    decode(tmp_path, "--any-features", **options)
    assert capsys.readouterr().err.count("warning: checkpoint") == 1 and len(rows(tmp_path / "out.csv")) == 5


def test_audio_is_not_decoded_with_a_checkpoint_of_an_archive(tmp_path, capsys):
    manifest = make_manifest(tmp_path / "data")
    options = {"data": manifest, "split": "dev", "checkpoint": make_checkpoint(tmp_path, info=archive("F23")).name}
    message = fails(tmp_path, capsys, **options)
    assert "trained on precomputed frames (HW4P2 F23), but " in message
    assert "has frames computed from audio" in message
    decode(tmp_path, "--any-features", **options)
    assert "warning: " in capsys.readouterr().err and len(rows(tmp_path / "out.csv")) == 5


def test_another_edition_with_frames_of_the_same_size_is_a_warning(tmp_path, capsys):
    root = make_archive(tmp_path, "S24")
    checkpoint = make_checkpoint(tmp_path, 27, info=archive("S23")).name
    decode(tmp_path, data=root, checkpoint=checkpoint)
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: checkpoint"))
    assert "was trained on HW4P2 S23, but this is HW4P2 S24" in warning
    make_checkpoint(tmp_path, 27, info=archive("S24"))
    decode(tmp_path, data=root, checkpoint=checkpoint)
    assert "warning: checkpoint" not in capsys.readouterr().err


def write_manifest(folder, *texts, splits=None, sections=None):
    """Write recordings, a manifest with these transcripts (None means no transcript), and a checkpoint."""
    source = [json.loads(line) for line in make_manifest(folder, suffix=".jsonl").read_text().splitlines()]
    lines = []
    for i, text in enumerate(texts):
        row = {"id": f"u{i}", "path": source[i]["path"], "split": (splits or ["dev"] * len(texts))[i]}
        lines.append(json.dumps(row if text is None else {**row, "transcript": text}) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines))
    make_checkpoint(folder, 20, mel_bins=23, sections=sections)
    return {"data": "manifest.jsonl", "split": "dev", "checkpoint": "untrained-20.safetensors"}


def references(path):
    return [json.loads(line).get("reference") for line in path.read_text().splitlines()]


def test_transcripts_outside_the_vocabulary_are_refused_or_mapped(tmp_path, capsys):
    options = write_manifest(tmp_path, "HELLO", "well, yes", "A-B")
    message = fails(tmp_path, capsys, **options)
    assert "2 of 3 transcripts, first that of u1, have characters outside" in message
    assert "'s' 'w' 'y'; map them with --normalise-text" in message and "',' '-' 'e'" in message
    decode(tmp_path, "--normalise-text", "--jsonl", str(tmp_path / "rows.jsonl"), **options)
    assert references(tmp_path / "rows.jsonl") == ["HELLO", "WELL YES", "A B"]


def test_transcripts_are_mapped_for_a_checkpoint_that_was_trained_so(tmp_path, capsys):
    options = write_manifest(tmp_path, "well, yes", sections={"data": DataConfig(normalise_text=True)})
    decode(tmp_path, "--jsonl", str(tmp_path / "rows.jsonl"), **options)
    assert references(tmp_path / "rows.jsonl") == ["WELL YES"]
    options = write_manifest(tmp_path, "AT 42", sections={"data": DataConfig(normalise_text=True)})
    assert "'2' '4'; write digits as words in the transcripts" in fails(tmp_path, capsys, **options)


def test_digits_cannot_be_mapped_and_the_error_says_to_write_words(tmp_path, capsys):
    options = write_manifest(tmp_path, "HELLO", "AT 42")
    assert fails(tmp_path, capsys, **options).endswith("vocabulary: '2' '4'; write digits as words\n")
    message = fails(tmp_path, capsys, "--normalise-text", **options)
    assert "'2' '4'; write digits as words in the transcripts" in message and "--normalise-text" not in message


def test_scores_say_how_many_utterances_have_transcripts(tmp_path, capsys):
    options = write_manifest(tmp_path, "HELLO", None, "", " ", "YES")
    decode(tmp_path, "--jsonl", str(tmp_path / "rows.jsonl"), **options)
    printed = capsys.readouterr().out
    actual = json.loads(printed.splitlines()[-1])
    assert actual["utterances"] == 5 and actual["scored"] == 2 and "ld" in actual
    assert "scored      2; the other 3 have no transcript" in printed
    assert references(tmp_path / "rows.jsonl") == ["HELLO", None, None, None, "YES"]


def test_only_blank_transcripts_give_no_scores(tmp_path, capsys):
    decode(tmp_path, **write_manifest(tmp_path, "", " "))
    assert list(last_line(capsys)) == ["utterances", "seconds", "audio_seconds", "rtfx"]


def test_ids_shared_by_two_splits_get_the_split_as_a_prefix_in_both_files(tmp_path, capsys):
    options = write_manifest(tmp_path, "ONE", "TWO", "THREE", "FOUR", splits=["train", "train", "dev", "dev"])
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"u2"', '"u0"'))
    (tmp_path / json.loads(manifest.read_text().splitlines()[1])["path"]).write_bytes(b"")
    argv = ["--on-bad", "skip", "--jsonl", str(tmp_path / "rows.jsonl")]
    decode(tmp_path, *argv, **{**options, "split": "train+dev"})
    actual = [json.loads(line)["id"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert actual == ["train/u0", "dev/u0", "dev/u3"]
    assert [row[0] for row in rows(tmp_path / "out.csv")[1:]] == ["train/u0", "train/u1", "dev/u0", "dev/u3"]


def test_json_lines_are_utf_8_as_they_are_read(tmp_path):
    options = write_manifest(tmp_path, "ONE", "TWO")
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"u1"', '"fünf"'), encoding="utf-8")
    decode(tmp_path, "--jsonl", str(tmp_path / "rows.jsonl"), **options)
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()[1].startswith('{"id": "fünf", "text": ')


def test_a_missing_checkpoint_is_an_error_and_never_random_weights(workspace, capsys):
    assert "gone" in fails(workspace, capsys, checkpoint="gone")


def test_a_corrupt_checkpoint_is_an_error(workspace, capsys):
    whole = (workspace / "untrained-28.safetensors").read_bytes()
    (workspace / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cut.safetensors" in fails(workspace, capsys, checkpoint="cut.safetensors")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--split", "dev-other"], "no split 'dev-other'; it has"),
        (["--nbest", "9"], "--nbest 9 needs --jsonl FILE, where the hypotheses are written"),
        (["--nbest", "9", "--beam", "2", "--jsonl", "r.jsonl"], "--nbest 9 needs a beam of at least 9; give --beam 9"),
        (["--speeds", "0.3"], "--speeds must be at least 0.5; got 0.3"),
        (["--warps", "nan"], "--warps must be a finite number; got nan"),
        (["--view-threshold", "-1"], "--view-threshold must be at least 0; got -1"),
        (["--view-threshold", "nan"], "--view-threshold must be a finite number; got nan"),
        (["--view-threshold", "inf"], "--view-threshold must be a finite number; got inf"),
        (
            ["--view-threshold", "0.5", "--decoding.view-threshold", "0.4"],
            "--view-threshold 0.5 and --decoding.view-threshold 0.4 disagree; give one of them",
        ),
        (
            ["--speeds", "1", "0.9", "--warps", "1", "1", "1.1"],
            "speeds has 2 values and decoding.warps 3; give",
        ),
        (
            ["--decoding.speeds", "0.8", "1", "--speeds", "1"],
            "--speeds 1 and --decoding.speeds 0.8 1 disagree; give one of them",
        ),
        (
            ["--precision", "bf16", "--decoding.precision", "fp32"],
            "--precision bf16 and --decoding.precision fp32 disagree; give one of them",
        ),
        (["--decoding.beam", "4", "--beam", "8"], "--beam 8 and --decoding.beam 4 disagree; give one of them"),
        (["--beam-threshold", "-1"], "--beam-threshold must be a finite number of at least 0; got -1"),
        (["--decoding.beam-threshold", "-1"], "decoding.beam_threshold must be at least 0; got -1"),
        (["--beam-threshold", "nan"], "--beam-threshold must be a finite number of at least 0; got nan"),
        (
            ["--beam-threshold", "2", "--decoding.beam-threshold", "3.5"],
            "--beam-threshold 2 and --decoding.beam-threshold 3.5 disagree; give one of them",
        ),
        (["--nbest", "0"], "--nbest must be at least 1"),
        (["--beam", "0"], "--beam must be from 1 to 1000; got 0"),
        (["--device", "cuda:77"], "--device cuda:77: there is no such device here"),
        (["--device", "nonsense"], "--device nonsense: there is no such device here; this machine has cpu"),
        (["--device", "privateuseone"], "--device privateuseone: there is no such device here"),
        (["--device", ""], "--device : there is no such device here"),
        (["--device", "meta"], "--device meta: there is no such device here"),
        (["--data", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_options_are_a_one_sentence_error(workspace, capsys, argv, message):
    assert message in fails(workspace, capsys, *argv)


def test_a_folder_as_output_file_is_refused(workspace, capsys, tmp_path):
    assert f"{tmp_path} is a folder" in fails(workspace, capsys, out=tmp_path)


def test_an_output_folder_that_cannot_be_made_is_an_error_before_decoding(workspace, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out.csv", tmp_path / "file" / "deep" / "out.csv"):
        assert f"--out: the folder {out.parent} cannot be created ({tmp_path / 'file'} is a file)" in fails(
            workspace, capsys, out=out
        )
    jsonl = str(tmp_path / "file" / "rows.jsonl")
    assert "--jsonl: the folder" in fails(workspace, capsys, "--jsonl", jsonl, out=tmp_path / "out.csv")


def test_two_results_need_two_files(workspace, capsys, tmp_path):
    out = tmp_path / "out.csv"
    (tmp_path / "deep").mkdir()
    for same in (out, tmp_path / "deep" / ".." / "out.csv"):
        assert f"--out and --jsonl are both {out}" in fails(workspace, capsys, "--jsonl", str(same), out=out)


def test_a_full_disk_leaves_no_partial_file(workspace, capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    decode(workspace, out=tmp_path / "warm.csv")  # the feature cache exists now
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(SystemExit):
        run(lambda _: decode(workspace, out=tmp_path / "out.csv"))
    assert "No space left" in capsys.readouterr().err and os.listdir(tmp_path) == ["warm.csv"]


def test_the_cache_of_the_training_is_not_used(tmp_path):
    make_archive(tmp_path, "F23", utterances=1)
    make_checkpoint(tmp_path, sections={"data": DataConfig(cache=str(tmp_path / "cache"))})
    decode(tmp_path)
    assert (tmp_path / "out.csv").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("missing", ["--checkpoint", "--data", "--split", "--out"])
def test_missing_required_options_are_named(missing, capsys):
    required = {"--checkpoint": "x", "--data": "y", "--split": "dev", "--out": "z.csv"}
    del required[missing]
    with pytest.raises(SystemExit):
        main([word for pair in required.items() for word in pair])
    assert f"{missing} must be given" in capsys.readouterr().err


def test_help_lists_options_and_the_settings_of_decoding_once(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and out.count("-h, --help") == 1 and "--any-features" in out
    assert "--decoding.length-penalty" in out and "--training.epochs" not in out


def test_options_have_their_types_and_defaults():
    argv = ["--checkpoint", "x", "--data", "y", "--split", "dev", "--out", "z.csv"]
    plain = command.parser().parse_args(argv)
    assert (plain.data, plain.out, plain.beam, plain.nbest, plain.jsonl) == (Path("y"), Path("z.csv"), None, 1, None)
    assert (plain.lm, plain.on_bad, plain.device) == (None, "error", "auto")
    assert not plain.normalise_text and not plain.any_features
    argv += ["--beam", "3", "--nbest", "2", "--jsonl", "r.jsonl", "--normalise-text", "--any-features"]
    options = command.parser().parse_args(argv)
    assert (options.beam, options.nbest, options.jsonl) == (3, 2, Path("r.jsonl"))
    assert options.normalise_text and options.any_features


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--on-bad", "ignore"], "--on-bad must be one of error, skip; got 'ignore'"),
        (["--nbest", "x"], "--nbest must be a whole number; got 'x'"),
        (["--beam", "1.5"], "--beam must be a whole number; got '1.5'"),
        (["--jsonl", "folder/"], "folder/ is a folder; give the name of a file to write"),
        (["--out", "folder/"], "folder/ is a folder; give the name of a file to write"),
    ],
)
def test_option_values_of_another_type_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        main(["--checkpoint", "x", "--data", "y", "--split", "dev", "--out", "z.csv", *argv])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [("id,label", True), ("Index,Labels", True), ("ID,transcription", True), ("id,predictions", True), ("id", False),
     ("name,label", False), ("id,text", False), ("id,label,more", False), ("", False)],
)  # fmt: skip
def test_a_submission_is_recognised_by_its_two_columns(tmp_path, line, expected):
    path = tmp_path / "s.csv"
    path.write_text(f"{line}\nu0,TEXT\n")
    assert command.is_submission(path) is expected


def test_json_lines_are_recognised_by_their_beginning(tmp_path):
    path = tmp_path / "r.jsonl"
    manifest = '{"id": "u0", "path": "a.wav", "text": "A"}'
    for text, expected in (('{"id": "u0", "text": "A", "score": -1.5}\n', True), ('{"name": "u0"}\n', False),
                           ('[{"id": 1}]', False), (manifest, False)):  # fmt: skip
        path.write_text(text)
        assert command.is_jsonl(path) is expected


@pytest.mark.parametrize("name", ["--out", "--jsonl"])
@pytest.mark.parametrize("option", ["--data", "--checkpoint", "--lm"])
def test_input_files_are_not_overwritten(tmp_path, name, option):
    file = tmp_path / "x"
    file.write_text('{"id": ' if name == "--jsonl" else "id,label\n")
    argv = {"--checkpoint": "x", "--data": "y", "--split": "dev", "--out": str(tmp_path / "z.csv")}
    argv |= {option: str(file), name: str(file)}
    with pytest.raises(InputError, match=f"{name} .*x is an input of this command"):
        main([word for pair in argv.items() for word in pair])


def test_json_lines_need_their_suffix_and_replace_only_json_lines(workspace, tmp_path):
    for name in ("rows.csv", "rows.wav"):
        with pytest.raises(InputError, match=r"the output is JSON Lines; .* ends in .jsonl"):
            decode(workspace, "--jsonl", str(tmp_path / name), out=tmp_path / "out.csv")
    for name in ("rows.json", "rows.txt", "rows"):
        for _ in range(2):
            decode(workspace, "--jsonl", str(tmp_path / name), out=tmp_path / "out.csv")
    (tmp_path / "mine.jsonl").write_text("notes")
    with pytest.raises(InputError, match=r"mine.jsonl exists and is not JSON Lines; give another name"):
        decode(workspace, "--jsonl", str(tmp_path / "mine.jsonl"), out=tmp_path / "out.csv")


def fake_dataset(texts, **fields):
    plain = {"texts": texts, "ids": [f"u{i}" for i in range(len(texts))], "skipped": []}
    kind = type("Dataset", (SimpleNamespace,), {"__len__": lambda self: len(self.texts)})
    return kind(**(plain | fields))


@pytest.mark.parametrize("count", [20, 21, 23])
def test_no_more_than_twenty_unknown_characters_are_listed(count):
    text = "".join(chr(ord("a") + i) for i in range(count))
    with pytest.raises(InputError) as caught:
        command.check_references(fake_dataset([text]), SimpleNamespace(vocabulary=Vocabulary()), normalised=False)
    listed = " ".join(map(repr, text[:20]))
    more = {20: "", 21: " and 1 more", 23: " and 3 more"}[count]
    assert f"vocabulary: {listed}{more}; map them with --normalise-text" in str(caught.value)


def test_a_row_has_scores_of_four_digits_and_frames_of_the_recording():
    def recording_frame(i, frame):
        return 100 * i + 2 * frame

    dataset = fake_dataset(["A", " "], recording_frame=recording_frame, seconds=np.array([3.0, 3.0]))
    config = SimpleNamespace(features=FeatureConfig())
    loaded = SimpleNamespace(vocabulary=Vocabulary(), model=SimpleNamespace(time_reduction=4), config=config)
    word = Word("AB", 0.105, 0.21, 0.123456)  # in frames 10 to 20
    several = [
        TokenHypothesis([3, 4], -1.23456, -1.0, [0, 3], [], True, None, (word,)),
        TokenHypothesis([5], -2.00004, -1.0, [9], [], True),
    ]
    row = command.jsonl_row(dataset, 1, several, loaded)
    # 100 + 2 * frame is 110 frames later for frame 10, 120 for frame 20
    words = [{"word": "AB", "start": 1.205, "end": 1.41, "confidence": 0.1235}]
    best, other = {"text": "AB", "score": -1.2346, "words": words}, {"text": "C", "score": -2.0, "words": []}
    frames = [(100 + 2 * 2) // 4, (100 + 2 * 14) // 4]
    assert row == {"id": "u1", **best, "frames": frames, "nbest": [best, other]}
    assert list(row) == ["id", "text", "score", "words", "frames", "nbest"]
    assert command.jsonl_row(dataset, 0, several, loaded)["reference"] == "A"


def test_the_summary_has_only_the_scores_that_exist():
    rows = [{"text": "AB", "reference": "AC"}, {"text": "A B"}, {"text": "C D", "reference": "C D E"}]
    dataset = fake_dataset([None] * 3, seconds=np.array([1.0, 2.0, 0.56789]), skipped=["u3"])
    scores = {"ld": 1.5, "cer": round(300 / 7, 4), "wer": 50.0}
    times = {"seconds": 2.346, "audio_seconds": 3.568, "rtfx": round(3.56789 / 2.34567, 3)}
    actual = command.summarise(dataset, rows, 2.34567)
    assert actual == {"utterances": 3, "skipped": 1, "scored": 2, **scores, **times}
    assert list(actual)[:3] == ["utterances", "skipped", "scored"]
    dataset.skipped = []
    actual = command.summarise(dataset, rows[::2], 2.34567)
    assert actual == {"utterances": 2, **scores, **times}
    assert command.summarise(dataset, rows[:2], 2.34567)["scored"] == 1
    assert command.summarise(dataset, rows[1:2], 0.0)["rtfx"] > 1e9


def test_the_summary_is_printed_in_words():
    times = {"seconds": 12.34, "audio_seconds": 150.6, "rtfx": 12.2}
    whole = {"utterances": 5, "skipped": 2, "scored": 3, "ld": 1.234, "cer": 10.126, "wer": 33.333, **times}
    speed, written = "speed       151 s of audio in 12.3 s, 12 x real time", "written     a/out.csv"
    assert command.format_summary(whole, Path("a/out.csv")).splitlines() == [
        "utterances  5",
        "left out    2 that could not be used; their rows in out.csv are empty",
        "scored      3; the other 2 have no transcript",
        "LD          1.23 characters per utterance",
        "CER         10.13 %",
        "WER         33.33 %",
        speed,
        written,
    ]
    assert command.format_summary({"utterances": 5, **times}, Path("a/out.csv")).splitlines() == [
        "utterances  5", speed, written,
    ]  # fmt: skip


def test_a_device_must_exist_and_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.choose_device(" CPU ") == torch.device("cpu") == command.choose_device("auto")
    made = []
    monkeypatch.setattr(torch, "zeros", lambda n, device: made.append(device) or torch.ones(n))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, device in (("auto", "cuda"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        assert command.choose_device(name) == torch.device(device)
    assert made == ["cuda", "cuda:1", "cpu"]
    with pytest.raises(InputError, match="--device cuda:2: .*; this machine has cpu, cuda, cuda:0, cuda:1$"):
        command.choose_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert command.choose_device("mps") == torch.device("mps") and command.choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("device is busy\nmore", r"--device cpu cannot be used \(device is busy\); wait for it"),
        ("CUDA out of memory. Tried to allocate", r"--device cpu cannot be used \(its memory is full\); wait for it"),
    ],
)
def test_an_unusable_device_is_a_one_sentence_error(monkeypatch, error, message):
    def fail(*_, **__):
        raise torch.OutOfMemoryError(error) if "memory" in error else RuntimeError(error)

    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(InputError, match=message):
        command.choose_device("cpu")


def test_the_real_model_gives_the_same_result_alone_and_in_a_batch():
    from las_fast.search.beam import beam_search

    config = Config(features=FeatureConfig(size=28), model=MODEL)
    torch.manual_seed(2)
    model = build_model(config).eval()
    lengths = torch.tensor([31, 7, 18])
    features = torch.randn(3, 31, 28)
    decoding = replace(config.decoding, beam=4)
    together = beam_search(model, model.listen(features, lengths), decoding, nbest=4)
    for b, n in enumerate(lengths.tolist()):
        (alone,) = beam_search(model, model.listen(features[b : b + 1, :n], lengths[b : b + 1]), decoding, nbest=4)
        assert [h.text_tokens for h in alone] == [h.text_tokens for h in together[b]]
        assert [h.score for h in alone] == pytest.approx([h.score for h in together[b]], abs=1e-4)
