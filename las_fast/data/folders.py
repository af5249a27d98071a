"""List folders without hidden files, and read text files line by line; shared by all data layouts."""

from __future__ import annotations

import codecs
import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from las_fast.errors import InputError

SYSTEM_FILES = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "#recycle", "lost+found",
          "$recycle.bin", "system volume information"}  # fmt: skip
BYTE_ORDER_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
BLOCK_BYTES = 1 << 20  # bytes of a text file decoded at once


def is_hidden(name: str) -> bool:
    """Return whether a name is hidden or belongs to the system, an editor or an office program."""
    return name.startswith((".", "~$")) or name.casefold() in SYSTEM_FILES


def list_folder(folder: Path) -> list[Path]:
    """List a folder, sorted by name, without hidden names; InputError if it cannot be listed."""
    return [folder / entry.name for entry in _scan(folder)]


def _scan(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder} cannot be listed: {error.strerror}; check the path and its permissions") from None


def list_files(folder: Path, suffixes: tuple[str, ...] | set[str]) -> list[Path]:
    """List the entries of a folder whose suffix, in lower case, is one of `suffixes`."""
    return [path for path in list_folder(folder) if path.suffix.lower() in suffixes]


def subfolders(folder: Path) -> list[Path]:
    """List the subfolders of a folder, sorted by name; empty if it cannot be listed."""
    try:
        return [folder / entry.name for entry in _scan(folder) if _is_folder(entry)]
    except InputError:
        return []


def _is_folder(entry: os.DirEntry) -> bool:
    """Return whether an entry is a folder or a link to one; only a link needs a stat."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir(follow_symlinks=False)


def list_at_depth(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the entries `depth` folders below a folder, sorted; InputError if a folder on the way cannot be listed."""
    for entry in _scan(folder):
        if depth == 0:
            yield folder / entry.name
        elif _is_folder(entry):
            yield from list_at_depth(folder / entry.name, depth - 1)


def to_filename(text: str) -> str:
    """Convert a file name in decoded text to the form that os functions expect, even if it is not UTF-8."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def read_lines(path: Path) -> Iterator[str]:
    r"""Yield the lines of a text file without their line ends; a .gz is decompressed.

    A line ends with \n or \r\n, or with \r if the file has no \n; no other character ends one. The encoding is UTF-8,
    or UTF-16 or UTF-32 with a byte order mark.

    Raises:
        InputError: the file cannot be read, has another encoding, or contains NUL; the message names the line.
    """
    end, rest = "", ""
    for text in _decoded(path):
        end = end or ("\r" if "\r" in text and "\n" not in text else "\n")
        *lines, rest = (rest + text).split(end)
        yield from map(_without_returns, lines)
    if rest:
        yield _without_returns(rest)


def _without_returns(line: str) -> str:
    return line.rstrip("\r").replace("\r", " ")


def _decoded(path: Path) -> Iterator[str]:
    """Yield the text of a file in blocks; a decoding error is raised after the text before it has been yielded."""
    line, decoder, problem = 1, None, ""
    for data in _blocks(path):
        if decoder is None:
            encoding = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
            decoder = codecs.getincrementaldecoder(encoding)()
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            good = error.object[: error.start]
            text = good.decode(encoding) if encoding.startswith("utf-8") else "\n" * good.count(b"\n")
            problem = "is not UTF-8 text"
        if "\0" in text:
            text, problem = text[: text.index("\0")], "contains a NUL character"
        line += text.count("\n")
        yield text
        if problem:
            raise InputError(f"{path} line {line} {problem}; save the file as UTF-8")


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file in blocks; the last block is empty."""
    data = b"more"
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            while data:
                data = file.read(BLOCK_BYTES)
                yield data
    except (OSError, EOFError, zlib.error, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path} cannot be read ({reason}); check the file and its permissions") from None
