"""Comparison of results that may differ by rounding errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest


def assert_equal_up_to_rounding(ours: Any, theirs: Any) -> None:
    """Compare dataclasses, sequences and dicts whose floats may differ by 1e-4; all else must be equal.

    oneDNN's float32 convolutions of short utterances depend on the batch, on some processors.
    """
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        names = [field.name for field in dataclasses.fields(ours) if field.compare]
        ours, theirs = ({name: getattr(x, name) for name in names} for x in (ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(ours, (list, tuple)) and type(ours) is type(theirs):
        for mine, other in zip(ours, theirs, strict=True):
            assert_equal_up_to_rounding(mine, other)
    elif isinstance(ours, float) and isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-4, nan_ok=True)
    else:
        assert ours == theirs
