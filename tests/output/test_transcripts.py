"""Transcripts, and the names of their files."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from las_fast.errors import InputError
from las_fast.output.transcripts import Hypothesis, Segment, Transcript, Word, _shortened, output_files


def segment(text, start=0.0, words=()):
    return Segment(start, start + 1.0, text, -1.0, -0.5, None, words=words)


def test_a_change_of_case_reaches_every_text():
    word = Word("HELLO", 0.0, 1.0, 0.5)
    other = Hypothesis("HOLLOW", -2.0, -0.3, None, (Word("HOLLOW", 0.0, 1.0, 0.1),))
    best = Segment(0.0, 1.0, "HELLO", -1.0, -0.2, 5.0, (Hypothesis("HELLO", -1.0, -0.2, 5.0, (word,)), other), (word,))
    transcript = Transcript("HELLO", (best,), (segment("HM"),), 3.0).map_text(str.lower)
    changed = transcript.segments[0]
    assert (transcript.text, changed.text, transcript.words[0].text) == ("hello", "hello", "hello")
    assert [(h.text, h.words[0].text) for h in changed.nbest] == [("hello", "hello"), ("hollow", "hollow")]
    assert transcript.noise[0].text == "hm" and transcript.duration == 3.0
    assert changed.words[0] == Word("hello", 0.0, 1.0, 0.5) and changed.score == -1.0


def test_the_words_of_a_transcript_are_those_of_its_segments():
    first, second = Word("A", 0.0, 0.5, 1.0), Word("B", 2.0, 2.5, 1.0)
    transcript = Transcript("A B", (segment("A", words=(first,)), segment("B", 2.0, (second,))))
    assert transcript.words == (first, second)


SAID = Transcript("A B", (segment("A B", words=(Word("A", 0.0, 0.5, 1.0), Word("B", 0.5, 1.5, 1.0))),))


def test_the_suffix_of_a_saved_transcript_is_its_format(tmp_path, monkeypatch):
    file = tmp_path / "new" / "talk.SRT"
    SAID.save(file)
    assert file.read_bytes() == b"1\n00:00:00,000 --> 00:00:01,500\nA B\n" == SAID.to_string("srt").encode()
    SAID.map_text(str.lower).save(str(file), width=1)
    assert file.read_bytes() == b"1\n00:00:00,000 --> 00:00:01,500\na\nb\n"  # replaced
    monkeypatch.setenv("HOME", str(tmp_path))
    SAID.save("~/talk.tsv")
    assert (tmp_path / "talk.tsv").read_text() == "start\tend\ttext\n0\t1000\tA B\n"


def test_ctm_of_a_transcript_without_a_path_has_a_name():
    assert SAID.to_string("ctm").startswith("recording 1 0.000 0.500 A")
    assert replace(SAID, recording="a/my talk.wav").to_string("ctm").startswith("my_talk 1 0.000 0.500 A")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("talk.docx", {}, r"^\S+talk\.docx: the name of a transcript must end in \.txt, \.json, \.srt, \.vtt, \.tsv, "
         r"\.ctm or \.TextGrid; change it$"),
        ("a\0.srt", {}, r"a\\x00\.srt: a path has no null characters; remove them$"),
        ("talk", {}, "talk: the name of a transcript must end in"),
        ("talk.srt", {"width": 0}, "^width must be a whole number of at least 1; got 0$"),
        ("talk.srt", {"lines": 1.5}, "^lines must be a whole number of at least 1; got 1.5$"),
        ("talk.srt", {"lines": True}, "^lines must be a whole number of at least 1; got True$"),
        ("talk.srt", {"word_times": True}, "^word_times is for vtt; got the format srt$"),
        ("talk.json", {"width": 30}, "^width is for srt and vtt; got the format json$"),
        ("taken/talk.srt", {}, r"^save \S+: the folder \S+ cannot be created \(\S+taken is a file\); choose another$"),
        ("folder.srt", {}, r"folder\.srt is not a regular file; give another name$"),
    ],
)  # fmt: skip
def test_a_transcript_that_cannot_be_saved_is_one_sentence(tmp_path, name, options, message):
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder.srt").mkdir()
    with pytest.raises(InputError, match=message):
        SAID.save(tmp_path / name, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.srt", "taken"]


@pytest.mark.parametrize("form", ["txt", "", None, ["srt"]])
def test_an_unknown_format_is_one_sentence(form):
    expected = f"the format must be one of text, json, srt, vtt, tsv, ctm, textgrid; got {form!r}"
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        SAID.to_string(form)


def test_a_path_of_another_type_is_one_sentence():
    with pytest.raises(InputError, match="^the file of a transcript is a path; got a value of type int$"):
        SAID.save(5)


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


def test_recordings_of_a_folder_keep_their_subfolders():
    paths = [Path(name) for name in ("in/mon/rec.ogg", "in/fri/rec.ogg", "in/rec.ogg", "else/mon/rec.ogg")]
    files = output_files(paths, Path("out"), ".srt", [Path("in")])
    names = ["mon/rec.srt", "fri/rec.srt", "rec.ogg.srt", "rec.ogg-2.srt"]
    assert files == {path: Path("out") / name for path, name in zip(paths, names, strict=True)}


def test_equal_long_names_are_shortened_and_numbered():
    paths = [Path(folder) / f"{'a' * 240}.wav" for folder in "xyz"]
    names = [path.name for path in output_files(paths, Path("out"), ".srt").values()]
    assert names == [f"{'a' * 240}.wav.srt", f"{'a' * 240}.wav-2.srt", f"{'a' * 240}.wav-3.srt"]


@pytest.mark.parametrize("name", ["\u0434" * 125, "\u4e2d" * 83, "\u0434" * 124, "a" * 251])
@pytest.mark.parametrize("suffixes", [(".wav", ".wav"), (".wav", ".mp3")])
def test_equal_names_of_any_length_and_script_get_files_of_their_own(name, suffixes):
    folders = "ab" if suffixes[0] == suffixes[1] else "aa"
    paths = [Path(folder) / (name + suffix) for folder, suffix in zip(folders, suffixes, strict=True)]
    names = [path.name for path in output_files(paths, Path("out"), ".srt").values()]
    assert len(set(names)) == 2 and all(len(os.fsencode(name)) <= 255 for name in names)


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
