"""Recordings into pieces, and pieces into text, JSON and subtitles."""

import json

import numpy as np
import pytest
import soundfile
from archives import make_waveform
from checkpoints import make_checkpoint

from las_fast import transcribe as module
from las_fast.cli import run
from las_fast.transcribe import Piece, as_srt, as_text, as_vtt, clock, cut_at_silences, main

RATE = 1000


def speech_with_pauses(seconds, pauses):
    samples = np.random.default_rng(0).normal(size=int(seconds * RATE)).astype(np.float32)
    for at in pauses:
        samples[int((at - 0.2) * RATE) : int((at + 0.2) * RATE)] *= 0.001
    return samples


def test_a_short_recording_stays_whole():
    assert cut_at_silences(speech_with_pauses(20, [3]), RATE) == [(0, 20 * RATE)]


def test_long_recordings_are_cut_at_their_pauses():
    pieces = cut_at_silences(speech_with_pauses(60, [15, 28, 43]), RATE)
    assert [start / RATE for start, _ in pieces] == pytest.approx([0, 15, 28, 43], abs=0.15)


def test_a_cut_lies_in_the_middle_of_a_pause():
    samples = np.random.default_rng(0).normal(size=30 * RATE).astype(np.float32)
    samples[int(14.9 * RATE) : int(15.1 * RATE)] *= 0.001  # as long as the span over which loudness is averaged
    (_, cut), _ = cut_at_silences(samples, RATE)
    assert cut / RATE == pytest.approx(15.0, abs=0.02)


@pytest.mark.parametrize("seconds", [20.001, 20.5, 39.9, 61, 200])
def test_pieces_are_short_enough_and_nothing_is_lost(seconds):
    samples = speech_with_pauses(seconds, [])
    pieces = cut_at_silences(samples, RATE)
    assert pieces[0][0] == 0 and pieces[-1][1] == len(samples)
    assert all(a[1] == b[0] for a, b in zip(pieces, pieces[1:], strict=False))
    assert all(0.05 < (end - start) / RATE <= 20 for start, end in pieces)


PIECES = [Piece(0.0, 1.5, "HELLO", -1.0), Piece(1.5, 2.0, "", -0.1), Piece(3661.0425, 3662.0, "THERE", -2.0)]


def test_texts_of_the_pieces_are_joined(tmp_path):
    assert as_text(tmp_path, PIECES) == "HELLO THERE\n"


def test_subtitles_have_the_times_of_the_pieces(tmp_path):
    assert as_srt(tmp_path, PIECES) == (
        "1\n00:00:00,000 --> 00:00:01,500\nHELLO\n\n2\n01:01:01,042 --> 01:01:02,000\nTHERE\n"
    )
    assert as_vtt(tmp_path, PIECES[:1]) == "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nHELLO\n"


def test_clock_carries_rounding_over():
    assert clock(59.9996, ".") == "00:01:00.000"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transcribe")
    make_checkpoint(folder, 20, mel_bins=23)
    generator = np.random.default_rng(0)
    soundfile.write(folder / "short.wav", make_waveform(generator, 0.6), 16000)
    soundfile.write(folder / "other.flac", np.stack([make_waveform(generator, 1.0)] * 2, 1), 22050)
    soundfile.write(folder / "long.wav", np.tile(make_waveform(generator, 1.0), 25), 16000)
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    return folder


def transcribe(here, *words, files=("short.wav",)):
    model = ["--checkpoint", str(here / "untrained-20.safetensors"), "--device", "cpu", "--beam", "2"]
    main([*(str(here / name) for name in files), *model, *words])


def test_a_long_recording_is_decoded_in_pieces(here, capsys):
    transcribe(here, "--format", "json", files=["long.wav"])
    row = json.loads(capsys.readouterr().out)
    assert len(row["pieces"]) == 2 and row["pieces"][0]["end"] == row["pieces"][1]["start"] < 20
    assert row["text"] == " ".join(piece["text"] for piece in row["pieces"]) and row["pieces"][1]["end"] == 25


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
    assert out == "\n" and "silent.wav: nothing in its 1.00 seconds is long (0.1 s) and loud enough" in err


def test_a_click_says_nothing(here, capsys):
    soundfile.write(here / "click.wav", np.full(500, 0.5), 16000)
    transcribe(here, files=["click.wav"])
    out, err = capsys.readouterr()
    assert out == "\n" and "click.wav: nothing in its 0.03 seconds" in err


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
        (["short.wav", "short.wav"], ["--out", "x"], "would be the same file"),
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


def test_the_released_model_is_taken_or_its_absence_explained(tmp_path, monkeypatch, capsys):
    from las_fast import checkpoint
    from las_fast.errors import InputError

    monkeypatch.setattr(checkpoint, "RELEASED", tmp_path)
    with pytest.raises(InputError, match="no released model; give --checkpoint"):
        module.released_model()
    for name in ("an4", "speech13h"):
        (tmp_path / f"{name}.safetensors").touch()
        assert module.released_model() == name
