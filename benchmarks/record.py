"""Rows of benchmarks/results/*.csv: what was measured, of which commit, on which machine."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
WHERE = ("date", "commit", "machine", "torch", "threads")


def where() -> tuple:
    """Return the values of WHERE, now."""
    return datetime.date.today().isoformat(), commit(), machine(), torch.__version__, torch.get_num_threads()


def append(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Add rows to a CSV file, which begins with the names of its columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([*([columns] if new else []), *rows])


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of such a file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def commit() -> str:
    """Return the commit measured, with a + where files differ from it."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=RESULTS.parents[1])
    return done.stdout.strip() or "unknown"


def machine() -> str:
    """Return the processor's name, its family and model too where that says little, and how many cores there are."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    if len(name.split()) < 3 and "cpu family" in facts:  # a virtual machine may hide which EPYC it is
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name
