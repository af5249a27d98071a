"""python -m las_fast.train: from (features or audio, transcript) pairs to a Listen, Attend and Spell model."""

from __future__ import annotations

import argparse
import contextlib
import copy
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from las_fast import checkpoint, monitor
from las_fast.augment import Augment
from las_fast.checkpoint import AVERAGED, BEST, LAST
from las_fast.cli import parse_settings, run
from las_fast.config import Config, check, load_config, presets, to_tree, to_yaml
from las_fast.data.batching import Batch, BucketBatches, make_loader
from las_fast.data.dataset import Corpus, SpeechDataset, load_dataset, open_corpus
from las_fast.errors import InputError
from las_fast.losses import training_loss
from las_fast.runlog import RunLog
from las_fast.schedules import Plateau, cosine_share, ctc_weight, guided_weight, teacher_forcing_rate
from las_fast.text import Vocabulary
from las_fast.validate import Validation, validate

# Settings that may differ when resuming: they change where and how fast, not what is learned.
FREE_TO_CHANGE = (
    "data.workers",
    "data.cache",
    "training.checkpoint_minutes",
    "training.wandb",
    "training.monitor_epoch",
)


@dataclass
class Progress:
    """Where training stands; saved in every checkpoint."""

    step: int = 0  # optimiser steps taken
    best_cer: float = float("inf")
    formed_epoch: float | None = None  # first validation at which the attention had formed
    plateau: Plateau = field(default_factory=Plateau)
    averaged_steps: int = 0
    skipped_steps: int = 0  # steps whose gradient was not finite


class Pace:
    """Seconds of audio trained on a second, since it was made."""

    def __init__(self):
        self.began, self.audio = time.perf_counter(), 0.0

    def count(self, audio_seconds: float) -> None:
        self.audio += audio_seconds

    def speed(self) -> float:
        return self.audio / (time.perf_counter() - self.began)


class Trainer:
    """One training run in the folder `out`: data, model, optimiser, and the loop over steps."""

    def __init__(self, config: Config, corpus: Corpus, out: Path, device: torch.device):
        self.config, self.out, self.device = config, out, device
        self.vocabulary = Vocabulary(config.data.characters)
        self.train_data, self.dev_data = load_data(config, corpus)
        self.batches = BucketBatches(
            self.train_data.frames,
            frames_per_batch=config.data.frames_per_batch,
            utterances_per_batch=config.data.utterances_per_batch,
            seed=config.training.seed,
            speed=config.augment.speed,
        )
        self.steps_per_epoch = len(self.batches)
        self.steps = self.steps_per_epoch * config.training.epochs
        torch.manual_seed(config.training.seed)
        self.model = checkpoint.build_model(config).to(device)
        self.averaged = copy.deepcopy(self.model).eval() if config.training.ema_decay else None
        self.optimiser = make_optimiser(self.model, config)
        self.precision = choose_precision(config.training.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.progress = Progress()
        self.stop_requested = False
        self.pace = Pace()

    # The loop

    def run(self) -> None:
        """Train to the last epoch; a first interrupt ends it after the step under way, with its state saved."""
        self.log = RunLog(self.out, self.config, self.progress.step)
        self.pace, saved = Pace(), time.monotonic()
        with catch_stop_signals(self), self._progress_bar() as bar:
            while self.progress.step < self.steps and not self.stop_requested:
                for batch in self._rest_of_epoch():
                    parts = self.train_step(batch.to(self.device))
                    self.pace.count(float(batch.feature_lengths.sum()) * self.config.features.shift_ms / 1000)
                    self._show(bar, parts)
                    if self._validation_is_due():
                        self._validate_and_save(bar)
                        saved = time.monotonic()
                    elif time.monotonic() - saved > 60 * self.config.training.checkpoint_minutes:
                        self.save()
                        saved = time.monotonic()
                    if self.stop_requested:
                        break
        self.save()
        self.log.close()
        if self.stop_requested:
            raise KeyboardInterrupt

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """Take one optimiser step; return the loss parts per token, detached."""
        training, epoch = self.config.training, self.epoch
        # Dropout and teacher forcing draw from a seed of their own at each step: resuming needs no random state.
        torch.manual_seed(training.seed * 1_000_003 + self.progress.step)
        share = cosine_share(training, self.progress.step, self.steps) * self.progress.plateau.share
        for group in self.optimiser.param_groups:
            group["lr"] = training.learning_rate * share
        self.model.train()
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            output = self.model(
                batch.features, batch.feature_lengths, batch.tokens, teacher_forcing_rate(training, epoch)
            )
        loss, parts = training_loss(
            output,
            batch.tokens,
            batch.token_lengths,
            label_smoothing=training.label_smoothing,
            ctc_weight=ctc_weight(training, epoch),
            guided_weight=guided_weight(training, epoch),
            guided_width=training.guided_width,
        )
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)  # clipping must see the true gradients
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), training.clip_norm)
        self._update(norm)
        return {"loss": loss.detach(), **parts, "gradient_norm": norm}

    def _update(self, norm: Tensor) -> None:
        if self.scaler.is_enabled() or bool(norm.isfinite()):
            self.scaler.step(self.optimiser)
        else:
            self.progress.skipped_steps += 1
            if self.progress.skipped_steps > 100:
                raise InputError("100 steps had gradients that are not finite; lower --training.learning-rate")
        self.scaler.update()
        self.progress.step += 1
        if self.averaged is not None:
            self._average()

    def _average(self) -> None:
        """averaged = decay * averaged + (1 - decay) * weights, with a shorter memory at the start."""
        self.progress.averaged_steps += 1
        n = self.progress.averaged_steps
        decay = min(self.config.training.ema_decay, (1 + n) / (10 + n))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay)

    @property
    def epoch(self) -> float:
        return self.progress.step / self.steps_per_epoch

    def _rest_of_epoch(self):
        epoch, start = divmod(self.progress.step, self.steps_per_epoch)
        augment = Augment(self.config.augment)
        return make_loader(
            self.train_data,
            self.batches.epoch(epoch),
            self.vocabulary,
            augment=augment,
            seed=self.config.training.seed,
            epoch=epoch,
            start=start,
            workers=self.config.data.workers,
        )

    # Validation and what is shown

    def _validation_is_due(self) -> bool:
        every = self.config.training.validate_every * self.steps_per_epoch
        step = self.progress.step
        return step == self.steps or int(step / every) > int((step - 1) / every)

    def _validate_and_save(self, bar: tqdm) -> None:
        model, speed = self.averaged or self.model, self.pace.speed()
        result = validate(model, self.dev_data, self.vocabulary, self.config, self.device, self.out, self.epoch)
        self._judge(result)
        line = monitor.line(result.alignment, self.epoch, self.config)
        self.log.validation(self.progress.step, self.epoch, result, line)
        scores = result.scores
        bar.write(
            f"epoch {self.epoch:g}: dev loss {result.loss:.3f} a token, LD {scores.ld:.2f}, CER {scores.cer:.2f}%, "
            f"WER {scores.wer:.2f}%; trained at {speed:.0f} x real time\n  {line}"
        )
        self.pace = Pace()
        info = {"epoch": self.epoch, "step": self.progress.step, "dev": asdict(scores)}
        self._save_weights(model, info, best=scores.cer < self.progress.best_cer)
        self.progress.best_cer = min(self.progress.best_cer, scores.cer)
        self.save()

    def _judge(self, result: Validation) -> None:
        self.progress.plateau.update(result.scores.cer, self.config.training)
        if result.alignment.formed and self.progress.formed_epoch is None:
            self.progress.formed_epoch = self.epoch

    def _save_weights(self, model: nn.Module, info: dict, best: bool) -> None:
        statistics = self.train_data.statistics if self.config.features.normalisation == "global" else None
        weights = model.state_dict()
        if best:
            checkpoint.save_model(self.out / BEST, weights, self.config, statistics, info)
        if self.averaged is not None:
            checkpoint.save_model(self.out / AVERAGED, weights, self.config, statistics, info)

    def _progress_bar(self) -> tqdm:
        return tqdm(total=self.steps, initial=self.progress.step, unit="step", dynamic_ncols=True, disable=None)

    def _show(self, bar: tqdm, parts: dict[str, Tensor]) -> None:
        step = self.progress.step
        bar.update()
        if step % 10 == 0 or step == self.steps:
            values = {name: float(value) for name, value in parts.items()}
            self.log.training(step, self.epoch, values, self.optimiser.param_groups[0]["lr"], self.pace.speed())
            bar.set_postfix_str(
                f"epoch {self.epoch:.1f}, loss {values['loss']:.3f}, {self.pace.speed():.0f} x real time"
            )

    # State on disk

    def save(self) -> None:
        """Write last.pt: everything that resuming needs."""
        progress = asdict(self.progress)
        checkpoint.save_state(
            self.out / LAST,
            {
                "settings": to_tree(self.config),
                "model": self.model.state_dict(),
                "averaged": self.averaged.state_dict() if self.averaged is not None else None,
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
                "progress": progress,
                "steps_per_epoch": self.steps_per_epoch,
            },
        )

    def resume(self) -> None:
        """Continue from last.pt; raises InputError when it was made with other settings or other data."""
        path = self.out / LAST
        state = checkpoint.load_state(path)
        check_same_settings(state["settings"], to_tree(self.config), path)
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise InputError(
                f"{path} was trained with {state['steps_per_epoch']} batches an epoch, this data gives "
                f"{self.steps_per_epoch}; resume with the data it began with"
            )
        checkpoint.load_weights(self.model, state["model"], path)
        if self.averaged is not None:
            checkpoint.load_weights(self.averaged, state["averaged"], path)
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**{**state["progress"], "plateau": Plateau(**state["progress"]["plateau"])})


def make_optimiser(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW; biases, gains and the tied embedding are not decayed."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (free if parameter.dim() < 2 or "embedding" in name else decayed).append(parameter)
    decay = config.training.weight_decay
    groups = [{"params": decayed, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.training.learning_rate, betas=(0.9, 0.98))


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products; "auto" is bfloat16 where the machine multiplies it in matrix units."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


@contextlib.contextmanager
def catch_stop_signals(trainer: Trainer):
    """Within it, SIGINT and SIGTERM ask the trainer to stop after its step; a second one stops at once."""

    def request(signum, frame):
        if trainer.stop_requested:
            raise KeyboardInterrupt
        trainer.stop_requested = True

    old = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def load_data(config: Config, corpus: Corpus) -> tuple[SpeechDataset, SpeechDataset]:
    """Return the training and dev sets, their features cached and checked."""
    train_splits = config.data.train or corpus.resolve("train")
    dev_splits = corpus.resolve(config.data.dev or "dev")
    train = load_dataset(corpus, tuple(train_splits), features=config.features, data=config.data, need_text=True)
    every = replace(config.data, max_seconds=0.0)  # the dev score covers the whole dev set
    dev = load_dataset(
        corpus, dev_splits, features=config.features, data=every, statistics=train.statistics, need_text=True
    )
    for name, data in (("+".join(train_splits), train), ("+".join(dev_splits), dev)):
        if len(data) == 0:
            raise InputError(f"{name} of {corpus.name} has no usable utterance; give another split or root")
        left_out = f", {len(data.skipped)} left out" if data.skipped else ""
        print(f"{name}: {len(data)} utterances, {data.seconds.sum() / 3600:.2f} hours{left_out}")
    return train, dev


def check_same_settings(then: dict, now: dict, path: Path) -> None:
    """Raise InputError naming the first setting that differs from the checkpoint's."""
    for section, values in now.items():
        for name, value in values.items():
            key, before = f"{section}.{name}", then.get(section, {}).get(name)
            if before != value and key not in FREE_TO_CHANGE:
                raise InputError(
                    f"{path} was trained with {key} = {before}, not {value}; resume with the same settings"
                )


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(prog="python -m las_fast.train", description=__doc__, add_help=False)
    parser.add_argument("--config", required=True, metavar="NAME|FILE", help=f"preset ({', '.join(presets())}) or YAML")
    parser.add_argument("--data", required=True, type=Path, metavar="ROOT", help="archive, LibriSpeech or manifest")
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="folder for all that training writes")
    parser.add_argument("--resume", action="store_true", help="continue the training in --out")
    parser.add_argument("--on-bad", choices=("error", "skip"), help="what to do with an unusable utterance")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options, config = parse_settings(parser, argv, lambda options: load_config(options.config))
    if options.on_bad:
        config = replace(config, data=replace(config.data, on_bad=options.on_bad))
    return options, check(config)


def main(argv: list[str] | None = None) -> None:
    """Train; see --help."""
    options, config = parse(argv)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    out = options.out
    if not options.resume and (out / LAST).exists():
        raise InputError(f"{out} already holds a training; add --resume to continue it or choose another --out")
    if options.resume and not (out / LAST).exists():
        raise InputError(f"{out / LAST} does not exist, so there is nothing to resume; start without --resume")
    corpus = open_corpus(options.data)
    print(f"data: {corpus.name}")
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, corpus, out, torch.device(options.device))
    if options.resume:
        trainer.resume()
    checkpoint.write_atomically(out / "config.yaml", lambda path: path.write_text(to_yaml(config)))
    describe(trainer)
    try:
        trainer.run()
    except KeyboardInterrupt:
        arguments = sys.argv[1:] if argv is None else argv
        again = " ".join([*arguments, *([] if options.resume else ["--resume"])])
        print(f"\nstopped at step {trainer.progress.step}; to go on: python -m las_fast.train {again}", file=sys.stderr)
        raise
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"best dev CER {trainer.progress.best_cer:.2f}%; peak memory {peak:.1f} GiB")
    print(f"decode with: python -m las_fast.decode --checkpoint {out} --data {options.data} --split dev --out dev.csv")


def describe(trainer: Trainer) -> None:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    share = 100 * trainer.batches.padding_share(0)
    precision = str(trainer.precision).removeprefix("torch.")
    print(
        f"model: {parameters / 1e6:.1f} M parameters, {precision} on {trainer.device}; "
        f"{trainer.steps_per_epoch} batches an epoch, {share:.1f}% padding; "
        f"from step {trainer.progress.step} to {trainer.steps}"
    )


if __name__ == "__main__":
    run(main)
