"""The log of a training: Weights & Biases, folders of any name, and full disks."""

import errno
import json
import os
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread
from tiny_checkpoints import small

from las_fast.config import to_yaml
from las_fast.errors import InputError
from las_fast.output.figures import attention_picture
from las_fast.output.metrics import Scores
from las_fast.training.monitor import Alignment
from las_fast.training.origin import write_start
from las_fast.training.runlog import RunLog, read_rows, replace_non_finite
from las_fast.training.validate import Sample, Validation
from las_fast.tree import to_tree


class Wandb:
    """Replaces the package wandb and the run that it starts."""

    def __init__(self, key):
        self.api, self.began, self.logged, self.ended = SimpleNamespace(api_key=key), [], [], 0

    def init(self, **options):
        self.began.append(options)
        return self

    def log(self, scalars, step):
        self.logged.append((step, scalars))

    def finish(self):
        self.ended += 1


@pytest.mark.parametrize(("key", "mode"), [(None, "offline"), ("secret", "online")])
def test_weights_and_biases_gets_the_settings_and_every_number(tmp_path, monkeypatch, key, mode):
    wandb = Wandb(key)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = small(training=replace(small().training, wandb=True))
    log = RunLog(tmp_path, config, 0)
    (began,) = wandb.began
    assert began == {
        "project": "las_fast",
        "id": None,
        "dir": str(tmp_path),
        "mode": mode,
        "config": to_tree(config),
        "resume": "allow",
    }
    log.training(5, 0.5, {"loss": 2.0, "count": 3}, 0.01)
    log.validation(6, 1.0, Validation(1.5, Scores(3, 4.0, 50.0, 60.0), Alignment(0.9, 0.8, 0.78, 0.6, 3), []), "", 0.5)
    first, second = wandb.logged
    assert first == (5, {"train/loss": 2.0, "train/lr": 0.01})
    assert second[0] == 6 and second[1]["valid/cer"] == 50.0 and second[1]["monitor/formed"] == 1.0
    assert "monitor/audio_gain" not in second[1] and wandb.ended == 0
    log.close()
    assert wandb.ended == 1


def test_a_resumed_training_continues_its_run_of_weights_and_biases(tmp_path, monkeypatch):
    wandb = Wandb(None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = small(training=replace(small().training, wandb=True))
    starts = (("cpu", 0, False), ("cpu", 7, True), ("cuda:0", 0, False), ("cpu", 0, True), ("cpu", 3, True))
    for device, step, is_resumed in starts:  # the fourth one resumes a training that was saved before its first step
        write_start(tmp_path, ["--out", "run"], step=step, resumed=is_resumed, device=device)
        RunLog(tmp_path, config, step).close()
    first, resumed, again, *resumed_again = (options["id"] for options in wandb.began)
    assert first == resumed != again and resumed_again == [again, again] and re.fullmatch("[0-9a-f]{12}", first)


def test_rows_of_steps_that_are_trained_again_are_dropped(tmp_path):
    log = RunLog(tmp_path, small(), 0)
    for step in (1, 2, 3, 4):
        log.training(step, step / 10, {"loss": 2.0}, 0.01)
    log.close()
    RunLog(tmp_path, small(), 5, 0.25).close()  # batches are smaller now, so step 2 counts as step 5
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [1, 2]
    RunLog(tmp_path, small(), 1, 0.25).close()
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [1]


def test_wandb_is_not_started_by_default(tmp_path, monkeypatch):
    wandb = Wandb(None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = RunLog(tmp_path, small(), 0)
    log.training(1, 0.1, {"loss": 2.0}, 0.01)
    log.close()
    assert wandb.began == [] and log.wandb is None and wandb.ended == 0


def test_a_folder_of_any_name_stays_open_until_the_log_is_closed(tmp_path):
    out = tmp_path / os.fsdecode(b"mod\xe0")
    out.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    log = RunLog(out, small(), 0)
    log.training(1, 0.1, {"loss": 2.0}, 0.01)
    log.close()
    assert len(os.listdir("/proc/self/fd")) == before and log.file.closed
    assert read_rows(out / "log.jsonl")[0]["step"] == 1 and os.listdir(out / "tensorboard")


def test_an_unwritable_log_is_a_one_sentence_error(tmp_path):
    log = RunLog(tmp_path, small(), 0)
    log.file.close()

    def write(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    log.file = SimpleNamespace(write=write, close=lambda: None)
    with pytest.raises(InputError, match=r"log.jsonl cannot be written \(No space left.*check the disk's space"):
        log.training(1, 0.1, {"loss": 2.0}, 0.01)
    log.close()


def test_numbers_that_json_lacks_become_null():
    row = {"a": float("nan"), "b": {"c": float("inf"), "d": 1.5}, "e": 3, "f": None, "g": "x", "h": True}
    actual = replace_non_finite(row)
    assert actual == {"a": None, "b": {"c": None, "d": 1.5}, "e": 3, "f": None, "g": "x", "h": True}
    assert json.loads(json.dumps(actual)) == actual


def test_lines_that_are_not_rows_are_skipped(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_rows(path) == []
    good = [{"kind": "train", "step": step} for step in (1, 2)]
    bad = ["", "[1]", "7", "null", "{", '{"kind": 1, "step": 1}', '{"kind": "train", "step": true}',
           '{"kind": "train", "step": 1.0}', '{"step": 3}', '{"kind": "train"}']  # fmt: skip
    path.write_text("\n".join([json.dumps(good[0]), *bad, json.dumps(good[1]), *bad]))
    assert read_rows(path) == good


def test_keys_of_earlier_log_versions_are_renamed(tmp_path):
    old = {"kind": "valid", "step": 3, "monitor": {"diagonal": 0.9, "heard": 0.7}}
    odd = {"kind": "valid", "step": 4, "monitor": None}
    (tmp_path / "log.jsonl").write_text(f"{json.dumps(old)}\n{json.dumps(odd)}\n")
    expected = [{"kind": "valid", "step": 3, "monitor": {"diagonal": 0.9, "audio_gain": 0.7}}, odd]
    assert read_rows(tmp_path / "log.jsonl") == expected
    RunLog(tmp_path, small(), 4).close()
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == expected


def test_tensorboard_gets_settings_texts_and_attention(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = tmp_path / "a.png"
    attention_picture(picture, np.eye(4, 9, dtype=np.float32), "A B", "title", frame_seconds=0.04)
    log = RunLog(tmp_path, small(), 0)
    samples = (Sample("dev-1", "A B", "A\nC", picture),)
    log.validation(
        6, 1.0, Validation(1.5, Scores(3, 4.0, 50.0, 60.0), Alignment(0, 0, 0, 0, 3), [], samples=samples), "", 0.5
    )
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    board.Reload()
    texts = {
        tag: board.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
        for tag in ("settings", "dev/dev-1")
    }
    lines = [line.removeprefix("    ") for line in texts["settings"].splitlines()]
    assert "\n".join(lines) + "\n" == to_yaml(small())
    assert texts["dev/dev-1"].split() == ["reference", "A", "B", "hypothesis", "A", "C"]
    (image,) = board.Images("attention/dev-1")
    assert image.step == 6 and (image.height, image.width) == imread(picture).shape[:2]


def test_a_validation_logs_the_peak_memory(tmp_path):
    log = RunLog(tmp_path, small(), 0)
    log.validation(6, 1.0, Validation(1.5, Scores(3, 4.0, 50.0, 60.0), Alignment(0, 0, 0, 0, 3), []), "", 0.5)
    log.close()
    (row,) = read_rows(tmp_path / "log.jsonl")
    assert 0.05 < row["peak_gib"] < 64  # of this process, torch included
