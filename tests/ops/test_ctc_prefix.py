import itertools
import math

import pytest
import torch
from calls import call, compile_and_count, ops_called, threads
from torch.nn import functional as F

from las_fast.ops import CtcState, ctc_log_probabilities, ctc_prefix, ctc_start

EOS, SOS = 2, 1
INF, NAN = torch.inf, torch.nan
SHAPES = [(1, 1, 1, 4), (2, 3, 2, 5), (3, 4, 15, 7), (2, 8, 64, 31), (2, 17, 65, 33), (1, 2, 130, 100), (2, 1, 16, 5)]


def random_log_probs(B=2, T=6, V=5, lengths=None, seed=0, scale=2.0, forbidden=(SOS, EOS)):
    """Random (B, T, V) log-probabilities in which <sos> and <eos> are impossible."""
    logits = scale * torch.randn(B, T, V, generator=torch.Generator().manual_seed(seed))
    return ctc_log_probabilities(logits, torch.as_tensor(lengths or [T] * B), forbidden)


def extend_texts(ctc_log_probs, texts, *, backend, eos=EOS):
    """The CTC state after extending hypothesis k of every utterance by texts[k], token by token."""
    B, K = len(ctc_log_probs), len(texts)
    state, tokens = ctc_start(ctc_log_probs, K, eos=eos), torch.full((B, K), SOS)
    parents = torch.arange(K).expand(B, K)
    for column in zip(*texts, strict=True):
        chosen = torch.tensor(column).expand(B, K)
        state = call(ctc_prefix, ctc_log_probs, state, tokens, parents, chosen, eos=eos, backend=backend)
        tokens = chosen
    return state


def collapse(path):
    """The text of a path: merge repeats, then drop blanks."""
    return tuple(v for v, _ in itertools.groupby(path) if v)


def brute_force(ctc_log_probs):
    """{text: probability} for (T, V) log-probabilities, summed over all paths."""
    totals = {}
    for path in itertools.product(range(ctc_log_probs.shape[1]), repeat=len(ctc_log_probs)):
        probability = math.exp(sum(float(ctc_log_probs[t, v]) for t, v in enumerate(path)))
        totals[collapse(path)] = totals.get(collapse(path), 0.0) + probability
    return totals


def log(x):
    return math.log(x) if x > 0 else -INF


def random_step(B, K, T, V, seed=0, lengths=None):
    """Arguments of ctc_prefix in the middle of a search."""
    ctc_log_probs = random_log_probs(B, T, V, lengths, seed)
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(3, V, (3, B, K), generator=generator)
    texts[1, :, ::2] = texts[0, :, ::2]
    state, tokens = ctc_start(ctc_log_probs, K, eos=EOS), torch.full((B, K), SOS)
    for chosen in texts:
        parents = torch.randint(0, K, (B, K), generator=generator)
        arguments = ctc_log_probs, state, tokens, parents, chosen
        state = ctc_prefix(*arguments, eos=EOS, backend="reference")
        tokens = chosen
    return arguments


def assert_same(actual, expected):
    for name, x, y in zip(actual._fields, actual, expected, strict=True):
        torch.testing.assert_close(x, y, atol=5e-5, rtol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("T", [1, 2, 3, 5])
@pytest.mark.parametrize("text", [(), (3,), (4,), (3, 3), (3, 4), (3, 3, 3), (3, 4, 3), (4, 4, 3)])
def test_scores_are_sums_over_all_paths(backend, T, text):
    ctc_log_probs = random_log_probs(1, T, 5, scale=1.0)
    state = extend_texts(ctc_log_probs, [text], backend=backend)
    probabilities = brute_force(ctc_log_probs[0].double())

    def log_prob_of_prefix(prefix):
        return log(sum(p for text, p in probabilities.items() if text[: len(prefix)] == prefix))

    prefix = log_prob_of_prefix(text)
    assert float(state.prefix_log_probs) == pytest.approx(prefix, abs=1e-5)
    assert float(state.forward_log_probs[0, 0, -1]) == pytest.approx(log(probabilities.get(text, 0.0)), abs=1e-5)
    for v, log_prob in enumerate(state.next_log_probs[0, 0].tolist()):
        joint = log(probabilities.get(text, 0.0)) if v == EOS else log_prob_of_prefix((*text, v)) if v else -INF
        assert log_prob == (-INF if prefix == -INF else pytest.approx(joint - prefix, abs=1e-5)), v


@pytest.mark.parametrize(("B", "K", "T", "V"), SHAPES)
def test_a_step_equals_the_reference(backend, B, K, T, V):
    for seed in range(3):
        arguments = random_step(B, K, T, V, seed, [max(0, T - 3 * b) for b in range(B)])
        actual = call(ctc_prefix, *arguments, eos=EOS, backend=backend)
        assert_same(actual, ctc_prefix(*arguments, eos=EOS, backend="reference"))


def test_float32_errors_are_at_most_four_times_the_references(backend):
    arguments = random_step(2, 4, 300, 31)
    ctc_log_probs, state, *tokens = arguments
    state64 = CtcState(*(x.double() for x in state))
    exact = ctc_prefix(ctc_log_probs.double(), state64, *tokens, eos=EOS, backend="reference")
    baseline = ctc_prefix(*arguments, eos=EOS, backend="reference")
    actual = call(ctc_prefix, *arguments, eos=EOS, backend=backend)
    for x, y, z in zip(actual, baseline, exact, strict=True):
        there = z.isfinite()
        error, allowed = ((a.double() - z)[there].abs().max() for a in (x, y))
        assert torch.equal(x.isneginf(), z.isneginf()) and error <= 4 * allowed + 1e-6 * z[there].abs().max()


@pytest.mark.parametrize("length", [1, 2, 9])
def test_the_log_probability_of_ending_a_text_is_its_negative_ctc_loss(backend, length):
    ctc_log_probs, text = random_log_probs(2, 20, 7, [20, 13]), [3, 3, 4, 6, 5, 5, 3, 4, 4][:length]
    state = extend_texts(ctc_log_probs, [text], backend=backend)
    targets, target_lengths = torch.tensor([text, text]), torch.tensor([length, length])
    loss = F.ctc_loss(ctc_log_probs.transpose(0, 1), targets, torch.tensor([20, 13]), target_lengths, reduction="none")
    torch.testing.assert_close(state.forward_log_probs[:, 0, -1], -loss)
    torch.testing.assert_close(state.next_log_probs[:, 0, EOS] + state.prefix_log_probs[:, 0], -loss)


@pytest.mark.parametrize("text", [(), (3,), (4, 4), (3, 4, 3, 3)])
def test_the_probabilities_of_all_continuations_sum_to_one(backend, text):
    state = extend_texts(random_log_probs(3, 12, 6, [12, 7, 5]), [text, text[::-1]], backend=backend)
    torch.testing.assert_close(state.next_log_probs.logsumexp(-1), torch.zeros(3, 2), atol=2e-6, rtol=0.0)


def test_a_repeated_token_needs_a_blank_between(backend):
    ctc_log_probs = torch.full((1, 3, 5), -INF)
    ctc_log_probs[0, :, 3] = 0.0  # certainly three frames of one token
    state = extend_texts(ctc_log_probs, [(3,)], backend=backend)
    assert state.next_log_probs[0, 0].tolist() == [-INF, -INF, 0.0, -INF, -INF]
    ctc_log_probs[0, 1], ctc_log_probs[0, 1, 0] = -INF, 0.0
    state = extend_texts(ctc_log_probs, [(3,)], backend=backend)
    assert state.next_log_probs[0, 0].tolist() == [-INF, -INF, -INF, 0.0, -INF]


def test_hypotheses_too_long_for_the_frames_are_impossible_without_nan(backend):
    ctc_log_probs = random_log_probs(2, 4, 5, [4, 2])
    state = extend_texts(ctc_log_probs, [(3, 4, 3, 4, 3), (3, 3, 3, 4, 4)], backend=backend)
    assert all((x == -INF).all() for x in state)


@pytest.mark.parametrize("T", [0, 3])
def test_without_frames_only_eos_is_possible(backend, T):
    ctc_log_probs = random_log_probs(2, T, 5, [0, 0])
    empty = ctc_start(ctc_log_probs, 2, eos=EOS)
    assert empty.next_log_probs[0, 0].tolist() == [-INF, -INF, 0.0, -INF, -INF]
    state = extend_texts(ctc_log_probs, [(3,), (4,)], backend=backend)
    assert (state.next_log_probs == -INF).all() and (state.prefix_log_probs == -INF).all()


def test_padding_is_ignored(backend):
    logits = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    logits[1, 4:] = NAN
    ctc_log_probs = ctc_log_probabilities(logits, torch.tensor([9, 4]), (SOS, EOS))
    short = ctc_log_probabilities(logits[1:, :4], torch.tensor([4]), (SOS, EOS))
    texts = [(3, 4), (5, 5), (4, 3)]
    actual, expected = (extend_texts(x, texts, backend=backend) for x in (ctc_log_probs, short))
    assert_same(CtcState(actual.forward_log_probs[1:, :, :5], *(x[1:] for x in actual[1:])), expected)
    assert (actual.forward_log_probs[1, :, 5:] == actual.forward_log_probs[1, :, 4:5]).all()


@pytest.mark.parametrize("certain", [[0], [0, 1, 2], [3], [5, 6]])
def test_frames_that_are_certainly_blank_are_exact(backend, certain):
    ctc_log_probs = random_log_probs(1, 8, 9)
    ctc_log_probs[:, certain] = torch.tensor([0.0] + 8 * [-INF])
    actual = extend_texts(ctc_log_probs, [(3, 4), (4, 4)], backend=backend)
    exact = extend_texts(ctc_log_probs.double(), [(3, 4), (4, 4)], backend="reference")
    assert_same(actual, CtcState(*(x.float() for x in exact)))


def test_frames_whose_blank_rounds_to_probability_1_are_no_padding(backend):
    logits = torch.zeros(1, 4, 6)
    logits[:, :, 0], logits[:, :, 3] = 18.0, 1.0
    ctc_log_probs = torch.log_softmax(logits, -1)
    assert (ctc_log_probs[:, :, 0] == 0).all() and ctc_log_probs[0, 0, 3] > -18
    for frames in (4, 1):
        actual = extend_texts(ctc_log_probs[:, :frames], [(3,), (4,)], backend=backend)
        assert_same(actual, extend_texts(ctc_log_probs[:, :frames], [(3,), (4,)], backend="reference"))
        assert (actual.prefix_log_probs > -40).all()


def test_a_frame_of_nan_allows_no_hypothesis(backend):
    logits = torch.zeros(1, 3, 5)
    logits[0, 1, 3] = NAN
    state = extend_texts(ctc_log_probabilities(logits, torch.tensor([3])), [(3,)], backend=backend)
    assert not any(x.isnan().any() for x in state)
    assert state.next_log_probs[0, 0, EOS] == -INF


@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_probabilities_far_below_the_range_of_float32_are_kept(backend, scale):
    ctc_log_probs = random_log_probs(2, 40, 6, scale=scale)
    texts = [(3, 4, 5), (5, 5, 3), (4, 3, 4)]
    actual, expected = (extend_texts(ctc_log_probs, texts, backend=name) for name in (backend, "reference"))
    assert_same(actual, expected)
    log_probs = expected.next_log_probs
    assert log_probs.min(-1).values.isneginf().all() and (log_probs[log_probs.isfinite()] < -90).any()


def test_finished_hypotheses_hold_no_nan(backend):
    ctc_log_probs, state, tokens, parents, chosen = random_step(2, 4, 9, 7)
    chosen[:, 1], chosen[:, 2] = EOS, 0
    after = call(ctc_prefix, ctc_log_probs, state, tokens, parents, chosen, eos=EOS, backend=backend)
    parents, last = torch.arange(4).expand(2, 4), torch.full((2, 4), EOS)
    again = call(ctc_prefix, ctc_log_probs, after, chosen, parents, last, eos=EOS, backend=backend)
    assert not any(x.isnan().any() for x in (*after, *again))


def test_a_start_has_one_state_for_every_hypothesis():
    ctc_log_probs = random_log_probs(2, 5, 6)
    state = ctc_start(ctc_log_probs, 3, eos=EOS)
    assert [tuple(x.shape) for x in state] == [(2, 3, 6), (2, 3), (2, 3, 6)]
    torch.testing.assert_close(state.forward_log_probs[:, 1, 1:], ctc_log_probs[..., 0].cumsum(-1))
    assert (state.forward_log_probs[..., 0] == 0).all() and (state.prefix_log_probs == 0).all()


def test_forbidden_tokens_leave_their_probability_to_the_others():
    logits = torch.randn(1, 4, 6)
    actual = ctc_log_probabilities(logits, torch.tensor([4]), (1, 2))
    assert (actual[..., 1:3] == -INF).all()
    torch.testing.assert_close(actual.logsumexp(-1), torch.zeros(1, 4))


def test_inputs_need_not_be_contiguous_and_are_not_modified(backend):
    ctc_log_probs, state, *tokens = random_step(3, 4, 10, 7)

    def strided(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    arguments = strided(ctc_log_probs), CtcState(*map(strided, state)), *map(strided, tokens)
    actual = call(ctc_prefix, *arguments, eos=EOS, backend=backend)
    assert_same(actual, ctc_prefix(ctc_log_probs, state, *tokens, eos=EOS, backend="reference"))
    fresh = random_step(3, 4, 10, 7)
    flat, expected = ((x[0], *x[1], *x[2:]) for x in (arguments, fresh))
    assert all(torch.equal(x, y) for x, y in zip(flat, expected, strict=True))


def test_an_utterance_has_the_same_bits_alone_and_in_any_batch(cpp):
    lengths = [30, 17, 1, 0, 24]
    ctc_log_probs, state, *tokens = random_step(5, 4, 30, 31, lengths=lengths)
    batched = ctc_prefix(ctc_log_probs, state, *tokens, eos=EOS, backend=cpp)
    for b, n in enumerate(lengths):
        rows = slice(b, b + 1)
        short = CtcState(state.forward_log_probs[rows, :, : n + 1], *(x[rows] for x in state[1:]))
        alone = ctc_prefix(ctc_log_probs[rows, :n], short, *(x[rows] for x in tokens), eos=EOS, backend=cpp)
        assert torch.equal(alone.forward_log_probs[0], batched.forward_log_probs[b, :, : n + 1])
        assert torch.equal(alone.next_log_probs[0], batched.next_log_probs[b])
        assert torch.equal(alone.prefix_log_probs[0], batched.prefix_log_probs[b])


def test_two_threads_give_the_same_bits(cpp):
    arguments = random_step(7, 3, 20, 31)
    expected = ctc_prefix(*arguments, eos=EOS, backend=cpp)
    with threads(2):
        actual = ctc_prefix(*arguments, eos=EOS, backend=cpp)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def changed(**change):
    """Valid arguments of the registered op by name, some of them replaced."""
    ctc_log_probs, state, tokens, parents, chosen = random_step(2, 3, 6, 5)
    good = {"ctc_log_probs": ctc_log_probs, **state._asdict(), "tokens": tokens, "parents": parents}
    good |= {"chosen": chosen, "eos": EOS}
    return {**good, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ctc_log_probs": torch.zeros(6, 5)}, r"ctc_log_probs must be \(B, T, V\)"),
        ({"tokens": torch.zeros(3).long()}, r"tokens must be \(B, K\) int64"),
        ({"forward_log_probs": torch.zeros(2, 3, 6)},
         r"state.forward_log_probs must be \(2, 3, 7\) .* like ctc_log_probs; got \(2, 3, 6\)"),
        ({"prefix_log_probs": torch.zeros(2, 3).double()}, r"state.prefix_log_probs must be .* got .* torch.float64"),
        ({"next_log_probs": torch.zeros(2, 3, 4)}, r"state.next_log_probs must be \(2, 3, 5\)"),
        ({"parents": torch.zeros(2, 3)}, r"parents must be \(2, 3\) torch.int64"),
        ({"chosen": torch.zeros(2, 2).long()}, r"chosen must be \(2, 3\) torch.int64"),
        ({"eos": 5}, "eos must be a token from 0 to 4; got 5"),
    ],
)  # fmt: skip
def test_disagreeing_arguments_are_explained(change, message):
    arguments = changed(**change)
    state = CtcState(*(arguments.pop(name) for name in CtcState._fields))
    ctc_log_probs, eos = arguments.pop("ctc_log_probs"), arguments.pop("eos")
    with pytest.raises(ValueError, match=message):
        ctc_prefix(ctc_log_probs, state, *arguments.values(), eos=eos)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ctc_log_probs": torch.zeros(2, 6, 5).double()}, r"ctc_log_probs must be \(B, T, V\) float32; got .* Double"),
        (
            {"forward_log_probs": torch.zeros(2, 3, 6)},
            r"forward_log_probs must be \[2, 3, 7\] Float like ctc_log_probs; got \[2, 3, 6\]",
        ),
        ({"next_log_probs": torch.zeros(2, 3, 4)}, r"next_log_probs must be \[2, 3, 5\] Float"),
        ({"parents": torch.full((2, 3), 3)}, "parents must be from 0 to 2; got 3"),
        ({"chosen": torch.full((2, 3), -1)}, "chosen must be from 0 to 4; got -1"),
        ({"eos": -1}, "eos must be a token from 0 to 4; got -1"),
    ],
)
def test_the_registered_op_checks_its_own_arguments(cpp, change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.las_fast.ctc_prefix_cpp(*changed(**change).values())


def test_the_registered_op_passes_opcheck(cpp):
    torch.library.opcheck(torch.ops.las_fast.ctc_prefix_cpp.default, tuple(changed().values()))


def test_auto_takes_the_cpp_path_on_a_cpu(cpp):
    arguments = random_step(2, 3, 6, 5)
    assert ops_called(lambda: ctc_prefix(*arguments, eos=EOS)) == ["las_fast::ctc_prefix_cpp"]


def test_it_compiles_into_one_graph(cpp):
    ctc_log_probs, state, *tokens = random_step(2, 3, 6, 5)
    compiled, graphs = compile_and_count(lambda f, a, p, g, *x: ctc_prefix(f, CtcState(a, p, g), *x, eos=EOS))
    assert_same(compiled(ctc_log_probs, *state, *tokens), ctc_prefix(ctc_log_probs, state, *tokens, eos=EOS))
    assert len(graphs) == 1
