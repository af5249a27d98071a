"""python -m las_fast.doctor: check the installation and the machine, and say what would make them better.

It works without torch and without the C++ extension. The exit status is 0 even if a check has advice.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from las_fast import __version__
from las_fast.errors import show
from las_fast.system import allowed_cores, compiler, compiler_version, cpu_quota, missing_for_build

PACKAGE = Path(__file__).resolve().parent
MIN_FREE = 2**30  # bytes of disk or memory; with less there is advice
NVIDIA_DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl")  # one of them exists if a driver is loaded
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}  # the extension needs all for vectors of 16 numbers
BACKEND_NAMES = {"cpp": "C++", "triton": "Triton", "fused": "fused PyTorch", "reference": "reference"}
INSTALL_TORCH = (
    "pip install torch; on a machine without a GPU, the much smaller CPU build: "
    "pip install torch --index-url https://download.pytorch.org/whl/cpu"
)


class Finding(NamedTuple):
    """The result of a check."""

    state: str  # one line
    advice: str = ""  # what the user should do; "" if nothing


def run_checks() -> dict[str, Finding]:
    """Run all checks; return {area: its finding}. The finding of a check that raises is the error."""
    return {area: _attempt(check) for area, check in CHECKS.items()}


def _attempt(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except ModuleNotFoundError as error:
        return Finding(f"unknown without the package {error.name}")
    except Exception as error:  # a damaged installation fails in many ways, and the other checks still count
        return Finding(f"could not be checked ({type(error).__name__}: {_first_line(error)})")


def _first_line(error: BaseException) -> str:
    return show(str(error).strip().partition("\n")[0])


def table(findings: dict[str, Finding]) -> str:
    """Return one line per area, each followed by its advice, and a summary."""
    lines = []
    for area, (state, advice) in findings.items():
        lines.append(f"{area:<14}{state}")
        if advice:
            lines.append(f"{'':<14}-> {advice}")
    count = sum(bool(advice) for _, advice in findings.values())
    return "\n".join([*lines, "", f"{count} of {len(findings)} checks have advice" if count else "no problems found"])


# ----------------------------------------------------------------------------------------------------------- Software


def check_las_fast() -> Finding:
    models = sorted(path.stem for path in (PACKAGE / "checkpoints").glob("*.safetensors") if path.stem.isidentifier())
    return Finding(f"{__version__} in {show(PACKAGE)}, with the models {' and '.join(models) or 'none'}")


def check_python() -> Finding:
    advice = "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer"
    return Finding(f"{platform.python_version()}, {show(sys.executable)}", advice)


def check_torch() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        is_absent = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        return Finding("not installed" if is_absent else f"does not load ({_first_line(error)})", INSTALL_TORCH)
    if torch.version.hip:
        return Finding(f"{torch.__version__}, for ROCm {torch.version.hip}")
    return Finding(f"{torch.__version__}, {f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU build'}")


def check_packages() -> Finding:
    required, extras = requirements()
    problems = [problem for line in required if (problem := requirement_problem(line))]
    installed = [name for name, lines in extras.items() if not any(map(requirement_problem, lines))]
    state = f"{len(required) - len(problems)} of {len(required)} installed; extras: {', '.join(installed) or 'none'}"
    if not problems:
        return Finding(state)
    packages = " ".join(f"'{line.partition(';')[0].strip()}'" for line in required if requirement_problem(line))
    return Finding(f"{state}; {', '.join(problems)}", f"pip install --upgrade {packages}")


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """Return the requirements of las_fast, and those of each extra.

    They are read from pyproject.toml in a clone, and else from the metadata of the installed package.
    """
    project = PACKAGE.parent / "pyproject.toml"
    if project.is_file() and (settings := tomllib.loads(project.read_text("utf-8")))["project"]["name"] == "las_fast":
        required = settings["tool"]["las_fast"]["dependencies"]
        extras = settings["project"]["optional-dependencies"]
    else:
        required, extras = [], {}
        for line in metadata.requires("las_fast") or []:
            extra = re.search(r"""extra == ["'](.+?)["']""", line)
            (extras.setdefault(extra[1], []) if extra else required).append(line)
    linux = [line for line in required if "platform_system" not in line or sys.platform == "linux"]
    return linux, extras


def requirement_problem(line: str) -> str:
    """Return why a requirement is not met, such as "torch 2.9.1 is older than 2.10"; "" if it is met."""
    name, minimum, exact = _parse_requirement(line)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is missing"
    if exact and _numbers(version)[: len(_numbers(exact))] != _numbers(exact):
        return f"{name} {version} is not {exact}.*"
    width = len(_numbers(minimum))  # version 6 is 6.0, not older
    is_older = _numbers(version) + [0] * width < _numbers(minimum)
    return f"{name} {version} is older than {minimum}" if is_older else ""


def _parse_requirement(line: str) -> tuple[str, str, str]:
    """Return the name of a requirement, the X of >=X, and the Y of ==Y or ==Y.*; "" for a part that it lacks."""
    name = re.match(r"[\w.-]+", line)
    bounds = dict(re.findall(r"(>=|==)\s*(\d+(?:\.\d+)*)", line.partition(";")[0]))
    return name[0] if name else "", bounds.get(">=", ""), bounds.get("==", "")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def check_audio() -> Finding:
    import soundfile

    missing = {"WAV", "FLAC", "OGG", "MP3"} - set(soundfile.available_formats())
    state = f"soundfile {soundfile.__version__} with libsndfile {soundfile.__libsndfile_version__}"
    if missing:
        advice = "pip install --force-reinstall soundfile, which brings a newer libsndfile"
        return Finding(f"{state}, which cannot read {', '.join(sorted(missing)).lower()}", advice)
    return Finding(f"{state}: wav, flac, ogg, mp3")


# ---------------------------------------------------------------------------------------------------------- Fast paths


def check_compiler() -> Finding:
    """Check the C++ compiler, which the extension needs while it is built. check_backends reports what Triton lacks."""
    if missing := missing_for_build():
        reason, remedy = missing
        return Finding(reason, "" if _extension_problem() is None else remedy)
    try:
        return Finding(show(compiler_version()))
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(f"{compiler()} does not run ({_first_line(error)})", "install g++")


def _extension_problem() -> str | None:
    """Return why the extension does not load, with the command that mends it; None if it does."""
    from las_fast.ops import backends

    return backends.EXTENSION_PROBLEM


def check_extension() -> Finding:
    problem = _extension_problem()
    if problem is None:
        return Finding("built and loaded")
    state, _, command = problem.rpartition(". Run: ")
    return Finding(state, f"run: {command}")


def check_gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Finding(", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards))
    if torch.backends.mps.is_available():
        return Finding("Apple GPU, which las_fast uses only if asked: --device mps")
    if not any(Path(path).exists() for path in NVIDIA_DRIVER):
        return Finding("none")
    if torch.version.cuda is None:
        return Finding("NVIDIA, but torch is the CPU build", "pip install --force-reinstall torch")
    return Finding(
        "NVIDIA, but torch cannot use it",
        f"run nvidia-smi; the driver may be too old for CUDA {torch.version.cuda}, or the container may lack the GPU",
    )


def check_backends() -> Finding:
    import torch

    from las_fast.ops import backends

    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts = Counter(backends.auto_backend(op, device) for op in backends.IMPLEMENTED)
    state = ", ".join(f"{BACKEND_NAMES[name]} for {count}" for name, count in counts.most_common())
    reason = backends.unavailable("beam_topk", "triton") if device == "cuda" else None
    _, _, advice = (reason or "").partition(". ")
    advice = "" if advice.startswith("Use backend") else advice[:1].lower() + advice[1:]
    return Finding(f"{state} of {len(backends.IMPLEMENTED)} ops; python -m las_fast.ops lists them", advice)


def check_instruction_sets() -> Finding:
    """Check the vector instructions, from which the C++ extension and torch choose at run time."""
    flags = cpu_flags()
    if not flags:
        return Finding(platform.machine())
    names = [("AVX-512", flags >= AVX512), ("AVX2", {"avx2", "fma"} <= flags), ("VNNI", "avx512_vnni" in flags),
             ("bfloat16", "avx512_bf16" in flags), ("AMX", "amx_tile" in flags)]  # fmt: skip
    state = f"{platform.machine()}: {', '.join(name for name, there in names if there) or 'neither AVX2 nor AVX-512'}"
    if not {"avx2", "fma"} <= flags:
        return Finding(
            state, "use a processor with AVX2; on this one, C++ computes with 4 numbers at once instead of 8"
        )
    return Finding(state)


def cpu_flags() -> set[str]:
    """Return the instruction sets of an x86 processor as Linux names them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    match = re.search(r"^flags\s*:(.*)$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return set(match[1].split()) if match else set()


# ------------------------------------------------------------------------------------------------------------- Machine


def check_threads() -> Finding:
    import torch

    available, threads, quota = allowed_cores(), torch.get_num_threads(), cpu_quota()
    state = f"{threads} for {available} cores"
    if quota and quota < threads:
        advice = f"set OMP_NUM_THREADS={math.ceil(quota)}, or raise the limit"
        return Finding(f"{state}, but the container may use only {quota:g} cores", advice)
    if threads < available and os.environ.get("OMP_NUM_THREADS"):
        return Finding(f"{state}, because OMP_NUM_THREADS is set", "unset OMP_NUM_THREADS to use all cores")
    return Finding(state)


def check_memory() -> Finding:
    path = Path("/proc/meminfo")
    if not path.is_file():
        return Finding("unknown on this system")
    sizes = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+): +(\d+) kB", path.read_text(), re.MULTILINE)}
    available, total = sizes["MemAvailable"], sizes["MemTotal"]
    advice = "end other programs, or lower --decoding.frames-per-batch and --data.frames-per-batch"
    return Finding(
        f"{available / 2**30:.1f} of {total / 2**30:.1f} GiB available", advice if available < MIN_FREE else ""
    )


def check_disk() -> Finding:
    folders = [Path.cwd()]
    try:
        from las_fast.data.cache import cache_folder

        folders.append(cache_folder(""))
    except ImportError:  # numpy is missing, which another check reports
        pass
    free = {folder: shutil.disk_usage(_existing(folder)).free for folder in folders}
    state = ", ".join(f"{size / 2**30:.1f} GiB free in {show(folder)}" for folder, size in free.items())
    full = [folder for folder, size in free.items() if size < MIN_FREE]
    return Finding(state, f"free some space in {' and '.join(map(show, full))}" if full else "")


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


CHECKS: dict[str, Callable[[], Finding]] = {
    "las_fast": check_las_fast,
    "Python": check_python,
    "torch": check_torch,
    "packages": check_packages,
    "audio": check_audio,
    "compiler": check_compiler,
    "extension": check_extension,
    "GPU": check_gpu,
    "backends": check_backends,
    "instructions": check_instruction_sets,
    "threads": check_threads,
    "memory": check_memory,
    "disk": check_disk,
}


def main(argv: list[str] | None = None) -> None:
    """Print the table; see --help."""
    parser = argparse.ArgumentParser
    try:
        from las_fast.options import Parser

        parser = Parser
    except ImportError:  # a package is missing, which the table reports
        pass
    parser(prog="python -m las_fast.doctor", description=__doc__).parse_args(argv)
    print(table(run_checks()))


if __name__ == "__main__":
    from las_fast.cli import run

    run(main)
