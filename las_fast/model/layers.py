"""What listener and speller share: dropout masks and the initialisation of LSTMs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def locked_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout with one mask an utterance, the same in every frame of x (B, T, F) (Gal and Ghahramani 2016)."""
    if not training or p == 0:
        return x
    return x * dropout_mask(x[:, :1], p)


def dropout_mask(like: Tensor, p: float) -> Tensor:
    """Return a mask shaped like `like`: 0 with probability p, else 1 / (1 - p)."""
    return torch.empty_like(like).bernoulli_(1 - p).div_(1 - p)


def initialise_lstm(name: str, parameter: Tensor) -> None:
    """Orthogonal recurrence and Xavier inputs, gate by gate; biases 0, the forget gate's 1 (Jozefowicz 2015)."""
    size = parameter.shape[0] // 4
    with torch.no_grad():
        if "weight_hh" in name:
            for gate in parameter.split(size):
                nn.init.orthogonal_(gate)
        elif "weight_ih" in name:
            for gate in parameter.split(size):
                nn.init.xavier_uniform_(gate)
        else:
            parameter.zero_()
            if "bias_ih" in name:
                parameter[size : 2 * size] = 1.0
