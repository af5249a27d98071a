"""The web application: its addresses, the requests in progress, and streamed responses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from las_fast.data.media import has_pyav
from las_fast.errors import InputError
from las_fast.output.formats import Style, as_srt, as_vtt, rounded, segment_row
from las_fast.output.transcripts import Segment, Transcript
from las_fast.recogniser import Recogniser
from las_fast.serve import openai
from las_fast.serve.attention import attention_of, encode_text
from las_fast.serve.batcher import Batcher, Event, Job, Upload
from las_fast.serve.errors import ApiError, http_error, internal_error, recording_error
from las_fast.serve.limits import Limits
from las_fast.serve.metrics import ABORTED, AUDIO_SECONDS, Metrics, ObserveRequests
from las_fast.serve.uploads import Form, drain, is_received, receive_form, until_disconnected

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"/": "index.html", "/app.js": "app.js", "/wave.js": "wave.js", "/style.css": "style.css"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; media-src blob:; img-src 'self' data:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
NDJSON = "application/x-ndjson"
SEND_GRACE = 10.0  # seconds after its deadline in which a response must be sent
ALIVE_SECONDS = 1.0  # between checks, while a request waits, that the batcher is alive

log = logging.getLogger("las_fast.serve")


@dataclass
class Service:
    """The state that all requests share.

    Args:
        model:    the model; only the batcher runs it.
        name:     name of the model, for the field `model`.
        batcher:  runs the model.
        limits:   limits on each request.
        language: language that verbose_json reports.
    """

    model: Recogniser
    name: str
    batcher: Batcher
    limits: Limits = field(default_factory=Limits)
    language: str = "english"
    in_progress: int = 0  # requests with a recording
    created: int = field(default_factory=lambda: int(time.time()))  # Unix time, for /v1/models

    def __post_init__(self):
        self.metrics = Metrics(self.batcher)

    def application(self) -> Starlette:
        """Return the ASGI application. Its shutdown ends the batcher, after all requests."""
        routes = [
            Route("/v1/audio/transcriptions", self.transcriptions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/transcribe", self.transcribe, methods=["POST"]),
            Route("/attention", self.attention, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            *(Route(path, partial(_page, name)) for path, name in PAGE_FILES.items()),
        ]
        known = {route.path for route in routes}
        observe = Middleware(ObserveRequests, metrics=self.metrics, path_of=partial(_label, known))
        handlers: dict[Any, Callable[..., Any]] = {
            ApiError: self._refuse,
            HTTPException: self._refuse_http,
            ClientDisconnect: _gone,
            Exception: _fail,
        }
        return Starlette(routes=routes, middleware=[observe], exception_handlers=handlers, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.batcher.close)

    # ------------------------------------------------------------------------------------------------------ Addresses

    async def transcriptions(self, request: Request) -> Response:
        """Answer OpenAI's /v1/audio/transcriptions."""
        async with contextlib.AsyncExitStack() as stack:
            form, deadline = await self._receive(request, stack)
            fields = openai.parse_request(form, self.name, self.language)
            if fields.stream:
                return self._stream(request, form, deadline, _openai_events, "text/event-stream", stack.pop_all())
            transcript = await _unless_gone(request, self._whole(request, form, deadline))
            return openai.respond(transcript, fields, self.model.loaded.vocabulary)

    async def transcribe(self, request: Request) -> Response:
        """Answer the page with JSON lines: one per segment as soon as it is decoded, and one at the end."""
        async with contextlib.AsyncExitStack() as stack:
            form, deadline = await self._receive(request, stack)
            return self._stream(request, form, deadline, _json_lines, NDJSON, stack.pop_all())

    async def attention(self, request: Request) -> Response:
        """Answer the page with the attention while the model spells the field `text` for the speech in `file`."""
        async with contextlib.AsyncExitStack() as stack:
            form, deadline = await self._receive(request, stack)
            text = form.get("text")
            try:
                tokens = encode_text(text, self.model.loaded.vocabulary)
            except InputError as error:
                raise ApiError(400, str(error), param="text") from None
            vad = self.batcher.vad
            future = self.batcher.call(lambda model: attention_of(model, Upload(form.file), tokens, vad=vad))
            try:
                row = await _unless_gone(request, self._in_time(asyncio.wrap_future(future), deadline))
                return JSONResponse({"text": text, **row})
            except ClientDisconnect:
                raise
            except Exception as error:
                raise _reported(error) from None
            finally:
                await _ended(future)  # wait: the model may still read the upload

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_row(self.name)]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        openai.check_model(name, self.name)
        return JSONResponse(self._model_row(name))

    def _model_row(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "las_fast"}

    async def health(self, request: Request) -> Response:
        is_alive = self.batcher.is_alive
        row = {"status": "ok" if is_alive else "failed", "model": self.name, "in_progress": self.in_progress,
               "queue": self.limits.queue, "pyav": has_pyav()}  # fmt: skip
        return JSONResponse(row, 200 if is_alive else 503)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # ------------------------------------------------------------------------------------------------------- Requests

    async def _receive(self, request: Request, stack: contextlib.AsyncExitStack) -> tuple[Form, float]:
        """Receive a form; return it and the time by which the request must end.

        The stack gives the place of the request back and closes the file.
        """
        deadline = asyncio.get_running_loop().time() + self.limits.timeout
        stack.enter_context(self._place())
        try:
            async with asyncio.timeout_at(deadline):
                form = await receive_form(request, self.limits.max_bytes)
        except TimeoutError:
            message = f"the upload took longer than {self.limits.timeout:g} seconds; send a smaller file"
            raise ApiError(408, message, code="upload_timeout") from None
        except (OSError, MemoryError) as error:  # such as a full disk
            raise _reported(error) from None
        stack.callback(form.close)
        return form, deadline

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """Hold one of the places for requests in progress."""
        self._check_alive()
        if self.in_progress >= self.limits.queue:
            raise ApiError(
                503, f"{self.limits.queue} requests are in progress; try again in a second", code="queue_full"
            )
        self.in_progress += 1
        self.metrics.in_progress.set(self.in_progress)
        try:
            yield
        finally:
            self.in_progress -= 1
            self.metrics.in_progress.set(self.in_progress)

    def _check_alive(self) -> None:
        if not self.batcher.is_alive:
            raise ApiError(503, "a bug has ended the transcription; restart the server", code="service_failed")

    async def _in_time(self, result: Awaitable[Any], deadline: float) -> Any:
        """Return the result; raise ApiError if there is none by the deadline, or if the batcher has died."""
        loop, work = asyncio.get_running_loop(), asyncio.ensure_future(result)
        try:
            while not work.done():
                self._check_alive()
                if loop.time() >= deadline:
                    message = "the recording was not transcribed in time; send a shorter one, or try again later"
                    raise ApiError(504, message, code="timeout")
                await asyncio.wait([work], timeout=min(ALIVE_SECONDS, deadline - loop.time()))
            return work.result()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _events(
        self, request: Request, form: Form, deadline: float
    ) -> AsyncGenerator[Segment | Transcript, None]:
        """Yield each segment of a recording as soon as it is decoded, then the transcript; raise ApiError."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def on_event(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(form.file, on_event)
        self.batcher.submit(job)
        try:
            while True:
                event = await self._in_time(events.get(), deadline)
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Transcript):
                    request.scope[AUDIO_SECONDS] = event.duration
                    yield event
                    return
                yield event
        except Exception as error:
            raise _reported(error) from None
        finally:
            job.cancel()

    async def _whole(self, request: Request, form: Form, deadline: float) -> Transcript:
        """Return the transcript of a recording; raise ApiError."""
        async for event in self._events(request, form, deadline):
            if isinstance(event, Transcript):
                return event
        raise internal_error()

    def _stream(
        self,
        request: Request,
        form: Form,
        deadline: float,
        lines: Callable[[AsyncIterator[Segment | Transcript]], AsyncIterator[str]],
        media_type: str,
        stack: contextlib.AsyncExitStack,
    ) -> Response:
        """Respond with lines(events of the recording) as they come; close the stack at the end."""

        async def body() -> AsyncGenerator[str, None]:
            async with stack, contextlib.aclosing(self._events(request, form, deadline)) as events:
                async for line in lines(events):
                    yield line

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        until = deadline + SEND_GRACE
        return _Stream(body(), media_type=media_type, headers=headers, until=until, on_end=stack.aclose)

    async def _refuse(self, request: Request, error: ApiError) -> Response:
        if error.status != 408:  # do not wait for a slow client once more
            await drain(request, self.limits.max_bytes)
        response = error.response()
        if not is_received(request):  # the next bytes are the rest of the upload, not a request
            response.headers["Connection"] = "close"
        return response

    async def _refuse_http(self, request: Request, error: HTTPException) -> Response:
        return await self._refuse(request, http_error(request, error))


class _Stream(StreamingResponse):
    """A StreamingResponse that is given up at the time `until`, and calls on_end at its end, even if it never began."""

    def __init__(
        self, content: AsyncGenerator[str, None], *, until: float, on_end: Callable[[], Awaitable[None]], **options: Any
    ):
        super().__init__(content, **options)
        self.lines, self.until, self.on_end = content, until, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(TimeoutError):  # the client has stopped reading; the server closes the connection
                async with asyncio.timeout_at(self.until):
                    await super().__call__(scope, receive, send)
        finally:
            await self.lines.aclose()
            await self.on_end()


def _label(known: set[str], path: str) -> str:
    """Return the label of a path in metrics and log: itself if it is in `known`, "/v1/models/NAME", or "other"."""
    if path.startswith("/v1/models/"):
        return "/v1/models/NAME"
    return path if path in known else "other"


async def _openai_events(events: AsyncIterator[Segment | Transcript]) -> AsyncIterator[str]:
    is_first = True
    try:
        async for event in events:
            if isinstance(event, Transcript):
                yield openai.done(event)
            elif event.text:
                yield openai.delta(event, is_first=is_first)
                is_first = False
    except ApiError as error:
        yield openai.event(error.body())


async def _json_lines(events: AsyncIterator[Segment | Transcript]) -> AsyncIterator[str]:
    try:
        async for event in events:
            if isinstance(event, Transcript):
                yield _line({"type": "done", **_done_row(event)})
            else:
                yield _line({"type": "segment", **segment_row(event)})
    except ApiError as error:
        yield _line({"type": "error", **error.body()})


def _done_row(transcript: Transcript) -> dict[str, Any]:
    files = {name: write(Path("recording"), transcript, Style()) for name, write in (("srt", as_srt), ("vtt", as_vtt))}
    row = {"text": transcript.text, "duration": transcript.duration, "warnings": openai.warnings_of(transcript)}
    return {**row, **files}


def _line(row: dict[str, Any]) -> str:
    return json.dumps(rounded(row), ensure_ascii=False, allow_nan=False) + "\n"


async def _unless_gone(request: Request, result: Awaitable[Any]) -> Any:
    """Return the result; raise ClientDisconnect as soon as the client disconnects."""
    work, gone = asyncio.ensure_future(result), asyncio.ensure_future(until_disconnected(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _ended(future: Future) -> None:
    """Cancel a call of the batcher; if it has started, wait for its end."""
    if not future.cancel():
        await asyncio.gather(asyncio.wrap_future(future), return_exceptions=True)


def _reported(error: Exception) -> ApiError:
    """Return the error to report for an error of the batcher; log it if the server caused it."""
    if isinstance(error, ApiError):
        return error
    reported = recording_error(error)
    if reported is None or reported.status == 500:
        log.error("a request failed", exc_info=error)
    return reported or internal_error()


async def _page(name: str, request: Request) -> Response:
    return FileResponse(PAGE / name, headers=PAGE_HEADERS)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=ABORTED)  # nobody reads it


async def _fail(request: Request, error: Exception) -> Response:
    return internal_error().response()
