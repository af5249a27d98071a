"""Errors from outside the program: each is one sentence, and faults of the program stay what they are."""

import errno
import json
import os
import signal
import sys

import pytest
import torch
import yaml

from las_fast import plain_yaml
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
from las_fast.plain_yaml import Plain


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
def test_system_errors_are_one_sentence_with_the_file(code, sentence):
    assert explain_error(OSError(code, "Not a directory", "x.wav")) == sentence
    assert code in ADVICE or code == errno.ENOTDIR


def test_a_system_error_without_a_file_and_one_with_two():
    assert explain_error(OSError(errno.ENOSPC, "full")) == "no space is left on the disk (input or output); free some"
    both = OSError(errno.EXDEV, "Invalid cross-device link", "a", None, b"b\xe0")
    assert explain_error(both) == r"a and b\xe0: Invalid cross-device link; check the path"
    assert explain_error(OSError("what a library says")) == "a system call failed (what a library says); run again"
    assert explain_error(OSError()) == "a system call failed (OSError); run again"
    open_file = OSError(errno.EIO, "Input/output error", 7)  # a number in place of a name
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
def test_only_errors_from_outside_have_a_sentence(error, sentence):
    found = explain_error(error)
    assert found is None if sentence is None else found.startswith(sentence)


def test_a_deeply_nested_file_is_not_a_bug():
    with pytest.raises(RecursionError) as raised:
        yaml.safe_load("[" * 100_000)
    assert explain_error(raised.value) == "a file is nested too deeply to be read; check that it is the intended file"

    def ours(found):
        raise RecursionError("maximum recursion depth exceeded")

    with pytest.raises(RecursionError) as raised:
        json.loads("{}", object_hook=ours)
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


def test_a_muted_stream_writes_nothing_and_leaks_no_descriptor(tmp_path):
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
        full.write("more")  # and closing it is no error


# -------------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "whole", "real"),
    [
        ("10", 10, 10.0), ("-3", -3, -3.0), ("+3", 3, 3.0), ("0", 0, 0.0), ("1_000", 1000, 1000.0),
        ("010", None, None), ("1__0", None, None), ("1:30", None, None), ("0x10", None, None), ("ten", None, None),
        ("1.5", None, 1.5), (".5", None, 0.5), ("1.", None, 1.0), ("1e-3", None, 1e-3), ("-1.5E+2", None, -150.0),
        (".inf", None, float("inf")), ("+.INF", None, float("inf")), ("-.Inf", None, float("-inf")),
        ("inf", None, None), ("1e", None, None), ("", None, None), ("1 0", None, None),
    ],
)  # fmt: skip
def test_unquoted_numbers_are_parsed_or_rejected(text, whole, real):
    assert plain_yaml.parse_number(Plain(text), int) == whole and plain_yaml.parse_number(Plain(text), float) == real


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("010", "; write it in decimal, without a leading zero"),
        ("-0x1", "; write it in decimal, without a leading zero"),
        ("+08", "; write it in decimal, without a leading zero"),
        ("1:30", "; write minutes and hours as one number"),
        ("ten", ""),
    ],
)
def test_a_number_that_yaml_would_misread_has_a_hint(text, hint):
    from las_fast import config

    assert config._hint(int, Plain(text)) == config._hint(float, Plain(text)) == hint
    assert config._hint(str, Plain(text)) == config._hint(int, text) == ""


def test_nan_is_a_float_and_not_an_int():
    found = plain_yaml.parse_number(Plain(".NaN"), float)
    assert found != found and plain_yaml.parse_number(Plain(".nan"), int) is None
    assert plain_yaml.parse_number(Plain("9" * 5000), int) is None  # more digits than Python converts


def test_booleans_are_six_words():
    for word, value in {"true": True, "Yes": True, "ON": True, "false": False, "No": False, "off": False}.items():
        assert plain_yaml.parse_bool(Plain(word)) is value
    assert all(plain_yaml.parse_bool(Plain(word)) is None for word in ("1", "0", "y", "n", "t", ""))


def test_values_keep_their_text_and_their_line():
    found = plain_yaml.load('a: 010\nb: "010"\nc:\nd: ~\ne: [no, 2020-01-01]\nf: null\n', "x.yaml")
    assert found == {"a": "010", "b": "010", "c": None, "d": None, "e": ["no", "2020-01-01"], "f": None}
    assert isinstance(found["a"], Plain) and not isinstance(found["b"], Plain)
    assert (found["a"].line, [item.line for item in found["e"]]) == (1, [5, 5])
    assert plain_yaml.load("", "x.yaml") is None
    assert plain_yaml.load("[Null, NULL, ~, null, ]", "x.yaml") == [None] * 4 and Plain("x").line == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "x.yaml: a is set twice, in lines 1 and 3; leave one of them out"),
        ("a: [1\n", "x.yaml is not YAML: "),
        ("[" * 100_000, "x.yaml is nested too deeply; give a file of settings"),
        ("a: !!int x\n", "x.yaml is not YAML: "),
    ],
)
def test_an_invalid_document_is_one_sentence(text, message):
    with pytest.raises(InputError) as raised:
        plain_yaml.load(text, "x.yaml")
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_values_in_errors_are_short_and_have_their_line():
    assert plain_yaml.got(Plain("010", 4)) == "010 (line 4)" and plain_yaml.got("010") == "'010'"
    assert plain_yaml.got(Plain("word", 2)) == "'word' (line 2)" and plain_yaml.got(None) == "None"
    assert plain_yaml.got(Plain("x" * 80)) == f"'{'x' * 80}'" and len(plain_yaml.got(Plain("x" * 81))) <= 80
    assert plain_yaml.got([1, 2, 3, 4]) == "[1, 2, 3, 4]" and plain_yaml.got([1, 2, 3, 4, 5]) == "[1, 2, 3, 4, ...]"
    assert plain_yaml.got(dict.fromkeys("abcd")) == "{'a': None, 'b': None, 'c': None, 'd': None}"
    assert plain_yaml.got(dict.fromkeys("abcde")) == "{'a': None, 'b': None, 'c': None, 'd': None, ...}"
    assert plain_yaml.got([[[1]]]) == "[[[...]]]" and plain_yaml.got([[]]) == "[[]]"
    assert [len(plain_yaml.got(long)) for long in ("x" * 78, "x" * 79, b"x" * 77, b"x" * 78)] == [80] * 4
    assert "..." not in plain_yaml.got("x" * 78) + plain_yaml.got(b"x" * 77)
    assert Plain.__repr__(Plain("0x1F")) == "0x1F" and repr(Plain("ten")) == "'ten'"
