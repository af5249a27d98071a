"""The CTC loss (Graves et al. 2006), and the frame at which CTC places each token.

A path is one token or blank per frame. It spells the transcript if merging repeats and then dropping blanks yields the
transcript. Over all paths that spell the transcript:

    loss     = -log(sum over paths of P(path)); P(path) is the product over frames of the softmax of the path's token
    times[u] = sum over frames t of t * P(u | t) / sum over t of P(u | t)

where P(u | t) is the posterior that frame t belongs to token u. For `times` only, paths without a blank between two
equal tokens count as well; this moves those times by less than a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import eq

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from las_fast.ops import backends
from las_fast.ops.masks import padding_mask
from las_fast.text import BLANK


def min_frames(text: Sequence) -> int:
    """Return how many frames the shortest path has: one per token, and a blank between two equal tokens in a row."""
    return len(text) + sum(map(eq, text, text[1:]))


def ctc_loss(
    logits: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Return the CTC loss of each utterance, (B,); 0 if no path spells the transcript, as with too few frames.

    Differentiable once in logits. Computed in log space in float32 (float64 for float64 logits); in Triton the gradient
    ends with a matmul, which uses tf32 if torch.set_float32_matmul_precision allows it. The reference is torch's
    ctc_loss, which is scalar code on a CPU and makes the host wait on CUDA. In C++ the result of an utterance is
    bit-identical in any batch and with any number of threads.

    Args:
        logits:        (B, T, V) of floats; V includes the blank, which is token 0.
        lengths:       (B,) int64 valid frames, 0 to T.
        tokens:        (B, S) int64 from 1 to V - 1; not read past token_lengths.
        token_lengths: (B,) int64, 0 to S.
        backend:       "auto", "reference", "cpp" or "triton".

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the named backend is not available here; in C++, lengths or tokens are out of range.
    """
    _check(logits, lengths, tokens, token_lengths)
    logits = logits.float() if logits.dtype in backends.HALF else logits
    chosen = backends.choose("ctc_loss", backend, logits.device, logits.dtype)
    if chosen == "reference":
        return _reference(logits, lengths, tokens, token_lengths)
    gradients = torch.is_grad_enabled() and logits.requires_grad
    op = getattr(torch.ops.las_fast, f"ctc_loss_{chosen}")
    return op(logits, lengths, tokens, token_lengths, gradients)[0]


def ctc_token_times(
    logits: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Return the mean frame of each token's CTC posterior, (B, S) in frames, dtype of the loss; it has no gradient.

    0 past token_lengths and in utterances that have more tokens than frames.

    Args, Raises: as in ctc_loss.
    """
    _check(logits, lengths, tokens, token_lengths)
    logits = logits.detach().float() if logits.dtype in backends.HALF else logits.detach()
    chosen = backends.choose("ctc_loss", backend, logits.device, logits.dtype)
    if chosen == "reference":
        return _reference_times(logits, lengths, tokens, token_lengths)
    return getattr(torch.ops.las_fast, f"ctc_token_times_{chosen}")(logits, lengths, tokens, token_lengths)


def _reference(logits: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
    time_major = F.log_softmax(logits, -1).transpose(0, 1)
    return F.ctc_loss(time_major, tokens, lengths, token_lengths, BLANK, reduction="none", zero_infinity=True)


def _reference_times(logits: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
    valid = ~padding_mask(token_lengths, tokens.shape[1])
    # Make each position of the transcript a separate class, so that the posterior is per position.
    classes = F.pad(tokens.masked_fill(~valid, BLANK), (1, 0), value=BLANK)
    log_probs = F.log_softmax(logits, -1).gather(2, classes[:, None].expand(-1, logits.shape[1], -1))  # (B, T, 1 + S)
    with torch.inference_mode(False), torch.enable_grad():
        time_major = log_probs.transpose(0, 1).clone().requires_grad_()
        targets = torch.arange(1, log_probs.shape[2], device=tokens.device).expand_as(tokens)
        loss = F.ctc_loss(time_major, targets, lengths, token_lengths, BLANK, reduction="sum", zero_infinity=True)
        # torch returns the gradient of the log-softmax's input: probability - posterior.
        (gradient,) = torch.autograd.grad(loss, time_major)
    posterior = (log_probs.exp() - gradient.transpose(0, 1))[..., 1:]
    posterior = posterior.masked_fill(padding_mask(lengths, log_probs.shape[1])[..., None], 0.0)
    frames = torch.arange(log_probs.shape[1], device=logits.device, dtype=log_probs.dtype)
    times = torch.einsum("btu,t->bu", posterior, frames) / posterior.sum(1).clamp_min(1e-6)
    return times.masked_fill(~valid | (lengths < token_lengths)[:, None], 0.0)


def _check(logits: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> None:
    if logits.ndim != 3 or not logits.is_floating_point():
        raise ValueError(f"logits must be (B, T, V) of floats; got {tuple(logits.shape)} {logits.dtype}")
    B = logits.shape[0]
    if tokens.ndim != 2 or tokens.shape[0] != B or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be ({B}, S) int64 like logits; got {tuple(tokens.shape)} {tokens.dtype}")
    for name, x in (("lengths", lengths), ("token_lengths", token_lengths)):
        if x.shape != (B,) or x.dtype != torch.int64:
            raise ValueError(f"{name} must be ({B},) int64; got {tuple(x.shape)} {x.dtype}")
    devices = {x.device for x in (logits, lengths, tokens, token_lengths)}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"logits, lengths, tokens and token_lengths must be on one device; got {names}")


LOSS = (
    "(Tensor logits, Tensor lengths, Tensor tokens, Tensor token_lengths, bool gradients)"
    " -> (Tensor losses, Tensor gradient)"
)
TIMES = "(Tensor logits, Tensor lengths, Tensor tokens, Tensor token_lengths) -> Tensor"


def _fake_loss(logits, lengths, tokens, token_lengths, gradients):
    B, T, V = logits.shape
    return logits.new_empty(B), logits.new_empty(B if gradients else 0, T, V)


def _fake_times(logits, lengths, tokens, token_lengths):
    return logits.new_empty(tokens.shape)


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


@once_differentiable
def _backward(ctx, losses_gradient, gradient_gradient):
    (gradient,) = ctx.saved_tensors
    return gradient * losses_gradient[:, None, None], None, None, None, None


backends.register("ctc_token_times", TIMES, _fake_times, module="ctc_loss")
for _name in backends.register("ctc_loss", LOSS, _fake_loss):
    torch.library.register_autograd(_name, _backward, setup_context=_save)
