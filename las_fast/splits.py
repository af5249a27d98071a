"""Load a split of a corpus for a checkpoint: its features, its vocabulary, and what to do with bad utterances."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from las_fast.errors import InputError
from las_fast.text import remedy

if TYPE_CHECKING:  # importing torch would slow down --help
    from las_fast.checkpoint import Loaded
    from las_fast.data.corpus import Corpus
    from las_fast.data.dataset import SpeechDataset


def add_utterance_options(parser: argparse.ArgumentParser, *, on_bad: str | None = None) -> None:
    """Add the options of a command with open_split or load_splits: --on-bad with this default, and --normalise-text."""
    parser.add_argument(
        "--on-bad",
        choices=("error", "skip"),
        default=on_bad,
        help="what to do with utterances that cannot be used; skip: list them and continue "
        f"(default: {on_bad or 'as in training'})",
    )
    parser.add_argument(
        "--normalise-text",
        action="store_true",
        help="map transcripts to the checkpoint's characters, even if the training did not",
    )


def open_split(
    data: str | Path,
    split: str | None,
    loaded: Loaded,
    *,
    on_bad: Literal["error", "skip"] | None,
    normalise_text: bool,
) -> SpeechDataset:
    """Load a whole split with the features and the vocabulary of a checkpoint, for scoring.

    Args:
        data:           archive, corpus folder or manifest.
        split:          as for Corpus.choose; None: the one that `data` names, or the dev split.
        on_bad:         what to do with an utterance that cannot be used, or has no transcript; None: as in training.
        normalise_text: map transcripts to the vocabulary, even if the training did not. This and on_bad are the
                        options of add_utterance_options, which errors name.

    Raises:
        InputError: the features do not fit the checkpoint, or an utterance is bad and not to be skipped.
    """
    from las_fast.data.layouts import open_corpus

    corpus = open_corpus(data)
    check_fits(corpus, loaded)
    return load_splits(
        corpus, corpus.choose(split), loaded, on_bad=on_bad, normalise_text=normalise_text, need_text=True
    )


def load_splits(
    corpus: Corpus,
    splits: tuple[str, ...],
    loaded: Loaded,
    *,
    on_bad: Literal["error", "skip"] | None,
    normalise_text: bool,
    need_text: bool,
) -> SpeechDataset:
    """Load whole splits with the features and the vocabulary of a checkpoint; see open_split and load_dataset.

    Raises:
        InputError: as load_dataset; its advice names the options of add_utterance_options.
    """
    from las_fast.data.dataset import load_dataset

    trained = loaded.config.data
    return load_dataset(
        corpus,
        splits,
        features=loaded.config.features,
        data=replace(
            trained.without_limits(),
            cache="",  # the folder of the training may be on another machine
            on_bad=on_bad or trained.on_bad,
            normalise_text=normalise_text or trained.normalise_text,
        ),
        statistics=loaded.statistics,
        need_text=need_text,
        text_remedy=partial(remedy, option="--normalise-text"),
    )


def check_fits(corpus: Corpus, loaded: Loaded, *, any_features: bool | None = None) -> None:
    """Check the features of a corpus against those that the checkpoint was trained on.

    A warning is printed if the archives differ but their frames have the same size, or if any_features allows another
    kind; None is for commands without --any-features.

    Raises:
        InputError: the sizes differ, or the kinds (precomputed, computed from audio) differ without any_features.
    """
    size = loaded.config.features.size
    if corpus.kind == "features" and corpus.feature_size != size:
        raise InputError(
            f"{corpus.name} has {corpus.feature_size} values per frame, but checkpoint {loaded.path} was trained on "
            f"{size}; decode data with {size} values per frame, or train on this data"
        )
    known = loaded.info.get("data")  # {"kind", "name"} of the corpus
    if known is None:
        return
    if known["kind"] != corpus.kind:
        kinds = {"features": "precomputed frames", "audio": "frames computed from audio"}
        trained = f"checkpoint {loaded.path} was trained on {kinds[known['kind']]} ({known['name']})"
        problem = f"{trained}, but {corpus.name} has {kinds[corpus.kind]}"
        if not any_features:
            option = "" if any_features is None else ", or add --any-features to decode it anyway"
            raise InputError(f"{problem}; give data of the same kind{option}")
        print(f"warning: {problem}; expect many errors", file=sys.stderr)
    elif corpus.feature_kind and known["name"] != corpus.name:  # a manifest's name says nothing about its frames
        print(
            f"warning: checkpoint {loaded.path} was trained on {known['name']}, but this is {corpus.name}; "
            "its frames have the same size but may be computed differently",
            file=sys.stderr,
        )
