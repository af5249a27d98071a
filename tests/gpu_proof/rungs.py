"""Rungs 1, 2 and 4 as functions of a case. Call them in a worker process of the right kind (see process.py)."""

from gpu_proof import process
from gpu_proof.interpreter import fast, poisoned
from gpu_proof.memo import Memo
from gpu_proof.sanitizer import sanitized


def interpret(case):
    """Rung 1: results in Triton's interpreter, with outputs poisoned so that unwritten elements fail."""
    fast()
    with poisoned():
        case.run()


def sanitize(case):
    """Rung 2: every lane of every access is in bounds, and programs do not race."""
    fast()
    with sanitized(last_program_only=case.huge), poisoned():
        case.run()


def execute(case, arch=90, mutate=None, approximate=False, remember=True):
    """Rung 4: results of the compiled machine code, executed instruction by instruction.

    approximate: perturb approximate instructions by as much as a GPU's may err. remember: keep the results of launches
    for the rest of the run; those of earlier ones are used in any case.
    """
    from gpu_proof.emulator import executed

    memo = Memo(process.shared_folder, remember) if process.shared_folder else None
    with executed(arch=arch, mutate=mutate, approx_ulps=2 if approximate else 0, memo=memo), poisoned():
        case.run(approximate=approximate)
