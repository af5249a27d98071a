"""Progress: a bar on a terminal, a few lines in a log."""

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
import tqdm

from las_fast import progress as module
from las_fast.progress import ProgressBar, close_all, track


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: clock[0] is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_each_tenth_and_a_last_one(clock, capsys):
    with ProgressBar(40, "reading dev", "utterances") as shown:
        for _ in range(40):
            clock[0] += 1
            shown.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "reading dev: 10% (4 of 40 utterances), 36 s left",
        "reading dev: 20% (8 of 40 utterances), 32 s left",
    ]
    assert len(lines) == 10 and lines[-1] == "reading dev: 100% (40 of 40 utterances) in 40 s"


@pytest.mark.parametrize("total", [None, 4])
def test_track_uses_the_total_or_the_length(clock, capsys, total):
    for _ in track([7, 8], "reading", "files", total=total):
        clock[0] += 5
    share = "50% (1 of 2 files)" if total is None else "25% (1 of 4 files)"
    assert capsys.readouterr().err.splitlines()[0].startswith(f"reading: {share}")
    assert list(track([7, 8], "reading", "files", show=False)) == [7, 8] and capsys.readouterr().err == ""


def test_lines_are_two_seconds_apart(clock, capsys):
    for _ in track(range(100), "reading", "files"):
        clock[0] += 0.0625
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[2][:4] for line in lines] == [" 32%", " 64%", " 96%", " 100"]


def test_a_line_is_due_at_exactly_two_seconds_and_a_tenth(clock, capsys):
    with ProgressBar(20, "reading", "files") as shown:
        for _ in range(4):
            clock[0] += 1
            shown.update()
    assert (
        capsys.readouterr().err == "reading: 10% (2 of 20 files), 18 s left\nreading: 20% (4 of 20 files), 16 s left\n"
    )


def test_work_of_an_earlier_run_is_neither_shown_nor_timed(clock, capsys):
    clock[0] = 1000.0
    with ProgressBar(40, "training", "steps", done=20) as shown:
        clock[0] += 10
        shown.update(3)
        assert capsys.readouterr().err == ""
        shown.update()
    assert capsys.readouterr().err == "training: 60% (24 of 40 steps), 40 s left\n"


def test_only_a_complete_loop_reports_its_time(clock, capsys):
    clock[0] = 1000.0
    for count, last in ((9, "90% (9 of 10 files), 3 s left"), (10, "100% (10 of 10 files) in 30 s")):
        with ProgressBar(10, "reading", "files") as shown:
            for _ in range(count):
                clock[0] += 3
                shown.update()
        shown.close()  # a second call changes nothing
        assert capsys.readouterr().err.splitlines()[-1] == f"reading: {last}" and shown not in module._open


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99.4, "99 s"), (99.5, "2 min"), (120, "2 min"), (5969, "99 min"), (5970, "1.7 h"), (7200, "2.0 h")],
)
def test_durations_are_in_seconds_minutes_or_hours(seconds, text):
    assert module.format_duration(seconds) == text


def test_lines_are_flushed_at_once(clock, tmp_path, monkeypatch):
    with (tmp_path / "log").open("w") as log, ProgressBar(4, "reading", "files", show=False) as hidden:
        monkeypatch.setattr(sys, "stderr", log)
        with ProgressBar(4, "reading", "files") as shown:
            clock[0] += 4
            shown.update()
            assert (tmp_path / "log").read_text() == "reading: 25% (1 of 4 files), 12 s left\n"
            hidden.write("a line", file=log)
            assert (tmp_path / "log").read_text().endswith("left\na line\n")


def test_lines_go_to_the_stream_that_is_named(capsys):
    module.write("a", end="")
    module.write("b", file=sys.stderr, end="!")
    ProgressBar(4, "reading", "files", show=False).write("c")
    close_all()
    assert capsys.readouterr() == ("ac\n", "b!")


def test_a_short_loop_prints_nothing_to_a_log(clock, capsys):
    for _ in track(range(1000), "reading", "files"):
        clock[0] += 0.0019
    assert capsys.readouterr().err == ""


def test_without_a_total_the_interval_between_lines_doubles(clock, capsys):
    for _ in track(itertools.islice(itertools.count(), 100), "counting", "sentences"):
        clock[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [*(f"counting: {n} sentences" for n in (2, 6, 14, 30, 62)), "counting: 100 sentences in 2 min"]


def test_the_remaining_time_is_estimated_from_this_process_only(clock, capsys):
    with ProgressBar(100, "training", "steps", done=50) as shown:
        clock[0] = 100.0
        shown.note("loss 2.5")
        shown.update(10)
    assert capsys.readouterr().err == "training: 60% (60 of 100 steps), 7 min left; loss 2.5\n"


def test_a_sum_of_fractions_does_not_exceed_the_total(clock, capsys):
    with ProgressBar(0.3, "decoding", "s of audio") as shown:
        for _ in range(3):
            clock[0] += 3
            shown.update(0.1)
            assert shown.n <= 0.3


@pytest.mark.parametrize("total", [0, 0.0])
def test_an_empty_loop_does_not_divide_by_zero(clock, capsys, total):
    with ProgressBar(total, "decoding", "s of audio") as shown:
        clock[0] = 5.0
        shown.update(0)
    assert capsys.readouterr().err == ""


def test_hidden_progress_prints_nothing_and_still_counts(clock, capsys):
    with ProgressBar(4, "reading", "files", show=False) as shown:
        clock[0] = 9.0
        shown.update(2)
        assert shown.n == 2
    assert capsys.readouterr().err == ""


def test_a_write_error_does_not_end_the_loop(clock, monkeypatch):
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
    """The output of a program whose stdout and stderr are a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    done = subprocess.run([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode in (0, 2), text
    return text


class Bar:
    """Replaces tqdm and records its calls."""

    made: list = []

    def __init__(self, **options):
        self.options, self.n, self.notes, self.open = options, options["initial"], [], True
        Bar.made = [*Bar.made, self]

    def update(self, n):
        self.n += n

    def set_postfix_str(self, text, refresh):
        self.notes.append((text, refresh))

    def close(self):
        self.open = False

    @staticmethod
    def write(line, file, end):
        file.write(f"above the bar: {line}{end}")


@pytest.fixture
def terminal(monkeypatch):
    """A function (columns) that makes stderr a terminal and replaces tqdm by Bar."""
    ours, theirs = pty.openpty()

    def appear(columns):
        monkeypatch.setattr(sys, "stderr", stream)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    with os.fdopen(theirs, "w") as stream:
        yield appear
    os.close(ours)


@pytest.mark.parametrize(
    ("columns", "width"), [(80, {"dynamic_ncols": True}), (1, {"dynamic_ncols": True}), (0, {"ncols": 80})]
)
@pytest.mark.parametrize(("total", "form"), [(9, module.BAR), (None, module.BAR_WITHOUT_TOTAL)], ids=["bar", "endless"])
def test_the_bar_is_as_wide_as_the_terminal_or_80_columns(terminal, columns, width, total, form):
    terminal(columns)
    with ProgressBar(total, "reading dev", "utterances", done=3) as shown:
        shown.note("loss 2.5")
        shown.update(2)
        assert (shown.n, Bar.made[0].n, Bar.made[0].open) == (5, 5, True)
    (bar,) = Bar.made
    assert bar.options == {
        "total": total, "desc": "reading dev", "initial": 3, "unit": "utterances", "bar_format": form,
        "file": sys.stderr, "leave": False, **width,
    }  # fmt: skip
    assert bar.notes == [("loss 2.5", False)] and not bar.open and not module._open


def test_lines_are_written_above_a_visible_bar(terminal, clock, capsys):
    terminal(80)
    with ProgressBar(9, "reading", "files", show=False):
        with ProgressBar(9, "reading", "files") as shown:
            shown.write("a")
            module.write("b", end="!\n")
        module.write("c")
    assert len(Bar.made) == 1
    assert capsys.readouterr().out == "above the bar: a\nabove the bar: b!\nc\n"


@pytest.mark.parametrize("columns", [80, 0])
def test_lines_on_a_terminal_do_not_overwrite_the_bar(columns):
    text = on_a_terminal(
        """
from las_fast.progress import ProgressBar
with ProgressBar(4, "reading dev", "utterances") as shown:
    shown.update(2)
    shown.write("a line")
print("the end")
""",
        columns,
    )
    assert "reading dev:   0%|" in text and "/4 utterances [" in text
    lines = text.replace("\r\n", "\n").split("\n")
    assert any(line.endswith("\ra line") or line == "a line" for line in lines), lines
    assert lines[-2].endswith("\rthe end")  # the bar is cleared


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


def test_close_all_closes_bars_left_open_by_an_exception(clock, monkeypatch):
    first, second = track(range(3), "reading", "files"), track(range(3), "counting", "files")
    assert (next(first), next(second)) == (0, 0)
    order, close = [], module.ProgressBar.close
    monkeypatch.setattr(module.ProgressBar, "close", lambda self: order.append(self.what) or close(self))
    close_all()
    assert not module._open and order == ["counting", "reading"], "the lowest bar on the screen first"


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

    with ProgressBar(4, "reading", "files") as shown:
        shown._bar = Gone()
        for _ in range(4):
            shown.update()
    assert shown.n == 4


def test_a_log_gets_a_line_each_minute_if_a_tenth_takes_longer(clock, capsys):
    with ProgressBar(1000, "training", "steps") as shown:
        for _ in range(21):
            clock[0] += 9
            shown.update()
        clock[0] += 100
        shown.update(0)  # no progress, no line
    assert capsys.readouterr().err.splitlines() == [
        "training: 0% (7 of 1000 steps), 2.5 h left",
        "training: 1% (14 of 1000 steps), 2.5 h left",
        "training: 2% (21 of 1000 steps), 2.4 h left",
    ]


def test_without_a_total_lines_are_at_most_a_minute_apart(clock, capsys):
    for _ in track(itertools.islice(itertools.count(), 300), "counting", "sentences"):
        clock[0] += 1
    assert [int(line.split()[1]) for line in capsys.readouterr().err.splitlines()][-5:] == [62, 122, 182, 242, 300]
