"""Build backend for pip: that of setuptools, except that the C++ extension is required.

If it cannot be built, the build fails, unless `-C extension=skip` is given. `python setup.py build_ext` only prints a
line in that case, but pip hides the output of a build that succeeds.

The extension works only with the minor version of torch that it is compiled with, because torch's C++ interface is not
stable. So it is compiled with the torch of the environment that pip installs into. If that has no torch, torch is a
build requirement, and pip downloads and compiles with the newest version.
"""

from __future__ import annotations

import importlib.util
import site
import sys
import sysconfig
import tomllib
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist  # noqa: F401 (hooks)

ROOT = Path(__file__).resolve().parent
CHOICES = ("require", "skip")

extension = ""  # one of CHOICES while pip runs the build, which setup.py reads; "" otherwise


def get_requires_for_build_wheel(config_settings=None):
    """Return the build requirements, with torch if the environment lacks it; exit if the compiler is missing."""
    _configure(config_settings)
    required = build_meta.get_requires_for_build_wheel(config_settings)
    if extension == "skip":
        return required
    from las_fast.system import missing_for_build

    if missing := missing_for_build():
        raise SystemExit(unbuilt(*missing))
    return required if find_torch() else [*required, *filter(_is_torch, dependencies())]


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    _configure(config_settings)
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _configure(config_settings)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


get_requires_for_build_editable = get_requires_for_build_wheel


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    _configure(config_settings)
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Build an editable wheel that puts this folder on sys.path, unless -C editable_mode says otherwise.

    By default setuptools installs an import hook, which Python asks last: in the folder that contains a clone,
    `import las_fast` would find the clone, which has no __init__.py, as a namespace package before the hook.
    """
    _configure(config_settings)
    settings = {"editable_mode": "compat", **(config_settings or {})}
    return build_meta.build_editable(wheel_directory, settings, metadata_directory)


def _configure(config_settings) -> None:
    """Set `extension` from pip's option `-C extension=require|skip`."""
    global extension
    extension = (config_settings or {}).get("extension", CHOICES[0])
    if extension not in CHOICES:
        raise SystemExit(f"las_fast: -C extension must be {' or '.join(CHOICES)}; got {extension!r}")


def unbuilt(reason: str, remedy: str) -> str:
    """Return the message of a build that fails under pip."""
    return (
        f"las_fast: {reason}, so the C++ extension cannot be built. To build it, {remedy} and run pip again; to "
        "install without it, on slower paths, add: -C extension=skip"
    )


def dependencies() -> list[str]:
    """Return the packages that las_fast needs, with the oldest versions that it works with."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["las_fast"]["dependencies"]


def runtime_dependencies(torch_version: str | None) -> list[str]:
    """Return the dependencies of a build; torch is pinned to the minor version of `torch_version` unless it is None."""
    if torch_version is None:
        return dependencies()  # there is no extension
    pin = f"torch=={'.'.join(torch_version.split('.')[:2])}.*"
    return [pin if _is_torch(line) else line for line in dependencies()]


def _is_torch(line: str) -> bool:
    return line.partition(">")[0] == "torch"


def find_torch() -> bool:
    """Make the torch of the environment that pip installs into importable; return whether there is one.

    pip builds in an isolated environment, in which sysconfig still has the paths of the environment outside.
    """
    if importlib.util.find_spec("torch"):
        return True
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    for folder in folders if site.ENABLE_USER_SITE else folders[:2]:
        if Path(folder, "torch", "version.py").is_file():
            sys.path.append(folder)  # at the end: setuptools and ninja must be those of the isolated environment
            return True
    return False
