"""Listener: a Conv1d front end, a BiLSTM, pyramidal BiLSTMs that each halve the frame rate (Chan et al. 2016), and
further BiLSTMs at the final rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from las_fast.config import ListenerConfig
from las_fast.model.layers import initialise_lstm, locked_dropout, on_cuda
from las_fast.ops import bilstm, padding_mask
from las_fast.ops.bilstm import bilstm_on_streams

Taps = dict[int, tuple[Tensor, Tensor]]  # by layer: output (B, T, 2H) and lengths (B,)

# cuDNN's persistent LSTM kernels need a batch size that is a multiple of this. A batch of fewer rows is not padded: one
# row would take the memory of eight, so a batch that does not fit would not fit row by row either.
CUDNN_ROWS = 8


def convolve(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """Apply a zero-padded Conv1d over the frames of x (B, T, C_in); return (B, T_out, C_out).

    On the CPU it runs as a conv2d of height 1, the only form that keeps channels last. Transposing the inputs, outputs
    and gradients of each layer instead makes training the front end 1.4 times as slow.
    """
    if on_cuda(x):
        return conv(x.transpose(1, 2)).transpose(1, 2)
    pixels, kernel = x.transpose(1, 2)[:, :, None], conv.weight[:, :, None]
    geometry = (1, *conv.stride), (0, *conv.padding), (1, *conv.dilation)
    output = nn.functional.conv2d(pixels, kernel, conv.bias, *geometry, conv.groups)
    return output[:, :, 0].transpose(1, 2)


class ConvFrontEnd(nn.Module):
    """Layers of Conv1d, LayerNorm over channels and GELU; each turns T frames into ceil(T / stride)."""

    def __init__(self, config: ListenerConfig, input_size: int):
        super().__init__()
        sizes = (input_size, *config.conv_channels)
        convs = nn.ModuleList(
            nn.Conv1d(sizes[i], sizes[i + 1], kernel, stride, padding=kernel // 2)
            for i, (kernel, stride) in enumerate(zip(config.conv_kernels, config.conv_strides, strict=True))
        )
        self.convs = cast("Sequence[nn.Conv1d]", convs)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in config.conv_channels)
        self.output_size = sizes[-1]

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode x (B, T, F); return (B, T_out, C) with zeros past the new lengths, and those lengths (B,)."""
        x = x.masked_fill(padding_mask(lengths, x.shape[1])[:, :, None], 0.0)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            lengths = torch.div(lengths - 1, conv.stride[0], rounding_mode="floor") + 1
            x = nn.functional.gelu(norm(convolve(conv, x)))
            # Zero the padding again: the next convolution reads past the end, where an unpadded utterance has zeros.
            x = x.masked_fill(padding_mask(lengths, x.shape[1])[:, :, None], 0.0)
        return x, lengths


class DirectionWeights(nn.LSTM):
    """The weights of a bidirectional LSTM layer. On CUDA each direction lies in one buffer, as cuDNN needs it.

    nn.LSTM puts both directions in one buffer. cuDNN would then copy the weights at every call of a single direction,
    and PyTorch would warn. Copies of a module (copy.deepcopy) get buffers as well.
    """

    def flatten_parameters(self) -> None:
        weights, names = self._flat_weights, self._flat_weights_names
        half = len(names) // 2
        self.bidirectional = False
        try:
            for direction in (slice(half), slice(half, None)):
                self._flat_weights, self._flat_weights_names = weights[direction], names[direction]
                super().flatten_parameters()
        finally:
            self._flat_weights, self._flat_weights_names, self.bidirectional = weights, names, True

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.flatten_parameters()


class BiLSTM(nn.Module):
    """One bidirectional LSTM layer: (B, T, F) to (B, T, 2H), with zeros past each utterance's length.

    It runs ops.bilstm on the CPU and two LSTMs of cuDNN on CUDA.
    """

    def __init__(self, input_size: int, size: int):
        super().__init__()
        self.lstm = DirectionWeights(input_size, size, batch_first=True, bidirectional=True)
        self.output_size = 2 * size
        for name, parameter in self.lstm.named_parameters():
            initialise_lstm(name, parameter)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        forwards, backwards = self.lstm.all_weights
        run = bilstm_on_streams if on_cuda(x) else bilstm
        return run(x, lengths, forwards, backwards)


def halve_time(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenate pairs of frames: (B, T, F) to (B, ceil(T / 2), 2F); an odd last frame is paired with zeros."""
    if x.shape[1] % 2:
        x = nn.functional.pad(x, (0, 0, 0, 1))
    return x.reshape(x.shape[0], -1, 2 * x.shape[2]), torch.div(lengths + 1, 2, rounding_mode="floor")


class Listener(nn.Module):
    """Encode feature frames as encoder frames. Lengths are exact after every layer, and at least 1."""

    def __init__(self, config: ListenerConfig, input_size: int):
        super().__init__()
        self.front = ConvFrontEnd(config, input_size)
        pyramids, top = [4 * config.lstm_size] * config.pyramids, [2 * config.lstm_size] * config.top_layers
        inputs = (self.front.output_size, *pyramids, *top)
        self.pyramids = config.pyramids
        self.layers = nn.ModuleList(BiLSTM(size, config.lstm_size) for size in inputs)
        self.norms = nn.ModuleList(nn.LayerNorm(2 * config.lstm_size) for _ in inputs)
        self.output_size = 2 * config.lstm_size
        self.dropout = config.dropout

    def forward(self, features: Tensor, lengths: Tensor, taps: Sequence[int] = ()) -> tuple[Tensor, Tensor, Taps]:
        """Encode features.

        Args:
            features: (B, T, F) float32.
            lengths: (B,) int64, each at least 1.
            taps: indices of layers whose outputs are also returned: 0 is the BiLSTM, then the pyramids, then the top
                layers.

        Returns:
            output (B, T_out, 2H) with zeros past the lengths, lengths (B,), and (output, lengths) by index in `taps`.
        """
        rows = features.shape[0]
        extra = -rows % CUDNN_ROWS if on_cuda(features) and rows > CUDNN_ROWS else 0
        if not extra:
            return self._encode(features, lengths, taps)
        padded = F.pad(features, (0, 0, 0, 0, 0, extra)), F.pad(lengths, (0, extra))  # utterances of length 0
        output, lengths, tapped = self._encode(*padded, taps)
        return output[:rows], lengths[:rows], {i: (x[:rows], frames[:rows]) for i, (x, frames) in tapped.items()}

    def _encode(self, features: Tensor, lengths: Tensor, taps: Sequence[int]) -> tuple[Tensor, Tensor, Taps]:
        x, lengths = self.front(features, lengths)
        tapped: Taps = {}
        for i, layer in enumerate(self.layers):
            if 1 <= i <= self.pyramids:
                x, lengths = halve_time(x, lengths)
            x = self.norms[i](layer(locked_dropout(x, self.dropout, self.training), lengths))
            x = x.masked_fill(padding_mask(lengths, x.shape[1])[:, :, None], 0.0)
            if i in taps:
                tapped[i] = x, lengths
        return locked_dropout(x, self.dropout, self.training), lengths, tapped
