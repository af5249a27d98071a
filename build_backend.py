"""The build backend of pip: that of setuptools, and the C++ extension must be built, or `-C extension=skip` be given.

pip builds in an isolated environment and hides the output of a build that succeeds. So what prevents the extension from
being built is an error here, unlike for `python setup.py build_ext`.

The extension only works with the minor version of torch that it is compiled with, because torch's C++ interface is not
stable. It is compiled with the torch of the environment that pip installs into. Only if there is none, torch is a build
requirement, and pip compiles with the newest.
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

extension = ""  # one of CHOICES if pip runs the build; setup.py reads it


def get_requires_for_build_wheel(config_settings=None):
    """Check what can be checked before pip downloads anything; require torch if the environment has none."""
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
    _configure(config_settings)
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def _configure(config_settings) -> None:
    """Read `-C extension=require|skip` of pip."""
    global extension
    extension = (config_settings or {}).get("extension", CHOICES[0])
    if extension not in CHOICES:
        raise SystemExit(f"las_fast: -C extension must be {' or '.join(CHOICES)}; got {extension!r}")


def unbuilt(reason: str, remedy: str) -> str:
    """Return the error of a build under pip."""
    return (
        f"las_fast: {reason}, so the C++ extension cannot be built. To build it, {remedy} and run pip again; to "
        "install without it, on slower paths, add: -C extension=skip"
    )


def dependencies() -> list[str]:
    """Return the packages that las_fast needs, with the oldest versions that it works with."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["las_fast"]["dependencies"]


def runtime_dependencies(torch_version: str | None) -> list[str]:
    """Return the dependencies of a build; with an extension compiled with `torch_version`, only its minor version."""
    if torch_version is None:
        return dependencies()
    pin = f"torch=={'.'.join(torch_version.split('.')[:2])}.*"
    return [pin if _is_torch(line) else line for line in dependencies()]


def _is_torch(line: str) -> bool:
    return line.partition(">")[0] == "torch"


def find_torch() -> bool:
    """Make the torch of the environment that pip installs into importable; return whether there is one.

    In pip's isolated environment, the interpreter and its paths are those of the target.
    """
    if importlib.util.find_spec("torch"):
        return True
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    for folder in folders if site.ENABLE_USER_SITE else folders[:2]:
        if Path(folder, "torch", "version.py").is_file():
            sys.path.append(folder)  # last: setuptools and ninja are those of the isolated environment
            return True
    return False
