"""Settings that follow the data and the initial checkpoint, and launchers that a training refuses."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_checkpoints import MODEL, make_checkpoint
from tiny_corpora import EDITIONS, make_archive, make_librispeech

from las_fast import lm, train
from las_fast.config import (
    Config,
    DataConfig,
    DecodingConfig,
    FeatureConfig,
    TrainingConfig,
    load_config,
    load_settings,
    to_yaml,
)
from las_fast.data.hw4p2 import FEATURE_FOLDERS
from las_fast.data.layouts import open_corpus
from las_fast.errors import InputError
from las_fast.search.ngram import load_lm, save_lm
from las_fast.training import adapt

TINY = ["--model.listener.conv-channels", "4", "--model.listener.lstm-size", "4", "--model.speller.key-size", "4",
        "--model.speller.value-size", "4", "--model.speller.embedding-size", "4", "--model.speller.lstm-sizes", "4",
        "--training.precision", "fp32", "--training.pictures", "0", "--data.workers", "0",
        "--training.epochs", "1"]  # fmt: skip


def arguments(config, data, out, *more):
    return ["--config", str(config), "--data", str(data), "--out", str(out), "--device", "cpu", *more]


def options_of(*argv):
    return train.parse(arguments("hw4p2", "here", "run", *argv))


# ----------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("edition", EDITIONS)
def test_the_size_and_kind_of_features_follow_every_edition(tmp_path, edition):
    corpus = open_corpus(make_archive(tmp_path, edition, utterances=2))
    features = adapt.adapt_features(load_config("hw4p2"), corpus, ()).features
    layout = EDITIONS[edition]
    assert (features.size, features.kind) == (layout.size, FEATURE_FOLDERS[layout.features])


def test_features_that_the_user_has_set_do_not_follow_the_data(tmp_path, capsys):
    corpus = open_corpus(make_archive(tmp_path, "S25", utterances=2))
    config = load_config("hw4p2")
    assert adapt.adapt_features(config, corpus, {"features.size", "features.kind"}) == config
    assert capsys.readouterr().out == ""
    assert adapt.adapt_features(config, corpus, {"features.size"}).features == replace(config.features, kind="logmel")
    assert capsys.readouterr().out.startswith("features: 28 logmel values per frame, as in the data (the settings say")
    audio = open_corpus(make_librispeech(tmp_path / "audio"))
    assert adapt.adapt_features(config, audio, ()) == config


def test_s25_trains_with_the_preset_of_another_edition(tmp_path, capsys):
    archive = make_archive(tmp_path, "S25", utterances=2)
    train.main(arguments("hw4p2", archive, tmp_path / "run", "--training.epochs", "1", *TINY))
    assert "features: 80 logmel values per frame, as in the data" in capsys.readouterr().out
    config = load_config(tmp_path / "run" / "config.yaml")
    assert config.features == replace(load_config("hw4p2").features, size=80, kind="logmel")


def test_the_settings_are_checked_again_with_the_features_of_the_archive(tmp_path):
    archive = make_archive(tmp_path, "S24", utterances=2)  # 27 MFCC; the preset has 13 of 23 mel filters
    with pytest.raises(InputError, match=r"augment.warp needs features.mel_bins \(23\) of at least .*size \(27\)"):
        train.main(arguments("an4", archive, tmp_path / "run", "--augment.warp", "0.1"))
    assert not (tmp_path / "run").exists()


def test_the_warp_of_a_preset_is_off_for_more_mfcc_than_mel_filters(tmp_path, capsys):
    archive = open_corpus(make_archive(tmp_path, "S24", utterances=2))
    config = adapt.adapt_features(load_config("an4"), archive, ())
    capsys.readouterr()
    assert adapt.adapt_augment(config, archive, ()).augment == replace(config.augment, warp=0.0)
    message = "augment.warp: 0, because the archive has 27 MFCC, and features.mel_bins is below that\n"
    assert capsys.readouterr().out == message
    assert adapt.adapt_augment(config, archive, {"features.mel_bins"}) == config


def test_what_needs_recordings_is_off_for_an_archive(tmp_path, capsys):
    archive = open_corpus(make_archive(tmp_path, "S25", utterances=2))
    config = load_config("english")
    off = dict.fromkeys(("silence", "room", "noise", "babble", "band_limit"), 0.0)
    assert adapt.adapt_augment(config, archive, ()).augment == replace(config.augment, **off)
    message = "augment: silence, noise, babble, room, band_limit need recordings, so they are 0 for this archive"
    assert sorted(capsys.readouterr().out) == sorted(f"{message} of features\n")
    kept = adapt.adapt_augment(config, archive, {"augment.noise"})
    assert kept.augment == replace(config.augment, **(off | {"noise": config.augment.noise}))
    audio = open_corpus(make_librispeech(tmp_path / "audio"))
    capsys.readouterr()
    for unchanged, corpus in ((config, audio), (load_config("an4"), archive)):
        assert adapt.adapt_augment(unchanged, corpus, ()) == unchanged
    assert capsys.readouterr().out == ""


def test_an_archive_trains_with_a_preset_for_recordings(tmp_path, capsys):
    archive = make_archive(tmp_path, "S25", utterances=2)
    extra = ["--model.ctc-layer", "1", "--model.inner-ctc-layer", "0", "--data.shared-texts", "keep"]
    train.main(arguments("english", archive, tmp_path / "run", *TINY, "--model.listener.conv-kernels", "3",
                         "--model.listener.conv-strides", "1", "--model.listener.top-layers", "1", *extra))  # fmt: skip
    assert "need recordings" in capsys.readouterr().out
    with pytest.raises(
        InputError, match="augment.noise: frames must be log-mel, computed from recordings; got an arch"
    ):
        train.main(arguments("hw4p2", archive, tmp_path / "other", "--augment.noise", "0.5"))


def test_a_warp_says_what_it_takes_the_archive_for(capsys):
    warped = load_config("an4")
    config = replace(warped, augment=replace(warped.augment, warp=0.0))
    logmel = replace(warped, features=replace(warped.features, kind="logmel"))
    for unconcerned, kind in ((config, "features"), (warped, "audio"), (logmel, "features")):
        adapt.describe_warp(unconcerned, kind)
        assert capsys.readouterr().out == ""
    adapt.describe_warp(warped, "features")
    message = "augment.warp: assumes MFCC of 23 mel filters with a lifter of 0 (0: none); if that is wrong, set "
    assert capsys.readouterr().out.startswith(message)


def test_a_training_with_another_feature_kind_of_the_same_archive_resumes(tmp_path, capsys):
    archive, out = make_archive(tmp_path, "S25", utterances=2), tmp_path / "run"
    train.main(arguments("hw4p2", archive, out, *TINY, "--features.size", "80", "--features.kind", "mfcc"))
    train.main(arguments("hw4p2", archive, out, *TINY, "--features.size", "80", "--resume"))
    assert "this training is complete" in capsys.readouterr().out


def test_settings_of_a_file_and_of_options_count_as_set_by_the_user(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("features: {size: 40}\ntraining:\n  epochs: 7\ndata:\n")
    assert load_settings(file)[1] == {"features.size", "training.epochs"}
    assert load_settings("hw4p2")[1] == frozenset()
    assert options_of("--training.seed", "3", "--data.max_seconds=2")[0].user_set == {
        "training.seed",
        "data.max_seconds",
    }
    options, _ = train.parse(arguments(file, "here", "run", "--training.seed", "3"))
    assert options.user_set == {"features.size", "training.epochs", "training.seed"}


def test_a_file_over_a_base_changes_only_what_it_names(tmp_path):
    base = Config(features=FeatureConfig(size=13), training=TrainingConfig(restarts=(3,), learning_rate=0.5))
    file = tmp_path / "mine.yaml"
    file.write_text("training: {restarts: [], epochs: 9, teacher_forcing: [{start: 0, end: 1, first: 1, last: 0.5}]}")
    config, _ = load_settings(file, base)
    changed = replace(config.training, restarts=(3,), epochs=60, teacher_forcing=TrainingConfig().teacher_forcing)
    assert replace(config, training=changed) == base
    assert (config.training.restarts, config.training.epochs) == ((), 9)
    assert config.training.teacher_forcing[0].last == 0.5


# ----------------------------------------------------------------------------------------------------- epochs, splits


@pytest.mark.parametrize(
    ("argv", "restarts", "printed"),
    [
        (["60"], (40,), ""),
        (["41"], (40,), ""),
        (["40"], (), "restarts: dropped at epoch 40, because the training ends at epoch 40\n"),
        (["3"], (), "restarts: dropped at epoch 40, because the training ends at epoch 3\n"),
        (["3", "--training.restarts", "1", "2"], (1, 2), ""),
    ],
)
def test_fewer_epochs_drop_the_restarts_of_a_preset(argv, restarts, printed, capsys):
    _, config = train.parse(arguments("speech13h", "here", "run", "--training.epochs", *argv))
    assert config.training.restarts == restarts and capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("argv", "splice"), [(["41"], 0.5), (["40"], 0.0), (["9", "--augment.splice-epoch", "5"], 0.5)]
)
def test_fewer_epochs_drop_the_splice_of_a_preset(argv, splice, capsys):
    _, config = train.parse(arguments("an4", "here", "run", "--training.epochs", *argv))
    printed = "augment.splice: 0, because the training ends at epoch 40, before epoch 40\n"
    assert config.augment.splice == splice and capsys.readouterr().out == ("" if splice else printed)


def test_a_splice_that_was_given_past_the_end_is_an_error():
    with pytest.raises(InputError, match=r"splice_epoch must be below training.epochs \(3\); got 40; lower it, or set"):
        train.parse(arguments("an4", "here", "run", "--training.epochs", "3", "--augment.splice", "0.5"))


def test_restarts_that_were_given_past_the_end_are_an_error():
    with pytest.raises(InputError, match="training.restarts must increase and stay below training.epochs"):
        train.parse(arguments("speech13h", "here", "run", "--training.epochs", "3", "--training.restarts", "3"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("data"), "F23", utterances=2)


@pytest.mark.parametrize("below", ["train-clean-100", "train-clean-100/mfcc", "train-clean-100/"])
def test_the_split_that_data_names_is_trained_alone(archive, capsys, below):
    corpus = open_corpus(f"{archive}/{below}")
    assert (corpus.root, corpus.named_split) == (archive, "train-clean-100")
    assert adapt.training_splits(Config(), corpus) == ("train-clean-100",)
    assert capsys.readouterr().out == (
        f"training on train-clean-100 only, which --data names; for train-clean-360 as well, give {archive}\n"
    )


@pytest.mark.parametrize("root", ["", "."])
def test_an_archive_trains_all_its_splits(archive, capsys, root):
    corpus = open_corpus(archive / root)
    assert adapt.training_splits(Config(), corpus) == ("train-clean-100", "train-clean-360") and not corpus.named_split
    assert capsys.readouterr().out == ""


def test_a_named_split_that_is_not_trained_on_is_printed(archive, capsys):
    both = ("train-clean-100", "train-clean-360")
    assert adapt.training_splits(Config(), open_corpus(archive / "dev-clean")) == both
    assert capsys.readouterr().out == (
        f"training on {'+'.join(both)} of {archive}, not on dev-clean, which --data names: dev-clean is not for "
        "training\n"
    )
    config = replace(Config(), data=replace(Config().data, train=("train-clean-360",)))
    assert adapt.training_splits(config, open_corpus(archive / "train-clean-100")) == ("train-clean-360",)
    assert capsys.readouterr().out.endswith("not on train-clean-100, which --data names: data.train is set\n")
    assert adapt.training_splits(config, open_corpus(archive / "train-clean-360")) == ("train-clean-360",)
    assert capsys.readouterr().out == ""


def test_a_split_of_recordings_may_be_named_too(tmp_path):
    make_librispeech(tmp_path)
    corpus = open_corpus(tmp_path / "LibriSpeech" / "train-clean-360")
    assert adapt.training_splits(Config(), corpus) == ("train-clean-360",)


def test_the_error_for_a_missing_dev_split_says_how_to_hold_one_out(tmp_path):
    corpus = open_corpus(make_librispeech(tmp_path, splits=("train-clean-100",)))
    with pytest.raises(InputError, match=r"has no split 'dev'; it has .*, or hold out .*: --data.dev-share 0.1$"):
        adapt.dev_splits(Config(), corpus)
    config = replace(Config(), data=replace(Config().data, dev="dev-x"))
    with pytest.raises(InputError, match="has no split 'dev-x'") as error:
        adapt.dev_splits(config, corpus)
    assert "dev-share" not in str(error.value)


def test_a_share_of_the_training_data_serves_as_dev(tmp_path, capsys):
    root = make_librispeech(tmp_path, splits=("train-clean-100",), utterances=6)
    train.main(arguments("librispeech100", root, tmp_path / "run", "--data.dev", "", "--data.dev-share", "0.3", *TINY,
                         "--data.cache", str(tmp_path / "cache")))  # fmt: skip
    out = capsys.readouterr().out
    assert "train-clean-100: 8 utterances" in out and "dev, held out of train-clean-100: 4 utterances" in out
    assert "epoch 1: dev loss" in out and "--split SPLIT --out SPLIT.csv" in out


def test_a_dev_split_and_a_share_exclude_each_other():
    with pytest.raises(InputError, match="data.dev names a dev split and data.dev_share holds one out"):
        options_of("--data.dev", "dev-clean", "--data.dev-share", "0.1")


# ---------------------------------------------------------------------------------------------------------- fine-tune


@pytest.fixture
def parent(tmp_path):
    """A checkpoint with a language model."""
    sections = {"decoding": DecodingConfig(beam=3, ngram_weight=0.2), "training": TrainingConfig(restarts=(40,))}
    path = make_checkpoint(tmp_path, sections=sections | {"model": MODEL})
    save_lm(path.with_suffix(".lm.safetensors"), lm.train(["AB", "BA"], order=2))
    return path


def test_the_finetune_preset_takes_all_else_from_the_checkpoint(parent):
    options, config = train.parse(arguments("finetune", "here", "run", "--init", str(parent)))
    assert config.decoding == DecodingConfig(beam=3, ngram_weight=0.2) and config.model == MODEL
    assert config.features == FeatureConfig(kind="mfcc", size=28) and config.training.restarts == ()
    assert config.training.validate_first and config.data.normalise_text
    assert options.user_set >= {"features.size", "features.kind"}
    with pytest.raises(InputError, match="--config finetune needs --init, the model to start from"):
        train.parse(arguments("finetune", "here", "run"))
    with pytest.raises(InputError, match="the name of the checkpoint is empty"):
        train.parse(arguments("finetune", "here", "run", "--init", ""))


def test_fine_tuning_does_not_choose_data_as_the_checkpoint_did(tmp_path):
    data = DataConfig(shared_texts="drop", dev_share=0.2, train=("mine",), dev="")
    path = make_checkpoint(tmp_path, sections={"data": data, "model": MODEL})
    _, config = train.parse(arguments("finetune", "here", "run", "--init", str(path)))
    assert (config.data.shared_texts, config.data.dev_share, config.data.train) == ("keep", 0.0, ())


def test_a_resumed_fine_tuning_has_the_settings_of_its_run(tmp_path, parent):
    run = tmp_path / "run"
    run.mkdir()
    begun = replace(train.parse(arguments("finetune", "here", run, "--init", str(parent)))[1], model=replace(MODEL))
    begun = replace(begun, decoding=DecodingConfig(beam=5))
    (run / "config.yaml").write_text(to_yaml(begun))
    for more in (["--init", str(parent)], ["--init", "gone"], []):
        assert train.parse(arguments("finetune", "here", run, "--resume", *more))[1] == begun
    assert train.parse(arguments("finetune", "here", run, "--init", str(parent)))[1].decoding.beam == 3


@pytest.mark.parametrize(
    ("listener", "message"),
    [
        ({"pyramids": 2}, "model.listener.pyramids 1, not 2"),
        ({"top_layers": 0}, "model.listener.top_layers 1, not 0"),
    ],
)
def test_a_checkpoint_with_layers_that_the_settings_have_not_is_refused(tmp_path, archive, listener, message):
    from las_fast.checkpoint import load_model

    given = replace(MODEL, listener=replace(MODEL.listener, pyramids=1, top_layers=1))
    init = load_model(make_checkpoint(tmp_path, sections={"model": given}))
    config = replace(init.config, model=replace(given, listener=replace(given.listener, **listener)))
    with pytest.raises(InputError, match=f"was trained with {message}; give --config finetune, which takes"):
        adapt.check_init(init, config, open_corpus(archive))
    deeper = replace(given, listener=replace(given.listener, top_layers=2))
    adapt.check_init(init, replace(init.config, model=deeper), open_corpus(archive))


def test_fine_tuning_keeps_the_language_model_and_validates_the_start(archive, parent, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(arguments("finetune", archive, out, "--init", str(parent), "--training.epochs", "1", "--data.workers",
                         "0", "--training.pictures", "0", "--training.precision", "fp32"))  # fmt: skip
    printed = capsys.readouterr().out
    assert "epoch 0: dev loss" in printed and "epoch 1: dev loss" in printed
    assert f"language model: that of {parent.stem}, copied to {out}/best.lm.safetensors" in printed
    for name in ("best", "averaged"):
        assert load_lm(out / f"{name}.lm.safetensors").order == 2
    assert load_config(out / "config.yaml").decoding.ngram_weight == 0.2


def test_another_language_model_in_the_folder_is_not_replaced(parent, tmp_path):
    from las_fast.checkpoint import load_model

    init = load_model(parent)
    own = tmp_path / "best.lm.safetensors"
    adapt.inherit_lm(init, init.config, tmp_path)
    adapt.inherit_lm(init, init.config, tmp_path)  # of a training that was stopped before its first save
    own.write_bytes(b"mine")
    with pytest.raises(InputError, match="best.lm.safetensors is not the language model of .*; move it away"):
        adapt.inherit_lm(init, init.config, tmp_path)
    assert own.read_bytes() == b"mine"


def test_fine_tuning_uses_the_threads_of_the_machine():
    parent = replace(Config(), training=replace(Config().training, threads=1))
    settings, _ = load_settings("finetune", parent)
    assert settings.training.threads == 0


def test_a_language_model_without_a_weight_is_not_copied(parent, tmp_path):
    from las_fast.checkpoint import load_model

    adapt.inherit_lm(load_model(parent), Config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_other_features_names_what_to_give(archive, tmp_path, parent):
    other = make_archive(tmp_path, "S25", utterances=2)
    with pytest.raises(InputError, match="was trained on 28 features per frame, but HW4P2 S25/F25 has 80; give data"):
        train.main(arguments("finetune", other, tmp_path / "run", "--init", str(parent)))
    with pytest.raises(InputError, match="was trained with features.deltas 0, not 1; give --config finetune"):
        train.main(arguments("tiny", archive, tmp_path / "run", "--init", str(parent), "--features.deltas", "1"))


def test_the_frame_shift_may_differ_from_that_of_the_initial_checkpoint(parent, capsys):
    from las_fast.checkpoint import load_model

    init = load_model(parent)
    recordings = SimpleNamespace(feature_size=None, name="recordings")
    shorter = replace(init.config, features=replace(init.config.features, shift_ms=8.0))
    adapt.check_init(init, shorter, recordings)
    assert capsys.readouterr().out == f"features.shift_ms: 8, but --init {init.path} was trained with 10\n"
    adapt.check_init(init, init.config, recordings)
    assert not capsys.readouterr().out
    wider = replace(init.config, features=replace(init.config.features, window_ms=32.0))
    with pytest.raises(InputError, match="was trained with features.window_ms 25.0, not 32.0"):
        adapt.check_init(init, wider, recordings)


# ------------------------------------------------------------------------------------------------- launchers, packages


def test_a_launcher_of_several_processes_is_refused(monkeypatch):
    for count in ("", "x", "0", "1"):
        monkeypatch.setenv("WORLD_SIZE", count)
        adapt.check_one_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="has started 2 processes, but a training is one process on one device"):
        adapt.check_one_process()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        adapt.check_one_process()
    assert end.value.code == 2


@pytest.mark.parametrize(("name", "count", "rank"), adapt.LAUNCHERS)
def test_every_launcher_is_named(monkeypatch, name, count, rank):
    monkeypatch.setenv(count, "3")
    monkeypatch.setenv(rank, "0")
    with pytest.raises(InputError, match=f"^{name} .* has started 3 processes"):
        adapt.check_one_process()


def test_a_missing_package_is_named_before_the_data_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(adapt, "is_installed", lambda name: False)
    with pytest.raises(InputError, match="--training.wandb needs the package wandb; run: pip install wandb"):
        train.main(arguments("tiny", tmp_path / "nowhere", tmp_path / "run", "--training.wandb", "True"))


def test_help_does_not_import_torch():
    code = "import sys, las_fast.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(train.__file__).parents[1]).returncode == 0
