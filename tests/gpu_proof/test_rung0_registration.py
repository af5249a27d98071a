"""Rung 0: torch accepts the schemas, fakes and gradients of the Triton ops."""

import pytest

from gpu_proof.process import interpreted
from gpu_proof.registration import check_op, compile_ops
from las_fast.ops import backends

OPS = [op for op, kinds in backends.IMPLEMENTED.items() if "triton" in kinds]


@pytest.mark.work(call=lambda op: interpreted(check_op, op))
@pytest.mark.parametrize("op", OPS)
def test_a_registered_triton_op_passes_opcheck(op, result):
    result()


@pytest.mark.work(call=lambda: interpreted(compile_ops))
def test_each_triton_op_compiles_into_one_graph_with_the_same_results(result):
    assert result() == dict.fromkeys(OPS, 1)
