"""python -m las_fast.ops: which backends of each op are available here, and why the others are not."""

from __future__ import annotations

import torch

from las_fast.ops import backends
from las_fast.options import Parser


def table() -> str:
    """Return a table with one row per op and one column per backend, and below it each reason and its remedy once.

    A cell is "auto" (available, and the choice of backend="auto" here), "yes" (available), "no [n]" (not available, for
    reason n) or "-" (the op has no such backend).
    """
    reasons: list[str] = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[tuple[str, ...]] = [("op", *backends.BACKENDS)]
    for op in backends.IMPLEMENTED:
        rows.append((op, *(_cell(op, backend, device, reasons) for backend in backends.BACKENDS)))
    lines = ["".join(f"{cell:<{11 if i else 18}}" for i, cell in enumerate(row)).rstrip() for row in rows]
    notes = [f"[{i}] {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes]).rstrip()


def _cell(op: str, backend: str, device: str, reasons: list[str]) -> str:
    """Return the cell of one op and backend; add the reason to `reasons` if it is new."""
    if backend not in backends.IMPLEMENTED[op]:
        return "-"
    if reason := backends.unavailable(op, backend):
        if reason not in reasons:
            reasons.append(reason)
        return f"no [{reasons.index(reason) + 1}]"
    return "auto" if backend == backends.auto_backend(op, device) else "yes"


def main(argv: list[str] | None = None) -> None:
    """Print the devices and the table; see --help."""
    Parser(prog="python -m las_fast.ops", description=__doc__).parse_args(argv)
    devices = f"{torch.get_num_threads()} CPU threads, {torch.cuda.device_count()} CUDA devices"
    print(f"torch {torch.__version__}, {devices}\n\n{table()}")


if __name__ == "__main__":
    from las_fast.cli import run

    run(main)
