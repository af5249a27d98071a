"""Progress of long loops: a bar if stderr is a terminal, occasional plain lines if it is a file or a pipe.

    with ProgressBar(len(files), "reading", "files") as bar:
        for file in files:
            ...
            bar.update()

    for file in track(files, "reading", "files"):
        ...

A plain line reads "reading: 45% (54 of 120 files), 12 s left". Lines are 10% and at least 2 seconds apart, or a minute
if 10% take longer, so that short loops leave nothing in a log and long ones show that they go on. They never contain a
carriage return.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TextIO, TypeVar

Item = TypeVar("Item")

MIN_SHARE = 0.1  # of the total between two plain lines
MIN_SECONDS = 2.0  # between two plain lines; doubles after each line if the total is unknown
MAX_SECONDS = 60.0  # between two plain lines, if the count has changed
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}{postfix}]"
BAR_WITHOUT_TOTAL = "{desc}: {n:.0f} {unit} [{elapsed}{postfix}]"

_open: list[ProgressBar] = []  # the displays that are not closed yet


class ProgressBar:
    """A count towards `total`, shown on stderr until it is closed; usable in a `with` statement.

    Args:
        total: final count, `done` included; None if unknown.
        what:  the activity, such as "reading dev".
        unit:  the items counted, in the plural.
        done:  count at the start.
        show:  whether to show anything.
    """

    def __init__(self, total: float | None, what: str, unit: str, *, done: float = 0, show: bool = True):
        self.total, self.what, self.unit = total, what, unit
        self.n = self._start = self._shown_at = done
        self._began = self._last = time.monotonic()
        self._min_gap, self._has_printed, self._note = MIN_SECONDS, False, ""
        self._stream = sys.stderr if show else None
        self._bar = self._make_bar() if show and _is_terminal(sys.stderr) else None
        _open.append(self)

    def update(self, n: float = 1) -> None:
        """Add n to the count."""
        self.n += n
        if self.total is not None:
            self.n = min(self.n, self.total)  # a sum of floats may exceed the total
        if self._bar is not None:
            with self._ignoring_errors():
                self._bar.update(self.n - self._bar.n)
        elif self._stream is not None and self._is_due():
            self._print(self._line())

    def note(self, text: str) -> None:
        """Show `text` after the count, from the next update of the display."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def write(self, line: str, *, file: TextIO | None = None) -> None:
        """Print a line to `file` (default stdout) above the bar."""
        write(line, file=file)

    def close(self) -> None:
        """Remove the bar; if plain lines were printed, print a last one with the total time."""
        if self not in _open:
            return
        _open.remove(self)
        if self._bar is not None:
            with self._ignoring_errors():
                self._bar.close()
        elif self._has_printed and self.total in (None, self.n):
            self._print(f"{self._count()} in {format_duration(time.monotonic() - self._began)}")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_bar(self) -> Any:
        from tqdm import tqdm

        form = BAR_WITHOUT_TOTAL if self.total is None else BAR
        assert self._stream is not None
        has_width = os.get_terminal_size(self._stream.fileno()).columns > 0  # some terminals report 0
        width = {"dynamic_ncols": True} if has_width else {"ncols": 80}
        return tqdm(total=self.total, desc=self.what, initial=self.n, unit=self.unit, bar_format=form,
                    file=self._stream, leave=False, **width)  # fmt: skip

    def _is_due(self) -> bool:
        waited = time.monotonic() - self._last
        if self.n == self.total:
            return False
        if self.total is None:
            return waited >= min(self._min_gap, MAX_SECONDS)
        done = self.n - self._shown_at
        return done > 0 and waited >= (MIN_SECONDS if done >= MIN_SHARE * self.total else MAX_SECONDS)

    def _line(self) -> str:
        note = f"; {self._note}" if self._note else ""
        if self.total is None:
            self._min_gap *= 2
            return f"{self._count()}{note}"
        elapsed = time.monotonic() - self._began
        left = elapsed * (self.total - self.n) / (self.n - self._start)
        return f"{self._count()}, {format_duration(left)} left{note}"

    def _count(self) -> str:
        if self.total is None:
            return f"{self.what}: {self.n:.0f} {self.unit}"
        share = 100 * self.n / self.total
        return f"{self.what}: {int(share)}% ({self.n:.0f} of {self.total:.0f} {self.unit})"

    def _print(self, line: str) -> None:
        self._last, self._shown_at, self._has_printed = time.monotonic(), self.n, True
        with self._ignoring_errors():
            print(line, file=self._stream, flush=True)

    @contextlib.contextmanager
    def _ignoring_errors(self) -> Iterator[None]:
        """Stop showing progress if printing fails: a full disk or a closed terminal must not end the work."""
        try:
            yield
        except (OSError, ValueError):
            self._bar, self._stream = None, None


def track(
    items: Iterable[Item], what: str, unit: str, *, total: float | None = None, show: bool = True
) -> Iterator[Item]:
    """Yield the items and show how many are done; `total` is their number if len(items) is not available."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    with ProgressBar(total, what, unit, show=show) as bar:
        for item in items:
            yield item
            bar.update()


def write(line: str, *, file: TextIO | None = None, end: str = "\n") -> None:
    """Print a line to `file` (default stdout) above the bars."""
    file = file or sys.stdout
    if any(bar._bar is not None for bar in _open):
        from tqdm import tqdm

        tqdm.write(line, file=file, end=end)
    else:
        print(line, file=file, end=end, flush=True)


def close_all() -> None:
    """Close all open bars, so that the next print starts on its own line."""
    for bar in reversed(tuple(_open)):
        bar.close()


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def format_duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
