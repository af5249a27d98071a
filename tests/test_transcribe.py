"""The transcribe command."""

import contextlib
import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from archives import RATE, make_speech
from checkpoints import make_checkpoint

from las_fast import recogniser
from las_fast import transcribe as module
from las_fast.cli import run
from las_fast.config import DecodingConfig
from las_fast.data.segments import Speech
from las_fast.errors import InputError, show
from las_fast.output.metrics import score
from las_fast.output.transcripts import Hypothesis, Segment, Transcript
from las_fast.recogniser import Decoder, Recogniser
from las_fast.search import beam, dataset
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


def test_a_long_recording_is_decoded_in_segments(here, capsys):
    transcribe(here, "--format", "json", files=["long.wav"])
    row = json.loads(capsys.readouterr().out)
    assert len(row["pieces"]) == 2 and row["text"] == " ".join(piece["text"] for piece in row["pieces"])
    first, second = row["pieces"]
    assert 0 <= first["start"] < 0.3 and 10 < first["end"] < 20.2 and second["end"] == pytest.approx(25, abs=0.3)
    assert second["start"] == pytest.approx(first["end"], abs=0.5)
    assert first["mean_score"] < 0 and first["speech_score"] is None  # this model has no CTC head


def test_recordings_have_the_same_text_alone_and_together(here, capsys):
    transcribe(here, "--format", "json", files=["short.wav", "other.flac", "long.wav"])
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for name, row in zip(["short.wav", "other.flac", "long.wav"], together, strict=True):
        transcribe(here, "--format", "json", files=[name])
        alone = json.loads(capsys.readouterr().out)
        assert alone["text"] == row["text"] and row["file"].endswith(name)


def test_texts_of_several_files_have_their_names(here, capsys):
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
        assert err.count("was trained on the features of HW4P2 F23; those that las_fast computes") == warnings


def test_silence_has_no_text(here, capsys):
    transcribe(here, files=["silent.wav"])
    out, err = capsys.readouterr()
    assert out == "\n" and "silent.wav: no speech was found in its 1.00 seconds" in err


def test_a_click_has_no_text(here, capsys):
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
    assert "warning: " in (err := capsys.readouterr().err) and "half.wav is cut off: it has" in err


def test_files_can_go_to_a_folder(here, tmp_path):
    transcribe(here, "--format", "srt", "--out", str(tmp_path / "subs"), files=["short.wav", "other.flac"])
    assert sorted(path.name for path in (tmp_path / "subs").iterdir()) == ["other.srt", "short.srt"]


@pytest.mark.parametrize("below", ["", "deep", "deep/er"])
def test_an_output_folder_that_is_a_file_is_refused_before_the_work(here, capsys, tmp_path, below):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as end:
        run(lambda _: transcribe(here, "--out", str(tmp_path / "taken" / below), files=["gone.wav"]))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: --out: the folder") and err.count("\n") == 1
    assert f"({tmp_path / 'taken'} is a file)" in err


@pytest.mark.parametrize(
    ("files", "words", "message"),
    [
        (["gone.wav"], [], "gone.wav"),
        (["short.wav", "other.flac"], ["--format", "srt"], "give a folder for them with --out FOLDER"),
        (["short.wav"], ["--beam", "100000"], "decoding.beam must be at most"),
        (["short.wav"], ["--min-speech-score", "nan"], "--min-speech-score must be a number; got nan"),
        (["short.wav"], ["--beam", "0"], "--beam must be at least 1"),
        (["short.wav"], ["--checkpoint", "gone"], "checkpoint gone"),
    ],
)
def test_bad_input_is_one_sentence(here, capsys, files, words, message):
    with pytest.raises(SystemExit) as end:
        run(lambda _: transcribe(here, *words, files=files))
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_file_that_is_not_audio_is_named(here, capsys):
    (here / "noise.wav").write_bytes(b"not audio")
    with pytest.raises(SystemExit):
        run(lambda _: transcribe(here, files=["noise.wav"]))
    assert "noise.wav" in capsys.readouterr().err


def test_files_that_cannot_be_read_may_be_left_out(here, capsys):
    (here / "noise.wav").write_bytes(b"not audio")
    transcribe(here, "--on-bad", "skip", "--format", "json", files=["short.wav", "noise.wav", "gone.wav", "other.flac"])
    captured = capsys.readouterr()
    assert [json.loads(line)["file"].rsplit("/", 1)[1] for line in captured.out.splitlines()] == [
        "short.wav",
        "other.flac",
    ]
    assert "left out" in captured.err and "noise.wav" in captured.err and "gone.wav does not exist" in captured.err
    transcribe(here, "--on-bad", "skip", files=["noise.wav"])
    assert capsys.readouterr().out == ""


def test_each_file_is_written_when_it_is_decoded(here, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POOL_SECONDS", 0.5)
    (here / "noise.wav").write_bytes(b"not audio")
    with pytest.raises(InputError, match="noise.wav"):
        transcribe(here, "--out", str(tmp_path), files=["short.wav", "other.flac", "noise.wav", "long.wav"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "short.txt"]


@pytest.mark.parametrize("pool", [0.1, 5.0, 1e9])
def test_texts_do_not_depend_on_the_pool(here, capsys, monkeypatch, pool):
    transcribe(here, "--format", "json", files=["long.wav", "short.wav"])
    expected = capsys.readouterr().out
    monkeypatch.setattr(module, "POOL_SECONDS", pool)
    transcribe(here, "--format", "json", files=["long.wav", "short.wav"])
    assert capsys.readouterr().out == expected


def test_an_error_in_decoding_is_not_skipped(here, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POOL_SECONDS", 0.1)

    def failing(*arguments, **options):
        raise InputError("no memory")

    monkeypatch.setattr(dataset, "decode_dataset", failing)
    with pytest.raises(InputError, match="no memory"):
        transcribe(here, "--on-bad", "skip", "--out", str(tmp_path), files=["short.wav", "other.flac"])


def test_a_recording_is_never_replaced_by_a_transcript(here, tmp_path):
    (tmp_path / "talk.txt").write_bytes((here / "short.wav").read_bytes())
    words = ["--checkpoint", str(here / "untrained-20.safetensors"), "--out", str(tmp_path), "--existing", "replace"]
    with pytest.raises(InputError, match="talk.txt would replace a recording"):
        main([str(tmp_path / "talk.txt"), *words])


def test_a_missing_file_is_reported_before_the_work(here, tmp_path):
    with pytest.raises(InputError, match="gone.wav does not exist"):
        transcribe(here, "--out", str(tmp_path), files=["short.wav", "gone.wav"])
    assert not list(tmp_path.iterdir())


def test_existing_files_are_replaced_only_on_request(here, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("my own notes")
    with pytest.raises(InputError, match="1 of 2 output files exist already, the first is .*short.txt"):
        transcribe(here, "--out", str(tmp_path), files=["short.wav", "other.flac"])
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
    transcribe(here, "--out", str(tmp_path), "--existing", "skip", files=["short.wav", "other.flac"])
    assert (tmp_path / "short.txt").read_text() == "my own notes" and (tmp_path / "other.txt").exists()
    transcribe(here, "--out", str(tmp_path), "--existing", "skip", files=["short.wav", "other.flac"])
    assert "nothing to do: all 2" in capsys.readouterr().out
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


def test_noise_is_left_out_with_a_warning(here, capsys, monkeypatch):
    scores = iter([0.5, 3.0, 0.5, 3.0])
    whole = dataset.decode_dataset

    def scored(*arguments, **options):
        found = whole(*arguments, **options)
        return [[replace(best, speech_score=next(scores)), *rest] for best, *rest in found]

    monkeypatch.setattr(dataset, "decode_dataset", scored)
    transcribe(here, "--format", "json", files=["long.wav"])
    out, err = capsys.readouterr()
    (piece,) = json.loads(out)["pieces"]
    assert piece["speech_score"] == 3.0 and "left out 1 segment that may be noise, the first at 0.0 s" in err
    transcribe(here, "--format", "json", "--min-speech-score", "0.5", files=["long.wav"])
    out, err = capsys.readouterr()
    assert len(json.loads(out)["pieces"]) == 2 and "noise" not in err


def test_the_length_of_a_recording_is_estimated(here, tmp_path):
    assert module.estimated_seconds(here / "long.wav") == pytest.approx(25)
    assert module.estimated_seconds(here / "gone.wav") == module.estimated_seconds(Path("-")) == 0
    soundfile.write(tmp_path / "lies.flac", make_speech(0.5), RATE)
    data = bytearray((tmp_path / "lies.flac").read_bytes())
    data[22:26] = b"\xff" * 4  # the number of samples
    (tmp_path / "lies.flac").write_bytes(data)
    assert module.estimated_seconds(tmp_path / "lies.flac") == len(data) / 500


def test_a_recording_without_a_length_is_not_read_to_estimate_it(here, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("not audio")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "text"):
        assert module.estimated_seconds(path) == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-").write_bytes((here / "short.wav").read_bytes())
    assert module.estimated_seconds(Path("-")) == 0  # it is standard input, not this file


# ------------------------------------------------------------------------------------------- the order of the work


class Work:
    """Recordings that are made up of segments, decoded by a stand-in for the search; says what happens in what order.

    recordings: the seconds of the segments of each, or an error.
    """

    def __init__(self, monkeypatch, recordings: dict[str, list[float] | InputError], scores=()):
        self.recordings, self.log, self.data, self.asked = recordings, [], [], []
        self.scores = iter(scores)
        self.shown, self.updates = None, []
        self.loaded = SimpleNamespace(
            config=SimpleNamespace(features=SimpleNamespace(sample_rate=10)), statistics=None, model="model", info={},
            vocabulary=SimpleNamespace(decode=lambda tokens: "".join(map(chr, tokens))),
        )  # fmt: skip
        self.decoder = Decoder(DecodingConfig(beam=2), "table", "packed")
        self.model = Recogniser(self.loaded, torch.device("cpu"))
        monkeypatch.setattr(self.model, "settings", lambda **given: self.asked.append(given) or "settings")
        monkeypatch.setattr(self.model, "decoder", lambda *given: self.asked.append(given) or self.decoder)
        monkeypatch.setattr(recogniser, "open_recording", self.open)
        monkeypatch.setattr(recogniser, "segments", self.segments)
        monkeypatch.setattr(dataset, "decode_dataset", self.decode)
        monkeypatch.setattr(module, "Progress", self.progress)
        monkeypatch.setattr(module, "POOL_SECONDS", 10.0)

    @contextlib.contextmanager
    def progress(self, *given, **options):
        self.shown = given, options
        yield SimpleNamespace(update=self.updates.append)

    @contextlib.contextmanager
    def open(self, path, sample_rate):
        assert sample_rate == 10
        found = self.recordings[str(path)]
        if isinstance(found, InputError):
            raise found

        class Recording(list):
            name = show(path)
            warnings = [f"{path} is odd"] if str(path) == "odd" else []

        yield Recording([np.zeros(15)] * 2 if not found else [np.zeros(int(10 * s)) for s in found])

    def segments(self, blocks, features, statistics):
        assert features is self.loaded.config.features and statistics is None
        start = 0.0
        for block in blocks:
            if len(block) != 15:
                yield Speech(start, start + len(block) / 10, torch.zeros(len(block), 2))
            start += len(block) / 10

    def decode(self, model, data, vocabulary, config, *, nbest, **options):
        assert (model, vocabulary, config) == ("model", self.loaded.vocabulary, self.decoder.config)
        self.log.append(f"decode {len(data)}")
        self.data.append((data, options))
        worse = beam.Hypothesis([90], -8.0, -4.0, [0], [-8.0], True)
        return [[beam.Hypothesis([65 + i, 66], -6.0, -2.0, [0, 0], [-3.0, -1.0], True, next(self.scores, None)),
                 worse][:nbest] for i in range(len(data))]  # fmt: skip

    def run(self, *words) -> list[tuple[Segment, ...]]:
        """Return the segments of each recording as the command transcribes it."""
        options = module.parser().parse_args([*self.recordings, *words])
        return self.listed(module.transcribe(options.files, self.model, options))

    def listed(self, transcripts) -> list[tuple[Segment, ...]]:
        found = []
        for path, transcript in transcripts:
            self.log.append(str(path))
            found.append(transcript.segments)
        return found


def test_recordings_come_in_their_order_as_soon_as_all_of_each_is_decoded(monkeypatch, capsys):
    work = Work(monkeypatch, {"a": [3.0, 4.0], "b": [3.0, 2.0], "c": [], "odd": [2.0, 2.0]})
    found = work.run()
    assert work.log == ["decode 3", "a", "decode 3", "b", "c", "odd"]
    times = [[(segment.start, segment.end) for segment in segments] for segments in found]
    assert times == [[(0, 3), (3, 7)], [(0, 3), (3, 5)], [], [(0, 2), (2, 4)]]
    best = Hypothesis("CB", -6.0, -2.0, None)
    assert found[1][0] == Segment(0.0, 3.0, "CB", -6.0, -2.0, None, (best,))
    data, options = work.data[0]
    expected = {"ngram": "table", "packed": "packed", "device": torch.device("cpu")}
    assert options == {**expected, "speech_scores": True, "progress": False}
    assert data.ids == ["a from 0 s", "a from 3 s", "b from 0 s"] and data.seconds.tolist() == [3, 4, 3]
    assert data.frame_counts.tolist() == [30, 40, 30] and len(data) == 3 and data[1].shape == (40, 2)
    assert capsys.readouterr().err == ("warning: c: no speech was found in its 3.00 seconds\nwarning: odd is odd\n")
    assert work.shown == ((None, "transcribing", "s of audio"), {}) and sum(work.updates) == 19


def test_python_callers_are_told_what_was_heard_and_shown_nothing(monkeypatch, capsys):
    work = Work(monkeypatch, {"a": [3.0, 4.0], "odd": [3.0, 2.0], "c": []})
    messages, seconds = [], []
    options = {"nbest": 2, "pool_seconds": 10, "warn": messages.append, "on_audio": seconds.append}
    found = work.listed(work.model.transcribe_all(work.recordings, **options))
    assert work.log == ["decode 3", "a", "decode 1", "odd", "c"]
    assert messages == ["odd is odd", "c: no speech was found in its 3.00 seconds"] and sum(seconds) == 15
    best, worse = Hypothesis("AB", -6.0, -2.0, None), Hypothesis("Z", -8.0, -4.0, None)
    assert found[0][0] == Segment(0.0, 3.0, "AB", -6.0, -2.0, None, (best, worse))
    assert work.shown is None and capsys.readouterr() == ("", "")


def test_recordings_before_one_that_cannot_be_read_come_first(monkeypatch, capsys):
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


def test_segments_below_the_minimum_speech_score_are_left_out_and_counted(monkeypatch, capsys):
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


def test_progress_has_the_total_length_of_all_recordings(here, monkeypatch):
    work = Work(monkeypatch, {str(here / "short.wav"): [1.0], str(here / "long.wav"): []})
    work.run()
    assert work.shown[0][0] == pytest.approx(25.6)


def test_beam_and_language_model_reach_the_search(monkeypatch):
    work = Work(monkeypatch, {"a": [1.0]})
    work.run()
    work.run("--beam", "7", "--lm", "text.arpa")
    asked = {"beam": None, "lm": None}, {"beam": 7, "lm": "text.arpa"}
    assert work.asked == [asked[0], ("settings", None), asked[1], ("settings", "text.arpa")]


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def asked(monkeypatch):
    """Give what main asks of a model, of which one segment comes for each recording."""
    calls = []

    def answer(model, paths, **options):
        calls.append({"paths": [path.name for path in paths], "model": model, **options})
        return ((path, Transcript("HELLO", (Segment(0.0, 1.5, "HELLO", -1.0, -0.25, 5.5),))) for path in paths)

    monkeypatch.setattr(Recogniser, "transcribe_all", answer)
    return calls


def ask(here, *words, files=("short.wav",)):
    main([*(f"{here}/{name}" for name in files), "--checkpoint", str(here / "untrained-20.safetensors"), *words])


def test_options_reach_the_work(here, asked, monkeypatch):
    given_back = []
    monkeypatch.setattr(module, "return_freed_memory", lambda: given_back.append(True))
    ask(here)
    assert given_back == [True]
    assert str(asked[0]["model"].device) in ("cpu", "cuda") and asked[0]["beam"] is asked[0]["lm"] is None
    assert asked[0]["min_speech_score"] == 1.0 and asked[0]["skip_bad"] is False
    assert asked[0]["pool_seconds"] == module.POOL_SECONDS and asked[0]["warn"] is module.warn
    words = ["--beam", "1", "--lm", "text.arpa", "--min-speech-score=-inf", "--on-bad", "skip", "--device", "cpu"]
    ask(here, *words, files=["short.wav", "gone.wav"])
    assert asked[1]["paths"] == ["short.wav", "gone.wav"]
    assert (asked[1]["beam"], asked[1]["lm"], str(asked[1]["model"].device)) == (1, "text.arpa", "cpu")
    assert asked[1]["min_speech_score"] == -np.inf and asked[1]["skip_bad"] is True


def test_the_search_has_the_settings_of_the_checkpoint_except_for_options(here, asked, tmp_path, monkeypatch):
    ask(here, "--device", "cpu")
    model = asked[0]["model"]
    own = model.loaded.config.decoding
    assert model.settings() == own and model.decoder(own)[:2] == (own, None)
    path, table, calls = tmp_path / "text.arpa", torch.zeros(1, len(model.loaded.vocabulary)), []
    path.touch()
    monkeypatch.setattr(recogniser, "with_default_weight", lambda decoding, path: replace(decoding, ngram_weight=0.7))
    monkeypatch.setattr(recogniser, "load_ngram_table", lambda *given: calls.append(given) or table)
    expected = replace(own, beam=1, ngram_weight=0.7)
    assert model.settings(beam=1, lm=str(path)) == expected
    config, ngram, _ = model.decoder(expected, str(path))
    assert config == expected and ngram is table
    assert calls == [(str(path), expected, model.loaded, torch.device("cpu"), "--lm ")]


@pytest.mark.parametrize(("form", "suffix", "first"), [("text", "txt", "HELLO"), ("json", "json", '{"file": '),
                                                       ("srt", "srt", "1"), ("vtt", "vtt", "WEBVTT")])  # fmt: skip
def test_each_format_goes_to_stdout_or_to_files_of_its_name(here, asked, tmp_path, capsys, form, suffix, first):
    ask(here, "--format", form)
    assert capsys.readouterr().out.splitlines()[0].startswith(first)
    out = tmp_path / "two\nlines"
    ask(here, "--format", form, "--out", str(out), files=["short.wav", "long.wav"])
    assert sorted(path.name for path in out.iterdir()) == [f"long.{suffix}", f"short.{suffix}"]
    assert (out / f"long.{suffix}").read_text().startswith(first)
    shown = f"{tmp_path}/two\\nlines/"
    assert capsys.readouterr().out == f"{shown}short.{suffix}\n{shown}long.{suffix}\n"
    with pytest.raises(InputError, match=rf"^2 of 2 output files exist already, the first is \S+short.{suffix}; add"):
        ask(here, "--format", form, "--out", str(out), files=["short.wav", "long.wav"])
    ask(here, "--format", form, "--out", str(out), "--existing", "skip", files=["short.wav", "long.wav"])
    assert capsys.readouterr().out == f"nothing to do: all 2 transcripts exist in {shown[:-1]}\n"
    ask(here, "--format", form, "--out", str(out), "--existing", "skip", files=["short.wav", "silent.wav"])
    assert asked[-1]["paths"] == ["silent.wav"]


def test_texts_of_several_files_have_their_names_on_one_line(here, asked, capsys):
    (here / "odd\nname.wav").write_bytes(b"")
    ask(here, files=["odd\nname.wav", "short.wav"])
    assert capsys.readouterr().out == f"{here}/odd\\nname.wav: HELLO\n{here}/short.wav: HELLO\n"
    ask(here, "--format", "json", files=["odd\nname.wav", "short.wav"])
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["HELLO", "HELLO"]


@pytest.mark.parametrize("form", ["srt", "vtt"])
def test_subtitles_of_several_files_need_a_folder(here, asked, form):
    with pytest.raises(
        InputError, match=f"^2 recordings need 2 {form} files; give a folder for them with --out FOLDER$"
    ):
        ask(here, "--format", form, files=["short.wav", "long.wav"])


@pytest.mark.parametrize("option", ["--format", "--existing", "--on-bad", "--beam", "--min-speech-score"])
def test_an_option_rejects_other_values(here, asked, capsys, option):
    with pytest.raises(SystemExit):
        run(lambda _: ask(here, option, "otherwise"))
    assert option in capsys.readouterr().err and not asked


def test_stdout_is_required_without_a_folder(here, asked, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(module, "require_stdout", needed.append)
    ask(here, "--out", str(tmp_path))
    assert needed == []
    ask(here)
    assert needed == ["--out FOLDER"]


def test_files_must_exist_except_for_standard_input(here, asked, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    main(["-", "--checkpoint", str(here / "untrained-20.safetensors")])
    assert asked[0]["paths"] == ["-"]
    with pytest.raises(InputError, match="gone.wav does not exist; check the path"):
        ask(here, files=["gone.wav"])


def test_the_released_model_is_the_default(here, asked, monkeypatch):
    monkeypatch.setattr(module, "released_model", lambda: str(here / "untrained-20.safetensors"))
    main([str(here / "short.wav")])
    assert asked[0]["model"].loaded.path == here / "untrained-20.safetensors"


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
    recognised = {Path(row["file"]).stem: row["text"] for row in map(json.loads, capsys.readouterr().out.splitlines())}
    texts = [[recognised[f"{k}-{kind}"] for k in range(len(rows))] for kind in ("bare", "silent")]
    bare, silent = (score([row["transcript"] for row in rows], found).cer for found in texts)
    assert silent < 1.25 * bare


def test_the_released_model_has_no_text_for_noise(capsys, tmp_path):
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


def test_the_default_model_is_speech13h_or_the_only_one(tmp_path, monkeypatch, capsys):
    from las_fast import checkpoint

    monkeypatch.setattr(checkpoint, "RELEASED", tmp_path)
    with pytest.raises(InputError, match="no released model; give --checkpoint"):
        module.released_model()
    for name in ("an4", "speech13h"):
        (tmp_path / f"{name}.safetensors").touch()
        assert module.released_model() == name
