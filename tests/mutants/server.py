"""A process that judges mutants: it does the slow imports once, then forks a child per mutant.

There are two kinds. A "warm" server has collected every test; its child replaces the code of one function and runs the
tests at once. A "cold" server has imported torch and pytest but nothing of las_fast; its child imports the faulty
module, so it can judge constants, classes and default arguments. Both exchange JSON lines over two pipes.

    -> {"module": ..., "file": ..., "text": ..., "function": ..., "line": ..., "tests": [...], "limits": [...]}
    <- {"outcome": "noticed" | "slow" | "survived" | "not warm", "by": TEST}

A job without "module" is the control: it runs the tests on the unchanged code.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import types
from pathlib import Path

import pytest

from tests.mutants.overlay import sitecustomize

OVERLAY = Path(sitecustomize.__file__).parent
MAX_MEMORY = 16 * 2**30  # bytes of address space
LOG_BYTES = 64 * 2**20  # that a child may write to one file


class NotWarm(Exception):
    """The function cannot be replaced in place, so a cold server must import the module."""


# --------------------------------------------------------------------------------------------------------- children


class Watch:
    """A pytest plugin that reports each test to the parent and ends the process at the first failure."""

    def __init__(self, pipe: int):
        self.pipe = pipe

    def send(self, **message) -> None:
        os.write(self.pipe, (json.dumps(message) + "\n").encode())

    def pytest_runtest_logstart(self, nodeid) -> None:
        self.send(begins=nodeid)

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.finish("noticed", report.nodeid)

    def finish(self, outcome: str, by: str = "") -> None:
        self.send(outcome=outcome, by=by)
        os._exit(0)


def run_items(session: pytest.Session, tests: list[str], pipe: int) -> None:
    """Run these tests of a session, in this order, and exit."""
    watch = Watch(pipe)
    session.config.pluginmanager.register(watch, "mutants-watch")
    known = {item.nodeid: item for item in session.items}
    items = [known[name] for name in tests if name in known]
    for item, following in zip(items, [*items[1:], None], strict=True):
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    watch.finish("survived")


def start_child(job: dict, scratch: Path) -> None:
    """Isolate a new child: its own session, resource limits and temporary folder."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    if job.get("module"):
        os.environ["MUTANTS_OVERLAY"] = "|".join((job["module"], job["file"], job["text"]))
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{OVERLAY}{os.pathsep}{path}" if path else str(OVERLAY)


def replace_code(job: dict, index: dict) -> None:
    """Replace the code of every function object that contains the mutant by the faulty code."""
    code = compile(Path(job["text"]).read_text(encoding="utf-8"), job["file"], "exec")
    matching = [c for c in codes(code) if c.co_qualname == job["function"] and c.co_firstlineno == job["line"]]
    functions = index.get((job["file"], job["function"], job["line"]), [])
    if len(matching) != 1 or not functions:
        raise NotWarm
    for function in functions:
        if function.__code__.co_freevars != matching[0].co_freevars:
            raise NotWarm
        function.__code__ = matching[0]


def codes(code: types.CodeType):
    """Yield the code objects of all functions and classes in a module's code."""
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield inner
            yield from codes(inner)


def index_functions(folder: str) -> dict[tuple[str, str, int], list[types.FunctionType]]:
    index: dict[tuple[str, str, int], list[types.FunctionType]] = {}
    for thing in gc.get_objects():
        if isinstance(thing, types.FunctionType) and thing.__code__.co_filename.startswith(folder):
            code = thing.__code__
            index.setdefault((code.co_filename, code.co_qualname, code.co_firstlineno), []).append(thing)
    return index


# ----------------------------------------------------------------------------------------------------------- parent


class Serving:
    """The pytest plugin of a warm server: serves jobs instead of running the tests."""

    def __init__(self, requests, answers, folder: str):
        self.requests, self.answers, self.folder = requests, answers, folder

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        index = index_functions(self.folder)

        def child(job, pipe, scratch):
            factory = session.config._tmp_path_factory
            factory._given_basetemp, factory._basetemp = scratch / "tests", None
            if job.get("module"):
                replace_code(job, index)
            run_items(session, job["tests"], pipe)

        serve(self.requests, self.answers, child)
        return True


class RunOneJob:
    """The pytest plugin of a cold child: runs the tests of one job."""

    def __init__(self, tests, pipe):
        self.tests, self.pipe = tests, pipe

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            Watch(self.pipe).finish("noticed", f"import of {report.nodeid}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        run_items(session, self.tests, self.pipe)


def cold_child(job: dict, pipe: int, scratch: Path) -> None:
    if job.get("module"):
        sitecustomize.install(os.environ["MUTANTS_OVERLAY"])
    files = list(dict.fromkeys(name.split("::")[0] for name in job["tests"]))
    pytest.main(
        [*OPTIONS, f"--rootdir={os.getcwd()}", f"--basetemp={scratch / 'tests'}", *files],
        plugins=[RunOneJob(job["tests"], pipe)],
    )
    Watch(pipe).finish("noticed", "pytest did not start")


OPTIONS = ["-q", "-p", "no:cacheprovider"]


def serve(requests, answers, child) -> None:
    """Answer jobs one at a time, each in its own child process."""
    for line in requests:
        answers.write(json.dumps(judge(json.loads(line), child)) + "\n")
        answers.flush()


def judge(job: dict, child) -> dict:
    scratch = Path(tempfile.mkdtemp(prefix="las_fast-mutant-"))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _in_child(job, child, writer, scratch)
    os.close(writer)
    try:
        return _listen(reader, job, pid)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        shutil.rmtree(scratch, ignore_errors=True)


def _in_child(job: dict, child, writer: int, scratch: Path) -> None:
    try:
        start_child(job, scratch)
        child(job, writer, scratch)
    except NotWarm:
        Watch(writer).finish("not warm")
    except BaseException as error:  # also KeyboardInterrupt, SystemExit and pytest's exits
        Watch(writer).finish("noticed", f"ended by {type(error).__name__}")
    os._exit(1)


def _listen(reader: int, job: dict, pid: int) -> dict:
    """Read a child's messages until it reports an outcome or exceeds the limit of a test."""
    limits, current, rest = dict(zip(job["tests"], job["limits"], strict=True)), "", b""
    while True:
        if not _has_message(reader, pid, limits.get(current, 60.0)):
            return {"outcome": "slow", "by": current}
        received = os.read(reader, 65536)
        if not received:
            return {"outcome": "noticed", "by": f"{current} (the process died)"}
        *lines, rest = (rest + received).split(b"\n")
        for message in map(json.loads, lines):
            if "outcome" in message:
                return message
            current = message["begins"]


def _has_message(reader: int, pid: int, limit: float) -> bool:
    """Wait for a message of a child that may take `limit` CPU seconds: on a busy machine, up to ten times as long."""
    began = _cpu_seconds(pid)
    for _ in range(10):
        if select.select([reader], [], [], limit)[0]:
            return True
        if _cpu_seconds(pid) - began > 0.9 * limit:
            return False
    return False


def _cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Serve: KIND REQUESTS ANSWERS FOLDER IMPORTS FILES, in the root of the repository.

    FOLDER is mutated; IMPORTS are the modules that a cold server imports, separated by commas.
    """
    kind, requests, answers, folder, imports, *files = sys.argv[1:]
    sys.dont_write_bytecode = True
    pipes = (os.fdopen(int(requests)), os.fdopen(int(answers), "w"))
    if kind == "warm":
        args = [*OPTIONS, f"--rootdir={os.getcwd()}", *files]
        pytest.main(args, plugins=[Serving(*pipes, os.path.abspath(folder))])
    else:
        for name in filter(None, imports.split(",")):
            with contextlib.suppress(ImportError):
                __import__(name)
        serve(*pipes, cold_child)


if __name__ == "__main__":
    main()
