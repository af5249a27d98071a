"""Recognise the layout of a data root and open it as a Corpus."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from las_fast.data import hw4p2, kaldi, librispeech, manifest, old_editions
from las_fast.data.corpus import Corpus, role_of
from las_fast.data.folders import list_folder, subfolders
from las_fast.data.manifest_columns import SYNONYMS, has_path_column
from las_fast.data.recordings import audio_suffixes
from las_fast.data.tables import SUFFIXES
from las_fast.errors import InputError
from las_fast.files import expand, nearest_path_hint

ARCHIVE_SUFFIXES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"}
MAX_FOLDERS = 100  # folders per level that are searched for data


def open_corpus(root: str | Path) -> Corpus:
    """Recognise a data root.

    Known layouts: an HW4P2 archive of any edition, LibriSpeech, Kaldi, Common Voice and Hugging Face audio folders, and
    manifests. The data may lie up to two folders below the root. The root may be a split; see Corpus.named_split.
    Raises InputError if the root is missing or empty, or has no known layout or several corpora.
    """
    root = expand(root)
    if root.name in ("", ".."):  # the layouts need the folder's name and parent
        root = Path(os.path.abspath(root))
    try:
        root.stat()
    except (OSError, ValueError) as error:
        raise InputError(_root_problem(root, error)) from None
    if root.is_file():
        return _open_file(root)
    if not root.is_dir():
        raise InputError(f"{root} is neither a folder nor a file; give the folder with the data")
    openers = _recognise(root)
    if not openers and len(manifest.find_tables(root)) < 2:
        openers = _recognise_below(root)
    if len(openers) > 1:
        raise InputError(f"{root} contains several archives or corpora; give one of {', '.join(openers)}")
    if not openers:
        raise InputError(_unrecognised(root))
    corpus = next(iter(openers.values()))()
    return replace(corpus, named_split=_named_split(root, corpus))


def _named_split(root: Path, corpus: Corpus) -> str:
    """Return the split of a corpus that a path inside its folder names, or ""."""
    above, path = (Path(os.path.abspath(x)) for x in (corpus.root, root))
    if path == above or not path.is_relative_to(above):
        return ""
    name = path.relative_to(above).parts[0]
    equal = [split for split in corpus.splits if split.casefold() == name.casefold()]
    return name if name in equal else next(iter(equal), "")


def _recognise(root: Path, *, strict: bool = False) -> dict[str, Callable[[], Corpus]]:
    """Map the path of each corpus in a folder to a function that opens it; only HW4P2 archives can be several.

    strict: accept a .tsv or .jsonl only if it has the columns of a manifest; otherwise opening it reports missing ones.
    """
    if archives := hw4p2.find_archives(root):
        return {str(archive): partial(hw4p2.open_archive, archive) for archive in archives}
    if folder := librispeech.find_librispeech(root):
        return {str(folder): partial(librispeech.open_librispeech, folder)}
    if folder := kaldi.find_kaldi(root):
        return {str(folder): partial(kaldi.open_kaldi, folder)}
    tables = manifest.find_tables(root)
    if strict and not all(has_path_column(table.path) for table in tables):
        return {}
    if len(tables) == 1 or (tables and all(table.split for table in tables)):
        return {str(tables[0].path.parent): partial(manifest.open_tables, tables)}
    return {}


def _recognise_below(root: Path) -> dict[str, Callable[[], Corpus]]:
    """Recognise the subfolders of a folder or, if none is a known layout, their subfolders."""
    level = [root]
    for _ in range(2):
        children = [child for folder in level for child in subfolders(folder)][:MAX_FOLDERS]
        distinct = {os.path.realpath(child): child for child in reversed(children)}  # count a link and its target once
        level = list(distinct.values())[::-1]
        openers: dict[str, Callable[[], Corpus]] = {}
        for folder in level:
            openers |= _recognise(folder, strict=True)
        if openers:
            return openers
    return {}


def _open_file(path: Path) -> Corpus:
    if path.suffix.lower() in SUFFIXES:
        return manifest.open_manifest(path)
    if (folder := kaldi.find_kaldi(path.parent)) and path.name in kaldi.FILES:
        return kaldi.open_kaldi(folder)
    if path.suffix.lower() == ".npy" and (advice := old_editions.advice(path.parent)):
        raise InputError(advice)
    endings = ", ".join(SUFFIXES)
    raise InputError(f"{path} is a file; expected a folder, or a manifest ending in {endings}")


def _root_problem(root: Path, error: Exception) -> str:
    """Return why a root cannot be opened; if it names a split of the corpus in its parent, how to select that split."""
    if role_of(root.name) and isinstance(error, (FileNotFoundError, NotADirectoryError)):
        with suppress(InputError):
            splits = "+".join(open_corpus(root.parent).resolve(root.name))
            return (
                f"{root} does not exist, but {root.parent} has a split {splits}; give {root.parent}, and the split "
                "with --split (in training --data.train and --data.dev)"
            )
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    what = "does not exist" if missing else f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    return f"{root} {what}; give the folder with the data{nearest_path_hint(root) if missing else ''}"


def _unrecognised(root: Path) -> str:
    """Return the error for a folder of no known layout: what was expected and what is there."""
    entries, tables = list_folder(root), manifest.find_tables(root)
    if advice := old_editions.advice(root):
        return advice
    layouts = ", ".join((hw4p2.LAYOUT, librispeech.LAYOUT, kaldi.LAYOUT))
    if len(tables) > 1:
        names = ", ".join(table.path.name for table in tables[:5])
        return (
            f"{root} has {len(tables)} manifests ({names}); give one of them, or name each after its split, such as "
            "train.tsv and dev.tsv"
        )
    closed = next((path for path in entries if path.is_dir() and not os.access(path, os.R_OK | os.X_OK)), None)
    if closed is not None:
        return f"{closed} cannot be listed: Permission denied; check its permissions"
    what = "has no known layout" if entries else "is empty"
    return f"{root} {what}; expected {layouts}, or {manifest.LAYOUT}{_hint(entries)}"


def _hint(entries: list[Path]) -> str:
    """Return advice for data in an unsupported form, as a clause that starts with "; ", or ""."""
    tables = [path for path in entries if path.suffix.lower() in SUFFIXES]
    if tables and not os.access(tables[0], os.R_OK):
        return f"; {tables[0].name} cannot be read; check its permissions"
    tables.sort(key=lambda path: path.suffix.lower() == ".json")
    no_path = f"has no column 'path' (or {', '.join(SYNONYMS['path'][1:6])})"
    if tables and tables[0].suffix.lower() != ".json":
        return f"; {tables[0].name} {no_path}"
    kinds = {path.suffix.lower() for path in entries}
    if suffixes := sorted(kinds & ARCHIVE_SUFFIXES):
        return f"; it has {', '.join(suffixes)} files; unpack them first"
    if suffixes := sorted(kinds & {".parquet", ".arrow"}):
        advice = "extract the recordings to files, with a metadata.csv in the same folder"
        return f"; it has {', '.join(suffixes)} files; {advice}"
    if tables:  # a .json often describes such files
        return f"; {tables[0].name} {no_path}"
    if kinds & audio_suffixes():
        return "; it has recordings but no transcripts; write a manifest"
    return ""
