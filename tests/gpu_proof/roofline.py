"""Rung 6: a lower bound on the time of attention and of the decoder pass on a GPU, from bytes and operations.

    PYTHONPATH=tests python -m gpu_proof.roofline      prints the tables

The bound is the largest of the times for memory traffic, arithmetic and launches. Bytes are counted in the interpreter
for every lane of every load and store, as if there were no caches. Decoding may be faster than this table when the keys
and values of a few utterances stay in the L2 cache.
"""

from dataclasses import dataclass

import torch

from gpu_proof.budgets import attend, unroll
from gpu_proof.cases import FP16, FP32
from gpu_proof.interpreter import fast
from gpu_proof.process import interpreted
from gpu_proof.sanitizer import sanitized

# NVIDIA H100 SXM, from its data sheet
BANDWIDTH = 3.35e12  # bytes per second
THROUGHPUT = {"half": 989e12, "tf32": 494e12, "float": 67e12}  # operations per second, dense
LAUNCH = 2.5e-6  # seconds between launches, typical
L2_BANDWIDTH = 5.5e12  # bytes per second, as others have measured; the data sheet does not give it
ROWS = 16  # rows of a matrix instruction's tile; queries are padded to a multiple

K, D = 8, 256  # beams; size of keys and values
SHAPES = [(B, T) for B in (1, 16, 64) for T in (100, 400, 1600)]


@dataclass(frozen=True)
class Bound:
    """Bytes and operations of one call, and the lower bound on its time."""

    bytes: int
    ideal_bytes: int  # keys, values, queries and results once each
    operations: int
    throughput: float  # operations per second
    launches: int

    @property
    def times(self):
        """Seconds for memory traffic, arithmetic and launches."""
        return {
            "memory": self.bytes / BANDWIDTH,
            "arithmetic": self.operations / self.throughput,
            "launches": self.launches * LAUNCH,
        }

    @property
    def seconds(self):
        return max(self.times.values())

    @property
    def limit(self):
        """The part that takes longest."""
        return max(self.times, key=self.times.get)


def attention_bound(B, T, dtype):
    """The Bound of attention with K beams of size D, without weights. Runs an interpreting worker.

    One utterance is counted: those of a batch move the same bytes each.
    """
    launches = interpreted(traffic, 1, T, dtype)
    requested = B * sum(launch.requested for launch in launches)
    rows = -(-K // ROWS) * ROWS
    operations = 4 * B * rows * T * D  # 2 matmuls of 2 operations per element
    return Bound(
        requested, ideal(B, T, dtype), operations, THROUGHPUT["half" if dtype == FP16 else "float"], len(launches)
    )


def traffic(B, T, dtype):
    """Run the launcher once at a shape and return its LaunchTraffic list. Call it in an interpreting worker."""
    fast()
    with sanitized(checks=False) as launches:
        attend(B=B, K=K, T=T, D=D, E=D, dtype=dtype)
    return launches


def ideal(B, T, dtype):
    """Bytes of keys, values, queries, context, peaks (int64) and log-sums (float32)."""
    return torch.finfo(dtype).bits // 8 * 2 * D * (B * T + B * K) + (8 + 4) * B * K


UNROLL = {"B": 49, "T": 161}  # the typical batch of preset hw4p2
TOKENS = 188


def token_traffic():
    """{(kernel, number of its launch): bytes} for one token of the decoder pass. Runs an interpreting worker."""
    launches = interpreted(unroll_traffic, UNROLL)
    traffic = {}
    for kernel, moved in launches:
        number = sum(name == kernel for name, _ in traffic)
        traffic[kernel, number] = moved
    return traffic


def unroll_traffic(sizes):
    """(kernel, bytes) of each launch of the first token, forward and backward. Call it in an interpreting worker."""
    fast()
    with sanitized(checks=False) as launches:
        unroll(U=2, **sizes)
    names = [(launch.kernel, launch.requested) for launch in launches]
    forward = next(i for i, (name, _) in enumerate(names) if name == "input_gradient_kernel")
    token, backward = forward // 2, (len(names) - forward) // 2
    return names[:token] + names[forward + backward :]


def unroll_table():
    """Yield the markdown lines of the table of launches for one token of the decoder pass."""
    yield "| kernel | MB moved | lower bound, us |"
    yield "|---|---|---|"
    total = 0.0
    for (kernel, _), moved in token_traffic().items():
        seconds = max(moved / L2_BANDWIDTH, LAUNCH)
        total += seconds
        yield f"| {kernel.removesuffix('_kernel')} | {moved / 1e6:.2f} | {seconds * 1e6:.1f} |"
    yield f"| one token | | {total * 1e6:.1f} |"
    yield f"| {TOKENS} tokens, ms | | {total * TOKENS * 1e3:.1f} |"


def table():
    """Yield the markdown lines of the table of attention's bounds."""
    yield "| dtype | B | T | MB moved | of ideal | GFLOP | lower bound, us | limited by |"
    yield "|---|---|---|---|---|---|---|---|"
    for dtype in (FP16, FP32):
        for B, T in SHAPES:
            bound = attention_bound(B, T, dtype)
            yield (
                f"| {str(dtype).removeprefix('torch.')} | {B} | {T} | {bound.bytes / 1e6:.2f} "
                f"| {bound.bytes / bound.ideal_bytes:.3f} | {bound.operations / 1e9:.3f} "
                f"| {bound.seconds * 1e6:.1f} | {bound.limit} |"
            )


if __name__ == "__main__":
    for lines in (table, unroll_table):
        for line in lines():
            print(line, flush=True)
