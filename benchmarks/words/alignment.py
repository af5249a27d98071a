"""The words that are recognised right, and those that are out of order."""

from __future__ import annotations

from collections.abc import Sequence

from Levenshtein import opcodes

from las_fast.output.transcripts import Word


def right_words(words: list[tuple[str, float | None]], recognised: Sequence[Word]) -> list[tuple[float, Word]]:
    """Return (known start, recognised word) of each word that is recognised right and whose start is known."""
    pairs = matches([word for word, _ in words], [word.text for word in recognised])
    return [(start, recognised[j]) for i, j in pairs if (start := words[i][1]) is not None]


def matches(reference: list[str], hypothesis: list[str]) -> list[tuple[int, int]]:
    """Return the pairs of indices of equal words in the Levenshtein alignment."""
    ids: dict[str, int] = {}
    texts = [
        "".join(chr(0x100 + ids.setdefault(word, len(ids))) for word in words) for words in (reference, hypothesis)
    ]
    blocks = [(i, j, end - i) for kind, i, end, j, _ in opcodes(*texts) if kind == "equal"]
    return [(i + n, j + n) for i, j, count in blocks for n in range(count)]


def count_disorder(words: Sequence[Word], seconds: float) -> int:
    """Count the words that do not lie inside the recording or do not follow the word before."""
    previous, wrong = 0.0, 0
    for word in words:
        wrong += not previous <= word.start < word.end <= seconds + 1e-6
        previous = word.end
    return wrong
