"""Triton kernels and their launchers: a file per op, parts of the longest beside it, and what they share in tiles.py.

In a checkout this package points to the top-level folder kernels/; an installed package contains the files.
"""

from pathlib import Path


def folders(file: Path) -> list[str]:
    """Return the folder kernels/ of the checkout that contains `file`, or [] if there is none."""
    kernels = file.resolve().parents[2] / "kernels"
    return [str(kernels)] if kernels.is_dir() else []


__path__ += folders(Path(__file__))
