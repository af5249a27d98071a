"""Sentences of a plain text file; files of other formats that are given as text are refused by name.

A model of the letters of markup would look like any other: it must not come about without a word.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from las_fast.errors import InputError, show

HEAD = 200  # lines by which a file is judged
PACKED = {  # how files begin
    b"PK\x03\x04": "a zip archive (or an office document)",
    b"\x1f\x8b": "a gzip file whose name does not end in .gz",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
}
OTHERS = {
    b"%PDF-": "a PDF document",
    b"%!PS": "a PostScript document",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0": "an office document",
    b"mmap lm": "a language model of KenLM",
    b"RIFF": "a recording",
    b"fLaC": "a recording",
    b"OggS": "a recording",
    b"ID3": "a recording",
    b"\x93NUMPY": "an array of NumPy",
}
ENDS = re.compile(r"^\s*<s>\s|\s</s>\s*$")  # marks of beginning and end around a sentence
CLOSING = re.compile(r"</(?!s>)[A-Za-z][^<>]*>")
DOCUMENT = re.compile(r"<(!doctype|\?xml|!--|html|head|body|svg|tei|rss|xml)\b", re.IGNORECASE)
JSON = re.compile(r'[\[{]\s*(["\[{]|$)')
COLUMNS = {"id", "path", "file", "filename", "audio", "wav", "text", "transcript", "sentence", "label", "duration",
           "speaker", "client_id", "split"}  # fmt: skip


def sentences(path: Path, lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a text file, without <s> and </s> around them.

    Raises:
        InputError: they are of another format: an n-gram model, markup, JSON, subtitles or a table.
    """
    lines = iter(lines)
    head = list(itertools.islice(lines, HEAD))
    if found := other_format([line for line in head if line.strip()]):
        what, advice = found
        raise InputError(f"{show(path)} is {what}, not text with a sentence a line; {advice}")
    for line in itertools.chain(head, lines):
        yield ENDS.sub("", line)


def check_beginning(path: Path) -> None:
    """Raise InputError where the first bytes of a file are those of a packed file or of a document."""
    if not path.is_file():  # what comes through a pipe can be read once; what is missing, the reader says
        return
    with path.open("rb") as file:
        begin = file.read(512)
    for kinds, advice in ((PACKED, "unpack it and give the text in it"), (OTHERS, "give plain text")):
        for mark, what in kinds.items():
            if begin.startswith(mark) and not (what.startswith("a gzip") and path.suffix.lower() == ".gz"):
                raise InputError(f"{show(path)} is {what}, not text with a sentence a line; {advice}")
    if begin[257:262] == b"ustar":
        raise InputError(f"{show(path)} is a tar archive, not text with a sentence a line; unpack it")


def is_other_model(path: Path) -> bool:
    """Return whether a file is an ARPA file or a model of KenLM, by its beginning."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        begin = file.read(4096)
        return begin.startswith(b"mmap lm") or _is_arpa(begin.decode("utf-8", "replace").splitlines())
    return False


def _is_arpa(lines: list[str]) -> bool:
    return any(line.strip().lower() == "\\data\\" or line.startswith("ngram 1=") for line in lines)


def other_format(lines: list[str]) -> tuple[str, str] | None:
    """Return what the first lines of a file (without blank ones) are, if not text, and what to do."""
    if not lines:
        return None
    first = lines[0].lstrip("\ufeff").strip()
    if _is_arpa(lines):
        return "an n-gram model (ARPA)", "give the text that it was made of: models of other programs are not read"
    if DOCUMENT.match(first) or 10 * sum(bool(CLOSING.search(line)) for line in lines) > len(lines):
        return "HTML or XML", "take the markup out first"
    if JSON.match(first) or 2 * sum(line.lstrip().startswith('{"') for line in lines) > len(lines):
        return "JSON", "give the texts alone, or a manifest that ends in .jsonl"
    if first.startswith("WEBVTT") or any(" --> " in line for line in lines):
        return "subtitles", "give the texts alone"
    return _table(lines)


def _table(lines: list[str]) -> tuple[str, str] | None:
    advice = "give the column of the texts alone, or a manifest that ends in .tsv or .csv with a header line"
    for separator, name in (("\t", "tabs"), (",", "commas"), (";", "semicolons"), ("|", "bars")):
        counts = {line.count(separator) for line in lines}
        header = {field.strip(' "').lower() for field in lines[0].split(separator)}
        same = len(counts) == 1 and min(counts) > 0
        if (separator == "\t" and same and len(lines) > 1) or (min(counts) > 0 and len(header & COLUMNS) > 1):
            return f"a table of columns between {name}", advice
    return None
