"""Worker processes may die, hang or fail: batches stay the same, and nothing waits forever."""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from las_fast.data import loader as module
from las_fast.data.loader import Loader, can_fork
from las_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not can_fork(), reason="workers are forks, on Linux only")


class FakeBatches:
    """Batches with known values; a worker calls `fault(b)` first."""

    def __init__(self, fault=lambda b: None, *, everywhere=False):
        self.fault, self.parent, self.everywhere = fault, os.getpid(), everywhere

    def __getitem__(self, b):
        if self.everywhere or os.getpid() != self.parent:
            self.fault(b)
        return {"numbers": torch.arange(40_000, dtype=torch.float32) * b, "lengths": torch.tensor([b]), "tokens": None,
                "pid": torch.tensor(os.getpid()), "none": torch.zeros(0, 3)}  # fmt: skip


def check_batches(batches_to_load, *, workers=1, count=9):
    """Check that all batches came in order; return how many were made in this process."""
    made_here, expected, threads = 0, FakeBatches(), threading.active_count()
    for b, fields in enumerate(Loader(batches_to_load, range(count), workers=workers)):
        expected_fields = expected[b]
        assert list(fields) == list(expected_fields) and fields["tokens"] is None
        for name in ("numbers", "lengths", "none"):
            assert torch.equal(fields[name], expected_fields[name])
            assert fields[name].dtype == expected_fields[name].dtype
            assert not fields[name].is_shared(), "shared memory is scarce in containers"
        made_here += int(fields["pid"]) == os.getpid()
    assert no_children() and threading.active_count() == threads
    return made_here


workers_started: list[int] = []


@pytest.fixture(autouse=True)
def count_workers(monkeypatch):
    def fork(*arguments, _fork=module._fork):
        pid, pipe = _fork(*arguments)
        workers_started.append(pid)
        return pid, pipe

    workers_started.clear()
    monkeypatch.setattr(module, "_fork", fork)


def no_children() -> bool:
    return not any(os.path.exists(f"/proc/{pid}") for pid in workers_started)


@pytest.mark.parametrize("workers", [1, 2, 20])
def test_workers_make_all_batches_in_order(workers, capsys):
    assert check_batches(FakeBatches(), workers=workers) == 0
    assert capsys.readouterr().err == ""


def test_without_workers_each_batch_is_made_in_this_process():
    assert check_batches(FakeBatches(), workers=0) == 9


def test_nothing_to_load_is_an_empty_loader():
    assert list(Loader(FakeBatches(), range(0), workers=2)) == []


@pytest.mark.parametrize("name", ["SIGKILL", "SIGBUS", "SIGSEGV"])
def test_batches_of_a_worker_that_dies_are_made_in_this_process(name, capsys):
    def die(b):
        if b == 4:
            faulthandler.disable()  # the handler of pytest
            os.kill(os.getpid(), getattr(signal, name))

    assert check_batches(FakeBatches(die)) == 5
    err = capsys.readouterr().err
    why = ", perhaps out of memory" if name == "SIGKILL" else ""
    assert err.startswith(f"warning: a loader process ended early ({name}{why})")
    assert err.endswith("; from here on batches are made in the training process\n") and err.count("\n") == 1


def send_through_pipe(batches, b):
    """Write batch b to a pipe and read it back."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        module._send(batches, b, writing)
        os.close(writing)
        fields = module._read(pipe, False)
        assert pipe.read() == b""
    return fields


def test_a_batch_survives_the_pipe_unchanged(monkeypatch):
    batch = {"x": torch.arange(6, dtype=torch.int64).reshape(2, 3), "none": None, "empty": torch.zeros(0, 3),
            "half": torch.ones(2, dtype=torch.float16)}  # fmt: skip
    write = os.write
    monkeypatch.setattr(os, "write", lambda pipe, content: write(pipe, content[:7]))  # as if the pipe were full
    fields = send_through_pipe([batch], 0)
    assert list(fields) == list(batch) and fields["none"] is None
    for name in ("x", "empty", "half"):
        assert torch.equal(fields[name], batch[name]) and fields[name].dtype == batch[name].dtype
    assert send_through_pipe([], 0) is None  # the batch could not be made


@pytest.mark.parametrize(("fault", "status"), [(None, 0), (BrokenPipeError, 0), (OSError, 1)])
def test_a_worker_exits_with_a_status_and_never_returns(monkeypatch, fault, status):
    class Ended(BaseException):
        pass

    def send(batches, b, pipe):
        did.append((batches, b, pipe))
        if b == 5 and fault:
            raise fault

    def end(status):
        raise Ended(status)

    did, ignored, masks, threads = [], [], [], []
    monkeypatch.setattr(module, "_send", send)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(signal, "signal", lambda number, handler: ignored.append((number, handler)))
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *words: masks.append(words))
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    with pytest.raises(Ended) as error:
        module._work("batches", [4, 5], 7, {signal.SIGUSR1})
    monkeypatch.undo()
    assert error.value.args == (status,) and did == [("batches", 4, 7), ("batches", 5, 7)]
    assert ignored == [(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert masks == [(signal.SIG_SETMASK, {signal.SIGUSR1})] and threads == [1]


def test_the_exit_status_of_a_worker_that_was_already_reaped_is_unknown():
    process = subprocess.Popen(["true"])
    process.wait()
    child = module._Child.__new__(module._Child)
    child._pid = process.pid
    assert child._exit_reason() == "unknown exit status"


def test_batches_of_a_worker_that_exits_are_made_in_this_process(capsys):
    assert check_batches(FakeBatches(lambda b: b == 4 and os._exit(3)), workers=2) == 5
    assert "ended early (exit status 3)" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [time.sleep, lambda _: os.kill(os.getpid(), signal.SIGSTOP)], ids=["sleep", "stop"])
def test_a_worker_that_sends_nothing_is_abandoned(fault, monkeypatch, capsys):
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    assert check_batches(FakeBatches(lambda b: b == 4 and fault(99))) == 5
    assert "a loader process sent nothing for 0 s" in capsys.readouterr().err


def test_a_batch_that_a_worker_cannot_make_is_made_in_this_process(capsys):
    def no_memory(b):
        if b == 4:
            raise MemoryError

    assert check_batches(FakeBatches(no_memory)) == 1


def test_an_error_of_the_dataset_is_raised_unchanged():
    def bad(b):
        if b == 4:
            raise InputError("x.npy is damaged")

    with pytest.raises(InputError, match="x.npy is damaged"):
        check_batches(FakeBatches(bad, everywhere=True))
    assert no_children()


def test_if_no_process_can_start_batches_are_made_in_this_process(monkeypatch, capsys):
    def fork():
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    before = len(os.listdir("/proc/self/fd"))
    assert check_batches(FakeBatches(), workers=2) == 9
    assert "no loader process could be started (Resource temporarily unavailable)" in capsys.readouterr().err
    assert len(os.listdir("/proc/self/fd")) == before


def test_leaving_a_loader_early_ends_its_workers():
    batches = iter(Loader(FakeBatches(), range(100), workers=2))
    next(batches)
    assert len(workers_started) == 2 and not no_children()
    batches.close()
    assert no_children()


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_workers_leave_signals_to_the_parent(signal_name):
    def signalled(b):
        if b == 2:
            os.kill(os.getpid(), getattr(signal, signal_name))

    old = signal.signal(getattr(signal, signal_name), lambda *_: pytest.fail("the parent's handler ran in a worker"))
    try:
        assert check_batches(FakeBatches(signalled)) == 0
    finally:
        signal.signal(getattr(signal, signal_name), old)


def test_workers_end_with_a_parent_that_is_killed():
    code = """
import torch
from las_fast.data.loader import Loader
class Made:
    def __getitem__(self, b): return {"x": torch.zeros(1 << 18)}
for fields in Loader(Made(), range(1000), workers=2):
    print("ready", flush=True)
    input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert parent.stdout.readline() == b"ready\n"
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) == 2
    parent.kill()
    assert parent.stdout.read() == b""  # a live worker would hold it open
    parent.wait()


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_for_a_gpu_are_in_pinned_memory(monkeypatch, workers):
    pinned = []
    empty = torch.empty

    def fake_empty(*arguments, pin_memory=False, **options):
        pinned.extend([1] if pin_memory else [])
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", fake_empty)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(1) or self)
    assert len(list(Loader(FakeBatches(), range(3), workers=workers, pin=True))) == 3
    assert len(pinned) == 3 * 4  # the tensors of a batch
