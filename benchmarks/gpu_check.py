"""make gpu-check: on a GPU, every proof again, then the time of each op against plain PyTorch and the least possible.

Prints one table and appends its rows to benchmarks/results/gpu.csv. The least possible time is that of the bytes that
must move (each input and output once), at the bandwidth of a large copy measured on the same device just before.
"""

from __future__ import annotations

import datetime
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import record
from las_fast.config import DecodingConfig, ListenerConfig, ModelConfig, SpellerConfig
from las_fast.model.las import LAS
from las_fast.ops import (
    beam_backtrack,
    beam_gather,
    beam_topk,
    ctc_log_probabilities,
    ctc_prefix,
    ctc_start,
    masked_attention,
    padding_mask,
)
from las_fast.search.beam import beam_search

ROOT = Path(__file__).resolve().parents[1]
RESULTS = record.RESULTS / "gpu.csv"
COLUMNS = ("date", "commit", "device", "torch", "what", "shape", "dtype", "backend", "median_us", "least_us")
PROOFS = ("tests/gpu_proof/test_rung7_gpu.py", "tests/ops")
EOS = 2
CACHE = 2**28  # bytes, more than the second-level cache of any GPU
CAPTURED = "triton graph"  # the same kernels, replayed as CUDA graphs


@dataclass(frozen=True)
class Measurement:
    """One call to time on several backends."""

    what: str
    shape: str
    dtype: torch.dtype
    run: Callable[[str], object]  # of a backend's name
    bytes: int  # that must move; 0 where that says nothing
    others: tuple[str, ...] = ()  # what `run` takes besides the op's own backends


def attention(B: int, T: int, dtype: torch.dtype, device: str, K: int = 8, D: int = 256) -> Measurement:
    query, keys, values = (torch.randn(B, n, D, device=device).to(dtype) for n in (K, T, T))
    lengths = torch.full((B,), T, device=device)
    valid = ~padding_mask(lengths, T)[:, None]

    def run(backend: str) -> object:
        if backend == "torch sdpa":
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=valid)
        return masked_attention(query, keys, values, lengths, weights=False, backend=backend)

    moved = size(query, query, keys, values)
    return Measurement("masked_attention", f"B{B} K{K} T{T} D{D} E{D}", dtype, run, moved, ("torch sdpa",))


def pruning(B: int, K: int, V: int, device: str) -> Measurement:
    logits, scores = torch.randn(B, K, V, device=device), -torch.rand(B, K, device=device)
    finished, lengths = scores > -0.2, torch.full((B, K), 5, device=device)

    def run(backend: str) -> tuple:
        return beam_topk(logits, scores, finished, eos=EOS, lengths=lengths, backend=backend)

    return Measurement("beam_topk", f"B{B} K{K} V{V}", torch.float32, run, size(logits))


def gathering(B: int, K: int, device: str) -> Measurement:
    states = [torch.randn(B, K, n, device=device) for n in (512, 512, 256, 256, 256)]
    parents = torch.randint(0, K, (B, K), device=device)
    shape = f"B{B} K{K} N1792"
    return Measurement(
        "beam_gather", shape, torch.float32, lambda x: beam_gather(states, parents, backend=x), 2 * size(*states)
    )


def prefixes(B: int, K: int, T: int, V: int, device: str) -> Measurement:
    frames = ctc_log_probabilities(torch.randn(B, T, V, device=device), torch.full((B,), T, device=device))
    state, parents = ctc_start(frames, K, eos=EOS), torch.arange(K, device=device).repeat(B, 1)
    chosen = torch.randint(3, V, (B, K), device=device)

    def run(backend: str) -> tuple:
        return ctc_prefix(frames, state, torch.full_like(chosen, EOS), parents, chosen, eos=EOS, backend=backend)

    return Measurement("ctc_prefix", f"B{B} K{K} T{T} V{V}", torch.float32, run, size(frames) + 2 * size(*state))


def backtracking(L: int, B: int, K: int, device: str) -> Measurement:
    tokens, parents, frames = (torch.randint(0, K, (L, B, K), device=device) for _ in range(3))
    scores = torch.randn(L, B, K, device=device)

    def run(backend: str) -> tuple:
        return beam_backtrack(tokens, parents, scores, frames, eos=EOS, backend=backend)

    return Measurement(
        "beam_backtrack", f"L{L} B{B} K{K}", torch.int64, run, 2 * size(tokens, frames, scores) + size(parents)
    )


def searching(B: int, frames: int, device: str, sizes: ModelConfig) -> Measurement:
    """A search of 128 steps."""
    model = LAS(sizes, input_size=80, vocabulary_size=31).to(device).eval()
    with torch.inference_mode():
        lengths = torch.full((B,), frames, device=device)
        memory = model.listen(torch.randn(B, frames, 80, device=device), lengths)
    settings = DecodingConfig(beam=8, minimum_share=1.0, maximum_share=127 / frames, maximum_extra=0)

    def run(backend: str) -> object:
        name, captured = backend.removesuffix(" graph"), backend == CAPTURED
        return beam_search(model, memory, settings, backend=name, capture=captured)

    return Measurement("beam_search", f"B{B} K8 T{memory.keys.shape[1]} 128 steps", torch.float32, run, 0, (CAPTURED,))


def size(*tensors: Tensor) -> int:
    """Bytes of all tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def measurements(device: str) -> Iterator[Measurement]:
    """All that is timed, at the shapes of training and decoding."""
    for dtype in (torch.float16, torch.float32):
        for B in (1, 16, 64):
            for T in (100, 400, 1600):
                yield attention(B, T, dtype, device)
    for shape in ((16, 8, 31), (64, 8, 31), (16, 8, 5000), (16, 8, 32000)):
        yield pruning(*shape, device)
    yield gathering(16, 8, device)
    yield gathering(64, 8, device)
    yield prefixes(16, 8, 400, 31, device)
    yield prefixes(64, 8, 400, 31, device)
    yield backtracking(200, 64, 8, device)
    for B in (1, 16, 64):
        yield searching(B, 1600, device, ModelConfig(ListenerConfig(), SpellerConfig()))


def median(run: Callable[[], object], seconds: float = 1.0) -> float:
    """Return the median time of a call in microseconds, waiting for the device, over calls of `seconds` in all."""
    for _ in range(3):
        run()
    times: list[float] = []
    cold = torch.empty(CACHE, dtype=torch.uint8, device="cuda")
    while len(times) < 5 or (sum(times) < seconds * 1e6 and len(times) < 200):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cold.zero_()  # inputs of the last call must not lie in the cache: the least time is that of memory
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def bandwidth(time: Callable[[Callable[[], object]], float], device: str, numbers: int = 2**28) -> float:
    """Return the bytes that a large copy moves in a microsecond."""
    source = torch.empty(numbers, device=device)
    target = torch.empty_like(source)
    return 2 * size(source) / time(lambda: target.copy_(source))


def rows(
    of: Iterator[Measurement], backends: tuple[str, ...], time: Callable[[Callable[[], object]], float], speed: float
) -> Iterator[tuple]:
    """Yield (what, shape, dtype, backend, median us, least us) of each measurement and backend."""
    for m in of:
        for backend in (*backends, *m.others):
            found = time(lambda m=m, backend=backend: m.run(backend))
            kind = str(m.dtype).removeprefix("torch.")
            yield m.what, m.shape, kind, backend, round(found, 2), round(m.bytes / speed, 2)


def main() -> int:
    if not torch.cuda.is_available():
        print(
            f"make gpu-check needs a CUDA device, and torch {torch.__version__} sees none. `make test` proves the "
            "kernels without one, as far as that goes."
        )
        return 1
    print(f"== proofs on {torch.cuda.get_device_name()}", flush=True)
    proofs = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PROOFS], cwd=ROOT)
    if proofs.returncode:
        return proofs.returncode
    speed = bandwidth(median, "cuda")
    print(f"== times; a large copy moves {speed / 1e3:.0f} GB/s", flush=True)
    print(f"{'what':<18}{'shape':<26}{'dtype':<10}{'backend':<19}{'median us':>10}{'least us':>10}{'reached':>9}")
    found = []
    for row in rows(measurements("cuda"), ("reference", "triton"), median, speed):
        what, shape, dtype, backend, time, least = row
        share = f"{100 * least / time:.0f}%" if least else ""
        print(f"{what:<18}{shape:<26}{dtype:<10}{backend:<19}{time:>10.1f}{least:>10.1f}{share:>9}", flush=True)
        found.append(row)
    where = (datetime.date.today().isoformat(), record.commit(), torch.cuda.get_device_name(), torch.__version__)
    record.append(RESULTS, COLUMNS, [(*where, *row) for row in found])
    print(f"rows added to {RESULTS.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
