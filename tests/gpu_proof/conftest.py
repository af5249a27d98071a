"""Run the tests' work in worker processes, two at a time."""

import concurrent.futures

import pytest

PROCESSES = 2  # concurrent


def _key(parameters):
    return frozenset((name, str(value)) for name, value in parameters.items())


@pytest.fixture(scope="module")
def start_all(request):
    """A function (call) that starts call(**parameters) for every selected test of the module, two at a time.

    It returns a function (**parameters) that waits for the call with these parameters and returns its result.
    """
    pool = concurrent.futures.ThreadPoolExecutor(PROCESSES)

    def start(call):
        tests = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
        futures = {_key(test.callspec.params): pool.submit(call, **test.callspec.params) for test in tests}
        return lambda **parameters: futures[_key(parameters)].result()

    yield start
    pool.shutdown(cancel_futures=True)
