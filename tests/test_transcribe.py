"""Recordings into text, from the command line."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from archives import RATE, make_speech
from checkpoints import make_checkpoint

from las_fast import transcribe as module
from las_fast.cli import run
from las_fast.errors import InputError
from las_fast.output.metrics import score
from las_fast.search import dataset
from las_fast.transcribe import main


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transcribe")
    make_checkpoint(folder, 20, mel_bins=23)
    soundfile.write(folder / "short.wav", make_speech(0.6), 16000)
    soundfile.write(folder / "other.flac", np.stack([make_speech(1.0, rate=22050, seed=1)] * 2, 1), 22050)
    soundfile.write(folder / "long.wav", make_speech(25.0, seed=2), 16000)
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    return folder


def transcribe(here, *words, files=("short.wav",)):
    model = ["--checkpoint", str(here / "untrained-20.safetensors"), "--device", "cpu", "--beam", "2"]
    main([*(f"{here}/{name}" for name in files), *model, *words])


def test_a_long_recording_is_decoded_in_pieces(here, capsys):
    transcribe(here, "--format", "json", files=["long.wav"])
    row = json.loads(capsys.readouterr().out)
    assert len(row["pieces"]) == 2 and row["text"] == " ".join(piece["text"] for piece in row["pieces"])
    first, second = row["pieces"]
    assert 0 <= first["start"] < 0.3 and 10 < first["end"] < 20.2 and second["end"] == pytest.approx(25, abs=0.3)
    assert second["start"] == pytest.approx(first["end"], abs=0.5)
    assert first["mean_score"] < 0 and first["speech_score"] is None  # this model has no CTC head


def test_a_piece_reads_as_if_it_were_a_file_of_its_own(here, capsys):
    transcribe(here, "--format", "json", files=["short.wav", "other.flac", "long.wav"])
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for name, row in zip(["short.wav", "other.flac", "long.wav"], together, strict=True):
        transcribe(here, "--format", "json", files=[name])
        alone = json.loads(capsys.readouterr().out)
        assert alone["text"] == row["text"] and row["file"].endswith(name)


def test_several_files_are_told_apart(here, capsys):
    transcribe(here, files=["short.wav", "other.flac"])
    assert [line.split(": ")[0].rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "short.wav",
        "other.flac",
    ]


def test_a_checkpoint_of_an_archive_is_a_warning(here, tmp_path, capsys):
    for kind, warnings in (("features", 1), ("audio", 0)):
        make_checkpoint(tmp_path, 20, mel_bins=23, info={"data": {"kind": kind, "name": "HW4P2 F23"}})
        transcribe(here, "--checkpoint", str(tmp_path / "untrained-20.safetensors"))
        err = capsys.readouterr().err
        assert err.count("was trained on the frames of HW4P2 F23; those that las_fast computes") == warnings


def test_silence_says_nothing(here, capsys):
    transcribe(here, files=["silent.wav"])
    out, err = capsys.readouterr()
    assert out == "\n" and "silent.wav: no speech was found in its 1.00 seconds" in err


def test_a_click_says_nothing(here, capsys):
    soundfile.write(here / "click.wav", np.full(500, 0.5), 16000)
    transcribe(here, files=["click.wav"])
    out, err = capsys.readouterr()
    assert out == "\n" and "click.wav: no speech was found in its 0.03 seconds" in err


def test_a_recording_that_is_cut_off_is_a_warning(here, capsys):
    transcribe(here, files=["short.wav"])
    assert "warning" not in capsys.readouterr().err
    whole = (here / "short.wav").read_bytes()
    (here / "half.wav").write_bytes(whole[: len(whole) // 2])
    transcribe(here, files=["half.wav"])
    assert "warning: " in (err := capsys.readouterr().err) and "half.wav is cut off: it holds" in err


def test_files_can_go_to_a_folder(here, tmp_path):
    transcribe(here, "--format", "srt", "--out", str(tmp_path / "subs"), files=["short.wav", "other.flac"])
    assert sorted(path.name for path in (tmp_path / "subs").iterdir()) == ["other.srt", "short.srt"]


@pytest.mark.parametrize("below", ["", "deep", "deep/er"])
def test_a_file_where_the_folder_should_be_is_named_before_any_work(here, capsys, tmp_path, below):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as end:
        run(lambda _: transcribe(here, "--out", str(tmp_path / "taken" / below), files=["gone.wav"]))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: --out: the folder") and err.count("\n") == 1
    assert f"({tmp_path / 'taken'} is a file)" in err


@pytest.mark.parametrize(
    ("files", "words", "said"),
    [
        (["gone.wav"], [], "gone.wav"),
        (["short.wav", "other.flac"], ["--format", "srt"], "say where with --out FOLDER"),
        (["short.wav"], ["--beam", "100000"], "decoding.beam must be at most"),
        (["short.wav"], ["--min-speech-score", "nan"], "--min-speech-score must be a number; got nan"),
        (["short.wav"], ["--beam", "0"], "--beam must be at least 1"),
        (["short.wav"], ["--checkpoint", "gone"], "checkpoint gone"),
    ],
)
def test_bad_input_is_one_sentence(here, capsys, files, words, said):
    with pytest.raises(SystemExit) as end:
        run(lambda _: transcribe(here, *words, files=files))
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_file_that_is_no_audio_is_named(here, capsys):
    (here / "noise.wav").write_bytes(b"not audio")
    with pytest.raises(SystemExit):
        run(lambda _: transcribe(here, files=["noise.wav"]))
    assert "noise.wav" in capsys.readouterr().err


def test_files_that_cannot_be_read_may_be_left_out(here, capsys):
    (here / "noise.wav").write_bytes(b"not audio")
    transcribe(here, "--on-bad", "skip", "--format", "json", files=["short.wav", "noise.wav", "gone.wav", "other.flac"])
    said = capsys.readouterr()
    assert [json.loads(line)["file"].rsplit("/", 1)[1] for line in said.out.splitlines()] == ["short.wav", "other.flac"]
    assert "left out" in said.err and "noise.wav" in said.err and "gone.wav does not exist" in said.err
    transcribe(here, "--on-bad", "skip", files=["noise.wav"])
    assert capsys.readouterr().out == ""


def test_each_file_is_written_when_it_is_decoded(here, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POOL_SECONDS", 0.5)
    (here / "noise.wav").write_bytes(b"not audio")
    with pytest.raises(InputError, match="noise.wav"):
        transcribe(here, "--out", str(tmp_path), files=["short.wav", "other.flac", "noise.wav", "long.wav"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "short.txt"]


@pytest.mark.parametrize("pool", [0.1, 5.0, 1e9])
def test_texts_do_not_depend_on_what_is_decoded_together(here, capsys, monkeypatch, pool):
    transcribe(here, "--format", "json", files=["long.wav", "short.wav"])
    expected = capsys.readouterr().out
    monkeypatch.setattr(module, "POOL_SECONDS", pool)
    transcribe(here, "--format", "json", files=["long.wav", "short.wav"])
    assert capsys.readouterr().out == expected


def test_what_cannot_be_decoded_is_an_error_of_its_own(here, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POOL_SECONDS", 0.1)

    def failing(*arguments, **options):
        raise InputError("no memory")

    monkeypatch.setattr(dataset, "decode_dataset", failing)
    with pytest.raises(InputError, match="no memory"):
        transcribe(here, "--on-bad", "skip", "--out", str(tmp_path), files=["short.wav", "other.flac"])


def test_a_recording_is_never_replaced_by_a_transcript(here, tmp_path):
    (tmp_path / "said.txt").write_bytes((here / "short.wav").read_bytes())
    words = ["--checkpoint", str(here / "untrained-20.safetensors"), "--out", str(tmp_path), "--existing", "replace"]
    with pytest.raises(InputError, match="said.txt would replace a recording"):
        main([str(tmp_path / "said.txt"), *words])


def test_a_missing_file_is_said_before_the_work(here, tmp_path):
    with pytest.raises(InputError, match="gone.wav does not exist"):
        transcribe(here, "--out", str(tmp_path), files=["short.wav", "gone.wav"])
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_replaced_only_when_told_so(here, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("my own notes")
    with pytest.raises(InputError, match="1 of 2 files to write exist already, the first is .*short.txt"):
        transcribe(here, "--out", str(tmp_path), files=["short.wav", "other.flac"])
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
    transcribe(here, "--out", str(tmp_path), "--existing", "skip", files=["short.wav", "other.flac"])
    assert (tmp_path / "short.txt").read_text() == "my own notes" and (tmp_path / "other.txt").exists()
    transcribe(here, "--out", str(tmp_path), "--existing", "skip", files=["short.wav", "other.flac"])
    assert "nothing is left to do: all 2" in capsys.readouterr().out
    transcribe(here, "--out", str(tmp_path), "--existing", "replace", files=["short.wav"])
    assert (tmp_path / "short.txt").read_text() != "my own notes"


def test_a_recording_given_twice_is_transcribed_once(here, capsys):
    transcribe(here, "--format", "json", files=["short.wav", "short.wav"])
    assert capsys.readouterr().out.count("short.wav") == 1


def test_standard_input_is_a_recording(here, tmp_path):
    command = [sys.executable, "-m", "las_fast.transcribe", "-", "--checkpoint", str(here / "untrained-20.safetensors")]
    command += ["--device", "cpu", "--beam", "2", "--format", "json", "--out", str(tmp_path)]
    with open(here / "short.wav", "rb") as recording:
        subprocess.run(command, stdin=recording, check=True, cwd=Path(__file__).parents[1])
    transcribe(here, "--format", "json", "--out", str(tmp_path))
    assert read(tmp_path / "stdin.json")["pieces"] == read(tmp_path / "short.json")["pieces"]


def read(path):
    return json.loads(path.read_text())


def test_text_out_of_noise_is_left_out_and_said(here, capsys, monkeypatch):
    scores = iter([0.5, 3.0, 0.5, 3.0])
    whole = dataset.decode_dataset

    def scored(*arguments, **options):
        found = whole(*arguments, **options)
        return [[replace(best, speech_score=next(scores)), *rest] for best, *rest in found]

    monkeypatch.setattr(dataset, "decode_dataset", scored)
    transcribe(here, "--format", "json", files=["long.wav"])
    out, err = capsys.readouterr()
    (piece,) = json.loads(out)["pieces"]
    assert piece["speech_score"] == 3.0 and "left out 1 piece that may be noise, the first at 0.0 s" in err
    transcribe(here, "--format", "json", "--min-speech-score", "0.5", files=["long.wav"])
    out, err = capsys.readouterr()
    assert len(json.loads(out)["pieces"]) == 2 and "noise" not in err


def test_the_length_of_a_recording_is_estimated(here, tmp_path):
    assert module.estimated_seconds(here / "long.wav") == pytest.approx(25)
    assert module.estimated_seconds(here / "gone.wav") == module.estimated_seconds(Path("-")) == 0
    header = (here / "long.wav").read_bytes()[:40] + b"\xff\xff\xff\x7f"
    (tmp_path / "lies.wav").write_bytes(header + bytes(1000))
    assert module.estimated_seconds(tmp_path / "lies.wav") <= 1044 / module.LEAST_BYTES


SILENT = {"zeros": 0.0, "noise of -74 dB": 2e-4, "noise of -54 dB": 2e-3}


@pytest.mark.parametrize("level", SILENT.values(), ids=SILENT)
def test_silence_around_speech_costs_the_released_model_little(shared, capsys, tmp_path, level):
    if not (shared / "speech" / "manifest.tsv").is_file():
        pytest.skip("../shared/speech is absent")
    with (shared / "speech" / "manifest.tsv").open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if row["split"] == "dev"]
    rows = rows[5::110]
    generator = np.random.default_rng(0)
    for k, row in enumerate(rows):
        speech, _ = soundfile.read(shared / "speech" / row["path"], dtype="float32")
        silence = level * generator.normal(size=(2, 4 * RATE))
        soundfile.write(tmp_path / f"{k}-bare.wav", speech, RATE)
        soundfile.write(tmp_path / f"{k}-silent.wav", np.concatenate([silence[0], speech, silence[1]]), RATE)
    main([*map(str, tmp_path.iterdir()), "--checkpoint", "speech13h", "--format", "json", "--device", "cpu"])
    said = {Path(row["file"]).stem: row["text"] for row in map(json.loads, capsys.readouterr().out.splitlines())}
    texts = [[said[f"{k}-{kind}"] for k in range(len(rows))] for kind in ("bare", "silent")]
    bare, silent = (score([row["transcript"] for row in rows], found).cer for found in texts)
    assert silent < 1.25 * bare


def test_the_released_model_writes_nothing_out_of_noise(capsys, tmp_path):
    t = np.arange(4 * RATE) / RATE
    white = np.random.default_rng(0).normal(size=len(t))
    sounds = {"white": white, "tone": np.sin(2 * np.pi * 1000 * t), "hum": np.sin(2 * np.pi * 50 * t)}
    sounds["clicks"] = (np.arange(len(t)) % 9000 < 20) + 1e-4 * white
    for name, sound in sounds.items():
        for db in (-60, -20):
            soundfile.write(tmp_path / f"{name}{db}.wav", 10 ** (db / 20) * sound, RATE, subtype="FLOAT")
    main([*map(str, tmp_path.iterdir()), "--checkpoint", "speech13h", "--format", "json", "--device", "cpu"])
    rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert len(rows) == 8 and not any(row["text"] for row in rows)


def test_the_released_model_is_taken_or_its_absence_explained(tmp_path, monkeypatch, capsys):
    from las_fast import checkpoint

    monkeypatch.setattr(checkpoint, "RELEASED", tmp_path)
    with pytest.raises(InputError, match="no released model; give --checkpoint"):
        module.released_model()
    for name in ("an4", "speech13h"):
        (tmp_path / f"{name}.safetensors").touch()
        assert module.released_model() == name
