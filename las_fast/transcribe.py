"""python -m las_fast.transcribe: transcribe recordings into text, JSON, subtitles, tables or annotations.

Recordings of any length are cut at pauses into segments of speech, which are decoded in batches. Each transcript is
written as soon as its recording is decoded.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from las_fast.arguments import (
    add_device_option,
    add_lm_option,
    add_search_options,
    add_vad_option,
    as_output,
    as_recording,
    check_nbest,
    check_transcription_options,
    decoding_options,
)
from las_fast.cli import require_stdout, run
from las_fast.errors import BadRecording, InputError, show
from las_fast.files import DEFAULT_MODEL, KNOWN_SUFFIXES, make_folder, may_be_file_name
from las_fast.options import Parser
from las_fast.output.formats import FORMATS, STYLE_OPTIONS, SUFFIXES, OptionScope, Style, suffix_list, unused_option
from las_fast.output.subtitles import SubtitleSize
from las_fast.output.transcripts import (
    MIN_SPEECH_SCORE,
    POOL_SECONDS,
    Transcript,
    count,
    noise_warning,
    output_files,
)
from las_fast.progress import ProgressBar, write
from las_fast.system import choose_device, return_freed_memory

if TYPE_CHECKING:  # importing torch would slow down --help
    from las_fast.recogniser import Recogniser

MIN_BYTES_PER_SECOND = 500  # of a recording; with fewer, its header states a wrong duration


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
    add("files", nargs="+", type=as_recording, metavar="FILE",
        help="recordings, folders of recordings, or patterns such as 'talks/*.mp3'; - is standard input")  # fmt: skip
    add("--checkpoint", metavar="RUN|FILE|NAME", help=f"run folder, file or released model (default: {DEFAULT_MODEL})")
    add("--format", choices=FORMATS, type=str.lower,
        help="json has a line per recording, tsv per segment, ctm per word; textgrid is for Praat "
        "(default: that of --out FILE, else text)")  # fmt: skip
    add("--out", type=as_output, metavar="FOLDER|FILE",
        help="folder for RECORDING.txt, .json, .srt ..., in subfolders like those of a folder given; or, for one "
             "recording, a file such as talk.srt; a name that ends in / is always a folder")  # fmt: skip
    add("--existing", choices=("error", "skip", "replace"), default="error",
        help="what to do if an output file exists; skip: keep it, do not transcribe (default: error)")  # fmt: skip
    add("--case", choices=("lower", "upper"), help="write texts in lower or upper case (default: as the model does)")
    add("--width", type=int, default=42, metavar="N", help="maximum characters per line of srt and vtt (default: 42)")
    add("--lines", type=int, default=2, metavar="N", help="maximum lines of a cue of srt and vtt (default: 2)")
    add("--word-times", action="store_true", help="with vtt: a time tag per word, for players that highlight words")
    add("--nbest", type=int, default=1, metavar="N", help="with json: maximum hypotheses per segment (default: 1)")
    add_search_options(parser)
    add_lm_option(parser)
    add("--min-speech-score", type=float, default=MIN_SPEECH_SCORE, metavar="X",
        help="leave out segments with a lower speech score, which are mostly noise; no effect without a CTC head "
        f"(default: {MIN_SPEECH_SCORE}; -inf keeps all)")  # fmt: skip
    add_vad_option(parser)
    add(
        "--on-bad",
        choices=("error", "skip"),
        default="error",
        help="what to do with files that cannot be read; skip: warn, continue, and exit with status 1 (default: error)",
    )
    add_device_option(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    return_freed_memory()
    options = parser().parse_args(argv)
    check_options(options)
    from las_fast.data.recordings import find_recordings

    paths = find_recordings(options.files)
    choose_format(options, len(paths))
    targets = choose_targets(paths, options)
    if options.out and not targets:
        print(f"nothing to do: every transcript exists in {show(options.out)}")
        return
    paths = list(targets) or paths
    if options.on_bad == "error":
        check_existence(paths)
    from las_fast.checkpoint import default_model, load_model
    from las_fast.recogniser import Recogniser

    device = choose_device(options.device)
    checkpoint = default_model() if options.checkpoint is None else options.checkpoint
    model = Recogniser(load_model(checkpoint, device), device, lm_option="--lm ")
    check_nbest(options.nbest, model.settings(**decoding_options(options)).beam)
    done = 0
    for path, transcript in transcribe(paths, model, options):
        emit(path, transcript, options, targets, several=len(paths) > 1)
        done += 1
    if done < len(paths):
        warn(f"{count(len(paths) - done, 'recording')} of {len(paths)} left out")
        sys.exit(1)


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for numbers out of range."""
    for name in ("width", "lines"):
        value = getattr(options, name)
        if value < 1:
            raise InputError(f"--{name} must be at least 1; got {value}")
    check_transcription_options(options)


def choose_format(options: argparse.Namespace, recordings: int) -> None:
    """Set options.format, from --out FILE if it is not given, and options.out_is_file; make options.out a path.

    Raises:
        InputError: --out FILE has the suffix of another format or of none, or there are several recordings; several
            recordings are printed in a format other than text and json; or an option does not apply to the format.
    """
    options.out_is_file = out_is_file(options, recordings)
    options.out = options.out and options.out.path
    named = format_of_out(options, recordings) if options.out_is_file else None
    options.format = options.format or named or "text"
    if options.format not in ("text", "json") and recordings > 1 and options.out is None:
        raise InputError(
            f"{recordings} recordings need {recordings} {options.format} files; give a folder with --out FOLDER"
        )
    scopes = {"nbest": OptionScope(1, ("json",)), **STYLE_OPTIONS}
    if name := unused_option(options.format, vars(options), scopes):
        option = f"--{name.replace('_', '-')}"
        raise InputError(f"{option} is for {' and '.join(scopes[name].formats)}; got --format {options.format}")


def out_is_file(options: argparse.Namespace, recordings: int) -> bool:
    """Return whether --out is a file: neither an existing folder nor marked as one, with the suffix of a file.

    A suffix that is not known is that of a file if a single recording is given, because a folder for it is unlikely.
    """
    if options.out is None or options.out.is_marked_folder or options.out.path.is_dir():
        return False
    path = options.out.path
    if path.suffix.lower() in {*SUFFIXES, *KNOWN_SUFFIXES}:
        return True
    is_single = recordings == 1 and not any(one.is_dir() for one in options.files)
    return is_single and may_be_file_name(path)


def format_of_out(options: argparse.Namespace, recordings: int) -> str:
    """Return the format that --out FILE names; raise InputError as choose_format does."""
    out = show(options.out)
    named = SUFFIXES.get(options.out.suffix.lower())
    if named is None:
        raise InputError(
            f"--out {out}: the name of a transcript must end in {suffix_list()}; for a folder of this name, add a "
            f"slash: {out}/"
        )
    if recordings > 1:
        raise InputError(f"--out {out} is one file, but there are {recordings} recordings; give a folder")
    if options.format not in (None, named):
        raise InputError(f"--format {options.format} writes {FORMATS[options.format].suffix} files; got --out {out}")
    return named


def emit(path: Path, transcript: Transcript, options: argparse.Namespace, targets: dict[Path, Path], *, several: bool):
    """Write the transcript of a recording to its file in `targets`, or print it without --out."""
    if options.case:
        transcript = transcript.map_text(str.lower if options.case == "lower" else str.upper)
    if several and options.format == "text" and not options.out:
        write(f"{show(path)}: {transcript.text}")  # one line per recording
        return
    style = Style(SubtitleSize(options.width, options.lines), options.word_times)
    text = FORMATS[options.format].write(path, transcript, style)
    if options.out:
        save(targets[path], text)
    else:
        write(text, end="")


def transcribe(paths: list[Path], model: Recogniser, options: argparse.Namespace) -> Iterator[tuple[Path, Transcript]]:
    """Yield each recording with its transcript; show progress and print warnings."""
    with ProgressBar(sum(map(estimated_seconds, paths)) or None, "transcribing", "s of audio") as bar:
        transcripts = model.transcribe_all(
            paths,
            **decoding_options(options),
            nbest=options.nbest,
            min_speech_score=options.min_speech_score,
            vad=options.vad,
            skip_bad=options.on_bad == "skip",
            pool_seconds=POOL_SECONDS,
            warn=warn,
            on_audio=bar.update,
        )
        try:
            for path, transcript in transcripts:
                if transcript.noise:
                    warn(noise_warning(show(path), transcript, "--min-speech-score"))
                yield path, transcript
        except BadRecording as error:
            hint = ", or leave out such files with --on-bad skip" if len(paths) > 1 else ""
            raise InputError(f"{error}{hint}") from None


def choose_targets(paths: list[Path], options: argparse.Namespace) -> dict[Path, Path]:
    """Return the output file of each recording that is to be transcribed; {} without --out.

    Raises:
        InputError: a file would replace a recording, exists and --existing is "error", or cannot be written.
    """
    if not options.out:
        require_stdout("--out FOLDER")
        return {}
    if options.out_is_file:
        make_folder(options.out.parent, "--out")
        targets = {paths[0]: options.out}
    else:
        make_folder(options.out, "--out")
        roots = [path for path in options.files if path.is_dir()]
        targets = output_files(paths, options.out, FORMATS[options.format].suffix, roots)
        check_names(paths, targets, options)
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


def check_names(paths: list[Path], targets: dict[Path, Path], options: argparse.Namespace) -> None:
    """Raise InputError if --existing skip would depend on numbered names, which change with the recordings given."""
    if options.existing != "skip":
        return
    first: dict[tuple[Path, str], Path] = {}
    for path in paths:
        same = first.setdefault((targets[path].parent, path.name.casefold()), path)
        if same is not path:
            raise InputError(
                f"--existing skip: {show(same)} and {show(path)} have the same name, so it is unclear "
                "which transcript belongs to which; transcribe each folder to an --out of its own, or give the folder "
                "above both"
            )


def check_existence(paths: list[Path]) -> None:
    """Raise InputError for the first recording that does not exist."""
    for path in paths:
        if str(path) != "-" and not os.path.exists(path):
            raise InputError(f"{show(path)} does not exist; check the path, or leave out such files with --on-bad skip")


def save(target: Path, text: str) -> None:
    """Write a transcript, and print the name of its file."""
    from las_fast.files import write_text_atomically

    make_folder(target.parent, "--out")
    write_text_atomically(target, text)
    write(show(target))


if __name__ == "__main__":
    run(main)
