"""Schedules: functions of the step or epoch alone, so that resuming needs no state. Only Plateau has state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from las_fast.config import TrainingConfig

MAX_WARMUP_SHARE = 0.1  # of the steps of a cycle of the learning rate


def teacher_forcing_rate(config: TrainingConfig, epoch: float) -> float:
    """Return the probability that the speller reads the true previous token, by the latest stage that has begun.

    epoch: may have a fraction. Before the first stage the probability is 1.
    """
    rate = 1.0
    for stage in sorted(config.teacher_forcing, key=lambda s: s.start):
        if epoch >= stage.start:
            span = max(stage.end - stage.start, 1e-9)
            done = min((epoch - stage.start) / span, 1.0)
            rate = stage.first + (stage.last - stage.first) * done
    return rate


def guided_weight(config: TrainingConfig, epoch: float) -> float:
    """Return the weight of the guided attention loss, which falls linearly to 0 at epoch guided_until."""
    if config.guided_until <= 0:
        return 0.0
    return config.guided_weight * max(0.0, 1 - epoch / config.guided_until)


def ctc_weight(config: TrainingConfig, epoch: float) -> float:
    """Return the weight of the CTC loss: ctc_weight until epoch ctc_until, then 0; ctc_until 0 means always."""
    return 0.0 if config.ctc_until and epoch >= config.ctc_until else config.ctc_weight


def warmup_steps(config: TrainingConfig, steps: int) -> int:
    """Return the steps of warm-up in a cycle of `steps`: at most MAX_WARMUP_SHARE, so that most steps learn."""
    return min(config.warmup_steps, int(MAX_WARMUP_SHARE * steps))


def learning_rate_factor(config: TrainingConfig, step: int, steps: int) -> float:
    """Return the factor on the peak learning rate at `step` of a cycle of `steps`.

    It rises linearly during the warm-up. Then it follows a cosine down to final_share, or stays 1 with other schedules.
    """
    warmup = warmup_steps(config, steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule != "cosine":
        return 1.0
    done = (step - warmup) / (steps - warmup)
    return config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass
class Plateau:
    """Lowers the learning rate when the dev CER has not fallen for more than plateau_patience validations."""

    share: float = 1.0  # factor on the learning rate
    best: float = math.inf  # lowest dev CER so far
    waited: int = 0  # validations since the lowest CER or the last cut

    def update(self, cer: float, config: TrainingConfig) -> None:
        """Count a validation; does nothing with other schedules than "plateau"."""
        if config.schedule != "plateau":
            return
        if cer < self.best:
            self.best, self.waited = cer, 0
            return
        self.waited += 1
        if self.waited > config.plateau_patience:
            self.share, self.waited = max(self.share * config.plateau_factor, config.final_share), 0
