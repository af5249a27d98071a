"""What share of the machine's rate of matrix products the encoder and the decoder reach, in training and decoding.

One batch of preset speech13h on one thread. Operations are those of the products alone, without padding; the rate is
the best that this machine's products of large matrices reach in the same type, measured in the same minute.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks import machine, record
from benchmarks.made import LETTERS_PER_FRAME
from benchmarks.operations import BACKWARD, listener_operations, speller_operations
from benchmarks.test_bench_train import make_batch, preset, shape_of
from las_fast import checkpoint
from las_fast.search.beam import beam_search

COLUMNS = (*record.WHERE, "part", "task", "dtype", "shape", "seconds", "gflop", "gflop_s", "machine_gflop_s", "share")
ROUNDS = 5
BEAM = 8
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def fastest(run: Callable[[], object]) -> float:
    """Return the seconds of the fastest of some calls, as those of the machine's own rate are."""
    times = []
    for _ in range(1 + ROUNDS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


class Parts:
    """The two halves of a model on one batch, each by itself."""

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
        share = {"minimum_share": LETTERS_PER_FRAME, "maximum_share": LETTERS_PER_FRAME, "maximum_extra": 0}
        config = dataclasses.replace(self.config.decoding, beam=BEAM, precision=self.precision, **share)
        beam_search(self.model.eval(), self.memory, config)

    def operations(self, part: str, task: str) -> float:
        listener, speller = self.config.model.listener, self.config.model.speller
        passes = 1 + BACKWARD if task == "training" else 1
        frames, encoder_frames = self.batch.feature_lengths, self.memory.lengths
        if part == "encoder":
            return passes * listener_operations(listener, speller, self.batch.features.shape[2], int(frames.sum()))
        hypotheses = BEAM if task == "decoding" else 1
        tokens = (frames * LETTERS_PER_FRAME).long() + 1
        vocabulary = self.model.vocabulary_size
        each = zip(tokens.tolist(), encoder_frames.tolist(), strict=True)
        one = functools.partial(speller_operations, speller, vocabulary, looked_up=task == "decoding")
        return passes * hypotheses * sum(n * one(t) for n, t in each)


def rate(dtype: torch.dtype) -> float:
    """Return the best operations a second of large products, by whichever library is faster."""
    best = machine.product_rate(dtype)
    return max(best, machine.onednn_rate()) if dtype == torch.float32 else best


@pytest.mark.parametrize("precision", TYPES)
def test_share_of_the_machines_rate(request, capsys, precision):
    parts, rows = Parts(precision), []
    most = rate(TYPES[precision])
    for task in ("training", "decoding"):
        for part in ("encoder", "decoder"):
            seconds = fastest(getattr(parts, f"{part}_{task}"))
            done = parts.operations(part, task)
            assert 0 < done / seconds < 1.2 * most, "more than the machine can do: the count is wrong"
            numbers = (seconds, done / 1e9, done / seconds / 1e9, most / 1e9, done / seconds / most)
            kind = str(TYPES[precision]).removeprefix("torch.")
            rows.append((*record.where(), part, task, kind, shape_of(parts.batch), *(f"{x:.4g}" for x in numbers)))
    with capsys.disabled():
        for row in rows:
            print("\n" + "  ".join(map(str, row[len(record.WHERE) :])), end="")
    if request.config.getoption("--record"):
        record.append(record.RESULTS / "shares.csv", COLUMNS, rows)
