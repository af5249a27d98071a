"""las-fast doctor: each check says what is there and what would make it better, also in a damaged installation."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from fakes import raising

from las_fast import doctor
from las_fast.ops import backends

ROOT = Path(__file__).resolve().parents[1]


def run_doctor(code=""):
    """The table of a new process that runs `code` first: {area: state}, and the advice lines."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nfrom las_fast import doctor\ndoctor.main([])"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    states = {line[:14].strip(): line[14:] for line in lines[:-2] if not line.startswith(" ")}
    return states, [line.strip() for line in lines if line.startswith(" ")]


def test_every_area_is_reported():
    states, _ = run_doctor()
    assert list(states) == list(doctor.CHECKS)
    assert states["torch"].startswith(torch.__version__) and states["las_fast"].endswith("an4 and english")
    assert "could not" not in "".join(states.values()) and "unknown" not in "".join(states.values())


def test_without_torch_it_says_how_to_get_it_and_checks_the_rest():
    states, advice = run_doctor("sys.modules['torch'] = None")
    assert list(states) == list(doctor.CHECKS) and states["torch"] == "not installed"
    assert any("pip install torch" in line for line in advice)
    for area in ("extension", "GPU", "backends", "threads"):
        assert states[area] == "unknown without the package torch"
    assert "GiB free" in states["disk"]


def test_without_the_packages_of_the_settings_it_still_works():
    states, _ = run_doctor("for name in ('yaml', 'numpy', 'soundfile', 'safetensors'): sys.modules[name] = None")
    assert list(states) == list(doctor.CHECKS) and states["audio"] == "unknown without the package soundfile"
    assert states["Python"].startswith(sys.version.split()[0])


def test_a_check_that_fails_does_not_stop_the_others(monkeypatch):
    checks = {"one": raising(OSError("disk\nerror")), "two": lambda: doctor.Finding("fine")}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert doctor.run_checks() == {
        "one": doctor.Finding("could not be checked (OSError: disk)"),
        "two": doctor.Finding("fine"),
    }


def test_advice_stands_below_its_line_and_is_counted():
    findings = {"a": doctor.Finding("there"), "b": doctor.Finding("gone", "get it")}
    assert doctor.table(findings).splitlines() == [
        "a             there", "b             gone", "              -> get it", "", "1 of 2 checks have advice"
    ]  # fmt: skip
    assert doctor.table({"a": doctor.Finding("there")}).endswith("\n\nno problems found")


def test_the_readme_quotes_a_table_of_all_areas():
    text = (ROOT / "las_fast" / "deploy" / "README.md").read_text("utf-8")
    quoted = re.search(r"^\$ python -m las_fast.doctor\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)[1]
    findings = {}
    for line in quoted.splitlines()[:-2]:
        if line.startswith(" "):
            area, finding = findings.popitem()
            findings[area] = finding._replace(advice=line.strip().removeprefix("-> "))
        else:
            findings[line[:14].strip()] = doctor.Finding(line[14:])
    assert list(findings) == list(doctor.CHECKS) and doctor.table(findings) == quoted


@pytest.mark.parametrize(
    ("problem", "state", "advice"),
    [
        ("the extension is not built. Run: python setup.py build_ext", "the extension is not built",
         "run: python setup.py build_ext"),
        ("the extension does not load (_C: a. b). Run: x --force", "the extension does not load (_C: a. b)",
         "run: x --force"),
        (None, "built and loaded", ""),
    ],
)  # fmt: skip
def test_the_command_that_mends_the_extension_is_the_advice(monkeypatch, problem, state, advice):
    monkeypatch.setattr(backends, "EXTENSION_PROBLEM", problem)
    assert doctor.check_extension() == (state, advice)


def test_a_compiler_is_only_asked_for_if_the_extension_needs_it(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    for problem, advice in ((None, ""), ("the extension is not built", "install g++")):
        monkeypatch.setattr(backends, "EXTENSION_PROBLEM", problem)
        assert doctor.check_compiler() == ("no C++ compiler (no-such-compiler)", advice)
    monkeypatch.setenv("CXX", sys.executable)
    assert doctor.check_compiler() == (f"Python {sys.version.split()[0]}", "")


def test_a_compiler_that_does_not_run_is_reported(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    state, advice = doctor.check_compiler()
    assert state.startswith("false does not run (") and "exit status 1" in state and advice == "install g++"


def test_a_torch_without_its_shared_libraries_is_reported():
    code = "import importlib.abc\nclass F(importlib.abc.MetaPathFinder):\n def find_spec(self, name, *_):\n"
    code += "  if name == 'torch': raise OSError('libc10.so: cannot open')\nsys.meta_path.insert(0, F())"
    states, advice = run_doctor(code)
    assert states["torch"] == "does not load (libc10.so: cannot open)"
    assert any("pip install torch" in line for line in advice)


@pytest.mark.parametrize(
    ("raised", "state"),
    [
        ("ModuleNotFoundError('no torch', name='torch')", "not installed"),
        ("ModuleNotFoundError('no sympy', name='sympy')", "does not load (no sympy)"),
        ("ImportError('no symbol', name='torch')", "does not load (no symbol)"),
        ("OSError('no libc10.so')", "does not load (no libc10.so)"),
    ],
)
def test_only_an_absent_torch_counts_as_not_installed(monkeypatch, tmp_path, raised, state):
    (tmp_path / "torch.py").write_text(f"raise {raised}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    assert doctor.check_torch() == (state, doctor.INSTALL_TORCH)


def test_the_command_prints_the_table(monkeypatch, capsys):
    findings = {"disk": doctor.Finding("12 GiB free")}
    monkeypatch.setattr(doctor, "run_checks", lambda: findings)
    doctor.main([])
    assert capsys.readouterr().out == doctor.table(findings) + "\n"


@pytest.mark.parametrize(
    ("line", "installed", "problem"),
    [
        ("torch>=2.10", "2.9.1", "torch 2.9.1 is older than 2.10"),
        ("torch>=2.10", "2.13.0+cpu", ""),
        ("torch==2.13.*", "2.13.1", ""),
        ("torch==2.13.*", "2.14.0", "torch 2.14.0 is not 2.13.*"),
        ("torch==2.13.*", "2.1.0", "torch 2.1.0 is not 2.13.*"),
        ("triton>=3.6; platform_system == 'Linux'", "3.7.1", ""),
        ('onnx>=1.16; extra == "onnx"', None, "onnx is missing"),
        ("pyyaml", "6", ""),
        ("pyyaml>=6.0", "6", ""),
        ("pyyaml>=6.0.2", "6", "pyyaml 6 is older than 6.0.2"),
    ],
)
def test_a_package_that_is_missing_or_of_another_version_is_named(monkeypatch, line, installed, problem):
    def version(name):
        if installed is None:
            raise doctor.metadata.PackageNotFoundError
        return installed

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert doctor.requirement_problem(line) == problem


def test_missing_packages_come_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(doctor, "requirements", lambda: (["numpy>=1", "no-such-package>=2"], {"x": ["neither>=1"]}))
    state, advice = doctor.check_packages()
    assert state == "1 of 2 installed; extras: none; no-such-package is missing"
    assert advice == "pip install --upgrade 'no-such-package>=2'"


def test_requirements_are_those_of_the_project_and_in_an_installation_those_of_its_metadata(monkeypatch, tmp_path):
    required, extras = doctor.requirements()
    assert any(line.startswith("soundfile") for line in required) and "demo" in extras
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path / "las_fast")
    lines = ["torch==2.13.*", "wandb>=0.18; extra == 'wandb'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    assert doctor.requirements() == (lines[:1], {"wandb": lines[1:]})


def test_audio_formats_that_are_missing_are_named(monkeypatch):
    assert doctor.check_audio().advice == ""
    monkeypatch.setattr(soundfile, "available_formats", lambda: {"WAV": "", "FLAC": "", "OGG": ""})
    state, advice = doctor.check_audio()
    assert state.endswith("which cannot read mp3") and "soundfile" in advice


@pytest.mark.parametrize(
    ("driver", "cuda", "state"),
    [
        (False, None, "none"),
        (True, None, "NVIDIA, but torch is the CPU build"),
        (True, "12.9", "NVIDIA, but torch cannot use it"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_explained(monkeypatch, driver, cuda, state):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", (str(ROOT) if driver else "/nowhere",))
    finding = doctor.check_gpu()
    assert finding.state == state and bool(finding.advice) == driver


def test_gpus_are_listed_with_their_memory_and_triton_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card = SimpleNamespace(name="H100", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    assert doctor.check_gpu() == ("H100 (80 GiB), H100 (80 GiB)", "")
    backends._unmet_by_triton.cache_clear()
    monkeypatch.setattr(backends, "is_installed", lambda name: False)
    state, advice = doctor.check_backends()
    assert state.startswith("reference for ") and advice == "run: pip install triton"
    backends._unmet_by_triton.cache_clear()
    monkeypatch.setattr(backends, "is_installed", lambda name: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (8, 6))
    monkeypatch.setattr(backends, "missing_for_triton", lambda: ("there is no C compiler", "Install gcc"))
    monkeypatch.setattr(backends, "_triton_has_compiled", lambda: False)
    assert doctor.check_backends().advice == "install gcc"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert doctor.check_backends().advice == ""
    backends._unmet_by_triton.cache_clear()


def test_the_backends_of_all_ops_are_counted():
    state, advice = doctor.check_backends()
    assert advice == ""
    counts = [int(part.split(" for ")[1].split()[0]) for part in state.partition(";")[0].split(", ")]
    assert sum(counts) == len(backends.IMPLEMENTED)


@pytest.mark.parametrize(
    ("flags", "state"),
    [
        ("avx avx2 fma", "AVX2"),
        ("avx2 fma avx512f avx512bw avx512dq avx512vl avx512_vnni amx_tile", "AVX-512, AVX2, VNNI, AMX"),
        ("avx2 fma avx512f", "AVX2"),
        ("sse4_2", "neither AVX2 nor AVX-512"),
    ],
)
def test_instruction_sets_are_those_that_the_extension_chooses_from(monkeypatch, flags, state):
    monkeypatch.setattr(doctor, "cpu_flags", lambda: set(flags.split()))
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    finding = doctor.check_instruction_sets()
    assert finding.state == f"x86_64: {state}" and bool(finding.advice) == ("neither" in state)
    monkeypatch.setattr(doctor, "cpu_flags", set)
    assert doctor.check_instruction_sets() == ("x86_64", "")


def test_instruction_sets_are_the_words_after_flags(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "Path", lambda _: tmp_path / "cpuinfo")
    assert doctor.cpu_flags() == set()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\nvmx flags\t: vnmi\n")
    assert doctor.cpu_flags() == {"fpu", "avx2", "fma"}
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert doctor.cpu_flags() == set()


def test_the_extension_agrees_about_the_width_of_vectors():
    assert backends.EXTENSION_PROBLEM is None
    widest = torch.ops.las_fast.limit_lanes(64)
    torch.ops.las_fast.limit_lanes(widest)
    flags = doctor.cpu_flags()
    if flags:  # an x86 processor
        assert widest == (16 if flags >= doctor.AVX512 else 8 if {"avx2", "fma"} <= flags else 4)
    else:
        assert widest in (4, 8, 16)


def test_the_quota_of_a_container_is_read(tmp_path):
    assert doctor.cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert doctor.cpu_quota(tmp_path) is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    assert doctor.cpu_quota(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert doctor.cpu_quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor.cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("threads", "quota", "variable", "advice"),
    [
        (4, None, None, ""),
        (4, 1.5, None, "set OMP_NUM_THREADS=2, or raise the limit"),
        (4, 8.0, None, ""),
        (1, None, "1", "unset OMP_NUM_THREADS to use all cores"),
        (2, None, None, ""),
    ],
)
def test_threads_fit_the_cores(monkeypatch, threads, quota, variable, advice):
    monkeypatch.setattr(doctor, "allowed_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(doctor, "cpu_quota", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    state, actual = doctor.check_threads()
    assert state.startswith(f"{threads} for 4 cores") and actual == advice


@pytest.mark.parametrize(("free", "advice"), [(2**30, ""), (2**30 - 1, "free some space in ")])
def test_a_full_disk_is_reported_with_its_folders(monkeypatch, tmp_path, free, advice):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    finding = doctor.check_disk()
    assert f"1.0 GiB free in {tmp_path}" in finding.state and finding.advice.startswith(advice)
    assert bool(finding.advice) == bool(advice) and (not advice or str(tmp_path) in finding.advice)
