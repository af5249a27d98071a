"""Untrained checkpoints for tests of everything around the recognition."""

from __future__ import annotations

from pathlib import Path

import torch

from las_fast.checkpoint import build_model, save_model
from las_fast.config import Config, FeatureConfig, ListenerConfig, ModelConfig, SpellerConfig

MODEL = ModelConfig(
    ListenerConfig(conv_channels=(8,), conv_kernels=(3,), conv_strides=(1,), lstm_size=8, pyramids=1),
    SpellerConfig(key_size=8, value_size=8, embedding_size=8, lstm_sizes=(12, 8)),
)


def make_checkpoint(
    folder: Path, size: int = 28, *, info: dict | None = None, sections: dict | None = None, **features
) -> Path:
    """Write folder/untrained-SIZE.safetensors, of random but repeatable weights; sections: of the Config."""
    kind = "mfcc" if size < 80 else "logmel"
    features = FeatureConfig(kind=kind, size=size, **features)
    config = Config(**{"features": features, "model": MODEL} | (sections or {}))
    torch.manual_seed(1)
    path = folder / f"untrained-{size}.safetensors"
    save_model(path, build_model(config).state_dict(), config, None, info or {})
    return path
