"""Manifests: tables that name recordings or feature files, one by itself or one for each split.

Columns, by any of their NAMES: path, relative to the manifest; transcript, needed for training; id (otherwise the
file's name without its ending); split (otherwise the manifest's own name or folder, or one split, "all", that plays
every role); seconds, against which recordings are checked; start or offset, and end: with one of them only that part
of the recording is read, to its end or for `seconds`. Times are in seconds, or milliseconds where the column's name
ends in ms. Other columns are not used; one that would change what is read is an error.

Also here: Common Voice (train.tsv, dev.tsv, ... whose paths lie in clips) and Hugging Face's audio folders
(metadata.csv or metadata.jsonl, also one for each split).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from urllib.parse import unquote

import soundfile

from las_fast.data.corpus import Corpus, Utterance, assign_roles, is_role, role_of
from las_fast.data.folders import files, subfolders, system_name
from las_fast.data.hw4p2 import PEEK, peek_shape
from las_fast.data.tables import SUFFIXES, columns, normal, read_rows
from las_fast.errors import InputError

LAYOUT = "a manifest (.tsv, .csv, .jsonl or .json), or one named for each split (also Common Voice, audiofolder)"
NAMES = {
    "path": ("path", "audio", "audio_filepath", "audio_path", "audio_file", "file_name", "filename", "wav_filename",
             "wav"),
    "transcript": ("transcript", "text", "sentence", "transcription", "wrd"),
    "id": ("id", "utt_id", "utterance_id"),
    "split": ("split",),
    "seconds": ("seconds", "duration"),
    "start": ("start", "offset", "begin"),
    "end": ("end",),
}  # fmt: skip
TIME = re.compile(r"(?:(?:audio|segment|utterance)_)?(start|offset|begin|end|duration|seconds)(?:_?time)?"
                  r"(?:_?(s|sec|secs|seconds|ms|msec|milliseconds))?")  # fmt: skip
SAMPLES = ("num_samples", "n_samples")
RATES = ("sample_rate", "sampling_rate", "samplerate")
CHANGING = {"start", "begin", "end", "offset", "onset", "stop"}  # words in names of columns for other tools
SELECTING = {"lang", "language", "locale", "subset", "partition", "fold", "take", "use", "keep", "skip", "ignore",
             "include", "exclude", "discard"}  # fmt: skip
CLIPS = "clips"  # where Common Voice keeps its recordings
EXTRA = {"manifest", "metadata", "audio", "asr", "cv", "data", "set"}  # beside a split's name in that of its manifest
DIFFERENCE = 0.1  # seconds between end - start and the duration on the same line
MANY = 200  # files that are looked at whether they are manifests


@dataclass(frozen=True)
class Table:
    """A manifest, and the split of its lines that name none."""

    path: Path
    split: str | None = None


@dataclass(frozen=True)
class Entry:
    """A line of a manifest."""

    utterance: Utterance
    split: str | None
    row: dict
    own_id: bool  # it came with one


# ----------------------------------------------------------------------------------------------------- recognising them


def find_tables(root: Path) -> list[Table]:
    """Return the manifests that a folder holds: one, one for each split, or several that no split is known of."""
    if root.name == CLIPS and any(map(_is_common_voice, _manifests(root.parent))):
        root = root.parent
    found = _manifests(root)
    if voices := [path for path in found if _is_common_voice(path)]:
        return [Table(path, path.stem) for path in voices]
    if len(found) == 1 and is_role(root.name):  # perhaps one split of an audio folder
        beside = _tables_of_splits(root.parent)
        if len(beside) > 1 and all(table.path.stem == "metadata" for table in beside):
            return beside
    if len(found) > 1:
        splits = [split_of(path.stem) for path in found]
        distinct = None not in splits and len(set(splits)) == len(splits)
        return [Table(path, split if distinct else None) for path, split in zip(found, splits, strict=True)]
    if not found:
        return _tables_of_splits(root)
    return [Table(path) for path in found]


def _tables_of_splits(root: Path) -> list[Table]:
    """Return the manifests of folders that are named for splits and hold one each."""
    inside = {folder.name: _manifests(folder) for folder in subfolders(root) if is_role(folder.name)}
    return [Table(found[0], name) for name, found in inside.items() if len(found) == 1]


def _manifests(root: Path) -> list[Path]:
    """Return the files that are manifests by their columns; where none is, those that are by their names."""
    try:
        found = [path for path in files(root, SUFFIXES) if path.is_file()][:MANY]
    except InputError:
        return []
    return [path for path in found if names_files(path)] or [
        path for path in found if path.suffix.lower() in (".tsv", ".jsonl")
    ]


def names_files(path: Path) -> bool:
    """Say whether a table has a column that names files."""
    return "path" in _claims(tuple(columns(path)))


def _is_common_voice(path: Path) -> bool:
    return (path.parent / CLIPS).is_dir() and "sentence" in columns(path)


def split_of(stem: str) -> str | None:
    """Return the split that a manifest's name speaks of: train_manifest is of train; None where it speaks of none."""
    words = [word for word in re.split(r"[^a-z0-9]+", stem.lower()) if word not in EXTRA]
    roles = [word for word in words if role_of(word)]
    if not roles:
        return None
    one_role = len(set(map(role_of, roles))) == 1
    return "-".join(words) if one_role and words[0] == roles[0] else roles[-1]


# --------------------------------------------------------------------------------------------------------- reading them


def open_manifest(path: Path) -> Corpus:
    """Return the corpus of a manifest; InputError naming the line of its first mistake."""
    return open_tables([Table(path)])


def open_tables(tables: list[Table]) -> Corpus:
    """Return the corpus of the manifests that find_tables gave; InputError naming the first mistake.

    A manifest that is all of one split is read when that is asked for.
    """
    listings: dict[str, Callable[[], list[Utterance]]]
    if len(tables) > 1 and not any("split" in _claims(tuple(columns(table.path))) for table in tables):
        listings = {
            _plain_split(table.split) or "": lru_cache(maxsize=1)(partial(_of_one_split, table)) for table in tables
        }
        first = _first(listings.values())
    else:
        splits = _splits(tables)
        listings = {split: partial(list, utterances) for split, utterances in splits.items()}
        first = [u for utterances in splits.values() for u in utterances]
    if not first:
        raise InputError(f"{tables[0].path} names no recordings; expected a line for each")
    is_features = _are_features(tables[0].path, first)
    return Corpus(
        name="Common Voice" if _is_common_voice(tables[0].path) else _name(tables),
        root=Path(os.path.commonpath([table.path for table in tables])),  # one manifest, or the folder of several
        kind="features" if is_features else "audio",
        listings=listings,
        roles=assign_roles(listings) if set(listings) != {"all"} else dict.fromkeys(("train", "dev", "test"), ("all",)),
        feature_size=_frame_size(tables[0].path, first) if is_features else None,
        texts=f"a column 'transcript' (or {', '.join(NAMES['transcript'][1:])})",
        naming="name some lines so in a column 'split'",
    )


def _first(listings: Iterable[Callable[[], list[Utterance]]]) -> list[Utterance]:
    """Return utterances of the first split that has any; a mistake in one only counts where all have one."""
    problem = None
    for listing in listings:
        try:
            if utterances := listing():
                return utterances[:PEEK]
        except InputError as error:
            problem = problem or error
    if problem:
        raise problem
    return []


def _name(tables: list[Table]) -> str:
    return f"manifest {', '.join(table.path.name for table in tables)}"


def _are_features(path: Path, utterances: list[Utterance]) -> bool:
    kinds = {u.path.suffix.lower() == ".npy" for u in utterances}
    if len(kinds) > 1:
        raise InputError(f"{path} names both audio and .npy files; make a manifest of each")
    return kinds.pop()


def _of_one_split(table: Table) -> list[Utterance]:
    utterances = [entry.utterance for entry in _entries([table])]
    if utterances:
        _are_features(table.path, utterances)
    return utterances


def _splits(tables: list[Table]) -> dict[str, list[Utterance]]:
    splits: dict[str, list[Utterance]] = {}
    for entry in _entries(tables):
        splits.setdefault(entry.split or "all", []).append(entry.utterance)
    return splits


def further_columns(path: Path) -> dict[str, dict]:
    """Return id -> all columns of its line, of a manifest that open_manifest takes."""
    return {entry.utterance.id: entry.row for entry in _entries([Table(path)])}


def _entries(tables: list[Table]) -> list[Entry]:
    """Return the lines of manifests; each split's utterances have ids that differ, but for those given twice."""
    entries = [entry for table in tables for entry in _lines(table)]
    by_split: dict[str | None, list[int]] = {}
    for i, entry in enumerate(entries):
        by_split.setdefault(entry.split, []).append(i)
    for places in by_split.values():
        for i, entry in zip(places, _with_ids([entries[i] for i in places]), strict=True):
            entries[i] = entry
    return entries


def _lines(table: Table) -> list[Entry]:
    path = table.path
    rows = list(read_rows(path))
    if not rows:
        return []
    if path.suffix.lower() in (".tsv", ".csv") and "path" not in _claims(tuple(rows[0][1])):
        raise InputError(
            f"{path} must begin with a header line that has a column 'path' (or {', '.join(NAMES['path'][1:6])}); "
            f"got {list(rows[0][1])!r}"
        )
    _check_columns(path, rows)
    folder = path.parent / CLIPS if _is_common_voice(path) else path.parent
    entries = [_entry(table, folder, line, row) for line, row in rows]
    if path.stem == "metadata" and all(entry.split is None for entry in entries):  # of an audio folder
        inside = [_split_above(entry.utterance.path, path.parent) for entry in entries]
        if None not in inside:
            return [replace(entry, split=split) for entry, split in zip(entries, inside, strict=True)]
    return entries


def _split_above(file: Path, folder: Path) -> str | None:
    """Return the first folder on the way from a folder to a file that is named for a split."""
    inside = file.relative_to(folder).parts[:-1] if file.is_relative_to(folder) else ()
    return next((name for name in inside if role_of(name)), None)


def _check_columns(path: Path, rows: list[tuple[int, dict]]) -> None:
    """Refuse columns that would change what is read, or which lines are meant, in a way that is not known here."""
    values: dict[str, set] = {}
    for _, row in rows:
        for name, value in row.items():
            if _problem(name) and value is not None and str(value).strip():
                values.setdefault(name, set()).add(str(value).strip())
    for name, found in values.items():
        if normal(name) not in SELECTING or len(found) > 1:
            some = ", ".join(sorted(found)[:3])
            raise InputError(f"{path}: column {name!r} {_problem(name).format(some)}, or remove the column")


@lru_cache(maxsize=1024)
def _problem(name: str) -> str:
    """Return why values of a column that is not known matter and what to do, or ""; "{}" is some of them."""
    plain = normal(name)
    words = plain.split("_")
    if plain in SELECTING:
        return "has different values ({}), and lines are not chosen by them; remove the lines that are not meant"
    if "channel" in words:
        return (
            "names channels ({}), but all channels of a recording are averaged; write the channel that is meant to a "
            "file of its own (sox in.wav out.wav remix 1)"
        )
    if plain in ("from", "to") or (CHANGING.intersection(words) and not _claims((name,))):
        return (
            "({}) is not known, and may say which part of a recording is meant; give that in seconds in columns "
            "'start' and 'end'"
        )
    return ""


@lru_cache(maxsize=256)
def _claims(names: tuple[str, ...]) -> dict[str, list[tuple[str, float]]]:
    """Return, for what a line may say, the columns that say it, the first choice first, each with its unit."""
    found: dict[str, list[tuple[int, str, float]]] = {}
    for name in names:
        plain, unit = normal(name), 1.0
        if time := TIME.fullmatch(plain):
            plain, unit = time[1], 0.001 if (time[2] or "s").startswith("m") else 1.0
        for meaning, known in NAMES.items():
            if plain in known:
                found.setdefault(meaning, []).append((known.index(plain), name, unit))
    return {meaning: [(name, unit) for _, name, unit in sorted(columns)] for meaning, columns in found.items()}


def _entry(table: Table, folder: Path, line: int, row: dict) -> Entry:
    path = table.path
    claims = _claims(tuple(row))
    found = {name: _text(path, line, name, row, claims.get(name, [])) for name in ("path", "transcript", "id", "split")}
    if not found["path"]:
        raise InputError(f"{path} line {line} has no path; name the recording")
    if found["split"] == "":
        raise InputError(f"{path} line {line} has an empty split; give train, dev or test, or leave the column out")
    file = _locate(path, line, found["path"], folder)
    start, seconds = _part(path, line, row, claims, file)
    utterance = Utterance(
        id=found["id"] or file.stem,
        path=file,
        transcript=found["transcript"] or None,
        seconds=seconds,
        start=start or 0.0,
        is_part=start is not None,
    )
    return Entry(utterance, _plain_split(found["split"] or table.split), row, bool(found["id"]))


def _plain_split(split: str | None) -> str | None:
    return split.casefold() if split and role_of(split) else split


def _text(path: Path, line: int, name: str, row: dict, claims: list[tuple[str, float]]) -> str | None:
    """Return the first value that is not blank, "" where all are, and None where there is none."""
    blank = None
    for column, _ in claims:
        value = row[column]
        if name == "id" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is not None and not isinstance(value, str):
            raise InputError(f"{path} line {line}: {column} must be text; got {value!r}")
        if value and value.strip():
            if not _is_writable(value):
                raise InputError(f"{path} line {line}: {column} holds characters that no file can; write it again")
            return value.strip()
        blank = blank if value is None else ""
    return blank


def _is_writable(text: str) -> bool:
    """Say whether text has no NUL, which ends a file's name, and no half of a character, which JSON can write."""
    try:
        return "\0" not in text and bool(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return False


def _locate(path: Path, line: int, text: str, folder: Path) -> Path:
    """Return the file that a manifest's path means."""
    if text.startswith("file://"):
        text = unquote(text.removeprefix("file://"))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise InputError(f"{path} line {line}: {text} is an address; download the recording and name its file")
    if os.name == "posix" and re.match(r"[A-Za-z]:[\\/]", text):
        raise InputError(f"{path} line {line}: {text} is a path of Windows; write it relative to the manifest")
    text = system_name(text)
    file = folder / os.path.expanduser(text)  # an absolute path stays as it is
    if "\\" in text and not os.path.lexists(file):
        file = folder / text.replace("\\", "/")
    if folder != path.parent:  # Common Voice
        file = folder.parent / text if text.startswith(f"{CLIPS}/") else file
        file = file if file.suffix else file.with_suffix(".mp3")
    return file


def _part(path: Path, line: int, row: dict, claims: dict, file: Path) -> tuple[float | None, float | None]:
    """Return where the part begins that is meant, None if that is the whole recording, and how long it is or None."""
    start, end, seconds = (_time(path, line, name, row, claims.get(name, [])) for name in ("start", "end", "seconds"))
    if start is None and end is None:
        return None, seconds or _by_samples(path, line, row, file)
    if file.suffix.lower() == ".npy":
        raise InputError(f"{path} line {line}: a part of {file.name} cannot be read; store its frames in a file")
    if end is not None:
        length = end - (start or 0.0)
        if seconds and abs(length - seconds) > DIFFERENCE:
            raise InputError(f"{path} line {line}: from start to end are {length:g} s, its duration is {seconds:g} s")
        seconds = length
    elif seconds is None:
        seconds = _by_samples(path, line, row, file)
    if seconds is not None and seconds <= 0:
        raise InputError(f"{path} line {line}: the part has {seconds:g} seconds; give it an end after its start")
    return start or 0.0, seconds


def _time(path: Path, line: int, name: str, row: dict, claims: list[tuple[str, float]]) -> float | None:
    """Return seconds, or None where no column has any."""
    for column, unit in claims:
        if (value := row[column]) is not None and str(value).strip():
            return _number(path, line, column, value) * unit
    return None


def _number(path: Path, line: int, column: str, value) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise InputError(f"{path} line {line}: {column} must be a number; got {value!r}")
    return number


def _by_samples(path: Path, line: int, row: dict, file: Path) -> float | None:
    """Return the seconds that a count of samples means, by the line's rate or the recording's; None without a count."""
    plain = {normal(name): (name, value) for name, value in row.items() if value is not None and str(value).strip()}
    name, count = next((plain[name] for name in SAMPLES if name in plain), ("", None))
    if count is None:
        return None
    column, rate = next((plain[name] for name in RATES if name in plain), ("", None))
    rate = _number(path, line, column, rate) if column else _rate_of(file)
    return _number(path, line, name, count) / rate if rate else None


def _rate_of(file: Path) -> int | None:
    try:
        return soundfile.info(os.fsencode(file)).samplerate
    except (soundfile.LibsndfileError, OSError, RuntimeError, ValueError):
        return None


def _with_ids(entries: list[Entry]) -> list[Entry]:
    """Make the ids of lines that brought none distinct: by the file's folder, the start of the part, or a number."""
    for rename in (_by_folder, _by_start, lambda name, group: [f"{name}-{i:04d}" for i in range(1, len(group) + 1)]):
        groups: dict[str, list[int]] = {}
        for i, entry in enumerate(entries):
            groups.setdefault(entry.utterance.id, []).append(i)
        for name, places in groups.items():
            if len(places) > 1:
                names = rename(name, [entries[i].utterance for i in places])
                for i, new in zip(places, names, strict=True):
                    if not entries[i].own_id:
                        entries[i] = replace(entries[i], utterance=replace(entries[i].utterance, id=new))
    return entries


def _by_folder(name: str, group: list[Utterance]) -> list[str]:
    return [name if len({u.path for u in group}) == 1 else f"{u.path.parent.name}/{name}" for u in group]


def _by_start(name: str, group: list[Utterance]) -> list[str]:
    return [f"{name}-{u.start:.3f}" if u.is_part else name for u in group]


def _frame_size(path: Path, utterances: list[Utterance]) -> int:
    for utterance in utterances[:PEEK]:
        shape = peek_shape(utterance.path)
        if shape is not None and len(shape) == 2:
            return shape[1]
    raise InputError(f"{path}: none of its first .npy files is a readable array (frames, features); check the paths")
