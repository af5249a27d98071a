"""Checks before a training is resumed: which settings may differ, and whether the data is the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

from las_fast.config import Config
from las_fast.data.dataset import SpeechDataset
from las_fast.errors import InputError
from las_fast.tree import flatten, to_tree

# These may differ: they change where and how fast a training runs, but not what the model learns.
FREE_TO_CHANGE = (
    "training.threads",  # changes rounding, but rounding differs between machines anyway
    "data.workers",
    "data.cache",
    "training.checkpoint_minutes",
    "training.wandb",
    "training.monitor_epoch",
    "decoding.frames_per_batch",
)
BATCH_SIZES = ("frames_per_batch", "utterances_per_batch")  # fields of DataConfig that may become smaller
# Settings that earlier versions lacked, with the values that describe their behaviour, if not the defaults.
LEGACY_SETTINGS = {"features.trim_silence": False}


def check_same_settings(saved: dict, current: dict, path: Path, *, kind: str = "audio") -> None:
    """Raise InputError, which names the setting, if a setting differs that must stay the same.

    A setting that the checkpoint lacks is newer; it counts as its default, or as its value in LEGACY_SETTINGS. Besides
    FREE_TO_CHANGE, these may differ: a restart of the learning rate at the former end and more epochs, which leave the
    earlier cycles as they are; smaller batches, in case memory ran out; and features.kind and lifter where they have no
    effect.

    Args:
        saved:   settings of the checkpoint, as plain data.
        current: settings of the resumed training, as plain data.
        path:    the checkpoint, for the error.
        kind:    of the corpus, "audio" or "features"; with "features", only warping uses features.kind and lifter.
    """
    before, after = dict(flatten(to_tree(Config()))) | LEGACY_SETTINGS | dict(flatten(saved)), dict(flatten(current))
    ends_before, ends_after = (  # epochs at which cycles end
        [*settings["training.restarts"], settings["training.epochs"]] for settings in (before, after)
    )
    longer = ends_after[: len(ends_before)] == ends_before
    free = {*FREE_TO_CHANGE} | ({"training.epochs", "training.restarts"} if longer else set())
    warps = after["augment.warp"] or {*after["decoding.warps"]} != {1.0}
    free |= {"features.kind", "features.lifter"} if kind == "features" and not warps else set()
    for key, value in after.items():
        section, _, name = key.rpartition(".")
        smaller = section == "data" and name in BATCH_SIZES and value < before[key]
        if before[key] != value and key not in free and not smaller:
            advice = "resume with the same settings"
            if key in ("training.epochs", "training.restarts") and before["training.schedule"] == "cosine":
                advice += f", or lengthen it: --training.epochs N --training.restarts {' '.join(map(str, ends_before))}"
            raise InputError(f"{path} was trained with {key} = {before[key]}, not {value}; {advice}")


def fingerprint(*datasets: SpeechDataset) -> str:
    """Return the SHA-256 of the ids, frame counts and transcripts of datasets, in order."""
    digest = hashlib.sha256()
    for data in datasets:
        digest.update(repr((data.ids, data.frame_counts.tolist(), data.texts)).encode())
    return digest.hexdigest()
