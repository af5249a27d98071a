"""Run the tests' work in worker processes, two at a time."""

import concurrent.futures

import pytest

PROCESSES = 2  # concurrent


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "work(call): what `result` waits for; it is called ahead with the parameters of the test"
    )


@pytest.fixture(scope="session")
def started(request):
    """{id of a test: future} of every selected test with work, started in their order, PROCESSES at a time."""
    pool = concurrent.futures.ThreadPoolExecutor(PROCESSES)
    futures = {}
    for item in request.session.items:
        if mark := item.get_closest_marker("work"):
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            futures[item.nodeid] = pool.submit(mark.kwargs["call"], **parameters)
    yield futures
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def result(request, started):
    """A function that waits for the work of the test and returns its result, or raises its exception."""
    return started[request.node.nodeid].result
