"""Run Triton launches as the machine code that a GPU would get, on CPU tensors."""

import contextlib
import functools
from dataclasses import dataclass

from gpu_proof import ptx
from gpu_proof.compiler import compile_launch, launches_go_to
from gpu_proof.executor import Counts, Program


@dataclass(frozen=True)
class Execution:
    """One launch that ran."""

    name: str  # of the kernel
    grid: tuple[int, int, int]
    counts: Counts


@contextlib.contextmanager
def executed(arch=90, *, mutate=None, races=True, approx_ulps=0):
    """Run each Triton launch inside the block as its compiled PTX, on its CPU tensors.

    Args:
        arch: 80, 90 or 100.
        mutate: a function from PTX text to PTX text, applied before it runs.
        races: raise `executor.BarrierRace` where warps race in shared memory.
        approx_ulps: let .approx instructions be off by up to so many units in the last place.

    Yields:
        a list that gets an `Execution` for each launch.

    Raises:
        executor.MachineError: the code of a launch did something that is undefined on a GPU.
        NotImplementedError: the code has an instruction that is not modelled.
    """
    executions = []

    def run(launch):
        compiled = compile_launch(launch, arch)
        text = compiled.asm["ptx"]
        program = _program(mutate(text) if mutate else text, compiled.metadata.shared, races, approx_ulps)
        arguments = dict(_leaves(launch, compiled))
        counts = program.run(launch.grid, list(arguments.values()), list(arguments))
        executions.append(Execution(launch.name, launch.grid, counts))

    with launches_go_to(run):
        yield executions


@functools.lru_cache(maxsize=32)
def _program(text, shared_bytes, races, approx_ulps):
    return Program(ptx.parse(text), shared_bytes, races=races, approx_ulps=approx_ulps)


def _leaves(launch, compiled):
    """Yield (name, value) of each PTX parameter: constants are folded into the code, tuples are flattened."""
    for name, type in compiled.src.signature.items():
        yield from _spread(name, type, launch.arguments[name])


def _spread(name, type, value):
    if isinstance(type, tuple):
        for number, (inner_type, inner) in enumerate(zip(type, value, strict=True)):
            yield from _spread(f"{name}[{number}]", inner_type, inner)
    elif type != "constexpr":
        yield name, value
