"""How each rung checks a case; called in a worker process of the right kind (see process.py)."""

from gpu_proof.interpreter import fast, poisoned
from gpu_proof.sanitizer import sanitized


def interpret(case):
    """Rung 1: the kernel's logic, in triton's interpreter; an output that nobody wrote is wrong."""
    fast()
    with poisoned():
        case.run()


def sanitize(case):
    """Rung 2: every lane of every load and store stays in bounds, and no two programs disturb each other."""
    fast()
    with sanitized(last_program_only=case.huge), poisoned():
        case.run()


def execute(case, arch=90, mutate=None, approximate=False):
    """Rung 4: the values of the machine code that the kernel is compiled to, executed instruction by instruction.

    approximate: approximate instructions are off by as much as a GPU's may be.
    """
    from gpu_proof.emulator import executed

    with executed(arch=arch, mutate=mutate, approx_ulps=2 if approximate else 0), poisoned():
        case.run(approximate=approximate)
