"""What was said in a recording, as text, JSON or subtitles, and the files that it is written to."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from las_fast.files import NAME_MAX

MIN_SPEECH_SCORE = 1.0  # of a text; below it lie texts made out of noise
POOL_SECONDS = 600.0  # of speech that are decoded together
SHOWN = 60  # characters of a text in a repr


@dataclass(frozen=True)
class Hypothesis:
    """One reading of a stretch of speech."""

    text: str
    score: float  # sum of what each token adds: natural log-probabilities, see las_fast.search.beam.beam_search
    mean_score: float  # per token, the end counted
    speech_score: (
        float | None
    )  # see las_fast.search.dataset.speech_scores; None without a CTC head, and but for the best


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording and what was said in it; times in seconds. The scores are as in Hypothesis."""

    start: float
    end: float
    text: str
    score: float
    mean_score: float
    speech_score: float | None
    nbest: tuple[Hypothesis, ...] = field(default=(), repr=False)  # best first; the text is that of the first


@dataclass(frozen=True, repr=False)
class Transcript:
    """What was said in a recording."""

    text: str  # of all segments
    segments: tuple[Segment, ...]  # in order
    noise: tuple[Segment, ...] = ()  # left out because of a low speech score: texts that may be made out of noise

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= SHOWN else f"{self.text[:SHOWN]}..."
        noise = f", {len(self.noise)} left out" if self.noise else ""
        return f"Transcript({text!r}, {count(len(self.segments), 'segment')}{noise})"


def joined(segments: Iterable[Segment]) -> str:
    """Return the text of all segments."""
    return " ".join(segment.text for segment in segments if segment.text)


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def noise_warning(name: str, transcript: Transcript, option: str) -> str:
    """Return the sentence on what was left out of a transcript as noise; option: sets the limit."""
    first = transcript.noise[0]
    return (
        f"{name}: left out {count(len(transcript.noise), 'piece')} that may be noise, the first at "
        f"{first.start:.1f} s (speech score {first.speech_score:.2f}); {option} sets the limit"
    )


def as_text(path: Path, segments: Sequence[Segment]) -> str:
    return joined(segments) + "\n"


def as_json(path: Path, segments: Sequence[Segment]) -> str:
    names = [f.name for f in fields(Segment) if f.name != "nbest"]
    rows = [{name: _rounded(getattr(segment, name)) for name in names} for segment in segments]
    whole = {"file": os.fspath(path), "text": joined(segments).strip(), "pieces": rows}
    return json.dumps(whole, ensure_ascii=False) + "\n"


def _rounded(value):
    return round(value, 4) if isinstance(value, float) else value


def as_srt(path: Path, segments: Sequence[Segment]) -> str:
    told = enumerate((segment for segment in segments if segment.text), 1)
    return "\n".join(f"{n}\n{clock(s.start, ',')} --> {clock(s.end, ',')}\n{s.text}\n" for n, s in told)


def as_vtt(path: Path, segments: Sequence[Segment]) -> str:
    told = [segment for segment in segments if segment.text]
    return "WEBVTT\n" + "".join(f"\n{clock(s.start, '.')} --> {clock(s.end, '.')}\n{s.text}\n" for s in told)


def clock(seconds: float, point: str) -> str:
    """Return seconds as hours:minutes:seconds and milliseconds."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


FORMATS = {"text": as_text, "json": as_json, "srt": as_srt, "vtt": as_vtt}
SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}


def output_files(paths: list[Path], folder: Path, suffix: str) -> dict[Path, Path]:
    """Return the file in `folder` that each of the distinct paths is written to.

    It has the recording's name with the suffix instead of its own. Recordings whose files would be the same keep their
    own suffix, and then get a number.
    """
    stems = {path: "stdin" if str(path) == "-" else path.stem for path in paths}
    counts = Counter(_folded(stem, suffix) for stem in stems.values())
    taken: set[str] = set()
    files = {}
    for path, stem in stems.items():
        if counts[_folded(stem, suffix)] > 1:
            stem = path.name if str(path) != "-" else stem
        number, name = 1, stem
        while _folded(name, suffix) in taken:
            number += 1
            name = f"{stem[: NAME_MAX // 2]}-{number}"
        taken.add(_folded(name, suffix))
        files[path] = folder / _shortened(name, suffix)
    return files


def _folded(name: str, suffix: str) -> str:
    """Return what two names share that are one file: some disks do not tell case apart."""
    return _shortened(name, suffix).casefold()


def _shortened(name: str, suffix: str) -> str:
    """Return name + suffix, the name cut to what a file system takes."""
    room = NAME_MAX - len(suffix)
    data = os.fsencode(name or "recording")
    return (data[:room].decode("utf-8", "ignore") if len(data) > room else name or "recording") + suffix
