"""The whole decoder pass of training, as one differentiable op.

Step u of utterance b is that of speller_search with one beam. `token` is tokens[b, u] or, if sampled[b, u], the argmax
of the logits of step u - 1. The output of cell i is hidden_i * mask_i (dropout):

    gates_1   = W_1 [embedding[token], context, hidden_1] + b_1         context and hidden_1 of the previous step
    gates_i   = W_i [hidden_(i-1) * mask_(i-1), hidden_i] + b_i
    cell_i    = sigmoid(f) * cell_i + sigmoid(i) * tanh(g);   hidden_i = sigmoid(o) * tanh(cell_i)
    context   = attention of query(hidden_last * mask_last) over keys and values    see masked_attention
    logits    = embedding . gelu(project([hidden_last * mask_last, context])) + bias

For a weight that U steps use, autograd computes U thin matmuls and adds each to the gradient: most of the time of the
backward pass of a plain loop. The fused form and C++ run only the recurrence backwards, and take the gradients of each
weight and of keys and values as matmuls over many steps. With X the inputs of a layer and dY the gradients of its
outputs in all steps, W the attention weights (B, U, T), C the contexts, Q the queries and S = scale Q K^T:

    dWeight = dY^T X;   dV = W^T dC;   dS = W * (dW + dC V^T - rowsum(W * (dW + dC V^T)));   dK = scale dS^T Q

Values and gradients equal those of the plain loop up to the order of summation.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from las_fast.ops import backends
from las_fast.ops.masked_attention import masked_attention
from las_fast.ops.masks import padding_mask
from las_fast.ops.speller import SpellerWeights, check_memory, initial_state, step

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PANEL = 32  # columns per panel of packed weights (csrc/memory.h): rows of saved tensors are padded to a multiple


def speller_unroll(
    weights: SpellerWeights,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    sampled: Tensor | None,
    masks: Sequence[Tensor] | None = None,
    *,
    precision: str = "fp32",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the logits and the attention weights of every step.

    Differentiable once in weights, keys and values; the choice of a sampled token has no gradient. In C++ the results
    of an utterance are the same bits in any batch, and all results and gradients on any number of threads.

    Args:
        weights: of the speller.
        keys:    (B, T, D) float32.
        values:  (B, T, E) float32.
        lengths: (B,) int64 valid frames, 0 to T; keys and values past them must be finite, except in C++.
        tokens:  (B, U) int64, U at least 1: the true token before each step.
        sampled: (B, U) bool, whether a step reads the model's best token, the first among equal ones, instead of
            the true one; ignored at the first step. None: no step does.
        masks:   dropout masks (B, H_i) float32, one per cell, the same at every step; None: no dropout.
        precision: of the matmuls: "fp32", "bf16" or "fp16", with sums, cell states and attention in float32. fused
            takes all, C++ and Triton not fp16; the reference always computes in fp32. Triton also rounds the keys and
            values that it attends to.
        backend: "auto", "reference", "fused", "cpp" or "triton"; "fused" is PyTorch calls, for any device.

    Returns:
        logits:    (B, U, V) float32.
        attention: (B, U, T) float32 weights; rows sum to 1 and are exactly 0 past the length.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the precision or backend is unknown.
        RuntimeError: the named backend is not available here, or does not take the precision; in C++, a token is out
            of range. (On a CPU the reference and fused raise IndexError for it. On a GPU it is an assertion of the
            device.)
    """
    _check(weights, keys, values, lengths, tokens, sampled, masks, precision)
    reason = "has no fp16 matmuls" if precision == "fp16" else None
    unsupported = {"cpp": reason, "triton": reason}
    chosen = backends.choose("speller_unroll", backend, keys.device, keys.dtype, unsupported)
    if chosen in ("cpp", "triton"):
        flat = weights.flat()
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (*flat, keys, values))
        if sampled is None:  # Triton takes an empty tensor for that
            sampled = tokens.new_zeros(tokens.shape if chosen == "cpp" else (0, 0), dtype=torch.bool)
        arguments = (flat, keys, values, lengths, tokens, sampled, list(masks or ()), precision == "bf16", gradients)
        return getattr(torch.ops.las_fast, f"speller_unroll_{chosen}")(*arguments)[:2]
    with torch.autocast(keys.device.type, enabled=False):
        if chosen == "reference":
            return _reference(weights, keys, values, lengths, tokens, sampled, masks)
        return _fused(weights, keys, values, lengths, tokens, sampled, masks, PRECISIONS[precision])


# ----------------------------------------------------------------------------------------------------------- reference


def _reference(weights: SpellerWeights, keys, values, lengths, tokens, sampled, masks) -> tuple[Tensor, Tensor]:
    state = initial_state(weights, values, 1)
    logits: list[Tensor] = []
    attention: list[Tensor] = []
    masks = None if masks is None else [mask[:, None] for mask in masks]
    for u in range(tokens.shape[1]):
        token = tokens[:, u : u + 1]
        if u > 0 and sampled is not None:
            token = torch.where(sampled[:, u : u + 1], logits[-1].argmax(-1), token)
        now, attended, _, state = step(weights, keys, values, lengths, token, state, masks)
        logits.append(now)
        attention.append(attended)
    return torch.cat(logits, 1), torch.cat(attention, 1)


# --------------------------------------------------------------------------------------------------------------- fused


def _fused(weights: SpellerWeights, keys, values, lengths, tokens, sampled, masks, dtype) -> tuple[Tensor, Tensor]:
    """Run the loop without gradients for weights, keys and values, and compute each of these with one matmul.

    Each step adds a slice of a tensor with one slice per step (zeros, or the bias) to its outputs. Autograd collects
    the gradients of all steps in that tensor, from which one matmul gives the gradient of a weight, or of the keys and
    values.
    """
    state, steps = initial_state(weights, values, 1), tokens.shape[1]
    layers = zip((*weights.gates, weights.query), (*weights.gate_biases, weights.query_bias), strict=True)
    *cells, query = (_DeferredLinear(*layer, steps, len(tokens), dtype) for layer in layers)
    attend = _DeferredAttention(keys, values, lengths, steps)
    may_sample = [False] * steps if sampled is None else _may_sample(sampled)
    hidden, cell, context = ([x[:, 0] for x in state[0]], [x[:, 0] for x in state[1]], state[2][:, 0])
    outputs: list[Tensor] = []
    contexts, attention = [], []
    for u in range(steps):
        token = tokens[:, u]
        if u > 0 and may_sample[u]:
            with torch.no_grad():
                best = _logits(weights, outputs[-1], context, dtype).argmax(-1)
            token = torch.where(sampled[:, u], best, token)
        inputs: tuple[Tensor, ...] = (F.embedding(token, weights.embedding), context)
        for n, layer in enumerate(cells):
            i, f, g, o = layer(torch.cat((*inputs, hidden[n]), -1)).chunk(4, -1)
            cell[n] = torch.sigmoid(f) * cell[n] + torch.sigmoid(i) * torch.tanh(g)
            hidden[n] = torch.sigmoid(o) * torch.tanh(cell[n])
            inputs = (hidden[n] if masks is None else hidden[n] * masks[n],)
        context, attended = attend(query(inputs[0]))
        outputs.append(inputs[0])
        contexts.append(context)
        attention.append(attended)
    logits = _logits(weights, torch.stack(outputs, 1), torch.stack(contexts, 1), dtype)
    return logits, torch.stack(attention, 1)


def _may_sample(sampled: Tensor) -> list[bool]:
    """Return whether a token of each step is sampled; on devices where reading that would wait, True for every step."""
    return [True] * sampled.shape[1] if _read_waits(sampled) else sampled.any(0).tolist()


def _read_waits(x: Tensor) -> bool:
    """Return whether the host waits for a device when it reads a number of x."""
    return x.device.type != "cpu"


def _logits(weights: SpellerWeights, outputs: Tensor, context: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(outputs.device.type, dtype, enabled=dtype != torch.float32):
        features = F.gelu(F.linear(torch.cat((outputs, context), -1), weights.project, weights.project_bias))
        return F.linear(features, weights.embedding, weights.bias).float()


class _DeferredLinear:
    """A linear layer, called once per step on (B, in) inputs; returns (B, out) float32."""

    def __init__(self, weight: Tensor, bias: Tensor, steps: int, batch: int, dtype: torch.dtype):
        self.inputs: list[Tensor] = []
        self.weight = weight.detach().to(dtype).t().contiguous()  # (in, out): faster for few rows
        self.offsets = iter(_LinearOffsets.apply(weight, bias, self.inputs, (steps, batch), dtype).unbind(0))

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        self.inputs.append(x.detach())
        return torch.mm(x, self.weight) + next(self.offsets)  # float32


class _LinearOffsets(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, inputs, shape, dtype):
        ctx.inputs, ctx.dtype = inputs, dtype
        return bias.expand(*shape, -1).clone()  # (U, B, out)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        inputs = torch.stack(ctx.inputs).flatten(0, 1)  # (U B, in)
        gradient = gradient.flatten(0, 1)  # (U B, out)
        weight = torch.mm(gradient.to(ctx.dtype).t(), inputs).float()
        return weight, gradient.sum(0), None, None, None


class _DeferredAttention:
    """Masked attention, called once per step with queries (B, D) on the same keys and values."""

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor, steps: int):
        self.memory, self.padding = (keys.detach(), values.detach(), lengths), padding_mask(lengths, keys.shape[1])
        self.queries: list[Tensor] = []
        self.weights: list[Tensor] = []
        context, weights = _AttentionOffsets.apply(keys, values, self.queries, self.weights, steps)
        self.offsets = zip(context.unbind(1), weights.unbind(1), strict=True)

    def __call__(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return context (B, E) and weights (B, T), both differentiable in query, keys and values."""
        context, weights = (x[:, 0] for x in masked_attention(query[:, None], *self.memory, padding=self.padding))
        self.queries.append(query.detach())
        self.weights.append(weights.detach())
        offsets = next(self.offsets)
        return context + offsets[0], weights + offsets[1]


class _AttentionOffsets(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keys, values, queries, weights, steps):
        ctx.save_for_backward(values)
        ctx.queries, ctx.weights = queries, weights
        batch, frames, _ = keys.shape
        return values.new_zeros(batch, steps, values.shape[2]), keys.new_zeros(batch, steps, frames)

    @staticmethod
    @once_differentiable
    def backward(ctx, context_gradient, weight_gradient):
        (values,) = ctx.saved_tensors
        queries, weights = torch.stack(ctx.queries, 1), torch.stack(ctx.weights, 1)  # (B, U, D), (B, U, T)
        values_gradient = torch.bmm(weights.transpose(1, 2), context_gradient)
        scores = torch.baddbmm(weight_gradient, context_gradient, values.transpose(1, 2))
        scores = weights * (scores - (weights * scores).sum(-1, keepdim=True))
        keys_gradient = torch.bmm(scores.transpose(1, 2), queries * queries.shape[2] ** -0.5)
        return keys_gradient, values_gradient, None, None, None


# ----------------------------------------------------------------------------------------------- checks, registration


def _check(weights: SpellerWeights, keys, values, lengths, tokens, sampled, masks, precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    check_memory(weights, keys, values)
    others = {"weights": weights.flat(), "values": values, "lengths": lengths}
    backends.check_devices("keys", keys.device, {**others, "tokens": tokens, "sampled": sampled, "masks": masks})
    B = keys.shape[0]
    if lengths.shape != (B,) or lengths.dtype != torch.int64:
        raise ValueError(f"lengths must be ({B},) int64; got {tuple(lengths.shape)} {lengths.dtype}")
    if tokens.ndim != 2 or len(tokens) != B or tokens.shape[1] == 0 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be (B, U) int64 with B={B}, U > 0; got {tuple(tokens.shape)} {tokens.dtype}")
    if sampled is not None and (sampled.shape != tokens.shape or sampled.dtype != torch.bool):
        raise ValueError(f"sampled must be {tuple(tokens.shape)} bool; got {tuple(sampled.shape)} {sampled.dtype}")
    sizes = [(B, size) for size in weights.cell_sizes]
    if masks is not None and [(tuple(mask.shape), mask.dtype) for mask in masks] != [(s, torch.float32) for s in sizes]:
        got = [f"{tuple(mask.shape)} {mask.dtype}" for mask in masks]
        raise ValueError(f"masks must be {sizes} float32, or None; got {', '.join(got) or 'none'}")


FORWARD = (
    "(Tensor[] weights, Tensor keys, Tensor values, Tensor lengths, Tensor tokens, Tensor sampled, Tensor[] masks,"
    " bool bf16, bool gradients) -> (Tensor logits, Tensor attention, Tensor read, Tensor operands, Tensor states)"
)
BACKWARD = (
    "(Tensor? logits_gradient, Tensor? attention_gradient, Tensor[] weights, Tensor keys, Tensor values,"
    " Tensor lengths, Tensor[] masks, Tensor attention, Tensor read, Tensor operands, Tensor states, bool bf16)"
    " -> (Tensor[] weights_gradients, Tensor keys_gradient, Tensor values_gradient)"
)


def _padded(size: int) -> int:
    return -(-size // PANEL) * PANEL


def _fake_forward(weights, keys, values, lengths, tokens, sampled, masks, bf16, gradients):
    (B, U), (V, M), D, E = tokens.shape, weights[0].shape, keys.shape[2], values.shape[2]
    sizes = SpellerWeights.from_flat(weights).cell_sizes
    inputs = [below + size for below, size in zip((E, *sizes), sizes, strict=False)]
    operands = sum(map(_padded, (*inputs, sizes[-1] + E, M, *(4 * size for size in sizes))))
    states = sum(map(_padded, (*sizes, D, M)))
    steps = U if gradients else min(2, U)
    return (
        keys.new_empty(B, U, V),
        keys.new_empty(B, U, keys.shape[1]),
        torch.empty_like(tokens),
        keys.new_empty(steps, B, operands, dtype=torch.bfloat16 if bf16 else torch.float32),
        keys.new_empty(steps, B, states),
    )


def _fake_forward_triton(weights, keys, values, lengths, tokens, sampled, masks, bf16, gradients):
    make_layout = importlib.import_module("las_fast.kernels.speller_unroll").make_layout  # imports triton
    (B, U), V, dtype = tokens.shape, len(weights[0]), torch.bfloat16 if bf16 else torch.float32
    layout = make_layout(SpellerWeights.from_flat(weights).cell_sizes, values.shape[2])
    operands = keys.new_empty(U, B, layout.operands, dtype=dtype)
    logits, attention = (keys.new_empty(U, B, size).transpose(0, 1) for size in (V, keys.shape[1]))
    return logits, attention, tokens.new_empty(U, B), operands, keys.new_empty(U, B, layout.states)


def _fake_backward(logits_gradient, attention_gradient, weights, keys, values, *saved):
    return [x.new_empty(x.shape) for x in weights], keys.new_empty(keys.shape), values.new_empty(values.shape)


def _save(ctx, inputs, output) -> None:
    weights, keys, values, lengths, _tokens, _sampled, masks, ctx.bf16, _gradients = inputs
    _logits, attention, read, operands, states = output
    ctx.count, ctx.masks = len(weights), len(masks)
    ctx.mark_non_differentiable(read, operands, states)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*weights, *masks, keys, values, lengths, attention, read, operands, states)


def _backward(op, ctx, logits_gradient, attention_gradient, *others):
    saved, n = ctx.saved_tensors, ctx.count
    weights, masks, (keys, values, lengths, *results) = saved[:n], saved[n : n + ctx.masks], saved[n + ctx.masks :]
    no_gradients = (None, None, None, [None] * ctx.masks, None, None)
    gradients = getattr(torch.ops.las_fast, op)(
        logits_gradient, attention_gradient, weights, keys, values, lengths, masks, *results, ctx.bf16
    )
    return (*gradients, *no_gradients)


def _refuse(ctx, *gradients):
    raise RuntimeError("speller_unroll is differentiable once, not twice")


for _name in backends.register("speller_unroll_backward", BACKWARD, _fake_backward, module="speller_unroll"):
    torch.library.register_autograd(_name, _refuse)
for _name in backends.register("speller_unroll", FORWARD, _fake_forward, triton_fake=_fake_forward_triton):
    _op = f"speller_unroll_backward_{_name.rsplit('_', 1)[1]}"
    torch.library.register_autograd(_name, partial(_backward, _op), setup_context=_save)
