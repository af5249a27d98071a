"""The mask of a padded batch, shared by the ops and the model."""

from __future__ import annotations

import torch
from torch import Tensor


def padding_mask(lengths: Tensor, size: int) -> Tensor:
    """Return (B, size) bool, True at padding: from lengths[b] on in row b. `lengths` is (B,) int64."""
    return torch.arange(size, device=lengths.device) >= lengths[:, None]
