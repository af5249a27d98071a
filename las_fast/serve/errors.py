"""Errors in the form of OpenAI's API: {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from las_fast.errors import DoesNotFit, InputError, NotFinite, NotStored, explain_error, is_out_of_memory
from las_fast.serve.batcher import TooLong

INVALID, SERVER = "invalid_request_error", "server_error"  # types of errors


class ApiError(Exception):
    """An error to report to the client.

    Args:
        status:  HTTP status.
        message: one sentence.
        param:   name of the field of the form that is wrong.
        code:    identifier of the problem, for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = INVALID if self.status < 500 else SERVER
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {"Retry-After": "1"} if self.status == 503 else None
        return JSONResponse(self.body(), self.status, headers=headers)


def recording_error(error: Exception) -> ApiError | None:
    """Return the error to report for a recording that was not transcribed; None for a fault of the program or model."""
    if isinstance(error, TooLong):
        return ApiError(400, str(error), param="file", code="audio_too_long")
    if isinstance(error, NotFinite):  # the model is bad, not the recording
        return None
    if isinstance(error, DoesNotFit) or is_out_of_memory(error):
        return ApiError(503, "the server is out of memory; try again later", code="out_of_memory")
    if isinstance(error, InputError) and not isinstance(error, NotStored):
        return ApiError(400, str(error), param="file", code="invalid_audio")
    if explain_error(error):  # such as a full disk
        return ApiError(500, "the server could not store or read the file; see its log", code="storage")
    return None


def internal_error() -> ApiError:
    """Return the error to report for a fault of the program or the model."""
    return ApiError(500, "the server failed; see its log", code="internal_error")


def http_error(request: Request, error: HTTPException) -> ApiError:
    """Return the error to report for an unknown address or method."""
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(404, f"there is no {where}; recordings go to POST /v1/audio/transcriptions", code="unknown_url")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return ApiError(405, f"{where} is not allowed; use {allowed}", code="method_not_allowed")
    return ApiError(error.status_code, error.detail)
