"""python -m las_fast.tune: find the best settings of the search on a development split.

Each batch is encoded once and searched with every combination of the given values. The table is sorted by CER, best
first. The last line printed has the options to add to las_fast.decode. Do not tune on the split that you report.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from las_fast.cli import require_stdout, run
from las_fast.config import DecodingConfig, check_decoding
from las_fast.errors import InputError
from las_fast.files import first_line, prepare_output_file
from las_fast.options import Parser, as_file, as_path
from las_fast.progress import Progress, progress
from las_fast.search.ngram import load_ngram_model, with_default_weight
from las_fast.system import choose_device, return_freed_memory
from las_fast.text import remedy

if TYPE_CHECKING:  # importing torch would slow down --help
    from las_fast.checkpoint import Loaded
    from las_fast.data.batching import Batch
    from las_fast.data.dataset import SpeechDataset

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
    parser.add_argument("--split", default="dev", help="split name (default: dev)")
    add_utterance_options(parser)
    parser.add_argument(
        "--lm", metavar="FILE", help="language model, see las_fast.lm (default: the checkpoint's, if any)"
    )
    parser.add_argument("--out", type=as_file, metavar="FILE.csv", help="also write the table to this file")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda if available)")
    for name in GRID:
        number = int if name == "beam" else float
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=number, nargs="+", help="values to try (default: the checkpoint's)"
        )
    return parser


def add_utterance_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command with open_split: --on-bad and --normalise-text."""
    parser.add_argument(
        "--on-bad",
        choices=("error", "skip"),
        help="what to do with utterances that cannot be used; skip: list them and continue (default: as in training)",
    )
    parser.add_argument("--normalise-text", action="store_true", help="map transcripts to the checkpoint's characters")


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
    if not options.out:
        require_stdout("--out FILE.csv")
    else:
        kind: dict[str, Any] = {
            "what": "a table of settings in CSV",
            "suffixes": (".csv", ".txt"),
            "may_replace": is_table,
        }
        prepare_output_file(options.out, "--out", inputs=(options.data, options.checkpoint, options.lm), **kind)
    from las_fast.checkpoint import load_model
    from las_fast.files import write_text_atomically

    device = choose_device(options.device)
    loaded = load_model(options.checkpoint, device)
    settings = grid(options, names, with_default_weight(loaded.config.decoding, options.lm))
    for point in settings:
        check_decoding(loaded.config, point)
    heaviest = max(settings, key=lambda point: point.ngram_weight)
    ngram = load_ngram_model(options.lm, heaviest, loaded, device)
    dataset = open_split(
        options.data, options.split, loaded, on_bad=options.on_bad, normalise_text=options.normalise_text
    )
    texts = decode_grid(loaded, dataset, settings, ngram, device)
    order, rows = rank(names, settings, [text or "" for text in dataset.texts], texts)
    print(f"{len(dataset)} utterances of {options.split}\n" + "\n".join("".join(map("{:>16}".format, r)) for r in rows))
    best = [f"--decoding.{name.replace('_', '-')} {value}" for name, value in zip(names, rows[1], strict=False)]
    if options.lm and settings[order[0]].ngram_weight:
        best.append(f"--lm {options.lm}")
    print(f"best: {' '.join(best)}")
    if options.out:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text_atomically(options.out, text.getvalue())


def is_table(path: Path) -> bool:
    """Return whether the first line of a file is that of a table from this command."""
    return first_line(path).endswith("cer,wer,ld")


def open_split(
    data: str | Path,
    split: str,
    loaded: Loaded,
    *,
    on_bad: Literal["error", "skip"] | None,
    normalise_text: bool,
) -> SpeechDataset:
    """Load a whole split with the features and the vocabulary of a checkpoint, for scoring.

    Args:
        data:           archive, corpus folder or manifest.
        on_bad:         what to do with an utterance that cannot be used, or has no transcript; None: as in training.
        normalise_text: map transcripts to the vocabulary, even if the training did not. This and on_bad are the
                        options of add_utterance_options, which errors name.

    Raises:
        InputError: the features do not fit the checkpoint, or an utterance is bad and not to be skipped.
    """
    from las_fast.data.dataset import load_dataset
    from las_fast.data.layouts import open_corpus
    from las_fast.decode import check_fits

    corpus = open_corpus(data)
    check_fits(corpus, loaded)
    config = loaded.config
    return load_dataset(
        corpus,
        corpus.resolve(split),
        features=config.features,
        data=replace(
            config.data.without_limits(),
            cache="",  # the folder of the training may be on another machine
            on_bad=on_bad or config.data.on_bad,
            normalise_text=normalise_text or config.data.normalise_text,
        ),
        statistics=loaded.statistics,
        need_text=True,
        text_remedy=partial(remedy, option="--normalise-text"),
    )


def decode_grid(
    loaded: Loaded, dataset: SpeechDataset, settings: list[DecodingConfig], ngram, device, backend: str = "auto"
) -> list[list[str]]:
    """Decode a dataset with each of the settings, which all have the same precision.

    For ngram see load_ngram_model, for backend see beam_search.

    Returns:
        A list of texts, one per utterance, for each of the settings.
    """
    from las_fast.search.beam import beam_search, packed_weights
    from las_fast.search.dataset import decode_batches, listen

    texts = [[""] * len(dataset) for _ in settings]
    packed = packed_weights(loaded.model, settings[0], device, backend)

    def decode(batch: Batch, bar: Progress) -> None:
        memory = listen(loaded.model, batch.to(device), settings[0])
        for texts_of_point, point in zip(texts, settings, strict=True):
            hypotheses = beam_search(loaded.model, memory, point, ngram=ngram, packed=packed, backend=backend)
            for i, (best, *_) in zip(batch.indices.tolist(), hypotheses, strict=True):
                texts_of_point[i] = loaded.vocabulary.decode(best.text_tokens)
            bar.update(len(batch.indices))  # those of a batch that is halved count twice

    with progress(len(dataset) * len(settings), "tuning", "utterances") as bar:
        for _ in decode_batches(partial(decode, bar=bar), dataset, loaded.vocabulary, settings[0]):
            pass
    return texts


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
