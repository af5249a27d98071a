"""The training loop: data, model, optimiser, steps, validations and the state on disk."""

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
from las_fast.data.batching import Batch, make_loader, plan_course
from las_fast.data.dataset import SpeechDataset
from las_fast.data.features import seconds_of
from las_fast.errors import InputError, Stopped, explain_error, is_out_of_memory
from las_fast.model.las import LAS
from las_fast.progress import Progress as ProgressBar
from las_fast.text import Vocabulary
from las_fast.training import monitor
from las_fast.training.losses import training_loss
from las_fast.training.runlog import RunLog
from las_fast.training.schedules import Plateau, cosine_share, ctc_weight, guided_weight, teacher_forcing_rate
from las_fast.training.validate import Validation, validate

# Settings that may differ when resuming: they change where and how fast, not what is learned.
FREE_TO_CHANGE = (  # threads: a machine with other cores rounds otherwise in any case
    "training.threads",
    "data.workers",
    "data.cache",
    "training.checkpoint_minutes",
    "training.wandb",
    "training.monitor_epoch",
    "decoding.frames_per_batch",
)
SIZES = ("frames_per_batch", "utterances_per_batch")  # of data
SAME_SIGNAL = 2.0  # seconds in which further signals to stop count as the first
BEFORE = {"features.trim_silence": False}  # what versions did that did not have the setting
SKIPPED_IN_A_ROW = 50  # half precision's scale needs some twenty to come down


@dataclass
class Progress:
    """Where training stands; saved in every checkpoint."""

    step: int = 0  # optimiser steps taken
    best_cer: float = float("inf")
    plateau: Plateau = field(default_factory=Plateau)
    averaged_steps: int = 0
    skipped_in_a_row: int = 0  # latest steps whose gradient was not finite: they change no weight
    validated: int = 0  # step of the latest validation


class Diverged(InputError):
    """The training leads nowhere; its state is not worth saving."""


class Pace:
    """How fast training goes, since it was made, and how much of the time it waits for data."""

    def __init__(self):
        self.began, self.audio, self.waited = time.perf_counter(), 0.0, 0.0

    def count(self, audio_seconds: float) -> None:
        self.audio += audio_seconds

    def next_of(self, batches: Iterator[Batch]) -> Batch | None:
        """Return the next batch, None after the last, and count the time that it is waited for."""
        asked = time.perf_counter()
        batch = next(batches, None)
        self.waited += time.perf_counter() - asked
        return batch

    def speed(self) -> float:
        """Return the seconds of audio trained on in a second."""
        return self.audio / (time.perf_counter() - self.began)

    def waiting(self) -> float:
        """Return the share of the time that was spent waiting for data."""
        return self.waited / (time.perf_counter() - self.began)


class Trainer:
    """One training run in the folder `out`: data, model, optimiser, and the loop over steps.

    source: what the data is (kind and name of the corpus), kept in every checkpoint.
    """

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
        self.course = plan_course(self.train_data.frames, config)
        self.steps = self.course.steps
        torch.manual_seed(config.training.seed)
        self.model = checkpoint.build_model(config).to(device)
        self.averaged = copy.deepcopy(self.model).eval() if config.training.ema_decay else None
        self.optimiser = make_optimiser(self.model, config)
        self.precision = choose_precision(config.training.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.progress = Progress()
        self.saved_step: int | None = None  # that last.pt holds
        self.earlier_core_seconds = 0.0  # of the process's own time, before this run was resumed
        self.stop_signal = 0  # number of the signal that asked to stop
        self.saving = False
        self.whole = True  # the state is that after a step, not in the middle of an update
        self.batch_size = (0, 0)  # utterances and padded frames of the latest batch; 0 before the first
        self.pace = Pace()

    # The loop

    def run(self) -> None:
        """Train to the last epoch.

        A signal to stop, or an error from outside the program, ends it with its state saved.

        Raises:
            Stopped: a signal asked for it.
            InputError: memory or disk do not suffice, or the training has diverged.
        """
        self.log = RunLog(self.out, self.config, self.progress.step)
        with catch_stop_signals(self), self._progress_bar() as bar:
            problem = self._train(bar)
            saved = self._rescue(problem)
        with contextlib.suppress(*([] if problem is None else [OSError])):  # the problem matters more
            self.log.close()
        if problem is not None:
            raise self._explained(problem, saved)

    def _train(self, bar: ProgressBar) -> BaseException | None:
        """Take all steps; return what ended them too early.

        It is returned, not raised: its traceback would keep alive all that the step had in memory.
        """
        try:
            self.pace, self._saved_at = Pace(), time.monotonic()
            if self.owes_validation:
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
                self.pace.count(seconds_of(float(batch.feature_lengths.sum()), self.config.features))
                self._show(bar, parts)
                self.check_stop()
                if self.owes_validation:
                    self._validate_and_save(bar)
                elif time.monotonic() - self._saved_at > 60 * self.config.training.checkpoint_minutes:
                    self.save()

    def _rescue(self, problem: BaseException | None) -> bool:
        """Save the state unless it is saved, torn or worthless; return whether it is on the disk."""
        if self.saved_step == self.progress.step:
            return True
        if not self.whole or not self.progress.step or isinstance(problem, Diverged):
            return False
        self.optimiser.zero_grad()  # the gradients are freed: memory for the saving
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            self.save()
        except (InputError, RuntimeError, MemoryError):
            if problem is None:
                raise
        return self.saved_step == self.progress.step

    def _explained(self, problem: BaseException, saved: bool) -> BaseException:
        """Return the exception to end with: for lack of memory, one that says what to lower."""
        if not is_out_of_memory(problem):
            return problem
        utterances, frames = self.batch_size
        what = f"a batch of {utterances} utterances, {utterances * frames} frames," if utterances else "the first batch"
        more = f"--data.frames-per-batch less than {self.config.data.frames_per_batch}"
        if utterances == 1:
            what, more = f"an utterance of {frames} frames", "--data.max-seconds, which leaves out the longest"
        state = f"step {self.progress.step} is saved, go on with --resume and {more}"
        if utterances == 1 or not saved:
            state = f"start again with {more}"
        return InputError(f"training on {what} does not fit in memory; {state}")

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """Take one optimiser step; return the loss parts per token, detached."""
        training, epoch = self.config.training, self.epoch
        # Dropout and teacher forcing draw from a seed of their own at each step: resuming needs no random state.
        torch.manual_seed(training.seed * 1_000_003 + self.progress.step)
        share = cosine_share(training, *self._in_cycle()) * self.progress.plateau.share
        for group in self.optimiser.param_groups:
            group["lr"] = training.learning_rate * share
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
        """Scale the gradients down to clip_norm where they are more; return the norm that they had."""
        parameters, most = list(self.model.parameters()), self.config.training.clip_norm
        norm = nn.utils.get_total_norm([x.grad for x in parameters if x.grad is not None])
        if norm > most:
            nn.utils.clip_grads_with_norm_(parameters, most, norm)
        return norm

    def _update(self, norm: Tensor) -> None:
        finite = bool(norm.isfinite())
        self.whole = False
        if finite:
            self.scaler.step(self.optimiser)
        self.progress.skipped_in_a_row = 0 if finite else self.progress.skipped_in_a_row + 1
        if self.progress.skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise Diverged(
                f"{SKIPPED_IN_A_ROW} steps in a row had gradients that are not finite; "
                f"lower --training.learning-rate (now {self.config.training.learning_rate:g}) and start again"
            )
        self.scaler.update()  # lowers its scale where unscale_ met what is not finite
        self.progress.step += 1
        if finite and self.averaged is not None:
            self._average()
        self.whole = True

    def _average(self) -> None:
        """averaged = decay * averaged + (1 - decay) * weights, with a shorter memory at the start."""
        assert self.averaged is not None
        self.progress.averaged_steps += 1
        n = self.progress.averaged_steps
        decay = min(self.config.training.ema_decay, (1 + n) / (10 + n))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay)

    @property
    def epoch(self) -> float:
        return self.course.epochs(self.progress.step)

    def core_hours(self) -> float:
        """Return the hours that one core would have worked for this training so far, loader processes not counted."""
        return (self.earlier_core_seconds + time.process_time()) / 3600

    def _timed_batches(self) -> Generator[Batch, None, None]:
        """Yield the rest of the epoch's batches; the waiting counts in whatever pace is running then."""
        batches = iter(self._rest_of_epoch())
        while (batch := self.pace.next_of(batches)) is not None:
            yield batch

    def check_stop(self) -> None:
        """Raise Stopped where a signal has asked for it; called where nothing that is saved is being changed."""
        if self.stop_signal:
            raise Stopped(self.stop_signal)

    def _rest_of_epoch(self):
        epoch, start = self.course.place(self.progress.step)
        augment = Augment(self.config.augment)
        return make_loader(
            self.train_data,
            self.course.of(epoch).epoch(epoch),
            self.vocabulary,
            augment=augment,
            seed=self.config.training.seed,
            epoch=epoch,
            start=start,
            workers=self.config.data.workers,
            look_up=self.check_stop,
        )

    # Validation and what is shown

    def _in_cycle(self) -> tuple[int, int]:
        """Return how many steps of the learning rate's cycle are done, of how many (Loshchilov and Hutter 2017)."""
        bounds = (0, *self.config.training.restarts, self.config.training.epochs)
        cycle = bisect.bisect_right(bounds, self.course.place(self.progress.step)[0]) - 1
        begin, end = (self.course.steps_before(epoch) for epoch in bounds[cycle : cycle + 2])
        return self.progress.step - begin, end - begin

    @property
    def owes_validation(self) -> bool:
        """Whether the model of this step is to be validated and has not been."""
        every, step = self.config.training.validate_every, self.progress.step
        if step == self.progress.validated:
            return False
        before, now = (int(self.course.epochs(s) / every) for s in (step - 1, step))
        return step == self.steps or now > before

    def _validate_and_save(self, bar: ProgressBar) -> None:
        model, pace = self.averaged or self.model, self.pace
        speed = f"trained at {pace.speed():.0f} x real time, {pace.waiting():.1%} of it waiting for data"
        result = self._validate(model)
        self._check_alive(result.loss)
        with self.undisturbed():
            line = self._keep(result, model)
        scores = result.scores
        bar.write(
            f"epoch {self.epoch:g}: dev loss {result.loss:.3f} a token, LD {scores.ld:.2f}, CER {scores.cer:.2f}%, "
            f"WER {scores.wer:.2f}%; {speed}\n  {line}"
        )
        self.pace = Pace()

    def _validate(self, model: LAS) -> Validation:
        try:
            where = (self.config, self.device, self.out, self.epoch, self.check_stop)
            return validate(model, self.dev_data, self.vocabulary, *where)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            now = self.config.decoding.frames_per_batch
        advice = f"lower --decoding.frames-per-batch (now {now}) and go on with --resume"
        raise InputError(f"a validation does not fit in memory; {advice}")

    def _keep(self, result: Validation, model: nn.Module) -> str:
        """Write weights, log and state after a validation; return the monitor's line."""
        cer, progress = result.scores.cer, self.progress
        info = {"epoch": self.epoch, "step": progress.step, "dev": asdict(result.scores), "data": self.source}
        info["core_hours"] = round(self.core_hours(), 3)
        self._save_weights(model, info, best=cer < progress.best_cer)
        progress.plateau.update(cer, self.config.training)
        progress.best_cer, progress.validated = min(progress.best_cer, cer), progress.step
        line = monitor.line(result.alignment, self.epoch, self.config)
        self.log.validation(progress.step, self.epoch, result, line, self.core_hours())
        self.save()
        return line

    def _check_alive(self, loss: float) -> None:
        """Raise InputError where this training leads nowhere, before anything of it is kept as the best."""
        rate, progress = self.config.training.learning_rate, self.progress
        if not math.isfinite(loss):
            raise Diverged(
                f"the dev loss is {loss} after {progress.step} steps: the training has diverged; "
                f"lower --training.learning-rate (now {rate:g}) and start again"
            )
        if progress.skipped_in_a_row == progress.step and not self.scaler.is_enabled():  # which starts by skipping
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

    def _show(self, bar: ProgressBar, parts: dict[str, Tensor]) -> None:
        step = self.progress.step
        bar.update()
        if step % 10 == 0 or step == self.steps:
            values = {name: float(value) for name, value in parts.items()}
            values |= {"speed": self.pace.speed(), "waiting": self.pace.waiting()}
            self.log.training(step, self.epoch, values, self.optimiser.param_groups[0]["lr"])
            bar.note(f"epoch {self.epoch:.1f}, loss {values['loss']:.3f}, {values['speed']:.0f} x real time")

    def begin_with(self, model: nn.Module, path: Path) -> None:
        """Take the weights of another model of the same sizes; `path` names it in errors and in the checkpoints."""
        for own in filter(None, (self.model, self.averaged)):
            checkpoint.load_weights(own, model.state_dict(), path)
        self.source = {**self.source, "init": path.name}

    # State on disk

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within it no signal stops the training: files are written."""
        before, self.saving = self.saving, True
        try:
            yield
        finally:
            self.saving = before

    def save(self) -> None:
        """Write last.pt: everything that resuming needs."""
        with self.undisturbed():
            checkpoint.save_state(self.out / LAST, self.state())
            self.saved_step, self._saved_at = self.progress.step, time.monotonic()

    def state(self) -> dict:
        """Return what last.pt holds."""
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
        """Continue from last.pt; raises InputError when it was made with other settings or other data."""
        path = self.out / LAST
        state = checkpoint.load_state(path)
        check_same_settings(state["settings"], to_tree(self.config), path)
        if state["data"] != fingerprint(self.train_data, self.dev_data):
            raise InputError(f"{path} was trained on other utterances; resume with the data it began with")
        checkpoint.load_weights(self.model, state["model"], path)
        if self.averaged is not None:
            checkpoint.load_weights(self.averaged, state["averaged"], path)
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        progress = {"validated": state["progress"]["step"], **state["progress"]}  # an older version saved no such step
        self.progress = Progress(**{**progress, "plateau": Plateau(**progress["plateau"])})
        self.saved_step = self.progress.step
        self.earlier_core_seconds = state["core_seconds"]
        self._move(state["settings"]["data"])

    def _move(self, then: dict) -> None:
        """Go to the step of this course that is as far as that of the course with the earlier sizes of batches."""
        sizes = {name: then[name] for name in SIZES}
        data, progress = self.config.data, self.progress
        if all(getattr(data, name) == size for name, size in sizes.items()):
            return
        before = plan_course(self.train_data.frames, replace(self.config, data=replace(data, **sizes)))
        epoch, batch = before.place(progress.step)
        step = self.course.steps_before(epoch) + batch * len(self.course.of(epoch)) // len(before.of(epoch))
        print(f"batches are smaller than before: step {progress.step} is step {step} now")
        progress.validated = step if progress.validated == progress.step else 0
        progress.step = self.saved_step = step


def fingerprint(*datasets: SpeechDataset) -> str:
    """Return a hash of the ids, lengths and transcripts of datasets, in their order."""
    digest = hashlib.sha256()
    for data in datasets:
        digest.update(repr((data.ids, data.frames.tolist(), data.texts)).encode())
    return digest.hexdigest()


def make_optimiser(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW in one pass over the weights (fused); biases, gains and the tied embedding are not decayed."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (free if parameter.dim() < 2 or "embedding" in name else decayed).append(parameter)
    decay = config.training.weight_decay
    groups = [{"params": decayed, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.training.learning_rate, betas=(0.9, 0.98), fused=True)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products; "auto" is bfloat16 where the machine has instructions to multiply it."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


@contextlib.contextmanager
def catch_stop_signals(trainer: Trainer) -> Iterator[None]:
    """Within it SIGINT, SIGTERM and SIGHUP ask the trainer to stop after the step, or while it waits or validates.

    A second one raises Stopped in the middle of a step, but not of a save. Those of the first seconds count as one: a
    process group and the programs around a training pass the same signal on. SIGHUP stays ignored under nohup.
    """
    first = 0.0

    def request(signum: int, frame: object) -> None:
        nonlocal first
        again = trainer.stop_signal and time.monotonic() - first > SAME_SIGNAL
        first = first if trainer.stop_signal else time.monotonic()
        trainer.stop_signal = trainer.stop_signal or signum
        if again and not trainer.saving:
            raise Stopped(signum)

    numbers = [s for s in STOP_SIGNALS if s == signal.SIGINT or signal.getsignal(s) != signal.SIG_IGN]
    old = {number: signal.signal(number, request) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def check_same_settings(then: dict, now: dict, path: Path) -> None:
    """Raise InputError naming the first setting that differs from the checkpoint's.

    One that the checkpoint does not know is newer; it was trained with its default, or with what BEFORE says. A restart
    of the learning rate where the training ended lengthens it and changes nothing of what was. Batches may become
    smaller, for lack of memory.
    """
    before, after = dict(_flat(to_tree(Config()))) | BEFORE | dict(_flat(then)), dict(_flat(now))
    was, ahead = ([*settings["training.restarts"], settings["training.epochs"]] for settings in (before, after))
    longer = ahead[: len(was)] == was
    free = (*FREE_TO_CHANGE, "training.epochs", "training.restarts") if longer else FREE_TO_CHANGE
    for key, value in after.items():
        section, _, name = key.rpartition(".")
        smaller = section == "data" and name in SIZES and value < before[key]
        if before[key] != value and key not in free and not smaller:
            how = "resume with the same settings"
            if key in ("training.epochs", "training.restarts"):
                how += f", or lengthen it: --training.epochs more --training.restarts {' '.join(map(str, was))}"
            raise InputError(f"{path} was trained with {key} = {before[key]}, not {value}; {how}")


def _flat(tree: dict, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each setting of a tree."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{name}{key}.")
        else:
            yield name + key, value
