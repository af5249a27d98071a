"""Levenshtein distance in plain Python, for a machine without the package of that name."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence


def distance(a: Sequence, b: Sequence) -> int:
    """Return the minimum number of insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def provide() -> None:
    """Provide `distance` to las_fast in this process as the package Levenshtein, if that is missing."""
    try:
        import Levenshtein  # noqa: F401 (is it installed?)
    except ImportError:
        module = types.ModuleType("Levenshtein")
        module.distance = distance  # type: ignore[attr-defined]
        sys.modules["Levenshtein"] = module
