"""Training losses; all are sums over real tokens, never over padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from las_fast import ops
from las_fast.model.las import Output
from las_fast.model.listener import valid_frames
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
    return ops.ctc_loss(logits, lengths, tokens, token_lengths - 1).sum()


def guided_attention_loss(weights: Tensor, lengths: Tensor, token_lengths: Tensor, width: float) -> Tensor:
    """Sum over tokens of the attention that lies off a soft diagonal (Tachibana et al. 2018).

    loss = sum_u sum_t weights[u, t] * (1 - exp(-(u / U - t / T)^2 / (2 width^2)))

    Args:
        weights: (B, U, T) attention weights.
        lengths: (B,) encoder frames.
        token_lengths: (B,) tokens, <eos> included.
        width: standard deviation of the diagonal, as a share of the utterance.
    """
    off = _distance(_diagonal(token_lengths, weights.shape[1]), lengths, weights.shape[2])
    near = torch.exp(-(off**2) / (2 * width**2))
    return (weights * (1 - near) * valid_frames(token_lengths, weights.shape[1])[:, :, None]).sum()


def aligned_attention_loss(weights: Tensor, lengths: Tensor, token_lengths: Tensor, places: Tensor,
                           frames: float) -> Tensor:  # fmt: skip
    """Sum over tokens of the surprise at how little attention is near where each token is expected.

    loss = -sum_u log sum_t weights[u, t] * max(0, 1 - ((places[u] T - t) / frames)^2)

    A supervised attention (Mi et al. 2016). Unlike that of guided_attention_loss its gradient does not vanish where
    the attention is sharp and wrong; no tail of the window may reach there, or it would again.

    Args:
        weights, lengths, token_lengths: as for guided_attention_loss.
        places: (B, U) where each token is expected, as a share of the utterance.
        frames: half the width of the window, in encoder frames.
    """
    off = _distance(places, lengths, weights.shape[2]) * (lengths / frames)[:, None, None]
    near = (1 - off**2).clamp_min(0)
    found = (weights * near).sum(2).clamp_min(1e-20)
    return -(found.log() * valid_frames(token_lengths, weights.shape[1])).sum()


def _distance(places: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Return (B, U, T) how far each token's place is from each frame, as a share of the utterance."""
    return places[:, :, None] - (torch.arange(count, device=places.device) / lengths[:, None])[:, None, :]


def _diagonal(token_lengths: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=token_lengths.device) / token_lengths[:, None]


def ctc_places(logits: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
    """Return where CTC hears each token, (B, U), as a share of the utterance; no gradient flows through it.

    It is the mean frame of the character's posterior given the transcript (ops.ctc_places); for attention that is to
    follow CTC see Inaguma and Kawahara 2021. <eos> is at the end. Utterances with more characters than frames get the
    diagonal.

    Args: as ctc_loss.
    """
    places = ops.ctc_places(logits, lengths, tokens, token_lengths - 1) / lengths.clamp_min(1)[:, None]
    places = places.masked_fill(torch.arange(tokens.shape[1], device=tokens.device) == token_lengths[:, None] - 1, 1.0)
    possible = (lengths >= token_lengths - 1)[:, None]
    return torch.where(possible, places, _diagonal(token_lengths, tokens.shape[1]))


def training_loss(output: Output, tokens: Tensor, token_lengths: Tensor, *, label_smoothing: float,
                  ctc_weight: float, guided_weight: float, guided_width: float, guided_frames: float = 0.0,
                  ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Return the loss per token and its parts, each per token and detached.

    Attention is guided along the diagonal, guided_width wide (a share of the utterance), or, where guided_frames is
    more than 0, to within that many encoder frames of where CTC hears the token.
    """
    count = token_lengths.sum()
    parts = {"attention": token_loss(output.logits, tokens, label_smoothing) / count}
    loss = parts["attention"]
    if ctc_weight:
        parts["ctc"] = ctc_loss(*output.ctc, tokens, token_lengths) / count
        loss = loss + ctc_weight * parts["ctc"]
    if guided_weight:
        memory = output.weights, output.lengths, token_lengths
        if guided_frames:
            places = ctc_places(*output.ctc, tokens, token_lengths)
            guided = aligned_attention_loss(*memory, places, guided_frames)
        else:
            guided = guided_attention_loss(*memory, guided_width)
        parts["guided"] = guided / count
        loss = loss + guided_weight * parts["guided"]
    return loss, {name: value.detach() for name, value in parts.items()}
