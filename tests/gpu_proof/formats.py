"""The number formats of PTX as numpy types, and the conversions that numpy lacks.

bfloat16 is stored as its bits in a uint16, tf32 as a float32 with low bits 0, a packed pair as one integer.
"""

import numpy as np

DTYPES = {
    "pred": np.dtype(np.bool_),
    "b8": np.dtype(np.uint8),
    "b16": np.dtype(np.uint16),
    "b32": np.dtype(np.uint32),
    "b64": np.dtype(np.uint64),
    "u8": np.dtype(np.uint8),
    "u16": np.dtype(np.uint16),
    "u32": np.dtype(np.uint32),
    "u64": np.dtype(np.uint64),
    "s8": np.dtype(np.int8),
    "s16": np.dtype(np.int16),
    "s32": np.dtype(np.int32),
    "s64": np.dtype(np.int64),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "bf16": np.dtype(np.uint16),
    "tf32": np.dtype(np.float32),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "f32x2": np.dtype(np.uint64),
}
PACKED = {"f16x2": np.float16, "bf16x2": np.uint16, "f32x2": np.float32}
FLOATS = ("f16", "bf16", "f32", "f64", *PACKED)
UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
COPY_DTYPES = UNSIGNED | {16: np.dtype("V16")}
SMALLEST_NORMAL = np.finfo(np.float32).tiny
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def bf16_to_f32(bits):
    """Convert bfloat16 bits to float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values, toward_zero=False):
    """Round float32 to bfloat16 and return its bits: to nearest, ties to even, or toward zero."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    if not toward_zero:
        bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.where(np.isnan(values), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def f32_to_tf32(values, away=True):
    """Round to 10 bits of mantissa, ties away from zero or to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = np.uint32(0x1000) if away else np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    rounded = ((bits + half) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def flush_subnormals(values):
    """Replace subnormal float32 numbers by zero of the same sign."""
    if values.dtype != np.float32:
        return values
    small = np.abs(values) < SMALLEST_NORMAL
    return np.where(small, np.copysign(np.float32(0), values), values) if small.any() else values


def perturb(values, ulps):
    """Move float32 numbers by up to `ulps` units in the last place, by an amount hashed from their bits."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    shift = (bits * np.uint32(2654435761) >> np.uint32(8)) % np.uint32(2 * ulps + 1)
    moved = (bits + shift - np.uint32(ulps)).view(np.float32)
    # the approximations are exact where the result is zero, one or infinite: ex2(0), rcp(1), lg2(0)
    kept = ~np.isfinite(moved) | (np.abs(values) < SMALLEST_NORMAL) | (values == 1) | ~np.isfinite(values)
    return np.where(kept, values, moved)
