"""Attention monitor: whether the attention has aligned characters with frames, and advice if it has not.

No single number proves an alignment: sharp attention may stay on one frame, jump to the end, or wander. Therefore the
monitor averages four numbers over utterances and requires a minimum of each. The guided attention loss alone can raise
all four while the speller follows only the prior and ignores the audio. The fifth number, audio_gain, detects that.

    diagonal    correlation between a token's index and its attended frame (weighted mean); 1 is a diagonal
    sharp       attention within 2 frames of the peak, corrected for chance: 0 is uniform, 1 is all of it. Entropy would
                penalise a letter spread over two frames, and would depend on the length of the utterance.
    monotonic   share of steps between peaks that go back at most 2 frames and forward at most a quarter of the
                utterance, or twice the average frames per token if that is more
    coverage    share of the utterance's frames within reach of some token's peak
    audio_gain  rise in cross-entropy (nats per token) when the audio is swapped for another utterance's; near 0, the
                speller is only a language model
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from las_fast.config import Config
from las_fast.training.schedules import teacher_forcing_rate

SHAPE_THRESHOLDS = {"diagonal": 0.8, "sharp": 0.5, "monotonic": 0.75, "coverage": 0.55}
THRESHOLDS = SHAPE_THRESHOLDS | {"audio_gain": 0.5}
PEAK_RADIUS = 2  # frames on either side of the peak that count as the peak
MIN_TOKENS = 3  # shorter utterances have no order to measure
MIN_FRAMES = 8  # in shorter utterances every frame is near the peak


@dataclass(frozen=True)
class Alignment:
    """The numbers of the monitor, averaged over utterances; the docstring of the module explains each."""

    diagonal: float
    sharp: float
    monotonic: float
    coverage: float
    formed: bool = field(init=False)  # every number that was measured reaches its threshold
    utterances: int  # that were long enough to be measured
    audio_gain: float | None = None  # None: not measured

    def __post_init__(self):
        object.__setattr__(self, "formed", self.utterances > 0 and not self.failing())

    def failing(self) -> list[str]:
        """Return the names of the numbers below their thresholds; NaN counts as below."""
        known = {name: value for name in THRESHOLDS if (value := getattr(self, name)) is not None}
        return [name for name, value in known.items() if not value >= THRESHOLDS[name]]


@torch.no_grad()
def measure(weights: torch.Tensor, token_lengths: torch.Tensor, lengths: torch.Tensor) -> Alignment:
    """Measure teacher-forced attention.

    Args:
        weights:       (B, U, T) float32; values past the lengths are ignored.
        token_lengths: (B,) int64 tokens, <eos> included. <eos> itself is not measured: it may attend anywhere.
        lengths:       (B,) int64 valid encoder frames.

    Returns:
        Averages over the utterances of at least 3 characters and 8 frames, without audio_gain; zeros if there is none.
    """
    device = weights.device
    token_lengths, lengths = token_lengths.to(device) - 1, lengths.to(device)
    measured = (token_lengths >= MIN_TOKENS) & (lengths >= MIN_FRAMES)
    count = int(measured.sum())
    if count == 0:
        return Alignment(0.0, 0.0, 0.0, 0.0, 0)
    weights, token_lengths, lengths = weights[measured].float(), token_lengths[measured], lengths[measured]
    token_mask = torch.arange(weights.shape[1], device=device) < token_lengths[:, None]  # (B, U)
    frame_mask = torch.arange(weights.shape[2], device=device) < lengths[:, None]  # (B, T)
    weights = weights.masked_fill(~(token_mask[:, :, None] & frame_mask[:, None, :]), 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
    peaks = weights.argmax(-1)  # (B, U)
    parts = (
        _diagonal(weights, token_mask),
        _sharp(weights, peaks, token_mask, frame_mask),
        _monotonic(peaks, token_mask, lengths),
        _coverage(peaks, token_mask, frame_mask),
    )
    diagonal, sharp, monotonic, coverage = (float(part.mean()) for part in parts)
    return Alignment(diagonal, sharp, monotonic, coverage, count)


def combine(alignments: list[Alignment]) -> Alignment:
    """Return the average over the utterances of all alignments, without audio_gain."""
    total = sum(alignment.utterances for alignment in alignments)
    if total == 0:
        return Alignment(0.0, 0.0, 0.0, 0.0, 0)
    means = {name: sum(getattr(a, name) * a.utterances for a in alignments) / total for name in SHAPE_THRESHOLDS}
    return Alignment(**means, utterances=total)


def _diagonal(weights: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
    counts = token_mask.sum(-1, keepdim=True)
    attended = weights @ torch.arange(weights.shape[2], device=weights.device, dtype=weights.dtype)  # (B, U)
    index = torch.arange(weights.shape[1], device=weights.device, dtype=weights.dtype).expand_as(attended)

    def centred(x: torch.Tensor) -> torch.Tensor:
        return (x - (x * token_mask).sum(-1, keepdim=True) / counts) * token_mask

    attended, index = centred(attended), centred(index)
    # floor: a movement below a tenth of a frame is rounding, which has no direction
    spread = attended.square().sum(-1).clamp_min(0.01 * counts[:, 0])
    return (attended * index).sum(-1) / (spread * index.square().sum(-1)).sqrt()


def _sharp(
    weights: torch.Tensor, peaks: torch.Tensor, token_mask: torch.Tensor, frame_mask: torch.Tensor
) -> torch.Tensor:
    position = torch.arange(weights.shape[2], device=weights.device)
    near = ((position - peaks[:, :, None]).abs() <= PEAK_RADIUS) & frame_mask[:, None]  # (B, U, T)
    mass = (weights * near).sum(-1)
    chance = near.sum(-1) / frame_mask.sum(-1, keepdim=True)
    return ((mass - chance) / (1 - chance) * token_mask).sum(-1) / token_mask.sum(-1)


def _monotonic(peaks: torch.Tensor, token_mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    moves = peaks[:, 1:] - peaks[:, :-1]
    max_step = torch.maximum(lengths / 4, 2 * lengths / token_mask.sum(-1)).clamp_min(2 * PEAK_RADIUS + 1)
    in_order = (moves >= -PEAK_RADIUS) & (moves <= max_step[:, None]) & token_mask[:, 1:]
    return in_order.sum(-1) / (token_mask.sum(-1) - 1)


def _coverage(peaks: torch.Tensor, token_mask: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
    position = torch.arange(frame_mask.shape[1], device=frame_mask.device)
    spacing = frame_mask.sum(-1) / token_mask.sum(-1)
    reach = (0.75 * spacing).clamp_min(PEAK_RADIUS)  # frames; wider where few characters span many frames
    distance = (position - peaks[:, :, None]).abs()  # (B, U, T)
    covered = ((distance <= reach[:, None, None]) & token_mask[:, :, None]).any(1) & frame_mask
    return covered.sum(-1) / frame_mask.sum(-1)


def status_line(alignment: Alignment, epoch: float, config: Config, fault: str = "") -> str:
    """Describe the alignment in one line; if it has not formed by training.monitor_epoch, add advice.

    Args:
        alignment: of the dev set.
        epoch:     epochs trained so far.
        config:    settings of the run; advice that they already follow is left out.
        fault:     of the greedy texts, see las_fast.output.faults; "" if there is none.
    """
    deadline = config.training.monitor_epoch
    if alignment.utterances == 0:
        return "attention: not measured, since no dev utterance has 3 characters and 8 encoder frames"
    numbers = ", ".join(_number(alignment, name) for name in THRESHOLDS if getattr(alignment, name) is not None)
    if alignment.formed:
        return f"attention: formed ({numbers}){_advise_on_texts(fault, config)}"
    if epoch < deadline:
        usual = "; until then such texts are usual" if fault else ""
        return f"attention: not formed yet ({numbers}); expected by epoch {deadline:g}{usual}"
    steps = "; ".join(f"{i}. {step}" for i, step in enumerate(advice(epoch, config), 1))
    return f"attention: not formed by epoch {deadline:g} ({numbers}). Try in new runs, in this order: {steps}"


def _advise_on_texts(fault: str, config: Config) -> str:
    """Return advice, as a clause, for a fault of the greedy texts although attention has formed; "" without a fault."""
    if not fault:
        return ""
    search = " with --decoding.ctc-weight 0.3, which ends loops" if config.model.ctc_layer >= 0 else ""
    return f", but {fault}: train longer; if it stays so, decode{search or ' with a wider --beam'}"


def _number(alignment: Alignment, name: str) -> str:
    below = f" below {THRESHOLDS[name]:g}" if name in alignment.failing() else ""
    value = getattr(alignment, name)
    rounded = math.floor(100 * value) / 100 if below and math.isfinite(value) else value  # never "0.80 below 0.8"
    return f"{name.replace('_', ' ')} {rounded:.2f}{below}"


def advice(epoch: float, config: Config) -> list[str]:
    """Return changes to try if attention has not formed, the most promising first, without those that the run has."""
    rules = (
        _advise_guided_loss, _advise_ctc, _advise_short_utterances, _advise_teacher_forcing, _advise_later_masks,
        _advise_less_reduction, _advise_smaller_batches,
    )  # fmt: skip
    advised = [rule(epoch, config) for rule in rules]
    return [*filter(None, advised), f"longer training: --training.epochs {2 * config.training.epochs}"]


def _advise_guided_loss(epoch: float, config: Config) -> str | None:
    training = config.training
    weight, until = training.guided_weight, training.guided_until
    if training.ctc_weight and not training.guided_frames:
        now = "along the diagonal" if weight else "0"
        longer = f" --training.guided-until {max(2 * epoch, 10):g}" if until < 2 * epoch else ""
        return f"attention guided by CTC: --training.guided-frames 8 --training.guided-weight 1{longer} (now {now})"
    strong = 1 if training.guided_frames else 3
    if weight == 0:
        return f"guided attention loss: --training.guided-weight {strong} (now 0)"
    if until < 2 * epoch:
        return f"guided attention loss for longer: --training.guided-until {max(2 * epoch, 10):g} (now {until:g})"
    if weight < strong:
        return f"a stronger guided attention loss: --training.guided-weight {strong} (now {weight:g})"
    return None


def _advise_ctc(epoch: float, config: Config) -> str | None:
    weight, until, layer = config.training.ctc_weight, config.training.ctc_until, config.model.ctc_layer
    if layer < 0:
        inner = max(0, config.model.listener.pyramids - 1)
        return f"CTC on an inner layer: --model.ctc-layer {inner} --training.ctc-weight 0.3 (now none)"
    if weight == 0:
        return "CTC on the listener: --training.ctc-weight 0.3 (now 0)"
    if 0 < until <= epoch:
        return f"CTC for longer: --training.ctc-until 0 (now {until:g})"
    return f"a stronger CTC: --training.ctc-weight 1 (now {weight:g})" if weight < 1 else None


def _advise_short_utterances(_epoch: float, config: Config) -> str | None:
    return None if config.data.short_epochs else "short utterances first: --data.short-epochs 10 (now 0)"


def _advise_teacher_forcing(epoch: float, config: Config) -> str | None:
    rate = teacher_forcing_rate(config.training, epoch)
    if rate == 1:
        return None
    return (
        f"teacher forcing at 1.0 until the attention has formed: training.teacher_forcing in the YAML (now {rate:.2f})"
    )


def _advise_later_masks(epoch: float, config: Config) -> str | None:
    augment = config.augment
    if augment.start_epoch > epoch or augment.time_masks + augment.frequency_masks == 0:
        return None
    return f"SpecAugment later: --augment.start-epoch {max(2 * epoch, 10):g} (now {augment.start_epoch:g})"


def _advise_less_reduction(_epoch: float, config: Config) -> str | None:
    listener = config.model.listener
    reduction = listener.time_reduction
    if reduction <= 4 or listener.pyramids == 0:
        return None
    return (
        f"less time reduction: --model.listener.pyramids {listener.pyramids - 1} "
        f"(now {listener.pyramids}, {reduction} feature frames per encoder frame)"
    )


def _advise_smaller_batches(_epoch: float, config: Config) -> str | None:
    size = config.data.utterances_per_batch
    return f"smaller batches: --data.utterances-per-batch {size // 2} (now {size})" if size >= 16 else None
