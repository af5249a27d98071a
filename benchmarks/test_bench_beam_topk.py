"""One pruning step of beam search: the reference against the few calls that a plain search makes."""

import pytest
import torch

from las_fast.ops import beam_topk

EOS = 2
SHAPES = {"characters": (16, 8, 31), "one utterance": (1, 8, 31), "word pieces": (16, 8, 5000)}


def make(B, K, V):
    generator = torch.Generator().manual_seed(0)
    logits, scores = torch.randn(B, K, V, generator=generator), -torch.rand(B, K, generator=generator)
    finished = torch.rand(B, K, generator=generator) < 0.2
    return logits, scores, finished, torch.full((B, K), 5)


def plain(logits, scores, finished):
    """Log-softmax, mask, torch.topk: no end rules, no order among ties."""
    frozen = torch.full((logits.shape[2],), -torch.inf)
    frozen[EOS] = 0.0
    steps = torch.where(finished[..., None], frozen, logits.log_softmax(-1))
    best = (scores[..., None] + steps).flatten(1).topk(scores.shape[1])
    return best.values, best.indices % logits.shape[2], best.indices // logits.shape[2]


@pytest.mark.parametrize("path", ["reference", "plain torch.topk"])
@pytest.mark.parametrize("name", SHAPES)
def test_beam_topk(measure, name, path):
    logits, scores, finished, lengths = make(*SHAPES[name])
    paths = {
        "reference": lambda: beam_topk(logits, scores, finished, eos=EOS, lengths=lengths, backend="reference"),
        "plain torch.topk": lambda: plain(logits, scores, finished),
    }
    found, expected = paths[path](), paths["reference"]()
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])
    shape = " ".join(f"{letter}{size}" for letter, size in zip("BKV", SHAPES[name], strict=True))
    measure(paths[path], op="beam_topk", backend=path, shape=shape, dtype=torch.float32)
