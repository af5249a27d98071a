"""Masked dot-product attention on a GPU. las_fast/ops/masked_attention.py defines the operation.

One program takes all K queries of one utterance, as the rows of one tile, and a range of its frames. It iterates over
BLOCK_T frames at a time with the online softmax (Milakov and Gimelshein 2018; Dao et al. 2022), where m is the row
maximum, l the sum and a the unnormalised average of the frames so far:

    s = scale * log2(e) * Q K^T;  m' = max(m, max s);  p = 2 ** (s - m');  f = 2 ** (m - m')
    l' = f l + sum p;             a' = f a + p V;      context = a / l;    logsumexp = ln 2 * (m + log2 l)

Bytes: keys, values, queries and results are moved once for the whole beam; padding is never read. Long utterances are
split into ranges of at least MIN_RANGE frames, so that one utterance occupies many multiprocessors: each range writes
its average and finish_kernel merges them. A range has at least 48 frames per query, so that the averages add at most 5%
to the bytes. The length of a range does not depend on B or T: an utterance is summed in the same order alone, in any
batch, with any padding. If the weights are wanted, finish_kernel also turns the scores that forward_kernel left in
`weights` into weights.

The backward pass iterates in the same way. It recomputes the weights from logsumexp and writes the gradients of each
frame once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from las_fast.kernels.tiles import LOG2_E, float32_precision
from torch import Tensor

MIN_RANGE = 400  # frames per range, at least: fewer are not worth a program
FRAMES_PER_QUERY = 48  # frames per range and query, at least
# {rows: (frames per tile, warps, stages)}, at D, E = 256; tiles have fewer frames if D or E is larger. They compile
# without spills and fit in the 99 KiB of shared memory of the smallest supported GPUs. More queries than the largest
# number of rows, or more than 16 if D or E is above 256, take several launches.
TILES = {
    "forward": {
        "half": {16: (32, 4, 3), 32: (64, 8, 2), 64: (32, 8, 2)},
        "ieee": {16: (32, 8, 2), 32: (16, 16, 2)},
        "tf32": {16: (32, 8, 2), 32: (16, 8, 2)},
    },
    "backward": {
        "half": {16: (32, 8, 2), 32: (32, 8, 2), 64: (16, 8, 2)},
        "ieee": {16: (16, 8, 2)},
        "tf32": {16: (16, 16, 1)},
    },
}


@triton.jit
def _tile(pointer, rows, columns, stride, row_count, column_count):
    """Load as tiles.load does, with offsets in 32 bits: rows count from the tile's first, and integer work is less."""
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def forward_kernel(
    query, keys, values, lengths, context, logsumexp, peaks, maxima, sums, weights,
    K, T, range_frames, scale, query_b, query_k, keys_b, keys_t, values_b, values_t,
    D: tl.constexpr, E: tl.constexpr, SPLIT: tl.constexpr, WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Attend to frames [split * range_frames, (split + 1) * range_frames) of utterance b; scale includes log2(e)."""
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    k, d, e = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    row = (b * tl.num_programs(1) + split) * K + k  # (BLOCK_K,) in the results
    length = tl.minimum(tl.load(lengths + b), T).to(tl.int32)
    begin = split * range_frames
    end = tl.minimum(begin + range_frames, length)
    # (BLOCK_K, BLOCK_D)
    q = _tile(query + b * query_b, k, d, query_k, K, D)
    # (BLOCK_K,)
    m = tl.full([BLOCK_K], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_K], tl.float32)
    peak = tl.zeros([BLOCK_K], tl.int32)
    # (BLOCK_K, BLOCK_E)
    a = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    for t0 in range(begin, end, BLOCK_T):
        local = tl.arange(0, BLOCK_T)  # (BLOCK_T,); t is the frame
        t = t0 + local
        # (BLOCK_T, BLOCK_D)
        first = tl.cast(t0, tl.int64)
        k_tile = _tile(keys + b * keys_b + first * keys_t, local, d, keys_t, end - t0, D)
        # (BLOCK_K, BLOCK_T)
        s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale
        s = tl.where(t[None, :] < end, s, -float("inf"))
        if WEIGHTS:
            tl.store(weights + (b * K + k[:, None]) * T + t[None, :], s, mask=(k[:, None] < K) & (t[None, :] < end))
        # (BLOCK_K,)
        top = tl.max(s, 1)
        first_top = tl.min(tl.where(s == top[:, None], t[None, :], 2147483647), 1)
        peak = tl.where(top > m, first_top, peak)
        m_new = tl.maximum(m, top)
        # (BLOCK_K, BLOCK_T)
        p = tl.exp2(s - m_new[:, None])
        # (BLOCK_K,)
        rescale = tl.exp2(m - m_new)
        l = l * rescale + tl.sum(p, 1)
        # (BLOCK_T, BLOCK_E)
        v_tile = _tile(values + b * values_b + first * values_t, local, e, values_t, end - t0, E)
        # (BLOCK_K, BLOCK_E)
        a = a * rescale[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        m = m_new
    # (BLOCK_K, BLOCK_E)
    average = a / _nonzero(l)[:, None]
    inside = (k[:, None] < K) & (e[None, :] < E)
    tl.store(context + row[:, None] * E + e[None, :], average.to(context.dtype.element_ty), mask=inside)
    tl.store(peaks + row, peak, mask=k < K)
    if SPLIT or WEIGHTS:
        tl.store(maxima + row, m, mask=k < K)
        tl.store(sums + row, l, mask=k < K)
    if not SPLIT:
        tl.store(logsumexp + row, _logsumexp(m, l), mask=k < K)


@triton.jit
def _logsumexp(m, l):
    """Return the natural logarithm of l * 2 ** m, (BLOCK_K,); -inf where no frame was summed."""
    return tl.where(l == 0.0, -float("inf"), (m + tl.log2(_nonzero(l))) * 0.6931471805599453)


@triton.jit
def finish_kernel(
    part_context, part_peaks, maxima, sums, lengths, context, logsumexp, peaks, weights,
    K, T, splits,
    E: tl.constexpr, SPLIT: tl.constexpr, WEIGHTS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Turn one block of scores of utterance b into weights; the first block also merges the averages of the ranges."""
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    k, e = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_E)
    # (BLOCK_K,)
    m = tl.full([BLOCK_K], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_K], tl.float32)
    peak = tl.zeros([BLOCK_K], tl.int32)
    for i in range(splits):  # in order, so that ranges of padding change no bit
        part = (b * splits + i) * K + k
        part_m = tl.load(maxima + part, mask=k < K, other=-float("inf"))
        if SPLIT:
            peak = tl.where(part_m > m, tl.load(part_peaks + part, mask=k < K, other=0), peak)
        m_new = tl.maximum(m, part_m)
        finite = _finite(m_new)
        l = l * tl.exp2(m - finite) + tl.load(sums + part, mask=k < K, other=0.0) * tl.exp2(part_m - finite)
        m = m_new
    finite = _finite(m)
    total = _nonzero(l)
    if WEIGHTS:
        t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        # (BLOCK_K, BLOCK_T)
        at = weights + (b * K + k[:, None]) * T + t[None, :]
        valid = (k[:, None] < K) & (t[None, :] < tl.load(lengths + b))
        s = tl.load(at, mask=valid & (t[None, :] < T), other=-float("inf"))
        w = tl.exp2(s - finite[:, None]) / total[:, None]
        tl.store(at, tl.where(valid, w, 0.0), mask=(k[:, None] < K) & (t[None, :] < T))
    if SPLIT and block == 0:
        # (BLOCK_K, BLOCK_E)
        inside = (k[:, None] < K) & (e[None, :] < E)
        a = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
        for i in range(splits):
            part = (b * splits + i) * K + k
            part_m = tl.load(maxima + part, mask=k < K, other=-float("inf"))
            fraction = tl.load(sums + part, mask=k < K, other=0.0) * tl.exp2(part_m - finite) / total
            average = tl.load(part_context + part[:, None] * E + e[None, :], mask=inside, other=0.0)
            a += fraction[:, None] * average.to(tl.float32)
        row = b * K + k
        tl.store(context + row[:, None] * E + e[None, :], a.to(context.dtype.element_ty), mask=inside)
        tl.store(logsumexp + row, _logsumexp(m, l), mask=k < K)
        tl.store(peaks + row, peak, mask=k < K)


@triton.jit
def _finite(m):
    """Return m with 0 for -inf, which marks rows without frames: -inf - -inf would be NaN."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def _nonzero(l):
    """Return l with 1 for 0, which marks rows without frames: 0 / 0 would be NaN."""
    return tl.where(l == 0.0, 1.0, l)


@triton.jit
def backward_kernel(
    context_gradient, weights_gradient, query, keys, values, lengths, context, weights, logsumexp,
    query_gradient, keys_gradient, values_gradient,
    K, T, range_frames, scale, query_b, query_k, keys_b, keys_t, values_b, values_t,
    D: tl.constexpr, E: tl.constexpr, CONTEXT: tl.constexpr, WEIGHTS: tl.constexpr,
    MEMORY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a range of frames of utterance b, and its part of the query gradient (ranges, B, K, D).

    CONTEXT, WEIGHTS: whether that result has a gradient. MEMORY: whether gradients of keys and values are wanted.
    """
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    k, d, e = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    row = b * K + k
    length = tl.minimum(tl.load(lengths + b), T).to(tl.int32)
    begin = split * range_frames
    end = tl.minimum(begin + range_frames, T)
    # (BLOCK_K, BLOCK_D)
    q = _tile(query + b * query_b, k, d, query_k, K, D)
    # (BLOCK_K,)
    lse = tl.load(logsumexp + row, mask=k < K, other=float("inf")) * 1.4426950408889634
    delta = tl.zeros([BLOCK_K], tl.float32)  # rowsum(W * dW') = rowsum(dC * C) + rowsum(W * dW)
    if CONTEXT:
        # (BLOCK_K, BLOCK_E)
        dc = _tile(context_gradient + b * K * E, k, e, E, K, E)
        delta += tl.sum(dc.to(tl.float32) * _tile(context + b * K * E, k, e, E, K, E).to(tl.float32), 1)
    if WEIGHTS:
        for t0 in range(0, length, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            # (BLOCK_K, BLOCK_T)
            dw = _tile(weights_gradient + b * K * T, k, t, T, K, length)
            delta += tl.sum(dw * _tile(weights + b * K * T, k, t, T, K, length), 1)
    # (BLOCK_K, BLOCK_D)
    dq = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for t0 in range(begin, end, BLOCK_T):
        local = tl.arange(0, BLOCK_T)  # (BLOCK_T,); t is the frame
        t = t0 + local
        # (BLOCK_T, BLOCK_D)
        first = tl.cast(t0, tl.int64)
        k_tile = _tile(keys + b * keys_b + first * keys_t, local, d, keys_t, length - t0, D)
        # (BLOCK_K, BLOCK_T)
        s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * (scale * 1.4426950408889634)
        p = tl.where(t[None, :] < length, tl.exp2(s - lse[:, None]), 0.0)
        dp = -delta[:, None]
        if CONTEXT:
            # (BLOCK_T, BLOCK_E)
            v_tile = _tile(values + b * values_b + first * values_t, local, e, values_t, length - t0, E)
            dp += tl.dot(dc, tl.trans(v_tile), input_precision=PRECISION)
        if WEIGHTS:
            dp += _tile(weights_gradient + b * K * T, k, t, T, K, length)
        ds = (p * dp * scale).to(q.dtype)
        # (BLOCK_K, BLOCK_D)
        dq += tl.dot(ds, k_tile, input_precision=PRECISION)
        if MEMORY:
            frame = b * T + first + local  # (BLOCK_T,)
            # (BLOCK_T, BLOCK_D)
            dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
            inside = (t[:, None] < end) & (d[None, :] < D)
            tl.store(keys_gradient + frame[:, None] * D + d[None, :], dk.to(q.dtype), mask=inside)
            # (BLOCK_T, BLOCK_E)
            inside = (t[:, None] < end) & (e[None, :] < E)
            at = values_gradient + frame[:, None] * E + e[None, :]
            if CONTEXT:
                dv = tl.dot(tl.trans(p.to(dc.dtype)), dc, input_precision=PRECISION)
                tl.store(at, dv.to(q.dtype), mask=inside)
            else:
                tl.store(at, 0.0, mask=inside)
    # (BLOCK_K, BLOCK_D)
    inside = (k[:, None] < K) & (d[None, :] < D)
    part = (split * tl.num_programs(0) + b) * K + k
    tl.store(query_gradient + part[:, None] * D + d[None, :], dq.to(query_gradient.dtype.element_ty), mask=inside)


def masked_attention(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward pass; the implementation of las_fast::masked_attention_triton."""
    (B, K, D), T, E = query.shape, keys.shape[1], values.shape[2]
    blocks = query.split(_max_rows(query, values, "forward"), 1)
    if len(blocks) > 1:
        results = [masked_attention(x, keys, values, lengths, scale, weights) for x in blocks]
        return tuple(torch.cat(column, 1) for column in zip(*results, strict=True))
    query, keys, values = map(_dense_rows, (query, keys, values))
    lengths = lengths.contiguous()
    blocks, options = _blocks(K, D, E, query.dtype)
    splits, range_frames = _ranges(K, T, blocks["BLOCK_T"])
    attention = query.new_empty((B, K, T) if weights else (0, 0, 0), dtype=torch.float32)
    results = (
        values.new_empty(B, K, E),
        query.new_empty(B, K, dtype=torch.float32),
        query.new_empty(B, K, dtype=torch.int64),
    )
    context, logsumexp, peaks = results
    if K == 0:
        return context, attention, peaks, logsumexp
    parts = splits if splits > 1 or weights else 0
    maxima, sums = (query.new_empty(B, parts, K, dtype=torch.float32) for _ in range(2))
    if splits > 1:
        context, peaks = values.new_empty(B, splits, K, E), query.new_empty(B, splits, K, dtype=torch.int32)
    forward_kernel[B, splits](
        query, keys, values, lengths, context, logsumexp, peaks, maxima, sums, attention,
        K, T, range_frames, scale * LOG2_E, *_strides(query, keys, values),
        D, E, splits > 1, weights, float32_precision(), **blocks, **options,
    )  # fmt: skip
    if parts:
        finish_kernel[B, triton.cdiv(T, 256) if weights else 1](
            context, peaks, maxima, sums, lengths, *results, attention,
            K, T, splits, E, splits > 1, weights,
            BLOCK_K=triton.next_power_of_2(K), BLOCK_T=256, BLOCK_E=blocks["BLOCK_E"],
        )  # fmt: skip
    return results[0], attention, results[2], logsumexp


def masked_attention_backward(
    context_gradient: Tensor | None, weights_gradient: Tensor | None, query: Tensor, keys: Tensor, values: Tensor,
    lengths: Tensor, context: Tensor, weights: Tensor, logsumexp: Tensor, scale: float, memory: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward pass: the gradients of query, keys and values; the last two are empty unless memory."""
    (B, K, D), T, E = query.shape, keys.shape[1], values.shape[2]
    max_rows = _max_rows(query, values, "backward")
    if max_rows < K:
        results = (query, keys, values, lengths, context, weights, logsumexp)
        return _backward_in_parts(max_rows, context_gradient, weights_gradient, *results, scale, memory)
    query, keys, values = map(_dense_rows, (query, keys, values))
    lengths = lengths.contiguous()
    blocks, options = _blocks(K, D, E, query.dtype, "backward")
    splits, range_frames = _ranges(K, T, blocks["BLOCK_T"])
    shapes = [(x.shape if memory else (0, 0, 0)) for x in (keys, values)]
    keys_gradient, values_gradient = keys.new_empty(shapes[0]), values.new_empty(shapes[1])
    parts = query.new_empty(splits, B, K, D, dtype=query.dtype if splits == 1 else torch.float32)
    upstream = [None if x is None else x.contiguous() for x in (context_gradient, weights_gradient)]
    backward_kernel[B, splits](
        *upstream, query, keys, values, lengths, context, weights, logsumexp, parts, keys_gradient, values_gradient,
        K, T, range_frames, scale, *_strides(query, keys, values),
        D, E, upstream[0] is not None, upstream[1] is not None, memory, float32_precision(), **blocks, **options,
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0).to(query.dtype), keys_gradient, values_gradient


def _backward_in_parts(
    max_rows, context_gradient, weights_gradient, query, keys, values, lengths, context, weights, logsumexp, scale,
    memory,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch one backward pass per block of max_rows queries and sum the gradients of keys and values."""
    gradients = []
    for start in range(0, query.shape[1], max_rows):
        rows = slice(start, start + max_rows)
        upstream = [None if x is None else x[:, rows] for x in (context_gradient, weights_gradient)]
        q, c, w, total = (x[:, rows].contiguous() for x in (query, context, weights, logsumexp))
        gradients.append(masked_attention_backward(*upstream, q, keys, values, lengths, c, w, total, scale, memory))
    query_parts, *memory_parts = zip(*gradients, strict=True)
    sums = [torch.stack(x).float().sum(0).to(query.dtype) for x in memory_parts]
    return torch.cat(query_parts, 1), *sums


def _dense_rows(x: Tensor) -> Tensor:
    """Return x, copied if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(query: Tensor, keys: Tensor, values: Tensor) -> tuple[int, ...]:
    return *query.stride()[:2], *keys.stride()[:2], *values.stride()[:2]


def _ranges(K: int, T: int, block: int) -> tuple[int, int]:
    """Return the number of ranges per utterance and the frames per range, a multiple of the block."""
    range_frames = triton.cdiv(max(MIN_RANGE, FRAMES_PER_QUERY * K), block) * block
    return max(1, triton.cdiv(T, range_frames)), range_frames


def _kind(dtype: torch.dtype) -> str:
    """Return the key of TILES for a dtype."""
    return float32_precision() if dtype == torch.float32 else "half"


def _max_rows(query: Tensor, values: Tensor, pass_name: str) -> int:
    """Return the largest number of queries per launch."""
    narrow = max(query.shape[2], values.shape[2]) <= 256
    return max(TILES[pass_name][_kind(query.dtype)]) if narrow else 16


def _blocks(K: int, D: int, E: int, dtype: torch.dtype, pass_name: str = "forward") -> tuple[dict, dict]:
    """Return the block sizes and the launch options for a shape, from TILES."""
    rows = max(16, triton.next_power_of_2(K))  # matrix units take 16 rows
    block_d, block_e = (max(16, triton.next_power_of_2(x)) for x in (D, E))
    widest = max(block_d, block_e)  # at most 512: las_fast.ops.masked_attention checks it
    tile_frames, warps, stages = TILES[pass_name][_kind(dtype)][rows]
    # At most 32 in the backward pass, where frames are also rows of matmuls.
    tile_frames = max(16, min(64 if pass_name == "forward" else 32, tile_frames * 256 // widest))
    blocks = {"BLOCK_K": rows, "BLOCK_T": tile_frames, "BLOCK_D": block_d, "BLOCK_E": block_e}
    return blocks, {"num_warps": warps, "num_stages": stages}
