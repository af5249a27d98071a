"""The parts of a run, and the process of one part: python -m benchmarks.device.parts NAME ..."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import signal
import traceback
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of prctl
ROWS, LOG, TABLE = "rows.csv", "log.txt", "table.txt"  # files in the results folder


@dataclass(frozen=True)
class Part:
    """A module of this package with a function run(options, record)."""

    name: str
    seconds: int  # time limit


PARTS = (  # the most important first; kernels uses all remaining time
    Part("machine", 40),
    Part("training", 130),
    Part("checks", 80),
    Part("cases", 120),
    Part("searching", 60),
    Part("an4", 130),
    Part("lstm", 40),
    Part("decoding", 60),
    Part("ops", 60),
    Part("kernels", 240),
)


@dataclass(frozen=True)
class Options:
    """Options that every part receives."""

    out: Path  # results folder
    device: str  # cuda or cpu
    quick: bool  # tiny sizes, to try the code
    commit: str  # for the rows
    data: Path | None  # AN4


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that the command and the processes of its parts share."""
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder for rows, table and log")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the command itself")
    parser.add_argument("--commit", default="", metavar="ID", help="commit for the rows (default: git's)")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="AN4 in the HW4P2 layout, to train and decode")


def command_of(part: str, options: Options, end: float) -> list[str]:
    """Return the arguments of `python` that run one part until time.monotonic() is `end`."""
    words = ["-m", "benchmarks.device.parts", part, "--out", options.out, "--device", options.device]
    words += ["--commit", options.commit, "--end", f"{end:.1f}"]
    words += ["--quick"] if options.quick else []
    words += ["--data", options.data] if options.data else []
    return [str(word) for word in words]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device.parts", description=__doc__)
    parser.add_argument("part", choices=[part.name for part in PARTS])
    add_options(parser)
    # The clock is that of the whole system, so importing torch counts.
    parser.add_argument("--end", type=float, required=True, help="time.monotonic() at which the part has to end")
    arguments = parser.parse_args(argv)
    options = Options(arguments.out, arguments.device, arguments.quick, arguments.commit, arguments.data)
    run_part(arguments.part, options, arguments.end)


def end_with_parent() -> None:
    """Let the system kill this process when its parent ends, even by SIGKILL: it must not go on using the GPU."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_part(name: str, options: Options, end: float) -> None:
    """Run one part in this process; record an exception as a FAIL row."""
    import torch

    from benchmarks.device.record import FAIL, Record, device_name, reason_of

    if options.quick:
        torch.set_num_threads(1)
    device = device_name(options.device)
    record = Record(options.out / ROWS, name, commit=options.commit, device=device, end=end)
    try:
        importlib.import_module(f"benchmarks.device.{name}").run(options, record)
    except Exception as error:
        traceback.print_exc()
        record.row("the part itself", status=FAIL, note=reason_of(error))


if __name__ == "__main__":
    end_with_parent()
    main()
