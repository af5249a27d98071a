"""PYTHONPATH=tests python -m gpu_proof: print the README's table of how much each rung covers per op."""

from collections import Counter

from gpu_proof.budgets import VARIANTS
from gpu_proof.cases import CASES, HUGE
from gpu_proof.mutants import MUTANTS
from las_fast.ops import backends

RUNGS = [
    ("0", "torch's own checks: schema, shapes without data, gradients, one graph under `torch.compile`", None, "yes"),
    ("1", "interpreted, with outputs poisoned: values, gradients and indices against the reference, in float64 where "
     "the op sums or multiplies",
     [case for case in CASES if case.interpretable], "{} cases"),
    ("2", "every lane of every access in bounds, no races between programs; sizes beyond 2^31",
     [case for case in CASES if case.interpretable] + HUGE, "{} cases"),
    ("3", "compiled for sm_80, sm_86, sm_90, sm_100 and sm_120 (and gfx942): registers, no spill, shared memory, "
     "128-bit loads, matrix units", VARIANTS, "{} shapes"),
    ("4", "the compiled PTX executed instruction by instruction, with races detected between barriers",
     [case for case in CASES for _ in case.executable], "{} runs"),
    ("5", "seeded faults, each detected by a rung", MUTANTS, "all {}"),
    ("6", "bytes counted, and a lower bound on the time on an H100", None, ""),
    ("7", "all cases again on a GPU, then timings: `make gpu-check`", None, "not run"),
]  # fmt: skip


def table():
    """Yield the lines of the table, in markdown."""
    ops = [op for op, kinds in backends.IMPLEMENTED.items() if "triton" in kinds]
    yield f"| rung | what is done | {' | '.join(ops)} |"
    yield "|" + "---|" * (2 + len(ops))
    for rung, what, items, cell in RUNGS:
        count = Counter(item.op for item in items or ())
        cells = [cell.format(count[op]) for op in ops]
        if rung == "6":
            cells[0] = "table below"
        yield f"| {rung} | {what} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(table()))
