"""Time calls on a device, profile them, and find the backends that run there."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from las_fast.ops import backends

CLOCK = 2e9  # Hz of the device, about
MIN_WAIT, MAX_WAIT = 1e-3, 20e-3  # seconds
FLUSH_BYTES = 2**28  # more than the L2 cache of any GPU
# Prefixes of the profiler's entries that are not kernels: copies, and spans of time that contain kernels.
NOT_KERNELS = ("Memcpy", "Memset", "Optimizer.", "ProfilerStep")


def synchronize(device: str) -> None:
    """Wait for all work on the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of_call(run: Callable[[], object], device: str) -> float:
    """Return the wall-clock time of a call, including its work on the device."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def median_seconds(
    run: Callable[[], object], device: str, *, rounds: int = 7, warmups: int = 2, max_seconds: float = 2.5
) -> float:
    """Return the median wall-clock time of `rounds` calls, or of fewer (at least one) once they took `max_seconds`."""
    for _ in range(warmups):
        run()
    times: list[float] = []
    while len(times) < rounds and sum(times) < max_seconds:
        times.append(seconds_of_call(run, device))
    return statistics.median(times)


class DeviceTimer:
    """Measures the median time of a call in microseconds, between two events on CUDA and with its inputs uncached."""

    def __init__(self, device: str, *, seconds: float = 0.4, min_calls: int = 5, max_calls: int = 100):
        self.device, self.seconds, self.min_calls, self.max_calls = device, seconds, min_calls, max_calls
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None
        self.wait = MIN_WAIT  # seconds that the device waits before a call

    def __call__(self, run: Callable[[], object]) -> float:
        for _ in range(2):
            synchronize(self.device)
            started = time.perf_counter()
            run()
            self.wait = min(max(MIN_WAIT, 2 * (time.perf_counter() - started)), MAX_WAIT)
        times: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(times) < self.min_calls or (time.perf_counter() < end and len(times) < self.max_calls):
            times.append(self.once(run))
        return statistics.median(times)

    def once(self, run: Callable[[], object]) -> float:
        if self.flush is None:
            return 1e6 * seconds_of_call(run, self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()  # evict the inputs from the cache: the lower bound assumes that they are read from memory
        # Meanwhile the host enqueues the call: launches are not measured, up to MAX_WAIT of them.
        torch.cuda._sleep(round(self.wait * CLOCK))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end)


def backends_for(op: str, device: str, dtype: torch.dtype | None = None) -> list[str]:
    """Return the backends of an op that run on the device and take tensors of `dtype`."""
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
    """Work of one call on a GPU. Launches and waits are counted from calls of the host."""

    kernels: int
    busy_ms: float  # sum of the kernels' times
    launches: int  # of single kernels
    graph_launches: int
    waits: int  # of the host for the device; two are made by the profiler and by profile()
    copies_to_host: int
    longest: list[tuple[str, int, float]]  # kernels by total time: name, count, milliseconds


def profile(run: Callable[[], object], device: str) -> Profile:
    """Profile one call; without CUDA, torch's own ops stand in for kernels, and nothing is launched."""
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU, kind.CUDA] if device == "cuda" else [kind.CPU]) as profiler:
        run()
        synchronize(device)
    events = profiler.key_averages()
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    timed = [(e.key, e.count, e.self_device_time_total / 1e3) for e in on_gpu if not e.key.startswith(NOT_KERNELS)]
    if device != "cuda":
        timed = [(e.key, e.count, e.self_cpu_time_total / 1e3) for e in on_host if e.key.startswith("aten::")]

    def calls(name_part: str) -> int:
        return sum(event.count for event in on_host if name_part in event.key)

    return Profile(
        kernels=sum(count for _, count, _ in timed),
        busy_ms=sum(ms for _, _, ms in timed),
        launches=calls("LaunchKernel"),
        graph_launches=calls("GraphLaunch"),
        waits=calls("Synchronize"),
        copies_to_host=sum(event.count for event in on_gpu if event.key.startswith("Memcpy DtoH")),
        longest=sorted(timed, key=lambda kernel: -kernel[2])[:12],
    )
