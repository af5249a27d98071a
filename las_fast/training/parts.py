"""Divide batches that do not fit in memory into parts whose gradients add up to that of the batch."""

from __future__ import annotations

import math
import sys

from las_fast.progress import write


class Parts:
    """The number of parts of each batch, learned from batches that did not fit in memory."""

    def __init__(self, frames_per_batch: int):
        """frames_per_batch: the setting of data, for advice."""
        self.frames_per_batch = frames_per_batch
        self.limit = math.inf  # largest part that may fit: utterances times padded feature frames; inf: not known yet
        self.used = 1  # parts of the current batch

    def begin(self, utterances: int, frames: int) -> int:
        """Start a batch of utterances that are padded to `frames` feature frames; return its number of parts."""
        self.used = 1
        while self.used < utterances and self.size(utterances) * frames > self.limit:
            self.used *= 2
        return self.used

    def size(self, utterances: int) -> int:
        """Return the number of utterances in a part of the current batch; the last part may have fewer."""
        return -(-utterances // self.used)

    def halve(self, utterances: int, frames: int) -> int:
        """Halve the parts of the current batch, which did not fit in memory; return the new number of parts."""
        size = self.size(utterances)
        if self.limit == math.inf:
            write(
                f"warning: a batch of {size} utterances, {size * frames} frames, does not fit in memory; from here on "
                "such batches run in parts and give the same gradient; to avoid that, start again with "
                f"--data.frames-per-batch below {min(size * frames, self.frames_per_batch)}",
                file=sys.stderr,
            )
        self.limit = min(self.limit, -(-size // 2) * frames)
        self.used *= 2
        return self.used
