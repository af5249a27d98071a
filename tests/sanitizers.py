"""Run the tests of the C++ ops in builds with GCC's sanitizers of memory, undefined behaviour and threads.

    python -m tests.sanitizers                                     everything, about half an hour on two cores
    python -m tests.sanitizers --kind tsan --lanes 8 tests/ops/test_bilstm.py -k gradients

Needs x86-64, GCC with its sanitizer libraries (part of g++ on Debian), and setarch of util-linux for `tsan`. If the
processor has fewer lanes than requested, it says so and uses all of them. Builds and reports go to build/sanitizers.
The exit status is 0 if all tests pass and no sanitizer reports anything.

asan   AddressSanitizer: accesses out of bounds, use after free
ubsan  UndefinedBehaviorSanitizer: null pointers, overflow of integers, misaligned access
tsan   ThreadSanitizer: data races; at::parallel_for is replaced, see tests/tsan/ATen/Parallel.h
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests import extension

FOLDER = extension.ROOT / "build" / "sanitizers"
TSAN_HEADERS = extension.ROOT / "tests" / "tsan"
KINDS = ("asan", "ubsan", "tsan")
LIBRARIES = {"asan": "libasan.so", "ubsan": "libubsan.so", "tsan": "libtsan.so"}
SANITIZERS = {"asan": "address", "ubsan": "undefined", "tsan": "thread"}
ABORTED = 66  # exit status of a process that a sanitizer aborted


def flags(kinds: list[str]) -> list[str]:
    """Compiler flags for sanitizers that can share a build."""
    chosen = ",".join(SANITIZERS[kind] for kind in kinds)
    threads = [] if "tsan" in kinds else ["-fopenmp"]
    # -g1: source lines for reports; frame pointers for stack traces
    return ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={chosen}", *threads]


def environment(kinds: list[str], reports: Path) -> dict[str, str]:
    """Environment of a process that loads such a build: preloads the libraries and writes reports to files."""
    libraries = [_library(LIBRARIES[kind]) for kind in kinds]
    options = {
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={reports}/asan",  # Python itself leaks
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={reports}/ubsan",
        "TSAN_OPTIONS": f"halt_on_error=0:exitcode={ABORTED}:log_path={reports}/tsan"
        f":suppressions={TSAN_HEADERS}/suppressions.txt",
    }
    return {**os.environ, **options, "LD_PRELOAD": ":".join(libraries), "OMP_NUM_THREADS": "1"}


def _library(name: str) -> str:
    compiler = os.environ.get("CXX", "c++").split()
    actual = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = actual.stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"{compiler[0]} has no {name}. Install GCC's sanitizers (Debian: apt-get install g++)")
    return path


def run(kinds: list[str], lanes: int, arguments: list[str], jobs: int) -> bool:
    """Run the tests in one build and print the reports. Returns whether the tests passed without any report."""
    name = "-".join(kinds)
    includes = [TSAN_HEADERS] if "tsan" in kinds else []
    try:
        file = extension.build(FOLDER / name, flags(kinds), includes=includes, jobs=jobs)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"the build with {name} failed:\n{error.stderr}") from None
    reports = FOLDER / name / f"reports-{lanes}"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    print(f"== {name}, {lanes} lanes", flush=True)
    words = [sys.executable, "-m", "tests.extension", str(file), str(lanes), "-q", "-p", "no:cacheprovider", *arguments]
    if "tsan" in kinds:
        words = ["setarch", "-R", *words]  # ThreadSanitizer needs its fixed address ranges
    status = subprocess.run(words, env=environment(kinds, reports), cwd=extension.ROOT).returncode
    actual = sorted(reports.iterdir())
    for report in actual:
        print(report.read_text(errors="replace"))
    print(f"== {name}, {lanes} lanes: tests {'pass' if status == 0 else f'end with {status}'}, {len(actual)} reports")
    return status == 0 and not actual


def group_into_builds(kinds: list[str]) -> list[list[str]]:
    """Group kinds into builds: asan and ubsan share one, tsan has its own."""
    apart = [["tsan"]] if "tsan" in kinds else []
    return [x for x in [[kind for kind in kinds if kind != "tsan"]] if x] + apart


def _list_of(known: tuple, kind: type):
    def parse(text: str) -> list:
        values = [kind(word) for word in text.split(",")]
        if unknown := [value for value in values if value not in known]:
            raise argparse.ArgumentTypeError(f"must be some of {', '.join(map(str, known))}; got {unknown[0]}")
        return values

    return parse


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sanitizers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", type=_list_of(KINDS, str), default=list(KINDS), help="some of asan,ubsan,tsan")
    parser.add_argument("--lanes", type=_list_of((16, 8, 4), int), default=[16, 8, 4], help="some of 16,8,4")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    options, arguments = parser.parse_known_args(words)
    clean = [
        run(kinds, lanes, arguments or ["tests/ops"], options.jobs)
        for kinds in group_into_builds(options.kind)
        for lanes in options.lanes
    ]
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
