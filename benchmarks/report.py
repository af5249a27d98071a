"""The rows of benchmarks/results/*.csv as a table for the README and as pictures.

    python -m benchmarks.report [--machine NAME]

prints the table and draws, into benchmarks/results/plots, bars against the baselines and other libraries, curves over
batch, beam, frames, vocabulary, hidden size and threads, and what the decode command takes in time and memory. Beside
the curves stands the time that the plain search's operations and bytes would take at the machine's own rate of matrix
products and memory bandwidth (benchmarks.machine). Of several rows of one thing the last counts.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402 (the backend comes first)
from matplotlib.ticker import LogLocator  # noqa: E402

from benchmarks import machine, record  # noqa: E402

PLOTS = record.RESULTS / "plots"
THING = ("what", "shape", "dtype", "path", "threads")
FILES = ("train", "bilstm", "ctc", "decode", "features", "peers")
AXES = {"batch": "B", "beam": "K", "frames": "T", "vocabulary": "V", "hidden size": "H", "threads": "threads"}
NAMES = {"frames": "encoder frames", "batch": "utterances in a batch"}
KEYS = 256  # size of a key in the suites' shapes
COLOURS = {
    "las_fast": "#0b6e4f", "las_fast cpp": "#0b6e4f", "las_fast bf16": "#2fbf71",
    "las_fast int8": "#8fdcae",
    "las_fast steps": "#5e8c61", "las_fast reference": "#9bc1bc",
    "plain": "#b5651d", "plain bf16": "#e9a15b", "usual": "#8d8d8d",
}  # fmt: skip
OTHER = "#4f6d9a"  # other libraries, and stages
Row = dict[str, str]


def latest(rows: list[Row], name: str, thing: tuple[str, ...] = THING) -> list[Row]:
    """Return the last row of each thing that was measured on that machine; `thing`: the columns that tell one."""
    return list({tuple(row[k] for k in thing): row for row in rows if row["machine"] == name}.values())


def last_growth(rows: list[Row], name: str) -> list[Row]:
    """Return the last row of each size on one thread of that machine, small to large."""
    kept = latest(rows, name, ("over", "size", "threads"))
    return sorted((row for row in kept if row["threads"] == "1"), key=lambda row: float(row["size"]))


def groups(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Return the rows by (what, shape, threads): what one run compared."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["what"], row["shape"], row["threads"]), []).append(row)
    return found


def table(rows: list[Row]) -> str:
    """Return Markdown: one line a path of everything but the curves."""
    lines = ["| what | path | dtype | median | spread | faster by the clock | by own time | others' load | commit |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (what, shape, _), members in groups([row for row in rows if not axis_of(row["what"])]).items():
        for i, row in enumerate(members):
            ratios = [compared(row, kind) for kind in ("ratio", "cpu_ratio")]
            cells = (f"{what}, {shape}" if i == 0 else "", row["path"], row["dtype"],
                     f"{shown(float(row['median']))} {row['unit']}", shown(float(row["spread"])), *ratios,
                     f"{float(row['load']):.1f} cores", row["commit"])  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shares(rows: list[Row]) -> str:
    """Return Markdown: what share of the machine's rate of matrix products each half of the model reaches."""
    lines = ["| part | task | dtype | GFLOP | seconds | GFLOP/s | machine's | share |", f"|{8 * '---|'}"]
    for row in rows:
        numbers = [shown(float(row[k])) for k in ("gflop", "seconds", "gflop_s", "machine_gflop_s")]
        cells = (row["part"], row["task"], row["dtype"], *numbers, f"{float(row['share']):.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compared(row: Row, kind: str) -> str:
    """Return how many times faster than the baseline a row is, or what share of it where it is a stage of it."""
    if row["path"] == row["baseline"]:
        return ""
    if row["what"].endswith("by stages"):
        return f"{100 / float(row[kind]):.0f}% of {row['baseline']}"
    return f"{float(row[kind]):.2f} x {row['baseline']}"


def time_of(row: Row) -> float:
    """Return what the pictures show: on one thread the process's own time, which other programs hardly change."""
    return float(row["cpu"] if row["threads"] == "1" else row["median"])


def shown(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def axis_of(what: str) -> str:
    """Return what a scaling curve is over, "" for anything else."""
    axis = what.rpartition(" by ")[2] if " by " in what else ""
    return axis if axis in AXES else ""


# Pictures


def bars(rows: list[Row], title: str, path: Path) -> None:
    """Draw one bar a path, the fastest at the top, with how it compares to the baseline, and a tick for the clock."""
    rows = sorted(rows, key=time_of, reverse=True)
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.5), layout="constrained")
    times = [time_of(row) for row in rows]
    twice = len({row["path"] for row in rows}) < len(rows)  # then the type tells them apart
    names = [f"{row['path']}, {row['dtype']}" if twice else row["path"] for row in rows]
    axes.barh(names, times, color=[COLOURS.get(row["path"], OTHER) for row in rows])
    clock = [float(row["median"]) for row in rows]
    axes.plot(clock, range(len(rows)), "|", color="#222222", markersize=14, label="median by the clock")
    kind = "cpu_ratio" if rows[0]["threads"] == "1" else "ratio"
    for i, row in enumerate(rows):
        said = compared(row, kind)
        text = f"{shown(times[i])}  ({said})" if said else shown(times[i])
        axes.annotate(text, (max(times[i], clock[i]), i), xytext=(6, 0), textcoords="offset points", va="center",
                      fontsize=9)  # fmt: skip
    axes.set_xlim(0, 1.45 * max(times + clock))
    axes.set_xlabel(f"{rows[0]['unit']}, {measure(rows[0])}")
    axes.legend(fontsize=8, loc="upper right")
    finish(figure, title, rows, path)


def measure(row: Row) -> str:
    return "own time of the process" if row["threads"] == "1" else "by the clock"


def curves(rows: list[Row], axis: str, limits: dict[tuple[str, str], float], path: Path) -> None:
    """Draw each path over one axis of the shape, with the least time that the machine allows."""
    figure, axes = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    clock = axis == "threads"
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        time = float(row["median"]) if clock else time_of(row)
        lines.setdefault(row["path"], []).append((place(row, axis), time))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name, color=COLOURS.get(name, OTHER))
    for dtype, style in (("float32", "--"), ("bfloat16", ":")):
        points = sorted({(place(row, axis), least(row, dtype, limits)) for row in rows if row["dtype"] == dtype})
        if points and not any(math.isnan(y) for _, y in points):
            axes.plot(*zip(*points, strict=True), style, color="#222222", label=f"plain at the machine's rate, {dtype}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({place(row, axis) for row in rows})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_xlabel(NAMES.get(axis, axis))
    axes.set_ylabel(f"{rows[0]['unit']}, {'by the clock' if clock else measure(rows[0])}")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    finish(figure, rows[0]["what"], rows, path)


def growth(rows: list[Row], path: Path) -> None:
    """Draw what the decode command took in time and memory, beside time in proportion to the size."""
    kinds = {over: [row for row in rows if row["over"] == over] for over in dict.fromkeys(row["over"] for row in rows)}
    figure, panels = plt.subplots(2, len(kinds), figsize=(4.6 * len(kinds), 5.4), layout="constrained", squeeze=False)
    for (over, members), (above, below) in zip(kinds.items(), panels.T, strict=True):
        x, seconds, peaks = ([float(row[k]) for row in members] for k in ("size", "seconds", "peak_mib"))
        above.plot(x, seconds, "o-", color=COLOURS["las_fast"], label="decode, seconds")
        above.plot(x, [seconds[0] * size / x[0] for size in x], ":", color="#222222", label="in proportion")
        below.plot(x, peaks, "o-", color=OTHER, label="peak memory, MiB")
        above.set_yscale("log")
        above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_major_formatter("{x:g}")
        above.minorticks_off()
        below.set_ylim(0, 1.2 * max(peaks))
        below.set_xlabel(over)
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [f"{size:g}" for size in x])
            axes.legend(fontsize=8, loc="upper left" if axes is above else "lower right")
    finish(figure, "decode, by the untrained preset speech13h with its beam and CTC", rows, path)


def place(row: Row, axis: str) -> float:
    """Return where a row lies on an axis."""
    return float(row["threads"]) if axis == "threads" else float(sizes(row["shape"])[AXES[axis]])


def sizes(shape: str) -> dict[str, int]:
    return {letter: int(number) for letter, number in re.findall(r"\b([A-Z])(\d+)\b", shape)}


def least(row: Row, dtype: str, limits: dict[tuple[str, str], float]) -> float:
    """Return the unit's least value for a beam search step of an utterance; nan for anything else.

    Its products at the machine's best rate, or reading its keys and values once, whichever takes longer.
    """
    n = sizes(row["shape"])
    rates = [limits.get((what, dtype), 0.0) for what in ("matrix products", "matrix products by oneDNN")]
    bandwidth = limits.get(("memory bandwidth", "float32"), 0.0)
    if not row["what"].startswith("beam search") or not max(rates) or not bandwidth:
        return math.nan
    H, T = n["H"], n["T"]
    products = 12 * H * H + 8 * H * H + KEYS * H + 2 * H * H + H * n["V"] + T * (KEYS + H)
    operations = 2 * n["K"] * products / int(row["threads"])
    bytes_read = T * (KEYS + H) * (2 if dtype == "bfloat16" else 4)
    return max(operations / max(rates), bytes_read / bandwidth) * 1e-3  # of giga and of micro


def finish(figure, title: str, rows: list[Row], path: Path) -> None:
    loads = [float(row["load"]) for row in rows]
    row = rows[0]
    threads = "/".join(sorted({r["threads"] for r in rows}))
    about = f"{row['machine']}, torch {row['torch']}, {threads} thread(s), commit {row['commit']}"
    busy = f"other programs kept {min(loads):.1f} to {max(loads):.1f} cores busy"
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.supxlabel(f"{about}\n{busy}", fontsize=7, x=0.01, ha="left", color="#555555")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(rows: list[Row], limits: dict[tuple[str, str], float], folder: Path) -> list[Path]:
    """Draw every picture that the rows allow; return the files."""
    found = []
    for (what, shape, threads), members in groups([row for row in rows if not axis_of(row["what"])]).items():
        found.append(folder / f"{named(what)}-{named(shape)}-{threads}.png")
        bars(members, f"{what}, {shape}", found[-1])
    for what in dict.fromkeys(row["what"] for row in rows if axis_of(row["what"])):
        found.append(folder / f"{named(what)}.png")
        curves([row for row in rows if row["what"] == what], axis_of(what), limits, found[-1])
    return found


def named(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("--machine", default=record.machine(), help="whose rows (default: this one)")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the CSV files")
    parser.add_argument("--plots", type=Path, default=PLOTS, help="folder of the pictures")
    options = parser.parse_args(words)
    rows = [row for file in FILES for row in record.read(options.results / f"{file}.csv")]
    rows = latest(rows, options.machine)
    if not rows:
        print(f"{options.results} has no rows of {options.machine}; run: pytest benchmarks --record")
        return
    print(table(rows))
    reached = record.read(options.results / "shares.csv")
    if found := latest(reached, options.machine, ("part", "task", "dtype", "shape")):
        print(f"\n{shares(found)}")
    limits = machine.limits(record.read(options.results / "machine.csv"), options.machine)
    pictures = draw(rows, limits, options.plots)
    if grown := last_growth(record.read(options.results / "growth.csv"), options.machine):
        pictures.append(options.plots / "growth.png")
        growth(grown, pictures[-1])
    print("\n".join(map(str, pictures)))


if __name__ == "__main__":
    main()
