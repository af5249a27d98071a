"""Masks of padded batches."""

from __future__ import annotations

import torch
from torch import Tensor


def padding_mask(lengths: Tensor, frames: int) -> Tensor:
    """Return (B, frames) bool, True from each length on; lengths is (B,) int64."""
    return torch.arange(frames, device=lengths.device) >= lengths[:, None]
