"""What a training tried and what came of it: a row of benchmarks/results/recognition.csv, read off its folder.

    python -m benchmarks.recognition RUN --data NAME --what "speed perturbation 0.15 instead of 0.1" [--record]
    python -m benchmarks.recognition --table

Scores are those of the validations: greedy, on the dev split. "formed" is the first epoch from which the attention
monitor says of every validation that the attention has formed. --record also adds the validations, with the monitor's
numbers, to benchmarks/results/validations.csv; --table draws all of them into benchmarks/results/plots/monitor.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks import record
from las_fast import checkpoint
from las_fast.cli import run
from las_fast.config import from_yaml
from las_fast.errors import InputError
from las_fast.files import write_atomically
from las_fast.training.monitor import THRESHOLDS

FILE = record.RESULTS / "recognition.csv"
VALIDATIONS = record.RESULTS / "validations.csv"
PICTURE = record.RESULTS / "plots" / "monitor.png"
NUMBERS = ("run", "data", "epoch", "loss", "cer", *THRESHOLDS)
SAID = {False: "#d1495b", True: "#0b6e4f"}  # colours of the monitor's verdicts
COLUMNS = ("date", "commit", "run", "what", "data", "seed", "parameters_m", "epochs", "core_hours", "formed",
           "cer_before_formed", "cer_when_formed", "cer_best", "ld_best", "cer_last")  # fmt: skip
SHOWN = {"what": "what was tried", "data": "data", "seed": "seed", "parameters_m": "M parameters", "epochs": "epochs",
         "core_hours": "core hours", "formed": "formed at epoch", "cer_before_formed": "CER before",
         "cer_when_formed": "CER then", "cer_best": "best CER, greedy"}  # fmt: skip


def validations(run: Path) -> list[dict]:
    """Return the rows of a training's validations."""
    log = run / "log.jsonl"
    if not log.is_file():
        raise InputError(f"{log} does not exist; give the folder of a training")
    lines = log.read_text(encoding="utf-8").splitlines()
    found = [row for row in map(json.loads, lines) if row["kind"] == "valid"]
    if not found:
        raise InputError(f"{run} has no validation yet; wait for its first")
    return found


def formed(numbers: Mapping[str, float | str]) -> bool:
    """Return what the monitor says of these numbers, whatever its thresholds were when they were measured."""
    return all(float(numbers[name]) >= least for name, least in THRESHOLDS.items())


def since_formed(rows: list[dict]) -> int:
    """Return the first validation from which all say that the attention has formed; their number where none does."""
    first = len(rows)
    while first and formed(rows[first - 1]["monitor"]):
        first -= 1
    return first


def numbers_of(run: Path, data: str) -> list[tuple]:
    """Return rows of NUMBERS: the validations of a training."""
    return [(run.name, data, f"{row['epoch']:g}", f"{row['loss']:.3f}", f"{row['cer']:.2f}",
             *(f"{row['monitor'][name]:.3f}" for name in THRESHOLDS)) for row in validations(run)]  # fmt: skip


def row_of(run: Path, *, what: str, data: str) -> tuple:
    """Return a row of COLUMNS."""
    rows, config = validations(run), from_yaml((run / "config.yaml").read_text(encoding="utf-8"), str(run))
    first, best = since_formed(rows), min(rows, key=lambda row: row["cer"])
    parameters = sum(p.numel() for p in checkpoint.build_model(config).parameters()) / 1e6
    then = [f"{rows[first - 1]['cer']:.2f}" if first else "", ""]
    epoch = ""
    if first < len(rows):
        epoch, then[1] = f"{rows[first]['epoch']:g}", f"{rows[first]['cer']:.2f}"
    scores = (f"{best['cer']:.2f}", f"{best['ld']:.3f}", f"{rows[-1]['cer']:.2f}")
    about = (run.name, what, data, config.training.seed, f"{parameters:.1f}", f"{rows[-1]['epoch']:g}")
    date, commit = record.where()[:2]
    return (date, commit, *about, f"{rows[-1].get('core_hours', float('nan')):.2f}", epoch, *then, *scores)


def table(rows: list[dict[str, str]]) -> str:
    """Return Markdown."""
    lines = [f"| {' | '.join(SHOWN.values())} |", f"|{len(SHOWN) * '---|'}"]
    lines += [f"| {' | '.join(row[name] for name in SHOWN)} |" for row in rows]
    return "\n".join(lines)


def verdicts(rows: list[dict[str, str]]) -> str:
    """Return Markdown: the validations of all trainings by what the monitor says of them."""
    lines = ["| the monitor says | validations | dev loss a token: least, median, most | greedy CER, median |",
             "|---|---|---|---|"]  # fmt: skip
    for name, said in (("not formed", False), ("formed", True)):
        found = [row for row in rows if formed(row) == said]
        losses, cers = ([float(row[key]) for row in found] for key in ("loss", "cer"))
        spread = [f"{of(losses):.2f}" for of in (min, statistics.median, max)] if found else []
        middle = f"{statistics.median(cers):.0f}%" if found else ""
        lines.append(f"| {name} | {len(found)} | {', '.join(spread)} | {middle} |")
    return "\n".join(lines)


def draw(path: Path, rows: list[dict[str, str]]) -> None:
    """Write a PNG: the dev loss of each training over its epochs, filled where the monitor says "formed"."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row["data"].split(",")[0].split()[0] for row in rows))
    figure = Figure(figsize=(5.2 * len(kinds), 4.2), layout="constrained")
    for axes, kind in zip(np.atleast_1d(figure.subplots(1, len(kinds), sharey=True)), kinds, strict=True):
        runs: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            if row["data"].startswith(kind):
                runs.setdefault(row["run"], []).append(row)
        for members in runs.values():
            _draw_run(axes, members)
        axes.set_title(f"{kind}, {len(runs)} trainings", fontsize=10, loc="left")
        axes.set_xlabel("epoch")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("dev loss a token, teacher-forced")
    for said, colour in SAID.items():
        figure.axes[-1].plot([], [], "o", color=colour, markersize=5, label="formed" if said else "not formed")
    figure.axes[-1].legend(fontsize=8, title="the monitor says", title_fontsize=8)
    FigureCanvasAgg(figure).print_figure(path, format="png", dpi=110)


def _draw_run(axes, members: list[dict[str, str]]) -> None:
    epochs, losses = ([float(row[key]) for row in members] for key in ("epoch", "loss"))
    axes.plot(epochs, losses, "-", color="#cccccc", linewidth=1, zorder=1)
    axes.scatter(epochs, losses, s=14, color=[SAID[formed(row)] for row in members], zorder=2)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recognition", description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of a training")
    parser.add_argument("--what", default="", help="what was tried, against which other training")
    parser.add_argument("--data", default="", help="name of the data")
    parser.add_argument("--record", action="store_true", help=f"append the row to {FILE.name}")
    parser.add_argument("--table", action="store_true", help="print all rows as Markdown")
    options = parser.parse_args(words)
    if not options.run and not options.table:
        parser.error("give the folder of a training, --table, or both")
    if options.run:
        row = row_of(options.run, what=options.what, data=options.data)
        print("\n".join(f"{name:<20}{value}" for name, value in zip(COLUMNS, row, strict=True)))
        if options.record:
            record.append(FILE, COLUMNS, [row])
            record.append(VALIDATIONS, NUMBERS, numbers_of(options.run, options.data))
    if options.table:
        print(table(record.read(FILE)))
        found = record.read(VALIDATIONS)
        print(f"\n{verdicts(found)}")
        write_atomically(PICTURE, lambda path: draw(path, found))


if __name__ == "__main__":
    run(main)
