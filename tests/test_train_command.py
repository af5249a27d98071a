"""The train command: its arguments, its run folder, and its output before and after the training."""

import contextlib
import fcntl
import os
import resource
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import raising
from tiny_checkpoints import make_checkpoint, small
from tiny_corpora import make_archive

from las_fast import train
from las_fast.config import Config, DataConfig, to_yaml
from las_fast.data import dataset, overlap
from las_fast.data.layouts import open_corpus
from las_fast.errors import InputError, Stopped
from las_fast.files import lock_folder
from las_fast.training.step import Diverged
from las_fast.training.trainer import Trainer

WORDS = ["--config", "tiny", "--data", "here", "--out", "run"]


def test_arguments_become_options_and_settings():
    options, config = train.parse(WORDS)
    assert (options.config, options.data, options.out) == ("tiny", Path("here"), Path("run"))
    assert (options.resume, options.init, options.on_bad, options.device) == (False, None, None, "auto")
    assert config == train.load_config("tiny")
    options, config = train.parse([*WORDS, "--resume", "--init", "x", "--device", "cpu", "--training.epochs", "3"])
    assert (options.resume, options.init, options.device, config.training.epochs) == (True, "x", "cpu", 3)
    for on_bad in ("error", "skip"):
        assert train.parse([*WORDS, "--on-bad", on_bad])[1].data.on_bad == on_bad
    with pytest.raises(InputError, match="training.epochs must be at least 1"):
        train.parse([*WORDS, "--training.epochs", "0"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config, --data, --out must be given; see --help"),
        ([*WORDS, "--on-bad", "x"], "--on-bad must be one of error, skip; got 'x'"),
        ([*WORDS, "--resum"], "there is no option --resum; the nearest is --resume"),
    ],
)
def test_wrong_or_missing_arguments_are_named(capsys, argv, message):
    with pytest.raises(SystemExit):
        train.parse(argv)
    assert capsys.readouterr().err == f"error: {message}\n"


# ------------------------------------------------------------------------------------------------------------ folders


def test_a_training_starts_in_a_new_folder_and_resumes_in_an_existing_one(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "last.pt").touch()
    for out in (tmp_path, tmp_path / "new" / "deep"):
        train.check_run_folder(out, resume=False)
        with pytest.raises(InputError, match="last.pt does not exist, so there is nothing to resume"):
            train.check_run_folder(out, resume=True)
    (old / "best.safetensors").touch()
    train.check_run_folder(old, resume=True)
    with pytest.raises(InputError, match="already holds a training; add --resume"):
        train.check_run_folder(old, resume=False)
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "x" / "y"):
        with pytest.raises(InputError, match=f"--out {out}: {tmp_path}/file is a file; give a folder"):
            train.check_run_folder(out, resume=False)


def test_an_unwritable_folder_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and path == tmp_path))
    with pytest.raises(InputError, match=f"--out {tmp_path}/a/b: {tmp_path} is not writable; give another folder"):
        train.check_run_folder(tmp_path / "a" / "b", resume=False)


@pytest.mark.parametrize("name", ["best.safetensors", "averaged.safetensors"])
def test_weights_of_another_training_are_not_overwritten(tmp_path, name):
    (tmp_path / "last.pt.d").mkdir()
    train.check_nothing_is_replaced(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"--out {tmp_path} holds {name} without last.pt; choose another"):
        train.check_nothing_is_replaced(tmp_path)


@pytest.mark.parametrize("content", ["training: {epochs: 3}\n", "x: [", to_yaml(Config()) + "# mine\n", "\xff"])
def test_other_settings_files_are_not_overwritten(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="config.yaml would be overwritten"):
        train.check_nothing_is_replaced(tmp_path)


def test_a_run_folder_is_locked_by_one_training_at_a_time(tmp_path, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    with lock_folder(tmp_path / "a" / "b", "training"):
        with (
            pytest.raises(InputError, match="another training is writing into"),
            lock_folder(tmp_path / "a" / "b", "training"),
        ):
            pytest.fail("two hold it")
        with lock_folder(tmp_path / "a", "training"):
            pass
    with pytest.raises(InputError), lock_folder(tmp_path, "training"):
        raise InputError("in the middle")
    with lock_folder(tmp_path, "training"):
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.setattr(fcntl, "flock", raising(OSError(37, "No locks available")))
    with lock_folder(tmp_path, "training"):
        pass


def test_an_existing_folder_for_temporary_files_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    train.ensure_temporary_folder(tmp_path)
    assert tempfile.gettempdir() != str(tmp_path)


def test_the_disk_needs_space_for_ten_copies_of_the_weights(tmp_path, monkeypatch):
    made = SimpleNamespace(model=torch.nn.Linear(100, 1000))
    needed = 40 * 101_000 + 2**20
    for free, enough in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        message = r"a training of this model needs 5 MiB, and 5 MiB are free; free some space"
        with contextlib.nullcontext() if enough else pytest.raises(InputError, match=message):
            train.check_disk_space(tmp_path, made)


# --------------------------------------------------------------------------------------------------------------- data


def utterances(count=2, **fields):
    plain = {"ids": [f"u{i}" for i in range(count)], "texts": ["ABC"] * count, "seconds": np.full(count, 1800.0),
             "skipped": [], "statistics": "statistics"}  # fmt: skip
    return Utterances(**plain | fields)


class Utterances(SimpleNamespace):
    def __len__(self):
        return len(self.ids)


class Splits:
    """A corpus where each split is just its name."""

    name, named_split, root = "the corpus", "", "here"

    def resolve(self, split):
        return {"train": ("train-a", "train-b"), "dev": ("dev-a",)}.get(split, (split,))


@pytest.fixture
def loaded(monkeypatch):
    """Replaces load_dataset: records its calls in `calls` and returns the next of `answers`."""
    loaded = SimpleNamespace(asked=[], answers=[], shared=0, divided=0, warned=[])

    def load_dataset(corpus, splits, **options):
        loaded.asked.append((splits, options))
        return loaded.answers[len(loaded.asked) - 1]

    monkeypatch.setattr(dataset, "load_dataset", load_dataset)
    monkeypatch.setattr(overlap, "count_overlap", lambda ours, dev: (loaded.shared, loaded.divided))
    monkeypatch.setattr(train, "warn_too_fast", lambda name, data: loaded.warned.append((name, data)))
    monkeypatch.setattr(train, "warn_too_long_for_ctc", lambda data, model: loaded.warned.append(("crowded", data)))
    return loaded


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train": (), "dev": ""}, [("train-a", "train-b"), ("dev-a",)]),
        ({"train": ("x", "y"), "dev": "z"}, [("x", "y"), ("z",)]),
    ],
)
def test_both_datasets_are_loaded_with_transcripts_and_counted(loaded, capsys, splits, expected):
    data = replace(small().data, max_seconds=9.0, **splits)
    config = small(data=data)
    loaded.answers = ours, dev = [utterances(3), utterances(2, skipped=[("a", "b")])]
    assert train.load_data(config, Splits()) == (ours, dev)
    common = {"features": config.features, "need_text": True}
    assert loaded.asked == [
        (expected[0], {**common, "data": data}),
        (expected[1], {**common, "data": data.without_limits(), "statistics": "statistics"}),
    ]
    names = ["+".join(names) for names in expected]
    assert capsys.readouterr().out == (
        f"{names[0]}: 3 utterances, 1.50 hours\n{names[1]}: 2 utterances, 1.00 hours, 1 left out\n"
    )
    assert loaded.warned == [(names[0], ours), (names[1], dev)]


@pytest.mark.parametrize(("layer", "warns"), [(-1, False), (0, True), (1, True)])
def test_transcript_lengths_are_checked_only_with_a_ctc_head(loaded, layer, warns):
    loaded.answers = [utterances(1), utterances(1)]
    train.load_data(small(model=replace(small().model, ctc_layer=layer)), Splits())
    assert (("crowded", loaded.answers[0]) in loaded.warned) == warns


@pytest.mark.parametrize(
    ("shared", "divided", "message"),
    [(0, 0, ""), (4, 3, "4 dev utterances are trained on too"), (0, 3, "3 recordings have parts in both")],
)
def test_a_dev_set_that_was_trained_on_is_warned_of(loaded, capsys, shared, divided, message):
    loaded.answers, loaded.shared, loaded.divided = [utterances(1), utterances(1)], shared, divided
    train.load_data(small(), Splits())
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == bool(message) and all(line.startswith(f"warning: {message}") for line in warnings)


# --------------------------------------------------------------------------------------------------- around a training


@pytest.mark.parametrize(
    ("error", "saved_step", "message"),
    [
        (Stopped(15), 7, "stopped; step 7 is saved. To continue: python -m las_fast.train a --resume"),
        (Stopped(15), None, "stopped before anything was saved; start again with the same command"),
        (KeyboardInterrupt(), 7, "stopped; step 7 is saved. To continue: python -m las_fast.train a --resume"),
        (InputError("bad"), 7, "stopped; step 7 is saved. To continue: python -m las_fast.train a --resume"),
        (OSError(5, "bad"), 7, "stopped; step 7 is saved. To continue: python -m las_fast.train a --resume"),
        (InputError("bad"), None, ""),
        (Diverged("bad"), 7, ""),
        (Diverged("bad"), None, ""),
    ],
)
def test_a_training_that_ends_early_prints_how_to_resume_if_possible(monkeypatch, capsys, error, saved_step, message):
    monkeypatch.setattr(train, "check_disk_space", lambda out, trainer: None)
    made = SimpleNamespace(run=raising(error), saved_step=saved_step)
    with pytest.raises(type(error)):
        train.train(made, SimpleNamespace(out=Path("run")), ["a"])
    out, err = capsys.readouterr()
    assert err == (f"\n{message}\n" if message else "") and out == ""


def test_a_completed_training_prints_its_best_score_and_how_to_decode(monkeypatch, capsys):
    order = []
    monkeypatch.setattr(train, "check_disk_space", lambda out, trainer: order.append(out))
    monkeypatch.setattr(
        resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss={resource.RUSAGE_SELF: 3 * 2**20}[who])
    )
    made = SimpleNamespace(run=lambda: order.append("run"), progress=SimpleNamespace(best_cer=12.345))
    made.config = small(data=DataConfig())
    train.train(made, SimpleNamespace(out=Path("a b"), data=Path("data")), [])
    assert order == [Path("a b"), "run"]
    assert capsys.readouterr().out == (
        "best dev CER 12.35%; peak memory 3.0 GiB\n"
        "decode with: python -m las_fast.decode --checkpoint 'a b' --data data --split dev --out dev.csv\n"
    )
    made.config = small(data=DataConfig(dev="dev-other"))
    train.train(made, SimpleNamespace(out=Path("a"), data=Path("data")), [])
    assert capsys.readouterr().out.endswith("--split dev-other --out dev-other.csv\n")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("command"), "F23", utterances=2)


@pytest.fixture
def began(monkeypatch):
    """Replaces train.train and records its arguments."""
    began = []
    monkeypatch.setattr(train, "train", lambda trainer, options, argv: began.append((trainer, argv)))
    return began


def command(archive, out, *more):
    return ["--config", "tiny", "--data", str(archive), "--out", str(out), "--device", "cpu", *more]


@pytest.mark.parametrize("inside", ["", "train-clean-100"])
def test_the_command_that_decodes_dev_names_the_folder_that_has_it(archive, tmp_path, monkeypatch, inside):
    """Not the training split, if --data names it."""
    given = []
    monkeypatch.setattr(train, "train", lambda trainer, options, argv: given.append(options.data))
    train.main(command(archive / inside, tmp_path))
    assert given == [archive] and open_corpus(given[0]).choose("dev") == ("dev-clean",)


def test_the_command_prints_its_data_and_saves_its_settings(archive, tmp_path, capsys, monkeypatch, began):
    out = tmp_path / "run"
    argv = command(archive, out, "--training.epochs", "3")
    monkeypatch.setattr("sys.argv", ["las_fast.train", *argv])
    train.main()
    train.main([*argv, "--data.workers", "0"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "data: HW4P2 F23" and any(line.startswith("model: ") for line in printed)
    (made, first_arguments), (again, second_arguments) = began
    assert first_arguments == argv and second_arguments == [*argv, "--data.workers", "0"]
    assert (out / "config.yaml").read_text() == to_yaml(again.config) and made.config.training.epochs == 3
    assert made.source == {"kind": "features", "name": "HW4P2 F23"} and made.device == torch.device("cpu")
    with lock_folder(out, "training"):
        for more in ([], ["--resume"]):
            with pytest.raises(InputError, match="another training is writing into"):
                train.main([*argv, *more])
            (out / "last.pt").touch()  # without it, there is nothing to resume


def test_a_training_is_complete_only_after_its_last_validation(archive, tmp_path, capsys, monkeypatch, began):
    places = []

    def resume(self):
        self.progress.step, self.progress.validated = (where(self) for where in places[0])

    monkeypatch.setattr(Trainer, "resume", resume)
    (tmp_path / "last.pt").touch()
    end, before = (lambda made: made.steps), (lambda made: made.steps - 1)
    for place, finished in (((end, end), True), ((end, before), False), ((before, before), False)):
        places[:] = [place]
        began.clear()
        capsys.readouterr()
        train.main(command(archive, tmp_path, "--resume"))
        printed = "this training is complete; nothing is left to do" in capsys.readouterr().out
        assert printed == finished and len(began) == (not finished)


def test_initial_weights_are_loaded_only_by_a_new_training(archive, tmp_path, monkeypatch, began):
    taken = []
    monkeypatch.setattr(Trainer, "start_from", lambda self, init: taken.append(init.path))
    monkeypatch.setattr(Trainer, "resume", lambda self: taken.append("resumed"))
    path = make_checkpoint(tmp_path, sections={"features": train.load_config("tiny").features})
    train.main(command(archive, tmp_path / "a", "--init", str(path)))
    assert taken == [path]
    (tmp_path / "a" / "last.pt").touch()
    train.main(command(archive, tmp_path / "a", "--init", str(path), "--resume"))
    assert taken == [path, "resumed"]
    train.main(command(archive, tmp_path / "b"))
    assert taken == [path, "resumed"] and len(began) == 3
    with pytest.raises(
        InputError, match=f"--init {path} was trained with features.deltas 0, not 1; give --config fine"
    ):
        train.main(command(archive, tmp_path / "c", "--init", str(path), "--features.deltas", "1"))
    with pytest.raises(InputError, match="was trained with data.characters ABC.*, not AB ; give --config finetune"):
        train.main(command(archive, tmp_path / "c", "--init", str(path), "--data.characters", "AB "))
    with pytest.raises(InputError, match="the name of the checkpoint is empty"):
        train.main(command(archive, tmp_path / "c", "--init", ""))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("warmup", "restarts", "note"),
    [
        (200, [], "warm-up: shortened from 200 to 1 steps, a tenth of the 16 of the run"),
        (2, ["2"], "warm-up: shortened from 2 to 0 steps, a tenth of the 8 of the cycle"),
        (1, [], ""),
    ],
)
def test_a_warm_up_that_is_cut_short_is_noted(archive, tmp_path, capsys, began, warmup, restarts, note):
    settings = ["--training.epochs", "4", "--data.utterances-per-batch", "1", "--training.restarts", *restarts]
    train.main(command(archive, tmp_path / "run", *settings, "--training.warmup-steps", str(warmup)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warm-up")]
    assert lines == ([note] if note else [])
