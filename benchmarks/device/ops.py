"""The tests of the ops on their Triton backends; without CUDA, those of one op on its reference."""

from __future__ import annotations

from benchmarks.device import cases
from benchmarks.device.parts import Options
from benchmarks.device.record import Record


def run(options: Options, record: Record) -> None:
    on_cuda = options.device == "cuda"
    words = ["tests/ops", "-k", "triton"] if on_cuda else ["tests/ops/test_beam_gather.py", "-k", "reference"]
    cases.run_tests(options, record, words)
