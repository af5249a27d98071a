"""Rung 6: attention moves hardly more bytes than its inputs and outputs hold."""

import pytest

from gpu_proof.cases import FP16, FP32
from gpu_proof.process import interpreted
from gpu_proof.roofline import SHAPES, Bound, attention_bound, traffic, unroll_traffic

MEMORY = ("query", "keys", "values")


@pytest.mark.work(call=attention_bound)
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize(("B", "T"), SHAPES)
def test_attention_moves_at_most_5_percent_more_bytes_than_the_minimum(B, T, dtype, result):
    bound = result()
    assert bound.bytes <= 1.05 * bound.ideal_bytes


@pytest.mark.work(call=lambda: [interpreted(traffic, B, 500, FP32) for B in (1, 7)])
def test_each_utterance_of_a_batch_moves_the_same_bytes(result):
    alone, batch = (sum(launch.requested for launch in launches) for launches in result())
    assert batch == 7 * alone


@pytest.mark.work(call=lambda: interpreted(traffic, 16, 300, FP16))
def test_the_whole_beam_shares_one_load_of_keys_and_values(result):
    (launch,) = result()
    for name in MEMORY:
        loaded = launch.arguments[name].loaded
        assert loaded.requested == loaded.unique == 32 * loaded.sectors


def test_the_slowest_of_memory_arithmetic_and_launches_sets_the_bound():
    bound = Bound(bytes=3_350_000, ideal_bytes=1, operations=989_000_000, throughput=989e12, launches=2)
    assert bound.times == pytest.approx({"memory": 1e-6, "arithmetic": 1e-6, "launches": 5e-6})
    assert (bound.seconds, bound.limit) == (pytest.approx(5e-6), "launches")


@pytest.mark.work(call=lambda: interpreted(unroll_traffic, {"B": 33, "T": 8, "H": (64, 32), "E": 32, "D": 32, "M": 32}))
def test_a_step_of_a_cell_reads_its_weights_once_per_block_of_utterances(result):
    """It reads operands once per block of units. A tiled matmul without a cache cannot read less."""
    (cell, moved), *_ = result()
    depth, states = 64 + 32, 33 * 64 * (1 + 4 + 1)  # cell state, gates, dropout mask
    weights, operands, offsets = 2 * 4 * 64 * depth, 4 * 33 * depth, 64 * 4 * 64  # offsets also for the rows of padding
    hidden = 2 * 2 * 33 * 64  # written twice: before and after dropout
    assert cell == "cell_kernel"
    assert moved <= 1.05 * (2 * (weights + operands) + 4 * (states + offsets) + hidden)
