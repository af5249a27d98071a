"""Times in a line of a manifest: which part of the recording it names, and its duration."""

from __future__ import annotations

import math
import os
from pathlib import Path

from las_fast.data.tables import normalise_column
from las_fast.errors import InputError

SAMPLE_COUNTS = ("num_samples", "n_samples")
SAMPLE_RATES = ("sample_rate", "sampling_rate", "samplerate")
DURATION_TOLERANCE = 0.1  # seconds between end - start and the duration on the same line


def times_of_part(path: Path, line: int, row: dict, by_meaning: dict, file: Path) -> tuple[float | None, float | None]:
    """Return the start of the part (None: the whole recording) and its duration (None: unknown), in seconds."""
    start, end, seconds = (_time(path, line, row, by_meaning.get(name, [])) for name in ("start", "end", "seconds"))
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


def _time(path: Path, line: int, row: dict, candidates: list[tuple[str, float]]) -> float | None:
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
