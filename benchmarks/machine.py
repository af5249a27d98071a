"""What the machine can do at most: its rate of matrix products and its memory bandwidth, measured.

python -m benchmarks.machine [--record]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch

from benchmarks import record

COLUMNS = (*record.WHERE, "quantity", "dtype", "size", "value", "unit")
SIZE = 768  # of square products: they reach the best rate, and are over before another program's turn comes
COPIED = 2**25  # numbers: far more than any cache holds
SECONDS = 0.7  # for each quantity


def best(run: Callable[[], object]) -> float:
    """Return the seconds of the fastest of many calls: what the machine can do when others leave it alone."""
    run()
    times = [math.inf]
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def product_rate(dtype: torch.dtype, size: int = SIZE) -> float:
    """Return floating point operations a second of size x size matrix products."""
    a, b, out = (torch.randn(size, size).to(dtype) for _ in range(3))
    return 2 * size**3 / best(lambda: torch.mm(a, b, out=out))


def onednn_rate(size: int = SIZE) -> float:
    """Return the same in float32 by oneDNN, where torch.mm would call MKL: on some processors that is much slower."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / best(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))


def bandwidth(numbers: int = COPIED) -> float:
    """Return the bytes a second that a copy reads and writes."""
    source = torch.zeros(numbers)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best(lambda: target.copy_(source))


def call_cost() -> float:
    """Return the seconds that a call of a small op takes."""
    x, many = torch.ones(1), 2000

    def calls() -> None:
        for _ in range(many):
            torch.neg(x)

    return best(calls) / many


@torch.inference_mode()
def measured() -> list[tuple]:
    """Return rows of COLUMNS."""
    found = [("matrix products", dtype, f"{SIZE}", product_rate(dtype) / 1e9, "GFLOP/s")
             for dtype in (torch.float32, torch.bfloat16)]  # fmt: skip
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found.append(("matrix products by oneDNN", torch.float32, f"{SIZE}", onednn_rate() / 1e9, "GFLOP/s"))
    found.append(("memory bandwidth", torch.float32, f"{COPIED}", bandwidth() / 1e9, "GB/s"))
    found.append(("call of a small op", torch.float32, "1", call_cost() * 1e6, "us"))
    return [
        (*record.where(), quantity, str(dtype).removeprefix("torch."), size, float(f"{value:.4g}"), unit)
        for quantity, dtype, size, value, unit in found
    ]


def limits(rows: list[dict[str, str]], machine: str) -> dict[tuple[str, str], float]:
    """Return the best recorded values by (quantity, dtype), of one machine on one thread."""
    kept: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["machine"] == machine and row["threads"] == "1":
            key = row["quantity"], row["dtype"]
            kept[key] = max(kept.get(key, 0.0), float(row["value"]))
    return kept


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine", description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="append the rows to machine.csv")
    options = parser.parse_args(words)
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        rows = measured()
        for row in rows:
            quantity, dtype, size, value, unit = row[len(record.WHERE) :]
            print(f"{threads} thread(s)  {quantity:<28}{dtype:<10}{size:>10}{value:>10.4g} {unit}")
        if options.record:
            record.append(record.RESULTS / "machine.csv", COLUMNS, rows)


if __name__ == "__main__":
    main()
