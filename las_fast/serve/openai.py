"""OpenAI's /v1/audio/transcriptions: the fields of its form, and its response formats."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse, Response

from las_fast.output.formats import Style, as_srt, as_vtt, rounded
from las_fast.output.transcripts import Segment, Transcript, noise_warning
from las_fast.serve.errors import ApiError
from las_fast.serve.uploads import Form
from las_fast.text import Vocabulary

FORMATS = ("json", "verbose_json", "text", "srt", "vtt")
GRANULARITIES = ("segment", "word")
ALIASES = ("whisper-1",)  # other names of the model, for clients that cannot change theirs
SEEK_RATE = 100  # per second: whisper's `seek` counts feature frames of 10 ms


@dataclass(frozen=True)
class Request:
    """What a valid form asks for.

    `model` and `temperature` are only checked; prompt, include[] and chunking_strategy are ignored.
    """

    response_format: str
    granularities: frozenset[str]
    stream: bool
    language: str  # name that verbose_json reports


def parse_request(form: Form, model: str, language: str) -> Request:
    """Check the fields of a form; raise ApiError if one is wrong."""
    check_model(form.get("model") or model, model)
    response_format = _choice(form.get("response_format") or "json", FORMATS, "response_format")
    name = "timestamp_granularities[]"
    granularities = [_choice(value, GRANULARITIES, name) for value in form.all(name)]
    if granularities and response_format != "verbose_json":
        message = f"timestamp_granularities needs response_format verbose_json; got {response_format}"
        raise ApiError(400, message, param="timestamp_granularities")
    _check_temperature(form.get("temperature"))
    stream = _choice(form.get("stream").lower() or "false", ("true", "false", "1", "0"), "stream") in ("true", "1")
    if stream and response_format not in ("json", "text"):
        message = f"stream needs response_format json or text; got {response_format}"
        raise ApiError(400, message, param="response_format")
    return Request(response_format, frozenset(granularities or ["segment"]), stream, form.get("language") or language)


def check_model(name: str, model: str) -> None:
    """Raise ApiError if `name` is neither the model's name nor one of ALIASES."""
    if name not in (model, *ALIASES):
        message = f"the model {name[:80]!r} does not exist here; give {model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _choice(value: str, choices: tuple[str, ...], name: str) -> str:
    if value not in choices:
        raise ApiError(400, f"{name} must be one of {', '.join(choices)}; got {value[:80]!r}", param=name)
    return value


def _check_temperature(value: str) -> None:
    """Check a temperature, which has no effect: the search draws nothing at random."""
    try:
        is_valid = 0 <= float(value or 0) <= 1
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ApiError(400, f"temperature must be a number from 0 to 1; got {value[:80]!r}", param="temperature")


def respond(transcript: Transcript, request: Request, vocabulary: Vocabulary) -> Response:
    """Return a transcript in the format of the request."""
    if request.response_format == "json":
        return JSONResponse({"text": transcript.text, "usage": usage(transcript)})
    if request.response_format == "verbose_json":
        return JSONResponse(verbose(transcript, request, vocabulary))
    if request.response_format == "text":
        return PlainTextResponse(transcript.text + "\n")
    write = as_srt if request.response_format == "srt" else as_vtt
    media_type = "application/x-subrip" if request.response_format == "srt" else "text/vtt"
    return PlainTextResponse(write(Path("recording"), transcript, Style()), media_type=media_type)


def verbose(transcript: Transcript, request: Request, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the JSON object of verbose_json; OpenAI has neither `warnings` nor the confidences of words."""
    row: dict[str, Any] = {
        "task": "transcribe",
        "language": request.language,
        "duration": transcript.duration,
        "text": transcript.text,
        "usage": usage(transcript),
        "warnings": warnings_of(transcript),
    }
    if "segment" in request.granularities:
        row["segments"] = [segment_row(i, segment, vocabulary) for i, segment in enumerate(transcript.segments)]
    if "word" in request.granularities:
        row["words"] = [
            {"word": word.text, "start": word.start, "end": word.end, "confidence": word.confidence}
            for word in transcript.words
        ]
    return rounded(row)


def segment_row(number: int, segment: Segment, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the JSON object of a segment, with whisper's fields."""
    data = segment.text.encode()
    return {
        "id": number,
        "seek": round(segment.start * SEEK_RATE),
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": vocabulary.encode(segment.text),
        "temperature": 0.0,
        "avg_logprob": segment.mean_score,
        "compression_ratio": len(data) / len(zlib.compress(data)),
        "no_speech_prob": no_speech_probability(segment),
    }


def no_speech_probability(segment: Segment) -> float:
    """Return p(silence) / (p(silence) + p(text)) under the CTC head; 0 without a CTC head or text.

    The speech score is (log p(text) - log p(silence)) / tokens; see las_fast.search.dataset.speech_scores.
    """
    if segment.speech_score is None:
        return 0.0
    return 1 / (1 + math.exp(min(500.0, segment.speech_score * len(segment.text))))


def warnings_of(transcript: Transcript) -> list[str]:
    """Return the problems of a recording that make recognition worse, and whether segments were left out as noise."""
    noise = [noise_warning("the file", transcript, "--min-speech-score of the service")] if transcript.noise else []
    return [*transcript.warnings, *noise]


def usage(transcript: Transcript) -> dict[str, Any]:
    """Return the object by which OpenAI bills: the duration in seconds, rounded up."""
    return {"type": "duration", "seconds": math.ceil(transcript.duration)}


def event(row: dict[str, Any]) -> str:
    """Format a server-sent event."""
    return f"data: {json.dumps(row, ensure_ascii=False)}\n\n"


def delta(segment: Segment, *, is_first: bool) -> str:
    """Return the event with the text of a segment, after a space unless it is the first."""
    return event({"type": "transcript.text.delta", "delta": segment.text if is_first else f" {segment.text}"})


def done(transcript: Transcript) -> str:
    """Return the events at the end of a stream: the whole text, and the end mark."""
    return event({"type": "transcript.text.done", "text": transcript.text}) + "data: [DONE]\n\n"
