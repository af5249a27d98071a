"""Untrained checkpoints and tiny trainers, for tests that do not depend on accuracy."""

from __future__ import annotations

from pathlib import Path

import torch
import torch._dynamo  # the first optimiser imports it, and the log TensorBoard: import both before a test waits
import torch.utils.tensorboard  # noqa: F401

from las_fast import train
from las_fast.checkpoint import build_model, save_model
from las_fast.config import (
    Config,
    DataConfig,
    FeatureConfig,
    ListenerConfig,
    ModelConfig,
    SpellerConfig,
    TrainingConfig,
)
from las_fast.data.layouts import open_corpus
from las_fast.training.parts import Parts
from las_fast.training.step import Progress
from las_fast.training.trainer import Trainer

MODEL = ModelConfig(
    ListenerConfig(conv_channels=(8,), conv_kernels=(3,), conv_strides=(1,), lstm_size=8, pyramids=1),
    SpellerConfig(key_size=8, value_size=8, embedding_size=8, lstm_sizes=(12, 8)),
)


def make_checkpoint(
    folder: Path, size: int = 28, *, info: dict | None = None, sections: dict | None = None, **features
) -> Path:
    """Write folder/untrained-SIZE.safetensors with weights from a fixed seed. sections: fields of Config."""
    kind = "mfcc" if size < 80 else "logmel"
    features = FeatureConfig(kind=kind, size=size, **features)
    config = Config(**{"features": features, "model": MODEL} | (sections or {}))
    torch.manual_seed(1)
    path = folder / f"untrained-{size}.safetensors"
    save_model(path, build_model(config).state_dict(), config, None, info or {})
    return path


def small(**sections) -> Config:
    """Settings of a tiny model for an F23 archive. sections: fields of Config."""
    plain = {
        "features": FeatureConfig(size=28),
        "data": DataConfig(train=("train-clean-100",), dev="dev-clean", utterances_per_batch=2, workers=0),
        "model": MODEL,
        "training": TrainingConfig(epochs=2, warmup_steps=0, precision="fp32", pictures=0),
    }
    return Config(**(plain | sections))


def make_trainer(archive: Path, out: Path, config: Config) -> Trainer:
    out.mkdir(parents=True, exist_ok=True)
    data = train.load_data(config, open_corpus(archive))
    return Trainer(config, *data, out, torch.device("cpu"), {"kind": "features", "name": "HW4P2 F23"})


def bare_trainer(**fields) -> Trainer:
    """A trainer with only these fields."""
    instance = Trainer.__new__(Trainer)
    vars(instance).update(progress=Progress(), parts=Parts(20_000), config=small(), **fields)
    return instance
