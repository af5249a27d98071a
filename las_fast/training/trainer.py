"""The training loop: epochs, validations, logs, and checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from las_fast import checkpoint
from las_fast.checkpoint import AVERAGED, BEST, LAST
from las_fast.config import Config
from las_fast.data.augment import Augment
from las_fast.data.batch import TRAINING_FRAME_MULTIPLE, Batch, make_loader
from las_fast.data.batch_plan import plan_curriculum
from las_fast.data.dataset import SpeechDataset
from las_fast.data.features import seconds_of
from las_fast.data.normalisation import Statistics
from las_fast.data.splice import Splice, WordTable
from las_fast.errors import InputError, explain_error, is_out_of_memory
from las_fast.model.las import LAS
from las_fast.progress import ProgressBar, write
from las_fast.text import Vocabulary
from las_fast.training import monitor
from las_fast.training.adapt import FINETUNE
from las_fast.training.align import align_words
from las_fast.training.initial import initial_weights
from las_fast.training.pace import Pace
from las_fast.training.resume import BATCH_SIZES, check_same_settings, fingerprint
from las_fast.training.runlog import RunLog
from las_fast.training.schedules import Plateau
from las_fast.training.signals import StopSignals
from las_fast.training.step import Diverged, Learner, Progress, lower_rate
from las_fast.training.validate import Validation, validate
from las_fast.tree import to_tree

WORDS = "words.npz"  # in a run folder: the words of the training set, for augment.splice


class Trainer(Learner):
    """A training in the run folder `out`: data, model, optimiser, and the loop over steps.

    source: kind and name of the corpus, which are stored in every checkpoint.
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
        super().__init__(config, plan_curriculum(train_data.frame_counts, config), device)
        self.train_data, self.dev_data, self.out, self.source = train_data, dev_data, out, source
        self.vocabulary = Vocabulary(config.data.characters)
        self.steps = self.curriculum.steps
        self.saved_step: int | None = None  # step in last.pt
        self.saved_epoch = math.inf  # epoch of saved_step in the old batch sizes; inf: they are unchanged
        self.earlier_core_seconds = 0.0  # CPU time of this training before it was resumed
        self.splice: Splice | None = None  # from epoch augment.splice_epoch on
        self.stop = StopSignals()
        self.batch_shape = (0, 0)  # utterances and padded feature frames of the latest batch; 0 before the first
        self.pace = Pace()
        self.announced = False  # whether the expected duration was printed
        self.logged = ""  # loss and speed at the latest logged step, for the progress bar

    @cached_property
    def data_fingerprint(self) -> str:
        """The fingerprint of the datasets."""
        return fingerprint(self.train_data, self.dev_data)

    # The loop

    def run(self) -> None:
        """Train to the last epoch.

        On a stop signal, or an error that the machine caused (memory, disk), the state is saved first.

        Raises:
            Stopped: a signal asked to stop.
            InputError: memory or disk ran out, or the training has diverged.
        """
        self.log = RunLog(self.out, self.config, self.progress.step, self.saved_epoch)
        with self.stop.catch(), self._progress_bar() as bar:
            problem = self._train(bar)
            saved = self._rescue(problem)
        with contextlib.suppress(*([] if problem is None else [OSError])):  # raise the earlier problem instead
            self.log.close()
        if problem is not None:
            raise self._explain(problem, saved)

    def _train(self, bar: ProgressBar) -> BaseException | None:
        """Take the remaining steps; return the exception that ended the training early, or None.

        The exception has no traceback, which would keep the tensors of the step alive while the state is saved.
        """
        try:
            self.pace, self._saved_at = Pace(), time.monotonic()
            if self.validation_due:
                if not self.progress.step:
                    self._splice_of(0)  # may refuse the training, before anything is saved
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
                self.batch_shape = (batch.features.shape[0], batch.features.shape[1])
                losses = self.train_step(batch.to(self.device))
                self.pace.add_step(seconds_of(float(batch.feature_lengths.sum()), self.config.features))
                self._log_step(bar, losses)
                self._announce_duration(bar)
                self.stop.check()
                if self.validation_due:
                    self._validate_and_save(bar)
                elif time.monotonic() - self._saved_at > 60 * self.config.training.checkpoint_minutes:
                    self.save()

    def _rescue(self, problem: BaseException | None) -> bool:
        """Save the state unless it is inconsistent or has diverged; return whether last.pt has the current step."""
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
        utterances, frames = self.parts.size(self.batch_shape[0]), self.batch_shape[1]
        size = f"a batch of {utterances} utterances, {utterances * frames} frames," if utterances else "the first batch"
        remedy = f"--data.frames-per-batch below {self.config.data.frames_per_batch}"
        if utterances == 1:
            size, remedy = f"an utterance of {frames} frames", "--data.max-seconds, which leaves out the longest"
        advice = f"step {self.progress.step} is saved, continue with --resume and {remedy}"
        if utterances == 1 or not saved:
            advice = f"start again with {remedy}"
        return InputError(f"training on {size} does not fit in memory; {advice}")

    def core_hours(self) -> float:
        """Return the CPU time of this training in hours, with that before a resume, but without loader processes."""
        return (self.earlier_core_seconds + time.process_time()) / 3600

    def _timed_batches(self) -> Generator[Batch, None, None]:
        """Yield the remaining batches of the epoch, and add the time waiting for them to the pace."""
        batches = iter(self._rest_of_epoch())
        while (batch := self.pace.next_batch(batches)) is not None:
            yield batch

    def _rest_of_epoch(self):
        epoch, start = self.curriculum.locate(self.progress.step)
        augment = Augment(self.config.augment)
        return make_loader(
            self.train_data,
            self.curriculum.batches_of(epoch).epoch(epoch),
            self.vocabulary,
            augment=augment,
            splice=self._splice_of(epoch),
            seed=self.config.training.seed,
            epoch=epoch,
            start=start,
            workers=self.config.data.workers,
            frame_multiple=TRAINING_FRAME_MULTIPLE,
            pin=self.device.type == "cuda",
            poll=self.stop.check,
        )

    def _splice_of(self, epoch: int) -> Splice | None:
        """Return what replaces words in an epoch, or None; at the start of augment.splice_epoch, align all words.

        A training that was interrupted later reads the words of its run folder.
        """
        if not self.config.augment.splice or epoch < self.config.augment.splice_epoch:
            return None
        if self.splice is None:
            path, data = self.out / WORDS, fingerprint(self.train_data)
            is_later = self.progress.step > self.curriculum.steps_before(self.config.augment.splice_epoch)
            if is_later and path.is_file():
                self.splice = Splice(self.train_data, WordTable.load(path, data))
            else:
                if is_later:
                    write(f"warning: {path} is missing; a training that was not interrupted has words aligned earlier")
                self.splice = self._align()
                self.splice.table.save(path, data)
        return self.splice

    def _align(self) -> Splice:
        """Find the frames of all words of the training set; warn if the CTC head is unsure of most of them."""
        self.settle()
        start = time.perf_counter()
        table = align_words(
            self.averaged or self.model,
            self.train_data,
            self.vocabulary,
            data=self.config.data,
            precision=self.precision,
            check_stop=self.stop.check,
        )
        splice, total = Splice(self.train_data, table), len(table.utterances)
        self.pace.exclude(time.perf_counter() - start)
        write(f"augment.splice: {total} words aligned; the CTC head is sure of {splice.candidates}")
        advice = "raise --augment.splice-epoch, so that it learns more before, or give --augment.splice 0"
        if not splice.candidates and not self.progress.step:
            raise InputError(f"augment.splice: the CTC head is not sure of any of the {total} words; {advice}")
        if 2 * splice.candidates <= total:
            write(f"warning: the CTC head is unsure of most words, which therefore stay; next time, {advice}")
        return splice

    # Validation, logs and messages

    @property
    def validation_due(self) -> bool:
        """Whether a validation is due at this step and was not done."""
        every, step = self.config.training.validate_every, self.progress.step
        if step == self.progress.validated:
            return False
        if step == 0:
            return self.progress.validated < 0
        before, now = (int(self.curriculum.epochs(s) / every) for s in (step - 1, step))
        cycles = map(self.curriculum.steps_before, self.config.training.restarts)
        return now > before or step == self.steps or step in cycles  # at its end, a cycle has its lowest rate

    def _validate_and_save(self, bar: ProgressBar) -> None:
        self.settle()
        model, trained = self.averaged or self.model, self.pace.summary()
        result = self._validate(model)
        self._check_diverged(result.loss)
        with self.stop.defer():
            line = self._record(result, model)
        scores = result.scores
        fault = f" ({result.fault})" if result.fault else ""
        bar.write(
            f"epoch {self.epoch:g}: dev loss {result.loss:.3f} per token, LD {scores.ld:.2f}, CER {scores.cer:.2f}%, "
            f"WER {scores.wer:.2f}%{fault}{trained}\n  {line}"
        )
        self.pace = Pace()

    def _validate(self, model: LAS) -> Validation:
        try:
            options = (self.config, self.device, self.out, self.epoch, self.stop.check)
            return validate(model, self.dev_data, self.vocabulary, *options)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            now = self.config.decoding.frames_per_batch
        advice = "continue with --resume" if self.progress.step else "start again"
        raise InputError(
            f"a validation does not fit in memory; lower --decoding.frames-per-batch (now {now}) and {advice}"
        )

    def _record(self, result: Validation, model: nn.Module) -> str:
        """Write weights, log and last.pt after a validation; return the monitor's line."""
        cer, progress = result.scores.cer, self.progress
        info = {"epoch": self.epoch, "step": progress.step, "dev": asdict(result.scores), "data": self.source}
        info["core_hours"] = round(self.core_hours(), 3)
        info["speech_hours"] = round(float(self.train_data.seconds.sum()) / 3600, 4)
        self._save_weights(model, info, best=cer < progress.best_cer)
        progress.plateau.update(cer, self.config.training)
        progress.best_cer, progress.validated = min(progress.best_cer, cer), progress.step
        line = monitor.status_line(result.alignment, self.epoch, self.config, result.fault)
        self.log.validation(progress.step, self.epoch, result, line, self.core_hours())
        self.save()
        return line

    def _check_diverged(self, loss: float) -> None:
        """Raise Diverged, before weights are saved, if the dev loss or all gradients so far are not finite."""
        progress = self.progress
        if not math.isfinite(loss) and not progress.step:  # training.validate_first
            raise Diverged(f"the model of --init has a dev loss of {loss}; give another checkpoint")
        if not math.isfinite(loss):
            raise Diverged(
                f"the dev loss is {loss} after {progress.step} steps: the training has diverged; "
                f"{lower_rate(self.config)}"
            )
        none_taken = 0 < progress.skipped_in_a_row == progress.step
        if none_taken and not self.scaler.is_enabled():  # a scaler skips the first steps
            raise Diverged(
                f"none of the {progress.step} steps so far had finite gradients, so nothing was learned; "
                "lower the weights of the losses, such as --training.ctc-weight, or give --training.precision fp32, "
                "and start again"
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

    def _log_step(self, bar: ProgressBar, losses: dict[str, Tensor]) -> None:
        """Advance the bar, which shows the epoch of this step; log the losses of every tenth step and of the last."""
        step = self.progress.step
        if step % 10 == 0 or step == self.steps:
            values = dict(zip(losses, torch.stack(tuple(losses.values())).tolist(), strict=True))  # waits once
            values |= {"speed": self.pace.speed(), "waiting": self.pace.waiting()}
            if math.isfinite(values["loss"]):  # not that of a step that was skipped
                self.pace.losses.append(values["loss"])
            self.log.training(step, self.epoch, values, self.optimiser.param_groups[0]["lr"])
            self.logged = f", loss {values['loss']:.3f}, {values['speed']:.0f} x real time"
        bar.note(f"epoch {self.epoch:.1f}{self.logged}")
        bar.update()

    def _announce_duration(self, bar: ProgressBar) -> None:
        """Print once how long the rest will take, if that is long, as soon as the pace is known."""
        if not self.announced and self.pace.is_known():
            self.announced = True
            if forecast := self.pace.forecast(self.steps - self.progress.step):
                bar.write(forecast)

    def start_from(self, init: checkpoint.Loaded) -> None:
        """Start from the weights of a model of the same sizes, perhaps with fewer BiLSTMs or other CTC heads.

        Modules that it lacks keep their random weights, and their names are printed. Its feature statistics, if it has
        any, replace those of the data, which its weights were not trained with.
        """
        path, initial = init.path, initial_weights(self.model, init.model)
        for target in filter(None, (self.model, self.averaged)):
            checkpoint.load_weights(target, initial.weights, path, advice=f"give --config {FINETUNE}")
        self._set_statistics(init.statistics)
        if initial.new:
            print(f"random weights: {', '.join(initial.new)}; the others are from {path}")
        for layer in initial.unused:
            print(f"weights: the CTC head on BiLSTM {layer} of {path} is not used")
        self.source = {**self.source, "init": path.name}

    def _set_statistics(self, statistics: Statistics | None) -> None:
        """Normalise the features with these statistics, if normalisation is global and there are any."""
        if statistics is not None and self.config.features.normalisation == "global":
            self.train_data.statistics = self.dev_data.statistics = statistics

    # State on disk

    def save(self) -> None:
        """Write last.pt, which has everything that resuming needs."""
        with self.stop.defer():
            checkpoint.save_state(self.out / LAST, self.state())
            self.saved_step, self._saved_at = self.progress.step, time.monotonic()

    def state(self) -> dict:
        """Return the contents of last.pt."""
        self.settle()
        statistics = self.train_data.statistics
        return {
            "settings": to_tree(self.config),
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not None else None,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "core_seconds": 3600 * self.core_hours(),
            "init": self.source.get("init"),
            "statistics": None if statistics is None else (statistics.mean, statistics.std),
            "data": self.data_fingerprint,
        }

    def resume(self) -> None:
        """Continue from last.pt.

        Raises:
            InputError: last.pt is damaged, or was written with other settings or other data.
        """
        path = self.out / LAST
        state = checkpoint.load_state(path)
        check_same_settings(state["settings"], to_tree(self.config), path, kind=self.source["kind"])
        if state["data"] != self.data_fingerprint:
            raise InputError(f"{path} was trained on other utterances; resume with the same --data and --extra-data")
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
        if state.get("init"):  # earlier versions did not save it
            self.source = {**self.source, "init": state["init"]}
        if state.get("statistics"):
            self._set_statistics(Statistics(*state["statistics"]))
        self._convert_step(state["settings"]["data"])

    def _convert_step(self, saved: dict) -> None:
        """Convert the step from the saved batch sizes to the current ones: same epoch, same share of its batches."""
        sizes = {name: saved[name] for name in BATCH_SIZES}
        data, progress = self.config.data, self.progress
        if all(getattr(data, name) == size for name, size in sizes.items()):
            return
        before = plan_curriculum(self.train_data.frame_counts, replace(self.config, data=replace(data, **sizes)))
        epoch, batch = before.locate(progress.step)
        step = self.curriculum.steps_before(epoch) + batch * len(self.curriculum.batches_of(epoch)) // len(
            before.batches_of(epoch)
        )
        print(f"batches are smaller, so epochs have more steps: the saved step {progress.step} counts as step {step}")
        self.saved_epoch = epoch + batch / len(before.batches_of(epoch))
        progress.validated = step if progress.validated == progress.step else 0
        progress.step = self.saved_step = step
