"""Time calls on a device, profile them, and find the backends that run there."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from las_fast.ops import backends

FLUSH_BYTES = 2**28  # more than the L2 cache of any GPU
# Beginnings of what the profiler lists beside kernels: copies, and spans of time that contain kernels.
NO_KERNELS = ("Memcpy", "Memset", "Optimizer.", "ProfilerStep")


def synchronize(device: str) -> None:
    """Wait for all work on the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of_call(run: Callable[[], object], device: str) -> float:
    """Return the wall-clock time of a call, until the device has done its work."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def median_seconds(
    run: Callable[[], object], device: str, *, rounds: int = 7, warmups: int = 2, at_most: float = 2.5
) -> float:
    """Return the median wall-clock time of `rounds` calls, or of as many as take `at_most` seconds, at least one."""
    for _ in range(warmups):
        run()
    times: list[float] = []
    while len(times) < rounds and sum(times) < at_most:
        times.append(seconds_of_call(run, device))
    return statistics.median(times)


class DeviceTimer:
    """Median time of a call in microseconds: by the device's own clock, with its inputs out of the cache."""

    def __init__(self, device: str, *, seconds: float = 0.4, least: int = 5, most: int = 100):
        self.device, self.seconds, self.least, self.most = device, seconds, least, most
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None

    def __call__(self, run: Callable[[], object]) -> float:
        for _ in range(2):
            run()
        times: list[float] = []
        while len(times) < self.least or (sum(times) < self.seconds * 1e6 and len(times) < self.most):
            times.append(self.once(run))
        return statistics.median(times)

    def once(self, run: Callable[[], object]) -> float:
        if self.flush is None:
            return 1e6 * seconds_of_call(run, self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()  # evict the inputs from the cache: the lower bound is that of memory
        begin.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end)


def backends_for(op: str, device: str, dtype: torch.dtype | None = None) -> list[str]:
    """Return the backends of an op that take tensors of `dtype` on the device; new ones appear by themselves."""
    return [
        backend
        for backend in backends.IMPLEMENTED[op]
        if backends.unavailable(op, backend) is None
        and backends.DEVICES.get(backend, device) == device
        and backends.supports_dtype(op, backend, dtype)
    ]


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 LSTMs and convolutions in float32 inside the block; cuDNN's default is tf32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# ------------------------------------------------------------------------------------------------------------- profile


@dataclass(frozen=True)
class Profile:
    """What a call did on a GPU. Graph launches, waits and copies are counted by the host's calls."""

    kernels: int
    busy_ms: float  # sum of the kernels' times
    launches: int  # of single kernels
    graph_launches: int
    waits: int  # for the device; two of them are the profiler's and ours
    copies_to_host: int
    longest: list[tuple[str, int, float]]  # kernels by total time: name, count, milliseconds


def profile(run: Callable[[], object], device: str) -> Profile:
    """Profile one call; without CUDA, torch's own ops stand in for kernels, and nothing is launched."""
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU, kind.CUDA] if device == "cuda" else [kind.CPU]) as profiler:
        run()
        synchronize(device)
    events = profiler.key_averages()
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    there = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    timed = [(e.key, e.count, e.self_device_time_total / 1e3) for e in there if not e.key.startswith(NO_KERNELS)]
    if device != "cuda":
        timed = [(e.key, e.count, e.self_cpu_time_total / 1e3) for e in host if e.key.startswith("aten::")]

    def calls(part: str) -> int:
        return sum(event.count for event in host if part in event.key)

    return Profile(
        kernels=sum(count for _, count, _ in timed),
        busy_ms=sum(ms for _, _, ms in timed),
        launches=calls("LaunchKernel"),
        graph_launches=calls("GraphLaunch"),
        waits=calls("Synchronize"),
        copies_to_host=sum(event.count for event in there if event.key.startswith("Memcpy DtoH")),
        longest=sorted(timed, key=lambda kernel: -kernel[2])[:12],
    )
