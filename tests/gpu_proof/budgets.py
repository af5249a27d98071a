"""Rung 3: the resource budget of each kernel on each GPU, at the shapes of real training and decoding.

    PYTHONPATH=tests python -m gpu_proof.budgets > budgets.csv

prints the table as measured now.

The budget of registers and shared memory guards the number of programs per multiprocessor. On NVIDIA GPUs nothing may
spill. For AMD GPUs the kernels are compiled but not tuned: spills must not grow.
"""

import csv
import functools
import pathlib
import re
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, fields, replace

import torch

from gpu_proof.cases import BRAIN, FLOAT, HALF, launcher, matmul_precision, unroll_inputs
from gpu_proof.process import compiled

TABLE = pathlib.Path(__file__).with_name("budgets.csv")
ARCHITECTURES = (80, 86, 90, 100, 120, "gfx942")
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes per CTA
REGISTERS, WARPS, CTAS = 65536, 64, 32  # per NVIDIA multiprocessor
GRANULE = 8  # registers per thread are allocated in multiples of this
RESERVED = 1024  # bytes of shared memory per CTA that the system reserves
WIDE_LOAD = r"(LDG|LDGSTS)\S*\.128"
MATRIX = r"HMMA|HGMMA|QGMMA|UTC\w*MMA"
SPILL = r"LDL|STL"
EXACT = ("topk_kernel", "row_kernel")  # their divisions decide between hypotheses of equal rank
INEXACT = r"\b(div|rcp)\.(full|approx)"


@dataclass(frozen=True)
class Variant:
    """A way to call a launcher, and requirements on the machine code that it launches."""

    op: str
    name: str
    launch: Callable  # (**options): calls the launcher on CPU tensors of the real shape
    options: dict = field(default_factory=dict)
    matrix: tuple[str, ...] = ()  # kernels that must use matrix units
    wide: tuple[str, ...] = ()  # kernels that must load 16 bytes per lane

    def __str__(self):
        return f"{self.op}-{self.name}"


def attend(B=64, K=8, T=400, D=256, E=256, dtype=HALF, weights=False, precision="highest"):
    """One decoding step of 64 utterances of 16 s."""
    query, keys, values = (torch.zeros(shape, dtype=dtype) for shape in ((B, K, D), (B, T, D), (B, T, E)))
    with matmul_precision(precision):
        launcher("masked_attention")(query, keys, values, torch.full((B,), T), D**-0.5, weights)


def differentiate(B=32, K=1, T=400, D=256, E=256, dtype=BRAIN, weights=False, memory=True, precision="highest"):
    """The backward pass of one step of training."""
    query, keys, values = (torch.zeros(shape, dtype=dtype) for shape in ((B, K, D), (B, T, D), (B, T, E)))
    context, attended, logsumexp = torch.zeros(B, K, E, dtype=dtype), torch.zeros(B, K, T), torch.zeros(B, K)
    inputs, outputs = (query, keys, values, torch.full((B,), T)), (context, attended, logsumexp)
    launch = launcher("masked_attention", "masked_attention_backward")
    with matmul_precision(precision):
        launch(context, attended if weights else None, *inputs, *outputs, D**-0.5, memory)


def prune(B=64, K=8, V=31, dtype=FLOAT, order=None, length_penalty=0.0, eos_threshold=0.0, limits=True,
          ctc=False):  # fmt: skip
    """One pruning step of a search over characters or word pieces."""
    logits, scores = torch.zeros(B, K, V, dtype=dtype), torch.zeros(B, K)
    lengths = torch.zeros(B, K, dtype=torch.int64)
    limit = torch.zeros(B, dtype=torch.int64) if limits else None
    table, states = (None, None) if order is None else (torch.zeros(V ** (order - 1), V), lengths)
    gains = torch.zeros(B, K, V) if ctc else None
    options = (2, limit, limit, length_penalty, eos_threshold, None, table, states, 0.3, gains, 0.3)
    launcher("beam_topk")(logits, scores, lengths.bool(), lengths, *options)


def gather(B=64, K=8, sizes=(512, 512, 512, 512, 256), dtype=FLOAT):
    """Gather the states of two LSTM cells and the context by their parents."""
    states = [torch.zeros(B, K, n, dtype=dtype) for n in sizes]
    launcher("beam_gather")(states, torch.zeros(B, K, dtype=torch.int64))


def prefix(B=64, K=8, T=400, V=31):
    """One CTC prefix step of a search over characters or word pieces."""
    rows = torch.zeros(B, K, dtype=torch.int64)
    states = torch.zeros(B, K, T + 1), torch.zeros(B, K), torch.zeros(B, K, V)
    launcher("ctc_prefix")(torch.zeros(B, T, V), *states, rows, rows, rows, 2)


def backtrack(L=200, B=64, K=8):
    """Backtrack a search of 200 steps."""
    tokens = torch.zeros(L, B, K, dtype=torch.int64)
    launcher("beam_backtrack")(tokens, tokens, torch.zeros(L, B, K), tokens, 2)


def unroll(B=49, U=2, T=161, V=31, M=256, H=(512, 256), D=256, E=256, dtype=BRAIN):
    """Forward and backward pass of the decoder of preset hw4p2, with sampling, on its typical batch."""
    inputs = unroll_inputs(V, M, H, D, E, T, B, U, (T,), True, 0.5, 1.0, 0)
    logits, attention, *saved = launcher("speller_unroll")(*inputs, dtype == BRAIN, True)
    launcher("speller_unroll", "speller_unroll_backward")(
        logits, attention, *inputs[:4], inputs[6], attention, *saved, dtype == BRAIN
    )


FORWARD, BACKWARD = ("forward_kernel",), ("backward_kernel",)
LAYERS = ("cell_kernel", "cell_gradient_kernel", "input_gradient_kernel")
READS = ("attend_kernel", "attend_gradient_kernel")
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
            ("brain-beam-8", True, {"dtype": BRAIN}),
            ("brain-beam-8-weights", True, {"dtype": BRAIN, "weights": True}),
            ("half-beam-8-wide", True, {"D": 512, "E": 512}),
            ("float-beam-8-wide", False, {"dtype": FLOAT, "D": 512, "E": 512}),
            ("float-beam-8", False, {"dtype": FLOAT}),
            ("float-beam-32", False, {"dtype": FLOAT, "K": 32}),
            ("float-beam-64", False, {"dtype": FLOAT, "K": 64}),
            ("float-beam-1-weights", False, {"dtype": FLOAT, "K": 1, "weights": True}),
            ("tf32-beam-8", True, {"dtype": FLOAT, "precision": "medium"}),
            ("tf32-beam-64", True, {"dtype": FLOAT, "K": 64, "precision": "high"}),
        )
    ),
    *(
        Variant("masked_attention", name, differentiate, options, matrix=BACKWARD if matrix else (), wide=BACKWARD)
        for name, matrix, options in (
            ("backward-brain", True, {}),
            ("backward-brain-weights", True, {"weights": True}),
            ("backward-half-32-queries", True, {"dtype": HALF, "K": 32}),
            ("backward-half-64-queries", True, {"dtype": HALF, "K": 64}),
            ("backward-float", False, {"dtype": FLOAT}),
            ("backward-float-64-queries", False, {"dtype": FLOAT, "K": 64}),
            ("backward-tf32", True, {"dtype": FLOAT, "precision": "medium"}),
        )
    ),
    *(
        Variant("beam_topk", name, prune, options, wide=wide)
        for name, wide, options in (
            ("characters", (), {}),
            ("characters-half", (), {"dtype": HALF}),
            ("characters-beam-32", (), {"K": 32}),
            ("characters-4-gram", (), {"order": 4, "length_penalty": 0.6, "eos_threshold": 1.5}),
            ("characters-ctc", (), {"ctc": True, "length_penalty": 1.0}),
            ("word-pieces", ("row_kernel",), {"V": 5120}),
            ("word-pieces-half-penalty", ("row_kernel",), {"V": 5120, "dtype": HALF, "length_penalty": 0.6}),
            ("word-pieces-unaligned", (), {"V": 5003}),
        )
    ),
    Variant("beam_gather", "float", gather, wide=("gather_kernel",)),
    Variant("beam_gather", "brain", gather, {"dtype": BRAIN}),
    Variant("ctc_prefix", "characters", prefix),
    Variant("ctc_prefix", "word-pieces", prefix, {"V": 5120}),
    Variant("beam_backtrack", "beam-8", backtrack),
    Variant("beam_backtrack", "beam-32", backtrack, {"K": 32}),
    Variant("speller_unroll", "brain-hw4p2", unroll, matrix=LAYERS, wide=(*LAYERS, *READS)),
    Variant("speller_unroll", "float-hw4p2", unroll, {"dtype": FLOAT}, wide=(*LAYERS, *READS)),
]


@dataclass(frozen=True)
class Row:
    """The resources of one kernel of one variant on one architecture: measured, or in the table the limits."""

    variant: str
    kernel: str
    arch: str
    registers: int  # per thread, at most
    shared: int  # bytes per CTA, at most
    ctas: int  # that fit on one multiprocessor, at least; 0 for AMD
    wide_loads: int  # instructions that load 16 bytes per lane, at least
    matrix: int  # instructions of matrix units, at least
    spilled: int  # bytes per thread plus instructions that move them, or registers on AMD, at most

    @property
    def key(self):
        return self.variant, self.kernel, self.arch


def measure(variant, arch):
    """Compile the launches of a variant for an architecture; return one Row per kernel. Runs in a compiling worker."""
    from gpu_proof.compiler import compile_launch, recorded, resources

    with recorded() as launches:
        variant.launch(**variant.options)
    rows: dict[str, list[Row]] = {}
    for launch in launches:
        row = _row(str(variant), launch.name, arch, compile_launch(launch, arch), resources)
        rows.setdefault(launch.name, []).append(row)
    return [_worst(several) for several in rows.values()]


def _worst(rows):
    """Return the worst of each number: a kernel may be launched in several specialisations."""
    first, *_ = rows
    most = {name: max(getattr(row, name) for row in rows) for name in ("registers", "shared", "spilled")}
    least = {name: min(getattr(row, name) for row in rows) for name in ("ctas", "wide_loads", "matrix")}
    return replace(first, **most, **least)


def inexact_divisions(variant, arch):
    """The kernels in EXACT that the variant launches and whose PTX divides otherwise than IEEE says.

    Called in a compiling worker. Their results are compared with equality, and the CPU's divisions are exact.
    """
    from gpu_proof.compiler import compile_launch, recorded

    with recorded() as launches:
        variant.launch(**variant.options)
    ptx = {launch.name: compile_launch(launch, arch).asm["ptx"] for launch in launches if launch.name in EXACT}
    return [name for name, text in ptx.items() if re.search(INEXACT, text)]


def _row(variant, kernel, arch, binary, resources):
    found = resources(binary)
    if arch == "gfx942":
        matrix, wide = found.count("v_mfma"), found.count(r"(global|buffer)_load_dwordx4")
        spilled = found.spills + found.private
        return Row(variant, kernel, arch, found.vgprs, found.shared, 0, wide, matrix, spilled)
    warps = binary.metadata.num_warps
    granted = -(-found.registers // GRANULE) * GRANULE
    by_memory = SHARED_LIMIT[arch] // (found.shared + RESERVED)
    ctas = min(REGISTERS // (granted * 32 * warps), by_memory, WARPS // warps, CTAS)
    spilled = found.stack + found.local + found.count(SPILL)
    counts = found.count(WIDE_LOAD), found.count(MATRIX)
    return Row(variant, kernel, str(arch), found.registers, found.shared, ctas, *counts, spilled)


def complaints(variant, row, budget):
    """Return what is wrong with a measured row, as sentences; empty if it keeps to the rules and its budget."""
    found = [] if row.arch == "gfx942" else _broken_rules(variant, row)
    if budget is None:
        return [*found, "has no row in budgets.csv"]
    for name in ("registers", "shared", "spilled"):
        if getattr(row, name) > getattr(budget, name):
            found.append(f"{getattr(row, name)} {name}, at most {getattr(budget, name)} are budgeted")
    for name in ("ctas", "wide_loads", "matrix"):
        if getattr(row, name) < getattr(budget, name):
            found.append(f"{getattr(row, name)} {name}, at least {getattr(budget, name)} are budgeted")
    return found


def _broken_rules(variant, row):
    """Return violations that no budget may allow on NVIDIA GPUs."""
    limit = SHARED_LIMIT[int(row.arch)]
    rules = [
        (row.spilled, f"spills registers ({row.spilled})"),
        (row.shared > limit, f"{row.shared} bytes of shared memory, of {limit}"),
        (row.kernel in variant.matrix and not row.matrix, "no matrix instructions"),
        (row.kernel in variant.wide and not row.wide_loads, "no 128-bit loads"),
    ]
    return [sentence for broken, sentence in rules if broken]


@functools.cache
def table():
    """The checked-in budgets by Row.key."""
    with TABLE.open() as file:
        found = [Row(*(field.type(row[field.name]) for field in fields(Row))) for row in csv.DictReader(file)]
    return {row.key: row for row in found}


def main():
    """Print the table as measured now."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    for variant in VARIANTS:
        for arch in ARCHITECTURES:
            for row in dict.fromkeys(compiled(measure, variant, arch)):  # a kernel may be launched twice
                granted = -(-row.registers // GRANULE) * GRANULE
                writer.writerow(astuple(replace(row, registers=granted)))


if __name__ == "__main__":
    main()
