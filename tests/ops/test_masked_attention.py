import hashlib

import pytest
import torch
from calls import (
    LAYOUTS,
    TESTED_BACKENDS,
    assert_as_accurate_as_plain,
    call,
    compile_and_count,
    digests,
    errors,
    lanes,
    ops_called,
    threads,
)

from las_fast.ops import backends, masked_attention, padding_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = torch.nan
SIZES = [  # B, K, T, D, E
    (1, 1, 1, 1, 1),
    (3, 2, 7, 5, 6),
    (2, 3, 31, 15, 17),
    (2, 4, 32, 16, 16),
    (2, 5, 33, 17, 15),
    (2, 7, 63, 64, 31),
    (2, 8, 64, 33, 128),
    (2, 9, 65, 127, 129),
    (2, 1, 129, 256, 255),
    (1, 64, 131, 13, 257),
    (5, 13, 3, 2, 3),
    (2, 1, 8192, 8, 12),
]
THROUGH = ["context", "weights", "both"]  # outputs with an upstream gradient
SUPPORTED = [
    (x, dtype) for x in TESTED_BACKENDS for dtype in DTYPES if backends.supports_dtype("masked_attention", x, dtype)
]
on_each_dtype = pytest.mark.parametrize(("backend", "dtype"), SUPPORTED, indirect=["backend"])
on_each_half = pytest.mark.parametrize(
    ("backend", "dtype"), [x for x in SUPPORTED if x[1] != torch.float32], indirect=["backend"]
)


def inputs(B=3, K=2, T=7, D=5, E=6, dtype=torch.float32, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, K, D), (B, T, D), (B, T, E))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(grad) for s in shapes]


def some_lengths(B, T):
    return torch.tensor([T, max(T - 1, 0), T // 2, 1, 0][:B])


def op(backend):
    """The op as a function of query, keys, values and lengths."""
    return lambda *x: call(masked_attention, *x, backend=backend)


def plain(query, keys, values, lengths):
    """Softmax attention by the plain formula, in the precision of its inputs."""
    padding = (torch.arange(keys.shape[1]) >= lengths[:, None])[:, None]
    scores = query @ keys.transpose(1, 2) * query.shape[2] ** -0.5
    weights = scores.masked_fill(padding, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(padding, 0.0)
    return weights @ values, weights


def all_results(function, tensors, lengths, through, cotangents):
    """Context, weights, and the gradients of query, keys and values through the named outputs."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    context, weights = function(*leaves, lengths)
    chosen = {"context": [0], "weights": [1], "both": [0, 1]}[through]
    outputs = [(context, weights)[i] for i in chosen]
    upstream = [cotangents[i].to(x) for i, x in zip(chosen, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    zeros = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))
    return [x.detach() for x in (context, weights, *zeros)]


def check_accuracy(backend, sizes, dtype, through):
    B, K, T, D, E = sizes
    tensors, lengths = inputs(*sizes, dtype=dtype), some_lengths(B, T)
    cotangents = inputs(B, K, T, E, E, seed=1)[0].to(dtype), inputs(B, K, 1, T, 1, seed=2)[0]

    actual = all_results(op(backend), tensors, lengths, through, cotangents)
    exact = all_results(plain, [x.double() for x in tensors], lengths, through, [x.double() for x in cotangents])
    baseline = all_results(plain, tensors, lengths, through, cotangents)
    assert_as_accurate_as_plain(("context", "weights", "query", "keys", "values"), actual, exact, baseline, dtype)


@on_each_dtype
@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_values_and_gradients_err_at_most_twice_as_much_as_the_plain_formula(backend, sizes, through, dtype):
    if backend == "triton" and dtype == torch.float32:
        sizes = *sizes[:3], *(min(size, 256) for size in sizes[3:])  # the most that its gradients take
    check_accuracy(backend, sizes, dtype, through)


def test_padding_is_ignored_and_its_weights_are_exactly_zero(backend):
    query, keys, values = inputs()
    lengths = torch.tensor([7, 3, 1])
    context, weights = call(masked_attention, query, keys, values, lengths, backend=backend)
    assert (weights[padding_mask(lengths, 7)[:, None].expand_as(weights)] == 0).all()
    keys[1, 3:], values[1, 3:] = 1e4, -1e4
    again, _ = call(masked_attention, query, keys, values, lengths, backend=backend)
    assert torch.equal(again, context)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
def test_padding_full_of_nan_does_not_matter(backend, dtype):
    clean, lengths = inputs(5, 3, 70, 19, 21, dtype), some_lengths(5, 70)
    dirty = [x.clone() for x in clean]
    for x in dirty[1:]:
        x[padding_mask(lengths, 70)] = NAN
    cotangents = inputs(5, 3, 70, 21, 21, seed=1)[0], torch.ones(5, 3, 70)
    results = [all_results(op(backend), tensors, lengths, "both", cotangents) for tensors in (clean, dirty)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    for gradient in results[1][3:]:
        assert (gradient[padding_mask(lengths, 70)] == 0).all()


def test_nan_in_a_valid_frame_propagates(backend):
    query, keys, values = inputs()
    keys[1, 2] = NAN
    context, weights, peaks = call(masked_attention, query, keys, values, torch.full((3,), 7), peaks=True,
                                   backend=backend)  # fmt: skip
    assert context[1].isnan().all() and weights[1].isnan().all() and context[[0, 2]].isfinite().all()
    assert ((peaks >= 0) & (peaks < 7)).all()


def test_the_last_valid_frame_gets_weight(backend):
    query, keys, values = inputs(B=1)
    _, weights = call(masked_attention, query, keys, values, torch.tensor([4]), backend=backend)
    assert (weights[:, :, :4] > 0).all() and (weights[:, :, 4:] == 0).all()


@on_each_dtype
def test_length_zero_gives_zeros_and_no_nan_in_values_or_gradients(backend, dtype):
    tensors, lengths = inputs(dtype=dtype), torch.tensor([0, 7, 2])
    context, weights, peaks = call(masked_attention, *tensors, lengths, peaks=True, backend=backend)
    assert (context[0] == 0).all() and (weights[0] == 0).all() and (peaks[0] == 0).all()

    for gradient in all_results(op(backend), tensors, lengths, "both", (torch.ones(3, 2, 6), torch.ones(3, 2, 7)))[2:]:
        assert gradient.isfinite().all() and (gradient[0] == 0).all()


def test_no_frames_at_all_give_zeros(backend):
    tensors, lengths = inputs(T=0), torch.zeros(3, dtype=torch.int64)
    context, weights, peaks = call(masked_attention, *tensors, lengths, peaks=True, backend=backend)
    assert context.shape == (3, 2, 6) and not context.any() and weights.shape == (3, 2, 0)
    assert peaks.dtype == torch.int64 and peaks.tolist() == [[0, 0]] * 3

    gradients = all_results(op(backend), tensors, lengths, "both", (torch.ones(3, 2, 6), torch.ones(3, 2, 0)))[2:]
    assert (gradients[0] == 0).all() and gradients[1].shape == (3, 0, 5)


@pytest.mark.parametrize("sizes", [(0, 2, 7, 5, 6), (3, 0, 7, 5, 6)], ids=["no utterance", "no query"])
def test_empty_inputs_give_empty_results(backend, sizes):
    B, K, T, _, E = sizes
    lengths = torch.zeros(B, dtype=torch.int64)
    context, weights, peaks = call(masked_attention, *inputs(*sizes), lengths, peaks=True, backend=backend)
    assert context.shape == (B, K, E) and weights.shape == (B, K, T) and peaks.shape == (B, K)


def test_gradients_of_the_reference_pass_gradcheck():
    tensors, lengths = (x.detach().double().requires_grad_() for x in inputs(B=2, T=4)), torch.tensor([4, 2])
    assert torch.autograd.gradcheck(lambda *x: masked_attention(*x, lengths), tuple(tensors))


@pytest.mark.parametrize("requested", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_any_subset_of_the_gradients_can_be_requested(backend, requested):
    tensors, lengths = inputs(), torch.tensor([7, 3, 1])

    def gradients(requested, backend):
        leaves = [x.detach().requires_grad_(i in requested) for i, x in enumerate(tensors)]
        context, _ = call(masked_attention, *leaves, lengths, weights=False, backend=backend)
        return torch.autograd.grad(context.square().sum(), [leaves[i] for i in requested])

    expected = gradients((0, 1, 2), "reference")
    for i, gradient in zip(requested, gradients(requested, backend), strict=True):
        torch.testing.assert_close(gradient, expected[i])


def test_weights_that_were_not_returned_give_the_same_gradients(backend):
    tensors, lengths, results = inputs(3, 2, 70, 16, 16), torch.tensor([70, 33, 1]), []
    for weights in (True, False):
        leaves = [x.detach().requires_grad_() for x in tensors]
        context, _ = call(masked_attention, *leaves, lengths, weights=weights, backend=backend)
        results.append(torch.autograd.grad(context.square().sum(), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_gradients_through_the_weights_alone_do_not_depend_on_the_values(backend):
    (query, keys, values), lengths = inputs(grad=True), some_lengths(3, 7)
    results = []
    for x in (values, torch.full_like(values, NAN)):
        _, weights = call(masked_attention, query, keys, x, lengths, backend=backend)
        results.append(torch.autograd.grad(weights.square().sum(), (query, keys)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@on_each_half
def test_half_precision_is_summed_in_float32_and_rounded(backend, dtype):
    tensors, lengths = inputs(B=2, K=8, T=200, D=64, E=64, dtype=dtype), torch.tensor([200, 77])
    cotangents = inputs(2, 8, 200, 64, 64, dtype, seed=1)[0], inputs(2, 8, 1, 200, 1, seed=2)[0]

    actual = all_results(op(backend), tensors, lengths, "both", cotangents)
    exact = all_results(plain, [x.double() for x in tensors], lengths, "both", [x.double() for x in cotangents])
    assert actual[1].dtype == torch.float32
    torch.testing.assert_close(actual[1].double(), exact[1], atol=1e-6, rtol=1e-4)
    for a, b in zip((actual[0], *actual[2:]), (exact[0], *exact[2:]), strict=True):
        assert a.dtype == dtype
        for error, rounding in zip(errors(a, b), errors(b.to(dtype), b), strict=True):
            assert error <= (1.6 if backend == "triton" else 1.2) * rounding  # Triton also rounds the weights


def test_bfloat16_gradients_round_to_even_and_keep_nan(backend):
    query, keys, values = inputs(1, 2, 1, 1, 2, torch.bfloat16, grad=True)  # one frame: its weights are 1
    context, weights = call(masked_attention, query, keys, values, torch.tensor([1]), backend=backend)
    # the sums of these are halfway between two bfloat16 numbers
    halves = torch.tensor([[[1.0, 1.0 + 2**-7], [2**-8, 2**-8]]]).bfloat16()
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    _, key, value = torch.autograd.grad((context, weights), (query, keys, values), (halves, nan.expand(1, 2, 1)))
    assert value.tolist() == [[[1.0, 1.0 + 2**-6]]] and key.isnan().all()


def test_large_scores_do_not_overflow(backend):
    tensors = [100 * x for x in inputs(dtype=torch.bfloat16)]
    context, weights = call(masked_attention, *tensors, torch.tensor([7, 3, 1]), backend=backend)
    assert context.isfinite().all() and weights.isfinite().all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2))


def test_autocast_does_not_lower_the_precision(backend):
    tensors, lengths = inputs(), torch.tensor([7, 3, 1])
    with torch.autocast(backends.DEVICES.get(backend, "cpu"), torch.bfloat16):
        actual = call(masked_attention, *tensors, lengths, backend=backend)
    for a, b in zip(actual, call(masked_attention, *tensors, lengths, backend=backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("K", [1, 3, 8, 64])
def test_queries_of_a_beam_are_independent(backend, K):
    query, keys, values = inputs(K=K, T=67, D=20)
    lengths = torch.tensor([67, 33, 1])
    expected, _ = call(masked_attention, query, keys, values, lengths, backend=backend)
    for k in {0, K // 2, K - 1}:
        single, _ = call(masked_attention, query[:, k : k + 1], keys, values, lengths, backend=backend)
        torch.testing.assert_close(single[:, 0], expected[:, k], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("K", [1, 5, 8])
def test_an_utterance_has_the_same_bits_alone_and_in_any_batch(cpp, K, dtype):
    tensors, lengths = inputs(4, K, 131, 33, 40, dtype), torch.tensor([77, 131, 0, 1])
    cotangents = inputs(4, K, 131, 40, 40, seed=1)[0], torch.ones(4, K, 131)

    batched = all_results(op(cpp), tensors, lengths, "both", cotangents)
    for b, n in enumerate(lengths.tolist()):
        alone = [tensors[0][b : b + 1], *(x[b : b + 1, : n + 3] for x in tensors[1:])]
        actual = all_results(op(cpp), alone, lengths[b : b + 1], "both",
                           (cotangents[0][b : b + 1], cotangents[1][b : b + 1, :, : n + 3]))  # fmt: skip
        for i, (a, expected) in enumerate(zip(actual, batched, strict=True)):
            expected = expected[b : b + 1]
            if i == 1:
                a, expected = a[..., :n], expected[..., :n]
            if i >= 3:
                a, expected = a[:, :n], expected[:, :n]
            assert torch.equal(a, expected)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("weights", [True, False])
def test_peaks_are_the_first_frames_of_the_largest_weights(backend, weights, dtype):
    tensors, lengths = inputs(5, 9, 133, 16, 4, dtype), some_lengths(5, 133)
    _, every, peaks = call(masked_attention, *tensors, lengths, peaks=True, backend=backend)
    actual = call(masked_attention, *tensors, lengths, weights=weights, peaks=True, backend=backend)
    assert peaks.dtype == torch.int64 and torch.equal(peaks, every.argmax(-1)) and torch.equal(actual[2], peaks)


@pytest.mark.parametrize("T", [1, 7, 16, 17, 33, 131])
def test_of_equal_weights_the_first_frame_is_the_peak(backend, T):
    query = torch.tensor([[[1.0, 2.0], [-1.0, 3.0]]])  # small integers: sums are exact in any order
    keys, values, lengths = torch.ones(1, T, 2), torch.ones(1, T, 3), torch.tensor([T])

    def peaks():
        return call(masked_attention, query, keys, values, lengths, scale=1.0, peaks=True, backend=backend)[2].tolist()

    assert peaks() == [[0, 0]]
    keys[:, T // 2 :] = torch.tensor([4.0, 1.0])  # better for the first query, worse for the second
    assert peaks() == [[T // 2, 0]]


def test_scores_so_close_that_their_weights_are_equal_have_the_first_as_peak(backend):
    scores = 1.0 + torch.arange(64) * 2.0**-23  # the last is the largest, by the smallest possible difference
    query, keys = torch.ones(1, 1, 1), scores.view(1, 64, 1)
    lengths = torch.tensor([64])
    _, weights, peaks = call(masked_attention, query, keys, keys, lengths, scale=1.0, peaks=True, backend=backend)
    assert torch.equal(peaks, weights.argmax(-1))


def test_an_explicit_scale_and_mask_are_used(backend):
    query, keys, values = inputs()
    lengths = torch.tensor([7, 3, 1])
    context, nothing = call(masked_attention, query, keys, values, lengths, scale=2.0, weights=False, backend=backend)
    again, _ = call(
        masked_attention, query * 2 * 5**0.5, keys, values, lengths, padding=padding_mask(lengths, 7), backend=backend
    )
    assert nothing is None
    torch.testing.assert_close(context, again, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("relayout", LAYOUTS.values(), ids=LAYOUTS)
def test_inputs_need_not_be_contiguous(backend, relayout):
    strided, lengths = [relayout(x) for x in inputs(3, 2, 35, 6, 17)], torch.tensor([35, 3, 1])
    assert not any(x.is_contiguous() for x in strided)
    cotangents = [relayout(torch.randn(3, 2, n, generator=torch.Generator().manual_seed(n))) for n in (17, 35)]

    def run(tensors, cotangents):
        return all_results(op(backend), tensors, lengths, "both", cotangents)

    expected = run([x.contiguous() for x in strided], [x.contiguous() for x in cotangents])
    for a, b in zip(run(strided, cotangents), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, n: (q[0], k, v, n), r"query must be \(B, K, D\); got \(2, 5\)"),
        (lambda q, k, v, n: (q, k[:, :, :4], v, n), r"keys must be .* B=3, D=5 like query; got \(3, 7, 4\)"),
        (lambda q, k, v, n: (q, k[:2], v[:2], n), r"keys must be .* B=3, D=5 like query; got \(2, 7, 5\)"),
        (lambda q, k, v, n: (q, k, v[:, :6], n), r"values must be .* B=3, T=7 like keys; got \(3, 6, 6\)"),
        (lambda q, k, v, n: (q, k, v, n[:2]), r"lengths must be \(3,\) int64; got \(2,\)"),
        (lambda q, k, v, n: (q, k, v, n.int()), r"lengths must be .* int64; got .* torch.int32"),
        (lambda q, k, v, n: (q, k.half(), v, n), "share one float dtype; got torch.float32, torch.float16"),
        (lambda q, k, v, n: (q, k.to("meta"), v, n), "on one device; got cpu, meta"),
    ],
)
def test_disagreeing_arguments_are_explained(change, message):
    with pytest.raises(ValueError, match=message):
        masked_attention(*change(*inputs(), torch.tensor([7, 3, 1])))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"padding must be \(3, 7\) bool"):
        masked_attention(*inputs(), torch.tensor([7, 3, 1]), padding=torch.zeros(3, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, n: (q.half(), k, v, n), r"query must be \(B, K, D\) float32 or bfloat16; got .* Half"),
        (lambda q, k, v, n: (q, k[:, :, :4], v, n), r"keys must be \(B, T, D\) with B=3, D=5 .*; got \[3, 7, 4\]"),
        (lambda q, k, v, n: (q, k.bfloat16(), v, n), r"keys must be .* the dtype of query; got .* BFloat16"),
        (lambda q, k, v, n: (q, k, v[:, :6], n), r"values must be \(B, T, E\) with B=3, T=7 .*; got \[3, 6, 6\]"),
        (lambda q, k, v, n: (q, k, v, n.int()), r"lengths must be \(3,\) int64; got \[3\] Int"),
    ],
)
def test_the_registered_ops_check_their_own_arguments(cpp, change, message):
    tensors = change(*inputs(), torch.tensor([7, 3, 1]))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.las_fast.masked_attention_cpp(*tensors, 1.0, True)
    context, weights, logsumexp = torch.ones(3, 2, 6), torch.ones(3, 2, 7), torch.ones(3, 2)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.las_fast.masked_attention_backward_cpp(
            context, None, *tensors, context, weights, logsumexp, 1.0, True
        )


@pytest.mark.parametrize(
    ("name", "context", "weights"),
    [("context_gradient", torch.ones(3, 2, 5), None), ("weights_gradient", None, torch.ones(3, 2, 7).bfloat16())],
)
def test_the_registered_backward_checks_the_gradients(cpp, name, context, weights):
    tensors = (*inputs(), torch.tensor([7, 3, 1]))
    saved = torch.ones(3, 2, 6), torch.ones(3, 2, 7), torch.ones(3, 2)
    with pytest.raises(RuntimeError, match=rf"{name} must be \[3, 2, .\] Float; got"):
        torch.ops.las_fast.masked_attention_backward_cpp(context, weights, *tensors, *saved, 1.0, True)


@pytest.mark.parametrize("lengths", [[-5, 9, 2**40]])
def test_lengths_out_of_range_are_clamped(cpp, lengths):
    tensors = inputs()
    actual = masked_attention(*tensors, torch.tensor(lengths), peaks=True, backend=cpp)
    expected = masked_attention(*tensors, torch.tensor(lengths).clamp(0, 7), peaks=True, backend=cpp)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_the_logsumexp_is_taken_over_the_scaled_scores(cpp):
    query, keys, values = inputs()
    _, weights, _, logsumexp = torch.ops.las_fast.masked_attention_cpp(
        query, keys, values, torch.tensor([7, 3, 0]), 0.5, False
    )
    scores = query.double() @ keys.double().transpose(1, 2) * 0.5
    expected = torch.stack([scores[0].logsumexp(-1), scores[1, :, :3].logsumexp(-1)])
    torch.testing.assert_close(logsumexp[:2].double(), expected, atol=1e-6, rtol=1e-6)
    assert (logsumexp[2] == -torch.inf).all() and weights.shape == (0, 0, 0)


def test_keys_have_fewer_than_two_to_the_power_of_31_frames(cpp):
    attend, lengths = torch.ops.las_fast.masked_attention_cpp, torch.empty(0, dtype=torch.int64)

    def context(frames):
        query, keys, values = torch.empty(0, 2, 5), torch.empty(0, frames, 5), torch.empty(0, frames, 6)
        return attend(query, keys, values, lengths, 1.0, False)[0]

    assert context(2**31 - 1).shape == (0, 2, 6)
    with pytest.raises(RuntimeError, match=r"keys must have fewer than 2\^31 frames"):
        context(2**31)


def test_padding_is_neither_copied_nor_read(cpp):
    """A copy of these views of one frame would take 256 GiB."""
    attend, back = torch.ops.las_fast.masked_attention_cpp, torch.ops.las_fast.masked_attention_backward_cpp
    query, frame, lengths = torch.randn(1, 2, 2**14), torch.randn(1, 1, 2**14), torch.tensor([3])
    few, many = frame.expand(1, 3, -1), frame.expand(1, 2**22, -1)
    expected, actual = (attend(query, x, x, lengths, 0.1, False) for x in (few, many))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    context, weights, _, logsumexp = expected
    expected, actual = (
        back(context, None, query, x, x, lengths, context, weights, logsumexp, 0.1, False)[0] for x in (few, many)
    )
    assert torch.equal(actual, expected)


def test_auto_takes_the_cpp_path_on_a_cpu_in_both_directions(cpp):
    leaves, lengths = inputs(grad=True), torch.tensor([7, 3, 1])
    actual = []
    forward = ops_called(lambda: actual.extend(masked_attention(*leaves, lengths)))
    backward = ops_called(lambda: actual[0].sum().backward())
    assert "las_fast::masked_attention_cpp" in forward and "las_fast::masked_attention_backward_cpp" in backward


def test_gradients_of_keys_and_values_are_skipped_on_request(cpp):
    query, keys, values = inputs()
    saved = torch.ops.las_fast.masked_attention_cpp(query, keys, values, torch.tensor([7, 3, 1]), 0.5, True)
    arguments = (query, keys, values, torch.tensor([7, 3, 1]), saved[0], saved[1], saved[3], 0.5)
    backward = torch.ops.las_fast.masked_attention_backward_cpp
    full = backward(saved[0], None, *arguments, True)
    partial = backward(saved[0], None, *arguments, False)
    assert torch.equal(partial[0], full[0]) and partial[1].shape == partial[2].shape == (0, 0, 0)


def test_a_gradient_of_weights_that_were_not_returned_is_ignored(cpp):
    leaves, lengths = inputs(grad=True), torch.tensor([7, 3, 1])
    context, weights, *_ = torch.ops.las_fast.masked_attention_cpp(*leaves, lengths, 0.5, False)
    expected = torch.autograd.grad(context.sum(), leaves, retain_graph=True)
    actual = torch.autograd.grad(context.sum() + weights.sum(), leaves)
    assert weights.numel() == 0 and all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_the_registered_op_passes_opcheck(cpp, weights, dtype):
    arguments = (*inputs(dtype=dtype, grad=True), torch.tensor([7, 3, 1]), 0.5, weights)
    torch.library.opcheck(torch.ops.las_fast.masked_attention_cpp.default, arguments)


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("has_gradients", [(True, True), (True, False), (False, True)])
def test_the_registered_backward_passes_opcheck(cpp, memory, has_gradients):
    arguments = (*inputs(), torch.tensor([7, 3, 1]))
    context, weights, _, logsumexp = torch.ops.las_fast.masked_attention_cpp(*arguments, 0.5, True)
    gradients = [x if has_gradient else None for x, has_gradient in zip((context, weights), has_gradients, strict=True)]
    torch.library.opcheck(
        torch.ops.las_fast.masked_attention_backward_cpp.default,
        (*gradients, *arguments, context, weights, logsumexp, 0.5, memory),
    )


@pytest.mark.parametrize("weights", [True, False])
def test_it_compiles_into_one_graph_with_gradients(cpp, weights):
    tensors, lengths = inputs(), torch.tensor([7, 3, 1])

    def loss(query, keys, values):
        context, attended, peaks = masked_attention(query, keys, values, lengths, weights=weights, peaks=True)
        return context.square().sum() + (attended.square().sum() if weights else 0), peaks

    compiled, graphs = compile_and_count(loss)
    results = []
    for function in (loss, compiled):
        leaves = [x.detach().requires_grad_() for x in tensors]
        total, peaks = function(*leaves)
        results.append((total.detach(), peaks, *torch.autograd.grad(total, leaves)))
    assert len(graphs) == 1
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_derivative_is_refused_and_not_wrong(cpp):
    query, keys, values = inputs()
    query.requires_grad_()
    context, _ = masked_attention(query, keys, values, torch.tensor([7, 3, 1]), backend=cpp)
    (gradient,) = torch.autograd.grad(context.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(("D", "E"), [(0, 4), (4, 0)])
def test_keys_and_values_of_size_0_are_refused(D, E):
    with pytest.raises(ValueError, match=f"at least 1 number per frame; got D={D}, E={E}"):
        masked_attention(*inputs(D=D, E=E), torch.tensor([7, 3, 1]))


def test_integer_tensors_are_refused():
    with pytest.raises(ValueError, match="must share one float dtype; got torch.int64, torch.int64, torch.int64"):
        masked_attention(*(x.long() for x in inputs()), torch.tensor([7, 3, 1]))


def test_keys_too_wide_for_the_kernels_use_the_reference(monkeypatch):
    monkeypatch.setattr(backends, "_triton_problem", lambda: None)
    monkeypatch.setitem(backends.DEVICES, "triton", "cpu")
    monkeypatch.setattr(backends, "EXTENSION_PROBLEM", "not here")
    monkeypatch.setattr(backends, "_warned", {"not here"})
    tensors, lengths = inputs(D=513), torch.tensor([7, 3, 1])
    expected = masked_attention(*tensors, lengths, backend="reference")
    assert torch.equal(masked_attention(*tensors, lengths)[0], expected[0])
    with pytest.raises(
        RuntimeError, match='"triton" takes at most 512 numbers per key or value here; got D=513 and E=6'
    ):
        masked_attention(*tensors, lengths, backend="triton")


@pytest.mark.parametrize("sizes", [(16, 4, 129, 64, 64), (1, 43, 300, 64, 64)], ids=["utterances", "queries"])
def test_two_threads_give_the_same_bits(cpp, sizes):
    tensors = inputs(*sizes)
    lengths = torch.linspace(1, sizes[2], sizes[0]).long().flip(0)
    cotangents = torch.ones(*sizes[:2], sizes[4]), torch.ones(*sizes[:3])

    def run():
        peaks = masked_attention(*tensors, lengths, weights=False, peaks=True, backend=cpp)[2]
        return peaks, *all_results(op(cpp), tensors, lengths, "both", cotangents)

    with threads(2):
        actual = run()
    for a, b in zip(actual, run(), strict=True):
        assert torch.equal(a, b)


def check_and_digest() -> str:
    for sizes in SIZES:
        for dtype in DTYPES[:2]:
            check_accuracy("cpp", sizes, dtype, "both")
    context, _ = masked_attention(*inputs(2, 3, 67, 64, 64), torch.tensor([67, 5]), backend="cpp")
    return hashlib.sha256(context.numpy().tobytes()).hexdigest()


def test_results_hold_with_vectors_of_older_processors(cpp):
    actual = digests(check_and_digest)
    widths = {"AVX512": 3, "AVX2": 2}.get(torch.backends.cpu.get_cpu_capability(), 1)
    assert len(actual) == widths, "each vector width has its own order of summation"


@pytest.mark.parametrize(("limit", "width"), [(7, 4), (15, 8)])
def test_a_limit_between_two_widths_is_the_narrower_one(cpp, limit, width):
    arguments, contexts = (*inputs(2, 3, 67, 64, 64), torch.tensor([67, 5])), {}
    for number in (width, limit, limit + 1):
        with lanes(number):
            contexts[number], _ = masked_attention(*arguments, backend=cpp)
    assert torch.equal(contexts[limit], contexts[width])
    widest = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
    assert torch.equal(contexts[limit + 1], contexts[width]) == (widest <= width), "the test could not fail"
