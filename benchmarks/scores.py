"""Score a checkpoint with several decoding settings on each part of a split, in batches and one utterance at a time.

    python -m benchmarks.scores --checkpoint RUN --data ROOT [--lm FILE] [--by source] [--record]

The settings range from greedy search to the checkpoint's own; those between leave out CTC, the language model or both.
--by divides the split by a column of its manifest, such as source. Every utterance is also decoded alone, to check that
its text does not depend on the batch.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.rows import RESULTS, append_rows, context
from benchmarks.splits import add_split_options
from las_fast.checkpoint import Loaded, load_model
from las_fast.cli import run
from las_fast.config import DecodingConfig, check_decoding
from las_fast.data.dataset import SpeechDataset
from las_fast.data.layouts import open_corpus
from las_fast.data.manifest import rows_by_id
from las_fast.errors import InputError
from las_fast.output.metrics import score
from las_fast.search.ngram import load_ngram_model, with_default_weight
from las_fast.tune import decode_grid, open_split

FILE = RESULTS / "scores.csv"
COLUMNS = ("date", "commit", "checkpoint", "data", "split", "part", "way", "utterances", "ld", "cer", "wer",
           "other_alone")  # fmt: skip


def decodings(base: DecodingConfig, beam: int) -> dict[str, DecodingConfig]:
    """Return decoding settings by name: greedy, beam, and with CTC and a language model if `base` uses them."""
    attention = replace(base.attention_only(), beam=beam)
    settings = {"greedy": replace(attention, beam=1), "beam": attention}
    if base.ctc_weight:
        settings["beam, CTC"] = replace(attention, ctc_weight=base.ctc_weight)
    if base.ngram_weight:
        language = {"ngram_weight": base.ngram_weight, "length_reward": base.length_reward}
        settings |= {f"{name}, language model": replace(settings[name], **language) for name in list(settings)[1:]}
    return settings


def select(settings: dict[str, DecodingConfig], options: argparse.Namespace) -> dict[str, DecodingConfig]:
    """Return the settings that --ways selects; a backend other than auto is added to their names.

    Raises:
        InputError: an index of --ways is out of range, or there is none.
    """
    indices = range(len(settings)) if options.ways is None else options.ways
    if not set(indices) <= set(range(len(settings))) or not indices:
        names = "; ".join(f"{i}: {name}" for i, name in enumerate(settings))
        raise InputError(f"--ways takes indices from 0 to {len(settings) - 1} ({names}); got {list(indices)}")
    suffix = "" if options.backend == "auto" else f", {options.backend}"
    return {f"{name}{suffix}": settings[name] for i, name in enumerate(settings) if i in indices}


def parts(ids: list[str], root: Path, splits: Sequence[str], column: str) -> dict[str, list[int]]:
    """Group utterance indices by a column of the manifest `root`, after a group "all" of every utterance.

    Args:
        ids:    of the utterances; SPLIT/ID if the splits share ids.
        splits: names of the splits that the utterances are from.
        column: "" for the group "all" alone.

    Raises:
        InputError: `root` is not a manifest, or a line has no such column.
    """
    groups = defaultdict(list, {"all": list(range(len(ids)))})
    if column:
        if not root.is_file():
            raise InputError(f"{root} is not a manifest, so it has no column {column!r}; leave out --by")
        rows = {}
        for split in splits:
            for name, row in rows_by_id(root, split).items():
                rows[name] = rows[f"{split}/{name}"] = row
        if any(column not in row for row in rows.values()):
            raise InputError(f"{root} does not have column {column!r} on every line; choose another or leave out --by")
        for i, name in enumerate(ids):
            groups[str(rows[name][column])].append(i)
    return dict(groups)


def measure(loaded: Loaded, dataset: SpeechDataset, settings: dict[str, DecodingConfig], ngram,
            groups: dict[str, list[int]], backend: str) -> Iterator[tuple]:  # fmt: skip
    """Yield a row per setting and part: the last columns of COLUMNS, from part to other_alone.

    Args:
        settings: decoding settings by name.
        ngram:    see load_ngram_model.
        groups:   utterance indices of each part.
        backend:  see beam_search.
    """
    batched = decode_grid(loaded, dataset, list(settings.values()), ngram, "cpu", backend)
    one_by_one = [replace(decoding, frames_per_batch=1) for decoding in settings.values()]
    single = decode_grid(loaded, dataset, one_by_one, ngram, "cpu", backend)
    for way, texts, texts_alone in zip(settings, batched, single, strict=True):
        for part, members in groups.items():
            scores = score([dataset.texts[i] for i in members], [texts[i] for i in members])
            different = sum(texts[i] != texts_alone[i] for i in members)
            values = (round(asdict(scores)[name], 3) for name in ("ld", "cer", "wer"))
            yield part, way, scores.utterances, *values, different


def markdown(rows: list[tuple]) -> str:
    """Return a Markdown table of CER and LD, with a line per decoding and a column per part."""
    names = list(dict.fromkeys(part for part, *_ in rows))
    cells = {(part, way): f"{cer:.2f} / {ld:.2f}" for part, way, _, ld, cer, *_ in rows}
    lines = [f"| CER, % / LD | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}"]
    for way in dict.fromkeys(way for _, way, *_ in rows):
        lines.append(f"| {way} | {' | '.join(cells[part, way] for part in names)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scores", description=__doc__.split("\n")[0])
    add_split_options(parser, FILE)
    parser.add_argument("--lm", help="language model (default: the checkpoint's, if it has one)")
    parser.add_argument(
        "--beam", type=int, default=8, help="beam width of the settings that are not greedy (default: 8)"
    )
    parser.add_argument("--by", default="", help="manifest column to divide the split by")
    parser.add_argument("--ways", type=int, nargs="*", help="indices of the settings to use, from 0 (default: all)")
    parser.add_argument("--backend", default="auto", choices=("auto", "reference", "cpp"), help="backend of the search")
    options = parser.parse_args(argv)
    loaded = load_model(options.checkpoint)
    decoding = with_default_weight(loaded.config.decoding, options.lm)
    settings = select(decodings(decoding, options.beam), options)
    for selected in settings.values():
        check_decoding(loaded.config, selected)
    ngram = load_ngram_model(options.lm, decoding, loaded, "cpu")
    dataset = open_split(options, loaded)
    corpus = open_corpus(options.data)
    groups = parts(dataset.ids, corpus.root, corpus.resolve(options.split), options.by)
    rows = list(measure(loaded, dataset, settings, ngram, groups, options.backend))
    print(markdown(rows))
    print(f"texts that differ when an utterance is decoded alone: {sum(row[-1] for row in rows if row[0] == 'all')}")
    if options.record:
        labels = (*context()[:2], loaded.path.stem, Path(options.data).resolve().name, options.split)
        append_rows(FILE, COLUMNS, [(*labels, *row) for row in rows])


if __name__ == "__main__":
    run(main)
