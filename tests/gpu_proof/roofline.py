"""Rung 6: a lower bound on the time of attention and of the decoder pass on a GPU, from bytes and operations.

    PYTHONPATH=tests python -m gpu_proof.roofline      prints the tables

A launch takes at least the time of its bytes, of its operations and of its start. Bytes are counted in the interpreter,
for every lane of every load and store, as if there were no caches: decoding finds the keys and values of a few
utterances in the L2 cache and may be faster than this table.
"""

from dataclasses import dataclass

import torch

from gpu_proof.budgets import attend, unroll
from gpu_proof.cases import FLOAT, HALF
from gpu_proof.interpreter import fast
from gpu_proof.process import interpreted
from gpu_proof.sanitizer import sanitized

# NVIDIA H100 SXM, from its data sheet
BANDWIDTH = 3.35e12  # bytes per second
RATE = {"half": 989e12, "tf32": 494e12, "float": 67e12}  # operations per second, dense
START = 2.5e-6  # seconds from one launch to the next, typical
L2_BANDWIDTH = 5.5e12  # bytes per second, as measured by others: the data sheet has none
ROWS = 16  # rows of a matrix unit's tile: queries are padded to a multiple

K, D = 8, 256  # beams; numbers of a key and of a value
SHAPES = [(B, T) for B in (1, 16, 64) for T in (100, 400, 1600)]


@dataclass(frozen=True)
class Bound:
    """Bytes and operations of one call, and the time that they take at least."""

    bytes: int
    ideal_bytes: int  # of keys, values, queries and results, once each
    operations: int
    rate: float
    launches: int

    @property
    def times(self):
        """Return the seconds spent on each part."""
        return {
            "memory": self.bytes / BANDWIDTH,
            "arithmetic": self.operations / self.rate,
            "launches": self.launches * START,
        }

    @property
    def seconds(self):
        return max(self.times.values())

    @property
    def limit(self):
        """Return the slowest part."""
        return max(self.times, key=self.times.get)


def attention_bound(B, T, dtype):
    """The Bound of attention with K beams of size D, without weights; counts in a worker that interprets."""
    launches = interpreted(count, B, T, dtype)
    moved = sum(launch.requested for launch in launches)
    rows = -(-K // ROWS) * ROWS
    operations = 4 * B * rows * T * D  # a multiplication and an addition for each of keys and values
    return Bound(moved, ideal(B, T, dtype), operations, RATE["half" if dtype == HALF else "float"], len(launches))


def count(B, T, dtype):
    """LaunchTraffic of one call of the launcher at that shape."""
    fast()
    with sanitized(checks=False) as launches:
        attend(B=B, K=K, T=T, D=D, E=D, dtype=dtype)
    return launches


def ideal(B, T, dtype):
    """Bytes of the keys, values, queries, context, peaks (int64) and log-sums (float32) of a call."""
    return torch.finfo(dtype).bits // 8 * 2 * D * (B * T + B * K) + (8 + 4) * B * K


UNROLL = {"B": 49, "T": 161}  # the typical batch of preset hw4p2
TOKENS = 188


def unroll_traffic():
    """{(kernel, number of its launch in a token): bytes} of one token of the decoder pass; counts in a worker."""
    launches = interpreted(count_unroll, UNROLL)
    traffic = {}
    for kernel, moved in launches:
        number = sum(name == kernel for name, _ in traffic)
        traffic[kernel, number] = moved
    return traffic


def count_unroll(sizes):
    """(kernel, bytes) of each launch of the first token, forward and backward."""
    fast()
    with sanitized(checks=False) as launches:
        unroll(U=2, **sizes)
    names = [(launch.kernel, launch.requested) for launch in launches]
    forward = next(i for i, (name, _) in enumerate(names) if name == "input_gradient_kernel")
    token, backward = forward // 2, (len(names) - forward) // 2
    return names[:token] + names[forward + backward :]


def unroll_table():
    """The launches of one token of the decoder pass and their least times, as lines of markdown."""
    yield "| kernel | MB moved | at least, us |"
    yield "|---|---|---|"
    total = 0.0
    for (kernel, _), moved in unroll_traffic().items():
        seconds = max(moved / L2_BANDWIDTH, START)
        total += seconds
        yield f"| {kernel.removesuffix('_kernel')} | {moved / 1e6:.2f} | {seconds * 1e6:.1f} |"
    yield f"| a token | | {total * 1e6:.1f} |"
    yield f"| {TOKENS} tokens, ms | | {total * TOKENS * 1e3:.1f} |"


def table():
    """The bounds of attention for all shapes, as lines of markdown."""
    yield "| dtype | B | T | MB moved | of ideal | GFLOP | at least, us | limited by |"
    yield "|---|---|---|---|---|---|---|---|"
    for dtype in (HALF, FLOAT):
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
