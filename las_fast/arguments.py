"""Options that several commands have, and the types of arguments that are paths."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from las_fast.config import MAX_BEAM, PRECISIONS, VADS, DecodingConfig
from las_fast.errors import InputError

VIEW_OPTIONS = ("speeds", "warps", "view_threshold")
SEARCH_OPTIONS = ("beam", "beam_threshold", *VIEW_OPTIONS, "precision")  # fields of DecodingConfig


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda if available)")


def add_lm_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lm",
        metavar="FILE|NAME",
        help="language model: a file written by las_fast.lm, or the name of a released model; its weight is that of "
        "the checkpoint, but 0.1 if the checkpoint has none, or if its own language model was made with --subtract and "
        "this one was not (default: the checkpoint's language model)",
    )


def add_vad_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vad",
        choices=VADS,
        default="energy",
        help="how speech and pauses are found; silero: by the network of the package silero-vad, which tells speech "
        "from music and changing noise (default: energy)",
    )


def add_beam_options(parser: argparse.ArgumentParser, *, beam: int | None = None) -> None:
    """Add --beam, with the default `beam`, and --beam-threshold, by default None."""
    default = "the checkpoint's" if beam is None else beam
    parser.add_argument("--beam", type=int, default=beam, help=f"beam width; 1 is greedy (default: {default})")
    parser.add_argument(
        "--beam-threshold",
        type=float,
        metavar="X",
        help="drop hypotheses more than X nats below the best; 0: drop none (default: the checkpoint's)",
    )


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Add the SEARCH_OPTIONS, by default None."""
    add_beam_options(parser)
    add = parser.add_argument
    add("--speeds", type=as_factor, nargs="+", metavar="X",
        help="speeds at which each utterance is decoded, in this order, 0.5 to 2 (2: twice as fast); the text with the "
        "highest score is kept; --speeds 1 --warps 1: decode once (default: the checkpoint's)")  # fmt: skip
    add("--warps", type=as_factor, nargs="+", metavar="X",
        help="factor on the frequencies at each of the --speeds, 0.5 to 1.5 (1: unchanged); a single speed or warp "
        "applies to all (default: the checkpoint's)")  # fmt: skip
    add("--view-threshold", type=float, metavar="X",
        help="an utterance whose score is at least -X nats per token is not decoded at further speeds and warps; 0: "
        "every utterance is decoded at every speed (default: the checkpoint's)")  # fmt: skip
    add("--precision", choices=PRECISIONS,
        help="precision of matmuls; auto: fp32; bf16 and int8 (CPU only) change few texts and are faster where the "
        "processor has instructions for them (default: the checkpoint's)")  # fmt: skip


def check_search_options(options: argparse.Namespace) -> None:
    """Raise InputError if one of the SEARCH_OPTIONS is out of range."""
    check_beam_options(options)
    fields = {field.name: field for field in dataclasses.fields(DecodingConfig)}
    for name in VIEW_OPTIONS:
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and (bound := fields[name].metadata["bounds"].violated(value)):
                raise InputError(f"--{name.replace('_', '-')} must be {bound}; got {value:g}")


def as_factor(word: str) -> float:
    """Convert one of several values of an option to a number."""
    try:
        return float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{word!r} is not a number; if it belongs to another argument, give it before this option"
        ) from None


def check_beam_options(options: argparse.Namespace) -> None:
    """Raise InputError if --beam or --beam-threshold is out of range."""
    beam, threshold = options.beam, options.beam_threshold
    if beam is not None and not 1 <= beam <= MAX_BEAM:
        raise InputError(f"--beam must be from 1 to {MAX_BEAM}; got {beam}")
    if threshold is not None and not 0 <= threshold < math.inf:
        raise InputError(f"--beam-threshold must be a finite number of at least 0; got {threshold:g}")


def check_transcription_options(options: argparse.Namespace) -> None:
    """Raise InputError if an option of the search, --nbest or --min-speech-score is out of range."""
    check_search_options(options)
    if options.nbest is not None and options.nbest < 1:
        raise InputError(f"--nbest must be at least 1; got {options.nbest}")
    if options.nbest is not None and options.beam is not None:
        check_nbest(options.nbest, options.beam)
    if math.isnan(options.min_speech_score):
        raise InputError("--min-speech-score must be a number; got nan")


def check_nbest(nbest: int, beam: int) -> None:
    """Raise InputError if --nbest is greater than the beam or MAX_BEAM."""
    if nbest > MAX_BEAM:
        raise InputError(f"--nbest must be at most {MAX_BEAM}, the largest beam; got {nbest}")
    if nbest > beam:
        raise InputError(f"--nbest {nbest} needs a beam of at least {nbest}; give --beam {nbest}")


def decoding_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the search, by their names in Python (las_fast.recogniser.DecodingOptions)."""
    return {name: getattr(options, name) for name in (*SEARCH_OPTIONS, "lm")}


def as_path(word: str) -> Path:
    """Convert an argument to a path, and expand ~ where the shell does not, as in --out=~/run."""
    from las_fast.files import URL, expand

    if not word:
        raise argparse.ArgumentTypeError("the path is empty; give one")
    if re.match(URL, word):
        raise argparse.ArgumentTypeError(f"{word} is a URL; give a path on this machine")
    try:
        return expand(word)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def as_recording(word: str) -> Path:
    """Convert an argument to the path of a recording; "-" is standard input, and ./- a file of that name."""
    path = as_path(word)
    return path.absolute() if str(path) == "-" and word != "-" else path  # pathlib turns ./- into -


def as_folder(word: str) -> Path:
    """Convert an argument to the path of an output folder; a new name like that of a file is an error."""
    from las_fast.files import KNOWN_SUFFIXES

    path = as_path(word)
    if path.suffix.lower() in KNOWN_SUFFIXES and not word.endswith(os.sep) and not path.exists():
        raise argparse.ArgumentTypeError(f"{word} has the suffix of a file; give a folder, or add a slash: {word}/")
    return path


class Output(NamedTuple):
    """A file or a folder to write."""

    path: Path
    is_marked_folder: bool  # whether it was written with a slash at its end


def as_output(word: str) -> Output:
    """Convert an argument to the path of an output file or folder."""
    return Output(as_path(word), word.endswith(os.sep))


def as_file(word: str) -> Path:
    """Convert an argument to the path of an output file; a trailing slash, which means a folder, is an error."""
    if word.endswith(os.sep):
        raise argparse.ArgumentTypeError(f"{word} is a folder; give the name of a file to write")
    return as_path(word)
