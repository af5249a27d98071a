"""The target for csrc/: all faults in one build, enabled one at a time, judged by the tests of the ops.

The sources are copied to build/mutants/csrc with all faults as schemata (cpp_rules.py) and built once. One run of
tests/ops without a fault records which tests reach which fault; these tests judge it, cheapest first. Building takes
some minutes, a fault some seconds.

Needs a C++ compiler, and tree-sitter with its C++ grammar (in the extra "dev").
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import re
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from tests import extension
from tests.mutants.base import BUILD, ROOT, Mutant, Verdict, sources
from tests.mutants.cpp_rules import constants, cpp_mutants, schema

HERE = Path(__file__).parent
FLAGS = ["-O1", "-g0", "-fopenmp", "-include", str(HERE / "cpp_hook.h")]
TESTS = ("tests/ops",)
SECONDS = 10.0  # wall time, added to six times the CPU seconds of a test without a fault


class CppTarget:
    """Mutants of csrc.

    budget: CPU seconds, as recorded, that the tests of one mutant may take; the cheapest come first.
    """

    name = "csrc"

    def __init__(self, budget: float = 60.0, *, build: Path = BUILD):
        self.budget, self.folder = budget, build / "csrc"
        self.numbers: dict[str, int] = {}
        self.tests: dict[str, dict] = {}
        self.servers: queue.Queue[Server] = queue.Queue()
        self.started: list[Server] = []

    def mutants(self, paths: Sequence[Path]) -> list[Mutant]:
        mutants, left_out = [], 0
        for path in sources(paths, self.name, "*.*", ROOT):
            text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
            mutants += cpp_mutants(text, name)
            left_out += constants(text, name)
        if mutants:
            print(f"csrc: {left_out} edits of constant expressions are not tried", file=sys.stderr)
        return mutants

    def restrict(self, tests: Sequence[Path]) -> None:
        raise SystemExit("csrc is judged by tests/ops; leave --tests out")

    def prepare(self, mutants: Sequence[Mutant], jobs: int) -> None:
        self.numbers = {mutant.id: number for number, mutant in enumerate(mutants)}
        by_id = {mutant.id: mutant for mutant in mutants}
        self.file = None
        while self.file is None:
            self.write(by_id, len(mutants))
            try:
                self.file = extension.build(self.folder, FLAGS, sources=self.folder / "sources", jobs=jobs)
            except subprocess.CalledProcessError as error:
                refused = refused_by(error.stderr, by_id.values())
                print(f"csrc: {len(refused)} mutants may not compile and are left out", file=sys.stderr)
                for mutant in refused:
                    del by_id[mutant.id], self.numbers[mutant.id]
        self.record()
        for _ in range(jobs):
            self.started.append(Server(self.file))
            self.servers.put(self.started[-1])

    def write(self, by_id: dict[str, Mutant], count: int) -> None:
        """Write the sources with the faults; unchanged files keep their mtime."""
        folder = self.folder / "sources"
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted((ROOT / "csrc").iterdir()):
            in_file = [(self.numbers[m.id], m) for m in by_id.values() if m.file == f"csrc/{path.name}"]
            _write(folder / path.name, schema(path.read_text(encoding="utf-8"), in_file))
        hook = f'extern "C" {{\nint las_mutant = -1;\nunsigned char las_reached[{max(1, count)}];\n}}\n'
        _write(folder / "cpp_hook.cpp", hook)

    def record(self) -> None:
        """Run the tests once without a fault; record which faults each test reaches, and its time."""
        out = self.folder / "record.json"
        key = f"{self.file.stat().st_mtime_ns} {_newest(TESTS)}"
        if not out.exists() or json.loads(out.read_text())["key"] != key:
            words = [sys.executable, "-m", "tests.mutants.cpp_server", "record", str(self.file), str(out), key, *TESTS]
            done = subprocess.run(words, cwd=ROOT, env=_environment(), capture_output=True, text=True)
            if not out.exists() or json.loads(out.read_text())["key"] != key:
                raise SystemExit(f"the tests do not pass without a fault:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
        self.tests = json.loads(out.read_text())["tests"]

    def judge(self, mutant: Mutant) -> Verdict:
        began = time.monotonic()
        if mutant.id not in self.numbers:
            return Verdict("invalid")
        number = self.numbers[mutant.id]
        names = self.within(sorted((n for n, t in self.tests.items() if number in t["reached"]), key=self.cost))
        if not names:
            return Verdict("not run")
        job = {"mutant": number, "tests": names, "limits": [SECONDS + 6 * self.cost(name) for name in names]}
        server = self.servers.get()
        try:
            answer = server.ask(job)
        finally:
            self.servers.put(server)
        return Verdict(answer["outcome"], answer["by"], round(time.monotonic() - began, 2))

    def cost(self, test: str) -> float:
        return self.tests[test]["seconds"]

    def within(self, tests: list[str]) -> list[str]:
        chosen, left = [], self.budget
        for test in tests:
            left -= self.cost(test)
            if left < 0 and chosen:
                break
            chosen.append(test)
        return chosen

    def close(self) -> None:
        for server in self.started:
            server.close()


class Server:
    """One process of cpp_server.py."""

    def __init__(self, file: Path):
        (to_read, to_write), (from_read, from_write) = os.pipe(), os.pipe()
        words = [sys.executable, "-m", "tests.mutants.cpp_server", "judge", str(file), str(to_read), str(from_write)]
        self.process = subprocess.Popen(
            [*words, *TESTS], cwd=ROOT, env=_environment(), pass_fds=(to_read, from_write), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(from_write)
        self.requests, self.answers = os.fdopen(to_write, "w"), os.fdopen(from_read)

    def ask(self, job: dict) -> dict:
        self.requests.write(json.dumps(job) + "\n")
        self.requests.flush()
        answer = self.answers.readline()
        if not answer:
            raise RuntimeError("the server of the tests ended")
        return json.loads(answer)

    def close(self) -> None:
        self.requests.close()
        self.process.wait()


class Switch:
    """The variables of a loaded build: the enabled fault, and which faults have been reached."""

    def __init__(self, file: Path, count: int):
        library = ctypes.CDLL(str(file))
        self.mutant = ctypes.c_int.in_dll(library, "las_mutant")
        self.reached = (ctypes.c_ubyte * count).in_dll(library, "las_reached")


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def refused_by(messages: str, mutants: Collection[Mutant]) -> list[Mutant]:
    """The mutants on lines with compiler errors, or else on the lines that instantiated them."""
    for pattern in (r"/([\w.]+):(\d+):\d+: (?:internal compiler )?error:", r"/([\w.]+):(\d+):\d+:   required"):
        lines = {(f"csrc/{name}", int(line)) for name, line in re.findall(pattern, messages)}
        refused = [m for m in mutants if any((m.file, n) in lines for n in _lines(m))]
        if refused:
            return refused
    raise SystemExit(f"csrc does not compile, and no mutant is to blame:\n{messages[:3000]}")


def _lines(mutant: Mutant) -> range:
    return range(mutant.line, mutant.line + mutant.before.count("\n") + 1)


def _newest(paths: Sequence[str]) -> int:
    return max(x.stat().st_mtime_ns for path in paths for x in (ROOT / path).rglob("*.py"))
