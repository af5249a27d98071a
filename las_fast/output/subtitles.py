"""Cut timed words into subtitle cues that can be read at a glance.

A cue has at most two lines of 42 characters, is shown for 1 to 7 seconds, and does not continue over a pause longer
than 0.6 seconds: the usual rules of broadcasters. Between such pauses, dynamic programming finds the cuts: preferably
after a shorter pause or a punctuation mark, and not after a short word, which mostly belongs to the next word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest

from las_fast.output.transcripts import Word

MIN_SECONDS = 1.0  # of a cue, unless pauses leave less time
MAX_SECONDS = 7.0  # of a cue
MAX_PAUSE = 0.6  # seconds between two words of a cue
CLEAR_PAUSE = 0.3  # seconds; a longer pause is no better place to cut
SHORT_WORD = 3  # characters; most articles, prepositions and conjunctions have at most three
STOPS, COMMAS = (".", "?", "!"), (",", ";", ":")


@dataclass(frozen=True)
class SubtitleSize:
    """Limits of a subtitle."""

    width: int = 42  # characters per line
    lines: int = 2


@dataclass(frozen=True)
class Cue:
    """A subtitle: the words of each line, and when it is shown, in seconds."""

    start: float
    end: float
    lines: tuple[tuple[Word, ...], ...]

    @property
    def text(self) -> str:
        """The lines, separated by newlines."""
        return "\n".join(" ".join(word.text for word in line) for line in self.lines)


def make_cues(words: Sequence[Word], size: SubtitleSize | None = None) -> list[Cue]:
    """Cut the words of a recording into cues, in order; cues do not overlap.

    A word longer than a line is broken, and one longer than MAX_SECONDS counts as MAX_SECONDS long. A cue is shorter
    than MIN_SECONDS only if the cues before and after it leave no time.

    Args:
        words: in order of time; times in seconds.
        size:  limits of a cue; by default SubtitleSize().
    """
    size = size or SubtitleSize()
    pieces = [piece for word in words for piece in _break_long_word(word, size.width)]
    cues = [cue for phrase in _phrases(pieces) for cue in _cut(phrase, size)]
    shown: list[Cue] = []
    for cue, following in zip_longest(cues, cues[1:]):
        before = shown[-1].end if shown else 0.0
        shown.append(_show_long_enough(cue, before, following.start if following else math.inf))
    return shown


def _break_long_word(word: Word, width: int) -> Iterator[Word]:
    """Yield a word in parts of at most `width` characters; they share its time, at most MAX_SECONDS, by length."""
    end = min(word.end, word.start + MAX_SECONDS)
    per_character = (end - word.start) / max(1, len(word.text))  # seconds
    for first in range(0, len(word.text), width):
        text = word.text[first : first + width]
        start = word.start + first * per_character
        yield replace(word, text=text, start=start, end=start + len(text) * per_character)


def _phrases(words: Sequence[Word]) -> Iterator[list[Word]]:
    """Yield the words between pauses longer than MAX_PAUSE."""
    phrase: list[Word] = []
    for word in words:
        if phrase and word.start - phrase[-1].end > MAX_PAUSE:
            yield phrase
            phrase = []
        phrase.append(word)
    if phrase:
        yield phrase


def _cut(words: list[Word], size: SubtitleSize) -> list[Cue]:
    """Cut a phrase into the cues of lowest total cost, by dynamic programming."""
    breaks = [*(_cost_of_break(a, b) for a, b in pairwise(words)), 0.0]
    best = [0.0] + [math.inf] * len(words)  # best[n]: cost of the first n words
    previous = [0] * (len(words) + 1)
    for last in range(1, len(words) + 1):
        for first in reversed(range(last)):
            lines = _wrap(words[first:last], size.width)
            if first < last - 1 and (len(lines) > size.lines or _seconds(words[first:last]) > MAX_SECONDS):
                break
            until = words[last].start if last < len(words) else math.inf
            cost = best[first] + _cost_of_cue(words[first:last], until) + breaks[last - 1]
            if cost < best[last]:
                best[last], previous[last] = cost, first
    bounds = [len(words)]
    while bounds[-1]:
        bounds.append(previous[bounds[-1]])
    return [_cue(words[first:last], size) for last, first in pairwise(bounds)][::-1]


def _cost_of_break(before: Word, after: Word) -> float:
    """Return the cost of ending a cue between two words, from 0 to 1.5."""
    if before.text.endswith(STOPS):
        return 0.0
    pause = min(1.0, max(0.0, after.start - before.end) / CLEAR_PAUSE)
    cost = min(1.0 - pause, 0.3 if before.text.endswith(COMMAS) else 1.0)
    return cost + (0.5 if len(before.text) <= SHORT_WORD else 0.0)


def _cost_of_cue(words: list[Word], until: float) -> float:
    """Return the cost of a cue that must end by `until`.

    The square makes two cues of similar duration cheaper than a long and a short one.
    """
    missing = max(0.0, MIN_SECONDS - (until - words[0].start))
    return 1.0 + (_seconds(words) / MAX_SECONDS) ** 2 + 10.0 * missing


def _seconds(words: list[Word]) -> float:
    return words[-1].end - words[0].start


def _cue(words: list[Word], size: SubtitleSize) -> Cue:
    """Make a cue with as few lines as possible, of similar lengths."""
    count = len(_wrap(words, size.width))
    narrow = (_wrap(words, width) for width in range(max(len(word.text) for word in words), size.width + 1))
    lines = next(lines for lines in narrow if len(lines) == count)
    return Cue(words[0].start, words[-1].end, lines)


def _wrap(words: Sequence[Word], width: int) -> tuple[tuple[Word, ...], ...]:
    """Break words into lines of at most `width` characters, each filled before the next."""
    lines: list[list[Word]] = []
    length = width
    for word in words:
        if length + 1 + len(word.text) > width:
            lines.append([])
            length = -1
        lines[-1].append(word)
        length += 1 + len(word.text)
    return tuple(map(tuple, lines))


def _show_long_enough(cue: Cue, before: float, after: float) -> Cue:
    """Lengthen a cue to MIN_SECONDS, first at its end and then at its start, within `before` and `after`."""
    start = max(cue.start, before)
    end = min(max(cue.end, start + MIN_SECONDS), start + MAX_SECONDS, max(after, start))
    return replace(cue, start=min(start, max(before, end - MIN_SECONDS)), end=end)
