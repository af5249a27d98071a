"""The CTC loss on a GPU. las_fast/ops/ctc_loss.py defines the operation.

A program runs one utterance in one direction, frame by frame. Its states are the transcript with a blank around each
token: state 2u is the blank before token u, state 2u + 1 the token. With p the log-probability of the state's token:

    alpha_t(s) = p_t(s) + log(exp(alpha_(t-1)(s)) + exp(alpha_(t-1)(s-1)) + exp(alpha_(t-1)(s-2)))

The last term applies only if s and s-2 are different tokens. beta is the same recursion from the end. The sums of the
previous frame are read from memory, after a barrier. The posterior of a state is
exp(alpha + beta - p - log p(transcript)), and the posteriors of a frame sum to 1. They are computed as a softmax over
the states, because the sums of a long utterance have few digits after the point.

torch's own kernel makes the host wait: it copies the lengths from pageable memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from las_fast.ops.masks import padding_mask

BLANK = 0


@triton.jit
def _finite(x):
    """Return x with 0 for -inf: -inf - -inf would be NaN."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def _sum3(x, y, z):
    """log(exp(x) + exp(y) + exp(z))."""
    top = tl.maximum(tl.maximum(x, y), z)
    finite = _finite(top)
    return top + tl.log(tl.exp(x - finite) + tl.exp(y - finite) + tl.exp(z - finite))


@triton.jit(do_not_specialize=["B", "T", "S", "N"])
def states_kernel(
    log_probs, lengths, tokens, token_lengths, sums, likelihoods, B, T, V, S, N, ALLOW_ADJACENT_EQUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute sums[direction, b, t, state], and in the first direction the log-likelihood of the transcript.

    ALLOW_ADJACENT_EQUAL: equal tokens need no blank between them.
    """
    b, reverse = tl.program_id(0).to(tl.int64), tl.program_id(1) == 1
    frames = tl.minimum(tl.load(lengths + b), T)
    states = 2 * tl.minimum(tl.load(token_lengths + b), S) + 1
    order = tl.arange(0, BLOCK)  # (BLOCK,) position of each state in this direction
    inside = order < states
    state = tl.where(reverse, states - 1 - order, order)
    is_token = inside & (state % 2 == 1)
    token = tl.load(tokens + b * S + state // 2, mask=is_token, other=0)
    back = tl.where(reverse, -1, 1)  # from a state to the previous one
    follows = is_token & (order != 1)  # another token
    before = tl.load(tokens + b * S + state // 2 - back, mask=follows, other=0)
    skips = follows & ((before != token) | ALLOW_ADJACENT_EQUAL)
    log_probs += b * T * V
    sums += (tl.program_id(1) * B + b) * T * N
    alpha = tl.where(order == 0, 0.0, -float("inf"))  # a virtual start precedes states 0 and 1
    for i in range(0, frames):
        t = tl.where(reverse, frames - 1 - i, i)
        last = sums + (t - back) * N + state
        one = tl.load(last - back, mask=inside & (order >= 1) & (i > 0), other=-float("inf"))
        two = tl.load(last - 2 * back, mask=skips & (i > 0), other=-float("inf"))
        one = tl.where((i == 0) & (order == 1), 0.0, one)
        p = tl.load(log_probs + t * V + token, mask=inside, other=0.0)
        alpha = _sum3(alpha, one, two) + p
        tl.store(sums + t * N + state, alpha, mask=inside)
        tl.debug_barrier()
    ends = tl.where(inside & (order >= states - 2), alpha, -float("inf"))
    top = tl.max(ends, 0)
    tl.store(likelihoods + b, top + tl.log(tl.sum(tl.exp(ends - _finite(top)), 0)), mask=reverse == 0)


def posteriors(
    log_probs: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor, *, allow_adjacent_equal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-likelihoods (B,), 0 where there is no path; the token of each state (B, N); posteriors (B, T, N)."""
    (B, T, V), S = log_probs.shape, tokens.shape[1]
    N = 2 * S + 1
    tokens = tokens.clamp(BLANK, V - 1)  # they may be anything past the lengths, and a kernel cannot raise
    classes = tokens.new_full((B, N), BLANK)
    classes[:, 1::2] = tokens
    # States that are not reached keep -inf, whose posterior is 0.
    sums, likelihoods = log_probs.new_full((2, B, T, N), -torch.inf), log_probs.new_empty(B)
    inputs = [x.contiguous() for x in (log_probs, lengths, tokens, token_lengths)]
    block = triton.next_power_of_2(N)
    states_kernel[B, 2](
        *inputs, sums, likelihoods, B, T, V, S, N, ALLOW_ADJACENT_EQUAL=allow_adjacent_equal, BLOCK=block,
        num_warps=min(max(block // 128, 1), 16),
    )  # fmt: skip
    likelihoods = likelihoods.masked_fill(likelihoods == -torch.inf, 0.0)
    total = sums.sum(0)
    without_path = total == -torch.inf
    paths = (total - log_probs.gather(2, classes[:, None].expand(-1, T, -1))).masked_fill(without_path, -torch.inf)
    posterior = paths.softmax(2).masked_fill(without_path.all(2, keepdim=True), 0.0)
    return likelihoods, classes, posterior


def ctc_loss(
    logits: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor, gradients: bool
) -> tuple[Tensor, Tensor]:
    """Return losses (B,) and their gradients in logits; the implementation of las_fast::ctc_loss_triton."""
    _, T, V = logits.shape
    log_probs = F.log_softmax(logits, 2)
    inputs = log_probs, lengths, tokens, token_lengths
    likelihoods, classes, posterior = posteriors(*inputs, allow_adjacent_equal=False)
    if not gradients:
        return -likelihoods, logits.new_empty(0, T, V)
    expected = torch.bmm(posterior, (classes[:, :, None] == torch.arange(V, device=tokens.device)).to(posterior.dtype))
    # A likelihood of 0 means that there is no path or that the transcript is certain; the gradient is 0 either way.
    excluded = padding_mask(lengths, T) | (likelihoods == 0)[:, None]
    return -likelihoods, (log_probs.exp() - expected).masked_fill(excluded[:, :, None], 0.0)


def ctc_token_times(logits: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
    """Return the mean frame of each token's posterior, (B, S): las_fast::ctc_token_times_triton."""
    inputs = F.log_softmax(logits, 2), lengths, tokens, token_lengths
    posterior = posteriors(*inputs, allow_adjacent_equal=True)[2][:, :, 1::2]  # (B, T, S)
    frames = torch.arange(logits.shape[1], device=logits.device)
    return (posterior * frames[:, None]).sum(1) / posterior.sum(1).clamp_min(1e-6)
