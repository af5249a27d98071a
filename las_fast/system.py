"""The machine that the program runs on: cores, devices, and how the C library keeps memory."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING

from las_fast.errors import InputError, lacks_memory

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
LARGE, LARGE_OF_BATCHES = 2**25, 2**20  # bytes of blocks that have pages of their own, in training and in decoding


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(name: str, option: str = "--device ") -> torch.device:
    """Return the torch.device of that name; "auto" is CUDA where there is one. option stands before the name in errors.

    Raises:
        InputError: there is no such device here, or it cannot be used.
    """
    import torch

    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    plain = name.strip().lower()
    if plain == "auto":
        plain = "cuda" if "cuda" in there else "cpu"
    if plain not in there:
        raise InputError(f"{option}{name}: there is no such device here; this machine has {', '.join(there)}")
    try:
        torch.zeros(1, device=plain).item()
    except RuntimeError as error:
        reason = "its memory is full" if lacks_memory(error) else str(error).strip().partition("\n")[0]
        raise InputError(f"{option}{plain} cannot be used ({reason}); wait for it, or give {option}cpu") from None
    return torch.device(plain)


def tune_memory() -> None:
    """Have PyTorch take large blocks in huge pages and glibc keep small ones for the next call, on Linux.

    A training step frees and takes back more than a GiB. Each page of 4 KiB that comes back from the system costs a
    fault, together an eighth of the step. Must be called before the first tensor is made.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch offers no other way to say so
    _mallopt(M_MMAP_THRESHOLD, LARGE)
    _mallopt(M_TRIM_THRESHOLD, -1)  # never


def give_large_blocks_back() -> None:
    """Have glibc give the large blocks of a batch back when they are freed, as decoding wants it.

    Each batch has other sizes, and between its blocks lie hypotheses that stay. Blocks kept for the next call would fit
    it ever worse: after 1600 utterances of a model of 9.4 M parameters the process was half as large again. New pages
    cost up to 4% of the time.
    """
    _mallopt(M_MMAP_THRESHOLD, LARGE_OF_BATCHES)


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(parameter, value)
