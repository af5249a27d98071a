"""Build the package and its C++ extension, las_fast._C (`python setup.py build_ext` puts it into las_fast/).

The extension is optional: without a C++ compiler, Python's headers, or torch at build time, one line says so, nothing
is built, and the package runs on its reference paths. With all of them, a failing build is an error.
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
    "-Wno-psabi",  # a note about passing vectors to functions; ours are all inlined
]  # fmt: skip
SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))


def extension() -> dict:
    """Return setup's arguments for the extension, or none of them where it cannot be built."""
    if "build_ext" not in sys.argv and not {"bdist_wheel", "install", "develop", "editable_wheel"} & set(sys.argv):
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print(
            "las_fast: torch is not importable, so the C++ extension is not built. "
            "For the fast paths: pip install torch setuptools, then pip install --no-build-isolation ."
        )
        return {}
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        print(
            f"las_fast: no C++ compiler ({compiler}), so the extension is not built; "
            "the reference paths will be used. To get it, install g++ and run: python setup.py build_ext"
        )
        return {}
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        print(
            f"las_fast: Python's headers are missing ({header}), so the extension is not built; the reference paths "
            "will be used. To get it, install python3-dev (python3-devel) and run: python setup.py build_ext"
        )
        return {}
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
