"""What training a preset takes: measured on this machine's CPU, and at least, by its data sheet, on an NVIDIA H100.

    python -m benchmarks.cost --config hw4p2 --hours 460 [--price-core 0.04] [--price-gpu 3] [--record]

On the CPU, steps of las_fast's trainer are timed on made-up batches, short to long, of utterances as long as
LibriSpeech's, on one thread. The H100 is not measured: its time is that of the products at the rate of its data sheet,
and, which is far more, of the LSTM steps that must wait for each other. Validations and loading come on top of both.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time

import torch

from benchmarks import record
from benchmarks.made import LETTERS_PER_FRAME, book_frame_counts
from benchmarks.operations import BACKWARD, listener_operations, speller_operations
from benchmarks.test_bench_train import batch_of, trainers
from las_fast.cli import run
from las_fast.config import Config, load_config
from las_fast.data.batching import BucketBatches
from las_fast.errors import InputError
from las_fast.text import Vocabulary

FILE = record.RESULTS / "cost.csv"
COLUMNS = (*record.WHERE, "config", "hours", "epochs", "dtype", "times_real_time", "core_hours", "cpu_cost",
           "gpu_products_hours", "gpu_hours", "gpu_cost", "price_core", "price_gpu")  # fmt: skip
H100_RATE = 989e12  # operations a second of dense bf16 products, by the data sheet of the SXM card
H100_STEP = 2.5e-6  # seconds from one dependent launch to the next, assumed as in tests/gpu_proof/roofline.py
BATCHES = 4


def typical_batches(config: Config) -> list[torch.Tensor]:
    """Return the frames (B,) int64 of the utterances of some of an epoch's batches, from short to long."""
    counts = book_frame_counts(8000)
    batches = BucketBatches(counts, frames_per_batch=config.data.frames_per_batch,
                            utterances_per_batch=config.data.utterances_per_batch, seed=0).epoch(0)  # fmt: skip
    batches.sort(key=lambda batch: counts[batch].max())
    places = [int((i + 0.5) * len(batches) / BATCHES) for i in range(BATCHES)]
    return [torch.from_numpy(counts[batches[place]]) for place in places]


def audio_hours(batches: list[torch.Tensor]) -> float:
    return sum(int(frames.sum()) for frames in batches) / 360_000  # frames of 10 ms


def speed_on_cpu(config: Config, batches: list[torch.Tensor], precision: str, rounds: int) -> float:
    """Return how many hours of audio this thread trains on in an hour."""
    path = {"fp32": "las_fast", "bf16": "las_fast bf16"}[precision]
    running = trainers(config, [path])[path]
    seconds = 0.0
    for frames in batches:
        batch, times = batch_of(frames, config.features.input_size), []
        running.train_step(batch)
        for _ in range(rounds):
            started = time.perf_counter()
            running.train_step(batch)
            times.append(time.perf_counter() - started)
        seconds += statistics.median(times)
    return 3600 * audio_hours(batches) / seconds


def operations(config: Config, frames: torch.Tensor) -> float:
    """Return those of the products of a training step on utterances of `frames` feature frames, without padding."""
    listener, speller = config.model.listener, config.model.speller
    total = listener_operations(listener, speller, config.features.input_size, int(frames.sum()))
    for count in frames.tolist():
        left, tokens = count / listener.time_reduction, count * LETTERS_PER_FRAME + 1
        vocabulary = len(Vocabulary(config.data.characters))
        total += tokens * speller_operations(speller, vocabulary, left, looked_up=False)
    return (1 + BACKWARD) * total


def dependent_steps(config: Config, frames: torch.Tensor) -> float:
    """Return how many steps of a training step must wait for the one before: LSTM frames, and cells and attention."""
    listener, longest = config.model.listener, int(frames.max())
    steps = left = longest / math.prod(listener.conv_strides)
    for layer in range(listener.pyramids + listener.top_layers):
        left = left / 2 if layer < listener.pyramids else left
        steps += left
    tokens = longest * LETTERS_PER_FRAME + 1
    return 2 * (steps + tokens * (len(config.model.speller.lstm_sizes) + 1))  # forward, backward


def hours_on_h100(config: Config, batches: list[torch.Tensor], hours: float) -> tuple[float, float]:
    """Return the least hours of `hours` of audio: for the products alone, and with the dependent steps."""
    products = sum(operations(config, frames) for frames in batches) / H100_RATE
    steps = sum(dependent_steps(config, frames) for frames in batches) * H100_STEP
    return tuple(seconds / 3600 * hours / audio_hours(batches) for seconds in (products, products + steps))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="hw4p2", help="preset or YAML")
    parser.add_argument("--hours", type=float, default=460.0, help="of training data")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each batch")
    parser.add_argument("--price-core", type=float, default=0.04, help="dollars an hour of a CPU core, assumed")
    parser.add_argument("--price-gpu", type=float, default=3.0, help="dollars an hour of an H100, assumed")
    parser.add_argument("--record", action="store_true", help=f"append the row to {FILE.name}")
    options = parser.parse_args(words)
    if options.hours <= 0 or options.rounds < 1:
        raise InputError(f"--hours must be above 0 and --rounds at least 1; got {options.hours:g}, {options.rounds}")
    torch.set_num_threads(1)
    config = load_config(options.config)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, threads=1))
    batches, heard = typical_batches(config), options.hours * config.training.epochs
    speed = speed_on_cpu(config, batches, options.precision, options.rounds)
    products, gpu = hours_on_h100(config, batches, heard)
    numbers = (speed, heard / speed, heard / speed * options.price_core, products, gpu, gpu * options.price_gpu)
    row = (*record.where(), options.config, options.hours, config.training.epochs, options.precision,
           *(f"{x:.4g}" for x in numbers), options.price_core, options.price_gpu)  # fmt: skip
    print("\n".join(f"{name:<20}{value}" for name, value in zip(COLUMNS, row, strict=True)))
    if options.record:
        record.append(FILE, COLUMNS, [row])


if __name__ == "__main__":
    run(main)
