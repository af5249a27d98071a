"""Worker processes in which Triton is interpreted, and others in which it compiles.

TRITON_INTERPRET is read when a kernel is decorated, and the interpreter patches Triton for its whole process, so one
process cannot do both. A test calls `interpreted(function, *args)` or `compiled(function, *args)` and gets what the
function returns or raises.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import threading
import traceback

LIMIT = 300.0  # seconds that one call may take
SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class WorkerDied(RuntimeError):
    """The worker process ended, or had to be ended, before it answered."""


def interpreted(function, *args, limit=LIMIT):
    """Call function(*args) in a process where Triton kernels are interpreted.

    Args:
        function: picklable, so defined at the top level of a module.
        args:     picklable.
        limit:    seconds after which the worker is killed.

    Returns:
        what the function returned, pickled and back.

    Raises:
        WorkerDied: the process crashed, or took longer than the limit. The next call gets a new one.
        Exception: what the function raised, with the worker's traceback as a note.
    """
    return _interpreting.call(function, args, limit)


def compiled(function, *args, limit=LIMIT):
    """Call function(*args) in a process where Triton kernels are compiled; otherwise like `interpreted`."""
    return _compiling.call(function, args, limit)


class _Pool:
    """Workers of one kind. Calls from several threads run at once, each in a worker of its own."""

    def __init__(self, environment):
        self._environment = environment  # name -> value, or None for a variable that must not be set
        self._idle = []

    def call(self, function, args, limit):
        question = pickle.dumps((function, args))
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = _Worker(self._environment)
        try:
            answer = worker.ask(question, limit)
        except BaseException as error:  # also an interrupt, after which an answer would still come
            worker.kill()
            if isinstance(error, (EOFError, ConnectionError)):
                name = f"{function.__module__}.{function.__qualname__}"
                raise WorkerDied(f"{name}: the worker ended with exit code {worker.exitcode}") from None
            raise
        self._idle.append(worker)
        succeeded, result, trace = pickle.loads(answer)
        if succeeded:
            return result
        result.add_note(f"In the worker process:\n{trace}")
        raise result


class _Worker:
    def __init__(self, environment):
        context = multiprocessing.get_context("spawn")  # a fork would inherit triton as it is here
        self._connection, theirs = context.Pipe()
        # a daemon: multiprocessing ends it when this process ends
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _starting, _environment(environment):
            self._process.start()
        theirs.close()

    def ask(self, question, limit):
        """Return the answer; EOFError or ConnectionError where the process ends, by itself or at the limit."""
        self._connection.send_bytes(question)
        if not self._connection.poll(limit):
            self._process.kill()
        return self._connection.recv_bytes()

    def kill(self):
        """End the process, if it has not ended, and wait for that."""
        self._process.join(1.0)  # one that crashed needs a moment until it has an exit code
        self._process.kill()
        self._process.join()
        self._connection.close()

    @property
    def exitcode(self):
        return self._process.exitcode


@contextlib.contextmanager
def _environment(changes):
    """Set or, with None, unset environment variables for the processes that are started inside."""
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


def _serve(connection):
    """Answer calls, one after the other, until the other end of the connection closes."""
    faulthandler.enable()
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(call))


def _answer(call):
    """Return the pickled (True, result, "") or (False, exception, traceback) of a pickled call."""
    try:
        function, args = pickle.loads(call)
        return pickle.dumps((True, function(*args), ""))
    except Exception as error:
        trace = traceback.format_exc()
        return pickle.dumps((False, _portable(error), trace))


def _portable(error):
    """The exception itself if it survives pickling, or else one that says what it was."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


_starting = threading.Lock()  # the environment is changed while a worker starts, so one at a time
_interpreting = _Pool({"TRITON_INTERPRET": "1", **SINGLE_THREADED})
_compiling = _Pool({"TRITON_INTERPRET": None, **SINGLE_THREADED})
