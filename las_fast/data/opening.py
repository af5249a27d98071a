"""Open a recording as a regular file: a path, a pipe, standard input, a file object or an array.

Containers are read by position, so anything but a regular file is first copied to an unnamed temporary file.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from functools import partial
from typing import BinaryIO

import soundfile

from las_fast.data.decoder import decoder_message
from las_fast.data.samples import Samples
from las_fast.errors import InputError, NotStored, show

Audio = str | os.PathLike[str] | BinaryIO | Samples  # a path, "-" for standard input, a binary file or an array


def name_of(recording: Audio) -> str:
    """Return the name of a recording for errors and warnings."""
    if isinstance(recording, Samples):
        return "the array"
    if isinstance(recording, (str, os.PathLike)):
        return "standard input" if os.fspath(recording) == "-" else show(recording)
    name = getattr(recording, "name", None)
    return show(name) if isinstance(name, str) and name else "the file object"


def open_descriptor(path: Audio, name: str, *, pipes: bool) -> int:
    """Return the descriptor of a regular file with the recording's bytes: the file itself, or a copy.

    Args:
        name:  of the recording, for errors.
        pipes: whether path may be a pipe, which can be read only once.

    Raises:
        InputError: the recording cannot be opened or copied, or is a folder, device, socket or terminal.
    """
    if isinstance(path, Samples):
        return _write_temporary(path.write, name)
    if not isinstance(path, (str, os.PathLike)):
        return _write_temporary(partial(_copy, path.read, name), name)
    if os.fspath(path) == "-":
        descriptor = _standard_input()
    else:
        _check_path(path, name, pipes=pipes)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except (OSError, ValueError) as error:
            raise InputError(f"{name} {_open_problem(error)}") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return descriptor
        _check_kind(name, mode)
        copy = _write_temporary(partial(_copy, partial(os.read, descriptor), name), name)
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return copy


def _check_path(path: str | os.PathLike[str], name: str, *, pipes: bool) -> None:
    """Raise InputError if opening the path would fail or block forever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise InputError(f"{name} {_open_problem(error)}") from None
    _check_kind(name, mode)
    if stat.S_ISSOCK(mode):
        raise InputError(f"{name} is a socket; give a wav, flac, ogg or mp3 file")
    if not stat.S_ISREG(mode) and not pipes:
        raise InputError(f"{name} is a pipe, which can be read only once; give a wav, flac, ogg or mp3 file")


NOT_FILES = {stat.S_IFDIR: "folder", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


def _check_kind(name: str, mode: int) -> None:
    if kind := NOT_FILES.get(stat.S_IFMT(mode)):
        raise InputError(f"{name} is a {kind}; give a wav, flac, ogg or mp3 file")


def _standard_input() -> int:
    try:
        descriptor = os.dup(0)
    except OSError:
        raise InputError("standard input is closed; give a file, or send a recording through a pipe") from None
    if os.isatty(descriptor):
        os.close(descriptor)
        raise InputError("standard input is a terminal; give a file, or send a recording through a pipe")
    return descriptor


def _copy(read: Callable[[int], bytes], name: str, descriptor: int) -> None:
    """Write the bytes that read(count) returns to a file, until it returns b""."""
    try:
        while data := _read_block(read, name):
            while data:
                data = data[os.write(descriptor, data) :]
    except TypeError:
        raise InputError(f"{name} returns text instead of bytes; open it with open(path, 'rb')") from None
    except ValueError as error:  # the file object is closed, or open for writing only
        reason = str(error).rstrip(".")
        raise InputError(f"{name} cannot be read ({reason}); open it again with open(path, 'rb')") from None


def _read_block(read: Callable[[int], bytes | None], name: str) -> bytes:
    try:
        data = read(1 << 20)
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror or error}); open it again") from None
    if data is None:
        raise InputError(f"{name} has no data yet; give a file object whose read() waits for data")
    return data


def _write_temporary(write: Callable[[int], None], name: str) -> int:
    """Return the descriptor of a new unnamed file, filled by write(descriptor)."""
    copy = _temporary_file()
    try:
        write(copy)
    except (OSError, soundfile.LibsndfileError) as error:
        os.close(copy)
        reason = getattr(error, "strerror", None) or decoder_message(error)
        raise NotStored(
            f"{name} could not be copied to a temporary file ({reason}); "
            "free some space, or set TMPDIR to another folder"
        ) from None
    except BaseException:
        os.close(copy)
        raise
    return copy


def _temporary_file() -> int:
    """Return the descriptor of a new unnamed file, in the folder for temporary files or else in memory."""
    try:
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())
    except OSError:
        return os.memfd_create("recording")


def _open_problem(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    return f"cannot be opened ({getattr(error, 'strerror', None) or error})"
