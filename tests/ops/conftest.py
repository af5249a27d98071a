"""Fixtures: a test that takes `backend` runs on each backend of the op that its file is named after."""

from __future__ import annotations

import pytest
from calls import TESTED_BACKENDS

from las_fast.ops import backends


@pytest.fixture(params=TESTED_BACKENDS)
def backend(request) -> str:
    """Each backend; skips those that are not available here, with the reason."""
    op = request.module.__name__.removeprefix("test_")
    if reason := backends.unavailable(op, request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def cpp() -> str:
    """The C++ backend, for tests of that backend only."""
    if reason := backends.EXTENSION_PROBLEM:
        pytest.skip(reason)
    return "cpp"
