"""Sections of a report on decoded utterances."""

import re

import pytest

from las_fast.output import mistakes
from las_fast.output.mistakes import Decoded


def spans(text):
    return re.findall(r'<span class="(\w+)">(.*?)</span>', text)


def test_differences_mark_deletions_insertions_and_substitutions():
    reference, hypothesis = mistakes.differences("WE NEED THE CAR", "WE THE BARS")
    assert ("delete", "NEED ") in spans(reference)
    assert ("replace", "C") in spans(reference) and ("replace", "B") in spans(hypothesis)
    assert ("insert", "S") in spans(hypothesis)
    assert mistakes.differences("SAME", "SAME") == ("SAME", "SAME")


def test_marked_and_unmarked_parts_join_to_the_original_text():
    for reference, hypothesis in (("KITTEN", "SITTING"), ("", "ABC"), ("ABC", ""), ("A B", "B A")):
        plain = [re.sub(r"<[^>]+>", "", part) for part in mistakes.differences(reference, hypothesis)]
        assert plain == [reference, hypothesis]


def test_differences_escape_markup():
    reference, hypothesis = mistakes.differences("<A> & B", "<A> B")
    assert "<A>" not in reference + hypothesis and "&lt;A&gt;" in reference and "&amp;" in reference


def test_the_worst_utterances_have_errors_and_come_first():
    rows = [Decoded("a", "AB", "AB"), Decoded("b", "ABCD", "ABC"), Decoded("c", "AB", "")]
    assert [row.id for row in mistakes.worst(rows)] == ["c", "b"]
    many = [Decoded(f"{i:02}", "A" * 20, "A" * i) for i in range(20)]
    assert [row.id for row in mistakes.worst(many)] == [f"{i:02}" for i in range(12)]


def test_the_order_of_the_rows_does_not_matter():
    rows = [Decoded(id_, reference, text) for id_ in "abc" for reference in ("AB", "CD") for text in ("", "XY", "YX")]
    assert mistakes.worst(rows) == mistakes.worst(rows[::-1]) == sorted(rows, reverse=True)[:12]
    page = mistakes.utterances(rows, {})
    assert mistakes.utterances(rows[::-1], {}) == page
    best = re.findall(r'<td class="name">(.)</td>', page.partition("<h3>Best</h3>")[2])
    assert best == ["a", "a", "a"]


def test_a_recording_is_played_beside_its_utterance_only():
    rows = [Decoded('a"', "AB", "A"), Decoded("b", "AB", "B")]
    page = mistakes.utterances(rows, {'a"': "data:audio/mpeg;base64,AAAA"})
    players = re.findall(r"<audio (.*?)></audio>", page)
    assert players == ['controls preload="none" aria-label="recording of a&quot;" src="data:audio/mpeg;base64,AAAA"']


def test_character_edits_are_counted_by_what_was_said_and_written():
    rows = [Decoded("a", "KITTEN", "SITTING"), Decoded("b", "KIT", "SIT"), Decoded("c", "A B", "AB")]
    assert mistakes.count_confusions(rows) == {("K", "S"): 2, ("E", "I"): 1, ("", "G"): 1, (" ", ""): 1}


def test_the_table_of_confusions_has_shares_and_escapes_characters():
    page = mistakes.confusions([Decoded("a", "<<< ", "&&&")])
    rows = re.findall(
        r'<td class="name">(.*?)</td><td class="name">(.*?)</td><td class="rate">(.*?)</td><td class="rate">(.*?)</td>',
        page,
    )
    assert rows == [("&lt;", "&amp;", "3", "75.0 %"), ("␣", "<small>nothing</small>", "1", "25.0 %")]
    assert "width: 100%" in page and "width: 33%" in page
    assert mistakes.confusions([Decoded("a", "A", "A")]) == ""


def test_error_over_length_pools_utterances_of_similar_length():
    rows = [Decoded(str(i), "A" * 10, "A" * 9) for i in range(8)] + [
        Decoded(str(i), "A" * 20, "A" * 10) for i in range(8)
    ]
    curve = mistakes.by_length(rows)
    assert curve.x == [10.0] * 4 + [20.0] * 4 and curve.y == pytest.approx([10.0] * 4 + [50.0] * 4)
    mixed = mistakes.by_length([Decoded("a", "A", ""), *rows[:1] * 7, *rows[-1:] * 8])
    assert mixed.y[0] == pytest.approx(100 * 2 / 11), "characters are pooled, not rates"
    assert mistakes.by_length([Decoded("a", "", "A"), Decoded("b", "AB", "A")]).x == [2.0]


def test_a_word_is_right_if_the_alignment_keeps_it():
    words = (("THE", 0.9), ("CAT", 0.4), ("SAT", 0.8), ("THE", 0.1))
    row = Decoded("a", "THE BAT SAT", "THE CAT SAT THE", words)
    assert mistakes.scored_words([row]) == [(0.9, True), (0.4, False), (0.8, True), (0.1, False)]


def test_right_words_over_confidence_are_averaged_over_equally_many_words():
    words = [(i / 20, i % 4 == 0) for i in range(20)]
    curve = mistakes.by_confidence(words[::-1])
    assert curve.x == pytest.approx([2.5 + 10 * i for i in range(10)])
    assert curve.y == pytest.approx([50.0, 0.0] * 5)
    assert mistakes.by_confidence(words[:1]).x == [0.0]


def test_the_figure_over_confidence_needs_confidences():
    plain = mistakes.error_curves([Decoded("a", "A B", "A")])
    assert plain.count("<svg") == 1 and "confidence" not in plain
    page = mistakes.error_curves([Decoded("a", "A B", "A C", (("A", 0.75), ("C", 0.25)))])
    assert page.count("<svg") == 2
    assert "50.0 % of 2 words are right; the mean confidence is 50.0 %." in page
    assert mistakes.error_curves([Decoded("a", "", "A")]) == ""


def test_utterances_are_dots_and_at_most_a_thousand_are_drawn():
    rows = [Decoded(str(i), "AB", "ABCDEFG") for i in range(1001)]
    page = mistakes.error_curves(rows)
    assert '<i class="swatch line3 point"></i>an utterance, at most 100' in page
    assert page.count('class="dot line3"') == 501 and 'class="curve line3"' not in page
    assert "CER, percent, over the length of the reference" in page
