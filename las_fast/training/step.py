"""One optimiser step: losses, gradients, the update of the weights, and their average."""

from __future__ import annotations

import bisect
import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from las_fast.checkpoint import build_model
from las_fast.config import Config
from las_fast.data.batch import Batch
from las_fast.data.batch_plan import Curriculum
from las_fast.errors import InputError, is_out_of_memory
from las_fast.model.layers import BatchPart, running_part
from las_fast.search.cuda_graph import clear_graphs, has_graphs
from las_fast.search.steps import PendingFlag
from las_fast.training.losses import training_loss
from las_fast.training.parts import Parts
from las_fast.training.schedules import (
    Plateau,
    ctc_weight,
    guided_weight,
    learning_rate_factor,
    teacher_forcing_rate,
)

MAX_SKIPPED_STEPS = 50  # in a row; fp16 may skip about twenty until its loss scale is low enough


@dataclass
class Progress:
    """The position of a training. It is saved in last.pt, so field names must not change."""

    step: int = 0  # optimiser steps taken
    best_cer: float = float("inf")  # dev, percent
    plateau: Plateau = field(default_factory=Plateau)
    averaged_steps: int = 0  # updates of the averaged weights
    skipped_in_a_row: int = 0  # latest steps, without an update because their gradient was not finite
    validated: int = 0  # step of the latest validation; -1: the start is to be validated


class Diverged(InputError):
    """The training has diverged; its state is not worth saving."""


def lower_rate(config: Config) -> str:
    """Return what to do about a training that has diverged."""
    return f"lower --training.learning-rate (now {config.training.learning_rate:g}) and start again"


class Learner:
    """A model, its optimiser, and the state that an optimiser step reads and changes.

    On CUDA the host runs ahead of the device: only during the next step does it read whether a step was skipped.
    """

    reads_late = False  # whether the host reads the result of a step only during the next step
    pending: PendingFlag | None = None  # whether the latest step was taken; None once the host has read it

    def __init__(self, config: Config, curriculum: Curriculum, device: torch.device):
        self.config, self.curriculum, self.device = config, curriculum, device
        torch.manual_seed(config.training.seed)
        self.model = build_model(config).to(device)
        self.averaged = copy.deepcopy(self.model).eval() if config.training.ema_decay else None
        self.optimiser = make_optimiser(self.model, config)
        self.precision = choose_precision(config.training.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=needs_loss_scale(self.precision, device))
        self.reads_late = device.type == "cuda"
        self.progress = Progress(validated=-1 if config.training.validate_first else 0)
        self.parts = Parts(config.data.frames_per_batch)
        self.consistent = True  # False during an update of the weights

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """Take one optimiser step; return loss, its parts (both per token) and gradient_norm, detached scalars.

        Raises:
            Diverged: too many steps in a row had gradients that are not finite.
        """
        self._set_learning_rate()
        losses = self._gradients(batch)
        self.scaler.unscale_(self.optimiser)  # clipping must see the true gradients
        norm = self._clip()
        self._update(norm)
        return {**losses, "gradient_norm": norm}

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the gradients of a batch, in parts if it does not fit in memory; return its losses per token."""
        utterances, frames = batch.features.shape[:2]
        parts = self.parts.begin(utterances, frames)
        while True:
            self.optimiser.zero_grad()
            try:
                return self._accumulate(batch, self.parts.size(utterances))
            except (RuntimeError, MemoryError) as error:
                with_graphs = has_graphs()  # of the last validation; without them the whole batch may fit
                if not is_out_of_memory(error) or (parts >= utterances and not with_graphs):
                    raise
            if not with_graphs:
                parts = self.parts.halve(utterances, frames)  # outside `except`, where the error keeps tensors alive
            clear_graphs()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _accumulate(self, batch: Batch, size: int) -> dict[str, Tensor]:
        """Add up the gradients of `size` utterances at a time; return the losses of the batch per token."""
        utterances = len(batch.indices)
        losses: dict[str, Tensor] = {}
        for start in range(0, utterances, size):
            # Dropout and teacher forcing are seeded at each step, so that resuming needs no random state.
            torch.manual_seed(self.config.training.seed * 1_000_003 + self.progress.step)
            if size >= utterances:
                loss, values = self._loss(batch)
            else:
                part = batch.rows(start, start + size)
                with running_part(BatchPart(start, utterances)):
                    loss, values = self._loss(part)
                share = part.targets[1].sum() / batch.targets[1].sum()
                loss, values = loss * share, {name: value * share for name, value in values.items()}
            self.scaler.scale(loss).backward()
            for name, value in {"loss": loss.detach(), **values}.items():
                losses[name] = losses[name] + value if name in losses else value
        return losses

    def _set_learning_rate(self) -> None:
        training = self.config.training
        factor = learning_rate_factor(training, *self._cycle_position()) * self.progress.plateau.share
        for group in self.optimiser.param_groups:
            group["lr"] = training.learning_rate * factor

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch and its parts, per token; only the loss has a gradient."""
        training, epoch = self.config.training, self.epoch
        self.model.train()
        tokens, token_lengths = batch.targets
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            output = self.model(batch.features, batch.feature_lengths, tokens, teacher_forcing_rate(training, epoch))
        return training_loss(
            output,
            tokens,
            token_lengths,
            label_smoothing=training.label_smoothing,
            ctc_weight=ctc_weight(training, epoch),
            guided_weight=guided_weight(training, epoch),
            guided_width=training.guided_width,
            guided_frames=training.guided_frames,
        )

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
        step = self._step_unread if self.reads_late else self._step
        taken = step(norm)
        self.scaler.update()  # lowers the scale if unscale_ found a value that is not finite
        self.progress.step += 1
        if taken is not None:
            self._finish(taken)
        self.consistent = True

    def _step(self, norm: Tensor) -> bool:
        """Update the weights if the norm is finite; return whether it is."""
        taken = math.isfinite(float(norm))
        if taken:
            self.scaler.step(self.optimiser)
        return taken

    def _step_unread(self, norm: Tensor) -> bool | None:
        """Update the weights on the device if the norm is finite; return None, because `settle` reads that later."""
        finite = norm.isfinite()
        # The fused kernel skips the update if this is 1.
        self.optimiser.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
        self.optimiser.step()
        self.pending = PendingFlag(finite)
        return None

    def settle(self) -> None:
        """Read whether the latest step was taken, if that is pending, and finish it."""
        if self.pending is None:
            return
        taken = self.pending.read()  # a signal may come here: then it is read again
        self.consistent, self.pending = False, None
        self._finish(taken)
        self.consistent = True

    def _finish(self, taken: bool) -> None:
        """Count a step, and average its weights if it was taken."""
        self._count(taken)
        if taken and self.averaged is not None:
            self._average()

    def _count(self, taken: bool) -> None:
        """Count skipped steps in a row; raise Diverged at MAX_SKIPPED_STEPS."""
        self.progress.skipped_in_a_row = 0 if taken else self.progress.skipped_in_a_row + 1
        if self.progress.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise Diverged(
                f"{MAX_SKIPPED_STEPS} steps in a row had gradients that are not finite; {lower_rate(self.config)}"
            )

    def _average(self) -> None:
        """Update averaged = decay * averaged + (1 - decay) * weights; the decay is lower during the first updates."""
        assert self.averaged is not None
        self.progress.averaged_steps += 1
        n = self.progress.averaged_steps
        decay = min(self.config.training.ema_decay, (1 + n) / (10 + n))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay)

    @property
    def epoch(self) -> float:
        """Epochs done, with a fraction."""
        return self.curriculum.epochs(self.progress.step)

    def _cycle_position(self) -> tuple[int, int]:
        """Return (steps done, total steps) of the current cycle of the learning rate (Loshchilov and Hutter 2017)."""
        bounds = (0, *self.config.training.restarts, self.config.training.epochs)
        cycle = bisect.bisect_right(bounds, self.curriculum.locate(self.progress.step)[0]) - 1
        begin, end = (self.curriculum.steps_before(epoch) for epoch in bounds[cycle : cycle + 2])
        return self.progress.step - begin, end - begin


def make_optimiser(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Return a fused AdamW; biases, LayerNorm weights and the tied embedding have no weight decay."""
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (undecayed if parameter.dim() < 2 or "embedding" in name else decayed).append(parameter)
    decay = config.training.weight_decay
    groups = [{"params": decayed, "weight_decay": decay}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.training.learning_rate, betas=(0.9, 0.98), fused=True)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matmuls for "fp32", "bf16", "fp16" or "auto".

    "auto" is bfloat16 if the device has bfloat16 instructions, else float16 on CUDA and float32 on a CPU.
    """
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        with torch.cuda.device(device):  # it asks the current device
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def needs_loss_scale(precision: torch.dtype, device: torch.device) -> bool:
    """Return whether gradients pass through float16, in which small ones lose digits unless the loss is scaled.

    On CUDA that includes bfloat16: autocast runs cuDNN's LSTMs in float16 whatever its dtype.
    """
    return precision == torch.float16 or (device.type == "cuda" and precision != torch.float32)
