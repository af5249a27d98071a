"""Run a batch in parts if it does not fit in memory: the same gradient up to rounding, in less memory."""

from __future__ import annotations

import math
import sys

from las_fast.progress import write


class Parts:
    """How many parts a batch needs, as learned from batches that did not fit."""

    def __init__(self):
        self.limit = math.inf  # utterances times padded feature frames that fit, as far as known
        self.used = 1  # parts of the latest batch

    def begin(self, utterances: int, frames: int) -> int:
        """Return into how many parts to divide a batch of utterances padded to `frames` feature frames."""
        self.used = 1
        while self.used < utterances and self.size(utterances) * frames > self.limit:
            self.used *= 2
        return self.used

    def size(self, utterances: int) -> int:
        """Return the utterances of a part."""
        return -(-utterances // self.used)

    def halve(self, utterances: int, frames: int) -> int:
        """Note that the parts did not fit; return the number of parts of half their size."""
        size = self.size(utterances)
        if self.limit == math.inf:
            write(
                f"warning: a batch of {size} utterances, {size * frames} frames, does not fit in memory; from here on "
                "such batches run in parts and give the same gradient; to avoid that, start again with "
                f"--data.frames-per-batch below {size * frames}",
                file=sys.stderr,
            )
        self.limit = min(self.limit, -(-size // 2) * frames)
        self.used *= 2
        return self.used
