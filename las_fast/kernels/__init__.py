"""Triton kernels, one file an op, in the top-level folder kernels/; a launcher allocates its outputs and launches.

In a checkout this package only points to that folder; an installed package holds the files themselves.
"""

from pathlib import Path


def folders(file: Path) -> list[str]:
    """Return the folder of kernels in the checkout that this package's file is in; [] where there is no such folder."""
    kernels = file.resolve().parents[2] / "kernels"
    return [str(kernels)] if kernels.is_dir() else []


__path__ += folders(Path(__file__))
