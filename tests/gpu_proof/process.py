"""Worker processes in which Triton kernels are interpreted, and others in which they are compiled.

Triton reads TRITON_INTERPRET when a kernel is decorated, and its interpreter patches the whole process, so one process
cannot do both. Tests call `interpreted(function, *args)` or `compiled(function, *args)`, which return the function's
result or raise its exception.
"""

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pickle
import tempfile
import threading
import traceback

LIMIT = 300.0  # seconds per call
shared_folder = None  # in a worker: the path of a folder that all workers of this run share
SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class WorkerDied(RuntimeError):
    """The worker process crashed, or was killed at the time limit."""


def interpreted(function, *args, limit=LIMIT):
    """Call function(*args) in a process where Triton kernels are interpreted.

    Args:
        function: picklable, so defined at the top level of a module.
        args:     picklable.
        limit:    seconds after which the worker is killed.

    Returns:
        the function's result, copied by pickle.

    Raises:
        WorkerDied: the process crashed or took longer than the limit. The next call starts a new one.
        Exception: the function's exception, with the worker's traceback as a note.
    """
    return _interpreting.call(function, args, limit)


def compiled(function, *args, limit=LIMIT):
    """Call function(*args) in a process where Triton kernels are compiled; otherwise like `interpreted`."""
    return _compiling.call(function, args, limit)


class _Pool:
    """Workers with the same environment. Concurrent calls from several threads get a worker each."""

    def __init__(self, environment):
        self._environment = environment  # name -> value, or None to unset the variable
        self._idle = []

    def call(self, function, args, limit):
        request = pickle.dumps((function, args))
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = _Worker(self._environment)
        try:
            reply = worker.ask(request, limit)
        except BaseException as error:  # also KeyboardInterrupt: a late reply would go to the next call
            worker.kill()
            if isinstance(error, (EOFError, ConnectionError)):
                name = f"{function.__module__}.{function.__qualname__}"
                raise WorkerDied(f"{name}: the worker ended with exit code {worker.exitcode}") from None
            raise
        self._idle.append(worker)
        succeeded, result, trace = pickle.loads(reply)
        if succeeded:
            return result
        result.add_note(f"In the worker process:\n{trace}")
        raise result


class _Worker:
    def __init__(self, environment):
        context = multiprocessing.get_context("spawn")  # a fork would inherit this process's triton
        self._connection, remote = context.Pipe()
        with _starting, _environment(environment):
            # a daemon: multiprocessing ends it when this process ends
            self._process = context.Process(target=_serve, args=(remote, _temporary_folder().name), daemon=True)
            self._process.start()
        remote.close()

    def ask(self, request, limit):
        """Send a request and return the reply. Raises EOFError or ConnectionError if the process dies or is killed."""
        self._connection.send_bytes(request)
        if not self._connection.poll(limit):
            self._process.kill()
        return self._connection.recv_bytes()

    def kill(self):
        """Kill the process if it is still running, and wait for its end."""
        self._process.join(1.0)  # a crashed process has no exit code at once
        self._process.kill()
        self._process.join()
        self._connection.close()

    @property
    def exitcode(self):
        return self._process.exitcode


@contextlib.contextmanager
def _environment(changes):
    """Set environment variables, or unset those that are None, for processes started inside the block."""
    before = {name: os.environ.get(name) for name in changes}
    try:
        _set(changes)
        yield
    finally:
        _set(before)


def _set(variables):
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@functools.cache
def _temporary_folder():
    # removed when this process ends; call it under _starting, since a second folder of a race would be removed at once
    return tempfile.TemporaryDirectory(prefix="gpu_proof-")


def _serve(connection, folder):
    """Serve requests one at a time until the connection closes."""
    global shared_folder
    shared_folder = folder
    faulthandler.enable()
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_reply(request))


def _reply(request):
    """Run a pickled (function, args); return the pickled (True, result, "") or (False, exception, traceback)."""
    try:
        function, args = pickle.loads(request)
        return pickle.dumps((True, function(*args), ""))
    except Exception as error:
        trace = traceback.format_exc()
        return pickle.dumps((False, _picklable(error), trace))


def _picklable(error):
    """The exception if it survives pickling, else a RuntimeError with its type and message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


_starting = threading.Lock()  # starting a worker changes os.environ and may make the shared folder: one at a time
_interpreting = _Pool({"TRITON_INTERPRET": "1", **SINGLE_THREADED})
_compiling = _Pool({"TRITON_INTERPRET": None, **SINGLE_THREADED})
