"""Time a training step of las_fast and plain PyTorch on the same batches, its parts, and count its launches."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.device.parts import Options
from benchmarks.device.record import Record, require_cuda
from benchmarks.device.timing import backends_for, median_seconds, profile, seconds_of_call, synchronize
from benchmarks.synthetic_speech import audiobook_frame_counts, frame_counts
from benchmarks.training_paths import PATHS, dtype_of, make_trainers, shape_of, shrunk, synthetic_batch
from las_fast.config import Config, load_config
from las_fast.data.batch import Batch
from las_fast.data.batch_plan import BucketBatches
from las_fast.training.losses import training_loss
from las_fast.training.trainer import Trainer

TYPICAL = ("hw4p2", 49)  # preset, utterances of the batch
MAIN_PATHS = ("las_fast bf16", "plain graphed bf16", "plain bf16")
OTHER_PATHS = tuple(path for path in PATHS if path not in MAIN_PATHS)
OTHER_BATCHES = (
    ("an4", 16, (*MAIN_PATHS, "las_fast", "usual")),
    ("hw4p2", 96, MAIN_PATHS),
    ("hw4p2", 22, MAIN_PATHS),
)
STEPS_IN_A_ROW = 10
QUICK_LENGTHS = (60, 37)  # feature frames


def run(options: Options, record: Record) -> None:
    """Time the step, the most important first: las_fast and its best baselines, then where the time goes."""
    time_steps([(*TYPICAL, MAIN_PATHS)], options, record)
    profile_step(MAIN_PATHS[0], options, record)
    free(options.device)
    with record.attempt("parts of a training step"):
        time_parts(TYPICAL, options, record)
    if not options.quick:
        time_steps(OTHER_BATCHES, options, record)
        profile_step(MAIN_PATHS[1], options, record)
    time_steps([(*TYPICAL, OTHER_PATHS)], options, record)


def time_steps(batches: Sequence[tuple[str, int, tuple[str, ...]]], options: Options, record: Record) -> None:
    """Time a step of each path on each batch."""
    steps = [(preset, B, path) for preset, B, paths in batches for path in paths]
    for preset, B, path in record.while_time_remains(steps, "training step"):
        batch = make_batch(preset, B, options.quick)
        labels = {"shape": f"{preset} {shape_of(batch)}", "dtype": dtype_of(path), "path": path}
        free(options.device)
        with record.attempt("training step", **labels):
            time_step(path, batch, config_of(preset, options.quick), options, record, labels)


def profile_step(path: str, options: Options, record: Record) -> None:
    """Profile a step of one path, if there is time left."""
    for _ in record.while_time_remains([path], "profile of a training step"):
        free(options.device)
        with record.attempt("profile of a training step", path=path):
            record_profile(path, make_batch(*TYPICAL, options.quick), options, record)


def config_of(preset: str, quick: bool) -> Config:
    return shrunk(load_config(preset)) if quick else load_config(preset)


def make_batch(preset: str, B: int, quick: bool) -> Batch:
    """Return a batch of about B utterances, as the preset's batching cuts it from synthetic read speech."""
    config = load_config(preset)
    if quick:
        return synthetic_batch(torch.tensor(QUICK_LENGTHS), config.features.input_size)
    counts = audiobook_frame_counts(8000) if preset == "hw4p2" else frame_counts(844)
    data = config.data
    batches = BucketBatches(
        counts, frames_per_batch=data.frames_per_batch, utterances_per_batch=data.utterances_per_batch, seed=0
    ).epoch(0)
    nearest = min(batches, key=lambda batch: (abs(len(batch) - B), -counts[batch].max()))
    return synthetic_batch(torch.from_numpy(counts[nearest]), config.features.input_size)


def make_step(path: str, batch: Batch, config: Config, device: str) -> Callable[[], object]:
    """Return a function that takes a training step by one path."""
    trainer, device_batch = make_trainers(config, [path], device)[path], batch.to(device)
    return lambda: trainer.train_step(device_batch)


def time_step(path: str, batch: Batch, config: Config, options: Options, record: Record, labels: dict) -> None:
    device = options.device
    if "graphed" in path:
        require_cuda(device)
    step = make_step(path, batch, config, device)
    repeats = {"rounds": 1, "warmups": 0} if options.quick else {"rounds": 5}
    record.row("training step alone", 1e3 * median_seconds(step, device, **repeats), "ms", **labels)
    # In a training the host runs ahead of the device, so steps in a row take less time than one alone.
    count = 1 if options.quick else STEPS_IN_A_ROW
    seconds = seconds_of_call(lambda: [step() for _ in range(count)], device) / count
    record.row("training step", 1e3 * seconds, "ms", **labels)
    audio = float(batch.feature_lengths.sum()) / 100
    record.row("training: seconds of audio per second", audio / seconds, **labels)
    if device == "cuda":
        record.row("training: peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB", **labels)


def free(device: str) -> None:
    """Free the memory of the previous path."""
    gc.collect()
    if device == "cuda":
        with contextlib.suppress(RuntimeError):  # after an error of the device nothing works
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


# --------------------------------------------------------------------------------------------------------------- parts


def time_parts(typical: tuple[str, int], options: Options, record: Record) -> None:
    """Time each part of las_fast's step: the forward pass alone, and with the backward pass."""
    preset, B = typical
    device, config, batch = options.device, config_of(preset, options.quick), make_batch(preset, B, options.quick)
    trainer = make_trainers(config, ["las_fast bf16"], device)["las_fast bf16"]
    labels = {"shape": f"{preset} {shape_of(batch)}", "dtype": "bfloat16"}
    repeats = {"rounds": 1, "warmups": 0} if options.quick else {"rounds": 5}
    parts = StepParts(trainer, batch.to(device), device).functions(device)
    for name, path, function in record.while_time_remains(parts, "parts of a training step"):
        for what, backward in ((f"{name}, forward", False), (name, True)):
            with record.attempt(what, path=path, **labels):
                seconds = median_seconds(lambda f=function, b=backward: f(b), device, max_seconds=1.5, **repeats)
                record.row(what, 1e3 * seconds, "ms", path=path, **labels)
    with record.attempt("clipping and AdamW", **labels):
        record.row("clipping and AdamW", 1e3 * median_seconds(optimise(trainer), device), "ms", **labels)


class StepParts:
    """Listener, decoder and losses of a training step, each run by itself on inputs computed once."""

    def __init__(self, trainer: Trainer, batch: Batch, device: str):
        self.model, self.training, self.batch = trainer.model.train(), trainer.config.training, batch
        self.autocast = torch.autocast(device, torch.bfloat16)
        self.tokens, self.token_lengths = batch.targets
        with self.autocast, torch.no_grad():
            self.memory = self.model.listen(batch.features, batch.feature_lengths)
            self.output = self.model(batch.features, batch.feature_lengths, self.tokens)

    def functions(self, device: str) -> list[tuple[str, str, Callable[[bool], object]]]:
        """Return (name, path, function) of each part; function(backward) also runs the backward pass if it is true.

        The decoder is a part per available backend of speller_unroll, the slowest last.
        """
        decoders = [
            ("decoder", backend, partial(self.decoder, backend=backend))
            for backend in sorted(backends_for("speller_unroll", device), key="reference".__eq__)
        ]
        return [("listener", "", self.listener), *decoders, ("losses", "", self.losses)]

    def listener(self, backward: bool) -> None:
        with self.autocast:
            memory = self.model.listen(self.batch.features, self.batch.feature_lengths)
        self.finish([x for x in (memory.keys, memory.values, memory.ctc_logits) if x is not None], backward)

    def decoder(self, backward: bool, *, backend: str) -> None:
        keys, values = (x.detach().requires_grad_() for x in (self.memory.keys, self.memory.values))
        with self.autocast:
            results = self.model.speller(self.memory._replace(keys=keys, values=values), self.tokens, backend=backend)
        self.finish(list(results), backward)

    def losses(self, backward: bool) -> None:
        named = {"logits": self.output.logits, "weights": self.output.weights, "ctc_logits": self.output.ctc[0]}
        output = self.output._replace(**{name: x.detach().requires_grad_() for name, x in named.items()})
        loss, _ = training_loss(
            output, self.tokens, self.token_lengths, label_smoothing=self.training.label_smoothing, ctc_weight=1.0,
            guided_weight=1.0, guided_width=self.training.guided_width, guided_frames=6.0,
        )  # fmt: skip
        self.finish([loss], backward)

    def finish(self, results: list[torch.Tensor], backward: bool) -> None:
        if backward:
            torch.autograd.backward(results, [torch.ones_like(x) for x in results])
            self.model.zero_grad()


def optimise(trainer: Trainer) -> Callable[[], object]:
    """Return a function that clips made-up gradients and takes a step of AdamW."""
    parameters = list(trainer.model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.nn.utils.clip_grad_norm_(parameters, trainer.config.training.clip_norm)
        trainer.optimiser.step()

    return step


# ------------------------------------------------------------------------------------------------------------- profile


def record_profile(path: str, batch: Batch, options: Options, record: Record) -> None:
    """Record the kernels, launches, waits and copies of one step on the typical batch, and its longest kernels."""
    device = options.device
    step = make_step(path, batch, config_of(TYPICAL[0], options.quick), device)
    for _ in range(1 if device == "cpu" else 3):
        step()
    synchronize(device)
    labels = {"shape": f"{TYPICAL[0]} {shape_of(batch)}", "dtype": dtype_of(path), "path": path}
    measured = profile(step, device)
    what = "profile of a training step" if device == "cuda" else "torch's ops in a training step"
    for name in ("kernels", "launches", "graph_launches", "waits", "copies_to_host", "busy_ms"):
        record.row(f"{what}: {name}", getattr(measured, name), **labels)
    for name, count, milliseconds in measured.longest:
        record.row(f"{what}: {name[:90]}", milliseconds, "ms", note=f"{count} times", **labels)
