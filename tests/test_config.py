"""Settings are read without forgiveness."""

from dataclasses import replace

import pytest

from las_fast import config as module
from las_fast.config import Config, check, from_tree, from_yaml, load_config, presets, to_tree, to_yaml
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
        ("training: {epochs: true}", r"must be int; got true"),
        ("training: {wandb: 1}", r"must be bool; got 1"),
        ("training: {learning_rate: fast}", r"must be float; got 'fast'"),
        ("training: {precision: fp8}", r"must be one of .*'fp32'"),
        ("model: {listener: {conv_channels: 4}}", r"must be a list; got 4"),
        ("model: {listener: [4]}", r"must be a mapping"),
        ("training: {teacher_forcing: [{start: 0}]}", r"lacks end, first, last"),
        ("training: {ctc_weight: 0.3}", r"ctc_weight needs model.ctc_layer"),
        ("decoding: {ctc_weight: 0.3}", r"decoding.ctc_weight needs a model with a CTC head"),
        ("decoding: {ctc_weight: 1.3}", r"decoding.ctc_weight must be at most 1"),
        ("model: {listener: {conv_kernels: [4]}}", r"must be odd"),
        ("training: {restarts: [40, 30]}", r"training.restarts must rise and end below training.epochs"),
        ("training: {epochs: 9, restarts: [9]}", r"training.restarts must rise and end below training.epochs"),
        ("training: {restarts: [0]}", r"training.restarts must be at least 1; got 0"),
        ("training: {restarts: [9], schedule: plateau}", r"training.restarts needs training.schedule cosine"),
        ("training: [", r"is not YAML"),
        ("just text", r"must be a mapping"),
    ],
)
def test_a_mistake_is_named_with_where_it_stands(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(path)


SETTINGS = {name: value for name, value in module._numbers(Config())}


def with_setting(name, value):
    """Return the default settings, one of them (or of the first in a list) another."""
    tree = part = to_tree(Config())
    *sections, last = name.split(".")
    for section in sections:
        part = part[section][0] if isinstance(part[section], list) else part[section]
    part[last] = [value, *part[last][1:]] if isinstance(part[last], list) else value
    return from_tree(Config, tree, "test")


@pytest.mark.parametrize("name", [name for name, value in SETTINGS.items() if type(value) is float])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_number_may_be_endless_or_none(name, value):
    with pytest.raises(InputError, match=f"settings: {name} must be a finite number"):
        check(with_setting(name, value))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in module.MAY_BE_NEGATIVE])
def test_no_number_may_be_negative(name):
    with pytest.raises(InputError, match=f"settings: {name} must be (at least [01]|more than 0); got -2"):
        check(with_setting(name, -2))


@pytest.mark.parametrize("name", [f"{section}.{name}" for section, names in module.POSITIVE.items() for name in names])
def test_sizes_and_rates_may_not_be_nothing(name):
    with pytest.raises(InputError, match=f"settings: {name} must be (at least 1|more than 0); got 0"):
        check(with_setting(name, 0))


@pytest.mark.parametrize("name", [*module.AT_MOST_ONE, *module.BELOW_ONE])
def test_shares_are_no_more_than_the_whole(name):
    with pytest.raises(InputError, match=f"settings: {name} must be (at most|below) 1; got 1.5"):
        check(with_setting(name, 1.5))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("training.seed", 10**18, "training.seed must be at most"),
        ("training.epochs", 10**15, "training.epochs must be at most"),
        ("training.learning_rate", 1e30, "training.learning_rate must be at most 100; got"),
        ("training.warmup_steps", 10**12, "training.warmup_steps must be at most 1e"),
        ("features.window_ms", 1e9, "features.window_ms must be at most 1000"),
        ("model.listener.pyramids", 30, "model.listener.pyramids must be at most 8"),
        ("model.listener.conv_kernels", 100_001, "model.listener.conv_kernels must be at most 101"),
        ("decoding.maximum_share", 1e18, "decoding.maximum_share must be at most 1000"),
        ("decoding.length_reward", -1e300, "decoding.length_reward must be at least -1e"),
        ("decoding.length_reward", 1e30, "decoding.length_reward must be at most 1e"),
        ("model.ctc_layer", -2, "model.ctc_layer must be from -1"),
        ("model.ctc_layer", 4, "model.ctc_layer must be from -1"),
        ("features.deltas", 3, "features.deltas must be 0, 1 or 2"),
        ("data.characters", "AAB", "distinct characters"),
        ("data.characters", "", "distinct characters"),
    ],
)
def test_values_that_make_no_sense_are_named(name, value, message):
    with pytest.raises(InputError, match=message):
        check(with_setting(name, value))


def test_a_speller_needs_a_cell():
    config = Config()
    speller = replace(config.model.speller, lstm_sizes=())
    with pytest.raises(InputError, match="lstm_sizes must name at least one cell"):
        check(replace(config, model=replace(config.model, speller=speller)))


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


def test_settings_from_before_a_field_existed_take_its_default():
    settings = replace(Config(), decoding=replace(Config().decoding, beam=3))
    tree = to_tree(settings)
    del tree["decoding"]["coverage_weight"], tree["decoding"]["ngram_weight"]
    assert check(from_tree(Config, tree, "old")) == settings


def test_yaml_cannot_build_python_objects(tmp_path):
    (tmp_path / "c.yaml").write_text("training: !!python/object/apply:os.getcwd []")
    with pytest.raises(InputError, match="is not YAML"):
        load_config(tmp_path / "c.yaml")
