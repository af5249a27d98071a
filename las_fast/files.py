"""Paths and files: output paths are checked before the work starts, and files are written atomically."""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from las_fast.errors import JSON_ESCAPES, MAX_MESSAGE, InputError, is_out_of_memory

BEST, AVERAGED, LAST = "best.safetensors", "averaged.safetensors", "last.pt"  # in a run folder
LOCK = ".lock"  # in an output folder while a command writes into it, and after that
DEFAULT_MODEL = "english"  # the released model of commands without --checkpoint
FORMER_NAMES = {"speech13h": "english"}  # of released models, with the models that replace them
NAME_MAX = 255  # bytes of a file name on most file systems
URL = r"[A-Za-z][A-Za-z0-9+.-]+://"  # how one begins
FIRST_LINE_BYTES = 4096
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file
AMPLE_BYTES = 2**30  # with this much free space, a failed write is not due to a full disk
KNOWN_SUFFIXES = {  # an output of another kind must not have one of these
    *(".csv", ".tsv", ".txt", ".json", ".jsonl", ".srt", ".vtt", ".html", ".md", ".yaml", ".yml", ".pdf"),
    *(".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".wma", ".mp4", ".aiff", ".au", ".w64", ".webm"),
    *(".safetensors", ".pt", ".pth", ".npy", ".npz", ".arpa", ".zip", ".gz", ".tar", ".png", ".jpg", ".py"),
    *(".onnx", ".ckpt", ".bin", ".gguf", ".h5", ".tflite", ".ts"),
    *(".doc", ".docx", ".odt", ".rtf", ".tex", ".xls", ".xlsx", ".ods", ".ppt", ".pptx", ".xml", ".htm"),
    *(".ctm", ".stm", ".rttm", ".textgrid", ".eaf", ".ass", ".ssa", ".sub", ".sbv", ".ttml", ".lrc"),
}


# ------------------------------------------------------------------------------------------------------------- Paths


def expand(path: str | Path) -> Path:
    """Expand ~ and ~user in a path; raise InputError if the home folder is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0].removeprefix("~") or "this user"
        raise InputError(f"{path}: the home folder of {user} is not known; write the path without ~") from None


def nearest_path_hint(path: Path, *, fits: Callable[[Path], bool] = os.path.exists) -> str:
    """Return a hint for an error about a missing path, such as "; the nearest is DIR/NAME", or "".

    fits: whether a path with a similar name could be meant.
    """
    path = Path(os.path.abspath(path))
    existing = next((p for p in path.parents if os.path.isdir(p)), None)
    if existing is None or existing == Path(existing.anchor):
        return ""
    missing = path.relative_to(existing).parts[0]
    suits = fits if existing == path.parent else os.path.isdir
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(existing) if not name.startswith(".") and suits(existing / name)]
        if similar := difflib.get_close_matches(missing, names, 1, cutoff=0.7):
            return f"; the nearest is {existing / similar[0]}"
    return f"; {existing} exists, but has no {missing}" if existing != path.parent else ""


def is_utf8(path: str | Path) -> bool:
    """Return whether a path can be encoded in UTF-8, which libraries not written in Python require."""
    try:
        os.fspath(path).encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False


@contextlib.contextmanager
def utf8_path(path: str | Path) -> Iterator[str]:
    """Yield a UTF-8 name for an existing file or folder, valid inside the `with` block.

    This is the path itself if it is UTF-8, otherwise the /proc or /dev name of an open file descriptor.
    """
    if is_utf8(path):
        yield os.fspath(path)
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{handle}" if os.path.isdir("/proc/self/fd") else f"/dev/fd/{handle}"
    finally:
        os.close(handle)


def may_be_file_name(path: Path) -> bool:
    """Return whether a name ends like that of a file: a dot, then a letter and up to seven letters or digits."""
    return re.fullmatch(r"\.[A-Za-z][A-Za-z0-9]{0,7}", path.suffix) is not None


# ----------------------------------------------------------------------------------------------------------- Reading


def unreadable(path: str | Path, error: OSError) -> InputError:
    """Return the error to raise for a file that the system does not let us read."""
    return InputError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk")


def first_line(path: Path) -> str:
    """Return the first line of a file, up to FIRST_LINE_BYTES; "" if the file cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(FIRST_LINE_BYTES).decode("utf-8", "replace").partition("\n")[0].strip("\ufeff\r")
    return ""


def safetensors_format(path: Path) -> str | None:
    """Return the `format` entry of the metadata; None if it is not a safetensors file, or has no such entry."""
    return safetensors_metadata(path).get("format")


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; {} for any other file."""
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length <= MAX_HEADER_BYTES:
            return dict(json.loads(file.read(length)).get("__metadata__", {}))
    return {}


# ---------------------------------------------------------------------------------------- Checks before the work starts


def make_folder(path: Path, option: str) -> None:
    """Create the output folder that `option` names; raise InputError if it cannot be created or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((p for p in (path, *path.parents) if os.path.isfile(p)), None)
        reason = f"{file} is a file" if file else error.strerror
        raise InputError(f"{option}: the folder {path} cannot be created ({reason}); choose another") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{option}: the folder {path} is not writable; choose another")


@contextlib.contextmanager
def lock_folder(path: Path, what: str) -> Iterator[None]:
    """Make the folder of --out, and lock it in the `with` block; raise InputError if another process has locked it.

    The lock is on a hidden file in the folder, because NFS shares locks between hosts only on files that are open for
    writing.

    what: what writes into the folder, for errors: "training".
    """
    make_folder(path, "--out")
    try:
        file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # such as a file of another user
        file = os.open(path, os.O_RDONLY)
    try:
        if try_lock(file) is False:
            raise InputError(f"another {what} is writing into {path}; wait for it or choose another --out")
        yield
    finally:
        os.close(file)


def try_lock(descriptor: int) -> bool | None:
    """Lock a file or folder without waiting; return whether it is locked now, or None if the file system has no locks.

    Closing the descriptor ends the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def prepare_output_file(
    path: Path,
    option: str,
    *,
    what: str = "a file",
    suffixes: tuple[str, ...] = (),
    inputs: Iterable[str | Path | None] = (),
    may_replace: Callable[[Path], bool] | None = None,
) -> None:
    """Create the folder of an output file, and check that the file may be written.

    Args:
        path:        the output file.
        option:      option that names it, for errors.
        what:        kind of output, for errors: "a submission in CSV".
        suffixes:    suitable suffixes in lower case, the usual one first. Other KNOWN_SUFFIXES are refused.
        inputs:      files that the command reads; they are never overwritten.
        may_replace: returns whether an existing, non-empty file may be replaced; by default any file may.

    Raises:
        InputError: the file cannot or must not be written.
    """
    suffix = path.suffix.lower()
    if suffixes and suffix in KNOWN_SUFFIXES and suffix not in suffixes:
        raise InputError(f"{option} {path}: the output is {what}; give a name that ends in {suffixes[0]}")
    length = len(os.fsencode(path.name))
    if length > NAME_MAX:
        raise InputError(f"{option}: the name {path.name[:20]}... has {length} bytes; give one of at most {NAME_MAX}")
    # A link is followed: the file is written to the folder of its target.
    folder = Path(os.path.realpath(path)).parent if os.path.islink(path) else path.parent
    make_folder(folder, option)
    if os.path.isdir(path):
        raise InputError(f"{option} {path} is a folder; give the name of a file to write")
    if not os.path.exists(path):
        return
    if not os.path.isfile(path):
        raise InputError(f"{option} {path} is not a regular file; give another name")
    if any(_same_file(path, file) for file in inputs if file is not None):
        raise InputError(f"{option} {path} is an input of this command and would be replaced; give another name")
    if not os.access(path, os.W_OK):
        raise InputError(f"{option} {path} is write-protected; give another name or change its permissions")
    if may_replace and path.stat().st_size and not may_replace(path):
        raise InputError(f"{option} {path} exists and is not {what}; give another name, or remove it first")


def _same_file(path: Path, other: str | Path | int) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return os.path.samefile(path, other)
    return False


def file_identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """Return what stays the same only while a file and its contents do."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


# ----------------------------------------------------------------------------------------------------- Atomic writing


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path) and rename the result to path, so that path is never half-written.

    Raises InputError if the disk is full or the folder is not writable; an existing file is then left unchanged.
    """
    path = Path(os.path.realpath(path))  # a link is kept, and its target is replaced
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is not a regular file; give another name")
    with contextlib.ExitStack() as stack:  # which an interrupt closes too
        try:
            temporary = stack.enter_context(_temporary_file(path))
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())  # the name must not reach the disk before the content
            temporary.chmod(_mode(path))
            os.replace(temporary, path)
        except (OSError, SafetensorError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            reason, advice = _explain_failure(error, path.parent)  # while the temporary file still fills the disk
            raise InputError(f"{path} could not be written ({reason}); {advice}") from None


def write_text_atomically(path: str | Path, text: str) -> None:
    r"""Write text to path in UTF-8 as write_atomically does; newlines are not translated.

    Python decodes bytes of names that are not UTF-8 to lone surrogates, which are written as \udce0. A JSON reader
    restores the same name from this escape.
    """
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode("utf-8", JSON_ESCAPES)))


def write_tensors(path: str | Path, save_file: Callable[[str], None], save: Callable[[], bytes]) -> None:
    """Write a safetensors file as write_atomically does.

    Args:
        save_file: writes to a path, which must be UTF-8.
        save:      returns the file's bytes; used for other paths.
    """

    def write(temporary: Path) -> None:
        if is_utf8(temporary):
            save_file(str(temporary))
        else:
            temporary.write_bytes(save())

    write_atomically(path, write)


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """Yield a path in a hidden folder beside `path` that no other writer of `path` uses; remove both at the end.

    The folder is locked while it is in use, so one that a killed process left is used again. The file itself cannot be
    locked: safetensors puts another in its place.
    """
    lock, number = None, 0
    while lock is None:
        number += 1
        folder, is_new = _temporary(path, number), False
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
            is_new = True
        lock = _lock(folder, is_new=is_new)
    try:
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a failure must not hide the error being handled
        os.close(lock)


def _temporary(path: Path, number: int) -> Path:
    """Return a hidden name in the same folder, of at most NAME_MAX bytes, which depends only on the arguments."""
    name = f".{path.name}.{number}.partial"
    if len(os.fsencode(name)) > NAME_MAX:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}.{number}.partial"
    return path.with_name(name)


def _lock(folder: Path, *, is_new: bool) -> int | None:
    """Lock a folder; return its descriptor, or None if another writer has locked or removed it or it is not ours.

    Another user could have put links to our files into an older folder. A new one is ours whatever its owner, which
    some file systems map.
    """
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM):
            return None
        raise
    is_ours = is_new or os.fstat(lock).st_uid == os.geteuid()
    if is_ours and try_lock(lock) is not False and _same_file(folder, lock):  # not removed before it was locked
        return lock
    os.close(lock)
    return None


def _mode(path: Path) -> int:
    """Return the permissions of the file being replaced, or those of a new file; safetensors creates files 0600."""
    with contextlib.suppress(OSError):
        return stat.S_IMODE(path.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _explain_failure(error: Exception, folder: Path) -> tuple[str, str]:
    """Return why a file could not be written into `folder`, and what to do."""
    if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, None):
        return f"{error.strerror}", "choose another name or folder"
    # On a full disk, torch.save and safetensors raise errors that do not mention it.
    reason = getattr(error, "strerror", None) or "the file system accepts no more data"
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return f"{reason}; the folder is gone", "free some space or choose another folder"
    if not isinstance(error, OSError) and free > AMPLE_BYTES:
        return (str(error).splitlines() or [type(error).__name__])[0][:MAX_MESSAGE], "choose another name or folder"
    return f"{reason}; {free / 2**20:.0f} MiB are free there", "free some space or choose another folder"
