"""python -m las_fast.ops: which backends are available here, and why not the others."""

from __future__ import annotations

import argparse

import torch

from las_fast.ops import backends


def table() -> str:
    """Return one line an op and backend: available or not, and the reason with the remedy."""
    rows = []
    for op in backends.IMPLEMENTED:
        automatic = backends.automatic(op, "cuda" if torch.cuda.is_available() else "cpu")
        for backend in backends.BACKENDS:
            reason = backends.unavailable(op, backend)
            state = f"no: {reason}" if reason else "yes, what auto takes" if backend == automatic else "yes"
            rows.append(f"{op:<18}{backend:<11}{state}")
    return "\n".join([f"{'op':<18}{'backend':<11}available", *rows])


def main(argv: list[str] | None = None) -> None:
    """Print the table and the devices; see --help."""
    argparse.ArgumentParser(prog="python -m las_fast.ops", description=__doc__).parse_args(argv)
    devices = f"{torch.get_num_threads()} CPU threads, {torch.cuda.device_count()} CUDA devices"
    print(f"torch {torch.__version__}, {devices}\n\n{table()}")


if __name__ == "__main__":
    from las_fast.cli import run

    run(main)
