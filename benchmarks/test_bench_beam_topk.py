"""One pruning step of beam search, beside the few calls that a plain search makes."""

import pytest
import torch

from las_fast.ops import Ngram, backends, beam_topk

EOS = 2
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


def every_option(B, K, V):
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(V**2, V, generator=generator).log_softmax(-1)
    limit = torch.full((B,), 3)
    options = {"minimum": limit, "maximum": limit + 20, "length_penalty": 0.7, "eos_threshold": 1.5}
    options["coverage"] = torch.randn(B, K, generator=generator)
    return options | {"ngram": Ngram(table, torch.randint(0, V**2, (B, K), generator=generator), 0.3)}


def plain(logits, scores, finished):
    """Log-softmax, mask, torch.topk: no end rules, no order among ties."""
    frozen = torch.full((logits.shape[2],), -torch.inf)
    frozen[EOS] = 0.0
    steps = torch.where(finished[..., None], frozen, logits.log_softmax(-1))
    best = (scores[..., None] + steps).flatten(1).topk(scores.shape[1])
    return best.values, best.indices % logits.shape[2], best.indices // logits.shape[2]


def shape_of(name):
    return " ".join(f"{letter}{size}" for letter, size in zip("BKV", SHAPES[name], strict=True))


def check(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])


@pytest.mark.parametrize("path", ["reference", "cpp", "plain torch.topk"])
@pytest.mark.parametrize("name", SHAPES)
def test_beam_topk(measure, name, path):
    logits, scores, finished, lengths = make(*SHAPES[name])

    def run(backend=path):
        if backend == "plain torch.topk":
            return plain(logits, scores, finished)
        return beam_topk(logits, scores, finished, eos=EOS, lengths=lengths, backend=backend)

    if path in backends.BACKENDS and (reason := backends.unavailable("beam_topk", path)):
        pytest.skip(reason)
    check(run(), run("reference"))
    measure(run, op="beam_topk", backend=path, shape=shape_of(name), dtype=torch.float32)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", ["characters", "one utterance"])
def test_beam_topk_with_every_option(measure, name, backend):
    if reason := backends.unavailable("beam_topk", backend):
        pytest.skip(reason)
    logits, scores, finished, lengths = make(*SHAPES[name])
    options = every_option(*SHAPES[name])

    def run(path=backend):
        return beam_topk(logits, scores, finished, eos=EOS, lengths=lengths, backend=path, **options)

    check(run(), run("reference"))
    measure(run, op="beam_topk every option", backend=backend, shape=shape_of(name), dtype=torch.float32)
