"""Archives of all editions of CMU 11-785 HW4P2: SPLIT/{mfcc,fbank}/NAME.npy and SPLIT/{transcripts,...}/NAME.npy.

The folders and the frame size determine the edition, which determines the header and the order of a submission.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from las_fast.data.corpus import Corpus, Utterance, assign_roles
from las_fast.data.folders import list_files, read_lines, subfolders, to_filename
from las_fast.data.npy import LOAD_ERRORS, PEEK, load_problem, peek_shape
from las_fast.data.symbols import symbols_to_text
from las_fast.errors import InputError

FEATURE_FOLDERS: dict[str, Literal["logmel", "mfcc"]] = {"mfcc": "mfcc", "fbank": "logmel"}  # folder -> their kind
TRANSCRIPT_FOLDERS = ("transcript/raw", "transcripts/raw", "transcripts", "transcript", "text")
LAYOUT = "SPLIT/mfcc/*.npy or SPLIT/fbank/*.npy (HW4P2)"


@dataclass(frozen=True)
class Edition:
    name: str
    header: tuple[str, str]  # of the submission file


S22 = Edition("HW4P2 S22", ("id", "predictions"))
F22 = Edition("HW4P2 F22", ("id", "label"))
S23 = Edition("HW4P2 S23", ("index", "label"))
F23 = Edition("HW4P2 F23", ("index", "label"))
S24 = Edition("HW4P2 S24", ("index", "label"))
F24 = Edition("HW4P2 F24", ("Index", "Labels"))
S25 = Edition("HW4P2 S25/F25", ("id", "transcription"))


def find_archives(root: Path) -> list[Path]:
    """Find archives at `root`, above it (if root is a split or its feature folder), or up to two folders below."""
    if _is_archive(root):
        return [root]
    for inside in (root, root.parent):  # root is a split, or its feature folder
        if _feature_folder(inside) and _is_archive(inside.parent):
            return [inside.parent]
    children = subfolders(root)
    archives = [child for child in children if _is_archive(child)]
    archives = archives or [below for child in children for below in subfolders(child) if _is_archive(below)]
    distinct = {os.path.realpath(path): path for path in reversed(archives)}  # count a link and its target once
    return list(distinct.values())[::-1]


def open_archive(root: Path) -> Corpus:
    """Open an archive as a corpus; InputError if no feature file is readable."""
    splits = [path.name for path in subfolders(root) if _feature_folder(path)]
    size, transposed = _frame_layout([_features_of(root / split) for split in splits])
    edition = _edition(root, splits, size)
    roles = assign_roles(splits)
    if edition is S24 and "train-clean-100" in splits:  # train-clean-50 is a smaller alternative, not more data
        roles["train"] = tuple(name for name in roles["train"] if name != "train-clean-50")
    return Corpus(
        name=edition.name,
        root=root,
        kind="features",
        listings={split: partial(_list_split, root / split) for split in splits},
        roles=roles,
        feature_size=size,
        feature_kind=FEATURE_FOLDERS[_features_of(root / splits[0]).name],
        transposed=transposed,
        header=edition.header,
        numbered=True,
        expected_texts=f"SPLIT/{TRANSCRIPT_FOLDERS[2]}/NAME.npy (or in {', '.join(sorted(TRANSCRIPT_FOLDERS))})",
    )


def read_transcript(path: Path) -> str:
    """Read the text of a transcript .npy: an array of letters or of words, or one string; see symbols_to_text."""
    try:
        symbols = np.load(path, allow_pickle=False)
    except LOAD_ERRORS as error:
        raise InputError(f"{path} is not a transcript: {load_problem(error)}") from None
    if not isinstance(symbols, np.ndarray) or symbols.dtype.kind not in "US":
        kind = getattr(symbols, "dtype", type(symbols).__name__)
        raise InputError(f"{path} is not a transcript: expected an array of strings, got {kind}; copy it again")
    try:
        items = [s.decode("utf-8") if isinstance(s, bytes) else s for s in symbols.ravel().tolist()]
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a transcript: its bytes are not UTF-8; copy it again") from None
    try:
        return symbols_to_text(items)
    except InputError as error:
        raise InputError(f"{path} {error}") from None


def _is_archive(path: Path) -> bool:
    return any(_feature_folder(child) for child in subfolders(path))


def _feature_folder(split: Path) -> Path | None:
    return next((split / name for name in FEATURE_FOLDERS if (split / name).is_dir()), None)


def _features_of(split: Path) -> Path:
    """Return the folder of a split's features; if it is missing, where it should be."""
    return _feature_folder(split) or split / "mfcc"


def _frame_layout(folders: list[Path]) -> tuple[int, bool]:
    """Return the frame size F, and whether files have shape (F, T). F is the dimension whose size varies less."""
    names = [path for folder in folders for path in list(_arrays(folder).values())[:PEEK]]
    if not names:
        raise InputError(f"{folders[0]} has no .npy files; expected one per recording")
    shapes = [shape for path in names if (shape := peek_shape(path)) is not None and len(shape) == 2]
    if not shapes:
        raise InputError(f"{names[0]} and the files next to it are not two-dimensional .npy arrays; copy them again")
    rows, columns = ([shape[side] for shape in shapes] for side in (0, 1))
    transposed = folders[0].name == "fbank"
    if len(set(rows)) != len(set(columns)):
        transposed = len(set(rows)) < len(set(columns))
    sizes = rows if transposed else columns
    return max(sorted(set(sizes)), key=sizes.count), transposed


def _edition(root: Path, splits: list[str], size: int) -> Edition:
    if _features_of(root / splits[0]).name == "fbank" and size == 80:
        symbols = any((folder / "char_set.txt").is_file() for folder in (root, root.parent))
        is_s25 = symbols or root.name == "hw4p2_data"
        return S25 if is_s25 and not (root / "text-for-LM").exists() else F24
    if size == 13 and not any(split.startswith(("train-", "dev-", "test-")) for split in splits):
        return S22
    if size == 27:
        return S24 if "train-clean-50" in splits or "s24" in root.name.lower() else S23
    return {15: F22, 28: F23}.get(size, Edition(f"HW4P2 layout, {size} features", ("index", "label")))


def _list_split(split: Path) -> list[Utterance]:
    """Pair features and transcripts by name; keep unpaired ones, which loading reports."""
    folder = _features_of(split)
    features = _arrays(folder)
    texts = _transcripts(split)
    names = sorted(features.keys() | texts.keys())
    if (split / "test_order.csv").is_file():
        names = _test_order(split / "test_order.csv", names)
    return [Utterance(name, features.get(name, folder / f"{name}.npy"), texts.get(name)) for name in names]


def _transcripts(split: Path) -> dict[str, Path]:
    for name in TRANSCRIPT_FOLDERS:
        if (split / name).is_dir() and (transcripts := _arrays(split / name)):
            return transcripts
    return {}


def _arrays(folder: Path) -> dict[str, Path]:
    """Map the name of each .npy in a folder, without suffix, to its path."""
    return {path.stem: path for path in list_files(folder, {".npy"})}


def _test_order(path: Path, names: list[str]) -> list[str]:
    """Return the names in the order of test_order.csv, which must list every file of the split."""
    try:
        rows = list(csv.DictReader(read_lines(path), skipinitialspace=True))
    except csv.Error as error:
        raise InputError(f"{path} is not a CSV file ({error}); copy it again") from None
    if not rows or "file" not in rows[0]:
        raise InputError(f"{path} must be a CSV with a column 'file' that names every test recording; copy it again")
    order = [Path(to_filename((row["file"] or "").strip())).name.removesuffix(".npy") for row in rows]
    if len(set(order)) != len(order):
        duplicate = next(name for i, name in enumerate(order) if name in order[:i])
        raise InputError(f"{path} names {duplicate!r} twice; keep one row")
    if extra := sorted(set(names) - set(order)):
        raise InputError(f"{path} does not name {extra[0]}.npy ({len(extra)} such files); add it or remove the file")
    return order
