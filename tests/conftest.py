"""What tests share: one thread, and the data beside the repository where it is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared"

torch.set_num_threads(1)


@pytest.fixture
def shared() -> Path:
    """The folder of shared recordings; skips where a checkout has none."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent")
    return SHARED
