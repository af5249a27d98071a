"""Rung 2: no launch accesses memory out of bounds or depends on the order of its programs."""

import pytest

from gpu_proof.cases import CASES, HUGE
from gpu_proof.process import interpreted
from gpu_proof.rungs import sanitize

sanitized = pytest.mark.work(call=lambda case: interpreted(sanitize, case))


@sanitized
@pytest.mark.parametrize("case", [case for case in CASES if case.interpretable], ids=str)
def test_every_access_is_in_bounds_and_programs_do_not_race(case, result):
    result()


@sanitized
@pytest.mark.parametrize("case", HUGE, ids=str)
def test_no_index_overflows(case, result):
    result()
