"""Measure word times and confidences, and fit the confidences of a checkpoint.

    python -m benchmarks.words times --checkpoint english --data SPEECH [--record]
    python -m benchmarks.words confidence --checkpoint NAME --data ROOT [--record]
    python -m benchmarks.words cross --checkpoint NAME --data ROOT [--prior NAME] [--record]
    python -m benchmarks.words fit --checkpoint NAME --data ROOT --out NAME.words.json [--text SOURCE...] [--prior NAME]

`times` makes recordings in which the starts of words are known, and measures the error of the starts of the words that
are recognised right:

- synthetic: sentences spoken by eSpeak NG, which reports where each word starts. A pause of 0.15 to 0.5 s is inserted
  before the first word and before a quarter of the others.
- pauses, joined: eight utterances of the split one after the other, with pauses of 0.3 to 1.5 s between them, or of 0
  to 0.4 s. Each utterance is first cut to its speech, so the start of its first word is known. Speech is a stretch
  within 25 dB of the utterance's level that comes within 10 dB of it somewhere; breaths are quieter.

`confidence` measures the confidences of the words of the split, separately for its odd utterances and its even ones;
`fit` fits them on the even ones. Where the split is small, `cross` measures a fit by cross-validation: the utterances
are divided into five parts, and the words of each part are judged by a fit to the other parts, in ten random ways; then
`fit --part all` uses all utterances. A word is right if the Levenshtein alignment of the words pairs it with an equal
word.

The calibration error of few words is above 0 even if the confidences are perfect. Therefore the error of perfect ones
is printed too: the mean over draws in which each word is right with a probability equal to its confidence.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.splits import add_every_option, add_split_options
from benchmarks.words.confidence import MIN_OCCURRENCES, fit_calibration, measure_by_folds, measure_confidence
from benchmarks.words.record import FILE
from benchmarks.words.times import measure_times
from las_fast.cli import run


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    torch.set_num_threads(1)
    options.measure(options)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.words", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    for name, measure in (("times", measure_times), ("confidence", measure_confidence), ("cross", measure_by_folds),
                          ("fit", fit_calibration)):  # fmt: skip
        command = commands.add_parser(name)
        command.set_defaults(measure=measure)
        add_split_options(command, FILE, on_bad=name != "times", record=name != "fit")
        if name == "times":
            add_every_option(command)
        if name in ("cross", "fit"):
            add_fit_options(command)
        if name == "fit":
            add = command.add_argument
            add("--out", required=True, metavar="FILE", help="calibration to write, such as runs/mine/best.words.json")
            add("--part", choices=("half", "all"), default="half",
                help="utterances to use (default: half, the even ones)")  # fmt: skip
    return parser


def add_fit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a fit: --prior, --text and --large-text."""
    add = parser.add_argument
    add("--prior", metavar="NAME",
        help='checkpoint whose calibration is the prior, or "default" (default: none)')  # fmt: skip
    add("--text", nargs="*", default=[], metavar="SOURCE", help="texts whose words are known, as for las_fast.lm")
    add("--large-text", nargs="*", default=[], metavar="SOURCE",
        help=f"the same, of words that occur at least {MIN_OCCURRENCES} times")  # fmt: skip


if __name__ == "__main__":
    run(main)
