"""Stop signals during a training, which stops only where its state is consistent and no file is being written."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

from las_fast.errors import STOP_SIGNALS, Stopped

GRACE_SECONDS = 2.0  # stop signals within this time after the first one are ignored


class StopSignals:
    """Records SIGINT, SIGTERM and SIGHUP, so that the training can stop at the next check."""

    def __init__(self):
        self.signum = 0  # of the first signal; 0: none came
        self.deferred = False  # whether files are being written
        self._first_at = 0.0  # time.monotonic()

    def check(self) -> None:
        """Raise Stopped if a signal came. Call it only where the state is consistent."""
        if self.signum:
            raise Stopped(self.signum)

    @contextlib.contextmanager
    def defer(self) -> Iterator[None]:
        """Prevent a second signal from interrupting the `with` block, which writes files."""
        before, self.deferred = self.deferred, True
        try:
            yield
        finally:
            self.deferred = before

    @contextlib.contextmanager
    def catch(self) -> Iterator[None]:
        """Record signals in the `with` block. Ignored signals except SIGINT stay ignored, such as SIGHUP under nohup.

        A second signal raises Stopped at once, except in `defer`. Signals within GRACE_SECONDS count as one, because
        process groups and launchers pass the same signal on.
        """
        signals = [s for s in STOP_SIGNALS if s == signal.SIGINT or signal.getsignal(s) != signal.SIG_IGN]
        old = {signum: signal.signal(signum, self._receive) for signum in signals}
        try:
            yield
        finally:
            for signum, handler in old.items():
                signal.signal(signum, handler)

    def _receive(self, signum: int, frame: object) -> None:
        if not self.signum:
            self._first_at, self.signum = time.monotonic(), signum
        elif time.monotonic() - self._first_at > GRACE_SECONDS and not self.deferred:
            raise Stopped(signum)
