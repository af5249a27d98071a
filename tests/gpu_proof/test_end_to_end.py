"""Beam search and training on real speech, with the compiled PTX of every Triton kernel executed on the CPU."""

import functools
from collections import Counter
from pathlib import Path

import pytest
from toy_model import ToyModel, all_texts, memory

from gpu_proof.end_to_end import decode, executed_decode, executed_small_search, executed_training, train
from gpu_proof.process import compiled

ARCHIVE = Path(__file__).resolve().parents[2] / ".." / "shared" / "an4" / "hw4p2_student_data"


@pytest.fixture
def archive():
    """The AN4 development set: 104 utterances."""
    if not ARCHIVE.is_dir():
        pytest.skip("../shared/an4 is absent")
    return ARCHIVE


def assert_same(actual, expected):
    """The same hypotheses in the same order, with scores that differ by rounding only."""
    assert [name for name, _ in actual] == [name for name, _ in expected]
    for (name, best), (_, expected_best) in zip(actual, expected, strict=True):
        tokens, scores, frames = zip(*best, strict=True)
        expected_tokens, expected_scores, expected_frames = zip(*expected_best, strict=True)
        assert tokens == expected_tokens, name
        assert scores == pytest.approx(expected_scores, abs=1e-4), name
        assert frames == expected_frames, name


@pytest.mark.work(call=lambda: compiled(executed_decode, ARCHIVE, 90, 3))
def test_executed_ptx_decodes_three_utterances_as_the_reference_does(archive, result):
    decoded, launches = result()
    assert_same(decoded, decode(archive, "reference", 3))
    assert len(decoded) == 3 and all(best[0][0] for _, best in decoded)
    counts = Counter(launches)
    assert counts["backtrack_kernel"] == 1
    assert counts["forward_kernel"] == counts["topk_kernel"] == counts["gather_kernel"] >= 16


@pytest.mark.work(call=lambda: compiled(executed_decode, ARCHIVE, 90))
def test_all_backends_decode_every_development_utterance_alike(archive, result):
    expected = decode(archive, "reference")
    assert len(expected) == 104
    assert_same(decode(archive, "cpp"), expected)
    assert_same(result()[0], expected)


@pytest.mark.work(call=lambda seed: compiled(functools.partial(executed_small_search, beam=64), 90, seed))
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_on_executed_ptx_equals_brute_force(seed, result):
    expected = all_texts(ToyModel(), memory([seed], [4]), 4, 0.0)[:5]
    best = result()
    assert [tokens for tokens, _ in best] == [text for _, _, text in expected]
    assert [score for _, score in best] == pytest.approx([score for _, score, _ in expected], abs=1e-4)


@pytest.mark.work(call=lambda: compiled(executed_training, ARCHIVE, 90, 50))
def test_training_by_executed_ptx_follows_the_reference(archive, result):
    losses, gradients, launches = result()
    expected_losses, expected = train(archive, "reference", 50)
    assert len(losses) == 50 and losses == pytest.approx(expected_losses, abs=1e-4)
    for name, gradient in gradients.items():
        assert float((gradient - expected[name]).norm()) <= 1e-4 * float(expected[name].norm()) + 1e-7, name
    counts = Counter(launches)
    assert counts["cell_kernel"] == counts["cell_gradient_kernel"] == 2 * counts["attend_kernel"]
    assert counts["attend_kernel"] == counts["choose_kernel"] == counts["attend_gradient_kernel"]
    assert counts["attend_kernel"] == counts["input_gradient_kernel"]
