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


def listen(B=2, T=6, V=5, lengths=None, seed=0, scale=2.0, never=(NONE, EOS)):
    """Log-probabilities of frames for which <sos> and <eos> are no tokens."""
    logits = scale * torch.randn(B, T, V, generator=torch.Generator().manual_seed(seed))
    return ctc_log_probabilities(logits, torch.as_tensor(lengths or [T] * B), never)


def grow(frames, texts, *, backend, eos=EOS):
    """The state of each text, one for each hypothesis of every utterance, token by token; texts equally long."""
    B, K = len(frames), len(texts)
    state, tokens = ctc_start(frames, K, eos=eos), torch.full((B, K), NONE)
    parents = torch.arange(K).expand(B, K)
    for column in zip(*texts, strict=True):
        chosen = torch.tensor(column).expand(B, K)
        state = call(ctc_prefix, frames, state, tokens, parents, chosen, eos=eos, backend=backend)
        tokens = chosen
    return state


def read(path):
    """What a path of one token a frame reads."""
    return tuple(v for v, _ in itertools.groupby(path) if v)


def brute_force(frames):
    """Probabilities of all readings of frames (T, V), summed over all paths."""
    found = {}
    for path in itertools.product(range(frames.shape[1]), repeat=len(frames)):
        probability = math.exp(sum(float(frames[t, v]) for t, v in enumerate(path)))
        found[read(path)] = found.get(read(path), 0.0) + probability
    return found


def log(x):
    return math.log(x) if x > 0 else -INF


def random_step(B, K, T, V, seed=0, lengths=None):
    """A step in the middle of a search: everything that ctc_prefix takes."""
    frames = listen(B, T, V, lengths, seed)
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(3, V, (3, B, K), generator=generator)
    texts[1, :, ::2] = texts[0, :, ::2]
    state, tokens = ctc_start(frames, K, eos=EOS), torch.full((B, K), NONE)
    for chosen in texts:
        parents = torch.randint(0, K, (B, K), generator=generator)
        arguments = frames, state, tokens, parents, chosen
        state = ctc_prefix(*arguments, eos=EOS, backend="reference")
        tokens = chosen
    return arguments


def assert_same(found, expected):
    for name, x, y in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=5e-5, rtol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("T", [1, 2, 3, 5])
@pytest.mark.parametrize("text", [(), (3,), (4,), (3, 3), (3, 4), (3, 3, 3), (3, 4, 3), (4, 4, 3)])
def test_scores_are_sums_over_all_paths(backend, T, text):
    frames = listen(1, T, 5, scale=1.0)
    state = grow(frames, [text], backend=backend)
    every = brute_force(frames[0].double())

    def begins(prefix):
        return log(sum(p for reading, p in every.items() if reading[: len(prefix)] == prefix))

    prefix = begins(text)
    assert float(state.prefixes) == pytest.approx(prefix, abs=1e-5)
    assert float(state.alphas[0, 0, -1]) == pytest.approx(log(every.get(text, 0.0)), abs=1e-5)
    for v, gain in enumerate(state.gains[0, 0].tolist()):
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
    frames, state, *tokens = arguments
    state64 = CtcState(*(x.double() for x in state))
    exact = ctc_prefix(frames.double(), state64, *tokens, eos=EOS, backend="reference")
    usual = ctc_prefix(*arguments, eos=EOS, backend="reference")
    found = call(ctc_prefix, *arguments, eos=EOS, backend=backend)
    for x, y, z in zip(found, usual, exact, strict=True):
        there = z.isfinite()
        error, allowed = ((a.double() - z)[there].abs().max() for a in (x, y))
        assert torch.equal(x.isneginf(), z.isneginf()) and error <= 4 * allowed + 1e-6 * z[there].abs().max()


@pytest.mark.parametrize("length", [1, 2, 9])
def test_the_end_is_what_ctc_loss_is_the_negative_of(backend, length):
    frames, text = listen(2, 20, 7, [20, 13]), [3, 3, 4, 6, 5, 5, 3, 4, 4][:length]
    state = grow(frames, [text], backend=backend)
    targets, target_lengths = torch.tensor([text, text]), torch.tensor([length, length])
    loss = F.ctc_loss(frames.transpose(0, 1), targets, torch.tensor([20, 13]), target_lengths, reduction="none")
    torch.testing.assert_close(state.alphas[:, 0, -1], -loss)
    torch.testing.assert_close(state.gains[:, 0, EOS] + state.prefixes[:, 0], -loss)


@pytest.mark.parametrize("text", [(), (3,), (4, 4), (3, 4, 3, 3)])
def test_the_continuations_and_the_end_are_all_that_a_prefix_can_become(backend, text):
    state = grow(listen(3, 12, 6, [12, 7, 5]), [text, text[::-1]], backend=backend)
    torch.testing.assert_close(state.gains.logsumexp(-1), torch.zeros(3, 2), atol=2e-6, rtol=0.0)


def test_a_token_comes_twice_only_with_a_blank_between(backend):
    frames = torch.full((1, 3, 5), -INF)
    frames[0, :, 3] = 0.0  # certainly three frames of one token
    state = grow(frames, [(3,)], backend=backend)
    assert state.gains[0, 0].tolist() == [-INF, -INF, 0.0, -INF, -INF]
    frames[0, 1], frames[0, 1, 0] = -INF, 0.0
    assert grow(frames, [(3,)], backend=backend).gains[0, 0].tolist() == [-INF, -INF, -INF, 0.0, -INF]


def test_what_no_frames_can_read_stays_impossible_without_nan(backend):
    frames = listen(2, 4, 5, [4, 2])
    state = grow(frames, [(3, 4, 3, 4, 3), (3, 3, 3, 4, 4)], backend=backend)
    assert (state.prefixes == -INF).all() and (state.gains == -INF).all() and (state.alphas == -INF).all()


@pytest.mark.parametrize("T", [0, 3])
def test_no_frames_read_nothing_but_the_end(backend, T):
    frames = listen(2, T, 5, [0, 0])
    empty = ctc_start(frames, 2, eos=EOS)
    assert empty.gains[0, 0].tolist() == [-INF, -INF, 0.0, -INF, -INF]
    state = grow(frames, [(3,), (4,)], backend=backend)
    assert (state.gains == -INF).all() and (state.prefixes == -INF).all()


def test_padding_is_ignored(backend):
    logits = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    logits[1, 4:] = NAN
    frames = ctc_log_probabilities(logits, torch.tensor([9, 4]), (NONE, EOS))
    short = ctc_log_probabilities(logits[1:, :4], torch.tensor([4]), (NONE, EOS))
    texts = [(3, 4), (5, 5), (4, 3)]
    found, expected = (grow(x, texts, backend=backend) for x in (frames, short))
    assert_same(CtcState(found.alphas[1:, :, :5], *(x[1:] for x in found[1:])), expected)
    assert (found.alphas[1, :, 5:] == found.alphas[1, :, 4:5]).all()


@pytest.mark.parametrize("certain", [[0], [0, 1, 2], [3], [5, 6]])
def test_frames_that_are_certainly_blank_count_as_any_other(backend, certain):
    frames = listen(1, 8, 9)
    frames[:, certain] = torch.tensor([0.0] + 8 * [-INF])
    found = grow(frames, [(3, 4), (4, 4)], backend=backend)
    exact = grow(frames.double(), [(3, 4), (4, 4)], backend="reference")
    assert_same(found, CtcState(*(x.float() for x in exact)))


def test_a_frame_without_numbers_allows_nothing(backend):
    logits = torch.zeros(1, 3, 5)
    logits[0, 1, 3] = NAN
    state = grow(ctc_log_probabilities(logits, torch.tensor([3])), [(3,)], backend=backend)
    assert not any(x.isnan().any() for x in state)
    assert state.gains[0, 0, EOS] == -INF


@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_probabilities_far_below_the_range_of_float32_are_kept(backend, scale):
    frames = listen(2, 40, 6, scale=scale)
    texts = [(3, 4, 5), (5, 5, 3), (4, 3, 4)]
    found, expected = (grow(frames, texts, backend=name) for name in (backend, "reference"))
    assert_same(found, expected)
    assert expected.gains.min(-1).values.isneginf().all() and (expected.gains[expected.gains.isfinite()] < -90).any()


def test_finished_hypotheses_hold_no_nan(backend):
    frames, state, tokens, parents, chosen = random_step(2, 4, 9, 7)
    chosen[:, 1], chosen[:, 2] = EOS, 0
    after = call(ctc_prefix, frames, state, tokens, parents, chosen, eos=EOS, backend=backend)
    again = call(ctc_prefix, frames, after, chosen, torch.arange(4).expand(2, 4), torch.full((2, 4), EOS), eos=EOS,
                 backend=backend)  # fmt: skip
    assert not any(x.isnan().any() for x in (*after, *again))


def test_a_start_has_one_state_for_every_hypothesis():
    frames = listen(2, 5, 6)
    state = ctc_start(frames, 3, eos=EOS)
    assert [tuple(x.shape) for x in state] == [(2, 3, 6), (2, 3), (2, 3, 6)]
    torch.testing.assert_close(state.alphas[:, 1, 1:], frames[..., 0].cumsum(-1))
    assert (state.alphas[..., 0] == 0).all() and (state.prefixes == 0).all()


def test_tokens_that_never_come_leave_their_probability_to_the_others():
    logits = torch.randn(1, 4, 6)
    found = ctc_log_probabilities(logits, torch.tensor([4]), (1, 2))
    assert (found[..., 1:3] == -INF).all()
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(1, 4))


def test_inputs_need_not_be_contiguous_and_are_left_alone(backend):
    frames, state, *tokens = random_step(3, 4, 10, 7)

    def turned(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    given = turned(frames), CtcState(*map(turned, state)), *map(turned, tokens)
    found = call(ctc_prefix, *given, eos=EOS, backend=backend)
    assert_same(found, ctc_prefix(frames, state, *tokens, eos=EOS, backend="reference"))
    fresh = random_step(3, 4, 10, 7)
    assert all(torch.equal(x, y) for x, y in zip((given[0], *given[1], *given[2:]), (fresh[0], *fresh[1], *fresh[2:]),
                                                strict=True))  # fmt: skip


def test_an_utterance_has_one_answer_alone_and_in_any_batch(cpp):
    lengths = [30, 17, 1, 0, 24]
    frames, state, *tokens = random_step(5, 4, 30, 31, lengths=lengths)
    whole = ctc_prefix(frames, state, *tokens, eos=EOS, backend=cpp)
    for b, n in enumerate(lengths):
        rows = slice(b, b + 1)
        short = CtcState(state.alphas[rows, :, : n + 1], state.prefixes[rows], state.gains[rows])
        alone = ctc_prefix(frames[rows, :n], short, *(x[rows] for x in tokens), eos=EOS, backend=cpp)
        assert torch.equal(alone.alphas[0], whole.alphas[b, :, : n + 1])
        assert torch.equal(alone.gains[0], whole.gains[b]) and torch.equal(alone.prefixes[0], whole.prefixes[b])


def test_two_threads_give_the_same_answer(cpp):
    arguments = random_step(7, 3, 20, 31)
    expected = ctc_prefix(*arguments, eos=EOS, backend=cpp)
    with threads(2):
        found = ctc_prefix(*arguments, eos=EOS, backend=cpp)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def changed(**change):
    frames, state, tokens, parents, chosen = random_step(2, 3, 6, 5)
    good = {"frames": frames, **state._asdict(), "tokens": tokens, "parents": parents, "chosen": chosen, "eos": EOS}
    return {**good, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": torch.zeros(6, 5)}, r"frames must be \(B, T, V\)"),
        ({"tokens": torch.zeros(3).long()}, r"tokens must be \(B, K\) int64"),
        ({"alphas": torch.zeros(2, 3, 6)}, r"state.alphas must be \(2, 3, 7\) .* like frames; got \(2, 3, 6\)"),
        ({"prefixes": torch.zeros(2, 3).double()}, r"state.prefixes must be .* got \(2, 3\) torch.float64"),
        ({"gains": torch.zeros(2, 3, 4)}, r"state.gains must be \(2, 3, 5\)"),
        ({"parents": torch.zeros(2, 3)}, r"parents must be \(2, 3\) torch.int64"),
        ({"chosen": torch.zeros(2, 2).long()}, r"chosen must be \(2, 3\) torch.int64"),
        ({"eos": 5}, "eos must be a token from 0 to 4; got 5"),
    ],
)  # fmt: skip
def test_disagreeing_arguments_are_explained(change, message):
    given = changed(**change)
    state = CtcState(*(given.pop(name) for name in CtcState._fields))
    frames, eos = given.pop("frames"), given.pop("eos")
    with pytest.raises(ValueError, match=message):
        ctc_prefix(frames, state, *given.values(), eos=eos)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": torch.zeros(2, 6, 5).double()}, r"frames must be \(B, T, V\) float32; got .* Double"),
        ({"alphas": torch.zeros(2, 3, 6)}, r"alphas must be \[2, 3, 7\] Float like frames; got \[2, 3, 6\]"),
        ({"gains": torch.zeros(2, 3, 4)}, r"gains must be \[2, 3, 5\] Float"),
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
    frames, state, *tokens = random_step(2, 3, 6, 5)
    compiled, graphs = compile_and_count(lambda f, a, p, g, *x: ctc_prefix(f, CtcState(a, p, g), *x, eos=EOS))
    assert_same(compiled(frames, *state, *tokens), ctc_prefix(frames, state, *tokens, eos=EOS))
    assert len(graphs) == 1
