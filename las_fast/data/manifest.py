"""Manifests: a .tsv with a header line, or a .jsonl with an object a line, that name recordings or feature files.

Columns: path (also audio, audio_filepath), relative to the manifest; transcript (also text), needed for training;
id (otherwise the file's name without its ending); split (otherwise one split, "all", plays every role); seconds (also
duration), against which recordings are checked. Further columns, such as speaker and source, are allowed and not used.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from las_fast.data.corpus import Corpus, Utterance, assign_roles
from las_fast.data.hw4p2 import peek_shape
from las_fast.errors import InputError

SUFFIXES = (".tsv", ".jsonl")
LAYOUT = "exactly one .tsv or .jsonl manifest"
NAMES = {
    "path": ("path", "audio", "audio_filepath"),
    "transcript": ("transcript", "text"),
    "id": ("id",),
    "split": ("split",),
    "seconds": ("seconds", "duration"),
}


def find_manifests(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def open_manifest(path: Path) -> Corpus:
    """Return the corpus of a manifest; InputError naming the line of its first mistake."""
    splits = _read(path)
    kinds = {u.path.suffix.lower() == ".npy" for utterances in splits.values() for u in utterances}
    if len(kinds) != 1:
        raise InputError(f"{path} names both audio and .npy files; make a manifest of each")
    is_features = kinds.pop()
    roles = assign_roles(splits) if set(splits) != {"all"} else dict.fromkeys(("train", "dev", "test"), ("all",))
    return Corpus(
        name=f"manifest {path.name}",
        root=path,
        kind="features" if is_features else "audio",
        listings={split: partial(list, utterances) for split, utterances in splits.items()},
        roles=roles,
        feature_size=_frame_size(path, splits) if is_features else None,
    )


def further_columns(path: Path) -> dict[str, dict]:
    """Return id -> all columns of its line, of a manifest that open_manifest takes."""
    return {_utterance(path, line, row)[0].id: row for line, row in _rows(path)}


def _read(path: Path) -> dict[str, list[Utterance]]:
    splits: dict[str, list[Utterance]] = {}
    try:
        for line, row in _rows(path):
            utterance, split = _utterance(path, line, row)
            splits.setdefault(split, []).append(utterance)
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path} is no table separated by tabs ({error}); write it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check its permissions") from None
    if not splits:
        raise InputError(f"{path} names no recordings; expected a line for each")
    return splits


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        if path.suffix.lower() == ".jsonl":
            yield from _json_rows(path, lines)
            return
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = [name.strip() for name in next(reader, [])]
        if not any(name in header for name in NAMES["path"]):
            raise InputError(f"{path} must begin with a header line that has a column 'path'; got {header!r}")
        for line, values in enumerate(reader, 2):
            if values and len(values) != len(header):
                raise InputError(f"{path} line {line} has {len(values)} columns; its header has {len(header)}")
            if values:
                yield line, dict(zip(header, values, strict=True))


def _json_rows(path: Path, lines) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {line} is not JSON: {error.msg}; write one object a line") from None
        if not isinstance(row, dict):
            raise InputError(f"{path} line {line} must be a JSON object with a key 'path'; got {text.strip()[:40]}")
        yield line, row


def _utterance(path: Path, line: int, row: dict) -> tuple[Utterance, str]:
    found = {}
    for name, aliases in NAMES.items():
        value = next((row[alias] for alias in aliases if row.get(alias) is not None), None)
        if value is not None and not isinstance(value, str):
            if not isinstance(value, {"id": int, "seconds": (int, float)}.get(name, str)):
                raise InputError(f"{path} line {line}: {name} must be text; got {value!r}")
            value = str(value)
        found[name] = None if value is None else value.strip()
        if found[name] and not _is_writable(found[name]):
            raise InputError(f"{path} line {line}: {name} holds characters that no file can; write it again")
    if not found["path"]:
        raise InputError(f"{path} line {line} has no path; name the recording")
    file = path.parent / found["path"]  # an absolute path stays as it is
    if found["split"] == "":
        raise InputError(f"{path} line {line} has an empty split; give train, dev or test, or leave the column out")
    seconds = _seconds(path, line, found["seconds"])
    return Utterance(found["id"] or file.stem, file, found["transcript"] or None, seconds), found["split"] or "all"


def _is_writable(text: str) -> bool:
    """Say whether text has no NUL, which ends a file's name, and no half of a character, which JSON can write."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def _seconds(path: Path, line: int, text: str | None) -> float | None:
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InputError(f"{path} line {line}: seconds must be a number; got {text!r}")
    return seconds or None


def _frame_size(path: Path, splits: dict[str, list[Utterance]]) -> int:
    for utterances in splits.values():
        for utterance in utterances[:8]:
            shape = peek_shape(utterance.path)
            if shape is not None and len(shape) == 2:
                return shape[1]
    raise InputError(f"{path}: none of its first .npy files is a readable array (frames, features); check the paths")
