"""Read tables row by row: .tsv and .csv with a header line, .jsonl and .json with one object per line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from las_fast.data.folders import read_lines
from las_fast.errors import InputError

SUFFIXES = (".tsv", ".jsonl", ".csv", ".json")
DELIMITERS = ",;\t|"  # of a .csv; the most frequent in the header line is taken

Row = tuple[int, dict]  # line number, column -> value


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table; blank lines are skipped.

    Values of a .tsv or .csv are strings, without surrounding white space and quotes.

    Raises:
        InputError: the file cannot be read, or a line does not fit the header or is not JSON (the message names it).
    """
    if path.suffix.lower() in (".jsonl", ".json"):
        return _json_rows(path, read_lines(path))
    if path.suffix.lower() == ".csv":
        return _with_header(path, _csv_lines(path, read_lines(path)))
    return _with_header(path, enumerate((_split(line, "\t") for line in read_lines(path)), 1))


def columns(path: Path) -> list[str]:
    """Return the column names of a table, or the keys of its first object; empty if it cannot be read as a table."""
    try:
        if path.suffix.lower() in (".jsonl", ".json"):
            return next((list(row) for _, row in read_rows(path)), [])
        header = next(read_lines(path), "")
    except InputError:
        return []
    return [_unquoted(name) for name in header.split(_delimiter(header) if path.suffix.lower() == ".csv" else "\t")]


def normalise_column(column: str) -> str:
    """Lower-case a column's name and join its words with underscores: "Start [ms]" becomes "start_ms"."""
    letters = "".join(c if c.isalnum() else " " for c in column.lower())
    return "_".join(letters.split())


def _csv_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    lines = iter(lines)
    header = next(lines, "")
    delimiter = _delimiter(header)
    if delimiter in "\t|":  # tables with these delimiters do not quote
        yield from enumerate((_split(line, delimiter) for line in chain([header], lines)), 1)
        return
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, skipinitialspace=True)
    before = 1
    try:
        yield 1, next(csv.reader([header], delimiter=delimiter), [])
        for values in reader:
            if any("\n" in value for value in values):
                raise InputError(
                    f"{path} line {before + 1} has a field that spans several lines; close its quotes or join the lines"
                )
            before = 1 + reader.line_num
            yield before, values
    except csv.Error as error:
        raise InputError(f"{path} line {1 + reader.line_num} is not valid CSV ({error}); correct it") from None


def _delimiter(header: str) -> str:
    return max(DELIMITERS, key=header.count)


def _with_header(path: Path, lines: Iterator[tuple[int, list[str]]]) -> Iterator[Row]:
    header = _without_trailing_blanks(map(str.strip, next(lines, (1, []))[1]))
    header = [name or f"column {i}" for i, name in enumerate(header, 1)]  # pandas leaves the name of its index empty
    if len(set(header)) < len(header):
        duplicate = next(name for name in header if header.count(name) > 1)
        raise InputError(f"{path} has two columns named {duplicate!r}; rename or remove one")
    if not header:
        raise InputError(f"{path} must begin with a header line that has a column 'path'; got an empty line")
    for line, values in lines:
        values = [value.strip() for value in values]
        if not any(values):
            continue
        values = values[: len(header)] + _without_trailing_blanks(values[len(header) :])
        if len(values) != len(header):
            raise InputError(
                f"{path} line {line} has {len(values)} columns, but its header has {len(header)}; give every "
                f"line {len(header)}"
            )
        yield line, dict(zip(header, values, strict=True))


def _without_trailing_blanks(values: Iterable[str]) -> list[str]:
    """Drop empty values at the end, which spreadsheets add."""
    values = list(values)
    while values and not values[-1]:
        values.pop()
    return values


def _split(line: str, delimiter: str) -> list[str]:
    """Split a line of a table that does not quote, and remove the quotes that spreadsheets add nevertheless."""
    return [_unquoted(value) for value in line.split(delimiter)]


def _unquoted(value: str) -> str:
    value = value.strip()
    inner = value[1:-1].replace('""', "")
    if len(value) > 1 and value[0] == value[-1] == '"' and '"' not in inner:
        return value[1:-1].replace('""', '"').strip()
    return value


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    filled = ((line, text) for line, text in enumerate(lines, 1) if text.strip())
    first = next(filled, None)
    if first is None:
        return
    line, text = first
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        yield from _array_rows(path, "\n" * (line - 1) + "\n".join([text, *lines]))
        return
    for line, text in chain([first], filled):
        yield line, _object(path, line, _parsed(path, line, text, "write one object per line"))


def _array_rows(path: Path, text: str) -> Iterator[Row]:
    """Yield the objects of a JSON array with the lines in which they begin."""
    decoder = json.JSONDecoder()
    count = len(_parsed(path, 1, text, "correct it"))  # reports what is not JSON
    end = text.index("[") + 1
    line = 1 + text.count("\n", 0, end)
    for _ in range(count):
        start = next(i for i in range(end, len(text)) if text[i] not in " \t\r\n,")
        line += text.count("\n", end, start)
        row, end = decoder.raw_decode(text, start)
        yield line, _object(path, line, row)
        line += text.count("\n", start, end)


def _parsed(path: Path, line: int, text: str, remedy: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", None) or str(error)
        raise InputError(f"{path} line {line} is not JSON: {reason}; {remedy}") from None


def _object(path: Path, line: int, row) -> dict:
    if not isinstance(row, dict):
        raise InputError(f"{path} line {line} must be a JSON object with a key 'path'; got {str(row)[:40]}")
    return row
