"""Rung 4: the compiled code of each launcher, executed instruction by instruction, matches the reference."""

import pytest

from gpu_proof.cases import CASES
from gpu_proof.process import compiled
from gpu_proof.rungs import execute

executed = pytest.mark.work(call=lambda case, arch, approximate: compiled(execute, case, arch, None, approximate))


@executed
@pytest.mark.parametrize("approximate", [False], ids=["exact"])
@pytest.mark.parametrize(
    ("case", "arch"), [(x, arch) for arch in (80, 90, 100) for x in CASES if arch in x.executable], ids=str
)
def test_executed_machine_code_agrees_with_the_reference(case, arch, approximate, result):
    result()


@executed
@pytest.mark.parametrize("approximate", [True], ids=["approximate"])
@pytest.mark.parametrize(("case", "arch"), [(x, 90) for x in CASES if 90 in x.executable], ids=str)
def test_results_hold_with_approximate_exponentials(case, arch, approximate, result):
    result()
