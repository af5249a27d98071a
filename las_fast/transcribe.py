"""python -m las_fast.transcribe: what audio files say, as text, JSON or subtitles.

A recording of any length is cut at its pauses into segments of speech. Segments are decoded together, and the texts of
a recording are joined. Each file is written as soon as all of it is decoded.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from las_fast.cli import give_large_blocks_back, make_folder, need_stdout, run
from las_fast.config import check_decoding
from las_fast.errors import InputError, show
from las_fast.options import Parser, as_path
from las_fast.progress import Progress, write
from las_fast.transcripts import FORMATS, SUFFIXES, Piece, output_files

if TYPE_CHECKING:  # these import torch, which --help need not wait for
    from torch import Tensor

    from las_fast.checkpoint import Loaded
    from las_fast.config import DecodingConfig
    from las_fast.search import Hypothesis
    from las_fast.segments import Segment

MIN_SPEECH_SCORE = 1.0  # of a text; below it lie texts made out of noise
POOL_SECONDS = 600.0  # of speech that are decoded together
LEAST_BYTES = 500  # per second of a recording, for an estimate of its length


class Segments:
    """Segments as las_fast.search.decode_dataset wants a data set."""

    def __init__(self, segments: list[Segment], ids: list[str]):
        self.features, self.ids = [segment.features for segment in segments], ids
        self.frames = np.array([len(x) for x in self.features], np.int64)
        self.seconds = np.array([segment.end - segment.start for segment in segments])
        self.texts = [None] * len(segments)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, i: int) -> Tensor:
        return self.features[i]


@dataclass
class Transcript:
    """What is known of one recording so far."""

    path: Path
    pieces: list[Piece] = field(default_factory=list)
    waiting: int = 0  # segments that are not decoded yet
    noise: list[Piece] = field(default_factory=list)  # left out for their speech score
    is_read: bool = False
    error: InputError | None = None  # why it cannot be read


class Transcriber:
    """Decodes segments of many recordings together.

    ngram is as in las_fast.search.beam_search; texts with a speech score below min_speech_score are left out.
    """

    def __init__(
        self, loaded: Loaded, decoding: DecodingConfig, *, ngram: Tensor | None = None, device,
        min_speech_score: float = MIN_SPEECH_SCORE,
    ):  # fmt: skip
        self.loaded, self.decoding, self.ngram, self.device = loaded, decoding, ngram, device
        self.min_speech_score = min_speech_score
        self._pool: list[tuple[Transcript, Segment]] = []
        self._seconds = 0.0

    @property
    def is_full(self) -> bool:
        return self._seconds >= POOL_SECONDS

    def add(self, transcript: Transcript, segment: Segment) -> None:
        self._pool.append((transcript, segment))
        self._seconds += segment.end - segment.start
        transcript.waiting += 1

    def decode(self) -> None:
        """Decode what was added; raises InputError where memory does not suffice for one segment."""
        from las_fast.search import decode_dataset

        pool, self._pool, self._seconds = self._pool, [], 0.0
        if not pool:
            return
        data = Segments([s for _, s in pool], [f"{show(t.path)} from {s.start:.0f} s" for t, s in pool])
        options = {"ngram": self.ngram, "device": self.device, "speech_scores": True, "progress": False}
        found = decode_dataset(self.loaded.model, data, self.loaded.vocabulary, self.decoding, **options)
        for (transcript, segment), (best, *_) in zip(pool, found, strict=True):
            transcript.waiting -= 1
            piece = self._piece(segment, best)
            is_noise = piece.speech_score is not None and piece.speech_score < self.min_speech_score
            (transcript.noise if is_noise else transcript.pieces).append(piece)

    def _piece(self, segment: Segment, best: Hypothesis) -> Piece:
        text = self.loaded.vocabulary.decode(best.text_tokens)
        mean = best.score / (len(best.text_tokens) + 1)
        return Piece(segment.start, segment.end, text, best.score, mean, best.speech_score)


def transcribe(
    paths: list[Path],
    loaded: Loaded,
    decoding: DecodingConfig,
    *,
    ngram: Tensor | None = None,
    device,
    min_speech_score: float = MIN_SPEECH_SCORE,
    skip_bad: bool = False,
    progress: bool = True,
) -> Iterator[tuple[Path, list[Piece]]]:
    """Yield each recording with its pieces, in the order of paths, as soon as all of it is decoded.

    Args:
        paths:            of recordings, which are read in blocks; "-" is standard input.
        ngram:            as in las_fast.search.beam_search.
        min_speech_score: pieces whose speech score is lower are left out, and said in a warning.
        skip_bad:         a recording that cannot be read is a warning and not an error.

    Raises:
        InputError: a recording cannot be read, or one segment does not fit in memory. Recordings before it have been
            yielded by then.
    """
    options = {"ngram": ngram, "device": device, "min_speech_score": min_speech_score}
    transcriber, open_ones = Transcriber(loaded, decoding, **options), deque()
    with Progress(sum(map(estimated_seconds, paths)) or None, "transcribing", "s of audio", show=progress) as shown:
        for path in paths:
            transcript = Transcript(path)
            open_ones.append(transcript)
            for segment in _heard(transcript, loaded, shown):
                transcriber.add(transcript, segment)
                if transcriber.is_full:
                    transcriber.decode()
                    yield from _finished(open_ones)
            if transcript.error is not None:
                open_ones.pop()
                transcriber.decode()
                yield from _finished(open_ones)
                if not skip_bad:
                    raise transcript.error
                warn(f"left out: {transcript.error}")
        transcriber.decode()
    yield from _finished(open_ones)


def _heard(transcript: Transcript, loaded: Loaded, shown: Progress) -> Iterator[Segment]:
    """Yield the segments of a recording; warn of what is wrong with it, and where it has no speech.

    Where it cannot be read, transcript.error says why.
    """
    from las_fast.audio import open_recording
    from las_fast.segments import segments

    features = loaded.config.features
    seconds = 0.0

    def blocks() -> Iterator[np.ndarray]:
        nonlocal seconds
        for block in recording:
            yield block
            seconds += len(block) / features.sample_rate
            shown.update(len(block) / features.sample_rate)

    heard = False
    try:
        with open_recording(transcript.path, features.sample_rate) as recording:
            for segment in segments(blocks(), features, loaded.statistics):
                heard = True
                yield segment
    except InputError as error:
        transcript.error = error
        return
    for sentence in recording.warnings:
        warn(sentence)
    if not heard:
        warn(f"{show(transcript.path)}: no speech was found in its {seconds:.2f} seconds")
    transcript.is_read = True


def _finished(transcripts: deque[Transcript]) -> Iterator[tuple[Path, list[Piece]]]:
    """Take the recordings off the front that are decoded, and yield them."""
    while transcripts and transcripts[0].is_read and not transcripts[0].waiting:
        done = transcripts.popleft()
        if done.noise:
            first = done.noise[0]
            warn(
                f"{show(done.path)}: left out {count(len(done.noise), 'piece')} that may be noise, the first at "
                f"{first.start:.1f} s (speech score {first.speech_score:.2f}); --min-speech-score sets the limit"
            )
        yield done.path, done.pieces


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def estimated_seconds(path: Path) -> float:
    """Return about how long a recording is, for a bar; 0 where its header does not say it."""
    import soundfile

    if str(path) == "-" or not os.path.isfile(path):  # libsndfile would read standard input, and close it
        return 0.0
    try:
        return min(soundfile.info(os.fsencode(path)).duration, os.path.getsize(path) / LEAST_BYTES)
    except (soundfile.LibsndfileError, OSError, RuntimeError, ValueError, TypeError):
        return 0.0


def warn(message: str) -> None:
    write(f"warning: {message}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    own = Parser(
        prog="python -m las_fast.transcribe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = own.add_argument
    add("files", nargs="+", type=as_path, metavar="FILE", help="wav, flac, ogg, mp3...; - is standard input")
    add("--checkpoint", metavar="RUN|FILE|NAME", help="training folder, file, or released model")
    add("--format", choices=FORMATS, default="text", help="json is one object per file (default: text)")
    add("--out", type=as_path, metavar="FOLDER", help="write FILE.txt, .json, .srt or .vtt there, not here")
    add("--existing", choices=("error", "skip", "replace"), default="error",
        help="for files that are in --out already; skip leaves their recordings out (default: error)")  # fmt: skip
    add("--beam", type=int, help="hypotheses followed (default: the checkpoint's)")
    add("--lm", metavar="FILE", help="language model, of weight 0.1 unless set (default: its own)")
    add("--min-speech-score", type=float, default=MIN_SPEECH_SCORE, metavar="X",
        help="leave out pieces with a lower speech score: texts made out of noise. Needs a model with a CTC head "
        f"(default: {MIN_SPEECH_SCORE}; -inf keeps all)")  # fmt: skip
    add("--on-bad", choices=("error", "skip"), default="error", help="skip leaves out what cannot be read")
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    return own


def main(argv: list[str] | None = None) -> None:
    """Transcribe; see --help."""
    give_large_blocks_back()
    options = parser().parse_args(argv)
    if options.beam is not None and options.beam < 1:
        raise InputError(f"--beam must be at least 1; got {options.beam}")
    if math.isnan(options.min_speech_score):
        raise InputError("--min-speech-score must be a number; got nan")
    paths = list(dict.fromkeys(options.files))
    if options.format in ("srt", "vtt") and len(paths) > 1 and options.out is None:
        raise InputError(f"{len(paths)} files make as many {options.format} files; say where with --out FOLDER")
    targets = choose_targets(paths, options)
    if options.out and not targets:
        print(f"nothing is left to do: all {len(paths)} are in {show(options.out)} already")
        return
    paths = list(targets) or paths
    if options.on_bad == "error":
        check_there(paths)
    from las_fast.checkpoint import load_model
    from las_fast.decode import choose_device
    from las_fast.lm import default_weight, language_table

    device = choose_device(options.device)
    loaded = load_model(options.checkpoint or released_model(), device)
    data = loaded.info.get("data", {})
    if data.get("kind") == "features":
        warn(
            f"checkpoint {loaded.path} was trained on the frames of {data['name']}; "
            "those that las_fast computes from audio may differ from them"
        )
    decoding = default_weight(loaded.config.decoding, options.lm)
    decoding = check_decoding(loaded.config, replace(decoding, beam=options.beam or decoding.beam))
    ngram = language_table(options.lm, decoding, loaded, device)
    how = {"min_speech_score": options.min_speech_score, "skip_bad": options.on_bad == "skip"}
    for path, pieces in transcribe(paths, loaded, decoding, ngram=ngram, device=device, **how):
        text = FORMATS[options.format](path, pieces)
        if options.out:
            save(targets[path], text)
        else:
            several = options.format == "text" and len(paths) > 1
            write(f"{show(path)}: {text}" if several else text, end="")


def choose_targets(paths: list[Path], options: argparse.Namespace) -> dict[Path, Path]:
    """Return the file of each recording that is to be written into --out; none without --out."""
    if not options.out:
        need_stdout("--out FOLDER")
        return {}
    make_folder(options.out, "--out")
    targets = output_files(paths, options.out, SUFFIXES[options.format])
    recordings = {os.path.realpath(path): path for path in paths}
    if twin := next((path for file in targets.values() if (path := recordings.get(os.path.realpath(file)))), None):
        raise InputError(f"--out: the transcript of {show(twin)} would replace a recording; give another folder")
    there = {path: file for path, file in targets.items() if os.path.lexists(file)}
    if there and options.existing == "error":
        first = show(next(iter(there.values())))
        raise InputError(
            f"{len(there)} of {len(targets)} files to write exist already, the first is {first}; "
            "add --existing replace or --existing skip, or give another --out"
        )
    return targets if options.existing == "replace" else {p: f for p, f in targets.items() if p not in there}


def check_there(paths: list[Path]) -> None:
    """Raise InputError for the first recording that does not exist, before the work begins."""
    for path in paths:
        if str(path) != "-" and not os.path.exists(path):
            raise InputError(f"{show(path)} does not exist; check the path, or leave such files out with --on-bad skip")


def save(target: Path, text: str) -> None:
    from las_fast.checkpoint import write_text_atomically

    write_text_atomically(target, text)
    write(show(target))


def released_model() -> str:
    """Return the released model to use where none is named: the one of general speech, or the only one."""
    from las_fast.checkpoint import released_models

    names = released_models()
    if not names:
        raise InputError("this version brings no released model; give --checkpoint and the folder of a training")
    return "speech13h" if "speech13h" in names else names[0]


if __name__ == "__main__":
    run(main)
