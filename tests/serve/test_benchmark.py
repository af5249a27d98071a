"""benchmarks.serve notices a wrong text, a wrong status and a file left behind."""

from __future__ import annotations

import io
import os
from types import SimpleNamespace

import pytest

from benchmarks import serve as bench
from las_fast.errors import InputError
from las_fast.serve.limits import MEGABYTE, Limits
from serve.services import running


@pytest.fixture(scope="module")
def files(wav):
    return [wav(0.6), wav(1.0), wav(0.8)]


@pytest.fixture(scope="module")
def texts(model, files):
    return [model.transcribe(io.BytesIO(file)).text for file in files]


@pytest.fixture(scope="module")
def limited(model):
    with running(model, Limits(max_bytes=bench.MAX_MEGABYTES * MEGABYTE)) as one:
        yield one


@pytest.fixture
def service(limited, tmp_path):
    return bench.Service(SimpleNamespace(pid=os.getpid()), limited.url, tmp_path)


def test_a_mixed_load_gets_only_documented_answers(service, files, texts):
    kinds = bench.mixed(24)
    assert set(kinds) == {"good", *bench.KINDS} and kinds.count("good") == 18
    rows = {what: value for _, what, value, _ in bench.stress(service, files, texts, 24, 6)}
    assert rows["requests"] == 24 and rows["wrong answers"] == 0
    assert 0 < rows["median time of a recording"] <= rows["99th percentile"]


def test_batching_is_compared_with_one_at_a_time(service, files, texts, monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "REQUESTS_PER_ROUND", 6)
    values = {what: value for _, what, value, _ in bench.compare(service, service, files, texts, 3)}
    for way in ("a segment at a time", "a request at a time"):
        ratio = values["requests per second, batched"] / values[f"requests per second, {way}"]
        assert values[f"speedup by batching against {way}"] == pytest.approx(ratio)


def test_another_text_is_an_error(service, files, texts):
    with pytest.raises(InputError, match="wrong answers"):
        bench.stress(service, files, ["", *texts[1:]], 12, 3)


def test_a_file_left_behind_is_an_error(service, files, texts):
    (service.folder / "left").write_text("")
    with pytest.raises(InputError, match="1 files left"):
        bench.stress(service, files, texts, 6, 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--requests", "19"], "--requests must be at least 20; got 19"),
        (["--clients", "0"], "--clients must be at least 1; got 0"),
    ],
)
def test_too_small_a_load_is_refused(tmp_path, argv, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        bench.main(["--data", str(tmp_path), *argv])


def test_a_recording_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"not audio")
    with pytest.raises(InputError, match=r"bad.wav cannot be read \(.*\); remove it"):
        bench.recordings(tmp_path, 1)


def test_recordings_are_short(tmp_path, files):
    (tmp_path / "short.wav").write_bytes(files[1])
    (tmp_path / "shorter.wav").write_bytes(files[0])
    assert bench.recordings(tmp_path, 1) == [files[1]]
    with pytest.raises(InputError, match="has 1 recordings of 1 to 5 seconds; this needs 2"):
        bench.recordings(tmp_path, 2)
