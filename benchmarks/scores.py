"""Score checkpoints with several decoding settings on each part of a split, in batches and one utterance at a time.

    python -m benchmarks.scores --checkpoint RUN [RUN ...] --data ROOT [--beam 8 16] [--by source] [--record]

The settings range from greedy search to the checkpoint's own; those between leave out CTC, the language model or both.
--by divides the split by a column of its manifest, such as source. Every utterance is also decoded alone, to check that
its text does not depend on the batch. The table has several checkpoints side by side, each with its own weights and
language model, and the relative change of the CER from the first to the last. The cells of a setting that a checkpoint
does not have are empty.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.rows import RESULTS, append_rows, context
from benchmarks.side_by_side import labels, load_checkpoints, score_table
from benchmarks.splits import add_split_options, parts, scored_split
from las_fast.checkpoint import Loaded
from las_fast.cli import run
from las_fast.config import DecodingConfig, check_decoding
from las_fast.data.dataset import SpeechDataset
from las_fast.data.layouts import open_corpus
from las_fast.errors import InputError
from las_fast.ops import NgramModel
from las_fast.output.metrics import score
from las_fast.search.grid import decode_grid
from las_fast.search.ngram import load_ngram_model, with_default_weight

FILE = RESULTS / "scores.csv"
COLUMNS = ("date", "commit", "checkpoint", "data", "split", "part", "way", "utterances", "ld", "cer", "wer",
           "other_alone")  # fmt: skip
EVERY_WAY = DecodingConfig(ctc_weight=0.5, ngram_weight=0.5)  # of a checkpoint with CTC head and language model


class Entry(NamedTuple):
    """A checkpoint, and how it is decoded."""

    label: str
    loaded: Loaded
    settings: dict[str, DecodingConfig]  # by name
    ngram: NgramModel | None


def decodings(base: DecodingConfig, beams: Sequence[int]) -> dict[str, DecodingConfig]:
    """Return decoding settings by name: greedy, beam, and with CTC and a language model if `base` uses them.

    With several beams, the settings with each have its width in their names.
    """
    attention = replace(base.attention_only(), speeds=base.speeds, warps=base.warps, view_threshold=0.0)
    kinds = {"beam": attention}
    if base.ctc_weight:
        kinds["beam, CTC"] = replace(attention, ctc_weight=base.ctc_weight)
    if base.ngram_weight:
        language = {"ngram_weight": base.ngram_weight, "length_reward": base.length_reward}
        kinds |= {f"{name}, language model": replace(kind, **language) for name, kind in kinds.items()}
    full = [*kinds][-1]
    kinds[full] = replace(kinds[full], view_threshold=base.view_threshold)  # which is for the scores of all of them
    settings = {"greedy": base.greedy()}
    for name, kind in kinds.items():
        for beam in beams:
            numbered = name if len(beams) == 1 else name.replace("beam", f"beam {beam}")
            settings[numbered] = replace(kind, beam=beam)
    return settings


def select(names: list[str], ways: list[int] | None) -> list[str]:
    """Return the names of settings that --ways selects.

    Raises:
        InputError: an index of --ways is out of range, or there is none.
    """
    indices = range(len(names)) if ways is None else ways
    if not set(indices) <= set(range(len(names))) or not indices:
        known = "; ".join(f"{i}: {name}" for i, name in enumerate(names))
        raise InputError(f"--ways takes indices from 0 to {len(names) - 1} ({known}); got {list(indices)}")
    return [name for i, name in enumerate(names) if i in indices]


def prepare(options: argparse.Namespace) -> tuple[list[Entry], list[str]]:
    """Return the checkpoints, and the names of the settings that --ways selects of those that any of them has.

    A backend other than auto is added to the names.

    Raises:
        InputError: a checkpoint, a language model, --ways or --beam is unusable.
    """
    checkpoints = load_checkpoints(options.checkpoint)
    beams = list(dict.fromkeys(options.beam))
    bases = [with_default_weight(loaded, options.lm) for loaded in checkpoints]
    available = [decodings(base, beams) for base in bases]
    known = [name for name in decodings(EVERY_WAY, beams) if any(name in settings for settings in available)]
    suffix = "" if options.backend == "auto" else f", {options.backend}"
    ways = {name: f"{name}{suffix}" for name in select(known, options.ways)}
    entries = []
    names = labels(options.checkpoint)
    for label, loaded, base, settings in zip(names, checkpoints, bases, available, strict=True):
        selected = {ways[name]: settings[name] for name in ways if name in settings}
        for decoding in selected.values():
            check_decoding(loaded.config, decoding)
        entries.append(Entry(label, loaded, selected, load_ngram_model(options.lm, base, loaded, "cpu")))
    return entries, list(ways.values())


def measure(entry: Entry, dataset: SpeechDataset, groups: dict[str, list[int]], backend: str) -> Iterator[tuple]:
    """Yield a row per setting and part: the last columns of COLUMNS, from part to other_alone.

    Args:
        entry:   checkpoint and settings; without settings, there are no rows.
        groups:  utterance indices of each part.
        backend: see beam_search.
    """
    if not entry.settings:
        return
    loaded, settings, ngram = entry.loaded, entry.settings, entry.ngram
    batched = decode_grid(loaded, dataset, list(settings.values()), ngram, "cpu", backend)
    one_by_one = [replace(decoding, frames_per_batch=1) for decoding in settings.values()]
    single = decode_grid(loaded, dataset, one_by_one, ngram, "cpu", backend)
    for way, texts, texts_alone in zip(settings, batched, single, strict=True):
        for part, members in groups.items():
            scores = score([dataset.texts[i] for i in members], [texts[i] for i in members])
            different = sum(texts[i] != texts_alone[i] for i in members)
            values = (round(asdict(scores)[name], 3) for name in ("ld", "cer", "wer"))
            yield part, way, scores.utterances, *values, different


def check_utterances(entries: Sequence[Entry], datasets: Sequence[SpeechDataset]) -> None:
    """Raise InputError if the settings of the checkpoints leave out different utterances."""
    for entry, dataset in zip(entries, datasets, strict=True):
        if dataset.ids != datasets[0].ids:
            raise InputError(
                f"{entries[0].label} is scored on {len(datasets[0])} utterances and {entry.label} on {len(dataset)}, "
                "because data.on_bad, data.characters or data.normalise_text differ; score one checkpoint at a time"
            )


def warn_of_other_texts(entries: Sequence[Entry], datasets: Sequence[SpeechDataset]) -> None:
    """Warn if the settings of the checkpoints turn the transcripts into different references."""
    for entry, dataset in zip(entries, datasets, strict=True):
        if dataset.texts != datasets[0].texts:
            print(
                f"warning: {entries[0].label} and {entry.label} are scored against different texts, because their "
                "data.characters or data.normalise_text differ; their scores are not comparable",
                file=sys.stderr,
            )


def markdown(rows: dict[str, list[tuple]], ways: list[str], names: list[str]) -> str:
    """Return a Markdown table of CER and LD, with a line per decoding and checkpoint, and a column per part.

    Args:
        rows:  of each checkpoint, see measure.
        ways:  names of the settings.
        names: of the parts.
    """
    scores = {(label, way, part): (cer, ld) for label, some in rows.items() for part, way, _, ld, cer, *_ in some}
    return score_table("CER, % / LD", {key: cer for key, (cer, _) in scores.items()},
                       lambda key: "{:.2f} / {:.2f}".format(*scores[key]),
                       checkpoints=list(rows), rows=ways, parts=names)  # fmt: skip


def summary(rows: dict[str, list[tuple]]) -> str:
    """Return how many texts depend on the batch, per checkpoint if there are several."""
    counts = {label: sum(row[-1] for row in some if row[0] == "all") for label, some in rows.items()}
    counted = [f"{label} {count}" if len(counts) > 1 else str(count) for label, count in counts.items()]
    return f"texts that differ when an utterance is decoded alone: {', '.join(counted)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scores", description=__doc__.split("\n")[0])
    add_split_options(parser, FILE, several=True, on_bad=True)
    parser.add_argument("--lm", help="language model (default: each checkpoint's, if it has one)")
    parser.add_argument(
        "--beam", type=int, nargs="+", default=[8], help="beam widths of the settings that are not greedy (default: 8)"
    )
    parser.add_argument("--by", default="", help="manifest column to divide the split by")
    parser.add_argument("--ways", type=int, nargs="*", help="indices of the settings to use, from 0 (default: all)")
    parser.add_argument("--backend", default="auto", choices=("auto", "reference", "cpp"), help="backend of the search")
    options = parser.parse_args(argv)
    entries, ways = prepare(options)
    datasets = [scored_split(options, entry.loaded) for entry in entries]
    check_utterances(entries, datasets)
    warn_of_other_texts(entries, datasets)
    corpus = open_corpus(options.data)
    groups = parts(datasets[0].ids, corpus.root, corpus.choose(options.split), options.by)
    rows = {}
    for entry, dataset in zip(entries, datasets, strict=True):
        rows[entry.label] = list(measure(entry, dataset, groups, options.backend))
    print(markdown(rows, ways, list(groups)))
    print(summary(rows))
    if options.record:
        first, data = context()[:2], (Path(options.data).resolve().name, options.split)
        append_rows(FILE, COLUMNS, [(*first, label, *data, *row) for label, some in rows.items() for row in some])


if __name__ == "__main__":
    run(main)
