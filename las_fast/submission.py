"""Submission files: what Kaggle takes, one row an utterance in the edition's own order."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from las_fast.checkpoint import write_atomically


def write_submission(
    path: str | Path,
    ids: Sequence[str],
    texts: Sequence[str],
    *,
    header: tuple[str, str] = ("id", "label"),
    numbered: bool = False,
) -> None:
    """Write a CSV of texts in upper case, whole or not at all.

    Args:
        path:     the file; its folder is made.
        ids:      of the utterances, in submission order.
        texts:    their transcripts, without <sos> or <eos>.
        header:   of the two columns.
        numbered: the first column counts rows from 0 instead of giving ids.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    rows = [(row if numbered else id_, text.upper()) for row, (id_, text) in enumerate(zip(ids, texts, strict=True))]

    def write(temporary: Path) -> None:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([header, *rows])

    write_atomically(path, write)
