"""Which backends each op has, which of them are available here, and which one backend="auto" chooses.

C++ and Triton backends are torch ops, las_fast::<op>_cpp and las_fast::<op>_triton, with the same schema. The op's
module passes the schema to `register`; the C++ extension only provides kernels. The op's Python function chooses the
backend, so that torch.compile sees a single call and backends can be compared.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from las_fast.errors import SlowPathWarning
from las_fast.system import is_installed, missing_for_triton

BACKENDS = ("reference", "fused", "cpp", "triton")  # fused: PyTorch calls arranged for speed
FLOAT32, HALF = (torch.float32,), (torch.float16, torch.bfloat16)
# {op: {backend: supported float dtypes; None: any}}
IMPLEMENTED: dict[str, dict[str, tuple[torch.dtype, ...] | None]] = {
    "bilstm": {"reference": None, "cpp": (torch.float32, torch.bfloat16)},  # on CUDA the listener uses cuDNN
    "masked_attention": {"reference": None, "cpp": (torch.float32, torch.bfloat16), "triton": FLOAT32 + HALF},
    "beam_topk": {"reference": None, "cpp": FLOAT32 + HALF, "triton": FLOAT32 + HALF},
    "beam_gather": {"reference": None, "cpp": None, "triton": None},
    "ctc_prefix": {"reference": None, "cpp": FLOAT32, "triton": FLOAT32},
    "ngram_scores": {"reference": None, "cpp": None, "triton": None},
    "ctc_loss": {"reference": None, "cpp": FLOAT32, "triton": FLOAT32},
    "beam_backtrack": {"reference": None, "cpp": None, "triton": None},
    "speller_unroll": {"reference": None, "fused": None, "cpp": FLOAT32, "triton": FLOAT32},
    "speller_search": {"reference": None, "cpp": FLOAT32},  # on CUDA las_fast.search.beam calls the ops above per step
}
# C++ ops without an entry above: backward passes and helpers.
HELPER_OPS = (
    "bilstm_backward",
    "ctc_token_times",
    "masked_attention_backward",
    "speller_pack",
    "speller_unroll_backward",
)
MIN_CAPABILITY = (8, 0)  # of GPUs: older ones have less shared memory than the kernels' tiles need, and no bf16
DEVICES = {"cpp": "cpu", "triton": "cuda"}  # the device type that a backend requires
FASTEST_FIRST = ("triton", "cpp")
IN_CHECKOUT = (Path(__file__).resolve().parents[2] / "setup.py").is_file()
BUILD_ADVICE = (
    "Run: python setup.py build_ext"
    if IN_CHECKOUT
    else "Run: pip install --force-reinstall --no-deps SOURCE, which is a folder with las_fast's source code"
)
REBUILD_ADVICE = f"{BUILD_ADVICE} --force" if IN_CHECKOUT else BUILD_ADVICE

_warned: set[str] = set()


def _load_extension() -> str | None:
    """Load las_fast._C, which registers the C++ kernels with torch; return why it cannot be used, or None."""
    try:
        importlib.import_module("las_fast._C")
    except ModuleNotFoundError:
        return f"the extension is not built. {BUILD_ADVICE}"
    except ImportError as error:  # built against another torch, or a broken file
        return f"the extension does not load ({str(error).splitlines()[0]}). {REBUILD_ADVICE}"
    missing = [op for op in (*IMPLEMENTED, *HELPER_OPS) if not torch._C._dispatch_has_kernel(f"las_fast::{op}_cpp")]
    return _other_version(f"it lacks {', '.join(missing)}") if missing else None


def _other_version(difference: str) -> str:
    return f"the extension is from another version ({difference}). {REBUILD_ADVICE}"


EXTENSION_PROBLEM = _load_extension()


def unavailable(op: str, backend: str) -> str | None:
    """Return why `backend` of `op` is not available on this machine and what to do about it, or None."""
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
        return "the Triton kernels are for NVIDIA GPUs only. Use backend='auto'"
    return _unmet_by_triton()


# torch.compile calls it instead of tracing it. torch.compiler.assume_constant_result does the same, but imports
# torch._dynamo, which takes a second.
_triton_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache  # `choose` asks at each call
def _unmet_by_triton() -> str | None:
    """Return which need of Triton this machine does not meet, and what to do; None if it meets all."""
    if not is_installed("triton"):
        return "triton is not installed. Run: pip install triton"
    capabilities = {torch.cuda.get_device_capability(i): i for i in range(torch.cuda.device_count())}
    if capabilities and (best := max(capabilities)) < MIN_CAPABILITY:
        needed, present = (f"{major}.{minor}" for major, minor in (MIN_CAPABILITY, best))
        name = torch.cuda.get_device_name(capabilities[best])
        problem = f"the Triton kernels need a GPU of compute capability {needed} or higher, and {name} has {present}"
        return f"{problem}. Use backend='auto'"
    if (missing := missing_for_triton()) and not _triton_has_compiled():
        return "Triton compiles code when a kernel is first launched, but {}. {}".format(*missing)
    return None


def _triton_has_compiled() -> bool:
    """Return whether the code that launches kernels is in Triton's cache, so that no compiler is needed."""
    try:
        from triton.runtime import driver

        return driver.active.utils is not None
    except Exception:  # of the compiler, of its absence, or of loading
        return False


def choose(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    unsupported: dict[str, str | None] | None = None,
) -> str:
    """Return the backend to call for `op` on tensors of `device` and `dtype` (None: the dtype does not matter).

    "auto" chooses triton on CUDA or cpp on a CPU if that is available and supports this call; otherwise fused if the op
    has it, otherwise the reference. If the extension or Triton is missing, it warns once.

    unsupported: {backend: why it does not support this call}; None or no entry if it does.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend is not available, or does not support this device, dtype or size.
    """
    if backend == "reference":
        return backend
    if backend == "auto":
        native = {"cpu": "cpp", "cuda": "triton"}.get(device.type)
        if native in IMPLEMENTED[op] and (reason := unavailable(op, native)):
            _warn_once(reason)
        chosen = auto_backend(op, device.type, dtype)
        return _portable(op) if unsupported and unsupported.get(chosen) else chosen
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {backend!r}")
    if reason := unavailable(op, backend):
        raise RuntimeError(f'{op}: backend "{backend}" is not available: {reason}')
    if device.type != DEVICES.get(backend, device.type):
        raise RuntimeError(f'{op}: backend "{backend}" takes {DEVICES[backend]} tensors; got {device.type} tensors')
    if not supports_dtype(op, backend, dtype):
        types = " or ".join(str(x) for x in IMPLEMENTED[op][backend] or ())
        raise RuntimeError(f"{op}: backend \"{backend}\" takes {types}; got {dtype}. Use backend='auto'")
    if unsupported and (reason := unsupported.get(backend)):
        raise RuntimeError(f"{op}: backend \"{backend}\" {reason}. Use backend='auto'")
    return backend


def auto_backend(op: str, device_type: str, dtype: torch.dtype | None = None) -> str:
    """Return the backend that "auto" stands for, for `op` on that type of device."""
    for backend in FASTEST_FIRST:
        usable = DEVICES.get(backend) == device_type and unavailable(op, backend) is None
        if usable and supports_dtype(op, backend, dtype):
            return backend
    return _portable(op)


def _portable(op: str) -> str:
    """Return the fastest backend of `op` that runs on every device."""
    return "fused" if "fused" in IMPLEMENTED[op] else "reference"


def supports_dtype(op: str, backend: str, dtype: torch.dtype | None) -> bool:
    """Return whether that backend of `op` supports tensors of `dtype`; always True for None."""
    types = IMPLEMENTED[op][backend]
    return types is None or dtype is None or dtype in types


def check_devices(
    like: str, device: torch.device, tensors: Mapping[str, torch.Tensor | Sequence[torch.Tensor] | None]
) -> None:
    """Raise ValueError unless all tensors, by name, are on the device of the argument `like`."""
    for name, value in tensors.items():
        for x in [value] if isinstance(value, torch.Tensor) else value or ():
            if x.device != device:
                raise ValueError(f"{name} must be on {device} like {like}; got {x.device}")


def detached(x: torch.Tensor) -> torch.Tensor:
    """Detach x, so that the reference matches the fast backends, which have no gradient."""
    return x.detach() if x.requires_grad else x


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        problem = reason.removesuffix(". Use backend='auto'")  # which is what runs
        warnings.warn(f"las_fast runs on slower PyTorch paths: {problem}", SlowPathWarning, stacklevel=4)


def register(
    name: str, schema: str, fake: Callable, *, module: str | None = None, triton_fake: Callable | None = None
) -> list[str]:
    """Define las_fast::<name>_cpp and, if the op has it, las_fast::<name>_triton; return the names defined.

    Args:
        name:   of the op, of its launcher in las_fast/kernels/<module>.py and of its kernel in csrc/<module>.cpp.
        schema: arguments and results of both.
        fake:   takes the same arguments and returns empty results of the right shapes and dtypes.
        module: file of the op; default `name`.
        triton_fake: the same for the Triton op, if its results have other shapes.
    """

    def launch(*arguments):
        launcher = getattr(importlib.import_module(f"las_fast.kernels.{module or name}"), name)
        device = _device_of(arguments)
        # Triton launches on the current device, which may not be that of the tensors. Under autocast, torch ops of the
        # launcher would be in another precision than those that are tested.
        with (
            torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext(),
            torch.autocast(device.type, enabled=False),
        ):
            return launcher(*arguments)

    names = []
    if "triton" in IMPLEMENTED[module or name]:
        torch.library.define(f"las_fast::{name}_triton", schema)
        # For every device: `choose` admits only CUDA tensors, and tests/gpu_proof interprets the kernels on a CPU.
        torch.library.impl(f"las_fast::{name}_triton", "CompositeExplicitAutograd", launch)
        names.append(f"las_fast::{name}_triton")
    if _define_cpp(name, schema):
        names.append(f"las_fast::{name}_cpp")
    for full_name in names:
        torch.library.register_fake(full_name, triton_fake if triton_fake and full_name.endswith("_triton") else fake)
    return names


def _define_cpp(name: str, schema: str) -> bool:
    """Define the op whose kernel the extension has registered; return whether the extension is usable."""
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
