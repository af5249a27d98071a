"""Losses count real tokens only."""

import math

import pytest
import torch
from torch.nn import functional as F

from las_fast.losses import ctc_loss, guided_attention_loss, token_loss, training_loss
from las_fast.model import Output
from las_fast.text import EOS, PAD

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


def test_padding_adds_nothing_to_any_loss():
    output = make_output()
    changed = output._replace(logits=output.logits.clone(), weights=output.weights.clone())
    changed.logits[1, 2:] = 1e3
    changed.weights[1, 2:] = 1e3
    options = PLAIN | {"label_smoothing": 0.1, "guided_weight": 1.0, "ctc_weight": 1.0}
    assert training_loss(output, TOKENS, LENGTHS, **options)[0] == training_loss(changed, TOKENS, LENGTHS, **options)[0]


def test_loss_is_per_token_and_not_per_utterance_or_padded_cell():
    output = make_output()
    loss, _ = training_loss(output, TOKENS, LENGTHS, **PLAIN)
    by_hand = [
        F.cross_entropy(output.logits[b, u, EOS:], TOKENS[b, u] - EOS) for b in range(2) for u in range(int(LENGTHS[b]))
    ]
    torch.testing.assert_close(loss, sum(by_hand) / 6)


def test_label_smoothing_spreads_over_spelled_tokens_only():
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


def test_parts_are_reported_and_summed_with_their_weights():
    options = PLAIN | {"guided_weight": 2.0, "ctc_weight": 0.5}
    loss, parts = training_loss(make_output(), TOKENS, LENGTHS, **options)
    torch.testing.assert_close(loss, parts["attention"] + 0.5 * parts["ctc"] + 2 * parts["guided"])
