"""The console script `las-fast`, and the entry point of every command: errors, exit statuses, signals and streams."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from las_fast.errors import (
    JSON_ESCAPES,
    STOP_SIGNALS,
    FormerNameWarning,
    HiddenModelWarning,
    InputError,
    SlowPathWarning,
    Stopped,
    explain_error,
    mute,
    print_error,
    show,
)
from las_fast.progress import close_all, write
from las_fast.system import tune_memory

COMMANDS = {
    "train": ("las_fast.train", "train a model on recordings with transcripts"),
    "decode": ("las_fast.decode", "decode a split into a submission file, and score it"),
    "transcribe": ("las_fast.transcribe", "transcribe recordings into text, subtitles, JSON, tables or annotations"),
    "serve": ("las_fast.serve.__main__", "transcribe over HTTP, with OpenAI's API and a web page"),
    "lm": ("las_fast.lm", "estimate a language model from text, for --lm of other commands"),
    "tune": ("las_fast.tune", "find the best search settings on a development split"),
    "export": ("las_fast.export", "write a trained model and its decoding settings to a small file, or to ONNX"),
    "doctor": ("las_fast.doctor", "check the installation and the machine, and say what would make it better"),
    "report": ("las_fast.report", "write a page about a training, or compare several"),
    "attention": ("las_fast.attention", "draw what a model attends to in a recording"),
    "ops": ("las_fast.ops.__main__", "list the fast paths that work on this machine, and why others do not"),
    "demo": ("las_fast.demo", "synthesise a corpus, train on it, decode it and write a report"),
}


def run(main: Callable[..., Any], argv: list[str] | None = None) -> None:
    """Call main(argv), and exit with an error status if it fails.

    Bad input, and any other error from outside the program, prints one sentence after "error: " and exits with
    status 2. Ctrl-C exits with 130, SIGTERM with 143, SIGHUP with 129, a closed output pipe with 141. Bugs keep their
    traceback.
    """
    tune_memory()
    prepare_streams()
    with stop_signals(), plain_warnings():
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
    except SystemExit as end:  # from --help or a wrong option
        status = _flush()
        if end.code == 0 and status:
            return status
        raise
    except KeyboardInterrupt as stop:
        for s in STOP_SIGNALS:  # a second signal must not interrupt the exit
            signal.signal(s, signal.SIG_IGN)
        signum = getattr(stop, "signum", signal.SIGINT)
        print_error("interrupted" if signum == signal.SIGINT else f"stopped by {signal.Signals(signum).name}")
        return 128 + signum
    except BrokenPipeError:  # the reader of our output has exited, as in `| head`
        mute(sys.stdout)
        mute(sys.stderr)
        return 128 + signal.SIGPIPE
    except Exception as error:
        sentence = explain_error(error)
        if sentence is None:
            raise
        print_error(f"error: {show(sentence)}")
        return _flush() or 2


def _flush() -> int:
    """Flush stdout; return 0, 141 if the reader of a pipe has exited, or 2 after printing that it cannot be written."""
    try:
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        mute(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as error:
        mute(sys.stdout)  # or Python would flush again at exit, and fail
        print_error(f"error: standard output cannot be written ({error.strerror}); redirect it to another file")
        return 2


def prepare_streams() -> None:
    """Make print succeed in any encoding, and even if the caller has closed the standard streams.

    Characters that the encoding lacks, and bytes of names that are not UTF-8, are written as JSON escapes, so that
    printed JSON stays valid.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # occupies this number, which the next opened file would get otherwise
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (it stays open)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=JSON_ESCAPES)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # so that a log file shows each line at once


def require_stdout(instead: str) -> None:
    """Raise InputError if standard output is closed; `instead` is the option that writes the results to a file."""
    if sys.__stdout__ is None:
        raise InputError(f"standard output is closed, so the results cannot be printed; give {instead}")


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Inside the `with` block, SIGTERM and SIGHUP raise Stopped, so that cleanup runs as after Ctrl-C.

    Signals that the caller ignores stay ignored, such as SIGHUP under nohup.
    """

    def stop(signum: int, frame: Any) -> None:
        for s in caught:
            signal.signal(s, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        raise Stopped(signum)

    caught = {s: signal.getsignal(s) for s in STOP_SIGNALS if s != signal.SIGINT}
    caught = {s: handler for s, handler in caught.items() if handler != signal.SIG_IGN}
    for s in caught:
        signal.signal(s, stop)
    try:
        yield
    finally:
        for s, handler in caught.items():
            if signal.getsignal(s) is stop:
                signal.signal(s, handler)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Inside the `with` block, a warning of las_fast is printed once, in one line, without a place in the code."""
    usual = warnings.showwarning
    printed: set[str] = set()

    def show_warning(message: Any, category: type[Warning], *place: Any, **options: Any) -> None:
        if issubclass(category, (SlowPathWarning, FormerNameWarning, HiddenModelWarning)):
            if str(message) not in printed:
                printed.add(str(message))
                write(f"warning: {message}", file=sys.stderr)
        else:
            usual(message, category, *place, **options)

    warnings.showwarning = show_warning
    try:
        yield
    finally:
        if warnings.showwarning is show_warning:
            warnings.showwarning = usual


def dispatch(argv: list[str] | None = None) -> None:
    """Run the command named by the first argument with the remaining arguments."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: las-fast COMMAND [options]\n\nListen, Attend and Spell speech recognition.\n")
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
    """Entry point of `las-fast` and `python -m las_fast`."""
    run(dispatch, argv)
