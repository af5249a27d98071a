"""Files that commands write: checked before the work starts, written atomically, never replacing anything else."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from las_fast.errors import JSON_ESCAPES, InputError, lacks_memory

if TYPE_CHECKING:
    pass


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


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path) and rename the result to path, so that path is never half-written.

    Raises InputError when the disk is full or the folder cannot be written; the old file then stays as it was.
    """
    path = Path(os.path.realpath(path))  # a link stays, and the file that it leads to is replaced
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is not a regular file; give another name")
    temporary = _temporary(path)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        temporary.chmod(_mode(path))
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        _remove(temporary)
        if lacks_memory(error):
            raise
        raise InputError(f"{path} could not be written ({_reason(error, path.parent)}") from None
    except BaseException:  # an interrupt leaves nothing half-written either
        _remove(temporary)
        raise


def write_text_atomically(path: str | Path, text: str) -> None:
    r"""Write text to path in UTF-8 as write_atomically does; newlines stay as they are.

    A byte of a file's name that is not UTF-8, which Python keeps as a lone surrogate, is written as \udce0. In JSON
    this is an escape, so that readers get the same name.
    """
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode("utf-8", JSON_ESCAPES)))


def write_tensors(path: str | Path, save_file: Callable[[str], None], save: Callable[[], bytes]) -> None:
    """Write a safetensors file as write_atomically does, whatever its name: save_file takes names in UTF-8 only."""

    def write(temporary: Path) -> None:
        if is_utf8(temporary):
            save_file(str(temporary))
        else:
            temporary.write_bytes(save())

    write_atomically(path, write)


def _temporary(path: Path) -> Path:
    """Return a hidden name beside path, no longer than a name may be; what a killed process leaves is written over."""
    name = f".{path.name}.partial"
    if len(os.fsencode(name)) > NAME_MAX:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}.partial"
    return path.with_name(name)


def _remove(path: Path) -> None:
    """Remove a file if it is there; what stands in the way must not hide the error that is under way."""
    with contextlib.suppress(OSError):
        path.unlink()


def _mode(path: Path) -> int:
    """Return the permissions of the file that is replaced, or of a new one; safetensors' own let nobody else read."""
    with contextlib.suppress(OSError):
        return stat.S_IMODE(path.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _reason(error: Exception, folder: Path) -> str:
    """Return why a file could not be written into folder, and what to do."""
    if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, None):
        return f"{error.strerror}); choose another name or folder"
    # torch.save and safetensors report a full disk as errors of their own that do not say so.
    reason = getattr(error, "strerror", None) or "the file system took no more"
    try:
        free = f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free there"
    except OSError:
        free = "the folder is gone"
    return f"{reason}; {free}); free some space or choose another folder"


def expand(path: str | Path) -> Path:
    """Return a path with ~ and ~user replaced by the home folder; raise InputError where that is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        who = Path(path).parts[0].removeprefix("~") or "this user"
        raise InputError(f"{path}: the home folder of {who} is not known; write the path without ~") from None


def make_folder(path: Path, option: str) -> None:
    """Make the folder that `option` names, to write into; raise InputError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        standing = next((p for p in (path, *path.parents) if os.path.isfile(p)), None)
        reason = f"{standing} is a file" if standing else error.strerror
        raise InputError(f"{option}: the folder {path} cannot be made ({reason}); choose another") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{option}: nothing can be written into {path}; choose another folder")
