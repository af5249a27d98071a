"""The target for las_fast/: edits of Python code, judged by the tests that run the edited line."""

from __future__ import annotations

import ast
import functools
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.mutants.base import BUILD, ROOT, Mutant, Verdict, sources
from tests.mutants.rules import python_mutants
from tests.mutants.tests_of import Tests, chosen_files

# Modules that are slow to import and contain no mutated code.
HEAVY = (
    "numpy", "torch", "torch.utils.data", "torch._dynamo", "soundfile", "soxr", "yaml", "tyro", "tqdm",
    "safetensors.torch", "Levenshtein", "torch.utils.tensorboard", "matplotlib.pyplot",
)  # fmt: skip
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class PythonTarget:
    """Mutants of the Python files of one folder.

    budget: CPU seconds, as recorded, that the tests of one mutant may take; the cheapest come first.
    root, name: the repository, and its folder whose files are edited.
    imports: modules that are imported once for all mutants.
    """

    def __init__(
        self,
        budget: float = 60.0,
        *,
        root: Path = ROOT,
        name: str = "las_fast",
        build: Path = BUILD,
        imports: Sequence[str] = HEAVY,
    ):
        self.budget, self.root, self.name, self.imports = budget, root, name, imports
        self.tests = Tests(root, name, build / "records")
        self.pools: dict[str, queue.Queue[Server]] = {}
        self.servers: list[Server] = []
        self.trusted: set[str] = set()  # tests that passed in a server without a fault
        self.distrusted: set[str] = set()

    def mutants(self, paths: Sequence[Path]) -> list[Mutant]:
        mutants = []
        for path in sources(paths, self.name, "*.py", self.root):
            mutants += python_mutants(path.read_text(encoding="utf-8"), str(path.relative_to(self.root)))
        return mutants

    def restrict(self, tests: Sequence[Path]) -> None:
        self.tests.files = chosen_files(self.tests.files, tests, self.root)

    def prepare(self, mutants: Sequence[Mutant], jobs: int) -> None:
        self.tests.record()
        for kind in ("warm", "cold"):
            pool = self.pools[kind] = queue.Queue()
            for _ in range(jobs):
                server = Server(kind, self)
                self.servers.append(server)
                pool.put(server)

    def judge(self, mutant: Mutant) -> Verdict:
        began = time.monotonic()
        text = mutant.apply((self.root / mutant.file).read_text(encoding="utf-8"))
        try:
            compile(text, mutant.file, "exec")
        except (SyntaxError, ValueError):
            return Verdict("invalid")
        place = find(mutant, self.root)
        while True:
            tests = self._affordable(place)
            if not tests:
                return Verdict("not run")
            answer = self._ask(mutant, text, place, tests)
            by = answer["by"]
            if answer["outcome"] == "survived" or self._is_trusted(by):
                return Verdict(answer["outcome"], by, round(time.monotonic() - began, 2))
            self.distrusted.add(by)

    def _affordable(self, place: Place) -> list[str]:
        if place.names:
            tests = self.tests.mentioning(place.names, place.file)
        else:
            tests = self.tests.running(place.file, place.first, place.last)
        return self.tests.within([test for test in tests if test not in self.distrusted], self.budget)

    def _is_trusted(self, test: str) -> bool:
        """Whether a test passes without a fault; otherwise its failure does not count."""
        if test in self.tests.seconds and test not in self.trusted:
            job = {"tests": [test], "limits": [self._limit(test)]}
            if self._send("warm", job)["outcome"] != "survived":
                return False
            self.trusted.add(test)
        return True

    def _ask(self, mutant: Mutant, text: str, place: Place, tests: list[str]) -> dict:
        path = self.root / mutant.file
        module = ".".join(Path(mutant.file).with_suffix("").parts).removesuffix(".__init__")
        with tempfile.NamedTemporaryFile("w", suffix=".py", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            job = {"module": module, "file": str(path), "text": file.name, "function": place.function,
                   "line": place.line, "tests": tests, "limits": [self._limit(test) for test in tests]}  # fmt: skip
            answer = self._send("warm", job) if place.function else {"outcome": "not warm"}
            return self._send("cold", job) if answer["outcome"] == "not warm" else answer

    def _limit(self, test: str) -> float:
        return 10 + 6 * self.tests.cost(test)

    def _send(self, kind: str, job: dict) -> dict:
        server = self.pools[kind].get()
        try:
            return server.ask(job)
        finally:
            self.pools[kind].put(server)

    def close(self) -> None:
        for server in self.servers:
            server.close()


class Server:
    """One process of server.py, started at its first job."""

    def __init__(self, kind: str, target: PythonTarget):
        self.kind, self.target, self.process = kind, target, None

    def ask(self, job: dict) -> dict:
        if self.process is None:
            self._start()
        self.requests.write(json.dumps(job) + "\n")
        self.requests.flush()
        answer = self.answers.readline()
        if not answer:
            raise RuntimeError(f"the {self.kind} server ended; run it by hand to see why: {' '.join(self.words)}")
        return json.loads(answer)

    def _start(self) -> None:
        (to_read, to_write), (from_read, from_write) = os.pipe(), os.pipe()
        files = map(str, self.target.tests.files) if self.kind == "warm" else ()
        ends = (str(to_read), str(from_write))
        target = (self.target.name, ",".join(self.target.imports))
        self.words = [sys.executable, "-m", "tests.mutants.server", self.kind, *ends, *target, *files]
        self.process = subprocess.Popen(
            self.words, cwd=self.target.root, pass_fds=(to_read, from_write),
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(from_write)
        self.requests, self.answers = os.fdopen(to_write, "w"), os.fdopen(from_read)

    def close(self) -> None:
        if self.process is not None:
            self.requests.close()
            self.process.wait()


# ---------------------------------------------------------------------------------------------------------- places


@dataclass
class Place:
    """The location of a mutant: the lines of its statement, and the outermost function or the names that it defines."""

    file: str
    first: int
    last: int
    function: str = ""  # qualified name of the outermost function whose body contains the mutant
    line: int = 0  # first line of that function, decorators included
    names: list[str] = field(default_factory=list)  # defined at import; the tests of their users judge


@functools.lru_cache(maxsize=8)
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def find(mutant: Mutant, root: Path) -> Place:
    """The Place of a mutant."""
    path = _statements_around(_tree(root / mutant.file), mutant.line)
    statement = path[-1]
    place = Place(mutant.file, statement.lineno, _header_end(statement))
    functions = [i for i, node in enumerate(path) if isinstance(node, FUNCTIONS)]
    if functions and mutant.line >= path[functions[0]].body[0].lineno:
        outer = path[functions[0]]
        place.function = ".".join(node.name for node in path[: functions[0] + 1] if hasattr(node, "name"))
        place.line = min([outer.lineno, *(x.lineno for x in outer.decorator_list)])
    elif functions:  # a default argument
        outer = path[functions[0]]
        place.first, place.last = outer.body[0].lineno, outer.end_lineno
    else:
        place.names = _defined(statement) or [Path(mutant.file).stem]
    return place


def _statements_around(tree: ast.Module, line: int) -> list[ast.stmt]:
    """The nested statements that contain a line, outermost first."""
    path, body = [], tree.body
    while True:
        around = [x for x in body if _first_line(x) <= line <= x.end_lineno]
        if not around:
            return path
        path.append(around[0])
        body = [x for x in ast.iter_child_nodes(around[0]) if isinstance(x, (ast.stmt, ast.ExceptHandler))]


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", ()))])


def _header_end(node: ast.stmt) -> int:
    body = getattr(node, "body", None)
    return max(node.lineno, body[0].lineno - 1) if isinstance(body, list) and body else node.end_lineno


def _defined(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names = [x.id for target in targets if target for x in ast.walk(target) if isinstance(x, ast.Name)]
    return names or ([node.name] if hasattr(node, "name") else [])
