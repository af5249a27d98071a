"""Manifests: tables that name recordings or feature files, either a single one or one per split.

Columns (SYNONYMS in manifest_columns.py has their other names):
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

import os
import re
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path

from las_fast.data.corpus import Corpus, Utterance, assign_roles, is_role, role_of
from las_fast.data.folders import list_files, subfolders
from las_fast.data.manifest_columns import SYNONYMS, columns_by_meaning, has_path_column
from las_fast.data.manifest_lines import CLIPS_FOLDER, Table, canonical_split, is_common_voice, read_entries
from las_fast.data.npy import PEEK, peek_shape
from las_fast.data.tables import SUFFIXES, columns
from las_fast.errors import InputError

LAYOUT = "a manifest (.tsv, .csv, .jsonl or .json), or one per split (also Common Voice, audiofolder)"
FILLER_WORDS = {"manifest", "metadata", "audio", "asr", "cv", "data", "set"}  # in names of manifests, besides the split
MAX_FILES = 200  # tables per folder whose header is read


# ----------------------------------------------------------------------------------------------------- recognition


def find_tables(root: Path) -> list[Table]:
    """Find the manifests of a folder: a single one, one per split, or several of unknown splits."""
    if root.name == CLIPS_FOLDER and any(map(is_common_voice, _manifests(root.parent))):
        root = root.parent
    paths = _manifests(root)
    if common_voice := [path for path in paths if is_common_voice(path)]:
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
    if len(tables) > 1 and not any("split" in columns_by_meaning(tuple(columns(table.path))) for table in tables):
        listings = {
            canonical_split(table.split) or "": lru_cache(maxsize=1)(partial(_list_table, table)) for table in tables
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
        name="Common Voice" if is_common_voice(tables[0].path) else _name(tables),
        root=Path(os.path.commonpath([table.path for table in tables])),  # the manifest, or the folder of several
        kind="features" if is_features else "audio",
        listings=listings,
        roles=assign_roles(listings) if set(listings) != {"all"} else dict.fromkeys(("train", "dev", "test"), ("all",)),
        feature_size=_frame_size(tables[0].path, first) if is_features else None,
        expected_texts=f"a column 'transcript' (or {', '.join(SYNONYMS['transcript'][1:])})",
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
    utterances = [entry.utterance for entry in read_entries([table])]
    if utterances:
        _are_features(table.path, utterances)
    return utterances


def _splits(tables: list[Table]) -> dict[str, list[Utterance]]:
    splits: dict[str, list[Utterance]] = {}
    for entry in read_entries(tables):
        splits.setdefault(entry.split or "all", []).append(entry.utterance)
    return splits


def rows_by_id(path: Path, split: str | None = None) -> dict[str, dict]:
    """Map each utterance id of a manifest, or of one split of it, to all columns of its line."""
    entries = read_entries([Table(path)])
    return {e.utterance.id: e.row for e in entries if split in (None, e.split or "all")}


def _frame_size(path: Path, utterances: list[Utterance]) -> int:
    for utterance in utterances[:PEEK]:
        shape = peek_shape(utterance.path)
        if shape is not None and len(shape) == 2:
            return shape[1]
    raise InputError(
        f"{path}: none of its first .npy files is a readable array of shape (frames, features); check the paths"
    )
