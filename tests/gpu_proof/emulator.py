"""Run Triton launches on CPU tensors by executing the PTX that a GPU would get."""

import contextlib
import functools
from dataclasses import dataclass

from gpu_proof import ptx
from gpu_proof.compiler import compile_launch, redirect_launches
from gpu_proof.executor import Counts, Program


@dataclass(frozen=True)
class Execution:
    """One executed launch."""

    name: str  # the kernel's
    grid: tuple[int, int, int]
    counts: Counts


@contextlib.contextmanager
def executed(arch=90, *, mutate=None, races=True, approx_ulps=0, memo=None):
    """Execute the compiled PTX of each Triton launch inside the block, on its CPU tensors.

    Args:
        arch: 80, 90 or 100.
        mutate: function from PTX text to PTX text, applied before execution.
        races: detect races between barriers (`executor.BarrierRace`).
        approx_ulps: perturb .approx results by up to this many units in the last place.
        memo: a `Memo` of launches that are not executed twice; None executes all.

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
        text = mutate(text) if mutate else text
        settings = compiled.metadata.shared, races
        arguments = dict(_parameters(launch, compiled))

        def execute():
            return _program(text, *settings, approx_ulps).run(launch.grid, list(arguments.values()), list(arguments))

        counts = memo.run(text, settings, approx_ulps, launch.grid, arguments, execute) if memo else execute()
        executions.append(Execution(launch.name, launch.grid, counts))

    with redirect_launches(run):
        yield executions


@functools.lru_cache(maxsize=32)
def _program(text, shared_bytes, races, approx_ulps):
    return Program(ptx.parse(text), shared_bytes, races=races, approx_ulps=approx_ulps)


def _parameters(launch, compiled):
    """Yield (name, value) of each PTX parameter: tuples are flattened, constexprs are left out."""
    for name, type in compiled.src.signature.items():
        yield from _flatten(name, type, launch.arguments[name])


def _flatten(name, type, value):
    if isinstance(type, tuple):
        for number, (inner_type, inner) in enumerate(zip(type, value, strict=True)):
            yield from _flatten(f"{name}[{number}]", inner_type, inner)
    elif type != "constexpr":
        yield name, value
