"""The PTX executor computes the results of a GPU, and detects races, bad accesses and illegal divergence."""

import math
import re
import struct

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from gpu_proof import ptx
from gpu_proof.compiler import compile_launch, recorded, resources
from gpu_proof.emulator import executed
from gpu_proof.executor import BarrierRace, EndlessLoop, IllegalDivergence, Misaligned, OutOfBounds, Program
from gpu_proof.memo import Memo

ARCHITECTURES = (80, 90, 100)
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(actual, exact):
    """The largest error, relative to the largest exact value."""
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


# Kernels


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + i, mask=i < n, other=0.0) + tl.load(y + i, mask=i < n, other=0.0)
    tl.store(out + i, total, mask=i < n)


@triton.jit
def softmax_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0) * n
    values = tl.load(x + row + i, mask=i < n, other=-float("inf"))
    powers = tl.exp(values - tl.max(values, 0))
    tl.store(out + row + i, powers / tl.sum(powers, 0), mask=i < n)


@triton.jit
def matmul_kernel(a, b, out, depth, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """out (16, COLUMNS) = a (16, depth) @ b (depth, COLUMNS), DEPTH at a time; b goes through shared memory."""
    row, column, k = tl.arange(0, 16), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    total = tl.zeros([16, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        a_tile = tl.load(a + row[:, None] * depth + (start + k)[None, :])
        b_tile = tl.load(b + (start + k)[:, None] * COLUMNS + column[None, :])
        total = tl.dot(a_tile, b_tile, total, input_precision=PRECISION)
    tl.store(out + row[:, None] * COLUMNS + column[None, :], total)


@triton.jit
def row_sum_kernel(x, counts, out, n, BLOCK: tl.constexpr):
    """Sum the first counts[p] elements of row p, BLOCK at a time."""
    p = tl.program_id(0)
    count = tl.load(counts + p)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x + p * n + i, mask=i < count, other=0.0)
    tl.store(out + p, tl.sum(total, 0))


@triton.jit
def branch_kernel(x, out, BLOCK: tl.constexpr):
    """Odd programs double, every third program stops early, the others negate."""
    p = tl.program_id(0)
    i = p * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + i)
    if p % 3 == 2:
        return
    values = values * 2 if p % 2 == 1 else -values
    tl.store(out + i, values + tl.sum(values, 0))


@triton.jit
def cosine_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.cos(tl.load(x + i)))


@triton.jit
def order_kernel(x, ordered, best, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    tl.store(ordered + i, tl.sort(values))
    tl.store(best, tl.argmax(values, 0))


@triton.jit
def key_kernel(scores, out, BLOCK: tl.constexpr):
    """The largest score and its lowest index as one 64-bit key."""
    i = tl.arange(0, BLOCK)
    bits = tl.load(scores + i).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    tl.store(out, tl.max((ordered.to(tl.int64) << 32) | (0x7FFFFFFF - i).to(tl.int64), 0))


@triton.jit
def scatter_kernel(index, values, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out + tl.load(index + i), tl.load(values + i))


@triton.jit
def integer_kernel(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a // b)
    tl.store(out + BLOCK + i, a % b)
    tl.store(out + 2 * BLOCK + i, (a << 3) ^ (b >> 2))
    tl.store(out + 3 * BLOCK + i, a // 7)  # compiled to a multiplication by a large constant


@triton.jit
def copy_kernel(sources, targets, sizes: tl.constexpr, BLOCK: tl.constexpr):
    for i in tl.static_range(len(sizes)):
        n = tl.arange(0, BLOCK)
        tl.store(targets[i] + n, tl.load(sources[i] + n, mask=n < sizes[i], other=0), mask=n < sizes[i])


@triton.jit
def transpose_kernel(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tile = tl.load(x + row[:, None] * COLUMNS + column[None, :])
    tl.store(out + column[:, None] * ROWS + row[None, :], tl.trans(tile))


@triton.jit
def histogram_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, 16), tl.histogram(tl.load(x + tl.arange(0, BLOCK)), 16))


@triton.jit
def collatz_kernel(out):
    """The number of Collatz steps from the program's number + 1 down to 1."""
    p = tl.program_id(0)
    x, steps = p.to(tl.int64) + 1, 0
    while x != 1:
        x = x // 2 if x % 2 == 0 else 3 * x + 1
        steps += 1
    tl.store(out + p, steps)


@triton.jit
def grid_kernel(out):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    index = (z * tl.num_programs(1) + y) * tl.num_programs(0) + x
    tl.store(out + index, x + 10 * y + 100 * z)


@triton.jit
def multiply_add_kernel(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a * b + a)


# Values


@every_architecture
def test_a_masked_sum_is_exact(arch):
    x, y, out = random(1000), random(1000, seed=1), torch.full((1000,), torch.nan)
    with executed(arch) as launches:
        add_kernel[(4,)](x, y, out, 1000, BLOCK=256)
    assert torch.equal(out, x + y)
    assert (launches[0].name, launches[0].grid) == ("add_kernel", (4, 1, 1))


@every_architecture
def test_a_masked_softmax_is_accurate_with_perturbed_approximations(arch):
    x = 5 * random(6, 300)
    for ulps in (0, 2):
        out = torch.full_like(x, torch.nan)
        with executed(arch, approx_ulps=ulps):
            softmax_kernel[(6,)](x, out, 300, BLOCK=512)
        assert relative_error(out, x.double().softmax(1)) < 1e-6


def test_approx_ulps_changes_the_results():
    x = 5 * random(1, 300)
    results = []
    for ulps in (0, 2):
        results.append(torch.empty_like(x))
        with executed(90, approx_ulps=ulps):
            softmax_kernel[(1,)](x, results[-1], 300, BLOCK=512)
    assert not torch.equal(*results)


def matmul(arch, dtype, precision, depth=96, columns=64, **options):
    """The relative error of matmul_kernel, and its Execution."""
    a, b = random(16, depth, dtype=dtype), random(depth, columns, dtype=dtype, seed=1)
    out = torch.full((16, columns), torch.nan)
    with executed(arch, **options) as launches:
        matmul_kernel[(1,)](a, b, out, depth, DEPTH=32, COLUMNS=columns, PRECISION=precision, num_stages=3)
    return relative_error(out, a.double() @ b.double()), launches[0]


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_matmul_rounds_only_the_float32_sum(arch, dtype):
    error, launch = matmul(arch, dtype, "ieee")
    assert error < 1e-6 and launch.counts.mma


@every_architecture
def test_a_float32_matmul_has_the_error_of_its_precision(arch):
    assert matmul(arch, torch.float32, "ieee")[0] < 1e-6
    error, launch = matmul(arch, torch.float32, "tf32")
    assert 1e-5 < error < 2e-3 and launch.counts.mma  # 10 bits of mantissa, not 23
    assert matmul(arch, torch.float32, "tf32x3")[0] < 2e-6


def test_blackwell_uses_packed_float32_fma():
    _, launch = matmul(100, torch.float32, "ieee")
    assert launch.counts.opcodes["fma.rn.f32x2"]


@every_architecture
def test_programs_may_run_loops_of_different_length(arch):
    counts = torch.tensor([0, 1, 127, 128, 129, 700, 3], dtype=torch.int32)
    x, out = random(7, 700), torch.full((7,), torch.nan)
    with executed(arch):
        row_sum_kernel[(7,)](x, counts, out, 700, BLOCK=128)
    exact = torch.stack([row[:n].double().sum() for row, n in zip(x, counts.tolist(), strict=True)])
    assert relative_error(out, exact) < 1e-6


@every_architecture
def test_programs_may_take_different_branches(arch):
    x, out = random(7, 256), torch.zeros(7, 256)
    with executed(arch):
        branch_kernel[(7,)](x, out, BLOCK=256)
    sign = torch.tensor([-1.0, 2, 0, 2, -1, 0, -1], dtype=torch.float64)[:, None]
    exact = sign * (x.double() + x.double().sum(1, keepdim=True))
    assert relative_error(out, exact) < 1e-6 and (out[[2, 5]] == 0).all()


@every_architecture
def test_threads_of_a_warp_may_take_different_branches(arch):
    """tl.cos branches for large arguments, and uses local memory and carries there."""
    x = torch.where(torch.arange(256) % 3 == 0, random(256) * 1e8, random(256))
    out = torch.full((256,), torch.nan)
    with executed(arch):
        cosine_kernel[(1,)](x, out, BLOCK=256)
    assert relative_error(out, x.double().cos()) < 1e-6


@every_architecture
def test_sort_and_argmax_match_torch(arch):
    x = random(512).mul(8).round()
    ordered, best = torch.empty_like(x), torch.zeros(1, dtype=torch.int32)
    with executed(arch):
        order_kernel[(1,)](x, ordered, best, BLOCK=512)
    assert torch.equal(ordered, x.sort().values)
    assert best.item() == (x == x.max()).nonzero()[0].item()


@every_architecture
def test_a_packed_key_keeps_the_lower_index_of_equal_scores(arch):
    scores = random(1024).clamp(max=1.5)
    out = torch.zeros(1, dtype=torch.int64)
    with executed(arch):
        key_kernel[(1,)](scores, out, BLOCK=1024)
    assert 0x7FFFFFFF - (out.item() & 0xFFFFFFFF) == (scores == scores.max()).nonzero()[0].item()


@every_architecture
def test_atomic_sums_lose_no_update(arch):
    index = torch.randint(0, 5, (512,), generator=torch.Generator().manual_seed(0))
    out = torch.zeros(5)
    with executed(arch):
        scatter_kernel[(2,)](index, random(512), out, BLOCK=256)
    exact = torch.zeros(5, dtype=torch.float64).index_add(0, index, random(512).double())
    assert relative_error(out, exact) < 1e-5


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, torch.int64])
def test_a_tile_is_transposed_through_shared_memory(arch, dtype):
    x = (50 * random(32, 64)).to(dtype)
    out = torch.zeros(64, 32, dtype=dtype)
    with executed(arch) as launches:
        transpose_kernel[(1,)](x, out, ROWS=32, COLUMNS=64)
    assert torch.equal(out, x.T) and launches[0].counts.shared_requests


@every_architecture
def test_a_histogram_in_shared_memory_matches_torch(arch):
    x = torch.randint(0, 16, (1024,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    out = torch.zeros(16, dtype=torch.int32)
    with executed(arch):
        histogram_kernel[(1,)](x, out, BLOCK=1024)
    assert torch.equal(out.long(), torch.bincount(x, minlength=16))


def test_a_while_loop_ends_separately_for_each_program():
    out = torch.zeros(12, dtype=torch.int32)
    with executed(90):
        collatz_kernel[(12,)](out)
    assert out.tolist() == [0, 1, 7, 2, 5, 8, 16, 3, 19, 6, 14, 9]


@every_architecture
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_divide_like_c(arch, dtype):
    generator = torch.Generator().manual_seed(0)
    high = 2 ** (28 if dtype == torch.int32 else 59)
    x = torch.randint(-high, high, (256,), generator=generator).to(dtype)
    y = torch.randint(1, 1000, (256,), generator=generator).to(dtype) * (2 * (torch.arange(256) % 2) - 1).to(dtype)
    out = torch.zeros(4, 256, dtype=dtype)
    with executed(arch):
        integer_kernel[(1,)](x, y, out, BLOCK=256)
    exact = [torch.div(x, y, rounding_mode="trunc"), torch.fmod(x, y), (x << 3) ^ (y >> 2)]
    assert torch.equal(out, torch.stack([*exact, torch.div(x, 7, rounding_mode="trunc")]))


@every_architecture
def test_a_tuple_of_pointers_is_flattened_into_parameters(arch):
    sources = (random(50), random(70, dtype=torch.float16), torch.arange(33), torch.zeros(0, dtype=torch.int8))
    targets = tuple(torch.empty_like(x) for x in sources)
    with executed(arch):
        copy_kernel[(1,)](sources, targets, tuple(x.numel() for x in sources), BLOCK=128)
    assert all(torch.equal(x, y) for x, y in zip(sources, targets, strict=True))


def test_program_ids_are_right_in_a_three_dimensional_grid():
    out = torch.zeros(4, 3, 9, dtype=torch.int32)
    with executed(90):
        grid_kernel[(9, 3, 4)](out)
    z, y, x = torch.meshgrid(*(torch.arange(n) for n in out.shape), indexing="ij")
    assert torch.equal(out.long(), x + 10 * y + 100 * z)


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_arithmetic_rounds_like_half_precision(arch, dtype):
    x, y = random(256, dtype=dtype), random(256, dtype=dtype, seed=1)
    out = torch.empty_like(x)
    with executed(arch):
        multiply_add_kernel[(1,)](x, y, out, BLOCK=256)
    exact = x.double() * y.double() + x.double()
    assert relative_error(out, exact) <= 2 * relative_error(x * y + x, exact)


# Single instructions

THREADS = 64
TEXT = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry probe(
	.param .u64 .ptr .global .align 1 probe_param_0,
	.param .u64 .ptr .global .align 1 probe_param_1
)
.reqntid 64
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<32>;
	.reg .b64 	%rd<16>;
	ld.param.b64 	%rd1, [probe_param_0];
	ld.param.b64 	%rd2, [probe_param_1];
	mov.u32 	%r1, %tid.x;
	mad.wide.u32 	%rd3, %r1, 4, %rd1;
	mad.wide.u32 	%rd4, %r1, 4, %rd2;
	ld.global.b32 	%r2, [%rd3];
BODY
	st.global.b32 	[%rd4], %r3;
	ret;
}
"""


def run_body(body, values, **options):
    """Run instructions in 64 threads with a 32-bit value in %r2; return each thread's %r3 as int32."""
    source = torch.as_tensor(values).to(torch.int32).broadcast_to(THREADS).contiguous()
    result = torch.zeros(THREADS, dtype=torch.int32)
    Program(ptx.parse(TEXT.replace("BODY", body)), 256, **options).run((1, 1, 1), [source, result])
    return result


def bits(value):
    return struct.unpack("<i", struct.pack("<f", value))[0]


LANE = torch.arange(THREADS, dtype=torch.int32)
TINY = 1e-40  # subnormal
INSTRUCTIONS = {
    "mul.hi.s32 %r3, %r2, %r2;": (-(2**20) - 5, (2**20 + 5) ** 2 >> 32),
    "mul.hi.u32 %r3, %r2, 3;": (-1, 2),
    "mul.wide.s32 %rd5, %r2, %r2; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r3, %rd5;": (-(2**20), 2**8),
    "cvt.s64.s32 %rd5, %r2; mul.hi.s64 %rd6, %rd5, 0x7000000000000000; cvt.u32.u64 %r3, %rd6;": (-7, -4),
    "cvt.u64.u32 %rd5, %r2; mul.hi.u64 %rd6, %rd5, -1; cvt.u32.u64 %r3, %rd6;": (7, 6),
    "mad.lo.s32 %r3, %r2, -3, 5;": (7, -16),
    "add.cc.u32 %r4, %r2, %r2; addc.u32 %r3, 0, 0;": (-1, 1),
    "sub.cc.u32 %r4, %r2, 1; subc.u32 %r3, 0, 0;": (0, -1),
    "bfe.u32 %r3, %r2, 4, 8;": (0x1234ABCD, 0xBC),
    "bfe.s32 %r3, %r2, 4, 8;": (0x1234ABCD, 0xBC - 256),
    "bfi.b32 %r3, 15, %r2, 8, 4;": (0, 0xF00),
    "brev.b32 %r3, %r2;": (1, -(2**31)),
    "popc.b32 %r3, %r2;": (-1, 32),
    "clz.b32 %r3, %r2;": (1, 31),
    "clz.b32 %r3, %r2; ": (0, 32),
    "bfind.u32 %r3, %r2;": (0x1000, 12),
    "bfind.u32 %r3, %r2; ": (0, -1),
    "mul.wide.u32 %rd5, %r2, %r2; popc.b64 %r3, %rd5;": (-1, 32),
    "shl.b32 %r3, 1, %r2;": (32, 0),
    "shr.s32 %r3, -8, %r2;": (40, -1),
    "shr.u32 %r3, -8, %r2;": (40, 0),
    "shf.l.wrap.b32 %r3, %r2, 1, 33;": (-1, 3),
    "prmt.b32 %r3, %r2, 0x44332211, 0x8765;": (-1, struct.unpack("<i", bytes([0x22, 0x33, 0x44, 0xFF]))[0]),
    "lop3.b32 %r3, %r2, 3, 5, 0x96;": (6, 6 ^ 3 ^ 5),
    "rem.s32 %r3, %r2, 3;": (-7, -1),
    "div.s32 %r3, %r2, 2;": (-7, -3),
    "abs.s32 %r3, %r2;": (-7, 7),
    "min.u32 %r3, %r2, 5;": (-1, 5),
    "setp.lt.s32 %p1, %r2, 0; selp.b32 %r3, 1, 2, %p1;": (-1, 1),
    "setp.lo.u32 %p1, %r2, 1; selp.b32 %r3, 1, 2, %p1;": (-1, 2),
    "setp.eq.s32 %p2, 0, 0; setp.gt.and.s32 %p1|%p3, %r2, 0, !%p2; selp.b32 %r3, 1, 2, %p1;": (5, 2),
    "setp.ne.f32 %p1, %r2, %r2; selp.b32 %r3, 1, 2, %p1;": (bits(math.nan), 2),
    "setp.neu.f32 %p1, %r2, %r2; selp.b32 %r3, 1, 2, %p1;": (bits(math.nan), 1),
    "setp.ltu.f32 %p1, %r2, 0f00000000; selp.b32 %r3, 1, 2, %p1;": (bits(math.nan), 1),
    "setp.num.f32 %p1, %r2, 0f00000000; selp.b32 %r3, 1, 2, %p1;": (bits(math.nan), 2),
    "max.f32 %r3, %r2, 0f3F800000;": (bits(math.nan), bits(1.0)),
    "max.f32 %r3, %r2, 0f3F800000, 0f40000000;": (bits(1.5), bits(2.0)),
    "min.xorsign.abs.f32 %r3, %r2, 0fBF800000;": (bits(-2.0), bits(1.0)),
    "max.NaN.f32 %r3, %r2, 0f3F800000; setp.nan.f32 %p1, %r3, %r3; selp.b32 %r3, 1, 2, %p1;": (bits(math.nan), 1),
    "add.f32 %r3, %r2, 0f00000000;": (bits(TINY), bits(TINY)),
    "add.ftz.f32 %r3, %r2, 0f00000000;": (bits(TINY), 0),
    "add.sat.f32 %r3, %r2, 0f3F800000;": (bits(0.5), bits(1.0)),
    "fma.rn.f32 %r3, %r2, %r2, 0fBF800000;": (bits(1 + 2**-12), bits(2**-11 + 2**-24)),
    "copysign.f32 %r3, 0fBF800000, %r2;": (bits(3.0), bits(-3.0)),
    "cvt.rzi.s32.f32 %r3, %r2;": (bits(-2.7), -2),
    "cvt.rni.s32.f32 %r3, %r2;": (bits(2.5), 2),
    "cvt.rmi.f32.f32 %r3, %r2;": (bits(-2.5), bits(-3.0)),
    "cvt.rpi.s32.f32 %r3, %r2;": (bits(2.1), 3),
    "cvt.rzi.u32.f32 %r3, %r2; ": (bits(-3.0), 0),
    "cvt.rzi.s32.f32 %r3, %r2; ": (bits(1e20), 2**31 - 1),
    "cvt.rzi.s32.f32 %r3, %r2;  ": (bits(math.nan), 0),
    "cvt.s8.s32 %rs1, %r2; cvt.s32.s16 %r3, %rs1;": (0x180, -128),
    "cvt.sat.u8.s32 %rs1, %r2; cvt.u32.u16 %r3, %rs1;": (-5, 0),
    "cvt.rna.tf32.f32 %r3, %r2;": (bits(1 + 2**-11), bits(1 + 2**-10)),
    "cvt.rn.tf32.f32 %r3, %r2;": (bits(1 + 2**-11), bits(1.0)),
    "cvt.rn.bf16.f32 %rs1, %r2; cvt.u32.u16 %r3, %rs1;": (bits(1 + 3 * 2**-8), 0x3F82),
    "cvt.rn.f16x2.f32 %r3, %r2, 0f3F800000;": (bits(2.0), 0x40003C00),
    "mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};": (0x12345678, 0x56781234),
    "add.f16x2 %r3, %r2, %r2;": (0x3C004000, 0x40004400),
    "fma.rn.bf16x2 %r3, %r2, %r2, %r2;": (0x3F803F80, 0x40004000),
    "mov.b64 %rd5, {%r2, %r2}; fma.rn.f32x2 %rd6, %rd5, %rd5, %rd5; mov.b64 {%r4, %r3}, %rd6;": (bits(3.0), bits(12.0)),
    "cvt.rn.f16.f32 %rs1, %r2; sub.rn.f32.f16 %r3, %rs1, 0f3F800000;": (bits(3.0), bits(2.0)),
    "mov.b32 {%rs1, %rs2}, %r2; fma.rn.f32.bf16 %r3, %rs2, %rs2, 0f3F800000;": (bits(3.0), bits(10.0)),
    "setp.eq.ftz.f32 %p1, %r2, 0f00000000; selp.b32 %r3, 1, 2, %p1;": (bits(TINY), 1),
    "ex2.approx.f32 %r3, %r2;": (bits(0.0), bits(1.0)),
    "lg2.approx.f32 %r3, %r2;": (bits(0.0), bits(-math.inf)),
    "vote.sync.ballot.b32 %r3, %p1, -1;": (0, 0),
    "setp.gt.s32 %p1, %r2, 30; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r3, 1, 2, %p2;": (LANE, 1),
    "setp.gt.s32 %p1, %r2, 31; vote.sync.ballot.b32 %r3, %p1, -1;": (LANE, -(LANE // 32)),
    "redux.sync.add.s32 %r3, %r2, -1;": (LANE, LANE // 32 * 1024 + 496),
    "match.any.sync.b32 %r3, %r2, -1;": (LANE % 2, torch.where(LANE % 2 == 0, 0x55555555, -0x55555556)),
    "shfl.sync.bfly.b32 %r3, %r2, 3, 31, -1;": (LANE, LANE ^ 3),
    "shfl.sync.idx.b32 %r3, %r2, 5, 31, -1;": (LANE, LANE // 32 * 32 + 5),
    "shfl.sync.up.b32 %r3, %r2, 4, 0, -1;": (LANE, torch.where(LANE % 32 >= 4, LANE - 4, LANE)),
    "shfl.sync.down.b32 %r3, %r2, 4, 31, -1;": (LANE, torch.where(LANE % 32 < 28, LANE + 4, LANE)),
    "shfl.sync.down.b32 %r3, %r2, 4, 0x181F, -1;": (LANE, torch.where(LANE % 8 < 4, LANE + 4, LANE)),
    "shfl.sync.up.b32 %r4|%p1, %r2, 1, 0, -1; selp.b32 %r3, 1, 0, %p1;": (LANE, (LANE % 32 > 0).int()),
    "activemask.b32 %r3;": (0, -1),
}


@pytest.mark.parametrize("body", INSTRUCTIONS)
def test_an_instruction_matches_the_ptx_manual(body):
    value, expected = INSTRUCTIONS[body]
    expected = torch.as_tensor(expected).to(torch.int64).broadcast_to(THREADS)
    assert torch.equal(run_body(body, value), expected.to(torch.int32))


def test_diverged_threads_reconverge():
    """Each thread counts up to its own number; the shuffle after the loop needs all threads."""
    body = """
	mov.u32 	%r3, 0;
$L_loop:
	setp.ge.s32 	%p1, %r3, %r2;
	@%p1 bra 	$L_done;
	add.s32 	%r3, %r3, 1;
	bra.uni 	$L_loop;
$L_done:
	shfl.sync.bfly.b32 	%r3, %r3, 1, 31, -1;
"""
    numbers = torch.tensor([7, 0, 3, 9], dtype=torch.int32).repeat(THREADS // 4)
    assert torch.equal(run_body(body, numbers), numbers.view(-1, 2).flip(1).reshape(-1))


def test_a_thread_may_return_before_the_others():
    body = "\tsetp.gt.s32 \t%p1, %r1, 40;\n\tmov.u32 \t%r3, 1;\n\t@%p1 ret;"
    assert run_body(body, 0).sum() == 41


def test_the_error_names_an_unknown_instruction():
    for name in ("wgmma.fence.sync.aligned", "tcgen05.wait.ld.sync.aligned", "add.rz.f32", "mul.f32.f16"):
        with pytest.raises(NotImplementedError, match=re.escape(name)):
            run_body(f"{name};", 0)


# Undefined behaviour


@every_architecture
def test_a_forgotten_mask_is_detected(arch):
    """The tensors are adjacent in memory: an access out of one must not pass as an access to the next."""
    x, y, out = torch.zeros(3, 1000).unbind()
    with executed(arch), pytest.raises(OutOfBounds, match="outside x, .* of its 4000"):
        add_kernel[(4,)](x[:1000], y, out, 1001, BLOCK=256)


def test_a_strided_view_is_bounded_by_its_storage_and_a_contiguous_tensor_by_itself():
    storage = random(64)
    with executed(90):
        add_kernel[(1,)](storage[::2], storage[::2], torch.empty(64), 64, BLOCK=64)
    with executed(90), pytest.raises(OutOfBounds):
        add_kernel[(1,)](storage[:32], storage[:32], torch.empty(64), 64, BLOCK=64)


def test_a_misaligned_vector_load_is_detected():
    def shift_address(text):
        return re.sub(r"(ld\.global\.v4[^\[]*\[ %rd\d+ \+) 0", r"\1 4", text)

    x = random(1024)
    with executed(90, mutate=shift_address), pytest.raises(Misaligned):
        add_kernel[(1,)](x, x, torch.empty(1024), 1024, BLOCK=1024)


def without(pattern, number):
    """A mutation that removes match `number` of a pattern."""

    def mutate(text):
        match = list(re.finditer(pattern, text))[number]
        return text[: match.start()] + text[match.end() :]

    return mutate


def occurrences(pattern, arch, dtype):
    with recorded() as launches:
        a, b = random(16, 96, dtype=dtype), random(96, 64, dtype=dtype)
        matmul_kernel[(1,)](a, b, torch.empty(16, 64), 96, DEPTH=32, COLUMNS=64, PRECISION="tf32", num_stages=3)
    return len(re.findall(pattern, compile_launch(launches[0], arch).asm["ptx"]))


BARRIER, WAIT = r"\bbar\.sync[^;]*;", r"\bcp\.async\.wait_group[^;]*;"


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_missing_barrier_is_detected(arch, dtype):
    number = occurrences(BARRIER, arch, dtype)
    assert number > 1
    for i in range(1, number):  # the first separates two copies to different addresses
        with pytest.raises(BarrierRace, match="test_executor.py"):
            matmul(arch, dtype, "tf32", mutate=without(BARRIER, i))


@every_architecture
def test_a_missing_wait_for_a_copy_is_detected(arch):
    assert occurrences(WAIT, arch, torch.float16)
    with pytest.raises(BarrierRace, match="cp.async"):
        matmul(arch, torch.float16, "tf32", mutate=without(WAIT, 0))


def test_a_copy_that_is_not_waited_for_leaves_poison():
    error, _ = matmul(90, torch.float16, "tf32", races=False, mutate=lambda text: re.sub(WAIT, "", text))
    assert math.isnan(error)


def test_a_missing_barrier_in_a_reduction_is_detected():
    x = random(1, 512)
    with executed(90, mutate=without(BARRIER, 0)), pytest.raises(BarrierRace):
        softmax_kernel[(1,)](x, torch.empty_like(x), 512, BLOCK=512)


def test_warps_may_store_equal_values_to_one_address_but_not_different_ones():
    store = "mov.b32 %r4, global_smem; st.shared.b32 [%r4], {}; bar.sync 0; ld.shared.b32 %r3, [%r4];"
    assert (run_body(store.format("%r2"), 5) == 5).all()
    with pytest.raises(BarrierRace):
        run_body(store.format("%r1"), 0)


def test_different_warps_may_write_the_two_halves_of_a_word():
    body = """
	shr.u32 	%r4, %r1, 5;
	shl.b32 	%r4, %r4, 1;
	cvt.u16.u32 	%rs1, %r1;
	mov.b32 	%r5, global_smem;
	add.s32 	%r4, %r4, %r5;
	and.b32 	%r6, %r1, 31;
	setp.eq.s32 	%p1, %r6, 0;
	@%p1 st.shared.b16 	[%r4], %rs1;
	bar.sync 	0;
	ld.shared.b32 	%r3, [%r5];
"""
    assert (run_body(body, 0) == 32 << 16).all()


def test_shared_memory_starts_poisoned_and_is_bounded_by_its_size():
    read = "mov.b32 %r4, global_smem; ld.shared.b32 %r3, [%r4+{}];"
    assert (run_body(read.format(252), 0) == -1).all()
    with pytest.raises(OutOfBounds):
        run_body(read.format(256), 0)


def test_part_of_a_warp_at_a_shuffle_is_detected():
    body = "setp.gt.s32 %p1, %r1, 40;\n@%p1 bra $L_end;\nshfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;\n$L_end:"
    with pytest.raises(IllegalDivergence):
        run_body(body, 0)


def test_part_of_a_cta_at_a_barrier_is_detected():
    body = "setp.gt.s32 %p1, %r1, 31;\n@%p1 bra $L_end;\nbar.sync 0;\n$L_end:"
    with pytest.raises(IllegalDivergence):
        run_body(body, 0)


def test_an_endless_loop_is_detected():
    with pytest.raises(EndlessLoop):
        run_body("$L_loop:\nbra.uni $L_loop;", 0, max_blocks=100)


# Counts


def test_sectors_and_bytes_are_counted():
    x = random(1024)
    with executed(90) as launches:
        add_kernel[(1,)](x, x, torch.empty(1024), 1024, BLOCK=1024)
    counts = launches[0].counts
    assert (counts.global_load_bytes, counts.global_load_sectors) == (2 * 4096, 2 * 128)
    assert (counts.global_store_bytes, counts.global_store_sectors, counts.global_store_requests) == (4096, 128, 8)


@pytest.mark.parametrize(("stride", "conflicts"), [(1, 1), (2, 2), (32, 32), (33, 1)])
def test_bank_conflicts_are_counted(stride, conflicts):
    body = f"mov.b32 %r4, global_smem; mad.lo.s32 %r4, %r1, {4 * stride}, %r4; st.shared.b32 [%r4], %r1;"
    source, result = torch.zeros(2, THREADS, dtype=torch.int32)
    counts = Program(ptx.parse(TEXT.replace("BODY", body)), 4 * 33 * THREADS).run((1, 1, 1), [source, result])
    assert (counts.shared_requests, counts.shared_wavefronts) == (2, 2 * conflicts)


def test_16_byte_accesses_take_four_wavefronts_per_warp():
    body = "mov.b32 %r4, global_smem; mad.lo.s32 %r4, %r1, 16, %r4; st.shared.v4.b32 [%r4], {%r1, %r1, %r1, %r1};"
    source, result = torch.zeros(2, THREADS, dtype=torch.int32)
    counts = Program(ptx.parse(TEXT.replace("BODY", body)), 16 * THREADS).run((1, 1, 1), [source, result])
    assert counts.shared_wavefronts == 2 * 4


# Compiling


def test_a_launch_is_specialised_as_by_the_jit():
    x = random(1024)
    with recorded() as launches:
        add_kernel[(1,)](x, x, torch.empty(1024), 1024, BLOCK=256)
        add_kernel[(1,)](x, x, torch.empty(1024), 1023, BLOCK=256)
        add_kernel[(1,)](x[1:], x, torch.empty(1024), 1024, BLOCK=256)
        add_kernel[(1,)](x, x, torch.empty(1024), 2048, BLOCK=256)
        add_kernel[lambda arguments: (arguments["n"],)](x, x, torch.empty(1024), n=1, BLOCK=256, num_warps=2)
    aligned, odd_size, odd_pointer, other_size, one = (compile_launch(launch, 90) for launch in launches)
    assert aligned is other_size
    assert len({id(x) for x in (aligned, odd_size, odd_pointer, one)}) == 4
    assert launches[-1].grid == (1, 1, 1) and launches[-1].options == {"num_warps": 2}
    assert one.src.signature["n"] == "constexpr" and aligned.src.signature["n"] == "i32"


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "gfx942"])
def test_resources_are_read_from_the_machine_code(arch):
    with recorded() as launches:
        a, b = random(16, 96, dtype=torch.float16), random(96, 64, dtype=torch.float16)
        out = torch.full((16, 64), 7.0)
        matmul_kernel[(1,)](a, b, out, 96, DEPTH=32, COLUMNS=64, PRECISION="tf32", num_stages=3)
    assert (out == 7).all()  # recorded, not run
    used = resources(compile_launch(launches[0], arch))
    assert used.shared >= 2 * 32 * 64
    if arch == "gfx942":
        assert used.vgprs and used.count("v_mfma") and not used.spills
    else:
        assert used.registers and used.count("HMMA") and used.count("LDGSTS") and not used.stack


def test_numpy_rounds_as_the_executor_needs():
    """The executor relies on numpy to round float32 and float64 to half precision: to nearest, ties to even."""
    values = np.array([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-40, 2**-25], np.float64)
    assert values.astype(np.float16).tolist() == [1.0, 1 + 2**-9, 1 + 2**-10, 0.0]


# Launches that recur


@pytest.fixture
def add_twice(tmp_path, monkeypatch):
    """A function (first, second): adds twice with these changes, and returns the results and how often it was run."""
    runs, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda *args: runs.append(1) or run(*args))

    def add_twice(first, second):
        results = []
        for changes in (first, second):
            options = {
                "arch": 90,
                "adds": True,
                "ulps": 0,
                "kernel": add_kernel,
                "x": random(1000),
                "grid": 4,
            } | changes
            x, y, out = options["x"], random(1000, seed=1), torch.full((1000,), torch.nan)
            memo = Memo(tmp_path, options["adds"])
            with executed(options["arch"], approx_ulps=options["ulps"], memo=memo) as launches:
                inputs = (x, y) if options["kernel"] is add_kernel else (x,)
                options["kernel"][(options["grid"],)](*inputs, out, 1000, BLOCK=1024)
            results.append((out, launches[0].counts))
        return *results, len(runs)

    return add_twice


@pytest.mark.parametrize("changes", [{}, {"arch": 80}, {"ulps": 2}, {"adds": False}], ids=str)
def test_a_launch_that_recurs_is_not_executed_again(changes, add_twice):
    (first, counts), (second, counts_again), runs = add_twice({}, changes)
    assert torch.equal(first, random(1000) + random(1000, seed=1)) and torch.equal(first, second)
    assert counts == counts_again and runs == 1


@pytest.mark.parametrize(
    "x",
    [random(1000, seed=2), random(1000).where(torch.arange(1000) < 999, 7.0), random(1001)[1:]],
    ids=["other values", "one value", "offset"],
)
def test_a_launch_with_other_arguments_is_executed(x, add_twice):
    _, (second, _), runs = add_twice({}, {"x": x})
    assert torch.equal(second, x + random(1000, seed=1)) and runs == 2


def test_a_launch_with_another_grid_is_executed(add_twice):
    assert add_twice({}, {"grid": 2})[2] == 2


def test_a_launch_whose_approximations_are_perturbed_is_executed(add_twice):
    softmax = {"kernel": softmax_kernel, "grid": 1}
    (first, _), (second, _), runs = add_twice(softmax, softmax | {"ulps": 2})
    assert not torch.equal(first, second) and runs == 2


def test_results_are_kept_only_if_asked(add_twice):
    assert add_twice({"adds": False}, {})[2] == 2


def test_a_launch_that_fails_fails_again(add_twice):
    for _ in range(2):
        with pytest.raises(OutOfBounds):
            add_twice({"x": random(999)}, {})
