import gc
import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import compile_and_count, digests, ops_called, threads
from test_speller_search import WRONG_MEMORY, WRONG_MEMORY_OF_REGISTERED_OP, las, random_memory, random_weights
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_map_only

from las_fast.errors import is_out_of_memory
from las_fast.ops import SpellerWeights, backends, padding_mask, speller_unroll
from las_fast.ops.speller_unroll import _reference

NAN = torch.nan
SIZES = [  # V, M, H of each cell, D, E, T, B, U
    (3, 1, (1,), 1, 1, 1, 1, 1),
    (4, 1, (1, 1, 1), 1, 1, 1, 2, 3),
    (7, 5, (6,), 4, 3, 9, 3, 4),
    (31, 20, (40,), 8, 9, 50, 6, 1),
    (31, 33, (32, 31), 33, 17, 40, 5, 8),
    (32, 32, (64, 32), 32, 32, 20, 6, 13),
    (33, 31, (33, 16), 15, 32, 32, 3, 11),
    (67, 64, (8, 24, 17), 31, 65, 65, 4, 7),
    (5, 3, (7, 5), 4, 3, 11, 2, 700),  # more steps than a block of the backward pass
    (5, 3, (256, 8), 4, 3, 5, 2, 3),  # two threads share the gates of the first cell
    (7, 5, (260, 131), 4, 3, 9, 5, 6),  # two and three threads share the matmuls of both cells
]
on_each_size = pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)).replace(" ", ""))
on_each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16"])
SMALL = SIZES[4]


@pytest.fixture(params=["fused", "cpp"])
def fast_backend(request) -> str:
    """The fused form and C++; tests/gpu_proof has the cases of Triton. Skips those that are not available here."""
    if reason := backends.unavailable("speller_unroll", request.param):
        pytest.skip(reason)
    return request.param


def inputs(V, M, H, D, E, T, B, U, *, dropout=True, sampled_share=0.4, scale=1.0):
    """Arguments of the op, without its options; `sampled_share` of the tokens are sampled."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(V, (B, U), generator=generator)
    sampled = torch.rand(B, U, generator=generator) < sampled_share
    masks = [(torch.rand(B, size, generator=generator) < 0.7) / 0.7 for size in H] if dropout else None
    return (random_weights(V, M, H, D, E, scale=scale), *random_memory(B, T, D, E), tokens, sampled, masks)


def results(op, arguments, dtype=torch.float32, through=("logits", "attention"), **options) -> list[torch.Tensor]:
    """Both outputs, and the gradients of a random loss with respect to all weights, keys and values."""
    weights, keys, values, *others, masks = arguments
    leaves = [x.detach().to(dtype).requires_grad_() for x in (*weights.flat(), keys, values)]
    masks = None if masks is None else [mask.to(dtype) for mask in masks]
    actual = op(SpellerWeights.from_flat(leaves[:-2]), *leaves[-2:], *others, masks, **options)
    generator, loss = torch.Generator().manual_seed(8), 0.0
    for name, x in zip(("logits", "attention"), actual, strict=True):
        factors = torch.randn(x.shape, generator=generator)
        loss = loss + (x * factors.to(x.dtype)).sum() * (name in through)
    return [x.detach() for x in (*actual, *torch.autograd.grad(loss, leaves))]


def relative(actual, expected) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6))


def assert_close(actual, expected, tolerance=2e-5):
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert float((a - b).norm()) <= tolerance * max(float(b.norm()), 1e-2), f"result {i}"


def assert_equals_the_reference(sizes, backend, dropout=True):
    arguments = inputs(*sizes, dropout=dropout)
    expected = results(speller_unroll, arguments, backend="reference")
    assert_close(results(speller_unroll, arguments, backend=backend), expected)


@on_each_size
@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
def test_values_and_all_gradients_equal_the_reference(fast_backend, sizes, dropout):
    assert_equals_the_reference(sizes, fast_backend, dropout)


@pytest.mark.parametrize("through", ["logits", "attention"])
def test_a_loss_may_use_only_one_of_the_two_outputs(fast_backend, through):
    arguments = inputs(*SMALL)
    expected = results(speller_unroll, arguments, backend="reference", through=(through,))
    assert_close(results(speller_unroll, arguments, backend=fast_backend, through=(through,)), expected)


def test_an_unused_output_needs_no_gradient(cpp):
    for place in (0, 1):
        weights, *others = inputs(*SMALL)
        flat = [x.requires_grad_() for x in weights.flat()]
        speller_unroll(SpellerWeights.from_flat(flat), *others, backend=cpp)[place].sum().backward()
        assert all(x.grad is not None for x in flat)


def test_a_pass_frees_all_its_tensors(fast_backend):
    arguments, counts = inputs(*SMALL), []
    for _ in range(3):
        results(speller_unroll, arguments, backend=fast_backend)
        gc.collect()
        counts.append(sum(type(x) is torch.Tensor for x in gc.get_objects()))
    assert counts[0] == counts[1] == counts[2]


def test_gradients_of_the_reference_pass_gradcheck():
    weights, keys, values, *others, masks = inputs(4, 2, (2, 3), 2, 2, 3, 2, 3, sampled_share=0.0)
    leaves = [x.double().requires_grad_() for x in (*weights.flat(), keys, values)]

    def run(*leaves):
        return _reference(
            SpellerWeights.from_flat(leaves[:-2]), *leaves[-2:], *others, [mask.double() for mask in masks]
        )

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@on_each_size
def test_bfloat16_errs_at_most_twice_as_much_as_the_plain_formula(fast_backend, sizes):
    assert_bf16_is_as_accurate_as_plain(sizes, fast_backend)


def assert_bf16_is_as_accurate_as_plain(sizes, backend):
    arguments = inputs(*sizes, sampled_share=0.0)  # sampled tokens could differ
    exact, baseline = (results(_reference, arguments, dtype) for dtype in (torch.float64, torch.bfloat16))
    actual = results(speller_unroll, arguments, backend=backend, precision="bf16")
    compared = arguments[0].bias > -1e3  # the other logits are so large that they would hide the errors of these
    for outputs in (exact, baseline, actual):
        outputs[0] = outputs[0][..., compared]
    errors, baseline_errors = (
        torch.tensor([relative(a, b) for a, b in zip(x, exact, strict=True)]) for x in (actual, baseline)
    )
    # one result may be a single number, whose error varies: the factor of two holds for the mean over all results
    assert (errors <= 2 * baseline_errors + 1e-2).all(), (errors, baseline_errors)
    assert errors.square().mean() <= 4 * baseline_errors.square().mean() + 1e-6


@pytest.mark.parametrize("backend", ["reference", "fused", "cpp"])
def test_a_sampled_token_is_the_best_of_the_previous_step(backend):
    if reason := backends.unavailable("speller_unroll", backend):
        pytest.skip(reason)
    weights, keys, values, lengths, tokens, sampled, masks = inputs(*SIZES[7])
    logits, _ = speller_unroll(weights, keys, values, lengths, tokens, sampled, masks, backend=backend)
    best = torch.cat((tokens[:, :1], logits[:, :-1].argmax(-1)), 1)
    read = torch.where(sampled, best, tokens)
    assert (read != tokens).any() and sampled[:, 0].any()
    forced, _ = speller_unroll(weights, keys, values, lengths, read, sampled & False, masks, backend=backend)
    assert torch.equal(logits, forced)


@pytest.mark.parametrize("backend", ["reference", "fused", "cpp"])
def test_no_sampled_tensor_means_that_no_token_is_sampled(backend):
    if reason := backends.unavailable("speller_unroll", backend):
        pytest.skip(reason)
    *arguments, sampled, masks = inputs(*SMALL)
    expected = speller_unroll(*arguments, sampled & False, masks, backend=backend)
    for ours, theirs in zip(speller_unroll(*arguments, None, masks, backend=backend), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["reference", "fused", "cpp"])
def test_the_first_of_equally_good_tokens_is_sampled(backend):
    if reason := backends.unavailable("speller_unroll", backend):
        pytest.skip(reason)
    weights, *others, tokens, sampled, _ = inputs(*SMALL)
    bias = weights.bias.clone()
    bias[5] = bias[9] = 1e12  # so large that rounding makes the two logits equal
    weights = weights._replace(bias=bias)
    all_sampled = torch.ones_like(sampled)
    actual, _ = speller_unroll(weights, *others, tokens, all_sampled, backend=backend)
    assert (actual[..., [5, 9]] == 1e12).all()

    def forced(token):
        read = torch.full_like(tokens, token)
        read[:, 0] = tokens[:, 0]
        return speller_unroll(weights, *others, read, all_sampled & False, backend=backend)[0]

    assert torch.equal(actual, forced(5)) and not torch.equal(actual, forced(9))


def test_the_fused_form_computes_the_best_token_only_at_sampled_steps(monkeypatch):
    weights, *memory, tokens, sampled, masks = inputs(*SIZES[2])
    module, calls = sys.modules["las_fast.ops.speller_unroll"], []
    logits = module._logits
    monkeypatch.setattr(module, "_logits", lambda *args: calls.append(1) or logits(*args))
    for steps, expected in (([], 1), ([0], 1), ([2], 2), ([1, 3], 3)):
        calls.clear()
        read = sampled & False
        read[1, steps] = True
        speller_unroll(weights, *memory, tokens, read, masks, backend="fused")
        assert len(calls) == expected  # one call computes the logits of all steps, for the results


@pytest.fixture
def reads_wait(monkeypatch):
    """Let the fused form treat CPU tensors as those of a device for which the host would wait."""
    monkeypatch.setattr(sys.modules["las_fast.ops.speller_unroll"], "_read_waits", lambda x: True)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_fused_form_samples_the_same_tokens_without_reading_which(share, reads_wait):
    arguments = inputs(*SMALL, sampled_share=share)
    expected = results(speller_unroll, arguments, backend="reference")
    assert_close(results(speller_unroll, arguments, backend="fused"), expected)


def run_on_fake_tensors(precision):
    """Run the fused form on tensors without numbers: reading one raises. A CPU build cannot slice fake CUDA tensors."""
    with FakeTensorMode():
        weights, keys, values, *others, masks = tree_map_only(torch.Tensor, torch.empty_like, inputs(*SMALL))
        results(speller_unroll, (weights, keys, values, *others, masks), backend="fused", precision=precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_fused_form_never_waits_for_the_device(precision, reads_wait):
    run_on_fake_tensors(precision)


def test_a_read_of_a_fake_tensor_is_noticed():
    with pytest.raises(DataDependentOutputException):
        run_on_fake_tensors("fp16")


def test_weights_sum_to_1_and_are_0_in_padding(fast_backend):
    weights, keys, values, _, tokens, sampled, masks = inputs(*SMALL)
    lengths = torch.tensor([0, 1, 40, 2, 0])
    _, attention = speller_unroll(weights, keys, values, lengths, tokens, sampled, masks, backend=fast_backend)
    assert (attention[padding_mask(lengths, 40)[:, None].expand_as(attention)] == 0).all()
    torch.testing.assert_close(attention.sum(-1), (lengths > 0).float()[:, None].expand(5, 8))


@on_each_precision
def test_padding_full_of_nan_does_not_matter(cpp, precision):
    weights, keys, values, lengths, *others = inputs(*SMALL)
    past = padding_mask(lengths, keys.shape[1])[..., None]
    dirty = (weights, keys.masked_fill(past, NAN), values.masked_fill(past, NAN), lengths, *others)
    expected = results(speller_unroll, (weights, keys, values, lengths, *others), backend=cpp, precision=precision)
    for a, b in zip(results(speller_unroll, dirty, backend=cpp, precision=precision), expected, strict=True):
        assert torch.equal(a, b)


@on_each_precision
@pytest.mark.parametrize(
    "sizes", [SIZES[2], SMALL, SIZES[5], *SIZES[8:]], ids=["small", "odd", "even", "long", "wide", "shared"]
)
def test_any_number_of_threads_gives_the_same_results(cpp, sizes, precision):
    arguments = inputs(*sizes)
    expected = results(speller_unroll, arguments, backend=cpp, precision=precision)
    for number in (2, 3, 7):
        with threads(number):
            actual = results(speller_unroll, arguments, backend=cpp, precision=precision)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


@on_each_precision
def test_an_utterance_has_the_same_results_alone_and_in_a_batch(cpp, precision):
    weights, *rest, masks = inputs(*SMALL)
    batched = speller_unroll(weights, *rest, masks, backend=cpp, precision=precision)
    for b in range(5):
        one = slice(b, b + 1)
        alone = speller_unroll(weights, *(x[one] for x in rest), [m[one] for m in masks], precision=precision)
        assert torch.equal(alone[0], batched[0][one]) and torch.equal(alone[1], batched[1][one])


def test_strided_inputs_give_the_same_results(cpp):
    weights, keys, values, *others = inputs(*SMALL)
    expected = results(speller_unroll, (weights, keys, values, *others), backend=cpp)
    strided = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (keys, values))
    for a, b in zip(results(speller_unroll, (weights, *strided, *others), backend=cpp), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_strided_tokens_give_the_same_gradients(cpp, layout):
    weights, *memory, tokens, sampled, masks = inputs(*SMALL)
    tokens = tokens[:1].expand_as(tokens) if layout == "expanded" else tokens.T.contiguous().T
    with torch.no_grad():
        forward = (weights.flat(), *memory, tokens, sampled & False, masks, False, True)
        logits, attention, _, *kept = torch.ops.las_fast.speller_unroll_cpp(*forward)

        def gradients(read):
            before = (logits, attention, weights.flat(), *memory, masks, attention, read, *kept, False)
            flat, *others = torch.ops.las_fast.speller_unroll_backward_cpp(*before)
            return [*flat, *others]

        for a, b in zip(gradients(tokens), gradients(tokens.contiguous()), strict=True):
            assert torch.equal(a, b)


def test_without_gradients_only_two_steps_are_kept_and_results_are_equal(cpp):
    weights, *others, masks = inputs(*SMALL)
    with torch.no_grad():
        bare = speller_unroll(weights, *others, masks, backend=cpp)
        kept = torch.ops.las_fast.speller_unroll_cpp(weights.flat(), *others, masks, False, False)[3:]
    for a, b in zip(bare, results(speller_unroll, (weights, *others, masks), backend=cpp)[:2], strict=True):
        assert torch.equal(a, b)
    assert [len(x) for x in kept] == [2, 2]


def test_training_on_a_cpu_is_one_op_each_way(cpp):
    model = las().train()
    features, lengths = torch.randn(3, 60, 4), torch.tensor([60, 41, 9])
    tokens = torch.randint(3, 31, (3, 9))

    def train(precision):
        def step():
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                output = model(features, lengths, tokens, 0.7)
            (output.logits.sum() + output.weights.square().sum()).backward()

        return step

    for precision in ("fp32", "bf16"):
        called = ops_called(train(precision))
        assert called.count("las_fast::speller_unroll_cpp") == 1
        assert called.count("las_fast::speller_unroll_backward_cpp") == 1
        assert "las_fast::masked_attention_cpp" not in called and "aten::sigmoid" not in called


def test_autocast_sets_the_precision_of_the_matmuls(cpp):
    model, seen = las(), []
    memory = model.listen(torch.randn(3, 60, 4), torch.tensor([60, 41, 9]))
    tokens = torch.randint(3, 31, (3, 9))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            seen.append(ops_called(lambda: model.speller(memory, tokens)))
    assert "las_fast::speller_unroll_cpp" in seen[0] and "las_fast::speller_unroll_cpp" not in seen[1]
    with torch.autocast("cpu", torch.bfloat16):
        actual = model.speller(memory, tokens)[0]
    expected = speller_unroll(
        model.speller.weights(), *memory[:3], torch.cat((torch.ones(3, 1).long(), tokens[:, :-1]), 1),
        torch.zeros_like(tokens, dtype=torch.bool), precision="bf16",
    )  # fmt: skip
    assert torch.equal(actual, expected[0])


@on_each_precision
@pytest.mark.parametrize("sizes", [SIZES[2], SIZES[5]], ids=["odd", "even"])
@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
def test_the_registered_ops_pass_opcheck(cpp, sizes, precision, dropout):
    weights, keys, values, lengths, tokens, sampled, masks = inputs(*sizes, dropout=dropout)
    flat = [x.requires_grad_() for x in weights.flat()]
    memory, masks, bf16 = (keys.requires_grad_(), values.requires_grad_(), lengths), masks or [], precision == "bf16"
    forward = (flat, *memory, tokens, sampled, masks, bf16, True)
    torch.library.opcheck(torch.ops.las_fast.speller_unroll_cpp.default, forward)
    with torch.no_grad():
        logits, attention, *kept = torch.ops.las_fast.speller_unroll_cpp(*forward)
        backward = (logits, attention, flat, *memory, masks, attention, *kept, bf16)
        torch.library.opcheck(torch.ops.las_fast.speller_unroll_backward_cpp.default, backward)


def test_it_compiles_into_one_graph(cpp):
    weights, keys, values, *others, masks = inputs(*SMALL)
    leaves = [x.requires_grad_() for x in (*weights.flat(), keys, values)]

    def loss(*leaves):
        logits, attention = speller_unroll(SpellerWeights.from_flat(leaves[:-2]), *leaves[-2:], *others, masks)
        return logits.square().mean() + attention.square().sum()

    compiled, graphs = compile_and_count(loss)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)
    assert len(graphs) == 1


def test_a_second_derivative_is_refused_and_not_wrong(cpp):
    weights, keys, *others = inputs(*SMALL)
    keys.requires_grad_()
    logits, _ = speller_unroll(weights, keys, *others, backend=cpp)
    (first,) = torch.autograd.grad(logits.square().sum(), keys, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


@on_each_precision
def test_an_empty_batch_gives_empty_results_and_zero_gradients(fast_backend, precision):
    weights, *others, masks = inputs(*SMALL)
    arguments = (weights, *(x[:0] for x in others), [mask[:0] for mask in masks])
    logits, attention, *gradients = results(speller_unroll, arguments, backend=fast_backend, precision=precision)
    assert logits.shape == (0, 8, 31) and attention.shape == (0, 8, 40)
    assert all((x == 0).all() for x in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *WRONG_MEMORY,
        ({"tokens": torch.ones(3, 0).long()}, r"tokens must be \(B, U\) int64 with B=3, U > 0; got \(3, 0\)"),
        ({"tokens": torch.ones(2, 4).long()}, r"tokens must be \(B, U\) int64 with B=3, U > 0; got \(2, 4\)"),
        ({"sampled": torch.ones(3, 4)}, r"sampled must be \(3, 4\) bool; got \(3, 4\) torch.float32"),
        ({"masks": [torch.ones(3, 5)]}, r"masks must be \[\(3, 6\)\] float32, or None; got \(3, 5\)"),
        ({"masks": [torch.ones(3, 6).double()]}, r"float32, or None; got \(3, 6\) torch.float64"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16; got 'fp8'"),
    ],
)
def test_arguments_that_disagree_are_named(change, message):
    names = ("weights", "keys", "values", "lengths", "tokens", "sampled", "masks")
    with pytest.raises(ValueError, match=message):
        speller_unroll(**(dict(zip(names, inputs(*SIZES[2]), strict=True)) | change))


def test_a_precision_that_a_named_backend_lacks_is_refused(cpp):
    with pytest.raises(RuntimeError, match='speller_unroll: backend "cpp" has no fp16 matmuls'):
        speller_unroll(*inputs(*SMALL), precision="fp16", backend=cpp)
    assert_close(
        results(speller_unroll, inputs(*SMALL, sampled_share=0.0), precision="fp16"),
        results(speller_unroll, inputs(*SMALL, sampled_share=0.0)),
        tolerance=2e-2,
    )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        *WRONG_MEMORY_OF_REGISTERED_OP,
        (4, torch.ones(3, 0).long(), r"tokens must be \(B, U\) int64 with B=3 and U at least 1; got \[3, 0\]"),
        (4, torch.full((3, 4), 7), "tokens must be from 0 to 6; got 7"),
        (4, torch.full((3, 4), -1), "tokens must be from 0 to 6; got -1"),
        (5, torch.ones(3, 4), r"sampled must be \[3, 4\] bool; got \[3, 4\] Float"),
        (6, [torch.ones(3, 6)] * 2, "masks must be one per cell or none; got 2"),
        (6, [torch.ones(3, 5)], r"masks must be \(B, H\) float32 of each cell; got \[3, 5\] Float"),
    ],
)
def test_the_registered_op_checks_its_arguments(cpp, place, value, message):
    weights, *others = inputs(*SIZES[2])
    arguments = [weights.flat(), *others, False, True]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.las_fast.speller_unroll_cpp(*arguments)


def test_results_too_large_for_the_memory_are_an_error_and_not_a_crash(cpp):
    V, U = 2**24, 2**23  # 512 TiB of logits: more than an address space has
    weights, frame, lengths = random_weights(V, 1, (1,), 1, 1), torch.zeros(1, 1, 1), torch.tensor([1])
    tokens, sampled = torch.zeros(1, U, dtype=torch.int64), torch.zeros(1, U, dtype=torch.bool)
    with pytest.raises((RuntimeError, MemoryError), match="bad_alloc"):
        torch.ops.las_fast.speller_unroll_cpp(weights.flat(), frame, frame, lengths, tokens, sampled, [], False, False)


def call_with_ever_less_spare_memory(sizes, gradients):
    """Halve the range of memory limits between an error and success, for the forward or the backward op."""
    T, B, _ = sizes[-3:]
    torch.set_num_threads(2)
    weights, keys, values, _, tokens, sampled, _ = inputs(*sizes, dropout=False)
    memory = (keys, values, torch.full((B,), T))
    forward = (weights.flat(), *memory, tokens, sampled, [], False, True)

    def run():
        if not gradients:
            return torch.ops.las_fast.speller_unroll_cpp(*forward)[:2]
        weights, keys, values = torch.ops.las_fast.speller_unroll_backward_cpp(*backward)
        return (*weights, keys, values)

    logits, attention, *kept = torch.ops.las_fast.speller_unroll_cpp(*forward)
    backward = (logits, attention, weights.flat(), *memory, [], attention, *kept, False)
    expected = run()  # also starts the threads
    low, high = 0, 2**28  # bytes above the present size
    while high - low > 2**16:
        middle, actual = (low + high) // 2, None
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + middle, resource.RLIM_INFINITY))
        try:
            actual = run()
        except (MemoryError, RuntimeError) as error:
            assert is_out_of_memory(error), error
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        low, high = (middle, high) if actual is None else (low, middle)
        for a, b in zip(run() if actual is None else actual, expected, strict=True):
            assert torch.equal(a, b)
    assert low > 0 and high < 2**28


@pytest.mark.parametrize(
    ("sizes", "gradients"),
    [  # the last large arrays that a thread takes are:
        ((2**14, 1, (1,), 1, 1, 1, 256, 1), False),  # the logits of its utterances
        ((2**12, 1, (64,), 1, 1, 1, 1024, 1), False),  # the same, and threads share the matmuls
        ((3, 1, (64,), 1, 1, 1, 2**15, 1), False),  # those of a shared matmul, between two barriers
        ((3, 2**11, (1,), 1, 1, 1, 1024, 1), True),  # the gradients of the projection
        ((3, 2**11, (1,), 1, 256, 1, 1024, 1), True),  # the same, and threads share the matmuls
    ],
    ids=["forward", "shared forward", "between barriers", "backward", "shared backward"],
)
def test_a_thread_without_memory_is_an_error_and_not_a_crash(cpp, sizes, gradients):
    code = f"import test_speller_unroll as t; t.call_with_ever_less_spare_memory({sizes}, {gradients})"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment.pop("LD_PRELOAD", None)  # the sanitizers of tests/sanitizers.py reserve all addresses
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def check_and_digest() -> str:
    for sizes in SIZES:
        assert_equals_the_reference(sizes, "cpp")
        assert_bf16_is_as_accurate_as_plain(sizes, "cpp")
    actual = results(speller_unroll, inputs(*SMALL), backend="cpp")
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in actual)).hexdigest()


def test_results_hold_with_vectors_of_older_processors(cpp):
    actual = digests(check_and_digest)
    widths = {"AVX512": 3, "AVX2": 2}.get(torch.backends.cpu.get_cpu_capability(), 1)
    assert len(actual) in (widths, widths - 1), "vectors with fused multiply-add round differently from those without"
