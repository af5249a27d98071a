import itertools
import math

import pytest
import torch
from calls import call, compile_and_count, ops_called, threads
from torch.nn import functional as F

from las_fast.ops import CtcState, ctc_log_probabilities, ctc_prefix, ctc_start

EOS, NONE = 2, 1
INF, NAN = torch.inf, torch.nan
SHAPES = [(1, 1, 1, 4), (2, 3, 2, 5), (3, 4, 15, 7), (2, 8, 64, 31), (2, 17, 65, 33), (1, 2, 130, 100), (2, 1, 16, 5)]


def listen(B=2, T=6, V=5, lengths=None, seed=0, scale=2.0, forbidden=(NONE, EOS)):
    """Log-probabilities of frames for which <sos> and <eos> are no tokens."""
    logits = scale * torch.randn(B, T, V, generator=torch.Generator().manual_seed(seed))
    return ctc_log_probabilities(logits, torch.as_tensor(lengths or [T] * B), forbidden)


def grow(ctc_log_probs, texts, *, backend, eos=EOS):
    """The state of each text, one for each hypothesis of every utterance, token by token; texts equally long."""
    B, K = len(ctc_log_probs), len(texts)
    state, tokens = ctc_start(ctc_log_probs, K, eos=eos), torch.full((B, K), NONE)
    parents = torch.arange(K).expand(B, K)
    for column in zip(*texts, strict=True):
        chosen = torch.tensor(column).expand(B, K)
        state = call(ctc_prefix, ctc_log_probs, state, tokens, parents, chosen, eos=eos, backend=backend)
        tokens = chosen
    return state


def read(path):
    """What a path of one token a frame reads."""
    return tuple(v for v, _ in itertools.groupby(path) if v)


def brute_force(ctc_log_probs):
    """Probabilities of all readings of frames (T, V), summed over all paths."""
    found = {}
    for path in itertools.product(range(ctc_log_probs.shape[1]), repeat=len(ctc_log_probs)):
        probability = math.exp(sum(float(ctc_log_probs[t, v]) for t, v in enumerate(path)))
        found[read(path)] = found.get(read(path), 0.0) + probability
    return found


def log(x):
    return math.log(x) if x > 0 else -INF


def random_step(B, K, T, V, seed=0, lengths=None):
    """A step in the middle of a search: everything that ctc_prefix takes."""
    ctc_log_probs = listen(B, T, V, lengths, seed)
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(3, V, (3, B, K), generator=generator)
    texts[1, :, ::2] = texts[0, :, ::2]
    state, tokens = ctc_start(ctc_log_probs, K, eos=EOS), torch.full((B, K), NONE)
    for chosen in texts:
        parents = torch.randint(0, K, (B, K), generator=generator)
        arguments = ctc_log_probs, state, tokens, parents, chosen
        state = ctc_prefix(*arguments, eos=EOS, backend="reference")
        tokens = chosen
    return arguments


def assert_same(found, expected):
    for name, x, y in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=5e-5, rtol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("T", [1, 2, 3, 5])
@pytest.mark.parametrize("text", [(), (3,), (4,), (3, 3), (3, 4), (3, 3, 3), (3, 4, 3), (4, 4, 3)])
def test_scores_are_sums_over_all_paths(backend, T, text):
    ctc_log_probs = listen(1, T, 5, scale=1.0)
    state = grow(ctc_log_probs, [text], backend=backend)
    every = brute_force(ctc_log_probs[0].double())

    def begins(prefix):
        return log(sum(p for reading, p in every.items() if reading[: len(prefix)] == prefix))

    prefix = begins(text)
    assert float(state.prefix_log_probs) == pytest.approx(prefix, abs=1e-5)
    assert float(state.forward_log_probs[0, 0, -1]) == pytest.approx(log(every.get(text, 0.0)), abs=1e-5)
    for v, gain in enumerate(state.next_log_probs[0, 0].tolist()):
        whole = log(every.get(text, 0.0)) if v == EOS else begins((*text, v)) if v else -INF
        assert gain == (-INF if prefix == -INF else pytest.approx(whole - prefix, abs=1e-5)), v


@pytest.mark.parametrize(("B", "K", "T", "V"), SHAPES)
def test_the_step_is_that_of_the_reference(backend, B, K, T, V):
    for seed in range(3):
        arguments = random_step(B, K, T, V, seed, [max(0, T - 3 * b) for b in range(B)])
        found = call(ctc_prefix, *arguments, eos=EOS, backend=backend)
        assert_same(found, ctc_prefix(*arguments, eos=EOS, backend="reference"))


def test_it_is_as_exact_as_float32_allows(backend):
    arguments = random_step(2, 4, 300, 31)
    ctc_log_probs, state, *tokens = arguments
    state64 = CtcState(*(x.double() for x in state))
    exact = ctc_prefix(ctc_log_probs.double(), state64, *tokens, eos=EOS, backend="reference")
    usual = ctc_prefix(*arguments, eos=EOS, backend="reference")
    found = call(ctc_prefix, *arguments, eos=EOS, backend=backend)
    for x, y, z in zip(found, usual, exact, strict=True):
        there = z.isfinite()
        error, allowed = ((a.double() - z)[there].abs().max() for a in (x, y))
        assert torch.equal(x.isneginf(), z.isneginf()) and error <= 4 * allowed + 1e-6 * z[there].abs().max()


@pytest.mark.parametrize("length", [1, 2, 9])
def test_the_end_has_the_negative_ctc_loss(backend, length):
    ctc_log_probs, text = listen(2, 20, 7, [20, 13]), [3, 3, 4, 6, 5, 5, 3, 4, 4][:length]
    state = grow(ctc_log_probs, [text], backend=backend)
    targets, target_lengths = torch.tensor([text, text]), torch.tensor([length, length])
    loss = F.ctc_loss(ctc_log_probs.transpose(0, 1), targets, torch.tensor([20, 13]), target_lengths, reduction="none")
    torch.testing.assert_close(state.forward_log_probs[:, 0, -1], -loss)
    torch.testing.assert_close(state.next_log_probs[:, 0, EOS] + state.prefix_log_probs[:, 0], -loss)


@pytest.mark.parametrize("text", [(), (3,), (4, 4), (3, 4, 3, 3)])
def test_the_gains_of_all_continuations_sum_to_one(backend, text):
    state = grow(listen(3, 12, 6, [12, 7, 5]), [text, text[::-1]], backend=backend)
    torch.testing.assert_close(state.next_log_probs.logsumexp(-1), torch.zeros(3, 2), atol=2e-6, rtol=0.0)


def test_a_token_comes_twice_only_with_a_blank_between(backend):
    ctc_log_probs = torch.full((1, 3, 5), -INF)
    ctc_log_probs[0, :, 3] = 0.0  # certainly three frames of one token
    state = grow(ctc_log_probs, [(3,)], backend=backend)
    assert state.next_log_probs[0, 0].tolist() == [-INF, -INF, 0.0, -INF, -INF]
    ctc_log_probs[0, 1], ctc_log_probs[0, 1, 0] = -INF, 0.0
    assert grow(ctc_log_probs, [(3,)], backend=backend).next_log_probs[0, 0].tolist() == [-INF, -INF, -INF, 0.0, -INF]


def test_hypotheses_too_long_for_the_frames_are_impossible_without_nan(backend):
    ctc_log_probs = listen(2, 4, 5, [4, 2])
    state = grow(ctc_log_probs, [(3, 4, 3, 4, 3), (3, 3, 3, 4, 4)], backend=backend)
    assert all((x == -INF).all() for x in state)


@pytest.mark.parametrize("T", [0, 3])
def test_without_frames_only_the_end_is_possible(backend, T):
    ctc_log_probs = listen(2, T, 5, [0, 0])
    empty = ctc_start(ctc_log_probs, 2, eos=EOS)
    assert empty.next_log_probs[0, 0].tolist() == [-INF, -INF, 0.0, -INF, -INF]
    state = grow(ctc_log_probs, [(3,), (4,)], backend=backend)
    assert (state.next_log_probs == -INF).all() and (state.prefix_log_probs == -INF).all()


def test_padding_is_ignored(backend):
    logits = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    logits[1, 4:] = NAN
    ctc_log_probs = ctc_log_probabilities(logits, torch.tensor([9, 4]), (NONE, EOS))
    short = ctc_log_probabilities(logits[1:, :4], torch.tensor([4]), (NONE, EOS))
    texts = [(3, 4), (5, 5), (4, 3)]
    found, expected = (grow(x, texts, backend=backend) for x in (ctc_log_probs, short))
    assert_same(CtcState(found.forward_log_probs[1:, :, :5], *(x[1:] for x in found[1:])), expected)
    assert (found.forward_log_probs[1, :, 5:] == found.forward_log_probs[1, :, 4:5]).all()


@pytest.mark.parametrize("certain", [[0], [0, 1, 2], [3], [5, 6]])
def test_frames_that_are_certainly_blank_are_like_any_other(backend, certain):
    ctc_log_probs = listen(1, 8, 9)
    ctc_log_probs[:, certain] = torch.tensor([0.0] + 8 * [-INF])
    found = grow(ctc_log_probs, [(3, 4), (4, 4)], backend=backend)
    exact = grow(ctc_log_probs.double(), [(3, 4), (4, 4)], backend="reference")
    assert_same(found, CtcState(*(x.float() for x in exact)))


def test_a_frame_of_nan_allows_no_hypothesis(backend):
    logits = torch.zeros(1, 3, 5)
    logits[0, 1, 3] = NAN
    state = grow(ctc_log_probabilities(logits, torch.tensor([3])), [(3,)], backend=backend)
    assert not any(x.isnan().any() for x in state)
    assert state.next_log_probs[0, 0, EOS] == -INF


@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_probabilities_far_below_the_range_of_float32_are_kept(backend, scale):
    ctc_log_probs = listen(2, 40, 6, scale=scale)
    texts = [(3, 4, 5), (5, 5, 3), (4, 3, 4)]
    found, expected = (grow(ctc_log_probs, texts, backend=name) for name in (backend, "reference"))
    assert_same(found, expected)
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
    ctc_log_probs = listen(2, 5, 6)
    state = ctc_start(ctc_log_probs, 3, eos=EOS)
    assert [tuple(x.shape) for x in state] == [(2, 3, 6), (2, 3), (2, 3, 6)]
    torch.testing.assert_close(state.forward_log_probs[:, 1, 1:], ctc_log_probs[..., 0].cumsum(-1))
    assert (state.forward_log_probs[..., 0] == 0).all() and (state.prefix_log_probs == 0).all()


def test_forbidden_tokens_leave_their_probability_to_the_others():
    logits = torch.randn(1, 4, 6)
    found = ctc_log_probabilities(logits, torch.tensor([4]), (1, 2))
    assert (found[..., 1:3] == -INF).all()
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(1, 4))


def test_inputs_need_not_be_contiguous_and_are_not_modified(backend):
    ctc_log_probs, state, *tokens = random_step(3, 4, 10, 7)

    def turned(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    given = turned(ctc_log_probs), CtcState(*map(turned, state)), *map(turned, tokens)
    found = call(ctc_prefix, *given, eos=EOS, backend=backend)
    assert_same(found, ctc_prefix(ctc_log_probs, state, *tokens, eos=EOS, backend="reference"))
    fresh = random_step(3, 4, 10, 7)
    assert all(torch.equal(x, y) for x, y in zip((given[0], *given[1], *given[2:]), (fresh[0], *fresh[1], *fresh[2:]),
                                                strict=True))  # fmt: skip


def test_an_utterance_has_the_same_bits_alone_and_in_any_batch(cpp):
    lengths = [30, 17, 1, 0, 24]
    ctc_log_probs, state, *tokens = random_step(5, 4, 30, 31, lengths=lengths)
    whole = ctc_prefix(ctc_log_probs, state, *tokens, eos=EOS, backend=cpp)
    for b, n in enumerate(lengths):
        rows = slice(b, b + 1)
        short = CtcState(state.forward_log_probs[rows, :, : n + 1], *(x[rows] for x in state[1:]))
        alone = ctc_prefix(ctc_log_probs[rows, :n], short, *(x[rows] for x in tokens), eos=EOS, backend=cpp)
        assert torch.equal(alone.forward_log_probs[0], whole.forward_log_probs[b, :, : n + 1])
        assert torch.equal(alone.next_log_probs[0], whole.next_log_probs[b])
        assert torch.equal(alone.prefix_log_probs[0], whole.prefix_log_probs[b])


def test_two_threads_give_the_same_bits(cpp):
    arguments = random_step(7, 3, 20, 31)
    expected = ctc_prefix(*arguments, eos=EOS, backend=cpp)
    with threads(2):
        found = ctc_prefix(*arguments, eos=EOS, backend=cpp)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def changed(**change):
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
    given = changed(**change)
    state = CtcState(*(given.pop(name) for name in CtcState._fields))
    ctc_log_probs, eos = given.pop("ctc_log_probs"), given.pop("eos")
    with pytest.raises(ValueError, match=message):
        ctc_prefix(ctc_log_probs, state, *given.values(), eos=eos)


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
