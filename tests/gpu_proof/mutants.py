"""Rung 5: faults seeded into the kernels, each of which some rung must detect.

A fault that no rung detects is a hole in the cases, the sanitizer, the budgets or the executor.

detections.csv names the rung and the case that detect each fault. A fault is tried on that case first; only if it
passes there, on all.

    PYTHONPATH=tests python -m gpu_proof.mutants      rewrites the table; rows that still hold are not searched again
"""

import concurrent.futures
import contextlib
import csv
import functools
import importlib.util
import pathlib
import re
import sys
import tempfile
from dataclasses import dataclass
from unittest import mock

from gpu_proof.budgets import VARIANTS, inexact_divisions, measure, table, violations
from gpu_proof.cases import CASES, HUGE
from gpu_proof.process import compiled, interpreted
from gpu_proof.rungs import execute, sanitize
from gpu_proof.sanitizer import OutOfBounds, ProgramRace

ARCH = 90  # mutants are compiled for sm_90
TABLE = pathlib.Path(__file__).with_name("detections.csv")


class MutantDoesNotApply(Exception):
    """The text or pattern that a mutant replaces does not occur, or not exactly once."""


@dataclass(frozen=True)
class Verdict:
    """The rung and the case (of rung 3, the variant) that detected a mutant, and the message; rung 0 if none did."""

    rung: int
    case: str = ""
    message: str = ""


NOT_DETECTED = Verdict(0)


@dataclass(frozen=True)
class SourceMutant:
    """An op's kernels with one text replaced. If both texts are empty they are unchanged: a control."""

    op: str
    name: str
    old: str = ""  # occurs exactly once in the op's files
    new: str = ""
    slows: bool = False  # changes at most the last bit of a result: only rung 3 can detect it

    def __str__(self):
        return f"{self.op}-{self.name}"

    def judge(self):
        """Run the mutant, in workers, on the case of the table, and if it passes there, on all."""
        known = detections().get(str(self))
        verdict = self._judge_by(known.rung, known.case) if known else NOT_DETECTED
        return verdict if verdict.rung else self.search()

    def search(self):
        """Run the mutant through the rungs, in workers, until one detects it. Only the control passes through all."""
        for rung in self.rungs:
            verdict = self._judge_by(rung)
            if verdict.rung:
                return verdict
        return NOT_DETECTED

    @property
    def rungs(self):
        """The rungs that judge it, in order; 2 includes 1."""
        if self.slows:
            return (3,)
        if not self.old:
            return (2, 3, 4)
        # The interpreter has no barriers. Rung 3: one more register does not show that a result is wrong.
        return (4, 2) if "barrier" in self.old else (2, 4)

    def _judge_by(self, rung, only=None):
        worker, judge = JUDGES[rung]
        return worker(judge, self, only) if max(2, rung) in self.rungs else NOT_DETECTED

    def mutate(self, sources):
        """The op's sources by file name, with the fault."""
        if not self.old and not self.new:
            return sources
        occurrences = sum(source.count(self.old) for source in sources.values())
        if occurrences != 1 or self.old == self.new:
            raise MutantDoesNotApply(f"{self.old!r} occurs {occurrences} times in {', '.join(sources)}, not once")
        return {file: source.replace(self.old, self.new) for file, source in sources.items()}


@dataclass(frozen=True)
class CodeMutant:
    """The PTX of one kernel with a match of a pattern replaced; run with one case."""

    op: str
    name: str
    kernel: str
    case: str
    pattern: str  # regular expression
    replacement: str
    occurrence: int | None = 0  # which match is replaced; None: all

    def __str__(self):
        return f"{self.op}-ptx-{self.name}"

    def judge(self):
        """Execute the mutant in a worker. Only rung 4 runs machine code."""
        return compiled(judge_code, self)

    def mutate(self, text):
        """The PTX with the fault; PTX of another kernel unchanged."""
        if f".entry {self.kernel}(" not in text:
            return text
        matches = list(re.finditer(self.pattern, text))
        if not matches:
            raise MutantDoesNotApply(f"{self.pattern!r} is not in the PTX of {self.kernel}")
        for match in reversed(matches if self.occurrence is None else [matches[self.occurrence]]):
            text = text[: match.start()] + match.expand(self.replacement) + text[match.end() :]
        return text


# Called in workers


@contextlib.contextmanager
def mutated_kernels(mutant):
    """Import the kernels of the mutant's op from a folder with the fault inside the block."""
    package = importlib.import_module("las_fast.kernels")
    # real files: triton reads the source of a kernel through inspect
    with tempfile.TemporaryDirectory() as folder:
        for file, source in mutant.mutate(op_sources(mutant.op)).items():
            pathlib.Path(folder, file).write_text(source)
        originals = _forget_kernels()
        try:
            with mock.patch.object(package, "__path__", [folder]):
                yield
        finally:
            _forget_kernels()
            sys.modules.update(originals)


def _forget_kernels():
    """Remove the modules of las_fast.kernels from sys.modules and return them."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("las_fast.kernels.")}


@functools.cache
def op_sources(op):
    """{file name: text} of kernels/<op>.py and of the files in kernels/ that it imports, directly or not."""
    folder = pathlib.Path(importlib.util.find_spec(f"las_fast.kernels.{op}").origin).parent
    sources, imported = {}, [op]
    while imported:
        file = f"{imported.pop()}.py"
        if file not in sources:
            sources[file] = (folder / file).read_text()
            imported += re.findall(r"^from las_fast\.kernels\.(\w+) import", sources[file], re.MULTILINE)
    return sources


def ops_with(file):
    """The ops whose kernels are in kernels/<file>, or use what is in it."""
    return [op for op in OPS if file in op_sources(op)]


def judge_interpreted(mutant, only=None):
    """Rungs 1 and 2 in one run: the sanitizer checks each access first, so that no mutant can crash the process.

    only: the name of the case to run; None: all, as in the other rungs.
    """
    with mutated_kernels(mutant):
        for case in cases_of(mutant.op, only, huge=True):
            if not case.interpretable:
                continue
            try:
                sanitize(case)
            except (OutOfBounds, ProgramRace) as error:
                return Verdict(2, case.name, str(error))
            except AssertionError as error:
                return Verdict(1, case.name, str(error))
    return NOT_DETECTED


def judge_budgets(mutant, only=None):
    """Rung 3."""
    with mutated_kernels(mutant):
        for variant in VARIANTS:
            if variant.op != mutant.op or only not in (None, variant.name):
                continue
            for row in measure(variant, ARCH):
                if problems := violations(variant, row, table().get(row.key)):
                    return Verdict(3, variant.name, f"{row.kernel} {', '.join(problems)}")
            if kernels := inexact_divisions(variant, ARCH):
                return Verdict(3, variant.name, f"{', '.join(kernels)} divide inexactly")
    return NOT_DETECTED


def judge_executed(mutant, only=None):
    """Rung 4."""
    with mutated_kernels(mutant):
        for case in cases_of(mutant.op, only):
            if ARCH in case.executable and (verdict := _executed(case)):
                return verdict
    return NOT_DETECTED


JUDGES = {
    1: (interpreted, judge_interpreted),
    2: (interpreted, judge_interpreted),
    3: (compiled, judge_budgets),
    4: (compiled, judge_executed),
}


def judge_code(mutant):
    """Rung 4 with a fault in the machine code."""
    (case,) = cases_of(mutant.op, mutant.case)
    return _executed(case, mutant.mutate) or NOT_DETECTED


def _executed(case, mutate=None):
    try:
        execute(case, ARCH, mutate, remember=False)
    except AssertionError as error:
        return Verdict(4, case.name, f"{type(error).__name__} {error}")
    return None


def cases_of(op, only=None, huge=False):
    """The cases of an op, or only that of a name; huge: also those of HUGE, which some faults make endless."""
    cases = CASES + HUGE if huge else CASES
    return [case for case in cases if case.op == op and only in (None, case.name)]


# The faults

BACKTRACK = [
    SourceMutant("beam_backtrack", name, old, new)
    for name, old, new in (
        ("step-stride", "step = (t * B + b) * K", "step = (t * K + b) * K"),
        ("parents-unclamped", "beam = tl.minimum(tl.maximum(beam, 0), K - 1)", "beam = beam + 0"),
        ("parents-clamped-below-only", "tl.minimum(tl.maximum(beam, 0), K - 1)", "tl.maximum(beam, 0)"),
        ("parents-clamped-to-k", "tl.maximum(beam, 0), K - 1)", "tl.maximum(beam, 0), K)"),
        ("token-unmasked", "token = tl.load(tokens + step + beam, mask=exists, other=0)",
         "token = tl.load(tokens + step + beam)"),
        ("frame-of-the-wrong-beam", "frame = tl.load(attended_frames + step + beam",
         "frame = tl.load(attended_frames + step + k"),
        ("score-before-the-first-step", "mask=exists & (t > 0)", "mask=exists"),
        ("difference-of-infinities", "tl.where(score == before, 0.0, score - before)", "score - before"),
        ("length-counts-eos", "length = tl.where(token == eos, t, length)",
         "length = tl.where(token == eos, t + 1, length)"),
        ("one-token-past-eos", "(t[None, :] > length[:, None])", "(t[None, :] > length[:, None] + 1)"),
        ("fill-past-the-end", " & (t[None, :] < L)", ""),
        ("results-transposed", "tl.store(out_tokens + row * L + t, token", "tl.store(out_tokens + t * K + row, token"),
        ("utterance-in-32-bits", "b = tl.program_id(0).to(tl.int64)", "b = tl.program_id(0)"),
        ("step-in-32-bits", "t = tl.cast(L - 1 - i, tl.int64)", "t = L - 1 - i"),
        ("last-step-missing", "for i in range(L):", "for i in range(L - 1):"),
        ("no-barrier", "    tl.debug_barrier()", "    pass"),
    )
]  # fmt: skip

GATHER = [
    SourceMutant("beam_gather", name, old, new)
    for name, old, new in (
        ("parents-unclamped", "parent = tl.minimum(tl.maximum(parent, 0), K - 1)", "parent = parent + 0"),
        ("row-in-32-bits", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
        ("utterance-dropped", "source = row // K * K + parent", "source = parent"),
        ("one-value-too-many", "inside = n < sizes[i]", "inside = n <= sizes[i]"),
        ("store-unmasked", "tl.store(gathered[i] + row * sizes[i] + n, x, mask=inside)",
         "tl.store(gathered[i] + row * sizes[i] + n, x)"),
        ("first-block-only", "range(0, sizes[i], BLOCK)", "range(0, BLOCK, BLOCK)"),
        ("store-to-the-parent", "gathered[i] + row * sizes[i]", "gathered[i] + source * sizes[i]"),
        ("rows-not-made-contiguous", "[x.contiguous() for x in states]", "[x for x in states]"),
        ("parents-not-made-contiguous", "parents.contiguous()", "parents"),
        ("sizes-not-in-integers", "sizes = tuple(x.shape[2] for x in sources)", "pass"),
    )
]  # fmt: skip

ALIGNMENT = [
    SourceMutant("ctc_loss", name, old, new)
    for name, old, new in (
        ("infinity-less-infinity", 'return tl.where(x == -float("inf"), 0.0, x)', "return x"),
        ("one-state-left-out", "tl.exp(x - finite) + tl.exp(y - finite) + ", "tl.exp(x - finite) + "),
        ("utterance-in-32-bits", "b, reverse = tl.program_id(0).to(tl.int64)", "b, reverse = tl.program_id(0)"),
        ("frames-unlimited", "tl.minimum(tl.load(lengths + b), T)", "tl.load(lengths + b) + T * 0"),
        ("blank-after-the-end-missing", "tl.minimum(tl.load(token_lengths + b), S) + 1", "tl.load(token_lengths + b)"),
        ("states-not-reversed", "tl.where(reverse, states - 1 - order, order)", "order"),
        ("tokens-of-the-first-utterance", "tokens + b * S + state // 2, mask", "tokens + state // 2, mask"),
        ("from-the-wrong-side", "back = tl.where(reverse, -1, 1)", "back = tl.where(reverse, 1, 1)"),
        ("equal-tokens-need-no-blank", "((before != token) | ALLOW_ADJACENT_EQUAL)", "(token >= 0)"),
        ("equal-tokens-always-need-a-blank", "| ALLOW_ADJACENT_EQUAL)", ")"),
        ("sums-of-one-direction", "(tl.program_id(1) * B + b) * T * N", "b * T * N"),
        ("frames-not-reversed", "tl.where(reverse, frames - 1 - i, i)", "i"),
        ("first-token-not-at-the-start", "tl.where((i == 0) & (order == 1), 0.0, one)", "one"),
        ("two-states-back-unmasked", "mask=skips & (i > 0)", "mask=inside & (order > 1) & (i > 0)"),
        ("store-unmasked", "state, alpha, mask=inside)", "state, alpha)"),
        ("no-barrier", "        tl.debug_barrier()\n", ""),
        ("last-state-only", "order >= states - 2", "order >= states - 1"),
        ("likelihood-of-both-directions", ", mask=reverse == 0)", ")"),
        ("impossible-losses-infinite", "likelihoods = likelihoods.masked_fill(likelihoods == -torch.inf, 0.0)", "pass"),
        ("log-probabilities-twice", " - log_probs.gather(2, classes", " - 0 * log_probs.gather(2, classes"),
        ("impossible-states-are-nan", ".masked_fill(without_path, -torch.inf)", ""),
        ("frames-without-a-path-are-nan", ".masked_fill(without_path.all(2, keepdim=True), 0.0)", ""),
        ("padding-has-gradients", "padding_mask(lengths, T) | ", "padding_mask(lengths, T) & "),
        ("impossible-losses-have-gradients", " | (likelihoods == 0)[:, None]", ""),
        ("unreached-states-count", "log_probs.new_full((2, B, T, N), -torch.inf)", "log_probs.new_zeros(2, B, T, N)"),
        ("adjacent-equal-tokens-in-the-loss", "allow_adjacent_equal=False)", "allow_adjacent_equal=True)"),
    )
]  # fmt: skip

PREFIX = [
    SourceMutant("ctc_prefix", name, old, new)
    for name, old, new in (
        ("parents-unclamped", "tl.minimum(tl.maximum(tl.load(parents + row), 0), K - 1)", "tl.load(parents + row)"),
        ("tokens-unclamped", "tl.minimum(tl.maximum(tl.load(chosen + row), 0), V - 1)", "tl.load(chosen + row)"),
        ("row-in-32-bits", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
        ("frame-in-32-bits", "at = ctc_log_probs + t.to(tl.int64) * V", "at = ctc_log_probs + t * V"),
        ("utterance-dropped", "source = row // K * K + parent", "source = parent"),
        ("frames-of-the-first-utterance", "ctc_log_probs += row // K * T * V", "ctc_log_probs += 0"),
        ("infinity-minus-infinity", 'return tl.where(x == -float("inf"), 0.0, x)', "return x"),
        ("sum-not-rescaled", "total * tl.exp(top - finite) + ", "total + "),
        ("factors-not-multiplied", "return factor + next_factor,", "return next_factor,"),
        ("terms-not-carried", "_add(term + next_factor, next_term)", "_add(term, next_term)"),
        ("repeats-need-no-blank", "tl.where(repeats, from_blank, from_any)", "tl.where(repeats, from_any, from_any)"),
        ("pause-without-blank", 'from_blank += tl.load(blanks - V, mask=repeated, other=-float("inf"))',
         "from_blank += 0.0"),
        ("pause-before-the-first-frame", "repeated = inside & repeats & (t > 0)", "repeated = inside & repeats"),
        ("newest-not-carried", "_add(newest + factor, term)", "term"),
        ("newest-added-after-the-end", 'tl.where(inside, _add(newest + factor, term), -float("inf"))',
         "_add(newest + factor, term)"),
        ("alpha-not-carried", "now = _add(alpha + factor, term)", "now = term"),
        ("states-stored-one-too-early", "tl.store(after + t + 1, now", "tl.store(after + t, now"),
        ("states-stored-past-the-end", "now, mask=inside & writes", "now, mask=writes"),
        ("every-program-stores", "writes = tl.program_id(1) == 0", "writes = tl.program_id(1) >= 0"),
        ("no-first-state", "tl.store(after, alpha, mask=writes)", "tl.store(after, alpha, mask=writes & (T < 0))"),
        ("frame-after-the-last", "(t + 1 < T)[:, None]", "(t < T)[:, None]"),
        ("frame-not-advanced", "at[:, None] + V + v[None, :]", "at[:, None] + v[None, :]"),
        ("token-unmasked", " & (v < V)[None, :]", ""),
        ("repeat-one-frame-early", "tl.load(at + 2 * V + token", "tl.load(at + V + token"),
        ("repeat-as-any-other-token", "tl.where(v == token, repeat_top", "tl.where(v == -1, repeat_top"),
        ("blank-extends-the-prefix", 'tl.where(v == BLANK, -float("inf"), tl.where(v == eos, alpha, psi))',
         "tl.where(v == eos, alpha, psi)"),
        ("eos-as-any-other-token", "tl.where(v == eos, alpha, psi)", "psi"),
        ("impossible-prefix-subtracted", 'tl.where(prefix == -float("inf"), prefix, psi - prefix)', "psi - prefix"),
        ("prefix-of-the-new-row", "tl.load(prefix_log_probs + source)", "tl.load(prefix_log_probs + row)"),
        ("log-probs-stored-past-the-end", "log_probs, mask=v < V)", "log_probs)"),
        ("inputs-not-made-contiguous", "x.contiguous()", "x"),
    )
]  # fmt: skip

NGRAM = [
    SourceMutant("ngram_scores", name, old, new)
    for name, old, new in (
        ("hypothesis-in-32-bits", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
        ("unclamped", "return tl.minimum(tl.maximum(x, 0), end - 1)", "return x"),
        ("parents-ignored", "states + i // K * K + parent", "states + i + parent * 0"),
        ("state-of-the-first-utterance", "states + i // K * K + parent", "states + parent"),
        ("own-bit-counts", "+ 1 << bit) - 1)", "+ 2 << bit) - 1)"),
        ("first-mask-only", "row + 2 * index, mask", "row + index * 0, mask"),
        ("first-arc-of-the-first-mask", "row + 2 * index + 1", "row + index * 0 + 1"),
        ("back-off-weight-dropped", "total + backoff, total)", "total, total)"),
        ("back-off-after-the-arc", "tl.where(missing, total + backoff, total)", "total + backoff"),
        ("one-state-too-few", "in range(order)", "in range(order - 1)"),
        ("log-prob-as-next-state", "arcs + 2 * arc + 1", "arcs + 2 * arc"),
        ("bits-counted-in-threes", "(x + (x >> 4)) & 0x0F0F0F0F", "(x + (x >> 4)) & 0x03030303"),
        ("stored-past-the-end", "log_probs, mask=inside)", "log_probs)"),
        ("tokens-of-the-first-block", "begin, v, inside", "begin, v % BLOCK, inside"),
        ("model-not-made-contiguous", "(x.contiguous() for x in (rows, arcs, states))",
         "(x for x in (rows, arcs, states))"),
        ("step-not-made-contiguous", "(None if x is None else x.contiguous() for", "(x for"),
    )
]  # fmt: skip

FLAT_INDEX = """


@triton.jit
def _flat_index(key):
    \"\"\"Return k * V + v of a key.\"\"\"
    """
TOPK = [
    SourceMutant("beam_topk", name, old, new)
    for name, old, new in (
        ("utterance-in-32-bits", "b = tl.program_id(0).to(tl.int64)\n    k, v =", "b = tl.program_id(0)\n    k, v ="),
        ("utterance-of-long-rows-in-32-bits", "b, k = tl.program_id(0).to(tl.int64),", "b, k = tl.program_id(0),"),
        ("negative-ranks-not-mirrored", "tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)", "bits"),
        ("negative-zero-below-zero", "-(bits & 0x7FFFFFFF)", "bits ^ 0x7FFFFFFF"),
        ("threshold-without-the-sum", "(eos_logit - top) - log_sum, (best_other - top) - log_sum, count",
         "eos_logit - top, best_other - top, count"),
        ("minimum-of-the-first-utterance", "tl.load(minimum + b)", "tl.load(minimum)"),
        ("maximum-of-the-first-utterance", "tl.load(maximum + b)", "tl.load(maximum)"),
        ("length-zero-not-clamped", "tl.maximum(lengths + tl.where(finished, 0, 1), 1)",
         "(lengths + tl.where(finished, 0, 1))"),
        ("ties-to-the-higher-index",
         f"(0x7FFFFFFF - flat).to(tl.int64){FLAT_INDEX}return 0x7FFFFFFF - (",
         f"flat.to(tl.int64){FLAT_INDEX}return ("),
        ("forced-eos-denied", "return denied & (forced == 0), forced", "return denied, forced"),
        ("threshold-inverted", "eos_score <= threshold * best_other", "eos_score > threshold * best_other"),
        ("minimum-off-by-one", "lengths < tl.load(minimum", "lengths <= tl.load(minimum"),
        ("maximum-off-by-one", "lengths >= tl.load(maximum", "lengths > tl.load(maximum"),
        ("finished-beams-count-on", "lengths + tl.where(finished, 0, 1)", "lengths + 1"),
        ("power-of-the-penalty-dropped", "tl.exp2(length_penalty * tl.log2(tokens))", "tokens"),
        ("coverage-subtracted", "candidates + coverage[:, None]", "candidates - coverage[:, None]"),
        ("ngram-weight-dropped", "steps + ngram_weight * log_probs", "steps + log_probs"),
        ("ngram-row-stride", "ngram_log_probs + row[:, None] * V", "ngram_log_probs + row[:, None]"),
        ("ctc-weights-swapped", "(1.0 - ctc_weight) * steps + ctc_weight * log_probs",
         "ctc_weight * steps + (1.0 - ctc_weight) * log_probs"),
        ("ctc-row-stride", "next_log_probs + row[:, None] * V", "next_log_probs + row[:, None]"),
        ("ctc-zero-times-infinity", 'tl.where(steps == -float("inf"), steps, mixed)', "mixed"),
        ("ctc-log-probs-not-made-contiguous", "tuple(None if x is None else x.contiguous() for x in options)",
         "tuple(x if x is None or x.ndim == 3 else x.contiguous() for x in options)"),
        ("best-taken-twice", "keys = tl.where(keys == best, NO_KEY, keys)\n        index", "index"),
        ("parent-and-token-swapped", "parent, token = index // V, index % V", "token, parent = index // V, index % V"),
        ("eos-does-not-finish", "ended | (token == eos)", "ended | (token < 0)"),
        ("finished-beams-grow", "parent) + tl.where(ended, 0, 1))", "parent) + 1)"),
        ("padding-counts-in-the-sum", 'logits_k + v[None, :], mask=inside, other=-float("inf"))',
         "logits_k + v[None, :], mask=inside, other=0.0)"),
        ("stride-of-rows", "k[:, None] * logits_k", "k[:, None] * V"),
        ("running-sum-not-rescaled", "total * tl.exp(top - finite) + ", "total + "),
        ("blocks-skipped", "if tl.max(keys, 0) > worst:", "if tl.max(keys, 0) < worst:"),
        ("merge-reads-past-the-end", "inside = i < K * K", "inside = i < BLOCK"),
        ("row-keys-stored-too-far", "best, mask=slots < K)", "best)"),
        ("negative-ranks-positive", "tl.where(ordered < 0, -magnitude, magnitude)", "magnitude"),
        ("low-half-as-the-rank", "ordered = (key >> 32).to(tl.int32)", "ordered = key.to(tl.int32)"),
        ("finished-beams-dropped", "(ends == 0) & (gap", "(gap"),
        ("beams-at-the-threshold-dropped", "gap > beam_threshold", "gap >= beam_threshold"),
        ("gap-in-nats-per-token", "gap *= _power(", "_power("),
        ("gap-at-the-length-before", "parent) + 1).to(tl.float32)", "parent)).to(tl.float32)"),
        ("finished-beams-not-frozen", "tl.where(is_eos, 0.0, -float(\"inf\")), steps)", "steps, steps)"),
    )
]  # fmt: skip

INDICES = """    split = tl.program_id(1)
    k, d, e = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
"""
KEYS = "        k_tile = _tile(keys + b * keys_b + first * keys_t, local, d, keys_t,"
TILE = ' and integer work is less."""\n    inside = '
RANGE = "    begin = split * range_frames\n    end = tl.minimum(begin + range_frames"
ATTENTION = [
    SourceMutant("masked_attention", name, old, new)
    for name, old, new in (
        ("rows-one-too-many", f"{TILE}(rows[:, None] < row_count)", f"{TILE}(rows[:, None] <= row_count)"),
        ("columns-unmasked", f"{TILE}(rows[:, None] < row_count) & (columns[None, :] < column_count)",
         f"{TILE}(rows[:, None] < row_count)"),
        ("stride-of-rows", "pointer + rows[:, None] * stride", "pointer + rows[:, None] * column_count"),
        ("utterance-in-32-bits", f"b = tl.program_id(0).to(tl.int64)\n{INDICES}    row = (b * tl.num",
         f"b = tl.program_id(0)\n{INDICES}    row = (b * tl.num"),
        ("utterance-in-32-bits-backwards", f"b = tl.program_id(0).to(tl.int64)\n{INDICES}    row = b * K",
         f"b = tl.program_id(0)\n{INDICES}    row = b * K"),
        ("utterance-in-32-bits-at-last", "b = tl.program_id(0).to(tl.int64)\n    block =",
         "b = tl.program_id(0)\n    block ="),
        ("frame-in-32-bits", f"first = tl.cast(t0, tl.int64)\n{KEYS} end", f"first = t0\n{KEYS} end"),
        ("frame-in-32-bits-backwards", f"first = tl.cast(t0, tl.int64)\n{KEYS} length", f"first = t0\n{KEYS} length"),
        ("length-unclamped", f"tl.minimum(tl.load(lengths + b), T).to(tl.int32)\n{RANGE}, length)",
         f"tl.load(lengths + b).to(tl.int32)\n{RANGE}, length)"),
        ("length-unclamped-backwards", f"tl.minimum(tl.load(lengths + b), T).to(tl.int32)\n{RANGE}, T)",
         f"tl.load(lengths + b).to(tl.int32)\n{RANGE}, T)"),
        ("padding-attended", 's = tl.where(t[None, :] < end, s, -float("inf"))',
         's = tl.where(t[None, :] <= end, s, -float("inf"))'),
        ("scale-dropped", "input_precision=PRECISION) * scale\n", "input_precision=PRECISION)\n"),
        ("base-of-the-exponential", "scale * LOG2_E", "scale"),
        ("peak-of-the-last-block", "peak = tl.where(top > m,", "peak = tl.where(top >= m,"),
        ("peak-of-the-last-frame", "tl.min(tl.where(s == top[:, None], t[None, :], 2147483647), 1)",
         "tl.max(tl.where(s == top[:, None], t[None, :], 0), 1)"),
        ("sum-not-rescaled", "l = l * rescale + tl.sum(p, 1)", "l = l + tl.sum(p, 1)"),
        ("average-not-rescaled", "a = a * rescale[:, None] + tl.dot(", "a = a + tl.dot("),
        ("keys-past-the-end", "local, d, keys_t, end - t0, D)", "local, d, keys_t, BLOCK_T, D)"),
        ("values-of-padding", "local, e, values_t, end - t0, E)", "local, e, values_t, T - t0, E)"),
        ("scores-stored-past-the-end", "s, mask=(k[:, None] < K) & (t[None, :] < end))", "s, mask=(k[:, None] < K))"),
        ("zero-divided-by-zero", "a / _nonzero(l)[:, None]", "a / l[:, None]"),
        ("ranges-write-one-result", "row = (b * tl.num_programs(1) + split) * K + k  #",
         "row = b * tl.num_programs(1) * K + k  #"),
        ("ranges-overlap", "tl.minimum(begin + range_frames, length)", "tl.minimum(begin + range_frames + 1, length)"),
        ("base-of-the-logarithm", "(m + tl.log2(_nonzero(l))) * 0.6931471805599453", "(m + tl.log2(_nonzero(l)))"),
        ("sums-of-ranges-not-scaled", "other=0.0) * tl.exp2(part_m - finite)\n        m =",
         "other=0.0)\n        m ="),
        ("sum-of-earlier-ranges-not-scaled", "l = l * tl.exp2(m - finite) +", "l = l +"),
        ("infinity-minus-infinity", 'return tl.where(m == -float("inf"), 0.0, m)', "return m"),
        ("padding-not-zeroed", "(t[None, :] < tl.load(lengths + b))", "(t[None, :] <= tl.load(lengths + b))"),
        ("weights-not-normalised", "w = tl.exp2(s - finite[:, None]) / total[:, None]",
         "w = tl.exp2(s - finite[:, None])"),
        ("ranges-weighted-equally", "fraction = tl.load(sums + part, mask=k < K, other=0.0) * tl.exp2(part_m - finite)",
         "fraction = tl.exp2(part_m - finite)"),
        ("peak-of-the-last-range", "tl.where(part_m > m,", "tl.where(part_m >= m,"),
        ("delta-added", "dp = -delta[:, None]", "dp = delta[:, None]"),
        ("gradient-without-scale", "ds = (p * dp * scale)", "ds = (p * dp)"),
        ("gradient-to-padding", "p = tl.where(t[None, :] < length, tl.exp2(s - lse[:, None]), 0.0)",
         "p = tl.exp2(s - lse[:, None])"),
        ("padding-gradient-not-written", "end = tl.minimum(begin + range_frames, T)",
         "end = tl.minimum(begin + range_frames, length)"),
        ("gradients-of-a-range-misplaced", "frame = b * T + first + local", "frame = b * T + local"),
        ("partial-gradients-collide", "part = (split * tl.num_programs(0) + b) * K + k", "part = b * K + k"),
        ("weights-left-out-of-delta", "tl.sum(dw * _tile(weights + b * K * T, k, t, T, K, length), 1)",
         "tl.sum(dw, 1)"),
        ("rows-not-made-contiguous", "x if x.stride(-1) == 1 else x.contiguous()", "x"),
        ("partial-gradients-in-half", "dtype=query.dtype if splits == 1 else torch.float32", "dtype=query.dtype"),
        ("sums-of-launches-in-half", "[torch.stack(x).float().sum(0).to(query.dtype) for x in", "[sum(x) for x in"),
        ("exact-matmul-in-tf32", 'else "ieee"', 'else "tf32"'),
    )
]  # fmt: skip

STEP = "        step = tl.cast(u, tl.int64) * B + b\n"
BLOCK = "        b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)\n"
DROPOUT = "        if MASKED:\n            hidden *= load(masks, b, n, H, B, H)\n"
CARRIED = "        tl.store(after, hidden.to(dtype), mask=inside & (u + 1 < U))\n"
UPSTREAM = "        if MASKED:\n            gradient *= load(masks, b, n, H, B, H)\n"
LATER = "            gradient += load(hidden_gradient, b, n, H, B, H)\n"
UNROLL = [
    SourceMutant("speller_unroll", name, old, new)
    for name, old, new in (
        ("rows-one-too-many", "(rows[:, None] < row_count)", "(rows[:, None] <= row_count)"),
        ("row-in-32-bits", "rows[:, None].to(tl.int64) * stride", "rows[:, None] * stride"),
        ("columns-unmasked", "(rows[:, None] < row_count) & (columns[None, :] < column_count)",
         "(rows[:, None] < row_count)"),
        ("depth-of-one-block", "range(0, depth, BLOCK_K):\n        k = k0 + tl.arange(0, BLOCK_K)\n        x_tile",
         "range(0, BLOCK_K, BLOCK_K):\n        k = k0 + tl.arange(0, BLOCK_K)\n        x_tile"),
        ("candidate-of-the-output-gate", "tanh(g + load(offsets + 2 * H,", "tanh(g + load(offsets + 3 * H,"),
        ("weights-of-another-gate", "g += _gate(x, weight, 2,", "g += _gate(x, weight, 3,"),
        ("forget-gate-with-tanh", "f = _sigmoid(f +", "f = tanh(f +"),
        ("token-of-the-first-step", "tl.load(tokens + first + b,", "tl.load(tokens + b,"),
        ("state-before-the-first-step", "mask=inside & (u > 0), other=0.0) + i * g", "mask=inside, other=0.0) + i * g"),
        ("cell-state-of-this-step", "before = states + (row - B) * state_size", "before = states + row * state_size"),
        ("hidden-state-in-place-of-the-input", "operand_at + below_size + n[None, :]", "operand_at + n[None, :]"),
        ("hidden-state-after-dropout", CARRIED + DROPOUT, DROPOUT + CARRIED),
        ("output-without-dropout", DROPOUT + "        tl.store(operands", "        tl.store(operands"),
        ("hidden-state-past-the-last-step", CARRIED, "        tl.store(after, hidden.to(dtype), mask=inside)\n"),
        ("step-in-32-bits", "first = tl.cast(u, tl.int64) * B  # of the rows of this step\n        depth",
         "first = u * B  # of the rows of this step\n        depth"),
        ("length-unclamped", f"tl.minimum(tl.load(lengths + b), T).to(tl.int32)\n{STEP}        row",
         f"tl.load(lengths + b).to(tl.int32)\n{STEP}        row"),
        ("position-not-advanced", "tl.store(next_position, u + 1)", "tl.store(next_position, u)"),
        ("score-without-the-bias", "s = (s + tl.load(key_bias + b * T + t, mask=t < length, other=0.0)) * scale",
         "s = s * scale"),
        ("bias-of-the-first-utterance", "key_bias + b * T + t", "key_bias + t"),
        ("sum-not-rescaled", "l = l * tl.exp2(m - m_new) +", "l = l +"),
        ("padding-not-zeroed", "tl.store(at + t, w, mask=t < T)", "tl.store(at + t, w, mask=t < length)"),
        ("scores-overwritten-too-soon", "tl.debug_barrier()  # several threads load a score",
         "pass  # several threads load a score"),
        ("context-not-carried", "mask=(e < E) & (u + 1 < U))", "mask=e < 0)"),
        ("context-past-the-last-step", "mask=(e < E) & (u + 1 < U))", "mask=e < E)"),
        ("base-of-the-exponential", "LOG2_E * keys.shape[2] ** -0.5", "keys.shape[2] ** -0.5"),
        ("features-read-too-soon", "tl.debug_barrier()  # features", "pass  # features"),
        ("even-part-of-erf", "tl.where(x < 0.0, -magnitude, magnitude)", "magnitude"),
        ("features-without-bias", "x += tl.load(project_bias + n, mask=n < M, other=0.0)[None, :]", "x += 0.0"),
        ("last-of-equal-blocks", "token = tl.where(top > best,", "token = tl.where(top >= best,"),
        ("last-of-equal-tokens", "tl.min(tl.where(x == top[:, None], v[None, :], 2147483647), 1)",
         "tl.max(tl.where(x == top[:, None], v[None, :], 0), 1)"),
        ("all-tokens-sampled", "mask=(b < B) & chosen)", "mask=b < B)"),
        ("token-sampled-a-step-late", "at = (tl.cast(u, tl.int64) + 1) * B + b", "at = tl.cast(u, tl.int64) * B + b"),
        ("a-token-past-the-vocabulary", 'tl.where(v[None, :] < V, x, -float("inf"))', "x"),
        ("gradient-of-the-same-step", "after = gates_gradient + (tl.cast(u, tl.int64) + 1) * B * row_size",
         "after = gates_gradient + tl.cast(u, tl.int64) * B * row_size"),
        ("a-step-after-the-last", "depth = tl.where(u + 1 < U, 4 * H, 0)", "depth = 4 * H"),
        ("output-layer-left-out", "context = total + tl.load(upstream, mask=inside, other=0.0)", "context = total"),
        ("hidden-state-as-context", "(n[None, :] >= E) &", "(n[None, :] > E) &"),
        ("delta-left-out", "* (dw - delta) * scale", "* dw * scale"),
        ("gradient-without-scale", "* (dw - delta) * scale", "* (dw - delta)"),
        ("gradient-of-the-weights-left-out",
         "dw += tl.load(weights_gradient + step * T + t, mask=t < length, other=0.0)", "dw += 0.0"),
        ("padding-left-without-gradient", "tl.store(score_gradients + step * T + t, ds, mask=t < T)",
         "tl.store(score_gradients + step * T + t, ds, mask=t < length)"),
        ("gradients-read-too-soon", "tl.debug_barrier()  # these are read", "pass  # these are read"),
        ("gradients-overwritten-too-soon", "tl.debug_barrier()  # several threads load a number",
         "pass  # several threads load a number"),
        ("hidden-state-through-dropout", UPSTREAM + "        if FIRST:\n" + LATER,
         "        if FIRST:\n" + LATER + UPSTREAM + "        if FIRST:\n            gradient += 0.0\n"),
        ("gradient-without-dropout", UPSTREAM, ""),
        ("recurrence-through-the-input", "recurrent = weight + tl.cast(below_size, tl.int64) * 4 * H",
         "recurrent = weight"),
        ("a-step-after-the-last-of-a-cell", "rows = tl.where(u + 1 < U, B, 0)", "rows = B"),
        ("cell-state-not-carried", "tl.load(carried, mask=inside & (u + 1 < U), other=0.0)", "0.0"),
        ("cell-state-before-it-is-written", "tl.load(carried, mask=inside & (u + 1 < U), other=0.0)",
         "tl.load(carried, mask=inside, other=0.0)"),
        ("cell-state-not-forgotten", "tl.store(carried, dc * f,", "tl.store(carried, dc,"),
        ("slope-of-tanh", "(1.0 - tanh_cell * tanh_cell)", "(1.0 - tanh_cell)"),
        ("forget-gate-of-this-cell-state", "dc * before * f", "dc * tanh_cell * f"),
        ("position-not-lowered", "tl.store(next_position, u - 1)", "tl.store(next_position, u)"),
        ("weights-not-made-contiguous", "if n == 0 else 0 :].to(dtype).contiguous()", "if n == 0 else 0 :].to(dtype)"),
        ("embedding-as-input-left-out", "output_gradients[0] += embedding", "pass"),
        ("bias-of-the-query-left-out", "dtype) + bias[:, None] * weights.query_bias", "dtype)"),
        ("a-chunk-short", "triton.cdiv(tokens - 1, CHUNK)", "(tokens - 1) // CHUNK"),
        ("a-launch-past-the-end", "    if u < U:\n        b = tl.program_id(0) * BLOCK_B",
         "    if u < U + 1:\n        b = tl.program_id(0) * BLOCK_B"),
        ("a-launch-past-the-beginning", f"    if u >= 0:\n{BLOCK}        n = tl.program_id(1) * BLOCK_N",
         f"    if u >= -1:\n{BLOCK}        n = tl.program_id(1) * BLOCK_N"),
        ("first-step-from-garbage", "operands = keys.new_zeros(", "operands = keys.new_empty("),
    )
]  # fmt: skip

SLOW = [
    SourceMutant(op, name, old, new, slows=True)
    for op, name, old, new in (
        ("masked_attention", "tile-too-large", '"half": {16: (32, 4, 3), 32: (64',
         '"half": {16: (64, 4, 4), 32: (64'),
        ("masked_attention", "one-warp", '"half": {16: (32, 4, 3), 32: (64', '"half": {16: (32, 1, 3), 32: (64'),
        ("masked_attention", "half-matmul-in-float32",
         "s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale\n",
         's = tl.dot(q.to(tl.float32), tl.trans(k_tile).to(tl.float32), input_precision="ieee") * scale\n'),
        ("beam_topk", "one-warp-for-long-rows", "**blocks, num_warps=4)", "**blocks, num_warps=1)"),
        ("beam_topk", "fast-reciprocal", "tl.div_rn(1.0, tokens)", "tl.fdiv(1.0, tokens, ieee_rounding=True)"),
        ("beam_gather", "one-value-per-thread", "BLOCK=block", "BLOCK=block, num_warps=16"),
    )
]  # fmt: skip

FORWARD = ("masked_attention", "forward_kernel", "half-beam-8")
BACKWARD = ("masked_attention", "backward_kernel", "backward-half")
ONE_TILE = ("beam_topk", "topk_kernel", "characters")
LONG_ROWS = ("beam_topk", "row_kernel", "long-rows")
CODE = [
    CodeMutant(op, f"{kernel.removesuffix('_kernel')}-{name}", kernel, case, pattern, replacement, occurrence)
    for (op, kernel, case), name, pattern, replacement, occurrence in (
        (FORWARD, "no-barriers", r"bar\.sync\s+0;", "", None),
        (FORWARD, "no-barrier-after-the-copies", r"(cp\.async\.wait_group\s+\d+;\s+)bar\.sync\s+0;", r"\1", 0),
        (FORWARD, "no-wait-for-copies", r"cp\.async\.wait_group\s+[1-9]\d*;", "", 0),
        (FORWARD, "wait-for-one-group-too-few", r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 3;", 0),
        (FORWARD, "shuffle-from-another-lane", r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 2,", r"\1, 4,", 0),
        (FORWARD, "values-not-transposed", r"\.x4\.trans", ".x4", 0),
        (FORWARD, "smallest-score", r"max\.f32", "min.f32", 0),
        (FORWARD, "log-for-exp", r"ex2\.approx\.ftz", "lg2.approx.ftz", 0),
        (FORWARD, "one-mma-missing", r"mma\.sync[^;]+;", "", 3),
        (FORWARD, "store-without-predicate", r"@%p\d+ (st\.global\.v4)", r"\1", 0),
        (BACKWARD, "no-barriers", r"bar\.sync\s+0;", "", None),
        (BACKWARD, "no-wait-for-copies", r"cp\.async\.wait_group[^;]*;", "", None),
        (BACKWARD, "keys-not-transposed", r"\.x4\.trans", ".x4", 0),
        (BACKWARD, "one-mma-missing", r"mma\.sync[^;]+;", "", -1),
        (ONE_TILE, "shuffle-from-another-lane", r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 16,", r"\1, 8,", 0),
        (ONE_TILE, "smallest-key", r"max\.s64", "min.s64", 0),
        (ONE_TILE, "load-without-predicate", r"@%p\d+ (ld\.global)", r"\1", 0),
        (LONG_ROWS, "no-barriers", r"bar\.sync\s+0;", "", None),
        (LONG_ROWS, "smallest-key", r"max\.s64", "min.s64", -1),
        (("beam_backtrack", "backtrack_kernel", "parents-out-of-range"), "unclamped", r"min\.s64", "max.s64", 0),
        (("ctc_prefix", "prefix_kernel", "characters"), "no-barriers", r"bar\.sync\s+0;", "", None),
        (
            ("ctc_prefix", "prefix_kernel", "characters"),
            "scan-from-another-lane",
            r"(shfl\.sync\.up\.b32\s+%r\d+, %r\d+), 2,",
            r"\1, 4,",
            0,
        ),
        (("ngram_scores", "scores_kernel", "out-of-range"), "unclamped", r"max\.s64", "min.s64", 0),
        (("beam_gather", "gather_kernel", "parents-out-of-range"), "unclamped", r"max\.s64", "min.s64", 0),
        (("speller_unroll", "cell_kernel", "bf16"), "one-mma-missing", r"mma\.sync[^;]+;", "", 0),
        (("speller_unroll", "cell_kernel", "bf16"), "no-barriers", r"bar\.sync\s+0;", "", None),
        (("speller_unroll", "attend_kernel", "two-cells"), "no-barriers", r"bar\.sync\s+0;", "", None),
        (("speller_unroll", "cell_gradient_kernel", "bf16"), "one-mma-missing", r"mma\.sync[^;]+;", "", -1),
        (("speller_unroll", "attend_gradient_kernel", "two-cells"), "no-barriers", r"bar\.sync\s+0;", "", None),
    )
]

OPS = (
    "masked_attention", "beam_topk", "beam_gather", "ctc_prefix", "ngram_scores", "ctc_loss", "beam_backtrack",
    "speller_unroll",
)  # fmt: skip
CONTROLS = [SourceMutant(op, "unchanged") for op in OPS]
MUTANTS = BACKTRACK + GATHER + PREFIX + NGRAM + ALIGNMENT + TOPK + ATTENTION + UNROLL + SLOW + CODE


@functools.cache
def detections():
    """{name of a mutant: the Verdict of the table, without a message}."""
    if not TABLE.exists():
        return {}
    with TABLE.open(encoding="utf-8") as file:
        return {row["fault"]: Verdict(int(row["rung"]), row["case"]) for row in csv.DictReader(file)}


def main():
    """Judge every mutant and rewrite the table, after each verdict."""
    verdicts = {str(mutant): known for mutant in MUTANTS if (known := detections().get(str(mutant)))}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for mutant, verdict in zip(MUTANTS, pool.map(lambda mutant: mutant.judge(), MUTANTS), strict=True):
            verdicts[str(mutant)] = verdict
            print(f"{verdict.rung or 'NONE'}\t{mutant}\t{verdict.case}: {verdict.message}", flush=True)
            _write(verdicts)


def _write(verdicts):
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["fault", "rung", "case"])
        for name in filter(verdicts.get, map(str, MUTANTS)):
            writer.writerow([name, verdicts[name].rung, verdicts[name].case])


if __name__ == "__main__":
    main()
