"""Gradients of what every decoder step shares, taken once after the loop instead of once a step.

A weight used at U steps of a loop costs autograd U thin products and U additions to its gradient: most of the time of a
decoder's backward pass. Here the steps use the weight detached, each adds an offset that is zero, and the offsets'
gradients, all steps together, give the weight's gradient in one product. The same is done for the attention's keys
and values. Values and gradients are those of the plain loop, up to the order of sums.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from las_fast.attention import Memory
from las_fast.ops.masked_attention import masked_attention


class DeferredLinear:
    """A linear layer to be called once at each of `steps` steps on (B, K, in) inputs; returns (B, K, out) float32."""

    def __init__(self, layer: nn.Linear, steps: int, shape: tuple[int, int]):
        self.inputs: list[Tensor] = []
        device = layer.weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.weight.dtype
        self.weight = layer.weight.detach().to(dtype).t().contiguous()  # (in, out): the faster side for few rows
        offsets = _LinearOffsets.apply(layer.weight, layer.bias, self.inputs, (steps, *shape), dtype)
        self.offsets = iter(offsets.unbind(0))

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        self.inputs.append(x.detach())
        return torch.matmul(x, self.weight).float() + next(self.offsets)


class _LinearOffsets(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, inputs, shape, dtype):
        ctx.inputs, ctx.dtype = inputs, dtype
        return bias.detach().expand(*shape, -1).clone()  # (U, B, K, out)

    @staticmethod
    def backward(ctx, gradient):
        inputs = torch.stack(ctx.inputs).flatten(0, 2)  # (U B K, in)
        gradient = gradient.flatten(0, 2)  # (U B K, out)
        weight = torch.mm(gradient.to(ctx.dtype).t(), inputs).float()
        return weight, gradient.sum(0), None, None, None


class DeferredAttention:
    """Masked attention to be called once at each of `steps` steps with queries (B, 1, D) on the same memory."""

    def __init__(self, memory: Memory, steps: int):
        self.memory, self.queries, self.weights = memory, [], []
        self.keys, self.values = memory.keys.detach(), memory.values.detach()
        context, weights = _AttentionOffsets.apply(memory.keys, memory.values, self.queries, self.weights, steps)
        self.context_offsets, self.weight_offsets = iter(context.split(1, 1)), iter(weights.split(1, 1))

    def __call__(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return context (B, 1, E) and weights (B, 1, T), both with all their gradients."""
        query = query.to(self.keys.dtype)
        context, weights = masked_attention(
            query, self.keys, self.values, self.memory.lengths, padding=self.memory.padding
        )
        self.queries.append(query.detach())
        self.weights.append(weights.detach())
        return context + next(self.context_offsets), weights + next(self.weight_offsets)


class _AttentionOffsets(torch.autograd.Function):
    """With W the weights (B, U, T) and S = scale Q K^T the scores of all steps:
    dV = W^T dC;  dW' = dW + dC V^T;  dS = W * (dW' - rowsum(W * dW'));  dK = scale dS^T Q."""

    @staticmethod
    def forward(ctx, keys, values, queries, weights, steps):
        ctx.save_for_backward(values)
        ctx.queries, ctx.weights = queries, weights
        batch, frames, _ = keys.shape
        return values.new_zeros(batch, steps, values.shape[2]), keys.new_zeros(batch, steps, frames)

    @staticmethod
    def backward(ctx, context_gradient, weight_gradient):
        (values,) = ctx.saved_tensors
        queries, weights = torch.cat(ctx.queries, 1), torch.cat(ctx.weights, 1)  # (B, U, D), (B, U, T)
        values_gradient = torch.bmm(weights.transpose(1, 2), context_gradient)
        scores = torch.baddbmm(weight_gradient, context_gradient, values.transpose(1, 2))
        scores = weights * (scores - (weights * scores).sum(-1, keepdim=True))
        keys_gradient = torch.bmm(scores.transpose(1, 2), queries * queries.shape[2] ** -0.5)
        return keys_gradient, values_gradient, None, None, None
