"""Which tests can notice a fault in a line: those that run it, cheapest first.

One record is kept for each file of tests, under build/mutants; only files of tests that have changed are run again.
A record holds the sources as they were, so that lines which have moved since are still found.
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

from tests.mutants.base import BUILD, ROOT

# Nothing here looks at the Python code of las_fast in a way that a fault in it could show, or only after minutes.
LEFT_OUT = ("test_benchmarks", "test_packaging", "test_released", "test_mutants", "test_launches")
RECORD_SECONDS = 1800


def test_files() -> list[Path]:
    """Return the files of tests that judge mutants, relative to ROOT."""
    found = [*ROOT.glob("tests/test_*.py"), *ROOT.glob("tests/ops/test_*.py")]
    return sorted(path.relative_to(ROOT) for path in found if path.stem not in LEFT_OUT)


def record_path(file: Path) -> Path:
    digest = hashlib.sha1((ROOT / file).read_bytes()).hexdigest()[:8]
    return BUILD / "records" / f"{'.'.join(file.parts)}.{digest}.json"


def record_all() -> None:
    """Run each file of tests that has no record yet, one after another, and keep which test runs which line."""
    for file in test_files():
        path = record_path(file)
        if path.exists():
            continue
        print(f"recording {file}", file=sys.stderr)
        environment = os.environ | {"MUTANTS_RECORD": str(path), "OMP_NUM_THREADS": "1"}
        words = ["-q", "-p", "tests.mutants.recorder", "-p", "no:cacheprovider", str(file)]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            cwd=ROOT, env=environment, timeout=RECORD_SECONDS, capture_output=True, text=True,
        )  # fmt: skip
        if not path.exists():
            raise SystemExit(f"{file} could not be recorded:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        for old in path.parent.glob(f"{'.'.join(file.parts)}.*.json"):
            if old != path:
                old.unlink()


class Tests:
    """What the records say. Tests are named by their pytest node ids."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.shared: dict[str, float] = {}  # seconds that the shared fixtures of a test take, once
        self.users: dict[str, list[str]] = {}  # of a shared fixture
        self.records = [json.loads(path.read_text()) for path in map(record_path, test_files()) if path.exists()]
        for record in self.records:
            for test, row in record["tests"].items():
                self.seconds[test] = row["seconds"]
                self.shared[test] = sum(record.get("fixtures", {}).get(name, 10.0) for name in row["shared"])
                for fixture in row["shared"]:
                    self.users.setdefault(fixture, []).append(test)

    def running(self, file: str, first: int, last: int) -> list[str]:
        """Return the tests that run one of the lines first to last of a file, cheapest first."""
        tests: set[str] = set()
        for contexts in self._moved(file)[first - 1 : last]:
            for name in contexts:
                tests.update(self.users.get(name, ()) if name.startswith("fixture ") else [name])
        return sorted(tests, key=lambda test: (self.seconds.get(test, 0.0), test))

    def mentioning(self, names: Iterable[str]) -> list[str]:
        """Return the tests that run any line of las_fast in which one of these names stands, cheapest first."""
        pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b")
        tests: set[str] = set()
        for path in sorted((ROOT / "las_fast").rglob("*.py")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if pattern.search(line):
                    tests.update(self.running(str(path.relative_to(ROOT)), number, number))
        return sorted(tests, key=lambda test: (self.seconds.get(test, 0.0), test))

    @functools.cache  # noqa: B019 (lives as long as the process)
    def _moved(self, file: str) -> list[set[str]]:
        """Return the contexts of each line of the file as it is now."""
        now = (ROOT / file).read_text(encoding="utf-8").splitlines()
        found: list[set[str]] = [set() for _ in now]
        known: set[int] = set()
        for record in self.records:
            if row := record["files"].get(file):
                old = (BUILD / "records" / "sources" / row["source"]).read_text(encoding="utf-8").splitlines()
                for a, b in _same_lines(tuple(old), tuple(now)):
                    known.add(b)
                    found[b].update(row["lines"].get(str(a + 1), ()))
        return _spread(found, known, "\n".join(now))


@functools.cache
def _same_lines(old: tuple[str, ...], new: tuple[str, ...]) -> list[tuple[int, int]]:
    if old == new:
        return [(i, i) for i in range(len(new))]
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    return [(b.a + i, b.b + i) for b in blocks for i in range(b.size)]


def _spread(found: list[set[str]], known: set[int], source: str) -> list[set[str]]:
    """Give each line that is new since the records the tests of the function around it."""
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = range(function.body[0].lineno - 1, function.end_lineno)
            whole = set().union(*(found[line] for line in body))
            for line in set(body) - known:
                found[line] = whole
    return found
