"""Other libraries are optional: their suites are skipped where they are not installed."""

from __future__ import annotations

import importlib

import pytest


@pytest.fixture
def installed():
    """installed(name, remedy): import a library, or skip and say how to get it."""

    def find(name: str, remedy: str):
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: torchaudio beside a torch built otherwise
            pytest.skip(f"{name} cannot be imported ({str(error).splitlines()[0]}): {remedy}")

    return find
