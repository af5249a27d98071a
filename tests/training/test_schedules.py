"""Schedules of teacher forcing, loss weights and the learning rate."""

import math

import pytest

from las_fast.config import TeacherForcingStage, TrainingConfig
from las_fast.training.schedules import (
    Plateau,
    ctc_weight,
    guided_weight,
    learning_rate_factor,
    teacher_forcing_rate,
    warmup_steps,
)


def test_default_teacher_forcing_starts_at_one_and_decays_in_two_stages():
    config = TrainingConfig()
    rates = [teacher_forcing_rate(config, e) for e in (0, 19.9, 30, 40, 50, 60, 99)]
    assert rates == pytest.approx([1, 1, 0.9, 0.8, 0.7, 0.6, 0.6])


def test_any_list_of_stages_is_followed_in_order_of_start():
    stages = (TeacherForcingStage(5, 5, 0.5, 0.5), TeacherForcingStage(0, 2, 1.0, 0.8))
    config = TrainingConfig(teacher_forcing=stages)
    assert [teacher_forcing_rate(config, e) for e in (0, 1, 2, 4, 5, 9)] == pytest.approx([1, 0.9, 0.8, 0.8, 0.5, 0.5])
    assert teacher_forcing_rate(TrainingConfig(teacher_forcing=()), 7) == 1


def test_the_guided_weight_fades_to_0_and_ctc_ends_at_ctc_until():
    config = TrainingConfig(guided_weight=3.0, guided_until=10.0, ctc_weight=0.5, ctc_until=4.0)
    assert [guided_weight(config, e) for e in (0, 5, 10, 20)] == pytest.approx([3, 1.5, 0, 0])
    assert [ctc_weight(config, e) for e in (0, 3.9, 4)] == [0.5, 0.5, 0.0]
    assert guided_weight(TrainingConfig(guided_weight=3.0, guided_until=0.0), 0) == 0


def test_learning_rate_warms_up_then_follows_the_cosine_down():
    config = TrainingConfig(warmup_steps=10, final_share=0.1)
    shares = [learning_rate_factor(config, s, 110) for s in (0, 9, 10, 60, 110, 500)]
    assert shares == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1, 0.1])
    assert learning_rate_factor(TrainingConfig(warmup_steps=0, schedule="constant"), 50, 100) == 1


def test_plateau_halves_after_patience_and_only_with_its_schedule():
    config = TrainingConfig(schedule="plateau", plateau_patience=1)
    plateau = Plateau()
    shares = []
    for cer in (50, 40, 41, 42, 39, 39, 39):
        plateau.update(cer, config)
        shares.append(plateau.share)
    assert shares == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]
    constant = Plateau()
    assert constant == Plateau(share=1.0, best=math.inf, waited=0)
    for _ in range(9):
        constant.update(50, TrainingConfig(schedule="cosine"))
    assert constant.share == 1


def test_a_plateau_waits_again_after_each_cut_and_never_goes_below_the_final_share():
    config = TrainingConfig(schedule="plateau", plateau_patience=2, plateau_factor=0.5, final_share=0.2)
    plateau, shares = Plateau(), []
    for _ in range(11):
        plateau.update(50, config)
        shares.append(plateau.share)
    assert shares == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.2, 0.2]
    assert (plateau.best, plateau.waited) == (50, 1)


def test_schedules_hold_at_their_limits():
    stages = (TeacherForcingStage(2, 4, 1.0, 0.6), TeacherForcingStage(4, 4, 0.5, 0.2))
    rates = [teacher_forcing_rate(TrainingConfig(teacher_forcing=stages), e) for e in (0, 2, 3.999, 4, 5)]
    assert rates == pytest.approx([1, 1, 0.6, 0.5, 0.2], abs=1e-3)
    config = TrainingConfig(warmup_steps=4, final_share=0.0)
    assert [learning_rate_factor(config, s, 40) for s in (0, 2, 3, 4)] == pytest.approx([0.25, 0.75, 1.0, 1.0])
    assert learning_rate_factor(config, 40, 40) == pytest.approx(0, abs=1e-12)
    assert ctc_weight(TrainingConfig(ctc_weight=0.5, ctc_until=0.0), 1e9) == 0.5
    for schedule in ("constant", "plateau"):
        config = TrainingConfig(warmup_steps=2, schedule=schedule)
        assert [learning_rate_factor(config, s, 20) for s in (0, 1, 2, 20)] == [0.5, 1, 1, 1]


@pytest.mark.parametrize(("steps", "warmup"), [(9, 0), (10, 1), (300, 30), (1999, 199), (20_000, 2000), (10**6, 2000)])
def test_the_warm_up_is_at_most_a_tenth_of_the_run(steps, warmup):
    config = TrainingConfig(warmup_steps=2000, final_share=0.0)
    assert warmup_steps(config, steps) == warmup
    factors = [learning_rate_factor(config, s, steps) for s in range(min(steps, warmup + 1))]
    assert max(factors) == factors[-1] == 1 and sum(factor < 1 for factor in factors) == max(0, warmup - 1)
