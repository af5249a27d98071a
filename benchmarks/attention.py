"""Draw the attention of one dev utterance at several epochs, side by side in one picture.

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
from las_fast.training.runs import Run, epoch_of, read_attention

Panel = tuple[float, str, np.ndarray, float | None]  # epoch, text, weights (U, T), seconds of a column if known


def load_panel(name: str, utterance: int) -> Panel:
    """Load the attention that a training saved at one epoch.

    Args:
        name:      RUN@EPOCH: a training folder and the epoch of one of its validations.
        utterance: index among the dev utterances whose attention was saved.

    Raises:
        InputError: the training has no attention of that epoch.
    """
    run, _, epoch = name.rpartition("@")
    paths = {epoch_of(path): path for path in Path(run, "attention").glob("epoch-*.npz")}
    if not epoch or float(epoch) not in paths:
        known = ", ".join(f"{e:g}" for e in sorted(paths)) or "none"
        raise InputError(f"{name}: expected RUN@EPOCH with the epoch of a validation; available epochs: {known}")
    _, saved = read_attention(paths[float(epoch)])
    _, text, weights = saved[utterance]
    return float(epoch), text, weights, Run(Path(run), run, []).frame_seconds


def draw(path: Path, panels: list[Panel]) -> None:
    """Write a PNG with one panel per epoch: characters from top to bottom, seconds from left to right.

    All panels have the same colours, from 0 to 1.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    text = panels[0][1]
    figure = Figure(figsize=(3.1 * len(panels) + 0.6, 1.0 + 0.13 * len(text)), layout="constrained")
    side_by_side = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axes, (epoch, _, weights, seconds) in zip(side_by_side, panels, strict=True):
        image = axes.imshow(
            weights, aspect="auto", interpolation="nearest", cmap="magma", vmin=0.0, vmax=1.0,
            extent=(0.0, weights.shape[1] * (seconds or 1.0), len(weights) - 0.5, -0.5),
        )  # fmt: skip
        axes.set_title(f"epoch {epoch:g}", fontsize=9)
        axes.set_xlabel("seconds" if seconds else "encoder frame", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.colorbar(image, ax=side_by_side, pad=0.01, fraction=0.02, aspect=40).ax.tick_params(labelsize=7)
    label_tokens(side_by_side[0], text, len(panels[0][2]), fontsize=6)
    FigureCanvasAgg(figure).print_figure(path, format="png", dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.split("\n")[0])
    parser.add_argument("panels", nargs="+", metavar="RUN@EPOCH", help="training folder and epoch of a validation")
    parser.add_argument("--utterance", type=int, default=0, help="index among the saved utterances (default: 0)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    options = parser.parse_args(argv)
    panels = [load_panel(name, options.utterance) for name in options.panels]
    write_atomically(options.out, lambda path: draw(path, panels))


if __name__ == "__main__":
    run(main)
