"""Time several functions in alternation, so that load from other programs affects all of them equally.

On a shared machine the same call may be a third slower one minute than the next. So each round runs every function
once, in an order that rotates from round to round. Ratios are taken within a round. The result is the median over the
rounds, with its spread and with the CPU load of other programs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.rows import CONTEXT, context

COLUMNS = (*CONTEXT, "what", "shape", "dtype", "path", "rounds", "unit", "median", "spread", "cpu", "baseline",
           "ratio", "cpu_ratio", "load")  # fmt: skip
STAT = Path("/proc/stat")
JIFFY = 0.01  # seconds; the unit of /proc/stat on Linux, independent of the kernel's tick


@dataclass(frozen=True)
class Timing:
    """The times of one function over all rounds, in seconds."""

    rounds: int
    median: float  # wall-clock time
    spread: float  # interquartile range of the wall-clock time
    cpu: float  # median CPU time of this process: on one thread, the wall-clock time of an idle machine
    ratio: float  # speed relative to the baseline by wall-clock time, median over rounds
    cpu_ratio: float  # the same by CPU time: more reliable on a busy machine with one thread
    load: float  # cores kept busy by other programs, mean


class CallTime(NamedTuple):
    """The times of one call."""

    seconds: float  # wall-clock
    cpu_seconds: float  # of this process
    load: float  # cores kept busy by other programs


def time_interleaved(
    functions: dict[str, Callable[[], object]], *, baseline: str, rounds: int = 5
) -> dict[str, Timing]:
    """Time each function once per round, after one warm-up call each.

    A function may time itself, for example in another process, and return a CallTime.
    """
    for function in functions.values():
        function()
    times: dict[str, list[CallTime]] = {name: [] for name in functions}
    for i in range(rounds):
        names = list(functions)
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(time_call(functions[name]))
    return {name: _timing(times[name], times[baseline]) for name in functions}


def time_call(function: Callable[[], object]) -> CallTime:
    """Time one call, or return the CallTime that the function itself returns."""
    busy, cpu, started = busy_seconds(), time.process_time(), time.perf_counter()
    result = function()
    if isinstance(result, CallTime):
        return result
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return CallTime(seconds, cpu, max(0.0, busy_seconds() - busy - cpu) / max(seconds, JIFFY))


def busy_seconds() -> float:
    """Return the CPU time of all programs on all cores since boot, in seconds; 0 without /proc/stat."""
    if not STAT.exists():
        return 0.0
    user, nice, system, _idle, _wait, *rest = map(int, STAT.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) * JIFFY


def _timing(times: list[CallTime], baseline_times: list[CallTime]) -> Timing:
    seconds, cpu_seconds, loads = zip(*times, strict=True)
    ratios = [
        statistics.median(b[i] / max(t[i], 1e-9) for b, t in zip(baseline_times, times, strict=True)) for i in (0, 1)
    ]
    load = sum(x * s for x, s in zip(loads, seconds, strict=True)) / sum(seconds)
    median, cpu = statistics.median(seconds), statistics.median(cpu_seconds)
    return Timing(len(times), median, _interquartile_range(seconds), cpu, *ratios, load)


def _interquartile_range(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def timing_rows(
    timings: dict[str, Timing], *, what: str, shape: str, dtypes: dict[str, str], baseline: str, per: float = 1.0,
    unit: str = "s",
) -> list[tuple]:  # fmt: skip
    """Return one row of COLUMNS per function; times are divided by `per` to convert seconds to `unit`."""
    rows = []
    for path, t in timings.items():
        times = [float(f"{x / per:.5g}") for x in (t.median, t.spread, t.cpu)]
        ratio = (baseline, round(t.ratio, 3), round(t.cpu_ratio, 3), round(t.load, 2))
        rows.append((*context(), what, shape, dtypes[path], path, t.rounds, unit, *times, *ratio))
    return rows


def format_rows(rows: list[tuple]) -> str:
    """Format rows of COLUMNS as a table for the terminal."""
    dicts = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    first = dicts[0]
    baseline = first["baseline"]
    lines = [f"\n{first['what']} ({first['shape']}), {first['threads']} thread(s), speed relative to {baseline}"]
    for d in dicts:
        lines.append(
            f"  {d['path']:<28}{d['dtype']:<10}{d['median']:>10.4g} {d['unit']:<16} ± {d['spread']:<9.3g}"
            f"CPU {d['cpu']:<9.4g}{d['ratio']:>7.2f} x, CPU {d['cpu_ratio']:.2f} x; other load {d['load']:.2f} cores"
        )
    return "\n".join(lines)
