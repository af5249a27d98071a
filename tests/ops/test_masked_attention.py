import pytest
import torch

from las_fast.ops import masked_attention, padding_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(B=3, K=2, T=7, D=5, E=6, dtype=torch.float32, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, K, D), (B, T, D), (B, T, E))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(grad) for s in shapes]


def plain(query, keys, values, lengths):
    """One utterance and query at a time, in float64."""
    context = torch.zeros(*query.shape[:2], values.shape[2], dtype=torch.float64)
    weights = torch.zeros(*query.shape[:2], keys.shape[1], dtype=torch.float64)
    for b, n in enumerate(lengths.tolist()):
        for k in range(query.shape[1]):
            if n:
                scores = keys[b, :n].double() @ query[b, k].double() / query.shape[2] ** 0.5
                weights[b, k, :n] = scores.softmax(0)
                context[b, k] = weights[b, k, :n] @ values[b, :n].double()
    return context, weights


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (3, 2, 7, 5, 6), (2, 8, 33, 16, 17), (4, 1, 31, 13, 3)])
def test_it_is_the_softmax_average_over_valid_frames(sizes):
    B, K, T, D, E = sizes
    query, keys, values = inputs(B, K, T, D, E)
    lengths = torch.tensor([T, T - 1, 1, T // 2][:B])
    context, weights = masked_attention(query, keys, values, lengths)
    expected_context, expected_weights = plain(query, keys, values, lengths)
    torch.testing.assert_close(context.double(), expected_context, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(weights.double(), expected_weights, atol=2e-6, rtol=1e-5)


def test_padding_is_ignored_and_its_weights_are_exactly_zero():
    query, keys, values = inputs()
    lengths = torch.tensor([7, 3, 1])
    context, weights = masked_attention(query, keys, values, lengths)
    assert (weights[padding_mask(lengths, 7)[:, None].expand_as(weights)] == 0).all()
    keys[1, 3:], values[1, 3:] = 1e4, -1e4
    again, _ = masked_attention(query, keys, values, lengths)
    torch.testing.assert_close(again, context, atol=0, rtol=0)


def test_the_last_valid_frame_takes_part():
    query, keys, values = inputs(B=1)
    _, weights = masked_attention(query, keys, values, torch.tensor([4]))
    assert (weights[:, :, :4] > 0).all() and (weights[:, :, 4:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_length_zero_gives_zeros_and_no_nan_in_values_or_gradients(dtype):
    query, keys, values = inputs(dtype=dtype, grad=True)
    context, weights = masked_attention(query, keys, values, torch.tensor([0, 7, 2]))
    assert (context[0] == 0).all() and (weights[0] == 0).all()
    (context.float().sum() + weights.square().sum()).backward()
    for tensor in (query, keys, values):
        assert tensor.grad.isfinite().all() and (tensor.grad[0] == 0).all()


def test_no_frames_at_all_give_zeros():
    query, keys, values = inputs(T=0)
    context, weights = masked_attention(query, keys, values, torch.zeros(3, dtype=torch.int64))
    assert (context == 0).all() and weights.shape == (3, 2, 0)


def test_gradients_are_right():
    query, keys, values = (x.detach().double().requires_grad_() for x in inputs(B=2, T=4))
    lengths = torch.tensor([4, 2])
    assert torch.autograd.gradcheck(lambda *x: masked_attention(*x, lengths), (query, keys, values))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    query, keys, values = inputs(B=2, K=8, T=200, D=64, E=64, dtype=dtype)
    lengths = torch.tensor([200, 77])
    context, weights = masked_attention(query, keys, values, lengths)
    exact_context, exact_weights = plain(query, keys, values, lengths)
    assert context.dtype == dtype and weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), exact_weights, atol=1e-6, rtol=1e-4)
    assert (context.double() - exact_context).abs().max() <= 2 * (exact_context.to(dtype) - exact_context).abs().max()


def test_large_scores_do_not_overflow_in_half_precision():
    query, keys, values = (100 * x for x in inputs(dtype=torch.float16))
    context, weights = masked_attention(query, keys, values, torch.tensor([7, 3, 1]))
    assert context.isfinite().all() and weights.isfinite().all()


def test_autocast_does_not_lower_the_precision():
    query, keys, values = inputs()
    lengths = torch.tensor([7, 3, 1])
    with torch.autocast("cpu", torch.bfloat16):
        context, weights = masked_attention(query, keys, values, lengths)
    expected = masked_attention(query, keys, values, lengths)
    assert torch.equal(context, expected[0]) and torch.equal(weights, expected[1])


def test_queries_of_a_beam_are_independent():
    query, keys, values = inputs(K=5)
    lengths = torch.tensor([7, 3, 1])
    whole, _ = masked_attention(query, keys, values, lengths)
    for k in range(5):
        one, _ = masked_attention(query[:, k : k + 1], keys, values, lengths)
        torch.testing.assert_close(one[:, 0], whole[:, k], atol=1e-6, rtol=1e-5)


def test_a_scale_and_a_mask_made_before_are_used():
    query, keys, values = inputs()
    lengths = torch.tensor([7, 3, 1])
    context, nothing = masked_attention(query, keys, values, lengths, scale=2.0, weights=False)
    again, _ = masked_attention(query * 2 * 5**0.5, keys, values, lengths, padding=padding_mask(lengths, 7))
    assert nothing is None
    torch.testing.assert_close(context, again, atol=1e-5, rtol=1e-5)


def test_inputs_need_not_be_contiguous():
    query, keys, values = inputs()
    lengths = torch.tensor([7, 3, 1])
    turned = keys.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    torch.testing.assert_close(
        masked_attention(query, turned, values, lengths)[0], masked_attention(query, keys, values, lengths)[0]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, n: (q[0], k, v, n), r"query must be \(B, K, D\); got \(2, 5\)"),
        (lambda q, k, v, n: (q, k[:, :, :4], v, n), r"keys must be .* B=3, D=5 like query; got \(3, 7, 4\)"),
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
