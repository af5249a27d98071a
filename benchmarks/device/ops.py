"""Run the ops' tests on the Triton backends; without CUDA, the tests of one op on its reference.

The part `cases` tests speller_unroll.
"""

from __future__ import annotations

from benchmarks.device import cases
from benchmarks.device.parts import Options
from benchmarks.device.record import Record


def run(options: Options, record: Record) -> None:
    arguments = ["tests/ops", "-k", "triton"]
    if options.device != "cuda":
        arguments = ["tests/ops/test_beam_gather.py", "-k", "reference and hypothesis"]
    cases.run_tests(options, record, arguments)
