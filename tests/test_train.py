"""Training end to end: exact resume, validation of the whole dev set, and files that are complete or absent."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from las_fast import checkpoint, train
from las_fast.config import Config, ListenerConfig, ModelConfig, load_config
from las_fast.data import splice
from las_fast.data.layouts import open_corpus
from las_fast.errors import InputError
from las_fast.files import lock_folder
from las_fast.model.attention import Memory
from las_fast.training import pace as pace_module
from las_fast.training import schedules, step, trainer
from las_fast.training.validate import swap_audio, validate
from tests.tiny_corpora import make_archive

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "model.listener.conv-channels": 8, "model.listener.lstm-size": 6, "model.listener.conv-strides": 1,
    "model.speller.key-size": 6, "model.speller.value-size": 6, "model.speller.embedding-size": 6,
    "model.speller.lstm-sizes": (9, 8), "data.utterances-per-batch": 2, "data.workers": 0, "training.epochs": 3,
    "training.precision": "fp32", "training.warmup-steps": 4, "augment.start-epoch": 0.5, "training.pictures": 1,
    "decoding.maximum-extra": 3,
}  # fmt: skip


COUNTS = {"train-clean-100": 7, "train-clean-360": 4, "dev-clean": 5}
SAMPLED = {
    "training__teacher-forcing.0.end": 0.3,
    "training__teacher-forcing.1.start": 0.3,
    "training__teacher-forcing.1.end": 1.0,
    "training__teacher-forcing.1.last": 0.2,
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("data"), "F23", utterances=COUNTS)


def arguments(archive, out, *extra, **settings):
    argv = ["--config", "tiny", "--data", str(archive), "--out", str(out)]
    for name, value in (SMALL | {k.replace("__", "."): v for k, v in settings.items()}).items():
        values = value if isinstance(value, tuple) else (value,)
        argv += [f"--{name}", *map(str, values)]
    return [*argv, *extra]


def weights_of(out):
    state = checkpoint.load_state(out / "last.pt")
    return {**state["model"], **{f"averaged.{k}": v for k, v in state["averaged"].items()}}


def assert_same_weights(a, b):
    ours, theirs = weights_of(a), weights_of(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture(scope="module")
def uninterrupted(archive, tmp_path_factory):
    """The run folder of a training that was not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train.main(arguments(archive, out))
    return out


def rows(out, kind):
    return [r for r in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if r["kind"] == kind]


def test_a_training_writes_every_documented_file(uninterrupted):
    names = {p.name for p in uninterrupted.iterdir()}
    assert {"config.yaml", "log.jsonl", "last.pt", "best.safetensors", "averaged.safetensors", "tensorboard"} <= names
    assert list((uninterrupted / "tensorboard").glob("events*"))
    assert (
        len(list((uninterrupted / "attention").glob("*.png")))
        == len(list((uninterrupted / "attention").glob("*.npz")))
        == 3
    )
    assert [n for n in names if n.startswith(".")] == [".lock"], "temporary files"


def test_validation_covers_the_whole_dev_set(uninterrupted):
    assert [r["utterances"] for r in rows(uninterrupted, "valid")] == [5, 5, 5]
    assert all(isinstance(r["line"], str) and "attention" in r["line"] for r in rows(uninterrupted, "valid"))


def test_the_log_has_the_speed_and_the_time_waiting_for_data(uninterrupted):
    rows = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    paces = [(row["speed"], row["waiting"]) for row in rows if row["kind"] == "train"]
    assert paces and all(speed > 0 and 0 <= waiting < 1 for speed, waiting in paces)


def test_loss_falls(archive, tmp_path):
    train.main(arguments(archive, tmp_path, training__epochs=8, training__validate_every=4.0))
    losses = [r["loss"] for r in rows(tmp_path, "valid")]
    assert losses[-1] < losses[0]


def test_a_checkpoint_holds_its_settings_and_scores(uninterrupted):
    loaded = checkpoint.load_model(uninterrupted)
    assert loaded.config.model.listener.lstm_size == 6 and not loaded.model.training
    assert loaded.info["dev"]["utterances"] == 5 and loaded.path.name == "best.safetensors"
    averaged = checkpoint.load_model(uninterrupted / "averaged.safetensors").model.state_dict()
    kept = checkpoint.load_state(uninterrupted / "last.pt")["averaged"]
    assert all(torch.equal(averaged[k], kept[k]) for k in averaged)
    assert not all(
        torch.equal(averaged[k], checkpoint.load_state(uninterrupted / "last.pt")["model"][k]) for k in averaged
    )


def stop_after(monkeypatch, steps):
    """Make the trainer fail in the middle of the step after `steps` steps."""
    take = trainer.Trainer.train_step
    taken = []

    def failing(self, batch):
        if len(taken) == steps:
            raise RuntimeError("power cut")
        taken.append(1)
        return take(self, batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", failing)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_interrupted_within_an_epoch_resumes_bit_for_bit(
    archive, uninterrupted, tmp_path, monkeypatch, workers
):
    extra = {"training__checkpoint_minutes": 0.0, "data__workers": workers}
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(RuntimeError, match="power cut"):
            train.main(arguments(archive, tmp_path, **extra))
    assert checkpoint.load_state(tmp_path / "last.pt")["progress"]["step"] == 8
    train.main(arguments(archive, tmp_path, "--resume", **extra))
    assert_same_weights(uninterrupted, tmp_path)
    ours, theirs = (rows(out, "valid") for out in (tmp_path, uninterrupted))
    machine = {"core_hours": 0.0, "peak_gib": 0.0}
    assert [r | machine for r in ours] == [r | machine for r in theirs]


def any_word_will_do(monkeypatch):
    """Let augment.splice use all words, although the CTC head of a tiny training is sure of none."""
    monkeypatch.setattr(splice, "MIN_LOG_PROB", -99.0)
    monkeypatch.setattr(splice, "SECONDS", (0.0, 99.0))


@pytest.mark.parametrize(
    "settings",
    [
        SAMPLED,
        {"training__schedule": "plateau", "training__plateau_patience": 0, "training__validate_every": 0.5},
        {"training__precision": "fp16"},
        {"training__precision": "bf16"},
        {"augment__speed": 0.2},
        {"augment__join": 0.5, "data__short_epochs": 1, "data__short_seconds": 0.5},
        {"features__normalisation": "global", "training__ema_decay": 0.0},
        {"model__ctc_layer": 0, "augment__splice": 1.0, "augment__splice_epoch": 0},
        {"model__ctc_layer": 0, "augment__splice": 0.5, "augment__splice_epoch": 1},
    ],
    ids=["sampled", "plateau", "fp16", "bf16", "speed", "curriculum", "global", "splice", "splice later"],
)
def test_resuming_is_exact_with_any_feature_enabled(archive, tmp_path, monkeypatch, settings):
    any_word_will_do(monkeypatch)
    settings = settings | {"training__checkpoint_minutes": 0.0, "training__epochs": 2}
    train.main(arguments(archive, tmp_path / "whole", **settings))
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(RuntimeError, match="power cut"):
            train.main(arguments(archive, tmp_path / "cut", **settings))
    train.main(arguments(archive, tmp_path / "cut", "--resume", **settings))
    ours, theirs = (checkpoint.load_state(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert ours["progress"] == theirs["progress"] and ours["scaler"] == theirs["scaler"]
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())


@pytest.mark.parametrize(
    "settings",
    [
        SAMPLED,
        {"training__guided_weight": 0.0},
        {"training__ctc_weight": 0.0},
        {"training__label_smoothing": 0.3},
        {"training__precision": "bf16"},
        {"training__schedule": "constant"},
        {"training__clip_norm": 0.1},
        {"training__weight_decay": 0.5},
        {"training__seed": 2},
        {"augment__start_epoch": 9.0},
        {"augment__speed": 0.2},
        {"augment__join": 1.0},
        {"augment__splice": 1.0},
        {"data__short_epochs": 1, "data__short_seconds": 0.5},
        {"training__guided_frames": 2.0},
        {"model__listener.dropout": 0.0},
        {"model__speller.dropout": 0.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_setting_that_should_change_the_weights_changes_them(archive, one_epoch, tmp_path, monkeypatch, settings):
    any_word_will_do(monkeypatch)
    train.main(arguments(archive, tmp_path, **{"training__epochs": 1, **settings}))
    plain, changed = (checkpoint.load_state(path / "last.pt")["model"] for path in (one_epoch, tmp_path))
    assert any(not torch.equal(plain[name], changed[name]) for name in plain)


@pytest.fixture(scope="module")
def one_epoch(archive, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    train.main(arguments(archive, out, training__epochs=1))
    return out


def pretend_scores(monkeypatch, cers):
    """Make each validation report the next of these dev CERs."""
    cers = iter(cers)

    def fake_validate(*args):
        result = validate(*args)
        return replace(result, scores=replace(result.scores, cer=next(cers)))

    monkeypatch.setattr(trainer, "validate", fake_validate)


def test_best_is_the_best_of_all_validations_also_across_a_resume(archive, tmp_path, monkeypatch):
    pretend_scores(monkeypatch, [50.0, 40.0, 45.0])
    with monkeypatch.context() as patch:
        stop_after(patch, 13)  # in the third epoch
        with pytest.raises(RuntimeError):
            train.main(arguments(archive, tmp_path))
    train.main(arguments(archive, tmp_path, "--resume"))
    assert checkpoint.load_model(tmp_path / "best.safetensors").info["step"] == 12
    assert checkpoint.load_model(tmp_path / "averaged.safetensors").info["step"] == 18


def test_plateau_lowers_the_learning_rate_that_is_used(archive, tmp_path, monkeypatch):
    pretend_scores(monkeypatch, [50.0, 60.0, 60.0, 60.0])
    options = {"training__schedule": "plateau", "training__plateau_patience": 0, "training__epochs": 4}
    train.main(arguments(archive, tmp_path, **options))
    assert [r["lr"] for r in rows(tmp_path, "train")] == pytest.approx([0.004, 0.001, 0.001])  # steps 10, 20, 24


def test_the_same_dev_utterances_are_pictured_each_time(uninterrupted):
    shown = [np.load(path)["ids"].tolist() for path in sorted((uninterrupted / "attention").glob("*.npz"))]
    assert len(shown) == 3 and shown[0] == shown[1] == shown[2] and len(shown[0]) == 1


def test_the_audio_gain_gives_each_utterance_the_audio_of_the_next(uninterrupted):
    parts = [torch.arange(3.0)[:, None, None], torch.arange(3.0)[:, None, None], torch.arange(3), torch.zeros(3, 1)]
    assert swap_audio(Memory(*parts)).keys.flatten().tolist() == [1, 2, 0]
    assert swap_audio(Memory(*parts)).lengths.tolist() == [1, 2, 0]
    assert all(r["monitor"]["audio_gain"] != 0 for r in rows(uninterrupted, "valid"))


def test_a_training_killed_at_three_random_moments_resumes_bit_for_bit(archive, tmp_path):
    settings = {"training__checkpoint_minutes": 0.0, "training__epochs": 40, "training__validate_every": 20.0}
    train.main(arguments(archive, tmp_path / "whole", **settings))
    seed = time.time_ns()
    print("seed", seed)  # shown by pytest on failure
    seconds = random.Random(seed)
    for attempt in range(4):
        resume = ["--resume"] if (tmp_path / "cut" / "last.pt").exists() else []
        command = arguments(archive, tmp_path / "cut", *resume, **settings)
        # one thread, as in this process: another order of summation would change the last bit
        code = f"import torch; torch.set_num_threads(1); from las_fast import train; train.main({command!r})"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
        if attempt < 3:
            wait_for_first_save(tmp_path / "cut", child)
            time.sleep(seconds.uniform(0, 0.4))
            child.kill()
            assert child.wait() == -signal.SIGKILL, "the training ended before it could be killed"
            step = checkpoint.load_state(tmp_path / "cut" / "last.pt")["progress"]["step"]
            assert step < 240
        output = child.communicate()[0].decode()
    assert child.returncode == 0, output
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def wait_for_first_save(out, child):
    path = out / "last.pt"
    before = path.stat().st_mtime_ns if path.exists() else 0
    while child.poll() is None and not (path.exists() and path.stat().st_mtime_ns > before):
        time.sleep(0.02)


def test_an_interrupt_ends_after_the_step_and_prints_the_resume_command(
    archive, uninterrupted, tmp_path, monkeypatch, capsys
):
    take = trainer.Trainer.train_step

    def interrupting(self, batch):
        if self.progress.step == 4:
            signal.raise_signal(signal.SIGINT)
        return take(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", interrupting)
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments(archive, tmp_path))
    printed = capsys.readouterr().err
    assert "step 5 is saved" in printed and re.search(r"python -m las_fast.train .*--resume", printed)
    train.main(arguments(archive, tmp_path, "--resume"))
    assert_same_weights(uninterrupted, tmp_path)


def test_core_hours_continue_after_a_resume(archive, tmp_path):
    made = make_trainer(archive, tmp_path)
    made.earlier_core_seconds = 7200.0
    made.save()
    again = make_trainer(archive, tmp_path)
    again.resume()
    assert 2.0 < made.core_hours() < again.core_hours() < 3.0
    again.run()
    actual = [row["core_hours"] for row in rows(tmp_path, "valid")]
    assert actual == sorted(actual) and actual[0] > 2.0


def test_log_lines_after_the_resumed_step_are_dropped(archive, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 13)
        with pytest.raises(RuntimeError):
            train.main(arguments(archive, tmp_path))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 99}\n{"kind": "tra')
    train.main(arguments(archive, tmp_path, "--resume"))
    assert [r["step"] for r in rows(tmp_path, "valid")] == [r["step"] for r in rows(uninterrupted, "valid")]
    assert 99 not in [r["step"] for r in rows(tmp_path, "train")]


@pytest.mark.parametrize(
    "settings,extra,message",
    [
        ({}, [], "already holds a training; add --resume"),
        ({"training__learning_rate": 0.5}, ["--resume"], "training.learning_rate = 0.004, not 0.5"),
    ],
)
def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(archive, uninterrupted, settings, extra, message):
    before = (uninterrupted / "last.pt").read_bytes()
    with pytest.raises(InputError, match=message):
        train.main(arguments(archive, uninterrupted, *extra, **settings))
    assert (uninterrupted / "last.pt").read_bytes() == before


def test_a_dev_set_inside_the_training_set_is_warned_of(archive, tmp_path, capsys):
    extra = {"training__epochs": 1, "data__dev": "train-clean-360"}
    train.main(arguments(archive, tmp_path, **extra))
    assert "warning: 4 dev utterances are trained on too" in capsys.readouterr().out


def test_a_training_can_start_from_the_weights_of_another(archive, uninterrupted, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(trainer.Trainer, "run", lambda self: seen.append(self))
    train.main([*arguments(archive, tmp_path), "--init", str(uninterrupted)])
    initial = checkpoint.load_model(uninterrupted).model.state_dict()
    for model in (seen[0].model, seen[0].averaged):
        assert all(torch.equal(value, initial[name]) for name, value in model.state_dict().items())
    assert seen[0].source["init"] == "best.safetensors" and seen[0].progress.step == 0
    seen[0].save()
    train.main([*arguments(archive, tmp_path), "--resume"])
    assert seen[1].source == seen[0].source


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__speller__key_size": 9}, "does not fit the settings: speller.attention.key.weight should be"),
        ({"data__characters": "ABC"}, "was trained with data.characters"),
    ],
)
def test_weights_of_another_kind_are_refused(archive, uninterrupted, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        train.main([*arguments(archive, tmp_path, **settings), "--init", str(uninterrupted)])


def test_resuming_an_empty_folder_is_an_error(archive, tmp_path):
    with pytest.raises(InputError, match="nothing to resume"):
        train.main(arguments(archive, tmp_path / "none", "--resume"))
    assert not (tmp_path / "none").exists()


def test_a_finished_training_is_lengthened_by_a_restart(archive, tmp_path, monkeypatch):
    once = {"training__epochs": 2, "training__learning-rate": 0.01, "data__short_epochs": 1, "data__short_seconds": 0.5}
    twice = once | {"training__epochs": 3, "training__restarts": 2}
    places = []

    def learning_rate_factor(training, step, steps):
        places.append((step, steps))
        return schedules.learning_rate_factor(training, step, steps)

    train.main(arguments(archive, tmp_path / "longer", **once))
    train.main(arguments(archive, tmp_path / "longer", "--resume", **twice))
    monkeypatch.setattr(step, "learning_rate_factor", learning_rate_factor)
    train.main(arguments(archive, tmp_path / "whole", **twice))
    (_, first), (_, second) = places[0], places[-1]
    assert places == [(step, steps) for steps in (first, second) for step in range(steps)] and first != second
    ours, theirs = (checkpoint.load_state(tmp_path / name / "last.pt") for name in ("whole", "longer"))
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())
    with pytest.raises(InputError, match="training.epochs = 3, not 2"):
        train.main(arguments(archive, tmp_path / "whole", "--resume", **once))
    with pytest.raises(InputError, match="epochs = 3, not 6; .* --training.epochs N --training.restarts 2 3"):
        train.main(arguments(archive, tmp_path / "whole", "--resume", **once | {"training__epochs": 6}))


def test_resuming_with_other_settings_is_refused(archive, uninterrupted):
    with pytest.raises(InputError, match=r"was trained with model.listener.dropout = 0\.\d+, not 0.5; resume"):
        train.main([*arguments(archive, uninterrupted, "--resume", model__listener__dropout=0.5)])


def test_a_setting_missing_in_an_old_state_counts_as_its_default(archive, uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    state = checkpoint.load_state(tmp_path / "last.pt")
    del state["settings"]["data"]["hours"], state["settings"]["model"]["listener"]["top_layers"]
    checkpoint.save_state(tmp_path / "last.pt", state)
    train.main(arguments(archive, tmp_path, "--resume"))
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"data.hours = 0.0, not 1e-06"):
        train.main(arguments(archive, tmp_path, "--resume", data__hours=1e-6))


def test_resuming_with_other_data_is_refused(archive, uninterrupted, tmp_path):
    other = make_archive(tmp_path, "F23", utterances=COUNTS, seed=5)  # the same number of batches per epoch
    with pytest.raises(InputError, match="was trained on other utterances"):
        train.main(arguments(other, uninterrupted, "--resume"))


def test_a_full_disk_is_a_one_sentence_error_and_the_last_checkpoint_stays(archive, tmp_path, monkeypatch):
    train.main(arguments(archive, tmp_path, training__epochs=1))
    before = (tmp_path / "last.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    sentence = r"last.pt could not be written \(No space left on device; \d+ MiB are free there\); free some"
    with pytest.raises(InputError, match=sentence):
        checkpoint.save_state(tmp_path / "last.pt", {})
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob(".last*"))


def make_trainer(archive, out, **settings):
    _, config = train.parse(arguments(archive, out, **settings))
    data = train.load_data(config, open_corpus(archive))
    return trainer.Trainer(config, *data, out, torch.device("cpu"), {"kind": "features", "name": "HW4P2 F23"})


def test_averaged_weights_follow_their_formula(archive, tmp_path):
    made = make_trainer(archive, tmp_path)
    expected = {k: v.clone() for k, v in made.model.state_dict().items()}
    for n, batch in enumerate(made._rest_of_epoch(), 1):
        made.train_step(batch)
        decay = min(made.config.training.ema_decay, (1 + n) / (10 + n))
        for name, value in made.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in made.averaged.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("limit", "clipped"), [(0.01, True), (1e3, False)])
def test_gradients_are_clipped_after_backward_and_after_unscaling(archive, tmp_path, monkeypatch, limit, clipped):
    made = make_trainer(archive, tmp_path, training__precision="fp16", training__clip_norm=limit)
    assert made.scaler.is_enabled()
    seen = {}
    clip = made._clip

    def spy():
        seen["norm"] = clip()
        seen["after"] = torch.nn.utils.get_total_norm([p.grad for p in made.model.parameters()])
        return seen["norm"]

    monkeypatch.setattr(made, "_clip", spy)
    made.train_step(next(iter(made._rest_of_epoch())))
    assert 0.01 < seen["norm"] < 1000, "the scale of 65536 is out of the gradients before they are clipped"
    assert seen["after"] <= 0.0101 if clipped else seen["after"] == seen["norm"]


@pytest.mark.parametrize(
    ("loss", "norm", "sentence"),
    [
        (math.nan, 1.0, "the dev loss is nan after 6 steps: the training has diverged"),
        (1.0, math.inf, "none of the 6 steps so far had finite gradients, so nothing was learned"),
    ],
)
def test_a_diverged_training_ends_without_a_best_model(archive, tmp_path, monkeypatch, loss, norm, sentence):
    validate_unpatched, clip = trainer.validate, trainer.Trainer._clip
    monkeypatch.setattr(trainer, "validate", lambda *arguments: replace(validate_unpatched(*arguments), loss=loss))
    monkeypatch.setattr(trainer.Trainer, "_clip", lambda made: clip(made) * norm)
    with pytest.raises(InputError, match=sentence):
        train.main(arguments(archive, tmp_path / "run"))
    assert not list((tmp_path / "run").glob("*.safetensors")) and not (tmp_path / "run" / "last.pt").exists()
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_transcripts_too_long_for_their_recordings_are_named(capsys):
    texts, seconds = ["X" * 90, "X" * 91, "X" * 10], np.array([2.0, 2.0, 0.01])
    data = SimpleNamespace(ids=["a", "b", "c"], texts=texts, seconds=seconds)
    train.warn_too_fast("dev", data)
    printed = capsys.readouterr().out
    assert (
        "1 of 3 transcripts of dev have more than 40 characters per second; the first is b, with 91 in 2.00 s"
        in printed
    )
    data.texts[1] = "X"
    train.warn_too_fast("dev", data)
    assert capsys.readouterr().out == ""


def test_transcripts_that_ctc_cannot_align_are_named(capsys):
    listener = ListenerConfig(conv_strides=(2,), pyramids=2)
    frames, texts = np.array([41, 41, 40]), ["ABCDEFGHIJK", "ABCDEFGHIJJ", "ABCDEFGHIJ"]  # 11, 11 and 10 frames of four
    data = SimpleNamespace(ids=["a", "b", "c"], texts=texts, frame_counts=frames)
    train.warn_too_long_for_ctc(data, ModelConfig(listener, ctc_layer=1))
    printed = capsys.readouterr().out
    assert "nothing from 1 of 3 transcripts" in printed and "the first is b, which needs 12 and has 11" in printed
    train.warn_too_long_for_ctc(data, ModelConfig(listener, ctc_layer=0))
    assert capsys.readouterr().out == ""


def test_two_trainings_do_not_share_a_folder(archive, tmp_path):
    with (
        lock_folder(tmp_path, "training"),
        pytest.raises(InputError, match="another training is writing into .*; wait for it"),
    ):
        train.main(arguments(archive, tmp_path))
    assert os.listdir(tmp_path) == [".lock"]
    with lock_folder(tmp_path, "training"):
        pass


def test_a_disk_that_is_too_small_is_named_before_the_first_step(archive, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"a training of this model needs \d+ MiB, and 1 MiB are free"):
        train.main(arguments(archive, tmp_path))
    assert not (tmp_path / "log.jsonl").exists()


def test_a_resumed_training_needs_no_space_for_files_that_it_replaces(archive, tmp_path, monkeypatch):
    made = make_trainer(archive, tmp_path)
    numbers = sum(p.numel() for p in made.model.parameters())
    needed = 40 * numbers + 2**20  # ten float32 copies, and space for log and pictures
    for name, size in ((train.LAST, 3000), (train.BEST, 200), ("other", 10**6)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    for free, enough in ((needed - 3200, True), (needed - 3201, False)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(train.shutil, "disk_usage", lambda _, usage=usage: usage)
        with contextlib.nullcontext() if enough else pytest.raises(InputError, match="free some space"):
            train.check_disk_space(tmp_path, made)


def test_a_gradient_that_is_not_finite_changes_no_weight(archive, tmp_path):
    made = make_trainer(archive, tmp_path)
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    batch = next(iter(made._rest_of_epoch()))
    batch.features[0, 0, 0] = float("nan")
    made.train_step(batch)
    assert made.progress.skipped_in_a_row == 1 and made.progress.step == 1
    assert all(torch.equal(v, before[k]) for k, v in made.model.state_dict().items())


def test_time_waiting_for_data_is_counted_apart(monkeypatch):
    clock = iter(range(0, 100, 2))  # the clock advances 2 seconds per call
    monkeypatch.setattr(pace_module.time, "perf_counter", lambda: next(clock))
    pace = pace_module.Pace()  # 0
    assert pace.next_batch(iter(["batch"])) == "batch"  # from 2 to 4
    assert pace.next_batch(iter([])) is None  # from 6 to 8
    pace.add_step(50.0)
    assert (pace.speed(), pace.waiting()) == (50 / 10, 4 / 12)


def test_an_explicit_precision_is_used_and_auto_depends_on_the_machine(monkeypatch):
    cpu = torch.device("cpu")
    for amx, dots, chosen in ((False, False, "float32"), (True, False, "bfloat16"), (False, True, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda dots=dots: dots)
        assert step.choose_precision("auto", cpu) == getattr(torch, chosen)
    for name, chosen in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert step.choose_precision(name, cpu) == chosen
    cuda, calls, devices = torch.device("cuda:1"), [], []
    monkeypatch.setattr(torch.cuda, "device", lambda device: devices.append(device) or contextlib.nullcontext())
    for native, chosen in ((True, torch.bfloat16), (False, torch.float16)):
        is_supported = lambda native=native, **options: calls.append(options) or native  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
        assert step.choose_precision("auto", cuda) == chosen
    assert calls == [{"including_emulation": False}] * 2  # emulated bf16 matmuls are slow
    assert devices == [cuda] * 2


def test_biases_gains_and_the_tied_embedding_are_not_decayed():
    model = checkpoint.build_model(load_config("tiny"))
    decayed, free = (group["params"] for group in step.make_optimiser(model, Config()).param_groups)
    embedding = model.speller.embedding.weight
    matrices = [p for p in model.parameters() if p.dim() >= 2 and p is not embedding]
    assert [id(p) for p in decayed] == [id(p) for p in matrices] and any(p is embedding for p in free)
    assert len(decayed) + len(free) == len(list(model.parameters()))


def test_on_a_read_only_system_temporary_files_go_into_the_run_folder(tmp_path, monkeypatch):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", nowhere)
    train.ensure_temporary_folder(tmp_path)
    assert tempfile.gettempdir() == str(tmp_path)


def test_wandb_without_the_package_says_how_to_install_it(archive, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        train.main(arguments(archive, tmp_path, training__wandb=True))


def test_a_resumed_training_continues_its_wandb_run(archive, tmp_path, monkeypatch):
    ids, wandb = [], ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None, origin="wandb.py")
    wandb.api, wandb.log, wandb.finish = SimpleNamespace(api_key=None), lambda scalars, step: None, lambda: None
    wandb.init = lambda **options: ids.append(options["id"]) or wandb
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    once = {"training__wandb": True, "training__epochs": 1}
    for out in ("run", "other"):
        train.main(arguments(archive, tmp_path / out, **once))
    longer = once | {"training__epochs": 2, "training__restarts": 1}
    train.main(arguments(archive, tmp_path / "run", "--resume", **longer))
    assert ids[0] == ids[2] != ids[1] and all(ids)


def test_wrong_feature_size_ends_before_anything_is_trained(archive, tmp_path):
    with pytest.raises(InputError, match=r"--features.size 28"):
        train.main(arguments(archive, tmp_path / "run", features__size=27))
    assert not (tmp_path / "run" / "last.pt").exists()
