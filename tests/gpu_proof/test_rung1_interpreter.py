"""Rung 1: each interpreted launcher matches the reference and writes all of its results."""

import pytest

from gpu_proof.cases import CASES
from gpu_proof.process import interpreted
from gpu_proof.rungs import interpret


@pytest.mark.work(call=lambda case: interpreted(interpret, case))
@pytest.mark.parametrize("case", [case for case in CASES if case.interpretable], ids=str)
def test_interpreted_kernels_agree_with_the_reference(case, result):
    result()
