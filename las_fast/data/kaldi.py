"""Kaldi data folders: wav.scp, text and segments, in one folder or in one per split (data/train, data/dev).

Each line of these files begins with an id. wav.scp maps recordings to files, segments maps utterances to parts of
recordings (recording, start and end in seconds), and text maps utterances to words. Other files are not used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from las_fast.data.corpus import Corpus, Utterance, assign_roles, role_of
from las_fast.data.folders import read_lines, subfolders, to_filename
from las_fast.errors import InputError

LAYOUT = "[data/][SPLIT/]wav.scp with text and segments (Kaldi)"
RECORDINGS, TEXTS, SEGMENTS = FILES = ("wav.scp", "text", "segments")
PROBED = 20  # recordings that are looked for to find the folder that their paths are relative to


def find_kaldi(root: Path) -> Path | None:
    """Find the folder whose children are data folders (root, root/data, or root's parent), or a single data folder."""
    if _is_data_folder(root):
        splits = [path for path in subfolders(root.parent) if _is_data_folder(path)]
        return root.parent if role_of(root.name) and len(splits) > 1 else root
    data = root / "data"
    if any(_is_data_folder(path) for path in subfolders(root) if path != data):
        return root
    return data if any(map(_is_data_folder, (data, *subfolders(data)))) else None


def open_kaldi(root: Path) -> Corpus:
    """Open a folder that find_kaldi returned."""
    splits = {path.name: path for path in subfolders(root) if _is_data_folder(path)}
    roles = assign_roles(splits)
    if _is_data_folder(root):
        splits, roles = {"all": root}, dict.fromkeys(("train", "dev", "test"), ("all",))
    listings = {name: partial(_list_split, path) for name, path in splits.items()}
    texts = "a file 'text' next to wav.scp"
    return Corpus(name="Kaldi", root=root, kind="audio", listings=listings, roles=roles, expected_texts=texts)


def is_text(path: Path) -> bool:
    """Return whether a file is the transcript file of a Kaldi folder."""
    return path.name == TEXTS and _is_data_folder(path.parent)


def read_table(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line number, id and rest of each line; InputError for a repeated id."""
    seen = set()
    for number, line in enumerate(read_lines(path), 1):
        name, *rest = line.split(maxsplit=1) or [""]
        if name in seen:
            raise InputError(f"{path} line {number} repeats the id {name}; keep one line")
        if name:
            seen.add(name)
            yield number, name, rest[0].strip() if rest else ""


def _is_data_folder(folder: Path) -> bool:
    return (folder / RECORDINGS).is_file()


def _list_split(folder: Path) -> list[Utterance]:
    """List utterances in the order of segments or wav.scp, then those that have only a text."""
    recordings = _recordings(folder / RECORDINGS)
    texts = {name: text for _, name, text in read_table(folder / TEXTS)} if (folder / TEXTS).exists() else {}
    if (folder / SEGMENTS).exists():
        utterances = [_segment(folder, recordings, *line) for line in read_table(folder / SEGMENTS)]
        source = folder / SEGMENTS
    else:
        utterances = list(recordings.values())
        source = folder / RECORDINGS
    known = {u.id for u in utterances}
    for name in texts:
        if name not in known:
            problem = f"{folder / TEXTS} has a text of {name}, which {source} lacks; add it there or remove the text"
            utterances.append(Utterance(name, folder, None, problem=problem))
    return [replace(u, transcript=texts.get(u.id)) for u in utterances]


def _recordings(path: Path) -> dict[str, Utterance]:
    """Read a wav.scp: map ids of recordings to utterances without a transcript."""
    lines = [(name, file, _problem(path, number, name, file)) for number, name, file in read_table(path)]
    base = _base_folder(path.parent, [file for _, file, problem in lines if not problem][:PROBED])
    return {name: Utterance(name, base / to_filename(file), None, problem=problem) for name, file, problem in lines}


def _base_folder(folder: Path, files: list[str]) -> Path:
    """Find the folder that has one of these files: where Kaldi's scripts ran, often the parent of data."""
    bases = (folder, *folder.absolute().parents[:3], Path())
    return next((base for base in bases if any((base / to_filename(file)).exists() for file in files)), folder)


def _problem(path: Path, number: int, name: str, file: str) -> str:
    where = f"{path} line {number}: {name}"
    if file.endswith("|"):
        return (
            f"{where} is a command ({file[:40]}...), which is not run; write the recordings to files and list these: "
            'mkdir wav; while read -r id command; do bash -c "${command%|}" < /dev/null > wav/$id.wav; '
            f"done < {path.name}"
        )
    if re.search(r"\.ark:\d+$", file):
        return f"{where} lies in an archive ({file}); extract it with wav-copy and give that file"
    return "" if file else f"{where} names no file; add one or remove the line"


def _segment(folder: Path, recordings: dict[str, Utterance], number: int, name: str, rest: str) -> Utterance:
    where = f"{folder / SEGMENTS} line {number}"
    words = rest.split()
    try:
        recording, start, end = words[0], *map(float, words[1:])
        good = 0 <= start < math.inf and (start < end < math.inf or end == -1)  # -1: to the end of the recording
    except (ValueError, IndexError):
        good = False
    if not good:
        raise InputError(f"{where} must have an id, a recording, and start and end in seconds; got {name} {rest}")
    if recording not in recordings:
        problem = f"{where}: {RECORDINGS} has no {recording}; add it or remove the line"
        return Utterance(name, folder, None, problem=problem)
    length = None if end == -1 else end - start
    return replace(recordings[recording], id=name, start=start, seconds=length, is_part=True)
