"""Small hostile test cases of every op with a Triton launcher.

The same cases run in the interpreter, under the sanitizer, as executed PTX, on mutants, and on a GPU if there is one.
They call the launchers in las_fast.kernels directly.
"""

import collections
import contextlib
import functools
import importlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import torch
from automata import random_model

from gpu_proof.interpreter import poison
from las_fast.ops import (
    CtcState,
    SpellerWeights,
    beam_backtrack,
    beam_gather,
    ctc_log_probabilities,
    ctc_loss,
    ctc_prefix,
    ctc_start,
    ctc_token_times,
    masked_attention,
    table_model,
)
from las_fast.ops.speller_unroll import _reference as unroll_by_steps

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
INF = torch.inf
PLAIN_ERRORS = 1  # further factor on the plain formula's error; its exponentials are a CPU's
EXTRA_ROUNDINGS = 1  # tolerance beyond the plain formula's error, in roundings of the largest result


@dataclass(frozen=True)
class Case:
    """One check with its options. Picklable, for worker processes."""

    op: str
    name: str
    check: Callable  # (device, **options): make inputs from a seed, launch, assert
    options: dict = field(default_factory=dict)
    huge: bool = False  # larger than memory: only the bounds of the last program are checked

    def run(self, device="cpu", approximate=False):
        """Raise AssertionError if the launcher's results on this device differ from the reference's.

        approximate: allow the larger errors of a GPU's approximate exponentials and logarithms.
        """
        plain_errors, roundings = (2, 4) if approximate else (1, 1)
        with mock.patch.multiple(__name__, PLAIN_ERRORS=plain_errors, EXTRA_ROUNDINGS=roundings):
            self.check(torch.device(device), **self.options)

    @property
    def interpretable(self):
        """Whether Triton's interpreter can run it: the interpreter computes bfloat16 incorrectly."""
        return self.options.get("dtype") != BF16

    @property
    def executable(self):
        """The architectures whose machine code the executor can run for this case.

        It does not model wgmma and tcgen05, which sm_90 and sm_100 use for matmuls of 64 rows, except in exact float32.
        """
        options = self.options
        exact = options.get("dtype", FP32) == FP32 and options.get("precision", "highest") == "highest"
        return (80,) if self.op == "masked_attention" and options.get("K", 0) > 32 and not exact else (80, 90, 100)

    def __str__(self):
        return f"{self.op}-{self.name}"


def launcher(op, function=None):
    """The launcher of an op. Looked up at each call, because a mutant may have replaced its module."""
    return getattr(importlib.import_module(f"las_fast.kernels.{op}"), function or op)


@contextlib.contextmanager
def matmul_precision(precision):
    """Set torch's float32 matmul precision inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# Inputs and comparison


def with_layout(tensor, layout):
    """Copy a tensor to another memory layout, with poison in the gaps.

    layout: "dense"; "transposed", the first two dimensions swapped in memory; "spaced", an odd number of elements
    between rows; "strided", every other element of a row.
    """
    if layout == "dense":
        return tensor
    if layout == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    n = tensor.shape[-1]
    wide = poison(tensor.new_empty(*tensor.shape[:-1], 2 * n + 1))
    view = wide[..., :n] if layout == "spaced" else wide[..., : 2 * n : 2]
    view.copy_(tensor)
    return view


@contextlib.contextmanager
def not_copied(*tensors):
    """Inside the block, making a tensor contiguous that has dense rows already is an error."""
    make = torch.Tensor.contiguous

    def contiguous(tensor):
        assert not any(tensor is x for x in tensors if x.stride(-1) == 1), "a tensor with dense rows is copied"
        return make(tensor)

    with mock.patch.object(torch.Tensor, "contiguous", contiguous):
        yield


def assert_identical(actual, expected, name):
    """Assert equal shape, dtype and bytes; bools must be 0 or 1."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, not {expected.dtype}"
    actual, expected = actual.cpu().contiguous(), expected.cpu().contiguous()
    if actual.dtype == torch.bool:
        actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
    wrong = (actual != expected).nonzero()
    assert not len(wrong), (
        f"{name}: {len(wrong)} of {actual.numel()} differ, first at {wrong[0].tolist()}: "
        f"{actual[tuple(wrong[0])]}, not {expected[tuple(wrong[0])]}"
    )


def assert_close(actual, exact, tolerance, name):
    """Assert that every element is within the tolerance; infinities must be equal."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    actual, exact = actual.cpu().double(), exact.cpu().double()
    error = torch.where(actual == exact, 0.0, (actual - exact).abs())
    worst = float(error.nan_to_num(INF, INF).max()) if error.numel() else 0.0
    assert worst <= tolerance, f"{name}: off by {worst:.3g}, more than {tolerance:.3g}"


def max_abs(tensor):
    """The largest absolute value; 0 for an empty tensor."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


# masked_attention


def attention_inputs(B, K, T, D, E, lengths, dtype, seed, scores="random"):
    """Query, keys, values and lengths; scores are "random", all "equal" or all "negative"."""
    generator = torch.Generator().manual_seed(seed)
    query, keys, values = (torch.randn(s, generator=generator) for s in ((B, K, D), (B, T, D), (B, T, E)))
    if scores == "equal":  # small integers: their scores are exact in any order of summation
        query, keys = query.round(), keys[:, :1].round().expand(B, T, D).contiguous()
    if scores == "negative":
        query, keys = query.abs(), -keys.abs()
    lengths = torch.tensor([max(0, min(T, lengths[b % len(lengths)])) for b in range(B)], dtype=torch.int64)
    return query.to(dtype), keys.to(dtype), values.to(dtype), lengths


def out_of_range_lengths(lengths, T):
    """Replace lengths of T by more than T and lengths of 0 by a negative number: the kernels must clamp both."""
    return torch.where(lengths == T, lengths + 70, torch.where(lengths == 0, -70, lengths))


def with_poisoned_padding(memory, lengths):
    """Copy keys or values with NaN past each length, because padding must never be read."""
    memory = memory.clone()
    for row, length in zip(memory, lengths.tolist(), strict=True):
        row[length:] = torch.nan
    return memory


def plain_attention(query, keys, values, lengths, scale, precision):
    """Context and weights by the plain formula in the precision of the inputs: the baseline for errors."""
    tf32 = round_to_tf32 if query.dtype == FP32 and precision != "highest" else lambda x: x
    past = (torch.arange(keys.shape[1]) >= lengths[:, None])[:, None]
    scores = (tf32(query) @ tf32(keys).transpose(1, 2)) * scale
    weights = scores.masked_fill(past, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(past, 0.0)
    return tf32(weights) @ tf32(values), weights


def round_to_tf32(x):
    """Round float32 to the 11 significant bits of tf32; the gradient passes through."""
    rounded = ((x.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(FP32)
    return x + (rounded - x).detach()


def assert_as_accurate_as_plain(actual, exact, plain, unit, name, factor=2):
    """Assert that the RMS error is at most `factor` times the plain formula's, plus EXTRA_ROUNDINGS of the largest
    result.

    The largest error may be four times the plain formula's, because a single element varies more.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    if not actual.numel():
        return
    errors = [(x.detach().cpu().double() - exact).abs() for x in (actual, plain)]
    rounding = EXTRA_ROUNDINGS * unit * max_abs(exact)
    for statistic, times, measure in (("rms", factor, lambda x: x.square().mean().sqrt()), ("largest", 4, torch.max)):
        error, plain_error = (float(measure(x)) for x in errors)
        allowed = PLAIN_ERRORS * times * plain_error + rounding
        assert error <= allowed, f"{name}: {statistic} error {error:.3g}, allowed {allowed:.3g}"


def rounding(dtype, precision):
    """Relative rounding of a matmul in this dtype; precisions below "highest" use tf32 for float32."""
    return 2.0**-11 if dtype == FP32 and precision != "highest" else torch.finfo(dtype).eps


def check_attention(
    device, B=2, K=3, T=17, D=16, E=16, lengths=(10**9, 5, 1), dtype=FP32, weights=True, scale=None, layout="dense",
    precision="highest", scores="random", out_of_range=False, seed=0,
):  # fmt: skip
    """Context, weights and peaks match the reference, and padding is not read.

    out_of_range: pass lengths above T and below 0 to the launcher.
    """
    query, keys, values, lengths = attention_inputs(B, K, T, D, E, lengths, dtype, seed, scores)
    scale = D**-0.5 if scale is None else scale
    exact_context, exact_weights, peaks = masked_attention(
        query.double(), keys.double(), values.double(), lengths, scale=scale, peaks=True, backend="reference"
    )
    context, actual_weights, actual_peaks, logsumexp = launch_attention(
        device, query, keys, values, lengths, scale, weights, layout, precision, out_of_range
    )
    unit = rounding(dtype, precision)
    plain, plain_weights = plain_attention(query, keys, values, lengths, scale, precision)
    assert context.dtype == dtype
    assert_as_accurate_as_plain(context, exact_context, plain, unit, "context")
    if weights:
        assert actual_weights.dtype == FP32
        past = (torch.arange(T) >= lengths[:, None])[:, None].expand(B, K, T)
        assert (actual_weights.cpu()[past] == 0).all(), "weights past the length"
        assert_as_accurate_as_plain(actual_weights, exact_weights, plain_weights, unit, "weights")
    else:
        assert actual_weights.shape == (0, 0, 0)
    assert_identical(actual_peaks, peaks, "peaks")
    assert not logsumexp.isnan().any(), "logsumexp is NaN"


def launch_attention(device, query, keys, values, lengths, scale, weights, layout, precision, out_of_range=False):
    tensors = [query, with_poisoned_padding(keys, lengths), with_poisoned_padding(values, lengths)]
    tensors = [with_layout(x.to(device), layout) for x in tensors]
    lengths = passed_lengths(lengths.to(device), keys.shape[1], layout, out_of_range)
    with matmul_precision(precision), not_copied(*tensors):
        return launcher("masked_attention")(*tensors, lengths, scale, weights)


def passed_lengths(lengths, T, layout, out_of_range):
    """Return the lengths as the launcher gets them: out of range, and as a column of a matrix if rows are strided."""
    lengths = out_of_range_lengths(lengths, T) if out_of_range else lengths
    return torch.stack([lengths, lengths.flip(0) + 1], 1)[:, 0] if layout == "strided" else lengths


def check_attention_gradients(
    device, B=2, K=3, T=17, D=16, E=16, lengths=(10**9, 5, 1), dtype=FP32, gradients="both", memory=True,
    layout="dense", precision="highest", out_of_range=False, change=None, seed=0,
):  # fmt: skip
    """Gradients match the reference and are exactly 0 in padding.

    gradients: which outputs have an upstream gradient, "context", "weights" or "both". out_of_range: pass lengths above
    T and below 0 to the launcher. change: modifies query, keys, values and the upstream gradients in place.
    """
    inputs = attention_inputs(B, K, T, D, E, lengths, dtype, seed)
    query, keys, values, lengths = inputs
    scale = D**-0.5
    generator = torch.Generator().manual_seed(seed + 1)
    context_gradient, weights_gradient = (torch.randn(s, generator=generator) for s in ((B, K, E), (B, K, T)))
    upstream = [
        context_gradient.to(dtype) if gradients != "weights" else None,
        weights_gradient if gradients != "context" else None,
    ]
    if change:
        change(query, keys, values, *upstream)

    context, weights, _, logsumexp = launch_attention(
        device, query, keys, values, lengths, scale, gradients != "context", layout, precision, out_of_range
    )
    tensors = [query, with_poisoned_padding(keys, lengths), with_poisoned_padding(values, lengths)]
    tensors = [with_layout(x.to(device), layout) for x in tensors]
    upstream_there = [None if x is None else with_layout(x.to(device), layout) for x in upstream]
    lengths_there = passed_lengths(lengths.to(device), T, layout, out_of_range)
    with matmul_precision(precision):
        actual = launcher("masked_attention", "masked_attention_backward")(
            *upstream_there, *tensors, lengths_there, context, weights, logsumexp, scale, memory
        )
    exact = plain_gradients([x.double() for x in inputs[:3]], lengths, scale, precision, upstream)
    plain = plain_gradients(inputs[:3], lengths, scale, precision, upstream)
    for name, x, y, z in zip(("query", "keys", "values"), actual, exact, plain, strict=True):
        if not memory and name != "query":
            assert x.shape == (0, 0, 0)
            continue
        assert_as_accurate_as_plain(x, y, z, rounding(dtype, precision), f"gradient of {name}")
        if name != "query":
            past = torch.arange(T) >= lengths[:, None]
            assert (x.cpu()[past] == 0).all(), f"gradient of {name} past the length"


def cancelling_halves(query, keys, values, context_gradient, weights_gradient):
    """The two halves of the frames contribute almost opposite amounts to the query's gradient.

    All frames get about equal attention and the keys have mean 0, so that delta, which is computed from a rounded
    context, does not matter.
    """
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0]).to(keys).repeat_interleave(keys.shape[1] // 4)[:, None]
    opposite = torch.tensor([1.0, -1.0, -1.0, 1.0]).to(keys).repeat_interleave(keys.shape[1] // 4)[:, None]
    query -= query.mean(-1, keepdim=True)
    keys[:], values[:] = sign + 0.05 * keys, opposite + 0.05 * values


def uneven_context_gradients(query, keys, values, context_gradient, weights_gradient):
    """Attention is uniform; the first 64 queries add 2048 to the values' gradient, each later group of 64 adds 1."""
    query[:] = 0.0
    context_gradient[:], context_gradient[:, :64] = values.shape[1] / 64, 32.0 * values.shape[1]


def plain_gradients(tensors, lengths, scale, precision, upstream):
    """Gradients of query, keys and values by autograd through the plain formula, in the tensors' precision."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = plain_attention(*leaves, lengths, scale, precision)
    with_gradient = [(x, g.to(x)) for x, g in zip(outputs, upstream, strict=True) if g is not None]
    outputs, upstream = zip(*with_gradient, strict=True)
    return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, materialize_grads=True)


def check_alone_equals_batched(device, B=4, K=3, T=1000, lengths=(1000, 500, 300, 1), dtype=FP32, weights=True, seed=0):
    """Context, weights and peaks of an utterance are identical, bit for bit, alone without padding and in a batch."""
    query, keys, values, lengths = attention_inputs(B, K, T, 16, 24, lengths, dtype, seed)
    batched = launch_attention(device, query, keys, values, lengths, 0.25, weights, "dense", "highest")
    for b, n in enumerate(lengths.tolist()):
        rows = slice(b, b + 1)
        alone = launch_attention(
            device, query[rows], keys[rows, :n], values[rows, :n], lengths[rows], 0.25, weights, "dense", "highest"
        )
        for name, x, y in zip(("context", "weights", "peaks", "logsumexp"), alone, batched, strict=True):
            if name != "weights" or weights:
                assert_identical(x, y[rows, :, :n] if name == "weights" else y[rows], f"{name} of utterance {b}")


# beam_topk


def search_state(B, K, V, seed):
    """Logits, scores, finished flags and lengths in the middle of a search."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, K, V, generator=generator)
    scores = -3 * torch.rand(B, K, generator=generator)
    finished = torch.rand(B, K, generator=generator) < 0.25
    lengths = torch.randint(1, 6, (B, K), generator=generator)
    return logits, scores, finished, lengths, generator


def check_topk(
    device, B=2, K=4, V=31, eos=2, dtype=FP32, state="random", minimum=None, maximum=None, length_penalty=0.0,
    eos_threshold=0.0, coverage=False, ngram=False, ctc_weight=None, beam_threshold=math.inf, layout="dense", seed=0,
):  # fmt: skip
    """All results match the reference, indices exactly.

    state: a key of STATES. minimum, maximum: length limits, higher by 1 for every second utterance.
    """
    logits, scores, finished, lengths, generator = search_state(B, K, V, seed)
    STATES[state](logits, scores, finished, lengths)
    logits = logits.to(dtype)
    bounds = [None if x is None else x + torch.arange(B) % 2 for x in (minimum, maximum)]
    coverage = torch.randn(B, K, generator=generator) if coverage else None
    options = (eos, *bounds, length_penalty, eos_threshold, coverage)
    if ngram:
        log_probs = torch.randn(B, K, V, generator=generator).log_softmax(-1)
        options += (with_layout(log_probs, layout), 0.3)
    else:
        options += (None, 0.0)
    next_log_probs = None
    if ctc_weight is not None:
        next_log_probs = torch.randn(B, K, V, generator=generator).log_softmax(-1)
        next_log_probs = with_layout(
            next_log_probs.masked_fill(torch.rand(B, K, V, generator=generator) < 0.1, -INF), layout
        )
    options += (next_log_probs, ctc_weight or 0.0, beam_threshold)
    expected = importlib.import_module("las_fast.ops.beam_topk")._reference(logits, scores, finished, lengths, *options)
    tensors = [with_layout(x.to(device), layout) for x in (logits, scores, finished, lengths)]
    options = [x.to(device) if isinstance(x, torch.Tensor) else x for x in options]
    with not_copied(tensors[0]):
        actual = launcher("beam_topk")(*tensors, *options)
    assert_close(actual[0], expected[0], 2e-5, "scores")
    assert_identical(actual[0].isneginf(), expected[0].isneginf(), "beams without a score")
    names = ("scores", "tokens", "parents", "finished", "lengths")
    for name, x, y in list(zip(names, actual, expected, strict=True))[1:]:
        assert_identical(x, y, name)


def _all_finished(logits, scores, finished, lengths):
    finished[:] = True


def _first_beam_only(logits, scores, finished, lengths):
    finished[:] = False
    scores[:, 0], scores[:, 1:] = 0.0, -INF


def _all_equal(logits, scores, finished, lengths):
    finished[:] = False
    logits[:], scores[:] = 0.0, -1.0


def _equal_beams(logits, scores, finished, lengths):
    finished[:] = False
    logits[:], scores[:] = logits[:, :1].clone(), -1.0


def _tied_with_finished(logits, scores, finished, lengths):
    """Unfinished beams whose only token gives them the score of the finished ones."""
    logits[:], scores[:], finished[:] = -INF, -1.0, False
    logits[..., -1] = 0.0
    finished[:, 1::2] = True


def _all_impossible(logits, scores, finished, lengths):
    logits[:], scores[:] = -INF, -INF


def _one_token_each(logits, scores, finished, lengths):
    finished[:] = False
    logits[:] = -INF
    logits[..., 3] = 1.0


def _nan_and_inf_rows(logits, scores, finished, lengths):
    finished[:] = False
    logits[:, 0, 1], logits[:, 1, 2], logits[:, 2] = torch.nan, INF, -INF


def _extreme(logits, scores, finished, lengths):
    logits.mul_(1e4)
    scores.mul_(1e4)


def _eos_near_the_top(logits, scores, finished, lengths):
    """The logit of token 2 is below the best other one by 0 to 3."""
    finished[:] = False
    B, K, _ = logits.shape
    logits[..., 2] = logits.amax(-1) - torch.linspace(0.0, 3.0, B * K).view(B, K)


def _zero_lengths(logits, scores, finished, lengths):
    lengths[:] = 0


def _signed_zeros(logits, scores, finished, lengths):
    """Two finished beams whose scores, normalised with a length penalty of 1, are -0 and 0."""
    finished[:], scores[:], lengths[:] = True, -9.0, 2
    scores[:, 1], scores[:, 2] = -1e-45, 0.0


def _equal_means(logits, scores, finished, lengths):
    """Finished beams of the lengths 1, 2, ..., whose log-probability per token is -1."""
    finished[:] = True
    lengths[:] = 1 + torch.arange(lengths.shape[1])
    scores[:] = -lengths


def _eos_first(logits, scores, finished, lengths):
    """Token 2 is the most probable one, in beams of length 4."""
    finished[:], lengths[:] = False, 4
    logits[..., 2] = logits.amax(-1) + 1


STATES = {
    "random": lambda *_: None,
    "eos first": _eos_first,
    "all finished": _all_finished,
    "first beam only": _first_beam_only,
    "all equal": _all_equal,
    "equal beams": _equal_beams,
    "tied with finished": _tied_with_finished,
    "all impossible": _all_impossible,
    "one token each": _one_token_each,
    "nan and inf rows": _nan_and_inf_rows,
    "extreme": _extreme,
    "eos near the top": _eos_near_the_top,
    "zero lengths": _zero_lengths,
    "signed zeros": _signed_zeros,
    "equal means": _equal_means,
}


# beam_gather and beam_backtrack


def check_gather(device, B=2, K=4, sizes=(5,), dtypes=(FP32,), layout="dense", parents="random", seed=0):
    """The rows of each state are reordered byte for byte, and parents out of range are clamped."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-3, K + 3) if parents == "out of range" else (0, max(K, 1))
    chosen = torch.randint(low, high, (B, K), generator=generator)
    if parents == "out of range" and chosen.numel():
        chosen[0, 0], chosen[-1, -1] = -(2**40), 2**40
    states = [
        (100 * torch.randn(B, K, n, generator=generator)).to(dtype)
        for n, dtype in zip(sizes, itertools.cycle(dtypes), strict=False)
    ]
    expected = beam_gather(states, chosen.clamp(0, max(K - 1, 0)), backend="reference")
    *states, chosen = (with_layout(x.to(device), layout) for x in (*states, chosen))
    actual = launcher("beam_gather")(states, chosen)
    assert len(actual) == len(expected)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert_identical(x, y, f"state {i}")


def check_backtrack(device, L=5, B=2, K=3, eos=2, vocabulary=6, layout="dense", parents="random", seed=0):
    """Tokens, lengths, log-probabilities and attended frames of each hypothesis match the reference."""
    generator = torch.Generator().manual_seed(seed)
    tokens, attended_frames = (torch.randint(0, n, (L, B, K), generator=generator) for n in (vocabulary, 1000))
    low, high = (-2, K + 2) if parents == "out of range" else (0, max(K, 1))
    chosen = torch.randint(low, high, (L, B, K), generator=generator)
    scores = -torch.rand(L, B, K, generator=generator).cumsum(0)
    if L > 2 and K > 1:
        scores[-2:, :, -1] = -INF
    nearest = chosen.clamp(0, max(K - 1, 0))
    expected = beam_backtrack(tokens, nearest, scores, attended_frames, eos=eos, backend="reference")
    tensors = [with_layout(x.to(device), layout) for x in (tokens, chosen, scores, attended_frames)]
    actual = launcher("beam_backtrack")(*tensors, eos)
    for name, x, y in zip(expected._fields, actual, expected, strict=True):
        if name == "token_scores":
            assert_close(x, y, 1e-6, name)
        else:
            assert_identical(x, y, name)


# ctc_prefix


def check_ctc_prefix(
    device, B=2, K=3, T=9, V=7, eos=2, lengths=(10**9, 4), state="random", layout="dense", scale=2.0, blank_frames=0,
    out_of_range=False, seed=0,
):  # fmt: skip
    """The CTC state after a step matches the reference in float64.

    state: "first" step, "repeated" tokens, "long" (more tokens than frames) or "random". blank_frames: how many frames
    at the start are almost certainly blank.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([min(T, lengths[b % len(lengths)]) for b in range(B)], dtype=torch.int64)
    logits = scale * torch.randn(B, T, V, generator=generator)
    logits[:, :blank_frames, 0] += 12.0
    log_probs = ctc_log_probabilities(logits, lengths)
    before, tokens = ctc_start(log_probs, K, eos=eos), torch.full((B, K), eos)
    for _ in range({"first": 0, "long": T + 1}.get(state, 3)):
        parents, chosen = (torch.randint(low, high, (B, K), generator=generator) for low, high in ((0, K), (1, V)))
        if state == "repeated":
            chosen = torch.where(torch.arange(K) % 2 == 0, chosen[:, :1], chosen)
        before, tokens = ctc_prefix(log_probs, before, tokens, parents, chosen, eos=eos, backend="reference"), chosen
    parents, chosen = (torch.randint(low, high, (B, K), generator=generator) for low, high in ((0, K), (1, V)))
    if state == "repeated":
        chosen = tokens.gather(1, parents)
    exact = CtcState(*(x.double() for x in before))
    expected = ctc_prefix(log_probs.double(), exact, tokens, parents, chosen, eos=eos, backend="reference")
    if out_of_range:
        parents, chosen = (torch.where(x == 0, -(2**40), torch.where(x == n - 1, 2**40, x))
                           for x, n in ((parents, K), (chosen, V)))  # fmt: skip
    tensors = [with_layout(x.to(device), layout) for x in (log_probs, *before, tokens, parents, chosen)]
    actual = launcher("ctc_prefix")(*tensors, eos)
    for name, x, y in zip(CtcState._fields, actual, expected, strict=True):
        assert x.dtype == FP32
        assert_close(x, y, EXTRA_ROUNDINGS * (1e-5 + 1e-6 * max_abs(y[y.isfinite()])), name)


# ngram_scores


def check_ngram_scores(
    device, V=31, order=4, B=2, K=3, followed=True, table=False, layout="dense", out_of_range=False, seed=0,
):  # fmt: skip
    """States and log-probabilities equal the reference to the bit.

    followed: a step has been taken. table: every state has an arc of every token. out_of_range: pass states, parents
    and tokens to the launcher that are too small and too large.
    """
    generator = torch.Generator().manual_seed(seed)
    if table:
        model = table_model(torch.randn(V ** (order - 1), V, generator=generator), 1)
    else:
        model = random_model(V, order, seed=seed, prune=2)
    S = len(model.rows)
    limits = (S, K, V) if followed else (S,)
    taken = [torch.randint(0, n, (B, K), generator=generator) for n in limits]
    if out_of_range:
        outside = [torch.where(x % 3 == 0, -(2**40), torch.where(x % 3 == 1, 2**40, x)) for x in taken]
        taken = [x.clamp(0, n - 1) for x, n in zip(outside, limits, strict=True)]
    rest = [] if followed else [None, None]
    sizes = model.vocabulary_size, model.order
    parts = model.rows, model.arcs
    expected = importlib.import_module("las_fast.ops.ngram_scores")._reference(*parts, *sizes, *taken, *rest)
    parts, taken = ([with_layout(x.to(device), layout) for x in tensors]
                    for tensors in (parts, outside if out_of_range else taken))  # fmt: skip
    actual = launcher("ngram_scores")(*parts, *sizes, *taken, *rest)
    assert_identical(actual[0], expected[0], "states")
    assert_identical(actual[1].view(torch.int32), expected[1].view(torch.int32), "bits of the log-probabilities")


# ctc_loss


def check_ctc_loss(
    device, B=3, T=9, V=6, S=4, lengths=(10**9, 5), counts=(10**9, 2, 0), scale=3.0, equal=False, layout="dense",
    beyond_end=0, out_of_range=False, forbidden=False, seed=0,
):  # fmt: skip
    """Losses, gradients and token times match the float64 reference about as closely as the float32 reference does.

    equal: all tokens of a text are equal. beyond_end: value of `tokens` past each count. out_of_range: pass lengths,
    counts and tokens that are too large to the launcher. forbidden: every third frame must be blank, by logits of -inf;
    the reference, whose gradients would be NaN, gets -1e4.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(B, T, V, generator=generator)
    tokens = torch.randint(1, V, (B, S), generator=generator)
    tokens = tokens[:, :1].expand(B, S).contiguous() if equal else tokens
    lengths = torch.tensor([min(T, lengths[b % len(lengths)]) for b in range(B)], dtype=torch.int64)
    counts = torch.tensor([min(S, counts[b % len(counts)]) for b in range(B)], dtype=torch.int64)
    rest = lengths, tokens, counts
    if forbidden:
        logits[:, ::3, 1:] = -1e4
    exact, plain = losses_gradients_and_times(logits.double(), *rest), losses_gradients_and_times(logits, *rest)
    if forbidden:
        logits[:, ::3, 1:] = -INF
    if beyond_end:
        tokens = tokens.masked_fill(torch.arange(S) >= counts[:, None], beyond_end)
    if out_of_range:
        limits = (lengths, T), (tokens, V - 1), (counts, S)
        lengths, tokens, counts = (torch.where(x == limit, 2**40, x) for x, limit in limits)
    inputs = [with_layout(logits, layout), lengths, with_layout(tokens, layout), counts]
    inputs = [x.to(device) for x in inputs]
    actual = [*launcher("ctc_loss")(*inputs, True), launcher("ctc_loss", "ctc_token_times")(*inputs)]
    for name, x, y, z in zip(("losses", "gradient", "times"), actual, exact, plain, strict=True):
        assert x.dtype == FP32
        assert_close(x, y, 2 * EXTRA_ROUNDINGS * max_abs(z - y) + EXTRA_ROUNDINGS * (4e-6 + 1e-6 * max_abs(y)), name)
    losses, no_gradient = launcher("ctc_loss")(*inputs, False)
    assert_identical(losses, actual[0], "losses without gradients")
    assert no_gradient.shape == (0, T, V)


def check_impossible_transcript(device):
    """Without a path, loss, gradient and times are 0, also if a token has no probability in any frame."""
    logits, tokens = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 2], [2, 3]])
    logits[0, :, 1] = -INF
    inputs = [x.to(device) for x in (logits, torch.tensor([5, 4]), tokens, torch.tensor([2, 2]))]
    (losses, gradient), times = launcher("ctc_loss")(*inputs, True), launcher("ctc_loss", "ctc_token_times")(*inputs)
    assert losses[0] == 0 and (gradient[0] == 0).all() and (times[0] == 0).all()
    assert losses[1] > 0 and gradient[1].abs().sum() > 0 and times.isfinite().all()


def losses_gradients_and_times(logits, *rest):
    """Losses, gradients and token times by the reference."""
    leaf = logits.detach().requires_grad_()
    losses = ctc_loss(leaf, *rest, backend="reference")
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient, ctc_token_times(logits, *rest, backend="reference")


# Larger than memory: tensors on the meta device, with more elements than 32 bits can count


def huge(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


def check_huge_attention(device, B, K, T, D, layout="dense"):
    """No index of the forward or backward pass overflows."""
    query, lengths = huge(B, K, D, dtype=FP16), torch.full((B,), T)
    keys = huge(T, B, D, dtype=FP16).transpose(0, 1) if layout == "transposed" else huge(B, T, D, dtype=FP16)
    results = launcher("masked_attention")(query, keys, keys, lengths, 1.0, True)
    context, weights, _, logsumexp = results
    launcher("masked_attention", "masked_attention_backward")(
        context, weights, query, keys, keys, lengths, context, weights, logsumexp, 1.0, True
    )


def check_huge_topk(device, B, K, V):
    """No index overflows, with an n-gram model if the vocabulary is small."""
    rows = huge(B, K)
    lengths = rows.to(torch.int64)
    ngram_log_probs = huge(B, K, V) if V < 100 else None
    options = (2, None, None, 0.0, 0.0, rows, ngram_log_probs, 0.3, huge(B, K, V), 0.3, 2.0)
    # skip merge_kernel: it reads the results of row_kernel, which meta tensors do not hold
    unmerged = collections.defaultdict(lambda: lambda *_, **__: None)
    with mock.patch.object(importlib.import_module("las_fast.kernels.beam_topk"), "merge_kernel", unmerged):
        launcher("beam_topk")(huge(B, K, V, dtype=FP16), rows, rows.bool(), lengths, *options)


def check_huge_gather(device, B, K, N):
    """No index overflows."""
    launcher("beam_gather")([huge(B, K, N), huge(B, K, N, dtype=FP16)], huge(B, K, dtype=torch.int64))


def check_huge_ctc_prefix(device, B, K, T, V):
    """No index overflows."""
    rows = huge(B, K, dtype=torch.int64)
    launcher("ctc_prefix")(huge(B, T, V), huge(B, K, T + 1), huge(B, K), huge(B, K, V), rows, rows, rows, 2)


def check_huge_ngram_scores(device, B, K, V):
    """No index overflows, with more states and arcs than 32 bits can address."""
    rows, arcs = huge(2**30, 4, dtype=torch.int32), huge(2**31 - 1, 2, dtype=torch.int32)
    hypotheses = [huge(B, K, dtype=torch.int64)] * 3
    launcher("ngram_scores")(rows, arcs, V, 3, *hypotheses)


def check_huge_ctc_loss(device, B, T, V, S):
    """No index overflows."""
    lengths, counts = torch.full((B,), T), torch.full((B,), S)
    launcher("ctc_loss")(huge(B, T, V), lengths, huge(B, S, dtype=torch.int64), counts, False)


def check_huge_backtrack(device, L, B, K):
    """No index overflows."""
    tokens = huge(L, B, K, dtype=torch.int64)
    launcher("beam_backtrack")(tokens, tokens, huge(L, B, K), tokens, 2)


# speller_unroll

RESULTS = ("logits", "weights")


def unroll_inputs(V, M, H, D, E, T, B, U, lengths, dropout, share, scale, seed):
    """Weights in flat order, keys, values, lengths, tokens, sampled and masks. share: fraction of sampled tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * scale

    sizes = [below + h for below, h in zip((M + E, *H), H, strict=False)]
    cells = [x for h, size in zip(H, sizes, strict=True) for x in (normal(4 * h, size) * size**-0.5, normal(4 * h))]
    weights = [normal(V, M), normal(D, H[-1]), normal(D), normal(M, H[-1] + E), normal(M), normal(V), *cells]
    keys, values = normal(B, T, D), normal(B, T, E)
    lengths = torch.tensor([max(0, min(T, lengths[b % len(lengths)])) for b in range(B)], dtype=torch.int64)
    tokens = torch.randint(V, (B, U), generator=generator)
    sampled = torch.rand(B, U, generator=generator) < share
    masks = [(torch.rand(B, h, generator=generator) < 0.7) / 0.7 for h in H] if dropout else []
    return weights, keys, values, lengths, tokens, sampled, masks


def check_unroll(
    device, V=7, M=5, H=(6,), D=4, E=3, T=9, B=3, U=3, lengths=(10**9, 5, 1), dtype=FP32, dropout=True, share=0.4,
    scale=1.0, gradients="both", layout="dense", precision="highest", out_of_range=False, equal=False, shift=0.0,
    tolerance=None, replayed=False, seed=0,
):  # fmt: skip
    """Logits, attention, the tokens read and all gradients match the reference.

    share: fraction of sampled tokens; 0 passes an empty `sampled`. gradients: which results have one. equal: all
    logits are equal, so that the first token is the best. shift: added to all logits. out_of_range: pass lengths above
    T and below 0 to the launcher. tolerance: relative to the largest result; used where gates saturate, because the
    plain formula's error then varies. replayed: replay chunks of tokens as a CUDA graph would.
    """
    inputs = unroll_inputs(V, M, H, D, E, T, B, U, lengths, dropout, share, scale, seed)
    if equal:
        inputs[0][0].zero_(), inputs[0][5].zero_()
    inputs[0][5].add_(shift)
    weights, keys, values, lengths, tokens, sampled, masks = inputs
    sampled_on_device = with_layout(sampled if share else sampled[:0], layout).to(device)
    on_device = [
        [with_layout(x.to(device), layout) if x.ndim > 1 else x.to(device) for x in weights],
        *(with_layout(x.to(device), layout) for x in (keys, values)),
        (out_of_range_lengths(lengths, T) if out_of_range else lengths).to(device),
        with_layout(tokens.to(device), layout),
        sampled_on_device,
        [with_layout(x.to(device), layout) for x in masks],
    ]
    generator = torch.Generator().manual_seed(seed + 1)
    upstream = [torch.randn(shape, generator=generator) for shape in ((B, U, V), (B, U, T))]
    upstream = [x if gradients in ("both", name) else None for x, name in zip(upstream, RESULTS, strict=True)]
    replaying = replay_chunks() if replayed and device.type == "cpu" else contextlib.nullcontext()
    with matmul_precision(precision), replaying:
        logits, attention, read, *saved = launcher("speller_unroll")(*on_device, dtype == BF16, True)
        weight_gradients, *memory_gradients = launcher("speller_unroll", "speller_unroll_backward")(
            *(None if x is None else with_layout(x.to(device), layout) for x in upstream), *on_device[:4], on_device[6],
            attention, read, *saved, dtype == BF16,
        )  # fmt: skip
    assert ((read >= 0) & (read < V)).all(), "a token that does not exist is read"
    exact = reference_results(inputs, read.t().cpu(), upstream, torch.float64)
    with linear_in_tf32() if precision != "highest" else contextlib.nullcontext():
        plain = reference_results(inputs, read.t().cpu(), upstream, dtype)
    best = torch.cat((tokens[:, :1], exact[0][:, :-1].argmax(-1)), 1)
    first = torch.arange(U) == 0
    assert_identical(read.t(), torch.where(sampled & ~first, best, tokens), "tokens read")
    past = (torch.arange(T) >= lengths[:, None])[:, None].expand(B, U, T)
    assert (attention.cpu()[past] == 0).all(), "attention past the length"
    unit = rounding(dtype, precision)
    names = ["logits", "attention", *(f"gradient of weight {i}" for i in range(len(weights))), "keys", "values"]
    actual = [logits, attention, *weight_gradients, *memory_gradients]
    for name, x, y, z in zip(names, actual, exact, plain, strict=True):
        assert x.dtype == FP32
        if tolerance:
            assert_close(x, y, tolerance * max_abs(y), name)
        else:
            # In sums over all tokens much cancels, and the plain error depends on the order of the processor's PyTorch.
            assert_as_accurate_as_plain(x, y, z, unit, name, factor=4 if "weight" in name else 2)


class FakeGraph:
    """Fake of a CUDA graph: each replay launches a chunk of tokens."""

    def __init__(self, launch):
        self.launch = launch

    def replay(self):
        for i in range(1, 17):
            self.launch(i)


def replay_chunks():
    """Let speller_unroll replay chunks of tokens inside the block, even on a CPU."""
    module = importlib.import_module("las_fast.kernels.speller_unroll")
    return mock.patch.multiple(
        module, _captures=lambda tokens, _: tokens > 17, _capture=lambda launch, _: FakeGraph(launch)
    )


def check_unroll_tokens(device, token, waits=True):
    """A token outside the vocabulary of 3 is an error. A kernel that runs before the assertion reads an existing one.

    waits: the assertion stops the program before the kernels run.
    """
    inputs = unroll_inputs(3, 5, (6,), 4, 3, 2, 2, 2, (2,), False, 0.0, 1.0, 0)
    weights, keys, values, lengths, tokens, _, masks = inputs
    tokens[1, 1] = token
    arguments = ([x.to(device) for x in weights], *(x.to(device) for x in (keys, values, lengths, tokens)))
    run = functools.partial(launcher("speller_unroll"), *arguments, tokens[:0].bool().to(device), masks, False, True)
    if not waits:
        with mock.patch.object(torch, "_assert_async", lambda *_: None):
            assert_identical(run()[2].t(), tokens.clamp(0, 2), "tokens read")
    elif device.type == "cpu":  # on a GPU it would stop the whole program
        try:
            run()
        except RuntimeError as error:
            assert "tokens must be at least 0 and less than V=3" in str(error)
        else:
            raise AssertionError("the token is not refused")


def check_gelu(device, features=16):
    """Sampled tokens are chosen with the exact gelu, to 1e-5, between -4 and 4.

    The logit of token f is the error of the gelu of feature f, that of token features + f is minus that error, and that
    of the last token is 1e-5. So the last one is the best.
    """
    V = 2 * features + 1
    inputs = unroll_inputs(V, features, (6,), 4, 3, 2, 1, 2, (2,), False, 2.0, 1.0, 0)
    weights, keys, values, lengths, tokens, sampled, masks = inputs
    embedding, _, _, project, project_bias, bias = weights[:6]
    project.zero_(), project_bias.copy_(torch.linspace(-4, 4, features))
    gelu = torch.nn.functional.gelu(project_bias.double()).float()
    embedding.copy_(torch.cat((torch.eye(features), -torch.eye(features), torch.zeros(1, features))))
    bias.copy_(torch.cat((-gelu, gelu, torch.tensor([1e-5]))))
    arguments = ([x.to(device) for x in weights], *(x.to(device) for x in (keys, values, lengths, tokens, sampled)))
    read = launcher("speller_unroll")(*arguments, masks, False, True)[2]
    assert_identical(read[1].cpu(), torch.tensor([V - 1]), "token chosen")


def check_positions(device):
    """The two positions are at the same offset from a multiple of 16 bytes, so that a kernel is compiled once."""
    positions = importlib.import_module("las_fast.kernels.speller_unroll")._positions(torch.zeros(1, device=device), 7)
    assert_identical(positions[:, 0], torch.full((2,), 7, dtype=torch.int32), "positions")
    assert positions.stride(0) * positions.element_size() % 16 == 0


def check_tiles(device):
    """A tile of keys or values has at most TILE numbers and 64 frames; up to 16 utterances take blocks of 16."""
    layout = importlib.import_module("las_fast.kernels.unroll_layout")
    frames = {(5, 3): (64, 64), (256, 256): (32, 16), (1000, 20): (8, 4), (20, 1000): (8, 4), (9000, 1): (1, 1)}
    for (H, E), expected in frames.items():
        assert tuple(layout.attention_options(H, E, dtype)["BLOCK_T"] for dtype in (BF16, FP32)) == expected
    rows = [layout.matmul_options(B, FP32)["BLOCK_B"] for B in (1, 16, 17, 49)]
    assert rows == [16, 16, 32, 32]


def check_repeat(device, tokens, on="cuda", capturing=False, fails=False):
    """The tokens of a pass are launched in order: on a GPU the first by itself, the others as replays of a graph.

    Streams and graphs are fakes. capturing: a graph of the caller's is being captured. fails: a launch raises.
    """
    module = importlib.import_module("las_fast.kernels.speller_unroll")
    launched, events, current = [], [], []  # current: the streams entered, and a graph while it is captured

    class Stream:
        def wait_stream(self, other):
            events.append((self, "waits for", other))

    class Graph:
        def capture_begin(self, capture_error_mode):
            self.tokens = []
            events.append((current[-1], "begins", capture_error_mode))
            current.append(self)

        def capture_end(self):
            assert current.pop() is self
            events.append((current[-1], "ends"))

        def replay(self):
            launched.extend(self.tokens)

    @contextlib.contextmanager
    def stream(entered):
        current.append(entered)
        try:
            yield
        finally:
            current.pop()

    def launch(token):
        (current[-1].tokens if len(current) > 1 else launched).append(token)
        if fails and len(current) > 1:
            raise RuntimeError("a launch failed")

    main, side = Stream(), Stream()
    fakes = {"current_stream": lambda: main, "CUDAGraph": Graph, "stream": stream}
    expected = contextlib.suppress(RuntimeError) if fails else contextlib.nullcontext()
    with (
        mock.patch.object(module, "stream_for", lambda purpose, device: side),
        mock.patch.multiple(torch.cuda, is_current_stream_capturing=lambda: capturing, **fakes),
        expected,
    ):
        module._repeat(launch, tokens, torch.device(on))
    if fails:
        assert launched == [0] and not current and (side, "ends") in events
    elif on == "cpu" or capturing or tokens <= 17:
        assert launched == list(range(tokens)) and not events
    else:
        replays = -(-(tokens - 1) // 16)
        assert launched == [0, *list(range(1, 17)) * replays] and not current
        begins, ends = (side, "begins", "thread_local"), (side, "ends")
        assert events == [(side, "waits for", main), begins, ends, (main, "waits for", side)]
        assert module._graphs[-1].tokens == list(range(1, 17)), "the graph may be freed while the device runs it"


def linear_in_tf32():
    """Let linear layers round their operands to tf32 inside the block."""
    linear = torch.nn.functional.linear
    return mock.patch.object(
        torch.nn.functional, "linear", lambda x, weight, bias: linear(round_to_tf32(x), round_to_tf32(weight), bias)
    )


def reference_results(inputs, read, upstream, dtype):
    """Logits, attention and gradients of the reference in a dtype, given the tokens that are read."""
    weights, keys, values, lengths, _, sampled, masks = inputs
    leaves = [x.to(dtype).detach().requires_grad_() for x in (*weights, keys, values)]
    flat = leaves[:-2]
    masks = [x.to(dtype) for x in masks] or None
    speller_weights = SpellerWeights.from_flat(flat)
    results = unroll_by_steps(speller_weights, *leaves[-2:], lengths, read, sampled & False, masks)
    chosen = [(x, g.to(x)) for x, g in zip(results, upstream, strict=True) if g is not None]
    outputs, upstream = zip(*chosen, strict=True)
    gradients = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, materialize_grads=True)
    return *(x.detach() for x in results), *gradients


def check_huge_unroll(device, B, U, T, step, H=(8, 9)):
    """No index of one step overflows."""
    module = importlib.import_module("las_fast.kernels.speller_unroll")
    weights = [huge(*x.shape) for x in unroll_inputs(5, 4, H, 3, 7, 1, 1, 1, (1,), True, 0.0, 1.0, 0)[0]]
    memory = huge(B, T, 3), huge(B, T, 7), torch.full((B,), T, device="meta")
    tokens, masks = huge(B, U, dtype=torch.int64), [huge(B, h) for h in H]
    with (
        mock.patch.object(module, "_positions", lambda *_: torch.full((2, 4), step, dtype=torch.int32)),
        mock.patch.object(module, "_repeat", lambda launch, *_: launch(0)),
        mock.patch.object(torch, "_assert_async", lambda *_: None),
    ):
        logits, *saved = launcher("speller_unroll")(weights, *memory, tokens, tokens.bool(), masks, False, True)
        launcher("speller_unroll", "speller_unroll_backward")(logits, saved[0], weights, *memory, masks, *saved, False)


# The cases


def _cases(op, check, named_options):
    return [Case(op, name, check, options) for name, options in named_options.items()]


ATTENTION = _cases(
    "masked_attention",
    check_attention,
    {
        "no-frames": {"T": 0},
        "one-frame": {"T": 1, "B": 1, "K": 1, "D": 1, "E": 1},
        "primes": {"B": 3, "K": 5, "T": 37, "D": 13, "E": 7},
        "length-zero": {"lengths": (0, 17, 3)},
        "all-lengths-zero": {"lengths": (0,)},
        "half": {"dtype": FP16, "T": 70, "D": 32, "E": 48},
        "half-beam-8": {"dtype": FP16, "K": 8, "T": 65, "D": 64, "E": 64, "lengths": (65, 64)},
        "bf16": {"dtype": BF16, "K": 8, "T": 65, "D": 64, "E": 64, "lengths": (65, 33)},
        "tf32": {"precision": "medium", "K": 8, "T": 40, "D": 32, "E": 32},
        "tf32-precision-high": {"precision": "high", "K": 8, "T": 40, "D": 32, "E": 32},
        "one-query": {"K": 1, "T": 67, "D": 20, "E": 24},
        "one-query-half": {"K": 1, "T": 67, "D": 32, "E": 32, "dtype": FP16},
        "beam-16": {"K": 16, "T": 19},
        "beam-17": {"K": 17, "T": 19},
        "beam-67": {"K": 67, "T": 19, "B": 1},
        "beam-64-half": {"K": 64, "T": 40, "D": 32, "E": 32, "dtype": FP16},
        "beam-32-half": {"K": 32, "T": 40, "D": 32, "E": 32, "dtype": FP16},
        "beam-64": {"K": 64, "T": 33},
        "frames-8192": {"T": 8192, "B": 1, "K": 2, "lengths": (8191,), "weights": False, "dtype": FP16},
        "no-weights": {"weights": False},
        "no-weights-half": {"weights": False, "dtype": FP16, "T": 33},
        "scale": {"scale": 1.7},
        "equal-scores-peak-at-the-first": {"scores": "equal", "T": 40},
        "large-scale": {"scale": 30.0, "T": 40},
        "transposed": {"layout": "transposed", "T": 21, "K": 4},
        "spaced": {"layout": "spaced"},
        "strided": {"layout": "strided"},
        "no-utterances": {"B": 0},
        "no-queries": {"K": 0},
        "many-utterances": {"B": 9, "K": 2, "T": 6, "lengths": (6, 0, 1, 5, 2)},
        "lengths-out-of-range": {"lengths": (17, 0, 5), "B": 3, "out_of_range": True},
        "lengths-out-of-range-no-weights": {"lengths": (17, 0), "out_of_range": True, "weights": False},
        "splits-lengths-out-of-range": {"T": 900, "lengths": (900, 0), "out_of_range": True},
        "splits": {"T": 600, "lengths": (600, 301)},
        "splits-some-of-them-empty": {"T": 1300, "K": 2, "lengths": (250, 0)},
        "splits-no-weights": {"T": 520, "lengths": (519, 257), "weights": False, "dtype": FP16},
        "splits-equal-scores": {"T": 600, "B": 1, "scores": "equal"},
        "three-splits-negative-scores": {"T": 1000, "B": 1, "scores": "negative", "weights": False},
        **{f"frames-{T}": {"T": T, "B": 1, "K": 2, "lengths": (T,)} for T in (15, 16, 31, 32, 63, 64, 127, 128, 129)},
        **{f"frames-{T}-half": {"T": T, "B": 1, "K": 8, "lengths": (T,), "dtype": FP16} for T in (31, 33, 128, 129)},
        **{f"sizes-{D}-{E}": {"D": D, "E": E, "B": 1} for D, E in ((17, 15), (64, 33), (130, 100))},
    },
) + _cases(
    "masked_attention",
    check_alone_equals_batched,
    {
        "alone-and-in-a-batch": {},
        "alone-and-in-a-batch-half": {"dtype": FP16, "K": 8, "weights": False},
    },
) + _cases(
    "masked_attention",
    check_attention_gradients,
    {
        "backward": {"K": 5, "T": 37, "D": 13, "E": 7},
        "backward-of-context": {"gradients": "context", "T": 33},
        "backward-of-weights": {"gradients": "weights", "T": 33},
        "backward-of-query-only": {"memory": False, "T": 33},
        "backward-no-frames": {"T": 0},
        "backward-no-utterances": {"B": 0},
        "backward-no-queries": {"K": 0},
        "backward-length-zero": {"lengths": (0, 17)},
        "backward-lengths-out-of-range": {"lengths": (17, 0, 5), "B": 3, "out_of_range": True},
        "backward-splits-lengths-out-of-range": {"T": 600, "lengths": (600, 0), "out_of_range": True},
        "backward-one-query": {"K": 1, "T": 40},
        "backward-many-queries": {"K": 37, "T": 20},
        "backward-half": {"dtype": FP16, "K": 8, "T": 65, "D": 32, "E": 32},
        "backward-bf16": {"dtype": BF16, "K": 8, "T": 65, "D": 32, "E": 32},
        "backward-transposed": {"layout": "transposed", "T": 21, "K": 4},
        "backward-strided": {"layout": "strided", "T": 21},
        "backward-tf32": {"precision": "medium", "K": 8, "T": 40, "D": 32, "E": 32},
        "backward-splits": {"T": 600, "lengths": (600, 20)},
        "backward-half-cancelling-halves": {
            "dtype": FP16, "T": 832, "lengths": (832,), "gradients": "context", "change": cancelling_halves,
        },
        "backward-half-many-launches": {
            "dtype": FP16, "K": 640, "T": 16, "B": 1, "lengths": (16,), "gradients": "context",
            "change": uneven_context_gradients,
        },
        "backward-frames-64": {"T": 64, "B": 1, "lengths": (64,)},
        "backward-frames-65": {"T": 65, "B": 1, "lengths": (65,)},
    },
)  # fmt: skip

TOPK = _cases(
    "beam_topk",
    check_topk,
    {
        "characters": {"B": 3, "K": 8, "V": 31},
        "one-beam": {"K": 1, "V": 31},
        "one-token": {"K": 1, "V": 1, "eos": 0},
        "primes": {"B": 3, "K": 5, "V": 37},
        "beam-3-of-2-tokens": {"K": 3, "V": 2, "eos": 1, "state": "first beam only"},
        "more-beams-than-candidates": {"K": 5, "V": 3, "state": "first beam only"},
        **{state.replace(" ", "-"): {"state": state, "K": 4, "V": 9} for state in STATES},
        **{f"vocabulary-{V}": {"V": V, "K": 3} for V in (32, 33, 257)},
        "vocabulary-1025": {"V": 1025, "K": 4, "B": 1},
        "long-rows": {"V": 2100, "K": 5},
        "long-rows-half": {"V": 1100, "K": 8, "dtype": FP16},
        "long-rows-spaced": {"V": 1100, "K": 8, "layout": "spaced", "B": 1},
        "long-rows-everything": {
            "V": 1030, "K": 5, "minimum": 3, "maximum": 5, "length_penalty": 0.6, "eos_threshold": 1.2,
            "coverage": True, "ngram": True,
        },
        "long-rows-n-gram": {"V": 1100, "K": 6, "B": 1, "ngram": True},
        **{
            f"long-rows-{state.replace(' ', '-')}": {"state": state, "K": 5, "V": 2049, "B": 1}
            for state in (
                "all finished", "first beam only", "all equal", "equal beams", "all impossible", "nan and inf rows",
            )
        },
        "half": {"dtype": FP16},
        "bf16": {"dtype": BF16},
        "minimum": {"minimum": 4, "V": 5},
        "minimum-of-each-utterance": {"minimum": 4, "state": "eos first", "V": 5},
        "maximum-of-each-utterance": {"maximum": 4, "state": "eos first", "V": 5},
        "maximum": {"maximum": 3, "V": 5},
        "minimum-and-maximum": {"B": 6, "K": 5, "minimum": 9, "maximum": 4, "V": 3},
        "threshold": {"eos_threshold": 1.5, "V": 5, "K": 5},
        "threshold-maximum": {"eos_threshold": 1.5, "V": 5, "maximum": 3},
        "length-penalty": {"length_penalty": 0.8, "K": 5, "V": 7, "B": 6},
        "length-penalty-all-finished": {"length_penalty": 1.0, "state": "all finished"},
        "coverage": {"coverage": True, "K": 5},
        "n-gram": {"ngram": True, "V": 7, "K": 5},
        "everything": {
            "B": 3, "K": 5, "V": 11, "minimum": 3, "maximum": 5, "length_penalty": 0.6, "eos_threshold": 1.2,
            "coverage": True, "ngram": True,
        },
        "ctc": {"ctc_weight": 0.3, "K": 5},
        "ctc-alone": {"ctc_weight": 1.0, "V": 7, "minimum": 4, "maximum": 5, "state": "one token each"},
        "ctc-and-everything": {
            "B": 3, "K": 5, "V": 11, "minimum": 3, "maximum": 5, "length_penalty": 0.6, "eos_threshold": 1.2,
            "coverage": True, "ngram": True, "ctc_weight": 0.4,
        },
        "ctc-nan-and-inf-rows": {"ctc_weight": 0.5, "V": 9, "state": "nan and inf rows"},
        "ctc-alone-all-impossible": {"ctc_weight": 1.0, "V": 5, "state": "all impossible"},
        "ctc-spaced": {"ctc_weight": 0.5, "V": 7, "layout": "spaced"},
        "long-rows-ctc": {"V": 1100, "K": 5, "B": 1, "ctc_weight": 0.3},
        "long-rows-ctc-nan-and-inf-rows": {"V": 1030, "K": 4, "B": 1, "ctc_weight": 1.0, "state": "nan and inf rows"},
        "beam-threshold": {"B": 4, "K": 8, "beam_threshold": 1.0},
        "beam-threshold-0": {"B": 4, "K": 8, "beam_threshold": 0.0},
        "beam-threshold-length-penalty": {"B": 6, "K": 8, "beam_threshold": 1.5, "length_penalty": 1.0},
        "beam-threshold-no-beams": {"K": 0, "beam_threshold": 1.0},
        **{
            f"beam-threshold-{state.replace(' ', '-')}": {"state": state, "K": 4, "V": 9, "beam_threshold": 0.0}
            for state in (
                "all finished", "first beam only", "all equal", "tied with finished", "all impossible",
                "nan and inf rows",
            )
        },
        "beam-threshold-and-everything": {
            "B": 6, "K": 7, "V": 11, "minimum": 3, "maximum": 5, "length_penalty": 0.6, "eos_threshold": 1.2,
            "coverage": True, "ngram": True, "ctc_weight": 0.4, "beam_threshold": 2.0,
        },
        "long-rows-beam-threshold": {"V": 1100, "K": 5, "beam_threshold": 0.5, "length_penalty": 0.6},
        "first-eos": {"eos": 0, "V": 6},
        "last-eos": {"eos": 5, "V": 6},
        "transposed": {"layout": "transposed", "V": 7},
        "spaced": {"layout": "spaced", "V": 7},
        "strided": {"layout": "strided", "V": 7},
        "no-utterances": {"B": 0},
        "no-beams": {"K": 0},
        "threshold-eos-near-the-top": {"eos_threshold": 1.5, "state": "eos near the top", "K": 8},
        "long-rows-threshold": {"V": 1100, "K": 8, "eos_threshold": 1.3, "state": "eos near the top"},
        "zero-lengths-length-penalty": {"state": "zero lengths", "length_penalty": 1.0, "K": 5, "V": 7, "B": 6},
        "long-rows-zero-lengths": {"state": "zero lengths", "length_penalty": 0.6, "K": 5, "V": 2100},
        "equal-means-length-penalty": {"state": "equal means", "length_penalty": 1.0, "V": 3, "K": 16, "B": 1},
        "negative-zero-length-penalty": {"state": "signed zeros", "length_penalty": 1.0, "V": 7},
    },
)  # fmt: skip

GATHER = _cases(
    "beam_gather",
    check_gather,
    {
        "one-state": {},
        "one-value": {"sizes": (1,), "B": 1, "K": 1},
        "primes": {"B": 3, "K": 5, "sizes": (37,)},
        "several-states-and-types": {"sizes": (7, 64, 130, 1), "dtypes": (FP32, FP16, torch.int64)},
        "only-empty-rows": {"sizes": (0,)},
        "bools-and-bytes": {"sizes": (9, 17), "dtypes": (torch.bool, torch.uint8)},
        "bf16": {"sizes": (33,), "dtypes": (BF16,)},
        "complex": {"sizes": (5, 3, 5), "dtypes": (torch.complex128, torch.complex64)},
        "long-rows": {"sizes": (1025, 1024), "B": 1, "K": 3},
        "empty-rows": {"sizes": (0, 3)},
        "no-state": {"sizes": ()},
        "no-utterances": {"B": 0},
        "transposed": {"layout": "transposed", "sizes": (6, 9)},
        "spaced": {"layout": "spaced", "sizes": (6, 9)},
        "strided": {"layout": "strided", "sizes": (6, 9)},
        "parents-out-of-range": {"parents": "out of range", "sizes": (5,), "K": 4},
    },
)

BACKTRACK = _cases(
    "beam_backtrack",
    check_backtrack,
    {
        "default": {},
        "one-step": {"L": 1, "B": 1, "K": 1},
        "no-steps": {"L": 0},
        "no-beams": {"K": 0},
        "no-utterances": {"B": 0},
        "primes": {"L": 13, "B": 7, "K": 5},
        "no-eos": {"eos": 5, "vocabulary": 5, "L": 9},
        "eos-first": {"eos": 0, "vocabulary": 1},
        "many-beams": {"L": 6, "B": 3, "K": 33},
        "many-utterances": {"L": 4, "B": 65, "K": 2},
        "long": {"L": 67, "B": 2, "K": 4, "vocabulary": 40},
        "transposed": {"layout": "transposed"},
        "spaced": {"layout": "spaced"},
        "strided": {"layout": "strided"},
        "parents-out-of-range": {"parents": "out of range", "L": 7},
    },
)

PREFIX = _cases(
    "ctc_prefix",
    check_ctc_prefix,
    {
        "default": {},
        "first-token": {"state": "first"},
        "one-frame": {"T": 1, "B": 1, "K": 1, "state": "first"},
        "one-frame-two-tokens": {"T": 1, "B": 1, "K": 1},
        "no-frames": {"T": 0},
        "no-utterances": {"B": 0},
        "primes": {"B": 3, "K": 5, "T": 37, "V": 11},
        "characters": {"K": 4, "T": 61, "V": 31},
        "repeated": {"state": "repeated", "K": 4, "T": 30},
        "repeated-across-blocks": {"state": "repeated", "K": 2, "T": 131, "V": 5, "B": 1},
        "length-zero": {"lengths": (0, 9)},
        "more-tokens-than-frames": {"state": "long", "T": 4},
        **{f"frames-{T}": {"T": T, "B": 1, "K": 2, "V": 5} for T in (127, 128, 129, 130, 257)},
        **{f"vocabulary-{V}": {"V": V, "K": 2} for V in (3, 32, 33, 65)},
        "last-eos": {"eos": 6},
        "late-speech": {"T": 160, "B": 1, "K": 2, "V": 5, "blank_frames": 129},
        "extreme-logits": {"scale": 100.0, "T": 20},
        "transposed": {"layout": "transposed"},
        "spaced": {"layout": "spaced"},
        "strided": {"layout": "strided"},
        "parents-and-tokens-out-of-range": {"out_of_range": True, "K": 4, "V": 5, "B": 3},
    },
)

UNROLL = _cases(
    "speller_unroll",
    check_unroll,
    {
        "one-cell": {},
        "smallest": {"V": 1, "M": 1, "H": (1,), "D": 1, "E": 1, "T": 1, "B": 1, "U": 1, "dropout": False, "seed": 1},
        "two-cells": {"H": (6, 5)},
        "three-cells": {"H": (3, 18, 5), "U": 4},
        "primes": {"V": 11, "M": 7, "H": (19, 5), "D": 13, "E": 17, "T": 23, "B": 5, "U": 5},
        "units-17": {"H": (17, 17), "U": 2},
        "utterances-17": {"H": (4, 3), "B": 17, "U": 2},
        "utterances-33": {"H": (4, 3), "B": 33, "U": 2, "V": 3},
        "no-dropout": {"H": (6, 5), "dropout": False},
        "no-sampling": {"H": (6, 5), "share": 0.0},
        "all-sampled": {"H": (6, 5), "share": 1.0, "U": 5},
        "equal-logits": {"share": 1.0, "equal": True, "V": 40},
        "negative-logits": {"share": 1.0, "shift": -30.0},
        "vocabulary-33": {"V": 33, "share": 1.0},
        "embedding-33": {"M": 33, "share": 1.0},
        "no-frames": {"T": 0},
        "all-lengths-zero": {"lengths": (0,), "H": (6, 5)},
        "lengths-out-of-range": {"lengths": (0, 9, 4), "out_of_range": True},
        "frames-65": {"T": 65, "lengths": (65, 64, 1), "B": 2, "U": 2},
        "no-gap-between-rows": {"H": (12,), "E": 20, "B": 2, "U": 2},
        "wide-context": {"E": 300, "T": 33, "lengths": (33, 28), "B": 2, "U": 2},
        "deep": {"H": (70, 5), "E": 3, "B": 2, "U": 2},
        "saturated": {"scale": 4.0, "share": 0.0, "U": 2, "tolerance": 1e-3},
        "loss-of-logits": {"H": (6, 5), "gradients": "logits"},
        "loss-of-attention": {"H": (6, 5), "gradients": "weights"},
        "no-utterances": {"B": 0},
        "bf16": {"dtype": BF16, "H": (20, 17), "E": 18, "D": 20, "M": 20, "share": 0.0},
        "bf16-one-cell": {"dtype": BF16, "H": (66,), "E": 10, "share": 0.0, "B": 2, "U": 2},
        "tf32": {"precision": "high", "H": (20, 17), "E": 18, "share": 0.0},
        "transposed": {"layout": "transposed", "H": (6, 5)},
        "spaced": {"layout": "spaced", "H": (6, 5)},
        "strided": {"layout": "strided", "H": (6, 5)},
        **{f"replayed-{U}": {"B": 2, "U": U, "replayed": True, "T": 4, "lengths": (4, 3)} for U in (18, 34)},
    },
) + _cases(
    "speller_unroll",
    check_repeat,
    {
        **{f"launches-of-{tokens}-tokens": {"tokens": tokens} for tokens in (1, 17, 18, 33, 34)},
        "launches-on-a-cpu": {"tokens": 34, "on": "cpu"},
        "launches-inside-a-capture": {"tokens": 34, "capturing": True},
        "a-launch-fails": {"tokens": 18, "fails": True},
    },
) + _cases(
    "speller_unroll",
    check_unroll_tokens,
    {
        "a-token-below-0": {"token": -1},
        "a-token-above-the-last": {"token": 3},
        "a-token-below-0-is-clamped": {"token": -(2**40), "waits": False},
        "a-token-above-the-last-is-clamped": {"token": 3, "waits": False},
    },
) + [
    Case("speller_unroll", "positions", check_positions),
    Case("speller_unroll", "tiles", check_tiles),
    Case("speller_unroll", "gelu", check_gelu),
]  # fmt: skip

ALIGNMENT = _cases(
    "ctc_loss",
    check_ctc_loss,
    {
        "short": {},
        "one-frame": {"T": 1, "B": 1, "S": 1},
        "one-utterance": {"B": 1},
        "primes": {"B": 5, "T": 23, "V": 11, "S": 7},
        "characters": {"T": 37, "V": 31, "S": 13, "B": 2},
        "equal-tokens": {"equal": True, "T": 11},
        "too-few-frames-for-equal-tokens": {"equal": True, "T": 6},
        "too-few-frames": {"T": 3},
        "no-frames": {"lengths": (0, 9)},
        "no-tokens": {"counts": (0,)},
        "no-columns-of-tokens": {"S": 0, "B": 2},
        **{f"tokens-{S}": {"S": S, "T": S + 5, "B": 1, "V": 5} for S in (31, 32, 63, 64)},
        "far-apart": {"scale": 30.0, "T": 12},
        "flat": {"scale": 0.0},
        "transposed": {"layout": "transposed"},
        "spaced": {"layout": "spaced"},
        "strided": {"layout": "strided"},
        "tokens-past-the-end-out-of-range": {"beyond_end": -(2**40)},
        "out-of-range": {"out_of_range": True, "V": 3, "B": 2},
        "frames-that-must-be-blank": {"forbidden": True, "T": 12, "S": 3},
        "hostile": {"scale": 1e4, "T": 12},
    },
) + [Case("ctc_loss", "impossible", check_impossible_transcript)]  # fmt: skip

NGRAM = _cases(
    "ngram_scores",
    check_ngram_scores,
    {
        "characters": {"B": 3, "K": 4},
        "first-tokens": {"followed": False},
        "one-hypothesis": {"B": 1, "K": 1},
        "one-state": {"order": 1, "V": 5},
        "two-states-deep": {"order": 2, "V": 4, "K": 5},
        "deep": {"order": 7, "V": 6, "K": 5},
        "every-arc": {"table": True, "order": 2},
        "every-arc-one-token": {"table": True, "V": 2, "order": 1, "followed": False},
        **{f"vocabulary-{V}": {"V": V, "order": 3, "K": 2} for V in (32, 33, 64, 65)},
        "vocabulary-1025": {"V": 1025, "order": 2, "K": 1, "B": 1},
        "strided": {"layout": "strided", "K": 2},
        "transposed": {"layout": "transposed", "K": 5},
        "out-of-range": {"out_of_range": True, "B": 3, "K": 4},
    },
)

CASES = ALIGNMENT + ATTENTION + TOPK + GATHER + PREFIX + NGRAM + BACKTRACK + UNROLL

HUGE = [
    Case("masked_attention", "huge", check_huge_attention, {"B": 2**17, "K": 2, "T": 300, "D": 64}, huge=True),
    Case("masked_attention", "huge-queries", check_huge_attention, {"B": 2**23, "K": 9, "T": 33, "D": 32}, huge=True),
    Case("masked_attention", "huge-transposed", check_huge_attention,
         {"B": 2**16, "K": 2, "T": 600, "D": 64, "layout": "transposed"}, huge=True),
    Case("beam_topk", "huge", check_huge_topk, {"B": 2**24, "K": 5, "V": 31}, huge=True),
    Case("beam_topk", "huge-long-rows", check_huge_topk, {"B": 2**18, "K": 5, "V": 2100}, huge=True),
    Case("beam_gather", "huge", check_huge_gather, {"B": 2**19, "K": 9, "N": 600}, huge=True),
    Case("ctc_prefix", "huge-frames", check_huge_ctc_prefix, {"B": 2**18, "K": 2, "T": 300, "V": 31}, huge=True),
    Case("ctc_prefix", "huge-states", check_huge_ctc_prefix, {"B": 2**15, "K": 128, "T": 600, "V": 40}, huge=True),
    Case("ctc_prefix", "huge-log-probs", check_huge_ctc_prefix, {"B": 2**16, "K": 9, "T": 3, "V": 5000}, huge=True),
    Case("ctc_prefix", "huge-utterance", check_huge_ctc_prefix, {"B": 1, "K": 2, "T": 300, "V": 2**23}, huge=True),
    Case("ngram_scores", "huge", check_huge_ngram_scores, {"B": 2**22, "K": 20, "V": 31}, huge=True),
    Case("speller_unroll", "huge", check_huge_unroll, {"B": 2**25, "U": 2, "T": 8, "step": 0}, huge=True),
    Case("speller_unroll", "huge-steps", check_huge_unroll, {"B": 64, "U": 2**20, "T": 80, "step": 2**20 - 2},
         huge=True),
    Case("ctc_loss", "huge", check_huge_ctc_loss, {"B": 2**15, "T": 160, "V": 31, "S": 250}, huge=True),
    Case("ctc_loss", "huge-logits", check_huge_ctc_loss, {"B": 2**14, "T": 30, "V": 5120, "S": 3}, huge=True),
    Case("ctc_loss", "huge-tokens", check_huge_ctc_loss, {"B": 2**20, "T": 1, "V": 3, "S": 2100}, huge=True),
    Case("beam_backtrack", "huge", check_huge_backtrack, {"L": 20, "B": 2**27, "K": 3}, huge=True),
]  # fmt: skip
