"""Rows of results: appended to a file as they are measured, and formatted as one table."""

from __future__ import annotations

import contextlib
import datetime
import math
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.rows import append_rows, machine_name

COLUMNS = ("date", "commit", "device", "torch", "part", "what", "shape", "dtype", "path", "value", "unit", "bound",
           "status", "note")  # fmt: skip
QUANTITY = ("what", "shape", "dtype", "unit", "status")  # rows with equal values here share a line of the table
MEASURED, PASS, FAIL, SKIPPED = "measured", "PASS", "FAIL", "skipped"  # the statuses of a row
NEEDS_CUDA = "needs CUDA"
# Errors of CUDA after which every later call in the process fails, in any library's words.
STICKY = ("illegal memory access", "illegal address", "misaligned address", "illegal instruction",
          "unspecified launch failure", "device-side assert")  # fmt: skip
MARGIN = 6.0  # a part starts no new item in its last seconds


class NeedsCuda(Exception):
    """Raised by a measurement that exists on CUDA only."""


class DeviceLost(Exception):
    """An error after which this process cannot use the device."""


class Record:
    """Writes the rows of one part.

    Args:
        path:    the CSV file, which rows are appended to.
        part:    name of the part.
        commit:  of the code.
        device:  name of the device.
        end:     time.monotonic() at which the part has to end.
    """

    def __init__(self, path: Path, part: str, *, commit: str, device: str, end: float = math.inf):
        self.path, self.part = path, part
        self.context = (datetime.date.today().isoformat(), commit, device, torch.__version__)
        self.end = end

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def row(
        self,
        what: str,
        value: float | str = "",
        unit: str = "",
        *,
        shape: str = "",
        dtype: torch.dtype | str = "",
        path: str = "",
        bound: float | str = "",
        status: str = MEASURED,
        note: str = "",
    ) -> None:
        """Append a row. bound is the lower bound of a measurement, or the tolerance of a check."""
        labels = (self.part, what, shape, str(dtype).removeprefix("torch."), path)
        row = (*self.context, *labels, rounded(value), unit, rounded(bound), status, " ".join(note.split()))
        append_rows(self.path, COLUMNS, [row])

    def check(self, what: str, error: float, tolerance: float, unit: str = "", **labels: str) -> None:
        """Append a row: PASS if the error is within its tolerance, else FAIL; NaN fails."""
        self.row(what, error, unit, bound=tolerance, status=PASS if error <= tolerance else FAIL, **labels)

    def skip(self, what: str, reason: str, **labels: str) -> None:
        self.row(what, status=SKIPPED, note=reason, **labels)

    @contextlib.contextmanager
    def attempt(self, what: str, **labels: str) -> Iterator[None]:
        """If the block fails, append a FAIL row instead of raising; after an illegal access, raise DeviceLost too."""
        try:
            yield
        except NeedsCuda:
            self.skip(what, NEEDS_CUDA, **labels)
        except DeviceLost:
            raise
        except Exception as error:
            traceback.print_exc()
            self.row(what, status=FAIL, note=reason_of(error), **labels)
            if is_device_lost(error):
                raise DeviceLost(
                    "the rest of the part was left out: the device cannot be used after this error"
                ) from None

    def while_time_remains(self, items: Sequence, what: str) -> Iterator:
        """Yield items until the part must end; record how many were left out."""
        for done, item in enumerate(items):
            if self.seconds_left() < MARGIN:
                return self.skip(what, f"{len(items) - done} of {len(items)} left out: no time remained")
            yield item


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else machine_name()


def require_cuda(device: str) -> None:
    """Raise NeedsCuda unless the device is cuda."""
    if device != "cuda":
        raise NeedsCuda


def rounded(value: float | str) -> float | str:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def is_device_lost(error: BaseException) -> bool:
    """Return whether an error of CUDA makes every later call in this process fail."""
    return any(fault in str(error).lower() for fault in STICKY)


def reason_of(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line[:200]}"


# --------------------------------------------------------------------------------------------------------------- table


def format_table(rows: Sequence[dict[str, str]]) -> str:
    """Format rows as one table: a section per part, a line per quantity, and the failures again at the end."""
    parts: dict[str, dict[tuple, list]] = {}
    for row in rows:
        quantities = parts.setdefault(row["part"], {})
        quantities.setdefault(tuple(row[name] for name in QUANTITY), []).append(row)
    lines = []
    for part, quantities in parts.items():
        lines += [f"== {part}", *map(_line, quantities.values())]
    failures = [row for row in rows if row["status"] == FAIL]
    lines += ["== failures", *(f"{row['part']}: {_line([row])}" for row in failures)] if failures else []
    return "\n".join([*lines, summary(rows)])


def summary(rows: Sequence[dict[str, str]]) -> str:
    counts = Counter(row["status"] for row in rows)
    return ", ".join(f"{counts[status]} {status}" for status in (PASS, FAIL, MEASURED, SKIPPED))


def _line(rows: list[dict[str, str]]) -> str:
    """Format one quantity's rows, which differ in path, value, bound and note."""
    first = rows[0]
    labels = " ".join(filter(None, (first["what"], first["shape"], first["dtype"])))
    status = "" if first["status"] == MEASURED else first["status"]
    return f"{status:<8}{labels}: " + ", ".join(map(_value, rows))


def _value(row: dict[str, str]) -> str:
    relation = "at most" if row["status"] in (PASS, FAIL) else "bound"
    bound = f"({relation} {row['bound']})" if row["bound"] else ""
    note = f"[{row['note']}]" if row["note"] else ""
    return " ".join(filter(None, (row["path"], row["value"], row["unit"], bound, note)))
