"""python -m las_fast.report: write a page about one training, or compare several; add a decoded split to it.

    python -m las_fast.report RUN                              writes RUN/report.html
    python -m las_fast.report RUN RUN --out compared.html      the curves of all runs, and the settings that differ
    python -m las_fast.report RUN --decode FILE.jsonl          also the worst utterances and confused characters
    python -m las_fast.report RUN --decode FILE.jsonl --data ROOT    also recordings of the worst utterances

FILE.jsonl is the --jsonl output of las_fast.decode. The page is a single HTML file with all pictures and recordings
(MP3) inside.
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

from las_fast.arguments import as_file, as_path
from las_fast.cli import run
from las_fast.errors import InputError, show
from las_fast.files import nearest_path_hint, prepare_output_file
from las_fast.options import Parser

if TYPE_CHECKING:  # importing these would slow down --help
    import numpy as np

    from las_fast.data.corpus import Corpus, Utterance
    from las_fast.output.mistakes import Decoded

AUDIO_RATE = 16000  # Hz, of recordings in the page
PAGE = "report.html"


def parser() -> Parser:
    parser = Parser(
        prog="python -m las_fast.report",
        description="Write a page about one training, or compare several; add a decoded split to it.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=as_path, metavar="RUN", help="run folder, the --out of a training")
    parser.add_argument(
        "--out", type=as_file, metavar="FILE.html", help=f"page to write (default for one run: RUN/{PAGE})"
    )
    parser.add_argument(
        "--decode", type=as_path, metavar="FILE.jsonl", help="decoded split, the --jsonl output of las_fast.decode"
    )
    parser.add_argument(
        "--data", type=as_path, metavar="ROOT", help="the decoded corpus, to add recordings of the worst utterances"
    )
    parser.add_argument("--title", help="heading of the page (default: the names of the runs and of the decoded file)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    options = parser().parse_args(argv)
    check_options(options)
    from las_fast.output.mistakes import DecodedSplit, worst
    from las_fast.training.comparison import write_comparison
    from las_fast.training.report import is_report, write_report
    from las_fast.training.runs import read_log

    for path in options.runs:
        read_log(path)  # reports a wrong folder before a folder for the page is made
    rows = read_decoding(options.decode) if options.decode else []
    out = options.out or options.runs[0] / PAGE
    kind: dict[str, Any] = {"what": "a report of las_fast", "suffixes": (".html",), "may_replace": is_report}
    prepare_output_file(out, "--out", inputs=(options.decode,), **kind)
    decoded = DecodedSplit(rows, scores(rows), recordings(options.data, worst(rows)) if options.data else {})
    title = options.title or page_title(options.runs, options.decode)
    if len(options.runs) == 1:
        write_report(options.runs[0], out, title=title, decoded=decoded)
    else:
        write_comparison(options.runs, out, title=title, decoded=decoded)
    if options.data:
        print(f"recordings  {len(decoded.audio)} of the worst utterances, as MP3 inside the page")
    print(f"written     {out} ({os.path.getsize(out) / 1e6:.1f} MB)")


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for options that do not fit together."""
    if len(options.runs) > 1 and options.out is None:
        raise InputError(f"a comparison of {len(options.runs)} runs needs a file; give --out FILE.html")
    if options.data and not options.decode:
        raise InputError("--data adds the recordings of decoded utterances; give --decode FILE.jsonl too")


def page_title(runs: Sequence[Path], decoding: Path | None) -> str:
    """Return the default heading, such as "Trainings a and b, decoding dev.jsonl"."""
    names = [Path(os.path.abspath(path)).name for path in runs]
    title = f"Training {names[0]}" if len(names) == 1 else f"Trainings {', '.join(names[:-1])} and {names[-1]}"
    return show(f"{title}, decoding {decoding.name}" if decoding else title)


# ----------------------------------------------------------------------------------------------------------- Decoding


def read_decoding(path: Path) -> list[Decoded]:
    """Read the utterances of a --jsonl file of las_fast.decode that have a reference.

    Raises:
        InputError: the file is missing, is of another kind, or has no references.
    """
    if not path.exists():
        raise InputError(f"--decode {path} does not exist{nearest_path_hint(path) or '; check the path'}")
    if path.is_dir():
        raise InputError(f"--decode {path} is a folder; give the --jsonl file of las_fast.decode")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        row = _parse_line(line) if line.strip() else {}
        if row is None:
            raise InputError(
                f"--decode {path}, line {number}, is not an utterance with id and text; "
                "give the --jsonl file of las_fast.decode"
            )
        if row.get("reference") is not None:
            rows.append(_decoded(row))
    if not rows:
        raise InputError(f"--decode {path} has no references to compare with; decode a split that has transcripts")
    return rows


def _parse_line(line: bytes) -> dict | None:
    """Return the JSON object of a line; None if it is not an utterance."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_utterance = isinstance(row, dict) and "id" in row and isinstance(row.get("text"), str)
    return row if is_utterance and isinstance(row.get("reference", ""), str | None) else None


def _decoded(row: dict) -> Decoded:
    from las_fast.output.mistakes import Decoded

    return Decoded(str(row["id"]), row["reference"], row["text"], _words(row.get("words")))


def _words(words: Any) -> tuple[tuple[str, float], ...]:
    """Return (word, confidence) of the words of a row; () unless each has a confidence. It is clamped to 0 to 1."""
    if not isinstance(words, list) or not all(isinstance(word, dict) for word in words):
        return ()
    pairs = [(word.get("word"), word.get("confidence")) for word in words]
    if any(not isinstance(text, str) or not isinstance(value, int | float) or value != value for text, value in pairs):
        return ()
    return tuple((text, float(min(max(value, 0.0), 1.0))) for text, value in pairs)


def scores(rows: Sequence[Decoded]) -> dict[str, float]:
    """Return the numbers of the headline: utterances, ld, cer and wer; {} without rows."""
    from las_fast.output.metrics import score

    if not rows:
        return {}
    return asdict(score([row.reference for row in rows], [row.hypothesis for row in rows]))


# --------------------------------------------------------------------------------------------------------- Recordings


def recordings(root: Path, rows: Sequence[Decoded]) -> dict[str, str]:
    """Return the recordings of decoded utterances as data URLs by id.

    A recording that cannot be read, or whose id several splits share, is left out with a message.

    Raises:
        InputError: root has no recordings, or none of these utterances.
    """
    from las_fast.data.audio import load_utterance
    from las_fast.data.layouts import open_corpus

    corpus = open_corpus(root)
    if corpus.kind != "audio":
        raise InputError(f"--data {root} has {corpus.name} frames and no recordings to listen to; omit --data")
    candidates = utterances_by_id(corpus)
    if rows and not any(row.id in candidates for row in rows):
        raise InputError(f"--data {root} has no utterance {rows[0].id}; give the corpus that was decoded")
    audio = {}
    for name, reference in ((row.id, row.reference) for row in rows if row.id in candidates):
        utterance = choose_utterance(candidates[name], reference)
        if utterance is None:
            print(f"left out: {len(candidates[name])} splits have an utterance {name}")
            continue
        try:
            samples = load_utterance(utterance, AUDIO_RATE)
        except InputError as error:
            print(f"left out: {error}")
            continue
        audio[name] = as_mp3(samples)
    return audio


def utterances_by_id(corpus: Corpus) -> dict[str, list[Utterance]]:
    """Return the utterances of a corpus by id, and by SPLIT/ID, which las_fast.decode writes if splits share ids."""
    candidates: dict[str, list[Utterance]] = {}
    for split in corpus.splits:
        for utterance in corpus.utterances(split):
            for name in (utterance.id, f"{split}/{utterance.id}"):
                same = candidates.setdefault(name, [])
                if all((u.path, u.span) != (utterance.path, utterance.span) for u in same):
                    same.append(utterance)
    return candidates


def choose_utterance(candidates: Sequence[Utterance], reference: str) -> Utterance | None:
    """Return the candidate; of several, the only one whose transcript has the letters of the reference, or None."""
    if len(candidates) > 1:
        candidates = [u for u in candidates if _letters(str(u.transcript)) == _letters(reference)]
    return candidates[0] if len(candidates) == 1 else None


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))


def as_mp3(samples: np.ndarray) -> str:
    """Encode samples (N,) float32 at AUDIO_RATE as a data URL of an MP3."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, AUDIO_RATE, format="MP3")
    return f"data:audio/mpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


if __name__ == "__main__":
    run(main)
