import math

import pytest
import torch
from calls import call, compile_and_count, ops_called, threads

from las_fast.ops import Ctc, Ngram, beam_topk

EOS = 2
INF, NAN = torch.inf, torch.nan
SHAPES = [(1, 1, 1), (1, 1, 3), (3, 4, 7), (2, 8, 31), (2, 5, 63), (2, 3, 64), (2, 9, 65), (3, 2, 257), (1, 64, 31)]


def step(logits, scores=None, finished=None, lengths=None, *, backend, eos=EOS, **options):
    logits = torch.as_tensor(logits)
    B, K, _ = logits.shape
    scores = torch.zeros(B, K) if scores is None else torch.as_tensor(scores)
    finished = torch.zeros(B, K, dtype=torch.bool) if finished is None else torch.as_tensor(finished)
    lengths = torch.zeros(B, K, dtype=torch.int64) if lengths is None else torch.as_tensor(lengths)
    return call(beam_topk, logits, scores, finished, eos=eos, lengths=lengths, backend=backend, **options)


def random(B=3, K=4, V=7, seed=0):
    """Logits, scores, finished flags and lengths in the middle of a search."""
    generator = torch.Generator().manual_seed(seed)
    logits, scores = 3 * torch.randn(B, K, V, generator=generator), -torch.rand(B, K, generator=generator) * 3
    finished = torch.rand(B, K, generator=generator) < 0.3
    return logits, scores, finished, torch.randint(0, 9, (B, K), generator=generator)


def ngram(B, K, V, seed=0, weight=0.4):
    return Ngram(torch.randn(B, K, V, generator=torch.Generator().manual_seed(seed)).log_softmax(-1), weight)


def ctc(B, K, V, seed=0, weight=0.3):
    generator = torch.Generator().manual_seed(seed)
    next_log_probs = torch.randn(B, K, V, generator=generator).log_softmax(-1)
    return Ctc(next_log_probs.masked_fill(torch.rand(B, K, V, generator=generator) < 0.1, -INF), weight)


OPTIONS = {
    "plain": [],
    "length penalty 0.7": ["length_penalty"],
    "eos threshold": ["eos_threshold"],
    "minimum": ["minimum"],
    "maximum": ["maximum"],
    "both limits": ["minimum", "maximum"],
    "coverage": ["coverage"],
    "n-gram": ["ngram"],
    "ctc": ["ctc"],
    "beam threshold": ["beam_threshold"],
    "beam threshold and length penalty": ["beam_threshold", "length_penalty"],
    "all": ["length_penalty", "eos_threshold", "minimum", "maximum", "coverage", "ngram", "ctc", "beam_threshold"],
}


def options_for(name, B, K, V):
    generator = torch.Generator().manual_seed(1)
    make = {
        "length_penalty": lambda: 0.7,
        "eos_threshold": lambda: 1.2,
        "minimum": lambda: torch.arange(B) % 6 + 2,
        "maximum": lambda: torch.arange(B) % 6 + 3,
        "coverage": lambda: torch.randn(B, K, generator=generator),
        "ngram": lambda: ngram(B, K, V),
        "ctc": lambda: ctc(B, K, V),
        "beam_threshold": lambda: 1.0,
    }
    return {option: make[option]() for option in OPTIONS[name]}


def plain(logits, scores, finished, lengths, b, *, eos, minimum=None, maximum=None, length_penalty=0.0,
          eos_threshold=0.0, coverage=None, ngram=None, ctc=None, beam_threshold=INF):  # fmt: skip
    """All candidates (score, token, parent) of utterance b, best first, computed in float64."""
    candidates = []
    for k, row in enumerate(logits[b].double()):
        steps, tokens = row.log_softmax(0).tolist(), int(lengths[b, k]) + 1
        forced = maximum is not None and lengths[b, k] >= maximum[b]
        others = [x for v, x in enumerate(steps) if v != eos]
        early = minimum is not None and lengths[b, k] < minimum[b]
        unlikely = eos_threshold != 0 and steps[eos] <= eos_threshold * max(others, default=-math.inf)
        for v, total in enumerate(steps):
            if forced and v != eos or v == eos and not forced and (early or unlikely):
                total = -math.inf
            if ctc is not None and total > -math.inf:
                total = (1 - ctc.weight) * total + ctc.weight * float(ctc.next_log_probs[b, k, v])
            if ngram is not None:
                total += ngram.weight * float(ngram.log_probs[b, k, v])
            if finished[b, k]:
                total, tokens = 0.0 if v == eos else -math.inf, int(lengths[b, k])
            total += float(scores[b, k])
            bonus = 0.0 if coverage is None else float(coverage[b, k])
            rank = total / max(1, tokens) ** length_penalty + bonus
            candidates.append((rank, -(k * logits.shape[2] + v), total, v, k))
    candidates.sort(reverse=True)
    for i, (rank, index, _, v, k) in enumerate(candidates):
        tokens, live = int(lengths[b, k]) + 1, not finished[b, k] and v != eos
        if live and rank > -INF and (candidates[0][0] - rank) * tokens**length_penalty > beam_threshold:
            candidates[i] = (rank, index, -INF, v, k)
    return [(total, v, k) for _, _, total, v, k in candidates]


def assert_same(actual, expected):
    """Scores equal up to rounding, everything else exactly."""
    torch.testing.assert_close(actual.scores, expected.scores, atol=1e-5, rtol=1e-5)
    for name, a, b in zip(actual._fields[1:], actual[1:], expected[1:], strict=True):
        assert a is b is None or torch.equal(a, b), name


@pytest.mark.parametrize(("B", "K", "V"), SHAPES[:5])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_best_of_all_candidates_are_taken(backend, B, K, V, name):
    inputs, options, eos = random(B, K, V), options_for(name, B, K, V), min(EOS, V - 1)
    actual = step(*inputs, backend=backend, eos=eos, **options)
    _, _, finished, lengths = inputs
    for b in range(B):
        for k, (total, token, parent) in enumerate(plain(*inputs, b, eos=eos, **options)[:K]):
            assert float(actual.scores[b, k]) == pytest.approx(total, abs=1e-5)
            assert (int(actual.tokens[b, k]), int(actual.parents[b, k])) == (token, parent)
            assert bool(actual.finished[b, k]) == bool(finished[b, parent] or token == eos)
            assert int(actual.lengths[b, k]) == int(lengths[b, parent]) + (not finished[b, parent])


@pytest.mark.parametrize(("B", "K", "V"), SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_indices_equal_the_reference(backend, B, K, V, name):
    options, eos = options_for(name, B, K, V), min(EOS, V - 1)
    for seed in range(5):
        inputs = random(B, K, V, seed)
        assert_same(
            step(*inputs, backend=backend, eos=eos, **options), step(*inputs, backend="reference", eos=eos, **options)
        )


@pytest.mark.parametrize("name", ["plain", "both limits", "length penalty 0.7"])
def test_a_large_vocabulary_is_searched_to_the_end(backend, name):
    B, K, V = 2, 8, 32000
    logits, *others = random(B, K, V)
    options = options_for(name, B, K, V)
    for inputs in ((logits, *others), (logits.sort(-1).values, *others), (logits.round(), *others)):
        assert_same(step(*inputs, backend=backend, **options), step(*inputs, backend="reference", **options))


@pytest.mark.parametrize("V", [63, 64, 65, 130])
def test_the_best_token_is_found_at_any_index(backend, V):
    for v in range(V):
        logits = torch.zeros(1, 2, V)
        logits[0, 1, v] = 5.0
        actual = step(logits, backend=backend)
        assert (int(actual.tokens[0, 0]), int(actual.parents[0, 0])) == (v, 1)


@pytest.mark.parametrize(("K", "V"), [(3, 4), (8, 31), (5, 200), (70, 130)])
def test_equal_scores_keep_lower_index(backend, K, V):
    actual = step(torch.zeros(1, K, V), backend=backend)
    assert actual.tokens.tolist() == [[i % V for i in range(K)]]
    assert actual.parents.tolist() == [[i // V for i in range(K)]]


def test_equal_scores_of_different_beams_keep_the_lower_beam(backend):
    logits = torch.zeros(1, 3, 5)
    logits[..., 3] = 4.0
    actual = step(logits, backend=backend)
    assert actual.tokens.tolist() == [[3, 3, 3]] and actual.parents.tolist() == [[0, 1, 2]]


def test_a_finished_beam_continues_only_with_eos_at_an_unchanged_score(backend):
    actual = step(torch.zeros(1, 2, 5), [[-0.5, -9.0]], [[True, False]], [[3, 4]], backend=backend)
    assert (actual.scores[0, 0], actual.tokens[0, 0], actual.parents[0, 0]) == (-0.5, EOS, 0)
    assert actual.parents[0, 1] == 1 and actual.lengths.tolist() == [[3, 5]]
    assert actual.finished.tolist() == [[True, False]]


def test_all_beams_finished_stay_as_they_are(backend):
    logits = torch.full((1, 3, 5), NAN)
    actual = step(logits, [[-1.0, -2.0, -3.0]], [[True] * 3], [[2, 3, 4]], backend=backend)
    assert actual.scores.tolist() == [[-1.0, -2.0, -3.0]] and (actual.tokens == EOS).all() and actual.finished.all()
    assert actual.parents.tolist() == [[0, 1, 2]] and actual.lengths.tolist() == [[2, 3, 4]]


def test_taking_eos_finishes_a_beam(backend):
    logits = torch.zeros(1, 2, 5)
    logits[..., EOS] = 9.0
    actual = step(logits, lengths=[[4, 6]], backend=backend)
    assert actual.finished.all() and actual.lengths.tolist() == [[5, 7]]


def test_at_the_start_only_the_first_beam_continues(backend):
    actual = step(random(2, 4, 9)[0], [[0.0, -INF, -INF, -INF]] * 2, backend=backend)
    assert (actual.parents == 0).all() and actual.scores.isfinite().all()
    assert all(len(set(row)) == 4 for row in actual.tokens.tolist())


def test_missing_candidates_are_filled_with_the_lowest_unused_indices(backend):
    logits = torch.tensor([0.0, 3.0, -INF]).expand(1, 5, 3)
    actual = step(logits, [[-INF, -1.0, -INF, -INF, -INF]], backend=backend)
    assert actual.scores[0, :2].isfinite().all() and (actual.scores[0, 2:] == -INF).all()
    assert (actual.parents * 3 + actual.tokens).tolist() == [[4, 3, 0, 1, 2]]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("K", [2, 9, 40])
def test_filled_candidates_equal_the_reference(backend, name, K):
    logits, scores, finished, lengths = random(6, K, 5)
    options = options_for(name, 6, K, 5)
    scores[:4, 1:] = -INF
    logits[1, :, 1:4] = -INF
    logits[2] = -INF
    logits[3] = NAN
    logits[5, 0, 3] = NAN
    finished[4] = True
    inputs = logits, scores, finished, lengths
    assert_same(step(*inputs, backend=backend, **options), step(*inputs, backend="reference", **options))


@pytest.mark.parametrize("options", [{}, {"eos_threshold": 0.3}, {"eos_threshold": -1.0}, {"length_penalty": 1.0}])
def test_rows_of_minus_infinity_never_yield_nan(backend, options):
    logits = torch.full((2, 3, 5), -INF)
    logits[1, 1] = torch.tensor([0.0, -INF, -INF, -INF, -INF])
    actual = step(logits, [[-INF] * 3, [-INF, -1.0, -2.0]], backend=backend, **options)
    assert not actual.scores.isnan().any() and (actual.scores[0] == -INF).all()
    assert (actual.scores[1, 0], actual.tokens[1, 0], actual.parents[1, 0]) == (-1.0, 0, 1)
    assert ((actual.tokens >= 0) & (actual.tokens < 5) & (actual.parents >= 0) & (actual.parents < 3)).all()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("v", [0, 63, 64, 100, 129])
def test_a_row_with_nan_or_infinity_has_no_continuation(backend, bad, v):
    logits = torch.randn(1, 2, 130, generator=torch.Generator().manual_seed(0))
    logits[0, 0, v] = bad
    actual = step(logits, backend=backend)
    assert (actual.parents == 1).all() and actual.scores.isfinite().all()


def test_huge_logits_do_not_overflow(backend):
    logits = torch.tensor([[[3e38, -3e38, 0.0, 2.9e38]]])
    assert step(logits, backend=backend).scores.tolist() == [[0.0]]


def test_a_vocabulary_of_one_token_works(backend):
    actual = step(torch.zeros(2, 1, 1), eos=0, backend=backend)
    assert (actual.tokens == 0).all() and actual.finished.all()


@pytest.mark.parametrize(("B", "K"), [(0, 3), (2, 0)])
def test_empty_inputs_give_empty_results(backend, B, K):
    actual = step(torch.zeros(B, K, 5), backend=backend)
    assert all(x.shape == (B, K) for x in actual[:5])


def test_eos_is_denied_below_the_minimum(backend):
    logits = torch.zeros(2, 2, 4)
    logits[..., EOS] = 9.0
    actual = step(logits, lengths=[[2, 2], [3, 3]], minimum=torch.tensor([3, 3]), backend=backend)
    assert (actual.tokens[0] != EOS).all() and (actual.tokens[1] == EOS).all()


def test_each_beam_has_its_own_length(backend):
    logits = torch.zeros(1, 2, 4)
    logits[..., EOS] = 9.0
    actual = step(logits, lengths=[[2, 3]], minimum=torch.tensor([3]), backend=backend)
    assert (actual.tokens[0, 0], actual.parents[0, 0]) == (EOS, 1) and (actual.tokens[0, 1:] != EOS).all()


def test_forced_eos_is_the_only_continuation_and_costs_its_probability(backend):
    logits, scores, _, _ = random(2, 3, 6)
    limits = {"maximum": torch.tensor([4, 9]), "minimum": torch.tensor([7, 0]), "eos_threshold": 0.1}
    actual = step(logits, scores, lengths=torch.full((2, 3), 4), backend=backend, **limits)
    expected = (scores[0] + logits[0].log_softmax(-1)[:, EOS]).sort(descending=True)
    assert (actual.tokens[0] == EOS).all() and actual.parents[0].tolist() == expected.indices.tolist()
    assert not (actual.tokens[1] == EOS).all()
    torch.testing.assert_close(actual.scores[0], expected.values)


def test_forced_eos_does_not_change_finished_beams(backend):
    actual = step(
        torch.zeros(1, 2, 5), [[-1.0, -2.0]], [[True, True]], [[9, 9]], maximum=torch.tensor([3]), backend=backend
    )
    assert actual.scores.tolist() == [[-1.0, -2.0]] and (actual.tokens == EOS).all()
    assert actual.lengths.tolist() == [[9, 9]]


def test_the_threshold_compares_eos_with_the_best_other_token(backend):
    logits = torch.tensor([[[0.5, 0.2, 0.3]]]).log().expand(1, 3, 3)  # eos 0.3, best other 0.5
    ratio = math.log(0.3) / math.log(0.5)
    kept = step(logits, [[0.0, -INF, -INF]], eos_threshold=ratio * 1.01, backend=backend)
    dropped = step(logits, [[0.0, -INF, -INF]], eos_threshold=ratio * 0.99, backend=backend)
    assert EOS in kept.tokens[0].tolist() and (dropped.scores[0] > -INF).sum() == 2


@pytest.mark.parametrize("eos", [0, 63, 64, 127, 128, 200])
def test_the_threshold_finds_the_best_other_token_in_any_block(backend, eos):
    logits = torch.zeros(1, 1, 201)
    logits[..., eos], logits[..., (eos + 64) % 201] = 6.0, 5.0  # probabilities of 0.6, and 0.2 for the best other token
    best, other = logits[0, 0].log_softmax(0)[[eos, (eos + 64) % 201]].tolist()
    kept = step(logits, eos=eos, eos_threshold=1.01 * best / other, backend=backend)
    dropped = step(logits, eos=eos, eos_threshold=0.99 * best / other, backend=backend)
    assert kept.tokens.tolist() == [[eos]] and dropped.tokens.tolist() == [[(eos + 64) % 201]]


@pytest.mark.parametrize("best_other", [0, 5])
def test_eos_must_exceed_the_threshold(backend, best_other):
    logits = torch.zeros(1, 1, 6)
    logits[..., [EOS, best_other]] = 4.0
    assert step(logits, eos_threshold=1.0, backend=backend).tokens.tolist() == [[best_other]]


def test_the_threshold_ignores_the_language_model(backend):
    logits = torch.tensor([[[0.5, 0.2, 0.3]]]).log().expand(1, 3, 3)
    against_eos = Ngram(torch.tensor([0.0, 0.0, -50.0]).repeat(1, 3, 1), 1.0)
    actual = step(logits, [[0.0, -INF, -INF]], eos_threshold=2.0, ngram=against_eos, backend=backend)
    assert EOS in actual.tokens[0].tolist() and (actual.scores[0] > -INF).all()


@pytest.mark.parametrize("V", [7, 31])
@pytest.mark.parametrize(
    "options",
    [
        {"length_penalty": 1.0},
        {"length_penalty": -0.5},
        {"eos_threshold": -0.5},
        {"minimum": torch.full((3,), 9), "maximum": torch.full((3,), 3)},
    ],
)
def test_unusual_options_equal_the_reference(backend, options, V):
    inputs = random(3, 4, V)
    assert_same(step(*inputs, backend=backend, **options), step(*inputs, backend="reference", **options))


def test_length_normalisation_ranks_long_beams_higher_but_returns_true_scores(backend):
    options = {"finished": [[True, True]], "lengths": [[2, 10]], "backend": backend}
    assert step(torch.zeros(1, 2, 4), [[-2.0, -5.0]], **options).parents.tolist() == [[0, 1]]
    actual = step(torch.zeros(1, 2, 4), [[-2.0, -5.0]], **options, length_penalty=1.0)
    assert actual.parents.tolist() == [[1, 0]] and actual.scores.tolist() == [[-5.0, -2.0]]
    assert actual.lengths.tolist() == [[10, 2]]


def two_live_beams(gap, *, backend, **options):
    """The scores after a step of a beam with score 0 and one `gap` nats below it, each with one possible token."""
    logits = torch.full((1, 2, 4), -INF)
    logits[..., 3] = 0.0
    return step(logits, [[0.0, -gap]], backend=backend, **options).scores.tolist()


def test_a_beam_further_below_the_best_than_the_threshold_is_dropped(backend):
    assert two_live_beams(2.0, beam_threshold=2.0, backend=backend) == [[0.0, -2.0]]
    assert two_live_beams(2.0, beam_threshold=1.99, backend=backend) == [[0.0, -INF]]
    assert two_live_beams(0.0, beam_threshold=0.0, backend=backend) == [[0.0, 0.0]]
    assert two_live_beams(1e6, beam_threshold=INF, backend=backend) == [[0.0, -1e6]]


@pytest.mark.parametrize("length_penalty", [0.0, 0.5, 1.0])
def test_beams_of_one_length_are_dropped_by_their_scores(backend, length_penalty):
    options = {"lengths": [[8, 8]], "length_penalty": length_penalty, "backend": backend}
    assert two_live_beams(2.0, beam_threshold=2.01, **options) == [[0.0, -2.0]]
    assert two_live_beams(2.0, beam_threshold=1.99, **options) == [[0.0, -INF]]


def test_a_longer_beam_is_compared_with_the_rank_of_a_finished_one_at_its_own_length(backend):
    logits = torch.full((1, 2, 4), -INF)
    logits[..., 3] = 0.0
    options = {"finished": [[True, False]], "lengths": [[4, 7]], "length_penalty": 1.0, "backend": backend}
    inputs = logits, [[-4.0, -11.0]]  # at 8 tokens, the rank of the finished beam is a score of -8
    assert step(*inputs, beam_threshold=3.01, **options).scores.tolist() == [[-4.0, -11.0]]
    assert step(*inputs, beam_threshold=2.99, **options).scores.tolist() == [[-4.0, -INF]]


def test_finished_beams_are_never_dropped(backend):
    logits = torch.full((1, 3, 4), -INF)
    logits[0, 0, 3], logits[0, 1, EOS], logits[0, 2, EOS] = 0.0, 0.0, 0.0
    actual = step(logits, [[0.0, -50.0, -60.0]], [[False, False, True]], beam_threshold=1.0, backend=backend)
    assert actual.scores.tolist() == [[0.0, -50.0, -60.0]] and actual.finished.tolist() == [[False, True, True]]


def test_a_dropped_beam_keeps_its_token_and_parent_and_has_no_continuation(backend):
    logits = torch.full((1, 2, 4), -INF)
    logits[..., 3] = 0.0
    actual = step(logits, [[0.0, -5.0]], beam_threshold=1.0, backend=backend)
    assert (actual.tokens.tolist(), actual.parents.tolist()) == ([[3, 3]], [[0, 1]])
    after = step(torch.zeros(1, 2, 4), actual.scores, actual.finished, actual.lengths, backend=backend)
    assert after.parents.tolist() == [[0, 0]] and after.scores.isfinite().all()


def test_without_any_beam_nothing_is_compared(backend):
    logits = torch.zeros(1, 3, 5)
    actual = step(logits, [[-INF] * 3], beam_threshold=0.0, length_penalty=1.0, backend=backend)
    assert (actual.scores == -INF).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_an_infinite_threshold_changes_no_bit(backend, name):
    inputs, options = random(6, 8, 31), options_for(name, 6, 8, 31)
    plain_step = step(*inputs, backend=backend, **options | {"beam_threshold": 1e30})
    for a, b in zip(step(*inputs, backend=backend, **options | {"beam_threshold": INF}), plain_step, strict=True):
        assert torch.equal(a, b)


def test_coverage_changes_ranks_and_not_scores(backend):
    options = {"finished": [[True, True]], "lengths": [[2, 2]], "backend": backend}
    actual = step(torch.zeros(1, 2, 4), [[-2.0, -3.0]], **options, coverage=torch.tensor([[0.0, 1.5]]))
    assert actual.parents.tolist() == [[1, 0]] and actual.scores.tolist() == [[-3.0, -2.0]]


@pytest.mark.parametrize("V", [31, 131])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_a_ctc_model_is_mixed_in_by_its_weight(backend, weight, V):
    inputs, model = random(3, 5, V), ctc(3, 5, V, weight=weight)
    inputs[0][0, 1], inputs[0][1, :, 4], inputs[0][2, 0, 3] = -INF, -INF, NAN
    model = model._replace(next_log_probs=model.next_log_probs.clamp(min=-50.0)) if weight == 0 else model
    actual = step(*inputs, ctc=model, backend=backend)
    assert_same(actual, step(*inputs, ctc=model, backend="reference"))
    if weight == 0:
        assert_same(actual, step(*inputs, backend="reference"))


def test_a_token_that_the_logits_rule_out_stays_impossible_with_all_weight_on_ctc(backend):
    logits, next_log_probs = torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)
    logits[..., :3] = -INF
    limits = {"minimum": torch.tensor([9])}
    actual = step(logits, ctc=Ctc(next_log_probs, 1.0), backend=backend, eos=3, **limits)
    assert actual.tokens.tolist() == [[4, 4]] and actual.scores.tolist() == [[0.0, 0.0]]


def test_a_continuation_that_ctc_rules_out_is_impossible(backend):
    next_log_probs = torch.full((1, 1, 4), -INF)
    next_log_probs[..., 3] = -1.0
    actual = step(torch.zeros(1, 1, 4), ctc=Ctc(next_log_probs, 0.5), backend=backend)
    assert actual.tokens.tolist() == [[3]] and actual.scores.item() == pytest.approx(-0.5 - 0.5 * math.log(4))
    next_log_probs[..., 3] = -INF
    assert step(torch.zeros(1, 1, 4), ctc=Ctc(next_log_probs, 0.5), backend=backend).scores.item() == -INF


@pytest.mark.parametrize("model", ["ngram", "ctc"])
def test_a_model_can_choose_a_token_that_the_logits_rank_low_in_any_block(backend, model):
    logits, scores = torch.zeros(1, 1, 201), torch.zeros(1, 1, 201)
    logits[..., 3], scores[..., 150] = 15.0, 10.0
    made = Ngram(scores, 2.0) if model == "ngram" else Ctc(scores - 10, 0.9)
    assert step(logits, backend=backend, **{model: made}).tokens.tolist() == [[150]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(backend, dtype):
    logits, *others = random(2, 4, 131)
    low = logits.to(dtype)
    for a, b in zip(step(low, *others, backend=backend)[:5], step(low.float(), *others, backend=backend)[:5],
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_inputs_need_not_be_contiguous(backend):
    inputs, options = random(3, 4, 31), options_for("all", 3, 4, 31)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    strided[0] = strided[0].transpose(1, 2).contiguous().transpose(1, 2)
    options["coverage"] = options["coverage"].t().contiguous().t()
    log_probs = options["ctc"].next_log_probs.transpose(0, 1).contiguous().transpose(0, 1)
    options["ctc"] = options["ctc"]._replace(next_log_probs=log_probs)
    log_probs = options["ngram"].log_probs.transpose(0, 1).contiguous().transpose(0, 1)
    options["ngram"] = options["ngram"]._replace(log_probs=log_probs)
    assert not any(x.is_contiguous() for x in strided)
    assert_same(step(*strided, backend=backend, **options), step(*inputs, backend="reference", **options))


def test_inputs_are_not_modified(backend):
    inputs, options = random(), options_for("all", 3, 4, 7)
    before = [x.clone() for x in inputs]
    step(*inputs, backend=backend, **options)
    for a, b in zip(inputs, before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 4)}, r"logits must be \(B, K, V\)"),
        ({"scores": torch.zeros(2, 2)}, r"scores must be \(2, 3\) torch.float32 like logits; got \(2, 2\)"),
        ({"finished": torch.zeros(2, 3)}, r"finished must be \(2, 3\) torch.bool like logits; got .* torch.float32"),
        ({"lengths": torch.zeros(2, 3)}, r"lengths must be \(2, 3\) torch.int64"),
        ({"minimum": torch.ones(3, dtype=torch.int64)}, r"minimum must be \(2,\) torch.int64"),
        ({"maximum": torch.ones(2)}, r"maximum must be \(2,\) torch.int64 like logits; got \(2,\) torch.float32"),
        ({"coverage": torch.zeros(2)}, r"coverage must be \(2, 3\) torch.float32"),
        ({"ngram": Ngram(torch.zeros(2, 3, 4), 1.0)}, r"ngram.log_probs must be \(2, 3, 5\) torch.float32"),
        ({"ctc": Ctc(torch.zeros(2, 3, 4), 0.5)}, r"ctc.next_log_probs must be \(2, 3, 5\) torch.float32"),
        ({"ctc": Ctc(torch.zeros(2, 3, 5), 1.5)}, "ctc.weight must be from 0 to 1; got 1.5"),
        ({"scores": torch.zeros(2, 3, device="meta")}, "scores must be on cpu like logits; got meta"),
        ({"eos": 5}, "eos must be a token from 0 to 4; got 5"),
        ({"beam_threshold": -0.5}, "beam_threshold must be 0 or more, or infinity for none; got -0.5"),
        ({"beam_threshold": NAN}, "beam_threshold must be 0 or more, or infinity for none; got nan"),
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


def arguments(B=2, K=3, V=5, **change):
    """Arguments of the registered op, with all options set."""
    logits, scores, finished, lengths = random(B, K, V)
    model, limits = ngram(B, K, V), torch.full((B,), 4)
    defaults = {"logits": logits, "scores": scores, "finished": finished, "lengths": lengths, "eos": EOS}
    defaults |= {"minimum": limits, "maximum": limits + 4, "length_penalty": 0.7, "eos_threshold": 1.2}
    defaults |= {"coverage": torch.randn(B, K), "ngram_log_probs": model.log_probs, "ngram_weight": 0.3}
    defaults |= {"ctc_next_log_probs": ctc(B, K, V).next_log_probs, "ctc_weight": 0.3, "beam_threshold": 2.0}
    return tuple((defaults | change).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 5).double()}, r"logits must be .* float32, bfloat16 or float16; got .* Double"),
        ({"scores": torch.zeros(2, 2)}, r"scores must be \[2, 3\] Float like logits; got \[2, 2\]"),
        ({"finished": torch.zeros(2, 3)}, r"finished must be \[2, 3\] Bool"),
        ({"lengths": torch.zeros(2, 3)}, r"lengths must be \[2, 3\] Long"),
        ({"minimum": torch.zeros(2)}, r"minimum must be \[2\] Long"),
        ({"maximum": torch.zeros(3).long()}, r"maximum must be \[2\] Long"),
        ({"coverage": torch.zeros(2)}, r"coverage must be \[2, 3\] Float"),
        ({"ctc_next_log_probs": torch.zeros(2, 3)}, r"ctc_next_log_probs must be \[2, 3, 5\] Float"),
        ({"ngram_log_probs": torch.zeros(2, 3)}, r"ngram_log_probs must be \[2, 3, 5\] Float"),
        ({"ngram_log_probs": torch.zeros(2, 3, 5).double()}, r"ngram_log_probs must be .* Float like .* Double"),
        ({"logits": torch.zeros(3, 5)}, r"logits must be \(B, K, V\) .*; got \[3, 5\]"),
        ({"eos": -1}, "eos must be a token from 0 to 4; got -1"),
        ({"eos": 5}, "eos must be a token from 0 to 4; got 5"),
    ],
)
def test_the_registered_op_checks_its_own_arguments(cpp, change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.las_fast.beam_topk_cpp(*arguments(**change))


@pytest.mark.parametrize("options", [True, False])
def test_the_registered_op_passes_opcheck(cpp, options):
    names = () if options else ("minimum", "maximum", "coverage", "ngram_log_probs", "ctc_next_log_probs")
    torch.library.opcheck(torch.ops.las_fast.beam_topk_cpp.default, arguments(**dict.fromkeys(names)))


def test_auto_takes_the_cpp_path_on_a_cpu(cpp):
    logits, scores, finished, lengths = random()
    called = ops_called(lambda: beam_topk(logits, scores, finished, eos=EOS, lengths=lengths))
    assert called == ["las_fast::beam_topk_cpp"]


@pytest.mark.parametrize("name", ["plain", "all"])
def test_it_compiles_into_one_graph(cpp, name):
    logits, scores, finished, lengths = random()
    options = options_for(name, 3, 4, 7)
    compiled, graphs = compile_and_count(lambda *x: beam_topk(*x[:3], eos=EOS, lengths=x[3], **options))
    actual = compiled(logits, scores, finished, lengths)
    assert_same(actual, beam_topk(logits, scores, finished, eos=EOS, lengths=lengths, **options))
    assert len(graphs) == 1


@pytest.mark.parametrize(("B", "K", "V"), [(2000, 8, 31), (1, 32, 50_000)])
def test_two_threads_give_the_same_bits(cpp, B, K, V):
    inputs, options = random(B, K, V), options_for("both limits", B, K, V)
    with threads(2):
        actual = step(*inputs, backend=cpp, **options)
    expected = step(*inputs, backend=cpp, **options)
    assert_same(actual, expected)
    assert torch.equal(actual.scores, expected.scores)


def test_a_softmax_over_300000_tokens_is_accurate(cpp):
    logits = torch.full((1, 1, 300_000), -0.3)
    logits[0, 0, 7] = 0.0
    actual = step(logits, backend=cpp)
    exact = float(logits[0, 0].double().log_softmax(0)[7])
    assert float(actual.scores[0, 0]) == pytest.approx(exact, abs=2e-6)


@pytest.mark.parametrize("V", [31, 131])
def test_an_utterance_has_the_same_bits_alone_and_in_any_batch(cpp, V):
    inputs = random(5, 4, V)
    batched = step(*inputs, backend=cpp, length_penalty=0.7)
    for b in range(5):
        alone = step(*(x[b : b + 1] for x in inputs), backend=cpp, length_penalty=0.7)
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone[:5], batched[:5], strict=True))
