"""Build the package and its C++ extension las_fast._C; `python setup.py build_ext` writes it to las_fast/.

The extension is optional. If the C++ compiler, Python's headers or torch is missing, `python setup.py build_ext` prints
one line and skips it, and the package runs on its slower reference paths. Under pip that is an error; see
build_backend.py. If nothing is missing, a failed build is always an error.
"""

import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build_backend  # noqa: E402
from las_fast.system import missing_for_build  # noqa: E402

FLAGS = [
    "-O3", "-g0", "-std=c++20",
    "-fopenmp",  # without it at::parallel_for silently runs on one thread
    "-fno-math-errno", "-fno-trapping-math",  # no effect on results, unlike -ffast-math: NaN and infinity stay
    "-Wno-psabi",  # GCC notes an ABI change for vector arguments; ours are all inlined
]  # fmt: skip
SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
PACKAGING_COMMANDS = {"bdist_wheel", "install", "develop", "editable_wheel", "dist_info"}


def skip(reason: str, remedy: str) -> dict:
    """Print why there is no extension and return the arguments of setup() without it; under pip, exit with an error."""
    if build_backend.extension:
        raise SystemExit(build_backend.unbuilt(reason, remedy))
    print(
        f"las_fast: {reason}, so the C++ extension is not built and the slower reference paths are used. "
        f"To build it, {remedy} and run: python setup.py build_ext"
    )
    return {"install_requires": build_backend.runtime_dependencies(None)}


def extension() -> dict:
    """Return the arguments of setup() that depend on the extension."""
    is_needed = {"build_ext", *PACKAGING_COMMANDS} & set(sys.argv) and build_backend.extension != "skip"
    if not is_needed:
        return {"install_requires": build_backend.runtime_dependencies(None)}
    if missing := missing_for_build():
        return skip(*missing)
    try:
        build_backend.find_torch()
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return skip("torch is not importable", "run pip install torch setuptools")
    flags = {"extra_compile_args": {"cxx": FLAGS}, "extra_link_args": ["-fopenmp"]}
    module = CppExtension("las_fast._C", SOURCES, depends=HEADERS, py_limited_api=True, **flags)
    return {
        "install_requires": build_backend.runtime_dependencies(torch.__version__),
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": build_options(torch.__version__),
    }


def build_options(torch_version: str) -> dict:
    """Return the options of setuptools' commands."""
    # One folder per version of torch: setuptools does not rebuild an extension that is newer than its sources.
    base = Path("build", f"torch-{torch_version}")
    if "bdist_wheel" in sys.argv:
        shutil.rmtree(base / "lib", ignore_errors=True)  # it may hold modules that las_fast no longer has
    return {
        "build": {"build_base": str(base), "build_lib": str(base / "lib")},
        "build_ext": {"inplace": "build_ext" in sys.argv},
        "bdist_wheel": {"py_limited_api": "cp310"},
    }


setup(
    packages=[*find_packages(include=["las_fast", "las_fast.*"]), "las_fast.kernels"],
    package_dir={"las_fast.kernels": "kernels"},
    **extension(),
)
