"""Dot-product attention over the valid frames of each utterance.

    weights = softmax(scale * query . keys) over frames before the length, exactly 0 after it
    context = weights . values
    peak    = the frame of the largest weight; the first among equal ones

All K queries of an utterance share its keys and values, which are never repeated over the beam. The gradients, with W
the weights, S the scores, C the context and dX the gradient of X:

    dV = W^T dC;   dW' = dW + dC V^T;   dS = W * (dW' - rowsum(W * dW'));   dQ = scale dS K;   dK = scale dS^T Q
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from las_fast.ops import backends
from las_fast.ops.masks import padding_mask

LOWEST = torch.finfo(torch.float32).min  # not -inf: a row without valid frames must not give NaN


def masked_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    weights: bool = True,
    peaks: bool = False,
    padding: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """Average each utterance's values by softmax(scale * query . keys), ignoring padding.

    Differentiable once in query, keys and values. Computes in float32 (float64 for float64 inputs). In Triton, float32
    matmuls use tf32 if torch.set_float32_matmul_precision allows it; half-precision inputs are multiplied with weights
    rounded to their dtype, and their gradients need loss scaling, as in any half-precision model. For the reference,
    keys and values past the length must be finite; the other backends never read them.

    Args:
        query:   (B, K, D) decoder states; K is the beam, 1 in training.
        keys:    (B, T, D) projected listener outputs, dtype of query.
        values:  (B, T, E) listener outputs, dtype of query.
        lengths: (B,) int64 valid frames, 0 to T; 0 gives zero weights, zero context and peak 0.
        scale:   factor on the scores; default 1/sqrt(D).
        weights: whether to return the weights; False saves writing them.
        peaks:   whether to also return the frame that each query attends to most.
        padding: padding_mask(lengths, T), so that a loop computes it only once; only the reference uses it.
        backend: "auto", "reference", "triton" or "cpp".

    Returns:
        context: (B, K, E), dtype of values.
        weights: (B, K, T) float32 (float64 for float64 inputs), or None; rows sum to 1 and are exactly 0 past the
                 length.
        peaks:   (B, K) int64; only with peaks=True.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the named backend is not available here, or D or E exceeds its limit (Triton: 512, or 256 in
            float32 with gradients).
    """
    _check(query, keys, values, lengths, padding)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    unsupported = {"triton": triton_problem(query, keys, values)}
    chosen = backends.choose("masked_attention", backend, query.device, query.dtype, unsupported)
    if chosen == "reference":
        padding = padding_mask(lengths, keys.shape[1]) if padding is None else padding
        context, attended = _reference(query, keys, values, padding, scale)
        peak = _peaks(attended) if peaks else None
    else:
        op = getattr(torch.ops.las_fast, f"masked_attention_{chosen}")
        context, attended, peak, _ = op(query, keys, values, lengths, scale, weights)
    results = (context, attended if weights else None)
    return (*results, peak) if peaks else results


def _reference(query: Tensor, keys: Tensor, values: Tensor, padding: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    device = query.device.type
    autocast = torch.is_autocast_enabled(device)  # it would run the matmuls in half precision
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        dtype = torch.promote_types(query.dtype, torch.float32)
        masked = padding[:, None]  # (B, 1, T)
        scores = torch.bmm(query.to(dtype) * scale, keys.to(dtype).transpose(1, 2))  # (B, K, T)
        weights = scores.masked_fill(masked, LOWEST).softmax(-1).masked_fill(masked, 0.0)
        return torch.bmm(weights, values.to(dtype)).to(values.dtype), weights


def triton_problem(query: Tensor, keys: Tensor, values: Tensor) -> str | None:
    """Return why the tiles of these sizes do not fit into a GPU's shared memory, or None if they do."""
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys, values))
    max_size = 256 if gradients and query.dtype == torch.float32 else 512
    if max(query.shape[2], values.shape[2]) <= max_size:
        return None
    return f"takes at most {max_size} numbers per key or value here; got D={query.shape[2]} and E={values.shape[2]}"


def _peaks(weights: Tensor) -> Tensor:
    if weights.shape[2] == 0:
        return torch.zeros(weights.shape[:2], dtype=torch.int64, device=weights.device)
    return weights.argmax(-1)


def _check(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, padding: Tensor | None) -> None:
    if query.ndim != 3:
        raise ValueError(f"query must be (B, K, D); got {tuple(query.shape)}")
    B, _, D = query.shape
    if D == 0 or values.shape[-1:] == (0,):
        raise ValueError(f"keys and values must have at least 1 number per frame; got D={D}, E={values.shape[-1]}")
    if keys.ndim != 3 or keys.shape[0] != B or keys.shape[2] != D:
        raise ValueError(f"keys must be (B, T, D) with B={B}, D={D} like query; got {tuple(keys.shape)}")
    T = keys.shape[1]
    if values.ndim != 3 or values.shape[:2] != keys.shape[:2]:
        raise ValueError(f"values must be (B, T, E) with B={B}, T={T} like keys; got {tuple(values.shape)}")
    if lengths.shape != (B,) or lengths.dtype != torch.int64:
        raise ValueError(f"lengths must be ({B},) int64; got {tuple(lengths.shape)} {lengths.dtype}")
    if padding is not None and (padding.shape != (B, T) or padding.dtype != torch.bool):
        raise ValueError(f"padding must be ({B}, {T}) bool; got {tuple(padding.shape)} {padding.dtype}")
    if not query.is_floating_point() or not query.dtype == keys.dtype == values.dtype:
        dtypes = ", ".join(str(x.dtype) for x in (query, keys, values))
        raise ValueError(f"query, keys and values must share one float dtype; got {dtypes}")
    if not query.device == keys.device == values.device == lengths.device:
        devices = ", ".join(str(x.device) for x in (query, keys, values, lengths))
        raise ValueError(f"query, keys, values and lengths must be on one device; got {devices}")


FORWARD = (
    "(Tensor query, Tensor keys, Tensor values, Tensor lengths, float scale, bool weights)"
    " -> (Tensor context, Tensor weights, Tensor peaks, Tensor logsumexp)"
)
BACKWARD = (
    "(Tensor? context_gradient, Tensor? weights_gradient, Tensor query, Tensor keys, Tensor values, Tensor lengths,"
    " Tensor context, Tensor weights, Tensor logsumexp, float scale, bool memory)"
    " -> (Tensor query_gradient, Tensor keys_gradient, Tensor values_gradient)"
)


def _fake_forward(query, keys, values, lengths, scale, weights):
    B, K, _ = query.shape
    shape = (B, K, keys.shape[1]) if weights else (0, 0, 0)
    return (
        values.new_empty(B, K, values.shape[2]),
        query.new_empty(shape, dtype=torch.float32),
        query.new_empty(B, K, dtype=torch.int64),
        query.new_empty(B, K, dtype=torch.float32),
    )


def _fake_backward(
    context_gradient, weights_gradient, query, keys, values, lengths, context, weights, logsumexp, scale, memory
):
    """The gradients of keys and values are empty if `memory` is False, that is, if neither is needed."""
    shapes = [(x.shape if memory else (0, 0, 0)) for x in (keys, values)]
    return query.new_empty(query.shape), keys.new_empty(shapes[0]), values.new_empty(shapes[1])


def _save(ctx, inputs, output) -> None:
    query, keys, values, lengths, ctx.scale, ctx.weights = inputs
    context, weights, peaks, logsumexp = output
    ctx.mark_non_differentiable(peaks, logsumexp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, keys, values, lengths, context, weights, logsumexp)


def _make_backward(op):
    @once_differentiable
    def backward(ctx, context_gradient, weights_gradient, peaks_gradient, logsumexp_gradient):
        weights_gradient = weights_gradient if ctx.weights else None  # without weights it belongs to an empty tensor
        memory = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        query, keys, values = op(context_gradient, weights_gradient, *ctx.saved_tensors, ctx.scale, memory)
        return query, keys if memory else None, values if memory else None, None, None, None

    return backward


backends.register("masked_attention_backward", BACKWARD, _fake_backward, module="masked_attention")
for _name in backends.register("masked_attention", FORWARD, _fake_forward):
    _backward = getattr(torch.ops.las_fast, _name.split("::")[1].replace("attention", "attention_backward"))
    torch.library.register_autograd(_name, _make_backward(_backward), setup_context=_save)
