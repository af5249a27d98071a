"""Small hostile cases of every op: claims that its Triton launcher must meet wherever the kernels run.

The same cases run interpreted, sanitized, as executed PTX, against mutants, and on a GPU where there is one. They call
the launchers in las_fast.kernels directly.
"""

import collections
import contextlib
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import torch

from gpu_proof.interpreter import poison
from las_fast.ops import (
    CtcState,
    SpellerWeights,
    beam_backtrack,
    beam_gather,
    ctc_log_probabilities,
    ctc_prefix,
    ctc_start,
    masked_attention,
)
from las_fast.ops.speller_unroll import _reference as unroll_by_steps

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
INF = torch.inf
ROUNDINGS = 1  # roundings of the largest result that an error may exceed that of the plain formula by


@dataclass(frozen=True)
class Case:
    """One claim; can be pickled for a worker process."""

    op: str
    name: str
    check: Callable  # (device, **options): makes inputs from a seed, launches, asserts
    options: dict = field(default_factory=dict)
    huge: bool = False  # larger than memory: only the bounds of its last program are checked

    def run(self, device="cpu", approximate=False):
        """Raise AssertionError unless the launcher gives on this device what the reference gives in float64.

        approximate: exponentials and logarithms are off by as much as a GPU's may be, so errors may be larger.
        """
        with mock.patch(f"{__name__}.ROUNDINGS", 4 if approximate else 1):
            self.check(torch.device(device), **self.options)

    @property
    def interpretable(self):
        """Whether Triton's interpreter can judge it: the interpreter computes bfloat16 wrongly."""
        return self.options.get("dtype") != BRAIN

    @property
    def executable(self):
        """The architectures whose machine code the executor can run for this case.

        It does not model wgmma and tcgen05, which sm_90 and sm_100 use for matmuls of 64 rows, except in exact float32.
        """
        of = self.options
        exact = of.get("dtype", FLOAT) == FLOAT and of.get("precision", "highest") == "highest"
        return (80,) if self.op == "masked_attention" and of.get("K", 0) > 32 and not exact else (80, 90, 100)

    def __str__(self):
        return f"{self.op}-{self.name}"


def launcher(op, function=None):
    """Return the launcher of an op, looked up at each call: a mutant may have replaced its module."""
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


def laid_out(tensor, layout):
    """Copy a tensor to another memory layout, with poison in the gaps.

    Args:
        layout: "dense"; "turned", the first two dimensions exchanged in memory; "spaced", an odd number of elements
            between rows; "strided", every other element of a row.
    """
    if layout == "dense":
        return tensor
    if layout == "turned":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    n = tensor.shape[-1]
    wide = poison(tensor.new_empty(*tensor.shape[:-1], 2 * n + 1))
    view = wide[..., :n] if layout == "spaced" else wide[..., : 2 * n : 2]
    view.copy_(tensor)
    return view


def same(found, expected, what):
    """Assert equality of every byte, and of shape and type; bools must be 0 or 1."""
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    assert found.dtype == expected.dtype, f"{what}: {found.dtype}, not {expected.dtype}"
    found, expected = found.cpu().contiguous(), expected.cpu().contiguous()
    if found.dtype == torch.bool:
        found, expected = found.view(torch.uint8), expected.view(torch.uint8)
    wrong = (found != expected).nonzero()
    assert not len(wrong), (
        f"{what}: {len(wrong)} of {found.numel()} differ, first at {wrong[0].tolist()}: "
        f"{found[tuple(wrong[0])]}, not {expected[tuple(wrong[0])]}"
    )


def near(found, exact, tolerance, what):
    """Assert that every element is within the tolerance of the exact one; infinities must be equal."""
    assert found.shape == exact.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(exact.shape)}"
    found, exact = found.cpu().double(), exact.cpu().double()
    error = torch.where(found == exact, 0.0, (found - exact).abs())
    worst = float(error.nan_to_num(INF, INF).max()) if error.numel() else 0.0
    assert worst <= tolerance, f"{what}: off by {worst:.3g}, more than {tolerance:.3g}"


def largest(tensor):
    """The largest absolute value; 0 of an empty tensor."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


# masked_attention


def attention_inputs(B, K, T, D, E, lengths, dtype, seed, scores="random"):
    """Query, keys, values and lengths, finite everywhere; scores may also be all "equal" or all "negative"."""
    generator = torch.Generator().manual_seed(seed)
    query, keys, values = (torch.randn(s, generator=generator) for s in ((B, K, D), (B, T, D), (B, T, E)))
    if scores == "equal":  # of small integers, so that scores are exact in whatever order they are summed
        query, keys = query.round(), keys[:, :1].round().expand(B, T, D).contiguous()
    if scores == "negative":
        query, keys = query.abs(), -keys.abs()
    lengths = torch.tensor([max(0, min(T, lengths[b % len(lengths)])) for b in range(B)], dtype=torch.int64)
    return query.to(dtype), keys.to(dtype), values.to(dtype), lengths


def beyond(lengths, T):
    """Replace lengths T by more than T and 0 by a negative number: the kernels must clamp both."""
    return torch.where(lengths == T, lengths + 70, torch.where(lengths == 0, -70, lengths))


def with_poisoned_padding(memory, lengths):
    """Copy keys or values with NaN past each length: padding must never be read."""
    memory = memory.clone()
    for row, length in zip(memory, lengths.tolist(), strict=True):
        row[length:] = torch.nan
    return memory


def plain(query, keys, values, lengths, scale, precision):
    """Compute context and weights by the plain formula in the precision of the inputs: the yardstick for errors."""
    tf32 = through_tf32 if query.dtype == FLOAT and precision != "highest" else lambda x: x
    past = (torch.arange(keys.shape[1]) >= lengths[:, None])[:, None]
    scores = (tf32(query) @ tf32(keys).transpose(1, 2)) * scale
    weights = scores.masked_fill(past, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(past, 0.0)
    return tf32(weights) @ tf32(values), weights


def through_tf32(x):
    """Round float32 to the 11 bits that tf32 units keep; the gradient passes through."""
    rounded = ((x.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(FLOAT)
    return x + (rounded - x).detach()


def as_good_as_plain(found, exact, usual, unit, what):
    """Assert that the error is at most twice that of the plain formula, and ROUNDINGS of the largest result.

    That is for the root of the mean square; a single number may be luckier in one formula than in the other, and gets
    four times.
    """
    assert found.shape == exact.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(exact.shape)}"
    if not found.numel():
        return
    errors = [(x.detach().cpu().double() - exact).abs() for x in (found, usual)]
    rounding = ROUNDINGS * unit * largest(exact)
    for name, factor, measure in (("rms", 2, lambda x: x.square().mean().sqrt()), ("largest", 4, torch.max)):
        error, usual_error = (float(measure(x)) for x in errors)
        allowed = factor * usual_error + rounding
        assert error <= allowed, f"{what}: {name} error {error:.3g}, allowed {allowed:.3g}"


def rounding(dtype, precision):
    """Return the relative rounding of a product in this dtype; precisions below "highest" use tf32 for float32."""
    return 2.0**-11 if dtype == FLOAT and precision != "highest" else torch.finfo(dtype).eps


def attends(
    device, B=2, K=3, T=17, D=16, E=16, lengths=(10**9, 5, 1), dtype=FLOAT, weights=True, scale=None, layout="dense",
    precision="highest", scores="random", wild=False, seed=0,
):  # fmt: skip
    """Context, weights and peaks are those of the reference, and nothing past a length is read.

    wild: the launcher is given lengths above T and below 0.
    """
    query, keys, values, lengths = attention_inputs(B, K, T, D, E, lengths, dtype, seed, scores)
    scale = D**-0.5 if scale is None else scale
    exact_context, exact_weights, peaks = masked_attention(
        query.double(), keys.double(), values.double(), lengths, scale=scale, peaks=True, backend="reference"
    )
    given = (query, keys, values, lengths, scale, weights, layout, precision)
    found = launch_attention(device, *given, wild=wild)
    context, found_weights, found_peaks, logsumexp = found
    unit = rounding(dtype, precision)
    usual, usual_weights = plain(query, keys, values, lengths, scale, precision)
    assert context.dtype == dtype
    as_good_as_plain(context, exact_context, usual, unit, "context")
    if weights:
        assert found_weights.dtype == FLOAT
        past = (torch.arange(T) >= lengths[:, None])[:, None].expand(B, K, T)
        assert (found_weights.cpu()[past] == 0).all(), "weights past the length"
        as_good_as_plain(found_weights, exact_weights, usual_weights, unit, "weights")
    else:
        assert found_weights.numel() == 0
    same(found_peaks, peaks, "peaks")
    assert not logsumexp.isnan().any(), "logsumexp is NaN"


def launch_attention(device, query, keys, values, lengths, scale, weights, layout, precision, wild=False):
    tensors = [query, with_poisoned_padding(keys, lengths), with_poisoned_padding(values, lengths)]
    tensors = [laid_out(x.to(device), layout) for x in tensors]
    lengths = beyond(lengths, keys.shape[1]) if wild else lengths
    with matmul_precision(precision):
        return launcher("masked_attention")(*tensors, lengths.to(device), scale, weights)


def differentiates(
    device, B=2, K=3, T=17, D=16, E=16, lengths=(10**9, 5, 1), dtype=FLOAT, gradients="both", memory=True,
    layout="dense", precision="highest", wild=False, change=None, seed=0,
):  # fmt: skip
    """The gradients are those of the reference, exactly 0 past a length; `gradients` says of which outputs.

    wild: the launcher is given lengths above T and below 0. change: changes query, keys, values and the gradients given
    of context and weights, in place.
    """
    inputs = attention_inputs(B, K, T, D, E, lengths, dtype, seed)
    query, keys, values, lengths = inputs
    scale = D**-0.5
    generator = torch.Generator().manual_seed(seed + 1)
    given = [torch.randn(s, generator=generator) for s in ((B, K, E), (B, K, T))]
    given = [given[0].to(dtype) if gradients != "weights" else None, given[1] if gradients != "context" else None]
    if change:
        change(query, keys, values, *given)

    context, weights, _, logsumexp = launch_attention(
        device, query, keys, values, lengths, scale, gradients != "context", layout, precision, wild
    )
    tensors = [query, with_poisoned_padding(keys, lengths), with_poisoned_padding(values, lengths)]
    tensors = [laid_out(x.to(device), layout) for x in tensors]
    there = [None if x is None else laid_out(x.to(device), layout) for x in given]
    with matmul_precision(precision):
        found = launcher("masked_attention", "masked_attention_backward")(
            *there, *tensors, (beyond(lengths, T) if wild else lengths).to(device), context, weights, logsumexp, scale,
            memory,
        )  # fmt: skip
    exact = plain_gradients([x.double() for x in inputs[:3]], lengths, scale, precision, given)
    usual = plain_gradients(inputs[:3], lengths, scale, precision, given)
    for name, x, y, z in zip(("query", "keys", "values"), found, exact, usual, strict=True):
        if not memory and name != "query":
            continue
        as_good_as_plain(x, y, z, rounding(dtype, precision), f"gradient of {name}")
        if name != "query":
            past = torch.arange(T) >= lengths[:, None]
            assert (x.cpu()[past] == 0).all(), f"gradient of {name} past the length"


def opposed(query, keys, values, context_gradient, weights_gradient):
    """What the first half of the frames adds to the query's gradient, the second half nearly takes away.

    All frames are about equally attended to, and their keys are 0 on average: then delta, which comes from a rounded
    context, does not count.
    """
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0]).to(keys).repeat_interleave(keys.shape[1] // 4)[:, None]
    turn = torch.tensor([1.0, -1.0, -1.0, 1.0]).to(keys).repeat_interleave(keys.shape[1] // 4)[:, None]
    query -= query.mean(-1, keepdim=True)
    keys[:], values[:] = sign + 0.05 * keys, turn + 0.05 * values


def much_and_little(query, keys, values, context_gradient, weights_gradient):
    """All queries attend to all frames alike; the values' gradient gets 2048 from the first 64, 1 from each next 64."""
    query[:] = 0.0
    context_gradient[:], context_gradient[:, :64] = values.shape[1] / 64, 32.0 * values.shape[1]


def plain_gradients(tensors, lengths, scale, precision, given):
    """Gradients of query, keys and values by autograd through the plain formula, in the tensors' own precision."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = plain(*leaves, lengths, scale, precision)
    chosen = [(x, g.to(x)) for x, g in zip(outputs, given, strict=True) if g is not None]
    outputs, upstream = zip(*chosen, strict=True)
    return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, materialize_grads=True)


def stands_alone(device, B=4, K=3, T=1000, lengths=(1000, 500, 300, 1), dtype=FLOAT, weights=True, seed=0):
    """An utterance has the same context, weights and peaks, bit for bit, alone and unpadded as in a batch."""
    query, keys, values, lengths = attention_inputs(B, K, T, 16, 24, lengths, dtype, seed)
    together = launch_attention(device, query, keys, values, lengths, 0.25, weights, "dense", "highest")
    for b, n in enumerate(lengths.tolist()):
        rows = slice(b, b + 1)
        alone = launch_attention(
            device, query[rows], keys[rows, :n], values[rows, :n], lengths[rows], 0.25, weights, "dense", "highest"
        )
        for name, ours, theirs in zip(("context", "weights", "peaks", "logsumexp"), alone, together, strict=True):
            if name != "weights" or weights:
                same(ours, theirs[rows, :, :n] if name == "weights" else theirs[rows], f"{name} of utterance {b}")


# beam_topk


def search_state(B, K, V, seed):
    """Logits, scores, finished beams and lengths of a search under way."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, K, V, generator=generator)
    scores = -3 * torch.rand(B, K, generator=generator)
    finished = torch.rand(B, K, generator=generator) < 0.25
    lengths = torch.randint(1, 6, (B, K), generator=generator)
    return logits, scores, finished, lengths, generator


def continues(
    device, B=2, K=4, V=31, eos=2, dtype=FLOAT, state="random", minimum=None, maximum=None, length_penalty=0.0,
    eos_threshold=0.0, coverage=False, order=None, ctc_weight=None, layout="dense", wild=False, seed=0,
):  # fmt: skip
    """All results are those of the reference, indices exactly; `state` names the state of the beams.

    Every second utterance has limits that are higher by 1. wild: some n-gram states are outside the table.
    """
    logits, scores, finished, lengths, generator = search_state(B, K, V, seed)
    STATES[state](logits, scores, finished, lengths)
    logits = logits.to(dtype)
    bounds = [None if x is None else x + torch.arange(B) % 2 for x in (minimum, maximum)]
    coverage = torch.randn(B, K, generator=generator) if coverage else None
    table = states = None
    if order is not None:
        table = torch.randn(V ** (order - 1), V, generator=generator).log_softmax(-1)
        low, high = (-3, len(table) + 3) if wild else (0, len(table))
        states = torch.randint(low, high, (B, K), generator=generator)
    if wild:
        states[0, 0], states[-1, -1] = -(2**40), 2**40
    nearest = None if states is None else states.clamp(0, len(table) - 1)
    options = (eos, *bounds, length_penalty, eos_threshold, coverage, table, nearest, 0.3 if order else 0.0)
    gains = None
    if ctc_weight is not None:
        gains = torch.randn(B, K, V, generator=generator).log_softmax(-1)
        gains = laid_out(gains.masked_fill(torch.rand(B, K, V, generator=generator) < 0.1, -INF), layout)
    options += (gains, ctc_weight or 0.0)
    expected = importlib.import_module("las_fast.ops.beam_topk")._reference(logits, scores, finished, lengths, *options)
    options = (*options[:7], states, *options[8:])

    tensors = [laid_out(x.to(device), layout) for x in (logits, scores, finished, lengths)]
    found = launcher("beam_topk")(*tensors, *(x.to(device) if isinstance(x, torch.Tensor) else x for x in options))
    near(found[0], expected[0], 2e-5, "scores")
    names = ("scores", "tokens", "parents", "finished", "lengths", "states")
    assert order or found[5].shape == (0, 0)
    for name, x, y in list(zip(names, found, expected, strict=True))[1 : 6 if order else 5]:
        same(x, y, name)


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


def _equal_to_finished(logits, scores, finished, lengths):
    """An open beam whose only token leads to the score of a finished one."""
    logits[:], scores[:], finished[:] = -INF, -1.0, False
    logits[..., -1] = 0.0
    finished[:, 1::2] = True


def _hopeless(logits, scores, finished, lengths):
    logits[:], scores[:] = -INF, -INF


def _one_token_each(logits, scores, finished, lengths):
    finished[:] = False
    logits[:] = -INF
    logits[..., 3] = 1.0


def _broken_rows(logits, scores, finished, lengths):
    finished[:] = False
    logits[:, 0, 1], logits[:, 1, 2], logits[:, 2] = torch.nan, INF, -INF


def _extreme(logits, scores, finished, lengths):
    logits.mul_(1e4)
    scores.mul_(1e4)


def _eos_near_the_top(logits, scores, finished, lengths):
    """Token 2 is less probable than the best other one by 0 to 3."""
    finished[:] = False
    B, K, _ = logits.shape
    logits[..., 2] = logits.amax(-1) - torch.linspace(0.0, 3.0, B * K).view(B, K)


def _nothing_yet(logits, scores, finished, lengths):
    lengths[:] = 0


def _zeros_of_either_sign(logits, scores, finished, lengths):
    """Two ended beams whose ranks, for a length penalty of 1, are -0 and 0."""
    finished[:], scores[:], lengths[:] = True, -9.0, 2
    scores[:, 1], scores[:, 2] = -1e-45, 0.0


STATES = {
    "random": lambda *_: None,
    "all finished": _all_finished,
    "first beam only": _first_beam_only,
    "all equal": _all_equal,
    "equal beams": _equal_beams,
    "equal to finished": _equal_to_finished,
    "hopeless": _hopeless,
    "one token each": _one_token_each,
    "broken rows": _broken_rows,
    "extreme": _extreme,
    "eos near the top": _eos_near_the_top,
    "nothing yet": _nothing_yet,
    "zeros of either sign": _zeros_of_either_sign,
}


# beam_gather and beam_backtrack


def gathers(device, B=2, K=4, sizes=(5,), dtypes=(FLOAT,), layout="dense", parents="random", seed=0):
    """The rows of each state are reordered, byte for byte; a parent out of range is clamped."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-3, K + 3) if parents == "wild" else (0, max(K, 1))
    chosen = torch.randint(low, high, (B, K), generator=generator)
    if parents == "wild" and chosen.numel():
        chosen[0, 0], chosen[-1, -1] = -(2**40), 2**40
    states = [
        (100 * torch.randn(B, K, n, generator=generator)).to(dtype)
        for n, dtype in zip(sizes, itertools.cycle(dtypes), strict=False)
    ]
    expected = beam_gather(states, chosen.clamp(0, max(K - 1, 0)), backend="reference")
    *given, chosen = (laid_out(x.to(device), layout) for x in (*states, chosen))
    found = launcher("beam_gather")(given, chosen)
    assert len(found) == len(expected)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        same(x, y, f"state {i}")


def backtracks(device, L=5, B=2, K=3, eos=2, vocabulary=6, layout="dense", parents="random", seed=0):
    """Tokens, lengths, log-probabilities and frames of each hypothesis are those of the reference."""
    generator = torch.Generator().manual_seed(seed)
    tokens, attended_frames = (torch.randint(0, n, (L, B, K), generator=generator) for n in (vocabulary, 1000))
    low, high = (-2, K + 2) if parents == "wild" else (0, max(K, 1))
    chosen = torch.randint(low, high, (L, B, K), generator=generator)
    scores = -torch.rand(L, B, K, generator=generator).cumsum(0)
    if L > 2 and K > 1:
        scores[-2:, :, -1] = -INF
    nearest = chosen.clamp(0, max(K - 1, 0))
    expected = beam_backtrack(tokens, nearest, scores, attended_frames, eos=eos, backend="reference")
    tensors = [laid_out(x.to(device), layout) for x in (tokens, chosen, scores, attended_frames)]
    found = launcher("beam_backtrack")(*tensors, eos)
    for name, x, y in zip(expected._fields, found, expected, strict=True):
        if name == "token_scores":
            near(x, y, 1e-6, name)
        else:
            same(x, y, name)


# ctc_prefix


def listens(
    device, B=2, K=3, T=9, V=7, eos=2, lengths=(10**9, 4), state="random", layout="dense", scale=2.0, quiet=0,
    wild=False, seed=0,
):  # fmt: skip
    """The state after a step is that of the reference in float64.

    `state` names how the tokens were chosen; the first `quiet` frames are almost certainly blank.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([min(T, lengths[b % len(lengths)]) for b in range(B)], dtype=torch.int64)
    logits = scale * torch.randn(B, T, V, generator=generator)
    logits[:, :quiet, 0] += 12.0
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
    if wild:
        parents, chosen = (torch.where(x == 0, -(2**40), torch.where(x == n - 1, 2**40, x))
                           for x, n in ((parents, K), (chosen, V)))  # fmt: skip
    tensors = [laid_out(x.to(device), layout) for x in (log_probs, *before, tokens, parents, chosen)]
    found = launcher("ctc_prefix")(*tensors, eos)
    for name, x, y in zip(CtcState._fields, found, expected, strict=True):
        assert x.dtype == FLOAT
        near(x, y, ROUNDINGS * (1e-5 + 1e-6 * largest(y[y.isfinite()])), name)


# Larger than memory: tensors on the meta device, of more elements than 32 bits can count


def huge(*shape, dtype=FLOAT):
    return torch.empty(shape, dtype=dtype, device="meta")


def attends_to_huge(device, B, K, T, D, layout="dense"):
    """No index of the forward or the backward pass overflows."""
    query, lengths = huge(B, K, D, dtype=HALF), torch.full((B,), T)
    keys = huge(T, B, D, dtype=HALF).transpose(0, 1) if layout == "turned" else huge(B, T, D, dtype=HALF)
    results = launcher("masked_attention")(query, keys, keys, lengths, 1.0, True)
    context, weights, _, logsumexp = results
    launcher("masked_attention", "masked_attention_backward")(
        context, weights, query, keys, keys, lengths, context, weights, logsumexp, 1.0, True
    )


def continues_huge(device, B, K, V):
    """No index overflows, of characters with a 2-gram model or of word pieces."""
    rows = huge(B, K)
    lengths = rows.to(torch.int64)
    ngram_table, ngram_states = (huge(V, V), lengths) if V < 100 else (None, None)
    options = (2, None, None, 0.0, 0.0, rows, ngram_table, ngram_states, 0.3, huge(B, K, V), 0.3)
    # the last kernel reads what the others wrote, and there is no memory for that
    unmerged = collections.defaultdict(lambda: lambda *_, **__: None)
    with mock.patch.object(importlib.import_module("las_fast.kernels.beam_topk"), "merge_kernel", unmerged):
        launcher("beam_topk")(huge(B, K, V, dtype=HALF), rows, rows.bool(), lengths, *options)


def gathers_huge(device, B, K, N):
    """No index overflows."""
    launcher("beam_gather")([huge(B, K, N), huge(B, K, N, dtype=HALF)], huge(B, K, dtype=torch.int64))


def listens_huge(device, B, K, T, V):
    """No index overflows."""
    rows = huge(B, K, dtype=torch.int64)
    launcher("ctc_prefix")(huge(B, T, V), huge(B, K, T + 1), huge(B, K), huge(B, K, V), rows, rows, rows, 2)


def backtracks_huge(device, L, B, K):
    """No index overflows."""
    tokens = huge(L, B, K, dtype=torch.int64)
    launcher("beam_backtrack")(tokens, tokens, huge(L, B, K), tokens, 2)


# speller_unroll

RESULTS = ("logits", "weights")


def unroll_inputs(V, M, H, D, E, T, B, U, lengths, dropout, share, scale, seed):
    """Weights in flat order, keys, values, lengths, tokens, sampled and masks; a share of the tokens is sampled."""
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


def unrolls(
    device, V=7, M=5, H=(6,), D=4, E=3, T=9, B=3, U=3, lengths=(10**9, 5, 1), dtype=FLOAT, dropout=True, share=0.4,
    scale=1.0, gradients="both", layout="dense", precision="highest", wild=False, equal=False, shift=0.0,
    tolerance=None, replayed=False, seed=0,
):  # fmt: skip
    """Logits, attention, tokens read and all gradients are those of the reference, alone and at every step.

    share: of tokens sampled; 0 passes an empty `sampled`. gradients: which results have one. equal: all logits are
    equal, so that the first token is the best. shift: of all logits. wild: the launcher is given lengths above T and
    below 0. tolerance: of the largest result, where saturated gates make errors a matter of luck. replayed: chunks of
    tokens are replayed as a CUDA graph would.
    """
    inputs = unroll_inputs(V, M, H, D, E, T, B, U, lengths, dropout, share, scale, seed)
    if equal:
        inputs[0][0].zero_(), inputs[0][5].zero_()
    inputs[0][5].add_(shift)
    weights, keys, values, lengths, tokens, sampled, masks = inputs
    sampled_there = laid_out(sampled if share else sampled[:0], layout).to(device)
    there = [
        [laid_out(x.to(device), layout) if x.ndim > 1 else x.to(device) for x in weights],
        *(laid_out(x.to(device), layout) for x in (keys, values)),
        (beyond(lengths, T) if wild else lengths).to(device),
        laid_out(tokens.to(device), layout),
        sampled_there,
        [laid_out(x.to(device), layout) for x in masks],
    ]
    generator = torch.Generator().manual_seed(seed + 1)
    upstream = [torch.randn(shape, generator=generator) for shape in ((B, U, V), (B, U, T))]
    upstream = [x if gradients in ("both", name) else None for x, name in zip(upstream, RESULTS, strict=True)]
    with matmul_precision(precision), replays() if replayed and device.type == "cpu" else contextlib.nullcontext():
        logits, attention, read, *saved = launcher("speller_unroll")(*there, dtype == BRAIN, True)
        found = launcher("speller_unroll", "speller_unroll_backward")(
            *(None if x is None else laid_out(x.to(device), layout) for x in upstream), *there[:4], there[6],
            attention, read, *saved, dtype == BRAIN,
        )  # fmt: skip
    assert ((read >= 0) & (read < V)).all(), "a token that does not exist is read"
    exact = unrolled(inputs, read.t().cpu(), upstream, torch.float64)
    with tf32_layers() if precision != "highest" else contextlib.nullcontext():
        usual = unrolled(inputs, read.t().cpu(), upstream, dtype)
    best = torch.cat((tokens[:, :1], exact[0][:, :-1].argmax(-1)), 1)
    first = torch.arange(U) == 0
    same(read.t(), torch.where(sampled & ~first, best, tokens), "tokens read")
    past = (torch.arange(T) >= lengths[:, None])[:, None].expand(B, U, T)
    assert (attention.cpu()[past] == 0).all(), "attention past the length"
    unit = rounding(dtype, precision)
    names = ["logits", "attention", *(f"gradient of weight {i}" for i in range(len(weights))), "keys", "values"]
    for name, x, y, z in zip(names, [logits, attention, *found[0], *found[1:]], exact, usual, strict=True):
        assert x.dtype == FLOAT
        if tolerance:
            near(x, y, tolerance * largest(y), name)
        else:
            as_good_as_plain(x, y, z, unit, name)


class Replayed:
    """Stands in for a CUDA graph: launches a chunk again at each replay."""

    def __init__(self, launch):
        self.launch = launch

    def replay(self):
        for i in range(1, 17):
            self.launch(i)


def replays():
    """Inside, speller_unroll replays chunks of tokens, also on a CPU."""
    module = importlib.import_module("las_fast.kernels.speller_unroll")
    return mock.patch.multiple(module, _captures=lambda tokens, _: tokens > 17, _capture=Replayed)


def tf32_layers():
    """Inside, linear layers round their operands to tf32."""
    linear = torch.nn.functional.linear
    return mock.patch.object(
        torch.nn.functional, "linear", lambda x, weight, bias: linear(through_tf32(x), through_tf32(weight), bias)
    )


def unrolled(inputs, read, upstream, dtype):
    """Logits, attention and gradients of the reference in that type, when these tokens are read."""
    weights, keys, values, lengths, _, sampled, masks = inputs
    leaves = [x.to(dtype).detach().requires_grad_() for x in (*weights, keys, values)]
    flat = leaves[:-2]
    masks = [x.to(dtype) for x in masks] or None
    spelled = SpellerWeights(*flat[:6], tuple(flat[6::2]), tuple(flat[7::2]))
    results = unroll_by_steps(spelled, *leaves[-2:], lengths, read, sampled & False, masks)
    chosen = [(x, g.to(x)) for x, g in zip(results, upstream, strict=True) if g is not None]
    outputs, upstream = zip(*chosen, strict=True)
    found = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, materialize_grads=True)
    return *(x.detach() for x in results), *found


def unrolls_huge(device, B, U, T, step, H=(8, 9)):
    """No index of that step overflows."""
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
    attends,
    {
        "no-frames": {"T": 0},
        "one-frame": {"T": 1, "B": 1, "K": 1, "D": 1, "E": 1},
        "primes": {"B": 3, "K": 5, "T": 37, "D": 13, "E": 7},
        "length-zero": {"lengths": (0, 17, 3)},
        "all-lengths-zero": {"lengths": (0,)},
        "half": {"dtype": HALF, "T": 70, "D": 32, "E": 48},
        "half-beam-8": {"dtype": HALF, "K": 8, "T": 65, "D": 64, "E": 64, "lengths": (65, 64)},
        "brain": {"dtype": BRAIN, "K": 8, "T": 65, "D": 64, "E": 64, "lengths": (65, 33)},
        "tf32": {"precision": "medium", "K": 8, "T": 40, "D": 32, "E": 32},
        "tf32-by-the-other-name": {"precision": "high", "K": 8, "T": 40, "D": 32, "E": 32},
        "one-query": {"K": 1, "T": 67, "D": 20, "E": 24},
        "one-query-half": {"K": 1, "T": 67, "D": 32, "E": 32, "dtype": HALF},
        "beam-16": {"K": 16, "T": 19},
        "beam-17": {"K": 17, "T": 19},
        "beam-67": {"K": 67, "T": 19, "B": 1},
        "beam-64-half": {"K": 64, "T": 40, "D": 32, "E": 32, "dtype": HALF},
        "beam-32-half": {"K": 32, "T": 40, "D": 32, "E": 32, "dtype": HALF},
        "beam-64": {"K": 64, "T": 33},
        "frames-8192": {"T": 8192, "B": 1, "K": 2, "lengths": (8191,), "weights": False, "dtype": HALF},
        "no-weights": {"weights": False},
        "no-weights-half": {"weights": False, "dtype": HALF, "T": 33},
        "scale": {"scale": 1.7},
        "equal-scores-peak-at-the-first": {"scores": "equal", "T": 40},
        "sharp": {"scale": 30.0, "T": 40},
        "turned": {"layout": "turned", "T": 21, "K": 4},
        "spaced": {"layout": "spaced"},
        "strided": {"layout": "strided"},
        "many-utterances": {"B": 9, "K": 2, "T": 6, "lengths": (6, 0, 1, 5, 2)},
        "lengths-beyond": {"lengths": (17, 0, 5), "B": 3, "wild": True},
        "lengths-beyond-no-weights": {"lengths": (17, 0), "wild": True, "weights": False},
        "splits-lengths-beyond": {"T": 900, "lengths": (900, 0), "wild": True},
        "splits": {"T": 600, "lengths": (600, 301)},
        "splits-some-of-them-empty": {"T": 1300, "K": 2, "lengths": (250, 0)},
        "splits-no-weights": {"T": 520, "lengths": (519, 257), "weights": False, "dtype": HALF},
        "splits-equal-scores": {"T": 600, "B": 1, "scores": "equal"},
        "three-splits-negative-scores": {"T": 1000, "B": 1, "scores": "negative", "weights": False},
        **{f"frames-{T}": {"T": T, "B": 1, "K": 2, "lengths": (T,)} for T in (15, 16, 31, 32, 63, 64, 127, 128, 129)},
        **{f"frames-{T}-half": {"T": T, "B": 1, "K": 8, "lengths": (T,), "dtype": HALF} for T in (31, 33, 128, 129)},
        **{f"sizes-{D}-{E}": {"D": D, "E": E, "B": 1} for D, E in ((17, 15), (64, 33), (130, 100))},
    },
) + _cases(
    "masked_attention",
    stands_alone,
    {
        "alone-and-in-a-batch": {},
        "alone-and-in-a-batch-half": {"dtype": HALF, "K": 8, "weights": False},
    },
) + _cases(
    "masked_attention",
    differentiates,
    {
        "backward": {"K": 5, "T": 37, "D": 13, "E": 7},
        "backward-of-context": {"gradients": "context", "T": 33},
        "backward-of-weights": {"gradients": "weights", "T": 33},
        "backward-of-query-only": {"memory": False, "T": 33},
        "backward-no-frames": {"T": 0},
        "backward-length-zero": {"lengths": (0, 17)},
        "backward-lengths-beyond": {"lengths": (17, 0, 5), "B": 3, "wild": True},
        "backward-splits-lengths-beyond": {"T": 600, "lengths": (600, 0), "wild": True},
        "backward-one-query": {"K": 1, "T": 40},
        "backward-many-queries": {"K": 37, "T": 20},
        "backward-half": {"dtype": HALF, "K": 8, "T": 65, "D": 32, "E": 32},
        "backward-brain": {"dtype": BRAIN, "K": 8, "T": 65, "D": 32, "E": 32},
        "backward-turned": {"layout": "turned", "T": 21, "K": 4},
        "backward-strided": {"layout": "strided", "T": 21},
        "backward-tf32": {"precision": "medium", "K": 8, "T": 40, "D": 32, "E": 32},
        "backward-splits": {"T": 600, "lengths": (600, 20)},
        "backward-half-ranges-that-nearly-cancel": {
            "dtype": HALF, "T": 832, "lengths": (832,), "gradients": "context", "change": opposed,
        },
        "backward-half-many-launches": {
            "dtype": HALF, "K": 640, "T": 16, "B": 1, "lengths": (16,), "gradients": "context",
            "change": much_and_little,
        },
        "backward-frames-64": {"T": 64, "B": 1, "lengths": (64,)},
        "backward-frames-65": {"T": 65, "B": 1, "lengths": (65,)},
    },
)  # fmt: skip

TOPK = _cases(
    "beam_topk",
    continues,
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
        "long-rows-half": {"V": 1100, "K": 8, "dtype": HALF},
        "long-rows-spaced": {"V": 1100, "K": 8, "layout": "spaced", "B": 1},
        "long-rows-everything": {
            "V": 1030, "K": 5, "minimum": 3, "maximum": 5, "length_penalty": 0.6, "eos_threshold": 1.2,
            "coverage": True, "order": 1,
        },
        "long-rows-bigram": {"V": 1100, "K": 6, "B": 1, "order": 2},
        **{
            f"long-rows-{state.replace(' ', '-')}": {"state": state, "K": 5, "V": 2049, "B": 1}
            for state in ("all finished", "first beam only", "all equal", "equal beams", "hopeless", "broken rows")
        },
        "half": {"dtype": HALF},
        "brain": {"dtype": BRAIN},
        "minimum": {"minimum": 4, "V": 5},
        "maximum": {"maximum": 3, "V": 5},
        "minimum-and-maximum": {"B": 6, "K": 5, "minimum": 9, "maximum": 4, "V": 3},
        "threshold": {"eos_threshold": 1.5, "V": 5, "K": 5},
        "threshold-maximum": {"eos_threshold": 1.5, "V": 5, "maximum": 3},
        "length-penalty": {"length_penalty": 0.8, "K": 5, "V": 7, "B": 6},
        "length-penalty-all-finished": {"length_penalty": 1.0, "state": "all finished"},
        "coverage": {"coverage": True, "K": 5},
        "unigram": {"order": 1, "V": 7},
        "trigram": {"order": 3, "V": 7, "K": 5},
        "everything": {
            "B": 3, "K": 5, "V": 11, "minimum": 3, "maximum": 5, "length_penalty": 0.6, "eos_threshold": 1.2,
            "coverage": True, "order": 2,
        },
        "ctc": {"ctc_weight": 0.3, "K": 5},
        "ctc-alone": {"ctc_weight": 1.0, "V": 7, "minimum": 4, "maximum": 5, "state": "one token each"},
        "ctc-and-everything": {
            "B": 3, "K": 5, "V": 11, "minimum": 3, "maximum": 5, "length_penalty": 0.6, "eos_threshold": 1.2,
            "coverage": True, "order": 2, "ctc_weight": 0.4,
        },
        "ctc-broken-rows": {"ctc_weight": 0.5, "V": 9, "state": "broken rows"},
        "ctc-alone-hopeless": {"ctc_weight": 1.0, "V": 5, "state": "hopeless"},
        "ctc-spaced": {"ctc_weight": 0.5, "V": 7, "layout": "spaced"},
        "long-rows-ctc": {"V": 1100, "K": 5, "B": 1, "ctc_weight": 0.3},
        "long-rows-ctc-broken-rows": {"V": 1030, "K": 4, "B": 1, "ctc_weight": 1.0, "state": "broken rows"},
        "first-eos": {"eos": 0, "V": 6},
        "last-eos": {"eos": 5, "V": 6},
        "turned": {"layout": "turned", "V": 7},
        "spaced": {"layout": "spaced", "V": 7},
        "strided": {"layout": "strided", "V": 7},
        "no-utterances": {"B": 0},
        "threshold-eos-near-the-top": {"eos_threshold": 1.5, "state": "eos near the top", "K": 8},
        "long-rows-threshold": {"V": 1100, "K": 8, "eos_threshold": 1.3, "state": "eos near the top"},
        "nothing-yet-length-penalty": {"state": "nothing yet", "length_penalty": 1.0, "K": 5, "V": 7, "B": 6},
        "long-rows-nothing-yet": {"state": "nothing yet", "length_penalty": 0.6, "K": 5, "V": 2100},
        "negative-zero-length-penalty": {"state": "zeros of either sign", "length_penalty": 1.0, "V": 7},
        "trigram-wild-states": {"order": 3, "V": 5, "K": 8, "B": 8, "wild": True},
        "long-rows-bigram-wild-states": {"order": 2, "V": 1030, "K": 8, "wild": True},
    },
)  # fmt: skip

GATHER = _cases(
    "beam_gather",
    gathers,
    {
        "one-state": {},
        "one-value": {"sizes": (1,), "B": 1, "K": 1},
        "primes": {"B": 3, "K": 5, "sizes": (37,)},
        "several-states-and-types": {"sizes": (7, 64, 130, 1), "dtypes": (FLOAT, HALF, torch.int64)},
        "bools-and-bytes": {"sizes": (9, 17), "dtypes": (torch.bool, torch.uint8)},
        "brain": {"sizes": (33,), "dtypes": (BRAIN,)},
        "complex": {"sizes": (5, 3, 5), "dtypes": (torch.complex128, torch.complex64)},
        "long-rows": {"sizes": (1025, 1024), "B": 1, "K": 3},
        "empty-rows": {"sizes": (0, 3)},
        "no-state": {"sizes": ()},
        "no-utterances": {"B": 0},
        "turned": {"layout": "turned", "sizes": (6, 9)},
        "spaced": {"layout": "spaced", "sizes": (6, 9)},
        "strided": {"layout": "strided", "sizes": (6, 9)},
        "wild-parents": {"parents": "wild", "sizes": (5,), "K": 4},
    },
)

BACKTRACK = _cases(
    "beam_backtrack",
    backtracks,
    {
        "short": {},
        "one-step": {"L": 1, "B": 1, "K": 1},
        "no-steps": {"L": 0},
        "no-utterances": {"B": 0},
        "primes": {"L": 13, "B": 7, "K": 5},
        "never-ending": {"eos": 5, "vocabulary": 5, "L": 9},
        "ends-at-once": {"eos": 0, "vocabulary": 1},
        "many-beams": {"L": 6, "B": 3, "K": 33},
        "many-utterances": {"L": 4, "B": 65, "K": 2},
        "long": {"L": 67, "B": 2, "K": 4, "vocabulary": 40},
        "turned": {"layout": "turned"},
        "spaced": {"layout": "spaced"},
        "strided": {"layout": "strided"},
        "wild-parents": {"parents": "wild", "L": 7},
    },
)

PREFIX = _cases(
    "ctc_prefix",
    listens,
    {
        "short": {},
        "first-token": {"state": "first"},
        "one-frame": {"T": 1, "B": 1, "K": 1, "state": "first"},
        "one-frame-and-one-too-many-tokens": {"T": 1, "B": 1, "K": 1},
        "no-frames": {"T": 0},
        "no-utterances": {"B": 0},
        "primes": {"B": 3, "K": 5, "T": 37, "V": 11},
        "characters": {"K": 4, "T": 61, "V": 31},
        "repeated": {"state": "repeated", "K": 4, "T": 30},
        "repeated-across-blocks": {"state": "repeated", "K": 2, "T": 131, "V": 5, "B": 1},
        "length-zero": {"lengths": (0, 9)},
        "too-long": {"state": "long", "T": 4},
        **{f"frames-{T}": {"T": T, "B": 1, "K": 2, "V": 5} for T in (127, 128, 129, 130, 257)},
        **{f"vocabulary-{V}": {"V": V, "K": 2} for V in (3, 32, 33, 65)},
        "last-eos": {"eos": 6},
        "heard-late": {"T": 160, "B": 1, "K": 2, "V": 5, "quiet": 129},
        "far-apart": {"scale": 100.0, "T": 20},
        "turned": {"layout": "turned"},
        "spaced": {"layout": "spaced"},
        "strided": {"layout": "strided"},
        "wild-parents-and-tokens": {"wild": True, "K": 4, "V": 5, "B": 3},
    },
)

UNROLL = _cases(
    "speller_unroll",
    unrolls,
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
        "lengths-beyond": {"lengths": (0, 9, 4), "wild": True},
        "frames-65": {"T": 65, "lengths": (65, 64, 1), "B": 2, "U": 2},
        "wide-context": {"E": 300, "T": 33, "lengths": (33, 28), "B": 2, "U": 2},
        "deep": {"H": (70, 5), "E": 3, "B": 2, "U": 2},
        "saturated": {"scale": 4.0, "share": 0.0, "U": 2, "tolerance": 1e-3},
        "loss-of-logits": {"H": (6, 5), "gradients": "logits"},
        "loss-of-attention": {"H": (6, 5), "gradients": "weights"},
        "no-utterances": {"B": 0},
        "brain": {"dtype": BRAIN, "H": (20, 17), "E": 18, "D": 20, "M": 20, "share": 0.0},
        "brain-one-cell": {"dtype": BRAIN, "H": (66,), "E": 10, "share": 0.0, "B": 2, "U": 2},
        "tf32": {"precision": "high", "H": (20, 17), "E": 18, "share": 0.0},
        "turned": {"layout": "turned", "H": (6, 5)},
        "spaced": {"layout": "spaced", "H": (6, 5)},
        "strided": {"layout": "strided", "H": (6, 5)},
        **{f"replayed-{U}": {"B": 2, "U": U, "replayed": True, "T": 4, "lengths": (4, 3)} for U in (18, 34)},
    },
)  # fmt: skip

CASES = ATTENTION + TOPK + GATHER + PREFIX + BACKTRACK + UNROLL

HUGE = [
    Case("masked_attention", "huge", attends_to_huge, {"B": 2**17, "K": 2, "T": 300, "D": 64}, huge=True),
    Case("masked_attention", "huge-queries", attends_to_huge, {"B": 2**23, "K": 9, "T": 33, "D": 32}, huge=True),
    Case("masked_attention", "huge-turned", attends_to_huge,
         {"B": 2**16, "K": 2, "T": 600, "D": 64, "layout": "turned"}, huge=True),
    Case("beam_topk", "huge", continues_huge, {"B": 2**24, "K": 5, "V": 31}, huge=True),
    Case("beam_topk", "huge-long-rows", continues_huge, {"B": 2**18, "K": 5, "V": 2100}, huge=True),
    Case("beam_gather", "huge", gathers_huge, {"B": 2**19, "K": 9, "N": 600}, huge=True),
    Case("ctc_prefix", "huge-frames", listens_huge, {"B": 2**18, "K": 2, "T": 300, "V": 31}, huge=True),
    Case("ctc_prefix", "huge-states", listens_huge, {"B": 2**15, "K": 128, "T": 600, "V": 40}, huge=True),
    Case("ctc_prefix", "huge-gains", listens_huge, {"B": 2**16, "K": 9, "T": 3, "V": 5000}, huge=True),
    Case("ctc_prefix", "huge-utterance", listens_huge, {"B": 1, "K": 2, "T": 300, "V": 2**23}, huge=True),
    Case("speller_unroll", "huge", unrolls_huge, {"B": 2**25, "U": 2, "T": 8, "step": 0}, huge=True),
    Case("speller_unroll", "huge-steps", unrolls_huge, {"B": 64, "U": 2**20, "T": 80, "step": 2**20 - 2}, huge=True),
    Case("beam_backtrack", "huge", backtracks_huge, {"L": 20, "B": 2**27, "K": 3}, huge=True),
]  # fmt: skip
