"""Rung 0: torch accepts the schemas, fakes and gradients of the Triton ops."""

import pytest

from gpu_proof.process import interpreted
from gpu_proof.registration import check_op, compile_ops
from las_fast.ops import backends

OPS = [op for op, kinds in backends.IMPLEMENTED.items() if "triton" in kinds]


@pytest.mark.parametrize("op", OPS)
def test_a_registered_triton_op_passes_opcheck(op):
    interpreted(check_op, op)


def test_each_triton_op_compiles_into_one_graph_with_the_same_results():
    assert interpreted(compile_ops) == dict.fromkeys(OPS, 1)
