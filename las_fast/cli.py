"""The console script `las-fast`, and what all commands share: settings on the command line, errors, exit statuses."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from las_fast.errors import JSON_ESCAPES, InputError, Stopped, from_outside, mute, say_error, show
from las_fast.progress import close_all
from las_fast.system import tune_memory

if TYPE_CHECKING:
    pass


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
