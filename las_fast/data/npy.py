"""Read .npy files: the errors of damaged ones, and shapes from headers."""

from __future__ import annotations

import tokenize
import zipfile
from pathlib import Path

import numpy as np

PEEK = 8  # files per folder or manifest whose header is read to learn the frame size
# Errors of np.load on damaged files, whose headers can state any shape or be invalid Python
LOAD_ERRORS = (ValueError, TypeError, EOFError, OSError, MemoryError, OverflowError, SyntaxError, RecursionError,
               IndexError, NotImplementedError, tokenize.TokenError, zipfile.BadZipFile)  # fmt: skip


def load_problem(error: Exception) -> str:
    """Return why np.load failed and what to do, as a clause."""
    text = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        return "it does not exist; copy it again or remove its counterpart"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be read ({error.strerror}); check its name and permissions"
    if "pickle" in text.lower() or "Object arrays" in text:
        return "it contains pickled objects or is not a .npy file; save it as a plain array of numbers or strings"
    return f"it is truncated or damaged ({text or type(error).__name__}); copy it again"


def peek_shape(path: Path) -> tuple[int, ...] | None:
    """Return the shape of a .npy according to its header, or None if it is unreadable."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).shape
    except (*LOAD_ERRORS, AttributeError):
        return None
