"""Receive a form with a recording. Its size is limited, and a large file is kept in an unnamed temporary file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from las_fast.serve.errors import ApiError
from las_fast.serve.limits import MEGABYTE

MAX_FIELDS = 50  # in a form
FORM_BYTES = 65536  # of a form without its file
DRAIN_SECONDS, DRAIN_FACTOR = 10.0, 4  # a refused upload is read for so long, and up to this multiple of max_bytes


@dataclass(frozen=True)
class Form:
    """The fields of a form, and its recording."""

    fields: FormData
    file: BinaryIO  # at its start

    def get(self, name: str, default: str = "") -> str:
        """Return the last value of a text field; raise ApiError if it is a file."""
        value = self.fields.get(name, default)
        if not isinstance(value, str):
            raise ApiError(400, f"{name} must be text; got a file", param=name)
        if any("\ud800" <= character <= "\udfff" for character in value):  # the charset utf-7 can make them
            raise ApiError(400, f"{name} has a lone surrogate; send it as UTF-8", param=name)
        return value

    def all(self, name: str) -> list[str]:
        """Return all values of a field that are text."""
        return [value for value in self.fields.getlist(name) if isinstance(value, str)]

    def close(self) -> None:
        self.file.close()


class _Parser(MultiPartParser):
    """A parser that knows whether the form is complete: a file that is cut off must not be taken for a whole one."""

    is_complete = False

    def on_end(self) -> None:
        self.is_complete = True


async def receive_form(request: Request, max_bytes: int) -> Form:
    """Receive a form whose field "file" is a recording.

    Raises:
        ApiError: it is too large, is not a form, is cut off, or has no file.
        ClientDisconnect: the client has disconnected.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(400, 'send a multipart/form-data form with the recording in the field "file"')
    parser = _Parser(request.headers, _stream(request, max_bytes), max_files=1, max_fields=MAX_FIELDS,
                     max_part_size=FORM_BYTES)  # fmt: skip
    try:
        form = await parser.parse()
    except (MultiPartException, UnicodeError) as error:
        reason = getattr(error, "message", None) or str(error)
        raise ApiError(
            400, f"the form cannot be read ({reason.rstrip('.')}); send one file, and fields in UTF-8"
        ) from None
    file = form.get("file")
    if not isinstance(file, UploadFile):
        if not parser.is_complete:
            raise ApiError(400, "the form is cut off; send it again")
        got = "text" if file else "none"
        raise ApiError(400, f'the form needs the recording, a file, in the field "file"; got {got}', param="file")
    if not parser.is_complete or (file.size or 0) > max_bytes:
        file.file.close()
        raise _too_large(max_bytes) if parser.is_complete else ApiError(400, "the form is cut off; send it again")
    return Form(form, file.file)


async def _stream(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Yield the body of a request.

    Raises:
        ApiError: it is larger than a form with a file of max_bytes.
        ClientDisconnect: the client has disconnected.
    """
    limit = max_bytes + FORM_BYTES
    if int(request.headers.get("content-length") or 0) > limit:
        raise _too_large(max_bytes)
    total = 0
    while not is_received(request):
        chunk = await _receive(request)
        total += len(chunk)
        if total > limit:
            raise _too_large(max_bytes)
        yield chunk


def _too_large(max_bytes: int) -> ApiError:
    limit = f"{round(max_bytes / MEGABYTE, 4):g} MB"
    message = f"the file must have at most {limit}; send a shorter one, or compress it as flac, ogg or mp3"
    return ApiError(413, message, param="file", code="file_too_large")


async def _receive(request: Request) -> bytes:
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    if not message.get("more_body", False):
        request.scope["las_fast.is_received"] = True
    return message.get("body", b"")


def is_received(request: Request) -> bool:
    """Return whether the body of a request has been read to its end."""
    return request.scope.get("las_fast.is_received", False)


async def drain(request: Request, max_bytes: int) -> None:
    """Read and discard the rest of a refused upload, within limits.

    Many clients read no response before they have sent everything, and would report a broken connection. A client that
    waits for "100 Continue" sends nothing more.
    """
    if request.method not in ("POST", "PUT", "PATCH") or "100-continue" in request.headers.get("expect", "").lower():
        return
    total = 0
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DRAIN_SECONDS):
            while not is_received(request) and total < DRAIN_FACTOR * max_bytes:
                total += len(await _receive(request))


async def until_disconnected(request: Request) -> None:
    """Wait until the client disconnects; the body must have been received."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
