"""Every test that takes `backend` runs on each backend of the op that its file is named after."""

from __future__ import annotations

import pytest
from calls import COVERED

from las_fast.ops import backends


@pytest.fixture(params=COVERED)
def backend(request) -> str:
    """One backend after another; skips those that are not available here, with the reason."""
    op = request.module.__name__.removeprefix("test_")
    if reason := backends.unavailable(op, request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def cpp() -> str:
    """The C++ backend, for what is claimed of it alone."""
    if reason := backends.EXTENSION_PROBLEM:
        pytest.skip(reason)
    return "cpp"
