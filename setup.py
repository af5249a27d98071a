"""Build the package and its C++ extension las_fast._C; `python setup.py build_ext` writes it to las_fast/.

The extension is optional. Outside Linux, or if the C++ compiler, Python's headers or torch is missing, `python setup.py
build_ext` prints one line and skips it, and the package runs on slower PyTorch paths. Under pip that is an error; see
build_backend.py. If nothing is missing, a failed build is always an error.
"""

import platform
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import find_packages, setup

if sys.version_info < (3, 11):  # noqa: UP036 (without pip nothing checks requires-python)
    raise SystemExit(f"las_fast needs Python 3.11 or newer; this is {sys.version.split()[0]}")
if int(setuptools.__version__.partition(".")[0]) < 77:  # as in pyproject.toml; older ones cannot read its license
    raise SystemExit(f"las_fast needs setuptools 77 or newer to build, and this is {setuptools.__version__}. "
                     "Run: pip install --upgrade setuptools")  # fmt: skip

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build_backend  # noqa: E402
from las_fast.system import is_clang, missing_for_build  # noqa: E402

FLAGS = [
    "-O3", "-g0", "-std=c++20",
    "-fopenmp",  # without it at::parallel_for silently runs on one thread
    "-fno-math-errno", "-fno-trapping-math",  # no effect on results, unlike -ffast-math: NaN and infinity stay
    "-Wno-psabi",  # GCC notes an ABI change for vector arguments; ours are all inlined
]  # fmt: skip
SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
PACKAGING_COMMANDS = {"build", "bdist_wheel", "install", "develop", "editable_wheel", "dist_info"}


def skip(reason: str, remedy: str) -> dict:
    """Print why there is no extension and return the arguments of setup() without it; under pip, exit with an error."""
    if build_backend.extension:
        raise SystemExit(build_backend.unbuilt(reason, remedy))
    print(
        f"las_fast: {reason}, so the C++ extension is not built and slower PyTorch paths are used. "
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
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        return skip(f"torch cannot be imported ({str(error).partition(chr(10))[0]})", "install torch")
    if is_clang() and platform.machine() == "x86_64":
        print("las_fast: Clang builds vectors of 4 numbers only, and GCC those of AVX2, AVX-512 and AMX as well. "
              "To use GCC, run: CXX=g++ python setup.py build_ext --force")  # fmt: skip
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
        "bdist_wheel": {"py_limited_api": "cp310"},  # the interface that torch compiles for
    }


setup(
    packages=[*find_packages(include=["las_fast", "las_fast.*"]), "las_fast.kernels"],
    package_dir={"las_fast.kernels": "kernels"},
    **extension(),
)
