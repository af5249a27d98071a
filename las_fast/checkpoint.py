"""Checkpoints: released weights as one safetensors file, training state as one file read without pickle's freedom."""

from __future__ import annotations

import contextlib
import difflib
import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from las_fast.config import Config, from_yaml, to_yaml
from las_fast.data.dataset import Statistics
from las_fast.errors import InputError, lacks_memory
from las_fast.files import AVERAGED, BEST, LAST, nearest_path, utf8_path, write_atomically, write_tensors
from las_fast.model.las import LAS
from las_fast.text import Vocabulary

FORMAT = "las_fast 1"  # of the files with weights
RELEASED = Path(__file__).parent / "checkpoints"
STATE = {"settings", "model", "averaged", "optimiser", "scaler", "progress", "core_seconds", "data"}  # of last.pt


class Loaded(NamedTuple):
    """A model ready to decode, and what it was made with."""

    model: LAS
    config: Config
    vocabulary: Vocabulary
    statistics: Statistics | None
    path: Path
    info: dict[str, Any]


def build_model(config: Config) -> LAS:
    """Return a freshly initialised model for config."""
    vocabulary = Vocabulary(config.data.characters)
    return LAS(config.model, input_size=config.features.input_size, vocabulary_size=len(vocabulary))


def save_model(path: str | Path, weights: dict, config: Config, statistics: Statistics | None, info: dict) -> None:
    """Write weights (a state_dict) and everything needed to use them to one safetensors file.

    Args:
        statistics: feature mean and std for normalisation "global", else None.
        info: plain values worth keeping, such as epoch and dev scores.
    """
    tensors = {f"model.{name}": value.detach().cpu().contiguous() for name, value in weights.items()}
    if statistics is not None:
        tensors |= {"statistics.mean": statistics.mean, "statistics.std": statistics.std}
    metadata = {"format": FORMAT, "config": to_yaml(config), "info": json.dumps(info)}
    write_tensors(path, lambda name: save_file(tensors, name, metadata), lambda: save(tensors, metadata))


def released_models() -> list[str]:
    """Return the names of the checkpoints in the package; NAME.lm.safetensors is the language model of one."""
    return sorted(p.stem for p in RELEASED.glob("*.safetensors") if not p.name.endswith(".lm.safetensors"))


def find_checkpoint(name: str | Path) -> Path:
    """Return the file that --checkpoint names: a file, a training folder's best, or a released model."""
    path = Path(name)
    if path.is_dir():
        for candidate in (BEST, AVERAGED):
            if (path / candidate).is_file():
                return path / candidate
        raise InputError(f"{path} has no {BEST}; train it first, or wait for its first validation")
    if path.name == LAST:
        raise InputError(f"{path} is what --resume reads; to decode, give the folder {path.parent} or {BEST} in it")
    if path.is_file():
        return path
    released = released_models()
    if str(name) in released:
        return RELEASED / f"{name}.safetensors"
    known = f"; released models: {', '.join(released)}" if released else ""
    near = difflib.get_close_matches(str(name), released, 1)
    advice = f"; the nearest is {near[0]}" if near else nearest_path(path)
    raise InputError(f"checkpoint {name} is neither a training folder nor a file{known}{advice}")


def load_model(name: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """Load a model for decoding, in eval mode; raises InputError when it is missing, corrupt or made otherwise."""
    path = find_checkpoint(name)
    try:
        with utf8_path(path) as name, safe_open(name, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk") from None
        raise InputError(f"{path} is not a readable checkpoint ({error}); train again or copy it again") from None
    if metadata.get("format") != FORMAT or not {"config", "info"} <= metadata.keys():
        raise InputError(f"{path} was not written by las_fast; give a folder or a file that training wrote")
    config = from_yaml(metadata["config"], str(path))
    model = build_model(config).to(device)
    load_weights(model, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, path)
    statistics = None
    if "statistics.mean" in tensors:
        statistics = Statistics(tensors["statistics.mean"].cpu(), tensors["statistics.std"].cpu())
    vocabulary = Vocabulary(config.data.characters)
    return Loaded(model.eval(), config, vocabulary, statistics, path, _info(metadata["info"], path))


def _info(text: str, path: Path) -> dict:
    with contextlib.suppress(ValueError):
        info = json.loads(text)
        if isinstance(info, dict):
            return info
    raise InputError(f"{path} is damaged: what it says of its training is not JSON; train again or copy it again")


def load_weights(model: LAS, weights: dict, path: str | Path) -> None:
    """Copy weights into model; raises InputError naming the first that does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        ours, theirs = own.get(name), weights.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            sizes = [tuple(x.shape) if x is not None else "none" for x in (ours, theirs)]
            raise InputError(
                f"{path} does not fit the settings: {name} should be {sizes[0]}, the file has {sizes[1]}; "
                "use the config.yaml that lies beside it"
            )
    model.load_state_dict(weights)


def save_state(path: str | Path, state: dict) -> None:
    """Write a training state (tensors, numbers, text and containers of them) to one file, atomically."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_state(path: str | Path) -> dict:
    """Read what save_state wrote, on the CPU; raises InputError when it is missing or corrupt."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist, so there is nothing to resume; start without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports a damaged file in a dozen ways
        if lacks_memory(error):
            raise
        if isinstance(error, OSError) and error.errno:
            raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk") from None
        reason = " ".join(str(error).split())[:80] or "it is cut off"
        if isinstance(error, UnpicklingError):  # torch's own words are about how to load it all the same
            reason = "it is another kind of file, or holds more than numbers and text"
        raise InputError(f"{path} is damaged ({reason}); start again without --resume into a new folder") from None
    if not isinstance(state, dict) or not state.keys() >= STATE:
        raise InputError(f"{path} was not written by this version of las_fast; start again into a new folder")
    return state
