"""Two ways of doing one thing, timed by turns: a ratio is to be of the same minutes of the same machine.

Other programs slow a shared machine down by a third one minute and not at all the next. So every round runs each
function once, in an order that changes from round to round, ratios are taken within rounds, and the median over the
rounds is what is told, with the spread and with how busy the other programs kept the machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks import record

COLUMNS = (*record.WHERE, "what", "shape", "dtype", "path", "rounds", "unit", "median", "spread", "cpu", "baseline",
           "ratio", "cpu_ratio", "load")  # fmt: skip
STAT = Path("/proc/stat")
JIFFY = 0.01  # seconds; Linux reports in hundredths whatever its own tick


@dataclass(frozen=True)
class Timing:
    """One function's times, in seconds."""

    rounds: int
    median: float
    spread: float  # between the quartiles
    cpu: float  # median of this process's own time: what the clock would say on a quiet machine, on one thread
    ratio: float  # how many times faster than the baseline by the clock, the median over rounds
    cpu_ratio: float  # the same by own time: on a busy machine and one thread the better one
    load: float  # cores that other programs kept busy meanwhile, on average


class Clocked(NamedTuple):
    """One call."""

    seconds: float  # by the clock
    own: float  # seconds of the process's own time
    load: float  # cores that other programs kept busy


def paired(functions: dict[str, Callable[[], object]], *, baseline: str, rounds: int = 5) -> dict[str, Timing]:
    """Time each function `rounds` times by turns, after one call each that does not count."""
    for function in functions.values():
        function()
    taken: dict[str, list[Clocked]] = {name: [] for name in functions}
    for i in range(rounds):
        names = list(functions)
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(clocked(functions[name]))
    return {name: _timing(taken[name], taken[baseline]) for name in functions}


def clocked(function: Callable[[], object]) -> Clocked:
    """Call it, and clock it, unless it comes back with a clock's word of its own."""
    busy, own, started = busy_seconds(), time.process_time(), time.perf_counter()
    result = function()
    if isinstance(result, Clocked):
        return result
    seconds, own = time.perf_counter() - started, time.process_time() - own
    return Clocked(seconds, own, max(0.0, busy_seconds() - busy - own) / max(seconds, JIFFY))


def busy_seconds() -> float:
    """Return the seconds that all cores have worked since the machine started; 0 where it does not say."""
    if not STAT.exists():
        return 0.0
    user, nice, system, _idle, _wait, *rest = map(int, STAT.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) * JIFFY


def _timing(times: list[Clocked], of_baseline: list[Clocked]) -> Timing:
    clock, own, loads = zip(*times, strict=True)
    ratios = [
        statistics.median(b[i] / max(t[i], 1e-9) for b, t in zip(of_baseline, times, strict=True)) for i in (0, 1)
    ]
    load = sum(share * seconds for share, seconds in zip(loads, clock, strict=True)) / sum(clock)
    return Timing(len(times), statistics.median(clock), _spread(clock), statistics.median(own), *ratios, load)


def _spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def table(
    timings: dict[str, Timing], *, what: str, shape: str, dtypes: dict[str, str], baseline: str, per: float = 1.0,
    unit: str = "s",
) -> list[tuple]:  # fmt: skip
    """Return rows of COLUMNS; times are divided by `per` to be in `unit`."""
    found = []
    for path, t in timings.items():
        times = [float(f"{x / per:.5g}") for x in (t.median, t.spread, t.cpu)]
        ratio = (baseline, round(t.ratio, 3), round(t.cpu_ratio, 3), round(t.load, 2))
        found.append((*record.where(), what, shape, dtypes[path], path, t.rounds, unit, *times, *ratio))
    return found


def told(found: list[tuple]) -> str:
    """Return such rows as lines for people."""
    dicts = [dict(zip(COLUMNS, row, strict=True)) for row in found]
    first = dicts[0]
    lines = [f"\n{first['what']} ({first['shape']}), {first['threads']} thread(s), ratios to {first['baseline']}"]
    for d in dicts:
        lines.append(
            f"  {d['path']:<28}{d['dtype']:<10}{d['median']:>10.4g} {d['unit']:<16} ± {d['spread']:<9.3g}"
            f"own {d['cpu']:<9.4g}{d['ratio']:>7.2f} x, own {d['cpu_ratio']:.2f} x; others {d['load']:.2f} cores"
        )
    return "\n".join(lines)
