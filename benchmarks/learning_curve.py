"""How errors fall with the hours of training speech, and what that promises for more: a fit, and predictions from it.

    python -m benchmarks.learning_curve runs/1h runs/3h runs/6h speech13h --data ROOT [--record]
    python -m benchmarks.learning_curve

Checkpoints are of trainings that differ in data.hours (and in epochs, so that each sees enough). The first form decodes
the dev split with each, greedily and as its settings say; --record keeps the rows in learning_curve.csv. Both forms
print a table and draw the picture of what is recorded. The fit is error = c * hours ** -slope, least squares of the
logarithms; a prediction's range is that of the fits that each leave one training out.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import record
from las_fast.checkpoint import Loaded, load_model
from las_fast.cli import run
from las_fast.data.dataset import Corpus, open_corpus
from las_fast.errors import InputError
from las_fast.files import write_atomically
from las_fast.output.metrics import score
from las_fast.search.ngram import language_table
from las_fast.tune import decode_grid, open_split

FILE = record.RESULTS / "learning_curve.csv"
PICTURE = record.RESULTS / "plots" / "learning-curve.png"
COLUMNS = ("date", "commit", "checkpoint", "data", "hours", "epochs", "way", "utterances", "ld", "cer", "wer")
PREDICTED = (100.0, 460.0)  # hours: train-clean-100, and with train-clean-360
COLOURS = ("#b5651d", "#0b6e4f", "#4f6d9a")


def hours_of(loaded: Loaded, corpus: Corpus) -> float:
    """Return the hours that a model was trained on: data.hours, or all of the corpus's training splits."""
    if loaded.config.data.hours:
        return loaded.config.data.hours
    splits = loaded.config.data.train or corpus.resolve("train")
    seconds = [u.seconds for split in splits for u in corpus.utterances(split)]
    if None in seconds:
        raise InputError(f"{corpus.root} does not say how long its recordings are; add the column seconds")
    return sum(seconds) / 3600


def measure(name: str, options: argparse.Namespace) -> list[tuple]:
    """Return rows of COLUMNS for a checkpoint: greedy, and by its own settings."""
    loaded, corpus = load_model(name), open_corpus(options.data)
    about = (Path(name).name, Path(options.data).resolve().name, f"{hours_of(loaded, corpus):.3g}")
    own = loaded.config.decoding
    ways = {"greedy": replace(own, beam=1, ctc_weight=0.0, ngram_weight=0.0), "beam and CTC": own}
    options.split = "dev"
    dataset = open_split(options, loaded)
    table = language_table(None, own, loaded, "cpu")
    rows = []
    for way, texts in zip(ways, decode_grid(loaded, dataset, list(ways.values()), table, "cpu"), strict=True):
        found = score(dataset.texts, texts)
        scores = (f"{value:.3f}" for value in (found.ld, found.cer, found.wer))
        rows.append((*record.where()[:2], *about, loaded.config.training.epochs, way, found.utterances, *scores))
    return rows


def fit(hours: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """Return (c, slope) of errors = c * hours ** -slope."""
    slope, log_c = np.polyfit(np.log(hours), np.log(errors), 1)
    return float(np.exp(log_c)), float(-slope)


def predict(hours: np.ndarray, errors: np.ndarray, at: float) -> tuple[float, float, float]:
    """Return the fit's error at `at` hours, and the least and the most of the fits that leave a point out."""
    every = np.arange(len(hours))
    kept = [every] + [every[every != left] for left in every if len(hours) > 2]
    found = [c * at**-slope for c, slope in (fit(hours[some], errors[some]) for some in kept)]
    return found[0], min(found), max(found)


def points(rows: list[dict[str, str]], way: str, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return hours and errors of a way of decoding; of two trainings on as many hours the last counts."""
    found = {float(row["hours"]): float(row[what]) for row in rows if row["way"] == way}
    return np.array(sorted(found)), np.array([found[hours] for hours in sorted(found)])


def table(rows: list[dict[str, str]]) -> str:
    """Return Markdown: a line for each way and measure, measured first, then predicted."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    measured = points(rows, ways[0], "cer")[0]
    heads = [*(f"{hours:g} h" for hours in measured), *(f"{at:g} h, predicted" for at in PREDICTED), "slope"]
    lines = [f"| dev | {' | '.join(heads)} |", f"|{(len(heads) + 1) * '---|'}"]
    for what in ("cer", "ld"):
        for way in ways:
            hours, errors = points(rows, way, what)
            cells = [f"{error:.1f}" for error in errors]
            for at in PREDICTED:
                cells.append("{:.1f} ({:.1f} to {:.1f})".format(*predict(hours, errors, at)))
            cells.append(f"{fit(hours, errors)[1]:.2f}")
            lines.append(f"| {what.upper()}{', %' if what == 'cer' else ''}, {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, rows: list[dict[str, str]]) -> None:
    """Write a PNG: CER over hours on two logarithmic axes; what is predicted is dashed and hollow."""
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
        ends = np.array([hours[-1], PREDICTED[-1]])
        axes.plot(ends, c * ends**-slope, "--", color=colour, linewidth=1)
        for at in PREDICTED:
            middle, low, high = predict(hours, errors, at)
            ends = [[middle - low], [high - middle]]
            axes.errorbar([at], [middle], ends, fmt="o", mfc="white", color=colour, capsize=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [*points(rows, rows[0]["way"], "cer")[0], *PREDICTED]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("hours of training speech (hollow: predicted, not measured)")
    axes.set_ylabel("dev CER, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_figure(path, format="png", dpi=110)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning_curve", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="*", help="training folders, files or names")
    parser.add_argument("--data", help="as for las_fast.decode")
    parser.add_argument("--record", action="store_true", help=f"append the rows to {FILE.name}")
    options = parser.parse_args(words)
    if options.checkpoints and not options.data:
        raise InputError("checkpoints are measured on --data ROOT; give it")
    found = [row for name in options.checkpoints for row in measure(name, options)]
    if options.record:
        record.append(FILE, COLUMNS, found)
        found = []
    rows = record.read(FILE) + [dict(zip(COLUMNS, map(str, row), strict=True)) for row in found]
    if len({row["hours"] for row in rows}) < 2:
        raise InputError(f"a curve needs trainings on two different amounts of speech; {FILE.name} and this have fewer")
    print(table(rows))
    write_atomically(PICTURE, lambda path: draw(path, rows))


if __name__ == "__main__":
    run(main)
