"""Measure this machine's limits: matmul throughput, memory bandwidth and the overhead of one call.

python -m benchmarks.machine [--record]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch

from benchmarks.rows import CONTEXT, RESULTS, append_rows, context

COLUMNS = (*CONTEXT, "quantity", "dtype", "size", "value", "unit")
SIZE = 768  # of the square matrices: large enough for peak throughput, short enough to escape preemption
COPY_SIZE = 2**25  # float32 values, far more than any cache holds
SECONDS = 0.7  # of measuring per quantity


def fastest_call(run: Callable[[], object]) -> float:
    """Call `run` for SECONDS and return the seconds of the fastest, which other programs slowed least."""
    run()
    times = [math.inf]
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def matmul_flops(dtype: torch.dtype, size: int = SIZE) -> float:
    """Return the floating point operations per second of torch.mm on size x size matrices."""
    a, b, out = (torch.randn(size, size).to(dtype) for _ in range(3))
    return 2 * size**3 / fastest_call(lambda: torch.mm(a, b, out=out))


def onednn_flops(size: int = SIZE) -> float:
    """Return the operations per second of oneDNN in float32; torch.mm calls MKL, much slower on some processors."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / fastest_call(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))


def bandwidth(size: int = COPY_SIZE) -> float:
    """Return the bytes per second that a copy of `size` float32 values reads and writes."""
    source = torch.zeros(size)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest_call(lambda: target.copy_(source))


def call_overhead() -> float:
    """Return the seconds that a call of an op takes on one value."""
    x, count = torch.ones(1), 2000

    def calls() -> None:
        for _ in range(count):
            torch.neg(x)

    return fastest_call(calls) / count


@torch.inference_mode()
def measure() -> list[tuple]:
    """Measure every quantity; return rows of COLUMNS."""
    values = [("matrix products", dtype, f"{SIZE}", matmul_flops(dtype) / 1e9, "GFLOP/s")
              for dtype in (torch.float32, torch.bfloat16)]  # fmt: skip
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        values.append(("matrix products by oneDNN", torch.float32, f"{SIZE}", onednn_flops() / 1e9, "GFLOP/s"))
    values.append(("memory bandwidth", torch.float32, f"{COPY_SIZE}", bandwidth() / 1e9, "GB/s"))
    values.append(("call of a small op", torch.float32, "1", call_overhead() * 1e6, "us"))
    return [
        (*context(), quantity, str(dtype).removeprefix("torch."), size, float(f"{value:.4g}"), unit)
        for quantity, dtype, size, value, unit in values
    ]


def best_values(rows: list[dict[str, str]], machine: str) -> dict[tuple[str, str], float]:
    """Return the highest recorded value for each (quantity, dtype) of one machine on one thread."""
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["machine"] == machine and row["threads"] == "1":
            key = row["quantity"], row["dtype"]
            best[key] = max(best.get(key, 0.0), float(row["value"]))
    return best


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine", description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="append the rows to machine.csv")
    options = parser.parse_args(argv)
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        rows = measure()
        for row in rows:
            quantity, dtype, size, value, unit = row[len(CONTEXT) :]
            print(f"{threads} thread(s)  {quantity:<28}{dtype:<10}{size:>10}{value:>10.4g} {unit}")
        if options.record:
            append_rows(RESULTS / "machine.csv", COLUMNS, rows)


if __name__ == "__main__":
    main()
