"""python -m las_fast.tune: find the best settings of the search on a development split.

Each batch is encoded once, or once per view (decoding.speeds and warps of the checkpoint), and searched with every
combination of the given values. The table is sorted by CER, best first. The last line printed has the options to add to
las_fast.decode. Do not tune on the split that you report.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from las_fast.arguments import add_device_option, add_lm_option, as_file, as_path
from las_fast.cli import require_stdout, run
from las_fast.config import DecodingConfig, check_decoding
from las_fast.errors import InputError
from las_fast.files import first_line, prepare_output_file
from las_fast.options import Parser
from las_fast.search.ngram import load_ngram_model, with_default_weight
from las_fast.splits import add_utterance_options, open_split
from las_fast.system import choose_device, return_freed_memory

MAX_COMBINATIONS = 10_000
GRID = (
    "beam",
    "beam_threshold",
    "ctc_weight",
    "length_penalty",
    "ngram_weight",
    "length_reward",
    "eos_threshold",
    "coverage_weight",
)


def parser() -> Parser:
    parser = Parser(
        prog="python -m las_fast.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN|FILE|NAME", help="run folder, file or released model"
    )
    parser.add_argument(
        "--data", required=True, type=as_path, metavar="ROOT", help="archive, corpus folder or manifest"
    )
    parser.add_argument("--split", help="split name (default: the one that --data names, or dev)")
    add_utterance_options(parser)
    add_lm_option(parser)
    parser.add_argument("--out", type=as_file, metavar="FILE.csv", help="also write the table to this file")
    add_device_option(parser)
    for name in GRID:
        number = int if name == "beam" else float
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=number, nargs="+", help="values to try (default: the checkpoint's)"
        )
    return parser


def grid(options: argparse.Namespace, names: list[str], start: DecodingConfig) -> list[DecodingConfig]:
    """Return a copy of `start` for every combination of the values that `options` has for the settings `names`."""
    count = math.prod(len(getattr(options, name)) for name in names)
    if count > MAX_COMBINATIONS:
        raise InputError(f"the values make {count} combinations; give values for at most {MAX_COMBINATIONS}")
    points = itertools.product(*(getattr(options, name) for name in names))
    return [replace(start, **dict(zip(names, point, strict=True))) for point in points]


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    return_freed_memory()
    options = parser().parse_args(argv)
    names = [name for name in GRID if getattr(options, name)]
    if not names:
        raise InputError("there is nothing to tune; give values, such as --ngram-weight 0 0.1 0.2")
    prepare_out(options)
    from las_fast.checkpoint import load_model
    from las_fast.files import write_text_atomically
    from las_fast.search.grid import decode_grid

    device = choose_device(options.device)
    loaded = load_model(options.checkpoint, device)
    settings = grid(options, names, with_default_weight(loaded, options.lm))
    for point in settings:
        check_decoding(loaded.config, point)
    heaviest = max(settings, key=lambda point: point.ngram_weight)
    ngram = load_ngram_model(options.lm, heaviest, loaded, device)
    dataset = open_split(
        options.data, options.split, loaded, on_bad=options.on_bad, normalise_text=options.normalise_text
    )
    texts = decode_grid(loaded, dataset, settings, ngram, device)
    splits = dict.fromkeys(split for split, _ in dataset.listing)
    order, rows = rank(names, settings, [text or "" for text in dataset.texts], texts)
    print(
        f"{len(dataset)} utterances of {'+'.join(splits)}\n" + "\n".join("".join(map("{:>16}".format, r)) for r in rows)
    )
    print(f"best: {' '.join(options_of(settings[order[0]], names, options.lm))}")
    if options.out:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text_atomically(options.out, text.getvalue())


def prepare_out(options: argparse.Namespace) -> None:
    """Raise InputError if --out cannot be written, or if there is neither --out nor standard output."""
    if not options.out:
        require_stdout("--out FILE.csv")
        return
    kind: dict[str, Any] = {
        "what": "a table of settings in CSV",
        "suffixes": (".csv", ".txt"),
        "may_replace": is_table,
    }
    prepare_output_file(options.out, "--out", inputs=(options.data, options.checkpoint, options.lm), **kind)


def options_of(point: DecodingConfig, names: list[str], lm: str | None) -> list[str]:
    """Return the options of `decode` for the settings `names` of a point, with all digits, and for its --lm."""
    exact = {name: repr(getattr(point, name)).removesuffix(".0") for name in names}
    words = [f"--decoding.{name.replace('_', '-')} {value}" for name, value in exact.items()]
    return [*words, f"--lm {shlex.quote(lm)}"] if lm and point.ngram_weight else words


def is_table(path: Path) -> bool:
    """Return whether the first line of a file is that of a table from this command."""
    return first_line(path).endswith("cer,wer,ld")


def rank(
    names: list[str], settings: list[DecodingConfig], references: list[str], texts: list[list[str]]
) -> tuple[list[int], list[list[str]]]:
    """Return the indices of the settings, lowest CER first, and the table: a header and one row per setting."""
    from las_fast.output.metrics import score

    scores = [score(references, hypotheses) for hypotheses in texts]
    order = sorted(range(len(settings)), key=lambda i: scores[i].cer)
    rows = [[f"{getattr(settings[i], name):g}" for name in names] for i in order]
    for row, i in zip(rows, order, strict=True):
        row += [f"{x:.3f}" for x in (scores[i].cer, scores[i].wer, scores[i].ld)]
    return order, [[*names, "cer", "wer", "ld"], *rows]


if __name__ == "__main__":
    run(main)
