"""Beam search and training on real speech in which every Triton kernel is the execution of its compiled PTX."""

import functools
from collections import Counter

import pytest
from toy_model import ToyModel, all_texts, memory

from gpu_proof.end_to_end import decode, executed_decode, executed_small_search, executed_training, trained
from gpu_proof.process import compiled


@pytest.fixture
def archive(shared):
    """The AN4 development set: 104 utterances."""
    path = shared / "an4" / "hw4p2_student_data"
    if not path.is_dir():
        pytest.skip("../shared/an4 is absent")
    return path


def assert_same(found, expected):
    """The same hypotheses in the same order, of scores that differ by rounding alone."""
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, ours), (_, theirs) in zip(found, expected, strict=True):
        assert [tokens for tokens, _, _ in ours] == [tokens for tokens, _, _ in theirs], name
        assert [score for _, score, _ in ours] == pytest.approx([score for _, score, _ in theirs], abs=1e-4), name
        assert [frames for _, _, frames in ours] == [frames for _, _, frames in theirs], name


def test_three_utterances_decoded_by_executed_ptx_come_out_as_by_the_reference(archive):
    found, launches = compiled(executed_decode, archive, 90, 3)
    assert_same(found, decode(archive, "reference", 3))
    assert len(found) == 3 and all(several[0][0] for _, several in found)
    times = Counter(launches)
    assert times["backtrack_kernel"] == 1
    assert times["forward_kernel"] == times["topk_kernel"] == times["gather_kernel"] >= 16


def test_every_dev_utterance_comes_out_the_same_on_all_three_backends(archive):
    expected = decode(archive, "reference")
    assert len(expected) == 104
    assert_same(decode(archive, "cpp"), expected)
    assert_same(compiled(executed_decode, archive, 90)[0], expected)


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_of_executed_ptx_finds_what_brute_force_finds(seed):
    expected = all_texts(ToyModel(), memory([seed], [4]), 4, 0.0)[:5]
    found = compiled(functools.partial(executed_small_search, beam=64), 90, seed)
    assert [tokens for tokens, _ in found] == [text for _, _, text in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score, _ in expected], abs=1e-4)


def test_training_by_executed_ptx_follows_the_reference(archive):
    losses, gradients, launches = compiled(executed_training, archive, 90, 50)
    expected, right = trained(archive, "reference", 50)
    assert len(losses) == 50 and losses == pytest.approx(expected, abs=1e-4)
    for name, gradient in gradients.items():
        assert float((gradient - right[name]).norm()) <= 1e-4 * float(right[name].norm()) + 1e-7, name
    times = Counter(launches)
    assert times["cell_kernel"] == times["cell_gradient_kernel"] == 2 * times["attend_kernel"]
    assert times["attend_kernel"] == times["choose_kernel"] == times["attend_gradient_kernel"]
    assert times["attend_kernel"] == times["input_gradient_kernel"]
