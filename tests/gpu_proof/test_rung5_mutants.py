"""Rung 5: some rung detects every fault seeded into the kernels, and none rejects the unchanged kernels."""

from dataclasses import replace

import pytest

from gpu_proof.mutants import CONTROLS, MUTANTS, detections

judged = pytest.mark.work(call=lambda mutant: mutant.judge())


@judged
@pytest.mark.parametrize("mutant", CONTROLS, ids=str)
def test_kernels_without_a_fault_pass_every_rung(mutant, result):
    assert result().message == ""


@judged
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_fault_is_detected_as_the_table_says(mutant, result):
    verdict = result()
    assert verdict.rung, "no rung detects it"
    known = detections().get(str(mutant))
    assert known == replace(verdict, message=""), "rewrite the table: PYTHONPATH=tests python -m gpu_proof.mutants"


def test_the_table_has_a_row_for_each_fault():
    assert detections().keys() == {str(mutant) for mutant in MUTANTS}


def test_faults_have_distinct_names():
    assert len({str(mutant) for mutant in MUTANTS}) == len(MUTANTS)
