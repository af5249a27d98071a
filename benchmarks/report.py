"""Turn the rows of benchmarks/results/*.csv into Markdown tables and pictures.

    python -m benchmarks.report [--machine NAME]

Pictures go to benchmarks/results/plots: bars that compare las_fast with the baselines and other libraries; curves over
batch, beam, frames, vocabulary, hidden size and threads; and the time and memory of the decode command. The curves also
show a lower bound for the plain search: its operations and bytes at the machine's matmul throughput and memory
bandwidth (benchmarks.machine). If the same thing was measured several times, the last row counts.
benchmarks/results/README.md says in words what each picture shows.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402 (after the backend is chosen)
from matplotlib.ticker import LogLocator  # noqa: E402

from benchmarks import machine  # noqa: E402
from benchmarks.picture_index import Entry, index  # noqa: E402
from benchmarks.rows import RESULTS, machine_name, read_rows  # noqa: E402

PLOTS = RESULTS / "plots"
KEY = ("what", "shape", "dtype", "path", "threads")
FILES = ("train", "bilstm", "ctc", "decode", "features", "peers")
AXIS_LETTERS = {"batch": "B", "beam": "K", "frames": "T", "vocabulary": "V", "hidden size": "H", "threads": "threads"}
LETTERS = {"B": "batch {}", "K": "beam {}", "T": "{} frames", "U": "{} tokens", "S": "{} labels", "F": "{} features",
           "I": "input size {}", "H": "hidden size {}", "D": "key size {}", "V": "vocabulary {}"}  # fmt: skip
EQUAL_SPEED = 1.03  # ratios up to this one, and down to its inverse, are called equal
AXIS_WORDS = {"beam": "a beam of {}", "vocabulary": "a vocabulary of {}", "hidden size": "a hidden size of {}"}
AXIS_LABELS = {"frames": "encoder frames", "batch": "utterances per batch"}
KEY_SIZE = 256  # in all benchmarks of the search
COLOURS = {
    "las_fast": "#0b6e4f", "las_fast cpp": "#0b6e4f", "las_fast bf16": "#2fbf71",
    "las_fast int8": "#8fdcae",
    "las_fast steps": "#5e8c61", "las_fast reference": "#9bc1bc",
    "plain": "#b5651d", "plain bf16": "#e9a15b", "usual": "#8d8d8d",
}  # fmt: skip
OTHER_COLOUR = "#4f6d9a"  # other libraries, and stages
Row = dict[str, str]


def latest(rows: list[Row], machine: str, key: tuple[str, ...] = KEY) -> list[Row]:
    """Return the last row of one machine for each combination of the columns `key`."""
    return list({tuple(row[k] for k in key): row for row in rows if row["machine"] == machine}.values())


def latest_growth(rows: list[Row], machine: str) -> list[Row]:
    """Return the last single-threaded row of one machine for each size, from small to large."""
    last = latest(rows, machine, ("over", "size", "threads"))
    return sorted((row for row in last if row["threads"] == "1"), key=lambda row: float(row["size"]))


def group(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Group rows by (what, shape, threads): the paths that one run compared."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["what"], row["shape"], row["threads"]), []).append(row)
    return groups


def table(rows: list[Row]) -> str:
    """Return a Markdown table with a line per path; rows of curves are left out."""
    lines = ["| what | path | dtype | median | spread | speed by wall clock | by CPU time | other load | commit |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (what, shape, _), members in group([row for row in rows if not axis_of(row["what"])]).items():
        for i, row in enumerate(members):
            ratios = [compare(row, column) for column in ("ratio", "cpu_ratio")]
            cells = (f"{what}, {shape}" if i == 0 else "", row["path"], row["dtype"],
                     f"{format_number(row['median'])} {row['unit']}", format_number(row["spread"]), *ratios,
                     f"{float(row['load']):.1f} cores", row["commit"])  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def share_table(rows: list[Row]) -> str:
    """Return a Markdown table of the fraction of peak matmul throughput that encoder and decoder reach."""
    lines = ["| part | task | dtype | GFLOP | seconds | GFLOP/s | peak GFLOP/s | share |", f"|{8 * '---|'}"]
    for row in rows:
        numbers = [format_number(row[k]) for k in ("gflop", "seconds", "gflop_s", "machine_gflop_s")]
        cells = (row["part"], row["task"], row["dtype"], *numbers, f"{float(row['share']):.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(row: Row, column: str) -> str:
    """Return the speed relative to the baseline by one ratio column; for a stage, its share of the whole time."""
    if row["path"] == row["baseline"]:
        return ""
    if row["what"].endswith("by stages"):
        return f"{100 / float(row[column]):.0f}% of {row['baseline']}"
    return f"{float(row[column]):.2f} x {row['baseline']}"


def compare_in_words(row: Row, column: str) -> str:
    """Return compare() as people say it, such as "10.4 times faster than plain"."""
    if row["path"] == row["baseline"] or row["what"].endswith("by stages"):
        return compare(row, column)
    ratio = float(row[column])
    if 1 / EQUAL_SPEED <= ratio <= EQUAL_SPEED:
        return f"as fast as {row['baseline']}"
    factor, word = (ratio, "faster") if ratio > 1 else (1 / ratio, "slower")
    return f"{format_number(factor)} times {word} than {row['baseline']}"


def shape_in_words(shape: str) -> str:
    """Spell out a shape: "B16 K8 64 steps" is "batch 16, beam 8, 64 steps"; other texts are returned as they are."""
    if not re.match(r"[A-Z]\d+\b", shape):
        return shape
    rest = re.sub(r"\b[A-Z]\d+\b", "", shape).split()
    known = [LETTERS[letter].format(number) for letter, number in sizes(shape).items()]
    return ", ".join([*known, *([" ".join(rest)] if rest else [])])


def time_of(row: Row) -> float:
    """Return the time to draw: CPU time on one thread, as other programs hardly change it; else wall-clock time."""
    return float(row["cpu"] if row["threads"] == "1" else row["median"])


def format_number(value: float | str) -> str:
    value = float(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def axis_of(what: str) -> str:
    """Return the axis of a scaling curve, such as "batch"; "" for anything else."""
    axis = what.rpartition(" by ")[2] if " by " in what else ""
    return axis if axis in AXIS_LETTERS else ""


# Pictures


def bars(rows: list[Row], title: str, path: Path) -> None:
    """Draw a bar per path, the fastest on top, with its speed relative to the baseline and its wall-clock time."""
    rows = sorted(rows, key=time_of, reverse=True)
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.5), layout="constrained")
    times = [time_of(row) for row in rows]
    axes.barh(names_of(rows), times, color=[COLOURS.get(row["path"], OTHER_COLOUR) for row in rows])
    wall_times = [float(row["median"]) for row in rows]
    axes.plot(wall_times, range(len(rows)), "|", color="#222222", markersize=14)
    column = "cpu_ratio" if rows[0]["threads"] == "1" else "ratio"
    for i, row in enumerate(rows):
        comparison = compare_in_words(row, column)
        text = f"{format_number(times[i])}  ({comparison})" if comparison else format_number(times[i])
        axes.annotate(text, (max(times[i], wall_times[i]), i), xytext=(6, 0), textcoords="offset points", va="center",
                      fontsize=9)  # fmt: skip
    axes.set_xlim(0, 1.7 * max(times + wall_times))
    marks = "; marks: wall-clock time" if clock_of(rows[0]) == "CPU time" else ""
    axes.set_xlabel(f"{rows[0]['unit']}, {clock_of(rows[0])}{marks}; shorter is faster")
    finish(figure, title, rows, path)


def names_of(rows: list[Row]) -> list[str]:
    """Return the names of the paths, with the dtype where one path has several."""
    repeated = len({row["path"] for row in rows}) < len(rows)
    return [f"{row['path']}, {row['dtype']}" if repeated else row["path"] for row in rows]


def clock_of(row: Row) -> str:
    """Return which clock time_of() reads."""
    return "CPU time" if row["threads"] == "1" else "wall-clock time"


def curves(rows: list[Row], axis: str, limits: dict[tuple[str, str], float], path: Path) -> None:
    """Draw the time of each path over one axis of the shape, with the lower bound that the machine's limits set."""
    figure, axes = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    wall_clock = axis == "threads"
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        time = float(row["median"]) if wall_clock else time_of(row)
        lines.setdefault(row["path"], []).append((position(row, axis), time))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name, color=COLOURS.get(name, OTHER_COLOUR))
    for dtype, style in (("float32", "--"), ("bfloat16", ":")):
        members = [row for row in rows if row["dtype"] == dtype]
        points = sorted({(position(row, axis), lower_bound(row, dtype, limits)) for row in members})
        if points and not any(math.isnan(y) for _, y in points):
            axes.plot(*zip(*points, strict=True), style, color="#222222", label=f"lower bound for plain, {dtype}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({position(row, axis) for row in rows})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_xlabel(AXIS_LABELS.get(axis, axis))
    axes.set_ylabel(f"{rows[0]['unit']}, {'wall-clock time' if wall_clock else clock_of(rows[0])}")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    finish(figure, rows[0]["what"], rows, path)


def growth(rows: list[Row], path: Path) -> None:
    """Draw the time and peak memory of the decode command over the size of its input, beside proportional time."""
    series = {over: [row for row in rows if row["over"] == over] for over in dict.fromkeys(row["over"] for row in rows)}
    figure, panels = plt.subplots(2, len(series), figsize=(4.6 * len(series), 5.4), layout="constrained", squeeze=False)
    for (over, members), (above, below) in zip(series.items(), panels.T, strict=True):
        x, seconds, peaks = ([float(row[k]) for row in members] for k in ("size", "seconds", "peak_mib"))
        above.plot(x, seconds, "o-", color=COLOURS["las_fast"], label="decode command")
        above.plot(x, [seconds[0] * size / x[0] for size in x], ":", color="#222222", label="proportional to size")
        below.plot(x, peaks, "o-", color=OTHER_COLOUR)
        above.set_yscale("log")
        above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_major_formatter("{x:g}")
        above.minorticks_off()
        below.set_ylim(0, 1.2 * max(peaks))
        below.set_xlabel(over)
        above.set_ylabel("seconds")
        below.set_ylabel("peak memory, MiB")
        above.legend(fontsize=8, loc="upper left")
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [f"{size:g}" for size in x])
    finish(figure, "decode with the beam and CTC of preset speech13h, untrained", rows, path)


def position(row: Row, axis: str) -> float:
    """Return the value of a row on an axis."""
    return float(row["threads"]) if axis == "threads" else float(sizes(row["shape"])[AXIS_LETTERS[axis]])


def sizes(shape: str) -> dict[str, int]:
    """Parse a shape such as "B16 K8 T200" into sizes by letter."""
    return {letter: int(number) for letter, number in re.findall(r"\b([A-Z])(\d+)\b", shape)}


def lower_bound(row: Row, dtype: str, limits: dict[tuple[str, str], float]) -> float:
    """Return a lower bound in us for one beam search step of one utterance; nan for other rows or unknown limits.

    It is the longer of two times: the matmuls at peak throughput, and reading keys and values once.
    """
    n = sizes(row["shape"])
    peaks = [limits.get((what, dtype), 0.0) for what in ("matrix products", "matrix products by oneDNN")]
    bandwidth = limits.get(("memory bandwidth", "float32"), 0.0)
    if not row["what"].startswith("beam search") or not max(peaks) or not bandwidth:
        return math.nan
    H, T = n["H"], n["T"]
    # first cell, second cell, query, projection, logits, attention
    multiplies = 12 * H * H + 8 * H * H + KEY_SIZE * H + 2 * H * H + H * n["V"] + T * (KEY_SIZE + H)
    operations = 2 * n["K"] * multiplies / int(row["threads"])
    bytes_read = T * (KEY_SIZE + H) * (2 if dtype == "bfloat16" else 4)
    return max(operations / max(peaks), bytes_read / bandwidth) * 1e-3  # limits are per ns, the unit is us


def finish(figure, title: str, rows: list[Row], path: Path) -> None:
    """Add the title and a caption with machine, commit and load, and write the picture."""
    loads = [float(row["load"]) for row in rows]
    row = rows[0]
    threads = "/".join(sorted({r["threads"] for r in rows}))
    context = f"{row['machine']}, torch {row['torch']}, {threads} thread(s), commit {row['commit']}"
    load = f"other programs kept {load_in_words(min(loads), max(loads))} cores busy"
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.supxlabel(f"{context}\n{load}", fontsize=7, x=0.01, ha="left", color="#555555")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def load_in_words(low: float, high: float) -> str:
    """Return a range of loads, such as "0.1 to 0.4"."""
    if high < 0.05:
        return "less than 0.1"
    return f"{low:.1f} to {high:.1f}" if f"{low:.1f}" != f"{high:.1f}" else f"{high:.1f}"


class Picture(NamedTuple):
    """A picture of measurements."""

    entry: Entry
    draw: Callable[[Path], None]  # write it to a path


def pictures(rows: list[Row], growth_rows: list[Row], limits: dict[tuple[str, str], float]) -> list[Picture]:
    """Return the pictures of one machine's rows: bars for each comparison, curves for each axis, and growth."""
    found = []
    for (what, shape, threads), members in group([row for row in rows if not axis_of(row["what"])]).items():
        title = f"{what}\n{shape_in_words(shape)}"
        entry = Entry(
            f"{slug(what)}-{slug(shape)}-{threads}.png", f"{what}, {shape_in_words(shape)}", bars_in_words(members)
        )
        found.append(Picture(entry, partial(bars, members, title)))
    for what in dict.fromkeys(row["what"] for row in rows if axis_of(row["what"])):
        members = [row for row in rows if row["what"] == what]
        entry = Entry(f"{slug(what)}.png", what, curves_in_words(members, axis_of(what)))
        found.append(Picture(entry, partial(curves, members, axis_of(what), limits)))
    if growth_rows:
        entry = Entry("growth.png", "time and memory of decode", growth_in_words(growth_rows))
        found.append(Picture(entry, partial(growth, growth_rows)))
    return found


def bars_in_words(rows: list[Row]) -> str:
    """Return how each path compares with its baseline, the fastest first."""
    column = "cpu_ratio" if rows[0]["threads"] == "1" else "ratio"
    named = list(zip(names_of(rows), rows, strict=True))
    if rows[0]["what"].endswith("by stages"):
        parts = [f"{name} {compare(row, column).partition(' of ')[0]}" for name, row in named if compare(row, column)]
        return f"Of {rows[0]['baseline']}: {', '.join(parts)}."
    bases = [f"{format_number(time_of(row))} {row['unit']}" for _, row in named if row["path"] == row["baseline"]]
    others = sorted((float(row[column]), name) for name, row in named if row["path"] != row["baseline"])
    faster = [f"{name} ({format_number(x)} times)" for x, name in reversed(others) if x > EQUAL_SPEED]
    equal = [name for x, name in reversed(others) if 1 / EQUAL_SPEED <= x <= EQUAL_SPEED]
    slower = [f"{name} ({format_number(1 / x)} times)" for x, name in reversed(others) if x < 1 / EQUAL_SPEED]
    parts = [("Faster", faster), ("As fast", equal), ("Slower", slower)]
    said = " ".join(f"{words}: {'; '.join(names)}." for words, names in parts if names)
    return f"Baseline: {rows[0]['baseline']}, {' and '.join(bases)}. {said}"


def curves_in_words(rows: list[Row], axis: str) -> str:
    """Return the range of the speed of each path relative to the baseline, the fastest first."""
    column = "ratio" if axis == "threads" else "cpu_ratio"
    places = [position(row, axis) for row in rows]
    ranges: dict[str, list[float]] = {}
    for row in rows:
        if row["path"] != row["baseline"]:
            ranges.setdefault(row["path"], []).append(float(row[column]))
    found = sorted(((max(x), min(x), path) for path, x in ranges.items()), reverse=True)
    parts = [f"{path} ({range_in_words(low, high)} times)" for high, low, path in found]
    label = AXIS_WORDS.get(axis, "{} " + AXIS_LABELS.get(axis, axis)).format(f"{min(places):g} to {max(places):g}")
    return f"Faster than {rows[0]['baseline']} with {label}: {'; '.join(parts)}."


def growth_in_words(rows: list[Row]) -> str:
    """Return the time and the peak memory of the smallest and the largest size of each kind."""
    parts = []
    for over in dict.fromkeys(row["over"] for row in rows):
        first, *_, last = (row for row in rows if row["over"] == over)
        numbers = [(format_number(x["seconds"]), format_number(x["peak_mib"]), x["size"]) for x in (first, last)]
        parts.append(" and ".join(f"{seconds} s, {peak} MiB for {size}" for seconds, peak, size in numbers))
        parts[-1] += f" {over}"
    return f"{'; '.join(parts)}."


def range_in_words(low: float, high: float) -> str:
    low, high = format_number(low), format_number(high)
    return low if low == high else f"{low} to {high}"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("--machine", default=machine_name(), help="machine to report (default: this one)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--plots", type=Path, default=PLOTS, help="folder of the pictures")
    options = parser.parse_args(argv)
    rows = [row for file in FILES for row in read_rows(options.results / f"{file}.csv")]
    rows = latest(rows, options.machine)
    if not rows:
        print(f"{options.results} has no rows of machine {options.machine}; run: pytest benchmarks --record")
        return
    print(table(rows))
    shares = read_rows(options.results / "shares.csv")
    if shares := latest(shares, options.machine, ("part", "task", "dtype", "shape")):
        print(f"\n{share_table(shares)}")
    found = recorded_pictures(options.results, options.machine)
    for picture in found:
        picture.draw(options.plots / picture.entry.name)
        print(options.plots / picture.entry.name)
    page = options.plots.parent / "README.md"
    page.write_text(index([picture.entry for picture in found], options.machine), encoding="utf-8")
    print(page)


def recorded_pictures(results: Path, name: str) -> list[Picture]:
    """Return the pictures of the rows of one machine in a folder of CSV files."""
    rows = latest([row for file in FILES for row in read_rows(results / f"{file}.csv")], name)
    limits = machine.best_values(read_rows(results / "machine.csv"), name)
    return pictures(rows, latest_growth(read_rows(results / "growth.csv"), name), limits)


if __name__ == "__main__":
    main()
