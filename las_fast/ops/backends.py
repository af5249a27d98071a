"""Which backends each op has, which of them work here, and which one "auto" takes."""

from __future__ import annotations

import importlib
import warnings

import torch

BACKENDS = ("reference", "cpp", "triton")
IMPLEMENTED = {
    "masked_attention": ("reference",),
    "beam_topk": ("reference",),
    "beam_backtrack": ("reference", "cpp"),
}
DEVICES = {"cpp": "cpu", "triton": "cuda"}  # the only device type that a backend takes
FASTEST_FIRST = ("triton", "cpp")
BUILD = "Run: python setup.py build_ext"

_said: set[str] = set()


def _load_extension() -> str | None:
    """Load las_fast._C, which registers the C++ ops with torch; return why it cannot be had, or None."""
    try:
        importlib.import_module("las_fast._C")
    except ModuleNotFoundError:
        return f"the extension is not built. {BUILD}"
    except ImportError as error:  # built against another torch, or a broken file
        return f"the extension does not load ({str(error).splitlines()[0]}). {BUILD} --force"
    return None


EXTENSION_PROBLEM = _load_extension()


def unavailable(op: str, backend: str) -> str | None:
    """Return why `op` has no `backend` on this machine, and what to do about it; None where it has."""
    if backend not in IMPLEMENTED[op]:
        language = {"cpp": "C++", "triton": "Triton"}[backend]
        return f"this version has no {language} {op}. Use backend='auto'"
    if backend == "cpp":
        return EXTENSION_PROBLEM
    if backend == "triton" and not torch.cuda.is_available():
        return "there is no CUDA device here. Use backend='auto'"
    return None


def choose(op: str, backend: str, device: torch.device) -> str:
    """Return the backend to call for `op` on tensors of `device`.

    "auto" is triton on CUDA and cpp on a CPU where they are available, else the reference. What could be faster after
    building the extension is said once.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend is not available, or does not take tensors of that device.
    """
    if backend == "reference":
        return backend
    if backend == "auto":
        if device.type == "cpu" and "cpp" in IMPLEMENTED[op] and EXTENSION_PROBLEM:
            _say_once(EXTENSION_PROBLEM)
        return automatic(op, device.type)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {backend!r}")
    if reason := unavailable(op, backend):
        raise RuntimeError(f'{op}: backend "{backend}" is not available: {reason}')
    if device.type != DEVICES[backend]:
        raise RuntimeError(f'{op}: backend "{backend}" takes {DEVICES[backend]} tensors; got {device.type} tensors')
    return backend


def automatic(op: str, device_type: str) -> str:
    """Return what "auto" takes for `op` on that type of device."""
    for backend in FASTEST_FIRST:
        if DEVICES.get(backend) == device_type and unavailable(op, backend) is None:
            return backend
    return "reference"


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        warnings.warn(f"las_fast runs on its slower reference paths: {reason}", RuntimeWarning, stacklevel=4)
