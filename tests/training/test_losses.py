"""Losses count real tokens only."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from las_fast.model.las import Output
from las_fast.text import EOS, PAD
from las_fast.training.losses import (
    aligned_attention_loss,
    ctc_loss,
    guided_attention_loss,
    relative_token_times,
    token_loss,
    training_loss,
)

TOKENS = torch.tensor([[5, 6, 7, EOS], [8, EOS, PAD, PAD]])
LENGTHS = torch.tensor([4, 2])


def make_output(seed=0, frames=12):
    torch.manual_seed(seed)
    return Output(
        logits=torch.randn(2, 4, 31),
        weights=torch.rand(2, 4, frames).softmax(-1),
        lengths=torch.tensor([frames, 6]),
        ctc_logits=torch.randn(2, frames, 31),
        ctc_lengths=torch.tensor([frames, 6]),
    )


PLAIN = {"label_smoothing": 0.0, "ctc_weight": 0.0, "guided_weight": 0.0, "guided_width": 0.1}


def test_padding_does_not_contribute_to_any_loss():
    output = make_output()
    changed = output._replace(logits=output.logits.clone(), weights=output.weights.clone())
    changed.logits[1, 2:] = 1e3
    changed.weights[1, 2:] = 1e3
    options = PLAIN | {"label_smoothing": 0.1, "guided_weight": 1.0, "ctc_weight": 1.0}
    assert training_loss(output, TOKENS, LENGTHS, **options)[0] == training_loss(changed, TOKENS, LENGTHS, **options)[0]


def test_the_loss_is_averaged_over_real_tokens():
    output = make_output()
    loss, _ = training_loss(output, TOKENS, LENGTHS, **PLAIN)
    by_hand = [
        F.cross_entropy(output.logits[b, u, EOS:], TOKENS[b, u] - EOS) for b in range(2) for u in range(int(LENGTHS[b]))
    ]
    torch.testing.assert_close(loss, sum(by_hand) / 6)


def test_label_smoothing_covers_only_tokens_that_can_be_emitted():
    logits = torch.zeros(1, 1, 31)
    logits[..., :EOS] = -1e4
    assert token_loss(logits, torch.tensor([[5]]), 0.1).item() == pytest.approx(math.log(29), abs=1e-5)


def test_ctc_reads_characters_without_eos_and_survives_too_few_frames():
    torch.manual_seed(0)
    logits = torch.randn(2, 12, 31)
    expected = sum(
        F.ctc_loss(logits[b].log_softmax(-1), TOKENS[b, :n], torch.tensor(12), torch.tensor(n), PAD, reduction="sum")
        for b, n in ((0, 3), (1, 1))
    )
    torch.testing.assert_close(ctc_loss(logits, torch.tensor([12, 12]), TOKENS, LENGTHS), expected)
    assert ctc_loss(logits[:1, :2], torch.tensor([2]), TOKENS[:1], LENGTHS[:1]) == 0


def test_guided_loss_prefers_the_diagonal_within_each_length():
    diagonal, flat = torch.eye(8)[None], torch.full((1, 8, 8), 1 / 8)
    lengths = torch.tensor([8])
    assert guided_attention_loss(diagonal, lengths, lengths, 0.15) == 0
    assert guided_attention_loss(flat, lengths, lengths, 0.15) > 4
    padded = F.pad(diagonal, (0, 5, 0, 3))
    assert guided_attention_loss(padded, lengths, lengths, 0.15) == 0


def test_the_guided_loss_equals_its_formula():
    torch.manual_seed(3)
    weights, lengths, counts, width = torch.rand(2, 4, 9).softmax(2), [9, 6], [4, 2], 0.17
    expected = sum(
        float(weights[b, u, t]) * (1 - math.exp(-((u / counts[b] - t / lengths[b]) ** 2) / (2 * width**2)))
        for b in range(2) for u in range(counts[b]) for t in range(9)
    )  # fmt: skip
    actual = guided_attention_loss(weights, torch.tensor(lengths), torch.tensor(counts), width)
    assert float(actual) == pytest.approx(expected, rel=1e-5)


def test_the_aligned_attention_loss_equals_its_formula():
    torch.manual_seed(4)
    weights, lengths, counts, window = torch.rand(2, 4, 9).softmax(2), [9, 6], [4, 2], 2.5
    times = torch.rand(2, 4)
    expected = 0.0
    for b, u in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)):
        off = [(float(times[b, u]) * lengths[b] - t) / window for t in range(9)]
        expected -= math.log(sum(float(weights[b, u, t]) * max(0, 1 - off[t] ** 2) for t in range(9)))
    actual = aligned_attention_loss(weights, torch.tensor(lengths), torch.tensor(counts), times, window)
    assert float(actual) == pytest.approx(expected, rel=1e-5)


def test_only_the_total_loss_has_a_gradient():
    tokens = torch.tensor([[3, 4, EOS]])
    logits = torch.randn(1, 3, 31, requires_grad=True)
    output = Output(logits, torch.rand(1, 3, 5, requires_grad=True), torch.tensor([5]), None, None)
    loss, parts = training_loss(output, tokens, torch.tensor([3]), label_smoothing=0.0, ctc_weight=0.0,
                                guided_weight=1.0, guided_width=0.1)  # fmt: skip
    assert set(parts) == {"attention", "guided"} and loss.requires_grad
    assert not any(part.requires_grad for part in parts.values())


def test_parts_are_reported_and_summed_with_their_weights():
    options = PLAIN | {"guided_weight": 2.0, "ctc_weight": 0.5}
    loss, parts = training_loss(make_output(), TOKENS, LENGTHS, **options)
    torch.testing.assert_close(loss, parts["attention"] + 0.5 * parts["ctc"] + 2 * parts["guided"])


def test_an_inner_ctc_head_adds_its_loss_and_gives_the_token_times():
    output = make_output()
    other = make_output(seed=1)
    both = output._replace(inner_ctc=(other.ctc_logits, other.ctc_lengths))
    options = PLAIN | {"guided_weight": 2.0, "ctc_weight": 0.5, "guided_frames": 3.0}
    loss, parts = training_loss(both, TOKENS, LENGTHS, **options)
    _, of_inner = training_loss(output._replace(ctc_logits=other.ctc_logits), TOKENS, LENGTHS, **options)
    _, of_outer = training_loss(output, TOKENS, LENGTHS, **options)
    assert parts["ctc"] == of_outer["ctc"] and parts["inner_ctc"] == of_inner["ctc"]
    assert parts["guided"] == of_inner["guided"] != of_outer["guided"]
    expected = parts["attention"] + 0.5 * parts["ctc"] + 0.5 * parts["inner_ctc"] + 2 * parts["guided"]
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("guided_frames", [0.0, 3.0])
def test_every_part_is_per_token(guided_frames):
    output, count = make_output(), int(LENGTHS.sum())
    options = PLAIN | {"guided_weight": 2.0, "ctc_weight": 0.5, "label_smoothing": 0.1, "guided_frames": guided_frames}
    _, parts = training_loss(output, TOKENS, LENGTHS, **options)
    ctc = ctc_loss(output.ctc_logits, output.ctc_lengths, TOKENS, LENGTHS)
    memory = output.weights, output.lengths, LENGTHS
    if guided_frames:
        times = relative_token_times(output.ctc_logits, output.ctc_lengths, TOKENS, LENGTHS)
        guided = aligned_attention_loss(*memory, times, guided_frames)
    else:
        guided = guided_attention_loss(*memory, 0.1)
    torch.testing.assert_close(parts["attention"], token_loss(output.logits, TOKENS, 0.1) / count)
    torch.testing.assert_close(parts["ctc"], ctc / count)
    torch.testing.assert_close(parts["guided"], guided / count)


def test_the_ctc_loss_of_a_padded_batch_is_the_sum_over_utterances():
    output = make_output()
    alone = [
        F.ctc_loss(
            output.ctc_logits[b, :t].log_softmax(-1),
            TOKENS[b, :n],
            torch.tensor(t),
            torch.tensor(n),
            PAD,
            reduction="sum",
        )
        for b, (t, n) in enumerate(((12, 3), (6, 1)))
    ]
    torch.testing.assert_close(ctc_loss(output.ctc_logits, output.ctc_lengths, TOKENS, LENGTHS), sum(alone))


def test_the_time_of_a_token_is_the_mean_of_its_posterior():
    logits = torch.zeros(2, 6, 31)
    logits[..., PAD] = 20
    logits[0, 1, 5], logits[0, 2, 6], logits[0, 5, 7], logits[1, 2, 8] = 40, 40, 40, 40
    times = relative_token_times(logits, torch.tensor([6, 4]), TOKENS, LENGTHS)
    assert not times.requires_grad
    torch.testing.assert_close(times[0], torch.tensor([1 / 6, 2 / 6, 5 / 6, 1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(times[1, :2], torch.tensor([2 / 4, 1]), atol=1e-4, rtol=0)


def test_token_times_are_averaged_over_all_alignments():
    torch.manual_seed(4)
    logits = 2 * torch.randn(1, 5, 31)
    text = [5, 6]
    times = relative_token_times(logits, torch.tensor([5]), torch.tensor([[*text, EOS]]), torch.tensor([3]))
    # weighted by the number of frames that an alignment gives the character, like a posterior over frames
    log_p, total, sums = logits[0].log_softmax(-1), [0.0, 0.0], [0.0, 0.0]
    for labels in itertools.product([PAD, *text], repeat=5):
        if [c for c, _ in itertools.groupby(labels) if c != PAD] == text:
            p = math.exp(sum(float(log_p[t, c]) for t, c in enumerate(labels)))
            for u, c in enumerate(text):
                total[u] += p * labels.count(c)
                sums[u] += p * sum(t for t, label in enumerate(labels) if label == c)
    expected = torch.tensor([s / n / 5 for s, n in zip(sums, total, strict=True)])
    torch.testing.assert_close(times[0, :2], expected, atol=1e-5, rtol=1e-4)


def test_token_times_ignore_padding_and_fall_back_to_the_diagonal():
    torch.manual_seed(5)
    logits, lengths = torch.randn(3, 9, 31), torch.tensor([9, 5, 2])
    tokens = torch.tensor([[5, 5, 7, EOS], [8, EOS, PAD, PAD], [6, 7, 9, EOS]])
    counts = torch.tensor([4, 2, 4])
    times = relative_token_times(logits, lengths, tokens, counts)
    assert times.isfinite().all()
    alone = relative_token_times(logits[1:2, :5], lengths[1:2], tokens[1:2, :2], counts[1:2])
    torch.testing.assert_close(times[1:2, :2], alone)
    torch.testing.assert_close(times[2], torch.arange(4) / 4)  # three characters in two frames
    assert (times[0].diff() > 0).all()


def test_a_transcript_of_as_many_characters_as_frames_still_has_ctc_times():
    torch.manual_seed(6)
    logits, tokens = torch.randn(1, 3, 31), torch.tensor([[5, 6, 7, EOS]])
    times = relative_token_times(logits, torch.tensor([3]), tokens, torch.tensor([4]))
    torch.testing.assert_close(times, torch.tensor([[0 / 3, 1 / 3, 2 / 3, 1]]))
    diagonal = relative_token_times(logits[:, :2], torch.tensor([2]), tokens, torch.tensor([4]))
    torch.testing.assert_close(diagonal, torch.arange(4)[None] / 4)


def test_attention_at_the_token_times_is_cheap_and_elsewhere_costly():
    times, lengths, counts = torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([10]), torch.tensor([3])
    weights = torch.zeros(1, 3, 10)
    weights[0, 0, 0] = weights[0, 1, 5] = weights[0, 2, 9] = 1
    near = aligned_attention_loss(weights, lengths, counts, times, 2.0)
    assert near == pytest.approx(-math.log(0.75))  # <eos> is expected one frame after the last
    far = aligned_attention_loss(weights.flip(2), lengths, counts, times, 2.0)
    assert far > 90


def test_sharp_wrong_attention_still_gets_a_gradient():
    scores = torch.zeros(1, 1, 10)
    scores[..., 9] = 30.0
    diagonal, aligned = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    lengths, counts = torch.tensor([10]), torch.tensor([1])
    guided_attention_loss(diagonal.softmax(2), lengths, counts, 0.15).backward()
    aligned_attention_loss(aligned.softmax(2), lengths, counts, torch.tensor([[0.2]]), 2.0).backward()
    assert diagonal.grad.abs().max() < 1e-6
    assert aligned.grad[0, 0, 9] > 0.5 and aligned.grad[0, 0, 2] < -0.1


def test_the_prior_along_ctc_trains_the_attention_and_not_the_ctc_head():
    output = make_output()
    for x in output[:2] + output[3:4]:
        x.requires_grad_()
    options = PLAIN | {"guided_weight": 1.0, "guided_frames": 2.0}
    loss, parts = training_loss(output, TOKENS, LENGTHS, **options)
    loss.backward()
    assert output.weights.grad.abs().sum() > 0 and output.ctc_logits.grad is None
    assert parts["guided"] != training_loss(output, TOKENS, LENGTHS, **PLAIN | {"guided_weight": 1.0})[1]["guided"]
