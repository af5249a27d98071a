"""python -m las_fast.transcribe: what audio files say, as text, JSON or subtitles.

A recording is cut at its quietest places into pieces of at most 20 seconds, since the model has learned from single
utterances; the pieces are decoded together, and their texts joined.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from las_fast.cli import give_large_blocks_back, make_folder, run
from las_fast.errors import InputError

if TYPE_CHECKING:  # these import torch, which --help need not wait for
    from torch import Tensor

    from las_fast.checkpoint import Loaded
    from las_fast.config import DecodingConfig

LONGEST = 20.0  # seconds of a piece
QUIET_SPAN = 0.2  # seconds over which loudness is averaged to find a place to cut
SILENCE = 1e-4  # root mean square, of full scale 1, below which a piece holds no speech
SHORTEST = 0.1  # seconds, below which a piece holds no speech


@dataclass(frozen=True)
class Piece:
    """A stretch of a recording and what was said in it; times in seconds."""

    start: float
    end: float
    text: str
    score: float  # of the text, as las_fast.search.Hypothesis has it


class Pieces:
    """Features of pieces of audio, as las_fast.search.decode_dataset wants a data set."""

    def __init__(self, features: list[Tensor], seconds: list[float], ids: list[str]):
        self.features, self.ids = features, ids
        self.frames = np.array([len(x) for x in features], np.int64)
        self.seconds = np.array(seconds)
        self.texts = [None] * len(features)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, i: int) -> Tensor:
        return self.features[i]


def cut_at_silences(samples: np.ndarray, rate: int, *, longest: float = LONGEST) -> list[tuple[int, int]]:
    """Return (start, end) of consecutive pieces of at most `longest` seconds that cover samples (N,) float32.

    Each cut is made where the recording is quietest in the second half of what a piece may hold.
    """
    most, span = int(longest * rate), max(1, int(QUIET_SPAN * rate))
    pieces, start = [], 0
    while len(samples) - start > most:
        first = start + most // 2
        last = min(start + most, len(samples) - span)  # leave no crumb at the end
        energy = np.cumsum(np.square(samples[first - span // 2 : last + span // 2], dtype=np.float64))
        cut = first + int(np.argmin(energy[span:] - energy[:-span]))
        pieces.append((start, cut))
        start = cut
    return [*pieces, (start, len(samples))]


def transcribe(
    paths: list[Path],
    loaded: Loaded,
    decoding: DecodingConfig,
    *,
    ngram: Tensor | None = None,
    device,
    skip_bad: bool = False,
    progress: bool = True,
) -> Iterator[tuple[Path, list[Piece]]]:
    """Yield each recording with its pieces, in the order of paths; ngram is as in las_fast.search.beam_search.

    With skip_bad a file that cannot be read is a warning.

    Raises:
        InputError: a file cannot be read, or one piece does not fit in memory.
    """
    from las_fast.audio import open_recording
    from las_fast.search import decode_dataset

    rate = loaded.config.features.sample_rate
    spans: list[tuple[Path, list[tuple[int, int]]]] = []
    features, seconds, ids = [], [], []
    for path in paths:
        try:
            recording = open_recording(path, rate)
            samples = np.concatenate(list(recording))
        except InputError as error:
            if not skip_bad:
                raise
            warn(f"left out: {error}")
            continue
        for sentence in recording.warnings:
            warn(sentence)
        spans.append((path, _speech(path, samples, rate)))
        for start, end in spans[-1][1]:
            features.append(_frames(samples[start:end], loaded))
            seconds.append((end - start) / rate)
            ids.append(f"{path} from {start / rate:.0f} s")
    pieces = Pieces(features, seconds, ids)
    options = {"ngram": ngram, "progress": progress, "device": device}
    found = iter(decode_dataset(loaded.model, pieces, loaded.vocabulary, decoding, **options))
    for path, own in spans:
        best = [(span, next(found)[0]) for span in own]
        yield path, [Piece(a / rate, b / rate, loaded.vocabulary.decode(h.text_tokens), h.score) for (a, b), h in best]


def _speech(path: Path, samples: np.ndarray, rate: int) -> list[tuple[int, int]]:
    """Return the pieces of a recording that may be speech; warn where it has none."""
    spans = [s for s in cut_at_silences(samples, rate) if may_be_speech(samples[slice(*s)], rate)]
    if not spans:
        warn(f"{path}: nothing in its {len(samples) / rate:.2f} seconds is long ({SHORTEST:g} s) and loud enough")
    return spans


def may_be_speech(samples: np.ndarray, rate: int) -> bool:
    """Return whether samples are long and loud enough (by their root mean square)."""
    return len(samples) >= SHORTEST * rate and float(np.sqrt(np.square(samples, dtype=np.float64).mean())) > SILENCE


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _frames(samples: np.ndarray, loaded: Loaded) -> Tensor:
    from las_fast.data.dataset import normalise
    from las_fast.features import add_deltas, compute_features

    config = loaded.config.features
    frames = compute_features([samples], config)[0]
    return add_deltas(normalise(frames, config, loaded.statistics), config.deltas)


# -------------------------------------------------------------------------------------------------------- formats


def as_text(path: Path, pieces: list[Piece]) -> str:
    return " ".join(piece.text for piece in pieces if piece.text) + "\n"


def as_json(path: Path, pieces: list[Piece]) -> str:
    rows = [{**vars(piece), "score": round(piece.score, 4)} for piece in pieces]
    whole = {"file": str(path), "text": as_text(path, pieces).strip(), "pieces": rows}
    return json.dumps(whole, ensure_ascii=False) + "\n"


def as_srt(path: Path, pieces: list[Piece]) -> str:
    told = [piece for piece in pieces if piece.text]
    return "\n".join(
        f"{n}\n{clock(piece.start, ',')} --> {clock(piece.end, ',')}\n{piece.text}\n" for n, piece in enumerate(told, 1)
    )


def as_vtt(path: Path, pieces: list[Piece]) -> str:
    told = [piece for piece in pieces if piece.text]
    return "WEBVTT\n" + "".join(f"\n{clock(p.start, '.')} --> {clock(p.end, '.')}\n{p.text}\n" for p in told)


def clock(seconds: float, point: str) -> str:
    """Return seconds as hours:minutes:seconds and milliseconds."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


FORMATS = {"text": as_text, "json": as_json, "srt": as_srt, "vtt": as_vtt}
SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(
        prog="python -m las_fast.transcribe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own.add_argument("files", nargs="+", type=Path, metavar="FILE", help="wav, flac, ogg or mp3; any rate, any length")
    own.add_argument("--checkpoint", metavar="RUN|FILE|NAME", help="training folder, file, or released model")
    own.add_argument("--format", choices=FORMATS, default="text", help="json is one object a file (default: text)")
    own.add_argument("--out", type=Path, metavar="FOLDER", help="write FILE.txt, .json, .srt or .vtt there, not here")
    own.add_argument("--beam", type=int, help="hypotheses followed (default: the checkpoint's)")
    own.add_argument("--lm", metavar="FILE", help="language model, of weight 0.1 unless set (default: its own)")
    own.add_argument("--on-bad", choices=("error", "skip"), default="error", help="skip leaves out what cannot be read")
    own.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    return own


def main(argv: list[str] | None = None) -> None:
    """Transcribe; see --help."""
    give_large_blocks_back()
    options = parser().parse_args(argv)
    if options.beam is not None and options.beam < 1:
        raise InputError(f"--beam must be at least 1; got {options.beam}")
    if options.format in ("srt", "vtt") and len(options.files) > 1 and options.out is None:
        raise InputError(f"{len(options.files)} files make as many {options.format} files; say where with --out FOLDER")
    targets = {path.stem for path in options.files}
    if options.out and len(targets) < len(options.files):
        raise InputError(f"two of the files would be the same file in {options.out}; give them one at a time")
    if options.out:
        make_folder(options.out, "--out")
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
    decoding = replace(decoding, beam=options.beam or decoding.beam)
    ngram = language_table(options.lm, decoding, loaded, device)
    skip = options.on_bad == "skip"
    for path, pieces in transcribe(options.files, loaded, decoding, ngram=ngram, device=device, skip_bad=skip):
        deliver(path, FORMATS[options.format](path, pieces), options)


def deliver(path: Path, text: str, options: argparse.Namespace) -> None:
    """Write what a file says into --out, or print it, with the file's name before it where there are several."""
    if options.out:
        from las_fast.checkpoint import write_atomically

        target = options.out / f"{path.stem}{SUFFIXES[options.format]}"
        write_atomically(target, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        print(target)
    else:
        several = options.format == "text" and len(options.files) > 1
        print(f"{path}: {text}" if several else text, end="")


def released_model() -> str:
    """Return the released model to use where none is named: the one of general speech, or the only one."""
    from las_fast.checkpoint import released_models

    names = released_models()
    if not names:
        raise InputError("this version brings no released model; give --checkpoint and the folder of a training")
    return "speech13h" if "speech13h" in names else names[0]


if __name__ == "__main__":
    run(main)
