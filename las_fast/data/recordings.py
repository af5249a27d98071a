"""Find the recordings that the arguments of a command name: files, folders and patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from las_fast.data.folders import list_folder
from las_fast.errors import InputError, show

MEDIA_SUFFIXES = frozenset((  # of files that need PyAV
    ".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".3gp", ".aac", ".ac3", ".webm", ".mkv", ".mka", ".wma", ".wmv", ".avi",
    ".amr", ".flv", ".wv", ".ape", ".tta", ".mpg", ".mpeg",
))  # fmt: skip


@cache
def audio_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that libsndfile reads, in lower case."""
    import soundfile  # here, because archives of features need no soundfile

    formats = soundfile.available_formats().keys() - {"RAW"}  # RAW has no header
    return frozenset(f".{name.lower()}" for name in formats) | {".opus", ".oga", ".aif"}


def find_recordings(paths: list[Path]) -> list[Path]:
    """Return the recordings that paths name, in order, each once.

    "-" and files stand for themselves. A folder stands for the files in it and its subfolders that have the suffix of a
    recording and are not hidden. A path that does not exist and has one of * ? [ is a pattern for such files; **
    matches subfolders.

    Raises:
        InputError: a folder or a pattern has no recordings, or a folder cannot be listed.
    """
    return list(dict.fromkeys(recording for path in paths for recording in _expand(path)))


def _expand(path: Path) -> Iterator[Path]:
    if str(path) != "-" and path.is_dir():
        yield from _not_empty(list(_walk(path, set())), f"{show(path)} has no recordings in it or its subfolders")
    elif str(path) != "-" and glob.has_magic(str(path)) and not os.path.lexists(path):
        matches = sorted(Path(name) for name in glob.iglob(str(path), recursive=True) if is_recording(Path(name)))
        yield from _not_empty(matches, f"no recording matches {show(path)}")
    else:
        yield path


def _not_empty(recordings: list[Path], problem: str) -> list[Path]:
    """Return the recordings; raise InputError if there are none."""
    if not recordings:
        raise InputError(f"{problem}; give files such as wav, flac, ogg, mp3 or m4a")
    return recordings


def _walk(folder: Path, above: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield the recordings below a folder; `above` has the folders above it, so that no link leads in a circle."""
    status = os.stat(folder)
    key = status.st_dev, status.st_ino
    if key in above:
        return
    for path in list_folder(folder):
        if path.is_dir():
            yield from _walk(path, above | {key})
        elif is_recording(path):
            yield path


def is_recording(path: Path) -> bool:
    """Return whether a path has the suffix of a recording, and is not a folder."""
    suffix = path.suffix.lower()
    return (suffix in audio_suffixes() or suffix in MEDIA_SUFFIXES) and not path.is_dir()
