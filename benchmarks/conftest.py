"""One row a measurement: `pytest benchmarks --record` appends them to benchmarks/results/*.csv."""

from __future__ import annotations

import pytest
import torch

from benchmarks import paired, record

OPS = record.RESULTS / "ops.csv"
COLUMNS = (*record.WHERE, "op", "backend", "shape", "dtype", "rounds", "median_us", "iqr_us")


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="append the measurements to benchmarks/results/*.csv")
    parser.addoption("--rounds", type=int, default=0, help="of paired measurements, instead of each suite's own number")
    parser.addoption("--long", action="store_true", help="also the scaling curves and the 50 steps of training")


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
            record.append(OPS, COLUMNS, [(*record.where(), op, backend, shape, kind, *times)])

    return run


@pytest.fixture
def compare(request, capsys):
    """compare(file, functions, what=, shape=, dtypes=, baseline=, rounds=, per=, unit=): time functions by turns, print
    the table, and add its rows to results/<file>.csv if asked for; see benchmarks.paired. Returns the timings."""

    def run(file: str, functions: dict, *, baseline: str, rounds: int = 5, **about) -> dict[str, paired.Timing]:
        rounds = request.config.getoption("--rounds") or rounds
        timings = paired.paired(functions, baseline=baseline, rounds=rounds)
        found = paired.table(timings, baseline=baseline, **about)
        with capsys.disabled():
            print(paired.told(found))
        if request.config.getoption("--record"):
            record.append(record.RESULTS / f"{file}.csv", paired.COLUMNS, found)
        return timings

    return run


@pytest.fixture
def long(request):
    """Skips unless --long was given."""
    if not request.config.getoption("--long"):
        pytest.skip("takes minutes: give --long")
