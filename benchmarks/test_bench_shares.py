"""Measure the fraction of peak matmul throughput that encoder and decoder reach, in training and decoding.

The input is one batch of preset speech13h, on one thread. Only matmul operations count, without padding. The peak is
the throughput of large matmuls in the same dtype, measured just before.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks import machine
from benchmarks.flops import BACKWARD, listener_flops, speller_flops
from benchmarks.rows import CONTEXT, RESULTS, append_rows, context
from benchmarks.synthetic_speech import LETTERS_PER_FRAME
from benchmarks.test_bench_train import make_batch, preset
from benchmarks.training_paths import shape_of
from las_fast import checkpoint
from las_fast.search.beam import beam_search

COLUMNS = (*CONTEXT, "part", "task", "dtype", "shape", "seconds", "gflop", "gflop_s", "machine_gflop_s", "share")
ROUNDS = 5
BEAM = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def fastest(run: Callable[[], object]) -> float:
    """Return the shortest time of 1 + ROUNDS calls, in seconds; peak throughput is measured by the shortest, too."""
    times = []
    for _ in range(1 + ROUNDS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


class Parts:
    """Encoder and decoder of a model on one batch, to run separately."""

    def __init__(self, precision: str):
        torch.manual_seed(0)
        self.config, self.precision = preset(), precision
        self.batch = make_batch(self.config)
        self.model = checkpoint.build_model(self.config)
        with torch.no_grad():
            self.memory = self.model.eval().listen(self.batch.features, self.batch.feature_lengths)

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    def encoder_training(self) -> None:
        with self.autocast():
            memory = self.model.train().listen(self.batch.features, self.batch.feature_lengths)
        (memory.keys.sum() + memory.values.sum()).backward()

    def decoder_training(self) -> None:
        keys, values = (x.detach().requires_grad_() for x in self.memory[:2])
        with self.autocast():
            logits, weights = self.model.train().speller(self.memory._replace(keys=keys, values=values),
                                                         self.batch.tokens)  # fmt: skip
        (logits.sum() + weights.sum()).backward()

    @torch.inference_mode()
    def encoder_decoding(self) -> None:
        with self.autocast():
            self.model.eval().listen(self.batch.features, self.batch.feature_lengths)

    def decoder_decoding(self) -> None:
        limits = {"minimum_share": LETTERS_PER_FRAME, "maximum_share": LETTERS_PER_FRAME, "maximum_extra": 0}
        settings = {"beam": BEAM, "beam_threshold": 0.0, "precision": self.precision}  # all hypotheses are counted
        config = dataclasses.replace(self.config.decoding, **settings, **limits)
        beam_search(self.model.eval(), self.memory, config)

    def flops(self, part: str, task: str) -> float:
        """Return the matmul operations of one part in one task."""
        listener, speller = self.config.model.listener, self.config.model.speller
        passes = 1 + BACKWARD if task == "training" else 1
        frame_counts = self.batch.feature_lengths
        if part == "encoder":
            input_size = self.batch.features.shape[2]
            return passes * listener_flops(listener, speller, input_size, int(frame_counts.sum()))
        hypotheses = BEAM if task == "decoding" else 1
        tokens = (frame_counts * LETTERS_PER_FRAME).long() + 1
        vocabulary = self.model.vocabulary_size
        step_flops = functools.partial(speller_flops, speller, vocabulary, embedding_table=task == "decoding")
        utterances = zip(tokens.tolist(), self.memory.lengths.tolist(), strict=True)
        return passes * hypotheses * sum(count * step_flops(T) for count, T in utterances)


def peak_flops(dtype: torch.dtype) -> float:
    """Return the operations per second of large matmuls, by the faster library."""
    peak = machine.matmul_flops(dtype)
    return max(peak, machine.onednn_flops()) if dtype == torch.float32 else peak


@pytest.mark.parametrize("precision", DTYPES)
def test_share_of_peak_throughput(request, capsys, precision):
    parts, rows = Parts(precision), []
    peak = peak_flops(DTYPES[precision])
    for task in ("training", "decoding"):
        for part in ("encoder", "decoder"):
            seconds = fastest(getattr(parts, f"{part}_{task}"))
            flops = parts.flops(part, task)
            assert 0 < flops / seconds < 1.2 * peak, "above peak throughput: the operations are miscounted"
            numbers = (seconds, flops / 1e9, flops / seconds / 1e9, peak / 1e9, flops / seconds / peak)
            dtype = str(DTYPES[precision]).removeprefix("torch.")
            rows.append((*context(), part, task, dtype, shape_of(parts.batch), *(f"{x:.4g}" for x in numbers)))
    with capsys.disabled():
        for row in rows:
            print("\n" + "  ".join(map(str, row[len(CONTEXT) :])), end="")
    if request.config.getoption("--record"):
        append_rows(RESULTS / "shares.csv", COLUMNS, rows)
