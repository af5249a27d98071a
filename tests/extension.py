"""Build and load other variants of the C++ extension: with sanitizers, or with faults that can be switched on.

    python -m tests.extension FILE LANES [ARGUMENT ...]

runs pytest with the extension in FILE and vectors of at most LANES floats.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
FLAGS = ["-std=c++20", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-w"]  # language and numbers as in setup.py


def build(folder: Path, flags: list[str], *, sources: Path = SOURCES, includes: list[Path] = (), jobs: int = 1) -> Path:
    """Compile the extension and return its file.

    A source is compiled only if it or a header is newer than its object file.

    Args:
        folder:   for the objects and the extension; created if missing.
        flags:    for compiler and linker, besides FLAGS.
        sources:  the folder of .cpp and .h files.
        includes: header folders that are searched before torch's.
        jobs:     concurrent compilers.

    Raises:
        subprocess.CalledProcessError: the compiler failed; `stderr` has its messages.
    """
    from torch.utils.cpp_extension import library_paths

    folder.mkdir(parents=True, exist_ok=True)
    headers = [header for each in [sources, *includes] for header in each.rglob("*.h")]
    changed = max(header.stat().st_mtime for header in headers)
    objects = {source: folder / f"{source.stem}.o" for source in sorted(sources.glob("*.cpp"))}
    stale = [
        source
        for source, made in objects.items()
        if not made.exists() or made.stat().st_mtime < max(changed, source.stat().st_mtime)
    ]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        words = ([*command(flags, includes), "-c", str(source), "-o", str(objects[source])] for source in stale)
        list(pool.map(_run, words))
    made = folder / "_C.abi3.so"
    if stale or not made.exists():
        libraries = [f"-L{x}" for x in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
        words = [*command(flags), "-shared", *map(str, objects.values()), *libraries, "-o", str(made)]
        _run(words)
    return made


def _run(words: list[str]) -> None:
    subprocess.run(words, check=True, stderr=subprocess.PIPE, text=True)


def command(flags: list[str], includes: list[Path] = ()) -> list[str]:
    """The beginning of the compiler's command line."""
    from torch.utils.cpp_extension import include_paths

    paths = [f"-I{x}" for x in [*includes, *include_paths(), sysconfig.get_path("include")]]
    return [*os.environ.get("CXX", "c++").split(), *FLAGS, *flags, *paths]


def load(file: Path, lanes: int = 16) -> None:
    """Make `file` the extension of las_fast in this process; call it before las_fast.ops is imported.

    Raises:
        RuntimeError: las_fast has already loaded its extension.
    """
    import torch

    name = "las_fast._C"
    if name in sys.modules:
        raise RuntimeError(f"{name} is loaded already: it cannot be replaced by {file}")
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    torch.ops.las_fast.limit_lanes(lanes)


if __name__ == "__main__":
    import pytest

    load(Path(sys.argv[1]), int(sys.argv[2]))
    sys.exit(pytest.main(sys.argv[3:]))
