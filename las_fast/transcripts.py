"""What was said in a recording, as text, JSON or subtitles, and the files that it is written to."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

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

    It has the recording's name with the suffix instead of its own. Recordings whose files would be the same keep their
    own suffix, and then get a number.
    """
    stems = {path: "stdin" if str(path) == "-" else path.stem or path.name for path in paths}
    counts = Counter(_folded(stem, suffix) for stem in stems.values())
    taken: set[str] = set()
    files = {}
    for path, stem in stems.items():
        if counts[_folded(stem, suffix)] > 1:
            stem = path.name if str(path) != "-" else stem
        number, name = 1, stem
        while _folded(name, suffix) in taken:
            number += 1
            name = f"{stem[: NAME_MAX // 2]}-{number}"
        taken.add(_folded(name, suffix))
        files[path] = folder / _shortened(name, suffix)
    return files


def _folded(name: str, suffix: str) -> str:
    """Return what two names share that are one file: some disks do not tell case apart."""
    return _shortened(name, suffix).casefold()


def _shortened(name: str, suffix: str) -> str:
    """Return name + suffix, the name cut to what a file system takes."""
    room = NAME_MAX - len(suffix)
    data = os.fsencode(name or "recording")
    return (data[:room].decode("utf-8", "ignore") if len(data) > room else name or "recording") + suffix
