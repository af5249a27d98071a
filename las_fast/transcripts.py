"""What was said in a recording, as text, JSON or subtitles, and the files that it is written to."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from las_fast.errors import InputError, show
from las_fast.outputs import NAME_MAX


@dataclass(frozen=True)
class Piece:
    """A stretch of a recording and what was said in it; times in seconds."""

    start: float
    end: float
    text: str
    score: float  # of the text, as las_fast.search.Hypothesis has it
    mean_score: float  # per token, the end counted: natural logarithm
    speech_score: float | None  # as las_fast.search.speech_scores has it; None without a CTC head


def as_text(path: Path, pieces: list[Piece]) -> str:
    return " ".join(piece.text for piece in pieces if piece.text) + "\n"


def as_json(path: Path, pieces: list[Piece]) -> str:
    rows = [{name: _rounded(value) for name, value in vars(piece).items()} for piece in pieces]
    whole = {"file": os.fspath(path), "text": as_text(path, pieces).strip(), "pieces": rows}
    return json.dumps(whole, ensure_ascii=False) + "\n"


def _rounded(value):
    return round(value, 4) if isinstance(value, float) else value


def as_srt(path: Path, pieces: list[Piece]) -> str:
    told = [piece for piece in pieces if piece.text]
    return "\n".join(
        f"{n}\n{clock(piece.start, ',')} --> {clock(piece.end, ',')}\n{piece.text}\n" for n, piece in enumerate(told, 1)
    )


def as_vtt(path: Path, pieces: list[Piece]) -> str:
    told = [piece for piece in pieces if piece.text]
    return "WEBVTT\n" + "".join(f"\n{clock(p.start, '.')} --> {clock(p.end, '.')}\n{p.text}\n" for p in told)


def clock(seconds: float, point: str) -> str:
    """Return seconds as hours:minutes:seconds and milliseconds."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


FORMATS = {"text": as_text, "json": as_json, "srt": as_srt, "vtt": as_vtt}
SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}


def output_files(paths: list[Path], folder: Path, suffix: str) -> dict[Path, Path]:
    """Return the file in `folder` that each of the distinct paths is written to.

    It has the recording's name with the suffix instead of its own. Names that would be the same keep their own suffix,
    and the folders below the one that all recordings share.

    Raises:
        InputError: two of the paths are the same file.
    """
    names = {path: Path("stdin" if str(path) == "-" else path.stem) for path in paths}
    real: dict[str, Path] = {}
    for path in paths:
        if (other := real.setdefault(os.path.realpath(path), path)) is not path:
            raise InputError(f"{show(other)} and {show(path)} are the same file; give it once")
    for longer in (lambda path: Path(path.name), lambda path: _below(paths, path), lambda path: path):
        counts = Counter(str(name).casefold() for name in names.values())  # some disks do not tell case apart
        for path, name in names.items():
            if counts[str(name).casefold()] > 1:
                names[path] = longer(path)
    return {path: folder / _shortened(name, suffix) for path, name in names.items()}


def _below(paths: list[Path], path: Path) -> Path:
    """Return the path relative to the folder that all paths share."""
    absolute = [os.path.abspath(other.parent) for other in paths]
    return Path(os.path.relpath(os.path.abspath(path), os.path.commonpath(absolute)))


def _shortened(name: Path, suffix: str) -> Path:
    """Return name + suffix, its last part cut to what a file system takes."""
    room = NAME_MAX - len(suffix)
    last = os.fsencode(name.name)[:room].decode("utf-8", "ignore") if len(os.fsencode(name.name)) > room else name.name
    return name.with_name(last + suffix)
