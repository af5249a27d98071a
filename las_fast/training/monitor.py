"""Attention monitor: has the alignment between characters and frames formed, and what to try when it has not.

Four numbers, each an average over utterances. Only together do they mean an alignment: attention that is sharp may
still look at one frame, at the end, or anywhere. While the guided attention loss is on, all four can be high although
the speller only counts along the prior and hears nothing; so `formed` waits until the prior has faded.

    diagonal   correlation of the attended frame (weighted mean) with the token's index; 1 is a diagonal
    sharp      weight within 2 frames of the peak, corrected for chance: 0 is uniform, 1 all of it. Entropy would punish
               a letter that two neighbouring frames share, and would depend on the length of the utterance.
    monotonic  share of steps that go back at most 2 frames and forward at most a quarter of the utterance, or twice the
               frames of an average token where that is more
    coverage   share of the utterance's frames that lie within reach of some token's peak
    heard      nats that a token's cross-entropy rises by when the speller is given another utterance's audio: near 0 it
               only knows what text looks like
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from las_fast.config import Config
from las_fast.training.schedules import teacher_forcing_rate

SHAPE = {"diagonal": 0.8, "sharp": 0.5, "monotonic": 0.75, "coverage": 0.55}
THRESHOLDS = SHAPE | {"heard": 0.5}
NEAR = 2  # frames on either side of the peak that still are the peak
LEAST_TOKENS = 3  # shorter utterances say nothing about order
LEAST_FRAMES = 8  # in shorter ones everything is near the peak


@dataclass(frozen=True)
class Alignment:
    """Averages over `utterances` utterances; see the module for what they mean."""

    diagonal: float
    sharp: float
    monotonic: float
    coverage: float
    formed: bool = field(init=False)  # all that are known reach their thresholds
    utterances: int  # that were long enough to judge
    heard: float | None = None  # None where it was not measured

    def __post_init__(self):
        object.__setattr__(self, "formed", self.utterances > 0 and not self.failing())

    def failing(self) -> list[str]:
        """Return the names of the numbers below their thresholds; NaN is."""
        known = {name: value for name in THRESHOLDS if (value := getattr(self, name)) is not None}
        return [name for name, value in known.items() if not value >= THRESHOLDS[name]]


@torch.no_grad()
def measure(weights: torch.Tensor, token_lengths: torch.Tensor, lengths: torch.Tensor) -> Alignment:
    """Measure teacher-forced attention.

    Args:
        weights:       (B, U, T) float32; what lies past the lengths is not looked at.
        token_lengths: (B,) int64 tokens, <eos> included; the last token is left out, since <eos> may look anywhere.
        lengths:       (B,) int64 valid encoder frames.

    Returns:
        Averages over the utterances that have at least 3 characters and 8 frames; zeros if there is none.
    """
    device = weights.device
    token_lengths, lengths = token_lengths.to(device) - 1, lengths.to(device)
    judged = (token_lengths >= LEAST_TOKENS) & (lengths >= LEAST_FRAMES)
    count = int(judged.sum())
    if count == 0:
        return Alignment(0.0, 0.0, 0.0, 0.0, 0)
    weights, token_lengths, lengths = weights[judged].float(), token_lengths[judged], lengths[judged]
    tokens = torch.arange(weights.shape[1], device=device) < token_lengths[:, None]  # (B, U)
    frames = torch.arange(weights.shape[2], device=device) < lengths[:, None]  # (B, T)
    weights = weights.masked_fill(~(tokens[:, :, None] & frames[:, None, :]), 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
    peaks = weights.argmax(-1)  # (B, U)
    parts = (
        _diagonal(weights, tokens),
        _sharp(weights, peaks, tokens, frames),
        _monotonic(peaks, tokens, lengths),
        _coverage(peaks, tokens, frames),
    )
    diagonal, sharp, monotonic, coverage = (float(part.mean()) for part in parts)
    return Alignment(diagonal, sharp, monotonic, coverage, count)


def combine(alignments: list[Alignment]) -> Alignment:
    """Return the averages over the utterances of all of them, as if measured in one batch."""
    total = sum(alignment.utterances for alignment in alignments)
    if total == 0:
        return Alignment(0.0, 0.0, 0.0, 0.0, 0)
    means = {name: sum(getattr(a, name) * a.utterances for a in alignments) / total for name in SHAPE}
    return Alignment(**means, utterances=total)


def _diagonal(weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    counts = tokens.sum(-1, keepdim=True)
    attended = weights @ torch.arange(weights.shape[2], device=weights.device, dtype=weights.dtype)  # (B, U)
    index = torch.arange(weights.shape[1], device=weights.device, dtype=weights.dtype).expand_as(attended)

    def centred(x: torch.Tensor) -> torch.Tensor:
        return (x - (x * tokens).sum(-1, keepdim=True) / counts) * tokens

    attended, index = centred(attended), centred(index)
    # attention that moves less than a tenth of a frame has no direction: rounding must not count as one
    spread = attended.square().sum(-1).clamp_min(0.01 * counts[:, 0])
    return (attended * index).sum(-1) / (spread * index.square().sum(-1)).sqrt()


def _sharp(weights: torch.Tensor, peaks: torch.Tensor, tokens: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    position = torch.arange(weights.shape[2], device=weights.device)
    near = ((position - peaks[:, :, None]).abs() <= NEAR) & frames[:, None]  # (B, U, T)
    mass = (weights * near).sum(-1)
    chance = near.sum(-1) / frames.sum(-1, keepdim=True)
    return ((mass - chance) / (1 - chance) * tokens).sum(-1) / tokens.sum(-1)


def _monotonic(peaks: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    moves = peaks[:, 1:] - peaks[:, :-1]
    furthest = torch.maximum(lengths / 4, 2 * lengths / tokens.sum(-1)).clamp_min(2 * NEAR + 1)
    good = (moves >= -NEAR) & (moves <= furthest[:, None]) & tokens[:, 1:]
    return good.sum(-1) / (tokens.sum(-1) - 1)


def _coverage(peaks: torch.Tensor, tokens: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    position = torch.arange(frames.shape[1], device=frames.device)
    spacing = frames.sum(-1) / tokens.sum(-1)
    reach = (0.75 * spacing).clamp_min(NEAR)  # so that few characters over many frames are no fault
    distance = (position - peaks[:, :, None]).abs()  # (B, U, T)
    seen = ((distance <= reach[:, None, None]) & tokens[:, :, None]).any(1) & frames
    return seen.sum(-1) / frames.sum(-1)


def line(alignment: Alignment, epoch: float, config: Config) -> str:
    """Return one plain line: formed, not formed yet, or not by training.monitor_epoch with what to try in order.

    Args:
        epoch: epochs trained so far.
        config: the run's settings; what they have on already is not advised.
    """
    deadline = config.training.monitor_epoch
    if alignment.utterances == 0:
        return "attention: not judged; no dev utterance has 3 characters and 8 encoder frames"
    numbers = ", ".join(_number(alignment, name) for name in THRESHOLDS if getattr(alignment, name) is not None)
    if alignment.formed:
        return f"attention: formed ({numbers})"
    if epoch < deadline:
        return f"attention: not formed yet ({numbers}); it should be by epoch {deadline:g}"
    steps = "; ".join(f"{i}. {step}" for i, step in enumerate(advice(epoch, config), 1))
    return f"attention: not formed by epoch {deadline:g} ({numbers}). Try in new runs, in this order: {steps}"


def _number(alignment: Alignment, name: str) -> str:
    short = f" below {THRESHOLDS[name]:g}" if name in alignment.failing() else ""
    value = getattr(alignment, name)
    shown = math.floor(100 * value) / 100 if short and math.isfinite(value) else value  # 0.799 is not 0.80 below 0.8
    return f"{name} {shown:.2f}{short}"


def advice(epoch: float, config: Config) -> list[str]:
    """Return what to try when the attention has not formed, most promising first, without what is already done."""
    steps = (_guided, _ctc, _short, _teacher_forcing, _masks, _reduction, _batch)
    found = [step(epoch, config) for step in steps]
    return [*filter(None, found), f"longer training: --training.epochs {2 * config.training.epochs}"]


def _guided(epoch: float, config: Config) -> str | None:
    training = config.training
    weight, until = training.guided_weight, training.guided_until
    if training.ctc_weight and not training.guided_frames:
        now = "along the diagonal" if weight else "0"
        longer = f" --training.guided-until {max(2 * epoch, 10):g}" if until < 2 * epoch else ""
        return f"attention led by CTC: --training.guided-frames 8 --training.guided-weight 1{longer} (now {now})"
    enough = 1 if training.guided_frames else 3
    if weight == 0:
        return f"guided attention loss: --training.guided-weight {enough} (now 0)"
    if until < 2 * epoch:
        return f"guided attention loss for longer: --training.guided-until {max(2 * epoch, 10):g} (now {until:g})"
    if weight < enough:
        return f"a stronger guided attention loss: --training.guided-weight {enough} (now {weight:g})"
    return None


def _ctc(epoch: float, config: Config) -> str | None:
    weight, until, layer = config.training.ctc_weight, config.training.ctc_until, config.model.ctc_layer
    if layer < 0:
        inner = max(0, config.model.listener.pyramids - 1)
        return f"CTC on an inner layer: --model.ctc-layer {inner} --training.ctc-weight 0.3 (now none)"
    if weight == 0:
        return "CTC on the listener: --training.ctc-weight 0.3 (now 0)"
    if 0 < until <= epoch:
        return f"CTC for longer: --training.ctc-until 0 (now {until:g})"
    return f"a stronger CTC: --training.ctc-weight 1 (now {weight:g})" if weight < 1 else None


def _short(_epoch: float, config: Config) -> str | None:
    return None if config.data.short_epochs else "short utterances first: --data.short-epochs 10 (now 0)"


def _teacher_forcing(epoch: float, config: Config) -> str | None:
    rate = teacher_forcing_rate(config.training, epoch)
    if rate == 1:
        return None
    return f"teacher forcing back at 1.0 until it has formed: training.teacher_forcing in the YAML (now {rate:.2f})"


def _masks(epoch: float, config: Config) -> str | None:
    augment = config.augment
    if augment.start_epoch > epoch or augment.time_masks + augment.frequency_masks == 0:
        return None
    return f"SpecAugment later: --augment.start-epoch {max(2 * epoch, 10):g} (now {augment.start_epoch:g})"


def _reduction(_epoch: float, config: Config) -> str | None:
    listener = config.model.listener
    reduction = 2**listener.pyramids
    for stride in listener.conv_strides:
        reduction *= stride
    if reduction <= 4 or listener.pyramids == 0:
        return None
    return (
        f"less reduction in time: --model.listener.pyramids {listener.pyramids - 1} "
        f"(now {listener.pyramids}, {reduction} frames become one)"
    )


def _batch(_epoch: float, config: Config) -> str | None:
    size = config.data.utterances_per_batch
    return f"smaller batches: --data.utterances-per-batch {size // 2} (now {size})" if size >= 16 else None
