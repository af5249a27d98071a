"""What a checkpoint scores by each way of decoding, on each part of a dev split, and alone as well as in a batch.

    python -m benchmarks.scores --checkpoint RUN --data ROOT [--lm FILE] [--by source] [--record]

The checkpoint's own decoding settings are the last way; the others leave parts of them out. --by names a column of the
manifest, such as source, that parts the split. Every utterance is also decoded alone, and the texts are compared.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks import record
from las_fast.checkpoint import Loaded, load_model
from las_fast.cli import run
from las_fast.config import DecodingConfig
from las_fast.data.dataset import SpeechDataset, open_corpus
from las_fast.data.manifest import further_columns
from las_fast.errors import InputError
from las_fast.output.metrics import score
from las_fast.search.ngram import default_weight, language_table
from las_fast.tune import decode_grid, open_split

FILE = record.RESULTS / "scores.csv"
COLUMNS = ("date", "commit", "checkpoint", "data", "split", "part", "way", "utterances", "ld", "cer", "wer",
           "other_alone")  # fmt: skip


def ways(own: DecodingConfig, beam: int) -> dict[str, DecodingConfig]:
    """Return the ways of decoding by name, as far as the checkpoint's own settings use CTC and a language model."""
    attention = replace(own, beam=beam, ctc_weight=0.0, ngram_weight=0.0, length_reward=0.0)
    found = {"greedy": replace(attention, beam=1), "beam": attention}
    if own.ctc_weight:
        found["beam, CTC"] = replace(attention, ctc_weight=own.ctc_weight)
    if own.ngram_weight:
        language = {"ngram_weight": own.ngram_weight, "length_reward": own.length_reward}
        found |= {f"{name}, language model": replace(found[name], **language) for name in list(found)[1:]}
    return found


def chosen(settings: dict[str, DecodingConfig], options: argparse.Namespace) -> dict[str, DecodingConfig]:
    """Return the ways that --ways asks for, named with their backend where it is not the usual one."""
    places = range(len(settings)) if options.ways is None else options.ways
    if not set(places) <= set(range(len(settings))) or not places:
        raise InputError(f"--ways takes places from 0 to {len(settings) - 1} ({', '.join(settings)}); got {places}")
    suffix = "" if options.backend == "auto" else f", {options.backend}"
    return {f"{name}{suffix}": settings[name] for i, name in enumerate(settings) if i in places}


def parts(ids: list[str], root: Path, column: str) -> dict[str, list[int]]:
    """Return the indices of the utterances of each part, "all" first; `root` is that of the corpus."""
    found = defaultdict(list, {"all": list(range(len(ids)))})
    if column:
        if not root.is_file():
            raise InputError(f"{root} is no manifest, so it has no column {column!r}; leave --by out")
        rows = further_columns(root)
        if any(column not in row for row in rows.values()):
            raise InputError(f"{root} has no column {column!r} on every line; give one that it has, or leave --by out")
        for i, name in enumerate(ids):
            found[str(rows[name][column])].append(i)
    return dict(found)


def measure(loaded: Loaded, dataset: SpeechDataset, settings: dict[str, DecodingConfig], table,
            split: dict[str, list[int]], backend: str) -> Iterator[tuple]:  # fmt: skip
    """Yield (part, way, utterances, LD, CER, WER, texts that differ when each utterance is decoded alone)."""
    together = decode_grid(loaded, dataset, list(settings.values()), table, "cpu", backend)
    single = [replace(point, frames_per_batch=1) for point in settings.values()]
    apart = decode_grid(loaded, dataset, single, table, "cpu", backend)
    for way, texts, alone in zip(settings, together, apart, strict=True):
        for part, members in split.items():
            found = score([dataset.texts[i] for i in members], [texts[i] for i in members])
            other = sum(texts[i] != alone[i] for i in members)
            yield part, way, found.utterances, *(round(asdict(found)[name], 3) for name in ("ld", "cer", "wer")), other


def markdown(rows: list[tuple]) -> str:
    """Return a table: a row for each way, CER and LD of each part."""
    names = list(dict.fromkeys(part for part, *_ in rows))
    cells = {(part, way): f"{cer:.2f} / {ld:.2f}" for part, way, _, ld, cer, *_ in rows}
    lines = [f"| CER, % / LD | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}"]
    for way in dict.fromkeys(way for _, way, *_ in rows):
        lines.append(f"| {way} | {' | '.join(cells[part, way] for part in names)} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scores", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="training folder, file or name")
    parser.add_argument("--data", required=True, help="as for las_fast.decode")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--lm", help="language model (default: the checkpoint's, if any)")
    parser.add_argument("--beam", type=int, default=8)
    parser.add_argument("--by", default="", help="column of the manifest that parts the split")
    parser.add_argument("--ways", type=int, nargs="*", help="only the ways in these places, from 0")
    parser.add_argument("--backend", default="auto", choices=("auto", "reference", "cpp"), help="of the search")
    parser.add_argument("--record", action="store_true", help=f"append the rows to {FILE.name}")
    options = parser.parse_args(words)
    loaded = load_model(options.checkpoint)
    own = default_weight(loaded.config.decoding, options.lm)
    table = language_table(options.lm, own, loaded, "cpu")
    dataset = open_split(options, loaded)
    split = parts(dataset.ids, open_corpus(options.data).root, options.by)
    settings = chosen(ways(own, options.beam), options)
    rows = list(measure(loaded, dataset, settings, table, split, options.backend))
    print(markdown(rows))
    print(f"texts that differ when an utterance is decoded alone: {sum(row[-1] for row in rows if row[0] == 'all')}")
    if options.record:
        date, commit = record.where()[:2]
        about = (date, commit, loaded.path.stem, Path(options.data).resolve().name, options.split)
        record.append(FILE, COLUMNS, [(*about, *row) for row in rows])


if __name__ == "__main__":
    run(main)
