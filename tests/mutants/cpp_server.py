"""A process that holds the tests of the C++ ops and a build with faults, and forks a child for each fault.

    python -m tests.mutants.cpp_server record FILE OUT KEY TESTS...
    python -m tests.mutants.cpp_server judge FILE REQUESTS ANSWERS TESTS...

The second speaks JSON lines over two pipes: {"mutant": ..., "tests": [...], "limits": [...]} and
{"outcome": "noticed" | "slow" | "survived", "by": TEST}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests import extension
from tests.mutants.cpp import Switch
from tests.mutants.recorder import cpu_seconds
from tests.mutants.server import OPTIONS, run_items, serve


class Recording:
    """A pytest plugin that records which faults each test reaches, and how many CPU seconds it takes."""

    def __init__(self, switch: Switch):
        self.switch, self.tests = switch, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        for number in range(len(self.switch.reached)):
            self.switch.reached[number] = 0
        began = cpu_seconds()
        try:
            return (yield)
        finally:
            seconds = cpu_seconds() - began
            reached = [number for number, seen in enumerate(bytes(self.switch.reached)) if seen]
            self.tests[item.nodeid] = {"seconds": round(seconds, 3), "reached": reached}


class JobServer:
    """A pytest plugin that serves jobs instead of running the tests."""

    def __init__(self, switch: Switch, requests, answers):
        self.switch, self.requests, self.answers = switch, requests, answers

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        def child(job, pipe, scratch):
            factory = session.config._tmp_path_factory
            factory._given_basetemp, factory._basetemp = scratch / "tests", None
            self.switch.mutant.value = job["mutant"]
            run_items(session, job["tests"], pipe)

        serve(self.requests, self.answers, child)
        return True


def main() -> int:
    kind, name, *rest = sys.argv[1:]
    file = Path(name)
    extension.load(file)
    count = int((file.parent / "sources" / "cpp_hook.cpp").read_text().split("[")[1].split("]")[0])
    switch = Switch(file, count)
    options = [*OPTIONS, f"--rootdir={os.getcwd()}"]
    if kind == "record":
        out, key, *tests = rest
        recording = Recording(switch)
        status = pytest.main([*options, *tests], plugins=[recording])
        if status == 0:
            Path(out).write_text(json.dumps({"key": key, "tests": recording.tests}))
        return int(status)
    requests, answers, *tests = rest
    pipes = os.fdopen(int(requests)), os.fdopen(int(answers), "w")
    return int(pytest.main([*options, *tests], plugins=[JobServer(switch, *pipes)]))


if __name__ == "__main__":
    sys.exit(main())
