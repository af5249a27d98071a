"""Subtitles: what a viewer can read, whatever the words and pauses are."""

import random
import re

import pytest

from benchmarks.interview import broken_rules
from las_fast.output.subtitles import MAX_PAUSE, Cue, SubtitleSize, make_cues
from las_fast.output.transcripts import Word


def spoken(text, start=0.0, seconds=0.3, pause=0.05):
    """Words of equal duration with equal pauses."""
    step = seconds + pause
    return [Word(t, start + i * step, start + i * step + seconds, 0.9) for i, t in enumerate(text.split())]


def random_words(seed, count=300):
    rng = random.Random(seed)
    words, time = [], rng.uniform(0, 3)
    for _ in range(count):
        seconds = rng.choice([0.0, 0.04, rng.uniform(0.1, 0.8), rng.uniform(0.1, 0.8), rng.uniform(0.1, 9)])
        words.append(Word("x" * rng.choice([1, 2, 3, 5, 8, 13, 90]), time, time + seconds, 0.5))
        time += seconds + rng.choice([0.0, 0.04, 0.2, rng.uniform(0, 0.6), rng.uniform(0.6, 3)])
    return words


@pytest.mark.parametrize("size", [SubtitleSize(), SubtitleSize(20, 1), SubtitleSize(12, 3)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_cues_obey_the_rules_and_keep_every_letter(seed, size):
    words = random_words(seed)
    cues = make_cues(words, size)
    assert list(broken_rules(cues, size)) == []
    shown = "".join(word.text for cue in cues for line in cue.lines for word in line)
    assert shown == "".join(word.text for word in words)


def test_cues_that_break_the_rules_are_found():
    word = Word("YES", 0.0, 0.5, 1.0)
    long, late = Word("A" * 43, 0.0, 0.5, 1.0), Word("NO", 1.2, 1.5, 1.0)
    broken = [Cue(0, 2, ((long,),)), Cue(1, 9, ((word,), (word,), (word,))), Cue(9, 11, ((word, late),)),
              Cue(12, 12.5, ((word,),))]  # fmt: skip
    assert [re.sub("'.*?'", "X", rule) for rule in broken_rules(broken)] == [
        "X is not 2 lines of 42 characters", "X is not 2 lines of 42 characters", "X is shown for 8.00 s",
        "X has a pause of 0.70 s in it", "X and X overlap", "X is shown for 0.50 s, although there is time",
    ]  # fmt: skip


def test_no_words_give_no_cues():
    assert make_cues([]) == []


def test_a_long_pause_ends_a_cue_and_nothing_is_shown_in_it():
    first, second = make_cues(spoken("ONE TWO THREE FOUR") + spoken("FIVE SIX SEVEN EIGHT", start=2.0))
    assert first.text == "ONE TWO THREE FOUR" and first.end == pytest.approx(1.35)
    assert second.text == "FIVE SIX SEVEN EIGHT" and second.start == 2.0


def test_a_shorter_pause_does_not_end_a_cue():
    (cue,) = make_cues([Word("YES", 0.0, 0.5, 1.0), Word("NO", 0.49 + MAX_PAUSE, 1.5, 1.0)])
    assert cue.text == "YES NO"


def test_a_single_short_word_is_shown_for_a_second():
    (cue,) = make_cues([Word("YES", 5.0, 5.1, 1.0)])
    assert (cue.start, cue.end) == (5.0, 6.0)


def test_a_short_word_before_the_next_cue_is_shown_earlier():
    words = [Word("YES", 5.0, 5.1, 1.0), *spoken("THAT IS WHAT WE SAID", start=5.8)]
    first, second = make_cues(words)
    assert (first.start, first.end) == (pytest.approx(4.8), 5.8) and second.start == 5.8


def test_lines_of_a_cue_have_similar_lengths():
    (cue,) = make_cues(spoken("FOUR SCORE AND SEVEN YEARS AGO OUR FATHERS BROUGHT FORTH", seconds=0.2))
    assert cue.text == "FOUR SCORE AND SEVEN YEARS\nAGO OUR FATHERS BROUGHT FORTH"


def test_speech_without_long_pauses_is_cut_at_a_short_one():
    before = spoken("SHE HAD YOUR DARK SUIT IN GREASY WASH WATER")
    after = spoken("WHILE HE DREW BREATH FOR HIS NEXT LONG SPEECH OF THE DAY", start=before[-1].end + 0.4)
    assert [cue.text.split()[0] for cue in make_cues(before + after)][:2] == ["SHE", "WHILE"]


def test_a_cue_does_not_end_with_a_short_word():
    text = "PEOPLE ALWAYS WONDER ABOUT CERTAIN THINGS WHENEVER SOMEBODY MENTIONS THE WEATHER DURING BREAKFAST"
    for cue in make_cues(spoken(text, pause=0.0))[:-1]:
        assert not cue.text.endswith("THE")


def test_a_full_stop_ends_a_cue():
    text = "We went there together yesterday. Nobody else came because everybody was afraid of the terrible weather"
    assert make_cues(spoken(text, pause=0.0))[0].text == "We went there together yesterday."


def test_a_word_longer_than_a_line_is_broken_and_timed_in_proportion():
    cues = make_cues([Word("A" * 100, 0.0, 4.0, 1.0)])
    assert [line for cue in cues for line in cue.text.split("\n")] == ["A" * 42, "A" * 42, "A" * 16]
    assert [cue.start for cue in cues] == pytest.approx([0.0, 1.68])  # the rest is too short for a cue
