"""Dot-product attention over the valid frames of each utterance.

    weights = softmax(scale * query . keys) over frames before the length, exactly 0 after it
    context = weights . values

All K queries of an utterance share its keys and values, which are never repeated over the beam.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from las_fast.ops import backends

LOWEST = torch.finfo(torch.float32).min  # not -inf: a row without valid frames must not give NaN


def masked_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    weights: bool = True,
    padding: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Average each utterance's values by softmax(scale * query . keys), ignoring padding.

    Differentiable in query, keys and values. Computes in float32 (float64 for float64). A loop over steps should
    hold float32 keys and values, or each step converts them again. Keys and values past the length must be finite.

    Args:
        query:   (B, K, D) decoder states; K is the beam, 1 in training.
        keys:    (B, T, D) projected listener outputs, dtype of query.
        values:  (B, T, E) listener outputs, dtype of query.
        lengths: (B,) int64 valid frames; 0 gives zero weights and zero context.
        scale:   factor on the scores; default 1/sqrt(D).
        weights: False returns None in their place.
        padding: padding_mask(lengths, T) where a loop has it already; it must agree with lengths.
        backend: "auto", "reference", "triton" or "cpp".

    Returns:
        context: (B, K, E), dtype of values.
        weights: (B, K, T) float32; rows sum to 1 and are exactly 0 past the length; or None.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the named backend is not available here.
    """
    _check(query, keys, values, lengths, padding)
    backends.choose("masked_attention", backend, query.device)
    if padding is None:
        padding = padding_mask(lengths, keys.shape[1])
    context, attended = _reference(query, keys, values, padding, query.shape[2] ** -0.5 if scale is None else scale)
    return context, attended if weights else None


def padding_mask(lengths: Tensor, frames: int) -> Tensor:
    """Return (B, frames) bool, True from each length on; lengths is (B,) int64."""
    return torch.arange(frames, device=lengths.device) >= lengths[:, None]


def _reference(query: Tensor, keys: Tensor, values: Tensor, padding: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    device = query.device.type
    autocast = torch.is_autocast_enabled(device)  # it would take the products back to half precision
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        wide = torch.promote_types(query.dtype, torch.float32)
        past = padding[:, None]  # (B, 1, T)
        scores = torch.bmm(query.to(wide) * scale, keys.to(wide).transpose(1, 2))  # (B, K, T)
        weights = scores.masked_fill(past, LOWEST).softmax(-1).masked_fill(past, 0.0)
        return torch.bmm(weights, values.to(wide)).to(values.dtype), weights


def _check(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, padding: Tensor | None) -> None:
    if query.ndim != 3:
        raise ValueError(f"query must be (B, K, D); got {tuple(query.shape)}")
    (B, _, D), T = query.shape, keys.shape[1] if keys.ndim == 3 else -1
    if keys.ndim != 3 or keys.shape[0] != B or keys.shape[2] != D:
        raise ValueError(f"keys must be (B, T, D) with B={B}, D={D} like query; got {tuple(keys.shape)}")
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
