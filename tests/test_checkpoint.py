"""Checkpoints: no pickle, no partial files, no silent mismatch."""

import pickle
import re
import shutil
import warnings
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import las_fast
from las_fast import attention, transcribe
from las_fast.checkpoint import (
    build_model,
    default_model,
    find_checkpoint,
    load_model,
    load_state,
    save_model,
    save_state,
)
from las_fast.cli import plain_warnings
from las_fast.config import Config, FeatureConfig, ListenerConfig, ModelConfig, SpellerConfig, load_config
from las_fast.data.normalisation import Statistics
from las_fast.errors import FormerNameWarning, HiddenModelWarning, InputError
from las_fast.search.ngram import find_lm, load_ngram_model, with_default_weight

CONFIG = Config(
    features=FeatureConfig(size=5, normalisation="global"),
    model=ModelConfig(
        listener=ListenerConfig(conv_channels=(4,), lstm_size=3, pyramids=1),
        speller=SpellerConfig(key_size=4, value_size=4, embedding_size=4, lstm_sizes=(5,)),
    ),
)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model, path = build_model(CONFIG), tmp_path / "best.safetensors"
    save_model(path, model.state_dict(), CONFIG, Statistics(torch.arange(5.0), torch.ones(5)), {"epoch": 3})
    return model, path


def test_a_model_is_loaded_with_settings_statistics_and_scores(saved):
    model, path = saved
    loaded = load_model(path.parent)
    assert loaded.config == CONFIG and loaded.info == {"epoch": 3}
    assert loaded.statistics.mean.tolist() == [0, 1, 2, 3, 4]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)


def test_a_missing_checkpoint_is_an_error_and_never_random_weights(tmp_path):
    with pytest.raises(InputError, match="neither a run folder nor a file"):
        load_model(tmp_path / "nothing")
    with pytest.raises(InputError, match="has no best.safetensors; train it first"):
        find_checkpoint(tmp_path)


def test_without_released_models_the_error_names_none(tmp_path, monkeypatch):
    monkeypatch.setattr("las_fast.checkpoint.RELEASED", tmp_path)
    with pytest.raises(InputError) as caught:
        find_checkpoint("gone")
    assert str(caught.value).startswith("checkpoint gone is neither a run folder nor a file")
    assert "released" not in str(caught.value)


def test_the_resume_file_is_not_mistaken_for_weights(tmp_path):
    save_state(tmp_path / "last.pt", {"x": torch.zeros(3)})
    with pytest.raises(InputError, match="is a training state, for --resume; to decode, give the folder"):
        load_model(tmp_path / "last.pt")


def test_weights_have_the_default_file_permissions(saved):
    (saved[1].parent / "plain").write_text("")
    assert saved[1].stat().st_mode == (saved[1].parent / "plain").stat().st_mode


@pytest.mark.parametrize(
    "name,advice",
    [
        ("an5", "; the nearest is an4"),
        ("runs/beste.safetensors", "; the nearest is {}/runs/best.safetensors"),
        ("runs/x/y", "; {}/runs exists, but has no x"),
        ("runz", "; the nearest is {}/runs"),
        ("nosuch", "; released models: an4, english"),
        ("nosuch.safetensors", "; released models: an4, english"),
        ("speech13", "; the nearest is english"),
    ],
)
def test_a_missing_checkpoint_has_a_hint_to_the_nearest(tmp_path, monkeypatch, name, advice):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "best.safetensors").touch()
    (tmp_path / "nosuchdir").mkdir()
    for other in ("env.sh", "nosuch.safetensors.txt"):
        (tmp_path / other).touch()
    with pytest.raises(InputError, match=re.escape(advice.format(tmp_path)) + "$"):
        find_checkpoint(name)


def test_a_former_name_gives_the_newer_model_and_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(
        FormerNameWarning, match="speech13h was replaced by english, which gives other texts; give english"
    ):
        assert find_checkpoint("speech13h") == find_checkpoint("english")
    with pytest.warns(FormerNameWarning):
        assert find_lm("speech13h", Path("none")) == find_lm("english", Path("none"))
    Path("speech13h").touch()  # a file of that name comes first
    assert find_checkpoint("speech13h") == Path("speech13h") and find_lm("speech13h", Path("none")) == Path("speech13h")


def test_tilde_is_the_home_folder_in_names_of_models_and_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.safetensors", "b.lm.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "c.yaml").write_text("training: {epochs: 3}")
    assert find_checkpoint("~/a.safetensors") == tmp_path / "a.safetensors"
    assert find_lm("~/b.lm.safetensors", Path("none")) == tmp_path / "b.lm.safetensors"
    assert load_config("~/c.yaml").training.epochs == 3


def test_an_empty_name_of_a_language_model_is_not_none():
    """As of a shell variable that is not set."""
    loaded = load_model("an4")
    decoding = with_default_weight(loaded, "")
    assert decoding.ngram_weight and not loaded.config.decoding.ngram_weight
    with pytest.raises(InputError, match="^--lm is empty; give a file or the name of a released model$"):
        load_ngram_model("", decoding, loaded, "cpu")


def test_a_folder_without_a_checkpoint_does_not_hide_a_released_model(tmp_path, monkeypatch):
    """People keep the data of AN4 in a folder named an4."""
    released = find_checkpoint("an4")
    monkeypatch.chdir(tmp_path)
    for name in ("an4", "speech13h"):
        Path(name).mkdir()
    assert find_checkpoint("an4") == released
    with pytest.warns(FormerNameWarning):
        assert find_checkpoint("speech13h") == find_checkpoint("english")
    for name in ("an4", "speech13h"):
        Path(name, "best.safetensors").touch()  # a run folder of that name comes first
    assert find_checkpoint("speech13h") == Path("speech13h", "best.safetensors")
    hidden = re.escape(f"an4 is {tmp_path}/an4/best.safetensors, not the released model; give ./an4 to use it without")
    with pytest.warns(HiddenModelWarning, match=hidden):
        assert find_checkpoint("an4") == Path("an4", "best.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_checkpoint("./an4") == Path("an4", "best.safetensors")


def test_a_former_name_without_its_successor_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr("las_fast.checkpoint.RELEASED", tmp_path)
    with pytest.raises(InputError, match="checkpoint speech13h is neither a run folder nor a file$"):
        find_checkpoint("speech13h")


def test_the_warning_of_a_former_name_is_about_the_callers_line():
    with pytest.warns(FormerNameWarning) as caught:
        las_fast.load("speech13h", device="cpu")
    assert [warning.filename for warning in caught] == [__file__]


def test_a_command_prints_the_warning_of_a_former_name_once_in_one_line(capsys):
    with warnings.catch_warnings(), plain_warnings():
        warnings.simplefilter("always")  # as from two places in the code
        find_checkpoint("speech13h")
        find_checkpoint("speech13h")
    assert capsys.readouterr().err == (
        "warning: speech13h was replaced by english, which gives other texts; give english\n"
    )


@pytest.mark.parametrize("load", [load_model, load_state])
def test_a_file_without_read_permission_is_not_called_damaged(saved, monkeypatch, load):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\); check its permissions"):
        load(saved[1])


@pytest.mark.parametrize("info", ["{", "[]", ""])
def test_a_checkpoint_with_damaged_metadata_is_a_one_sentence_error(saved, info):
    with safe_open(saved[1], framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, saved[1], metadata | {"info": info})
    with pytest.raises(InputError, match="is damaged: its training information is not JSON"):
        load_model(saved[1])


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"\xff" * 100, lambda b: b""])
def test_a_corrupt_checkpoint_is_a_one_sentence_error(saved, damage):
    path = saved[1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="best.safetensors is not a readable checkpoint"):
        load_model(path)


def test_a_safetensors_file_of_another_program_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="was not written by las_fast"):
        load_model(tmp_path / "other.safetensors")


def test_weights_of_another_size_are_named(tmp_path):
    weights = build_model(CONFIG).state_dict()
    weights["speller.embedding.weight"] = torch.zeros(31, 9)
    save_model(tmp_path / "m.safetensors", weights, CONFIG, None, {})
    with pytest.raises(InputError, match=r"speller.embedding.weight should be \(31, 4\), but the file has \(31, 9\)"):
        load_model(tmp_path / "m.safetensors")


def test_missing_and_unexpected_weights_are_named(tmp_path):
    weights = build_model(CONFIG).state_dict()
    more = {**weights, "speller.more": torch.zeros(2)}
    del weights["speller.bias"]
    for state, message in ((weights, r"speller.bias should be \(31,\), but the file has none"),
                        (more, r"speller.more should be none, but the file has \(2,\)")):  # fmt: skip
        save_model(tmp_path / "m.safetensors", state, CONFIG, None, {})
        with pytest.raises(InputError, match=message):
            load_model(tmp_path / "m.safetensors")
    first = min(more)  # the first of many
    save_model(tmp_path / "m.safetensors", {"z": torch.zeros(2)}, CONFIG, None, {})
    with pytest.raises(InputError, match=f"{first} should be .*, but the file has none"):
        load_model(tmp_path / "m.safetensors")


def test_a_training_state_with_code_in_it_is_refused(tmp_path):
    class CodeInPickle:
        def __reduce__(self):
            return (print, ("code ran",))

    path = tmp_path / "last.pt"
    torch.save({"model": CodeInPickle()}, path, pickle_module=pickle)
    with pytest.raises(InputError, match="is damaged"):
        load_state(path)


def test_a_truncated_training_state_is_a_one_sentence_error(tmp_path):
    path = tmp_path / "last.pt"
    save_state(path, {"x": torch.zeros(1000)})
    with pytest.raises(InputError, match="was not written by this version"):
        load_state(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="last.pt is damaged"):
        load_state(path)


def test_a_training_state_of_a_gpu_is_read_onto_the_cpu(tmp_path):
    save_state(tmp_path / "cpu.pt", dict.fromkeys(STATE, 0) | {"model": torch.arange(3)})
    with zipfile.ZipFile(tmp_path / "cpu.pt") as cpu, zipfile.ZipFile(tmp_path / "last.pt", "w") as gpu:
        for name in cpu.namelist():
            data = cpu.read(name)  # in a pickle, a text follows its length
            gpu.writestr(name, data.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0"))
    assert b"cuda:0" in (tmp_path / "last.pt").read_bytes()
    model = load_state(tmp_path / "last.pt")["model"]
    assert model.device.type == "cpu" and model.tolist() == [0, 1, 2]


STATE = ["settings", "model", "averaged", "optimiser", "scaler", "progress", "core_seconds", "data"]


@pytest.mark.parametrize("missing", STATE)
def test_a_training_state_without_one_of_its_parts_is_refused(tmp_path, missing):
    save_state(tmp_path / "last.pt", dict.fromkeys(STATE, 0))
    load_state(tmp_path / "last.pt")
    save_state(tmp_path / "last.pt", dict.fromkeys(set(STATE) - {missing}, 0))
    with pytest.raises(InputError, match="was not written by this version"):
        load_state(tmp_path / "last.pt")


@pytest.mark.parametrize("missing", ["format", "config", "info"])
def test_weights_without_their_settings_are_refused(tmp_path, missing):
    metadata = {"format": "las_fast 1", "config": "{}", "info": "{}"}
    del metadata[missing]
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors", metadata)
    with pytest.raises(InputError, match="was not written by las_fast"):
        load_model(tmp_path / "other.safetensors")


def test_a_run_folder_does_not_hide_the_default_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("english").mkdir()
    Path("english", "best.safetensors").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(default_model()).name == "english"


def test_the_default_model_is_english_or_the_only_one(tmp_path, monkeypatch):
    monkeypatch.setattr("las_fast.checkpoint.RELEASED", tmp_path)
    with pytest.raises(InputError, match="no released model; give --checkpoint"):
        default_model()
    for name in ("an4", "english"):
        (tmp_path / f"{name}.safetensors").touch()
        assert default_model() == tmp_path / f"{name}.safetensors"


@pytest.mark.parametrize(("file", "name"), [("best.safetensors", "mine"), ("averaged.safetensors", "mine"),
                                             ("a.b.safetensors", "a.b")])  # fmt: skip
def test_a_model_is_named_after_its_file_or_its_run_folder(saved, tmp_path, monkeypatch, file, name):
    (tmp_path / "mine").mkdir()
    shutil.copy(saved[1], tmp_path / "mine" / file)
    monkeypatch.chdir(tmp_path / "mine")
    assert load_model(file).name == name and f"Recogniser {name} on" in repr(las_fast.load(file, device="cpu"))


@pytest.mark.parametrize("tensors", [{"mean": torch.zeros(28)}, {"mean": torch.zeros(27), "std": torch.ones(27)}])
def test_statistics_that_are_incomplete_or_of_another_size_are_refused(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    config = Config(features=FeatureConfig(size=28))
    save_model(path, build_model(config).state_dict(), config, None, {})
    with safe_open(path, "pt") as file:
        whole = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file(whole | {f"statistics.{name}": value for name, value in tensors.items()}, path, metadata)
    with pytest.raises(InputError, match="is damaged: it has no mean and deviation of its 28 features"):
        load_model(path)


def test_an_empty_name_is_no_checkpoint(tmp_path):
    recording = tmp_path / "x.wav"
    recording.touch()
    commands = [partial(command.main, [str(recording), "--checkpoint", ""]) for command in (transcribe, attention)]
    for load in (partial(load_model, ""), *commands):
        with pytest.raises(InputError, match="the name of the checkpoint is empty"):
            load()
