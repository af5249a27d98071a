"""Columns of manifests: their meanings by name, and the unknown ones that are errors."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from las_fast.data.tables import columns, normalise_column
from las_fast.errors import InputError

SYNONYMS = {
    "path": ("path", "audio", "audio_filepath", "audio_path", "audio_file", "file_name", "filename", "wav_filename",
             "wav"),
    "transcript": ("transcript", "text", "sentence", "transcription", "wrd"),
    "id": ("id", "utt_id", "utterance_id"),
    "split": ("split",),
    "seconds": ("seconds", "duration"),
    "start": ("start", "offset", "begin"),
    "end": ("end",),
}  # fmt: skip
UNIT = r"(?:_?(s|sec|secs|seconds|ms|msec|milliseconds))?"
TIME_COLUMN = re.compile(
    r"(?:(?:audio|segment|utterance)_)?(start|offset|begin|end|duration|seconds)(?:_?time)?" + UNIT
)
UNKNOWN_TIME = re.compile("(?:from|to|[tx]min|[tx]max)" + UNIT)
TIME_WORDS = {"start", "begin", "end", "offset", "onset", "stop"}  # words in unknown columns that suggest times
SELECTION_COLUMNS = {"lang", "language", "locale", "subset", "partition", "fold", "take", "use", "keep", "skip",
                     "ignore", "include", "exclude", "discard"}  # fmt: skip


def has_path_column(path: Path) -> bool:
    """Return whether a table has a column that names files."""
    return "path" in columns_by_meaning(tuple(columns(path)))


@lru_cache(maxsize=256)
def columns_by_meaning(names: tuple[str, ...]) -> dict[str, list[tuple[str, float]]]:
    """Map each key of SYNONYMS to the columns that hold it, preferred name first, each with its unit in seconds."""
    ranked: dict[str, list[tuple[int, str, float]]] = {}
    for name in names:
        plain, unit = normalise_column(name), 1.0
        if time := TIME_COLUMN.fullmatch(plain):
            plain, unit = time[1], 0.001 if (time[2] or "s").startswith("m") else 1.0
        for meaning, known in SYNONYMS.items():
            if plain in known:
                ranked.setdefault(meaning, []).append((known.index(plain), name, unit))
    return {meaning: [(name, unit) for _, name, unit in sorted(columns)] for meaning, columns in ranked.items()}


def check_columns(path: Path, rows: list[tuple[int, dict]]) -> None:
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
    if UNKNOWN_TIME.fullmatch(plain) or (TIME_WORDS.intersection(words) and not columns_by_meaning((name,))):
        return (
            "({}) is unknown, but may select a part of a recording; give the part in seconds in columns "
            "'start' and 'end'"
        )
    return ""
