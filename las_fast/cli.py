"""The console script `las-fast`, and what all commands share: settings on the command line, errors, exit statuses."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from las_fast.errors import JSON_ESCAPES, InputError, Stopped, from_outside, lacks_memory, mute, say_error, show
from las_fast.progress import close_all

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
LARGE, LARGE_OF_BATCHES = 2**25, 2**20  # bytes of blocks that have pages of their own, in training and in decoding

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

COMMANDS = {
    "train": ("las_fast.train", "train a model on an archive, LibriSpeech or a manifest"),
    "decode": ("las_fast.decode", "decode a split into a submission file, and score it"),
    "transcribe": ("las_fast.transcribe", "write down what audio files say"),
    "lm": ("las_fast.lm", "make a language model of text, for --lm of decode and transcribe"),
    "tune": ("las_fast.tune", "find the best settings of the search on a development split"),
    "export": ("las_fast.export", "a trained model as one small file, with the settings to decode with"),
    "ops": ("las_fast.ops.__main__", "which fast paths work on this machine, and why not the others"),
    "demo": ("las_fast.demo", "from nothing to a report: a spoken corpus, training, decoding"),
}


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


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(name: str, option: str = "--device ") -> torch.device:
    """Return the torch.device of that name; "auto" is CUDA where there is one. option stands before the name in errors.

    Raises:
        InputError: there is no such device here, or it cannot be used.
    """
    import torch

    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    plain = name.strip().lower()
    if plain == "auto":
        plain = "cuda" if "cuda" in there else "cpu"
    if plain not in there:
        raise InputError(f"{option}{name}: there is no such device here; this machine has {', '.join(there)}")
    try:
        torch.zeros(1, device=plain).item()
    except RuntimeError as error:
        reason = "its memory is full" if lacks_memory(error) else str(error).strip().partition("\n")[0]
        raise InputError(f"{option}{plain} cannot be used ({reason}); wait for it, or give {option}cpu") from None
    return torch.device(plain)


def tune_memory() -> None:
    """Have PyTorch take large blocks in huge pages and glibc keep small ones for the next call, on Linux.

    A training step frees and takes back more than a GiB. Each page of 4 KiB that comes back from the system costs a
    fault, together an eighth of the step. Must be called before the first tensor is made.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch offers no other way to say so
    _mallopt(M_MMAP_THRESHOLD, LARGE)
    _mallopt(M_TRIM_THRESHOLD, -1)  # never


def give_large_blocks_back() -> None:
    """Have glibc give the large blocks of a batch back when they are freed, as decoding wants it.

    Each batch has other sizes, and between its blocks lie hypotheses that stay. Blocks kept for the next call would fit
    it ever worse: after 1600 utterances of a model of 9.4 M parameters the process was half as large again. New pages
    cost up to 4% of the time.
    """
    _mallopt(M_MMAP_THRESHOLD, LARGE_OF_BATCHES)


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(parameter, value)


def run(main: Callable[..., Any], argv: list[str] | None = None) -> None:
    """Call main(argv) and end the process as all commands do.

    Bad input, and everything else that something outside the program causes, is one sentence after "error: " and
    status 2. Ctrl-C ends with status 130, SIGTERM with 143, SIGHUP with 129, a reader of the output that has gone with
    141. Faults of the program keep their traceback.
    """
    tune_memory()
    prepare_streams()
    with stop_signals():
        status = _status(main, argv)
    if status:
        sys.exit(status)


def _status(main: Callable[..., Any], argv: list[str] | None) -> int:
    try:
        try:
            main(argv)
        finally:
            close_all()
        return _flush()
    except SystemExit as end:  # of --help, or of a wrong option
        status = _flush()
        if end.code == 0 and status:
            return status
        raise
    except KeyboardInterrupt as stop:
        for s in STOPPING:  # another one must not disturb the end of the process
            signal.signal(s, signal.SIG_IGN)
        signum = getattr(stop, "signum", signal.SIGINT)
        say_error("interrupted" if signum == signal.SIGINT else f"stopped by {signal.Signals(signum).name}")
        return 128 + signum
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        mute(sys.stdout)
        mute(sys.stderr)
        return 128 + signal.SIGPIPE
    except Exception as error:
        sentence = from_outside(error)
        if sentence is None:
            raise
        say_error(f"error: {show(sentence)}")
        return _flush() or 2


def _flush() -> int:
    """Flush stdout; return the exit status: 2, with a sentence, where it takes no more."""
    try:
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        mute(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as error:
        mute(sys.stdout)  # or Python would try again at its end
        say_error(f"error: standard output cannot be written ({error.strerror}); send it elsewhere")
        return 2


def prepare_streams() -> None:
    """Have every print succeed: in any encoding, and where the standard streams were closed by the caller.

    What an encoding lacks, and bytes of names that are not UTF-8, are escaped as in JSON: printed JSON stays JSON.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets this number, which else the next file would get
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (it stays open)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=JSON_ESCAPES)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows a line when it is printed, not pages later


def need_stdout(instead: str) -> None:
    """Raise InputError where standard output is closed, for a command that prints its results; `instead`: an option."""
    if sys.__stdout__ is None:
        raise InputError(f"standard output is closed, so the results cannot be printed; give {instead}")


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP raise Stopped, as Ctrl-C raises KeyboardInterrupt, so that cleaning up is done.

    What the caller has set to be ignored stays so: SIGHUP under nohup.
    """

    def stop(signum: int, frame: Any) -> None:
        for s in caught:
            signal.signal(s, signal.SIG_IGN)  # a second one must not end the cleaning up
        raise Stopped(signum)

    caught = {s: signal.getsignal(s) for s in STOPPING if s != signal.SIGINT}
    caught = {s: handler for s, handler in caught.items() if handler != signal.SIG_IGN}
    for s in caught:
        signal.signal(s, stop)
    try:
        yield
    finally:
        for s, handler in caught.items():
            if signal.getsignal(s) is stop:
                signal.signal(s, handler)


def dispatch(argv: list[str] | None = None) -> None:
    """Run the command that the first word names on the rest of them."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: las-fast COMMAND [options]\n\nListen, Attend and Spell: speech in, characters out.\n")
        print("\n".join(f"  {name:<12}{summary}" for name, (_, summary) in COMMANDS.items()))
        print("\nlas-fast COMMAND --help lists a command's options.")
        return
    if argv[0] == "--version":
        from las_fast import __version__

        print(f"las_fast {__version__}")
        return
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, 1)
        advice = f"; the nearest is {near[0]}" if near else ""
        raise InputError(f"las-fast has no command {argv[0]!r}; it has {', '.join(COMMANDS)}{advice}")
    importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])


def main(argv: list[str] | None = None) -> None:
    """Entry point of `las-fast` and of `python -m las_fast`."""
    run(dispatch, argv)
