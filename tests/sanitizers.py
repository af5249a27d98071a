"""Run the tests of the C++ ops in builds that watch memory, undefined behaviour and threads.

    python -m tests.sanitizers                                     everything, about half an hour on two cores
    python -m tests.sanitizers --kind tsan --lanes 8 tests/ops/test_bilstm.py -k gradients

It needs GCC with its sanitizers' libraries (Debian: g++ brings them), x86-64, and setarch of util-linux for `tsan`;
where the processor has fewer lanes than asked for, it says so and takes what there is. Builds and reports go to
build/sanitizers. The exit status is 0 if all tests pass and no sanitizer has anything to report.

asan   AddressSanitizer: reads and writes outside of memory, use after it was freed
ubsan  UndefinedBehaviorSanitizer: null pointers, overflow of integers, misaligned access
tsan   ThreadSanitizer: two threads on one place; at::parallel_for is another one here, see tests/tsan/ATen/Parallel.h
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
ABORTED = 66  # exit status of a process that a sanitizer ended


def flags(kinds: list[str]) -> list[str]:
    """Return the compiler's flags for sanitizers that one build can have together."""
    chosen = ",".join(SANITIZERS[kind] for kind in kinds)
    threads = [] if "tsan" in kinds else ["-fopenmp"]
    # -g1: lines of the source, for reports. Frames stay, so that a report shows who called.
    return ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={chosen}", *threads]


def environment(kinds: list[str], reports: Path) -> dict[str, str]:
    """Return the variables of a process that loads such a build: the libraries first, reports into files."""
    libraries = [_library(LIBRARIES[kind]) for kind in kinds]
    options = {
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={reports}/asan",  # Python itself leaves much unfreed
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={reports}/ubsan",
        "TSAN_OPTIONS": f"halt_on_error=0:exitcode={ABORTED}:log_path={reports}/tsan"
        f":suppressions={TSAN_HEADERS}/suppressions.txt",
    }
    return {**os.environ, **options, "LD_PRELOAD": ":".join(libraries), "OMP_NUM_THREADS": "1"}


def _library(name: str) -> str:
    compiler = os.environ.get("CXX", "c++").split()
    found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"{compiler[0]} has no {name}. Install GCC's sanitizers (Debian: apt-get install g++)")
    return path


def run(kinds: list[str], lanes: int, arguments: list[str], jobs: int) -> bool:
    """Run the tests in one build; print what the sanitizers report; say whether all is well."""
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
        words = ["setarch", "-R", *words]  # ThreadSanitizer needs memory where it expects it
    status = subprocess.run(words, env=environment(kinds, reports), cwd=extension.ROOT).returncode
    found = sorted(reports.iterdir())
    for report in found:
        print(report.read_text(errors="replace"))
    print(f"== {name}, {lanes} lanes: tests {'pass' if status == 0 else f'end with {status}'}, {len(found)} reports")
    return status == 0 and not found


def together(kinds: list[str]) -> list[list[str]]:
    """Return the builds that the kinds take: asan and ubsan go together, tsan goes alone."""
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
    well = [
        run(kinds, lanes, arguments or ["tests/ops"], options.jobs)
        for kinds in together(options.kind)
        for lanes in options.lanes
    ]
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
