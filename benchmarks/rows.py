"""Read and write the rows of benchmarks/results/*.csv, each with its date, commit and machine."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from las_fast import system
from las_fast.system import machine_name

__all__ = ["CONTEXT", "RESULTS", "append_rows", "context", "current_commit", "machine_name", "read_rows"]

RESULTS = Path(__file__).parent / "results"
CONTEXT = ("date", "commit", "machine", "torch", "threads")  # the first columns of most files


def context() -> tuple:
    """Return the current values of CONTEXT."""
    date = datetime.date.today().isoformat()
    return date, current_commit(), machine_name(), torch.__version__, torch.get_num_threads()


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Append rows to a CSV file; a new file starts with the column names.

    Absolute paths are shortened to their last two parts: those before say where this machine keeps its files. Raises
    ValueError if the file has other columns.
    """
    rows = [tuple(map(_shortened, row)) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
        if header != list(columns):
            raise ValueError(f"{path} has the columns {header}, not {list(columns)}; convert it, or move it away")
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([*([columns] if new else []), *rows])


def _shortened(value: object) -> object:
    is_path = isinstance(value, (str, Path)) and Path(value).is_absolute()
    return "/".join(Path(str(value)).parts[-2:]) if is_path else value


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file by column name; [] if the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def current_commit() -> str:
    """Return the abbreviated commit of this clone; see las_fast.system.current_commit."""
    return system.current_commit(RESULTS.parents[1])
