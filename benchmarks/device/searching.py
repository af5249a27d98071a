"""Time a beam search: las_fast step by step and by CUDA graphs, and plain PyTorch, step by step, with the same weights.

What graphs give is the difference between the two of las_fast; plain PyTorch compares with las_fast step by step.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.device.parts import Options
from benchmarks.device.record import PASS, Record
from benchmarks.device.timing import exact_float32, median_seconds, profile
from benchmarks.search_paths import SearchPaths, Shape, dtype_of

SHAPES = tuple(Shape(B=B, steps=128) for B in (16, 1, 64))
EQUALITY = "beam search: scores and hypotheses equal those of plain PyTorch"
QUICK = Shape(B=2, K=3, T=20, H=32, steps=16)


def run(options: Options, record: Record) -> None:
    for shape in record.while_time_remains([QUICK] if options.quick else SHAPES, "beam search"):
        with record.attempt("beam search", shape=str(shape)), exact_float32():
            time_searches(shape, options, record)


def time_searches(shape: Shape, options: Options, record: Record) -> None:
    """Check and time every path at one shape."""
    searches = SearchPaths(shape, options.device)
    paths = searches.paths()
    for path, run_path in record.while_time_remains(list(paths.items()), "beam search"):
        labels = {"shape": str(shape), "dtype": dtype_of(path), "path": path}
        with record.attempt("beam search", **labels):
            with record.attempt(EQUALITY, **labels):
                searches.check({path: run_path})
                record.row(EQUALITY, status=PASS, **labels)
            rounds = 1 if options.quick else 7
            seconds = median_seconds(run_path, options.device, rounds=rounds, warmups=1, max_seconds=1.5)
            record.row("beam search", 1e3 * seconds, "ms", **labels)
            record.row("beam search", 1e6 * seconds / shape.B / shape.steps, "us/utterance/step", **labels)
    if "las_fast graph" in paths:
        with record.attempt("profile of a search", shape=str(shape)):
            record_profile(paths["las_fast graph"], shape, options.device, record)


def record_profile(search: Callable[[], object], shape: Shape, device: str, record: Record) -> None:
    """Record the kernels of the captured search per step, and its launches, waits and copies."""
    search()
    measured = profile(search, device)
    labels = {"shape": str(shape), "path": "las_fast graph"}
    record.row("profile of a search: kernels per step", measured.kernels / shape.steps, **labels)
    record.row("profile of a search: kernels' time per step", 1e3 * measured.busy_ms / shape.steps, "us", **labels)
    for name in ("launches", "graph_launches", "waits", "copies_to_host"):
        record.row(f"profile of a search: {name}", getattr(measured, name), **labels)
    for name, count, milliseconds in measured.longest:
        what = f"profile of a search: {name[:90]}"
        record.row(what, 1e3 * milliseconds / shape.steps, "us per step", note=f"{count} times", **labels)
