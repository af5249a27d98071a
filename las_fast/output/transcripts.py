"""Transcripts of recordings, and the names of their output files; las_fast.output.formats has their contents."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from las_fast.errors import InputError, show, type_name
from las_fast.files import NAME_MAX, expand, make_folder, write_text_atomically

MIN_SPEECH_SCORE = 1.0  # segments with a lower speech score are mostly noise
POOL_SECONDS = 600.0  # seconds of speech decoded together
MAX_REPR = 60  # characters of the text in a repr


@dataclass(frozen=True)
class Word:
    """A word of a hypothesis."""

    text: str
    start: float  # seconds in the recording
    end: float
    confidence: float  # probability that the word is right, 0 to 1; see las_fast.search.words


@dataclass(frozen=True)
class Hypothesis:
    """A candidate text for a segment of speech or an utterance."""

    text: str
    score: float  # sum of the tokens' log-probabilities and weighted bonuses; see las_fast.search.beam.beam_search
    mean_score: float  # score per token, <eos> included
    speech_score: float | None  # see las_fast.search.dataset.speech_scores; only of the best one, with a CTC head
    words: tuple[Word, ...] = field(default=(), repr=False)  # in order


@dataclass(frozen=True)
class Segment:
    """A part of a recording with its text; the scores are those of Hypothesis."""

    start: float  # seconds in the recording
    end: float
    text: str
    score: float
    mean_score: float
    speech_score: float | None
    nbest: tuple[Hypothesis, ...] = field(default=(), repr=False)  # best first; the first has the segment's text
    words: tuple[Word, ...] = field(default=(), repr=False)  # of the best hypothesis, in order


@dataclass(frozen=True, repr=False)
class Transcript:
    """The text of a recording."""

    text: str  # of all segments
    segments: tuple[Segment, ...]  # in order
    noise: tuple[Segment, ...] = ()  # segments left out of the text because of a low speech score
    duration: float = 0.0  # of the recording, in seconds
    recording: str | None = field(default=None, compare=False)  # its path; None for a file object or an array
    warnings: tuple[str, ...] = field(default=(), compare=False)  # problems that make recognition worse

    @property
    def words(self) -> tuple[Word, ...]:
        """The words of all segments, in order."""
        return tuple(word for segment in self.segments for word in segment.words)

    def map_text(self, change: Callable[[str], str]) -> Transcript:
        """Return a copy in which `change` is applied to every text; it must not add or remove words."""

        def changed(item):
            parts = {name: tuple(map(changed, getattr(item, name, ()))) for name in ("words", "nbest")}
            return replace(item, text=change(item.text), **{name: value for name, value in parts.items() if value})

        segments, noise = tuple(map(changed, self.segments)), tuple(map(changed, self.noise))
        return replace(self, text=change(self.text), segments=segments, noise=noise)

    def to_string(self, format: str, *, width: int = 42, lines: int = 2, word_times: bool = False) -> str:
        """Return the transcript in a format, as the command `transcribe --format` writes it.

        Args:
            format:     "text", "json", "srt", "vtt", "tsv", "ctm" or "textgrid".
            width:      maximum characters per line of srt and vtt.
            lines:      maximum lines of a cue of srt and vtt.
            word_times: with vtt, whether each word has a time tag, for players that highlight words.

        Raises:
            InputError: there is no such format, a number is below 1, or an option does not apply to the format.
        """
        from las_fast.output.formats import format_transcript  # which imports this module

        return format_transcript(self, format, width=width, lines=lines, word_times=word_times)

    def save(self, path: str | os.PathLike[str], *, width: int = 42, lines: int = 2, word_times: bool = False) -> None:
        """Write the transcript to a file, as the command `transcribe --out` does; an existing file is replaced.

        Args:
            path: its suffix is the format: .txt, .json, .srt, .vtt, .tsv, .ctm or .TextGrid. Its folder is created.
            width, lines, word_times: as in `to_string`.

        Raises:
            InputError: the suffix is another, an option is invalid, or the file cannot be written.
        """
        from las_fast.output.formats import format_of

        if not isinstance(path, (str, os.PathLike)):
            raise InputError(f"the file of a transcript is a path; got {type_name(path)}")
        file = expand(os.fsdecode(path))
        if "\0" in str(file):
            raise InputError(f"{show(file)}: a path has no null characters; remove them")
        text = self.to_string(format_of(file), width=width, lines=lines, word_times=word_times)
        make_folder(file.parent, f"save {show(file)}")
        write_text_atomically(file, text)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= MAX_REPR else f"{self.text[:MAX_REPR]}..."
        noise = f", {len(self.noise)} left out" if self.noise else ""
        return f"Transcript({text!r}, {count(len(self.segments), 'segment')}{noise})"


def join_texts(segments: Iterable[Segment]) -> str:
    """Join the texts of segments with spaces."""
    return " ".join(segment.text for segment in segments if segment.text)


def count(number: int, what: str) -> str:
    """Return a count with its noun, such as "2 segments"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def noise_warning(name: str, transcript: Transcript, option: str) -> str:
    """Return a warning about the segments left out as noise; option: name of the option that sets the limit."""
    first = transcript.noise[0]
    return (
        f"{name}: left out {count(len(transcript.noise), 'segment')} that may be noise, the first at "
        f"{first.start:.1f} s (speech score {first.speech_score:.2f}); {option} sets the limit"
    )


def output_files(paths: list[Path], folder: Path, suffix: str, roots: Sequence[Path] = ()) -> dict[Path, Path]:
    """Map each of the distinct paths to a distinct output file in `folder`.

    talk.wav becomes talk.txt. A recording below one of `roots` keeps its subfolders relative to that root. If two files
    would have the same name, ignoring case, the suffix is appended instead (talk.wav.txt); names that still clash are
    numbered (talk.wav-2.txt).
    """
    folders = {path: folder / _below(path, roots) for path in paths}
    stems = {path: "stdin" if str(path) == "-" else path.stem for path in paths}
    counts = Counter(_file_key(folders[path], stem, suffix) for path, stem in stems.items())
    taken: set[str] = set()
    files = {}
    for path, stem in stems.items():
        if counts[_file_key(folders[path], stem, suffix)] > 1:
            stem = path.name if str(path) != "-" else stem
        number, name = 1, stem
        while (key := _file_key(folders[path], name, suffix)) in taken:
            number += 1
            name = _shortened(stem, f"-{number}", NAME_MAX - len(suffix))
        taken.add(key)
        files[path] = folders[path] / _shortened(name, suffix)
    return files


def _below(path: Path, roots: Sequence[Path]) -> Path:
    """Return the folders between the first of `roots` that holds the path and the path itself."""
    root = next((root for root in roots if path.is_relative_to(root)), path.parent)
    return path.parent.relative_to(root)


def _file_key(folder: Path, name: str, suffix: str) -> str:
    """Return a key that is equal for two names if they may be the same file; some file systems ignore case."""
    return str(folder / _shortened(name, suffix)).casefold()


def _shortened(name: str, suffix: str, size: int = NAME_MAX) -> str:
    """Return name + suffix, with the name cut so that both fit in `size` bytes."""
    max_bytes = size - len(suffix)
    data = os.fsencode(name or "recording")
    return (data[:max_bytes].decode("utf-8", "ignore") if len(data) > max_bytes else name or "recording") + suffix
