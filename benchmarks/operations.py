"""How many floating point operations the products of a model take, padding left out: a multiply and an add are two."""

from __future__ import annotations

from las_fast.config import ListenerConfig, SpellerConfig

BACKWARD = 2  # a product's backward pass is two such products


def listener_operations(config: ListenerConfig, speller: SpellerConfig, features: int, frames: int) -> float:
    """Return those of the listener for `frames` feature frames, with the projection to keys and values."""
    total, size, left = 0.0, features, float(frames)
    for channels, kernel, stride in zip(config.conv_channels, config.conv_kernels, config.conv_strides, strict=True):
        left /= stride
        total += 2 * kernel * size * channels * left
        size = channels
    H = config.lstm_size
    for layer in range(1 + config.pyramids + config.top_layers):
        if 1 <= layer <= config.pyramids:
            left, size = left / 2, 2 * size
        total += 2 * 2 * 4 * H * (size + H) * left  # two directions
        size = 2 * H
    return total + 2 * size * (speller.key_size + speller.value_size) * left


def speller_operations(config: SpellerConfig, vocabulary: int, frames: float, *, looked_up: bool) -> float:
    """Return those of one token of one hypothesis that attends to `frames` encoder frames.

    looked_up: what a token adds to the gates of the first cell is in a table, as in a search.
    """
    D, E, M = config.key_size, config.value_size, config.embedding_size
    total, inputs = 0.0, E if looked_up else M + E
    for size in config.lstm_sizes:
        total += 2 * 4 * size * (inputs + size)
        inputs = size
    return total + 2 * (inputs * D + frames * (D + E) + (inputs + E) * M + M * vocabulary)
