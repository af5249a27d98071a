"""Rung 7: every case of every Triton kernel on the GPU, and the searches of tests/gpu_proof/test_rung7_gpu.py."""

from __future__ import annotations

import importlib.util
import time
from collections import Counter

import pytest

from benchmarks.device.parts import Options
from benchmarks.device.record import FAIL, MEASURED, NEEDS_CUDA, PASS, Record
from las_fast.system import cores

RUNG = "tests/gpu_proof/test_rung7_gpu.py"
MAX_FAILURES = 40  # more would show nothing new
MAX_WORKERS = 12
NOTE_SECONDS = 15.0  # between two rows with the number of tests that passed so far


def run(options: Options, record: Record) -> None:
    run_tests(options, record, [RUNG, "-k", "not training_path"])  # part `checks` records those with their errors


def run_tests(options: Options, record: Record, arguments: list[str]) -> None:
    """Run pytest; record each failure as it happens, and how many tests passed."""
    arguments = [*arguments, "-q", "-p", "no:cacheprovider", f"--maxfail={MAX_FAILURES}"]
    if options.device == "cuda" and importlib.util.find_spec("xdist"):
        arguments += ["-n", str(min(cores(), MAX_WORKERS))]
    reporter = Reporter(record)
    status = pytest.main(arguments, plugins=[reporter])
    reporter.finish(int(status), options.device)


class Reporter:
    """A pytest plugin that writes rows."""

    def __init__(self, record: Record):
        self.record, self.counts = record, Counter()
        self.noted_at = time.monotonic()

    def pytest_runtest_logreport(self, report) -> None:
        if time.monotonic() - self.noted_at > NOTE_SECONDS:  # the part may be stopped before `finish`
            self.noted_at = time.monotonic()
            self.record.row("tests that passed so far", self.counts["passed"])
        if report.failed:
            self.fail(report)
        elif report.skipped or report.when == "call":
            self.counts[report.outcome] += 1

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.fail(report)
        elif report.skipped:
            self.counts["skipped"] += 1

    def fail(self, report) -> None:
        self.counts["failed"] += 1
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash else str(report.longrepr)[-300:]
        self.record.row(report.nodeid, status=FAIL, note=text[:300])

    def finish(self, status: int, device: str) -> None:
        """Record the number of tests that passed. Without CUDA, all tests may be skipped."""
        passed, failed = self.counts["passed"], self.counts["failed"]
        if passed:
            self.record.row("tests that passed", passed, status=MEASURED if failed else PASS)
        elif device != "cuda":
            self.record.skip("tests", NEEDS_CUDA)
        elif not failed:
            self.record.row("tests", status=FAIL, note=f"none ran; pytest ended with status {status}")
