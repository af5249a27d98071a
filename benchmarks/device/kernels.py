"""Time each op on each of its backends, and compare with a lower bound. This part uses all remaining time.

The lower bound is the time to move each input and output once, at the bandwidth of a large copy measured on the same
device just before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.device.machine import bandwidth
from benchmarks.device.parts import Options
from benchmarks.device.record import Record
from benchmarks.device.timing import DeviceTimer, backends_for
from benchmarks.library_calls import INDEX_SELECT, SDPA, TOPK, index_select, sdpa, topk
from las_fast.ops import (
    beam_backtrack,
    beam_gather,
    beam_topk,
    ctc_log_probabilities,
    ctc_loss,
    ctc_prefix,
    ctc_start,
    ctc_token_times,
    masked_attention,
    ngram_scores,
    ngram_start,
    padding_mask,
    table_model,
)
from las_fast.text import BLANK, EOS, SOS

TORCH_CTC = "torch ctc_loss"  # with the lengths on the host; with those on the device, as the reference, the host waits


@dataclass(frozen=True)
class Measurement:
    """A call to time on several backends."""

    op: str
    shape: str
    dtype: torch.dtype
    run: Callable[[str], Sequence[Tensor | None]]  # takes the backend's name
    bytes: int  # minimum to move; 0 if memory is not the limit
    others: tuple[str, ...] = ()  # names that `run` takes besides the op's backends; may return the first tensors only
    what: str = ""  # label of the rows; by default the op's name
    relative: float = 1e-4  # largest difference from the reference over its largest value; in half precision 1e-2


def run(options: Options, record: Record) -> None:
    device = options.device
    timer = DeviceTimer(device)
    bytes_per_us = bandwidth(timer, device, 2**16 if options.quick else 2**28)
    makers = list(small_measurements(device) if options.quick else measurements(device))
    for make in record.while_time_remains(makers, "ops"):
        with record.attempt("op"):
            time_op(make(), device, timer, bytes_per_us, record)


def time_op(measurement: Measurement, device: str, timer: DeviceTimer, bytes_per_us: float, record: Record) -> None:
    """Time a measurement on every backend that runs on the device, and on its `others`, if their results are equal."""
    expected = measurement.run("reference")
    bound = measurement.bytes / bytes_per_us or ""
    for backend in (*backends_for(measurement.op, device, measurement.dtype), *measurement.others):
        what = measurement.what or measurement.op
        labels = {"shape": measurement.shape, "dtype": str(measurement.dtype), "path": backend}
        with record.attempt(what, **labels):
            check_equal(measurement.run(backend), expected, measurement)
            record.row(what, timer(lambda b=backend: measurement.run(b)), "us", bound=bound, **labels)


def check_equal(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None], measurement: Measurement) -> None:
    """Raise AssertionError if integers differ, or floats by more than another order of summation explains."""
    relative = 1e-2 if measurement.dtype in (torch.float16, torch.bfloat16) else measurement.relative
    for x, y in zip(actual, expected, strict=False):
        if x is None or y is None:
            continue
        largest = float(y.abs().nan_to_num(0.0, 0.0, 0.0).max()) if y.is_floating_point() and y.numel() else 0.0
        torch.testing.assert_close(x, y, rtol=0.0, atol=relative * largest, check_dtype=False)


def measurements(device: str) -> Iterator[Callable[[], Measurement]]:
    """Yield functions that make the measurements, at the shapes of training and decoding."""
    half, full = torch.float16, torch.float32
    for B, T in ((16, 400), (64, 400), (1, 1600), (64, 1600), (1, 400), (16, 100)):
        yield lambda B=B, T=T: attention(B, T, full, device)
    for B, K, V in ((16, 8, 31), (64, 8, 31), (16, 8, 5000), (16, 8, 32000)):
        yield lambda B=B, K=K, V=V: pruning(B, K, V, device)
    for dtype in (torch.bfloat16, full):
        yield lambda dtype=dtype: attention_of_training(49, 161, dtype, device)
    for B, T, S in ((49, 645, 151), (16, 1600, 400)):
        yield lambda B=B, T=T, S=S: ctc(B, T, 31, S, device)
    yield lambda: ctc_times(49, 645, 31, 151, device)
    for B in (16, 64):
        yield lambda B=B: gather(B, 8, device)
        yield lambda B=B: ctc_prefixes(B, 8, 400, 31, device)
        yield lambda B=B: language_model(B, 8, device)
    yield lambda: backtrack(200, 64, 8, device)
    for B, T in ((16, 400), (64, 400), (1, 1600), (64, 1600), (1, 400), (16, 100)):
        yield lambda B=B, T=T: attention(B, T, half, device)


def small_measurements(device: str) -> Iterator[Callable[[], Measurement]]:
    """Yield the same functions at tiny sizes, to try the code."""
    yield lambda: attention(2, 20, torch.float32, device, K=3, D=8)
    yield lambda: attention_of_training(2, 20, torch.float32, device, D=8)
    yield lambda: pruning(2, 3, 31, device)
    yield lambda: gather(2, 3, device)
    yield lambda: ctc(2, 20, 9, 5, device)
    yield lambda: ctc_times(2, 20, 9, 5, device)
    yield lambda: ctc_prefixes(2, 3, 7, 5, device)
    yield lambda: language_model(2, 3, device)
    yield lambda: backtrack(5, 2, 3, device)


def attention(B: int, T: int, dtype: torch.dtype, device: str, K: int = 8, D: int = 256) -> Measurement:
    query, keys, values = (torch.randn(B, n, D, device=device).to(dtype) for n in (K, T, T))
    lengths = torch.full((B,), T, device=device)
    valid = ~padding_mask(lengths, T)

    def run(backend: str) -> Sequence[Tensor | None]:
        if backend == SDPA:
            return (sdpa(query, keys, values, valid),)
        return masked_attention(query, keys, values, lengths, weights=False, backend=backend)

    moved = byte_count(query, query, keys, values)
    return Measurement("masked_attention", f"B{B} K{K} T{T} D{D} E{D}", dtype, run, moved, (SDPA,))


def attention_of_training(B: int, T: int, dtype: torch.dtype, device: str, D: int = 256) -> Measurement:
    """One query, with weights, forward and backward."""
    query, keys, values = (torch.randn(B, n, D, device=device).to(dtype).requires_grad_() for n in (1, T, T))
    lengths = torch.full((B,), T, device=device)

    def run(backend: str) -> Sequence[Tensor | None]:
        context, weights = masked_attention(query, keys, values, lengths, backend=backend)
        return torch.autograd.grad((context.sum() + weights.sum()), (query, keys, values))

    moved = 3 * byte_count(keys, values)
    what = "masked_attention, forward and backward"
    return Measurement("masked_attention", f"B{B} K1 T{T} D{D} E{D}", dtype, run, moved, what=what)


def pruning(B: int, K: int, V: int, device: str) -> Measurement:
    logits, scores = torch.randn(B, K, V, device=device), -torch.rand(B, K, device=device)
    finished, lengths = scores > -0.2, torch.full((B, K), 5, device=device)

    def run(backend: str) -> Sequence[Tensor | None]:
        if backend == TOPK:
            return topk(logits, scores, finished)
        return beam_topk(logits, scores, finished, eos=EOS, lengths=lengths, backend=backend)

    return Measurement("beam_topk", f"B{B} K{K} V{V}", torch.float32, run, byte_count(logits), (TOPK,))


def gather(B: int, K: int, device: str) -> Measurement:
    states = [torch.randn(B, K, n, device=device) for n in (512, 512, 256, 256, 256)]
    parents = torch.randint(0, K, (B, K), device=device)

    def run(backend: str) -> Sequence[Tensor | None]:
        if backend == INDEX_SELECT:
            return index_select(states, parents)
        return beam_gather(states, parents, backend=backend)

    return Measurement("beam_gather", f"B{B} K{K} N1792", torch.float32, run, 2 * byte_count(*states), (INDEX_SELECT,))


def ctc_prefixes(B: int, K: int, T: int, V: int, device: str) -> Measurement:
    ctc_log_probs = ctc_log_probabilities(torch.randn(B, T, V, device=device), torch.full((B,), T, device=device))
    state, parents = ctc_start(ctc_log_probs, K, eos=EOS), torch.arange(K, device=device).repeat(B, 1)
    tokens = torch.randint(3, V, (B, K), device=device)
    before = torch.full_like(tokens, EOS)

    def run(backend: str) -> Sequence[Tensor | None]:
        return ctc_prefix(ctc_log_probs, state, before, parents, tokens, eos=EOS, backend=backend)

    moved = byte_count(ctc_log_probs) + 2 * byte_count(*state)
    return Measurement("ctc_prefix", f"B{B} K{K} T{T} V{V}", torch.float32, run, moved)


def language_model(B: int, K: int, device: str, V: int = 31) -> Measurement:
    """One step of a table of bigrams."""
    model = table_model(torch.log_softmax(torch.randn(V, V), -1), SOS).to(device)
    states = ngram_start(model, B, K).states
    parents = torch.arange(K, device=device).repeat(B, 1)
    tokens = torch.randint(3, V, (B, K), device=device)

    def run(backend: str) -> Sequence[Tensor | None]:
        return ngram_scores(model, states, parents=parents, tokens=tokens, backend=backend)

    return Measurement("ngram_scores", f"B{B} K{K} V{V}", torch.float32, run, 4 * B * K * V)


def ctc(B: int, T: int, V: int, S: int, device: str) -> Measurement:
    """The loss of training, forward and backward."""
    logits, *rest = ctc_inputs(B, T, V, S, device)
    logits.requires_grad_()
    tokens, on_host = rest[1], [x.cpu() for x in rest[::2]]

    def run(backend: str) -> Sequence[Tensor | None]:
        if backend == TORCH_CTC:
            log_probs = F.log_softmax(logits, 2).transpose(0, 1)
            losses = F.ctc_loss(log_probs, tokens, *on_host, BLANK, reduction="none", zero_infinity=True)
        else:
            losses = ctc_loss(logits, *rest, backend=backend)
        return torch.autograd.grad(losses.sum(), logits)

    what = "ctc_loss, forward and backward"
    moved = 3 * byte_count(logits)
    return Measurement("ctc_loss", f"B{B} T{T} V{V} S{S}", torch.float32, run, moved, (TORCH_CTC,), what, 1e-2)


def ctc_times(B: int, T: int, V: int, S: int, device: str) -> Measurement:
    """The alignment of tokens to frames that guides the attention in training."""
    inputs = ctc_inputs(B, T, V, S, device)

    def run(backend: str) -> Sequence[Tensor | None]:
        return (ctc_token_times(*inputs, backend=backend),)

    moved = byte_count(inputs[0])
    return Measurement("ctc_loss", f"B{B} T{T} V{V} S{S}", torch.float32, run, moved, what="ctc_token_times")


def ctc_inputs(B: int, T: int, V: int, S: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits, lengths, tokens and token lengths."""
    tokens, counts = torch.randint(3, V, (B, S), device=device), torch.full((B,), S, device=device)
    return torch.randn(B, T, V, device=device), torch.full((B,), T, device=device), tokens, counts


def backtrack(L: int, B: int, K: int, device: str) -> Measurement:
    tokens, parents, attended_frames = (torch.randint(0, K, (L, B, K), device=device) for _ in range(3))
    scores = torch.randn(L, B, K, device=device)

    def run(backend: str) -> Sequence[Tensor | None]:
        return beam_backtrack(tokens, parents, scores, attended_frames, eos=EOS, backend=backend)

    moved = 2 * byte_count(tokens, attended_frames, scores) + byte_count(parents)
    return Measurement("beam_backtrack", f"L{L} B{B} K{K}", torch.int64, run, moved)


def byte_count(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
