"""Means of checkpoints: equal to the mean of the weights, refused where they make no sense."""

from dataclasses import replace

import pytest
import torch
from tiny_checkpoints import MODEL

from las_fast import checkpoint, export, lm
from las_fast.average import load_mean
from las_fast.config import Config, DataConfig, FeatureConfig, ModelConfig
from las_fast.data.normalisation import Statistics
from las_fast.errors import InputError
from las_fast.search.confidence import calibration_path_for, load_calibration
from las_fast.search.ngram import lm_path_for, save_lm


def write(path, seed=2, statistics=None, info=None, **sections):
    config = Config(**({"features": FeatureConfig(size=28), "model": MODEL} | sections))
    torch.manual_seed(seed)
    checkpoint.save_model(path, checkpoint.build_model(config).state_dict(), config, statistics, info or {})
    return path


def weights(path):
    return checkpoint.load_model(path).model.state_dict()


def test_the_mean_has_the_mean_weights_and_the_settings_of_the_first(tmp_path):
    one = write(tmp_path / "one.safetensors", 1, info={"epoch": 3, "data": {"kind": "audio"}})
    two = write(tmp_path / "two.safetensors", 2, info={"epoch": 5})
    mean = load_mean([one, two])
    for name, value in mean.model.state_dict().items():
        torch.testing.assert_close(value, (weights(one)[name] + weights(two)[name]) / 2, rtol=1e-6, atol=1e-8)
    assert mean.path == one and mean.config == checkpoint.load_model(one).config and not mean.model.training
    assert mean.info == {
        "mean_of": [{"epoch": 3, "data": {"kind": "audio"}}, {"epoch": 5}],
        "data": {"kind": "audio"},
    }


def test_a_checkpoint_named_twice_counts_twice(tmp_path):
    one, two = (write(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    mean = load_mean([one, two, one]).model.state_dict()
    for name, value in mean.items():
        torch.testing.assert_close(value, (2 * weights(one)[name] + weights(two)[name]) / 3, rtol=1e-6, atol=1e-8)


def test_the_mean_of_one_checkpoint_is_that_checkpoint(tmp_path):
    path = write(tmp_path / "one.safetensors", info={"epoch": 3})
    loaded = load_mean([path])
    assert not loaded.is_average and loaded.info == {"epoch": 3}
    assert all(torch.equal(value, weights(path)[name]) for name, value in loaded.model.state_dict().items())


LISTENER = MODEL.listener
STATISTICS = Statistics(torch.zeros(28), torch.ones(28))


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"model": replace(MODEL, listener=replace(LISTENER, lstm_size=6))}, "has model.listener.lstm_size = 6, and"),
        ({"model": replace(MODEL, ctc_layer=0)}, r"has model.ctc_layer = 0, and .*one.safetensors has -1; average"),
        ({"features": FeatureConfig(size=28, trim_silence=False)}, "has features.trim_silence = False, and"),
        ({"data": DataConfig(characters="ABC")}, "has data.characters = 'ABC', and"),
        ({"statistics": STATISTICS}, "normalises features by other statistics than .*one.safetensors; average"),
    ],
)
def test_models_that_cannot_be_averaged_are_refused(tmp_path, other, sentence):
    one, two = write(tmp_path / "one.safetensors"), write(tmp_path / "two.safetensors", **other)
    with pytest.raises(InputError, match=f"two.safetensors {sentence}"):
        load_mean([one, two])


@pytest.mark.parametrize(("mean", "std"), [(1.0, 1.0), (0.0, 2.0)])
def test_statistics_must_be_equal(tmp_path, mean, std):
    statistics = Statistics(torch.full((28,), mean), torch.full((28,), std))
    one, two = (write(tmp_path / f"{i}.safetensors", statistics=s) for i, s in enumerate((STATISTICS, statistics)))
    kept = load_mean([one, one]).statistics
    assert torch.equal(kept.mean, STATISTICS.mean) and torch.equal(kept.std, STATISTICS.std)
    with pytest.raises(InputError, match="normalises features by other statistics"):
        load_mean([one, two])


def test_dropout_may_differ(tmp_path):
    other = ModelConfig(replace(LISTENER, dropout=0.5), replace(MODEL.speller, dropout=0.4))
    one, two = write(tmp_path / "one.safetensors"), write(tmp_path / "two.safetensors", model=other)
    assert load_mean([one, two]).config.model == MODEL


def test_export_writes_the_mean_with_the_language_model_of_the_first_and_no_calibration(tmp_path):
    one, two, out = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "mean"))
    for seed, path in enumerate((one, two)):
        write(path, seed)
        load_calibration(path).save(calibration_path_for(path))
        save_lm(lm_path_for(path), lm.train(["AB" * (seed + 1)], order=1, characters="AB"))
    command = ["--checkpoint", str(one), str(two), "--out", str(out)]
    export.main([*command, "--decoding.ngram-weight", "0.2"])
    expected = load_mean([one, two]).model.state_dict()
    for name, value in weights(out).items():
        torch.testing.assert_close(value, expected[name], rtol=2**-11, atol=2**-24)
    assert lm_path_for(out).read_bytes() == lm_path_for(one).read_bytes() != lm_path_for(two).read_bytes()
    assert not calibration_path_for(out).exists()


def test_a_calibration_beside_the_mean_is_refused_before_but_kept_after(tmp_path):
    one, two, out = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "mean"))
    write(one, 1), write(two, 2)
    calibration = calibration_path_for(out)
    load_calibration(one).save(calibration)
    command = ["--checkpoint", str(one), str(two), "--out", str(out)]
    with pytest.raises(InputError, match="mean.words.json is not of this checkpoint.*; remove it$"):
        export.main(command)
    calibration.unlink()
    export.main(command)
    load_calibration(one).save(calibration)
    again = tmp_path / "again.safetensors"
    export.main(["--checkpoint", str(out), "--out", str(again)])
    assert calibration_path_for(again).read_bytes() == calibration.read_bytes()


@pytest.mark.parametrize("number", [0, 1])
def test_no_input_is_replaced(tmp_path, number):
    paths = [write(tmp_path / f"{i}.safetensors", i) for i in range(2)]
    with pytest.raises(InputError, match=f"{number}.safetensors is an input of this command"):
        export.main(["--checkpoint", *map(str, paths), "--out", str(paths[number])])
