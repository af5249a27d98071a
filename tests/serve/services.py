"""Services on a free port and connections to them, for tests."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import uvicorn

from las_fast.recogniser import Recogniser
from las_fast.serve.app import Service
from las_fast.serve.batcher import Batcher
from las_fast.serve.limits import Limits


class Running:
    """A service that answers on `url`."""

    def __init__(self, service: Service, url: str):
        self.service, self.url = service, url
        self.client = httpx.Client(base_url=url, timeout=20)
        self.batcher = service.batcher

    def post(self, path: str = "/v1/audio/transcriptions", *, file=None, **fields) -> httpx.Response:
        """Send a form; `file` is the bytes of a recording."""
        files = {} if file is None else {"file": ("talk.wav", file)}
        return self.client.post(path, data=fields, files=files or {"none": ("", b"")})

    def error(self, **form) -> tuple[int, dict]:
        """Send a form as `post` does; return the status and the error."""
        response = self.post(**form)
        return response.status_code, response.json()["error"]

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """Keep the model busy inside the `with` block."""
        started, go_on = threading.Event(), threading.Event()
        self.batcher.call(lambda model: (started.set(), go_on.wait(20)))
        assert started.wait(20)
        try:
            yield
        finally:
            go_on.set()


@contextlib.contextmanager
def running(model: Recogniser, limits: Limits | None = None, *, name: str = "tiny", **options) -> Iterator[Running]:
    """Run a service in a thread. options: those of Batcher."""
    limits = limits or Limits()
    batcher = Batcher(model, max_seconds=limits.max_seconds, **options)
    service = Service(model, name, batcher, limits)
    server = uvicorn.Server(uvicorn.Config(service.application(), port=0, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        one = Running(service, f"http://127.0.0.1:{port}")
        with one.client:
            yield one
    finally:
        server.should_exit = True
        thread.join()


def stalled_upload(port: int) -> socket.socket:
    """Return a connection that has sent the beginning of a form, and sends no more."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    )
    return connection
