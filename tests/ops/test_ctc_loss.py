import itertools
import math

import pytest
import torch
from calls import LAYOUTS, call, compile_and_count, lanes, ops_called, threads
from torch.nn import functional as F

from las_fast.ops import ctc_loss, ctc_token_times, padding_mask

INF, NAN = torch.inf, torch.nan
SIZES = [  # B, T, V, S
    (1, 1, 2, 1),
    (3, 5, 4, 2),
    (2, 17, 31, 15),
    (3, 40, 31, 16),
    (4, 33, 5, 17),
    (2, 64, 100, 31),
    (5, 158, 31, 73),
    (2, 300, 7, 3),
]
per_size = pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))


def inputs(B=3, T=9, V=6, S=4, seed=0, scale=3.0):
    """Logits, lengths, tokens with repeats, and token_lengths; the last utterance has lengths T and S."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(B, T, V, generator=generator)
    lengths = torch.randint((T + 1) // 2, T + 1, (B,), generator=generator)
    tokens = torch.randint(1, V, (B, S), generator=generator)
    token_lengths = torch.randint(0, S + 1, (B,), generator=generator)
    lengths[-1], token_lengths[-1] = T, S
    return logits, lengths, tokens, token_lengths


def all_results(logits, *rest, backend, weights=None):
    """The losses, the gradient of their weighted sum, and the token times."""
    leaf = logits.detach().clone().requires_grad_()
    losses = call(ctc_loss, leaf, *rest, backend=backend)
    (gradient,) = torch.autograd.grad(losses @ (torch.ones_like(losses) if weights is None else weights), leaf)
    return losses.detach(), gradient, call(ctc_token_times, logits, *rest, backend=backend)


def assert_same(actual, expected, **tolerance):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b.to(a), **tolerance)


@per_size
@pytest.mark.parametrize("scale", [0.5, 6.0])
def test_values_gradients_and_times_err_at_most_half_as_much_again_as_torch(backend, sizes, scale):
    arguments = inputs(*sizes, scale=scale)
    exact = all_results(arguments[0].double(), *arguments[1:], backend="reference")
    baseline = all_results(*arguments, backend="reference")
    for a, b, c in zip(all_results(*arguments, backend=backend), baseline, exact, strict=True):
        rounding = 4 * torch.finfo(torch.float32).eps * float(c.abs().max().clamp_min(1))
        assert (a - c).abs().max() <= 1.5 * (b - c).abs().max() + rounding


def confident_inputs(T=1000, S=400):
    """One utterance whose logits are confident of an alignment."""
    logits, lengths, tokens, token_lengths = inputs(1, T, 31, S, scale=1.0)
    frames = (torch.arange(S) + 0.5) * T / S
    likely = torch.zeros(T, dtype=torch.int64).scatter(0, frames.long(), tokens[0])
    return logits + 12 * F.one_hot(likely, 31), lengths, tokens, token_lengths


@pytest.mark.parametrize(
    "arguments",
    [inputs(2, 3000, 31, 500), confident_inputs(), (inputs(2, 200, 31, 50)[0] + 1e4, *inputs(2, 200, 31, 50)[1:])],
    ids=["long", "confident", "offset"],
)
def test_long_utterances_are_as_accurate_as_the_reference(cpp, arguments):
    exact = all_results(arguments[0].double(), *arguments[1:], backend="reference")
    baseline = all_results(*arguments, backend="reference")
    actual = all_results(*arguments, backend=cpp)
    for a, b, c in zip(actual, baseline, exact, strict=True):
        assert (a - c).abs().max() < 1.1 * (b - c).abs().max() + 1e-6


def paths_of(text, T, V, allow_repeats):
    """Yield the paths of T frames that spell the text: the number of each frame's token from 1, or 0 for a blank.

    allow_repeats: equal neighbouring tokens need no blank between them.
    """
    for path in itertools.product(range(-len(text), len(text) + 1), repeat=T):
        # -u is a blank after u tokens, u > 0 the u-th token
        begun = [abs(x) for x in (0, *path)]
        steps = list(zip((0, *path), path, strict=False))
        follows = all(
            (now == -abs(before)) or now == before or (now == abs(before) + 1
            and (allow_repeats or before <= 0 or text[now - 1] != text[now - 2]))
            for before, now in steps
        )  # fmt: skip
        if follows and begun[-1] == len(text):
            yield [max(x, 0) for x in path]


@pytest.mark.parametrize("text", [[1], [1, 2], [1, 1], [2, 1, 1], []])
def test_losses_and_times_are_sums_over_all_paths(backend, text):
    T, V = 4, 3
    logits = torch.randn(1, T, V, generator=torch.Generator().manual_seed(3))
    p = logits[0].softmax(-1).double()
    actual = all_results(logits, torch.tensor([T]), torch.tensor([text]).long().view(1, -1), torch.tensor([len(text)]),
                       backend=backend)  # fmt: skip

    def probability(times):
        return math.prod(float(p[t, text[u - 1] if u else 0]) for t, u in enumerate(times))

    total = sum(map(probability, paths_of(text, T, V, allow_repeats=False)))
    assert actual[0].item() == pytest.approx(-math.log(total) if total else 0.0, rel=1e-5)
    for u in range(1, len(text) + 1):
        weights = [[probability(path) * (x == u) for x in path] for path in paths_of(text, T, V, allow_repeats=True)]
        mass = sum(map(sum, weights))
        expected = sum(t * w for row in weights for t, w in enumerate(row)) / mass
        assert actual[2][0, u - 1].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_repeated_token_needs_a_blank_in_the_loss_but_not_in_the_alignment(backend):
    tokens, two = torch.tensor([[1, 1]]), torch.tensor([2])
    loss, gradient, times = all_results(torch.randn(1, 2, 3), two, tokens, two, backend=backend)
    assert loss == 0 and (gradient == 0).all()
    torch.testing.assert_close(times, torch.tensor([[0.0, 1.0]]))


def test_an_utterance_without_a_path_has_loss_zero(backend):
    logits, tokens = torch.randn(4, 3, 5), torch.tensor([[1, 2, 3, 4]]).expand(4, 4)
    lengths, token_lengths = torch.tensor([3, 3, 0, 0]), torch.tensor([4, 3, 1, 0])
    losses, gradient, times = all_results(logits, lengths, tokens, token_lengths, backend=backend)
    assert (losses[[0, 2, 3]] == 0).all() and losses[1] > 0
    assert (gradient[[0, 2, 3]] == 0).all() and gradient[1].abs().sum() > 0
    assert (times[[0, 2, 3]] == 0).all()
    torch.testing.assert_close(times[1], torch.tensor([0.0, 1.0, 2.0, 0.0]))


def test_token_times_are_finite_for_an_impossible_transcript(backend):
    logits, lengths, tokens, token_lengths = inputs()
    logits[-1, :, int(tokens[-1, 0])] = -torch.inf
    actual = call(ctc_token_times, logits, lengths, tokens, token_lengths, backend=backend)
    assert actual.isfinite().all()


def test_an_empty_transcript_is_all_blanks(backend):
    logits, lengths = torch.randn(2, 6, 4), torch.tensor([6, 2])
    losses, gradient, times = all_results(logits, lengths, torch.empty(2, 0).long(), torch.zeros(2).long(),
                                          backend=backend)  # fmt: skip
    log_p = logits.log_softmax(-1)[..., 0]
    torch.testing.assert_close(losses, -torch.stack([log_p[0].sum(), log_p[1, :2].sum()]))
    assert times.shape == (2, 0) and (gradient[1, 2:] == 0).all()


def test_padding_full_of_nan_does_not_matter(cpp):
    logits, lengths, tokens, token_lengths = inputs(5, 20, 6, 4)
    expected = all_results(logits, lengths, tokens, token_lengths, backend=cpp)
    padding = padding_mask(lengths, 20)
    dirty = logits.clone()
    dirty[padding] = NAN
    padded_tokens = tokens.masked_fill(padding_mask(token_lengths, 4), 10**6)
    actual = all_results(dirty, lengths, padded_tokens, token_lengths, backend=cpp)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert (actual[1][padding] == 0).all()


@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_in_a_valid_frame_propagates(backend, value):
    logits, lengths, tokens, token_lengths = inputs()
    logits[2, 3, 1] = value
    losses, gradient, _ = all_results(logits, lengths, tokens, token_lengths, backend=backend)
    assert losses[2].isnan() and losses[:2].isfinite().all()
    assert gradient[2].isnan().any() and gradient[:2].isfinite().all()


def test_hostile_logits_stay_finite(backend):
    logits, lengths, tokens, token_lengths = inputs(4, 30, 6, 4)
    actual = all_results(1e4 * logits, lengths, tokens, token_lengths, backend=backend)
    exact = all_results(1e4 * logits.double(), lengths, tokens, token_lengths, backend="reference")
    torch.testing.assert_close(actual[0], exact[0].float(), rtol=1e-6, atol=0.0)
    assert all(x.isfinite().all() for x in actual)
    assert backend == "reference" or actual[1].abs().max() <= 1 + 1e-6  # torch's error is larger


def test_frames_that_must_be_blank_are_supported(cpp):
    """torch's gradient of -inf is NaN, so the reference gets -1e4, which makes no difference."""
    logits, *rest = inputs(4, 30, 6, 4)
    logits[:, ::2, 1:] = -INF
    actual = all_results(logits, *rest, backend=cpp)
    exact = all_results(logits.double().clamp_min(-1e4), *rest, backend="reference")
    assert_same(actual, exact, rtol=1e-4, atol=1e-4)


def test_an_impossible_transcript_has_loss_zero(backend):
    logits, lengths, tokens, token_lengths = inputs()
    logits[2, :, tokens[2, 0]] = -INF
    losses, gradient, _ = all_results(logits, lengths, tokens, token_lengths, backend=backend)
    assert losses[2] == 0 and (gradient[2] == 0).all() and losses[:2].isfinite().all()


def test_an_utterance_has_the_same_bits_alone_and_in_any_batch(cpp):
    logits, lengths, tokens, token_lengths = inputs(7, 50, 31, 24)
    batched = all_results(logits, lengths, tokens, token_lengths, backend=cpp)
    for b, (n, s) in enumerate(zip(lengths.tolist(), token_lengths.tolist(), strict=True)):
        row = slice(b, b + 1)
        alone = all_results(logits[row, :n], lengths[row], tokens[row, :s], token_lengths[row], backend=cpp)
        for a, expected, length in zip(alone, batched, (None, n, s), strict=True):
            assert torch.equal(a[0], expected[b] if length is None else expected[b, :length])


def test_the_first_token_is_not_compared_with_the_previous_utterance(backend):
    logits, lengths, _, token_lengths = inputs(3, 9, 6, 4)
    tokens, full_lengths = torch.tensor([[2, 3, 4, 5], [5, 4, 3, 2], [2, 2, 3, 3]]), torch.full_like(token_lengths, 4)
    exact = all_results(logits.double(), lengths, tokens, full_lengths, backend="reference")
    assert_same(all_results(logits, lengths, tokens, full_lengths, backend=backend), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("number", [2, 3, 8])
def test_any_number_of_threads_gives_the_same_bits(cpp, number):
    arguments = inputs(9, 50, 31, 24)
    expected = all_results(*arguments, backend=cpp)
    with threads(number):
        actual = all_results(*arguments, backend=cpp)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("relayout", LAYOUTS.values(), ids=LAYOUTS)
def test_inputs_need_not_be_contiguous_and_are_not_modified(backend, relayout):
    logits, lengths, tokens, token_lengths = inputs()
    logits = relayout(logits)
    tokens = torch.cat([tokens, tokens], 1)[:, : tokens.shape[1]]
    before = logits.clone()
    actual = all_results(logits, lengths, tokens, token_lengths, backend=backend)
    contiguous = all_results(logits.contiguous(), lengths, tokens.contiguous(), token_lengths, backend=backend)
    assert_same(actual, contiguous)
    assert torch.equal(logits, before)


def test_the_weight_of_a_loss_scales_only_its_own_gradient(backend):
    arguments, weights = inputs(), torch.tensor([2.0, 0.0, -0.5])
    plain = all_results(*arguments, backend=backend)[1]
    weighted = all_results(*arguments, backend=backend, weights=weights)[1]
    torch.testing.assert_close(weighted, plain * weights[:, None, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_converted_to_float32(backend, dtype):
    logits, *rest = inputs()
    logits = logits.to(dtype)
    losses, gradient, times = all_results(logits, *rest, backend=backend)
    expected = all_results(logits.float(), *rest, backend=backend)
    assert losses.dtype == times.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(losses, expected[0]) and torch.equal(times, expected[2])
    torch.testing.assert_close(gradient, expected[1].to(dtype))


def test_token_times_have_no_gradient(backend):
    arguments = inputs()
    assert not call(ctc_token_times, arguments[0].requires_grad_(), *arguments[1:], backend=backend).requires_grad


def test_without_gradients_no_gradient_is_allocated_and_the_loss_is_equal(cpp):
    arguments = inputs()
    losses, gradient = torch.ops.las_fast.ctc_loss_cpp(*arguments, False)
    again, full = torch.ops.las_fast.ctc_loss_cpp(*arguments, True)
    assert torch.equal(losses, again) and gradient.numel() == 0 and full.shape == arguments[0].shape


def test_a_second_derivative_is_refused_and_not_wrong(cpp):
    logits, *rest = inputs()
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(ctc_loss(logits, *rest, backend=cpp).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_auto_takes_the_cpp_path_on_a_cpu(cpp):
    arguments = inputs()
    assert "las_fast::ctc_loss_cpp" in ops_called(lambda: ctc_loss(*arguments))
    assert ops_called(lambda: ctc_token_times(*arguments))[-1] == "las_fast::ctc_token_times_cpp"


def test_dtypes_that_cpp_lacks_go_to_the_reference(cpp):
    logits, *rest = inputs()
    assert ctc_loss(logits.double(), *rest).dtype == ctc_token_times(logits.double(), *rest).dtype == torch.float64
    with pytest.raises(RuntimeError, match="takes torch.float32; got torch.float64"):
        ctc_loss(logits.double(), *rest, backend=cpp)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_registered_ops_pass_opcheck(cpp, gradients):
    logits, *rest = inputs()
    torch.library.opcheck(torch.ops.las_fast.ctc_loss_cpp.default, (logits.requires_grad_(gradients), *rest, gradients))
    torch.library.opcheck(torch.ops.las_fast.ctc_token_times_cpp.default, (logits.detach(), *rest))


def test_it_compiles_into_one_graph_with_gradients(cpp):
    arguments = inputs()

    def run(logits, *rest):
        return ctc_loss(logits, *rest), ctc_token_times(logits, *rest)

    compiled, graphs = compile_and_count(run)
    leaf = arguments[0].clone().requires_grad_()
    losses, times = compiled(leaf, *arguments[1:])
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    assert_same((losses.detach(), gradient, times), all_results(*arguments, backend=cpp))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, n, y, m: (x[0], n, y, m), r"logits must be \(B, T, V\) of floats; got \(9, 6\)"),
        (lambda x, n, y, m: (x.long(), n, y, m), r"logits must be .* of floats; got .* torch.int64"),
        (lambda x, n, y, m: (x, n[:2], y, m), r"lengths must be \(3,\) int64; got \(2,\)"),
        (lambda x, n, y, m: (x, n, y[:2], m), r"tokens must be \(3, S\) int64 .*; got \(2, 4\)"),
        (lambda x, n, y, m: (x, n, y.int(), m), r"tokens must be .* got .* torch.int32"),
        (lambda x, n, y, m: (x, n, y, m.float()), r"token_lengths must be \(3,\) int64; got \(3,\) torch.float32"),
        (lambda x, n, y, m: (x.to("meta"), n, y, m), "on one device; got cpu, meta"),
    ],
)
def test_disagreeing_arguments_are_explained(change, message):
    for op in (ctc_loss, ctc_token_times):
        with pytest.raises(ValueError, match=message):
            op(*change(*inputs()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, n, y, m: (x.double(), n, y, m), r"logits must be \(B, T, V\) float32 with V > 0; got .* Double"),
        (lambda x, n, y, m: (x[..., :0], n, y, m), r"logits must be .* V > 0; got \[3, 9, 0\]"),
        (lambda x, n, y, m: (x, n + 9, y, m), r"lengths must be from 0 to 9; got"),
        (lambda x, n, y, m: (x, n - 10, y, m), r"lengths must be from 0 to 9; got -"),
        (lambda x, n, y, m: (x, n, y, m + 5), r"token_lengths must be from 0 to 4; got"),
        (lambda x, n, y, m: (x, n, 0 * y, m), r"tokens must be from 1 to 5 within token_lengths; got 0"),
        (lambda x, n, y, m: (x, n, 6 + 0 * y, m), r"tokens must be from 1 to 5 within token_lengths; got 6"),
        (lambda x, n, y, m: (x, n, y[:1], m), r"tokens must be \(3, S\) int64; got \[1, 4\]"),
        (lambda x, n, y, m: (x, n.int(), y, m), r"lengths must be \(3,\) int64; got \[3\] Int"),
    ],
)
def test_the_registered_ops_check_their_own_arguments(cpp, change, message):
    arguments = change(*inputs())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.las_fast.ctc_loss_cpp(*arguments, True)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.las_fast.ctc_token_times_cpp(*arguments)


@pytest.mark.parametrize("length", [4, 8])
def test_results_hold_with_vectors_of_older_processors(cpp, length):
    with lanes(length):
        for sizes in SIZES:
            arguments = inputs(*sizes)
            exact = all_results(arguments[0].double(), *arguments[1:], backend="reference")
            assert_same(all_results(*arguments, backend=cpp), exact, rtol=1e-5, atol=3e-4)
