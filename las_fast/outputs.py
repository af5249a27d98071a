"""Files that commands write: room is made for them before the work, and nothing else is replaced by them."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from las_fast.cli import make_folder
from las_fast.errors import InputError

BEST, AVERAGED, LAST = "best.safetensors", "averaged.safetensors", "last.pt"  # of a training
NAME_MAX = 255  # bytes of a file's name on most file systems
HEAD = 4096  # bytes of a file by which it is recognised
HEADER_MAX = 100_000_000  # bytes of the head of a safetensors file, at most
SUFFIXES = {  # whose meaning is settled: a file of another kind must not be called so
    *(".csv", ".tsv", ".txt", ".json", ".jsonl", ".srt", ".vtt", ".html", ".md", ".yaml", ".yml", ".pdf"),
    *(".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".wma", ".mp4", ".aiff", ".au", ".w64", ".webm"),
    *(".safetensors", ".pt", ".pth", ".npy", ".npz", ".arpa", ".zip", ".gz", ".tar", ".png", ".jpg", ".py"),
}


def make_room(
    path: Path,
    option: str,
    *,
    what: str = "a file",
    suffixes: tuple[str, ...] = (),
    inputs: Iterable[str | Path | None] = (),
    ours: Callable[[Path], bool] | None = None,
) -> None:
    """Make the folder of the file that `option` names; raise InputError where the file cannot or must not be written.

    Args:
        what:     is written, for errors: "a submission in CSV".
        suffixes: that fit it, in lower case, the usual one first; others whose meaning is settled are refused.
        inputs:   files that the command reads.
        ours:     says of a file that is there whether an earlier run wrote it; any other is left alone.
    """
    suffix = path.suffix.lower()
    if suffixes and suffix in SUFFIXES and suffix not in suffixes:
        raise InputError(f"{option} {path}: {what} is written there; give a name that ends in {suffixes[0]}")
    if len(os.fsencode(path.name)) > NAME_MAX:
        length = len(os.fsencode(path.name))
        raise InputError(f"{option}: the name {path.name[:20]}... has {length} bytes; give one of at most {NAME_MAX}")
    make_folder(path.parent, option)
    if os.path.isdir(path):
        raise InputError(f"{option} {path} is a folder; give the name of a file to write")
    if not os.path.exists(path):
        return
    if not os.path.isfile(path):
        raise InputError(f"{option} {path} is not a regular file; give another name")
    if any(_same(path, file) for file in inputs if file is not None):
        raise InputError(f"{option} {path} is read by this command, and would be replaced; give another name")
    if not os.access(path, os.W_OK):
        raise InputError(f"{option} {path} may not be written; give another name or change its permissions")
    if ours and path.stat().st_size and not ours(path):
        raise InputError(f"{option} {path} is there and is not {what}; give another name, or remove it first")


def _same(path: Path, other: str | Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return os.path.samefile(path, other)
    return False


def is_utf8(path: str | Path) -> bool:
    """Return whether a path is UTF-8, as libraries want it that are not written in Python."""
    try:
        os.fspath(path).encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False


@contextlib.contextmanager
def utf8_path(path: str | Path) -> Iterator[str]:
    """Give a name in UTF-8 by which a file can be read, or a folder be used, for as long as the block lasts.

    It is its own name where that is UTF-8, else the name of an open handle.
    """
    if is_utf8(path):
        yield os.fspath(path)
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{handle}" if os.path.isdir("/proc/self/fd") else f"/dev/fd/{handle}"
    finally:
        os.close(handle)


def nearest_path(path: Path) -> str:
    """Return "; DIR is there, and in it NAME" for a path that is not: the part of it that is, and the nearest name."""
    path = Path(os.path.abspath(path))
    there = next((p for p in path.parents if os.path.isdir(p)), None)
    if there is None or there == Path(there.anchor):
        return ""
    wanted = path.relative_to(there).parts[0]
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(there) if not name.startswith(".")]
        if near := difflib.get_close_matches(wanted, names, 1):
            return f"; the nearest is {there / near[0]}"
    return f"; {there} is there, {wanted} in it is not" if there != path.parent else ""


def first_line(path: Path) -> str:
    """Return the first line of a file, or its beginning; "" where it cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(HEAD).decode("utf-8", "replace").partition("\n")[0].strip("\ufeff\r")
    return ""


def safetensors_format(path: Path) -> str | None:
    """Return the format that a safetensors file names in its metadata, None where it is none or names none."""
    with contextlib.suppress(OSError, ValueError, AttributeError), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length <= HEADER_MAX:
            return json.loads(file.read(length)).get("__metadata__", {}).get("format")
    return None
