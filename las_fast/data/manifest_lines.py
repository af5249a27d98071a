"""Lines of manifests: each becomes an utterance of a split."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from las_fast.data.corpus import Utterance, role_of
from las_fast.data.folders import to_filename
from las_fast.data.manifest_columns import SYNONYMS, check_columns, columns_by_meaning
from las_fast.data.manifest_times import times_of_part
from las_fast.data.tables import columns, read_rows
from las_fast.errors import InputError
from las_fast.files import URL

CLIPS_FOLDER = "clips"  # where Common Voice keeps its recordings


@dataclass(frozen=True)
class Table:
    """A manifest file."""

    path: Path
    split: str | None = None  # of lines that name no split


@dataclass(frozen=True)
class Entry:
    """A line of a manifest."""

    utterance: Utterance
    split: str | None
    row: dict
    has_id: bool  # the line has an id; otherwise it is made from the file's name


def is_common_voice(path: Path) -> bool:
    return (path.parent / CLIPS_FOLDER).is_dir() and "sentence" in columns(path)


def read_entries(tables: list[Table]) -> list[Entry]:
    """Read the lines of all manifests; ids that come from file names are made distinct within each split."""
    entries = [entry for table in tables for entry in _lines(table)]
    by_split: dict[str | None, list[int]] = {}
    for i, entry in enumerate(entries):
        by_split.setdefault(entry.split, []).append(i)
    for indices in by_split.values():
        for i, entry in zip(indices, _with_distinct_ids([entries[i] for i in indices]), strict=True):
            entries[i] = entry
    return entries


def _lines(table: Table) -> list[Entry]:
    path = table.path
    rows = list(read_rows(path))
    if not rows:
        return []
    if path.suffix.lower() in (".tsv", ".csv") and "path" not in columns_by_meaning(tuple(rows[0][1])):
        raise InputError(
            f"{path} must begin with a header line that has a column 'path' (or {', '.join(SYNONYMS['path'][1:6])}); "
            f"got {list(rows[0][1])!r}"
        )
    check_columns(path, rows)
    folder = path.parent / CLIPS_FOLDER if is_common_voice(path) else path.parent
    entries = [_entry(table, folder, line, row) for line, row in rows]
    _check_transcripts(path, rows, entries)
    _check_splits(path, rows, entries)
    if path.stem == "metadata" and all(entry.split is None for entry in entries):  # an audio folder
        splits = [_split_above(entry.utterance.path, path.parent) for entry in entries]
        if None not in splits:
            return [replace(entry, split=split) for entry, split in zip(entries, splits, strict=True)]
        if {role_of(split) for split in splits if split} >= {"train", "test"}:
            line, _ = rows[splits.index(None)]
            raise InputError(f"{path} line {line} is in none of the folders train, dev and test, unlike other lines; "
                             "move the recording, or add a column 'split'")  # fmt: skip
    return entries


def _check_transcripts(path: Path, rows: list[tuple[int, dict]], entries: list[Entry]) -> None:
    """Raise InputError if lines without an id give one whole recording different transcripts, perhaps of its parts."""
    first: dict[Path, tuple[int, str | None]] = {}
    for (line, _), entry in zip(rows, entries, strict=True):
        u = entry.utterance
        if u.is_part or u.transcript is None or entry.has_id:
            continue
        before, transcript = first.setdefault(u.path, (line, str(u.transcript)))
        if transcript != u.transcript:
            raise InputError(
                f"{path} lines {before} and {line} have different transcripts of the same recording, {u.path}; remove "
                "one, give them ids, or give the parts of the recording in columns 'start' and 'end'"
            )


def _check_splits(path: Path, rows: list[tuple[int, dict]], entries: list[Entry]) -> None:
    """Raise InputError if some entries have a split and others have none, so that no role would include these."""
    without = [line for (line, _), entry in zip(rows, entries, strict=True) if entry.split is None]
    if without and len(without) < len(entries):
        raise InputError(
            f"{path} line {without[0]} has no split, unlike other lines; give train, dev or test in a column 'split', "
            "or remove the line"
        )


def _split_above(file: Path, folder: Path) -> str | None:
    """Return the first folder name between `folder` and `file` that is the name of a split, or None."""
    folders = file.relative_to(folder).parts[:-1] if file.is_relative_to(folder) else ()
    return next((name for name in folders if role_of(name)), None)


def _entry(table: Table, folder: Path, line: int, row: dict) -> Entry:
    path = table.path
    by_meaning = columns_by_meaning(tuple(row))
    texts = {
        name: _text(path, line, name, row, by_meaning.get(name, [])) for name in ("path", "transcript", "id", "split")
    }
    if not texts["path"]:
        raise InputError(f"{path} line {line} has no path; add the path of the recording")
    if texts["split"] == "":
        raise InputError(f"{path} line {line} has an empty split; give train, dev or test, or leave the column out")
    file = _resolve_path(path, line, texts["path"], folder)
    start, seconds = times_of_part(path, line, row, by_meaning, file)
    utterance = Utterance(
        id=texts["id"] or file.stem,
        path=file,
        transcript=texts["transcript"] or None,
        seconds=seconds,
        start=start or 0.0,
        is_part=start is not None,
    )
    return Entry(utterance, canonical_split(texts["split"] or table.split), row, bool(texts["id"]))


def canonical_split(split: str | None) -> str | None:
    return split.casefold() if split and role_of(split) else split


def _text(path: Path, line: int, name: str, row: dict, candidates: list[tuple[str, float]]) -> str | None:
    """Return the first value that is not blank; "" if all are blank, None if there is no value."""
    blank = None
    for column, _ in candidates:
        value = row[column]
        if name == "id" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is not None and not isinstance(value, str):
            raise InputError(f"{path} line {line}: {column} must be text; got {value!r}")
        if value and value.strip():
            if not _is_encodable(value):
                raise InputError(
                    f"{path} line {line}: {column} contains NUL or a lone surrogate; save the manifest again as UTF-8"
                )
            return value.strip()
        blank = blank if value is None else ""
    return blank


def _is_encodable(text: str) -> bool:
    """Return whether text has no NUL, which file names cannot contain, and no lone surrogate, which JSON may have."""
    try:
        return "\0" not in text and bool(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return False


def _resolve_path(path: Path, line: int, text: str, folder: Path) -> Path:
    """Turn a path of a manifest into the path of the file."""
    if text.startswith("file://"):
        text = unquote(text.removeprefix("file://"))
    if re.match(URL, text):
        raise InputError(f"{path} line {line}: {text} is a URL; download the recording and give its file")
    if os.name == "posix" and re.match(r"[A-Za-z]:[\\/]", text):
        raise InputError(f"{path} line {line}: {text} is a Windows path; write it relative to the manifest")
    text = to_filename(text)
    file = folder / os.path.expanduser(text)  # an absolute path stays as it is
    if "\\" in text and not os.path.lexists(file):
        file = folder / text.replace("\\", "/")
    if not file.name:
        raise InputError(f"{path} line {line}: {text} names no file; give the path of the recording")
    if folder != path.parent:  # Common Voice
        file = folder.parent / text if text.startswith(f"{CLIPS_FOLDER}/") else file
        file = file if file.suffix else file.with_suffix(".mp3")
    return file


def _with_distinct_ids(entries: list[Entry]) -> list[Entry]:
    """Make ids that come from file names distinct: add the folder, then the start of the part, then a number."""
    for rename in (_by_folder, _by_start, lambda name, group: [f"{name}-{i:04d}" for i in range(1, len(group) + 1)]):
        groups: dict[str, list[int]] = {}
        for i, entry in enumerate(entries):
            groups.setdefault(entry.utterance.id, []).append(i)
        for name, indices in groups.items():
            if len(indices) > 1:
                names = rename(name, [entries[i].utterance for i in indices])
                for i, new in zip(indices, names, strict=True):
                    if not entries[i].has_id:
                        entries[i] = replace(entries[i], utterance=replace(entries[i].utterance, id=new))
    return entries


def _by_folder(name: str, group: list[Utterance]) -> list[str]:
    return [name if len({u.path for u in group}) == 1 else f"{u.path.parent.name}/{name}" for u in group]


def _by_start(name: str, group: list[Utterance]) -> list[str]:
    return [f"{name}-{u.start:.3f}" if u.is_part else name for u in group]
