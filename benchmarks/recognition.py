"""Summarise a training as a row of benchmarks/results/recognition.csv: what was tried, and its scores.

    python -m benchmarks.recognition RUN --data NAME --what "speed perturbation 0.15 instead of 0.1" [--record]
    python -m benchmarks.recognition --table

Scores are those of the validations: greedy decoding of the dev split. "formed" is the first epoch from which on the
monitor says "formed" at every validation. --record also appends the validations, with the monitor's values, to
benchmarks/results/validations.csv. --table also draws all recorded validations to benchmarks/results/plots/monitor.png.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.rows import RESULTS, append_rows, context, read_rows
from las_fast import checkpoint
from las_fast.cli import run
from las_fast.config import from_yaml
from las_fast.errors import InputError
from las_fast.files import write_atomically
from las_fast.training import runlog
from las_fast.training.monitor import THRESHOLDS

FILE = RESULTS / "recognition.csv"
VALIDATIONS = RESULTS / "validations.csv"
PICTURE = RESULTS / "plots" / "monitor.png"
VALIDATION_COLUMNS = ("run", "data", "epoch", "loss", "cer", *THRESHOLDS)
VERDICT_COLOURS = {False: "#d1495b", True: "#0b6e4f"}  # by formed
COLUMNS = ("date", "commit", "run", "what", "data", "seed", "parameters_m", "epochs", "core_hours", "formed",
           "cer_before_formed", "cer_when_formed", "cer_best", "ld_best", "cer_last")  # fmt: skip
TABLE_HEADS = {
    "what": "what was tried",
    "data": "data",
    "seed": "seed",
    "parameters_m": "M parameters",
    "epochs": "epochs",
    "core_hours": "core hours",
    "formed": "formed at epoch",
    "cer_before_formed": "CER before",
    "cer_when_formed": "CER then",
    "cer_best": "best CER, greedy",
}


def read_validations(run: Path) -> list[dict]:
    """Return the log rows of the validations of a run folder.

    Raises:
        InputError: the folder has no log or no validation yet, or a validation lacks scores or the monitor's values.
    """
    log = run / "log.jsonl"
    if not log.is_file():
        raise InputError(f"{log} does not exist; give a run folder")
    rows = [row for row in runlog.read_rows(log) if row["kind"] == "valid"]
    if not rows:
        raise InputError(f"{run} has no validation yet; wait for the first one")
    for row in rows:
        values = [row.get("epoch"), row.get("loss"), row.get("cer"), row.get("ld")]
        values += [(row.get("monitor") or {}).get(name) for name in THRESHOLDS]
        if any(not isinstance(value, int | float) for value in values):
            raise InputError(
                f"the validation at step {row['step']} of {run} lacks scores or values of the monitor, such as the "
                "audio gain, which needs two dev utterances in a batch; summarise another training"
            )
    return rows


def formed(values: Mapping[str, float | str]) -> bool:
    """Return the monitor's verdict by its current thresholds, which may differ from those at the time."""
    return all(float(values[name]) >= threshold for name, threshold in THRESHOLDS.items())


def first_formed(rows: list[dict]) -> int:
    """Return the index of the validation from which on the attention is formed; len(rows) if it is not at the end."""
    first = len(rows)
    while first and formed(rows[first - 1]["monitor"]):
        first -= 1
    return first


def validation_rows(run: Path, data: str) -> list[tuple]:
    """Return a row of VALIDATION_COLUMNS for each validation of a training."""
    return [(run.name, data, f"{row['epoch']:g}", f"{row['loss']:.3f}", f"{row['cer']:.2f}",
             *(f"{row['monitor'][name]:.3f}" for name in THRESHOLDS)) for row in read_validations(run)]  # fmt: skip


def summary_row(run: Path, *, what: str, data: str) -> tuple:
    """Return a row of COLUMNS for a training."""
    rows, config = read_validations(run), from_yaml((run / "config.yaml").read_text(encoding="utf-8"), str(run))
    first, best = first_formed(rows), min(rows, key=lambda row: row["cer"])
    parameters = sum(p.numel() for p in checkpoint.build_model(config).parameters()) / 1e6
    cer_before = f"{rows[first - 1]['cer']:.2f}" if first else ""
    epoch = cer_formed = ""
    if first < len(rows):
        epoch, cer_formed = f"{rows[first]['epoch']:g}", f"{rows[first]['cer']:.2f}"
    scores = (f"{best['cer']:.2f}", f"{best['ld']:.3f}", f"{rows[-1]['cer']:.2f}")
    labels = (run.name, what, data, config.training.seed, f"{parameters:.1f}", f"{rows[-1]['epoch']:g}")
    core_hours = f"{rows[-1].get('core_hours', float('nan')):.2f}"
    return (*context()[:2], *labels, core_hours, epoch, cer_before, cer_formed, *scores)


def table(rows: list[dict[str, str]]) -> str:
    """Return a Markdown table with a line per training."""
    lines = [f"| {' | '.join(TABLE_HEADS.values())} |", f"|{len(TABLE_HEADS) * '---|'}"]
    lines += [f"| {' | '.join(row[name] for name in TABLE_HEADS)} |" for row in rows]
    return "\n".join(lines)


def verdict_table(rows: list[dict[str, str]]) -> str:
    """Return a Markdown table of all validations, grouped by the monitor's verdict."""
    lines = ["| monitor | validations | dev loss per token: minimum, median, maximum | greedy CER, median |",
             "|---|---|---|---|"]  # fmt: skip
    for name, verdict in (("not formed", False), ("formed", True)):
        members = [row for row in rows if formed(row) == verdict]
        losses, cers = ([float(row[key]) for row in members] for key in ("loss", "cer"))
        spread = [f"{f(losses):.2f}" for f in (min, statistics.median, max)] if members else []
        median = f"{statistics.median(cers):.0f}%" if members else ""
        lines.append(f"| {name} | {len(members)} | {', '.join(spread)} | {median} |")
    return "\n".join(lines)


def corpus_of(row: dict[str, str]) -> str:
    """Return the first word of the data of a row, such as "an4" for "an4, half of it"."""
    return (row["data"].replace(",", " ").split() or ["unnamed data"])[0]


def draw(path: Path, rows: list[dict[str, str]]) -> None:
    """Write a PNG of the dev loss over epochs, a line per training, with dots coloured by the monitor's verdict."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    corpora = list(dict.fromkeys(map(corpus_of, rows)))
    figure = Figure(figsize=(5.2 * len(corpora), 4.2), layout="constrained")
    for axes, corpus in zip(np.atleast_1d(figure.subplots(1, len(corpora), sharey=True)), corpora, strict=True):
        runs: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            if corpus_of(row) == corpus:
                runs.setdefault(row["run"], []).append(row)
        for members in runs.values():
            _draw_run(axes, members)
        axes.set_title(f"{corpus}, {len(runs)} trainings", fontsize=10, loc="left")
        axes.set_xlabel("epoch")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:g}"[0] in "25" else "")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("dev loss per token, teacher-forced")
    for verdict, colour in VERDICT_COLOURS.items():
        figure.axes[-1].plot([], [], "o", color=colour, markersize=5, label="formed" if verdict else "not formed")
    figure.axes[-1].legend(fontsize=8, title="monitor", title_fontsize=8)
    FigureCanvasAgg(figure).print_figure(path, format="png", dpi=110)


def _draw_run(axes, members: list[dict[str, str]]) -> None:
    epochs, losses = ([float(row[key]) for row in members] for key in ("epoch", "loss"))
    axes.plot(epochs, losses, "-", color="#cccccc", linewidth=1, zorder=1)
    axes.scatter(epochs, losses, s=14, color=[VERDICT_COLOURS[formed(row)] for row in members], zorder=2)


def record(row: Sequence) -> bool:
    """Append a row to recognition.csv, unless it has one of the same run and change; return whether it was appended."""
    named = dict(zip(COLUMNS, row, strict=True))
    if any((old["run"], old["what"]) == (named["run"], named["what"]) for old in read_rows(FILE)):
        return False
    append_rows(FILE, COLUMNS, [row])
    return True


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recognition", description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="run folder of a training")
    parser.add_argument("--what", default="", help="the change that is tried, and the training to compare with")
    parser.add_argument("--data", default="", help="name of the training data")
    parser.add_argument(
        "--record", action="store_true", help=f"append to {FILE.name} and {VALIDATIONS.name} of benchmarks/results"
    )
    parser.add_argument(
        "--table", action="store_true", help=f"print the recorded rows as Markdown; draw {PICTURE.name}"
    )
    options = parser.parse_args(argv)
    if not options.run and not options.table:
        parser.error("give a run folder, --table, or both")
    if options.run:
        row = summary_row(options.run, what=options.what, data=options.data)
        print("\n".join(f"{name:<20}{value}" for name, value in zip(COLUMNS, row, strict=True)))
        if options.record and record(row):
            append_rows(VALIDATIONS, VALIDATION_COLUMNS, validation_rows(options.run, options.data))
        elif options.record:
            print(f"nothing appended: {FILE.name} has a row of this run and --what")
    if options.table:
        print(table(read_rows(FILE)))
        rows = read_rows(VALIDATIONS)
        print(f"\n{verdict_table(rows)}")
        write_atomically(PICTURE, lambda path: draw(path, rows))


if __name__ == "__main__":
    run(main)
