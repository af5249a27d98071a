"""Prove and measure las_fast on a GPU: every part in its own process, with its own time limit.

    python -m benchmarks.device --out FOLDER [--data AN4] [--commit ID]
    python -m benchmarks.device --out FOLDER --device cpu --quick

It needs torch, Triton, numpy, PyYAML, safetensors and pytest; training AN4 also needs TensorBoard. It needs neither
pip nor git, nor the packages for audio. A part that fails or exceeds its limit does not stop the others. At the end
one table of all rows is printed; the exit status is 1 if a row says FAIL.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from benchmarks.device.parts import LOG, PARTS, ROWS, TABLE, Options, Part, add_options, command_of
from las_fast.cli import run
from las_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 530  # seconds for all parts together
QUICK_FACTOR = 4  # a quick run measures nothing and may share its CPU, so its parts may take longer
GRACE = 4.0  # seconds for a part to end by itself
TAIL = 12  # last log lines to print if a part failed


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help=f"in all (default: {LIMIT})")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    began = time.monotonic()
    check(arguments)
    from benchmarks.device.record import FAIL, format_table
    from benchmarks.rows import current_commit, read_rows

    out = arguments.out.resolve()
    data = arguments.data and arguments.data.resolve()
    options = Options(out, arguments.device, arguments.quick, arguments.commit or current_commit(), data)
    try:
        with (out / LOG).open("a", encoding="utf-8") as log:
            for part in PARTS:
                if part.name in arguments.only:
                    run_one(part, options, arguments.limit - (time.monotonic() - began), log)
    finally:  # also after Ctrl-C
        rows = read_rows(out / ROWS)
        (out / TABLE).write_text(format_table(rows) + "\n", encoding="utf-8")
        print(format_table(rows), flush=True)
    if any(row["status"] == FAIL for row in rows):
        raise SystemExit(1)


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError for unusable options; create the results folder."""
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            advice = "give --device cpu --quick to try the command itself"
            raise InputError(f"--device cuda: torch {torch.__version__} finds no CUDA device here; {advice}")
    if arguments.data is not None and not arguments.data.is_dir():
        advice = "give AN4 in the HW4P2 layout, or leave the option out"
        raise InputError(f"--data {arguments.data} is not a folder; {advice}")
    if not arguments.limit > 0:
        raise InputError(f"--limit must be more than 0 seconds; got {arguments.limit:g}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if (arguments.out / ROWS).exists():
        raise InputError(f"--out {arguments.out} already holds {ROWS} of another run; give a new folder")


def run_one(part: Part, options: Options, seconds_left: float, log: TextIO) -> None:
    """Run a part within its limit and the time left; record a FAIL row if it fails or is stopped."""
    from benchmarks.device.record import FAIL, Record

    seconds, started = min(part.seconds * (QUICK_FACTOR if options.quick else 1), seconds_left), time.monotonic()
    record = Record(options.out / ROWS, part.name, commit=options.commit, device=options.device)
    if seconds < 2 * GRACE:
        record.skip("the part itself", "not run: the time of --limit was used up; run it alone with --only")
        return
    print(f"== {part.name}, at most {seconds:.0f} s", flush=True)
    log.write(f"== {part.name}\n")
    log.flush()
    position = log.tell()
    problem = run_limited(
        [sys.executable, "-u", *command_of(part.name, options, started + seconds - GRACE)], seconds, log
    )
    if problem:
        record.row("the part itself", status=FAIL, note=problem)
        log.flush()
        print(last_lines(options.out / LOG, position), flush=True)
    print(f"   {problem or 'ended'} after {time.monotonic() - started:.0f} s", flush=True)


def run_limited(command: list[str], seconds: float, log: TextIO) -> str:
    """Run a command, write its output to the log, and end every process it started; return why it failed, or ""."""
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped at its limit of {seconds:.0f} s"
    finally:
        end(process)
    if status < 0:
        return f"ended by signal {signal.Signals(-status).name}"
    return f"ended with exit status {status}" if status else ""


def end(process: subprocess.Popen) -> None:
    """End the processes of a group that are still running: by SIGTERM first, after GRACE seconds by SIGKILL."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 10.0)):  # a hung driver may outlast both
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def last_lines(path: Path, position: int) -> str:
    """Return the last TAIL lines of what was written to a file after a position."""
    with path.open(encoding="utf-8", errors="replace") as file:
        file.seek(position)
        return "\n".join(file.read().splitlines()[-TAIL:])


if __name__ == "__main__":
    run(main)
