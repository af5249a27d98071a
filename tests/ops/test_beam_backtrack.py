import pytest
import torch
from calls import call, compile_and_count, ops_called, threads

from las_fast.ops import beam_backtrack

EOS = 2
INF = torch.inf


def random(L, B, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (L, B, K)
    tokens, parents, attended_frames = (torch.randint(0, n, shape, generator=generator) for n in (9, max(K, 1), 100))
    return tokens, parents, -torch.rand(shape, generator=generator).cumsum(0), attended_frames


def plain(tokens, parents, scores, attended_frames, b, k):
    """(token, token score, attended frame) of each step of one hypothesis."""
    steps, beam = [], k
    for t in reversed(range(tokens.shape[0])):
        token, score, parent = int(tokens[t, b, beam]), scores[t, b, beam], int(parents[t, b, beam])
        before = scores[t - 1, b, parent] if t else torch.tensor(0.0)
        steps.insert(0, (token, float(score - before), int(attended_frames[t, b, parent])))
        beam = parent
    return steps


@pytest.mark.parametrize(
    ("L", "B", "K"), [(1, 1, 1), (7, 3, 4), (33, 2, 8), (5, 64, 13), (3, 2, 64), (0, 2, 3), (4, 0, 2), (4, 2, 0)]
)
def test_hypotheses_follow_the_pointers(backend, L, B, K):
    history = random(L, B, K)
    actual = call(beam_backtrack, *history, eos=EOS, backend=backend)
    assert actual.tokens.shape == actual.token_scores.shape == actual.attended_frames.shape == (B, K, L)
    assert actual.lengths.shape == (B, K)
    for b in range(B):
        for k in range(K):
            steps = plain(*history, b, k)
            text = [token for token, _, _ in steps]
            n = text.index(EOS) if EOS in text else L
            assert actual.tokens[b, k].tolist() == text[:n] + [EOS] * (L - n)
            assert int(actual.lengths[b, k]) == n
            assert actual.token_scores[b, k].tolist() == [score for _, score, _ in steps]
            assert actual.attended_frames[b, k].tolist() == [frame for _, _, frame in steps]


def test_token_scores_add_up_to_the_score_of_the_hypothesis(backend):
    tokens, parents, scores, attended_frames = random(40, 3, 5)
    actual = call(beam_backtrack, tokens, parents, scores, attended_frames, eos=EOS, backend=backend)
    torch.testing.assert_close(actual.token_scores.double().sum(-1).float(), scores[-1])


def test_a_finished_beam_adds_nothing_and_its_eos_has_a_score(backend):
    tokens = torch.tensor([[[5]], [[EOS]], [[EOS]]])
    scores = torch.tensor([[[-1.0]], [[-1.5]], [[-1.5]]])
    nothing = torch.zeros_like(tokens)
    actual = call(beam_backtrack, tokens, nothing, scores, nothing, eos=EOS, backend=backend)
    assert actual.lengths.tolist() == [[1]] and actual.token_scores.tolist() == [[[-1.0, -0.5, 0.0]]]


def test_hypotheses_that_do_not_exist_have_no_nan(backend):
    tokens, parents, scores, attended_frames = random(6, 2, 3)
    scores[2:, 1] = -INF
    actual = call(beam_backtrack, tokens, parents, scores, attended_frames, eos=EOS, backend=backend)
    assert actual.token_scores[1, :, 2].tolist() == [-INF] * 3 and (actual.token_scores[1, :, 3:] == 0).all()
    assert not actual.token_scores.isnan().any()


def test_without_eos_a_hypothesis_is_as_long_as_the_search(backend):
    tokens, parents, scores, attended_frames = random(6, 2, 3)
    actual = call(beam_backtrack, tokens.clamp(min=EOS + 1), parents, scores, attended_frames, eos=EOS, backend=backend)
    assert (actual.lengths == 6).all() and (actual.tokens != EOS).all()


def test_inputs_need_not_be_contiguous(backend):
    history = random(5, 4, 3)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in history]
    assert not any(x.is_contiguous() for x in strided)
    actual = call(beam_backtrack, *strided, eos=EOS, backend=backend)
    for a, b in zip(actual, beam_backtrack(*history, eos=EOS, backend="reference"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_parent_out_of_range_is_an_error_and_not_a_crash(backend, bad, step):
    tokens, parents, scores, attended_frames = random(4, 2, 3)
    parents[step, 1] = bad
    with pytest.raises(RuntimeError):
        beam_backtrack(tokens, parents, scores, attended_frames, eos=EOS, backend=backend)


def test_disagreeing_arguments_are_explained():
    tokens, parents, scores, attended_frames = random(3, 2, 4)
    with pytest.raises(ValueError, match=r"tokens must be \(L, B, K\) int64; got \(2, 4\)"):
        beam_backtrack(tokens[0], parents, scores, attended_frames, eos=EOS)
    with pytest.raises(ValueError, match=r"parents must be \(3, 2, 4\) torch.int64 .* got .* torch.int32"):
        beam_backtrack(tokens, parents.int(), scores, attended_frames, eos=EOS)
    with pytest.raises(ValueError, match=r"scores must be .* torch.float32 .* got .* torch.float64"):
        beam_backtrack(tokens, parents, scores.double(), attended_frames, eos=EOS)
    with pytest.raises(ValueError, match=r"attended_frames must be \(3, 2, 4\) .* like tokens; got \(2, 2, 4\)"):
        beam_backtrack(tokens, parents, scores, attended_frames[:2], eos=EOS)


def test_auto_takes_the_cpp_path_on_a_cpu(cpp):
    history = random(6, 2, 3)
    assert ops_called(lambda: beam_backtrack(*history, eos=EOS)) == ["las_fast::beam_backtrack_cpp"]


def test_the_registered_op_passes_opcheck(cpp):
    torch.library.opcheck(torch.ops.las_fast.beam_backtrack_cpp.default, (*random(6, 2, 3), EOS))


def test_the_registered_op_checks_its_own_arguments(cpp):
    tokens, parents, scores, attended_frames = random(6, 2, 3)
    op = torch.ops.las_fast.beam_backtrack_cpp
    with pytest.raises(RuntimeError, match=r"tokens must be \(L, B, K\) int64; got \[6, 2, 3\] Int"):
        op(tokens.int(), parents, scores, attended_frames, EOS)
    with pytest.raises(RuntimeError, match=r"parents must be \[6, 2, 3\] Long like tokens; got \[3, 2, 3\]"):
        op(tokens, parents[:3], scores, attended_frames, EOS)
    with pytest.raises(RuntimeError, match=r"scores must be \[6, 2, 3\] Float like tokens; got .* Double"):
        op(tokens, parents, scores.double(), attended_frames, EOS)
    parents[4, 1] = 9
    with pytest.raises(RuntimeError, match="parents must be from 0 to 2; got 9 at step 4 of utterance 1"):
        op(tokens, parents, scores, attended_frames, EOS)


def test_it_compiles_into_one_graph(cpp):
    history = random(6, 2, 3)
    compiled, graphs = compile_and_count(lambda *x: beam_backtrack(*x, eos=EOS))
    for a, b in zip(compiled(*history), beam_backtrack(*history, eos=EOS), strict=True):
        assert torch.equal(a, b)
    assert len(graphs) == 1


def test_two_threads_give_the_same_bits(cpp):
    history = random(800, 64, 16)  # some milliseconds per thread, so that both run at the same time
    with threads(2):
        actual = beam_backtrack(*history, eos=EOS, backend=cpp)
    for a, b in zip(actual, beam_backtrack(*history, eos=EOS, backend="reference"), strict=True):
        assert torch.equal(a, b)
