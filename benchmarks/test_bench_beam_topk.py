"""Benchmark beam_topk, one pruning step of beam search, against the calls of a plain search."""

import pytest
import torch

from benchmarks.library_calls import TOPK, topk
from las_fast.ops import Ngram, backends, beam_topk
from las_fast.text import EOS

SHAPES = {
    "characters": (16, 8, 31),
    "one utterance": (1, 8, 31),
    "word pieces": (16, 8, 5000),
    "large vocabulary": (1, 8, 32000),
}


def make(B, K, V):
    generator = torch.Generator().manual_seed(0)
    logits, scores = torch.randn(B, K, V, generator=generator), -torch.rand(B, K, generator=generator)
    finished = torch.rand(B, K, generator=generator) < 0.2
    return logits, scores, finished, torch.full((B, K), 5)


def all_options(B, K, V):
    generator = torch.Generator().manual_seed(1)
    limit = torch.full((B,), 3)
    options = {"minimum": limit, "maximum": limit + 20, "length_penalty": 0.7, "eos_threshold": 1.5}
    options["coverage"] = torch.randn(B, K, generator=generator)
    options["beam_threshold"] = 3.0
    return options | {"ngram": Ngram(torch.randn(B, K, V, generator=generator).log_softmax(-1), 0.3)}


def shape_of(name):
    return " ".join(f"{letter}{size}" for letter, size in zip("BKV", SHAPES[name], strict=True))


def check(actual, expected):
    torch.testing.assert_close(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1]) and torch.equal(actual[2], expected[2])


@pytest.mark.parametrize("path", ["reference", "cpp", TOPK])
@pytest.mark.parametrize("name", SHAPES)
def test_beam_topk(measure, name, path):
    logits, scores, finished, lengths = make(*SHAPES[name])

    def run(backend=path):
        if backend == TOPK:
            return topk(logits, scores, finished)
        return beam_topk(logits, scores, finished, eos=EOS, lengths=lengths, backend=backend)

    if path in backends.BACKENDS and (reason := backends.unavailable("beam_topk", path)):
        pytest.skip(reason)
    check(run(), run("reference"))
    measure(run, op="beam_topk", backend=path, shape=shape_of(name), dtype=torch.float32)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", ["characters", "one utterance"])
def test_beam_topk_with_all_options(measure, name, backend):
    if reason := backends.unavailable("beam_topk", backend):
        pytest.skip(reason)
    logits, scores, finished, lengths = make(*SHAPES[name])
    options = all_options(*SHAPES[name])

    def run(backend=backend):
        return beam_topk(logits, scores, finished, eos=EOS, lengths=lengths, backend=backend, **options)

    check(run(), run("reference"))
    measure(run, op="beam_topk every option", backend=backend, shape=shape_of(name), dtype=torch.float32)
