"""Fixtures that time functions; `pytest benchmarks --record` appends a row per result to benchmarks/results/*.csv."""

from __future__ import annotations

import pytest
import torch

from benchmarks import interleaved
from benchmarks.rows import CONTEXT, RESULTS, append_rows, context

OPS = RESULTS / "ops.csv"
COLUMNS = (*CONTEXT, "op", "backend", "shape", "dtype", "rounds", "median_us", "iqr_us")


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="append the measurements to benchmarks/results/*.csv")
    parser.addoption("--rounds", type=int, default=0, help="rounds of timing (default: set by each benchmark)")
    parser.addoption(
        "--long",
        action="store_true",
        help="also run the curves over sizes, batches and threads, the growth with the data, and 50 training steps",
    )


@pytest.fixture(params=[1], ids=lambda n: f"{n}thread", autouse=True)
def threads(request):
    """Run on one thread, so that load from other programs matters less."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def measure(benchmark, request, threads):
    """measure(function, op=, backend=, shape=, dtype=): time a function; with --record, append its row to ops.csv."""

    def run(function, *, op: str, backend: str, shape: str, dtype: torch.dtype) -> None:
        benchmark.group = f"{op} {shape} {dtype}"
        with torch.inference_mode():
            benchmark(function)
        if request.config.getoption("--record") and benchmark.stats:
            stats = benchmark.stats.stats
            times = (stats.rounds, round(stats.median * 1e6, 2), round(stats.iqr * 1e6, 2))
            dtype_name = str(dtype).removeprefix("torch.")
            append_rows(OPS, COLUMNS, [(*context(), op, backend, shape, dtype_name, *times)])

    return run


@pytest.fixture
def compare(request, capsys):
    """compare(file, functions, what=, shape=, dtypes=, baseline=, rounds=, per=, unit=): time functions in alternation.

    Prints the table of benchmarks.interleaved and returns the timings. With --record, the rows are appended to
    results/<file>.csv.
    """

    def run(file: str, functions: dict, *, baseline: str, rounds: int = 5, **labels) -> dict[str, interleaved.Timing]:
        rounds = request.config.getoption("--rounds") or rounds
        timings = interleaved.time_interleaved(functions, baseline=baseline, rounds=rounds)
        rows = interleaved.timing_rows(timings, baseline=baseline, **labels)
        with capsys.disabled():
            print(interleaved.format_rows(rows))
        if request.config.getoption("--record"):
            append_rows(RESULTS / f"{file}.csv", interleaved.COLUMNS, rows)
        return timings

    return run


@pytest.fixture
def long(request):
    """Skip the test unless --long is given."""
    if not request.config.getoption("--long"):
        pytest.skip("takes minutes; run it with --long")
