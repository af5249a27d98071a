"""Rung 4: the compiled code of each launcher, executed instruction by instruction, matches the reference."""

import pytest

from gpu_proof.cases import CASES
from gpu_proof.process import compiled
from gpu_proof.rungs import execute


@pytest.fixture(scope="module")
def executed(start_all):
    return start_all(lambda case, arch, approximate: compiled(execute, case, arch, None, approximate))


@pytest.mark.parametrize("approximate", [False], ids=["exact"])
@pytest.mark.parametrize(("case", "arch"), [(x, arch) for x in CASES for arch in x.executable], ids=str)
def test_executed_machine_code_agrees_with_the_reference(case, arch, approximate, executed):
    executed(case=case, arch=arch, approximate=approximate)


@pytest.mark.parametrize("approximate", [True], ids=["approximate"])
@pytest.mark.parametrize(("case", "arch"), [(x, 90) for x in CASES if 90 in x.executable], ids=str)
def test_results_hold_with_approximate_exponentials(case, arch, approximate, executed):
    executed(case=case, arch=arch, approximate=approximate)
