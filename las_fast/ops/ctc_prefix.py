"""One step of CTC prefix scoring: the CTC log-probability of every continuation of each hypothesis.

Algorithm 2 of Watanabe et al. 2017, "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition", with one
forward variable per frame. For a hypothesis g, a token v and the probability p_t(v) of v in frame t:

    a_t(g)   = P(frames 1 to t collapse to g)                repeats merged, blanks dropped; a_0(g) = 1 if g is empty
    b_t(g)   = a_(t-1)(g) * p_t(blank)                       the part of a_t in which frame t is blank
    f_t(g,v) = b_t(g) if g ends with v, else a_t(g)          the part after which a frame of v starts a new token
    n_t(g.v) = (n_(t-1)(g.v) + f_(t-1)(g,v)) * p_t(v)        the part of a_t(g.v) in which frame t is v; n_0 = 0
    a_t(g.v) = n_t(g.v) + b_t(g.v)
    psi(g.v) = sum over t of f_(t-1)(g,v) * p_t(v)           P(the transcript starts with g.v)
    psi(g.<eos>) = a_T(g)                                    P(the transcript is g)

The log-probability of the next token, next_log_probs, is log psi(g.v) - log psi(g), and -inf for the blank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from las_fast.ops import backends
from las_fast.ops.masks import padding_mask
from las_fast.text import BLANK


class CtcState(NamedTuple):
    """CTC scores of K hypotheses per utterance: natural logarithms, dtype of the log-probabilities."""

    forward_log_probs: Tensor  # (B, K, T + 1), a_t
    prefix_log_probs: Tensor  # (B, K), psi
    next_log_probs: Tensor  # (B, K, V), log psi(g.v) - log psi(g)


def ctc_log_probabilities(logits: Tensor, lengths: Tensor, forbidden: Sequence[int] = ()) -> Tensor:
    """Return the log-softmax of logits (B, T, V) of any float type, as float32 input for ctc_start and ctc_prefix.

    Frames past the lengths (B,) are blank with probability 1, which changes no hypothesis. Tokens in `forbidden` get
    -inf before the softmax. In a frame with NaN or +inf, or with only -inf, every token gets
    -inf, and so does every hypothesis.
    """
    # Comparisons, not a tensor of token ids: a search on CUDA would wait for its copy from the host.
    logits, tokens = logits.float(), torch.arange(logits.shape[2], device=logits.device)
    for token in forbidden:
        logits = logits.masked_fill(tokens == token, -torch.inf)
    undefined = ~logits.logsumexp(-1, keepdim=True).isfinite()  # log_softmax would be NaN
    log_probs = logits.log_softmax(-1).masked_fill(undefined, -torch.inf)
    padding = padding_mask(lengths, logits.shape[1])[..., None]
    blank_only = torch.full_like(tokens, -torch.inf, dtype=torch.float32).masked_fill(tokens == BLANK, 0.0)
    return torch.where(padding, blank_only, log_probs)


def ctc_start(ctc_log_probs: Tensor, beam: int, *, eos: int) -> CtcState:
    """Return the state of `beam` empty hypotheses per utterance; the other arguments are those of ctc_prefix."""
    forward_log_probs = torch.nn.functional.pad(ctc_log_probs[..., BLANK].cumsum(-1), (1, 0))[:, None]
    prefix_log_probs = torch.zeros_like(forward_log_probs[..., 0])
    next_log_probs = _next_log_probs(ctc_log_probs, forward_log_probs, prefix_log_probs, None, eos)
    state = (forward_log_probs, prefix_log_probs, next_log_probs)
    return CtcState(*(x.repeat_interleave(beam, 1) for x in state))


def ctc_prefix(
    ctc_log_probs: Tensor,
    state: CtcState,
    tokens: Tensor,
    parents: Tensor,
    chosen: Tensor,
    *,
    eos: int,
    backend: str = "auto",
) -> CtcState:
    """Return the state of the hypotheses after each has been extended by one token. Not differentiable.

    In C++ the result of an utterance is bit-identical in any batch.

    Args:
        ctc_log_probs: (B, T, V) float32 from ctc_log_probabilities; not NaN.
        state:   of the hypotheses before this step.
        tokens:  (B, K) int64, the last token of each hypothesis before this step; for an empty one any token that is
                 never chosen.
        parents: (B, K) int64 from 0 to K-1, the hypothesis that each new one extends.
        chosen:  (B, K) int64, the token that it is extended by. The state of a hypothesis that chose eos or the blank,
                 or had ended before, is meaningless but holds no NaN.
        eos:     token id.
        backend: "auto", "reference", "triton" or "cpp".

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the named backend is not available here; on the CPU, a parent or token is out of range. Triton
            clamps it: a kernel cannot raise.
    """
    _check(ctc_log_probs, state, tokens, parents, chosen, eos)
    path = backends.choose("ctc_prefix", backend, ctc_log_probs.device, ctc_log_probs.dtype)
    op: Any = _reference if path == "reference" else getattr(torch.ops.las_fast, f"ctc_prefix_{path}")
    return CtcState(*op(backends.detached(ctc_log_probs), *map(backends.detached, state), tokens, parents, chosen, eos))


def _reference(
    ctc_log_probs, forward_log_probs, prefix_log_probs, next_log_probs, tokens, parents, chosen, eos
) -> tuple[Tensor, ...]:
    B, K, V = next_log_probs.shape
    before = forward_log_probs.gather(1, parents[..., None].expand(-1, -1, forward_log_probs.shape[2]))
    repeats = (chosen == tokens.gather(1, parents))[..., None]
    begun = torch.where(repeats, _after_blank(ctc_log_probs, before), before)  # f
    label, blank = _log_probs_of(ctc_log_probs, chosen), ctc_log_probs[:, None, :, BLANK]
    newest = alpha = torch.full_like(prefix_log_probs, -torch.inf)  # n and a
    after = [alpha]
    for t in range(ctc_log_probs.shape[1]):
        newest = torch.logaddexp(newest, begun[..., t]) + label[..., t]
        alpha = torch.logaddexp(newest, alpha + blank[..., t])
        after.append(alpha)
    forward_log_probs = torch.stack(after, -1)
    prefix_log_probs = (prefix_log_probs[..., None] + next_log_probs).flatten(1).gather(1, parents * V + chosen)
    next_log_probs = _next_log_probs(ctc_log_probs, forward_log_probs, prefix_log_probs, chosen, eos)
    return forward_log_probs, prefix_log_probs, next_log_probs


def _log_probs_of(ctc_log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probabilities (B, K, T) of one token (B, K) per hypothesis."""
    return ctc_log_probs.transpose(1, 2).gather(1, tokens[..., None].expand(-1, -1, ctc_log_probs.shape[1]))


def _after_blank(ctc_log_probs: Tensor, forward_log_probs: Tensor) -> Tensor:
    """Return b_t, (B, K, T + 1)."""
    ended = forward_log_probs[..., :-1] + ctc_log_probs[:, None, :, BLANK]
    return torch.nn.functional.pad(ended, (1, 0), value=-torch.inf)


def _next_log_probs(
    ctc_log_probs: Tensor, forward_log_probs: Tensor, prefix_log_probs: Tensor, last: Tensor | None, eos: int
) -> Tensor:
    psi = (forward_log_probs[..., :-1, None] + ctc_log_probs[:, None]).logsumexp(2)
    if last is not None:
        after_blank = _after_blank(ctc_log_probs, forward_log_probs)[..., :-1]
        repeated = (after_blank + _log_probs_of(ctc_log_probs, last)).logsumexp(-1)
        psi = psi.scatter(2, last[..., None], repeated[..., None])
    psi[..., BLANK] = -torch.inf
    psi[..., eos] = forward_log_probs[..., -1]
    return (psi - prefix_log_probs[..., None]).masked_fill(prefix_log_probs.isneginf()[..., None], -torch.inf)


def _check(ctc_log_probs: Tensor, state: CtcState, tokens: Tensor, parents: Tensor, chosen: Tensor, eos: int) -> None:
    if ctc_log_probs.ndim != 3 or not ctc_log_probs.is_floating_point():
        shape = tuple(ctc_log_probs.shape)
        raise ValueError(f"ctc_log_probs must be (B, T, V) of a float type; got {shape} {ctc_log_probs.dtype}")
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be (B, K) int64; got {tuple(tokens.shape)} {tokens.dtype}")
    (B, T, V), K = ctc_log_probs.shape, tokens.shape[1]
    expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]]
    expected = [(name, x, (B, K), torch.int64) for name, x in
                (("tokens", tokens), ("parents", parents), ("chosen", chosen))]  # fmt: skip
    shapes = ((B, K, T + 1), (B, K), (B, K, V))
    expected += [(f"state.{name}", x, shape, ctc_log_probs.dtype)
                 for name, x, shape in zip(state._fields, state, shapes, strict=True)]  # fmt: skip
    for name, x, shape, dtype in expected:
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(f"{name} must be {shape} {dtype} like ctc_log_probs; got {tuple(x.shape)} {x.dtype}")
        if x.device != ctc_log_probs.device:
            raise ValueError(f"{name} must be on {ctc_log_probs.device} like ctc_log_probs; got {x.device}")
    if not 0 <= eos < V:
        raise ValueError(f"eos must be a token from 0 to {V - 1}; got {eos}")


def _fake(ctc_log_probs, forward_log_probs, prefix_log_probs, next_log_probs, tokens, parents, chosen, eos):
    return tuple(x.new_empty(x.shape) for x in (forward_log_probs, prefix_log_probs, next_log_probs))


backends.register(
    "ctc_prefix",
    "(Tensor ctc_log_probs, Tensor forward_log_probs, Tensor prefix_log_probs, Tensor next_log_probs, Tensor tokens,"
    " Tensor parents, Tensor chosen, int eos)"
    " -> (Tensor forward_log_probs, Tensor prefix_log_probs, Tensor next_log_probs)",
    _fake,
)
