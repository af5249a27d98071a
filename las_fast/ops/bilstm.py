"""One bidirectional LSTM layer over utterances of different lengths.

In each direction (t ascending or descending over the valid frames of an utterance), with h = c = 0 at the start:

    i, f, g, o = W_ih x_t + b_ih + W_hh h + b_hh            h and c of the previous frame in that direction
    c          = sigmoid(f) * c + sigmoid(i) * tanh(g);     h = sigmoid(o) * tanh(c)

The output of a frame is h of both directions. csrc/bilstm_backward.h states the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from las_fast.ops import backends
from las_fast.ops.masks import padding_mask
from las_fast.system import stream_for

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def bilstm(
    x: Tensor, lengths: Tensor, forwards: Sequence[Tensor], backwards: Sequence[Tensor], *, backend: str = "auto"
) -> Tensor:
    """Run a bidirectional LSTM over each utterance. C++ neither reads nor computes padding.

    Differentiable once in x and the weights. Sums and cell states are float32; matmuls are bfloat16 for bfloat16 x and
    under CPU autocast to bfloat16. In C++ the result of an utterance is bit-identical in any batch and with any number
    of threads. The reference runs torch's LSTM once per direction and reverses each utterance within its length for the
    second: on a CPU this is much faster than a packed sequence. It needs finite padding.

    Args:
        x:         (B, T, I).
        lengths:   (B,) int64 valid frames, 0 to T.
        forwards:  weight_ih (4H, I), weight_hh (4H, H), bias_ih (4H,) and bias_hh (4H,) as in nn.LSTM: input, forget,
            cell and output gate. C++ needs float32 weights, even for bfloat16 x.
        backwards: the same for the direction from the last frame to the first.
        backend:   "auto", "reference" or "cpp".

    Returns:
        (B, T, 2H) hidden states, forward direction first, exactly 0 past the lengths; dtype of x or of autocast.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the named backend is not available here, or does not support the dtype of the weights.
    """
    _check(x, lengths, forwards, backwards)
    weights = [*forwards, *backwards]
    use_bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    dtype = torch.bfloat16 if use_bf16 and x.device.type == "cpu" and x.dtype == torch.float32 else x.dtype
    chosen = backends.choose("bilstm", backend, x.device, dtype, {"cpp": _unsupported(weights)})
    if chosen == "reference":
        return _reference(x, lengths, forwards, backwards)
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
    return torch.ops.las_fast.bilstm_cpp(x.to(dtype), lengths, weights, gradients)[0]


def bilstm_on_streams(x: Tensor, lengths: Tensor, forwards: Sequence[Tensor], backwards: Sequence[Tensor]) -> Tensor:
    """Compute bilstm on CUDA: each direction is a cuDNN LSTM on a separate stream. The host never waits.

    cuDNN runs packed sequences with its slowest algorithm, so the frames stay padded; padding must be finite. Its
    persistent kernels need float16, sizes in multiples of 128 and a batch in multiples of 8. Under autocast to any half
    type PyTorch runs these LSTMs in float16, so training must scale the loss.

    The backward pass of each op runs on the stream of its forward pass, and autograd orders the streams.

    Args, returns: as for bilstm.
    """
    main, side = torch.cuda.current_stream(x.device), stream_for("second direction", x.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        index = _reversal(lengths, x.shape[1])
        backward = _Reverse.apply(_direction(_Reverse.apply(x, index), backwards), index)
    forward = _direction(x, forwards)
    main.wait_stream(side)
    # The allocator must not reuse memory of one stream while the other still works on it.
    for tensor in (x, lengths):
        tensor.record_stream(side)
    backward.record_stream(main)
    return _join(forward, backward, lengths)


class _Reverse(torch.autograd.Function):
    """Reverse x (B, T, F) by an index from _reversal. The gradient is a gather too: torch's own adds atomically."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        return x.gather(1, index.expand_as(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (index,) = ctx.saved_tensors
        return gradient.gather(1, index.expand_as(gradient)), None


def _reversal(lengths: Tensor, frames: int) -> Tensor:
    """Return the frame to read at each frame, (B, T, 1) int64; its own inverse."""
    time = torch.arange(frames, device=lengths.device)
    return torch.where(time < lengths[:, None], lengths[:, None] - 1 - time, time)[:, :, None]


def reverse_within_lengths(x: Tensor, lengths: Tensor) -> Tensor:
    """Reverse the first lengths[b] frames of each row of x (B, T, F); padding stays where it is."""
    return x.gather(1, _reversal(lengths, x.shape[1]).expand_as(x))


def _reference(x: Tensor, lengths: Tensor, forwards: Sequence[Tensor], backwards: Sequence[Tensor]) -> Tensor:
    forward = _direction(x, forwards)
    backward = reverse_within_lengths(_direction(reverse_within_lengths(x, lengths), backwards), lengths)
    return _join(forward, backward, lengths)


def _join(forward: Tensor, backward: Tensor, lengths: Tensor) -> Tensor:
    padding = padding_mask(lengths, forward.shape[1])[:, :, None]
    return torch.cat((forward, backward), 2).masked_fill(padding, 0.0)


def _direction(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    zero = x.new_zeros(1, x.shape[0], weights[1].shape[1])
    weights = [weight.to(x.dtype) for weight in weights]
    return torch.lstm(x, (zero, zero), weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)[0]


def _unsupported(weights: list[Tensor]) -> str | None:
    """Return why C++ does not support these weights, or None."""
    types = {x.dtype for x in weights} - {torch.float32}
    return f"takes float32 weights; got {types.pop()}" if types else None


def _check(x: Tensor, lengths: Tensor, forwards: Sequence[Tensor], backwards: Sequence[Tensor]) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x must be (B, T, I) of floats; got {tuple(x.shape)} {x.dtype}")
    B, _, I = x.shape
    if lengths.shape != (B,) or lengths.dtype != torch.int64:
        raise ValueError(f"lengths must be ({B},) int64; got {tuple(lengths.shape)} {lengths.dtype}")
    for direction in (forwards, backwards):
        if len(direction) != len(NAMES):
            raise ValueError(f"each direction must have {', '.join(NAMES)}; got {len(direction)} tensors")
        H = forwards[1].shape[-1]
        shapes = ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
        for name, weight, shape in zip(NAMES, direction, shapes, strict=True):
            if weight.shape != shape:
                raise ValueError(f"{name} must be {shape} with I={I}, H={H}; got {tuple(weight.shape)}")
    devices = {tensor.device for tensor in (x, lengths, *forwards, *backwards)}
    if len(devices) > 1:
        raise ValueError(f"x, lengths and weights must be on one device; got {', '.join(sorted(map(str, devices)))}")


FORWARD = "(Tensor x, Tensor lengths, Tensor[] weights, bool gradients) -> (Tensor output, Tensor saved)"
BACKWARD = (
    "(Tensor gradient, Tensor x, Tensor lengths, Tensor[] weights, Tensor output, Tensor saved, bool inputs)"
    " -> (Tensor x_gradient, Tensor[] weight_gradients)"
)


def _fake_forward(x, lengths, weights, gradients):
    B, T, H = x.shape[0], x.shape[1], weights[1].shape[1]
    return x.new_empty(B, T, 2 * H), x.new_empty(B if gradients else 0, T, 2, 5, H)


def _fake_backward(gradient, x, lengths, weights, output, saved, inputs):
    gradients = [weights[i].new_empty(weights[i].shape) for i in (0, 1, 2, 4, 5, 6)]  # one for both biases
    return x.new_empty(x.shape if inputs else (0, *x.shape[1:])), gradients


def _save(ctx, inputs, output) -> None:
    x, lengths, weights, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, lengths, *weights, *output)


def _backward(ctx, gradient, kept_gradient):
    x, lengths, *weights, output, saved = ctx.saved_tensors
    inputs = ctx.needs_input_grad[0]
    op = torch.ops.las_fast.bilstm_backward_cpp
    x_gradient, (ih, hh, bias, ih_back, hh_back, bias_back) = op(gradient, x, lengths, weights, output, saved, inputs)
    weight_gradients = [ih, hh, bias, bias, ih_back, hh_back, bias_back, bias_back]
    return x_gradient if inputs else None, None, weight_gradients, None


def _refuse(ctx, *gradients):  # torch's once_differentiable does not support lists of gradients
    raise RuntimeError("bilstm in C++ cannot differentiate twice. Use backend='reference'")


for _name in backends.register("bilstm_backward", BACKWARD, _fake_backward, module="bilstm"):
    torch.library.register_autograd(_name, _refuse)
for _name in backends.register("bilstm", FORWARD, _fake_forward):
    torch.library.register_autograd(_name, _backward, setup_context=_save)
