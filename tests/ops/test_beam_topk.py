import math

import pytest
import torch

from las_fast.ops import beam_topk

EOS = 2
INF = torch.inf


def step(logits, scores=None, finished=None, lengths=None, **options):
    logits = torch.as_tensor(logits)
    B, K, _ = logits.shape
    scores = torch.zeros(B, K) if scores is None else torch.as_tensor(scores)
    finished = torch.zeros(B, K, dtype=torch.bool) if finished is None else torch.as_tensor(finished)
    lengths = torch.zeros(B, K, dtype=torch.int64) if lengths is None else torch.as_tensor(lengths)
    return beam_topk(logits, scores, finished, eos=EOS, lengths=lengths, **options)


def random(B=3, K=4, V=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, K, V, generator=generator), -torch.rand(B, K, generator=generator) * 3


def plain(logits, scores, finished, lengths, penalty=0.0):
    """Every candidate of one utterance, written out; returns (score, token, parent), best first."""
    K, V = logits.shape
    found = []
    for k in range(K):
        steps = logits[k].double().log_softmax(0)
        for v in range(V):
            if finished[k]:
                total, tokens = (float(scores[k]) if v == EOS else -math.inf), int(lengths[k])
            else:
                total, tokens = float(scores[k]) + float(steps[v]), int(lengths[k]) + 1
            found.append((total / max(1, tokens) ** penalty, -(k * V + v), total, v, k))
    found.sort(reverse=True)
    return [(total, v, k) for _, _, total, v, k in found[:K]]


@pytest.mark.parametrize(("B", "K", "V"), [(1, 1, 3), (3, 4, 7), (2, 8, 31), (2, 5, 257)])
@pytest.mark.parametrize("penalty", [0.0, 0.8])
def test_it_takes_the_best_of_all_candidates(B, K, V, penalty):
    logits, scores = random(B, K, V)
    finished = torch.arange(B * K).view(B, K) % 3 == 1
    lengths = torch.arange(B * K).view(B, K) % 5 + 1
    found, tokens, parents = step(logits, scores, finished, lengths, length_penalty=penalty)
    for b in range(B):
        expected = plain(logits[b], scores[b], finished[b], lengths[b], penalty)
        assert found[b].tolist() == pytest.approx([row[0] for row in expected], abs=1e-5)
        alive = [i for i, row in enumerate(expected) if row[0] > -math.inf]
        assert [int(tokens[b, i]) for i in alive] == [expected[i][1] for i in alive]
        assert [int(parents[b, i]) for i in alive] == [expected[i][2] for i in alive]


def test_equal_scores_keep_lower_index():
    _, tokens, parents = step(torch.zeros(1, 3, 4))
    assert tokens.tolist() == [[0, 1, 2]] and parents.tolist() == [[0, 0, 0]]


def test_a_finished_beam_continues_only_with_eos_at_an_unchanged_score():
    scores, tokens, parents = step(torch.zeros(1, 2, 5), [[-0.5, -9.0]], [[True, False]])
    assert (scores[0, 0], tokens[0, 0], parents[0, 0]) == (-0.5, EOS, 0)
    assert parents[0, 1] == 1


def test_all_beams_finished_stay_as_they_are():
    scores, tokens, parents = step(torch.randn(1, 3, 5), [[-1.0, -2.0, -3.0]], [[True] * 3], [[2, 3, 4]])
    assert scores.tolist() == [[-1.0, -2.0, -3.0]] and (tokens == EOS).all() and parents.tolist() == [[0, 1, 2]]


def test_at_the_start_only_the_first_beam_lives():
    scores, tokens, parents = step(torch.randn(2, 4, 9), [[0.0, -INF, -INF, -INF]] * 2)
    assert (parents == 0).all() and scores.isfinite().all()
    assert all(len(set(row)) == 4 for row in tokens.tolist())


def test_more_beams_than_alternatives_fill_up_with_minus_infinity():
    scores, _, _ = step(torch.zeros(1, 5, 3), [[0.0, -INF, -INF, -INF, -INF]])
    assert scores[0, :3].isfinite().all() and (scores[0, 3:] == -INF).all() and not scores.isnan().any()


@pytest.mark.parametrize("options", [{}, {"eos_threshold": 0.3}, {"length_penalty": 1.0}])
def test_rows_of_minus_infinity_never_yield_nan(options):
    logits = torch.full((2, 3, 5), -INF)
    logits[1, 1] = torch.tensor([0.0, -INF, -INF, -INF, -INF])
    scores, tokens, parents = step(logits, [[-INF] * 3, [-INF, -1.0, -2.0]], **options)
    assert not scores.isnan().any() and (scores[0] == -INF).all()
    assert (scores[1, 0], tokens[1, 0], parents[1, 0]) == (-1.0, 0, 1)
    assert ((tokens >= 0) & (tokens < 5) & (parents >= 0) & (parents < 3)).all()


def test_eos_may_come_too_early():
    logits = torch.zeros(2, 2, 4)
    logits[..., EOS] = 9.0
    _, tokens, _ = step(logits, allow_eos=torch.tensor([False, True]))
    assert (tokens[0] != EOS).all() and (tokens[1, 0] == EOS).all()


def test_forced_eos_is_all_there_is_and_costs_its_probability():
    logits, scores = random(2, 3, 6)
    found, tokens, parents = step(
        logits, scores, force_eos=torch.tensor([True, False]), allow_eos=torch.tensor([False, True]), eos_threshold=0.1
    )
    expected = (scores[0] + logits[0].log_softmax(-1)[:, EOS]).sort(descending=True)
    assert (tokens[0] == EOS).all() and parents[0].tolist() == expected.indices.tolist()
    torch.testing.assert_close(found[0], expected.values)


def test_a_forced_end_leaves_finished_beams_alone():
    scores, tokens, _ = step(
        torch.randn(1, 2, 5), [[-1.0, -2.0]], [[True, True]], [[2, 2]], force_eos=torch.tensor([True])
    )
    assert scores.tolist() == [[-1.0, -2.0]] and (tokens == EOS).all()


def test_the_threshold_compares_eos_with_the_best_other_token():
    logits = torch.tensor([[[0.5, 0.2, 0.3]]]).log()  # eos 0.3, best other 0.5
    ratio = math.log(0.3) / math.log(0.5)
    _, kept, _ = step(logits.expand(1, 3, 3), [[0.0, -INF, -INF]], eos_threshold=ratio * 1.01)
    scores, _, _ = step(logits.expand(1, 3, 3), [[0.0, -INF, -INF]], eos_threshold=ratio * 0.99)
    assert EOS in kept[0].tolist() and (scores[0] > -INF).sum() == 2


def test_length_normalisation_ranks_long_beams_higher_but_returns_true_scores():
    options = {"finished": [[True, True]], "lengths": [[2, 10]]}
    assert step(torch.zeros(1, 2, 4), [[-2.0, -5.0]], **options)[2].tolist() == [[0, 1]]
    scores, _, parents = step(torch.zeros(1, 2, 4), [[-2.0, -5.0]], **options, length_penalty=1.0)
    assert parents.tolist() == [[1, 0]] and scores.tolist() == [[-5.0, -2.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits, scores = random()
    low = logits.to(dtype)
    for a, b in zip(step(low, scores), step(low.float(), scores), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 4)}, r"logits must be \(B, K, V\)"),
        ({"scores": torch.zeros(2, 2)}, r"scores must be \(2, 3\) torch.float32 like logits; got \(2, 2\)"),
        ({"finished": torch.zeros(2, 3)}, r"finished must be \(2, 3\) torch.bool like logits; got .* torch.float32"),
        ({"lengths": torch.zeros(2, 3)}, r"lengths must be \(2, 3\) torch.int64"),
        ({"allow_eos": torch.ones(3, dtype=torch.bool)}, r"allow_eos must be \(2,\) torch.bool"),
        ({"scores": torch.zeros(2, 3, device="meta")}, "scores must be on cpu like logits; got meta"),
        ({"eos": 5}, "eos must be a token from 0 to 4; got 5"),
    ],
)
def test_disagreeing_arguments_are_explained(change, message):
    good = {
        "logits": torch.zeros(2, 3, 5),
        "scores": torch.zeros(2, 3),
        "finished": torch.zeros(2, 3, dtype=torch.bool),
        "lengths": torch.zeros(2, 3, dtype=torch.int64),
        "eos": EOS,
    }
    with pytest.raises(ValueError, match=message):
        beam_topk(**{**good, **change})
