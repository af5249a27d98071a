"""Sections of a report on a decoded split: worst utterances, confused characters, error by length and confidence."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from las_fast.output.figures import Curve, curves_svg, legend

MAX_WORST, MAX_BEST = 12, 3  # utterances in the tables
MAX_CONFUSIONS = 20
LENGTH_BINS, CONFIDENCE_BINS = 8, 10
MAX_DRAWN = 1000  # utterances drawn as dots
NOTHING = "nothing"


class Decoded(NamedTuple):
    """A decoded utterance."""

    id: str
    reference: str
    hypothesis: str
    words: tuple[tuple[str, float], ...] = ()  # (word, confidence from 0 to 1) of the hypothesis, if known

    @property
    def cer(self) -> float:
        """Character edits per 100 characters of the reference."""
        from Levenshtein import distance

        return 100 * distance(self.reference, self.hypothesis) / max(1, len(self.reference))


@dataclass(frozen=True)
class DecodedSplit:
    """What a report shows of a decoding; by default nothing."""

    utterances: Sequence[Decoded] = ()
    results: Mapping[str, float] = field(default_factory=dict)  # any of utterances, ld, cer, wer and rtfx
    audio: Mapping[str, str] = field(default_factory=dict)  # data URLs of recordings by utterance id, for some or all


# --------------------------------------------------------------------------------------------------------- Utterances


def differences(reference: str, hypothesis: str) -> tuple[str, str]:
    """Return reference and hypothesis as HTML; edits are in spans of the classes delete, insert and replace."""
    from Levenshtein import opcodes

    reference_parts, hypothesis_parts = [], []
    for kind, a, b, c, d in opcodes(reference, hypothesis):
        reference_parts.append(_span(kind, reference[a:b]))
        hypothesis_parts.append(_span(kind, hypothesis[c:d]))
    return "".join(reference_parts), "".join(hypothesis_parts)


def _span(kind: str, text: str) -> str:
    escaped = html.escape(text)
    return escaped if kind == "equal" or not text else f'<span class="{kind}">{escaped}</span>'


def worst(rows: Iterable[Decoded]) -> list[Decoded]:
    """Return the utterances with errors, highest CER first, at most MAX_WORST."""
    wrong = [row for row in rows if row.reference != row.hypothesis]
    return sorted(wrong, key=lambda row: (row.cer, *row[:3]), reverse=True)[:MAX_WORST]


def utterances(rows: Sequence[Decoded], audio: Mapping[str, str]) -> str:
    """Return the section on the worst and the best utterances; "" without rows.

    audio: data URLs of recordings by utterance id, for some or all.
    """
    if not rows:
        return ""
    correct = sum(1 for row in rows if row.cer == 0)
    bad = worst(rows)
    others = sorted(set(rows) - set(bad), key=lambda row: (row.cer, -len(row.reference), *row[:3]))[:MAX_BEST]
    key = (
        '<p>Each utterance: the reference, and below it the hypothesis. <span class="text"><span class="delete">missed'
        '</span> <span class="insert">added</span> <span class="replace">replaced</span></span></p>'
    )
    tables = "".join(
        f"<h3>{name}</h3>{_table(part, audio)}" for name, part in (("Worst", bad), ("Best", others)) if part
    )
    return f"<h2>Utterances</h2><p>{correct:,} of {len(rows):,} have no error.</p>{key}{tables}"


def _table(rows: Sequence[Decoded], audio: Mapping[str, str]) -> str:
    lines = []
    for row in rows:
        reference, hypothesis = differences(row.reference, row.hypothesis)
        texts = f"{reference or '&nbsp;'}<br>{hypothesis or '&nbsp;'}" if row.reference != row.hypothesis else reference
        lines.append(
            f'<tr><td class="name">{html.escape(row.id)}</td><td class="rate">{row.cer:.0f} %</td>'
            f'<td class="text">{texts}{_player(row.id, audio)}</td></tr>'
        )
    head = '<tr><th>utterance</th><th class="rate">CER</th><th>reference / hypothesis</th></tr>'
    return f'<div class="wide"><table class="utterances">{head}{"".join(lines)}</table></div>'


def _player(utterance: str, audio: Mapping[str, str]) -> str:
    if utterance not in audio:
        return ""
    label = html.escape(f"recording of {utterance}")
    return f'<audio controls preload="none" aria-label="{label}" src="{audio[utterance]}"></audio>'


# --------------------------------------------------------------------------------------------------------- Confusions


def count_confusions(rows: Iterable[Decoded]) -> Counter[tuple[str, str]]:
    """Count the character edits (reference, hypothesis); "" on one side is an insertion or a deletion."""
    from Levenshtein import editops

    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        for kind, i, j in editops(row.reference, row.hypothesis):
            reference = "" if kind == "insert" else row.reference[i]
            counts[reference, "" if kind == "delete" else row.hypothesis[j]] += 1
    return counts


def confusions(rows: Sequence[Decoded]) -> str:
    """Return the section on confused characters; "" if there are none."""
    counts = count_confusions(rows)
    if not counts:
        return ""
    total, highest = counts.total(), max(counts.values())
    lines = []
    for (reference, recognised), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_CONFUSIONS]:
        bar = f'<span class="bar" style="width: {100 * count / highest:.0f}%"></span>'
        lines.append(
            f'<tr><td class="name">{_character(reference)}</td><td class="name">{_character(recognised)}</td>'
            f'<td class="rate">{count:,}</td><td class="rate">{100 * count / total:.1f} %</td>'
            f'<td class="full">{bar}</td></tr>'
        )
    titles = '<th>reference</th><th>recognised</th><th class="rate">times</th><th class="rate">of all edits</th>'
    intro = f"<p>The {len(lines)} most frequent of {len(counts):,} kinds of character edits, {total:,} in all.</p>"
    table = f"<table><tr>{titles}<th></th></tr>{''.join(lines)}</table>"
    return f'<h2>Confused characters</h2>{intro}<div class="wide">{table}</div>'


def _character(character: str) -> str:
    return f"<small>{NOTHING}</small>" if not character else html.escape("␣" if character == " " else character)


# ------------------------------------------------------------------------------------------------------------- Curves


def by_length(rows: Sequence[Decoded]) -> Curve:
    """Return CER in percent over reference length in characters, in LENGTH_BINS bins of equally many utterances."""
    from Levenshtein import distance

    ordered = sorted((row for row in rows if row.reference), key=lambda row: len(row.reference))
    bins = [part for part in np.array_split(np.arange(len(ordered)), LENGTH_BINS) if len(part)]
    x, y = [], []
    for part in bins:
        members = [ordered[i] for i in part]
        characters = sum(len(row.reference) for row in members)
        x.append(characters / len(members))
        y.append(100 * sum(distance(row.reference, row.hypothesis) for row in members) / characters)
    return Curve("mean of similar lengths", "line1", x, y)


def scored_words(rows: Iterable[Decoded]) -> list[tuple[float, bool]]:
    """Return (confidence, whether it is right) of each word of the hypotheses, by the Levenshtein alignment."""
    from Levenshtein import opcodes

    result = []
    for row in rows:
        written = [word for word, _ in row.words]
        correct: set[int] = set()
        for kind, _, _, first, end in opcodes(row.reference.split(), written):
            correct |= set(range(first, end)) if kind == "equal" else set()
        result += [(confidence, i in correct) for i, (_, confidence) in enumerate(row.words)]
    return result


def by_confidence(words: Sequence[tuple[float, bool]]) -> Curve:
    """Return right words over mean confidence, both in percent, in CONFIDENCE_BINS bins of equally many words."""
    ordered = np.array(sorted(words, key=lambda word: word[0]), dtype=float)  # (N, 2)
    bins = [part.mean(0) for part in np.array_split(ordered, CONFIDENCE_BINS) if len(part)]
    return Curve("words of similar confidence", "line1", [100 * x for x, _ in bins], [100 * y for _, y in bins])


def error_curves(rows: Sequence[Decoded]) -> str:
    """Return the section with CER over length and, if words have confidences, right words over confidence."""
    if not any(row.reference for row in rows):
        return ""
    figures = [_length_figure(rows)]
    words = scored_words(rows)
    if words:
        figures.append(_confidence_figure(words))
    return f'<h2>Error rates</h2><div class="pair">{"".join(figures)}</div>'


def _length_figure(rows: Sequence[Decoded]) -> str:
    step = -(-len(rows) // MAX_DRAWN)
    drawn = [row for row in rows if row.reference][::step]
    rates = [min(row.cer, 100.0) for row in drawn]
    dots = Curve("an utterance, at most 100", "line3", [len(row.reference) for row in drawn], rates, is_line=False)
    return figure("CER, percent, over the length of the reference", [dots, by_length(rows)], x_label="characters")


def _confidence_figure(words: Sequence[tuple[float, bool]]) -> str:
    right, mean = (100 * sum(column) / len(words) for column in ((r for _, r in words), (c for c, _ in words)))
    ideal = Curve("confidence equals share of right words", "line3", [0.0, 100.0], [0.0, 100.0])
    note = f"{right:.1f} % of {len(words):,} words are right; the mean confidence is {mean:.1f} %."
    title = "Right words, percent, over confidence"
    return figure(title, [ideal, by_confidence(words)], x_label="confidence, percent", note=note)


def figure(
    title: str,
    curves: Sequence[Curve],
    *,
    x_label: str,
    note: str = "",
    mark: tuple[float, str] | None = None,
    show_legend: bool = True,
) -> str:
    """Return a figure as HTML, with caption, legend and a note below; for the curves and the mark see curves_svg."""
    svg = curves_svg(curves, x_label=x_label, y_label=title, mark=mark)
    names = legend(curves) if show_legend else ""
    text = f"<p><small>{html.escape(note)}</small></p>" if note else ""
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{names}{svg}{text}</figure>"
