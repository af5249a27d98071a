"""A training that ends early saves its state and resumes as if it had not been interrupted."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from las_fast import checkpoint, train
from las_fast.data import batch
from las_fast.data.loader import can_fork
from las_fast.errors import InputError, Stopped
from las_fast.training import signals, trainer
from las_fast.training.runlog import read_rows
from las_fast.training.step import Diverged
from tests.fakes import raising
from tests.tiny_corpora import make_archive

ROOT = Path(__file__).resolve().parents[1]
COUNTS = {"train-clean-100": 7, "train-clean-360": 4, "dev-clean": 5}
SMALL = {
    "model.listener.conv-channels": 8, "model.listener.lstm-size": 6, "model.listener.conv-strides": 1,
    "model.speller.key-size": 6, "model.speller.value-size": 6, "model.speller.embedding-size": 6,
    "model.speller.lstm-sizes": (9, 8), "data.utterances-per-batch": 2, "data.workers": 0, "training.epochs": 2,
    "training.precision": "fp32", "training.warmup-steps": 4, "training.pictures": 0, "decoding.maximum-extra": 3,
}  # fmt: skip
STEPS = 12  # in two epochs


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("data"), "F23", utterances=COUNTS)


@pytest.fixture(scope="module")
def uninterrupted(archive, tmp_path_factory):
    """The run folder of a training that was not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train.main(argv(archive, out))
    return out


def argv(archive, out, *extra, **settings):
    actual = ["--config", "tiny", "--data", str(archive), "--out", str(out)]
    for name, value in (SMALL | {k.replace("__", "."): v for k, v in settings.items()}).items():
        actual += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return [*actual, *extra]


def progress_of(out):
    return checkpoint.load_state(out / "last.pt")["progress"]


def assert_resumes_like(uninterrupted, archive, out, **settings):
    """Resume the training in out, and compare its files with those of the uninterrupted training."""
    train.main(argv(archive, out, "--resume", **settings))
    ours, theirs = (checkpoint.load_state(folder / "last.pt") for folder in (out, uninterrupted))
    assert ours["progress"] == theirs["progress"]
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())
    machine = {"core_hours": 0, "peak_gib": 0}
    ours, theirs = ([{**row, **machine} for row in read_rows(folder / "log.jsonl") if row["kind"] == "valid"]
                    for folder in (out, uninterrupted))  # fmt: skip
    assert ours == theirs
    assert sorted(p.name for p in out.glob("*.safetensors")) == ["averaged.safetensors", "best.safetensors"]


def at_step(monkeypatch, step, event):
    """Call `event()` just before a step."""
    take = trainer.Trainer.train_step

    def train_step(self, batch):
        if self.progress.step == step:
            event()
        return take(self, batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("step", [4, STEPS - 1])
def test_a_signal_ends_a_training_after_the_step(archive, uninterrupted, tmp_path, monkeypatch, capsys, name, step):
    number = getattr(signal, name)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(number))
        with pytest.raises(Stopped) as stop:
            train.main(argv(archive, tmp_path))
    assert stop.value.signum == number and progress_of(tmp_path)["step"] == step + 1
    assert f"step {step + 1} is saved. To continue: python -m las_fast.train" in capsys.readouterr().err
    assert_resumes_like(uninterrupted, archive, tmp_path)


def test_two_signals_in_quick_succession_count_as_one(archive, tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    at_step(monkeypatch, 4, twice)
    with pytest.raises(Stopped):
        train.main(argv(archive, tmp_path))
    assert progress_of(tmp_path)["step"] == 5


def test_a_second_signal_aborts_the_step_and_saves_the_previous_one(archive, uninterrupted, tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(signals, "GRACE_SECONDS", -1.0)
        at_step(patch, 4, twice)
        with pytest.raises(Stopped):
            train.main(argv(archive, tmp_path))
    assert progress_of(tmp_path)["step"] == 4
    assert_resumes_like(uninterrupted, archive, tmp_path)


def test_a_second_signal_in_the_middle_of_an_update_saves_no_inconsistent_state(
    archive, uninterrupted, tmp_path, monkeypatch
):
    def twice(self):
        if self.progress.averaged_steps == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        average(self)

    average = trainer.Trainer._average
    with monkeypatch.context() as patch:
        patch.setattr(signals, "GRACE_SECONDS", -1.0)
        patch.setattr(trainer.Trainer, "_average", twice)
        with pytest.raises(Stopped):
            train.main(argv(archive, tmp_path))
    assert progress_of(tmp_path)["step"] == 6  # the signal during the validation
    assert_resumes_like(uninterrupted, archive, tmp_path)


@pytest.mark.parametrize("where", ["save_state", "save_model"])
def test_signals_during_a_write_do_not_damage_files(archive, uninterrupted, tmp_path, monkeypatch, where):
    def write_with_signal(*arguments):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        write(*arguments)
        signal.raise_signal(signal.SIGTERM)

    write = getattr(checkpoint, where)
    with monkeypatch.context() as patch:
        patch.setattr(signals, "GRACE_SECONDS", -1.0)
        patch.setattr(checkpoint, where, write_with_signal)
        with pytest.raises(Stopped):
            train.main(argv(archive, tmp_path))
    assert progress_of(tmp_path)["validated"] == 6
    assert_resumes_like(uninterrupted, archive, tmp_path)


def test_a_validation_ended_by_a_signal_is_repeated_on_resume(archive, uninterrupted, tmp_path, monkeypatch):
    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        validation(*arguments)
        pytest.fail("the validation went on")

    validation = trainer.validate
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "validate", interrupted)
        with pytest.raises(Stopped):
            train.main(argv(archive, tmp_path))
    assert (progress_of(tmp_path)["step"], progress_of(tmp_path)["validated"]) == (6, 0)
    assert_resumes_like(uninterrupted, archive, tmp_path)


def test_a_missing_last_validation_is_done_on_resume(archive, uninterrupted, tmp_path, monkeypatch):
    seen = []

    def validate(*arguments):
        if seen:
            signal.raise_signal(signal.SIGTERM)
        seen.append(1)
        return validation(*arguments)

    validation = trainer.validate
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "validate", validate)
        with pytest.raises(Stopped):
            train.main(argv(archive, tmp_path))
    assert progress_of(tmp_path)["step"] == STEPS
    assert_resumes_like(uninterrupted, archive, tmp_path)


@pytest.mark.skipif(not can_fork(), reason="workers are forks, on Linux only")
def test_a_signal_ends_a_wait_for_data_at_once(archive, uninterrupted, tmp_path, monkeypatch):
    def hang(self, b):
        if os.getpid() != parent and b == 2 and self.epoch == 1:
            os.kill(parent, signal.SIGTERM)
            time.sleep(60)
        return make(self, b)

    parent, make = os.getpid(), batch._Batches.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(batch._Batches, "__getitem__", hang)
        with pytest.raises(Stopped):
            train.main(argv(archive, tmp_path, data__workers=1))
    assert progress_of(tmp_path)["step"] in (6, 7, 8)  # the worker is ahead
    assert_resumes_like(uninterrupted, archive, tmp_path)


@pytest.mark.skipif(not can_fork(), reason="workers are forks, on Linux only")
@pytest.mark.parametrize("death", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(1)])
def test_a_worker_that_dies_does_not_change_the_run(archive, uninterrupted, tmp_path, monkeypatch, capsys, death):
    def die(self, b):
        if os.getpid() != parent and b == 2:
            death()
        return make(self, b)

    parent, make = os.getpid(), batch._Batches.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(batch._Batches, "__getitem__", die)
        train.main(argv(archive, tmp_path, data__workers=2))
    assert "warning: a loader process ended early" in capsys.readouterr().err
    assert_resumes_like(uninterrupted, archive, tmp_path)


@pytest.mark.parametrize("error", [InputError("x.npy is damaged"), OSError(5, "Input/output error", "x.npy")])
def test_bad_data_in_mid_training_saves_the_state(archive, uninterrupted, tmp_path, monkeypatch, capsys, error):
    with monkeypatch.context() as patch:
        at_step(patch, 4, raising(error))
        with pytest.raises(type(error), match="x.npy"):
            train.main(argv(archive, tmp_path))
    assert progress_of(tmp_path)["step"] == 4
    assert "stopped; step 4 is saved. To continue: python -m las_fast.train" in capsys.readouterr().err
    assert_resumes_like(uninterrupted, archive, tmp_path)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA")]
)
def test_out_of_memory_names_the_setting_to_lower_and_saves(archive, uninterrupted, tmp_path, monkeypatch, error):
    with monkeypatch.context() as patch:
        at_step(patch, 3, raising(error))
        message = (
            r"training on a batch of 2 utterances, \d+ frames, does not fit in memory; step 3 is saved, continue with "
        )
        with pytest.raises(InputError, match=message + "--resume and --data.frames-per-batch below 8000"):
            train.main(argv(archive, tmp_path, data__frames_per_batch=8000))
    assert progress_of(tmp_path)["step"] == 3


def test_out_of_memory_at_the_first_step_writes_no_checkpoint(archive, tmp_path, monkeypatch):
    at_step(monkeypatch, 0, raising(MemoryError()))
    with pytest.raises(InputError, match="start again with --data.frames-per-batch below"):
        train.main(argv(archive, tmp_path))
    assert not (tmp_path / "last.pt").exists()


def test_an_utterance_that_does_not_fit_on_its_own_gets_other_advice(archive, tmp_path, monkeypatch):
    at_step(monkeypatch, 4, raising(MemoryError()))
    with pytest.raises(InputError, match=r"an utterance of \d+ frames does not fit .* --data.max-seconds"):
        train.main(argv(archive, tmp_path, data__utterances_per_batch=1))


def test_out_of_memory_in_a_validation_names_the_decoding_setting(archive, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "validate", raising(MemoryError()))
        with pytest.raises(
            InputError, match=r"lower --decoding.frames-per-batch \(now \d+\) and continue with --resume"
        ):
            train.main(argv(archive, tmp_path))
    assert_resumes_like(uninterrupted, archive, tmp_path, decoding__frames_per_batch=200)


def test_with_smaller_batches_a_training_resumes_at_the_same_share_of_the_epoch(archive, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 9, raising(MemoryError()))
        with pytest.raises(InputError):
            train.main(argv(archive, tmp_path))
    smaller = {"data__utterances_per_batch": 1}
    train.main(argv(archive, tmp_path, "--resume", **smaller))
    # Of 11 steps per epoch, half.
    printed = "batches are smaller, so epochs have more steps: the saved step 9 counts as step 16"
    assert printed in capsys.readouterr().out
    assert progress_of(tmp_path)["step"] == 22
    assert [row["epoch"] for row in read_rows(tmp_path / "log.jsonl") if row["kind"] == "valid"] == [1.0, 2.0]
    with pytest.raises(InputError, match="data.utterances_per_batch = 1, not 2"):
        train.main(argv(archive, tmp_path, "--resume"))


def test_a_state_that_has_diverged_is_not_saved(archive, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 8, raising(Diverged("the training has diverged")))
        with pytest.raises(InputError):
            train.main(argv(archive, tmp_path))
    assert progress_of(tmp_path)["step"] == 6  # during the validation


def test_bugs_keep_their_traceback(archive, tmp_path, monkeypatch):
    at_step(monkeypatch, 4, raising(TypeError("a fault")))
    with pytest.raises(TypeError, match="a fault"):
        train.main(argv(archive, tmp_path))


def test_the_first_error_is_reported_when_saving_fails_too(archive, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 4, raising(OSError(28, "No space left on device", "events.out")))
        patch.setattr(checkpoint, "save_state", raising(InputError("last.pt could not be written")))
        with pytest.raises(OSError, match=r"events.out"):
            train.main(argv(archive, tmp_path))


def test_a_finished_state_without_a_validation_record_counts_as_complete(archive, uninterrupted, tmp_path, capsys):
    state = checkpoint.load_state(uninterrupted / "last.pt")
    del state["progress"]["validated"]
    checkpoint.save_state(tmp_path / "last.pt", state)
    train.main(argv(archive, tmp_path, "--resume"))
    assert "is complete" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", [0.0, 0.7])
def test_a_signal_to_the_whole_group_saves_the_last_step(archive, tmp_path, seconds):
    """timeout, Slurm and Kubernetes signal the whole process group, including the workers."""
    settings = {"training__epochs": 500, "training__validate_every": 100.0, "data__workers": 2}
    command = [sys.executable, "-m", "las_fast.train", *argv(archive, tmp_path, **settings)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    log = tmp_path / "log.jsonl"
    while child.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
    time.sleep(seconds)
    for _ in range(3):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        time.sleep(0.05)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 143 and "Traceback" not in err, err
    step = int(re.search(r"step (\d+) is saved", err)[1])
    assert step == progress_of(tmp_path)["step"] > 0
    assert err.endswith("stopped by SIGTERM\n")


def test_a_terminal_that_is_closed_ends_a_training_with_its_state_saved(archive, tmp_path):
    settings = {"training__epochs": 500, "training__validate_every": 100.0}
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "las_fast.train", *argv(archive, tmp_path, **settings)])
    log = tmp_path / "log.jsonl"
    while not (log.exists() and log.stat().st_size):
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129 and progress_of(tmp_path)["step"] >= 10


DAMAGED_ENDS = {
    "nothing": b"",
    "cut": b'{"kind": "train", "st',
    "cut after an inner brace": b'{"kind": "valid", "step": 1, "epoch": 1.0, "monitor": {"diagonal": 0.5}',
    "zeros": bytes(4096),
    "zeros and a brace": bytes(64) + b"}\n",
    "not UTF-8": b'{"kind": "train", "step": 1, "x": "\xff"}\n',
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "no step": b'{"kind": "train"}\n',
    "a step that is a text": b'{"kind": "train", "step": "1"}\n',
    "no step at all": b'{"kind": "train", "step": null}\n',
    "no kind": b'{"step": 1}\n',
    "two in one": b'{"kind": "train", "st{"kind": "train", "step": 2}\n',
    "nested": b"[" * 100_000 + b"\n",
    "carriage returns": b"\r\n\r\n",
}


@pytest.mark.parametrize("end", DAMAGED_ENDS.values(), ids=DAMAGED_ENDS.keys())
def test_a_damaged_end_of_a_log_leaves_its_complete_rows(tmp_path, end):
    lines = [{"kind": "train", "step": 1, "loss": 0.5}, {"kind": "valid", "step": 2, "line": "{}"}]
    (tmp_path / "log.jsonl").write_bytes("".join(json.dumps(row) + "\n" for row in lines).encode() + end)
    assert read_rows(tmp_path / "log.jsonl") == lines


def test_a_log_truncated_at_any_byte_gives_its_complete_rows(uninterrupted, tmp_path):
    content = (uninterrupted / "log.jsonl").read_bytes()
    path, rows = tmp_path / "log.jsonl", read_rows(uninterrupted / "log.jsonl")
    assert len(rows) == content.count(b"\n") > 2
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        complete = content[: end + 1].count(b"\n")  # a line is complete without its newline
        assert read_rows(path) == rows[:complete]


def test_resuming_drops_lines_that_are_not_log_rows(archive, uninterrupted, tmp_path):
    out = tmp_path / "run"
    train.main(argv(archive, out, training__epochs=1))
    with (out / "log.jsonl").open("ab") as log:
        log.write(DAMAGED_ENDS["cut after an inner brace"] + bytes(100))
    longer = {"training__epochs": 2, "training__restarts": 1}
    train.main(argv(archive, out, "--resume", **longer))
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "valid"] == [6, 12]
