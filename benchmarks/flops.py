"""Count the floating point operations of a model's matmuls and convolutions; a multiply-add counts as two."""

from __future__ import annotations

from las_fast.config import ListenerConfig, SpellerConfig

BACKWARD = 2  # the backward pass of a matmul is two matmuls of the same size


def listener_flops(config: ListenerConfig, speller: SpellerConfig, input_size: int, frame_count: int) -> float:
    """Return the operations of the listener and of the projection to keys and values, without padding.

    Args:
        input_size:  values per feature frame.
        frame_count: feature frames, the sum over all utterances.
    """
    total, size, frames = 0.0, input_size, float(frame_count)
    for channels, kernel, stride in zip(config.conv_channels, config.conv_kernels, config.conv_strides, strict=True):
        frames /= stride
        total += 2 * kernel * size * channels * frames
        size = channels
    H = config.lstm_size
    for layer in range(1 + config.pyramids + config.top_layers):
        if 1 <= layer <= config.pyramids:
            frames, size = frames / 2, 2 * size
        total += 2 * 2 * 4 * H * (size + H) * frames  # two directions
        size = 2 * H
    return total + 2 * size * (speller.key_size + speller.value_size) * frames


def speller_flops(config: SpellerConfig, V: int, T: float, *, embedding_table: bool) -> float:
    """Return the operations of one decoder step of one hypothesis, with vocabulary size V and T encoder frames.

    embedding_table: a token's contribution to the gates of the first cell is read from a table, as in a search.
    """
    D, E, M = config.key_size, config.value_size, config.embedding_size
    total, inputs = 0.0, E if embedding_table else M + E
    for size in config.lstm_sizes:
        total += 2 * 4 * size * (inputs + size)
        inputs = size
    return total + 2 * (inputs * D + T * (D + E) + (inputs + E) * M + M * V)
