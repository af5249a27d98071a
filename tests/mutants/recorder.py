"""A pytest plugin that records which test runs which line, and how many CPU seconds each test takes.

The CPU seconds are those of the test's process and of the child processes that it waits for, so a busy machine does not
change them much.

Fixtures of a module or of the session run once, in the first test that uses them. Their lines are recorded separately,
so that they count for every test that uses the fixture.

    MUTANTS_RECORD=FILE.json:FOLDER python -m pytest -p tests.mutants.recorder tests/test_x.py
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from pathlib import Path

import coverage
import pytest


class Recorder:
    """The lines of `folder` that each test runs, written to `out` at the end."""

    def __init__(self, out: Path, root: Path, folder: str):
        self.out, self.root = out, root
        self.coverage = coverage.Coverage(data_file=None, source=[str(root / folder)], config_file=False)
        self.current: list[str] = []
        self.tests: dict[str, dict] = {}  # CPU seconds, and the shared fixtures that it uses
        self.asked: set[str] = set()
        self.fixture_seconds = 0.0  # of the current test
        self.fixtures: dict[str, float] = {}

    def enter(self, name: str) -> None:
        self.current.append(name)
        self.coverage.switch_context(name)

    def leave(self) -> None:
        self.current.pop()
        self.coverage.switch_context(self.current[-1] if self.current else "")

    def pytest_sessionstart(self) -> None:
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        began, self.fixture_seconds, self.asked = cpu_seconds(), 0.0, set()
        self.enter(item.nodeid)
        try:
            return (yield)
        finally:
            self.leave()
            seconds = cpu_seconds() - began - self.fixture_seconds
            self.tests[item.nodeid] = {"seconds": round(seconds, 3), "shared": sorted(self.asked)}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.scope == "function":
            return (yield)
        began = cpu_seconds()
        self.enter(shared_name(fixturedef, request.param_index))
        try:
            return (yield)
        finally:
            seconds = cpu_seconds() - began
            self.fixtures[self.current[-1]] = round(seconds, 3)
            self.leave()
            if not any(name.startswith("fixture ") for name in self.current):
                self.fixture_seconds += seconds

    def pytest_runtest_call(self, item):
        known, indices = item._fixtureinfo.name2fixturedefs, getattr(getattr(item, "callspec", None), "indices", {})
        for name in item._fixtureinfo.names_closure:
            fixture = known.get(name, [None])[-1]
            if fixture and fixture.scope != "function":
                self.asked.add(shared_name(fixture, indices.get(name, 0)))

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data, files = self.coverage.get_data(), {}
        for path in map(Path, data.measured_files()):
            by_line = data.contexts_by_lineno(str(path))
            lines = {n: names for n, contexts in by_line.items() if (names := named(contexts))}
            files[str(path.relative_to(self.root))] = {"source": self.keep(path.read_text()), "lines": lines}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps({"tests": self.tests, "fixtures": self.fixtures, "files": files}))

    def keep(self, text: str) -> str:
        """Store a recorded source and return its file name."""
        name = hashlib.sha1(text.encode()).hexdigest()[:12]
        folder = self.out.parent / "sources"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        return name


def cpu_seconds() -> float:
    """Return the CPU seconds that this process and the children it has waited for have taken so far."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def named(contexts: list[str]) -> list[str]:
    """Return the contexts that have a name, sorted; lines outside of tests have the context ""."""
    return sorted(name for name in contexts if name)


def shared_name(fixture, index: int) -> str:
    return f"fixture {fixture.baseid}::{fixture.argname} {index}"


def pytest_configure(config) -> None:
    if setting := os.environ.get("MUTANTS_RECORD"):
        out, _, folder = setting.rpartition(":")
        config.pluginmanager.register(Recorder(Path(out), config.rootpath, folder), "mutants-recorder")
