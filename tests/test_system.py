"""Cores and the memory allocator; devices are tested with the commands that use them."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from las_fast import decode, system, transcribe, tune


def test_mallopt_gets_the_parameters_of_malloc_h(monkeypatch):
    calls = []
    monkeypatch.setattr(system, "_mallopt", lambda *arguments: calls.append(arguments))
    system.tune_memory()
    system.return_freed_memory()
    mmap_threshold, trim_threshold, never = -3, -1, -1
    assert calls == [(mmap_threshold, 32 * 2**20), (trim_threshold, never), (mmap_threshold, 2**20)]


@pytest.mark.parametrize(
    ("name", "value"), [("THP_MEM_ALLOC_ENABLE", "1"), ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")]
)
def test_torch_is_told_by_the_environment_unless_the_user_has_chosen(monkeypatch, name, value):
    monkeypatch.setattr(system, "_mallopt", lambda *arguments: None)
    monkeypatch.delenv(name, raising=False)
    system.tune_memory()
    assert os.environ[name] == value
    monkeypatch.setenv(name, "0")
    system.tune_memory()
    assert os.environ[name] == "0"


@pytest.mark.parametrize(
    ("platform", "library", "expected"),
    [
        ("linux", lambda calls: SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments)), [(-3, 7)]),
        ("linux", lambda calls: SimpleNamespace(), []),  # musl has no mallopt
        ("darwin", lambda calls: SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments)), []),
    ],
)
def test_mallopt_is_called_only_if_the_c_library_has_it(monkeypatch, platform, library, expected):
    calls = []
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library(calls))
    system._mallopt(-3, 7)
    assert calls == expected


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0: {2, 5, 7}}[pid], raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(system, "cpu_quota", lambda: None)
    assert system.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert system.cores() == 16
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert system.cores() == 1


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (0.5, 1), (1.5, 2), (2.0, 2), (8.0, 4)])
def test_a_containers_limit_counts_as_cores(monkeypatch, quota, cores):
    monkeypatch.setattr(system, "allowed_cores", lambda: 4)
    monkeypatch.setattr(system, "cpu_quota", lambda: quota)
    assert system.cores() == cores


@pytest.mark.parametrize(
    ("code", "reason"),
    [(3, "exit status 3"), (0, "exit status 0"), (-9, "SIGKILL, perhaps out of memory"), (-11, "SIGSEGV"),
     (-40, "signal 40")],
)  # fmt: skip
def test_the_end_of_a_process_is_explained(code, reason):
    assert system.exit_reason(code) == reason


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: 17\n", "AMD EPYC (family 25, model 17)"),
        ("model name\t: AMD EPYC 9654\ncpu family\t: 25\nmodel\t\t: 17\n", "AMD EPYC 9654"),
        ("model name\t: Neoverse N1\n", "Neoverse N1"),
        ("BogoMIPS\t: 50.00\n", "some processor"),
        (None, "some processor"),
    ],
)
def test_the_name_of_a_processor_has_its_family_if_it_is_short(monkeypatch, tmp_path, lines, expected):
    monkeypatch.setattr(system, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(system.platform, "processor", lambda: "some processor")
    if lines is not None:
        (tmp_path / "cpuinfo").write_text(lines)
    assert system.machine_name() == expected
    monkeypatch.setattr(system.platform, "processor", lambda: "")
    monkeypatch.setattr(system.platform, "machine", lambda: "riscv64")
    assert system.machine_name() == expected.replace("some processor", "riscv64")


def test_what_is_missing_for_the_extension_comes_with_the_package_that_has_it(monkeypatch, tmp_path):
    monkeypatch.setattr(system.shutil, "which", lambda name: None)
    problem, advice = system.missing_for_build()
    assert "no C++ compiler" in problem and advice == "install g++"
    monkeypatch.setattr(system.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(system.sysconfig, "get_path", lambda name: str(tmp_path))
    problem, advice = system.missing_for_build()
    assert str(tmp_path / "Python.h") in problem and advice.startswith("install python3-dev")
    (tmp_path / "Python.h").touch()
    assert system.missing_for_build() is None
    monkeypatch.setattr(system.sys, "platform", "darwin")
    assert system.missing_for_build() == ("this is darwin and not Linux", "use Linux")


def test_clang_is_known_from_its_version(monkeypatch, tmp_path):
    program = tmp_path / "c++"
    for text, expected in (("Debian clang version 19.1.7", True), ("g++ (Debian 14.2.0-19) 14.2.0", False)):
        program.write_text(f"#!/bin/sh\necho '{text}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("CXX", str(program))
        assert system.is_clang() is expected
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not system.is_clang()


def test_what_is_missing_for_triton_is_what_it_looks_for(monkeypatch, tmp_path):
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    found: list[str] = []
    monkeypatch.setattr(system.shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(system.sysconfig, "get_path", lambda *_: str(tmp_path))
    assert system.missing_for_triton() == ("there is no C compiler (gcc or clang)", "Install gcc")
    for name in ("gcc", "clang"):
        found[:] = [name]
        problem, advice = system.missing_for_triton()
        assert problem == f"Python's headers are missing ({tmp_path}/Python.h)" and advice.startswith(
            "Install python3-dev"
        )
    found.clear()
    monkeypatch.setenv("CC", "my-compiler")  # Triton then runs it, wherever it is
    monkeypatch.setenv("CPATH", f"/nowhere:{tmp_path / 'other'}")
    assert "headers" in system.missing_for_triton()[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "Python.h").touch()
    assert system.missing_for_triton() is None


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")
def test_decoding_returns_large_blocks_to_the_system_and_training_keeps_them():
    """Runs in a new process, which counts its mapped blocks."""
    script = """
import ctypes
from las_fast import system
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
class Counts(ctypes.Structure):
    _fields_ = [(str(i), ctypes.c_size_t) for i in range(10)]
libc.mallinfo2.restype = Counts
def mapped_blocks():
    before = getattr(libc.mallinfo2(), "3")
    libc.malloc(ctypes.c_size_t(2 * system.DECODING_MMAP_BYTES))
    return getattr(libc.mallinfo2(), "3") - before
system.tune_memory()
print(mapped_blocks())
system.return_freed_memory()
print(mapped_blocks())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]


@pytest.mark.parametrize("module", [decode, transcribe, tune])
def test_decoding_commands_return_large_blocks_to_the_system(module, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(module, "return_freed_memory", lambda: calls.append(module))
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert calls == [module]


def test_a_folder_is_not_an_installed_package(monkeypatch, tmp_path):
    """A folder wandb, which wandb writes, is a namespace package to Python."""
    (tmp_path / "some_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert __import__("some_folder") and not system.is_installed("some_folder")
    assert system.is_installed("pytest") and not system.is_installed("no_such_package")
