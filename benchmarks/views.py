"""Measure CER and time of decoding in several views, that is at several speeds and with warped frequency axes.

    python -m benchmarks.views --checkpoint RUN|NAME --data ROOT [--by source] [--record]
        [--speeds 1 --warps 1] [--speeds 0.85 1 --warps 1] ...

Each --speeds, with the --warps after it, is a row; the first row should be the plain search. The other settings are the
checkpoint's. All rows decode a part of the utterances in turn, on one thread, and the time is the CPU time of decoding
with the features at hand, as a multiple of the first row's.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from benchmarks.rows import CONTEXT, RESULTS, append_rows, context
from benchmarks.splits import add_split_options, parts, scored_split
from las_fast.checkpoint import load_model
from las_fast.cli import run
from las_fast.config import DecodingConfig, check_decoding
from las_fast.data.dataset import SpeechDataset
from las_fast.data.layouts import open_corpus
from las_fast.errors import InputError
from las_fast.output.metrics import score
from las_fast.progress import ProgressBar
from las_fast.recogniser import Recogniser, SearchSetup
from las_fast.search.views import views_of

FILE = RESULTS / "views.csv"
COLUMNS = (*CONTEXT, "checkpoint", "split", "part", "beam", "speeds", "warps", "utterances", "cer", "cpu_seconds")
SPEEDS_AND_WARPS = (
    ((1.0,), (1.0,)),
    ((0.85, 1.0), (1.0,)),
    ((0.85, 0.9, 1.0), (1.0,)),
    ((0.9, 1.0), (1.0, 1.06)),
)
CHUNKS = 8  # parts of the utterances that are decoded in turn


def pairs_of(speeds: Sequence[list[float]], warps: Sequence[list[float]]) -> list[tuple]:
    """Return the speeds and the warps of each row; SPEEDS_AND_WARPS if there are none.

    Raises:
        InputError: there are more of --speeds than of --warps, or the reverse.
    """
    if not speeds and not warps:
        return [*SPEEDS_AND_WARPS]
    if len(speeds) != len(warps):
        raise InputError(f"each --speeds needs its --warps; got {len(speeds)} and {len(warps)}")
    return [(tuple(s), tuple(w)) for s, w in zip(speeds, warps, strict=True)]


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
        for part, members in groups.items():
            cer = score([dataset.texts[i] for i in members], [found[i] for i in members]).cer
            rows.append(
                (part, config.beam, speeds, warps, len(members), round(cer, 2), round(cpu, 3) if part == "all" else "")
            )
    return rows


def markdown(rows: Sequence[tuple], groups: Sequence[str]) -> str:
    """Return a Markdown table with a line per setting, a column of CER per part, and the time."""
    lines = ["| speeds | warps | " + " | ".join(f"{part}, CER, %" for part in groups) + " | time |"]
    lines.append("|---" * (len(groups) + 3) + "|")
    for start in range(0, len(rows), len(groups)):
        some = rows[start : start + len(groups)]
        cells = [*some[0][2:4], *(f"{row[5]:.2f}" for row in some), f"{some[0][6] / max(rows[0][6], 1e-3):.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.views", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_split_options(parser, FILE, on_bad=True)
    parser.add_argument("--by", default="", help="manifest column to divide the split by")
    for name in ("--speeds", "--warps"):
        parser.add_argument(name, type=float, nargs="+", action="append", default=[], metavar="X", help="of a row")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    loaded = load_model(options.checkpoint)
    base = loaded.config.decoding
    settings = [
        check_decoding(loaded.config, replace(base, speeds=speeds, warps=warps))
        for speeds, warps in pairs_of(options.speeds, options.warps)
    ]
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
