"""Progress: a bar on a terminal, few plain lines in a log."""

import fcntl
import io
import itertools
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from las_fast import progress as module
from las_fast.progress import close_all, progress, track


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: clock[0] is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_each_tenth_and_a_last_one(clock, capsys):
    with progress(40, "reading dev", "utterances") as shown:
        for _ in range(40):
            clock[0] += 1
            shown.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "reading dev: 10% (4 of 40 utterances), 36 s left",
        "reading dev: 20% (8 of 40 utterances), 32 s left",
    ]
    assert len(lines) == 10 and lines[-1] == "reading dev: 100% (40 of 40 utterances) in 40 s"


def test_lines_are_two_seconds_apart(clock, capsys):
    for _ in track(range(100), "reading", "files"):
        clock[0] += 0.0625
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[2][:4] for line in lines] == [" 32%", " 64%", " 96%", " 100"]


def test_a_short_loop_leaves_nothing_in_a_log(clock, capsys):
    for _ in track(range(1000), "reading", "files"):
        clock[0] += 0.0019
    assert capsys.readouterr().err == ""


def test_a_count_without_a_total_is_said_ever_more_rarely(clock, capsys):
    for _ in track(itertools.islice(itertools.count(), 100), "counting", "sentences"):
        clock[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "counting: 2 sentences" and len(lines) == 5


def test_time_left_is_judged_by_what_this_process_has_done(clock, capsys):
    with progress(100, "training", "steps", done=50) as shown:
        clock[0] = 100.0
        shown.note("loss 2.5")
        shown.update(10)
    assert capsys.readouterr().err == "training: 60% (60 of 100 steps), 7 min left; loss 2.5\n"


def test_a_sum_of_fractions_does_not_pass_the_total(clock, capsys):
    with progress(0.3, "decoding", "s of audio") as shown:
        for _ in range(3):
            clock[0] += 3
            shown.update(0.1)
            assert shown.n <= 0.3


@pytest.mark.parametrize("total", [0, 0.0])
def test_nothing_to_do_is_no_division_by_zero(clock, capsys, total):
    with progress(total, "decoding", "s of audio") as shown:
        clock[0] = 5.0
        shown.update(0)
    assert capsys.readouterr().err == ""


def test_hidden_progress_says_nothing_and_counts_all_the_same(clock, capsys):
    with progress(4, "reading", "files", show=False) as shown:
        clock[0] = 9.0
        shown.update(2)
        assert shown.n == 2
    assert capsys.readouterr().err == ""


def test_a_stream_that_takes_no_more_does_not_end_the_loop(clock, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        for _ in track(range(10), "reading", "files"):
            clock[0] += 3
        monkeypatch.undo()
        full.buffer.raw.close()


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_missing_stderr_is_no_error(clock, monkeypatch, stream):
    if stream:
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in track(range(10), "reading", "files"):
        clock[0] += 3


def on_a_terminal(code: str, columns: int = 80) -> str:
    """Return what a program writes to a terminal, which is its stdout and stderr."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    done = subprocess.run([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode in (0, 2), text
    return text


@pytest.mark.parametrize("columns", [80, 0])
def test_a_terminal_gets_a_bar_which_lines_do_not_touch(columns):
    text = on_a_terminal("""
from las_fast.progress import progress
with progress(4, "reading dev", "utterances") as shown:
    shown.update(2)
    shown.write("a line")
print("the end")
""", columns)
    assert "reading dev:   0%|" in text and "/4 utterances [" in text
    lines = text.replace("\r\n", "\n").split("\n")
    assert any(line.endswith("\ra line") or line == "a line" for line in lines), lines
    assert lines[-2].endswith("\rthe end")  # the bar is gone from the line


def test_an_error_on_a_terminal_begins_its_own_line():
    text = on_a_terminal("""
from las_fast.cli import run
from las_fast.errors import InputError
from las_fast.progress import track
def main(argv):
    for i in track(range(4), "reading", "files"):
        if i == 2:
            raise InputError("x.wav is empty")
run(main)
""")
    before, _, _ = text.partition("error: x.wav is empty")
    assert before.endswith("\r") and before.rstrip("\r").endswith(" ")


def test_close_all_ends_what_an_exception_left_open(clock, capsys):
    iterator = track(range(3), "reading", "files")
    next(iterator)
    close_all()
    assert not module._open


SOURCES = sorted((Path(module.__file__).parent).rglob("*.py"))


def test_only_this_module_draws_bars():
    others = [path.name for path in SOURCES if "tqdm" in path.read_text(encoding="utf-8")]
    assert others == ["progress.py"]


def test_a_terminal_that_is_closed_does_not_end_the_loop():
    class Gone:
        n = 0

        def update(self, n):
            raise OSError(5, "Input/output error")

        close = set_postfix_str = update

    with progress(4, "reading", "files") as shown:
        shown._bar = Gone()
        for _ in range(4):
            shown.update()
    assert shown.n == 4
