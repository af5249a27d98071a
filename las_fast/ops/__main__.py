"""python -m las_fast.ops: which backends are available here, and why not the others."""

from __future__ import annotations

import torch

from las_fast.ops import backends
from las_fast.options import Parser


def table() -> str:
    """Return a line an op and a column a backend, and below them each reason with its remedy, once.

    A cell is "auto" (there, and what auto takes on this machine), "yes" (there), "no" and the number of the reason, or
    "-" where the op has no such backend on any machine.
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
    """Say whether op has backend; `reasons` grows by why not, where that is new."""
    if backend not in backends.IMPLEMENTED[op]:
        return "-"
    if reason := backends.unavailable(op, backend):
        if reason not in reasons:
            reasons.append(reason)
        return f"no [{reasons.index(reason) + 1}]"
    return "auto" if backend == backends.automatic(op, device) else "yes"


def main(argv: list[str] | None = None) -> None:
    """Print the table and the devices; see --help."""
    Parser(prog="python -m las_fast.ops", description=__doc__).parse_args(argv)
    devices = f"{torch.get_num_threads()} CPU threads, {torch.cuda.device_count()} CUDA devices"
    print(f"torch {torch.__version__}, {devices}\n\n{table()}")


if __name__ == "__main__":
    from las_fast.cli import run

    run(main)
