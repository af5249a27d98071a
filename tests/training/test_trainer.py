"""The parts of the training loop: epochs, validations, saves and ends, with their edge cases."""

import contextlib
import math
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import Curriculum, raising
from tiny_checkpoints import bare_trainer, make_trainer, small

from las_fast import progress
from las_fast.checkpoint import Loaded, load_model
from las_fast.config import AugmentConfig, DecodingConfig
from las_fast.data.normalisation import Statistics
from las_fast.errors import InputError, Stopped
from las_fast.output.metrics import Scores
from las_fast.training import monitor
from las_fast.training import trainer as trainer_module
from las_fast.training.monitor import Alignment
from las_fast.training.resume import check_same_settings
from las_fast.training.runlog import read_rows
from las_fast.training.schedules import Plateau
from las_fast.training.signals import StopSignals
from las_fast.training.step import Diverged, Progress
from las_fast.training.validate import Validation
from las_fast.tree import to_tree


def test_a_new_trainer_starts_at_step_0(trainer, archive, tmp_path, monkeypatch):
    assert trainer.progress == Progress(
        step=0, best_cer=math.inf, plateau=Plateau(), averaged_steps=0, skipped_in_a_row=0, validated=0
    )
    monkeypatch.setattr(trainer_module.time, "process_time", lambda: 0.0)
    assert trainer.core_hours() == 0.0 and trainer.saved_step is None and trainer.batch_shape == (0, 0)
    assert trainer.logged == "" and trainer.consistent and not trainer.stop.deferred and not trainer.scaler.is_enabled()
    assert trainer.precision == torch.float32
    trainer.stop.check()
    weights = dict(trainer.model.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in trainer.averaged.named_parameters())
    again, other = (
        make_trainer(archive, tmp_path, small(training=replace(small().training, seed=seed, ema_decay=0.0)))
        for seed in (1, 2)
    )
    assert all(torch.equal(value, weights[name]) for name, value in again.model.named_parameters())
    assert not all(torch.equal(value, weights[name]) for name, value in other.model.named_parameters())
    assert other.averaged is None and not trainer.averaged.training


def test_the_pace_counts_seconds_of_audio_without_padding(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "_log_step", lambda bar, parts: None)
    monkeypatch.setattr(trainer, "_validate_and_save", lambda bar: None)
    sizes = []
    step = trainer.train_step
    monkeypatch.setattr(
        trainer, "train_step", lambda batch: sizes.append(tuple(batch.features.shape[:2])) or step(batch)
    )
    trainer._saved_at = math.inf
    trainer._train_epoch(None)
    assert trainer.pace.audio_seconds == pytest.approx(int(trainer.train_data.frame_counts.sum()) * 0.01)
    assert trainer.batch_shape == sizes[-1] and len(sizes) == 3


def test_the_loader_polls_for_a_stop_signal_while_it_waits(trainer, monkeypatch):
    args = {}
    monkeypatch.setattr(trainer_module, "make_loader", lambda *_, **options: args.update(options))
    trainer._rest_of_epoch()
    trainer.stop.signum = signal.SIGTERM
    with pytest.raises(Stopped) as stop:
        args["poll"]()
    assert stop.value.signum == signal.SIGTERM


class Bar:
    """Replaces the progress bar."""

    def __init__(self):
        self.lines, self.notes, self.count = [], [], 0

    def update(self):
        self.count += 1

    def note(self, text):
        self.notes.append(text)

    def write(self, line):
        self.lines.append(line)


def test_each_tenth_step_and_the_last_is_logged_with_its_pace():
    pace = SimpleNamespace(speed=lambda: 12.6, waiting=lambda: 0.25, losses=[])
    rows, bar = [], Bar()
    optimiser = SimpleNamespace(param_groups=[{"lr": 0.5}, {"lr": 0.25}])
    log = SimpleNamespace(training=lambda *row: rows.append(row))
    trainer = bare_trainer(curriculum=Curriculum(), steps=23, pace=pace, optimiser=optimiser, log=log, logged="")
    for step in range(1, 24):
        trainer.progress.step = step
        trainer._log_step(bar, {"loss": torch.tensor(step / 2)})
    assert bar.count == 23 and pace.losses == [5.0, 10.0, 11.5]
    assert rows == [(step, step / 4, {"loss": step / 2, "speed": 12.6, "waiting": 0.25}, 0.5) for step in (10, 20, 23)]
    losses = {0: "", 10: ", loss 5.000, 13 x real time", 20: ", loss 10.000, 13 x real time"}
    expected = [f"epoch {step / 4:.1f}{losses[step // 10 * 10]}" for step in range(1, 23)]
    assert bar.notes == [*expected, "epoch 5.8, loss 11.500, 13 x real time"]


def test_a_line_of_the_progress_shows_the_epoch_of_its_step(monkeypatch, capsys):
    monkeypatch.setattr(progress, "MIN_SECONDS", 0.0)
    pace = SimpleNamespace(speed=lambda: 12.6, waiting=lambda: 0.25, losses=[])
    log, optimiser = SimpleNamespace(training=lambda *row: None), SimpleNamespace(param_groups=[{"lr": 0.5}])
    trainer = bare_trainer(curriculum=Curriculum(), steps=40, pace=pace, optimiser=optimiser, log=log, logged="")
    with trainer._progress_bar() as bar:
        for step in range(1, 41):
            trainer.progress.step = step
            trainer._log_step(bar, {"loss": torch.tensor(1.0)})
    shown = re.findall(r"\((\d+) of 40 steps\).*; epoch ([\d.]+)", capsys.readouterr().err)
    assert len(shown) >= 9 and all(epoch == f"{int(step) / 4:.1f}" for step, epoch in shown)


def test_the_bar_starts_at_the_resumed_step(monkeypatch):
    seen = []
    monkeypatch.setattr(
        trainer_module, "ProgressBar", lambda *args, **options: seen.append((args, options)) or "the bar"
    )
    trainer = bare_trainer(steps=40)
    trainer.progress.step = 7
    assert trainer._progress_bar() == "the bar" and seen == [((40, "training", "steps"), {"done": 7})]


# -------------------------------------------------------------------------------------------------------- validation


def validation(cer=50.0, loss=1.25):
    return Validation(loss, Scores(5, 3.456, cer, 60.0), Alignment(0.9, 0.8, 0.9, 0.6, 5), [])


def test_validation_uses_the_averaged_model_if_any_and_resets_the_pace():
    first, second = object(), object()
    for averaged, expected in ((first, first), (None, second)):
        seen, bar = [], Bar()
        trainer = bare_trainer(curriculum=Curriculum(), averaged=averaged, model=second, stop=StopSignals())
        trainer.progress.step = 6
        trainer.pace = pace = SimpleNamespace(summary=lambda: "; trained at 13 x real time")
        trainer._validate = lambda model, seen=seen: seen.append(model) or validation()
        trainer._check_diverged = lambda loss, seen=seen: seen.append(loss)
        trainer._record = lambda result, model, seen=seen, trainer=trainer: (
            seen.append((model, trainer.stop.deferred)) or "attention: x"
        )
        trainer._validate_and_save(bar)
        assert seen == [expected, 1.25, (expected, True)] and not trainer.stop.deferred and trainer.pace is not pace
        assert bar.lines == [
            "epoch 1.5: dev loss 1.250 per token, LD 3.46, CER 50.00%, WER 60.00%; "
            "trained at 13 x real time\n  attention: x"
        ]


def test_validation_covers_the_dev_set_and_rewords_only_out_of_memory(monkeypatch):
    seen = []
    trainer = bare_trainer(curriculum=Curriculum(), device="cpu", out=Path("run"), dev_data="dev", vocabulary="ABC")
    trainer.stop = StopSignals()
    monkeypatch.setattr(trainer_module, "validate", lambda *args: seen.append(args) or "result")
    assert trainer._validate("model") == "result"
    assert seen == [("model", "dev", "ABC", trainer.config, "cpu", Path("run"), 0.0, trainer.stop.check)]
    monkeypatch.setattr(trainer_module, "validate", raising(RuntimeError("shapes disagree")))
    with pytest.raises(RuntimeError, match="shapes disagree"):
        trainer._validate("model")
    monkeypatch.setattr(trainer_module, "validate", raising(MemoryError()))
    for step, advice in ((0, "start again"), (3, "continue with --resume")):  # nothing is saved before the first step
        trainer.progress.step = step
        message = rf"a validation does not fit in memory; lower --decoding.frames-per-batch \(now 30000\) and {advice}$"
        with pytest.raises(InputError, match=message):
            trainer._validate("model")


def test_a_validation_is_recorded_in_weights_log_and_state(monkeypatch):
    kept, logged, saves = [], [], []
    trainer = bare_trainer(
        curriculum=Curriculum(), source={"kind": "features"}, save=lambda: saves.append(trainer.progress.validated)
    )
    trainer.core_hours = lambda: 1.23456
    trainer.train_data = SimpleNamespace(seconds=np.array([3600.0, 3600.0]))
    trainer._save_weights = lambda model, info, best: kept.append((model, info, best))
    trainer.log = SimpleNamespace(validation=lambda *row: logged.append(row))
    trainer.config = small(training=replace(small().training, schedule="plateau", plateau_patience=0))
    monkeypatch.setattr(
        monitor, "status_line", lambda alignment, epoch, config, fault: f"{alignment.diagonal} at {epoch:g}"
    )
    for step, cer in ((4, 50.0), (8, 50.0), (12, 40.0)):
        trainer.progress.step = step
        assert trainer._record(validation(cer), "model") == f"0.9 at {step // 4}"
    infos = [
        {
            "epoch": step / 4,
            "step": step,
            "dev": {"utterances": 5, "ld": 3.456, "cer": cer, "wer": 60.0},
            "data": {"kind": "features"},
            "core_hours": 1.235,
            "speech_hours": 2.0,
        }
        for step, cer in ((4, 50.0), (8, 50.0), (12, 40.0))
    ]
    bests = [True, False, True]  # an equal score is not better
    assert kept == [("model", info, best) for info, best in zip(infos, bests, strict=True)]
    assert logged[0] == (4, 1.0, validation(50.0), "0.9 at 1", 1.23456) and saves == [4, 8, 12]
    assert (trainer.progress.best_cer, trainer.progress.validated, trainer.progress.plateau.share) == (
        40.0,
        12,
        0.5,
    )


def test_a_dev_loss_that_is_not_finite_before_the_first_step_is_the_fault_of_the_initial_model():
    trainer = bare_trainer(scaler=SimpleNamespace(is_enabled=lambda: False))
    with pytest.raises(Diverged, match="the model of --init has a dev loss of nan; give another checkpoint"):
        trainer._check_diverged(math.nan)


@pytest.mark.parametrize(
    ("loss", "skipped", "scaled", "sentence"),
    [
        (1.0, 0, False, None),
        (1.0, 5, False, None),
        (
            1.0,
            6,
            False,
            "none of the 6 steps so far had finite gradients, .* lower the weights of the losses",
        ),
        (1.0, 6, True, None),  # half precision skips the first steps
        (math.nan, 0, False, "the dev loss is nan after 6 steps: .* lower --training.learning-rate .now 0.001"),
        (math.inf, 0, True, "the dev loss is inf after 6 steps"),
    ],
)
def test_skipped_steps_or_a_dev_loss_that_is_not_finite_are_divergence(loss, skipped, scaled, sentence):
    trainer = bare_trainer(scaler=SimpleNamespace(is_enabled=lambda: scaled))
    trainer.progress.step, trainer.progress.skipped_in_a_row = 6, skipped
    with contextlib.nullcontext() if sentence is None else pytest.raises(Diverged, match=sentence):
        trainer._check_diverged(loss)


@pytest.mark.parametrize("normalisation", ["global", "utterance", "none"])
@pytest.mark.parametrize(
    ("averaged", "best", "names"),
    [(True, True, ["best", "averaged"]), (True, False, ["averaged"]), (None, True, ["best"]), (None, False, [])],
)
def test_weights_are_saved_as_best_and_as_averaged(monkeypatch, normalisation, averaged, best, names):
    saved = []
    monkeypatch.setattr(trainer_module.checkpoint, "save_model", lambda *args: saved.append(args))
    trainer = bare_trainer(out=Path("run"), averaged=averaged, train_data=SimpleNamespace(statistics="statistics"))
    trainer.config = replace(small(), features=replace(small().features, normalisation=normalisation))
    trainer._save_weights(SimpleNamespace(state_dict=lambda: "weights"), {"step": 1}, best)
    statistics = "statistics" if normalisation == "global" else None
    assert saved == [
        (Path("run") / f"{n}.safetensors", "weights", trainer.config, statistics, {"step": 1}) for n in names
    ]


# ------------------------------------------------------------------------------------------------ the end of a training


def fake_run(trainer, monkeypatch, *, problem, close=None):
    """Make run() end with `problem`, and closing the log raise `close`."""
    closed = []

    def closing():
        closed.append(1)
        if close is not None:
            raise close

    monkeypatch.setattr(
        trainer_module, "RunLog", lambda out, config, *at: SimpleNamespace(close=closing, at=(out, *at))
    )
    trainer._train, trainer._rescue = (lambda bar: problem), (lambda error: True)
    trainer._progress_bar = contextlib.nullcontext
    return closed


@pytest.mark.parametrize(
    ("problem", "close", "raised"),
    [
        (None, None, None),
        (None, OSError(28, "full"), OSError),
        (InputError("bad"), None, InputError),
        (InputError("bad"), OSError(28, "full"), InputError),  # takes precedence
    ],
)
def test_a_training_closes_its_log_and_ends_with_its_problem(monkeypatch, problem, close, raised):
    trainer = bare_trainer(out=Path("run"), stop=StopSignals(), saved_epoch=0.5)
    trainer.progress.step = 5
    closed = fake_run(trainer, monkeypatch, problem=problem, close=close)
    with contextlib.nullcontext() if raised is None else pytest.raises(raised):
        trainer.run()
    assert closed == [1] and trainer.log.at == (Path("run"), 5, 0.5)


def test_all_steps_are_taken_and_a_validation_that_is_due_comes_first():
    order = []
    trainer = bare_trainer(curriculum=Curriculum(), steps=40)
    trainer.config = small(training=replace(small().training, epochs=10))

    def epoch(bar):
        order.append(trainer.progress.step)
        trainer.progress.step += 8

    def validated(bar):
        order.append("validation")
        trainer.progress.validated = trainer.progress.step

    trainer._train_epoch, trainer._validate_and_save = epoch, validated
    trainer.progress.step, trainer.progress.validated = 16, 16
    assert trainer._train("bar") is None and order == [16, 24, 32]
    order.clear()
    trainer.progress.step, trainer.progress.validated = 32, 28
    assert trainer._train("bar") is None and order == ["validation", 32]
    for error in (InputError("bad"), KeyboardInterrupt(), MemoryError()):
        trainer.progress.step, trainer._train_epoch = 33, raising(error)
        assert trainer._train("bar") is error and error.__traceback__ is None
    trainer._train_epoch = raising(TypeError("a fault"))
    with pytest.raises(TypeError):
        trainer._train("bar")


def test_the_loss_of_a_skipped_step_is_not_averaged():
    pace = SimpleNamespace(speed=lambda: 12.6, waiting=lambda: 0.25, losses=[])
    log, optimiser = SimpleNamespace(training=lambda *row: None), SimpleNamespace(param_groups=[{"lr": 0.5}])
    trainer = bare_trainer(curriculum=Curriculum(), steps=20, pace=pace, optimiser=optimiser, log=log, logged="")
    for step, loss in ((10, math.nan), (20, 2.0)):
        trainer.progress.step = step
        trainer._log_step(Bar(), {"loss": torch.tensor(loss)})
    assert pace.losses == [2.0]


@pytest.mark.parametrize(
    ("step", "saved_step", "consistent", "problem", "saves", "saved"),
    [
        (5, 5, True, None, 0, True),
        (5, 5, False, InputError("bad"), 0, True),
        (5, 4, True, None, 1, True),
        (5, None, True, InputError("bad"), 1, True),
        (5, 4, False, InputError("bad"), 0, False),
        (0, None, True, InputError("bad"), 0, False),
        (5, 4, True, Diverged("worthless"), 0, False),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_state_is_saved_unless_inconsistent_or_diverged(
    monkeypatch, step, saved_step, consistent, problem, saves, saved, device
):
    weight, freed = torch.nn.Parameter(torch.zeros(1)), []
    weight.grad = torch.zeros(1)
    trainer = bare_trainer(
        saved_step=saved_step, consistent=consistent, device=torch.device(device), optimiser=torch.optim.SGD([weight])
    )
    trainer.progress.step = step
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("cache"))

    def save():
        freed.append("gradients" if weight.grad is None else "")
        trainer.saved_step = trainer.progress.step

    trainer.save = save
    assert trainer._rescue(problem) is saved
    assert freed == [*(["cache"] if device == "cuda" else []), "gradients"] * saves


@pytest.mark.parametrize("error", [InputError("the disk is full"), RuntimeError("x"), MemoryError()])
def test_a_failed_save_raises_unless_an_error_came_first(error):
    trainer = bare_trainer(saved_step=None, consistent=True, device=torch.device("cpu"), save=raising(error))
    trainer.optimiser = SimpleNamespace(zero_grad=lambda: None)
    trainer.progress.step = 3
    assert trainer._rescue(InputError("bad data")) is False
    with pytest.raises(type(error)):
        trainer._rescue(None)


@pytest.mark.parametrize(
    ("size", "saved", "sentence"),
    [
        ((4, 500), True, "a batch of 4 utterances, 2000 frames, does not fit in memory; step 7 is saved, continue with "
         "--resume and --data.frames-per-batch below 20000"),
        ((4, 500), False, "a batch of 4 utterances, 2000 frames, does not fit in memory; start again with "
         "--data.frames-per-batch below 20000"),
        ((2, 500), True, "a batch of 2 utterances, 1000 frames, does not fit in memory; step 7 is saved, continue with "
         "--resume and --data.frames-per-batch below 20000"),
        ((1, 500), True, "an utterance of 500 frames does not fit in memory; start again with --data.max-seconds, "
         "which leaves out the longest"),
        ((0, 0), False, "the first batch does not fit in memory; start again with --data.frames-per-batch below "
         "20000"),
    ],
)  # fmt: skip
def test_out_of_memory_names_the_right_setting(size, saved, sentence):
    trainer = bare_trainer(batch_shape=size)
    trainer.progress.step = 7
    actual = trainer._explain(MemoryError(), saved)
    assert isinstance(actual, InputError) and str(actual) == f"training on {sentence}"
    other = InputError("x.npy is damaged")
    assert trainer._explain(other, saved) is other


# ------------------------------------------------------------------------------------------------------------- resuming


def test_no_signal_interrupts_a_save(monkeypatch):
    seen = []
    monkeypatch.setattr(
        trainer_module.checkpoint, "save_state", lambda path, state: seen.append((path, state, trainer.stop.deferred))
    )
    monkeypatch.setattr(trainer_module.time, "monotonic", lambda: 100.0)
    trainer = bare_trainer(out=Path("run"), stop=StopSignals(), state=lambda: "state")
    trainer.progress.step = 9
    trainer.save()
    assert seen == [(Path("run") / "last.pt", "state", True)]
    assert not trainer.stop.deferred and (trainer.saved_step, trainer._saved_at) == (9, 100.0)


def test_the_state_holds_everything_of_a_training(archive, tmp_path):
    config = small(training=replace(small().training, precision="fp16", schedule="plateau"))
    trainer = make_trainer(archive, tmp_path, config)
    for batch in trainer._rest_of_epoch():
        trainer.train_step(batch)
    trainer.progress.best_cer, trainer.progress.plateau = 12.5, Plateau(0.25, 12.5, 2)
    trainer.save()
    again = make_trainer(archive, tmp_path, config)
    again.resume()
    assert again.progress == trainer.progress and again.saved_step == again.progress.step == 3
    assert again.scaler.state_dict() == trainer.scaler.state_dict()
    for ours, theirs in ((trainer.model, again.model), (trainer.averaged, again.averaged)):
        values = theirs.state_dict()
        assert all(torch.equal(value, values[name]) for name, value in ours.state_dict().items())
    assert not all(map(torch.equal, again.model.parameters(), again.averaged.parameters()))
    ours, theirs = (t.optimiser.state_dict()["state"] for t in (trainer, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k]["exp_avg"], theirs[k]["exp_avg"]) for k in ours)
    assert again.earlier_core_seconds > 0


def test_initial_weights_are_loaded_into_both_models(trainer, archive, tmp_path):
    other = make_trainer(archive, tmp_path / "other", small(training=replace(small().training, seed=5)))
    trainer.start_from(Loaded(other.model, other.config, other.vocabulary, None, Path("there/best.safetensors"), {}))
    for model in (trainer.model, trainer.averaged):
        assert all(map(torch.equal, model.parameters(), other.model.parameters()))
    assert trainer.source == {"kind": "features", "name": "HW4P2 F23", "init": "best.safetensors"}


def test_a_model_with_global_normalisation_keeps_its_statistics_in_a_training_from_it(archive, tmp_path):
    config = small(features=replace(small().features, normalisation="global"))
    trainer = make_trainer(archive, tmp_path / "a", config)
    size = trainer.train_data.raw(0).shape[1]
    statistics = Statistics(torch.full((size,), 3.0), torch.full((size,), 2.0))
    init = Loaded(trainer.model, config, trainer.vocabulary, statistics, Path("init.safetensors"), {})
    assert not torch.equal(trainer.train_data.statistics.mean, statistics.mean)
    trainer.start_from(init)
    assert torch.equal(trainer.train_data[0], (trainer.train_data.raw(0) - 3.0) / 2.0)
    trainer.save()
    again = make_trainer(archive, tmp_path / "a", config)
    again.resume()
    for data in (trainer.dev_data, again.train_data, again.dev_data):
        assert data.statistics.mean.tolist() == [3.0] * size and data.statistics.std.tolist() == [2.0] * size
    other, plain = (make_trainer(archive, tmp_path / name, small()) for name in "bc")
    other.start_from(init)  # each utterance has its own statistics
    assert torch.equal(other.train_data[0], plain.train_data[0])


def test_the_end_of_a_cycle_is_validated(archive, tmp_path):
    training = replace(small().training, epochs=3, restarts=(1,), validate_every=2.0)
    made = make_trainer(archive, tmp_path, small(training=training))
    made.run()
    rows = [row for row in read_rows(tmp_path / "log.jsonl") if row["kind"] == "valid"]
    assert [row["epoch"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize(
    ("now", "validated", "step", "moved"),
    [
        ({}, 9, 9, 9),
        ({"utterances_per_batch": 1}, 9, 18, 18),
        ({"utterances_per_batch": 1}, 4, 18, 0),  # the step of the last validation is past
        ({"frames_per_batch": 50}, 9, 18, 18),
    ],
)
def test_smaller_batches_resume_at_the_same_share_of_the_epoch(monkeypatch, capsys, now, validated, step, moved):
    class Twice(Curriculum):
        """Eight batches per epoch."""

        def steps_before(self, epoch):
            return 8 * epoch

        def batches_of(self, epoch):
            return range(8)

    planned = []
    data = replace(small().data, frames_per_batch=100, utterances_per_batch=2)
    trainer = bare_trainer(curriculum=Twice(), train_data=SimpleNamespace(frame_counts="frames"), saved_step=9)
    trainer.config = small(data=replace(data, **now))
    trainer.progress = Progress(step=9, validated=validated)
    monkeypatch.setattr(
        trainer_module, "plan_curriculum", lambda frames, config: planned.append((frames, config)) or Curriculum()
    )
    trainer._convert_step(to_tree(data))
    assert (trainer.progress.step, trainer.progress.validated, trainer.saved_step) == (step, moved, step)
    assert planned == ([("frames", small(data=data))] if now else [])
    printed = f"batches are smaller, so epochs have more steps: the saved step 9 counts as step {step}\n" if now else ""
    assert capsys.readouterr().out == printed


# ------------------------------------------------------------------------------------------- validation before step 1


def test_the_start_is_validated_once_if_asked(archive, tmp_path):
    config = small(training=replace(small().training, validate_first=True, epochs=1))
    made = make_trainer(archive, tmp_path, config)
    assert made.validation_due
    made.run()
    rows = [row for row in read_rows(tmp_path / "log.jsonl") if row["kind"] == "valid"]
    assert [(row["step"], row["epoch"]) for row in rows] == [(0, 0), (made.steps, 1)]
    again = make_trainer(archive, tmp_path, config)
    again.resume()
    assert not again.validation_due and not make_trainer(archive, tmp_path / "b", small()).validation_due


def test_a_training_that_stops_after_the_first_validation_resumes_without_repeating_it(archive, tmp_path):
    config = small(training=replace(small().training, validate_first=True))
    made = make_trainer(archive, tmp_path, config)
    made.stop.check = lambda: None if made.progress.step == 0 else raising(Stopped(15))()
    with pytest.raises(Stopped):
        made.run()
    again = make_trainer(archive, tmp_path, config)
    again.resume()
    assert again.progress.step == 1 and again.progress.validated == 0 and not again.validation_due


def test_a_training_that_only_makes_it_worse_keeps_its_initial_weights_as_the_best(archive, tmp_path, monkeypatch):
    made = make_trainer(archive, tmp_path, small(training=replace(small().training, validate_first=True)))
    initial = {name: value.clone() for name, value in made.model.state_dict().items()}
    cers = [40.0, 50.0, 45.0]
    monkeypatch.setattr(trainer_module, "validate", lambda *_: validation(cers.pop(0)))
    made.run()
    assert cers == [] and not all(torch.equal(x, initial[name]) for name, x in made.averaged.state_dict().items())
    best = load_model(tmp_path / "best.safetensors")
    assert best.info["step"] == 0 and best.info["dev"]["cer"] == 40.0
    assert all(torch.equal(x, initial[name]) for name, x in best.model.state_dict().items())


def test_the_fault_of_the_texts_is_in_the_line_of_the_validation():
    bar, trainer = Bar(), bare_trainer(curriculum=Curriculum(), averaged=None, model="model", stop=StopSignals())
    trainer.pace = SimpleNamespace(summary=lambda: "")
    trainer._validate = lambda model: replace(validation(), fault="5 of 5 texts are blank")
    trainer._check_diverged, trainer._record = lambda loss: None, lambda result, model: "attention: x"
    trainer._validate_and_save(bar)
    assert bar.lines[0].endswith("WER 60.00% (5 of 5 texts are blank)\n  attention: x")


def test_the_forecast_is_printed_once_and_only_if_the_rest_is_long():
    for forecast, lines in (("take 3 h", ["take 3 h"]), ("", [])):
        bar, asked = Bar(), []
        trainer = bare_trainer(steps=40, announced=False)
        trainer.progress.step = 7
        trainer.pace = SimpleNamespace(is_known=lambda: False)
        trainer._announce_duration(bar)
        assert bar.lines == [] and not trainer.announced
        trainer.pace = SimpleNamespace(
            is_known=lambda: True,
            forecast=lambda steps, forecast=forecast, asked=asked: asked.append(steps) or forecast,
        )
        trainer._announce_duration(bar)
        trainer._announce_duration(bar)
        assert bar.lines == lines and asked == [33]


def test_the_kind_of_features_may_differ_where_an_archive_has_computed_them():
    then, now = (to_tree(small(features=replace(small().features, kind=kind))) for kind in ("mfcc", "logmel"))
    check_same_settings(then, now, Path("last.pt"), kind="features")
    with pytest.raises(InputError, match="was trained with features.kind = mfcc, not logmel"):
        check_same_settings(then, now, Path("last.pt"), kind="audio")


@pytest.mark.parametrize(("name", "before", "after"), [("kind", "mfcc", "logmel"), ("lifter", 22.0, 0.0)])
def test_warping_needs_the_kind_and_the_lifter_of_before(name, before, after):
    for warp, views in ((0.0, (1.0,)), (0.1, (1.0,)), (0.0, (1.0, 1.1))):
        sections = {"augment": AugmentConfig(warp=warp), "decoding": DecodingConfig(warps=views)}
        then, now = (
            to_tree(small(features=replace(small().features, **{name: value}), **sections)) for value in (before, after)
        )
        with (
            pytest.raises(InputError, match=f"features.{name} = {before}, not {after}")
            if warp or len(views) > 1
            else contextlib.nullcontext()
        ):
            check_same_settings(then, now, Path("last.pt"), kind="features")
