"""Fit the error rate as a function of the hours of training speech, and predict it for more hours.

    python -m benchmarks.learning_curve runs/1h runs/3h runs/6h runs/12h --data ROOT [--record]
    python -m benchmarks.learning_curve

The checkpoints differ in data.hours, and in epochs so that each is trained long enough. The first form decodes the dev
split with each checkpoint, greedily and with its own settings, and prints the curve of these and of the recorded rows
of that corpus; --record appends the rows to learning_curve.csv. The second form prints the curve of the recorded rows,
of the corpus of the last one. The picture shows recorded rows only. The fit is error = c * hours ** -slope, by least
squares on logarithms. The range of a prediction is that of the fits that leave out one training each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.rows import RESULTS, append_rows, context, read_rows
from benchmarks.splits import scored_split
from las_fast.checkpoint import Loaded, current_name, load_model
from las_fast.cli import run
from las_fast.errors import InputError
from las_fast.files import write_atomically
from las_fast.output.metrics import score
from las_fast.search.grid import decode_grid
from las_fast.search.ngram import load_ngram_model
from las_fast.splits import add_utterance_options

FILE = RESULTS / "learning_curve.csv"
PICTURE = RESULTS / "plots" / "learning-curve.png"
COLUMNS = ("date", "commit", "checkpoint", "data", "hours", "epochs", "way", "utterances", "ld", "cer", "wer")
PREDICTED_HOURS = (100.0, 460.0)  # train-clean-100, and with train-clean-360
COLOURS = ("#b5651d", "#0b6e4f", "#4f6d9a")


def training_hours(loaded: Loaded) -> float:
    """Return the hours of speech that a model was trained on; raise InputError if its checkpoint does not say it."""
    hours = loaded.info.get("speech_hours") or loaded.config.data.hours
    if not hours:
        raise InputError(f"checkpoint {loaded.path} does not say on how many hours it was trained; train it again")
    return hours


def measure(name: str, options: argparse.Namespace) -> list[tuple]:
    """Return rows of COLUMNS for a checkpoint: decoded greedily, and with its own settings."""
    loaded = load_model(name)
    labels = (Path(name).name, corpus_label(options.data), f"{training_hours(loaded):.3g}")
    decoding = loaded.config.decoding
    ways = {"greedy": decoding.greedy(), "beam and CTC": decoding}
    dataset = scored_split(options, loaded)
    ngram = load_ngram_model(None, decoding, loaded, "cpu")
    rows = []
    for way, texts in zip(ways, decode_grid(loaded, dataset, list(ways.values()), ngram, "cpu"), strict=True):
        scores = score(dataset.texts, texts)
        values = (f"{value:.3f}" for value in (scores.ld, scores.cer, scores.wer))
        rows.append((*context()[:2], *labels, loaded.config.training.epochs, way, scores.utterances, *values))
    return rows


def corpus_label(data: str) -> str:
    """Return the name of a corpus in the column `data`."""
    return Path(data).resolve().name


def of_one_corpus(rows: list[dict[str, str]], data: str | None) -> list[dict[str, str]]:
    """Return the rows of the corpus `data`, or of the last row's corpus if it is None."""
    label = corpus_label(data) if data else rows[-1]["data"] if rows else ""
    return [row for row in rows if row["data"] == label]


def fit(hours: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """Return (c, slope) of the fit errors = c * hours ** -slope."""
    slope, log_c = np.polyfit(np.log(hours), np.log(errors), 1)
    return float(np.exp(log_c)), float(-slope)


def predict(hours: np.ndarray, errors: np.ndarray, at: float) -> tuple[float, float, float]:
    """Return (prediction, low, high) of the error at `at` hours.

    low and high are the range of the predictions of all fits: of all points, and without each point in turn. Two points
    have only one fit.
    """
    indices = np.arange(len(hours))
    subsets = [indices] + [indices[indices != i] for i in indices if len(hours) > 2]
    predictions = [c * at**-slope for c, slope in (fit(hours[subset], errors[subset]) for subset in subsets)]
    return predictions[0], min(predictions), max(predictions)


def points(rows: list[dict[str, str]], way: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the hours (N,), ascending, and the errors (N,) of one decoding; of rows with equal hours, the last one."""
    errors = {float(row["hours"]): float(row[metric]) for row in rows if row["way"] == way}
    return np.array(sorted(errors)), np.array([errors[hours] for hours in sorted(errors)])


def table(rows: list[dict[str, str]]) -> str:
    """Return a Markdown table with a line per metric and decoding: measured errors, predictions, and the slope."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    measured = points(rows, ways[0], "cer")[0]
    heads = [*(f"{hours:g} h" for hours in measured), *(f"{at:g} h, predicted" for at in PREDICTED_HOURS), "slope"]
    lines = [f"| dev | {' | '.join(heads)} |", f"|{(len(heads) + 1) * '---|'}"]
    for metric in ("cer", "ld"):
        for way in ways:
            hours, errors = points(rows, way, metric)
            cells = [f"{error:.1f}" for error in errors]
            for at in PREDICTED_HOURS:
                cells.append("{:.1f} ({:.1f} to {:.1f})".format(*predict(hours, errors, at)))
            cells.append(f"{fit(hours, errors)[1]:.2f}")
            lines.append(f"| {metric.upper()}{', %' if metric == 'cer' else ''}, {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, rows: list[dict[str, str]]) -> None:
    """Write a PNG of CER over hours on logarithmic axes; dashed lines and hollow points are predictions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for way, colour in zip(dict.fromkeys(row["way"] for row in rows), COLOURS, strict=False):
        hours, errors = points(rows, way, "cer")
        c, slope = fit(hours, errors)
        axes.plot(hours, errors, "o", color=colour, label=way)
        ends = np.array([hours[0], hours[-1]])
        axes.plot(ends, c * ends**-slope, "-", color=colour, linewidth=1)
        ends = np.array([hours[-1], PREDICTED_HOURS[-1]])
        axes.plot(ends, c * ends**-slope, "--", color=colour, linewidth=1)
        for at in PREDICTED_HOURS:
            middle, low, high = predict(hours, errors, at)
            ends = [[middle - low], [high - middle]]
            axes.errorbar([at], [middle], ends, fmt="o", mfc="white", color=colour, capsize=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [*points(rows, rows[0]["way"], "cer")[0], *PREDICTED_HOURS]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("hours of training speech (hollow: predicted, not measured)")
    axes.set_ylabel("dev CER, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_figure(path, format="png", dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning_curve", description=__doc__.split("\n")[0])
    parser.add_argument(
        "checkpoints", nargs="*", type=current_name, help="run folders, checkpoint files or released names"
    )
    parser.add_argument("--data", help="corpus of the dev split, as for las_fast.decode")
    parser.add_argument("--record", action="store_true", help=f"append the rows to benchmarks/results/{FILE.name}")
    add_utterance_options(parser)
    parser.set_defaults(split="dev")
    options = parser.parse_args(argv)
    if options.checkpoints and not options.data:
        raise InputError("the checkpoints decode the dev split of a corpus; give it with --data ROOT")
    new_rows = [row for name in options.checkpoints for row in measure(name, options)]
    if options.record:
        append_rows(FILE, COLUMNS, new_rows)
        new_rows = []
    rows = read_rows(FILE) + [dict(zip(COLUMNS, map(str, row), strict=True)) for row in new_rows]
    rows = of_one_corpus(rows, options.data)
    if (amounts := len({row["hours"] for row in rows})) < 2:
        raise InputError(f"a curve needs trainings on two different amounts of speech, but {FILE.name} and the "
                         f"checkpoints given have {amounts}; add a checkpoint of another data.hours")  # fmt: skip
    print(table(rows))
    if not new_rows:
        write_atomically(PICTURE, lambda path: draw(path, rows))


if __name__ == "__main__":
    run(main)
