"""The same training step, with the same weights, by every implementation available here, on any device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.plain import Plain, PlainGraphed, PlainPacked, Usual
from benchmarks.synthetic_speech import LETTERS_PER_FRAME, frame_counts
from las_fast import checkpoint
from las_fast.config import Config
from las_fast.data.batch import Batch
from las_fast.text import EOS, PAD, Vocabulary
from las_fast.training.step import make_optimiser
from las_fast.training.trainer import Trainer

PATHS = {  # model (None: las_fast's own), precision
    "usual": (Usual, "fp32"),
    "plain": (Plain, "fp32"),
    "plain bf16": (Plain, "bf16"),
    "plain packed": (PlainPacked, "fp32"),
    "plain packed bf16": (PlainPacked, "bf16"),
    "plain graphed": (PlainGraphed, "fp32"),
    "plain graphed bf16": (PlainGraphed, "bf16"),
    "las_fast": (None, "fp32"),
    "las_fast bf16": (None, "bf16"),
}


def without_dropout(config: Config) -> Config:
    model = config.model
    parts = {name: dataclasses.replace(getattr(model, name), dropout=0.0) for name in ("listener", "speller")}
    return dataclasses.replace(config, model=dataclasses.replace(model, **parts))


def shrunk(config: Config) -> Config:
    """Return config with the same layers, each of a few units, to try code and not to time it."""
    listener, speller = config.model.listener, config.model.speller
    listener = dataclasses.replace(listener, conv_channels=(8,) * len(listener.conv_channels), lstm_size=12)
    sizes = tuple(16 + 4 * i for i in range(len(speller.lstm_sizes)))
    speller = dataclasses.replace(speller, key_size=12, value_size=12, embedding_size=12, lstm_sizes=sizes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, listener=listener, speller=speller))


def with_training(config: Config, **fields) -> Config:
    """Return config with some settings of its training changed."""
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **fields))


def synthetic_batch(lengths: torch.Tensor, size: int) -> Batch:
    """Return a batch of noise with `lengths` (B,) feature frames of `size` values and as many tokens as speech."""
    torch.manual_seed(0)
    features = torch.randn(len(lengths), int(lengths.max()), size)
    token_lengths = (lengths * LETTERS_PER_FRAME).long() + 1
    tokens = torch.randint(EOS + 1, len(Vocabulary()), (len(lengths), int(token_lengths.max())))
    after_text = torch.arange(tokens.shape[1]) - (token_lengths[:, None] - 1)
    tokens = tokens.masked_fill(after_text == 0, EOS).masked_fill(after_text > 0, PAD)
    features = features.masked_fill((torch.arange(features.shape[1]) >= lengths[:, None])[..., None], 0.0)
    return Batch(features, lengths, tokens, token_lengths, torch.arange(len(lengths)))


def dtype_of(path: str) -> str:
    return "bfloat16" if "bf16" in path else "float32"


def shape_of(batch: Batch) -> str:
    B, T, F = batch.features.shape
    return f"B{B} T{T} F{F} U{batch.targets[0].shape[1]}"


def make_trainer(path: str, config: Config, weights: dict, device: torch.device) -> Trainer:
    """Return las_fast's trainer with the model of one path."""
    model_class, precision = PATHS[path]
    config = with_training(config, precision=precision)
    data = SimpleNamespace(frame_counts=frame_counts(4000))  # gives the number of steps per epoch
    trainer = Trainer(config, data, None, Path(), device, {})
    trainer.model.load_state_dict(weights)
    if model_class is not None:
        trainer.model = model_class(trainer.model).to(device)
        trainer.optimiser = make_optimiser(trainer.model, config)
    if path == "usual":
        for group in trainer.optimiser.param_groups:
            group["fused"] = None  # the default of AdamW, which cannot skip a step on the device
        trainer.reads_late = False
    trainer.averaged = copy.deepcopy(trainer.model)
    return trainer


def make_trainers(config: Config, paths: Iterable[str], device: str = "cpu") -> dict[str, Trainer]:
    torch.manual_seed(1)
    weights = checkpoint.build_model(config).state_dict()
    return {path: make_trainer(path, config, weights, torch.device(device)) for path in paths}
