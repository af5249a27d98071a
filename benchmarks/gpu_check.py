"""Run the kernel proofs on a GPU, then time each op beside its PyTorch reference and a lower bound: make gpu-check.

Prints a table and appends its rows to benchmarks/results/gpu.csv. The lower bound is the time to move each input and
output once, at the bandwidth of a large copy measured on the same device just before.
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

from benchmarks.rows import RESULTS, append_rows, current_commit
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
FILE = RESULTS / "gpu.csv"
# least_us is the lower bound
COLUMNS = ("date", "commit", "device", "torch", "what", "shape", "dtype", "backend", "median_us", "least_us")
PROOFS = ("tests/gpu_proof/test_rung7_gpu.py", "tests/ops")
EOS = 2
FLUSH_BYTES = 2**28  # more than the L2 cache of any GPU
GRAPH_BACKEND = "triton graph"  # the same kernels, replayed as CUDA graphs

Timer = Callable[[Callable[[], object]], float]  # returns the microseconds of a call


@dataclass(frozen=True)
class Measurement:
    """A call to time on several backends."""

    what: str
    shape: str
    dtype: torch.dtype
    run: Callable[[str], object]  # takes the backend's name
    bytes: int  # moved at least; 0 if memory is not the limit
    extra_backends: tuple[str, ...] = ()  # names that `run` takes besides the op's backends


def attention(B: int, T: int, dtype: torch.dtype, device: str, K: int = 8, D: int = 256) -> Measurement:
    query, keys, values = (torch.randn(B, n, D, device=device).to(dtype) for n in (K, T, T))
    lengths = torch.full((B,), T, device=device)
    valid = ~padding_mask(lengths, T)[:, None]

    def run(backend: str) -> object:
        if backend == "torch sdpa":
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=valid)
        return masked_attention(query, keys, values, lengths, weights=False, backend=backend)

    moved = byte_count(query, query, keys, values)
    return Measurement("masked_attention", f"B{B} K{K} T{T} D{D} E{D}", dtype, run, moved, ("torch sdpa",))


def topk(B: int, K: int, V: int, device: str) -> Measurement:
    logits, scores = torch.randn(B, K, V, device=device), -torch.rand(B, K, device=device)
    finished, lengths = scores > -0.2, torch.full((B, K), 5, device=device)

    def run(backend: str) -> tuple:
        return beam_topk(logits, scores, finished, eos=EOS, lengths=lengths, backend=backend)

    return Measurement("beam_topk", f"B{B} K{K} V{V}", torch.float32, run, byte_count(logits))


def gather(B: int, K: int, device: str) -> Measurement:
    states = [torch.randn(B, K, n, device=device) for n in (512, 512, 256, 256, 256)]
    parents = torch.randint(0, K, (B, K), device=device)
    shape = f"B{B} K{K} N1792"
    return Measurement(
        "beam_gather", shape, torch.float32, lambda x: beam_gather(states, parents, backend=x), 2 * byte_count(*states)
    )


def ctc_prefixes(B: int, K: int, T: int, V: int, device: str) -> Measurement:
    ctc_log_probs = ctc_log_probabilities(torch.randn(B, T, V, device=device), torch.full((B,), T, device=device))
    state, parents = ctc_start(ctc_log_probs, K, eos=EOS), torch.arange(K, device=device).repeat(B, 1)
    tokens = torch.randint(3, V, (B, K), device=device)

    def run(backend: str) -> tuple:
        before = torch.full_like(tokens, EOS)
        return ctc_prefix(ctc_log_probs, state, before, parents, tokens, eos=EOS, backend=backend)

    return Measurement(
        "ctc_prefix", f"B{B} K{K} T{T} V{V}", torch.float32, run, byte_count(ctc_log_probs) + 2 * byte_count(*state)
    )


def backtrack(L: int, B: int, K: int, device: str) -> Measurement:
    tokens, parents, attended_frames = (torch.randint(0, K, (L, B, K), device=device) for _ in range(3))
    scores = torch.randn(L, B, K, device=device)

    def run(backend: str) -> tuple:
        return beam_backtrack(tokens, parents, scores, attended_frames, eos=EOS, backend=backend)

    moved = 2 * byte_count(tokens, attended_frames, scores) + byte_count(parents)
    return Measurement("beam_backtrack", f"L{L} B{B} K{K}", torch.int64, run, moved)


def search(B: int, frame_count: int, device: str, config: ModelConfig) -> Measurement:
    """A beam search of 128 steps over utterances of `frame_count` feature frames."""
    model = LAS(config, input_size=80, vocabulary_size=31).to(device).eval()
    with torch.inference_mode():
        lengths = torch.full((B,), frame_count, device=device)
        memory = model.listen(torch.randn(B, frame_count, 80, device=device), lengths)
    settings = DecodingConfig(beam=8, minimum_share=1.0, maximum_share=127 / frame_count, maximum_extra=0)

    def run(backend: str) -> object:
        capture = backend == GRAPH_BACKEND
        return beam_search(model, memory, settings, backend=backend.removesuffix(" graph"), capture=capture)

    shape = f"B{B} K8 T{memory.keys.shape[1]} 128 steps"
    return Measurement("beam_search", shape, torch.float32, run, 0, (GRAPH_BACKEND,))


def byte_count(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def measurements(device: str) -> Iterator[Measurement]:
    """Yield everything to time, at the shapes of training and decoding."""
    for dtype in (torch.float16, torch.float32):
        for B in (1, 16, 64):
            for T in (100, 400, 1600):
                yield attention(B, T, dtype, device)
    for shape in ((16, 8, 31), (64, 8, 31), (16, 8, 5000), (16, 8, 32000)):
        yield topk(*shape, device)
    yield gather(16, 8, device)
    yield gather(64, 8, device)
    yield ctc_prefixes(16, 8, 400, 31, device)
    yield ctc_prefixes(64, 8, 400, 31, device)
    yield backtrack(200, 64, 8, device)
    for B in (1, 16, 64):
        yield search(B, 1600, device, ModelConfig(ListenerConfig(), SpellerConfig()))


def median_us(run: Callable[[], object], seconds: float = 1.0) -> float:
    """Return the median device time of a call in microseconds, over `seconds` of calls."""
    for _ in range(3):
        run()
    times: list[float] = []
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    while len(times) < 5 or (sum(times) < seconds * 1e6 and len(times) < 200):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # evict the inputs from the cache: the lower bound is that of memory
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def bandwidth(time: Timer, device: str, size: int = 2**28) -> float:
    """Return the bytes per microsecond that a copy of `size` float32 values reads and writes."""
    source = torch.empty(size, device=device)
    target = torch.empty_like(source)
    return 2 * byte_count(source) / time(lambda: target.copy_(source))


def time_all(
    measurements: Iterator[Measurement], backends: tuple[str, ...], time: Timer, bytes_per_us: float
) -> Iterator[tuple]:
    """Yield (what, shape, dtype, backend, median us, lower bound us) for each measurement and backend."""
    for m in measurements:
        for backend in (*backends, *m.extra_backends):
            median = time(lambda m=m, backend=backend: m.run(backend))
            dtype = str(m.dtype).removeprefix("torch.")
            yield m.what, m.shape, dtype, backend, round(median, 2), round(m.bytes / bytes_per_us, 2)


def main() -> int:
    if not torch.cuda.is_available():
        print(
            f"make gpu-check needs a CUDA device, but torch {torch.__version__} finds none; "
            "`make test` runs the proofs that need no GPU."
        )
        return 1
    print(f"== proofs on {torch.cuda.get_device_name()}", flush=True)
    proofs = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PROOFS], cwd=ROOT)
    if proofs.returncode:
        return proofs.returncode
    bytes_per_us = bandwidth(median_us, "cuda")
    print(f"== times; a large copy moves {bytes_per_us / 1e3:.0f} GB/s", flush=True)
    print(f"{'what':<18}{'shape':<26}{'dtype':<10}{'backend':<19}{'median us':>10}{'bound us':>10}{'reached':>9}")
    rows = []
    for row in time_all(measurements("cuda"), ("reference", "triton"), median_us, bytes_per_us):
        what, shape, dtype, backend, median, bound = row
        share = f"{100 * bound / median:.0f}%" if bound else ""
        print(f"{what:<18}{shape:<26}{dtype:<10}{backend:<19}{median:>10.1f}{bound:>10.1f}{share:>9}", flush=True)
        rows.append(row)
    context = (datetime.date.today().isoformat(), current_commit(), torch.cuda.get_device_name(), torch.__version__)
    append_rows(FILE, COLUMNS, [(*context, *row) for row in rows])
    print(f"rows added to {FILE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
