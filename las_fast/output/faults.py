"""Texts of a model that does not follow the audio: blank, one piece again and again, or the same for all utterances."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

MIN_SHARE = 0.2  # of the texts that are blank or repeat; a few occur with any model
MIN_SAME_SHARE = 0.5  # of the texts that are alike: people do say the same, such as YES
MIN_REPEATED = 20  # characters; people repeat shorter pieces, as in NO NO NO
REPETITION = re.compile(r"(.{1,12}?)\1{2,}")  # a piece at least three times in a row


def repeated_piece(text: str) -> str:
    """Return the piece that makes up half of the text by repetition, at least MIN_REPEATED characters; "" if none."""
    needed = max(MIN_REPEATED, len(text) / 2)
    return next((match[1] for match in REPETITION.finditer(text) if len(match[0]) >= needed), "")


def describe_fault(texts: Sequence[str]) -> str:
    """Describe what is wrong with the texts of distinct utterances, such as "28 of 30 texts are blank"; "" if nothing.

    Few texts with a fault are none; see MIN_SHARE and MIN_SAME_SHARE.
    """
    count, needed = len(texts), max(2, MIN_SHARE * len(texts))
    blank = sum(not text.strip() for text in texts)
    if blank >= needed:
        return f"{blank} of {count} texts are blank"
    pieces = [piece for piece in map(repeated_piece, texts) if piece]
    if len(pieces) >= needed:
        return f"{len(pieces)} of {count} texts repeat one piece, such as {(pieces[0] * 3)!r}"
    text, same = Counter(texts).most_common(1)[0] if texts else ("", 0)
    if same >= max(2, MIN_SAME_SHARE * count):
        return f"{same} of {count} texts are the same, {text[:40]!r}"
    return ""
