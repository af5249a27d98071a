"""Training losses over the tokens of a batch without padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from las_fast import ops
from las_fast.model.las import Output
from las_fast.ops import padding_mask
from las_fast.text import EOS, PAD


def token_loss(logits: Tensor, tokens: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of tokens (B, U) under logits (B, U, V), summed over all tokens except <pad>.

    Label smoothing spreads probability only over tokens that the speller may emit: <eos> and the characters.
    """
    emitted = logits[..., EOS:].flatten(0, 1).float()  # (B * U, V - EOS)
    targets = torch.where(tokens == PAD, -100, tokens - EOS).flatten()
    return F.cross_entropy(emitted, targets, label_smoothing=label_smoothing, reduction="sum")


def ctc_loss(logits: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
    """Return the CTC loss of the characters (tokens without <eos>), summed over utterances; the blank is <pad>.

    An utterance with too few frames for its characters has no CTC path and adds 0.

    Args:
        logits:        (B, T', V) of the CTC head.
        lengths:       (B,) int64 CTC frames.
        tokens:        (B, U) int64.
        token_lengths: (B,) int64, <eos> included.
    """
    return ops.ctc_loss(logits, lengths, tokens, token_lengths - 1).sum()


def guided_attention_loss(weights: Tensor, lengths: Tensor, token_lengths: Tensor, width: float) -> Tensor:
    """Penalise attention off a soft diagonal (Tachibana et al. 2018), summed over tokens.

    loss = sum_u sum_t weights[u, t] * (1 - exp(-(u / U - t / T)^2 / (2 width^2)))

    Args:
        weights:       (B, U, T) attention weights.
        lengths:       (B,) int64 encoder frames.
        token_lengths: (B,) int64 tokens, <eos> included.
        width:         standard deviation of the diagonal, as a fraction of the utterance.
    """
    distance = _distance(_diagonal_times(token_lengths, weights.shape[1]), lengths, weights.shape[2])
    prior = torch.exp(-(distance**2) / (2 * width**2))
    padding = padding_mask(token_lengths, weights.shape[1])[:, :, None]
    return (weights * (1 - prior)).masked_fill(padding, 0.0).sum()


def aligned_attention_loss(weights: Tensor, lengths: Tensor, token_lengths: Tensor, token_times: Tensor,
                           window: float) -> Tensor:  # fmt: skip
    """Return the negative log of the attention near each token's expected time, summed over tokens.

    loss = -sum_u log sum_t weights[u, t] * max(0, 1 - ((token_times[u] T - t) / window)^2)

    This is supervised attention (Mi et al. 2016). Unlike guided_attention_loss, it has a gradient where attention is
    sharp but wrong. For that the window needs a hard edge: a tail that reached the wrong peak would make the gradient
    vanish.

    Args:
        weights:       as for guided_attention_loss.
        lengths:       as for guided_attention_loss.
        token_lengths: as for guided_attention_loss.
        token_times:   (B, U) expected time of each token, as a fraction of the utterance.
        window:        half its width, in encoder frames.
    """
    distance = _distance(token_times, lengths, weights.shape[2]) * (lengths / window)[:, None, None]
    prior = (1 - distance**2).clamp_min(0)
    mass = (weights * prior).sum(2).clamp_min(1e-20)  # (B, U)
    return -mass.log().masked_fill(padding_mask(token_lengths, weights.shape[1]), 0.0).sum()


def _distance(token_times: Tensor, lengths: Tensor, frames: int) -> Tensor:
    """Return token time minus frame time, (B, U, T), as a fraction of the utterance."""
    frame_times = torch.arange(frames, device=token_times.device) / lengths[:, None]  # (B, T)
    return token_times[:, :, None] - frame_times[:, None, :]


def _diagonal_times(token_lengths: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=token_lengths.device) / token_lengths[:, None]


def relative_token_times(logits: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
    """Return CTC's time of each token, (B, U), as a fraction of the utterance, without a gradient.

    The time of a character is the mean frame of its posterior given the transcript (ops.ctc_token_times); Inaguma and
    Kawahara 2021 guide attention by CTC in this way. The time of <eos> is 1. An utterance with more characters than
    frames gets the times of a diagonal. The arguments are those of ctc_loss.
    """
    times = ops.ctc_token_times(logits, lengths, tokens, token_lengths - 1) / lengths.clamp_min(1)[:, None]
    times = times.masked_fill(torch.arange(tokens.shape[1], device=tokens.device) == token_lengths[:, None] - 1, 1.0)
    enough_frames = (lengths >= token_lengths - 1)[:, None]
    return torch.where(enough_frames, times, _diagonal_times(token_lengths, tokens.shape[1]))


def training_loss(output: Output, tokens: Tensor, token_lengths: Tensor, *, label_smoothing: float,
                  ctc_weight: float, guided_weight: float, guided_width: float, guided_frames: float = 0.0,
                  ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Return the loss per token, and its unweighted parts by name, each per token and detached.

    Args:
        output:          of the model, teacher-forced on tokens.
        tokens:          (B, U) int64, <pad> past token_lengths.
        token_lengths:   (B,) int64, <eos> included.
        label_smoothing: as for token_loss.
        ctc_weight:      factor of the loss of each CTC head; 0 leaves them out. With a second, inner head this is
                         intermediate CTC (Lee and Watanabe 2021).
        guided_weight:   factor of the guided or aligned attention loss; 0 leaves it out.
        guided_width:    width of guided_attention_loss.
        guided_frames:   window of aligned_attention_loss around the token times of CTC, or of the inner CTC head if
                         there is one, which aligns sooner; 0 chooses guided_attention_loss.
    """
    count = token_lengths.sum()
    parts = {"attention": token_loss(output.logits, tokens, label_smoothing) / count}
    loss = parts["attention"]
    if ctc_weight:
        parts["ctc"] = ctc_loss(*output.ctc, tokens, token_lengths) / count
        loss = loss + ctc_weight * parts["ctc"]
        if output.inner_ctc is not None:
            parts["inner_ctc"] = ctc_loss(*output.inner_ctc, tokens, token_lengths) / count
            loss = loss + ctc_weight * parts["inner_ctc"]
    if guided_weight:
        attention = output.weights, output.lengths, token_lengths
        if guided_frames:
            token_times = relative_token_times(*(output.inner_ctc or output.ctc), tokens, token_lengths)
            guided = aligned_attention_loss(*attention, token_times, guided_frames)
        else:
            guided = guided_attention_loss(*attention, guided_width)
        parts["guided"] = guided / count
        loss = loss + guided_weight * parts["guided"]
    return loss, {name: value.detach() for name, value in parts.items()}
