"""Which backends each op has, which of them work here, and which one "auto" takes.

A fast backend of an op is one torch op, las_fast::<op>_cpp or las_fast::<op>_triton. Both have one schema, which the
op's module gives to `register`; the C++ extension only brings kernels. The module chooses between them in plain Python,
so that torch.compile sees one call and two backends can be compared.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Callable

import torch

BACKENDS = ("reference", "fused", "cpp", "triton")  # fused: PyTorch's own calls again, arranged for speed
WIDE, HALF = (torch.float32,), (torch.float16, torch.bfloat16)
IMPLEMENTED: dict[str, dict[str, tuple[torch.dtype, ...] | None]] = {  # the float types each takes; None: any
    "bilstm": {"reference": None, "cpp": (torch.float32, torch.bfloat16)},  # on CUDA the listener calls cuDNN
    "ctc_loss": {"reference": None, "cpp": WIDE},  # torch has one for CUDA
    "masked_attention": {"reference": None, "cpp": (torch.float32, torch.bfloat16), "triton": WIDE + HALF},
    "beam_topk": {"reference": None, "cpp": WIDE + HALF, "triton": WIDE + HALF},
    "beam_gather": {"reference": None, "cpp": None, "triton": None},
    "ctc_prefix": {"reference": None, "cpp": WIDE, "triton": WIDE},
    "beam_backtrack": {"reference": None, "cpp": None, "triton": None},
    "speller_unroll": {"reference": None, "fused": None, "cpp": WIDE},
    "speller_search": {
        "reference": None,
        "cpp": WIDE,
    },  # on CUDA las_fast.search.beam goes step by step with the ops above
}
COMPANIONS = ("bilstm_backward", "ctc_places", "masked_attention_backward", "speller_pack", "speller_unroll_backward")
DEVICES = {"cpp": "cpu", "triton": "cuda"}  # the only device type that a backend takes
FASTEST_FIRST = ("triton", "cpp")
BUILD = "Run: python setup.py build_ext"

_said: set[str] = set()


def _load_extension() -> str | None:
    """Load las_fast._C, which registers the C++ kernels with torch; return why it cannot be used, or None."""
    try:
        importlib.import_module("las_fast._C")
    except ModuleNotFoundError:
        return f"the extension is not built. {BUILD}"
    except ImportError as error:  # built against another torch, or a broken file
        return f"the extension does not load ({str(error).splitlines()[0]}). {BUILD} --force"
    lacks = [op for op in (*IMPLEMENTED, *COMPANIONS) if not torch._C._dispatch_has_kernel(f"las_fast::{op}_cpp")]
    return _other_version(f"it lacks {', '.join(lacks)}") if lacks else None


def _other_version(difference: str) -> str:
    return f"the extension is from another version ({difference}). {BUILD} --force"


EXTENSION_PROBLEM = _load_extension()


def unavailable(op: str, backend: str) -> str | None:
    """Return why `op` has no `backend` on this machine, and what to do about it; None where it has."""
    if backend not in IMPLEMENTED[op]:
        language = {"fused": "fused", "cpp": "C++", "triton": "Triton"}[backend]
        return f"this version has no {language} {op}. Use backend='auto'"
    if backend == "cpp":
        return EXTENSION_PROBLEM
    if backend == "triton":
        return _triton_problem()
    return None


def _triton_problem() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device here. Use backend='auto'"
    if torch.version.hip:
        return "the Triton kernels are tuned for NVIDIA's GPUs alone. Use backend='auto'"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed. Run: pip install triton"
    return None


def choose(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    excess: dict[str, str | None] | None = None,
) -> str:
    """Return the backend to call for `op` on tensors of `device` and, where the op is particular, of `dtype`.

    "auto" is triton on CUDA and cpp on a CPU where they are available and take that call, else fused where the op has
    that, else the reference. What could be faster after building the extension, or installing Triton, is said once.

    excess: for a backend, what of this call's sizes it does not take; None or no entry where it takes them.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend is not available, or does not take tensors of that device or type.
    """
    if backend == "reference":
        return backend
    if backend == "auto":
        native = {"cpu": "cpp", "cuda": "triton"}.get(device.type)
        if native in IMPLEMENTED[op] and (reason := unavailable(op, native)):
            _say_once(reason)
        chosen = automatic(op, device.type, dtype)
        return _portable(op) if excess and excess.get(chosen) else chosen
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {backend!r}")
    if reason := unavailable(op, backend):
        raise RuntimeError(f'{op}: backend "{backend}" is not available: {reason}')
    if device.type != DEVICES.get(backend, device.type):
        raise RuntimeError(f'{op}: backend "{backend}" takes {DEVICES[backend]} tensors; got {device.type} tensors')
    if not takes(op, backend, dtype):
        types = " or ".join(str(x) for x in IMPLEMENTED[op][backend] or ())
        raise RuntimeError(f"{op}: backend \"{backend}\" takes {types}; got {dtype}. Use backend='auto'")
    if excess and (reason := excess.get(backend)):
        raise RuntimeError(f"{op}: backend \"{backend}\" {reason}. Use backend='auto'")
    return backend


def automatic(op: str, device_type: str, dtype: torch.dtype | None = None) -> str:
    """Return what "auto" takes for `op` on that type of device."""
    for backend in FASTEST_FIRST:
        if DEVICES.get(backend) == device_type and unavailable(op, backend) is None and takes(op, backend, dtype):
            return backend
    return _portable(op)


def _portable(op: str) -> str:
    """Return the best of what every device has."""
    return "fused" if "fused" in IMPLEMENTED[op] else "reference"


def takes(op: str, backend: str, dtype: torch.dtype | None) -> bool:
    """Say whether that backend of `op` takes tensors of that float type; None is any."""
    types = IMPLEMENTED[op][backend]
    return types is None or dtype is None or dtype in types


def detached(x: torch.Tensor) -> torch.Tensor:
    """Return x without its gradient, for ops that have none: what the fast backends give, the reference gives too."""
    return x.detach() if x.requires_grad else x


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        warnings.warn(f"las_fast runs on its slower reference paths: {reason}", RuntimeWarning, stacklevel=4)


def register(name: str, schema: str, fake: Callable, *, module: str | None = None) -> list[str]:
    """Define las_fast::<name>_cpp and, if the op has it, las_fast::<name>_triton; return the names of those that exist.

    Args:
        name:   of the op, of its launcher in las_fast/kernels/<module>.py and of its kernel in csrc/<module>.cpp.
        schema: arguments and results of both.
        fake:   returns empty results of the right shapes and dtypes for the same arguments.
        module: file of the op; default `name`.
    """

    def launch(*arguments):
        launcher = getattr(importlib.import_module(f"las_fast.kernels.{module or name}"), name)
        device = _device_of(arguments)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return launcher(*arguments)

    names = []
    if "triton" in IMPLEMENTED[module or name]:
        torch.library.define(f"las_fast::{name}_triton", schema)
        # For every device: `choose` keeps all but CUDA tensors away, and proofs without a GPU run it on the CPU.
        torch.library.impl(f"las_fast::{name}_triton", "CompositeExplicitAutograd", launch)
        names.append(f"las_fast::{name}_triton")
    if _define_cpp(name, schema):
        names.append(f"las_fast::{name}_cpp")
    for full in names:
        torch.library.register_fake(full, fake)
    return names


def _define_cpp(name: str, schema: str) -> bool:
    """Define the op whose kernel the extension has registered; return whether the extension can be used."""
    global EXTENSION_PROBLEM
    if EXTENSION_PROBLEM is None:
        try:
            torch.library.define(f"las_fast::{name}_cpp", schema)
        except RuntimeError:  # the kernel takes other arguments, or the extension has defined a schema itself
            EXTENSION_PROBLEM = _other_version(f"it has another {name}")
    return EXTENSION_PROBLEM is None


def _device_of(arguments: tuple) -> torch.device:
    for x in arguments:
        if isinstance(x, list) and x:
            x = x[0]
        if isinstance(x, torch.Tensor):
            return x.device
    raise AssertionError("an op takes at least one tensor")
