"""python -m las_fast.report: write a page about one training, or compare several, with or without a decoding.

    python -m las_fast.report RUN                              writes RUN/report.html
    python -m las_fast.report RUN RUN --out compared.html      curves over each other, and what differs
    python -m las_fast.report RUN --decode FILE.jsonl          also the worst utterances and confused characters
    python -m las_fast.report RUN --decode FILE.jsonl --data ROOT    also their recordings, to listen to

FILE.jsonl is what las_fast.decode writes with --jsonl. The page is one file: pictures, and the recordings of the worst
utterances as MP3, are inside.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from las_fast.cli import run
from las_fast.errors import InputError, show
from las_fast.files import nearest_path_hint, prepare_output_file
from las_fast.options import Parser, as_file, as_path

if TYPE_CHECKING:
    from las_fast.data.corpus import Utterance

AUDIO_RATE = 16000  # Hz, of recordings in the page
PAGE = "report.html"


def parser() -> Parser:
    parser = Parser(
        prog="python -m las_fast.report",
        description="Write a page about one training, or compare several, with or without a decoding.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=as_path, metavar="RUN", help="run folder, the --out of a training")
    parser.add_argument(
        "--out", type=as_file, metavar="FILE.html", help=f"page to write (default of one run: RUN/{PAGE})"
    )
    parser.add_argument(
        "--decode", type=as_file, metavar="FILE.jsonl", help="decoded split, the --jsonl of las_fast.decode"
    )
    parser.add_argument(
        "--data", type=as_path, metavar="ROOT", help="the decoded corpus, to add recordings to the page"
    )
    parser.add_argument("--title", help="heading of the page (default: the names of the runs)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    options = parser().parse_args(argv)
    check_options(options)
    from las_fast.output.mistakes import worst
    from las_fast.training.comparison import write_comparison
    from las_fast.training.report import is_report, write_report
    from las_fast.training.runs import read_log

    for path in options.runs:
        read_log(path)  # reports a wrong folder before a folder for the page is made
    out = options.out or options.runs[0] / PAGE
    kind: dict[str, Any] = {"what": "a report of las_fast", "suffixes": (".html",), "may_replace": is_report}
    prepare_output_file(out, "--out", inputs=(options.decode,), **kind)
    rows = read_decoding(options.decode) if options.decode else []
    audio = recordings(options.data, worst(rows)) if options.data else {}
    results = scores(rows)
    title = options.title or page_title(options.runs, options.decode)
    if len(options.runs) == 1:
        write_report(options.runs[0], out, results=results, rows=rows, title=title, audio=audio)
    else:
        write_comparison(options.runs, out, results=results, rows=rows, title=title, audio=audio)
    if options.data:
        print(f"recordings  {len(audio)} of the worst utterances, as MP3 inside the page")
    print(f"written     {out} ({os.path.getsize(out) / 1e6:.1f} MB)")


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for options that do not fit together."""
    if len(options.runs) > 1 and options.out is None:
        raise InputError(f"{len(options.runs)} runs need a name for their page; give --out FILE.html")
    if options.data and not options.decode:
        raise InputError("--data adds the recordings of decoded utterances; give --decode FILE.jsonl too")


def page_title(runs: Sequence[Path], decoding: Path | None) -> str:
    names = [Path(os.path.abspath(path)).name for path in runs]
    title = f"Training {names[0]}" if len(names) == 1 else f"Trainings {', '.join(names[:-1])} and {names[-1]}"
    return show(f"{title}, decoding {decoding.name}" if decoding else title)


# ----------------------------------------------------------------------------------------------------------- Decoding


def read_decoding(path: Path) -> list[Any]:
    """Read the utterances of a --jsonl file of las_fast.decode that have a reference, as Decoded.

    Raises:
        InputError: the file is missing, is of another kind, or has no references.
    """
    from las_fast.output.mistakes import Decoded

    if not path.is_file():
        raise InputError(f"--decode {path} does not exist{nearest_path_hint(path) or '; check the path'}")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        row = _parse_line(line) if line.strip() else {}
        if row is None or (row and not {"id", "text"} <= row.keys()):
            raise InputError(
                f"--decode {path}, line {number}, is not an utterance with id and text; "
                "give what las_fast.decode wrote with --jsonl"
            )
        if "reference" in row:
            words = _words(row.get("words"))
            rows.append(Decoded(str(row["id"]), str(row["reference"]), str(row["text"]), words))
    if not rows:
        raise InputError(f"--decode {path} has no references to compare with; decode a split that has transcripts")
    return rows


def _parse_line(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _words(words: Any) -> tuple[tuple[str, float], ...]:
    """Return (word, confidence) of the words of a row; () unless all of them have a confidence."""
    if not isinstance(words, list) or not all(isinstance(word, dict) for word in words):
        return ()
    pairs = [(word.get("word"), word.get("confidence")) for word in words]
    if any(not isinstance(text, str) or not isinstance(value, int | float) for text, value in pairs):
        return ()
    return tuple((text, min(max(float(value), 0.0), 1.0)) for text, value in pairs)


def scores(rows: Sequence[Any]) -> dict:
    """Return the results for the headline; {} without rows."""
    from las_fast.output.metrics import score

    if not rows:
        return {}
    return asdict(score([row.reference for row in rows], [row.hypothesis for row in rows]))


# --------------------------------------------------------------------------------------------------------- Recordings


def recordings(root: Path, rows: Sequence[Any]) -> dict[str, str]:
    """Return the recordings of decoded utterances as data URLs by id; those that cannot be read are left out.

    Raises:
        InputError: root has no recordings, or none of these utterances.
    """
    from las_fast.data.audio import load_audio
    from las_fast.data.layouts import open_corpus

    corpus = open_corpus(root)
    if corpus.kind != "audio":
        raise InputError(f"--data {root} has {corpus.name} frames and no recordings to listen to; omit --data")
    found: dict[str, Utterance] = {}
    for split in corpus.splits:
        for utterance in corpus.utterances(split):
            found.setdefault(utterance.id, utterance)
            found[f"{split}/{utterance.id}"] = utterance  # decode writes such ids if splits share ids
    wanted = {row.id: found[row.id] for row in rows if row.id in found}
    if rows and not wanted:
        raise InputError(f"--data {root} has no utterance {rows[0].id}; give the corpus that was decoded")
    audio = {}
    for name, utterance in wanted.items():
        try:
            seconds = utterance.seconds if utterance.is_part else None
            samples = load_audio(utterance.path, AUDIO_RATE, start=utterance.start, seconds=seconds)
        except InputError as error:
            print(f"left out: {error}")
            continue
        audio[name] = as_mp3(samples)
    return audio


def as_mp3(samples: Any) -> str:
    """Encode samples (N,) at AUDIO_RATE as a data URL."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, AUDIO_RATE, format="MP3")
    return f"data:audio/mpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


if __name__ == "__main__":
    run(main)
