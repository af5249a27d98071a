"""Rung 3: the resource budget of each kernel on each GPU, at the shapes of real training and decoding.

    PYTHONPATH=tests python -m gpu_proof.budgets > budgets.csv

prints the current measurements as a new table.

The budgets of registers and shared memory protect occupancy. On NVIDIA GPUs nothing may spill. For AMD GPUs the kernels
are compiled but not tuned: spills must not grow.
"""

import csv
import functools
import math
import pathlib
import re
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, fields, replace

import torch

from gpu_proof.cases import BF16, FP16, FP32, launcher, matmul_precision, unroll_inputs
from gpu_proof.process import compiled

TABLE = pathlib.Path(__file__).with_name("budgets.csv")
ARCHITECTURES = (80, 86, 90, 100, 120, "gfx942")
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes per CTA
REGISTERS, WARPS, CTAS = 65536, 64, 32  # per NVIDIA multiprocessor
REGISTER_GRANULE = 8  # registers per thread are allocated in multiples of this
RESERVED_SHARED = 1024  # bytes of shared memory that CUDA reserves per CTA
WIDE_LOAD = r"(LDG|LDGSTS)\S*\.128"
MATRIX = r"HMMA|HGMMA|QGMMA|UTC\w*MMA"
SPILL = r"LDL|STL"
EXACT_DIVISION = ("topk_kernel", "row_kernel")  # their quotients rank hypotheses and must equal those of a CPU
INEXACT_DIVISION = r"\b(div|rcp)\.(full|approx)"


@dataclass(frozen=True)
class Variant:
    """A call of a launcher, and requirements on its machine code."""

    op: str
    name: str
    launch: Callable  # (**options): call the launcher on CPU tensors of the real shape
    options: dict = field(default_factory=dict)
    matrix: tuple[str, ...] = ()  # kernels that must use matrix units
    wide: tuple[str, ...] = ()  # kernels that must load 16 bytes per lane

    def __str__(self):
        return f"{self.op}-{self.name}"


def attend(B=64, K=8, T=400, D=256, E=256, dtype=FP16, weights=False, precision="highest"):
    """One decoding step of 64 utterances of 16 s each."""
    query, keys, values = (torch.zeros(shape, dtype=dtype) for shape in ((B, K, D), (B, T, D), (B, T, E)))
    with matmul_precision(precision):
        launcher("masked_attention")(query, keys, values, torch.full((B,), T), D**-0.5, weights)


def differentiate(B=32, K=1, T=400, D=256, E=256, dtype=BF16, weights=False, memory=True, precision="highest"):
    """The backward pass of one training step."""
    query, keys, values = (torch.zeros(shape, dtype=dtype) for shape in ((B, K, D), (B, T, D), (B, T, E)))
    context, attended, logsumexp = torch.zeros(B, K, E, dtype=dtype), torch.zeros(B, K, T), torch.zeros(B, K)
    inputs, outputs = (query, keys, values, torch.full((B,), T)), (context, attended, logsumexp)
    launch = launcher("masked_attention", "masked_attention_backward")
    with matmul_precision(precision):
        launch(context, attended if weights else None, *inputs, *outputs, D**-0.5, memory)


def prune(B=64, K=8, V=31, dtype=FP32, ngram=False, length_penalty=0.0, eos_threshold=0.0, limits=True,
          ctc=False, beam_threshold=math.inf):  # fmt: skip
    """One pruning step of a search over characters or word pieces."""
    logits, scores = torch.zeros(B, K, V, dtype=dtype), torch.zeros(B, K)
    lengths = torch.zeros(B, K, dtype=torch.int64)
    limit = torch.zeros(B, dtype=torch.int64) if limits else None
    ngram_log_probs = torch.zeros(B, K, V) if ngram else None
    next_log_probs = torch.zeros(B, K, V) if ctc else None
    options = (2, limit, limit, length_penalty, eos_threshold, None, ngram_log_probs, 0.3, next_log_probs, 0.3)
    options += (beam_threshold,)
    launcher("beam_topk")(logits, scores, lengths.bool(), lengths, *options)


def gather(B=64, K=8, sizes=(512, 512, 512, 512, 256), dtype=FP32):
    """Gather the states of two LSTM cells and the context by their parents."""
    states = [torch.zeros(B, K, n, dtype=dtype) for n in sizes]
    launcher("beam_gather")(states, torch.zeros(B, K, dtype=torch.int64))


def prefix(B=64, K=8, T=400, V=31):
    """One CTC prefix step of a search over characters or word pieces."""
    rows = torch.zeros(B, K, dtype=torch.int64)
    states = torch.zeros(B, K, T + 1), torch.zeros(B, K), torch.zeros(B, K, V)
    launcher("ctc_prefix")(torch.zeros(B, T, V), *states, rows, rows, rows, 2)


def score_ngrams(B=64, K=8, V=31, order=10):
    """One step of an n-gram model of a search over characters or word pieces."""
    rows, arcs = (torch.zeros(size, dtype=torch.int32) for size in ((100, 2 * -(-V // 32) + 2), (100, 2)))
    launcher("ngram_scores")(rows, arcs, V, order, *[torch.zeros(B, K, dtype=torch.int64)] * 3)


def align(B=4, T=645, V=31, S=188):
    """The CTC loss of a batch of training, at half the rate of the feature frames."""
    launcher("ctc_loss")(torch.zeros(B, T, V), torch.full((B,), T), torch.ones(B, S).long(), torch.full((B,), S), True)


def backtrack(L=200, B=64, K=8):
    """Backtrack a search of 200 steps."""
    tokens = torch.zeros(L, B, K, dtype=torch.int64)
    launcher("beam_backtrack")(tokens, tokens, torch.zeros(L, B, K), tokens, 2)


def unroll(B=49, U=2, T=161, V=31, M=256, H=(512, 256), D=256, E=256, dtype=BF16):
    """Forward and backward pass of the decoder of preset hw4p2, with sampling, on its typical batch."""
    inputs = unroll_inputs(V, M, H, D, E, T, B, U, (T,), True, 0.5, 1.0, 0)
    logits, attention, *saved = launcher("speller_unroll")(*inputs, dtype == BF16, True)
    launcher("speller_unroll", "speller_unroll_backward")(
        logits, attention, *inputs[:4], inputs[6], attention, *saved, dtype == BF16
    )


FORWARD, BACKWARD = ("forward_kernel",), ("backward_kernel",)
UNROLL_MATMULS = ("cell_kernel", "cell_gradient_kernel", "input_gradient_kernel")
UNROLL_ATTENTION = ("attend_kernel", "attend_gradient_kernel")
VARIANTS = [
    *(
        Variant("masked_attention", name, attend, options, matrix=FORWARD if matrix else (), wide=FORWARD)
        for name, matrix, options in (
            ("half-beam-8", True, {}),
            ("half-beam-8-one-utterance", True, {"B": 1, "T": 1600}),
            ("half-beam-1-weights", False, {"K": 1, "weights": True}),
            ("half-beam-32", True, {"K": 32}),
            ("half-beam-64", True, {"K": 64}),
            ("half-beam-8-narrow", True, {"D": 128, "E": 512}),
            ("bf16-beam-8", True, {"dtype": BF16}),
            ("bf16-beam-8-weights", True, {"dtype": BF16, "weights": True}),
            ("half-beam-8-wide", True, {"D": 512, "E": 512}),
            ("half-beam-32-wide", True, {"K": 32, "D": 512, "E": 512}),
            ("float-beam-8-wide", False, {"dtype": FP32, "D": 512, "E": 512}),
            ("float-beam-8", False, {"dtype": FP32}),
            ("float-beam-32", False, {"dtype": FP32, "K": 32}),
            ("float-beam-64", False, {"dtype": FP32, "K": 64}),
            ("float-beam-1-weights", False, {"dtype": FP32, "K": 1, "weights": True}),
            ("tf32-beam-8", True, {"dtype": FP32, "precision": "medium"}),
            ("tf32-beam-64", True, {"dtype": FP32, "K": 64, "precision": "high"}),
        )
    ),
    *(
        Variant("masked_attention", name, differentiate, options, matrix=BACKWARD if matrix else (), wide=BACKWARD)
        for name, matrix, options in (
            ("backward-bf16", True, {}),
            ("backward-bf16-weights", True, {"weights": True}),
            ("backward-half-32-queries", True, {"dtype": FP16, "K": 32}),
            ("backward-half-64-queries", True, {"dtype": FP16, "K": 64}),
            ("backward-float", False, {"dtype": FP32}),
            ("backward-float-64-queries", False, {"dtype": FP32, "K": 64}),
            ("backward-tf32", True, {"dtype": FP32, "precision": "medium"}),
        )
    ),
    *(
        Variant("beam_topk", name, prune, options, wide=wide)
        for name, wide, options in (
            ("characters", (), {}),
            ("characters-half", (), {"dtype": FP16}),
            ("characters-beam-32", (), {"K": 32}),
            ("characters-n-gram", (), {"ngram": True, "length_penalty": 0.6, "eos_threshold": 1.5}),
            ("characters-ctc", (), {"ctc": True, "length_penalty": 1.0}),
            ("characters-beam-threshold", (), {"length_penalty": 1.0, "beam_threshold": 4.0}),
            ("word-pieces", ("row_kernel",), {"V": 5120}),
            ("word-pieces-beam-threshold", ("row_kernel",), {"V": 5120, "length_penalty": 0.6, "beam_threshold": 4.0}),
            ("word-pieces-half-penalty", ("row_kernel",), {"V": 5120, "dtype": FP16, "length_penalty": 0.6}),
            ("word-pieces-unaligned", (), {"V": 5003}),
        )
    ),
    Variant("beam_gather", "float", gather, wide=("gather_kernel",)),
    Variant("beam_gather", "bf16", gather, {"dtype": BF16}),
    Variant("ctc_prefix", "characters", prefix),
    Variant("ctc_prefix", "word-pieces", prefix, {"V": 5120}),
    Variant("ngram_scores", "characters", score_ngrams),
    Variant("ngram_scores", "word-pieces", score_ngrams, {"V": 5120}),
    Variant("ctc_loss", "characters", align),
    Variant("ctc_loss", "long", align, {"S": 700}),
    Variant("ctc_loss", "short", align, {"S": 50}),
    Variant("beam_backtrack", "beam-8", backtrack),
    Variant("beam_backtrack", "beam-32", backtrack, {"K": 32}),
    Variant("speller_unroll", "bf16-hw4p2", unroll, matrix=UNROLL_MATMULS, wide=(*UNROLL_MATMULS, *UNROLL_ATTENTION)),
    Variant("speller_unroll", "float-hw4p2", unroll, {"dtype": FP32}, wide=(*UNROLL_MATMULS, *UNROLL_ATTENTION)),
]


@dataclass(frozen=True)
class Row:
    """Resources of one kernel of one variant on one architecture, as measured or as limits in the table."""

    variant: str
    kernel: str
    arch: str
    warps: int  # per CTA; exact
    registers: int  # per thread; upper limit
    shared: int  # bytes per CTA; upper limit
    ctas: int  # per multiprocessor, 0 for AMD; lower limit
    wide_loads: int  # instructions that load 16 bytes per lane; lower limit
    matrix: int  # matrix instructions; lower limit
    spilled: int  # bytes per thread plus spill instructions; on AMD registers and scratch bytes; upper limit

    @property
    def key(self):
        return self.variant, self.kernel, self.arch


def measure(variant, arch):
    """Compile the launches of a variant for an architecture: one Row per kernel. Call it in a compiling worker."""
    from gpu_proof.compiler import compile_launch, recorded, resources

    with recorded() as launches:
        variant.launch(**variant.options)
    rows: dict[str, list[Row]] = {}
    for launch in launches:
        row = _row(str(variant), launch.name, arch, compile_launch(launch, arch), resources)
        rows.setdefault(launch.name, []).append(row)
    return [_worst(group) for group in rows.values()]


def _worst(rows):
    """The worst value of each resource over the specialisations of one kernel."""
    first, *_ = rows
    largest = {name: max(getattr(row, name) for row in rows) for name in ("registers", "shared", "spilled")}
    smallest = {name: min(getattr(row, name) for row in rows) for name in ("ctas", "wide_loads", "matrix")}
    return replace(first, **largest, **smallest)


def inexact_divisions(variant, arch):
    """Names of the variant's kernels in EXACT_DIVISION whose PTX has divisions that are not rounded as by IEEE 754.

    Call it in a compiling worker.
    """
    from gpu_proof.compiler import compile_launch, recorded

    with recorded() as launches:
        variant.launch(**variant.options)
    ptx = {launch.name: compile_launch(launch, arch).asm["ptx"] for launch in launches if launch.name in EXACT_DIVISION}
    return [name for name, text in ptx.items() if re.search(INEXACT_DIVISION, text)]


def _row(variant, kernel, arch, binary, resources):
    used, warps = resources(binary), binary.metadata.num_warps
    if arch == "gfx942":
        matrix, wide = used.count("v_mfma"), used.count(r"(global|buffer)_load_dwordx4")
        spilled = used.spills + used.private
        return Row(variant, kernel, arch, warps, used.vgprs, used.shared, 0, wide, matrix, spilled)
    by_registers = REGISTERS // (_allocated(used.registers) * 32 * warps)
    by_memory = SHARED_LIMIT[arch] // (used.shared + RESERVED_SHARED)
    ctas = min(by_registers, by_memory, WARPS // warps, CTAS)
    spilled = used.stack + used.local + used.count(SPILL)
    counts = used.count(WIDE_LOAD), used.count(MATRIX)
    return Row(variant, kernel, str(arch), warps, used.registers, used.shared, ctas, *counts, spilled)


def _allocated(registers):
    return -(-registers // REGISTER_GRANULE) * REGISTER_GRANULE


def violations(variant, row, budget):
    """A sentence per rule or limit that a measured row violates. `budget` is its row in the table, or None."""
    problems = [] if row.arch == "gfx942" else _rule_violations(variant, row)
    if budget is None:
        return [*problems, "has no row in budgets.csv"]
    if row.warps != budget.warps:
        problems.append(f"{row.warps} warps, not {budget.warps}")
    for name in ("registers", "shared", "spilled"):
        if getattr(row, name) > getattr(budget, name):
            problems.append(f"{getattr(row, name)} {name}, at most {getattr(budget, name)} are budgeted")
    for name in ("ctas", "wide_loads", "matrix"):
        if getattr(row, name) < getattr(budget, name):
            problems.append(f"{getattr(row, name)} {name}, at least {getattr(budget, name)} are budgeted")
    return problems


def _rule_violations(variant, row):
    """A sentence per violation that no budget may allow on NVIDIA GPUs."""
    limit = SHARED_LIMIT[int(row.arch)]
    rules = [
        (row.spilled, f"spills registers ({row.spilled})"),
        (row.shared > limit, f"{row.shared} bytes of shared memory, more than {limit}"),
        (row.kernel in variant.matrix and not row.matrix, "no matrix instructions"),
        (row.kernel in variant.wide and not row.wide_loads, "no 128-bit loads"),
    ]
    return [sentence for violated, sentence in rules if violated]


@functools.cache
def table():
    """The checked-in budgets by Row.key."""
    with TABLE.open() as file:
        rows = [Row(*(field.type(row[field.name]) for field in fields(Row))) for row in csv.DictReader(file)]
    return {row.key: row for row in rows}


def main():
    """Print the current measurements as a new table."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    for variant in VARIANTS:
        for arch in ARCHITECTURES:
            for row in dict.fromkeys(compiled(measure, variant, arch)):  # a kernel may be launched twice
                writer.writerow(astuple(replace(row, registers=_allocated(row.registers))))


if __name__ == "__main__":
    main()
