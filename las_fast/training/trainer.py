"""The training loop: optimiser steps, validations, and the state on disk."""

from __future__ import annotations

import bisect
import contextlib
import copy
import hashlib
import math
import signal
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from las_fast import checkpoint
from las_fast.checkpoint import AVERAGED, BEST, LAST
from las_fast.cli import STOP_SIGNALS
from las_fast.config import Config, to_tree
from las_fast.data.augment import Augment
from las_fast.data.batching import Batch, make_loader, plan_curriculum
from las_fast.data.dataset import SpeechDataset
from las_fast.data.features import seconds_of
from las_fast.errors import InputError, Stopped, explain_error, is_out_of_memory
from las_fast.model.las import LAS
from las_fast.progress import Progress as ProgressBar
from las_fast.search.steps import PendingFlag
from las_fast.text import Vocabulary
from las_fast.training import monitor
from las_fast.training.losses import training_loss
from las_fast.training.runlog import RunLog
from las_fast.training.schedules import (
    Plateau,
    ctc_weight,
    guided_weight,
    learning_rate_factor,
    teacher_forcing_rate,
)
from las_fast.training.validate import Validation, validate

# Settings that may differ when resuming: they change where and how fast the model learns, not what.
FREE_TO_CHANGE = (
    "training.threads",  # changes rounding, but rounding differs between machines anyway
    "data.workers",
    "data.cache",
    "training.checkpoint_minutes",
    "training.wandb",
    "training.monitor_epoch",
    "decoding.frames_per_batch",
)
BATCH_SIZES = ("frames_per_batch", "utterances_per_batch")  # fields of DataConfig; may become smaller on resume
SIGNAL_GRACE_SECONDS = 2.0  # further stop signals within this time count as the first
# Values of settings that old checkpoints lack, where the behaviour then differed from today's default.
LEGACY_SETTINGS = {"features.trim_silence": False}
MAX_SKIPPED_STEPS = 50  # in a row; the fp16 loss scale needs about twenty to come down


@dataclass
class Progress:
    """Position of a training. It is saved in last.pt, so field names must not change."""

    step: int = 0  # optimiser steps taken
    best_cer: float = float("inf")  # dev, percent
    plateau: Plateau = field(default_factory=Plateau)
    averaged_steps: int = 0  # updates of the averaged weights
    skipped_in_a_row: int = 0  # latest steps without an update, because their gradient was not finite
    validated: int = 0  # step of the latest validation


class Diverged(InputError):
    """The training has diverged; its state is not worth saving."""


class Pace:
    """Training throughput and the share of time spent waiting for data, both since construction."""

    def __init__(self):
        self.started, self.audio_seconds, self.wait_seconds = time.perf_counter(), 0.0, 0.0

    def add_audio(self, seconds: float) -> None:
        self.audio_seconds += seconds

    def next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """Return the next batch, or None after the last, and add the waiting time."""
        start = time.perf_counter()
        batch = next(batches, None)
        self.wait_seconds += time.perf_counter() - start
        return batch

    def speed(self) -> float:
        """Seconds of audio per second."""
        return self.audio_seconds / (time.perf_counter() - self.started)

    def waiting(self) -> float:
        """Share of the time spent waiting for data."""
        return self.wait_seconds / (time.perf_counter() - self.started)


class Trainer:
    """One training in the run folder `out`: data, model, optimiser, and the loop over steps.

    source: kind and name of the corpus; stored in every checkpoint.

    On CUDA the host runs ahead of the device: it learns one step late whether a step was taken or skipped.
    """

    reads_late = False  # whether the host reads the result of a step in the step after it
    pending: PendingFlag | None = None  # whether the latest step was taken, if the host has not read it yet

    def __init__(
        self,
        config: Config,
        train_data: SpeechDataset,
        dev_data: SpeechDataset,
        out: Path,
        device: torch.device,
        source: dict[str, str],
    ):
        self.config, self.out, self.device, self.source = config, out, device, source
        self.vocabulary = Vocabulary(config.data.characters)
        self.train_data, self.dev_data = train_data, dev_data
        self.curriculum = plan_curriculum(self.train_data.frame_counts, config)
        self.steps = self.curriculum.steps
        torch.manual_seed(config.training.seed)
        self.model = checkpoint.build_model(config).to(device)
        self.averaged = copy.deepcopy(self.model).eval() if config.training.ema_decay else None
        self.optimiser = make_optimiser(self.model, config)
        self.precision = choose_precision(config.training.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=needs_loss_scale(self.precision, device))
        self.reads_late = device.type == "cuda"
        self.progress = Progress()
        self.saved_step: int | None = None  # step in last.pt
        self.earlier_core_seconds = 0.0  # CPU time of the processes before this resume
        self.stop_signal = 0  # number of the first signal that asked to stop; 0: none
        self.saving = False
        self.consistent = True  # False in the middle of an update
        self.batch_size = (0, 0)  # utterances and padded feature frames of the latest batch; 0 before the first
        self.pace = Pace()

    # The loop

    def run(self) -> None:
        """Train to the last epoch.

        On a stop signal, or an error that the machine caused (memory, disk), the state is saved first.

        Raises:
            Stopped: a signal asked to stop.
            InputError: memory or disk ran out, or the training has diverged.
        """
        self.log = RunLog(self.out, self.config, self.progress.step)
        with catch_stop_signals(self), self._progress_bar() as bar:
            problem = self._train(bar)
            saved = self._rescue(problem)
        with contextlib.suppress(*([] if problem is None else [OSError])):  # raise the earlier problem instead
            self.log.close()
        if problem is not None:
            raise self._explain(problem, saved)

    def _train(self, bar: ProgressBar) -> BaseException | None:
        """Take the remaining steps; return the exception that ended them early, or None.

        It is returned without its traceback, which would keep the step's tensors alive while the state is saved.
        """
        try:
            self.pace, self._saved_at = Pace(), time.monotonic()
            if self.validation_due:
                self._validate_and_save(bar)
            while self.progress.step < self.steps:
                self._train_epoch(bar)
        except (Exception, KeyboardInterrupt) as error:
            if explain_error(error) is None and not isinstance(error, KeyboardInterrupt):
                raise
            return error.with_traceback(None)
        return None

    def _train_epoch(self, bar: ProgressBar) -> None:
        with contextlib.closing(self._timed_batches()) as batches:
            for batch in batches:
                self.batch_size = (batch.features.shape[0], batch.features.shape[1])
                parts = self.train_step(batch.to(self.device))
                self.pace.add_audio(seconds_of(float(batch.feature_lengths.sum()), self.config.features))
                self._log_step(bar, parts)
                self.check_stop()
                if self.validation_due:
                    self._validate_and_save(bar)
                elif time.monotonic() - self._saved_at > 60 * self.config.training.checkpoint_minutes:
                    self.save()

    def _rescue(self, problem: BaseException | None) -> bool:
        """Save the state, unless it is inconsistent or has diverged; return whether last.pt holds this step."""
        if self.saved_step == self.progress.step:
            return True
        if not self.consistent or not self.progress.step or isinstance(problem, Diverged):
            return False
        self.optimiser.zero_grad()  # frees the gradients: saving needs memory
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            self.save()
        except (InputError, RuntimeError, MemoryError):
            if problem is None:
                raise
        return self.saved_step == self.progress.step

    def _explain(self, problem: BaseException, saved: bool) -> BaseException:
        """Replace an out-of-memory error by an InputError that names the setting to lower; return others unchanged."""
        if not is_out_of_memory(problem):
            return problem
        utterances, frames = self.batch_size
        size = f"a batch of {utterances} utterances, {utterances * frames} frames," if utterances else "the first batch"
        remedy = f"--data.frames-per-batch below {self.config.data.frames_per_batch}"
        if utterances == 1:
            size, remedy = f"an utterance of {frames} frames", "--data.max-seconds, which leaves out the longest"
        advice = f"step {self.progress.step} is saved, continue with --resume and {remedy}"
        if utterances == 1 or not saved:
            advice = f"start again with {remedy}"
        return InputError(f"training on {size} does not fit in memory; {advice}")

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """Take one optimiser step; return the loss, its parts (per token) and the gradient norm, detached."""
        training, epoch = self.config.training, self.epoch
        # Seed dropout and teacher forcing anew at each step: resuming needs no random state.
        torch.manual_seed(training.seed * 1_000_003 + self.progress.step)
        factor = learning_rate_factor(training, *self._cycle_position()) * self.progress.plateau.share
        for group in self.optimiser.param_groups:
            group["lr"] = training.learning_rate * factor
        self.model.train()
        tokens, token_lengths = batch.targets
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            output = self.model(batch.features, batch.feature_lengths, tokens, teacher_forcing_rate(training, epoch))
        loss, parts = training_loss(
            output,
            tokens,
            token_lengths,
            label_smoothing=training.label_smoothing,
            ctc_weight=ctc_weight(training, epoch),
            guided_weight=guided_weight(training, epoch),
            guided_width=training.guided_width,
            guided_frames=training.guided_frames,
        )
        self.optimiser.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)  # clipping must see the true gradients
        norm = self._clip()
        self._update(norm)
        return {"loss": loss.detach(), **parts, "gradient_norm": norm}

    def _clip(self) -> Tensor:
        """Clip the norm of the gradients to clip_norm; return the norm before clipping."""
        parameters, max_norm = list(self.model.parameters()), self.config.training.clip_norm
        norm = nn.utils.get_total_norm([x.grad for x in parameters if x.grad is not None])
        if self.reads_late or norm > max_norm:  # the factor is 1 for a smaller norm
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def _update(self, norm: Tensor) -> None:
        """Update the weights, or skip the step if the gradient norm is not finite."""
        self.settle()
        self.consistent = False
        if self.reads_late:
            finite = norm.isfinite()
            # The fused kernel skips the update if this is 1.
            self.optimiser.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
            self.optimiser.step()
            self.pending = PendingFlag(finite)
            taken = False  # or not known yet
        else:
            taken = math.isfinite(float(norm))
            if taken:
                self.scaler.step(self.optimiser)
            self._count(taken)
        self.scaler.update()  # lowers the scale if unscale_ found a value that is not finite
        self.progress.step += 1
        if taken and self.averaged is not None:
            self._average()
        self.consistent = True

    def settle(self) -> None:
        """Read whether the latest step was taken, if that is not known yet, and average its weights if it was."""
        pending, self.pending = self.pending, None
        if pending is not None:
            taken = pending.read()
            self._count(taken)
            if taken and self.averaged is not None:
                self._average()

    def _count(self, taken: bool) -> None:
        """Count skipped steps in a row; raise Diverged at MAX_SKIPPED_STEPS."""
        self.progress.skipped_in_a_row = 0 if taken else self.progress.skipped_in_a_row + 1
        if self.progress.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise Diverged(
                f"{MAX_SKIPPED_STEPS} steps in a row had gradients that are not finite; "
                f"lower --training.learning-rate (now {self.config.training.learning_rate:g}) and start again"
            )

    def _average(self) -> None:
        """averaged = decay * averaged + (1 - decay) * weights; the decay is smaller during the first updates."""
        assert self.averaged is not None
        self.progress.averaged_steps += 1
        n = self.progress.averaged_steps
        decay = min(self.config.training.ema_decay, (1 + n) / (10 + n))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay)

    @property
    def epoch(self) -> float:
        """Epochs done, a fraction within an epoch."""
        return self.curriculum.epochs(self.progress.step)

    def _cycle_position(self) -> tuple[int, int]:
        """(steps done, steps in all) of the current learning rate cycle (Loshchilov and Hutter 2017)."""
        bounds = (0, *self.config.training.restarts, self.config.training.epochs)
        cycle = bisect.bisect_right(bounds, self.curriculum.locate(self.progress.step)[0]) - 1
        begin, end = (self.curriculum.steps_before(epoch) for epoch in bounds[cycle : cycle + 2])
        return self.progress.step - begin, end - begin

    def core_hours(self) -> float:
        """CPU time of this training in hours, earlier runs included, loader processes excluded."""
        return (self.earlier_core_seconds + time.process_time()) / 3600

    def _timed_batches(self) -> Generator[Batch, None, None]:
        """Yield the remaining batches of the epoch and add the waiting time to the current pace."""
        batches = iter(self._rest_of_epoch())
        while (batch := self.pace.next_batch(batches)) is not None:
            yield batch

    def check_stop(self) -> None:
        """Raise Stopped if a signal has asked to stop; called only where the state is consistent."""
        if self.stop_signal:
            raise Stopped(self.stop_signal)

    def _rest_of_epoch(self):
        epoch, start = self.curriculum.locate(self.progress.step)
        augment = Augment(self.config.augment)
        return make_loader(
            self.train_data,
            self.curriculum.batches_of(epoch).epoch(epoch),
            self.vocabulary,
            augment=augment,
            seed=self.config.training.seed,
            epoch=epoch,
            start=start,
            workers=self.config.data.workers,
            poll=self.check_stop,
        )

    # Validation, logs and messages

    @property
    def validation_due(self) -> bool:
        """Whether this step is due for validation and has not been validated."""
        every, step = self.config.training.validate_every, self.progress.step
        if step == self.progress.validated:
            return False
        before, now = (int(self.curriculum.epochs(s) / every) for s in (step - 1, step))
        return step == self.steps or now > before

    def _validate_and_save(self, bar: ProgressBar) -> None:
        self.settle()
        model, pace = self.averaged or self.model, self.pace
        speed = f"trained at {pace.speed():.0f} x real time, {pace.waiting():.1%} of the time waiting for data"
        result = self._validate(model)
        self._check_diverged(result.loss)
        with self.deferring_signals():
            line = self._record(result, model)
        scores = result.scores
        bar.write(
            f"epoch {self.epoch:g}: dev loss {result.loss:.3f} per token, LD {scores.ld:.2f}, CER {scores.cer:.2f}%, "
            f"WER {scores.wer:.2f}%; {speed}\n  {line}"
        )
        self.pace = Pace()

    def _validate(self, model: LAS) -> Validation:
        try:
            options = (self.config, self.device, self.out, self.epoch, self.check_stop)
            return validate(model, self.dev_data, self.vocabulary, *options)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            now = self.config.decoding.frames_per_batch
        advice = f"lower --decoding.frames-per-batch (now {now}) and continue with --resume"
        raise InputError(f"a validation does not fit in memory; {advice}")

    def _record(self, result: Validation, model: nn.Module) -> str:
        """Write weights, log and state after a validation; return the monitor's line."""
        cer, progress = result.scores.cer, self.progress
        info = {"epoch": self.epoch, "step": progress.step, "dev": asdict(result.scores), "data": self.source}
        info["core_hours"] = round(self.core_hours(), 3)
        self._save_weights(model, info, best=cer < progress.best_cer)
        progress.plateau.update(cer, self.config.training)
        progress.best_cer, progress.validated = min(progress.best_cer, cer), progress.step
        line = monitor.status_line(result.alignment, self.epoch, self.config)
        self.log.validation(progress.step, self.epoch, result, line, self.core_hours())
        self.save()
        return line

    def _check_diverged(self, loss: float) -> None:
        """Raise Diverged if the loss or all gradients so far are not finite; called before weights are saved."""
        rate, progress = self.config.training.learning_rate, self.progress
        if not math.isfinite(loss):
            raise Diverged(
                f"the dev loss is {loss} after {progress.step} steps: the training has diverged; "
                f"lower --training.learning-rate (now {rate:g}) and start again"
            )
        if progress.skipped_in_a_row == progress.step and not self.scaler.is_enabled():  # fp16 starts with skips
            raise Diverged(
                f"none of the {progress.step} steps so far had finite gradients, so nothing was learned; "
                f"lower --training.learning-rate (now {rate:g}) or the weights of the losses and start again"
            )

    def _save_weights(self, model: nn.Module, info: dict, best: bool) -> None:
        statistics = self.train_data.statistics if self.config.features.normalisation == "global" else None
        weights = model.state_dict()
        if best:
            checkpoint.save_model(self.out / BEST, weights, self.config, statistics, info)
        if self.averaged is not None:
            checkpoint.save_model(self.out / AVERAGED, weights, self.config, statistics, info)

    def _progress_bar(self) -> ProgressBar:
        return ProgressBar(self.steps, "training", "steps", done=self.progress.step)

    def _log_step(self, bar: ProgressBar, parts: dict[str, Tensor]) -> None:
        """Advance the bar; log the losses of every tenth step and of the last one."""
        step = self.progress.step
        bar.update()
        if step % 10 == 0 or step == self.steps:
            values = dict(zip(parts, torch.stack(tuple(parts.values())).tolist(), strict=True))  # waits once
            values |= {"speed": self.pace.speed(), "waiting": self.pace.waiting()}
            self.log.training(step, self.epoch, values, self.optimiser.param_groups[0]["lr"])
            bar.note(f"epoch {self.epoch:.1f}, loss {values['loss']:.3f}, {values['speed']:.0f} x real time")

    def load_initial_weights(self, model: nn.Module, path: Path) -> None:
        """Start from the weights of a model of the same sizes; `path` names it in errors and checkpoints."""
        for target in filter(None, (self.model, self.averaged)):
            checkpoint.load_weights(target, model.state_dict(), path)
        self.source = {**self.source, "init": path.name}

    # State on disk

    @contextlib.contextmanager
    def deferring_signals(self) -> Iterator[None]:
        """Defer stop signals while files are written."""
        before, self.saving = self.saving, True
        try:
            yield
        finally:
            self.saving = before

    def save(self) -> None:
        """Write last.pt, which holds everything that resuming needs."""
        with self.deferring_signals():
            checkpoint.save_state(self.out / LAST, self.state())
            self.saved_step, self._saved_at = self.progress.step, time.monotonic()

    def state(self) -> dict:
        """Contents of last.pt."""
        self.settle()
        return {
            "settings": to_tree(self.config),
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not None else None,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "core_seconds": 3600 * self.core_hours(),
            "data": fingerprint(self.train_data, self.dev_data),
        }

    def resume(self) -> None:
        """Continue from last.pt.

        Raises:
            InputError: last.pt was written with other settings or other data.
        """
        path = self.out / LAST
        state = checkpoint.load_state(path)
        check_same_settings(state["settings"], to_tree(self.config), path)
        if state["data"] != fingerprint(self.train_data, self.dev_data):
            raise InputError(f"{path} was trained on other utterances; resume with the data that it began with")
        checkpoint.load_weights(self.model, state["model"], path)
        if self.averaged is not None:
            checkpoint.load_weights(self.averaged, state["averaged"], path)
        self.optimiser.load_state_dict(state["optimiser"])
        if state.get("scaler"):  # empty if this training had no loss scale, as bf16 on CUDA in earlier versions
            self.scaler.load_state_dict(state["scaler"])
        progress = {"validated": state["progress"]["step"], **state["progress"]}  # earlier versions did not save it
        self.progress = Progress(**{**progress, "plateau": Plateau(**progress["plateau"])})
        self.saved_step = self.progress.step
        self.earlier_core_seconds = state["core_seconds"]
        self._convert_step(state["settings"]["data"])

    def _convert_step(self, then: dict) -> None:
        """Convert the step from the earlier batch sizes to the current ones: same epoch, same share of its batches."""
        sizes = {name: then[name] for name in BATCH_SIZES}
        data, progress = self.config.data, self.progress
        if all(getattr(data, name) == size for name, size in sizes.items()):
            return
        before = plan_curriculum(self.train_data.frame_counts, replace(self.config, data=replace(data, **sizes)))
        epoch, batch = before.locate(progress.step)
        step = self.curriculum.steps_before(epoch) + batch * len(self.curriculum.batches_of(epoch)) // len(
            before.batches_of(epoch)
        )
        print(f"batches are smaller than before: step {progress.step} is step {step} now")
        progress.validated = step if progress.validated == progress.step else 0
        progress.step = self.saved_step = step


def fingerprint(*datasets: SpeechDataset) -> str:
    """SHA-256 of the ids, lengths and transcripts of datasets, in order."""
    digest = hashlib.sha256()
    for data in datasets:
        digest.update(repr((data.ids, data.frame_counts.tolist(), data.texts)).encode())
    return digest.hexdigest()


def make_optimiser(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Fused AdamW; biases, LayerNorm weights and the tied embedding have no weight decay."""
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (undecayed if parameter.dim() < 2 or "embedding" in name else decayed).append(parameter)
    decay = config.training.weight_decay
    groups = [{"params": decayed, "weight_decay": decay}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.training.learning_rate, betas=(0.9, 0.98), fused=True)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Dtype of matmuls; "auto" is bfloat16 if the machine has bfloat16 instructions, else float16 (CUDA) or float32."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def needs_loss_scale(precision: torch.dtype, device: torch.device) -> bool:
    """Return whether gradients pass through float16, where unscaled ones of thousands of tokens lose digits.

    On CUDA that is so for bfloat16 as well: PyTorch's autocast runs cuDNN's LSTMs in float16, whatever its dtype.
    """
    return precision == torch.float16 or (device.type == "cuda" and precision != torch.float32)


@contextlib.contextmanager
def catch_stop_signals(trainer: Trainer) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP stop the trainer after the step, or while it waits for data or validates.

    A second signal raises Stopped in the middle of a step, but not of a save. Signals within SIGNAL_GRACE_SECONDS count
    as one, because process groups and launchers pass the same signal on. SIGHUP stays ignored under nohup.
    """
    first = 0.0

    def request(signum: int, frame: object) -> None:
        nonlocal first
        second = trainer.stop_signal and time.monotonic() - first > SIGNAL_GRACE_SECONDS
        first = first if trainer.stop_signal else time.monotonic()
        trainer.stop_signal = trainer.stop_signal or signum
        if second and not trainer.saving:
            raise Stopped(signum)

    signals = [s for s in STOP_SIGNALS if s == signal.SIGINT or signal.getsignal(s) != signal.SIG_IGN]
    old = {signum: signal.signal(signum, request) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


def check_same_settings(then: dict, now: dict, path: Path) -> None:
    """Raise InputError naming the first setting that differs from the checkpoint's.

    A setting that the checkpoint lacks is newer; it counts as its default, or as its value in LEGACY_SETTINGS. Besides
    FREE_TO_CHANGE, two differences are allowed: a learning rate restart appended at the end, which lengthens the
    training without changing its earlier cycles, and smaller batches, in case memory ran out.
    """
    before, after = dict(_flatten(to_tree(Config()))) | LEGACY_SETTINGS | dict(_flatten(then)), dict(_flatten(now))
    then_ends, now_ends = (  # epochs at which cycles end
        [*settings["training.restarts"], settings["training.epochs"]] for settings in (before, after)
    )
    longer = now_ends[: len(then_ends)] == then_ends
    free = (*FREE_TO_CHANGE, "training.epochs", "training.restarts") if longer else FREE_TO_CHANGE
    for key, value in after.items():
        section, _, name = key.rpartition(".")
        smaller = section == "data" and name in BATCH_SIZES and value < before[key]
        if before[key] != value and key not in free and not smaller:
            advice = "resume with the same settings"
            if key in ("training.epochs", "training.restarts"):
                advice += f", or lengthen it: --training.epochs N --training.restarts {' '.join(map(str, then_ends))}"
            raise InputError(f"{path} was trained with {key} = {before[key]}, not {value}; {advice}")


def _flatten(tree: dict, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of each setting in a tree."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}{key}.")
        else:
            yield name + key, value
