"""Kaggle submission files: one row per utterance, in the order of the edition."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from las_fast.files import make_folder, write_text_atomically


def write_submission(
    path: str | Path,
    ids: Sequence[str],
    texts: Sequence[str],
    *,
    header: tuple[str, str] = ("id", "label"),
    numbered: bool = False,
) -> None:
    """Write texts in upper case to a CSV file, atomically.

    Args:
        path:     output file; its folder is created. See write_text_atomically for ids that are not UTF-8.
        ids:      utterance ids, in submission order.
        texts:    transcripts, without <sos> or <eos>.
        header:   names of the two columns.
        numbered: write row numbers from 0 in the first column, instead of ids.

    Raises:
        InputError: the file or its folder cannot be written.
        ValueError: the numbers of ids and texts differ.
    """
    rows = [(row if numbered else id_, text.upper()) for row, (id_, text) in enumerate(zip(ids, texts, strict=True))]

    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerows([header, *rows])
    make_folder(Path(path).parent, "--out")
    write_text_atomically(path, content.getvalue())
