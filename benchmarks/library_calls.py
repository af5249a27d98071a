"""The calls of PyTorch that do an op's work or most of it: baselines for any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from las_fast.text import EOS

SDPA, TOPK, INDEX_SELECT = "torch sdpa", "plain torch.topk", "plain index_select"  # names of paths


def sdpa(query: Tensor, keys: Tensor, values: Tensor, valid: Tensor) -> Tensor:
    """Return the context (B, K, E) of masked_attention by scaled_dot_product_attention, which returns no weights.

    valid: (B, T) bool, the frames to attend to. Fused kernels need the dimension of heads.
    """
    heads = (x[:, None] for x in (query, keys, values))
    return F.scaled_dot_product_attention(*heads, attn_mask=valid[:, None, None])[:, 0]


def topk(logits: Tensor, scores: Tensor, finished: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, tokens and parents of beam_topk by log-softmax, mask and torch.topk.

    Without rules for the end of a sentence and for equal scores.
    """
    frozen = logits.new_full((logits.shape[2],), -torch.inf)
    frozen[EOS] = 0.0
    log_probs = torch.where(finished[..., None], frozen, logits.log_softmax(-1))
    best = (scores[..., None] + log_probs).flatten(1).topk(scores.shape[1])
    return best.values, best.indices % logits.shape[2], best.indices // logits.shape[2]


def index_select(states: Sequence[Tensor], parents: Tensor) -> list[Tensor]:
    """Return the states of beam_gather by flattening the beams and calling index_select, as a plain search does."""
    B, K = parents.shape
    rows = (torch.arange(B, device=parents.device)[:, None] * K + parents).flatten()
    return [x.flatten(0, 1).index_select(0, rows).view_as(x) for x in states]
