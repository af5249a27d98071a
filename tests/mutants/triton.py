"""The target for kernels/: edits of Triton kernels and their launchers, judged by the rungs of tests/gpu_proof.

The rungs are those of gpu_proof/mutants.py: the kernel interpreted with every access checked, then its compiled PTX
executed. The budgets of rung 3 judge only edits of launchers, which choose warps, stages and tile sizes. They do not
judge edits of kernels: one more register does not show that a result is wrong.
"""

from __future__ import annotations

import ast
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.base import ROOT, Mutant, Verdict, sources
from tests.mutants.rules import python_mutants

sys.path.insert(0, str(ROOT / "tests"))  # for the package gpu_proof

from gpu_proof.mutants import (  # noqa: E402
    ARCH,
    MutantDoesNotApply,
    SourceMutant,
    cases_of,
    judge_budgets,
    judge_executed,
    judge_interpreted,
    ops_with,
)
from gpu_proof.mutants import Verdict as RungVerdict  # noqa: E402
from gpu_proof.process import WorkerDied, compiled, interpreted  # noqa: E402
from gpu_proof.rungs import execute  # noqa: E402

# tile sizes at the top of a kernel file
SIZES = ("TILES", "BLOCK", "BLOCK_T", "BLOCK_V", "MAX_TILE", "MIN_RANGE", "FRAMES_PER_QUERY")
# raised for edits that Triton cannot compile
COMPILE_ERRORS = ("InterpreterError", "CompilationError", "CompileTimeAssertionFailure")


@dataclass(frozen=True)
class PlacedMutant(SourceMutant):
    """An op's kernels with one edit at one position."""

    mutant: Mutant | None = None

    def mutate(self, sources: dict[str, str]) -> dict[str, str]:
        name = Path(self.mutant.file).name
        return sources | {name: self.mutant.apply(sources[name])}


class TritonTarget:
    """Mutants of kernels.

    budget: a rung of one mutant may take five times as many seconds of wall time, at least 120; a mutant that takes
            longer counts as noticed.
    """

    name = "kernels"

    def __init__(self, budget: float = 60.0):
        self.limit = max(120.0, 5 * budget)
        self.executed: set[str] = set()  # ops whose unchanged kernels were executed

    def mutants(self, paths: Sequence[Path]) -> list[Mutant]:
        mutants = []
        for path in sources(paths, self.name, "*.py"):
            text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
            left_out = set(_tile_sizes(ast.parse(text)))
            mutants += [m for m in python_mutants(text, name) if m.line not in left_out]
        return mutants

    def restrict(self, tests: Sequence[Path]) -> None:
        raise SystemExit("kernels is judged by tests/gpu_proof; leave --tests out")

    def prepare(self, mutants: Sequence[Mutant], jobs: int) -> None:
        pass

    def judge(self, mutant: Mutant) -> Verdict:
        began = time.monotonic()
        try:
            compile(mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8")), mutant.file, "exec")
        except (SyntaxError, ValueError):
            return Verdict("invalid")
        rungs = [(interpreted, judge_interpreted), (compiled, judge_executed)]
        if not in_a_kernel(mutant):
            rungs.append((compiled, judge_budgets))
        for (worker, judge), op in itertools.product(rungs, ops_with(Path(mutant.file).name)):
            if judge is judge_executed:
                self._execute_unchanged(op)
            outcome, by = self._rung(worker, judge, PlacedMutant(op, mutant.id, mutant=mutant))
            if outcome != "survived":
                return Verdict(outcome, by, round(time.monotonic() - began, 2))
        return Verdict("survived", "", round(time.monotonic() - began, 2))

    def _execute_unchanged(self, op: str) -> None:
        """Execute an op's unchanged kernels once: the launches that a mutant does not change are then copied."""
        if op not in self.executed:
            self.executed.add(op)
            compiled(execute_unchanged, op, limit=3600.0)

    def _rung(self, worker, judge, fault: PlacedMutant) -> tuple[str, str]:
        try:
            verdict: RungVerdict = worker(judge, fault, limit=self.limit)
        except WorkerDied as error:
            return "slow", f"{judge.__name__}: {error}"
        except MutantDoesNotApply:
            return "invalid", ""
        except NotImplementedError:  # an instruction that the executor does not model: the budgets may notice it
            return "survived", ""
        except Exception as error:
            outcome = "invalid" if type(error).__name__ in COMPILE_ERRORS else "noticed"
            return outcome, f"{judge.__name__}: {type(error).__name__}: {str(error)[:200]}"
        if not verdict.rung:
            return "survived", ""
        return "noticed", f"rung {verdict.rung}: {verdict.case}: {verdict.message[:200]}"

    def close(self) -> None:
        pass


def execute_unchanged(op: str) -> None:
    """Execute the cases of an op and remember the results of their launches; called in a worker."""
    for case in cases_of(op):
        if ARCH in case.executable:
            execute(case, ARCH)


def in_a_kernel(mutant: Mutant) -> bool:
    """Whether an edit is in a function that Triton compiles, not in one that runs on the host."""
    tree = ast.parse((ROOT / mutant.file).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    compiled_ones = {x.name for x in functions if any("triton.jit" in ast.unparse(y) for y in x.decorator_list)}
    return mutant.function in compiled_ones


def _tile_sizes(tree: ast.Module) -> Iterator[int]:
    """Yield the lines with only tile sizes, warps and stages, whose edits are slower but not wrong."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(x, ast.Name) and x.id in SIZES for x in node.targets):
            yield from range(node.lineno, node.end_lineno + 1)
