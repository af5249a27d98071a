"""Files, folders and patterns on the command line stand for recordings."""

import os
from pathlib import Path

import pytest

from las_fast.data.recordings import find_recordings
from las_fast.errors import InputError


@pytest.fixture
def folder(tmp_path):
    for name in ("b.wav", "a.MP3", "notes.txt", ".hidden.wav", "sub/c.flac", "sub/deep/d.m4a", "sub/.trash/e.wav"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def names(paths, folder):
    return [path.relative_to(folder).as_posix() for path in paths]


def test_a_folder_stands_for_the_recordings_in_it_and_below(folder):
    assert names(find_recordings([folder]), folder) == ["a.MP3", "b.wav", "sub/c.flac", "sub/deep/d.m4a"]


def test_a_link_to_a_folder_above_is_not_followed_forever(folder):
    os.symlink(folder, folder / "sub" / "loop")
    assert len(find_recordings([folder])) == 4


def test_a_pattern_stands_for_the_recordings_that_match(folder):
    assert names(find_recordings([folder / "*"]), folder) == ["a.MP3", "b.wav"]
    assert names(find_recordings([folder / "**" / "*.flac"]), folder) == ["sub/c.flac"]


def test_a_file_whose_name_looks_like_a_pattern_is_itself(folder):
    odd = folder / "take[1].wav"
    odd.touch()
    assert find_recordings([odd]) == [odd]


def test_files_stand_for_themselves_once_whatever_their_suffix(folder):
    paths = [folder / "notes.txt", Path("-"), folder / "gone.wav", folder / "notes.txt"]
    assert find_recordings(paths) == paths[:3]


@pytest.mark.parametrize(("name", "problem"), [("empty", "has no recordings in it or its subfolders; give files such"),
                                               ("*.ogg", "no recording matches .*; give files such")])  # fmt: skip
def test_nothing_found_is_an_error(folder, name, problem):
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=problem):
        find_recordings([folder / name])


def test_names_with_line_breaks_are_shown_on_one_line(folder):
    (folder / "two\nlines").mkdir()
    for name, problem in (("two\nlines", r"two\\nlines has no recordings"), ("*\n", r"no recording matches .*\*\\n;")):
        with pytest.raises(InputError, match=problem):
            find_recordings([folder / name])
