"""Measure CER, hypotheses per step and speed of the search for several values of decoding.beam_threshold.

    python -m benchmarks.beam_threshold --checkpoint RUN|NAME --data ROOT [--thresholds 10 6 4 3 2] [--record]
    python -m benchmarks.beam_threshold

The first form decodes all of a split with each threshold, and without one, in one view; the other settings are the
checkpoint's. It then times every N-th batch (--every), all thresholds alternately, on one thread, by CPU time. Both
forms print and draw the recorded rows, together with new ones.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.interleaved import Timing, time_interleaved
from benchmarks.rows import CONTEXT, RESULTS, append_rows, context, read_rows
from benchmarks.splits import add_split_options, scored_split
from las_fast.checkpoint import Loaded, load_model
from las_fast.cli import run
from las_fast.config import DecodingConfig, check_decoding
from las_fast.data.batch import Batch
from las_fast.data.dataset import SpeechDataset
from las_fast.errors import InputError
from las_fast.files import write_atomically
from las_fast.ops import Steps
from las_fast.output.metrics import score
from las_fast.search.beam import (
    TokenHypothesis,
    backtrack,
    choose_search,
    fold_length_reward,
    length_limits,
    packed_weights,
)
from las_fast.search.dataset import batches_to_decode, listen
from las_fast.search.ngram import load_ngram_model
from las_fast.search.steps import Search
from las_fast.text import EOS

FILE = RESULTS / "beam_threshold.csv"
PICTURE = RESULTS / "plots" / "beam-threshold.png"
COLUMNS = (*CONTEXT, "checkpoint", "data", "split", "utterances", "beam", "threshold", "cer", "other_texts",
           "beams_per_step", "timed_seconds", "rounds", "listener_cpu", "search_cpu", "search_speed", "decoding_speed",
           "load")  # fmt: skip
THRESHOLDS = (10.0, 8.0, 6.0, 5.0, 4.0, 3.5, 3.0, 2.5, 2.0, 1.0)
MEASURES = {"search_speed": "speed of the search", "decoding_speed": "speed of listener and search"}  # 1: no threshold
COLOURS = ("#0b6e4f", "#b5651d", "#4f6d9a", "#7a4988")


@dataclass(frozen=True)
class Encoded:
    """A batch after the listener."""

    batch: Batch
    memory: Any


@dataclass(frozen=True)
class Searcher:
    """Searches batches of one checkpoint with any settings of the same language model and precision."""

    loaded: Loaded
    ngram: Any
    packed: Tensor | None

    def steps(self, memory: Any, config: DecodingConfig) -> Steps:
        search = Search(self.loaded.model, config, self.ngram if config.ngram_weight else None, "auto", self.packed)
        return choose_search(search, memory)(search, memory, self.limits(memory, config))

    def limits(self, memory: Any, config: DecodingConfig):
        return length_limits(memory.lengths * self.loaded.model.time_reduction, config)

    def hypotheses(self, memory: Any, config: DecodingConfig) -> list[list[TokenHypothesis]]:
        return backtrack(self.steps(memory, config), self.limits(memory, config), config, 1, "auto")


def count_beams(steps: Steps) -> tuple[int, int]:
    """Return the number of beams computed, and the number of steps, both summed over the utterances."""
    live = torch.zeros_like(steps.scores[0], dtype=torch.bool)
    live[:, 0] = True  # before the first step
    finished = torch.zeros_like(live)
    beams = utterance_steps = 0
    for tokens, parents, scores in zip(steps.tokens, steps.parents, steps.scores, strict=True):
        beams += int(live.sum())
        utterance_steps += int(live.any(1).sum())
        finished = finished.gather(1, parents) | (tokens == EOS)
        live = ~finished & scores.isfinite()
    return beams, utterance_steps


def decode(
    searcher: Searcher, encoded: Sequence[Encoded], config: DecodingConfig, count: int
) -> tuple[list[str], float]:
    """Return the texts of `count` utterances, and the mean number of beams computed per step of an utterance."""
    texts, beams, utterance_steps = [""] * count, 0, 0
    for one in encoded:
        steps = searcher.steps(one.memory, config)
        hypotheses = backtrack(steps, searcher.limits(one.memory, config), config, 1, "auto")
        for i, (best, *_) in zip(one.batch.indices.tolist(), hypotheses, strict=True):
            texts[i] = searcher.loaded.vocabulary.decode(best.text_tokens)
        counts = count_beams(steps)
        beams, utterance_steps = beams + counts[0], utterance_steps + counts[1]
    return texts, beams / utterance_steps


@torch.inference_mode()
def measure(loaded: Loaded, dataset: SpeechDataset, thresholds: Sequence[float], options) -> Iterator[tuple]:
    """Yield a row per threshold, 0 (none) first: the columns of COLUMNS from utterances on."""
    ngram, base = fold_length_reward(
        load_ngram_model(options.lm, loaded.config.decoding, loaded, "cpu"), loaded.config.decoding.one_view(),
        len(loaded.vocabulary), "cpu",
    )  # fmt: skip
    searcher = Searcher(loaded, ngram, packed_weights(loaded.model, base, "cpu"))
    settings = {threshold: replace(base, beam_threshold=threshold) for threshold in (0.0, *thresholds)}
    batches = list(batches_to_decode(dataset, loaded.vocabulary, base))
    encoded = [Encoded(batch, listen(loaded.model, batch, base)) for batch in batches]
    decoded = {t: decode(searcher, encoded, config, len(dataset)) for t, config in settings.items()}
    timed = encoded[:: options.every]
    seconds = float(sum(dataset.seconds[one.batch.indices.numpy()].sum() for one in timed))
    timings = time_searches(searcher, timed, settings, options.rounds)
    listener, unpruned = timings["listener"].cpu, timings["0.0"].cpu
    for t, (texts, beams) in decoded.items():
        timing = timings[str(t)]
        other = sum(a != b for a, b in zip(texts, decoded[0.0][0], strict=True))
        cer = round(score(dataset.texts, texts).cer, 3)
        yield (len(dataset), base.beam, t, cer, other, round(beams, 3), round(seconds, 1), options.rounds,
               round(listener, 3), round(timing.cpu, 3), round(timing.cpu_ratio, 3),
               round((listener + unpruned) / (listener + timing.cpu), 3), round(timing.load, 2))  # fmt: skip


def time_searches(
    searcher: Searcher, encoded: Sequence[Encoded], settings: dict[float, DecodingConfig], rounds: int
) -> dict[str, Timing]:
    """Time the search of the batches with each of the settings, by str(threshold), and the "listener"."""

    def search(config: DecodingConfig) -> None:
        for one in encoded:
            searcher.hypotheses(one.memory, config)

    def listen_again() -> None:
        for one in encoded:
            listen(searcher.loaded.model, one.batch, settings[0.0])

    searches = {str(threshold): partial(search, config) for threshold, config in settings.items()}
    return time_interleaved(searches | {"listener": listen_again}, baseline="0.0", rounds=rounds)


def latest(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Return the rows of each checkpoint and split by threshold, none first; of equal thresholds the last row."""
    curves: dict[str, dict[float, dict[str, str]]] = {}
    for row in rows:
        name = f"{row['checkpoint']}, {row['split']}"
        curves.setdefault(name, {})[float(row["threshold"]) or math.inf] = row
    return {name: [curve[t] for t in sorted(curve, reverse=True)] for name, curve in curves.items()}


def table(rows: list[dict[str, str]]) -> str:
    """Return a Markdown table per checkpoint and split, with a line per threshold."""
    heads = ("`decoding.beam_threshold`", "CER, %", "other texts", "beams per step", *MEASURES.values())
    lines = []
    for name, curve in latest(rows).items():
        lines += [f"| {name}: {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for row in curve:
            threshold = f"{float(row['threshold']):g}" if float(row["threshold"]) else "0 (none)"
            values = (threshold, *(row[key] for key in ("cer", "other_texts", "beams_per_step", *MEASURES)))
            lines.append(f"| {' | '.join(values)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def draw(path: Path, rows: list[dict[str, str]]) -> None:
    """Write a PNG: change of the CER over speed, a line per curve of `latest`, points labelled with thresholds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, 2, sharey=True), MEASURES.items(), strict=True):
        for (name, curve), colour in zip(latest(rows).items(), itertools.cycle(COLOURS), strict=False):
            speeds = [float(row[key]) for row in curve]
            changes = [float(row["cer"]) - float(curve[0]["cer"]) for row in curve]
            axes.plot(speeds, changes, "o-", color=colour, label=name, markersize=4, linewidth=1)
            for row, x, y in zip(curve, speeds, changes, strict=True):
                if x > 1.05:  # the others overlap
                    text = f"{float(row['threshold']):g}"
                    axes.annotate(text, (x, y), textcoords="offset points", xytext=(0, 5), fontsize=7, color=colour)
        axes.axhspan(-0.02, 0.02, color="#dddddd", zorder=0)
        axes.set_xlabel(f"{label}, relative to no threshold")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("change of the CER, points")
    figure.axes[0].legend(fontsize=8)
    FigureCanvasAgg(figure).print_figure(path, format="png", dpi=110)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beam_threshold", description=__doc__.split("\n")[0])
    add_split_options(parser, FILE, required=False, on_bad=True)
    parser.add_argument("--lm", help="language model (default: the checkpoint's, if it has one)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS, metavar="X",
                        help=f"nats (default: {' '.join(f'{t:g}' for t in THRESHOLDS)})")  # fmt: skip
    parser.add_argument("--every", type=int, default=4, metavar="N", help="time every N-th batch (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing (default: 5)")
    options = parser.parse_args(argv)
    if bool(options.checkpoint) != bool(options.data):
        raise InputError("--checkpoint and --data go together; give both to measure, or neither to draw")
    if options.every < 1 or options.rounds < 1:
        raise InputError(f"--every and --rounds must be at least 1; got {options.every} and {options.rounds}")
    if not all(0 < t < math.inf for t in options.thresholds):
        raise InputError("--thresholds must be positive numbers; the search without one is always measured")
    return options


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    options, new_rows = parse(argv), []
    if options.checkpoint:
        torch.set_num_threads(1)
        loaded = load_model(options.checkpoint)
        for threshold in options.thresholds:
            check_decoding(loaded.config, replace(loaded.config.decoding, beam_threshold=threshold))
        dataset = scored_split(options, loaded)
        labels = (*context(), loaded.path.stem, Path(options.data).resolve().name, options.split)
        new_rows = [(*labels, *row) for row in measure(loaded, dataset, options.thresholds, options)]
    if options.record:
        append_rows(FILE, COLUMNS, new_rows)
        new_rows = []
    rows = read_rows(FILE) + [dict(zip(COLUMNS, map(str, row), strict=True)) for row in new_rows]
    if not rows:
        raise InputError(f"there are no rows in {FILE.name} yet; give --checkpoint and --data")
    print(table(rows))
    write_atomically(PICTURE, lambda path: draw(path, rows))


if __name__ == "__main__":
    run(main)
