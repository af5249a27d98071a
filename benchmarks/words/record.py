"""The rows of results/words.csv."""

from __future__ import annotations

import argparse

from benchmarks.rows import CONTEXT, RESULTS, append_rows, context

FILE = RESULTS / "words.csv"
COLUMNS = (*CONTEXT, "checkpoint", "measure", "data", "search", "words", "right", "median_ms", "p90_ms", "ece", "auc",
           "out_of_order", "ece_perfect", "ece_perfect_p95")  # fmt: skip


def record(options: argparse.Namespace, measure: str, data: str, search: str, cells: tuple) -> None:
    """Append a row with --record; cells are those from "words" on."""
    if options.record:
        append_rows(FILE, COLUMNS, [(*context(), options.checkpoint, measure, data, search, *cells)])
