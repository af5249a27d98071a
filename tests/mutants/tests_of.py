"""Which tests can detect a fault in a line: those that run it, cheapest first.

Each test file has a record under build/mutants. A file is run again when it, or the recorder, changes. A record holds
the sources at that time, so that lines that have moved since are still found.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.mutants.base import ROOT

# These tests cannot detect a fault in the Python code of las_fast, or only after minutes.
LEFT_OUT = ("test_benchmarks", "test_packaging", "test_released", "test_mutants", "test_launches")
RECORD_SECONDS = 1800
UNKNOWN = 1.0  # CPU seconds of a fixture without a recorded time
RECORDER = Path(__file__).with_name("recorder.py")


def files_of(root: Path) -> list[Path]:
    """The test files that judge mutants, relative to the root of the repository."""
    files = [path for path in root.glob("tests/**/test_*.py") if path.parent.name != "gpu_proof"]
    return sorted(path.relative_to(root) for path in files if path.stem not in LEFT_OUT)


def chosen_files(files: Iterable[Path], wanted: Iterable[Path], root: Path) -> list[Path]:
    """Return the files of tests that lie in one of the `wanted` files and folders; SystemExit if there is none."""
    places = [path.resolve() for path in wanted]
    selected = [file for file in files if any(p in ((root / file).resolve(), *(root / file).resolve().parents)
                                           for p in places)]  # fmt: skip
    if not selected:
        raise SystemExit(f"no tests that judge las_fast in {', '.join(map(str, wanted))}")
    return selected


class Tests:
    """The records of a repository's tests. Tests are named by their pytest node ids.

    folder: its lines are recorded; build: folder of the records.
    """

    def __init__(self, root: Path, folder: str, build: Path):
        self.root, self.folder, self.build = root, folder, build
        self.files = files_of(root)
        self.seconds: dict[str, float] = {}  # CPU time
        self.shared: dict[str, dict[str, float]] = {}  # test -> {shared fixture that it uses: CPU seconds}
        self.users: dict[str, list[str]] = {}  # shared fixture -> tests
        self.records: list[dict] = []

    def record(self) -> None:
        """Run each test file that has no record yet, then read all records."""
        self.records = []
        for file in self.files:
            path = self._path(file)  # once: the file may change meanwhile, and then the next run records it again
            if not path.exists():
                print(f"recording {file}", file=sys.stderr)
                self._record(file, path)
            self.records.append(json.loads(path.read_text()))
        for record in self.records:
            for test, row in record["tests"].items():
                self.seconds[test] = row["seconds"]
                known = record.get("fixtures", {})
                self.shared[test] = {name: known.get(name, UNKNOWN) for name in row["shared"]}
                for fixture in row["shared"]:
                    self.users.setdefault(fixture, []).append(test)

    def _path(self, file: Path) -> Path:
        digest = hashlib.sha1((self.root / file).read_bytes() + RECORDER.read_bytes()).hexdigest()[:8]
        return self.build / f"{'.'.join(file.parts)}.{digest}.json"

    def _record(self, file: Path, path: Path) -> None:
        environment = os.environ | {"MUTANTS_RECORD": f"{path}:{self.folder}", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(ROOT)
        words = ["-q", "-p", "tests.mutants.recorder", "-p", "no:cacheprovider", f"--rootdir={self.root}", str(file)]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            cwd=self.root, env=environment, timeout=RECORD_SECONDS, capture_output=True, text=True,
        )  # fmt: skip
        if not path.exists():
            raise SystemExit(f"{file} could not be recorded:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        for old in path.parent.glob(f"{'.'.join(file.parts)}.*.json"):
            if old != path:
                old.unlink()

    def cost(self, test: str) -> float:
        return self.seconds.get(test, 0.0) + sum(self.shared.get(test, {}).values())

    def within(self, tests: Iterable[str], budget: float) -> list[str]:
        """The first tests that take at most `budget` CPU seconds together, but at least one."""
        chosen, paid = [], set()
        for test in tests:
            fixtures = self.shared[test]
            budget -= self.seconds[test] + sum(fixtures[name] for name in fixtures.keys() - paid)
            if budget < 0 and chosen:
                break
            paid |= fixtures.keys()
            chosen.append(test)
        return chosen

    def running(self, file: str, first: int, last: int) -> list[str]:
        """The tests that run any of the lines first to last of a file, cheapest first."""
        tests: set[str] = set()
        for contexts in self._moved(file)[first - 1 : last]:
            for name in contexts:
                tests.update(self.users.get(name, ()) if name.startswith("fixture ") else [name])
        return sorted(tests, key=lambda test: (self.cost(test), test))

    def mentioning(self, names: Iterable[str], file: str) -> list[str]:
        """The tests that run any line with one of these names, and the tests of the file's module."""
        pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b")
        tests = {test for test in self.seconds if test.split("::")[0].endswith(f"/test_{Path(file).name}")}
        for path in sorted((self.root / self.folder).rglob("*.py")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if pattern.search(line):
                    tests.update(self.running(str(path.relative_to(self.root)), number, number))
        return sorted(tests, key=lambda test: (self.cost(test), test))

    @functools.cache  # noqa: B019 (lives as long as the process)
    def _moved(self, file: str) -> list[set[str]]:
        """The contexts of each line of the current file."""
        now = (self.root / file).read_text(encoding="utf-8").splitlines()
        contexts: list[set[str]] = [set() for _ in now]
        known: set[int] = set()
        for record in self.records:
            if row := record["files"].get(file):
                old = (self.build / "sources" / row["source"]).read_text(encoding="utf-8").splitlines()
                for a, b in _same_lines(tuple(old), tuple(now)):
                    known.add(b)
                    contexts[b].update(row["lines"].get(str(a + 1), ()))
        return _spread(contexts, known, "\n".join(now))


@functools.cache
def _same_lines(old: tuple[str, ...], new: tuple[str, ...]) -> list[tuple[int, int]]:
    if old == new:
        return [(i, i) for i in range(len(new))]
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    return [(b.a + i, b.b + i) for b in blocks for i in range(b.size)]


def _spread(contexts: list[set[str]], known: set[int], source: str) -> list[set[str]]:
    """Give each line that is newer than the records the tests of its function."""
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = range(function.body[0].lineno - 1, function.end_lineno)
            whole = set().union(*(contexts[line] for line in body))
            for line in set(body) - known:
                contexts[line] = whole
    return contexts
