"""Rung 3: compiled for GPUs, the kernels stay within their budgets and spill no registers."""

import pytest

from gpu_proof.budgets import ARCHITECTURES, VARIANTS, inexact_divisions, measure, table, violations
from gpu_proof.process import compiled


@pytest.mark.work(call=lambda variant, arch: compiled(measure, variant, arch))
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_compiled_kernels_keep_to_their_budget(variant, arch, result):
    rows = result()
    assert rows
    for row in rows:
        assert violations(variant, row, table().get(row.key)) == [], f"{row.kernel} for {row.arch}"


@pytest.mark.work(call=lambda variant: compiled(inexact_divisions, variant, 90))
@pytest.mark.parametrize("variant", [x for x in VARIANTS if x.options.get("length_penalty")], ids=str)
def test_length_penalties_are_divided_exactly(variant, result):
    assert result() == []


def test_the_table_has_no_stale_rows():
    assert {key[0] for key in table()} == {str(variant) for variant in VARIANTS}
