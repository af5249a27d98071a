"""Packaging: pins, the optional extension, the wheel, the Makefile, the skip check."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import check_skips
import numpy as np
import pytest
import soundfile
from packaging.requirements import Requirement

from las_fast import __version__

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, DEPENDENCIES = SETTINGS["project"], SETTINGS["tool"]["las_fast"]["dependencies"]
SOURCES = ("setup.py", "build_backend.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")


def requirement_lines(path):
    return [Requirement(line) for line in path.read_text().splitlines() if line and not line.startswith("#")]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_pin_satisfies_the_packages_requirements():
    pins = {canonical(pin.name): next(iter(pin.specifier)) for pin in requirement_lines(ROOT / "requirements.txt")}
    extras = [PROJECT["optional-dependencies"][name] for name in ("dev", "demo", "onnx", "serve", "media", "vad")]
    wanted = [Requirement(line) for line in (*DEPENDENCIES, *sum(extras, []))]
    for one in wanted:
        pin = pins[canonical(one.name)]
        assert pin.operator == "==" and pin.version in one.specifier, one
    assert set(pins) - {canonical(one.name) for one in wanted} == {"setuptools"}  # builds the extension


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
    done = run_setup(code, CXX=sys.executable)  # nothing is compiled: any program will do
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("las_fast: Python's headers are missing (/nowhere/Python.h)") and "python3-dev" in line


def test_without_torch_setup_says_so_in_one_line_and_succeeds():
    done = run_setup("sys.modules['torch'] = None")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("las_fast: torch cannot be imported (import of torch halted; None in sys.modules)")
    assert line.endswith("To build it, install torch and run: python setup.py build_ext")


def test_an_older_setuptools_is_named_before_it_fails():
    done = run_setup("import setuptools; setuptools.__version__ = '65.5.0'")
    assert done.returncode == 1 and done.stderr == (
        "las_fast needs setuptools 77 or newer to build, and this is 65.5.0. Run: pip install --upgrade setuptools\n"
    )


def test_an_older_python_is_named_before_it_fails():
    done = run_setup("import setuptools; sys.version_info = (3, 10, 4); sys.version = '3.10.4 (main)'")
    assert done.returncode == 1 and done.stderr == "las_fast needs Python 3.11 or newer; this is 3.10.4\n"


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


@pytest.fixture
def source(tmp_path):
    """A copy of the source without built files."""
    folder = tmp_path / "source"
    for name in ("las_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    return folder


def pip_wheel(source, *argv, **environment):
    out = source.parent / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), *argv]
    done = subprocess.run(
        [*command, str(source)], cwd=source, env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done, sorted(out.glob("*.whl"))


def test_a_wheel_contains_modules_presets_the_page_and_the_console_script(source):
    done, (wheel,) = pip_wheel(source, "-C", "extension=skip", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert wheel.name == f"las_fast-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    presets = {f"las_fast/configs/{path.name}" for path in (ROOT / "las_fast" / "configs").glob("*.yaml")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "las_fast").rglob("*.py")}
    modules -= {"las_fast/kernels/__init__.py"}  # in a checkout it points to kernels/; a wheel contains the files
    modules |= {f"las_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    released = {f"las_fast/checkpoints/{path.name}" for path in (ROOT / "las_fast" / "checkpoints").iterdir()}
    page = {f"las_fast/serve/page/{path.name}" for path in (ROOT / "las_fast" / "serve" / "page").iterdir()}
    files = {"las_fast/py.typed", "las_fast/training/report.html", *page}
    assert presets and released and page and presets | modules | released | files <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    (entry,) = (name for name in names if name.endswith("entry_points.txt"))
    assert b"las-fast = las_fast.cli:main" in zipfile.ZipFile(wheel).read(entry)
    assert [*map(str, wheel_requirements(wheel))] == [*map(str, map(Requirement, DEPENDENCIES))]


def wheel_requirements(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith("/METADATA"))
        lines = file.read(name).decode().splitlines()
    requirements = [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")]
    return [one for one in requirements if "extra ==" not in str(one.marker)]


def test_pip_fails_if_the_extension_cannot_be_built(source):
    done, wheels = pip_wheel(source, CXX="no-such-compiler")
    assert done.returncode != 0 and wheels == []
    sentence = (
        "las_fast: no C++ compiler (no-such-compiler), so the C++ extension cannot be built. To build it, install"
    )
    assert sentence in done.stderr and "-C extension=skip" in done.stderr


def backend(code, **environment):
    """Run code in a new process in the root of the source, as pip runs the hooks of the backend."""
    done = subprocess.run(
        [sys.executable, "-c", f"import build_backend as b\n{code}"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.splitlines()[-1] if done.stdout else "", done.stderr.strip()


def test_pip_gets_torch_only_if_the_environment_has_none():
    requires = "print([x for x in b.get_requires_for_build_wheel({}) if 'torch' in x])"
    isolated = "import importlib.util as u; u.find_spec = lambda name: None\n"  # hides what is installed
    empty = (
        "real = b.sysconfig.get_path; b.sysconfig.get_path = lambda n, *a: '/nowhere' if 'lib' in n else real(n, *a)\n"
    )
    torch = next(line for line in DEPENDENCIES if line.startswith("torch"))
    for code, expected in ((isolated, "[]"), (isolated + empty, f"[{torch!r}]")):
        assert backend(code + requires, CXX=sys.executable) == (expected, "")  # nothing is compiled
    assert backend(requires.replace("{}", "{'extension': 'skip'}"), CXX="no-such-compiler") == ("[]", "")


def test_torch_is_found_in_the_environment_that_pip_installs_into():
    """pip removes that environment's packages from sys.path in its isolated one, but not from sysconfig."""
    code = (
        "import sys; sys.path = [x for x in sys.path if 'site-packages' not in x]\n"
        "print(b.find_torch() and __import__('torch').__version__)"
    )
    import torch

    assert backend(code) == (torch.__version__, "")


@pytest.mark.parametrize("settings", ["{'extension': 'maybe'}", "{'extension': ''}"])
def test_a_wrong_value_of_the_option_extension_is_refused(settings):
    _, error = backend(f"b.build_wheel('x', {settings})")
    assert error.startswith("las_fast: -C extension must be require or skip; got '")


def test_an_extension_pins_the_minor_version_of_torch_that_compiled_it():
    expected = [line if not line.startswith("torch") else "torch==2.13.*" for line in DEPENDENCIES]
    assert backend("print(b.runtime_dependencies('2.13.1+cu129'))") == (str(expected), "")
    assert backend("print(b.runtime_dependencies(None))") == (str(DEPENDENCIES), "")


def test_an_editable_installation_works_where_the_clone_lies(source, tmp_path):
    """There Python finds the clone's folder, which is named las_fast and is no package, before any import hook."""
    clone, environment = source.rename(tmp_path / "las_fast"), tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (packages,) = environment.glob("lib/*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))  # torch and setuptools, without a download
    python = str(environment / "bin" / "python")
    command = [sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-index", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", "-C", "extension=skip", "-e", str(clone)], check=True)
    code = "import las_fast; print(las_fast.__file__)"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(clone / "las_fast" / "__init__.py"), done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of `make wheel`; objects that `make build` has compiled are used."""
    folder = tmp_path_factory.mktemp("wheel")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.iterdir()
    return built


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_wheel_runs_in_a_clean_environment_without_a_compiler(wheel, tmp_path):
    import torch

    assert re.fullmatch(rf"las_fast-{re.escape(__version__)}-cp310-abi3-\w+\.whl", wheel.name)
    (pin,) = (one for one in wheel_requirements(wheel) if one.name == "torch")
    assert str(pin.specifier) == f"=={'.'.join(torch.__version__.split('.')[:2])}.*"
    clean = tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(clean)], check=True)
    (packages,) = clean.glob("lib/*/site-packages")
    (packages / "others.pth").write_text(str(Path(torch.__file__).parents[1]))  # dependencies, without a download
    command = [sys.executable, "-m", "pip", "-q", "--python", str(clean / "bin" / "python"), "install", "--no-index"]
    subprocess.run([*command, "--no-deps", "--disable-pip-version-check", str(wheel)], check=True)

    def run(*argv):
        environment = {"PATH": str(clean / "bin"), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [str(clean / "bin" / "las-fast"), *argv], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done

    lines = {line[:14].strip(): line[14:] for line in run("doctor").stdout.splitlines()}
    assert lines["las_fast"] == f"{__version__} in {packages / 'las_fast'}, with the models an4 and english"
    assert lines["compiler"].startswith("no C++ compiler") and lines["extension"] == "built and loaded"
    noise = np.random.default_rng(1).normal(0, 0.2, 32000)
    soundfile.write(tmp_path / "noise.wav", noise * np.repeat([0, 1, 0, 1], 8000), 16000)
    done = run("transcribe", "noise.wav", "--min-speech-score", "-inf", "--format", "json")
    assert json.loads(done.stdout)["segments"] and "slower" not in done.stderr
    (packages / "las_fast" / "_C.abi3.so").unlink()
    lines = run("doctor").stdout.splitlines()
    place = lines.index("extension     the extension is not built")
    assert lines[place + 1].strip().startswith("-> run: pip install --force-reinstall --no-deps SOURCE")


def test_the_container_copies_what_a_build_needs():
    text = (ROOT / "Containerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for name in line.split()}
    assert copied == {*SOURCES, "requirements.txt", "csrc", "kernels", "las_fast"}
    ignored = (ROOT / ".containerignore").read_text().split()
    assert not copied & {*ignored} and all(not name.startswith(".") for name in copied)
    assert 'ENTRYPOINT ["las-fast"]' in text and "las-fast" in PROJECT["scripts"]


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
    ("wheel", "pip wheel"),
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
