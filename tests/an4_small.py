"""A small trained model and the development set of AN4."""

from __future__ import annotations

from pathlib import Path

from las_fast.checkpoint import load_model
from las_fast.data.dataset import load_dataset
from las_fast.data.layouts import open_corpus

CHECKPOINT = Path(__file__).with_name("an4-small.safetensors")


def load_an4_small(archive: Path):
    """Return the loaded model, and AN4's development set of 104 utterances from the features in `archive`."""
    loaded = load_model(CHECKPOINT)
    options = {"features": loaded.config.features, "data": loaded.config.data, "statistics": None, "need_text": False}
    return loaded, load_dataset(open_corpus(archive), ("dev",), **options)
