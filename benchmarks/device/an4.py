"""Train the preset an4 on AN4: the loss curve, the CER on dev, and the speed."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.device import edit_distance
from benchmarks.device.parts import Options
from benchmarks.device.record import MARGIN, Record
from benchmarks.training_paths import with_training
from las_fast.config import Config, load_config
from las_fast.data.dataset import SpeechDataset
from las_fast.data.layouts import open_corpus
from las_fast.errors import Stopped
from las_fast.train import load_data
from las_fast.training.runlog import read_rows
from las_fast.training.trainer import Trainer

WITHOUT_DATA = "no --data; see tests/gpu_proof/README.md"
EPOCHS = 40
MAX_CER = 35.0  # percent on dev after EPOCHS; 21.0 on a CPU
SAVING_SECONDS = 8.0  # for the training to validate and save before its part must end


def run(options: Options, record: Record) -> None:
    edit_distance.provide()
    with tempfile.TemporaryDirectory() as folder, data_of(options, Path(folder)) as data:
        if data is None:
            return record.skip("training of AN4", WITHOUT_DATA)
        config = settings(options, Path(folder))
        train_data, dev_data = load_data(config, open_corpus(data))
        train(config, train_data, dev_data, Path(folder) / "run", options, record)


@contextlib.contextmanager
def data_of(options: Options, folder: Path) -> Iterator[Path | None]:
    """Yield the folder of --data. Without --data, yield noise in the same layout if the run is quick, else None."""
    if options.data is None and options.quick:
        write_noise(folder / "data")
        yield folder / "data"
    else:
        yield options.data


def write_noise(root: Path) -> None:
    """Write an archive in the layout of AN4: noise with made-up transcripts."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("dev", 3)):
        for kind in ("mfcc", "transcript"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            frames = generator.normal(size=(int(generator.integers(40, 90)), 13)).astype(np.float32)
            np.save(root / split / "mfcc" / f"{split}-{i}.npy", frames)
            np.save(root / split / "transcript" / f"{split}-{i}.npy", np.array(["<sos>", *"ONE TWO"[i % 5 :], "<eos>"]))


def settings(options: Options, folder: Path) -> Config:
    """Return settings with which the attention forms within EPOCHS."""
    config = load_config("an4")
    # Workers, so that processes are forked and batches pinned while graphs are captured.
    cached = dataclasses.replace(config.data, cache=str(folder / "cache"), workers=2)
    # The preset replaces words from epoch 40 on, which this training does not reach.
    config = dataclasses.replace(config, data=cached, augment=dataclasses.replace(config.augment, splice=0.0))
    if options.quick:
        return with_training(config, epochs=1, validate_every=1.0, pictures=0)
    return with_training(config, epochs=EPOCHS, guided_frames=6.0, pictures=0)


def train(
    config: Config, train_data: SpeechDataset, dev_data: SpeechDataset, out: Path, options: Options, record: Record
) -> None:
    """Train within the part's time limit; record the training's log rows as they are written."""
    out.mkdir()
    trainer = Trainer(config, train_data, dev_data, out, torch.device(options.device), {})
    labels = {"shape": f"{len(train_data)} utterances", "dtype": str(trainer.precision)}
    timer = threading.Timer(record.seconds_left() - MARGIN - SAVING_SECONDS, stop, [trainer])
    timer.daemon = True
    timer.start()
    started = time.perf_counter()
    with recording_log(out / "log.jsonl", record, labels), contextlib.suppress(Stopped):
        trainer.run()
    timer.cancel()
    seconds, epochs = time.perf_counter() - started, trainer.epoch
    shutil.copy(out / "log.jsonl", options.out / "an4.jsonl")
    record.row("training of AN4", seconds, "s", note=f"{epochs:.1f} of {config.training.epochs} epochs", **labels)
    audio = float(train_data.seconds.sum()) * epochs
    record.row("training of AN4: seconds of audio per second", audio / seconds, **labels)
    if epochs >= EPOCHS:
        record.check("training of AN4: best CER", trainer.progress.best_cer, MAX_CER, "%", **labels)


def stop(trainer: Trainer) -> None:
    """Make a training stop after its current step, as a signal would."""
    trainer.stop.signum = signal.SIGTERM


@contextlib.contextmanager
def recording_log(path: Path, record: Record, labels: dict[str, str]) -> Iterator[None]:
    """Record the validations in a training's log, and one training loss per epoch, while the block runs."""
    ended, recorded = threading.Event(), [0]

    def record_new_rows() -> None:
        rows = read_rows(path)
        for before, row in zip([None, *rows][recorded[0] :], rows[recorded[0] :], strict=False):
            record_log_row(row, before, record, labels)
        recorded[0] = len(rows)

    def poll() -> None:
        while not ended.wait(2.0):
            record_new_rows()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        record_new_rows()


def record_log_row(row: dict, before: dict | None, record: Record, labels: dict[str, str]) -> None:
    """Record a validation, or the training loss if the row is the first of its epoch."""
    note = f"epoch {row['epoch']:.1f}"
    if row["kind"] == "valid":
        record.row("training of AN4: dev CER", row["cer"], "%", note=note, **labels)
        record.row("training of AN4: dev loss", row["loss"], "nats per token", note=note, **labels)
    elif before is None or int(before["epoch"]) != int(row["epoch"]):
        record.row("training of AN4: loss", row["loss"], note=note, **labels)
