"""One row a measurement: `pytest benchmarks --record` appends them to benchmarks/results/ops.csv."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).parent / "results" / "ops.csv"
WHERE = ("date", "commit", "machine", "torch", "threads")
COLUMNS = (*WHERE, "op", "backend", "shape", "dtype", "rounds", "median_us", "iqr_us")


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help=f"append the measurements to {RESULTS.name}")


@pytest.fixture(params=[1], ids=lambda n: f"{n}thread", autouse=True)
def threads(request):
    """Measure on one thread, whatever else the machine is doing."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def measure(benchmark, request, threads):
    """measure(function, op=, backend=, shape=, dtype=): time it, and keep the row if asked for."""

    def run(function, *, op: str, backend: str, shape: str, dtype: torch.dtype) -> None:
        benchmark.group = f"{op} {shape} {dtype}"
        with torch.inference_mode():
            benchmark(function)
        if request.config.getoption("--record") and benchmark.stats:
            stats = benchmark.stats.stats
            times = (stats.rounds, round(stats.median * 1e6, 2), round(stats.iqr * 1e6, 2))
            kind = str(dtype).removeprefix("torch.")
            where = (datetime.date.today().isoformat(), commit(), machine(), torch.__version__, threads)
            append((*where, op, backend, shape, kind, *times))

    return run


def append(row: tuple) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, row] if new else [row])


def commit() -> str:
    """Return the commit measured, with a + where files differ from it."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True, cwd=RESULTS.parents[2]).stdout.strip() or "unknown"


def machine() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
