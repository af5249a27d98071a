"""Checkpoints and training states.

A checkpoint is a safetensors file with weights and settings. A training state, last.pt, is written by torch.save and
read with weights_only, so that it cannot run code.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from las_fast.config import Config, from_yaml, to_yaml
from las_fast.data.normalisation import Statistics
from las_fast.errors import FormerNameWarning, HiddenModelWarning, InputError, is_out_of_memory, show
from las_fast.files import (
    AVERAGED,
    BEST,
    DEFAULT_MODEL,
    FORMER_NAMES,
    LAST,
    expand,
    nearest_path_hint,
    unreadable,
    utf8_path,
    write_atomically,
    write_tensors,
)
from las_fast.model.las import LAS
from las_fast.text import Vocabulary

FORMAT = "las_fast 1"  # of checkpoints, in their metadata
RELEASED = Path(__file__).parent / "checkpoints"
STATE_KEYS = {"settings", "model", "averaged", "optimiser", "scaler", "progress", "core_seconds", "data"}  # in last.pt


class Loaded(NamedTuple):
    """A model loaded from a checkpoint, in eval mode, with its settings."""

    model: LAS
    config: Config
    vocabulary: Vocabulary
    statistics: Statistics | None
    path: Path
    info: dict[str, Any]  # from save_model
    is_average: bool = False  # whether the weights are a mean, of the checkpoint at `path` and others

    @property
    def name(self) -> str:
        """Name of the run folder or of the checkpoint file."""
        path = self.path.absolute()  # a relative path may lack the folder that names the model
        return path.parent.name if path.name in (AVERAGED, BEST) else path.stem


def build_model(config: Config) -> LAS:
    """Create a model with random weights."""
    vocabulary = Vocabulary(config.data.characters)
    return LAS(config.model, input_size=config.features.input_size, vocabulary_size=len(vocabulary))


def save_model(path: str | Path, weights: dict, config: Config, statistics: Statistics | None, info: dict) -> None:
    """Write weights and everything needed to use them to one safetensors file, atomically.

    Args:
        weights:    a state_dict.
        statistics: feature mean and standard deviation for normalisation "global", else None.
        info:       JSON values to store, such as the epoch and dev scores.

    Raises:
        InputError: the file cannot be written.
    """
    tensors = {f"model.{name}": value.detach().cpu().contiguous() for name, value in weights.items()}
    if statistics is not None:
        tensors |= {"statistics.mean": statistics.mean, "statistics.std": statistics.std}
    metadata = {"format": FORMAT, "config": to_yaml(config), "info": json.dumps(info)}
    write_tensors(path, lambda name: save_file(tensors, name, metadata), lambda: save(tensors, metadata))


def released_models() -> list[str]:
    """Return the names of the checkpoints in the package, language models (NAME.lm.safetensors) excluded."""
    return sorted(p.stem for p in RELEASED.glob("*.safetensors") if not p.name.endswith(".lm.safetensors"))


def default_model() -> Path:
    """Return the file of the released model of commands without --checkpoint; raise InputError if there is none."""
    names = released_models()
    if not names:
        raise InputError("this installation has no released model; give --checkpoint and a run folder")
    return RELEASED / f"{DEFAULT_MODEL if DEFAULT_MODEL in names else names[0]}.safetensors"


def current_name(name: str) -> str:
    """Return the name of a released model. A former name gives its successor, with a FormerNameWarning, unless a
    checkpoint here has that name."""
    successor = FORMER_NAMES.get(name, name)
    if successor == name or successor not in released_models() or checkpoint_at(Path(name)):
        return name
    message = f"{name} was replaced by {successor}, which gives other texts; give {successor}"
    warnings.warn(message, FormerNameWarning, stacklevel=5)  # the caller of las_fast.load
    return successor


def checkpoint_at(path: Path) -> Path | None:
    """Return the file of the checkpoint at a path: the file itself, or the best one of a run folder; None if none."""
    if os.path.isdir(path):  # False, unlike Path.is_dir, for a name that is too long or must not be looked up
        return next((path / name for name in (BEST, AVERAGED) if os.path.isfile(path / name)), None)
    return path if os.path.isfile(path) else None


def find_checkpoint(name: str | Path) -> Path:
    """Return the file of a checkpoint, given as a file, a run folder (its best checkpoint), or a released model.

    A file or a run folder hides a released model of its name, with a HiddenModelWarning; another folder does not.

    Raises:
        InputError: there is no such checkpoint.
    """
    if not str(name):
        raise InputError("the name of the checkpoint is empty; give a run folder, a file or a released model")
    path = expand(name)
    if path.name == LAST and not os.path.isdir(path):
        raise InputError(
            f"{path} is a training state, for --resume; to decode, give the folder {path.parent} or {BEST} in it"
        )
    released = released_models()
    if found := checkpoint_at(path):
        if str(name) in released:
            message = (
                f"{name} is {show(found.absolute())}, not the released model; give ./{name} to use it without this "
                "warning, or rename it to use the released model"
            )
            warnings.warn(message, HiddenModelWarning, stacklevel=4)  # the caller of las_fast.load
        return found
    current = current_name(str(name))
    if current in released:
        return RELEASED / f"{current}.safetensors"
    if os.path.isdir(path):
        raise InputError(f"{path} has no {BEST}; train it first, or wait for its first validation")
    known = f"; released models: {', '.join(released)}" if released else ""
    former = {name: successor for name, successor in FORMER_NAMES.items() if successor in released}
    near = difflib.get_close_matches(str(name), [*released, *former], 1)
    hint = nearest_path_hint(path, fits=may_hold_checkpoint)
    advice = f"; the nearest is {former.get(near[0], near[0])}" if near else hint
    raise InputError(f"checkpoint {name} is neither a run folder nor a file{known}{advice}")


def may_hold_checkpoint(path: Path) -> bool:
    """Return whether a path is a safetensors file, a run folder, or a folder of run folders."""
    if not path.is_dir():
        return path.suffix == ".safetensors"
    return any(checkpoint_at(folder) for folder in (path, *path.glob("*/")))


def load_model(name: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """Load a model for decoding; raise InputError if it is missing, corrupt or not a las_fast checkpoint."""
    path = find_checkpoint(name)
    try:
        path.open("rb").close()  # safe_open's errors do not say what is wrong
        with utf8_path(path) as file_name, safe_open(file_name, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise unreadable(path, error) from None
        raise InputError(f"{path} is not a readable checkpoint ({error}); train again or copy it again") from None
    if metadata.get("format") != FORMAT or not {"config", "info"} <= metadata.keys():
        raise InputError(f"{path} was not written by las_fast; give a folder or a file that training wrote")
    config = from_yaml(metadata["config"], str(path))
    model = build_model(config).to(device, torch.float32)  # whatever torch's default dtype is
    load_weights(model, {key.removeprefix("model."): x for key, x in tensors.items() if key.startswith("model.")}, path)
    statistics = None
    if any(key.startswith("statistics.") for key in tensors):
        statistics = _statistics(tensors, config.features.size, path)
    vocabulary = Vocabulary(config.data.characters)
    return Loaded(model.eval(), config, vocabulary, statistics, path, _info(metadata["info"], path))


def _statistics(tensors: dict[str, torch.Tensor], size: int, path: Path) -> Statistics:
    """Return the feature statistics of a checkpoint; raise InputError if they are missing or have another size."""
    mean, std = (tensors.get(f"statistics.{name}") for name in ("mean", "std"))
    if mean is None or std is None or not mean.shape == std.shape == (size,):
        raise InputError(f"{path} is damaged: it has no mean and deviation of its {size} features; copy it again")
    return Statistics(mean.cpu(), std.cpu())


def _info(text: str, path: Path) -> dict:
    with contextlib.suppress(ValueError):
        info = json.loads(text)
        if isinstance(info, dict):
            return info
    raise InputError(f"{path} is damaged: its training information is not JSON; train again or copy it again")


def load_weights(model: LAS, weights: dict, path: str | Path, advice: str = "") -> None:
    """Copy a state_dict into the model; raise InputError that names the first tensor that does not fit.

    advice: what to do then (default: copy it again, or train again).
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        shapes = [tuple(x[name].shape) if name in x else "none" for x in (expected, weights)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{path} does not fit the settings: {name} should be {shapes[0]}, but the file has {shapes[1]}; "
                f"{advice or 'it is damaged or of another version: copy it again, or train again'}"
            )
    model.load_state_dict(weights)


def save_state(path: str | Path, state: dict) -> None:
    """Write a training state (tensors, numbers, text and containers of them) to a file, atomically."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_state(path: str | Path) -> dict:
    """Read a training state from save_state onto the CPU; raise InputError if it is missing or corrupt."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist, so there is nothing to resume; start without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for damaged files
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno:
            raise unreadable(path, error) from None
        reason = " ".join(str(error).split())[:80] or "it is cut off"
        if isinstance(error, UnpicklingError):  # torch's message suggests loading it unsafely
            reason = "it is another kind of file, or contains more than numbers and text"
        raise InputError(f"{path} is damaged ({reason}); start again without --resume into a new folder") from None
    if not isinstance(state, dict) or not state.keys() >= STATE_KEYS:
        raise InputError(f"{path} was not written by this version of las_fast; start again into a new folder")
    return state
