"""Initial weights of a training, from a checkpoint. The new model may have more BiLSTMs, and CTC heads elsewhere."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from las_fast.model.las import LAS

HEADS = ("ctc", "inner_ctc")


class Initial(NamedTuple):
    """The start of a model."""

    weights: dict[str, Tensor]  # a state_dict
    new: list[str]  # modules that keep their random weights
    unused: list[int]  # BiLSTMs of the checkpoint with a CTC head that the model does not have


def initial_weights(model: LAS, given: LAS) -> Initial:
    """Return a state_dict for `model` with the weights of `given`.

    BiLSTMs that `given` lacks lie on top and keep the weights of `model`. A CTC head stays on its BiLSTM: the head of
    `given` on BiLSTM 1 becomes the inner head of `model`, if that is on BiLSTM 1. A head on a BiLSTM where `given` has
    none keeps the weights of `model`. Any other difference stays in the result, for checkpoint.load_weights to refuse.
    """
    weights, depth = given.state_dict(), len(given.listener.layers)
    new = [f"listener.{part}.{i}" for i in range(depth, len(model.listener.layers)) for part in ("layers", "norms")]
    heads = {given.ctc_layer: given.ctc, given.inner_ctc_layer: given.inner_ctc}
    weights = {name: value for name, value in weights.items() if not name.startswith(HEADS)}
    for name, layer in zip(HEADS, (model.ctc_layer, model.inner_ctc_layer), strict=True):
        if (head := heads.get(layer)) is not None:
            weights |= {f"{name}.{key}": value for key, value in head.state_dict().items()}
        elif layer >= 0:
            new.append(name)
    own = model.state_dict().items()
    weights |= {key: value for key, value in own if key.startswith(tuple(f"{part}." for part in new))}
    used = {model.ctc_layer, model.inner_ctc_layer}
    return Initial(weights, new, [layer for layer, head in heads.items() if head is not None and layer not in used])
