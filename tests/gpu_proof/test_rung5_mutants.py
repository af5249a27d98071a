"""Rung 5: every fault that is put into the kernels on purpose is noticed by some rung, and nothing else is."""

import pytest

from gpu_proof.mutants import CONTROLS, MUTANTS


@pytest.fixture(scope="module")
def judged(ahead):
    return ahead(lambda mutant: mutant.judge())


@pytest.mark.parametrize("mutant", CONTROLS, ids=str)
def test_kernels_without_a_fault_pass_every_rung(mutant, judged):
    assert judged(mutant=mutant).message == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_fault_is_detected(mutant, judged):
    verdict = judged(mutant=mutant)
    assert verdict.rung, "by no rung"


def test_there_are_enough_mutants_of_every_kind():
    assert len(MUTANTS) >= 40
    assert len({str(mutant) for mutant in MUTANTS}) == len(MUTANTS)
