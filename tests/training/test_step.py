"""Optimiser steps: updates, skipped steps, the average of the weights, and results that are read late."""

import math
from dataclasses import replace

import pytest
import torch
from fakes import Curriculum, raising
from tiny_checkpoints import bare_trainer, make_trainer, small
from torch.utils._pytree import tree_leaves

from las_fast.errors import InputError
from las_fast.training import step as module
from las_fast.training.step import Diverged
from las_fast.training.trainer import Trainer


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_and_seed_of_the_settings_are_applied(trainer, monkeypatch, precision, dtype):
    training = replace(trainer.config.training, precision=precision, seed=7)
    config = replace(trainer.config, training=training)
    trainer = Trainer(config, trainer.train_data, trainer.dev_data, trainer.out, trainer.device, trainer.source)
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    seeds, casts = [], []
    seed, autocast = torch.manual_seed, torch.autocast
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))

    def spy(kind, dtype=None, enabled=True):
        casts.append((kind, dtype if enabled else None))
        return autocast(kind, dtype, enabled=enabled)

    monkeypatch.setattr(torch, "autocast", spy)
    trainer.progress.step = 2
    trainer.train_step(next(iter(trainer._rest_of_epoch())))
    assert seeds == [7 * 1_000_003 + 2] and casts[0] == ("cpu", dtype)
    assert trainer.model.training and trainer.progress.step == 3


@pytest.mark.parametrize(
    ("restarts", "step", "place"),
    [
        ((), 0, (0, 40)), ((), 39, (39, 40)),
        ((2, 5), 0, (0, 8)), ((2, 5), 7, (7, 8)), ((2, 5), 8, (0, 12)), ((2, 5), 19, (11, 12)), ((2, 5), 20, (0, 20)),
        ((1,), 3, (3, 4)), ((1,), 4, (0, 36)), ((1,), 39, (35, 36)),
    ],
)  # fmt: skip
def test_the_learning_rate_begins_again_after_each_restart(restarts, step, place):
    trainer = bare_trainer(curriculum=Curriculum())
    trainer.config = small(training=replace(small().training, epochs=10, restarts=restarts))
    trainer.progress.step = step
    assert trainer._cycle_position() == place


# ----------------------------------------------------------------------------------------------------------- updates


class Scaler:
    """Replaces torch's GradScaler and records its calls."""

    def __init__(self, trainer):
        self.trainer, self.calls = trainer, []

    def step(self, optimiser):
        self.calls.append(("step", self.trainer.consistent))

    def update(self):
        self.calls.append(("update", self.trainer.consistent))


def test_an_update_changes_weights_only_if_the_gradient_is_finite_but_always_counts():
    averaged = []
    trainer = bare_trainer(
        optimiser=None, averaged=object(), consistent=True, _average=lambda: averaged.append(trainer.progress.step)
    )
    trainer.scaler = Scaler(trainer)
    trainer._update(torch.tensor(1.0))
    assert trainer.scaler.calls == [("step", False), ("update", False)] and trainer.consistent, (
        "inconsistent only during the update"
    )
    assert (trainer.progress.step, trainer.progress.skipped_in_a_row, averaged) == (1, 0, [1])
    for norm in (math.inf, math.nan):
        trainer._update(torch.tensor(norm))
    assert trainer.scaler.calls[2:] == [("update", False)] * 2
    assert (trainer.progress.step, trainer.progress.skipped_in_a_row, averaged) == (3, 2, [1])
    trainer._update(torch.tensor(2.0))
    assert (trainer.progress.step, trainer.progress.skipped_in_a_row, averaged) == (4, 0, [1, 4])
    trainer.averaged = None
    trainer._update(torch.tensor(2.0))
    assert averaged == [1, 4]


def test_fifty_skipped_steps_in_a_row_end_the_training():
    trainer = bare_trainer(optimiser=None, averaged=None, consistent=True)
    trainer.scaler = Scaler(trainer)
    trainer.progress.skipped_in_a_row = 48
    trainer._update(torch.tensor(math.nan))
    assert trainer.progress.skipped_in_a_row == 49 and trainer.consistent
    with pytest.raises(Diverged, match="50 steps in a row had gradients that are not finite; lower .*now 0.001"):
        trainer._update(torch.tensor(math.nan))
    assert not trainer.consistent


# ------------------------------------------------------------------------------------------- steps that are read late


def losses_and_state(trainer, batches):
    """Train on the batches; return the losses and everything that the training keeps."""
    losses = [float(trainer.train_step(batch)["loss"]) for batch in batches]
    state = trainer.state()
    del state["core_seconds"]
    return losses, state


def assert_equal(actual, expected):
    leaves = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y or x != x for x, y in leaves)


def test_frames_of_training_batches_are_a_multiple_of_32(archive, tmp_path):
    trainer = make_trainer(archive, tmp_path, small())
    batches = list(trainer._rest_of_epoch())
    assert batches and all(batch.features.shape[1] % 32 == 0 for batch in batches)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_steps_that_are_read_late_train_the_same_and_skip_the_same(archive, tmp_path, precision):
    training = replace(small().training, precision=precision, ema_decay=0.9, clip_norm=1.0)
    results = []
    for late in (False, True):
        trainer = make_trainer(archive, tmp_path / str(late), small(training=training))
        trainer.reads_late = late
        first, second, third = trainer._rest_of_epoch()
        spoilt = replace(second, features=second.features.masked_fill(torch.ones(()).bool(), math.nan))
        results.append(losses_and_state(trainer, [first, spoilt, second, third, spoilt]))
        assert (
            trainer.progress.skipped_in_a_row == 1
            and trainer.progress.averaged_steps == 3
            and trainer.progress.step == 5
        )
    assert_equal(results[1], results[0])
    assert math.isnan(results[0][0][1]) and math.isfinite(results[0][0][2])


def test_a_step_read_late_is_averaged_before_the_next_update_and_before_a_save_or_a_validation(trainer, monkeypatch):
    trainer.reads_late = True
    (batch, *_), order = trainer._rest_of_epoch(), []
    average, step = trainer._average, trainer.optimiser.step
    trainer._average = lambda: order.append("average") or average()
    trainer.optimiser.step = lambda: order.append("step") or step()
    trainer.train_step(batch)
    assert order == ["step"] and trainer.pending is not None
    trainer.train_step(batch)
    assert order == ["step", "average", "step"]
    trainer.state()
    assert order[3:] == ["average"] and trainer.pending is None
    trainer.train_step(batch)
    monkeypatch.setattr(trainer, "_validate", raising(InputError("here")))
    with pytest.raises(InputError, match="here"):
        trainer._validate_and_save(None)
    assert order[4:] == ["step", "average"] and trainer.pending is None


def test_a_signal_during_the_late_read_loses_nothing(trainer):
    trainer.reads_late = True
    (batch, *_) = trainer._rest_of_epoch()
    trainer.train_step(batch)
    read, trainer.pending.read = trainer.pending.read, raising(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.settle()
    assert trainer.consistent and trainer.progress.averaged_steps == 0
    trainer.pending.read = read
    trainer.state()
    assert trainer.progress.averaged_steps == 1 and trainer.pending is None


def test_with_late_reads_a_divergence_is_raised_one_step_later(trainer):
    trainer.reads_late = True
    (batch, *_) = trainer._rest_of_epoch()
    trainer.progress.skipped_in_a_row = 49
    spoilt = replace(batch, features=torch.full_like(batch.features, math.nan))
    trainer.train_step(spoilt)
    with pytest.raises(Diverged, match="50 steps in a row"):
        trainer.train_step(batch)
    trainer.progress.skipped_in_a_row = 49
    trainer.train_step(spoilt)
    with pytest.raises(Diverged):  # a worthless state is not saved
        trainer.save()


def test_a_scale_that_overflows_comes_down_and_no_weight_changes_until_then(trainer, monkeypatch):
    trainer.reads_late = True
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    training_loss = module.training_loss

    def large(*arguments, **options):
        loss, parts = training_loss(*arguments, **options)
        return loss * 2**10, parts

    monkeypatch.setattr(module, "training_loss", large)
    (batch, *_) = trainer._rest_of_epoch()
    before = [x.clone() for x in trainer.model.parameters()]
    for _ in range(30):
        trainer.progress.step = 0  # the training has only a few steps
        trainer.train_step(batch)
        trainer.settle()
        if not trainer.progress.skipped_in_a_row:
            break
        assert all(torch.equal(x, y) for x, y in zip(before, trainer.model.parameters(), strict=True))
        trainer.progress.skipped_in_a_row = 1
    assert trainer.progress.averaged_steps == 1 and 2.0 < trainer.scaler.get_scale() < 2.0**126
    assert not all(torch.equal(x, y) for x, y in zip(before, trainer.model.parameters(), strict=True))


def test_only_on_cuda_steps_are_read_late(trainer, monkeypatch):
    assert not trainer.reads_late and not trainer.scaler.is_enabled()
    monkeypatch.setattr(module, "needs_loss_scale", lambda precision, device: device.type == "cpu")
    again = Trainer(trainer.config, trainer.train_data, trainer.dev_data, trainer.out, trainer.device, trainer.source)
    assert again.scaler.is_enabled()


def test_the_loss_scale_is_saved_and_a_state_without_one_can_be_resumed(trainer, monkeypatch):
    trainer.save()
    monkeypatch.setattr(module, "needs_loss_scale", lambda precision, device: True)
    parts = trainer.config, trainer.train_data, trainer.dev_data, trainer.out, trainer.device, trainer.source
    scaled = Trainer(*parts)
    scaled.resume()
    assert scaled.scaler.get_scale() == 65536.0
    (batch, *_) = scaled._rest_of_epoch()
    scaled.train_step(batch)
    scaled.scaler._scale.fill_(1024.0)
    scaled.save()
    again = Trainer(*parts)
    again.resume()
    assert again.scaler.get_scale() == 1024.0
    monkeypatch.setattr(module, "needs_loss_scale", lambda precision, device: False)
    unscaled = Trainer(*parts)
    unscaled.resume()
    assert unscaled.progress.step == 1 and not unscaled.scaler.is_enabled()


def test_the_decay_of_the_average_grows_to_its_setting():
    trainer = bare_trainer(averaged=torch.nn.Linear(1, 1), model=torch.nn.Linear(1, 1))
    for taken, decay in ((0, 2 / 11), (1, 3 / 12), (9989, 9991 / 10000), (9990, 0.9991)):
        trainer.config = small(training=replace(small().training, ema_decay=0.9991))
        trainer.progress.averaged_steps = taken
        with torch.no_grad():
            trainer.averaged.weight.fill_(1.0)
            trainer.model.weight.fill_(3.0)
        trainer._average()
        assert float(trainer.averaged.weight.detach()) == pytest.approx(decay + 3 * (1 - decay), abs=1e-6)
        assert trainer.progress.averaged_steps == taken + 1


def test_the_optimiser_takes_one_pass_over_the_weights(trainer):
    assert trainer.optimiser.defaults["fused"] is True


def test_parameters_without_a_gradient_are_left_out_of_the_norm(trainer):
    trainer.optimiser.zero_grad()
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.model.speller.bias.grad = torch.full_like(trainer.model.speller.bias, 0.5)
    assert trainer._clip() == pytest.approx(0.5 * math.sqrt(trainer.model.speller.bias.numel()))
