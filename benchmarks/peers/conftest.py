"""Skip the benchmarks of libraries that are not installed."""

from __future__ import annotations

import importlib

import pytest


@pytest.fixture
def installed():
    """installed(name, remedy): import a library, or skip the test and say how to install it."""

    def import_or_skip(name: str, remedy: str):
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: torchaudio was built for another torch
            pytest.skip(f"{name} cannot be imported ({str(error).splitlines()[0]}): {remedy}")

    return import_or_skip
