"""Errors from outside the program are one sentence; bugs are not."""

import errno
import json
import os
import signal
import sys

import pytest
import torch
import yaml

from las_fast.errors import (
    ADVICE,
    JSON_ESCAPES,
    InputError,
    Stopped,
    explain_error,
    is_out_of_memory,
    mute,
    print_error,
    show,
)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, "no space is left on the disk (x.wav); free some"),
        (errno.EDQUOT, "the disk quota is used up (x.wav); free some space or write to another disk"),
        (errno.EFBIG, "x.wav would exceed the file size limit; write to another disk, or raise ulimit -f"),
        (errno.EACCES, "x.wav: permission denied; change its permissions or give another path"),
        (errno.EPERM, "x.wav: operation not permitted; change its permissions or give another path"),
        (errno.EROFS, "x.wav lies on a read-only file system; give another path"),
        (errno.ENOENT, "x.wav does not exist; check the path"),
        (errno.ENAMETOOLONG, "x.wav: the name is too long for the file system; shorten it"),
        (errno.EMFILE, "too many files are open (x.wav); raise the limit, such as with ulimit -n 1024"),
        (errno.ENFILE, "too many files are open on this machine (x.wav); end other programs"),
        (errno.EIO, "x.wav could not be read or written (input/output error); check the disk or the network"),
        (errno.EAGAIN, "the system allows no more processes or threads (x.wav); raise ulimit -u or end other programs"),
        (errno.ENOTDIR, "x.wav: Not a directory; check the path"),
    ],
)
def test_system_errors_are_one_sentence_with_the_file_name(code, sentence):
    assert explain_error(OSError(code, "Not a directory", "x.wav")) == sentence
    assert code in ADVICE or code == errno.ENOTDIR


def test_a_system_error_without_a_file_and_one_with_two():
    assert explain_error(OSError(errno.ENOSPC, "full")) == "no space is left on the disk (input or output); free some"
    both = OSError(errno.EXDEV, "Invalid cross-device link", "a", None, b"b\xe0")
    assert explain_error(both) == r"a and b\xe0: Invalid cross-device link; check the path"
    assert explain_error(OSError("what a library says")) == "a system call failed (what a library says); run again"
    assert explain_error(OSError()) == "a system call failed (OSError); run again"
    open_file = OSError(errno.EIO, "Input/output error", 7)  # a file descriptor in place of a name
    assert explain_error(open_file) == "a system call failed (Input/output error); run again"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (InputError("as it is"), "as it is"),
        (MemoryError(), "there is not enough memory; give smaller input, or run on a machine with more memory"),
        (RuntimeError("Could not determine home directory."), "no home folder is known; set HOME, or write paths"),
        (RuntimeError("can't start new thread"), "the system allows no more threads; raise ulimit -u"),
        (ValueError("embedded null byte"), "a path contains a NUL character; correct the settings or the manifest"),
        (UnicodeError("odd"), "a text or a name is not UTF-8 (odd); save it as UTF-8 or rename the file"),
        (RuntimeError("shapes disagree"), None),
        (ValueError("home directory"), None),
        (RecursionError("maximum recursion depth exceeded"), None),
        (KeyError("x"), None),
    ],
)
def test_only_errors_from_outside_are_explained(error, sentence):
    actual = explain_error(error)
    assert actual is None if sentence is None else actual.startswith(sentence)


def test_a_deeply_nested_file_is_not_a_bug():
    with pytest.raises(RecursionError) as raised:
        yaml.safe_load("[" * 100_000)
    assert explain_error(raised.value) == "a file is nested too deeply to be read; check that it is the intended file"

    def is_explained(actual):
        raise RecursionError("maximum recursion depth exceeded")

    with pytest.raises(RecursionError) as raised:
        json.loads("{}", object_hook=is_explained)
    assert explain_error(raised.value) is None


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "x"), True),
        (torch.OutOfMemoryError("CUDA"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (OSError("Cannot allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a memory object"), True),
        (ValueError("out of memory"), False),
        (OSError(errno.ENOSPC, "x"), False),
        (RuntimeError("memory"), False),
    ],
)
def test_out_of_memory_is_recognised_by_type_errno_and_message(error, lacks):
    assert is_out_of_memory(error) is lacks


def test_an_error_raised_while_memory_ran_out_reports_it_too():
    captured = RuntimeError("operation failed due to a previous error during capture")
    captured.__context__ = torch.OutOfMemoryError("CUDA")
    wrapped = ValueError("x")
    wrapped.__cause__ = captured
    assert is_out_of_memory(captured) and is_out_of_memory(wrapped) and not is_out_of_memory(ValueError("x"))


def test_messages_of_libraries_are_shortened_to_one_line():
    short, long = "a\n b" + "x" * 117, "y" * 121
    assert explain_error(OSError(short)) == f"a system call failed (a b{'x' * 117}); run again"
    assert explain_error(OSError(long)) == f"a system call failed ({'y' * 120}...); run again"


def test_names_are_shown_on_one_line_of_printable_characters():
    assert show(b"caf\xe0.wav") == r"caf\xe0.wav" and show("a\nb\x1b") == r"a\nb\x1b" and show("é 한") == "é 한"


def test_characters_that_an_encoding_lacks_become_json_escapes():
    assert "aé한😀\udce0b".encode("ascii", JSON_ESCAPES) == rb"a\u00e9\ud55c\ud83d\ude00\udce0b"
    assert json.loads('"' + "é😀".encode("ascii", JSON_ESCAPES).decode() + '"') == "é😀"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("utf-8", JSON_ESCAPES)


def test_stopped_knows_its_signal():
    assert (Stopped().signum, Stopped(signal.SIGHUP).signum) == (signal.SIGINT, signal.SIGHUP)


def test_a_muted_stream_writes_nothing_and_leaks_no_file_descriptor(tmp_path):
    stream = (tmp_path / "log").open("w")
    stream.write("pending")
    before = len(os.listdir("/proc/self/fd"))
    mute(stream)
    assert len(os.listdir("/proc/self/fd")) == before
    stream.close()
    assert (tmp_path / "log").read_text() == ""
    mute(stream)
    mute(None)


def test_errors_are_flushed_and_a_full_stderr_is_muted(tmp_path, monkeypatch):
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        print_error("error: x")
        assert (tmp_path / "log").read_text() == "error: x\n"
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        print_error("error: x")
        full.write("more")  # closing it is not an error
