"""Settings are read without forgiveness."""

import pytest

from las_fast.config import Config, from_yaml, load_config, presets, to_yaml
from las_fast.errors import InputError


def test_every_preset_loads_and_survives_a_round_trip():
    assert set(presets()) >= {"tiny", "an4", "speech13h", "hw4p2", "librispeech100"}
    for name in presets():
        config = load_config(name)
        assert from_yaml(to_yaml(config), name) == config


def test_f23_preset_takes_28_coefficients():
    assert load_config("hw4p2").features.size == 28


@pytest.mark.parametrize(
    "text,message",
    [
        ("training: {epohcs: 3}", r"has no setting 'epohcs'; the nearest is 'epochs'"),
        ("trainign: {epochs: 3}", r"the nearest is 'training'"),
        ("training: {epochs: three}", r"training: epochs must be int; got 'three'"),
        ("training: {epochs: 3.5}", r"must be int; got 3.5"),
        ("training: {epochs: true}", r"must be int; got True"),
        ("training: {wandb: 1}", r"must be bool; got 1"),
        ("training: {learning_rate: fast}", r"must be float; got 'fast'"),
        ("training: {precision: fp8}", r"must be one of .*'fp32'"),
        ("model: {listener: {conv_channels: 4}}", r"must be a list; got 4"),
        ("model: {listener: [4]}", r"must be a mapping"),
        ("training: {teacher_forcing: [{start: 0}]}", r"lacks end, first, last"),
        ("training: {ctc_weight: 0.3}", r"ctc_weight needs model.ctc_layer"),
        ("model: {listener: {conv_kernels: [4]}}", r"must be odd"),
        ("training: [", r"is not YAML"),
        ("just text", r"must be a mapping"),
    ],
)
def test_a_mistake_is_named_with_where_it_stands(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(path)


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean speech13h"):
        load_config("speech14h")


def test_exponents_and_whole_numbers_are_floats_where_floats_are_meant(tmp_path):
    (tmp_path / "c.yaml").write_text("training: {learning_rate: 1e-3, clip_norm: 5}")
    config = load_config(tmp_path / "c.yaml")
    assert config.training.learning_rate == 1e-3 and config.training.clip_norm == 5.0


def test_an_empty_file_means_the_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("")
    assert load_config(tmp_path / "c.yaml") == Config()


def test_yaml_cannot_build_python_objects(tmp_path):
    (tmp_path / "c.yaml").write_text("training: !!python/object/apply:os.getcwd []")
    with pytest.raises(InputError, match="is not YAML"):
        load_config(tmp_path / "c.yaml")
