"""Manifests: tables that name recordings or feature files, either a single one or one per split.

Columns (NAMES lists their other names):
    path        relative to the manifest
    transcript  needed for training
    id          default: the file's name without its suffix
    split       default: from the manifest's name or folder; else there is one split "all", which has every role
    seconds     checked against the recording
    start, end  read only this part of the recording; without end, up to `seconds` or to the end of the recording
Times are in seconds, or in milliseconds if the column's name ends in ms. Other columns are ignored, unless they might
select a part of a recording or some of the lines: those are errors.

Common Voice (train.tsv, dev.tsv, ... with paths inside clips) and Hugging Face audio folders (metadata.csv or
metadata.jsonl, also one per split) are manifests too.
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

from las_fast.data.corpus import Corpus, Utterance, assign_roles, is_role, role_of
from las_fast.data.folders import list_files, subfolders, to_filename
from las_fast.data.hw4p2 import PEEK, peek_shape
from las_fast.data.tables import SUFFIXES, columns, normalise_column, read_rows
from las_fast.errors import InputError

LAYOUT = "a manifest (.tsv, .csv, .jsonl or .json), or one per split (also Common Voice, audiofolder)"
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
TIME_COLUMN = re.compile(
    r"(?:(?:audio|segment|utterance)_)?(start|offset|begin|end|duration|seconds)(?:_?time)?"
    r"(?:_?(s|sec|secs|seconds|ms|msec|milliseconds))?"
)
SAMPLE_COUNTS = ("num_samples", "n_samples")
SAMPLE_RATES = ("sample_rate", "sampling_rate", "samplerate")
TIME_WORDS = {"start", "begin", "end", "offset", "onset", "stop"}  # words in unknown columns that suggest times
SELECTION_COLUMNS = {"lang", "language", "locale", "subset", "partition", "fold", "take", "use", "keep", "skip",
                     "ignore", "include", "exclude", "discard"}  # fmt: skip
CLIPS_FOLDER = "clips"  # where Common Voice keeps its recordings
FILLER_WORDS = {"manifest", "metadata", "audio", "asr", "cv", "data", "set"}  # in names of manifests, besides the split
DURATION_TOLERANCE = 0.1  # seconds between end - start and the duration on the same line
MAX_FILES = 200  # tables per folder whose header is read


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


# ----------------------------------------------------------------------------------------------------- recognition


def find_tables(root: Path) -> list[Table]:
    """Find the manifests of a folder: a single one, one per split, or several of unknown splits."""
    if root.name == CLIPS_FOLDER and any(map(_is_common_voice, _manifests(root.parent))):
        root = root.parent
    paths = _manifests(root)
    if common_voice := [path for path in paths if _is_common_voice(path)]:
        return [Table(path, path.stem) for path in common_voice]
    if len(paths) == 1 and is_role(root.name):  # perhaps one split of an audio folder
        siblings = _tables_of_splits(root.parent)
        if len(siblings) > 1 and all(table.path.stem == "metadata" for table in siblings):
            return siblings
    if len(paths) > 1:
        splits = [split_of(path.stem) for path in paths]
        distinct = None not in splits and len(set(splits)) == len(splits)
        return [Table(path, split if distinct else None) for path, split in zip(paths, splits, strict=True)]
    if not paths:
        return _tables_of_splits(root)
    return [Table(path) for path in paths]


def _tables_of_splits(root: Path) -> list[Table]:
    """Find the manifests of subfolders that are named after a split and have exactly one each."""
    manifests = {folder.name: _manifests(folder) for folder in subfolders(root) if is_role(folder.name)}
    return [Table(paths[0], name) for name, paths in manifests.items() if len(paths) == 1]


def _manifests(root: Path) -> list[Path]:
    """Find the tables with a path column; if there are none, all .tsv and .jsonl files."""
    try:
        tables = [path for path in list_files(root, SUFFIXES) if path.is_file()][:MAX_FILES]
    except InputError:
        return []
    return [path for path in tables if has_path_column(path)] or [
        path for path in tables if path.suffix.lower() in (".tsv", ".jsonl")
    ]


def has_path_column(path: Path) -> bool:
    """Return whether a table has a column that names files."""
    return "path" in _columns_by_meaning(tuple(columns(path)))


def _is_common_voice(path: Path) -> bool:
    return (path.parent / CLIPS_FOLDER).is_dir() and "sentence" in columns(path)


def split_of(stem: str) -> str | None:
    """Guess the split from a manifest's name: "train" for train_manifest; None if no word names a split."""
    words = [word for word in re.split(r"[^a-z0-9]+", stem.lower()) if word not in FILLER_WORDS]
    roles = [word for word in words if role_of(word)]
    if not roles:
        return None
    one_role = len(set(map(role_of, roles))) == 1
    return "-".join(words) if one_role and words[0] == roles[0] else roles[-1]


# --------------------------------------------------------------------------------------------------------- reading


def open_manifest(path: Path) -> Corpus:
    """Open one manifest as a corpus; InputError names the line of the first mistake."""
    return open_tables([Table(path)])


def open_tables(tables: list[Table]) -> Corpus:
    """Open the manifests that find_tables returned as a corpus; InputError names the line of the first mistake.

    With one manifest per split, each is read only when its split is requested.
    """
    listings: dict[str, Callable[[], list[Utterance]]]
    if len(tables) > 1 and not any("split" in _columns_by_meaning(tuple(columns(table.path))) for table in tables):
        listings = {
            _canonical_split(table.split) or "": lru_cache(maxsize=1)(partial(_list_table, table)) for table in tables
        }
        first = _first_utterances(listings.values())
    else:
        splits = _splits(tables)
        listings = {split: partial(list, utterances) for split, utterances in splits.items()}
        first = [u for utterances in splits.values() for u in utterances]
    if not first:
        raise InputError(f"{tables[0].path} names no recordings; expected one line per recording")
    is_features = _are_features(tables[0].path, first)
    return Corpus(
        name="Common Voice" if _is_common_voice(tables[0].path) else _name(tables),
        root=Path(os.path.commonpath([table.path for table in tables])),  # the manifest, or the folder of several
        kind="features" if is_features else "audio",
        listings=listings,
        roles=assign_roles(listings) if set(listings) != {"all"} else dict.fromkeys(("train", "dev", "test"), ("all",)),
        feature_size=_frame_size(tables[0].path, first) if is_features else None,
        expected_texts=f"a column 'transcript' (or {', '.join(NAMES['transcript'][1:])})",
        split_remedy="assign some lines to it in a column 'split'",
    )


def _first_utterances(listings: Iterable[Callable[[], list[Utterance]]]) -> list[Utterance]:
    """Return the first utterances of the first split that has any; raise only if every split is bad or empty."""
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
        raise InputError(f"{path} names both audio and .npy files; write one manifest for each kind")
    return kinds.pop()


def _list_table(table: Table) -> list[Utterance]:
    utterances = [entry.utterance for entry in _entries([table])]
    if utterances:
        _are_features(table.path, utterances)
    return utterances


def _splits(tables: list[Table]) -> dict[str, list[Utterance]]:
    splits: dict[str, list[Utterance]] = {}
    for entry in _entries(tables):
        splits.setdefault(entry.split or "all", []).append(entry.utterance)
    return splits


def rows_by_id(path: Path) -> dict[str, dict]:
    """Map each utterance id of a manifest to all columns of its line."""
    return {entry.utterance.id: entry.row for entry in _entries([Table(path)])}


def _entries(tables: list[Table]) -> list[Entry]:
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
    if path.suffix.lower() in (".tsv", ".csv") and "path" not in _columns_by_meaning(tuple(rows[0][1])):
        raise InputError(
            f"{path} must begin with a header line that has a column 'path' (or {', '.join(NAMES['path'][1:6])}); "
            f"got {list(rows[0][1])!r}"
        )
    _check_columns(path, rows)
    folder = path.parent / CLIPS_FOLDER if _is_common_voice(path) else path.parent
    entries = [_entry(table, folder, line, row) for line, row in rows]
    if path.stem == "metadata" and all(entry.split is None for entry in entries):  # an audio folder
        splits = [_split_above(entry.utterance.path, path.parent) for entry in entries]
        if None not in splits:
            return [replace(entry, split=split) for entry, split in zip(entries, splits, strict=True)]
    return entries


def _split_above(file: Path, folder: Path) -> str | None:
    """Return the first folder name between `folder` and `file` that is the name of a split, or None."""
    folders = file.relative_to(folder).parts[:-1] if file.is_relative_to(folder) else ()
    return next((name for name in folders if role_of(name)), None)


def _check_columns(path: Path, rows: list[tuple[int, dict]]) -> None:
    """Raise InputError for an unknown column that may select a part of a recording or some of the lines."""
    values: dict[str, set] = {}
    for _, row in rows:
        for name, value in row.items():
            if _column_problem(name) and value is not None and str(value).strip():
                values.setdefault(name, set()).add(str(value).strip())
    for name, distinct in values.items():
        if normalise_column(name) not in SELECTION_COLUMNS or len(distinct) > 1:
            some = ", ".join(sorted(distinct)[:3])
            raise InputError(f"{path}: column {name!r} {_column_problem(name).format(some)}, or remove the column")


@lru_cache(maxsize=1024)
def _column_problem(name: str) -> str:
    """Return why an unknown column matters and what to do; "{}" stands for some values. "" if it does not matter."""
    plain = normalise_column(name)
    words = plain.split("_")
    if plain in SELECTION_COLUMNS:
        return "has different values ({}), but lines are not selected by them; delete the lines that you do not want"
    if "channel" in words:
        return (
            "names channels ({}), but all channels of a recording are averaged; write the channel that you want to a "
            "separate file (sox in.wav out.wav remix 1)"
        )
    if plain in ("from", "to") or (TIME_WORDS.intersection(words) and not _columns_by_meaning((name,))):
        return (
            "({}) is unknown, but may select a part of a recording; give the part in seconds in columns "
            "'start' and 'end'"
        )
    return ""


@lru_cache(maxsize=256)
def _columns_by_meaning(names: tuple[str, ...]) -> dict[str, list[tuple[str, float]]]:
    """Map each key of NAMES to the columns that hold it, preferred name first, each with its unit in seconds."""
    ranked: dict[str, list[tuple[int, str, float]]] = {}
    for name in names:
        plain, unit = normalise_column(name), 1.0
        if time := TIME_COLUMN.fullmatch(plain):
            plain, unit = time[1], 0.001 if (time[2] or "s").startswith("m") else 1.0
        for meaning, known in NAMES.items():
            if plain in known:
                ranked.setdefault(meaning, []).append((known.index(plain), name, unit))
    return {meaning: [(name, unit) for _, name, unit in sorted(columns)] for meaning, columns in ranked.items()}


def _entry(table: Table, folder: Path, line: int, row: dict) -> Entry:
    path = table.path
    by_meaning = _columns_by_meaning(tuple(row))
    texts = {
        name: _text(path, line, name, row, by_meaning.get(name, [])) for name in ("path", "transcript", "id", "split")
    }
    if not texts["path"]:
        raise InputError(f"{path} line {line} has no path; add the path of the recording")
    if texts["split"] == "":
        raise InputError(f"{path} line {line} has an empty split; give train, dev or test, or leave the column out")
    file = _resolve_path(path, line, texts["path"], folder)
    start, seconds = _times_of_part(path, line, row, by_meaning, file)
    utterance = Utterance(
        id=texts["id"] or file.stem,
        path=file,
        transcript=texts["transcript"] or None,
        seconds=seconds,
        start=start or 0.0,
        is_part=start is not None,
    )
    return Entry(utterance, _canonical_split(texts["split"] or table.split), row, bool(texts["id"]))


def _canonical_split(split: str | None) -> str | None:
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
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise InputError(f"{path} line {line}: {text} is a URL; download the recording and give its file")
    if os.name == "posix" and re.match(r"[A-Za-z]:[\\/]", text):
        raise InputError(f"{path} line {line}: {text} is a Windows path; write it relative to the manifest")
    text = to_filename(text)
    file = folder / os.path.expanduser(text)  # an absolute path stays as it is
    if "\\" in text and not os.path.lexists(file):
        file = folder / text.replace("\\", "/")
    if folder != path.parent:  # Common Voice
        file = folder.parent / text if text.startswith(f"{CLIPS_FOLDER}/") else file
        file = file if file.suffix else file.with_suffix(".mp3")
    return file


def _times_of_part(path: Path, line: int, row: dict, by_meaning: dict, file: Path) -> tuple[float | None, float | None]:
    """Return the start of the part (None: the whole recording) and its duration (None: unknown), in seconds."""
    start, end, seconds = (
        _time(path, line, name, row, by_meaning.get(name, [])) for name in ("start", "end", "seconds")
    )
    if start is None and end is None:
        return None, seconds or _seconds_by_samples(path, line, row, file)
    if file.suffix.lower() == ".npy":
        raise InputError(
            f"{path} line {line}: a part of {file.name} cannot be read; save the frames of the part as a file"
        )
    if end is not None:
        length = end - (start or 0.0)
        if seconds and abs(length - seconds) > DURATION_TOLERANCE:
            raise InputError(
                f"{path} line {line}: start to end is {length:g} s, but the duration is {seconds:g} s; correct one"
            )
        seconds = length
    elif seconds is None:
        seconds = _seconds_by_samples(path, line, row, file)
    if seconds is not None and seconds <= 0:
        raise InputError(f"{path} line {line}: the part lasts {seconds:g} seconds; its end must come after its start")
    return start or 0.0, seconds


def _time(path: Path, line: int, name: str, row: dict, candidates: list[tuple[str, float]]) -> float | None:
    """Return the first time that is not blank, in seconds; None if there is none."""
    for column, unit in candidates:
        if (value := row[column]) is not None and str(value).strip():
            return _number(path, line, column, value) * unit
    return None


def _number(path: Path, line: int, column: str, value) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise InputError(f"{path} line {line}: {column} must be a number of 0 or more; got {value!r}")
    return number


def _seconds_by_samples(path: Path, line: int, row: dict, file: Path) -> float | None:
    """Return the duration in seconds from a sample count and the rate in the line or file; None without a count."""
    plain = {
        normalise_column(name): (name, value) for name, value in row.items() if value is not None and str(value).strip()
    }
    name, count = next((plain[name] for name in SAMPLE_COUNTS if name in plain), ("", None))
    if count is None:
        return None
    column, rate = next((plain[name] for name in SAMPLE_RATES if name in plain), ("", None))
    rate = _number(path, line, column, rate) if column else _sample_rate(file)
    return _number(path, line, name, count) / rate if rate else None


def _sample_rate(file: Path) -> int | None:
    import soundfile  # here, because archives of features need no soundfile

    try:
        return soundfile.info(os.fsencode(file)).samplerate
    except (soundfile.LibsndfileError, OSError, RuntimeError, ValueError):
        return None


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


def _frame_size(path: Path, utterances: list[Utterance]) -> int:
    for utterance in utterances[:PEEK]:
        shape = peek_shape(utterance.path)
        if shape is not None and len(shape) == 2:
            return shape[1]
    raise InputError(
        f"{path}: none of its first .npy files is a readable array of shape (frames, features); check the paths"
    )
