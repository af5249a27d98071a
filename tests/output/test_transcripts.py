"""Transcripts as text, JSON and subtitles, and the names of their files."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from las_fast.output.transcripts import (
    Segment,
    Transcript,
    Word,
    _shortened,
    as_json,
    as_srt,
    as_text,
    as_vtt,
    clock,
    output_files,
)

SEGMENTS = [
    Segment(0.0, 1.5, "HELLO", -1.0, -0.25, 5.5),
    Segment(1.5, 2.0, "", -0.1, -0.1, None),
    Segment(3661.0425, 3662.0, "THERE", -2.0, -0.33333, 4.0, (), (Word("THERE", 3661.14251, 3661.5, 0.98765),)),
]


def test_texts_of_segments_are_joined(tmp_path):
    assert as_text(tmp_path, SEGMENTS) == "HELLO THERE\n"


def test_json_holds_times_and_scores():
    row = json.loads(as_json(Path("a/b.wav"), SEGMENTS))
    assert row["file"] == "a/b.wav" and row["text"] == "HELLO THERE" and len(row["pieces"]) == 3
    assert row["pieces"][2] == {
        "start": 3661.0425, "end": 3662.0, "text": "THERE", "score": -2.0, "mean_score": -0.3333, "speech_score": 4.0,
        "words": [{"word": "THERE", "start": 3661.143, "end": 3661.5, "confidence": 0.9877}],
    }  # fmt: skip
    assert row["pieces"][0]["words"] == []
    assert row["pieces"][1]["speech_score"] is None


def test_a_transcript_has_the_words_of_all_segments_in_order():
    first, second = Word("A", 0.0, 0.5, 0.5), Word("B", 1.0, 1.5, 0.25)
    segments = [replace(SEGMENTS[0], words=(first,)), SEGMENTS[1], replace(SEGMENTS[2], words=(second,))]
    assert Transcript("A B", tuple(segments)).words == (first, second)


def test_subtitles_have_the_times_of_the_segments(tmp_path):
    assert as_srt(tmp_path, SEGMENTS) == (
        "1\n00:00:00,000 --> 00:00:01,500\nHELLO\n\n2\n01:01:01,042 --> 01:01:02,000\nTHERE\n"
    )
    assert as_vtt(tmp_path, SEGMENTS[:1]) == "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nHELLO\n"


def test_segments_without_text_have_no_subtitle(tmp_path):
    assert as_vtt(tmp_path, SEGMENTS) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nHELLO\n\n01:01:01.042 --> 01:01:02.000\nTHERE\n"
    )


def test_json_does_not_escape_non_ascii_letters():
    row = as_json(Path("a.wav"), [Segment(0.0, 1.0, "\uac15 \u00e9", -1.0, -1.0, None)])
    assert "\uac15 \u00e9" in row and row.endswith("}\n") and row.count("\n") == 1


def test_rounding_carries_into_minutes_and_hours():
    assert clock(59.9996, ".") == "00:01:00.000"
    assert clock(59 * 60, ".") == "00:59:00.000" and clock(3600 + 60 + 1.5, ",") == "01:01:01,500"


@pytest.mark.parametrize(
    ("paths", "files"),
    [
        (["in/a.wav", "in/b.flac"], ["a.srt", "b.srt"]),
        (["-"], ["stdin.srt"]),
        (["x/a.wav", "x/a.mp3"], ["a.wav.srt", "a.mp3.srt"]),
        (["x/talk.wav", "y/talk.wav", "y/other.wav"], ["talk.wav.srt", "talk.wav-2.srt", "other.srt"]),
        (["x/A.wav", "x/a.wav"], ["A.wav.srt", "a.wav-2.srt"]),  # some file systems ignore case
        (["/s/1.wav", "../t/1.wav", "1.wav"], ["1.wav.srt", "1.wav-2.srt", "1.wav-3.srt"]),
        (["-", "stdin.wav"], ["stdin.srt", "stdin.wav.srt"]),
        (["..wav", "/"], ["..srt", "recording.srt"]),
        (["v1.2.wav"], ["v1.2.srt"]),
    ],
)
def test_each_recording_has_its_own_file(paths, files):
    paths = [Path(path) for path in paths]
    assert output_files(paths, Path("out"), ".srt") == {
        path: Path("out") / file for path, file in zip(paths, files, strict=True)
    }


def test_equal_long_names_are_shortened_and_numbered():
    paths = [Path(folder) / f"{'a' * 240}.wav" for folder in "xyz"]
    names = [path.name for path in output_files(paths, Path("out"), ".srt").values()]
    assert names == [f"{'a' * 240}.wav.srt", f"{'a' * 127}-2.srt", f"{'a' * 127}-3.srt"]


@pytest.mark.parametrize(("length", "kept"), [(250, 250), (251, 251), (252, 251)])
def test_a_name_may_have_255_bytes_with_its_suffix(length, kept):
    assert _shortened("x" * length, ".srt") == "x" * kept + ".srt"


def test_a_name_that_is_not_utf8_is_kept():
    path = Path(os.fsdecode(b"mod\xe0.wav"))
    assert output_files([path], Path("out"), ".srt") == {path: Path("out") / os.fsdecode(b"mod\xe0.srt")}


def test_shortened_names_stay_distinct():
    paths = [Path(f"{'a' * 250}{number}.wav") for number in (1, 2)]
    names = [path.name for path in output_files(paths, Path("out"), ".json").values()]
    assert len(set(names)) == 2 and all(len(name) <= 255 for name in names)


@pytest.mark.parametrize("stem", ["x" * 251, "\u00e9" * 125, "\uac15" * 83])
def test_a_long_name_is_cut_to_255_bytes(stem, tmp_path):
    (file,) = output_files([Path(f"{stem}.wav")], tmp_path, ".json").values()
    file.write_text("")
    assert file.suffix == ".json" and 200 < len(os.fsencode(file.name)) <= 255
