"""Options and data of the benchmarks that decode a split."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from las_fast.checkpoint import Loaded, current_name
from las_fast.data.corpus import Utterance
from las_fast.data.dataset import SpeechDataset
from las_fast.data.layouts import open_corpus
from las_fast.data.manifest import rows_by_id
from las_fast.errors import InputError
from las_fast.splits import add_utterance_options, open_split


def add_split_options(
    parser: argparse.ArgumentParser,
    results: Path,
    *,
    checkpoint: str | None = None,
    required: bool = True,
    several: bool = False,
    on_bad: bool = False,
    record: bool = True,
) -> None:
    """Add --checkpoint, --data, --split and --record.

    Args:
        results:    CSV file of --record, for --help.
        checkpoint: default of --checkpoint, which is required without one.
        required:   False: --checkpoint and --data may be missing.
        several:    --checkpoint takes several, see add_checkpoints_option.
        on_bad:     also add --on-bad and --normalise-text, for scored_split.
        record:     False: without --record.
    """
    add = parser.add_argument
    if several:
        add_checkpoints_option(parser)
    else:
        add("--checkpoint", required=required and checkpoint is None, default=checkpoint, type=current_name,
            help="run folder, checkpoint file or released name")  # fmt: skip
    add("--data", required=required, help="corpus, as for las_fast.decode")
    add("--split", default="dev", help="split to decode (default: dev)")
    if record:
        add("--record", action="store_true", help=f"append the rows to benchmarks/results/{results.name}")
    if on_bad:
        add_utterance_options(parser)


def add_checkpoints_option(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint, a list of one or several."""
    text = "run folder, checkpoint file or released name; several are compared, the last with the first"
    parser.add_argument("--checkpoint", required=True, nargs="+", action="extend", type=current_name,
                        metavar="RUN|FILE|NAME", help=text)  # fmt: skip


def add_every_option(parser: argparse.ArgumentParser) -> None:
    """Add --every, for utterances_of."""
    parser.add_argument("--every", type=int, default=1, metavar="N", help="use every N-th utterance (default: 1)")


def scored_split(options: argparse.Namespace, loaded: Loaded) -> SpeechDataset:
    """Return the split of --data and --split, with features and transcripts for a checkpoint; see open_split."""
    return open_split(options.data, options.split, loaded, on_bad=options.on_bad, normalise_text=options.normalise_text)


def utterances_of(data: str, split: str, every: int = 1) -> list[Utterance]:
    """Return the first of every `every` recordings of a split.

    Raises:
        InputError: `every` is below 1, the corpus has features instead of recordings, there is no such split, it is
            empty, or a selected recording has no transcript.
    """
    if every < 1:
        raise InputError(f"--every must be at least 1; got {every}")
    corpus = open_corpus(data)
    if corpus.kind != "audio":
        raise InputError(f"--data {data} has {corpus.name} frames; give a corpus of recordings")
    utterances = [u for name in corpus.choose(split) for u in corpus.utterances(name)][::every]
    untranscribed = [u.id for u in utterances if not str(u.transcript or "").strip()]
    if untranscribed or not utterances:
        problem = "none"
        if untranscribed:
            problem = f"{len(untranscribed)} recordings without a transcript, the first is {untranscribed[0]}"
        raise InputError(f"--split {split} needs recordings with transcripts; it has {problem}")
    return utterances


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
