"""Settings: presets, bounds, YAML, and errors that name the setting."""

import dataclasses
import errno
import os
import re
import threading
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest

from las_fast import config as module
from las_fast import options
from las_fast.config import (
    AugmentConfig,
    Config,
    DataConfig,
    DecodingConfig,
    FeatureConfig,
    ListenerConfig,
    ModelConfig,
    TeacherForcingStage,
    TrainingConfig,
    check,
    check_training,
    from_yaml,
    load_config,
    presets,
    to_yaml,
)
from las_fast.errors import InputError
from las_fast.tree import from_tree, to_tree


def test_every_preset_loads_and_survives_a_round_trip():
    assert set(presets()) >= {"tiny", "an4", "speech13h", "english", "hw4p2", "librispeech100"}
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
        ("optimiser: {}", r"has no setting 'optimiser'; it has features, .*training"),
        ("training: {epochs: three}", r"training: epochs must be int; got 'three'"),
        ("training: {epochs: 3.5}", r"must be int; got 3.5"),
        ("training: {epochs: true}", r"must be int; got true"),
        ("training: {wandb: 1}", r"must be bool; got 1"),
        ("training: {learning_rate: fast}", r"must be float; got 'fast'"),
        ("training: {precision: fp8}", r"must be one of .*'fp32'"),
        ("model: {listener: {conv_channels: 4}}", r"must be a list; got 4"),
        ("model: {listener: [4]}", r"must be a mapping"),
        ("training: {teacher_forcing: [{start: 0}]}", r"lacks end, first, last"),
        ("training: {ctc_weight: 0.3}", r"training.ctc_weight needs a model with a CTC head"),
        ("decoding: {ctc_weight: 0.3}", r"decoding.ctc_weight needs a model with a CTC head"),
        ("decoding: {ctc_weight: 1.3}", r"decoding.ctc_weight must be at most 1"),
        ("model: {listener: {conv_kernels: [4]}}", r"must be odd"),
        ("training: {restarts: [40, 30]}", r"training.restarts must increase and stay below training.epochs"),
        ("training: {epochs: 9, restarts: [9]}", r"training.restarts must increase and stay below training.epochs"),
        ("training: {restarts: [0]}", r"training.restarts must be at least 1; got 0"),
        ("training: {restarts: [9], schedule: plateau}", r"training.restarts needs training.schedule cosine"),
        ("training: [", r"is not YAML"),
        ("just text", r"must be a mapping"),
    ],
)
def test_a_mistake_is_named_with_its_section(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(path)


SETTINGS = {name: value for name, value, _ in module._numbers(Config())}
BOUNDS = {name: bounds for name, _, bounds in module._numbers(Config())} | {
    "training.restarts": module.Bounds(at_least=1)  # empty by default
}


def with_setting(name, value):
    """The default settings with one changed, in the first item if they are a list."""
    tree = part = to_tree(Config())
    *sections, last = name.split(".")
    for section in sections:
        part = part[section][0] if isinstance(part[section], list) else part[section]
    part[last] = [value, *part[last][1:]] if isinstance(part[last], list) else value
    return from_tree(Config, tree, "test")


@pytest.mark.parametrize("name", [name for name, value in SETTINGS.items() if type(value) is float])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_number_may_be_infinite_or_nan(name, value):
    with pytest.raises(InputError, match=f"settings: {name} must be a finite number"):
        check(with_setting(name, value))


@pytest.mark.parametrize("name", [name for name in SETTINGS if BOUNDS[name].at_least >= 0])
def test_no_number_may_be_negative(name):
    with pytest.raises(InputError, match=f"settings: {name} must be (at least (0|0.5|1)|more than 0); got -2"):
        check(with_setting(name, -2))


@pytest.mark.parametrize("name", [name for name, b in BOUNDS.items() if max(b.at_least - 1, b.above) >= 0])
def test_sizes_and_rates_may_not_be_0(name):
    with pytest.raises(InputError, match=f"settings: {name} must be (at least 1|more than 0); got 0"):
        check(with_setting(name, 0))


@pytest.mark.parametrize("name", [name for name, bounds in BOUNDS.items() if min(bounds.at_most, bounds.below) == 1])
def test_fractions_are_at_most_1(name):
    with pytest.raises(InputError, match=f"settings: {name} must be (at most|below) 1; got 1.5"):
        check(with_setting(name, 1.5))


# The default of each setting; for numbers also the smallest and largest value.
TABLE = {
    "features.kind": "logmel",
    "features.size": (80, 1, 10_000),
    "features.mel_bins": (80, 1, 10_000),
    "features.lifter": (22.0, 0, 1000),
    "features.sample_rate": (16_000, 1, 768_000),
    "features.window_ms": (25.0, "more than 0", 1000),
    "features.shift_ms": (10.0, "more than 0", 1000),
    "features.normalisation": "utterance",
    "features.trim_silence": True,
    "features.deltas": (0, 0, 1_000_000_000),
    "data.train": (),
    "data.dev": "",
    "data.characters": "ABCDEFGHIJKLMNOPQRSTUVWXYZ' ",
    "data.normalise_text": False,
    "data.on_bad": "error",
    "data.frames_per_batch": (20_000, 1, 10_000_000),
    "data.utterances_per_batch": (64, 1, 10_000),
    "data.max_seconds": (0.0, 0, 1_000_000_000),
    "data.hours": (0.0, 0, 1_000_000_000),
    "data.short_epochs": (0, 0, 1_000_000_000),
    "data.short_seconds": (4.0, 0, 1_000_000_000),
    "data.shared_texts": "keep",
    "data.dev_share": (0.0, 0, 0.5),
    "data.cache": "",
    "data.workers": (1, 0, 256),
    "augment.start_epoch": (0.0, 0, 1_000_000_000),
    "augment.time_masks": (2, 0, 1000),
    "augment.time_width": (40, 0, 1_000_000_000),
    "augment.time_share": (0.2, 0, 1),
    "augment.frequency_masks": (2, 0, 1000),
    "augment.frequency_width": (10, 0, 1_000_000_000),
    "augment.frequency_share": (0.5, 0, 1),
    "augment.speed": (0.0, 0, "below 1"),
    "augment.warp": (0.0, 0, 0.5),
    "augment.join": (0.0, 0, 1),
    "augment.splice": (0.0, 0, 1),
    "augment.splice_epoch": (0, 0, 1_000_000_000),
    "augment.silence": (0.0, 0, 1),
    "augment.room": (0.0, 0, 1),
    "augment.noise": (0.0, 0, 1),
    "augment.babble": (0.0, 0, 1),
    "augment.snr_low": (0.0, -30, 100),
    "augment.snr_high": (30.0, -30, 100),
    "augment.band_limit": (0.0, 0, 1),
    "model.listener.conv_channels": ((256,), 1, 10_000),
    "model.listener.conv_kernels": ((5,), 1, 101),
    "model.listener.conv_strides": ((1,), 1, 16),
    "model.listener.lstm_size": (256, 1, 10_000),
    "model.listener.pyramids": (3, 0, 8),
    "model.listener.top_layers": (0, 0, 100),
    "model.listener.dropout": (0.2, 0, "below 1"),
    "model.speller.key_size": (256, 1, 10_000),
    "model.speller.value_size": (256, 1, 10_000),
    "model.speller.embedding_size": (256, 1, 10_000),
    "model.speller.lstm_sizes": ((512, 256), 1, 10_000),
    "model.speller.dropout": (0.2, 0, "below 1"),
    "model.ctc_layer": (-1, -1, 1_000_000_000),
    "model.inner_ctc_layer": (-1, -1, 1_000_000_000),
    "training.epochs": (60, 1, 1_000_000),
    "training.learning_rate": (0.001, "more than 0", 100),
    "training.weight_decay": (0.01, 0, 1_000_000_000),
    "training.warmup_steps": (200, 0, 1_000_000_000),
    "training.schedule": "cosine",
    "training.final_share": (0.02, 0, 1),
    "training.restarts": ((), 1, 1_000_000_000),
    "training.plateau_patience": (4, 0, 1_000_000_000),
    "training.plateau_factor": (0.5, "more than 0", 1),
    "training.clip_norm": (5.0, "more than 0", 1_000_000_000),
    "training.label_smoothing": (0.1, 0, "below 1"),
    "training.ctc_weight": (0.0, 0, 1_000_000),
    "training.ctc_until": (0.0, 0, 1_000_000_000),
    "training.guided_weight": (0.0, 0, 1_000_000),
    "training.guided_width": (0.15, "more than 0", 1_000_000_000),
    "training.guided_frames": (0.0, 0, 1_000_000_000),
    "training.guided_until": (10.0, 0, 1_000_000_000),
    "training.precision": "auto",
    "training.threads": (0, 0, 1024),
    "training.ema_decay": (0.999, 0, "below 1"),
    "training.seed": (1, 0, 1_000_000_000_000),
    "training.validate_every": (1.0, "more than 0", 1_000_000_000),
    "training.checkpoint_minutes": (5.0, 0, 1_000_000_000),
    "training.pictures": (2, 0, 1000),
    "training.monitor_epoch": (10.0, 0, 1_000_000_000),
    "training.wandb": False,
    "training.validate_first": False,
    "decoding.beam": (8, 1, 1000),
    "decoding.beam_threshold": (3.5, 0, 1_000_000_000),
    "decoding.length_penalty": (1.0, 0, 100),
    "decoding.eos_threshold": (0.0, 0, 1_000_000_000),
    "decoding.minimum_share": (0.0, 0, 1_000_000_000),
    "decoding.maximum_share": (0.3, 0, 1000),
    "decoding.maximum_extra": (10, 0, 1_000_000),
    "decoding.coverage_weight": (0.0, 0, 1_000_000_000),
    "decoding.ctc_weight": (0.0, 0, 1),
    "decoding.ngram_weight": (0.0, 0, 1_000_000_000),
    "decoding.length_reward": (0.0, -1_000_000, 1_000_000),
    "decoding.speeds": ((1.0,), 0.5, 2),
    "decoding.warps": ((1.0,), 0.5, 1.5),
    "decoding.view_threshold": (0.0, 0, 1_000_000_000),
    "decoding.frames_per_batch": (30_000, 1, 10_000_000),
    "decoding.precision": "auto",
}


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        options.parse_settings(options.Parser(prog="job", add_help=False), ["--help"], lambda _: Config())
    plain = re.sub(r"\x1b\[[0-9;]*m|[^ -~\n]", "", capsys.readouterr().out)  # plain text, without colours and boxes
    meanings = dict(re.findall(r"^ *--([a-z]+\.\S+)[^\n]*\n(.*?)\(default:", plain, re.MULTILINE | re.DOTALL))
    assert {name.replace("-", "_") for name in meanings} >= set(TABLE)
    assert [name for name, meaning in meanings.items() if not meaning.strip()] == []


def settings(config, name=""):
    """Yield (dotted name, value) of each setting."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{name}{field.name}.")
        else:
            yield name + field.name, value


def test_every_setting_has_the_default_listed_here():
    defaults = {name: row[0] if isinstance(row, tuple) and len(row) == 3 else row for name, row in TABLE.items()}
    assert dict(settings(Config())) == defaults | {
        "training.teacher_forcing": (
            TeacherForcingStage(0.0, 20.0, 1.0, 1.0),
            TeacherForcingStage(20.0, 40.0, 1.0, 0.8),
            TeacherForcingStage(40.0, 60.0, 0.8, 0.6),
        )
    }
    assert DataConfig(max_seconds=3.0, hours=2.0).without_limits() == DataConfig()


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if isinstance(row, tuple) and len(row) == 3])
def test_a_number_may_be_anything_within_its_bounds(name):
    default, low, high = TABLE[name]
    kind = type(default[0] if default else 1) if isinstance(default, tuple) else type(default)
    good = [1e-9 if low == "more than 0" else kind(low), 1 - 1e-9 if high == "below 1" else kind(high)]
    bad = [0.0 if low == "more than 0" else low - 1 if kind is int else low - 1e-9 * max(1, abs(low))]
    bad += [1.0 if high == "below 1" else high + 1 if kind is int else high * (1 + 1e-9)]
    assert [BOUNDS[name].violated(value) for value in good] == ["", ""]
    assert all(BOUNDS[name].violated(value) for value in bad), bad


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
        ("model.ctc_layer", -2, "model.ctc_layer must be at least -1"),
        ("model.ctc_layer", 4, "model.ctc_layer must be from -1"),
        ("features.deltas", 3, "features.deltas must be 0, 1 or 2"),
        ("training.teacher_forcing.first", 1.1, "training.teacher_forcing.first must be at most 1; got 1.1"),
        ("training.teacher_forcing.last", 1.1, "training.teacher_forcing.last must be at most 1; got 1.1"),
        (
            "data.characters",
            "AAB",
            "settings: data.characters: a vocabulary needs one or more characters, each given once; got 'AAB'",
        ),
        ("data.characters", "", "data.characters: .* each given once; got ''"),
    ],
)
def test_values_out_of_bounds_are_named(name, value, message):
    with pytest.raises(InputError, match=message):
        check(with_setting(name, value))


def layers(channels=1, kernels=1, strides=1):
    return ListenerConfig(conv_channels=(8,) * channels, conv_kernels=(3,) * kernels, conv_strides=(1,) * strides)


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ({"model": ModelConfig(layers(2, 2, 2))}, {"model": ModelConfig(layers(2, 1, 1))}, "must be equally long"),
        ({"model": ModelConfig(layers())}, {"model": ModelConfig(layers(1, 2, 1))}, "must be equally long"),
        ({"model": ModelConfig(layers())}, {"model": ModelConfig(layers(1, 1, 2))}, "must be equally long"),
        (
            {"model": ModelConfig(ListenerConfig(conv_kernels=(1,)))},
            {"model": ModelConfig(ListenerConfig(conv_kernels=(2,)))},
            "conv_kernels must be odd",
        ),
        (
            {"model": ModelConfig(replace(layers(2, 2, 2), conv_kernels=(3, 7)))},
            {"model": ModelConfig(replace(layers(2, 2, 2), conv_kernels=(3, 4)))},
            "conv_kernels must be odd",
        ),
        (
            {"model": ModelConfig(ListenerConfig(pyramids=2, top_layers=1), ctc_layer=3)},
            {"model": ModelConfig(ListenerConfig(pyramids=2, top_layers=1), ctc_layer=4)},
            "model.ctc_layer must be from -1",
        ),
        (
            {"model": ModelConfig(ctc_layer=2, inner_ctc_layer=1)},
            {"model": ModelConfig(ctc_layer=2, inner_ctc_layer=2)},
            r"model.inner_ctc_layer must be below model.ctc_layer \(2\), or -1 for none; got 2",
        ),
        ({"features": FeatureConfig(deltas=2)}, {"features": FeatureConfig(deltas=3)}, "deltas must be 0, 1 or 2"),
        (
            {"training": TrainingConfig(ctc_weight=1.0), "model": ModelConfig(ctc_layer=0)},
            {"training": TrainingConfig(ctc_weight=1.0)},
            "training.ctc_weight needs a model with a CTC head",
        ),
        (
            {"training": TrainingConfig(guided_frames=1.0), "model": ModelConfig(ctc_layer=0)},
            {"training": TrainingConfig(guided_frames=1.0)},
            "training.guided_frames needs a model with a CTC head",
        ),
        (
            {"decoding": DecodingConfig(ctc_weight=0.5), "model": ModelConfig(ctc_layer=0)},
            {"decoding": DecodingConfig(ctc_weight=0.5)},
            "decoding.ctc_weight needs a model with a CTC head",
        ),
        (
            {"training": TrainingConfig(restarts=(20, 40))},
            {"training": TrainingConfig(restarts=(20, 40), schedule="plateau")},
            "training.restarts needs training.schedule cosine",
        ),
        (
            {"training": TrainingConfig(restarts=(59,))},
            {"training": TrainingConfig(restarts=(60,))},
            "training.restarts must increase and stay below training.epochs",
        ),
        (
            {"training": TrainingConfig(restarts=(4, 5))},
            {"training": TrainingConfig(restarts=(5, 5))},
            "training.restarts must increase",
        ),
        (
            {"training": TrainingConfig(teacher_forcing=(TeacherForcingStage(2, 2, 1, 1),))},
            {
                "training": TrainingConfig(
                    teacher_forcing=(TeacherForcingStage(0, 9, 1, 1), TeacherForcingStage(2, 1, 1, 1))
                )
            },
            "teacher_forcing: a stage must not end before it starts; got 2 to 1",
        ),
    ],
    ids=str,
)
def test_settings_must_be_consistent_and_may_reach_their_limits(good, bad, message):
    assert check(replace(Config(), **good)) == replace(Config(), **good)
    with pytest.raises(InputError, match=message):
        check(replace(Config(), **bad))


def test_bounds_exist_for_every_number_and_nothing_else():
    stages = {f"training.teacher_forcing.{name}" for name in ("start", "end", "first", "last")}
    assert {name for name, *_ in module._numbers(Config())} | {"training.restarts"} == stages | {
        name for name, row in TABLE.items() if isinstance(row, tuple) and len(row) == 3
    }
    values = [value for name, value, *_ in module._numbers(Config()) if name == "model.speller.lstm_sizes"]
    assert values == [512, 256]


def test_the_violated_bound_is_named():
    bounds = {("features.size", 0): "at least 1", ("features.window_ms", 0.0): "more than 0",
            ("training.warmup_steps", -1): "at least 0", ("decoding.length_reward", -2e6): "at least -1e+06",
            ("augment.speed", 1.0): "below 1", ("decoding.length_penalty", 101.0): "at most 100",
            ("training.ctc_until", float("nan")): "a finite number", ("training.warmup_steps", 5): ""}  # fmt: skip
    assert {(name, value): BOUNDS[name].violated(value) for name, value in bounds} == bounds


def test_a_speller_needs_a_cell():
    config = Config()
    speller = replace(config.model.speller, lstm_sizes=())
    with pytest.raises(InputError, match="lstm_sizes must have at least one cell"):
        check(replace(config, model=replace(config.model, speller=speller)))


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean speech13h"):
        load_config("speech14h")


def test_exponents_and_integers_are_read_as_floats_for_float_settings(tmp_path):
    (tmp_path / "c.yaml").write_text("training: {learning_rate: 1e-3, clip_norm: 5}")
    config = load_config(tmp_path / "c.yaml")
    assert config.training.learning_rate == 1e-3 and config.training.clip_norm == 5.0


def test_an_empty_file_means_the_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("")
    assert load_config(tmp_path / "c.yaml") == Config()


def test_a_field_missing_in_old_settings_takes_its_default():
    settings = replace(Config(), decoding=replace(Config().decoding, beam=3))
    tree = to_tree(settings)
    del tree["decoding"]["coverage_weight"], tree["decoding"]["ngram_weight"]
    assert check(from_tree(Config, tree, "old")) == settings


def test_yaml_cannot_build_python_objects(tmp_path):
    (tmp_path / "c.yaml").write_text("training: !!python/object/apply:os.getcwd []")
    with pytest.raises(InputError, match="is not YAML"):
        load_config(tmp_path / "c.yaml")


def read(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    return load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "text,message",
    [
        ("training: {epochs: 1}\ntraining: {seed: 2}", r"training is set twice, in lines 1 and 2; remove one"),
        ("training:\n  epochs: 1\n  seed: 2\n  epochs: 3", r"epochs is set twice, in lines 2 and 4"),
        ("training:\n  epochs: 1\n  'epochs': 3", r"epochs is set twice, in lines 2 and 3"),
        ("training: {epochs: 010}", r"epochs must be int; got 010 \(line 1\); write it in decimal, without a leading"),
        ("training: {epochs: 0x10}", r"epochs must be int; got 0x10 \(line 1\); write it in decimal"),
        ("training: {epochs: 0b1}", r"epochs must be int; got 0b1"),
        ("training: {epochs: 1:30}", r"epochs must be int; got 1:30 \(line 1\); write minutes and hours as one number"),
        ("training:\n  clip_norm: 1:30", r"clip_norm must be float; got 1:30 \(line 2\); write minutes"),
        ("training: {learning_rate: 01e-3}", r"learning_rate must be float; got 01e-3 .* without a leading zero"),
        ("training: {epochs: 1e3}", r"epochs must be int; got 1e3"),
        ("training: {epochs: 2026-11-28}", r"epochs must be int; got 2026-11-28"),
        ("training: {epochs: '3'}", r"epochs must be int; got '3'"),
        ("training: {epochs: }", r"epochs must be int; got None"),
        ("training: {epochs: 1__0}", r"epochs must be int; got 1__0"),
        ("training: {learning_rate: .inf}", r"training.learning_rate must be a finite number"),
        ("training: {learning_rate: .nan}", r"training.learning_rate must be a finite number"),
        ("training: {wandb: maybe}", r"wandb must be bool; got 'maybe'"),
        ("training: {wandb: y}", r"wandb must be bool; got 'y'"),
        ("training: {wandb: 'yes'}", r"wandb must be bool; got 'yes'"),
        ("training: {precision: no}", r"precision must be one of .*; got no"),
        ("data: {dev: [a]}", r"dev must be str; got \['a'\]"),
        ("data: {dev: {a: b}}", r"dev must be str; got \{'a': 'b'\}"),
        ("training:\n\tepochs: 3", r"is not YAML: .*cannot start any token .*line 2"),
        ("training: {epochs: 3", r"is not YAML"),
        ("a: &a [*a]", r"has no setting 'a'"),
        ("data: {train: &a [*a]}", r"train\[0\] must be str; got"),
        ("<<: {training: {epochs: 1}}", r"has no setting '<<'"),
        ("training: !!float 3", r"training must be a mapping of settings; got 3.0"),
        ("training: {epochs: !!int x}", r"is not YAML"),
        ("training: {epochs: !!timestamp x}", r"is not YAML"),
        ("? [a]\n: b", r"is not YAML"),
        ("? {a: 1}\n: b", r"is not YAML"),
        ("1: 2", r"has no setting '1'"),
        ("- a", r"must be a mapping of settings; got \['a'\]"),
        ("false", r"must be a mapping of settings; got false"),
        ("training: {epochs: 3}\n---\ntraining: {epochs: 4}", r"is not YAML: expected a single document"),
        ("training: {epochs: 3\0}", r"is not YAML"),
        ("training: {epochs: " + "9" * 5000 + "}", r"epochs must be int; got '?9+\.\.\.9+"),
        ("[" * 100_000, r"nested too deeply"),
        ("a: " * 3 + "b", r"is not YAML"),
    ],
)
def test_ambiguous_yaml_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, text)
    assert len(str(error.value)) < 600


def test_a_yaml_bomb_is_refused_at_once(tmp_path):
    names = "abcdefghijklmnopqrstuvwxyz"
    lists = "".join(f"  - &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip(names, names[1:], strict=False))
    with pytest.raises(InputError, match=r"train\[0\] must be str"):
        read(tmp_path, f"data:\n train:\n  - &a [{', '.join(['x'] * 10)}]\n{lists}")


@pytest.mark.parametrize(
    "text,name,value",
    [
        ("data: {dev: no}", "data.dev", "no"),
        ("data: {dev: 460}", "data.dev", "460"),
        ("data: {dev: 010}", "data.dev", "010"),
        ("data: {dev: 2026-11-28}", "data.dev", "2026-11-28"),
        ("data: {dev: 1:30}", "data.dev", "1:30"),
        ("data: {dev: 'x'}", "data.dev", "x"),
        ("data: {train: [on, 1.0, off]}", "data.train", ("on", "1.0", "off")),
        ("data: {normalise_text: yes}", "data.normalise_text", True),
        ("data: {normalise_text: Off}", "data.normalise_text", False),
        ("data: {normalise_text: TRUE}", "data.normalise_text", True),
        ("data: {frames_per_batch: 20_000}", "data.frames_per_batch", 20000),
        ("model: {ctc_layer: -1}", "model.ctc_layer", -1),
        ("training: {learning_rate: 1e-3}", "training.learning_rate", 1e-3),
        ("training: {learning_rate: .5}", "training.learning_rate", 0.5),
        ("training: {clip_norm: 5}", "training.clip_norm", 5.0),
        ("training:\n# all of it commented out\n", "training", Config().training),
        ("training: &t\n  epochs: 3\n", "training.epochs", 3),
        ("\ufefftraining: {epochs: 3}", "training.epochs", 3),
        ("training: {epochs: 3}\r\n", "training.epochs", 3),
        ("--- # settings\ntraining: {epochs: 3}\n...\n", "training.epochs", 3),
    ],
)
def test_yaml_is_read_by_the_type_of_the_setting(tmp_path, text, name, value):
    actual = attrgetter(name)(read(tmp_path, text))
    assert actual == value and type(actual) is type(value)


def test_settings_with_any_text_survive_a_round_trip():
    for text in ("no", "010", "1:30", "null", "~", "", "2026-11-28", "1e3", "a: b", "# x", "é", "\t", "- x", "'"):
        config = replace(Config(), data=replace(Config().data, dev=text, cache=text, train=(text, "x")))
        assert from_yaml(to_yaml(config), "test") == config


@pytest.mark.parametrize("end,advice", [("", "did you mean an4"), (".yaml", "give .*an44.yaml")])
def test_a_missing_settings_file_is_answered_with_the_nearest(tmp_path, monkeypatch, end, advice):
    monkeypatch.chdir(tmp_path)
    if end:
        (tmp_path / "an44.yaml").touch()
    with pytest.raises(InputError, match=f"--config an44: no such preset or file; {advice}"):
        load_config("an44")


def test_a_folder_as_settings_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder; give a YAML file in it, or a preset"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(InputError, match=f"is a folder; give {tmp_path}/config.yaml"):
        load_config(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfet\0", b"training: \xe9", b"PK\x03\x04\x14\0\0\0\x89"])
def test_a_binary_settings_file_is_a_one_sentence_error(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(InputError, match="c.yaml is not YAML"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENAMETOOLONG])
def test_an_unreadable_settings_file_is_a_one_sentence_error(tmp_path, monkeypatch, number):
    def read_text(self, encoding):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(
        InputError, match=rf"--config .*c.yaml cannot be read \({os.strerror(number)}\); give a readable file"
    ):
        load_config(tmp_path / "c.yaml")


def test_settings_may_come_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("training: {epochs: 3}"))
    writer.start()
    assert load_config(tmp_path / "pipe").training.epochs == 3
    writer.join()


@pytest.mark.parametrize(
    "name", ["decoding.beam", "data.workers", "data.frames_per_batch", "data.utterances_per_batch", "features.mel_bins",
             "decoding.frames_per_batch", "training.threads", "training.pictures"]
)  # fmt: skip
def test_sizes_have_a_limit(name):
    limit = BOUNDS[name].at_most
    check(with_setting(name, limit))
    with pytest.raises(InputError, match=f"settings: {name} must be at most [0-9e+]+; got {limit + 1}"):
        check(with_setting(name, limit + 1))


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (
            {"augment": AugmentConfig(join=0.5)},
            {"augment": AugmentConfig(join=0.5), "data": DataConfig(characters="AB")},
            "augment.join joins transcripts by a space, which data.characters lacks",
        ),
        (
            {"training": TrainingConfig(ctc_weight=1.0, guided_frames=8.0), "model": ModelConfig(ctc_layer=0)},
            {"training": TrainingConfig(guided_frames=8.0, guided_weight=1.0), "model": ModelConfig(ctc_layer=0)},
            "training.guided_frames follows the CTC head, which training.ctc_weight 0 does not train; raise",
        ),
    ],
)
def test_what_a_training_cannot_do_is_refused_but_not_in_a_checkpoint(good, bad, message):
    assert check_training(Config(**good)) == Config(**good)
    assert check(Config(**bad)) == Config(**bad)
    with pytest.raises(InputError, match=message):
        check_training(Config(**bad))
