"""The service speaks OpenAI's API: its official client works unchanged, and errors have OpenAI's form."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import math
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from fakes import raising
from recordings import encoded
from tiny_corpora import make_music, make_speech

from las_fast.errors import InputError
from las_fast.output.formats import Style, as_srt, as_vtt, segment_row
from las_fast.output.transcripts import Segment, Transcript, Word
from las_fast.search.beam import TokenHypothesis
from las_fast.serve import app
from las_fast.serve import openai as api
from las_fast.serve.app import Service
from las_fast.serve.limits import Limits
from las_fast.text import Vocabulary
from serve.services import running, stalled_upload


@pytest.fixture
def client(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as one:
        yield one.audio.transcriptions


@pytest.fixture
def expected(model, wav):
    return model.transcribe(io.BytesIO(wav()))


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# -------------------------------------------------------------------------------------------------- The official client


def test_the_openai_client_gets_the_text_of_the_python_api(client, wav, expected):
    for model in ("tiny", "whisper-1"):
        assert client.create(model=model, file=("talk.wav", wav())).text == expected.text


def test_the_openai_client_gets_text_srt_and_vtt(client, wav, expected):
    path = Path("recording")
    texts = {
        "text": f"{expected.text}\n",
        "srt": as_srt(path, expected, Style()),
        "vtt": as_vtt(path, expected, Style()),
    }
    for response_format, text in texts.items():
        assert client.create(model="tiny", file=wav(), response_format=response_format) == text


def test_the_openai_client_gets_segments_and_words(client, wav, model):
    expected = model.transcribe(io.BytesIO(wav(25)))
    answer = client.create(
        model="tiny", file=wav(25), response_format="verbose_json", timestamp_granularities=["segment", "word"]
    )
    assert (answer.text, answer.language, answer.duration) == (expected.text, "english", 25.0)
    assert [(s.start, s.end, s.text) for s in answer.segments] == [(s.start, s.end, s.text) for s in expected.segments]
    assert len(answer.segments) == 2
    assert [s.avg_logprob for s in answer.segments] == [round(s.mean_score, 4) for s in expected.segments]
    assert [word.word for word in answer.words] == [word.text for word in expected.words]


def test_the_openai_client_gets_a_stream_of_segments(client, wav, model):
    expected = model.transcribe(io.BytesIO(wav(25)))
    *deltas, last = client.create(model="tiny", file=wav(25), stream=True)
    assert len(deltas) == 2
    assert "".join(one.delta for one in deltas) == last.text == expected.text


def test_the_openai_client_lists_the_model(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused") as client:
        assert [one.id for one in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"


def test_the_openai_client_raises_its_own_errors(client, wav):
    with pytest.raises(openai.NotFoundError) as error:
        client.create(model="whisper-9", file=wav())
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="cannot be read as audio"):
        client.create(model="tiny", file=b"not audio")


# ------------------------------------------------------------------------------------------------------ verbose_json


def transcript(*words, score=3.0):
    segment = Segment(1.0, 2.5, "SO IT IS", -2.0, -0.25, score, (), tuple(words))
    return Transcript(segment.text, (segment,), (), 4.0)


def test_words_have_times_and_confidences():
    words = [Word("SO", 1.1, 1.4, 0.91234), Word("IT", 1.5, 1.7, 0.5), Word("IS", 1.8, 2.4, 1.0)]
    asked = api.Request("verbose_json", frozenset({"word"}), False, "english")
    row = api.verbose(transcript(*words), asked, Vocabulary())
    assert "segments" not in row
    assert row["words"][0] == {"word": "SO", "start": 1.1, "end": 1.4, "confidence": 0.9123}
    assert [word["word"] for word in row["words"]] == ["SO", "IT", "IS"]


def test_problems_of_the_recording_are_reported(service, wav):
    half = wav()[: len(wav()) // 2]
    answer = service.post(file=half, response_format="verbose_json").json()
    assert len(answer["warnings"]) == 1 and answer["warnings"][0].startswith("the file is cut off: it has")
    *_, last = service.post("/transcribe", file=half).text.splitlines()
    assert json.loads(last)["warnings"] == answer["warnings"]


def test_segments_left_out_as_noise_are_reported():
    said = transcript(score=0.25)
    noisy = replace(said, segments=(), noise=said.segments, warnings=("the file is quiet",))
    assert api.warnings_of(said) == [] and api.warnings_of(noisy) == [
        "the file is quiet",
        "the file: left out 1 segment that may be noise, the first at 1.0 s (speech score 0.25); --min-speech-score of "
        "the service sets the limit",
    ]


def test_segments_have_whispers_fields():
    row = api.segment_row(3, transcript().segments[0], Vocabulary())
    assert row == {
        "id": 3, "seek": 100, "start": 1.0, "end": 2.5, "text": "SO IT IS", "tokens": Vocabulary().encode("SO IT IS"),
        "temperature": 0.0, "avg_logprob": -0.25, "compression_ratio": 0.5, "no_speech_prob": 1 / (1 + math.exp(24)),
    }  # fmt: skip


def test_the_probability_of_no_speech_is_that_of_silence_against_the_text():
    probabilities = [api.no_speech_probability(transcript(score=x).segments[0]) for x in (None, 0.0, 100.0, -math.inf)]
    assert probabilities == [0.0, 0.5, pytest.approx(0.0, abs=1e-200), 1.0]


# -------------------------------------------------------------------------------------------------------------- Errors


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "docx"}, "response_format"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": "1.5"}, "temperature"),
        ({"stream": "maybe"}, "stream"),
        ({"stream": "true", "response_format": "srt"}, "response_format"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
        ({"response_format": "verbose_json", "timestamp_granularities[]": "letter"}, "timestamp_granularities[]"),
    ],
)
def test_a_wrong_field_is_named(service, wav, fields, param):
    status, error = service.error(file=wav(), **fields)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)


def test_a_form_without_a_file_is_refused(service):
    status, error = service.error(model="tiny")
    assert (status, error["param"]) == (400, "file")
    for body, kind in ((b"{}", "application/json"), (b"--x", "multipart/form-data; boundary=x"), (b"", "")):
        response = service.client.post("/v1/audio/transcriptions", content=body, headers={"content-type": kind})
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(("charset", "text"), [("undefined", "en"), ("utf-7", "+2AA-")])
def test_a_form_of_a_hostile_charset_is_refused(service, wav, charset, text):
    head = f'--x\r\nContent-Disposition: form-data; name="language"\r\n\r\n{text}\r\n'.encode()
    head += b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    kind = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
    response = service.client.post("/v1/audio/transcriptions", content=head + wav() + b"\r\n--x--\r\n", headers=kind)
    assert response.status_code == 400 and "UTF-8" in response.json()["error"]["message"]


def test_a_form_that_is_cut_off_is_refused(service, wav):
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    kind = {"content-type": "multipart/form-data; boundary=x"}
    whole = service.client.post("/v1/audio/transcriptions", content=head + wav() + b"\r\n--x--\r\n", headers=kind)
    assert whole.status_code == 200
    for body in (head + wav(), head + wav() + b"\r\n--x\r\n"):
        response = service.client.post("/v1/audio/transcriptions", content=body, headers=kind)
        assert (response.status_code, response.json()["error"]["message"]) == (
            400, "the form is cut off; send it again",
        )  # fmt: skip


@pytest.mark.parametrize("data", [b"", b"not audio", b"RIFF\x00\x00\x00\x00WAVE"])
def test_a_file_that_is_not_audio_is_refused(service, data):
    status, error = service.error(file=data)
    assert (status, error["code"], error["param"]) == (400, "invalid_audio", "file")
    assert error["message"].startswith("the file ")


def test_an_unknown_address_or_method_is_refused(service):
    for method, path, status, advice in (
        ("GET", "/v1/nothing", 404, "go to POST /v1/audio/transcriptions"), ("GET", "/transcribe", 405, "; use POST"),
        ("POST", "/v1/files", 404, "go to POST /v1/audio/transcriptions"),
    ):  # fmt: skip
        response = service.client.request(method, path, content=b"x" * 100)
        assert (response.status_code, response.json()["error"]["type"]) == (status, "invalid_request_error")
        assert response.json()["error"]["message"].endswith(advice)


def test_a_bug_is_reported_without_details(service, wav, monkeypatch, caplog):
    monkeypatch.setattr(app, "recording_error", lambda error: None)
    monkeypatch.setattr("las_fast.transcription.open_recording", raising(KeyError("the bug")))
    status, error = service.error(file=wav())
    assert (status, error["type"], error["code"]) == (500, "server_error", "internal_error")
    assert "bug" not in error["message"] and "the bug" in caplog.text


def not_finite(batch, **options):
    return [[TokenHypothesis([], math.nan, math.nan, [], [], False)]] * batch.features.shape[0]


DISK_FULL = raising(OSError(28, "No space left on device"))
FAULTS = {
    "memory": ("las_fast.search.dataset._decode_batch", raising(MemoryError()), 503, "out_of_memory"),
    "NaN": ("las_fast.search.dataset._decode_batch", not_finite, 500, "internal_error"),
    "disk full at the copy": ("las_fast.data.opening._copy", DISK_FULL, 500, "storage"),
    "disk full at the upload": ("starlette.datastructures.UploadFile.write", DISK_FULL, 500, "storage"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_server_does_not_blame_the_recording(service, wav, monkeypatch, caplog, fault):
    name, failing, status, code = FAULTS[fault]
    monkeypatch.setattr(name, failing)
    actual, error = service.error(file=wav())
    assert (actual, error["type"], error["code"], error["param"]) == (status, "server_error", code, None)
    assert ("a request failed" in caplog.text) == (status == 500)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_a_bug_in_a_thread_requests_get_503_at_once(model, wav):
    with running(model) as service:
        service.batcher._read = raising(BaseException("a bug"))
        for form in ({}, {}, {"path": "/attention", "text": "A"}):  # the first of them meets the bug
            began = time.monotonic()
            status, error = service.error(file=wav(), **form)
            assert (status, error["code"]) == (503, "service_failed") and time.monotonic() - began < 5
        assert service.service.in_progress == 0


# -------------------------------------------------------------------------------------------------------------- Limits


@pytest.fixture(scope="module")
def small(model):
    limits = Limits(max_bytes=100_000, max_seconds=2.0, timeout=20.0, queue=2)
    with running(model, limits) as one:
        yield one


@pytest.fixture(scope="module")
def hasty(model):
    with running(model, Limits(timeout=1.0, queue=2)) as one:
        yield one


def chunks(data, size=10_000):
    for first in range(0, len(data), size):
        yield data[first : first + size]


def test_a_file_at_the_limit_is_accepted_and_a_larger_one_refused(small, wav):
    file = wav().ljust(100_000, b"\0")
    assert small.post(file=file).status_code == 200
    status, error = small.error(file=file + b"\0")
    assert (status, error["code"]) == (413, "file_too_large") and "0.0954 MB" in error["message"]


def test_a_large_body_is_refused_with_and_without_its_length(small):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    for content in (bytes(200_000), chunks(bytes(200_000))):
        response = small.client.post("/v1/audio/transcriptions", content=content, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) in ((413, "file_too_large"), (400, None))
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    response = small.client.post("/v1/audio/transcriptions", content=chunks(head + bytes(200_000)), headers=headers)
    assert response.json()["error"]["code"] == "file_too_large"


def test_a_text_field_has_at_most_64_kib(service, wav):
    assert service.post(file=wav(), prompt="x" * 2**16).status_code == 200
    status, error = service.error(file=wav(), prompt="x" * (2**16 + 1))
    assert status == 400 and "exceeded maximum size of 64KB" in error["message"]


def test_a_long_recording_is_refused(small, wav):
    assert small.post(file=wav(1.9)).status_code == 200
    status, error = small.error(file=wav(2.5))
    assert (status, error["code"]) == (400, "audio_too_long")
    assert error["message"] == "the file is longer than 2 seconds; send it in parts"


def test_more_requests_than_places_get_503(small, wav):
    port = small.client.base_url.port
    with stalled_upload(port), stalled_upload(port):
        wait_until(lambda: small.service.in_progress == 2)
        response = small.post(file=wav())
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
        assert response.headers["retry-after"] == "1"
        assert small.client.get("/health").json()["in_progress"] == 2
    wait_until(lambda: small.service.in_progress == 0)
    assert small.post(file=wav()).status_code == 200


def test_a_slow_upload_gets_408(hasty):
    with stalled_upload(hasty.client.base_url.port) as connection:
        connection.settimeout(20)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408") and b"upload_timeout" in answer


def test_a_request_that_the_model_cannot_do_in_time_gets_504(hasty, wav):
    with hasty.blocked():
        status, error = hasty.error(file=wav())
    assert (status, error["type"], error["code"]) == (504, "server_error", "timeout")
    wait_until(lambda: hasty.post(file=wav()).status_code == 200)  # on a busy machine, the first may take too long


def count_disconnected(service, path="/v1/audio/transcriptions"):
    """Return how many requests /metrics counts as disconnected."""
    count = re.search(rf'requests_total{{path="{path}",status="499"}} (.*)', service.client.get("/metrics").text)
    return float(count[1]) if count else 0.0


def test_a_client_that_disconnects_frees_its_place_and_the_model(small, wav):
    before, disconnected_before = small.batcher.totals.segments, count_disconnected(small)
    with small.blocked():
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{small.url}/v1/audio/transcriptions", files={"file": wav()}, timeout=0.2)
        wait_until(lambda: small.service.in_progress == 0)
    assert small.post(file=wav()).status_code == 200
    assert small.batcher.totals.segments == before + 1  # that of the second request
    assert count_disconnected(small) == disconnected_before + 1


def test_a_client_that_leaves_an_attention_request_counts_as_disconnected(small, wav, caplog):
    before = count_disconnected(small, "/attention")
    with small.blocked(), pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{small.url}/attention", files={"file": wav()}, data={"text": "A"}, timeout=0.2)
    wait_until(lambda: count_disconnected(small, "/attention") == before + 1)
    assert "a request failed" not in caplog.text


def test_a_client_that_stops_reading_a_stream_loses_its_place(small, wav, monkeypatch):
    monkeypatch.setattr(app, "SEND_GRACE", 0.2)
    request = httpx.Request("POST", small.url, files={"file": wav()})
    messages = [{"type": "http.request", "body": request.read()}]
    sent = []

    async def receive():
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message):
        sent.append(message["type"])
        if len(sent) > 1:
            await asyncio.Event().wait()  # for ever

    scope = {"type": "http", "method": "POST", "path": "/transcribe", "query_string": b"",
             "headers": [(name.lower(), value) for name, value in request.headers.raw],
             "asgi": {"version": "3.0", "spec_version": "2.3"}}  # fmt: skip
    service = Service(small.service.model, "tiny", small.batcher, replace(small.service.limits, timeout=1.0))
    asyncio.run(asyncio.wait_for(service.application()(scope, receive, send), 10))
    assert sent == ["http.response.start", "http.response.body"] and service.in_progress == 0


def test_uploads_leave_no_file_behind(small, model, wav, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with running(model) as service:
        large = wav().ljust(3_000_000, b"\0")  # larger than what is kept in memory
        assert service.post(file=large).status_code == 200
        assert service.post(file=bytes(3_000_000)).status_code == 400
        with service.blocked(), pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{service.url}/v1/audio/transcriptions", files={"file": large}, timeout=0.3)
        wait_until(lambda: service.service.in_progress == 0)
        assert service.post(file=large).status_code == 200
        assert list(tmp_path.iterdir()) == []
        open_files = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        assert [path for path in open_files if str(path).startswith(str(tmp_path))] == []


# --------------------------------------------------------------------------------------------------- Page and metrics


def test_the_page_gets_each_segment_as_a_line(service, wav, model):
    expected = model.transcribe(io.BytesIO(wav(25)), nbest=2)
    response = service.post("/transcribe", file=wav(25))
    *segments, last = [json.loads(line) for line in response.text.splitlines()]
    assert [one["type"] for one in segments] == ["segment"] * 2 and last["type"] == "done"
    assert [one["text"] for one in segments] == [one.text for one in expected.segments]
    assert [one["alternatives"][0]["text"] for one in segments] == [one.nbest[1].text for one in expected.segments]
    assert (last["text"], last["duration"]) == (expected.text, 25.0)
    assert last["srt"] == as_srt(Path("x"), expected, Style()) and last["vtt"].startswith("WEBVTT")


def test_a_score_that_json_cannot_express_is_null_on_the_page():
    row = json.loads(app._line({"type": "segment", **segment_row(transcript(score=-math.inf).segments[0])}))
    assert row["speech_score"] is None and row["text"] == "SO IT IS"


def test_an_error_in_a_stream_is_its_last_line(service):
    (line,) = service.post("/transcribe", file=b"not audio").text.splitlines()
    row = json.loads(line)
    assert (row["type"], row["error"]["code"]) == ("error", "invalid_audio")


def test_a_segment_is_sent_before_the_recording_is_decoded(model, wav):
    with running(model, batch_seconds=0) as service:
        reached, go_on = threading.Event(), threading.Event()
        decode = service.batcher._shared.decode_pool

        def decode_pool():
            if reached.is_set():
                go_on.wait(20)
            reached.set()
            decode()

        service.batcher._shared.decode_pool = decode_pool
        request = service.client.stream("POST", "/transcribe", files={"file": wav(25)})
        with request as response:
            lines = response.iter_lines()
            first = next(lines)
            assert reached.is_set() and not go_on.is_set()
            go_on.set()
            assert '"start": 0.0' in first and len([*lines]) == 2


def test_health_and_metrics(service, wav):
    assert service.client.get("/health").json() == {
        "status": "ok", "model": "tiny", "in_progress": 0, "queue": 64, "pyav": True,
    }  # fmt: skip
    text = service.client.get("/metrics").text
    assert 'las_fast_requests_total{path="/health",status="200"}' in text
    assert "las_fast_segments_total" in text and "las_fast_requests_in_progress 0.0" in text


def test_a_service_whose_model_has_failed_is_not_healthy(service, monkeypatch):
    monkeypatch.setattr(type(service.batcher), "is_alive", False)
    response = service.client.get("/health")
    assert (response.status_code, response.json()["status"]) == (503, "failed")
    monkeypatch.undo()
    assert service.client.get("/health").status_code == 200


def test_the_durations_of_requests_are_counted_up_to_each_limit(service):
    service.client.get("/health")
    text = service.client.get("/metrics").text
    limits = re.findall(r'request_seconds_bucket{le="(.*?)",path="/health"}', text)
    assert limits == ["0.05", "0.1", "0.2", "0.5", "1.0", "2.0", "5.0", "10.0", "30.0", "60.0", "300.0", "+Inf"]


def logged(caplog):
    """The requests in the log, without the seconds that they took."""
    lines = [record.getMessage() for record in caplog.records if record.name == "las_fast.serve"]
    assert all(re.search(r" in \d+\.\d\d s$", line) for line in lines)
    return [line.rpartition(" in ")[0] for line in lines]


def test_a_request_is_a_line_of_the_log_without_texts_or_names(service, wav, model, caplog):
    file, text = wav(), model.transcribe(io.BytesIO(wav())).text
    lines = []
    requests = [
        (lambda: service.post(file=file), "POST /v1/audio/transcriptions 200, 0.6 s of audio"),
        (lambda: service.post(file=file, stream="true"), "POST /v1/audio/transcriptions 200, 0.6 s of audio"),
        (lambda: service.post("/transcribe", file=file), "POST /transcribe 200, 0.6 s of audio"),
        (lambda: service.post(file=b"secret"), "POST /v1/audio/transcriptions 400"),
        (lambda: service.post("/attention", file=file, text="A SECRET"), "POST /attention 200"),
        (lambda: service.client.get("/health?of=secret"), "GET /health 200"),
        (lambda: service.client.get("/v1/models/secret"), "GET /v1/models/NAME 404"),
        (lambda: service.client.put("/secret.wav", content=file), "PUT other 404"),
    ]
    with caplog.at_level("INFO", logger="las_fast.serve"):
        for request, line in requests:
            caplog.clear()
            request()
            wait_until(lambda line=line: line in logged(caplog))  # a client may have its answer before
            lines += logged(caplog)
    assert not re.search(rf"secret|talk|{re.escape(text)}", "\n".join(lines), re.IGNORECASE) and len(text) > 3


def test_a_client_that_disconnects_is_logged_with_status_499(small, wav, caplog):
    with caplog.at_level("INFO", logger="las_fast.serve"), small.blocked():
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{small.url}/v1/audio/transcriptions", files={"file": wav()}, timeout=0.2)
        wait_until(lambda: "POST /v1/audio/transcriptions 499" in logged(caplog))


def test_a_bug_outside_of_the_model_is_counted_and_logged_with_status_500(service, monkeypatch, caplog):
    def count():
        found = re.search(r'requests_total{path="/health",status="500"} (.*)', service.client.get("/metrics").text)
        return float(found[1]) if found else 0.0

    before = count()
    with monkeypatch.context() as patch, caplog.at_level("INFO", logger="las_fast.serve"):
        patch.setattr(app, "has_pyav", raising(KeyError("the bug")))
        response = httpx.get(f"{service.url}/health")  # uvicorn closes the connection afterwards
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert count() == before + 1 and "GET /health 500" in logged(caplog)


def test_the_attention_of_a_segment_is_a_matrix_of_bytes(service, wav):
    row = service.post("/attention", file=wav(), text="A B").json()
    assert row["text"] == "A B" and row["frame_seconds"] == pytest.approx(0.02)
    assert len(base64.b64decode(row["weights"])) == 4 * row["frames"]  # with <eos>


def test_the_attention_starts_at_its_first_frame(service, wav):
    silence = encoded(np.concatenate([np.zeros(40000, np.float32), make_speech(1.0)]), format="WAV")
    row = service.post("/attention", file=silence, text="A").json()
    assert row["start"] == pytest.approx(2.0, abs=0.1)  # half a second of silence is kept before the speech
    assert row["start"] + row["frames"] * row["frame_seconds"] == pytest.approx(3.5, abs=0.1)


def test_a_wrong_text_or_recording_for_the_attention_is_refused(service, wav):
    texts = {"é": "the text has 'é'; the model writes", "": "1 to 1000 characters; got 0", "A" * 1001: "got 1001"}
    for text, message in texts.items():
        status, error = service.error(path="/attention", file=wav(), text=text)
        assert (status, error["param"]) == (400, "text") and message in error["message"]
    for file, message in ((wav(31), "longer than 30 seconds"), (encoded([0.0] * 16000, format="WAV"), "no speech")):
        status, error = service.error(path="/attention", file=file, text="A")
        assert (status, error["param"]) == (400, "file") and message in error["message"]


def test_a_refused_recording_of_the_attention_leaves_nothing_in_the_log(service, caplog):
    with caplog.at_level("ERROR", logger="asyncio"):
        assert service.error(path="/attention", file=b"not audio", text="A")[0] == 400
        wait_until(lambda: service.service.in_progress == 0)
        gc.collect()
    assert caplog.text == ""


def test_the_service_finds_speech_by_the_chosen_way(model, service):
    music = encoded(make_music(3), format="WAV")
    with running(model, vad="silero") as other:
        assert service.post(file=music).json()["text"] and other.post(file=music).json()["text"] == ""
        assert service.post("/attention", file=music, text="A").status_code == 200
        assert other.error(path="/attention", file=music, text="A")[1]["message"].startswith("the file has no speech")


def test_the_page_may_load_nothing_from_elsewhere(service):
    response = service.client.get("/")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    assert response.headers["content-security-policy"].startswith("default-src 'self'")
    for path in app.PAGE_FILES:
        text = service.client.get(path).text.replace("http://www.w3.org/2000/svg", "")
        assert text and "http://" not in text and "https://" not in text


def test_bad_input_a_full_disk_and_full_memory_have_their_own_statuses():
    assert app._reported(InputError("x")).status == 400
    disk = app._reported(OSError(28, "No space left on device"))
    assert (disk.status, disk.code) == (500, "storage")
    assert app._reported(MemoryError()).status == 503
