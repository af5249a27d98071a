import hashlib

import pytest
import torch
from calls import LAYOUTS, assert_as_accurate_as_plain, call, compile_and_count, digests, ops_called, threads, tiles
from torch import nn
from torch.nn import functional as F

from las_fast.ops import bilstm, padding_mask
from las_fast.ops.bilstm import reverse_within_lengths

DTYPES = [torch.float32, torch.bfloat16]
NAN = torch.nan
SIZES = [  # B, T, I, H
    (1, 1, 1, 1),
    (3, 2, 7, 5),
    (5, 31, 13, 8),
    (4, 33, 17, 31),
    (2, 40, 32, 32),
    (3, 20, 65, 33),
    (13, 9, 64, 16),
    (37, 6, 40, 24),
    (16, 4, 30, 48),
    (33, 3, 98, 15),
    (7, 190, 6, 10),
    (2, 3, 1057, 8),
    (3, 20, 33, 70),  # with AMX, a group of 8 panels of gates and one of 24 columns
]
NAMES = ["output", "x", *(f"{name}{way}" for way in ("", " backwards") for name in ("w_ih", "w_hh", "b_ih", "b_hh"))]
per_size = pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
per_dtype = pytest.mark.parametrize("dtype", DTYPES)


def inputs(B=3, T=7, I=5, H=6, seed=0):
    """x and the 8 weights, exact in bfloat16, so that all precisions get the same values."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, I), *2 * [(4 * H, I), (4 * H, H), (4 * H,), (4 * H,)]]
    scales = [1.0, *2 * [I**-0.5, H**-0.5, 0.3, 0.3]]
    return [
        (scale * torch.randn(shape, generator=generator)).bfloat16().float()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def some_lengths(B, T):
    """Unsorted lengths with duplicates, 1, 0 if B > 3, and T."""
    return torch.tensor([T // 2, T, 1, 0, max(T - 1, 1), T, T // 3][:B] if B > 1 else [T]).repeat(-(-B // 7))[:B]


def op(backend, dtype=torch.float32):
    """The op as a function (x, lengths, *weights) that converts x to a dtype."""
    return lambda x, lengths, *weights: call(bilstm, x.to(dtype), lengths, weights[:4], weights[4:], backend=backend)


def plain(x, lengths, *weights):
    """The plain formulas, frame by frame, in the precision of x."""
    weights, frames = [weight.to(x) for weight in weights], range(x.shape[1])
    both = []
    for (w_ih, w_hh, b_ih, b_hh), order in ((weights[:4], frames), (weights[4:], reversed(frames))):
        h = c = x.new_zeros(x.shape[0], w_hh.shape[1])
        states = {}
        for t in order:
            i, f, g, o = (F.linear(x[:, t], w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, 1)
            valid = (t < lengths)[:, None]
            c = torch.where(valid, f.sigmoid() * c + i.sigmoid() * g.tanh(), 0.0)
            h = states[t] = torch.where(valid, o.sigmoid() * c.tanh(), 0.0)
        both.append(torch.stack([states[t] for t in frames], 1))
    return torch.cat(both, 2)


def all_results(function, tensors, lengths, cotangent):
    """The output and the gradients of x and all weights."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = function(leaves[0], lengths, *leaves[1:])
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))]


def cotangent_of(sizes):
    B, T, _, H = sizes
    return torch.randn(B, T, 2 * H, generator=torch.Generator().manual_seed(1)).bfloat16().float()


def check_accuracy(backend, sizes, dtype, lengths=None):
    tensors, cotangent = inputs(*sizes), cotangent_of(sizes)
    lengths = some_lengths(*sizes[:2]) if lengths is None else torch.tensor(lengths)
    actual = all_results(op(backend, dtype), tensors, lengths, cotangent)
    exact = all_results(plain, [x.double() for x in tensors], lengths, cotangent)
    baseline = all_results(lambda x, *rest: plain(x.to(dtype), *rest), tensors, lengths, cotangent)
    assert_as_accurate_as_plain(NAMES, actual, exact, baseline, dtype)


@per_dtype
@per_size
def test_values_and_gradients_err_at_most_twice_as_much_as_the_plain_formula(backend, sizes, dtype):
    check_accuracy(backend, sizes, dtype)


@pytest.mark.parametrize("lengths", [[1024, 1023], [1024, 1024], [1025, 1024], [2049, 2048]], ids=sum)
@per_dtype
def test_gradients_of_weights_add_up_over_blocks_of_2048_frames(cpp, lengths, dtype):
    sizes, lengths = (2, max(lengths), 3, 9), torch.tensor(lengths)  # two panels of gates, one of 4 columns
    tensors, cotangent = inputs(*sizes), cotangent_of(sizes)
    actual = all_results(op(cpp, dtype), tensors, lengths, cotangent)
    exact = all_results(op("reference", torch.float64), [x.double() for x in tensors], lengths, cotangent)
    for name, a, b in zip(NAMES, actual, exact, strict=True):
        assert (a - b).norm() <= (1e-5 if dtype == torch.float32 else 5e-2) * b.norm(), name


@pytest.mark.parametrize(
    "lengths", [[7, 7, 7], [1, 1, 1], [2, 4, 3], [3, 0, 0]], ids=["equal", "one frame", "all shorter", "empty"]
)
@per_dtype
def test_any_lengths_are_supported(backend, lengths, dtype):
    check_accuracy(backend, (3, 7, 5, 6), dtype, lengths)


@per_dtype
def test_it_equals_nn_lstm_over_packed_sequences(backend, dtype):
    lstm = nn.LSTM(5, 6, batch_first=True, bidirectional=True)
    x, lengths = inputs()[0], torch.tensor([3, 7, 1])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected, _ = nn.utils.rnn.pad_packed_sequence(lstm(packed)[0], batch_first=True)
    actual = op(backend, dtype)(x, lengths, *(w for direction in lstm.all_weights for w in direction))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert actual.dtype == dtype and (actual[padding_mask(lengths, 7)] == 0).all()
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)


def test_cells_add_up_in_float32(cpp):
    """Each frame adds 2^-10 to the cell; a bfloat16 cell would round that away above 1/4."""
    biases = torch.tensor([[20.0], [20.0], [2.0**-10], [20.0]]).expand(4, 2).reshape(8)
    weights = [torch.zeros(8, 1), torch.zeros(8, 2), biases, torch.zeros(8)]
    x = torch.zeros(1, 512, 1, dtype=torch.bfloat16)
    output = bilstm(x, torch.tensor([512]), weights, weights, backend=cpp)
    assert (output[0, -1, :2] == torch.tensor(0.5).tanh().bfloat16()).all()


@per_dtype
def test_padding_full_of_nan_does_not_matter(cpp, dtype):
    sizes, lengths = (5, 9, 7, 6), some_lengths(5, 9)
    clean, cotangent = inputs(*sizes), cotangent_of(sizes)
    dirty, dirty_cotangent = [x.clone() for x in clean], cotangent.clone()
    dirty[0][padding_mask(lengths, 9)] = dirty_cotangent[padding_mask(lengths, 9)] = NAN
    results = [all_results(op(cpp, dtype), x, lengths, y) for x, y in ((clean, cotangent), (dirty, dirty_cotangent))]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    for x in results[1][:2]:
        assert (x[padding_mask(lengths, 9)] == 0).all()


def test_nan_in_a_valid_frame_propagates(backend):
    x, *weights = inputs()
    x[1, 2, 3] = NAN
    output = op(backend)(x, torch.full((3,), 7), *weights)
    assert output[1, 2:, :6].isnan().all() and output[1, :3, 6:].isnan().all() and output[[0, 2]].isfinite().all()


@per_dtype
def test_large_gates_do_not_overflow(backend, dtype):
    x, *weights = inputs()
    actual = all_results(op(backend, dtype), [1e3 * x, *weights], torch.tensor([7, 3, 1]), cotangent_of((3, 7, 5, 6)))
    assert all(part.isfinite().all() for part in actual)


@pytest.mark.parametrize("gate", range(4), ids=["input", "forget", "cell", "output"])
def test_a_gate_of_any_magnitude_is_accurate_to_one_in_a_million(cpp, gate):
    """Two frames, with the other gates open: otherwise the state would be 0 for any value of the gate."""
    x = torch.linspace(-60, 60, 3001)[:, None, None].repeat(1, 2, 1)
    bias, weight = torch.full((4,), 3.0), torch.zeros(4, 1)
    bias[gate], weight[gate] = 0.0, 1.0
    weights, lengths = [weight, torch.zeros(4, 1), bias, torch.zeros(4)] * 2, torch.full((3001,), 2)
    expected = plain(x.double(), lengths, *weights)
    actual = op(cpp)(x, lengths, *weights)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-12)
    assert actual.abs().max() <= 1


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7FC00001, 0x7F800001, -1], ids=hex)
@pytest.mark.parametrize("gate", range(4))
def test_every_nan_bit_pattern_in_a_gate_propagates(backend, gate, bits):
    x, *weights = inputs()
    weights[2][6 * gate : 6 * gate + 6] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    output = op(backend)(x, torch.full((3,), 7), *weights)
    assert output[..., :6].isnan().all() and output[..., 6:].isfinite().all()


@per_dtype
@pytest.mark.parametrize("sizes", [(0, 7, 5, 6), (3, 0, 5, 6)], ids=["no utterance", "no frame"])
def test_empty_inputs_give_empty_results(cpp, sizes, dtype):
    lengths = torch.zeros(sizes[0], dtype=torch.int64)
    output, x, *weights = all_results(op(cpp, dtype), inputs(*sizes), lengths, cotangent_of(sizes))
    assert output.shape == (*sizes[:2], 12) and x.shape == sizes[:3]
    assert all((gradient == 0).all() for gradient in weights)


@per_dtype
@pytest.mark.parametrize("sizes", [(5, 31, 13, 8), (37, 20, 40, 24), (37, 3, 353, 24)], ids=["few", "many", "deep"])
def test_an_utterance_has_the_same_bits_alone_and_in_any_batch(cpp, sizes, dtype):
    (x, *weights), lengths, cotangent = inputs(*sizes), some_lengths(*sizes[:2]), cotangent_of(sizes)
    batched = all_results(op(cpp, dtype), [x, *weights], lengths, cotangent)[:2]
    for b, n in enumerate(lengths.tolist()):
        alone = all_results(op(cpp, dtype), [x[b : b + 1, : n + 2], *weights], lengths[b : b + 1],
                           cotangent[b : b + 1, : n + 2])[:2]  # fmt: skip
        for a, expected in zip(alone, batched, strict=True):
            assert torch.equal(a[0, :n], expected[b, :n])


@per_dtype
@pytest.mark.parametrize("number", [2, 3, 8])
def test_any_number_of_threads_gives_the_same_bits(cpp, number, dtype):
    sizes = (37, 40, 33, 24)
    tensors, lengths, cotangent = inputs(*sizes), some_lengths(*sizes[:2]), cotangent_of(sizes)
    expected = all_results(op(cpp, dtype), tensors, lengths, cotangent)
    with threads(number):
        actual = all_results(op(cpp, dtype), tensors, lengths, cotangent)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("relayout", LAYOUTS.values(), ids=LAYOUTS)
def test_inputs_need_not_be_contiguous(backend, relayout):
    (x, *weights), lengths, cotangent = inputs(), torch.tensor([7, 3, 1]), cotangent_of((3, 7, 5, 6))
    weights = [w.t().contiguous().t() if w.ndim == 2 else w for w in weights]
    x, cotangent = relayout(x), relayout(cotangent)
    actual = all_results(op(backend), [x, *weights], lengths, cotangent)
    contiguous = [y.contiguous() for y in (x, *weights)]
    for a, b in zip(actual, all_results(op(backend), contiguous, lengths, cotangent.contiguous()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_reversal_stays_within_each_length():
    x = torch.arange(10.0).view(2, 5, 1)
    reversed_ = reverse_within_lengths(x, torch.tensor([5, 2]))[:, :, 0].tolist()
    assert reversed_ == [[4, 3, 2, 1, 0], [6, 5, 7, 8, 9]]


def test_gradients_of_the_reference_pass_gradcheck():
    tensors = [x.double().requires_grad_() for x in inputs(2, 3, 2, 2)]
    lengths = torch.tensor([3, 2])
    assert torch.autograd.gradcheck(lambda x, *w: bilstm(x, lengths, w[:4], w[4:], backend="reference"), tensors)


@pytest.mark.parametrize("requested", [(0,), (1,), (8,), (2, 3), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_any_subset_of_the_gradients_can_be_requested(backend, requested):
    tensors, lengths, cotangent = inputs(), torch.tensor([7, 3, 1]), cotangent_of((3, 7, 5, 6))
    expected = all_results(op(backend), tensors, lengths, cotangent)[1:]
    leaves = [x.clone().requires_grad_(i in requested) for i, x in enumerate(tensors)]
    output = op(backend)(leaves[0], lengths, *leaves[1:])
    for i, gradient in zip(
        requested, torch.autograd.grad(output, [leaves[i] for i in requested], cotangent), strict=True
    ):
        torch.testing.assert_close(gradient, expected[i])


def test_gradients_of_the_two_biases_do_not_share_memory(cpp):
    x, *weights = inputs()
    leaves = [w.requires_grad_() for w in weights]
    op(cpp)(x, torch.tensor([7, 3, 1]), *leaves).sum().backward()
    assert torch.equal(leaves[2].grad, leaves[3].grad)
    leaves[2].grad.zero_()
    assert (leaves[3].grad != 0).any()


def test_inference_saves_no_tensors_and_has_the_same_output(cpp):
    x, *weights = inputs()
    lengths = torch.tensor([7, 3, 1])
    output, kept = torch.ops.las_fast.bilstm_cpp(x, lengths, weights, False)
    again, more = torch.ops.las_fast.bilstm_cpp(x, lengths, weights, True)
    assert kept.numel() == 0 and more.shape == (3, 7, 2, 5, 6) and torch.equal(output, again)


def test_the_backward_pass_can_run_twice(cpp):
    leaves = [x.requires_grad_() for x in inputs()]
    output = op(cpp)(leaves[0], torch.tensor([7, 3, 1]), *leaves[1:])
    actual = [torch.autograd.grad(output.square().sum(), leaves, retain_graph=True) for _ in range(2)]
    for a, b in zip(*actual, strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused_and_not_wrong(cpp):
    x, *weights = inputs()
    output = op(cpp)(x.requires_grad_(), torch.tensor([7, 3, 1]), *weights)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


def test_auto_takes_the_cpp_path_on_a_cpu_in_both_directions(cpp):
    leaves, lengths, actual = [x.requires_grad_() for x in inputs()], torch.tensor([7, 3, 1]), []
    forward = ops_called(lambda: actual.append(bilstm(leaves[0], lengths, leaves[1:5], leaves[5:])))
    backward = ops_called(lambda: actual[0].sum().backward())
    assert "aten::lstm" not in forward and "las_fast::bilstm_cpp" in forward
    assert "las_fast::bilstm_backward_cpp" in backward


def under_autocast(tensors, backend="auto"):
    with torch.autocast("cpu", torch.bfloat16):
        return bilstm(tensors[0], torch.tensor([7, 3, 1]), tensors[1:5], tensors[5:], backend=backend)


def test_autocast_computes_in_bfloat16_with_gradients_in_each_tensors_dtype(cpp):
    leaves = [x.requires_grad_() for x in inputs()]
    output = under_autocast(leaves, cpp)
    assert output.dtype == torch.bfloat16
    expected = all_results(op(cpp, torch.bfloat16), leaves, torch.tensor([7, 3, 1]), torch.ones_like(output))
    output.sum().backward()
    for leaf, gradient in zip(leaves, expected[1:], strict=True):
        assert leaf.grad.dtype == torch.float32 and torch.equal(leaf.grad, gradient)


def test_matmuls_of_bfloat16_and_no_others_use_tiles(cpp):
    cotangent = cotangent_of((3, 20, 64, 64))
    for dtype in DTYPES:
        results = []
        for allowed in (False, True):
            with tiles(allowed):
                results.append(all_results(op(cpp, dtype), inputs(3, 20, 64, 64), torch.tensor([20, 9, 1]), cotangent))
        equal = all(map(torch.equal, *results))
        assert equal == (dtype == torch.float32 or not torch.ops.las_fast.has_tiles())  # tiles add in another order


def test_autocast_to_float16_does_not_change_the_result(cpp):
    x, *weights = inputs()
    lengths, expected = torch.tensor([7, 3, 1]), None
    for enabled in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            actual = bilstm(x, lengths, weights[:4], weights[4:])
        assert actual.dtype == torch.float32
        expected = actual if expected is None else expected
    assert torch.equal(actual, expected)


def test_dtypes_that_cpp_lacks_go_to_the_reference(cpp):
    tensors, lengths = [x.double() for x in inputs()], torch.tensor([7, 3, 1])
    assert bilstm(tensors[0], lengths, tensors[1:5], tensors[5:]).dtype == torch.float64
    with pytest.raises(RuntimeError, match="takes torch.float32 or torch.bfloat16; got torch.float64"):
        bilstm(tensors[0], lengths, tensors[1:5], tensors[5:], backend=cpp)
    halves = [x.bfloat16() for x in tensors]
    assert bilstm(halves[0], lengths, halves[1:5], halves[5:]).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match='"cpp" takes float32 weights; got torch.bfloat16. Use backend'):
        bilstm(halves[0], lengths, halves[1:5], halves[5:], backend=cpp)


@per_dtype
@pytest.mark.parametrize("gradients", [True, False])
def test_the_registered_op_passes_opcheck(cpp, gradients, dtype):
    x, *weights = (y.requires_grad_(gradients) for y in inputs())
    lengths = torch.tensor([7, 7, 7])  # no padding: its saved values are uninitialised, and opcheck would compare them
    arguments = (x.detach().to(dtype).requires_grad_(gradients), lengths, weights, gradients)
    torch.library.opcheck(torch.ops.las_fast.bilstm_cpp.default, arguments)


@per_dtype
@pytest.mark.parametrize("x_gradient", [True, False])
def test_the_registered_backward_passes_opcheck(cpp, x_gradient, dtype):
    x, *weights = inputs()
    arguments = (x.to(dtype), torch.tensor([7, 3, 1]), weights)
    output, kept = torch.ops.las_fast.bilstm_cpp(*arguments, True)
    torch.library.opcheck(
        torch.ops.las_fast.bilstm_backward_cpp.default, (output, *arguments, output, kept, x_gradient)
    )


def test_it_compiles_into_one_graph_with_gradients(cpp):
    tensors, lengths, cotangent = inputs(), torch.tensor([7, 3, 1]), cotangent_of((3, 7, 5, 6))

    def run(x, lengths, *weights):
        return bilstm(x, lengths, weights[:4], weights[4:])

    compiled, graphs = compile_and_count(run)
    actual = all_results(compiled, tensors, lengths, cotangent)
    assert len(graphs) == 1
    for a, b in zip(actual, all_results(run, tensors, lengths, cotangent), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, n, a, b: (x[0], n, a, b), r"x must be \(B, T, I\) of floats; got \(7, 5\)"),
        (lambda x, n, a, b: (x, n[:2], a, b), r"lengths must be \(3,\) int64; got \(2,\)"),
        (lambda x, n, a, b: (x, n.int(), a, b), r"lengths must be .* int64; got .* torch.int32"),
        (lambda x, n, a, b: (x, n, a[:3], b), "must have weight_ih, weight_hh, bias_ih, bias_hh; got 3 tensors"),
        (lambda x, n, a, b: (x[..., :4], n, a, b), r"weight_ih must be \(24, 4\) with I=4, H=6; got \(24, 5\)"),
        (lambda x, n, a, b: (x, n, a, [*b[:2], b[2][:6], b[3]]), r"bias_ih must be \(24,\) .*; got \(6,\)"),
        (lambda x, n, a, b: (x.to("meta"), n, a, b), "on one device; got cpu, meta"),
    ],
)
def test_disagreeing_arguments_are_explained(change, message):
    x, *weights = inputs()
    with pytest.raises(ValueError, match=message):
        bilstm(*change(x, torch.tensor([7, 3, 1]), weights[:4], weights[4:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, n, w: (x.half(), n, w), r"x must be \(B, T, I\) float32 or bfloat16; got .* Half"),
        (lambda x, n, w: (x, n.int(), w), r"lengths must be \(3,\) int64; got \[3\] Int"),
        (lambda x, n, w: (x, n, w[:7]), "weights must be 8 tensors; got 7"),
        (lambda x, n, w: (x, n, [*w[:4], w[4][:, :4], *w[5:]]), r"weights\[4\] must be \[24, 5\] .*; got \[24, 4\]"),
        (lambda x, n, w: (x, n, [w[0].double(), *w[1:]]), r"weights\[0\] must be .* float32; got \[24, 5\] Double"),
    ],
)
def test_the_registered_ops_check_their_own_arguments(cpp, change, message):
    x, *weights = inputs()
    arguments = change(x, torch.tensor([7, 3, 1]), weights)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.las_fast.bilstm_cpp(*arguments, True)
    output, kept = torch.zeros(3, 7, 12), torch.zeros(3, 7, 2, 5, 6)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.las_fast.bilstm_backward_cpp(output, *arguments, output, kept, True)


@pytest.mark.parametrize(
    ("name", "place", "wrong"),
    [
        ("gradient", 0, torch.zeros(3, 7, 11)),
        ("output", 1, torch.zeros(3, 7, 12).bfloat16()),
        ("saved", 2, torch.zeros(0, 7, 2, 5, 6)),
    ],
)
def test_the_registered_backward_checks_its_saved_tensors(cpp, name, place, wrong):
    x, *weights = inputs()
    kept = [torch.zeros(3, 7, 12), torch.zeros(3, 7, 12), torch.zeros(3, 7, 2, 5, 6)]
    kept[place] = wrong
    with pytest.raises(RuntimeError, match=f"{name} must be"):
        torch.ops.las_fast.bilstm_backward_cpp(kept[0], x, torch.tensor([7, 3, 1]), weights, *kept[1:], True)


def test_lengths_out_of_range_are_clamped(cpp):
    tensors, cotangent, lengths = inputs(), cotangent_of((3, 7, 5, 6)), torch.tensor([-5, 9, 2**40])
    actual = all_results(op(cpp), tensors, lengths, cotangent)
    for a, b in zip(actual, all_results(op(cpp), tensors, lengths.clamp(0, 7), cotangent), strict=True):
        assert torch.equal(a, b)


def check_and_digest() -> str:
    for sizes in SIZES:
        for dtype in DTYPES:
            check_accuracy("cpp", sizes, dtype)
    actual = all_results(op("cpp"), inputs(2, 7, 64, 64), torch.tensor([7, 5]), cotangent_of((2, 7, 64, 64)))
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in actual)).hexdigest()


def test_results_hold_with_vectors_of_older_processors(cpp):
    actual = digests(check_and_digest)
    fused = torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2")
    assert len(actual) <= 1 + fused, "sums have the same order in every width; only 4 lanes lack fused multiply-add"
