"""Transcripts in every format."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest

from las_fast.output.formats import FORMATS, Style, as_ctm, as_json, as_srt, as_text, as_textgrid, as_tsv, as_vtt, clock
from las_fast.output.subtitles import SubtitleSize
from las_fast.output.transcripts import Hypothesis, Segment, Transcript, Word

STYLE, PATH = Style(), Path("a/my talk.wav")


def timed(text, start):
    """Words of 0.3 s, one after the other."""
    return tuple(Word(t, start + 0.3 * i, start + 0.3 * (i + 1), 0.75) for i, t in enumerate(text.split()))


def segment(text, start, end, nbest=()):
    return Segment(start, end, text, -1.0, -0.33333, 5.5, nbest, timed(text, start + 0.1))


def transcript(*segments, duration=10.0):
    return Transcript(" ".join(s.text for s in segments if s.text), segments, (), duration)


TWO = transcript(segment("HELLO THERE", 0.4, 1.2), segment("", 2.0, 2.5), segment("GOOD BYE", 3.0, 3.9))


def test_a_pause_longer_than_a_second_starts_a_paragraph():
    assert as_text(PATH, TWO, STYLE) == "HELLO THERE\nGOOD BYE\n"
    close = transcript(segment("HELLO THERE", 0.4, 1.2), segment("GOOD BYE", 1.5, 2.4))
    assert as_text(PATH, close, STYLE) == "HELLO THERE GOOD BYE\n"


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_transcript_has_no_text(name):
    written = FORMATS[name].write(PATH, transcript(), STYLE)
    assert not re.search(r"-->|HELLO|None|inf", written)


def test_json_has_words_scores_and_alternatives():
    other = Hypothesis("YELLOW THERE", -2.0, -0.5, None, timed("YELLOW THERE", 0.5))
    best = Hypothesis("HELLO THERE", -1.0, -0.33333, 5.5, timed("HELLO THERE", 0.5))
    row = json.loads(as_json(PATH, transcript(segment("HELLO THERE", 0.4, 1.2, (best, other))), STYLE))
    assert (row["file"], row["text"], row["duration"]) == ("a/my talk.wav", "HELLO THERE", 10.0)
    (only,) = row["segments"]
    assert {k: v for k, v in only.items() if k not in ("words", "alternatives")} == {
        "id": 0, "start": 0.4, "end": 1.2, "text": "HELLO THERE",
        "score": -1.0, "mean_score": -0.3333, "speech_score": 5.5,
    }  # fmt: skip
    assert only["words"][1] == {"word": "THERE", "start": 0.8, "end": 1.1, "confidence": 0.75}
    assert [a["text"] for a in only["alternatives"]] == ["YELLOW THERE"]
    assert only["alternatives"][0]["words"][0]["word"] == "YELLOW" and only["alternatives"][0]["speech_score"] is None


def test_a_score_that_json_lacks_is_null():
    failed = Segment(0.0, 1.0, "", -math.inf, math.nan, None)  # of a model that diverged
    (row,) = json.loads(as_json(PATH, transcript(failed), STYLE), parse_constant=pytest.fail)["segments"]
    assert row["score"] is row["mean_score"] is None


def test_json_does_not_escape_non_ascii_letters():
    written = as_json(PATH, transcript(segment("\uac15 \u00e9", 0.0, 1.0)), STYLE)
    assert "\uac15 \u00e9" in written and written.endswith("}\n") and written.count("\n") == 1


def test_srt_has_the_times_of_the_words():
    assert as_srt(PATH, TWO, STYLE) == (
        "1\n00:00:00,500 --> 00:00:01,500\nHELLO THERE\n\n2\n00:00:03,100 --> 00:00:04,100\nGOOD BYE\n"
    )


def test_vtt_escapes_markup_and_may_time_each_word():
    said = transcript(segment("FISH & CHIPS", 0.0, 1.0))
    assert as_vtt(PATH, said, STYLE) == "WEBVTT\n\n00:00:00.100 --> 00:00:01.100\nFISH &amp; CHIPS\n"
    timed_words = as_vtt(PATH, said, Style(word_times=True)).splitlines()[-1]
    assert timed_words == "FISH <00:00:00.400>&amp; <00:00:00.700>CHIPS"


def test_a_word_at_the_same_millisecond_as_its_cue_has_no_time_tag():
    words = (Word("A", 1.0, 1.00001, 1.0), Word("B", 1.0002, 1.5, 1.0), Word("C", 1.6, 2.0, 1.0))
    said = transcript(Segment(1.0, 2.0, "A B C", -1.0, -0.5, None, words=words))
    assert as_vtt(PATH, said, Style(word_times=True)).splitlines()[-1] == "A B <00:00:01.600>C"


def test_the_size_reaches_the_subtitles():
    narrow = as_srt(PATH, TWO, Style(SubtitleSize(width=6, lines=2))).splitlines()
    assert narrow[2:4] == ["HELLO", "THERE"]


def test_tsv_has_milliseconds_as_whisper_writes_them():
    assert as_tsv(PATH, TWO, STYLE) == "start\tend\ttext\n400\t1200\tHELLO THERE\n3000\t3900\tGOOD BYE\n"


def test_ctm_has_a_line_per_word_without_spaces_in_the_name():
    assert as_ctm(PATH, TWO, STYLE).splitlines()[1] == "my_talk 1 0.800 0.300 THERE 0.750"


def test_textgrid_intervals_fill_the_recording():
    quoted = transcript(segment('SAY "A"', 0.4, 1.2), segment("B", 1.0, 1.6))  # segments overlap by their margins
    grid = as_textgrid(PATH, quoted, STYLE)
    assert grid.startswith('File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\nxmax = 10.0000\n')
    assert 'text = "SAY ""A"""' in grid
    for tier in grid.split("item [")[2:]:
        intervals = re.findall(r"intervals \[\d+\]:\s+xmin = ([\d.]+)\s+xmax = ([\d.]+)", tier)
        times = [(float(start), float(end)) for start, end in intervals]
        assert int(re.search(r"size = (\d+)", tier)[1]) == len(times)
        assert times[0][0] == 0 and times[-1][1] == 10
        assert all(start < end for start, end in times) and all(a[1] == b[0] for a, b in pairwise(times))


@pytest.mark.parametrize("end", [10.0, 9.99996])
def test_a_textgrid_has_no_empty_interval_after_text_up_to_its_end(end):
    _, _, segments, _ = as_textgrid(PATH, transcript(segment("A", 0.4, end)), STYLE).split("item [")
    assert re.findall('text = "(.*)"', segments) == ["", "A"]


def test_rounding_carries_into_minutes_and_hours():
    assert clock(59.9996, ".") == "00:01:00.000"
    assert clock(59 * 60, ".") == "00:59:00.000" and clock(3600 + 60 + 1.5, ",") == "01:01:01,500"
