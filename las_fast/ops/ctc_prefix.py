"""One step of CTC prefix scores: what a CTC model says of every continuation of each hypothesis.

Algorithm 2 of Watanabe et al. 2017, "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition", in terms of
one number a frame. All are probabilities, p_t(v) that of token v in frame t:

    a_t(g)   = that the first t frames read exactly g, repetitions merged and blanks dropped;   a_0(g) = 1 if g is empty
    b_t(g)   = a_(t-1)(g) * p_t(blank)                            of which the last frame is a blank
    f_t(g,v) = b_t(g) if g ends with v, else a_t(g)               after which a frame of v begins a new token
    n_t(g.v) = (n_(t-1)(g.v) + f_(t-1)(g,v)) * p_t(v)             those that read g.v and end with v;   n_0 = 0
    a_t(g.v) = n_t(g.v) + b_t(g.v)
    psi(g.v) = sum over t of f_(t-1)(g,v) * p_t(v)                that g.v is what the frames read, or begins it
    psi(g.<eos>) = a_T(g)                                         that they read g and no more

The gains of a hypothesis are log psi(g.v) - log psi(g): log-probabilities of the next token, the blank's -inf.
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
    """What the frames say of K hypotheses an utterance; all natural logarithms, of the type of the frames."""

    alphas: Tensor  # (B, K, T + 1), a_t
    prefixes: Tensor  # (B, K), psi
    gains: Tensor  # (B, K, V)


def ctc_log_probabilities(logits: Tensor, lengths: Tensor, never: Sequence[int] = ()) -> Tensor:
    """Return log-softmax (B, T, V) float32 of logits (B, T, V) of any float type, for ctc_start and ctc_prefix.

    Frames past the lengths (B,) are certain to be blank, which changes no hypothesis. Tokens in `never` get -inf before
    the softmax. A frame that holds NaN or +inf, or only -inf, allows nothing: no hypothesis gets past it.
    """
    logits = logits.float()
    if never:
        logits = logits.index_fill(2, torch.tensor(never, device=logits.device), -torch.inf)
    without = ~logits.logsumexp(-1, keepdim=True).isfinite()
    found = logits.log_softmax(-1).masked_fill(without, -torch.inf)
    padding = padding_mask(lengths, logits.shape[1])[..., None]
    certain = torch.full((logits.shape[2],), -torch.inf, device=logits.device)
    certain[BLANK] = 0.0
    return torch.where(padding, certain, found)


def ctc_start(frames: Tensor, beam: int, *, eos: int) -> CtcState:
    """Return the state of `beam` empty hypotheses an utterance; frames as in ctc_prefix."""
    alphas = torch.nn.functional.pad(frames[..., BLANK].cumsum(-1), (1, 0))[:, None]
    prefixes = torch.zeros_like(alphas[..., 0])
    state = CtcState(alphas, prefixes, _gains(frames, alphas, prefixes, None, eos))
    return CtcState(*(x.repeat_interleave(beam, 1) for x in state))


def ctc_prefix(
    frames: Tensor, state: CtcState, tokens: Tensor, parents: Tensor, chosen: Tensor, *, eos: int, backend: str = "auto"
) -> CtcState:
    """Return the state of hypotheses that continue others by a token. Not differentiable.

    In C++ an utterance has one answer, bit for bit, alone and in any batch.

    Args:
        frames:  (B, T, V) float32 log-probabilities as of ctc_log_probabilities; not NaN.
        state:   of the hypotheses before.
        tokens:  (B, K) int64 last token of each of them; of an empty one a token that is never chosen.
        parents: (B, K) int64 which of them each new one continues, from 0 to K-1.
        chosen:  (B, K) int64 by which token. Of a hypothesis that chose eos or the blank, or that had ended, the state
                 means nothing, but holds no NaN.
        eos:     token id.
        backend: "auto", "reference", "triton" or "cpp".

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the named backend is not available here, or, on the CPU, a parent or token does not exist; Triton
            takes the nearest that does.
    """
    _check(frames, state, tokens, parents, chosen, eos)
    picked = backends.choose("ctc_prefix", backend, frames.device, frames.dtype)
    op: Any = _reference if picked == "reference" else getattr(torch.ops.las_fast, f"ctc_prefix_{picked}")
    return CtcState(*op(backends.detached(frames), *map(backends.detached, state), tokens, parents, chosen, eos))


def _reference(frames, alphas, prefixes, gains, tokens, parents, chosen, eos) -> tuple[Tensor, ...]:
    B, K, V = gains.shape
    before = alphas.gather(1, parents[..., None].expand(-1, -1, alphas.shape[2]))
    repeats = (chosen == tokens.gather(1, parents))[..., None]
    begun = torch.where(repeats, _after_blank(frames, before), before)  # f
    label, blank = _of(frames, chosen), frames[:, None, :, BLANK]
    newest = alpha = torch.full_like(prefixes, -torch.inf)
    after = [alpha]
    for t in range(frames.shape[1]):
        newest = torch.logaddexp(newest, begun[..., t]) + label[..., t]
        alpha = torch.logaddexp(newest, alpha + blank[..., t])
        after.append(alpha)
    alphas = torch.stack(after, -1)
    prefixes = (prefixes[..., None] + gains).flatten(1).gather(1, parents * V + chosen)
    return alphas, prefixes, _gains(frames, alphas, prefixes, chosen, eos)


def _of(frames: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probabilities (B, K, T) of one token (B, K) a hypothesis."""
    return frames.transpose(1, 2).gather(1, tokens[..., None].expand(-1, -1, frames.shape[1]))


def _after_blank(frames: Tensor, alphas: Tensor) -> Tensor:
    """Return b_t, (B, K, T + 1)."""
    ended = alphas[..., :-1] + frames[:, None, :, BLANK]
    return torch.nn.functional.pad(ended, (1, 0), value=-torch.inf)


def _gains(frames: Tensor, alphas: Tensor, prefixes: Tensor, last: Tensor | None, eos: int) -> Tensor:
    found = (alphas[..., :-1, None] + frames[:, None]).logsumexp(2)
    if last is not None:
        again = (_after_blank(frames, alphas)[..., :-1] + _of(frames, last)).logsumexp(-1)
        found = found.scatter(2, last[..., None], again[..., None])
    found[..., BLANK] = -torch.inf
    found[..., eos] = alphas[..., -1]
    return (found - prefixes[..., None]).masked_fill(prefixes.isneginf()[..., None], -torch.inf)


def _check(frames: Tensor, state: CtcState, tokens: Tensor, parents: Tensor, chosen: Tensor, eos: int) -> None:
    if frames.ndim != 3 or not frames.is_floating_point():
        raise ValueError(f"frames must be (B, T, V) of a float type; got {tuple(frames.shape)} {frames.dtype}")
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be (B, K) int64; got {tuple(tokens.shape)} {tokens.dtype}")
    (B, T, V), K = frames.shape, tokens.shape[1]
    expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]]
    expected = [(name, x, (B, K), torch.int64) for name, x in
                (("tokens", tokens), ("parents", parents), ("chosen", chosen))]  # fmt: skip
    shapes = ((B, K, T + 1), (B, K), (B, K, V))
    expected += [(f"state.{name}", x, shape, frames.dtype)
                 for name, x, shape in zip(state._fields, state, shapes, strict=True)]  # fmt: skip
    for name, x, shape, dtype in expected:
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(f"{name} must be {shape} {dtype} like frames; got {tuple(x.shape)} {x.dtype}")
        if x.device != frames.device:
            raise ValueError(f"{name} must be on {frames.device} like frames; got {x.device}")
    if not 0 <= eos < V:
        raise ValueError(f"eos must be a token from 0 to {V - 1}; got {eos}")


def _fake(frames, alphas, prefixes, gains, tokens, parents, chosen, eos):
    return tuple(x.new_empty(x.shape) for x in (alphas, prefixes, gains))


backends.register(
    "ctc_prefix",
    "(Tensor frames, Tensor alphas, Tensor prefixes, Tensor gains, Tensor tokens, Tensor parents, Tensor chosen,"
    " int eos) -> (Tensor alphas, Tensor prefixes, Tensor gains)",
    _fake,
)
