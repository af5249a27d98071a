"""Errors that the user can fix, as opposed to bugs: bad input, and failures outside the program."""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator

JSON_ESCAPES = "las_fast.json"  # encoding error handler: characters that cannot be encoded become JSON escapes, \u00e9
MAX_MESSAGE = 120  # characters of another library's message that are quoted


class InputError(Exception):
    """Bad data, settings or files. The message is one sentence: what was expected, what came, what to do.

    The commands print it after "error: " and end with exit status 2, without a traceback.
    """


class BadRecording(InputError):
    """A recording cannot be read."""


class DoesNotFit(InputError):
    """One utterance alone does not fit in memory."""


class NotFinite(InputError):
    """The outputs of the model are NaN or infinite."""


class NotStored(InputError):
    """A recording could not be copied to a temporary file."""


class SlowPathWarning(RuntimeWarning):
    """las_fast runs on slower paths than this machine allows; the message says why, and what to do."""


class FormerNameWarning(UserWarning):
    """A released model was asked for by a former name; the model that replaced it is used."""


class HiddenModelWarning(UserWarning):
    """A file or a run folder here has the name of a released model; it is used instead."""


# The signals that stop the program.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """The program received a stop signal other than Ctrl-C; `signum` is its number."""

    def __init__(self, signum: int = signal.SIGINT):
        self.signum = signum


def show(text: str | bytes | os.PathLike) -> str:
    r"""Return a path, or text with paths in it, as one line of printable characters.

    Bytes of names that are not UTF-8 become \xe0; control characters become \n or \x1b.
    """
    text = os.fsdecode(text)
    with contextlib.suppress(UnicodeEncodeError):  # a surrogate that does not encode a byte is escaped below
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def type_name(value: object) -> str:
    """Return how an error names a value of the wrong type."""
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _json_escapes(error: UnicodeError) -> tuple[str, int]:
    """Return JSON escapes for the characters that cannot be encoded, and the position after them."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2)), error.end


codecs.register_error(JSON_ESCAPES, _json_escapes)


# Phrases of torch's CPU allocator, CUDA outside torch, cuBLAS, C++ and oneDNN.
NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "alloc_failed", "bad_alloc",
             "could not create a primitive", "could not create a memory")  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one that it was raised from or while handling, reports that memory ran out.

    If memory runs out during the capture of a CUDA graph, torch ends the capture, and that raises another error.
    """
    return any(map(_reports_full_memory, causes(error)))


def _reports_full_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):  # numpy's too
        return True
    text = str(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and (
        type(error).__name__ == "OutOfMemoryError"
        or getattr(error, "errno", None) == errno.ENOMEM
        or any(phrase in text for phrase in NO_MEMORY)
    )


# Errors of the standard library that are not OSErrors: type, phrase in its message, message that we print.
PHRASES = (
    (RuntimeError, "home directory", "no home folder is known; set HOME, or write paths without ~"),
    (RuntimeError, "can't start new thread", "the system allows no more threads; raise ulimit -u"),
    (ValueError, "embedded null", "a path contains a NUL character; correct the settings or the manifest"),
)

# errno -> message; "{}" is the file name if known, else "input or output".
ADVICE = {
    errno.ENOSPC: "no space is left on the disk ({}); free some",
    errno.EDQUOT: "the disk quota is used up ({}); free some space or write to another disk",
    errno.EFBIG: "{} would exceed the file size limit; write to another disk, or raise ulimit -f",
    errno.EACCES: "{}: permission denied; change its permissions or give another path",
    errno.EPERM: "{}: operation not permitted; change its permissions or give another path",
    errno.EROFS: "{} lies on a read-only file system; give another path",
    errno.ENOENT: "{} does not exist; check the path",
    errno.ENAMETOOLONG: "{}: the name is too long for the file system; shorten it",
    errno.EMFILE: "too many files are open ({}); raise the limit, such as with ulimit -n 1024",
    errno.ENFILE: "too many files are open on this machine ({}); end other programs",
    errno.EIO: "{} could not be read or written (input/output error); check the disk or the network",
    errno.EAGAIN: "the system allows no more processes or threads ({}); raise ulimit -u or end other programs",
}


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and those it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explain_error(error: BaseException) -> str | None:
    """Return one sentence for an error caused outside the program; None for a bug in the program.

    This is the fallback: code that knows the option or the file raises InputError.
    """
    if isinstance(error, InputError):
        return str(error)
    if is_out_of_memory(error):
        return "there is not enough memory; give smaller input, or run on a machine with more memory"
    if isinstance(error, OSError):
        return _explain_system_error(error)
    if isinstance(error, UnicodeError):
        return f"a text or a name is not UTF-8 ({_shorten(error)}); save it as UTF-8 or rename the file"
    if isinstance(error, RecursionError) and _raised_in(error, "yaml", "json"):
        return "a file is nested too deeply to be read; check that it is the intended file"
    for kind, phrase, sentence in PHRASES:
        if isinstance(error, kind) and phrase in str(error):
            return sentence
    return None


def _explain_system_error(error: OSError) -> str:
    names = [show(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes, os.PathLike))]
    place = " and ".join(names)
    if error.errno in ADVICE and (place or not ADVICE[error.errno].startswith("{}")):
        return ADVICE[error.errno].format(place or "input or output")
    reason = error.strerror or _shorten(error) or type(error).__name__
    return f"{place}: {reason}; check the path" if place else f"a system call failed ({reason}); run again"


def _shorten(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


def _raised_in(error: BaseException, *packages: str) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").partition(".")[0] in packages


def mute(stream) -> None:
    """Redirect a standard stream that cannot be written to the null device, pending output included."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError, AttributeError):
        pass


def print_error(line: str) -> None:
    """Print a line to stderr; if stderr cannot be written, mute it: the exit status still reports the error."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        mute(sys.stderr)
