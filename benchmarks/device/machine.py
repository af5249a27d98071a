"""Describe the machine, and measure its limits: memory bandwidth, throughput of matmuls, cost of a launch."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import time

import numpy
import torch

from benchmarks.device.parts import Options
from benchmarks.device.record import Record, require_cuda
from benchmarks.device.timing import DeviceTimer, synchronize
from las_fast.ops import backends
from las_fast.system import cores

QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"
CHAIN = 1000  # dependent kernels in the graph that is timed


def run(options: Options, record: Record) -> None:
    describe(options.device, record)
    timer = DeviceTimer(options.device)
    with record.attempt("copy of memory"):
        record.row("copy of memory", bandwidth(timer, options.device, 2**16 if options.quick else 2**28) / 1e3, "GB/s")
    size = 128 if options.quick else 8192
    for name, dtype, precision in (
        ("float32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("float16", torch.float16, "highest"),
        ("bfloat16", torch.bfloat16, "highest"),
    ):
        labels = {"shape": f"{size}^3", "dtype": name}
        with record.attempt("matmul", **labels):
            record.row("matmul", matmul_tflops(timer, options.device, size, dtype, precision), "TFLOP/s", **labels)
    with record.attempt("launch of a small op"):
        record.row("launch of a small op", launch_us(options.device), "us")
    with record.attempt("dependent kernel in a CUDA graph"):
        record.row("dependent kernel in a CUDA graph", graphed_us(options.device), "us")


def describe(device: str, record: Record) -> None:
    """Record the GPU, the versions, whether the C++ extension is built, and the backend of each op."""
    with record.attempt("nvidia-smi"):
        require_cuda(device)
        record.row("nvidia-smi", note=graphics_card())
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    with contextlib.suppress(ImportError):
        import triton

        versions["triton"] = triton.__version__
    if device == "cuda":
        versions |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    record.row("versions", note=", ".join(f"{name} {version}" for name, version in versions.items()))
    record.row("CPU cores", cores())
    record.row("C++ extension", note=backends.EXTENSION_PROBLEM or "built")
    for op in backends.IMPLEMENTED:
        chosen = backends.auto_backend(op, device)
        record.row("backend of", path=f"{op} {chosen}")


def graphics_card() -> str:
    """Return nvidia-smi's description of the GPU, or why there is none."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi failed ({error})"
    return (done.stdout or done.stderr).strip()


def bandwidth(timer: DeviceTimer, device: str, size: int = 2**28) -> float:
    """Return the bytes per microsecond that a copy of `size` float32 values reads and writes."""
    source = torch.zeros(size, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source))


def matmul_tflops(timer: DeviceTimer, device: str, size: int, dtype: torch.dtype, precision: str) -> float:
    """Return the throughput of torch.mm on size x size matrices in TFLOP/s."""
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return 2 * size**3 / timer(lambda: torch.mm(a, b, out=out)) / 1e6
    finally:
        torch.set_float32_matmul_precision(before)


def launch_us(device: str, count: int = 2000) -> float:
    """Return the microseconds per op on one value, when many are launched one after another."""
    x = torch.ones(1, device=device)
    out = torch.empty_like(x)

    def launches() -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(count):
            torch.neg(x, out=out)
        synchronize(device)
        return time.perf_counter() - started

    return 1e6 * min(launches() for _ in range(3)) / count


def graphed_us(device: str) -> float:
    """Return the microseconds per kernel of a CUDA graph in which each kernel depends on the previous one."""
    require_cuda(device)
    x = torch.ones(1, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x.neg_()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CHAIN):
            x.neg_()
    return DeviceTimer(device)(graph.replay) / CHAIN
