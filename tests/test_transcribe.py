"""The transcribe command."""

import contextlib
import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from tiny_checkpoints import make_checkpoint
from tiny_corpora import RATE, make_music, make_speech

from las_fast import recogniser, transcription
from las_fast import transcribe as module
from las_fast.cli import run
from las_fast.config import DecodingConfig
from las_fast.data.segments import Speech
from las_fast.errors import InputError, show
from las_fast.output.metrics import score
from las_fast.output.transcripts import Hypothesis, Segment, Transcript, Word
from las_fast.recogniser import Recogniser, SearchSetup
from las_fast.search import beam, dataset
from las_fast.transcribe import main


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transcribe")
    make_checkpoint(folder, 20, mel_bins=23)
    soundfile.write(folder / "short.wav", make_speech(0.6), 16000)
    soundfile.write(folder / "other.flac", np.stack([make_speech(1.0, rate=22050, seed=1)] * 2, 1), 22050)
    soundfile.write(folder / "long.wav", make_speech(25.0, seed=2), 16000)
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    return folder


def transcribe(workspace, *argv, files=("short.wav",)):
    model = ["--checkpoint", str(workspace / "untrained-20.safetensors"), "--device", "cpu", "--beam", "2"]
    main([*(f"{workspace}/{name}" for name in files), *model, *argv])


def test_a_long_recording_is_decoded_in_segments(workspace, capsys):
    transcribe(workspace, "--format", "json", files=["long.wav"])
    row = json.loads(capsys.readouterr().out)
    assert len(row["segments"]) == 2 and row["text"] == " ".join(piece["text"] for piece in row["segments"])
    first, second = row["segments"]
    assert 0 <= first["start"] < 0.3 and 10 < first["end"] < 20.2 and second["end"] == pytest.approx(25, abs=0.3)
    assert second["start"] == pytest.approx(first["end"], abs=0.5)
    assert first["mean_score"] < 0 and first["speech_score"] is None  # this model has no CTC head


def test_a_recording_has_the_same_text_alone_and_in_a_batch(workspace, capsys):
    transcribe(workspace, "--format", "json", files=["short.wav", "other.flac", "long.wav"])
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for name, row in zip(["short.wav", "other.flac", "long.wav"], together, strict=True):
        transcribe(workspace, "--format", "json", files=[name])
        alone = json.loads(capsys.readouterr().out)
        assert alone["text"] == row["text"] and row["file"].endswith(name)


def test_music_is_speech_by_energy_but_not_by_silero(workspace, capsys):
    soundfile.write(workspace / "music.wav", make_music(3), RATE)
    transcribe(workspace, files=["music.wav"])
    assert "no speech" not in capsys.readouterr().err
    transcribe(workspace, "--vad", "silero", files=["music.wav"])
    out, err = capsys.readouterr()
    assert out == "\n" and "music.wav: no speech was found in its 3.00 seconds" in err


def test_texts_of_several_files_have_their_names(workspace, capsys):
    transcribe(workspace, files=["short.wav", "other.flac"])
    assert [line.split(": ")[0].rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "short.wav",
        "other.flac",
    ]


def test_a_checkpoint_of_an_archive_is_a_warning(workspace, tmp_path, capsys):
    for kind, warnings in (("features", 1), ("audio", 0)):
        make_checkpoint(tmp_path, 20, mel_bins=23, info={"data": {"kind": kind, "name": "HW4P2 F23"}})
        transcribe(workspace, "--checkpoint", str(tmp_path / "untrained-20.safetensors"))
        err = capsys.readouterr().err
        assert err.count("was trained on the features of HW4P2 F23; those that las_fast computes") == warnings


def test_silence_has_no_text(workspace, capsys):
    transcribe(workspace, files=["silent.wav"])
    out, err = capsys.readouterr()
    assert out == "\n" and "silent.wav: no speech was found in its 1.00 seconds" in err


def test_a_click_has_no_text(workspace, capsys):
    soundfile.write(workspace / "click.wav", np.full(500, 0.5), 16000)
    transcribe(workspace, files=["click.wav"])
    out, err = capsys.readouterr()
    assert out == "\n" and "click.wav: no speech was found in its 0.03 seconds" in err


def test_a_truncated_recording_is_a_warning(workspace, capsys):
    transcribe(workspace, files=["short.wav"])
    assert "warning" not in capsys.readouterr().err
    whole = (workspace / "short.wav").read_bytes()
    (workspace / "half.wav").write_bytes(whole[: len(whole) // 2])
    transcribe(workspace, files=["half.wav"])
    assert "warning: " in (err := capsys.readouterr().err) and "half.wav is cut off: it has" in err


def test_files_can_go_to_a_folder(workspace, tmp_path):
    transcribe(workspace, "--format", "srt", "--out", str(tmp_path / "subs"), files=["short.wav", "other.flac"])
    assert sorted(path.name for path in (tmp_path / "subs").iterdir()) == ["other.srt", "short.srt"]


@pytest.mark.parametrize("below", ["", "deep", "deep/er"])
def test_an_output_folder_that_is_a_file_is_refused_before_the_work(workspace, capsys, tmp_path, below):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as end:
        run(lambda _: transcribe(workspace, "--out", str(tmp_path / "taken" / below), files=["gone.wav"]))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: --out: the folder") and err.count("\n") == 1
    assert f"({tmp_path / 'taken'} is a file)" in err


@pytest.mark.parametrize(
    ("files", "argv", "message"),
    [
        (["gone.wav"], [], "gone.wav"),
        (["short.wav", "other.flac"], ["--format", "srt"], "give a folder with --out FOLDER"),
        (["short.wav"], ["--beam", "1001"], "--beam must be from 1 to 1000; got 1001"),
        (
            ["short.wav"],
            ["--format", "json", "--beam", "2", "--nbest", "3"],
            "--nbest 3 needs a beam of at least 3; give --beam 3",
        ),
        (
            ["short.wav"],
            ["--format", "json", "--nbest", "999"],
            "--nbest 999 needs a beam of at least 999; give --beam",
        ),
        (
            ["short.wav"],
            ["--format", "json", "--nbest", "1001"],
            "--nbest must be at most 1000, the largest beam; got 1001",
        ),
        (["short.wav"], ["--min-speech-score", "nan"], "--min-speech-score must be a number; got nan"),
        (["short.wav"], ["--beam", "0"], "--beam must be from 1 to 1000; got 0"),
        (["short.wav"], ["--beam-threshold", "-1"], "--beam-threshold must be a finite number of at least 0; got -1"),
        (["short.wav"], ["--beam-threshold", "inf"], "--beam-threshold must be a finite number of at least 0; got inf"),
        (["short.wav"], ["--checkpoint", "gone"], "checkpoint gone"),
    ],
)
def test_bad_input_is_a_one_sentence_error(workspace, capsys, files, argv, message):
    with pytest.raises(SystemExit) as end:
        run(lambda _: transcribe(workspace, *argv, files=files))
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_file_that_is_not_audio_is_refused(workspace, capsys):
    (workspace / "noise.wav").write_bytes(b"not audio")
    hint = ", or leave out such files with --on-bad skip"
    for files, has_hint in ((["noise.wav"], False), (["noise.wav", "short.wav"], True)):
        with pytest.raises(SystemExit) as end:
            run(lambda _, files=files: transcribe(workspace, files=files))
        err = capsys.readouterr().err
        assert end.value.code == 2 and "noise.wav" in err and err.endswith(f"{hint}\n") == has_hint


def test_unreadable_files_may_be_skipped_with_exit_status_1(workspace, capsys):
    (workspace / "noise.wav").write_bytes(b"not audio")
    files = ["short.wav", "noise.wav", "gone.wav", "other.flac"]
    with pytest.raises(SystemExit) as end:
        transcribe(workspace, "--on-bad", "skip", "--format", "json", files=files)
    assert end.value.code == 1
    captured = capsys.readouterr()
    assert [json.loads(line)["file"].rsplit("/", 1)[1] for line in captured.out.splitlines()] == [
        "short.wav",
        "other.flac",
    ]
    assert "left out" in captured.err and "noise.wav" in captured.err and "gone.wav does not exist" in captured.err
    with pytest.raises(SystemExit):
        transcribe(workspace, "--on-bad", "skip", files=["noise.wav"])
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("warning: 1 recording of 1 left out\n")


def test_each_file_is_written_as_soon_as_it_is_decoded(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POOL_SECONDS", 0.5)
    (workspace / "noise.wav").write_bytes(b"not audio")
    with pytest.raises(InputError, match="noise.wav"):
        transcribe(workspace, "--out", str(tmp_path), files=["short.wav", "other.flac", "noise.wav", "long.wav"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "short.txt"]


@pytest.mark.parametrize("pool", [0.1, 5.0, 1e9])
def test_texts_do_not_depend_on_the_pool(workspace, capsys, monkeypatch, pool):
    transcribe(workspace, "--format", "json", files=["long.wav", "short.wav"])
    expected = capsys.readouterr().out
    monkeypatch.setattr(module, "POOL_SECONDS", pool)
    transcribe(workspace, "--format", "json", files=["long.wav", "short.wav"])
    assert capsys.readouterr().out == expected


def test_an_error_in_decoding_is_not_skipped(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POOL_SECONDS", 0.1)

    def failing(*arguments, **options):
        raise InputError("no memory")

    monkeypatch.setattr(dataset, "decode_dataset", failing)
    with pytest.raises(InputError, match="no memory"):
        transcribe(workspace, "--on-bad", "skip", "--out", str(tmp_path), files=["short.wav", "other.flac"])


def test_a_recording_is_never_replaced_by_a_transcript(workspace, tmp_path):
    (tmp_path / "talk.txt").write_bytes((workspace / "short.wav").read_bytes())
    argv = [
        "--checkpoint",
        str(workspace / "untrained-20.safetensors"),
        "--out",
        str(tmp_path),
        "--existing",
        "replace",
    ]
    with pytest.raises(InputError, match="talk.txt would replace a recording"):
        main([str(tmp_path / "talk.txt"), *argv])


def test_a_missing_file_is_reported_before_the_work(workspace, tmp_path):
    with pytest.raises(InputError, match="gone.wav does not exist"):
        transcribe(workspace, "--out", str(tmp_path), files=["short.wav", "gone.wav"])
    assert not list(tmp_path.iterdir())


def test_existing_files_are_replaced_only_on_request(workspace, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("my own notes")
    with pytest.raises(InputError, match="1 of 2 output files exist already, the first is .*short.txt"):
        transcribe(workspace, "--out", str(tmp_path), files=["short.wav", "other.flac"])
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
    transcribe(workspace, "--out", str(tmp_path), "--existing", "skip", files=["short.wav", "other.flac"])
    assert (tmp_path / "short.txt").read_text() == "my own notes" and (tmp_path / "other.txt").exists()
    transcribe(workspace, "--out", str(tmp_path), "--existing", "skip", files=["short.wav", "other.flac"])
    assert "nothing to do: every transcript exists" in capsys.readouterr().out
    transcribe(workspace, "--out", str(tmp_path), "--existing", "replace", files=["short.wav"])
    assert (tmp_path / "short.txt").read_text() != "my own notes"


def test_transcripts_of_a_folder_lie_in_its_subfolders_and_are_skipped_there(workspace, calls, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    for day in ("friday", "monday"):
        (folder / day).mkdir(parents=True)
        (folder / day / "rec.wav").touch()
    argv = ["--checkpoint", str(workspace / "untrained-20.safetensors"), "--out", str(out), "--existing", "skip"]
    main([str(folder), *argv])
    assert sorted(out.rglob("*.txt")) == [out / "friday/rec.txt", out / "monday/rec.txt"]
    (folder / "early").mkdir()
    (folder / "early" / "rec.wav").touch()
    main([str(folder), *argv])
    assert [call["paths"] for call in calls] == [["rec.wav", "rec.wav"], ["rec.wav"]]
    assert (out / "early/rec.txt").exists() and len(list(out.rglob("*"))) == 6
    with pytest.raises(
        InputError,
        match="monday.* and .*friday.* have the same name, so it is unclear which .* to which; transcribe",
    ):
        main([str(folder / "monday" / "rec.wav"), str(folder / "friday" / "rec.wav"), *argv])


def test_a_recording_given_twice_is_transcribed_once(workspace, capsys):
    transcribe(workspace, "--format", "json", files=["short.wav", "short.wav"])
    assert capsys.readouterr().out.count("short.wav") == 1


def test_standard_input_is_a_recording(workspace, tmp_path):
    command = [
        sys.executable,
        "-m",
        "las_fast.transcribe",
        "-",
        "--checkpoint",
        str(workspace / "untrained-20.safetensors"),
    ]
    command += ["--device", "cpu", "--beam", "2", "--format", "json", "--out", str(tmp_path)]
    with open(workspace / "short.wav", "rb") as recording:
        subprocess.run(command, stdin=recording, check=True, cwd=Path(__file__).parents[1])
    transcribe(workspace, "--format", "json", "--out", str(tmp_path))
    assert read(tmp_path / "stdin.json")["segments"] == read(tmp_path / "short.json")["segments"]


def read(path):
    return json.loads(path.read_text())


def test_noise_segments_are_omitted_with_a_warning(workspace, capsys, monkeypatch):
    scores = iter([0.5, 3.0, 0.5, 3.0])
    whole = dataset.decode_dataset

    def scored(*arguments, **options):
        actual = whole(*arguments, **options)
        return [[replace(best, speech_score=next(scores)), *rest] for best, *rest in actual]

    monkeypatch.setattr(dataset, "decode_dataset", scored)
    transcribe(workspace, "--format", "json", files=["long.wav"])
    out, err = capsys.readouterr()
    (piece,) = json.loads(out)["segments"]
    assert piece["speech_score"] == 3.0 and "left out 1 segment that may be noise, the first at 0.0 s" in err
    transcribe(workspace, "--format", "json", "--min-speech-score", "0.5", files=["long.wav"])
    out, err = capsys.readouterr()
    assert len(json.loads(out)["segments"]) == 2 and "noise" not in err


def test_the_length_of_a_recording_is_estimated(workspace, tmp_path):
    assert module.estimated_seconds(workspace / "long.wav") == pytest.approx(25)
    assert module.estimated_seconds(workspace / "gone.wav") == module.estimated_seconds(Path("-")) == 0
    soundfile.write(tmp_path / "lies.flac", make_speech(0.5), RATE)
    data = bytearray((tmp_path / "lies.flac").read_bytes())
    data[22:26] = b"\xff" * 4  # the number of samples in its header
    (tmp_path / "lies.flac").write_bytes(data)
    assert module.estimated_seconds(tmp_path / "lies.flac") == len(data) / 500


def test_a_recording_without_a_length_is_not_read_to_estimate_it(workspace, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("not audio")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "text"):
        assert module.estimated_seconds(path) == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-").write_bytes((workspace / "short.wav").read_bytes())
    assert module.estimated_seconds(Path("-")) == 0  # "-" is standard input, not this file


# ------------------------------------------------------------------------------------------- the order of the work


class Work:
    """Recordings made of segments, decoded by a fake search; `log` has the events in order.

    recordings: {name: seconds of its segments, or an error}.
    """

    def __init__(self, monkeypatch, recordings: dict[str, list[float] | InputError], scores=()):
        self.recordings, self.log, self.data, self.asked = recordings, [], [], []
        self.scores = iter(scores)
        self.shown, self.updates = None, []
        self.loaded = SimpleNamespace(
            config=SimpleNamespace(features=SimpleNamespace(sample_rate=10)), statistics=None, model="model", info={},
            path=Path("none.safetensors"),
            vocabulary=SimpleNamespace(decode=lambda tokens: "".join(map(chr, tokens))),
        )  # fmt: skip
        self.setup = SearchSetup(DecodingConfig(beam=2), "table", "packed")
        self.model = Recogniser(self.loaded, torch.device("cpu"))
        monkeypatch.setattr(self.model, "settings", lambda **args: self.asked.append(args) or "settings")
        monkeypatch.setattr(self.model, "search_setup", lambda *args: self.asked.append(args) or self.setup)
        monkeypatch.setattr(transcription, "open_recording", self.open)
        monkeypatch.setattr(transcription, "segments", self.segments)
        monkeypatch.setattr(dataset, "decode_dataset", self.decode)
        monkeypatch.setattr(module, "ProgressBar", self.progress)
        monkeypatch.setattr(module, "POOL_SECONDS", 10.0)
        monkeypatch.setattr(self.model, "_word_finder", lambda config: "words")

    @contextlib.contextmanager
    def progress(self, *args, **options):
        self.shown = args, options
        yield SimpleNamespace(update=self.updates.append)

    @contextlib.contextmanager
    def open(self, path, sample_rate):
        assert sample_rate == 10
        actual = self.recordings[str(path)]
        if isinstance(actual, InputError):
            raise actual

        class Recording(list):
            name = show(path)
            warnings = [f"{path} is odd"] if str(path) == "odd" else []

        yield Recording([np.zeros(15)] * 2 if not actual else [np.zeros(int(10 * s)) for s in actual])

    def segments(self, blocks, features, *, vad, mark_silence):
        assert features is self.loaded.config.features
        assert vad == "energy" and not mark_silence
        start = 0.0
        for block in blocks:
            if len(block) != 15:
                yield Speech(start, start + len(block) / 10, torch.zeros(len(block), 2))
            start += len(block) / 10

    def decode(self, model, data, vocabulary, config, *, nbest, **options):
        assert (model, vocabulary, config) == ("model", self.loaded.vocabulary, self.setup.config)
        self.log.append(f"decode {len(data)}")
        self.data.append((data, options))
        worse = beam.TokenHypothesis([90], -8.0, -4.0, [0], [-8.0], True)
        return [[beam.TokenHypothesis([65 + i, 66], -6.0, -2.0, [0, 0], [-3.0, -1.0], True, next(self.scores, None)),
                 worse][:nbest] for i in range(len(data))]  # fmt: skip

    def run(self, *argv) -> list[tuple[Segment, ...]]:
        """The segments of each recording as the command transcribes it."""
        options = module.parser().parse_args([*self.recordings, *argv])
        return self.listed(module.transcribe(options.files, self.model, options))

    def listed(self, transcripts) -> list[tuple[Segment, ...]]:
        actual = []
        for path, transcript in transcripts:
            self.log.append(str(path))
            actual.append(transcript.segments)
        return actual


def test_recordings_are_returned_in_order_as_soon_as_each_is_decoded(monkeypatch, capsys):
    work = Work(monkeypatch, {"a": [3.0, 4.0], "b": [3.0, 2.0], "c": [], "odd": [2.0, 2.0]})
    actual = work.run()
    assert work.log == ["decode 3", "a", "decode 3", "b", "c", "odd"]
    times = [[(segment.start, segment.end) for segment in segments] for segments in actual]
    assert times == [[(0, 3), (3, 7)], [(0, 3), (3, 5)], [], [(0, 2), (2, 4)]]
    best = Hypothesis("CB", -6.0, -2.0, None)
    assert actual[1][0] == Segment(0.0, 3.0, "CB", -6.0, -2.0, None, (best,))
    data, options = work.data[0]
    expected = {"ngram": "table", "packed": "packed", "device": torch.device("cpu")}
    assert options == {**expected, "speech_scores": True, "words": "words", "progress": False}
    assert data.ids == ["a from 0 s", "a from 3 s", "b from 0 s"] and data.seconds.tolist() == [3, 4, 3]
    assert data.frame_counts.tolist() == [30, 40, 30] and len(data) == 3 and data.raw(1).shape == (40, 2)
    assert capsys.readouterr().err == ("warning: c: no speech was found in its 3.00 seconds\nwarning: odd is odd\n")
    assert work.shown == ((None, "transcribing", "s of audio"), {}) and sum(work.updates) == 19


def test_python_callers_get_progress_and_warnings_and_no_output(monkeypatch, capsys):
    work = Work(monkeypatch, {"a": [3.0, 4.0], "odd": [3.0, 2.0], "c": []})
    messages, seconds = [], []
    options = {"nbest": 2, "pool_seconds": 10, "warn": messages.append, "on_audio": seconds.append}
    actual = work.listed(work.model.transcribe_all(work.recordings, **options))
    assert work.log == ["decode 3", "a", "decode 1", "odd", "c"]
    assert messages == ["odd is odd", "c: no speech was found in its 3.00 seconds"] and sum(seconds) == 15
    best, worse = Hypothesis("AB", -6.0, -2.0, None), Hypothesis("Z", -8.0, -4.0, None)
    assert actual[0][0] == Segment(0.0, 3.0, "AB", -6.0, -2.0, None, (best, worse))
    assert work.shown is None and capsys.readouterr() == ("", "")


def test_progress_counts_audio_when_its_speech_is_decoded(monkeypatch):
    work = Work(monkeypatch, {"silent": [], "a": [3.0, 4.0], "b": [3.0, 2.0, 1.0]})
    options = {"pool_seconds": 10, "warn": work.log.append, "on_audio": lambda seconds: work.log.append(seconds)}
    work.listed(work.model.transcribe_all(work.recordings, **options))
    silent = "silent: no speech was found in its 3.00 seconds"
    assert work.log == [1.5, 1.5, silent, "silent", "decode 3", 7.0, "a", 3.0, "decode 2", 3.0, "b"]


def test_recordings_before_an_unreadable_one_are_returned_first(monkeypatch, capsys):
    recordings = {"a": [1.0], "bad": InputError("bad is no audio"), "b": [2.0]}
    work = Work(monkeypatch, recordings)
    with pytest.raises(InputError, match="bad is no audio"):
        work.run()
    assert work.log == ["decode 1", "a"]
    work = Work(monkeypatch, recordings)
    assert len(work.run("--on-bad", "skip")) == 2 and work.log == ["decode 1", "a", "decode 1", "b"]
    assert capsys.readouterr().err == "warning: left out: bad is no audio\n"


def test_a_recording_without_speech_is_not_decoded(monkeypatch):
    work = Work(monkeypatch, {"a": []})
    assert work.run() == [()] and work.log == ["a"]


def test_segments_below_the_minimum_speech_score_are_omitted_and_counted(monkeypatch, capsys):
    work = Work(monkeypatch, {"two\nlines": [1.0, 2.0, 3.0], "b": [1.0]}, scores=(0.99, 0.5, 1.0, 0.7))
    assert [[segment.start for segment in segments] for segments in work.run()] == [[3.0], []]
    assert capsys.readouterr().err == (
        "warning: two\\nlines: left out 2 segments that may be noise, the first at 0.0 s (speech score 0.99); "
        "--min-speech-score sets the limit\n"
        "warning: b: left out 1 segment that may be noise, the first at 0.0 s (speech score 0.70); "
        "--min-speech-score sets the limit\n"
    )
    work = Work(monkeypatch, {"a": [1.0]}, scores=(0.5,))
    assert len(work.run("--min-speech-score", "0.5")[0]) == 1


def test_progress_has_the_total_length_of_all_recordings(workspace, monkeypatch):
    work = Work(monkeypatch, {str(workspace / "short.wav"): [1.0], str(workspace / "long.wav"): []})
    work.run()
    assert work.shown[0][0] == pytest.approx(25.6)


def test_beam_views_precision_and_language_model_reach_the_search(monkeypatch):
    work = Work(monkeypatch, {"a": [1.0]})
    work.run()
    views = ["--speeds", "0.8", "1", "--warps", "1.1", "--view-threshold", "0.4"]
    work.run("--beam", "7", "--beam-threshold", "2.5", *views, "--precision", "bf16", "--lm", "text.arpa")
    names = ("beam", "beam_threshold", "speeds", "warps", "view_threshold", "precision", "lm")
    calls = (
        dict.fromkeys(names),
        dict(zip(names, (7, 2.5, [0.8, 1.0], [1.1], 0.4, "bf16", "text.arpa"), strict=True)),
    )
    assert work.asked == [calls[0], ("settings", None), calls[1], ("settings", "text.arpa")]


# ------------------------------------------------------------------------------------------------- the command line


def test_recordings_after_a_list_of_numbers_are_an_error_that_says_so(capsys):
    with pytest.raises(SystemExit):
        main(["--speeds", "0.8", "1", "talk.wav"])
    sentence = "'talk.wav' is not a number; if it belongs to another argument, give it before this option"
    assert capsys.readouterr().err == f"error: --speeds: {sentence}\n"


@pytest.fixture
def calls(monkeypatch):
    """Replace the model by one that gives a segment per recording; return a list of its calls."""
    calls = []
    words = (Word("HELLO", 0.1, 0.6, 0.9),)
    transcript = Transcript("HELLO", (Segment(0.0, 1.5, "HELLO", -1.0, -0.25, 5.5, words=words),))

    def answer(model, paths, **options):
        calls.append({"paths": [path.name for path in paths], "model": model, **options})
        return ((path, transcript) for path in paths)

    monkeypatch.setattr(Recogniser, "transcribe_all", answer)
    return calls


def ask(workspace, *argv, files=("short.wav",)):
    main(
        [*(f"{workspace}/{name}" for name in files), "--checkpoint", str(workspace / "untrained-20.safetensors"), *argv]
    )


def test_options_reach_the_model(workspace, calls, monkeypatch):
    calls_to_free = []
    monkeypatch.setattr(module, "return_freed_memory", lambda: calls_to_free.append(True))
    ask(workspace)
    assert calls_to_free == [True]
    assert str(calls[0]["model"].device) in ("cpu", "cuda") and calls[0]["beam"] is calls[0]["lm"] is None
    assert calls[0]["min_speech_score"] == 1.0 and calls[0]["skip_bad"] is False
    assert calls[0]["pool_seconds"] == module.POOL_SECONDS and calls[0]["warn"] is module.warn
    argv = ["--beam", "1", "--lm", "text.arpa", "--min-speech-score=-inf", "--on-bad", "skip", "--device", "cpu"]
    ask(workspace, *argv, files=["short.wav", "gone.wav"])
    assert calls[1]["paths"] == ["short.wav", "gone.wav"]
    assert (calls[1]["beam"], calls[1]["lm"], str(calls[1]["model"].device)) == (1, "text.arpa", "cpu")
    assert calls[1]["min_speech_score"] == -np.inf and calls[1]["skip_bad"] is True


def test_the_search_has_the_settings_of_the_checkpoint_except_for_options(workspace, calls, tmp_path, monkeypatch):
    ask(workspace, "--device", "cpu")
    model = calls[0]["model"]
    settings = model.loaded.config.decoding
    assert model.settings() == settings and model.search_setup(settings)[:2] == (settings, None)
    path, table, calls = tmp_path / "text.arpa", torch.zeros(1, len(model.loaded.vocabulary)), []
    path.touch()
    weighted = replace(settings, ngram_weight=0.7)
    monkeypatch.setattr(recogniser, "with_default_weight", lambda loaded, path: weighted)
    monkeypatch.setattr(recogniser, "load_ngram_model", lambda *args: calls.append(args) or table)
    expected = replace(settings, beam=1, beam_threshold=0.0, ngram_weight=0.7)
    assert model.settings(beam=1, beam_threshold=0, lm=str(path)) == expected
    config, ngram, _ = model.search_setup(expected, str(path))
    assert config == expected and ngram is table
    assert calls == [(str(path), expected, model.loaded, torch.device("cpu"), "--lm ")]


@pytest.mark.parametrize(("form", "suffix", "first"), [
    ("text", "txt", "HELLO"), ("json", "json", '{"file": '), ("srt", "srt", "1"), ("vtt", "vtt", "WEBVTT"),
    ("tsv", "tsv", "start"), ("textgrid", "TextGrid", "File type"),
    ("TextGrid", "TextGrid", "File type"), ("JSON", "json", '{"file": '),
])  # fmt: skip
def test_each_format_goes_to_stdout_or_to_files_of_its_name(workspace, calls, tmp_path, capsys, form, suffix, first):
    ask(workspace, "--format", form)
    assert capsys.readouterr().out.splitlines()[0].startswith(first)
    out = tmp_path / "two\nlines"
    ask(workspace, "--format", form, "--out", str(out), files=["short.wav", "long.wav"])
    assert sorted(path.name for path in out.iterdir()) == [f"long.{suffix}", f"short.{suffix}"]
    assert (out / f"long.{suffix}").read_text().startswith(first)
    shown = f"{tmp_path}/two\\nlines/"
    assert capsys.readouterr().out == f"{shown}short.{suffix}\n{shown}long.{suffix}\n"
    with pytest.raises(InputError, match=rf"^2 of 2 output files exist already, the first is \S+short.{suffix}; add"):
        ask(workspace, "--format", form, "--out", str(out), files=["short.wav", "long.wav"])
    ask(workspace, "--format", form, "--out", str(out), "--existing", "skip", files=["short.wav", "long.wav"])
    assert capsys.readouterr().out == f"nothing to do: every transcript exists in {shown[:-1]}\n"
    ask(workspace, "--format", form, "--out", str(out), "--existing", "skip", files=["short.wav", "silent.wav"])
    assert calls[-1]["paths"] == ["silent.wav"]


@pytest.fixture
def single(workspace):
    """Make a folder with one recording."""
    (workspace / "single").mkdir(exist_ok=True)
    (workspace / "single" / "short.wav").write_bytes((workspace / "short.wav").read_bytes())


def test_out_is_a_file_for_one_recording_if_it_has_the_suffix_of_a_format(workspace, calls, tmp_path):
    ask(workspace, "--out", str(tmp_path / "new" / "talk.SRT"))
    assert (tmp_path / "new" / "talk.SRT").read_text().startswith("1\n00:00:00,100 -->")
    refused = "^--out \\S+talk.vtt is one file, but there are 2 recordings; give a folder$"
    with pytest.raises(InputError, match=refused):
        ask(workspace, "--out", str(tmp_path / "talk.vtt"), files=["short.wav", "long.wav"])
    with pytest.raises(InputError, match="^--format json writes .json files; got --out \\S+talk.vtt$"):
        ask(workspace, "--out", str(tmp_path / "talk.vtt"), "--format", "json")
    assert len(calls) == 1 and [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("talk.docx", ["short.wav"]),
        ("talk.docx", ["short.wav", "long.wav"]),
        ("talk.MP3", ["short.wav", "long.wav"]),
        ("talk.srtt", ["short.wav"]),
        ("talk.html", ["single"]),
    ],
)
@pytest.mark.parametrize("form", [[], ["--format", "srt"]])
def test_out_with_another_suffix_names_those_of_the_formats(workspace, single, calls, tmp_path, name, files, form):
    expected = (
        f"--out {tmp_path}/{name}: the name of a transcript must end in .txt, .json, .srt, .vtt, .tsv, .ctm or "
        f".TextGrid; for a folder of this name, add a slash: {tmp_path}/{name}/"
    )
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        ask(workspace, "--out", str(tmp_path / name), *form, files=files)
    assert not calls and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "files"),
    [
        ("talk.docx/", ["short.wav"]),
        ("talk.srt/", ["short.wav"]),
        ("old.srt", ["short.wav"]),
        ("v1.2", ["short.wav"]),
        ("texts.en", ["short.wav", "long.wav"]),
        ("texts.en", ["single"]),  # the next recording in that folder must not change what the name means
    ],
)
def test_out_is_a_folder_by_a_slash_or_if_it_exists_or_lacks_a_suffix(workspace, single, calls, tmp_path, word, files):
    (tmp_path / "old.srt").mkdir()
    ask(workspace, "--out", f"{tmp_path}/{word}", files=files)
    assert (tmp_path / word / "short.txt").read_text() == "HELLO\n"


@pytest.mark.parametrize(("option", "formats"), [
    (["--width", "30"], ("srt", "vtt")), (["--lines", "1"], ("srt", "vtt")), (["--word-times"], ("vtt",)),
    (["--nbest", "2", "--beam", "2"], ("json",)),
])  # fmt: skip
def test_an_option_of_some_formats_is_refused_with_others(workspace, calls, capsys, option, formats):
    for form in module.FORMATS:
        refused = f"^{option[0]} is for {' and '.join(formats)}; got --format {form}$"
        with contextlib.nullcontext() if form in formats else pytest.raises(InputError, match=refused):
            ask(workspace, "--format", form, *option)
    assert len(calls) == len(formats)


@pytest.mark.parametrize("option", ["--case", "--existing", "--on-bad", "--vad", "--format"])
def test_an_unknown_choice_is_refused(workspace, calls, capsys, option):
    with pytest.raises(SystemExit):
        ask(workspace, option, "Other")
    assert option in capsys.readouterr().err and not calls


def test_texts_of_several_files_have_their_names_on_one_line(workspace, calls, capsys):
    (workspace / "odd\nname.wav").write_bytes(b"")
    ask(workspace, files=["odd\nname.wav", "short.wav"])
    assert capsys.readouterr().out == f"{workspace}/odd\\nname.wav: HELLO\n{workspace}/short.wav: HELLO\n"
    ask(workspace, "--format", "json", files=["odd\nname.wav", "short.wav"])
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["HELLO", "HELLO"]


@pytest.mark.parametrize("form", ["srt", "vtt"])
def test_subtitles_of_several_files_need_a_folder(workspace, calls, form):
    with pytest.raises(InputError, match=f"^2 recordings need 2 {form} files; give a folder with --out FOLDER$"):
        ask(workspace, "--format", form, files=["short.wav", "long.wav"])


@pytest.mark.parametrize("option", ["--format", "--existing", "--on-bad", "--beam", "--min-speech-score", "--vad"])
def test_an_option_rejects_other_values(workspace, calls, capsys, option):
    with pytest.raises(SystemExit):
        run(lambda _: ask(workspace, option, "otherwise"))
    assert option in capsys.readouterr().err and not calls


def test_stdout_is_required_without_a_folder(workspace, calls, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(module, "require_stdout", needed.append)
    ask(workspace, "--out", str(tmp_path))
    assert needed == []
    ask(workspace)
    assert needed == ["--out FOLDER"]


def test_files_must_exist_except_for_standard_input(workspace, calls, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    main(["-", "--checkpoint", str(workspace / "untrained-20.safetensors")])
    assert calls[0]["paths"] == ["-"]
    with pytest.raises(InputError, match="gone.wav does not exist; check the path"):
        ask(workspace, files=["gone.wav"])


def test_the_released_model_is_the_default(workspace, calls, monkeypatch):
    monkeypatch.setattr("las_fast.checkpoint.default_model", lambda: str(workspace / "untrained-20.safetensors"))
    main([str(workspace / "short.wav")])
    assert calls[0]["model"].loaded.path == workspace / "untrained-20.safetensors"


SILENT = {"zeros": 0.0, "noise of -74 dB": 2e-4, "noise of -54 dB": 2e-3}


@pytest.mark.parametrize("level", SILENT.values(), ids=SILENT)
def test_surrounding_silence_hardly_raises_the_released_models_cer(shared, capsys, tmp_path, level):
    if not (shared / "speech" / "manifest.tsv").is_file():
        pytest.skip("../shared/speech is absent")
    with (shared / "speech" / "manifest.tsv").open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if row["split"] == "dev"]
    rows = rows[5::12]  # of 8 utterances, one alone could double the CER
    generator = np.random.default_rng(0)
    for k, row in enumerate(rows):
        speech, _ = soundfile.read(shared / "speech" / row["path"], dtype="float32")
        silence = level * generator.normal(size=(2, 4 * RATE))
        soundfile.write(tmp_path / f"{k}-bare.wav", speech, RATE)
        soundfile.write(tmp_path / f"{k}-silent.wav", np.concatenate([silence[0], speech, silence[1]]), RATE)
    main([*map(str, tmp_path.iterdir()), "--checkpoint", "english", "--format", "json", "--device", "cpu"])
    recognised = {Path(row["file"]).stem: row["text"] for row in map(json.loads, capsys.readouterr().out.splitlines())}
    texts = [[recognised[f"{k}-{kind}"] for k in range(len(rows))] for kind in ("bare", "silent")]
    bare, silent = (score([row["transcript"] for row in rows], actual).cer for actual in texts)
    assert silent < 1.15 * bare


def test_the_released_model_transcribes_noise_as_empty(capsys, tmp_path):
    t = np.arange(4 * RATE) / RATE
    white = np.random.default_rng(0).normal(size=len(t))
    sounds = {"white": white, "tone": np.sin(2 * np.pi * 1000 * t), "hum": np.sin(2 * np.pi * 50 * t)}
    sounds["clicks"] = (np.arange(len(t)) % 9000 < 20) + 1e-4 * white
    for name, sound in sounds.items():
        for db in (-60, -20):
            soundfile.write(tmp_path / f"{name}{db}.wav", 10 ** (db / 20) * sound, RATE, subtype="FLOAT")
    main([*map(str, tmp_path.iterdir()), "--checkpoint", "english", "--format", "json", "--device", "cpu"])
    rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert len(rows) == 8 and not any(row["text"] for row in rows)
