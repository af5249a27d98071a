"""Initial weights from a checkpoint of the same model, or of one with fewer BiLSTMs."""

from dataclasses import replace

import pytest
import torch
from tiny_checkpoints import MODEL, make_trainer, small
from tiny_corpora import make_archive

from las_fast.checkpoint import Loaded, load_weights
from las_fast.errors import InputError
from las_fast.model.las import LAS
from las_fast.training.initial import initial_weights


def make_model(top_layers, *, ctc=-1, inner=-1, seed=0, pyramids=1, size=8):
    listener = replace(MODEL.listener, top_layers=top_layers, pyramids=pyramids, lstm_size=size)
    torch.manual_seed(seed)
    config = replace(MODEL, listener=listener, ctc_layer=ctc, inner_ctc_layer=inner)
    return LAS(config, input_size=5, vocabulary_size=9)


def grow(given, **settings):
    model = make_model(**settings, seed=1)
    weights, new, unused = initial_weights(model, given)
    load_weights(model, weights, "given")
    used = {model.ctc_layer, model.inner_ctc_layer}
    assert unused == [layer for layer in (given.ctc_layer, given.inner_ctc_layer) if layer >= 0 and layer not in used]
    return model, new


@pytest.mark.parametrize("top_layers", [0, 2])
def test_a_model_of_the_same_sizes_takes_every_weight(top_layers):
    given = make_model(top_layers, ctc=1, inner=0)
    model, new = grow(given, top_layers=top_layers, ctc=1, inner=0)
    assert new == []
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in given.state_dict().items())


def test_a_deeper_model_takes_every_weight_and_has_new_bilstms_on_top():
    given = make_model(0)
    model, new = grow(given, top_layers=2)
    assert new == ["listener.layers.2", "listener.norms.2", "listener.layers.3", "listener.norms.3"]
    weights, own = model.state_dict(), make_model(2, seed=1).state_dict()
    for name, value in weights.items():
        assert torch.equal(value, (own if name.startswith(tuple(new)) else given.state_dict())[name]), name
    x, lengths = torch.randn(2, 12, 5), torch.tensor([12, 7])
    below = [net.listener.eval()(x, lengths, (1,))[2][1][0] for net in (given, model)]
    assert torch.equal(*below)


@pytest.mark.parametrize(
    ("given_heads", "heads", "kept", "new"),
    [
        ({"ctc": 1}, {"ctc": 3, "inner": 1}, {"inner_ctc": "ctc"}, ["ctc"]),
        ({"ctc": 1}, {"ctc": 1}, {"ctc": "ctc"}, []),
        ({"ctc": 1, "inner": 0}, {"ctc": 3, "inner": 1}, {"inner_ctc": "ctc"}, ["ctc"]),
        ({"ctc": 1, "inner": 0}, {"ctc": 1, "inner": 0}, {"ctc": "ctc", "inner_ctc": "inner_ctc"}, []),
        ({"ctc": 1, "inner": 0}, {"ctc": 0}, {"ctc": "inner_ctc"}, []),
        ({"ctc": 1}, {"ctc": 3, "inner": 2}, {}, ["ctc", "inner_ctc"]),
        ({}, {"ctc": 3}, {}, ["ctc"]),
        ({"ctc": 1}, {}, {}, []),
    ],
)
@pytest.mark.parametrize("depth", [0, 2])  # BiLSTMs on top that `given` has
def test_a_ctc_head_stays_on_its_bilstm(given_heads, heads, kept, new, depth):
    given = make_model(depth, **given_heads)
    model, names = grow(given, top_layers=2, **heads)
    assert [name for name in names if "listener" not in name] == new
    weights, own = model.state_dict(), make_model(2, seed=1, **heads).state_dict()
    for head in ("ctc", "inner_ctc"):
        for part in ("weight", "bias"):
            if head in kept:
                assert torch.equal(weights[f"{head}.{part}"], given.state_dict()[f"{kept[head]}.{part}"])
            elif head in new:
                assert torch.equal(weights[f"{head}.{part}"], own[f"{head}.{part}"])
            else:
                assert f"{head}.{part}" not in weights


@pytest.mark.parametrize(
    "settings",
    [
        {"top_layers": 0},
        {"top_layers": 2, "pyramids": 0},
        {"top_layers": 2, "size": 6},
    ],
)
def test_another_model_is_refused(settings):
    with pytest.raises(InputError, match="given does not fit the settings: .* should be"):
        grow(make_model(1), **settings)


def test_a_training_grows_a_model_and_its_average_alike(tmp_path, capsys):
    archive = make_archive(tmp_path, "F23", utterances=2)
    config = small(model=replace(MODEL, listener=replace(MODEL.listener, top_layers=1)))
    trainer = make_trainer(archive, tmp_path / "run", config)
    torch.manual_seed(5)
    given = LAS(replace(MODEL, ctc_layer=1), input_size=28, vocabulary_size=trainer.model.vocabulary_size)
    trainer.start_from(Loaded(given, config, trainer.vocabulary, None, tmp_path / "given.safetensors", {}))
    assert "random weights: listener.layers.2, listener.norms.2; the others are from" in (
        out := capsys.readouterr().out
    )
    assert f"weights: the CTC head on BiLSTM 1 of {tmp_path / 'given.safetensors'} is not used" in out
    averaged, taken = trainer.averaged.state_dict(), given.state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, averaged[name])
        assert name.startswith(("listener.layers.2", "listener.norms.2")) or torch.equal(value, taken[name])
    assert not any(name.startswith("ctc") for name in averaged)
