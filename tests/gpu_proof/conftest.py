"""Tests whose work is done in worker processes, on both cores."""

import concurrent.futures

import pytest

PROCESSES = 2  # at work at once


def _key(parameters):
    return frozenset((name, str(value)) for name, value in parameters.items())


@pytest.fixture(scope="module")
def ahead(request):
    """A function that starts call(**parameters) for every selected test of the module, two at a time.

    It returns another one: of the parameters of a test, it gives what the call returned, or raises what it raised.
    """
    pool = concurrent.futures.ThreadPoolExecutor(PROCESSES)

    def start(call):
        tests = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
        futures = {_key(test.callspec.params): pool.submit(call, **test.callspec.params) for test in tests}
        return lambda **parameters: futures[_key(parameters)].result()

    yield start
    pool.shutdown(cancel_futures=True)
