"""python -m las_fast.transcribe: what audio files say, as text, JSON or subtitles.

A recording of any length is cut at its pauses into segments of speech. Segments are decoded together, and the texts of
a recording are joined. Each file is written as soon as all of it is decoded.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from las_fast.cli import need_stdout, run
from las_fast.errors import InputError, show
from las_fast.files import make_folder
from las_fast.options import Parser, as_path
from las_fast.output.transcripts import (
    FORMATS,
    MIN_SPEECH_SCORE,
    POOL_SECONDS,
    SUFFIXES,
    Transcript,
    noise_warning,
    output_files,
)
from las_fast.progress import Progress, write
from las_fast.system import choose_device, give_large_blocks_back

if TYPE_CHECKING:  # this imports torch, which --help need not wait for
    from las_fast.recogniser import Recogniser

LEAST_BYTES = 500  # per second of a recording, for an estimate of its length


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
    from las_fast.recogniser import Recogniser

    device = choose_device(options.device)
    model = Recogniser(load_model(options.checkpoint or released_model(), device), device, lm_option="--lm ")
    for path, transcript in transcribe(paths, model, options):
        text = FORMATS[options.format](path, transcript.segments)
        if options.out:
            save(targets[path], text)
        else:
            several = options.format == "text" and len(paths) > 1
            write(f"{show(path)}: {text}" if several else text, end="")


def transcribe(paths: list[Path], model: Recogniser, options: argparse.Namespace) -> Iterator[tuple[Path, Transcript]]:
    """Yield each recording with its transcript; show how far it is, and warn of what is wrong."""
    with Progress(sum(map(estimated_seconds, paths)) or None, "transcribing", "s of audio") as shown:
        for path, transcript in model.transcribe_all(
            paths,
            beam=options.beam,
            lm=options.lm,
            min_speech_score=options.min_speech_score,
            skip_bad=options.on_bad == "skip",
            pool_seconds=POOL_SECONDS,
            warn=warn,
            heard=shown.update,
        ):
            if transcript.noise:
                warn(noise_warning(show(path), transcript, "--min-speech-score"))
            yield path, transcript


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
    from las_fast.files import write_text_atomically

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
