"""Build the package and its C++ extension las_fast._C; `python setup.py build_ext` writes it to las_fast/.

The extension is optional. Without a C++ compiler, Python's headers, or torch at build time, setup prints one line and
skips it, and the package runs on its slower reference paths. With all of them, a failed build is an error.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

FLAGS = [
    "-O3", "-g0", "-std=c++20",
    "-fopenmp",  # without it at::parallel_for silently runs on one thread
    "-fno-math-errno", "-fno-trapping-math",  # no effect on results, unlike -ffast-math: NaN and infinity stay
    "-Wno-psabi",  # GCC notes an ABI change for vector arguments; ours are all inlined
]  # fmt: skip
SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))


def skip(reason: str, remedy: str) -> dict:
    """Print why the extension is not built; return no arguments for setup()."""
    print(
        f"las_fast: {reason}, so the C++ extension is not built and the slower reference paths are used. "
        f"To build it, {remedy}"
    )
    return {}


def extension() -> dict:
    """Return the arguments of setup() for the extension; empty if it cannot or need not be built."""
    if "build_ext" not in sys.argv and not {"bdist_wheel", "install", "develop", "editable_wheel"} & set(sys.argv):
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        remedy = "run: pip install torch setuptools, then pip install --no-build-isolation ."
        return skip("torch is not importable", remedy)
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return skip(f"no C++ compiler ({compiler})", "install g++ and run: python setup.py build_ext")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        remedy = "install python3-dev (python3-devel) and run: python setup.py build_ext"
        return skip(f"Python's headers are missing ({header})", remedy)
    module = CppExtension(
        "las_fast._C",
        SOURCES,
        depends=HEADERS,
        extra_compile_args={"cxx": FLAGS},
        extra_link_args=["-fopenmp"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"build_ext": {"inplace": True}, "bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[*find_packages(include=["las_fast", "las_fast.*"]), "las_fast.kernels"],
    package_dir={"las_fast.kernels": "kernels"},
    **extension(),
)
