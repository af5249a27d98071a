"""Read sentences from a plain text file; for a file in another format, the error names the format.

Without these checks, a language model would silently be trained on markup.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from las_fast.errors import InputError, show

HEAD_LINES = 200  # lines that decide the format
ARCHIVES = {  # first bytes -> format
    b"PK\x03\x04": "a zip archive (or an office document)",
    b"\x1f\x8b": "a gzip file whose name does not end in .gz",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
}
DOCUMENTS = {
    b"%PDF-": "a PDF document",
    b"%!PS": "a PostScript document",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0": "an office document",
    b"mmap lm": "a KenLM language model",
    b"RIFF": "a recording",
    b"fLaC": "a recording",
    b"OggS": "a recording",
    b"ID3": "a recording",
    b"\x93NUMPY": "a NumPy array",
}
SENTENCE_MARKS = re.compile(r"^\s*<s>\s|\s</s>\s*$")  # <s> at the start and </s> at the end of a sentence
CLOSING_TAG = re.compile(r"</(?!s>)[A-Za-z][^<>]*>")
DOCUMENT = re.compile(r"<(!doctype|\?xml|!--|html|head|body|svg|tei|rss|xml)\b", re.IGNORECASE)
JSON = re.compile(r'[\[{]\s*(["\[{]|$)')
COLUMN_NAMES = {"id", "path", "file", "filename", "audio", "wav", "text", "transcript", "sentence", "label", "duration",
           "speaker", "client_id", "split"}  # fmt: skip


def sentences(path: Path, lines: Iterable[str]) -> Iterator[str]:
    """Yield the sentences of a text file, one per line, without <s> and </s>.

    Raises:
        InputError: the text is an n-gram model, markup, JSON, subtitles or a table.
    """
    lines = iter(lines)
    head = list(itertools.islice(lines, HEAD_LINES))
    if problem := foreign_format([line for line in head if line.strip()]):
        name, advice = problem
        raise InputError(f"{show(path)} is {name}, not text with one sentence per line; {advice}")
    for line in itertools.chain(head, lines):
        yield SENTENCE_MARKS.sub("", line)


def check_signature(path: Path) -> None:
    """Raise InputError if the first bytes of a file are those of an archive, a document or a recording."""
    if not path.is_file():  # a pipe can be read only once; a missing file is reported on reading
        return
    with path.open("rb") as file:
        start = file.read(512)
    for kinds, advice in ((ARCHIVES, "unpack it and give the text inside"), (DOCUMENTS, "give plain text")):
        for mark, what in kinds.items():
            if start.startswith(mark) and not (what.startswith("a gzip") and path.suffix.lower() == ".gz"):
                raise InputError(f"{show(path)} is {what}, not text with one sentence per line; {advice}")
    if start[257:262] == b"ustar":
        raise InputError(f"{show(path)} is a tar archive, not text with one sentence per line; unpack it")


def is_arpa_or_kenlm(path: Path) -> bool:
    """Return whether a file begins like an ARPA file or a KenLM model."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(4096)
        return start.startswith(b"mmap lm") or _is_arpa(start.decode("utf-8", "replace").splitlines())
    return False


def _is_arpa(lines: list[str]) -> bool:
    return any(line.strip().lower() == "\\data\\" or line.startswith("ngram 1=") for line in lines)


def foreign_format(lines: list[str]) -> tuple[str, str] | None:
    """Return the format of a file's first non-blank lines and what to do; None for plain text."""
    if not lines:
        return None
    first = lines[0].lstrip("\ufeff").strip()
    if _is_arpa(lines):
        return (
            "an n-gram model (ARPA)",
            "give the text that it was trained on; models of other programs are not supported",
        )
    if DOCUMENT.match(first) or 10 * sum(bool(CLOSING_TAG.search(line)) for line in lines) > len(lines):
        return "HTML or XML", "remove the markup first"
    if JSON.match(first) or 2 * sum(line.lstrip().startswith('{"') for line in lines) > len(lines):
        return "JSON", "give only the texts, or a manifest that ends in .jsonl"
    if first.startswith("WEBVTT") or any(" --> " in line for line in lines):
        return "subtitles", "give only the texts"
    return _table(lines)


def _table(lines: list[str]) -> tuple[str, str] | None:
    advice = "give only the column of texts, or a manifest that ends in .tsv or .csv with a header line"
    for separator, name in (("\t", "tabs"), (",", "commas"), (";", "semicolons"), ("|", "vertical bars")):
        counts = {line.count(separator) for line in lines}
        header = {field.strip(' "').lower() for field in lines[0].split(separator)}
        same = len(counts) == 1 and min(counts) > 0
        if (separator == "\t" and same and len(lines) > 1) or (min(counts) > 0 and len(header & COLUMN_NAMES) > 1):
            return f"a table with columns separated by {name}", advice
    return None
