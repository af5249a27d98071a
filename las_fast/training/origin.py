"""The starts of a run: RUN/starts.jsonl has a line with command, commit, machine and date for each start."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from las_fast import __version__
from las_fast.files import write_text_atomically
from las_fast.system import current_commit, machine_name

STARTS = "starts.jsonl"  # in a run folder


def write_start(run: Path, arguments: Sequence[str], *, step: int, resumed: bool, device: str) -> None:
    """Append a line to run/starts.jsonl.

    Args:
        run:       the run folder.
        arguments: of the command las_fast.train.
        step:      steps taken before this start.
        resumed:   whether the start continues an earlier one, which may have saved its state at step 0.
        device:    of the training, such as "cuda:0".

    Raises:
        InputError: the file cannot be written.
    """
    row = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"python -m las_fast.train {shlex.join(arguments)}",
        "step": step,
        "resumed": resumed,
        "device": device,
        "machine": machine_name(),
        "version": __version__,
        "commit": current_commit(Path(__file__).parents[2]),
    }
    rows = [*read_starts(run), row]
    write_text_atomically(run / STARTS, "".join(json.dumps(row) + "\n" for row in rows))


def read_starts(run: Path) -> list[dict]:
    """Return the rows of run/starts.jsonl; [] if an earlier version of las_fast wrote none. Other lines are skipped."""
    path = run / STARTS
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def run_id(run: Path) -> str | None:
    """Return 12 hexadecimal digits that a training keeps when it is resumed: a hash of its first start.

    None if starts.jsonl has no such start.
    """
    fresh = [row for row in read_starts(run) if row.get("step") == 0 and not row.get("resumed")]
    # More than one if the first saved nothing.
    return hashlib.sha256(json.dumps(fresh[-1]).encode()).hexdigest()[:12] if fresh else None
