"""Packaging: pins, the optional extension, the wheel, the Makefile, the skip check."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import check_skips
import pytest
from packaging.requirements import Requirement

from las_fast import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirement_lines(path):
    return [Requirement(line) for line in path.read_text().splitlines() if line and not line.startswith("#")]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_pin_satisfies_the_packages_requirements():
    pins = {canonical(pin.name): next(iter(pin.specifier)) for pin in requirement_lines(ROOT / "requirements.txt")}
    extras = PROJECT["optional-dependencies"]
    for wanted in map(Requirement, [*PROJECT["dependencies"], *extras["dev"], *extras["demo"], *extras["onnx"]]):
        pin = pins.pop(canonical(wanted.name))
        assert pin.operator == "==" and pin.version in wanted.specifier, wanted
    assert set(pins) == {"setuptools"}  # builds the extension


def test_every_dependency_has_a_reason():
    block = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("\n]")[0]
    assert all(re.search(r'",\s+# \S+', line) for line in block.strip().splitlines())


def run_setup(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", f"import sys, runpy; sys.argv = ['setup.py', '-q', 'build_ext']; {code}\n"
         "runpy.run_path('setup.py', run_name='__main__')"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_without_a_compiler_setup_says_so_in_one_line_and_succeeds():
    done = run_setup("", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("las_fast: no C++ compiler (no-such-compiler)") and "build_ext" in line


def test_without_the_headers_of_python_setup_says_so_in_one_line_and_succeeds():
    code = """
import sysconfig; real = sysconfig.get_path
sysconfig.get_path = lambda name, *a, **k: '/nowhere' if name == 'include' else real(name, *a, **k)
"""
    done = run_setup(code, CXX=sys.executable)  # any existing program: nothing is compiled
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("las_fast: Python's headers are missing (/nowhere/Python.h)") and "python3-dev" in line


def test_without_torch_setup_says_so_in_one_line_and_succeeds():
    done = run_setup("sys.modules['torch'] = None")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "torch is not importable" in line and "--no-build-isolation" in line


def test_without_the_extension_ops_run_with_a_single_warning():
    code = """
import sys; sys.modules['las_fast._C'] = None
import torch
from las_fast.ops import beam_backtrack
t = torch.tensor([[[3]], [[2]]])
for _ in range(3): print(beam_backtrack(t, t * 0, t.float(), t, eos=2)[0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[[[3, 2]]]"] * 3
    assert done.stderr.count("Run: python setup.py build_ext") == 1


def test_a_wheel_contains_modules_presets_and_the_console_script(tmp_path):
    source = tmp_path / "source"
    for folder in ("las_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = subprocess.run(
        [*command, "."],
        cwd=source,
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob(f"las_fast-{__version__}-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    presets = {f"las_fast/configs/{path.name}" for path in (ROOT / "las_fast" / "configs").glob("*.yaml")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "las_fast").rglob("*.py")}
    modules -= {"las_fast/kernels/__init__.py"}  # in a checkout it points to kernels/; a wheel contains the files
    modules |= {f"las_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    released = {f"las_fast/checkpoints/{path.name}" for path in (ROOT / "las_fast" / "checkpoints").iterdir()}
    files = {"las_fast/py.typed", "las_fast/training/report.html"}
    assert presets and released and presets | modules | released | files <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    (entry,) = (name for name in names if name.endswith("entry_points.txt"))
    assert b"las-fast = las_fast.cli:main" in zipfile.ZipFile(wheel).read(entry)


def make(*argv):
    """Run make without the variables of an outer make that started these tests."""
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(["make", *argv], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("target", "job"), [
    ("demo", "-m las_fast.demo --out runs/demo"),
    ("test", "-m pytest"),
    ("bench", "-m pytest benchmarks"),
    ("lint", "ruff check"),
    ("lint", "/mypy"),
    ("gpu-check", "-m benchmarks.device --out runs/gpu-"),
])  # fmt: skip
def test_each_make_target_sets_up_everything_before_its_job(target, job):
    lines = make("-n", target, "VENV=/nowhere/venv").stdout
    steps = ["-m venv /nowhere/venv", "grep '^torch=='", "-r requirements.txt"]
    steps += [] if target == "lint" else ["setup.py -q build_ext"]
    places = [lines.index(step) for step in [*steps, job]]
    assert places == sorted(places)


def junit(path, *reasons):
    cases = "".join(f'<testcase classname="t" name="n"><skipped message="{r}"/></testcase>' for r in reasons)
    path.write_text(f"<testsuites><testsuite>{cases}<testcase classname='t' name='ran'/></testsuite></testsuites>")
    return str(path)


def test_a_skip_without_a_good_reason_fails_the_run(tmp_path, capsys):
    assert check_skips.main(junit(tmp_path / "a.xml")) == 0
    assert check_skips.main(junit(tmp_path / "b.xml", "no CUDA device here")) == 0
    assert check_skips.main(junit(tmp_path / "c.xml", "no CUDA device here", "could not import x")) == 1
    assert "SHOULD HAVE RUN: t::n: could not import x" in capsys.readouterr().out


def test_a_file_skipped_as_a_whole_is_excused_only_by_its_reason(tmp_path):
    for reason, expected in (("no CUDA device", 0), ("could not import x", 1)):
        mark = f"<skipped message='collection skipped'>('t.py', 3, 'Skipped: {reason}')</skipped>"
        path = tmp_path / "a.xml"
        path.write_text(f"<testsuite><testcase classname='' name='t'>{mark}</testcase></testsuite>")
        assert check_skips.main(str(path)) == expected


def test_absent_recordings_are_an_excuse_only_if_they_are_absent(tmp_path):
    expected = 1 if check_skips.SHARED.is_dir() else 0
    assert check_skips.main(junit(tmp_path / "a.xml", "../shared is absent")) == expected
    (tmp_path / "none.xml").write_text("<testsuites/>")
    assert check_skips.main(str(tmp_path / "none.xml")) == 1
