"""RUN/starts.jsonl: how a run came about."""

import datetime
import subprocess
from pathlib import Path

from las_fast import __version__
from las_fast.system import current_commit, machine_name
from las_fast.training.origin import STARTS, read_starts, write_start


def test_each_start_adds_a_line_with_command_machine_and_date(tmp_path):
    write_start(tmp_path, ["--config", "an4", "--out", "a b"], step=0, resumed=False, device="cpu")
    write_start(tmp_path, ["--resume"], step=20, resumed=True, device="cuda:1")
    first, second = read_starts(tmp_path)
    assert first["command"] == "python -m las_fast.train --config an4 --out 'a b'"
    assert (first["step"], first["resumed"], second["resumed"]) == (0, False, True)
    assert second["command"] == "python -m las_fast.train --resume" and second["step"] == 20
    assert (second["device"], second["machine"], second["version"]) == ("cuda:1", machine_name(), __version__)
    assert first["commit"] == second["commit"] == current_commit(Path(__file__).parents[2])
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(first["date"])
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=5)


def test_runs_without_starts_and_damaged_lines_are_read(tmp_path):
    assert read_starts(tmp_path) == []
    (tmp_path / STARTS).write_bytes(b'{"step": 1}\n{"ste\n\xff\n[1]\n')
    assert read_starts(tmp_path) == [{"step": 1}]


def test_the_commit_of_a_clone_is_known_and_of_a_folder_inside_it_is_not(tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=tmp_path, check=True)

    assert current_commit(tmp_path) == "unknown"
    git("init", "-q")
    (tmp_path / "file").write_text("a")
    (tmp_path / "inner").mkdir()
    git("add", "file")
    git("commit", "-q", "-m", "first")
    commit = current_commit(tmp_path)
    assert len(commit) >= 7 and set(commit) <= set("0123456789abcdef")
    (tmp_path / "file").write_text("b")
    assert current_commit(tmp_path) == f"{commit}+"
    assert current_commit(tmp_path / "inner") == "unknown"
