"""Training losses; all are sums over real tokens, never over padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from las_fast.listener import valid_frames
from las_fast.model import Output
from las_fast.text import EOS, PAD


def token_loss(logits: Tensor, tokens: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum of cross-entropies of tokens (B, U) under logits (B, U, V); <pad> rows count nothing.

    Label smoothing spreads over the tokens that can be spelled: <eos> and the characters.
    """
    spelled = logits[..., EOS:].flatten(0, 1).float()
    targets = torch.where(tokens == PAD, -100, tokens - EOS).flatten()
    return F.cross_entropy(spelled, targets, label_smoothing=label_smoothing, reduction="sum")


def ctc_loss(logits: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
    """Sum over utterances of the CTC loss of the characters (tokens without <eos>); the blank is <pad>.

    An utterance with fewer frames than its characters need has no CTC path and counts 0.
    """
    log_probabilities = F.log_softmax(logits.float(), -1).transpose(0, 1)  # (T, B, V)
    targets = tokens.masked_fill(tokens == EOS, PAD)
    return F.ctc_loss(
        log_probabilities, targets, lengths, token_lengths - 1, blank=PAD, reduction="sum", zero_infinity=True
    )


def guided_attention_loss(weights: Tensor, lengths: Tensor, token_lengths: Tensor, width: float) -> Tensor:
    """Sum over tokens of the attention that lies off a soft diagonal (Tachibana et al. 2018).

    loss = sum_u sum_t weights[u, t] * (1 - exp(-(u / U - t / T)^2 / (2 width^2)))

    Args:
        weights: (B, U, T) attention weights.
        lengths: (B,) encoder frames.
        token_lengths: (B,) tokens, <eos> included.
        width: standard deviation of the diagonal, as a share of the utterance.
    """
    u = torch.arange(weights.shape[1], device=weights.device) / token_lengths[:, None]  # (B, U)
    t = torch.arange(weights.shape[2], device=weights.device) / lengths[:, None]  # (B, T)
    off = 1 - torch.exp(-((u[:, :, None] - t[:, None, :]) ** 2) / (2 * width**2))
    return (weights * off * valid_frames(token_lengths, weights.shape[1])[:, :, None]).sum()


def training_loss(output: Output, tokens: Tensor, token_lengths: Tensor, *, label_smoothing: float,
                  ctc_weight: float, guided_weight: float, guided_width: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss per token and its parts, each per token and detached."""
    count = token_lengths.sum()
    parts = {"attention": token_loss(output.logits, tokens, label_smoothing) / count}
    loss = parts["attention"]
    if ctc_weight:
        parts["ctc"] = ctc_loss(output.ctc_logits, output.ctc_lengths, tokens, token_lengths) / count
        loss = loss + ctc_weight * parts["ctc"]
    if guided_weight:
        parts["guided"] = guided_attention_loss(output.weights, output.lengths, token_lengths, guided_width) / count
        loss = loss + guided_weight * parts["guided"]
    return loss, {name: value.detach() for name, value in parts.items()}
