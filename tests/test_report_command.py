"""The command las_fast.report: options, decoded utterances, recordings, and errors."""

import base64
import io
import json

import numpy as np
import pytest
import soundfile
from tiny_corpora import make_archive, make_kaldi, make_manifest

from las_fast import report
from las_fast.errors import InputError
from las_fast.output.mistakes import Decoded

ROWS = [
    {"id": "dev-0", "text": "A CAT", "reference": "A BAT", "words": [{"word": "A", "confidence": 0.9},
                                                                     {"word": "CAT", "confidence": 0.2}]},
    {"id": "dev-1", "text": "", "reference": "ALL MISSED"},
    {"id": "dev-2", "text": "SAME", "reference": "SAME"},
    {"id": "dev-3", "text": "NO REFERENCE"},
]  # fmt: skip


def write_rows(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_run(path):
    path.mkdir(parents=True)
    row = {"kind": "valid", "step": 1, "epoch": 1.0, "loss": 1.0, "ld": 2.0, "cer": 3.0, "wer": 4.0, "monitor": {}}
    (path / "log.jsonl").write_text(json.dumps(row) + "\n")
    return path


def fail(capsys, *words):
    with pytest.raises((SystemExit, InputError)) as error:
        report.main([str(word) for word in words])
    return str(error.value) if error.type is InputError else capsys.readouterr().err


def test_one_run_is_reported_in_its_folder(tmp_path, capsys):
    run = make_run(tmp_path / "my-run")
    report.main([str(run)])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<h1>Training my-run</h1>" in page and "<b>3.00 %</b><span>CER</span><small>dev, greedy</small>" in page
    assert "http" not in page and "<script" not in page
    assert capsys.readouterr().out.startswith(f"written     {run / 'report.html'} (0.0 MB)")
    report.main([str(run), "--title", "again & again"])  # replaces its own page
    assert "<h1>again &amp; again</h1>" in (run / "report.html").read_text(encoding="utf-8")


def test_several_runs_are_compared_in_a_named_file(tmp_path, capsys):
    runs = [make_run(tmp_path / name) for name in "abc"]
    assert "a comparison of 3 runs needs a file; give --out FILE.html" in fail(capsys, *runs)
    report.main([*map(str, runs), "--out", str(tmp_path / "new" / "all.html")])
    page = (tmp_path / "new" / "all.html").read_text(encoding="utf-8")
    assert "<h1>Trainings a, b and c</h1>" in page and "<h2>Different settings</h2>" in page


def test_a_decoding_adds_scores_utterances_confusions_and_errors(tmp_path):
    run = make_run(tmp_path / "run")
    report.main([str(run), "--decode", str(write_rows(tmp_path / "dev.jsonl"))])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<h1>Training run, decoding dev.jsonl</h1>" in page and "1 of 3 have no error" in page
    assert f"<b>{100 * 11 / 19:.2f} %</b><span>CER</span>" in page and "NO REFERENCE" not in page
    assert "<h2>Confused characters</h2>" in page and "over the length of the reference" in page
    assert "50.0 % of 2 words are right; the mean confidence is 55.0 %." in page


def test_recordings_of_the_worst_utterances_are_in_the_page(tmp_path, capsys):
    manifest = make_manifest(tmp_path / "data")
    run, rows = make_run(tmp_path / "run"), write_rows(tmp_path / "dev.jsonl")
    (tmp_path / "data" / "audio" / "dev-1.wav").write_bytes(b"damaged")
    report.main([str(run), "--decode", str(rows), "--data", str(manifest)])
    printed = capsys.readouterr().out
    assert "recordings  1 of the worst utterances, as MP3 inside the page" in printed and "left out: " in printed
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<audio") == 1, "dev-1 is damaged, dev-2 has no error"
    data = page.partition("data:audio/mpeg;base64,")[2].partition('"')[0]
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
    original, _ = soundfile.read(tmp_path / "data" / "audio" / "dev-0.wav")
    assert rate == 16000 and len(samples) == pytest.approx(len(original), abs=2400)
    assert np.abs(samples).max() == pytest.approx(np.abs(original).max(), rel=0.3)


def test_an_id_that_two_splits_share_plays_the_recording_of_its_reference(tmp_path, capsys):
    manifest = make_manifest(tmp_path / "data", suffix=".jsonl", utterances=2)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    texts = ["A cat.", "A dog", "A BAT", "A DOG"]  # of train-0, train-1, dev-0, dev-1
    lines = [row | {"id": row["id"][-1], "transcript": text} for row, text in zip(rows, texts, strict=True)]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    decoded = [Decoded("0", "A BAT", ""), Decoded("1", "A DOG", ""), Decoded("train/0", "A CAT", "")]
    audio = report.recordings(manifest, decoded)
    assert capsys.readouterr().out == "left out: 2 splits have an utterance 1\n" and list(audio) == ["0", "train/0"]
    for name, path in (("0", "dev-0"), ("train/0", "train-0")):
        samples, _ = soundfile.read(tmp_path / "data" / "audio" / f"{path}.wav", dtype="float32")
        assert audio[name] == report.as_mp3(samples)


def test_a_recording_with_a_known_problem_is_left_out_with_it(tmp_path, capsys):
    data = make_kaldi(tmp_path, splits=("dev",), recordings=1)
    (data / "dev" / "wav.scp").write_text("dev0 sph2pipe -f wav dev0.sph |\n")
    assert report.recordings(tmp_path, [Decoded("dev0-0", "A", "B")]) == {}
    assert "wav.scp line 1: dev0 is a command (sph2pipe" in capsys.readouterr().out


def test_recordings_of_another_corpus_or_of_features_are_refused(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    rows = write_rows(tmp_path / "dev.jsonl", [{**ROWS[0], "id": "unknown"}])
    manifest = make_manifest(tmp_path / "data")
    assert "--data adds the recordings of decoded utterances" in fail(capsys, run, "--data", manifest)
    assert "has no utterance unknown; give the corpus" in fail(capsys, run, "--decode", rows, "--data", manifest)
    archive = make_archive(tmp_path / "archive", "F23")
    assert "no recordings to listen to; omit --data" in fail(capsys, run, "--decode", rows, "--data", archive)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            b'{"id": "a", "text": "A", "reference": "A"}\n\n{"id": "b"}\n',
            "line 3, is not an utterance with id and text",
        ),
        (b"id,label\n0,A\n", "line 1, is not an utterance"),
        (b"\xff\xfe\n", "line 1, is not an utterance"),
        (b'{"id": "a", "text": "A"}\n', "has no references to compare with"),
        (b'{"id": "a", "text": "A", "reference": null}\n', "has no references to compare with"),
        (b'{"id": "a", "text": "A", "reference": 3}\n', "line 1, is not an utterance"),
        (b'{"id": "a", "text": null, "reference": "A"}\n', "line 1, is not an utterance"),
        (b'{"text": "A", "reference": "A"}\n', "line 1, is not an utterance"),
        (b'["id", "text"]\n', "line 1, is not an utterance"),
        (b"", "has no references to compare with"),
    ],
)
def test_a_file_that_is_no_decoding_is_refused(tmp_path, capsys, content, problem):
    run = make_run(tmp_path / "run")
    (tmp_path / "dev.jsonl").write_bytes(content)
    assert problem in fail(capsys, run, "--decode", tmp_path / "dev.jsonl")
    assert f"--decode {run} is a folder; give the --jsonl file" in fail(capsys, run, "--decode", run)
    assert not (run / "report.html").exists()


def test_a_missing_decoding_names_the_nearest_file(tmp_path, capsys):
    write_rows(tmp_path / "dev.jsonl")
    error = fail(capsys, make_run(tmp_path / "run"), "--decode", tmp_path / "dex.jsonl")
    assert f"does not exist; the nearest is {tmp_path / 'dev.jsonl'}" in error


def test_words_count_only_if_each_has_a_confidence():
    assert report._words([{"word": "A", "confidence": 0.5}, {"word": "B", "confidence": 1.5}]) == (
        ("A", 0.5),
        ("B", 1.0),
    )
    assert report._words([{"word": "A", "confidence": 10**400}]) == (("A", 1.0),)
    nan = [{"word": "A", "confidence": float("nan")}]
    without_text = [{"word": 1, "confidence": 0.5}], [{"confidence": 0.5}]
    without_confidence = [{"word": "A"}], [{"word": "A", "confidence": None}]
    for words in (*without_text, *without_confidence, nan, None, [], ["A"], {"word": "A"}):
        assert report._words(words) == ()


def test_wrong_paths_and_options_are_one_sentence(tmp_path, capsys):
    run = make_run(tmp_path / "runs" / "one")
    assert "RUN must be given; see --help" in fail(capsys)
    assert f"did you mean {run}?" in fail(capsys, tmp_path / "runs" / "onn")
    assert f"did you mean {run}?" in fail(capsys, tmp_path / "runs")
    assert "the nearest is --decode" in fail(capsys, run, "--decoded", "x")
    page = tmp_path / "mine.html"
    page.write_text("<!doctype html>\nmine")
    assert "exists and is not a report of las_fast" in fail(capsys, run, "--out", page)
    assert "the output is a report of las_fast; give a name that ends in .html" in fail(capsys, run, "--out", "x.csv")
    assert page.read_text() == "<!doctype html>\nmine"
