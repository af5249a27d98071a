"""Transcripts as text, JSON, subtitles, tables and annotations.

Each function of FORMATS takes the path of the recording (None if it has none), its transcript and a Style, and returns
the contents of the output file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from las_fast.errors import InputError, show
from las_fast.output.subtitles import SubtitleSize, make_cues
from las_fast.output.transcripts import Hypothesis, Segment, Transcript, Word

PARAGRAPH_PAUSE = 1.0  # seconds between two words; a longer pause starts a new paragraph


@dataclass(frozen=True)
class Style:
    """Options of the formats."""

    size: SubtitleSize = SubtitleSize()  # of srt and vtt
    word_times: bool = False  # whether cues of vtt have a time tag per word


def as_text(path: Path | None, transcript: Transcript, style: Style) -> str:
    """Paragraphs, one per line."""
    return "\n".join(paragraphs(transcript)) + "\n"


def paragraphs(transcript: Transcript) -> list[str]:
    """Return the text in paragraphs, which end at pauses longer than PARAGRAPH_PAUSE."""
    groups: list[list[str]] = []
    end = -float("inf")
    for word in transcript.words:
        if word.start - end > PARAGRAPH_PAUSE:
            groups.append([])
        groups[-1].append(word.text)
        end = word.end
    return [" ".join(words) for words in groups]


def as_json(path: Path | None, transcript: Transcript, style: Style) -> str:
    """One line; las_fast/search/README.md describes the fields."""
    segments = [{"id": i, **segment_row(segment)} for i, segment in enumerate(transcript.segments)]
    file = None if path is None else os.fspath(path)
    row = {"file": file, "text": transcript.text, "duration": transcript.duration, "segments": segments}
    return json.dumps(rounded(row), ensure_ascii=False) + "\n"


def segment_row(segment: Segment) -> dict[str, Any]:
    """Return a segment as a JSON object; its other hypotheses are "alternatives"."""
    row = {"start": segment.start, "end": segment.end, **hypothesis_row(segment)}
    others = [hypothesis_row(other) for other in segment.nbest[1:]]
    return {**row, "alternatives": others} if others else row


def hypothesis_row(hypothesis: Hypothesis | Segment) -> dict[str, Any]:
    """Return the text, scores and words of a hypothesis as a JSON object."""
    scores = {name: getattr(hypothesis, name) for name in ("score", "mean_score", "speech_score")}
    return {"text": hypothesis.text, **scores, "words": [word_row(word) for word in hypothesis.words]}


def word_row(word: Word) -> dict[str, str | float]:
    """Return a word as a JSON object, with times to the millisecond."""
    times = {"start": round(word.start, 3), "end": round(word.end, 3)}
    return {"word": word.text, **times, "confidence": rounded(word.confidence)}


def rounded(value: Any) -> Any:
    """Round all floats in a JSON value to 4 decimals; NaN and infinity, which JSON lacks, become None."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, list) else value


def as_srt(path: Path | None, transcript: Transcript, style: Style) -> str:
    """SubRip: numbered cues."""
    cues = enumerate(make_cues(transcript.words, style.size), 1)
    return "\n".join(f"{n}\n{clock(c.start, ',')} --> {clock(c.end, ',')}\n{c.text}\n" for n, c in cues)


def as_vtt(path: Path | None, transcript: Transcript, style: Style) -> str:
    """WebVTT; with word times, a tag before each later word of a cue tells players when to highlight it."""
    blocks = ["WEBVTT\n"]
    for cue in make_cues(transcript.words, style.size):
        text = "\n".join(_vtt_line(line, cue.start, style.word_times) for line in cue.lines)
        blocks.append(f"{clock(cue.start, '.')} --> {clock(cue.end, '.')}\n{text}\n")
    return "\n".join(blocks)


def _vtt_line(words: Iterable[Word], cue_start: float, word_times: bool) -> str:
    def tag(word: Word) -> str:  # WebVTT requires that a tag is later than the start of its cue
        is_later = round(1000 * word.start) > round(1000 * cue_start)
        return f"<{clock(word.start, '.')}>" if word_times and is_later else ""

    return " ".join(tag(word) + _escape_html(word.text) for word in words)


def _escape_html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def as_tsv(path: Path | None, transcript: Transcript, style: Style) -> str:
    """Segments as whisper writes them: start and end in milliseconds, and text, separated by tabs."""
    rows = (f"{round(s.start * 1000)}\t{round(s.end * 1000)}\t{s.text}\n" for s in transcript.segments if s.text)
    return "start\tend\ttext\n" + "".join(rows)


def as_ctm(path: Path | None, transcript: Transcript, style: Style) -> str:
    """Words as NIST's sclite reads them: recording, channel, start, duration, word, confidence."""
    name = "_".join(path.stem.split() if path else []) or "recording"
    return "".join(
        f"{name} 1 {word.start:.3f} {word.end - word.start:.3f} {word.text} {word.confidence:.3f}\n"
        for word in transcript.words
    )


def as_textgrid(path: Path | None, transcript: Transcript, style: Style) -> str:
    """Tiers "segments" and "words" for Praat, in its long text format."""
    tiers = {
        "segments": [(s.start, s.end, s.text) for s in transcript.segments],
        "words": [(word.start, word.end, word.text) for word in transcript.words],
    }
    end = max([transcript.duration, *(interval[1] for tier in tiers.values() for interval in tier)])
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {end:.4f}"]
    lines += ["tiers? <exists>", f"size = {len(tiers)}", "item []:"]
    for number, (name, intervals) in enumerate(tiers.items(), 1):
        lines += _tier(number, name, list(_without_gaps(intervals, end)), end)
    return "\n".join(lines) + "\n"


def _without_gaps(intervals: Iterable[tuple[float, float, str]], end: float) -> Iterator[tuple[float, float, str]]:
    """Yield intervals from 0 to `end`, with empty text in the gaps; empty intervals are left out."""
    time = 0.0
    for start, stop, text in intervals:
        start, stop = round(max(start, time), 4), round(stop, 4)
        if stop <= start:
            continue
        if start > time:
            yield time, start, ""
        yield start, stop, text
        time = stop
    if round(end, 4) > time or not time:  # Praat needs at least one interval
        yield time, end, ""


def _tier(number: int, name: str, intervals: list[tuple[float, float, str]], end: float) -> list[str]:
    lines = [f"    item [{number}]:", '        class = "IntervalTier"', f'        name = "{name}"']
    lines += ["        xmin = 0", f"        xmax = {end:.4f}", f"        intervals: size = {len(intervals)}"]
    for i, (start, stop, text) in enumerate(intervals, 1):
        quoted = text.replace('"', '""')
        lines += [f"        intervals [{i}]:", f"            xmin = {start:.4f}", f"            xmax = {stop:.4f}"]
        lines += [f'            text = "{quoted}"']
    return lines


def clock(seconds: float, point: str) -> str:
    """Format seconds as HH:MM:SS, `point` and milliseconds."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


Writer = Callable[[Path | None, Transcript, Style], str]


class Format(NamedTuple):
    """The suffix of files in a format, and the function that writes a transcript in it."""

    suffix: str
    write: Writer


FORMATS = {
    "text": Format(".txt", as_text),
    "json": Format(".json", as_json),
    "srt": Format(".srt", as_srt),
    "vtt": Format(".vtt", as_vtt),
    "tsv": Format(".tsv", as_tsv),
    "ctm": Format(".ctm", as_ctm),
    "textgrid": Format(".TextGrid", as_textgrid),
}
SUFFIXES = {form.suffix.lower(): name for name, form in FORMATS.items()}


class OptionScope(NamedTuple):
    """Which formats an option applies to."""

    default: Any
    formats: tuple[str, ...]


STYLE_OPTIONS = {
    "width": OptionScope(SubtitleSize.width, ("srt", "vtt")),
    "lines": OptionScope(SubtitleSize.lines, ("srt", "vtt")),
    "word_times": OptionScope(False, ("vtt",)),
}


def suffix_list() -> str:
    """Return the suffixes of all formats, for errors."""
    *first, last = (form.suffix for form in FORMATS.values())
    return f"{', '.join(first)} or {last}"


def format_of(path: Path) -> str:
    """Return the format that the suffix of a file names; raise InputError if it names none."""
    try:
        return SUFFIXES[path.suffix.lower()]
    except KeyError:
        raise InputError(f"{show(path)}: the name of a transcript must end in {suffix_list()}; change it") from None


def unused_option(
    form: str, values: Mapping[str, Any], scopes: Mapping[str, OptionScope] = STYLE_OPTIONS
) -> str | None:
    """Return the first option that is set although it has no effect in the format; None if there is none."""
    return next(
        (name for name, scope in scopes.items() if values[name] != scope.default and form not in scope.formats), None
    )


def format_transcript(transcript: Transcript, form: str, *, width: int, lines: int, word_times: bool) -> str:
    """Return a transcript in a format; Transcript.to_string documents the arguments and the errors."""
    if form not in list(FORMATS):
        raise InputError(f"the format must be one of {', '.join(FORMATS)}; got {form!r}")
    for name, value in (("width", width), ("lines", lines)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1; got {value!r}")
    if unused := unused_option(form, {"width": width, "lines": lines, "word_times": word_times}):
        raise InputError(f"{unused} is for {' and '.join(STYLE_OPTIONS[unused].formats)}; got the format {form}")
    path = None if transcript.recording is None else Path(transcript.recording)
    return FORMATS[form].write(path, transcript, Style(SubtitleSize(width, lines), word_times))
