"""Run folders: their contents, and the errors for other folders."""

import json

import numpy as np
import pytest

from las_fast.errors import InputError
from las_fast.training.runs import open_runs, read_attention, read_log


def make_run(path, *rows):
    path.mkdir(parents=True)
    (path / "log.jsonl").write_text("".join(json.dumps({"step": 1, **row}) + "\n" for row in rows))
    return path


def test_runs_have_the_shortest_names_that_differ(tmp_path):
    paths = [make_run(tmp_path / name) for name in ("a/run", "b/run")]
    assert [run.name for run in open_runs(paths)] == ["a/run", "b/run"]
    assert [run.name for run in open_runs([paths[0], make_run(tmp_path / "other")])] == ["run", "other"]
    assert [run.name for run in open_runs(paths[:1])] == ["run"]


def test_a_run_has_the_best_validation_and_the_epoch_at_which_attention_formed(tmp_path):
    valid = [
        {"kind": "valid", "epoch": e, "cer": c, "monitor": {"formed": e > 1}} for e, c in ((1, 9.0), (2, 3.0), (3, 4.0))
    ]
    (run,) = open_runs([make_run(tmp_path / "run", {"kind": "train", "epoch": 0.5}, *valid)])
    assert run.best["epoch"] == 2 and run.formed_epoch == 2 and len(run.train) == 1 and len(run.valid) == 3
    (empty,) = open_runs([make_run(tmp_path / "empty", {"kind": "valid", "epoch": 1, "cer": None})])
    assert empty.best is None and empty.formed_epoch is None and empty.settings == "" and empty.config is None


def test_rows_of_other_programs_and_files_of_other_names_are_left_out(tmp_path):
    rows = [{"kind": "train"}, {"kind": "valid", "epoch": "1"}, {"kind": "valid", "epoch": 2, "monitor": None}]
    (run,) = open_runs([make_run(tmp_path / "run", *rows)])
    assert run.log == [{"step": 1, "kind": "valid", "epoch": 2, "monitor": {}}] and run.formed_epoch is None
    (run.path / "attention").mkdir()
    for name in ("epoch-0010.00", "epoch-0002.50", "epoch-x", "epoch-1-old"):
        (run.path / "attention" / f"{name}.npz").touch()
    assert [path.stem for path in run.attention_files] == ["epoch-0002.50", "epoch-0010.00"]


def test_values_that_are_not_finite_numbers_are_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "log.jsonl").write_text(
        '{"kind": "valid", "step": 1, "epoch": NaN}\n{"kind": "valid", "step": 2, "epoch": Infinity}\n'
        '{"kind": "valid", "step": 3, "epoch": 3.0, "cer": "low", "loss": null, "ld": 1' + 400 * "0" + ", "
        '"line": "formed", "monitor": {"sharp": "x", "coverage": 0.5, "formed": true}}\n'
    )
    monitor = {"coverage": 0.5, "formed": True}
    assert read_log(run) == [{"kind": "valid", "step": 3, "epoch": 3.0, "line": "formed", "monitor": monitor}]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x93NUMPY\x01\x00"])
def test_damaged_attention_is_an_input_error(tmp_path, content):
    path = tmp_path / "epoch-0001.00.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not attention that a training saved"):
        read_attention(path)
    np.savez(path, ids=np.array(["a"]))
    with pytest.raises(InputError, match="text_0"):
        read_attention(path)


def test_one_run_given_twice_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(InputError, match="is given twice"):
        open_runs([run, tmp_path / "x" / ".." / "run"])


@pytest.mark.parametrize(
    ("given", "problem", "suggested"),
    [
        ("rums/one", "does not exist", None),
        ("runs/onn", "does not exist", ["runs/one"]),
        ("runs/zzzzzz", "does not exist", ["runs/deep/two", "runs/one"]),
        ("runs", "has no log.jsonl, so it is not a run folder", ["runs/one", "runs/deep/two"]),
        ("runs/one/attention", "has no log.jsonl", ["runs/one"]),
        ("runs/one/log.jsonl", "is a file, not a run folder", ["runs/one"]),
    ],
)
def test_an_error_for_another_folder_names_the_runs_nearby(tmp_path, given, problem, suggested):
    make_run(tmp_path / "runs" / "one")
    make_run(tmp_path / "runs" / "deep" / "two")
    (tmp_path / "runs" / "one" / "attention").mkdir()
    with pytest.raises(InputError) as error:
        read_log(tmp_path / given)
    assert str(error.value).startswith(f"{tmp_path / given} {problem}")
    if suggested:
        named = str(error.value).partition("did you mean ")[2].rstrip("?").split(" or ")
        assert set(named) <= {str(tmp_path / name) for name in suggested} and str(tmp_path / suggested[-1]) in named
    else:
        assert f"the nearest is {tmp_path / 'runs'}" in str(error.value)


def test_without_runs_nearby_the_error_says_what_a_run_is(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="give the --out folder of a training"):
        read_log(tmp_path / "empty")
