"""Measure CER and time of decoding in several views, that is at several speeds and with warped frequency axes.

    python -m benchmarks.views --checkpoint RUN|NAME --data ROOT [--by source] [--record]
        [--views "1 / 1 / 0"] [--views "1 0.85 1 / 1 1 1.06 / 0.5"] ...

Each --views is a row, with the speeds, the warps and the view threshold, as in las_fast.decode; the first row should be
the plain search. The other settings are the checkpoint's. All rows decode a part of the utterances in turn, on one
thread, and the time is the CPU time of decoding with the features at hand, as a multiple of the first row's.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.rows import CONTEXT, RESULTS, append_rows, context
from benchmarks.splits import add_split_options, parts, scored_split
from las_fast.checkpoint import load_model
from las_fast.cli import run
from las_fast.config import DecodingConfig, check_decoding
from las_fast.data.dataset import SpeechDataset
from las_fast.data.layouts import open_corpus
from las_fast.output.metrics import score
from las_fast.progress import ProgressBar
from las_fast.recogniser import Recogniser, SearchSetup
from las_fast.search.views import views_of

FILE = RESULTS / "views.csv"
SETTINGS = ("speeds", "warps", "view_threshold")
COLUMNS = (*CONTEXT, "checkpoint", "split", "part", "beam", *SETTINGS, "utterances", "cer", "cpu_seconds")
ROWS = ("1 / 1 / 0", "1 0.85 / 1 / 0", *(f"1 0.85 1 / 1 1 1.06 / {threshold}" for threshold in (0.55, 0.5, 0.45, 0)))
CHUNKS = 8  # parts of the utterances that are decoded in turn


def as_views(words: str) -> dict[str, Any]:
    """Convert a --views to decoding settings."""
    try:
        speeds, warps, (threshold,) = (tuple(map(float, part.split())) for part in words.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{words!r} must be speeds, warps and a threshold, such as {ROWS[2]!r}"
        ) from None
    return {"speeds": speeds, "warps": warps, "view_threshold": threshold}


def measure(
    model: Recogniser, dataset: SpeechDataset, setups: Sequence[SearchSetup]
) -> tuple[list[list[str]], list[float]]:
    """Return the texts of the utterances, and the CPU seconds, for each setup."""
    texts = [[""] * len(dataset) for _ in setups]
    seconds = [0.0] * len(setups)
    order = np.argsort(dataset.frame_counts, kind="stable")
    model.decode_dataset(dataset, setups[0], progress=False)  # reads the features and loads what is loaded once
    passes = sum(len(views_of(setup.config)) for setup in setups)
    with ProgressBar(CHUNKS * passes, "decoding", "parts") as bar:
        for k, (d, setup) in itertools.product(range(CHUNKS), enumerate(setups)):
            indices = order[k::CHUNKS]
            started = time.process_time()
            results = model.decode_dataset(dataset.subset(indices), setup, progress=False)
            seconds[d] += time.process_time() - started
            for i, (best, *_) in zip(indices, results, strict=True):
                texts[d][i] = model.loaded.vocabulary.decode(best.text_tokens)
            bar.update(len(views_of(setup.config)))
    return texts, seconds


def rows_of(
    dataset: SpeechDataset, groups: dict[str, list[int]], settings: Sequence[DecodingConfig],
    texts: Sequence[list[str]], seconds: Sequence[float],
) -> list[tuple]:  # fmt: skip
    """Return a row per setting and part: the last columns of COLUMNS, from part on."""
    rows = []
    for config, found, cpu in zip(settings, texts, seconds, strict=True):
        speeds, warps = (" ".join(f"{x:g}" for x in values) for values in (config.speeds, config.warps))
        views = (speeds, warps, f"{config.view_threshold:g}")
        for part, members in groups.items():
            cer = score([dataset.texts[i] for i in members], [found[i] for i in members]).cer
            rows.append(
                (part, config.beam, *views, len(members), round(cer, 2), round(cpu, 3) if part == "all" else "")
            )
    return rows


def markdown(rows: Sequence[tuple], groups: Sequence[str]) -> str:
    """Return a Markdown table with a line per setting, a column of CER per part, and the time."""
    lines = ["| speeds | warps | view threshold | " + " | ".join(f"{part}, CER, %" for part in groups) + " | time |"]
    lines.append("|---" * (len(groups) + 4) + "|")
    for start in range(0, len(rows), len(groups)):
        some = rows[start : start + len(groups)]
        cells = [*some[0][2:5], *(f"{row[6]:.2f}" for row in some), f"{some[0][7] / max(rows[0][7], 1e-3):.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.views", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_split_options(parser, FILE, on_bad=True)
    parser.add_argument("--by", default="", help="manifest column to divide the split by")
    parser.add_argument("--views", type=as_views, action="append", metavar="ROW", help="speeds / warps / threshold")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    loaded = load_model(options.checkpoint)
    base = loaded.config.decoding
    rows_asked = options.views or [as_views(row) for row in ROWS]
    settings = [check_decoding(loaded.config, replace(base, **views)) for views in rows_asked]
    dataset = scored_split(options, loaded)
    corpus = open_corpus(options.data)
    groups = parts(dataset.ids, corpus.root, corpus.choose(options.split), options.by)
    model = Recogniser(loaded, torch.device("cpu"))
    texts, seconds = measure(model, dataset, [model.search_setup(one) for one in settings])
    rows = rows_of(dataset, groups, settings, texts, seconds)
    print(markdown(rows, list(groups)))
    if options.record:
        described = (*context(), options.checkpoint, options.split)
        append_rows(FILE, COLUMNS, [(*described, *row) for row in rows])


if __name__ == "__main__":
    run(main)
