"""LibriSpeech folders: ROOT[/LibriSpeech]/SPLIT/SPEAKER/CHAPTER/ID.flac with SPEAKER-CHAPTER.trans.txt beside them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import soundfile

from las_fast.data.corpus import Corpus, Utterance, assign_roles, subfolders
from las_fast.errors import InputError

LAYOUT = "[LibriSpeech/]SPLIT/SPEAKER/CHAPTER/*.trans.txt (LibriSpeech)"
FORMATS = soundfile.available_formats().keys() - {"RAW"}  # which says neither its rate nor its channels
AUDIO_SUFFIXES = {f".{name.lower()}" for name in FORMATS} | {".opus", ".oga", ".aif"}


def find_librispeech(root: Path) -> Path | None:
    """Return the folder whose children are splits: root, its folder LibriSpeech, its only child, or root's parent."""
    children = subfolders(root)
    candidates = [root, root / "LibriSpeech", *(children if len(children) == 1 else [])]
    found = next((path for path in candidates if path.is_dir() and any(map(_is_split, subfolders(path)))), None)
    return root.parent if found is None and _is_split(root) else found


def open_librispeech(root: Path) -> Corpus:
    splits = [path.name for path in subfolders(root) if _is_split(path) or _has_audio(path)]
    return Corpus(
        name="LibriSpeech",
        root=root,
        kind="audio",
        listings={split: partial(_list_split, root / split) for split in splits},
        roles=assign_roles(splits),
    )


def _is_split(path: Path) -> bool:
    return next(path.glob("*/*/*.trans.txt"), None) is not None


def _has_audio(path: Path) -> bool:
    """Say whether a split without transcripts has recordings (a test set may)."""
    return any(file.suffix.lower() in AUDIO_SUFFIXES for file in path.glob("*/*/*"))


def _list_split(split: Path) -> list[Utterance]:
    texts: dict[str, str] = {}
    sound: dict[str, Path] = {}
    for path in split.glob("*/*/*"):
        if path.name.endswith(".trans.txt"):
            for name, text in read_transcripts(path):
                if name in texts:
                    raise InputError(f"{path} has a second transcript of {name}; keep one")
                texts[name] = text
                sound.setdefault(name, path.parent / f"{name}.flac")
    for path in split.glob("*/*/*"):
        if path.suffix.lower() in AUDIO_SUFFIXES:
            if sound.get(path.stem, path) != path and sound[path.stem].exists():
                raise InputError(f"{path} and {sound[path.stem]} are recordings of the same name; keep one")
            sound[path.stem] = path
    return [Utterance(name, sound[name], texts.get(name)) for name in sorted(sound)]


def read_transcripts(path: Path) -> list[tuple[str, str]]:
    """Return (id, text) of each line of a *.trans.txt."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; copy it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check its permissions") from None
    pairs = (line.strip().partition(" ") for line in lines if line.strip())
    return [(name, text.strip()) for name, _, text in pairs]
