"""Benchmark ngram_scores, one step of an n-gram model in mid-search, against a look-up in a dense table."""

import pytest
import torch

from las_fast.lm import train
from las_fast.ops import backends, ngram_scores
from las_fast.text import CHARACTERS

SHAPES = {"batch": (16, 8, 5), "one utterance": (1, 8, 5), "short contexts": (16, 8, 3), "long contexts": (16, 8, 10)}


def make(B, K, order):
    """Return a model of random words, and states, parents and tokens of a step."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(0, len(CHARACTERS), (2000, 8), generator=generator)
    words = ["".join(CHARACTERS[i] for i in word) for word in letters.tolist()]
    chosen = torch.randint(0, len(words), (500, 6), generator=generator)
    model = train([" ".join(words[i] for i in line) for line in chosen.tolist()], order=order).automaton()
    states = torch.randint(0, len(model.rows), (B, K), generator=generator)
    tokens = torch.randint(3, model.vocabulary_size, (B, K), generator=generator)
    return model, states, torch.randint(0, K, (B, K), generator=generator), tokens


def dense(model):
    """Return the next states and the log-probabilities of every state, (S, V) each: the fastest plain look-up."""
    S, V = len(model.rows), model.vocabulary_size
    every_state = torch.arange(S)[:, None].expand(S, V).contiguous()
    every_token = torch.arange(V).expand(S, V).contiguous()  # and the parents: each beam continues itself
    following = ngram_scores(model, every_state, parents=every_token, tokens=every_token).states
    return following, ngram_scores(model, torch.arange(S)[:, None]).log_probs[:, 0]


@pytest.mark.parametrize("path", ["reference", "cpp", "dense table"])
@pytest.mark.parametrize("name", SHAPES)
def test_ngram_scores(measure, name, path):
    if path in backends.BACKENDS and (reason := backends.unavailable("ngram_scores", path)):
        pytest.skip(reason)
    model, states, parents, tokens = make(*SHAPES[name])
    following, log_probs = dense(model) if path == "dense table" else (None, None)

    def run(backend=path):
        if backend == "dense table":
            after = following[states.gather(1, parents), tokens]
            return after, log_probs[after]
        return ngram_scores(model, states, parents=parents, tokens=tokens, backend=backend)

    for actual, expected in zip(run(), run("reference"), strict=True):
        assert torch.equal(actual, expected)
    shape = " ".join(f"{letter}{size}" for letter, size in zip(("B", "K", "order "), SHAPES[name], strict=True))
    measure(run, op="ngram_scores", backend=path, shape=shape, dtype=torch.float32)
