"""Progress of long loops: a bar where stderr is a terminal, a plain line now and then where it is a file or a pipe.

    with progress(len(files), "reading", "files") as shown:
        for file in files:
            ...
            shown.update()

    for file in track(files, "reading", "files"):
        ...

A plain line reads "reading: 45% (54 of 120 files), 12 s left" and comes at most once in 10% and in 2 seconds, so that
short loops leave nothing in a log. Lines never hold a carriage return.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TextIO, TypeVar

Item = TypeVar("Item")

SHARE = 0.1  # of the total between two plain lines
SECONDS = 2.0  # between two plain lines; they are twice as far apart each time where the total is unknown
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}{postfix}]"
ENDLESS = "{desc}: {n:.0f} {unit} [{elapsed}{postfix}]"

_open: list[Progress] = []  # bars and counts that are on the screen now


class Progress:
    """What `progress` returns: a count that is shown. Close it, or use it in a `with` statement."""

    def __init__(self, total: float | None, what: str, unit: str, *, done: float = 0, show: bool = True):
        self.total, self.what, self.unit = total, what, unit
        self.n = self._start = self._shown_at = done
        self._began = self._last = time.monotonic()
        self._gap, self._has_spoken, self._note = SECONDS, False, ""
        self._stream = sys.stderr if show else None
        self._bar = self._make_bar() if show and _is_terminal(sys.stderr) else None
        _open.append(self)

    def update(self, n: float = 1) -> None:
        """Count n more."""
        self.n = self.n + n if self.total is None else min(self.n + n, self.total)  # sums of floats may pass the total
        if self._bar is not None:
            with self._giving_up():
                self._bar.update(self.n - self._bar.n)
        elif self._stream is not None and self._is_due():
            self._say(self._line())

    def note(self, text: str) -> None:
        """Show `text` behind the count, as of the next time it is drawn."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def write(self, line: str, *, file: TextIO | None = None) -> None:
        """Print a line to `file` (default stdout) above the bar."""
        write(line, file=file)

    def close(self) -> None:
        """Take the bar off the screen; end the plain lines, where there were any, with the whole time."""
        if self not in _open:
            return
        _open.remove(self)
        if self._bar is not None:
            with self._giving_up():
                self._bar.close()
        elif self._has_spoken and self.n == self.total:
            self._say(f"{self._count()} in {_duration(time.monotonic() - self._began)}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_bar(self) -> Any:
        from tqdm import tqdm

        form = ENDLESS if self.total is None else BAR
        assert self._stream is not None
        known = os.get_terminal_size(self._stream.fileno()).columns > 0  # some terminals do not know their width
        width = {"dynamic_ncols": True} if known else {"ncols": 80}
        return tqdm(total=self.total, desc=self.what, initial=self.n, unit=self.unit, bar_format=form,
                    file=self._stream, leave=False, **width)  # fmt: skip

    def _is_due(self) -> bool:
        if time.monotonic() - self._last < self._gap or self.n == self.total:
            return False
        return self.total is None or self.n - self._shown_at >= SHARE * self.total

    def _line(self) -> str:
        note = f"; {self._note}" if self._note else ""
        if self.total is None:
            self._gap *= 2
            return f"{self._count()}{note}"
        spent = time.monotonic() - self._began
        left = spent * (self.total - self.n) / (self.n - self._start)  # at least SHARE of the total is done
        return f"{self._count()}, {_duration(left)} left{note}"

    def _count(self) -> str:
        if self.total is None:
            return f"{self.what}: {self.n:.0f} {self.unit}"
        share = 100 * self.n / self.total
        return f"{self.what}: {int(share)}% ({self.n:.0f} of {self.total:.0f} {self.unit})"

    def _say(self, line: str) -> None:
        self._last, self._shown_at, self._has_spoken = time.monotonic(), self.n, True
        with self._giving_up():
            print(line, file=self._stream, flush=True)

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Show nothing more where that fails: a full disk or a terminal that was closed must not end the work."""
        try:
            yield
        except (OSError, ValueError):
            self._bar, self._stream = None, None


def progress(total: float | None, what: str, unit: str, *, done: float = 0, show: bool = True) -> Progress:
    """Return a count towards `total`, shown on stderr until it is closed.

    Args:
        total: how many there will be, done ones counted; None where that is not known.
        what:  what is being done, such as "reading dev".
        unit:  what is counted, in the plural.
        done:  how many were done before.
        show:  False shows nothing.
    """
    return Progress(total, what, unit, done=done, show=show)


def track(
    items: Iterable[Item], what: str, unit: str, *, total: float | None = None, show: bool = True
) -> Iterator[Item]:
    """Yield the items and show how many were taken; total: how many there are, where len(items) does not say it."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    with progress(total, what, unit, show=show) as shown:
        for item in items:
            yield item
            shown.update()


def write(line: str, *, file: TextIO | None = None, end: str = "\n") -> None:
    """Print a line to `file` (default stdout) above whatever bars are shown."""
    file = file or sys.stdout
    if any(shown._bar is not None for shown in _open):
        from tqdm import tqdm

        tqdm.write(line, file=file, end=end)
    else:
        print(line, file=file, end=end, flush=True)


def close_all() -> None:
    """Close every count that is still open, so that what is printed next begins its own line."""
    for shown in reversed(tuple(_open)):
        shown.close()


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
