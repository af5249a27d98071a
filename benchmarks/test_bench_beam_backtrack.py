"""Hypotheses from back-pointers at the end of a search."""

import pytest
import torch

from las_fast.ops import backends, beam_backtrack

EOS = 2
SHAPES = {"batch": (200, 16, 8), "one utterance": (200, 1, 8), "wide": (100, 64, 32)}


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", SHAPES)
def test_beam_backtrack(measure, name, backend):
    if reason := backends.unavailable("beam_backtrack", backend):
        pytest.skip(reason)
    L, B, K = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 31, (L, B, K), generator=generator)
    parents = torch.randint(0, K, (L, B, K), generator=generator)
    scores = -torch.rand(L, B, K, generator=generator).cumsum(0)
    frames = torch.randint(0, 400, (L, B, K), generator=generator)

    def run(path=backend):
        return beam_backtrack(tokens, parents, scores, frames, eos=EOS, backend=path)

    for found, expected in zip(run(), run("reference"), strict=True):
        assert torch.equal(found, expected)
    measure(run, op="beam_backtrack", backend=backend, shape=f"L{L} B{B} K{K}", dtype=torch.int64)
