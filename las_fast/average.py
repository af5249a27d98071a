"""The mean of the weights of several checkpoints (Wortsman et al. 2022, "Model soups").

Use it for checkpoints of one training, or of trainings that started from the same weights or from each other. The mean
of unrelated trainings is useless, because the units of two trainings from random weights have nothing in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from las_fast.checkpoint import Loaded, load_model
from las_fast.config import Config
from las_fast.errors import InputError
from las_fast.tree import flatten, to_tree


def load_mean(names: Sequence[str | Path]) -> Loaded:
    """Load the mean of checkpoints, on the CPU; of a single one, the checkpoint itself.

    A checkpoint that is named twice counts twice. Settings, path and corpus are those of the first; `info["mean_of"]`
    has the info of each.

    Raises:
        InputError: a checkpoint does not load, or differs from the first in architecture, features or characters.
    """
    first, *others = (load_model(name) for name in names)
    if not others:
        return first
    for other in others:
        _check_alike(first, other)
    models = [loaded.model.state_dict() for loaded in (first, *others)]
    first.model.load_state_dict({key: torch.stack([model[key] for model in models]).mean(0) for key in models[0]})
    info = {"mean_of": [loaded.info for loaded in (first, *others)]}
    info |= {key: value for key, value in first.info.items() if key == "data"}
    return first._replace(info=info, is_average=True)


def _check_alike(first: Loaded, other: Loaded) -> None:
    """Raise InputError, which names the first difference, if the mean of two models would make no sense."""
    expected, got = (_defining_settings(loaded.config) for loaded in (first, other))
    for name, value in expected.items():
        if got[name] != value:
            raise InputError(
                f"{other.path} has {name} = {got[name]!r}, and {first.path} has {value!r}; average models of one "
                "architecture with the same features and characters"
            )
    if not _same_statistics(first, other):
        raise InputError(
            f"{other.path} normalises features by other statistics than {first.path}; average models of one training, "
            "or of trainings with --init"
        )


def _defining_settings(config: Config) -> dict[str, Any]:
    """Return the settings that say what the weights mean. Dropout does not."""
    settings = dict(flatten({"model": to_tree(config.model), "features": to_tree(config.features)}))
    settings["data.characters"] = config.data.characters
    return {name: value for name, value in settings.items() if not name.endswith(".dropout")}


def _same_statistics(first: Loaded, other: Loaded) -> bool:
    one, two = first.statistics, other.statistics
    if one is None or two is None:
        return one is two
    return torch.equal(one.mean, two.mean) and torch.equal(one.std, two.std)
