"""python -m las_fast.transcribe: transcribe audio files into text, JSON or subtitles.

Recordings of any length are cut at pauses into segments of speech, which are decoded in batches. Each transcript is
written as soon as its recording is decoded.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from las_fast.cli import require_stdout, run
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
from las_fast.system import choose_device, return_freed_memory

if TYPE_CHECKING:  # importing torch would slow down --help
    from las_fast.recogniser import Recogniser

MIN_BYTES_PER_SECOND = 500  # of a recording; limits the duration that a damaged header may state


def estimated_seconds(path: Path) -> float:
    """Estimate the duration of a recording for the progress bar; 0 if its header does not state it."""
    import soundfile

    if str(path) == "-" or not os.path.isfile(path):  # libsndfile would consume standard input
        return 0.0
    try:
        return min(soundfile.info(os.fsencode(path)).duration, os.path.getsize(path) / MIN_BYTES_PER_SECOND)
    except (soundfile.LibsndfileError, OSError, RuntimeError, ValueError, TypeError):
        return 0.0


def warn(message: str) -> None:
    write(f"warning: {message}", file=sys.stderr)


def parser() -> Parser:
    parser = Parser(
        prog="python -m las_fast.transcribe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("files", nargs="+", type=as_path, metavar="FILE", help="wav, flac, ogg, mp3...; - is standard input")
    add("--checkpoint", metavar="RUN|FILE|NAME", help="run folder, file or released model (default: speech13h)")
    add("--format", choices=FORMATS, default="text", help="json writes one object per file (default: text)")
    add("--out", type=as_path, metavar="FOLDER", help="write FILE.txt, .json, .srt or .vtt there instead of printing")
    add("--existing", choices=("error", "skip", "replace"), default="error",
        help="what to do if an output file exists; skip: leave the recording out (default: error)")  # fmt: skip
    add("--beam", type=int, help="beam width (default: the checkpoint's)")
    add(
        "--lm",
        metavar="FILE",
        help="language model; its weight is 0.1 unless the checkpoint sets one (default: the checkpoint's)",
    )
    add("--min-speech-score", type=float, default=MIN_SPEECH_SCORE, metavar="X",
        help="leave out segments with a lower speech score, which are mostly noise; needs a model with a CTC head "
        f"(default: {MIN_SPEECH_SCORE}; -inf keeps all)")  # fmt: skip
    add(
        "--on-bad",
        choices=("error", "skip"),
        default="error",
        help="what to do with files that cannot be read; skip: warn and continue (default: error)",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda if available)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    return_freed_memory()
    options = parser().parse_args(argv)
    if options.beam is not None and options.beam < 1:
        raise InputError(f"--beam must be at least 1; got {options.beam}")
    if math.isnan(options.min_speech_score):
        raise InputError("--min-speech-score must be a number; got nan")
    paths = list(dict.fromkeys(options.files))
    if options.format in ("srt", "vtt") and len(paths) > 1 and options.out is None:
        raise InputError(
            f"{len(paths)} recordings need {len(paths)} {options.format} files; "
            "give a folder for them with --out FOLDER"
        )
    targets = choose_targets(paths, options)
    if options.out and not targets:
        print(f"nothing to do: all {len(paths)} transcripts exist in {show(options.out)}")
        return
    paths = list(targets) or paths
    if options.on_bad == "error":
        check_existence(paths)
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
    """Yield each recording with its transcript; show progress and print warnings."""
    with Progress(sum(map(estimated_seconds, paths)) or None, "transcribing", "s of audio") as bar:
        for path, transcript in model.transcribe_all(
            paths,
            beam=options.beam,
            lm=options.lm,
            min_speech_score=options.min_speech_score,
            skip_bad=options.on_bad == "skip",
            pool_seconds=POOL_SECONDS,
            warn=warn,
            on_audio=bar.update,
        ):
            if transcript.noise:
                warn(noise_warning(show(path), transcript, "--min-speech-score"))
            yield path, transcript


def choose_targets(paths: list[Path], options: argparse.Namespace) -> dict[Path, Path]:
    """Return the output file of each recording to transcribe; empty without --out.

    Raises:
        InputError: a file would replace a recording, or exists and --existing is "error".
    """
    if not options.out:
        require_stdout("--out FOLDER")
        return {}
    make_folder(options.out, "--out")
    targets = output_files(paths, options.out, SUFFIXES[options.format])
    recordings = {os.path.realpath(path): path for path in paths}
    replaced = next((path for file in targets.values() if (path := recordings.get(os.path.realpath(file)))), None)
    if replaced:
        raise InputError(f"--out: the transcript of {show(replaced)} would replace a recording; give another folder")
    existing = {path: file for path, file in targets.items() if os.path.lexists(file)}
    if existing and options.existing == "error":
        first = show(next(iter(existing.values())))
        raise InputError(
            f"{len(existing)} of {len(targets)} output files exist already, the first is {first}; "
            "add --existing replace or --existing skip, or give another --out"
        )
    return targets if options.existing == "replace" else {p: f for p, f in targets.items() if p not in existing}


def check_existence(paths: list[Path]) -> None:
    """Raise InputError for the first recording that does not exist."""
    for path in paths:
        if str(path) != "-" and not os.path.exists(path):
            raise InputError(f"{show(path)} does not exist; check the path, or leave out such files with --on-bad skip")


def save(target: Path, text: str) -> None:
    from las_fast.files import write_text_atomically

    write_text_atomically(target, text)
    write(show(target))


def released_model() -> str:
    """Return the name of the default released model."""
    from las_fast.checkpoint import released_models

    names = released_models()
    if not names:
        raise InputError("this installation has no released model; give --checkpoint and a run folder")
    return "speech13h" if "speech13h" in names else names[0]


if __name__ == "__main__":
    run(main)
