"""Submission files: what Kaggle takes, one row an utterance in the edition's own order."""

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
    """Write a CSV of texts in upper case, whole or not at all; ids are written as write_text_atomically has it.

    Args:
        path:     the file; its folder is made.
        ids:      of the utterances, in submission order.
        texts:    their transcripts, without <sos> or <eos>.
        header:   of the two columns.
        numbered: the first column counts rows from 0 instead of giving ids.

    Raises:
        InputError: the file cannot be written.
    """
    rows = [(row if numbered else id_, text.upper()) for row, (id_, text) in enumerate(zip(ids, texts, strict=True))]

    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerows([header, *rows])
    make_folder(Path(path).parent, "--out")
    write_text_atomically(path, content.getvalue())
