"""Detect texts of a model that does not follow the audio: blank, repetitive, or the same for many utterances."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

MIN_SHARE = 0.2  # of texts that are blank or repetitive; any model writes a few
MIN_SAME_SHARE = 0.5  # of texts that are equal; people do say the same, such as YES
MIN_REPEATED = 20  # characters of a repetition; people say shorter ones, such as NO NO NO
REPETITION = re.compile(r"(.{1,12}?)\1{2,}")  # a piece at least three times in a row


def repeated_piece(text: str) -> str:
    """Return the piece whose repetitions are half of the text and at least MIN_REPEATED characters; "" if none."""
    needed = max(MIN_REPEATED, len(text) / 2)
    return next((match[1] for match in REPETITION.finditer(text) if len(match[0]) >= needed), "")


def describe_fault(texts: Sequence[str]) -> str:
    """Describe the fault of many texts of distinct utterances, such as "28 of 30 texts are blank"; "" if there is none.

    Many are at least two, and at least MIN_SHARE of the texts; for equal texts, MIN_SAME_SHARE.
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
