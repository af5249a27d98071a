"""Draw the attention of one dev utterance at several epochs, side by side in one picture.

    python -m benchmarks.attention runs/a@1 runs/a@15 runs/b@200 --out attention.png [--utterance 1]
    python -m benchmarks.attention runs/a@1 runs/a@15 an4 --data AN4 --out attention.png

A panel without an epoch is a checkpoint that spells the transcript of the first panel's utterance, read from --data.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from las_fast.attention import attend, find_utterance
from las_fast.cli import run
from las_fast.data.layouts import open_corpus
from las_fast.data.readers import read_utterance
from las_fast.errors import InputError
from las_fast.files import write_atomically
from las_fast.output.figures import label_tokens
from las_fast.recogniser import load
from las_fast.splits import check_fits
from las_fast.training.runs import Run, epoch_of, frame_seconds, read_attention


class Panel(NamedTuple):
    """The attention of one model on an utterance."""

    title: str
    id: str  # of the utterance
    text: str
    weights: np.ndarray  # (U, T)
    column_seconds: float | None  # None: unknown


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
    if not 0 <= utterance < len(saved):
        raise InputError(f"--utterance {utterance}: {name} has the attention of {len(saved)} utterances, from 0 on")
    return Panel(f"epoch {float(epoch):g}", *saved[utterance], Run(Path(run), run, []).frame_seconds)


def spell_panel(checkpoint: str, like: Panel, data: str) -> Panel:
    """Compute the attention of a checkpoint while it spells the text of another panel; the utterance is in `data`.

    Raises:
        InputError: the checkpoint, the data or the utterance does not exist, or they do not fit.
    """
    model = load(checkpoint, device="cpu")
    corpus = open_corpus(data)
    check_fits(corpus, model.loaded)
    config = model.loaded.config
    item = read_utterance(corpus, find_utterance(corpus, like.id, None), config.features)
    if item.frames is None:
        raise InputError(item.problem)
    _, weights = attend(model, torch.from_numpy(item.frames), text=like.text)
    return Panel(checkpoint, like.id, like.text, weights, frame_seconds(config))


def draw(path: Path, panels: list[Panel]) -> None:
    """Write a PNG with one panel per epoch: characters from top to bottom, seconds from left to right.

    All panels have the same colours, from 0 to 1.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    text = panels[0].text
    figure = Figure(figsize=(3.1 * len(panels) + 0.6, 1.0 + 0.13 * len(text)), layout="constrained")
    side_by_side = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axes, (title, _, _, weights, seconds) in zip(side_by_side, panels, strict=True):
        image = axes.imshow(
            weights, aspect="auto", interpolation="nearest", cmap="magma", vmin=0.0, vmax=1.0,
            extent=(0.0, weights.shape[1] * (seconds or 1.0), len(weights) - 0.5, -0.5),
        )  # fmt: skip
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("seconds" if seconds else "encoder frame", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.colorbar(image, ax=side_by_side, pad=0.01, fraction=0.02, aspect=40).ax.tick_params(labelsize=7)
    label_tokens(side_by_side[0], text, len(panels[0].weights), fontsize=6)
    FigureCanvasAgg(figure).print_figure(path, format="png", dpi=110)


def load_panels(options: argparse.Namespace) -> list[Panel]:
    first, *others = options.panels
    panels = [load_panel(first, options.utterance)]
    for name in others:
        if "@" in name:
            panels.append(load_panel(name, options.utterance))
        elif options.data is None:
            raise InputError(f"{name} is a checkpoint, which needs the utterance's data; give --data ROOT")
        else:
            panels.append(spell_panel(name, panels[0], options.data))
    return panels


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.split("\n")[0])
    parser.add_argument("panels", nargs="+", metavar="RUN@EPOCH|CHECKPOINT",
                        help="training and epoch of a validation; after the first, also a checkpoint")  # fmt: skip
    parser.add_argument("--data", metavar="ROOT", help="data with the utterance, for checkpoints")
    parser.add_argument("--utterance", type=int, default=0, help="index among the saved utterances (default: 0)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    options = parser.parse_args(argv)
    panels = load_panels(options)
    write_atomically(options.out, lambda path: draw(path, panels))


if __name__ == "__main__":
    run(main)
