"""Benchmark beam_backtrack: read the hypotheses from the back-pointers of a finished search."""

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
    tokens = torch.randint(EOS, 31, (L, B, K), generator=generator)
    parents = torch.randint(0, K, (L, B, K), generator=generator)
    scores = -torch.rand(L, B, K, generator=generator).cumsum(0)
    attended_frames = torch.randint(0, 400, (L, B, K), generator=generator)

    def run(backend=backend):
        return beam_backtrack(tokens, parents, scores, attended_frames, eos=EOS, backend=backend)

    for actual, expected in zip(run(), run("reference"), strict=True):
        assert torch.equal(actual, expected)
    measure(run, op="beam_backtrack", backend=backend, shape=f"L{L} B{B} K{K}", dtype=torch.int64)
