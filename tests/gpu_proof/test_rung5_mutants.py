"""Rung 5: some rung detects every fault seeded into the kernels, and none rejects the unchanged kernels."""

import pytest

from gpu_proof.mutants import CONTROLS, MUTANTS


@pytest.fixture(scope="module")
def judged(start_all):
    return start_all(lambda mutant: mutant.judge())


@pytest.mark.parametrize("mutant", CONTROLS, ids=str)
def test_kernels_without_a_fault_pass_every_rung(mutant, judged):
    assert judged(mutant=mutant).message == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_fault_is_detected(mutant, judged):
    verdict = judged(mutant=mutant)
    assert verdict.rung, "no rung detects it"


def test_there_are_at_least_forty_mutants_with_distinct_names():
    assert len(MUTANTS) >= 40
    assert len({str(mutant) for mutant in MUTANTS}) == len(MUTANTS)
