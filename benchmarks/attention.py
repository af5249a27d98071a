"""The attention of one utterance at several epochs of trainings, side by side in one picture.

python -m benchmarks.attention runs/a@1 runs/a@15 runs/b@200 --out attention.png [--utterance 1]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from las_fast.cli import run
from las_fast.errors import InputError
from las_fast.files import write_atomically
from las_fast.output.figures import label_tokens
from las_fast.training.report import attention_of, epoch_of


def panel(words: str, utterance: int) -> tuple[float, str, np.ndarray]:
    """Return (epoch, text, weights) of the dev utterance that RUN@EPOCH drew as its `utterance`-th."""
    run, _, epoch = words.rpartition("@")
    paths = {epoch_of(path): path for path in Path(run, "attention").glob("epoch-*.npz")}
    if not epoch or float(epoch) not in paths:
        known = ", ".join(f"{e:g}" for e in sorted(paths)) or "none"
        raise InputError(f"{words}: expected RUN@EPOCH of a validation; the epochs drawn there are {known}")
    _, drawn = attention_of(paths[float(epoch)])
    _, text, weights = drawn[utterance]
    return float(epoch), text, weights


def draw(path: Path, panels: list[tuple[float, str, np.ndarray]]) -> None:
    """Write a PNG: characters from top to bottom, encoder frames from left to right, an epoch a panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    text = panels[0][1]
    figure = Figure(figsize=(3.1 * len(panels) + 0.6, 1.0 + 0.13 * len(text)), layout="constrained")
    side_by_side = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axes, (epoch, _, weights) in zip(side_by_side, panels, strict=True):
        axes.imshow(weights, aspect="auto", interpolation="nearest", cmap="magma", vmin=0.0)
        axes.set_title(f"epoch {epoch:g}", fontsize=9)
        axes.set_xlabel("encoder frame", fontsize=8)
        axes.tick_params(labelsize=7)
    label_tokens(figure.axes[0], text, len(panels[0][2]), fontsize=6)
    FigureCanvasAgg(figure).print_figure(path, format="png", dpi=110)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.split("\n")[0])
    parser.add_argument("panels", nargs="+", metavar="RUN@EPOCH")
    parser.add_argument("--utterance", type=int, default=0, help="which of the utterances drawn (default: the first)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    options = parser.parse_args(words)
    found = [panel(words, options.utterance) for words in options.panels]
    write_atomically(options.out, lambda path: draw(path, found))


if __name__ == "__main__":
    run(main)
