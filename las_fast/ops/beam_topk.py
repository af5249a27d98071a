"""One step of beam search: the K best continuations of each utterance's K hypotheses.

    candidate[k, v] = scores[k] + log_softmax(logits[k])[v]
    a finished beam has one candidate: eos at an unchanged score
    ranked by candidate / tokens ** length_penalty, equal ranks by the lower flat index k * V + v
"""

from __future__ import annotations

import torch
from torch import Tensor

from las_fast.ops import backends


def beam_topk(
    logits: Tensor,
    scores: Tensor,
    finished: Tensor,
    *,
    eos: int,
    lengths: Tensor,
    allow_eos: Tensor | None = None,
    force_eos: Tensor | None = None,
    length_penalty: float = 0.0,
    eos_threshold: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the K best continuations of each utterance, best first.

    Args:
        logits:    (B, K, V) of any float type; float32 inside. A row of -inf has no continuation.
        scores:    (B, K) float32 sums of log-probabilities; -inf marks a beam that does not exist.
        finished:  (B, K) bool, beams that have ended with eos.
        eos:       token id.
        lengths:   (B, K) int64 tokens of each beam so far, its eos counted.
        allow_eos: (B,) bool, False where eos would come too early; None allows it everywhere.
        force_eos: (B,) bool, True where every unfinished beam must take eos (wins over allow_eos and the threshold).
        length_penalty: candidates are ranked by score / tokens ** length_penalty; 0 ranks by score.
        eos_threshold:  eos only where its log-probability exceeds this times the best other one; 0 sets no limit.
        backend:   "auto", "reference", "triton" or "cpp".

    Returns:
        scores (B, K) float32, tokens (B, K) int64 and parents (B, K) int64: the beam that each one continues.
        Where fewer than K candidates exist, the rest have score -inf.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the named backend is not available here.
    """
    _check(logits, scores, finished, lengths, allow_eos, force_eos, eos)
    backends.choose("beam_topk", backend, logits.device)
    steps = _log_probabilities(logits, eos, allow_eos, force_eos, eos_threshold)
    return _reference(steps, scores, finished, eos, lengths, length_penalty)


def _log_probabilities(
    logits: Tensor, eos: int, allow_eos: Tensor | None, force_eos: Tensor | None, eos_threshold: float
) -> Tensor:
    """Return log-softmax (B, K, V) float32 with -inf where a token may not follow."""
    logits = logits.float()
    empty = logits.amax(-1, keepdim=True) == -torch.inf  # log_softmax of such a row would be NaN
    steps = logits.log_softmax(-1).masked_fill(empty, -torch.inf)
    is_eos = torch.arange(logits.shape[2], device=logits.device) == eos
    denied = torch.zeros_like(steps[..., 0], dtype=torch.bool)  # (B, K)
    if eos_threshold != 0.0:
        denied = steps[..., eos] <= eos_threshold * steps.masked_fill(is_eos, -torch.inf).amax(-1)
    if allow_eos is not None:
        denied = denied | ~allow_eos[:, None]
    if force_eos is not None:
        denied = denied & ~force_eos[:, None]
        steps = steps.masked_fill(force_eos[:, None, None] & ~is_eos, -torch.inf)
    return steps.masked_fill(denied[..., None] & is_eos, -torch.inf)


def _reference(
    steps: Tensor, scores: Tensor, finished: Tensor, eos: int, lengths: Tensor, length_penalty: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, K, V = steps.shape
    frozen = torch.full((V,), -torch.inf, device=steps.device)
    frozen[eos] = 0.0
    steps = torch.where(finished[..., None], frozen, steps)
    candidates = scores[..., None] + steps  # (B, K, V)
    token_counts = (lengths + ~finished).clamp(min=1).float()
    ranks = candidates / (token_counts**length_penalty)[..., None]
    best = ranks.view(B, K * V).sort(stable=True, dim=-1, descending=True).indices[:, :K]
    return candidates.view(B, K * V).gather(1, best), best % V, best // V


def _check(
    logits: Tensor,
    scores: Tensor,
    finished: Tensor,
    lengths: Tensor,
    allow_eos: Tensor | None,
    force_eos: Tensor | None,
    eos: int,
) -> None:
    if logits.ndim != 3 or not logits.is_floating_point():
        raise ValueError(f"logits must be (B, K, V) of a float type; got {tuple(logits.shape)} {logits.dtype}")
    B, K, V = logits.shape
    expected = [("scores", scores, (B, K), torch.float32), ("finished", finished, (B, K), torch.bool)]
    expected += [("lengths", lengths, (B, K), torch.int64)]
    expected += [("allow_eos", allow_eos, (B,), torch.bool), ("force_eos", force_eos, (B,), torch.bool)]
    for name, tensor, shape, dtype in expected:
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {shape} {dtype} like logits; got {tuple(tensor.shape)} {tensor.dtype}")
        if tensor.device != logits.device:
            raise ValueError(f"{name} must be on {logits.device} like logits; got {tensor.device}")
    if not 0 <= eos < V:
        raise ValueError(f"eos must be a token from 0 to {V - 1}; got {eos}")
