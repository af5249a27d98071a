"""Fixtures and settings of all tests: one thread, a temporary feature cache, and the shared recordings."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from las_fast.ops import backends

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared"

torch.set_num_threads(1)

# Background shells and nohup ignore these signals, but tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _signal in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(_signal, signal.SIG_DFL)


def pytest_report_header() -> list[str]:
    """List the backends of each op that this run covers."""
    lines = []
    for op in backends.IMPLEMENTED:
        names = [name for name in backends.BACKENDS if backends.unavailable(op, name) is None]
        lines.append(f"backends of {op}: {', '.join(names)}")
    return lines


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keep the user's feature cache out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def shared() -> Path:
    """The folder of shared recordings; skips where a checkout has none."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent")
    return SHARED
