"""LibriSpeech folders: ROOT[/LibriSpeech]/SPLIT/SPEAKER/CHAPTER/ID.flac with SPEAKER-CHAPTER.trans.txt beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import soundfile

from las_fast.data.corpus import Corpus, Utterance, assign_roles
from las_fast.data.folders import at_depth, listed, read_lines, subfolders, system_name
from las_fast.errors import InputError

LAYOUT = "[LibriSpeech/]SPLIT/SPEAKER/CHAPTER/*.trans.txt (LibriSpeech)"
FORMATS = soundfile.available_formats().keys() - {"RAW"}  # which says neither its rate nor its channels
AUDIO_SUFFIXES = {f".{name.lower()}" for name in FORMATS} | {".opus", ".oga", ".aif"}


def find_librispeech(root: Path) -> Path | None:
    """Return the folder whose children are splits: root, its folder LibriSpeech, or root's parent."""
    candidates = (root, root / "LibriSpeech")
    found = next((path for path in candidates if any(map(_is_split, subfolders(path)))), None)
    return root.parent if found is None and _is_split(root) else found


def open_librispeech(root: Path) -> Corpus:
    splits = [path.name for path in subfolders(root) if _is_split(path) or _has_audio(path)]
    return Corpus(
        name="LibriSpeech",
        root=root,
        kind="audio",
        listings={split: partial(_list_split, root / split) for split in splits},
        roles=assign_roles(splits),
        texts="SPEAKER-CHAPTER.trans.txt beside the recordings",
    )


def _is_split(path: Path) -> bool:
    return any(_is_transcript(file) for file in _look(path))


def _has_audio(path: Path) -> bool:
    """Say whether a split without transcripts has recordings (a test set may)."""
    return any(file.suffix.lower() in AUDIO_SUFFIXES for file in _look(path))


def _look(split: Path) -> Iterator[Path]:
    """Yield the files of a split as far as its folders can be listed; reading the split says what cannot."""
    for speaker in subfolders(split):
        for chapter in subfolders(speaker):
            with suppress(InputError):
                yield from listed(chapter)


def _is_transcript(path: Path) -> bool:
    return path.name.lower().endswith(".trans.txt")


def _list_split(split: Path) -> list[Utterance]:
    texts: dict[str, str] = {}
    sound: dict[str, Path] = {}
    paths = list(at_depth(split, 2))
    for path in filter(_is_transcript, paths):
        for name, text in read_transcripts(path):
            if name in texts:
                raise InputError(f"{path} has a second transcript of {name}; keep one")
            texts[name] = text
            sound.setdefault(name, path.parent / f"{name}.flac")
    for path in paths:
        if path.suffix.lower() in AUDIO_SUFFIXES:
            if sound.get(path.stem, path) != path and sound[path.stem].exists():
                raise InputError(f"{path} and {sound[path.stem]} are recordings of the same name; keep one")
            sound[path.stem] = path
    return [Utterance(name, sound[name], texts.get(name)) for name in sorted(sound)]


def read_transcripts(path: Path) -> list[tuple[str, str]]:
    """Return (id, text) of each line of a *.trans.txt; any white space parts the id from the text."""
    words = (line.split(maxsplit=1) for line in read_lines(path))
    return [(system_name(name), text[0].strip() if text else "") for name, *text in filter(None, words)]
