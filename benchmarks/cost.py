"""Estimate the cost of training a preset: measured on this machine's CPU, and a lower bound for an NVIDIA H100.

    python -m benchmarks.cost --config hw4p2 --hours 460 [--price-core 0.04] [--price-gpu 3] [--record]

On the CPU, steps of las_fast's trainer are timed on one thread, on synthetic batches with the utterance lengths of
LibriSpeech. The H100 is not measured. Its time is that of the matmuls at the throughput of the data sheet, plus the
much longer time of the LSTM steps, which depend on each other. Validation and data loading are not included.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time

import torch

from benchmarks.flops import BACKWARD, listener_flops, speller_flops
from benchmarks.rows import CONTEXT, RESULTS, append_rows, context
from benchmarks.synthetic_speech import LETTERS_PER_FRAME, audiobook_frame_counts
from benchmarks.training_paths import make_trainers, synthetic_batch
from las_fast.cli import run
from las_fast.config import Config, load_config
from las_fast.data.batch_plan import BucketBatches
from las_fast.errors import InputError
from las_fast.text import Vocabulary

FILE = RESULTS / "cost.csv"
COLUMNS = (*CONTEXT, "config", "hours", "epochs", "dtype", "times_real_time", "core_hours", "cpu_cost",
           "gpu_products_hours", "gpu_hours", "gpu_cost", "price_core", "price_gpu")  # fmt: skip
H100_FLOPS = 989e12  # dense bf16 matmul operations per second, from the data sheet of the SXM card
H100_STEP = 2.5e-6  # seconds between dependent launches, assumed as in tests/gpu_proof/roofline.py
BATCHES = 4


def typical_batches(config: Config) -> list[torch.Tensor]:
    """Return the feature frames (B,) int64 of the utterances of BATCHES batches, from short to long."""
    counts = audiobook_frame_counts(8000)
    batches = BucketBatches(counts, frames_per_batch=config.data.frames_per_batch,
                            utterances_per_batch=config.data.utterances_per_batch, seed=0).epoch(0)  # fmt: skip
    batches.sort(key=lambda batch: counts[batch].max())
    indices = [int((i + 0.5) * len(batches) / BATCHES) for i in range(BATCHES)]
    return [torch.from_numpy(counts[batches[i]]) for i in indices]


def audio_hours(batches: list[torch.Tensor]) -> float:
    return sum(int(frame_counts.sum()) for frame_counts in batches) / 360_000  # frames of 10 ms


def speed_on_cpu(config: Config, batches: list[torch.Tensor], precision: str, rounds: int) -> float:
    """Return the hours of audio that one thread trains on per hour."""
    path = {"fp32": "las_fast", "bf16": "las_fast bf16"}[precision]
    trainer = make_trainers(config, [path])[path]
    seconds = 0.0
    for frame_counts in batches:
        batch, times = synthetic_batch(frame_counts, config.features.input_size), []
        trainer.train_step(batch)
        for _ in range(rounds):
            started = time.perf_counter()
            trainer.train_step(batch)
            times.append(time.perf_counter() - started)
        seconds += statistics.median(times)
    return 3600 * audio_hours(batches) / seconds


def step_flops(config: Config, frame_counts: torch.Tensor) -> float:
    """Return the matmul operations of a training step on utterances of `frame_counts` feature frames (B,)."""
    listener, speller = config.model.listener, config.model.speller
    total = listener_flops(listener, speller, config.features.input_size, int(frame_counts.sum()))
    for count in frame_counts.tolist():
        encoder_frames, tokens = count / listener.time_reduction, count * LETTERS_PER_FRAME + 1
        vocabulary = len(Vocabulary(config.data.characters))
        total += tokens * speller_flops(speller, vocabulary, encoder_frames, embedding_table=False)
    return (1 + BACKWARD) * total


def dependent_steps(config: Config, frame_counts: torch.Tensor) -> float:
    """Return the length of the longest chain of dependent launches in a training step, forward and backward.

    Per layer, one launch per LSTM frame; per token, one for each cell and one for the attention.
    """
    listener, longest = config.model.listener, int(frame_counts.max())
    steps = frames = longest / math.prod(listener.conv_strides)
    for layer in range(listener.pyramids + listener.top_layers):
        frames = frames / 2 if layer < listener.pyramids else frames
        steps += frames
    tokens = longest * LETTERS_PER_FRAME + 1
    return 2 * (steps + tokens * (len(config.model.speller.lstm_sizes) + 1))  # forward, backward


def hours_on_h100(config: Config, batches: list[torch.Tensor], hours: float) -> tuple[float, float]:
    """Return lower bounds in hours for `hours` of audio: for the matmuls alone, and with the dependent steps."""
    matmuls = sum(step_flops(config, frame_counts) for frame_counts in batches) / H100_FLOPS
    steps = sum(dependent_steps(config, frame_counts) for frame_counts in batches) * H100_STEP
    return tuple(seconds / 3600 * hours / audio_hours(batches) for seconds in (matmuls, matmuls + steps))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="hw4p2", help="preset or YAML file (default: hw4p2)")
    parser.add_argument("--hours", type=float, default=460.0, help="hours of training data (default: 460)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps per batch (default: 3)")
    parser.add_argument("--price-core", type=float, default=0.04, help="assumed dollars per core hour")
    parser.add_argument("--price-gpu", type=float, default=3.0, help="assumed dollars per H100 hour")
    parser.add_argument("--record", action="store_true", help=f"append the row to {FILE.name}")
    options = parser.parse_args(argv)
    if options.hours <= 0 or options.rounds < 1:
        raise InputError(f"--hours must be above 0 and --rounds at least 1; got {options.hours:g}, {options.rounds}")
    torch.set_num_threads(1)
    config = load_config(options.config)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, threads=1))
    batches, hours = typical_batches(config), options.hours * config.training.epochs
    speed = speed_on_cpu(config, batches, options.precision, options.rounds)
    gpu_matmuls, gpu = hours_on_h100(config, batches, hours)
    numbers = (speed, hours / speed, hours / speed * options.price_core, gpu_matmuls, gpu, gpu * options.price_gpu)
    row = (*context(), options.config, options.hours, config.training.epochs, options.precision,
           *(f"{x:.4g}" for x in numbers), options.price_core, options.price_gpu)  # fmt: skip
    print("\n".join(f"{name:<20}{value}" for name, value in zip(COLUMNS, row, strict=True)))
    if options.record:
        append_rows(FILE, COLUMNS, [row])


if __name__ == "__main__":
    run(main)
