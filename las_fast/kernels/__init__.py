"""Triton kernels, one file an op, in the top-level folder kernels/; a launcher allocates its outputs and launches.

In a checkout this package only points to that folder; an installed package holds the files themselves.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "kernels"
if _checkout.is_dir():
    __path__.append(str(_checkout))
