"""Initial weights of a training, from a checkpoint of the same model, or with fewer BiLSTMs or other CTC heads."""

from __future__ import annotations

from torch import Tensor

from las_fast.model.las import LAS

HEADS = ("ctc", "inner_ctc")


def initial_weights(model: LAS, given: LAS) -> tuple[dict[str, Tensor], list[str]]:
    """Return a state_dict for `model` with the weights of `given`, and the modules that are new, by name.

    If `model` has more BiLSTMs, those on top are new and keep their weights. A CTC head stays on its BiLSTM: the head
    of `given` on BiLSTM 1 becomes the inner head of `model`, if that is on BiLSTM 1. A head on a BiLSTM where `given`
    has none is new. Any other difference stays in the state_dict, for checkpoint.load_weights to refuse.

    Training the lower layers first is as in Bengio et al. 2006, "Greedy layer-wise training of deep networks".
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
    return weights | {key: value for key, value in own if key.startswith(tuple(f"{part}." for part in new))}, new
