"""Searches with bfloat16 matmuls by steps: on a CPU, which multiplies the same bfloat16 numbers in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from an4_small import load_an4_small

from las_fast.config import ListenerConfig, ModelConfig, SpellerConfig
from las_fast.data.batch import make_loader
from las_fast.data.batch_plan import sorted_batches
from las_fast.model.las import LAS
from las_fast.search.beam import beam_search
from las_fast.search.bf16 import Bf16Steps

B, K, V = 3, 4, 9


def make_model(lstm_sizes: tuple[int, ...]) -> LAS:
    """A model whose weights are bfloat16 numbers, large enough that every one matters."""
    torch.manual_seed(0)
    speller = SpellerConfig(key_size=7, value_size=5, embedding_size=6, lstm_sizes=lstm_sizes)
    model = LAS(ModelConfig(ListenerConfig((8,), (3,), (2,), 6, 1), speller), input_size=4, vocabulary_size=V).eval()
    with torch.no_grad():
        for parameter in model.speller.parameters():
            parameter.copy_(torch.randn_like(parameter).mul(0.5).bfloat16())
    return model


@pytest.mark.parametrize("lstm_sizes", [(8,), (8, 9), (8, 9, 10)], ids=str)
@torch.inference_mode()
def test_a_step_is_that_of_the_model_with_rounded_states(lstm_sizes):
    model = make_model(lstm_sizes)
    memory = model.listen(torch.randn(B, 40, 4), torch.tensor([40, 30, 7]))
    memory = memory._replace(keys=memory.keys.bfloat16(), values=memory.values.bfloat16())
    exact = memory._replace(keys=memory.keys.float(), values=memory.values.float())
    half = Bf16Steps(model)
    state, expected = half.start(memory, K), model.start(exact, K)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        tokens, parents = (
            torch.randint(0, V, (B, K), generator=generator),
            torch.randint(0, K, (B, K), generator=generator),
        )
        logits, read, state = half.step(tokens, state, memory, weights=True)
        wanted, wanted_read, expected = model.step(tokens, expected, exact, weights=True)
        torch.testing.assert_close(logits[..., 3:], wanted[..., 3:], atol=0.05, rtol=0.02)
        torch.testing.assert_close(read.weights, wanted_read.weights, atol=0.03, rtol=0)
        state, expected = state.gather(parents), expected.gather(parents)


@torch.inference_mode()
def test_matmuls_are_in_bfloat16_and_all_else_in_float32():
    model = make_model((8, 9))
    memory = model.listen(torch.randn(B, 40, 4), torch.tensor([40, 30, 7]))
    half = Bf16Steps(model)
    memory = memory._replace(keys=memory.keys.bfloat16(), values=memory.values.bfloat16())
    before = half.start(memory, K)
    logits, read, after = half.step(torch.full((B, K), 3), before, memory, weights=True)
    assert {x.dtype for x in (logits, read.weights, *after.cell, after.weights.token_gates)} == {torch.float32}
    matrices = (after.joined, after.weights.recurrent, *after.weights.below, after.weights.query, after.weights.project)
    assert {x.dtype for x in (*matrices, after.weights.embedding)} == {torch.bfloat16}
    assert not before.joined.any(), "a step changed the state before it"


def test_a_trained_model_spells_the_same_in_bfloat16(shared):
    archive = shared / "an4" / "hw4p2_student_data"
    if not archive.is_dir():
        pytest.skip("../shared/an4 is absent")
    loaded, dev = load_an4_small(archive)
    batches = sorted_batches(dev.frame_counts, frames_per_batch=10000, utterances_per_batch=32)
    batch = next(iter(make_loader(dev, batches, loaded.vocabulary, augment=None, seed=0, epoch=0, workers=0)))
    with torch.inference_mode():
        encoded = loaded.model.listen(batch.features, batch.feature_lengths)
    settings = replace(loaded.config.decoding, beam=4, ctc_weight=0.3)
    actual, expected = (
        beam_search(loaded.model, encoded, replace(settings, precision=precision), capture=False)
        for precision in ("bf16", "fp32")
    )
    assert actual != expected and len(actual) > 8
    for (ours, *_), (theirs, *_) in zip(actual, expected, strict=True):
        assert ours.text_tokens == theirs.text_tokens
        assert ours.score == pytest.approx(theirs.score, abs=0.1)
