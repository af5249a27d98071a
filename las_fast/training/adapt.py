"""Adapt the settings of a training to its data and its initial checkpoint, except those that the user has set."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from las_fast.config import Config
from las_fast.data.corpus import Corpus, role_of
from las_fast.errors import InputError
from las_fast.files import AVERAGED, BEST, write_atomically
from las_fast.search.ngram import lm_path_for
from las_fast.system import is_installed

if TYPE_CHECKING:  # importing torch would slow down --help
    from las_fast.checkpoint import Loaded

FINETUNE = "finetune"  # the preset that takes all other settings from --init
NO_DEV = "or hold out a tenth of the training data: --data.dev-share 0.1"


# Launchers, and the environment variables in which they tell a process how many there are, and its number.
LAUNCHERS = (
    ("torchrun", "WORLD_SIZE", "RANK"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def check_one_process() -> None:
    """Raise InputError if a launcher such as torchrun has started several processes; only rank 0 has the message.

    Raises:
        SystemExit: with status 2, in the processes of other ranks.
    """
    launched = ((name, os.environ.get(size, "1"), os.environ.get(rank, "0")) for name, size, rank in LAUNCHERS)
    name, count, rank = next((x for x in launched if x[1].isdecimal() and int(x[1]) > 1), ("", "", ""))
    if not name:
        return
    if rank != "0":
        raise SystemExit(2)
    raise InputError(
        f"{name} (or a launcher like it) has started {count} processes, but a training is one process on one device; "
        "start it with python -m las_fast.train, with --training.threads for CPU cores or --device cuda:1 for a GPU; "
        "several GPUs can run several trainings, each with its own --out"
    )


def check_packages(config: Config) -> None:
    """Raise InputError if a package that the settings need is missing."""
    if config.training.wandb and not is_installed("wandb"):
        raise InputError("--training.wandb needs the package wandb; run: pip install wandb")


def adapt_epochs(config: Config, user_set: Collection[str]) -> Config:
    """Drop what the preset does at or after the last epoch, restarts and splice, if the user has set the epochs.

    What is dropped is printed. user_set: names of the settings that the user has set; these do not change.
    """
    if "training.epochs" not in user_set:
        return config
    return _adapt_splice(_adapt_restarts(config, user_set), user_set)


def _adapt_splice(config: Config, user_set: Collection[str]) -> Config:
    augment, epochs = config.augment, config.training.epochs
    is_set = "augment.splice" in user_set or "augment.splice_epoch" in user_set
    if not augment.splice or augment.splice_epoch < epochs or is_set:
        return config
    print(f"augment.splice: 0, because the training ends at epoch {epochs}, before epoch {augment.splice_epoch}")
    return replace(config, augment=replace(augment, splice=0.0))


def _adapt_restarts(config: Config, user_set: Collection[str]) -> Config:
    training = config.training
    if "training.restarts" in user_set:
        return config
    restarts = tuple(epoch for epoch in training.restarts if epoch < training.epochs)
    if dropped := training.restarts[len(restarts) :]:
        epochs = ", ".join(map(str, dropped))
        print(f"restarts: dropped at epoch {epochs}, because the training ends at epoch {training.epochs}")
    return replace(config, training=replace(training, restarts=restarts))


def adapt_features(config: Config, corpus: Corpus, user_set: Collection[str]) -> Config:
    """Take the size and kind of the features from an archive of features, and print them if they change.

    user_set: names of the settings that the user has set; these do not change.
    """
    if corpus.feature_size is None or corpus.feature_kind is None:
        return config
    before = config.features
    size = before.size if "features.size" in user_set else corpus.feature_size
    kind = before.kind if "features.kind" in user_set else corpus.feature_kind
    if (size, kind) == (before.size, before.kind):
        return config
    print(f"features: {size} {kind} values per frame, as in the data (the settings say {before.size} {before.kind})")
    return replace(config, features=replace(before, size=size, kind=kind))


def adapt_augment(config: Config, corpus: Corpus, user_set: Collection[str]) -> Config:
    """Turn off what needs recordings, or fewer values per frame, for an archive; print what is turned off.

    config has the features of the archive. user_set: names of the settings that the user has set; these do not change,
    and checks refuse them.
    """
    from las_fast.data.degrade import SETTINGS  # imports torch, which would slow --help down

    if corpus.kind == "audio":
        return config
    on = [name for name in SETTINGS if getattr(config.augment, name) > 0 and f"augment.{name}" not in user_set]
    off: dict[str, Any] = dict.fromkeys(on, 0.0)
    if on:
        print(f"augment: {', '.join(on)} need recordings, so they are 0 for this archive of features")
    features, is_set = config.features, {"augment.warp", "features.mel_bins"} & set(user_set)
    if config.augment.warp and features.kind == "mfcc" and features.size > features.mel_bins and not is_set:
        print(f"augment.warp: 0, because the archive has {features.size} MFCC, and features.mel_bins is below that")
        off["warp"] = 0.0
    return replace(config, augment=replace(config.augment, **off))


def describe_warp(config: Config, kind: str) -> None:
    """Print the settings that augment.warp assumes for the MFCC of an archive. kind is that of the corpus."""
    features = config.features
    if config.augment.warp and kind == "features" and features.kind == "mfcc":
        print(
            f"augment.warp: assumes MFCC of {features.mel_bins} mel filters with a lifter of {features.lifter:g} (0: "
            "none); if that is wrong, set --features.mel-bins and --features.lifter"
        )


def training_splits(config: Config, corpus: Corpus) -> tuple[str, ...]:
    """Return the names of the training splits; if --data names a split, print which splits are used."""
    named, root = corpus.named_split, corpus.root
    splits = tuple(config.data.train) or corpus.resolve("train")
    if not named:
        return splits
    if not config.data.train and role_of(named) == "train":
        others = [name for name in splits if name != named]
        hint = f"; for {' and '.join(others)} as well, give {root}" if others else ""
        print(f"training on {named} only, which --data names{hint}")
        return (named,)
    if named not in splits:
        reason = "data.train is set" if config.data.train else f"{named} is not for training"
        print(f"training on {'+'.join(splits)} of {root}, not on {named}, which --data names: {reason}")
    return splits


def dev_splits(config: Config, corpus: Corpus) -> tuple[str, ...]:
    """Return the names of the dev splits; raise InputError, with advice to hold one out, if there is none."""
    try:
        return corpus.resolve(config.data.dev or "dev")
    except InputError as error:
        if config.data.dev:
            raise
        raise InputError(f"{error}, {NO_DEV}") from None


def check_extra(corpus: Corpus, extra: Sequence[Corpus]) -> None:
    """Raise InputError if a corpus of --extra-data has no training split, or frames unlike those of --data."""
    for other in extra:
        extra_splits(other)
        kinds = {corpus.feature_kind, other.feature_kind} - {None}
        if (other.kind, other.feature_size) != (corpus.kind, corpus.feature_size) or len(kinds) > 1:
            raise InputError(
                f"--extra-data {other.root} has {_frames(other)}, but --data {corpus.root} has {_frames(corpus)}; "
                "give corpora of the same kind"
            )


def extra_splits(corpus: Corpus) -> tuple[str, ...]:
    """Return the splits of a corpus of --extra-data to train on: its training splits, or the one that the path names.

    Raises:
        InputError: there is none.
    """
    if corpus.named_split:
        return (corpus.named_split,)
    if "train" not in corpus.roles:
        raise InputError(
            f"--extra-data {corpus.root} has no training split; it has {', '.join(corpus.splits)}; "
            f"{corpus.split_remedy}, or give the path of a split"
        )
    return corpus.roles["train"]


def _frames(corpus: Corpus) -> str:
    if corpus.kind == "audio":
        return "recordings"
    return f"{corpus.feature_size} {corpus.feature_kind or 'features'} per frame"


def check_init(init: Loaded, config: Config, corpus: Corpus) -> None:
    """Raise InputError if the initial checkpoint does not fit the training: other characters or features, or layers
    that the model does not have. features.shift_ms may differ: a shorter shift is like slower speech; that is printed.
    """
    trained = init.config.features
    if corpus.feature_size not in (None, trained.size):
        raise InputError(
            f"--init {init.path} was trained on {trained.size} features per frame, but {corpus.name} has "
            f"{corpus.feature_size}; give data with {trained.size}, or train without --init"
        )
    pairs = {f"features.{name}": (value, getattr(config.features, name)) for name, value in vars(trained).items()}
    if corpus.feature_size is not None:  # the other fields are about computing features, which the archive has
        pairs = {name: pairs[name] for name in ("features.size", "features.normalisation", "features.deltas")}
    before_ms, now_ms = pairs.pop("features.shift_ms", (0, 0))
    pairs["data.characters"] = (init.config.data.characters, config.data.characters)
    before, now = init.config.model.listener, config.model.listener
    pairs["model.listener.pyramids"] = (before.pyramids, now.pyramids)
    if before.top_layers > now.top_layers:
        pairs["model.listener.top_layers"] = (before.top_layers, now.top_layers)
    for name, (was, wanted) in pairs.items():
        if was != wanted:
            option = f"--{name.replace('_', '-')}"
            raise InputError(
                f"--init {init.path} was trained with {name} {was}, not {wanted}; give --config {FINETUNE}, which "
                f"takes its settings, without {option}"
            )
    if before_ms != now_ms:
        print(f"features.shift_ms: {now_ms:g}, but --init {init.path} was trained with {before_ms:g}")


def inherit_lm(init: Loaded, config: Config, out: Path) -> None:
    """Copy the language model of the initial checkpoint next to the new checkpoints, if the settings use one.

    Raises:
        InputError: another one is there.
    """
    lm = lm_path_for(init.path)
    if not config.decoding.ngram_weight or not lm.is_file():
        return
    names = (BEST, *([AVERAGED] if config.training.ema_decay else []))
    own = lm_path_for(out / BEST)
    if own.is_file() and not filecmp.cmp(own, lm, shallow=False):
        raise InputError(f"{own} is not the language model of {init.path}; move it away, and back after the training")
    for name in names:
        write_atomically(lm_path_for(out / name), lambda path: shutil.copyfile(lm, path))
    print(f"language model: that of {init.path.stem}, copied to {own}")
