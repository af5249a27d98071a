"""Read run folders: log, settings, attention weights and starts."""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from las_fast.config import Config, from_yaml
from las_fast.errors import InputError
from las_fast.files import nearest_path_hint
from las_fast.training.origin import read_starts
from las_fast.training.runlog import read_rows

LOG = "log.jsonl"
MAX_SUGGESTIONS = 5


@dataclass(frozen=True)
class Run:
    """A run folder. Only log.jsonl must exist."""

    path: Path
    name: str  # short
    log: list[dict] = field(repr=False)  # rows with an epoch; see read_log

    @cached_property
    def train(self) -> list[dict]:
        """The log rows of training steps."""
        return [row for row in self.log if row["kind"] == "train"]

    @cached_property
    def valid(self) -> list[dict]:
        """The log rows of validations."""
        return [row for row in self.log if row["kind"] == "valid"]

    @cached_property
    def settings(self) -> str:
        """The text of config.yaml, or ""."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (self.path / "config.yaml").read_text(encoding="utf-8")
        return ""

    @cached_property
    def config(self) -> Config | None:
        """The settings; None if config.yaml is missing, or this version of las_fast cannot read it."""
        with contextlib.suppress(InputError):
            return from_yaml(self.settings, str(self.path / "config.yaml")) if self.settings else None
        return None

    @cached_property
    def starts(self) -> list[dict]:
        """The lines of starts.jsonl."""
        return read_starts(self.path)

    @property
    def formed_epoch(self) -> float | None:
        """The epoch of the first validation at which attention had formed, or None."""
        return next((row["epoch"] for row in self.log if row.get("monitor", {}).get("formed")), None)

    @property
    def best(self) -> dict | None:
        """The log row of the validation with the lowest CER, or None."""
        rows = [row for row in self.valid if "cer" in row]
        return min(rows, key=lambda row: row["cer"], default=None)

    @property
    def frame_seconds(self) -> float | None:
        """Seconds per encoder frame; None if the settings are unknown."""
        return None if self.config is None else frame_seconds(self.config)

    @property
    def attention_files(self) -> list[Path]:
        """The files attention/epoch-EPOCH.npz in the order of their epochs."""
        files = (self.path / "attention").glob("epoch-*.npz")
        return sorted((path for path in files if re.fullmatch(r"epoch-\d+(\.\d+)?", path.stem)), key=epoch_of)


def frame_seconds(config: Config) -> float:
    """Return the seconds per encoder frame."""
    from las_fast.data.features import seconds_of  # imports torch

    return seconds_of(config.model.listener.time_reduction, config.features)


def open_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Open run folders; their names are the last parts of the paths, as few as make them different.

    Raises:
        InputError: a path is not a run folder, or is given twice.
    """
    folders = [Path(path) for path in paths]
    for i, folder in enumerate(folders):
        if any(os.path.realpath(folder) == os.path.realpath(other) for other in folders[:i]):
            raise InputError(f"{folder} is given twice; give each run once")
    logs = [read_log(folder) for folder in folders]
    return [Run(*parts) for parts in zip(folders, _short_names(folders), logs, strict=True)]


def read_log(run: str | Path) -> list[dict]:
    """Return the rows of run/log.jsonl that have an epoch.

    Of each row, finite numbers, the texts `kind` and `line` and the dict `monitor` are kept.

    Raises:
        InputError: there is no log. The error names the runs nearby.
    """
    path = Path(run)
    if (path / LOG).is_file():
        return [row for row in map(_clean, read_rows(path / LOG)) if "epoch" in row]
    problem = f"{path} does not exist" if not path.exists() else f"{path} has no {LOG}, so it is not a run folder"
    if path.is_file():
        problem = f"{path} is a file, not a run folder"
    near = nearby_runs(path)
    advice = f"; did you mean {' or '.join(map(str, near))}?" if near else ""
    if not advice and not path.exists():
        advice = nearest_path_hint(path)
    raise InputError(problem + (advice or "; give the --out folder of a training"))


def _clean(row: dict) -> dict:
    """Return a row of a log with finite numbers, `kind` and `line`, and in `monitor` finite numbers and `formed`."""
    monitor = row.get("monitor", {})
    numbers = {key: value for key, value in row.items() if _is_number(value) or key in ("kind", "line")}
    if "monitor" not in row:
        return numbers
    known = monitor.items() if isinstance(monitor, dict) else ()
    return {**numbers, "monitor": {key: value for key, value in known if _is_number(value) or key == "formed"}}


def nearby_runs(path: Path) -> list[Path]:
    """Return up to MAX_SUGGESTIONS run folders around `path` and inside it, or else beside it, similar names first."""
    inside = [log.parent for pattern in (f"*/{LOG}", f"*/*/{LOG}") for log in sorted(path.glob(pattern))]
    around = [parent for parent in list(path.parents)[:2] if (parent / LOG).is_file()]
    if inside or around:
        return [*around, *inside][:MAX_SUGGESTIONS]
    beside = {log.parent.name: log.parent for log in sorted(path.parent.glob(f"*/{LOG}"))}
    similar = difflib.get_close_matches(path.name, beside, MAX_SUGGESTIONS, cutoff=0.5)
    return [beside[name] for name in similar or list(beside)[:MAX_SUGGESTIONS]]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of each path, as few as make all names different."""
    full = [Path(os.path.abspath(path)).parts for path in paths]
    for count in range(1, max(map(len, full)) + 1):
        names = ["/".join(parts[-count:]) for parts in full]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_attention(path: Path) -> tuple[float, list[tuple[str, str, np.ndarray]]]:
    """Read an attention/epoch-*.npz: return its epoch, and (id, text, weights (U, T)) of each utterance.

    Raises:
        InputError: the file is damaged or of another kind.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            ids = [str(i) for i in data["ids"]]
            pictures = [(i, str(data[f"text_{n}"]), data[f"weights_{n}"]) for n, i in enumerate(ids)]
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not attention that a training saved ({error}); remove it") from None
    return epoch_of(path), pictures


def _is_number(value: object) -> bool:
    """Return whether a value of JSON is a finite number that fits a float."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of more than 300 digits
        return False


def epoch_of(path: Path) -> float:
    """Return the epoch in the name of an attention/epoch-*.npz."""
    return float(path.stem.removeprefix("epoch-"))
