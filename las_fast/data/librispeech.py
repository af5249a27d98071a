"""LibriSpeech folders: ROOT[/LibriSpeech]/SPLIT/SPEAKER/CHAPTER/ID.flac next to SPEAKER-CHAPTER.trans.txt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from las_fast.data.corpus import Corpus, Utterance, assign_roles
from las_fast.data.folders import list_at_depth, list_folder, read_lines, subfolders, to_filename
from las_fast.data.recordings import audio_suffixes
from las_fast.errors import InputError

LAYOUT = "[LibriSpeech/]SPLIT/SPEAKER/CHAPTER/*.trans.txt (LibriSpeech)"


def find_librispeech(root: Path) -> Path | None:
    """Find the folder whose children are splits: root, root/LibriSpeech, or root's parent."""
    candidates = (root, root / "LibriSpeech")
    folder = next((path for path in candidates if any(map(_is_split, subfolders(path)))), None)
    return root.parent if folder is None and _is_split(root) else folder


def open_librispeech(root: Path) -> Corpus:
    """Open a folder that find_librispeech returned."""
    splits = [path.name for path in subfolders(root) if _is_split(path) or _has_audio(path)]
    return Corpus(
        name="LibriSpeech",
        root=root,
        kind="audio",
        listings={split: partial(_list_split, root / split) for split in splits},
        roles=assign_roles(splits),
        expected_texts="SPEAKER-CHAPTER.trans.txt next to the recordings",
    )


def _is_split(path: Path) -> bool:
    return any(_is_transcript(file) for file in _files(path))


def _has_audio(path: Path) -> bool:
    """Return whether a split has recordings; a test set may lack transcripts."""
    return any(file.suffix.lower() in audio_suffixes() for file in _files(path))


def _files(split: Path) -> Iterator[Path]:
    """Yield the files of a split without those in unreadable folders, which _list_split reports."""
    for speaker in subfolders(split):
        for chapter in subfolders(speaker):
            with suppress(InputError):
                yield from list_folder(chapter)


def _is_transcript(path: Path) -> bool:
    return path.name.lower().endswith(".trans.txt")


def _list_split(split: Path) -> list[Utterance]:
    texts: dict[str, str] = {}
    recordings: dict[str, Path] = {}
    paths = list(list_at_depth(split, 2))
    for path in filter(_is_transcript, paths):
        for name, text in read_transcripts(path):
            if name in texts:
                raise InputError(f"{path} has a second transcript of {name}; keep only one")
            texts[name] = text
            recordings.setdefault(name, path.parent / f"{name}.flac")
    for path in paths:
        if path.suffix.lower() in audio_suffixes():
            if recordings.get(path.stem, path) != path and recordings[path.stem].exists():
                raise InputError(f"{path} and {recordings[path.stem]} are recordings with the same name; keep only one")
            recordings[path.stem] = path
    return [Utterance(name, recordings[name], texts.get(name)) for name in sorted(recordings)]


def read_transcripts(path: Path) -> list[tuple[str, str]]:
    """Read (id, text) from each line of a *.trans.txt; any white space separates them."""
    words = (line.split(maxsplit=1) for line in read_lines(path))
    return [(to_filename(name), text[0].strip() if text else "") for name, *text in filter(None, words)]
