"""The machine: CPU cores, names, compiler, torch devices, and settings of the memory allocator."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from las_fast.errors import InputError, is_out_of_memory

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
TRAINING_MMAP_BYTES, DECODING_MMAP_BYTES = 2**25, 2**20  # blocks of this size or more are unmapped when freed


OUT_OF_MEMORY = "perhaps out of memory"  # of a process that was killed


def cores() -> int:
    """Return the number of CPU cores that this process may use; a container's limit is rounded up."""
    available = allowed_cores()
    return min(available, math.ceil(cpu_quota() or available))


def allowed_cores() -> int:
    """Return the number of CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return how many cores a container may use on average; None if its cgroup sets no limit."""
    if (root / "cpu.max").is_file():  # cgroup v2
        quota, period = (root / "cpu.max").read_text().split()
    elif (root / "cpu" / "cpu.cfs_quota_us").is_file():  # cgroup v1
        quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    else:
        return None
    return None if quota.strip() in ("max", "-1") else int(quota) / int(period)


def exit_reason(code: int) -> str:
    """Return how a process ended, from its exit status or, as in subprocess, minus the number of a signal."""
    if code >= 0:
        return f"exit status {code}"
    name = next((s.name for s in signal.Signals if s == -code), f"signal {-code}")
    return f"{name}, {OUT_OF_MEMORY}" if name == "SIGKILL" else name


def compiler() -> str:
    """Return the name of the C++ compiler that builds the extension."""
    return (os.environ.get("CXX", "").split() or ["c++"])[0]


def compiler_version() -> str:
    """Return the first line that the C++ compiler's --version prints.

    Raises:
        OSError, subprocess.SubprocessError: the compiler does not run.
    """
    command = [compiler(), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=True)
    return (done.stdout or done.stderr).strip().partition("\n")[0]


def is_clang() -> bool:
    """Return whether the C++ compiler is Clang."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return "clang" in compiler_version().lower()
    return False


def is_installed(package: str) -> bool:
    """Return whether a package is installed; a folder of its name, which is a namespace package, is not."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def missing_for_build() -> tuple[str, str] | None:
    """Return what is missing to compile the C++ extension, and what to do; None if nothing is."""
    if sys.platform != "linux":
        return f"this is {sys.platform} and not Linux", "use Linux"
    if shutil.which(compiler()) is None:
        return f"no C++ compiler ({compiler()})", "install g++"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return f"Python's headers are missing ({header})", "install python3-dev (python3-devel)"
    return None


def missing_for_triton() -> tuple[str, str] | None:
    """Return what is missing to launch Triton kernels, as triton.runtime.build looks for it, and how to install it.

    The result is None if nothing is missing.
    """
    if "CC" not in os.environ and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "there is no C compiler (gcc or clang)", "Install gcc"
    folders = [sysconfig.get_path("include"), sysconfig.get_path("include", "posix_prefix")]
    for name in ("CPATH", "C_INCLUDE_PATH"):
        folders += os.environ.get(name, "").split(":")
    if not any(Path(folder, "Python.h").is_file() for folder in folders):
        return f"Python's headers are missing ({folders[0]}/Python.h)", "Install python3-dev (python3-devel)"
    return None


def machine_name() -> str:
    """Return the processor's name, with its CPU family and model if the name is too short to identify it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    if len(name.split()) < 3 and "cpu family" in facts:  # a virtual machine may hide which EPYC it is
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name


def current_commit(root: Path) -> str:
    """Return the abbreviated commit of a clone, followed by + if tracked files differ from it.

    It is "unknown" without git, and if `root` is not the top folder of a clone, as in an installed package.
    """
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    except OSError:  # there is no git here
        return "unknown"
    return done.stdout.strip() or "unknown"


def choose_device(name: str, option: str = "--device ") -> torch.device:
    """Return the torch.device called `name` after a test allocation on it.

    Args:
        name:   "cpu", "cuda", "cuda:1", "mps", or "auto": CUDA if available, else the CPU.
        option: text before the name in errors.

    Raises:
        InputError: this machine has no such device, or the device cannot be used.
    """
    import torch

    available = ["cpu"]
    if torch.cuda.is_available():
        available += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        available.append("mps")
    device = name.strip().lower()
    if device == "auto":
        device = "cuda" if "cuda" in available else "cpu"
    if device not in available:
        raise InputError(f"{option}{name}: there is no such device here; this machine has {', '.join(available)}")
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        reason = "its memory is full" if is_out_of_memory(error) else str(error).strip().partition("\n")[0]
        raise InputError(f"{option}{device} cannot be used ({reason}); wait for it, or give {option}cpu") from None
    return torch.device(device)


def tune_memory() -> None:
    """On Linux, make PyTorch use huge pages for large blocks, and make glibc keep freed blocks below 32 MiB.

    A training step frees and allocates more than 1 GiB. If that memory went back to the system, page faults would take
    an eighth of the step. oneDNN keeps its kernels for four times as many shapes as by default: kernels that come and
    go fragment the heap, until malloc takes a tenth of the step. Call this before the first tensor is allocated.
    """
    # PyTorch has no other switches for these.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
    _mallopt(M_MMAP_THRESHOLD, TRAINING_MMAP_BYTES)
    _mallopt(M_TRIM_THRESHOLD, -1)  # never


def return_freed_memory() -> None:
    """Make glibc return freed blocks of 1 MiB or more to the system; for decoding.

    Block sizes change from batch to batch, and hypotheses remain allocated between the blocks. Without this call the
    heap fragments: after 1600 utterances with a model of 9.4 M parameters, the process was 1.5 times as large. New
    pages cost up to 4% of the time.
    """
    _mallopt(M_MMAP_THRESHOLD, DECODING_MMAP_BYTES)


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(parameter, value)


@functools.cache
def stream_for(purpose: str, device: str | torch.device) -> torch.cuda.Stream:
    """Return the CUDA stream of a device for a purpose, always the same.

    torch hands out 32 streams per device in turn, so a stream made for every use would sooner or later be one that is
    in use, such as by the capture of a graph.
    """
    import torch

    return torch.cuda.Stream(device)
