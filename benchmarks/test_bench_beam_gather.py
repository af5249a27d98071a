"""Benchmark beam_gather: reorder the states of two LSTM cells and a context by parents after a pruning step."""

import pytest
import torch

from benchmarks.library_calls import INDEX_SELECT, index_select
from las_fast.ops import backends, beam_gather

SHAPES = {"batch": (16, 8, 512), "one utterance": (1, 8, 512), "wide": (64, 32, 512)}
STATES = 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("path", ["reference", "cpp", INDEX_SELECT])
@pytest.mark.parametrize("name", SHAPES)
def test_beam_gather(measure, name, path, dtype):
    B, K, N = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(B, K, N, generator=generator).to(dtype) for _ in range(STATES)]
    parents = torch.randint(0, K, (B, K), generator=generator)
    if path in backends.BACKENDS and (reason := backends.unavailable("beam_gather", path)):
        pytest.skip(reason)

    def run(backend=path):
        if backend == INDEX_SELECT:
            return index_select(states, parents)
        return beam_gather(states, parents, backend=backend)

    for actual, expected in zip(run(), run("reference"), strict=True):
        assert torch.equal(actual, expected)
    measure(run, op="beam_gather", backend=path, shape=f"B{B} K{K} N{N} x{STATES}", dtype=dtype)
