"""The command: wrong options and missing packages are one sentence, and a signal lets running requests finish."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from tiny_checkpoints import make_checkpoint

from las_fast.errors import InputError
from las_fast.serve import __main__ as serve
from las_fast.serve.limits import Limits
from serve.services import stalled_upload


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--queue", "0"], r"--queue must be a number above 0 and at most 1e\+09; got 0"),
        (["--timeout", "-1"], r"--timeout must be a number above 0 and at most 1e\+09; got -1"),
        (["--max-seconds", "inf"], r"--max-seconds must be a number above 0 and at most 1e\+09; got inf"),
        (["--max-megabytes", "nan"], r"--max-megabytes must be a number above 0 and at most 1e\+09; got nan"),
        (["--max-megabytes", "1e303"], r"--max-megabytes must be a number above 0 and at most 1e\+09; got 1e\+303"),
        (["--min-speech-score", "nan"], "--min-speech-score must be a number; got nan"),
        (["--nbest", "1", "--min-speech-score", "nan"], "--min-speech-score must be a number; got nan"),
        (["--nbest", "0"], "--nbest must be at least 1; got 0"),
        (["--beam", "0"], "--beam must be from 1 to 1000; got 0"),
        (["--beam-threshold", "-1"], "--beam-threshold must be a finite number of at least 0; got -1"),
        (["--beam-threshold", "inf"], "--beam-threshold must be a finite number of at least 0; got inf"),
        (["--batch-seconds", "nan"], "--batch-seconds must be 0 or more; got nan"),
        (["--port", "99999"], "--port must be from 0 to 65535; got 99999"),
        (["--host", "256.0.0.1", "--port", "0"], r"--host 256.0.0.1 --port 0 cannot be used \(.*\); give another"),
    ],
)
def test_a_wrong_option_is_one_sentence(argv, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        serve.main(argv)


def test_a_port_that_is_taken_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(InputError, match=f"--port {port} cannot be used"):
            serve.main(["--port", port])


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match="serve needs the package uvicorn; run: pip install starlette uvicorn"):
        serve.main(["--port", "0"])


@pytest.mark.parametrize(
    ("host", "url", "is_open"),
    [
        ("127.0.0.1", "http://127.0.0.1:80", False),
        ("::1", "http://[::1]:80", False),
        ("0.0.0.0", "http://0.0.0.0:80", True),
    ],
)
def test_the_address_is_printed_with_a_warning_if_other_machines_reach_it(capsys, host, url, is_open):
    serve.announce("tiny", host, 80)
    printed = capsys.readouterr()
    assert printed.out == f"tiny on {url}; Ctrl-C stops\n"
    assert printed.err.startswith("warning: every machine") if is_open else not printed.err


def test_stopping_waits_no_longer_than_a_request_can_take(monkeypatch):
    configs = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: configs.append(server.config))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serve.serve(SimpleNamespace(application=Starlette, name="tiny", limits=Limits(timeout=30.5)), listener)
    assert configs[0].timeout_graceful_shutdown == 51


def test_a_wide_nbest_needs_a_wide_beam(tmp_path):
    argv = ["--port", "0", "--checkpoint", str(make_checkpoint(tmp_path, 20, mel_bins=23)), "--beam", "2"]
    with pytest.raises(InputError, match="^--nbest 3 needs a beam of at least 3; give --beam 3$"):
        serve.main([*argv, "--nbest", "3"])


@pytest.mark.parametrize("option", ["--speeds", "--warps"])
def test_views_reach_the_search(tmp_path, monkeypatch, option):
    class Asked(Exception):
        pass

    def batcher(model, **options):
        raise Asked(options)

    monkeypatch.setattr("las_fast.serve.batcher.Batcher", batcher)
    argv = ["--port", "0", "--checkpoint", str(make_checkpoint(tmp_path, 20, mel_bins=23)), "--device", "cpu"]
    with pytest.raises(Asked) as asked:
        serve.main([*argv, option, "1", "0.75", "--beam", "3", "--view-threshold", "0.4"])
    (options,) = asked.value.args
    assert options[option[2:]] == [1.0, 0.75] and (options["beam"], options["view_threshold"]) == (3, 0.4)
    with pytest.raises(InputError, match=f"^{option} must be at least 0.5; got 0.4$"):
        serve.main(["--checkpoint", "gone", option, "1", "0.4"])
    with pytest.raises(InputError, match="^--view-threshold must be at least 0; got -1$"):
        serve.main(["--checkpoint", "gone", "--view-threshold", "-1"])


@pytest.mark.parametrize("name", ["best.safetensors", "averaged.safetensors"])
def test_a_model_in_a_run_folder_has_the_name_of_the_folder(tmp_path, monkeypatch, name):
    folder = tmp_path / "mine"
    folder.mkdir()
    make_checkpoint(tmp_path, 20, mel_bins=23).rename(folder / name)
    monkeypatch.chdir(folder)
    for checkpoint in (str(folder), ".", name):
        options = serve.parser().parse_args(["--checkpoint", checkpoint, "--device", "cpu"])
        assert serve.open_model(options)[1] == "mine"


@contextlib.contextmanager
def started(tmp_path, *options):
    """Run the command with an untrained model; yield the process and its address."""
    checkpoint = make_checkpoint(tmp_path, 20, mel_bins=23)
    argv = ["serve", "--port", "0", "--checkpoint", str(checkpoint), "--device", "cpu", *options]
    command = [sys.executable, "-m", "las_fast", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) as process:
        try:
            first = process.stdout.readline()
            yield process, re.fullmatch(r"untrained-20 on (http://127\.0\.0\.1:\d+); Ctrl-C stops\n", first)[1]
        finally:
            process.kill()


def wait_for_a_request(url):
    while not httpx.get(f"{url}/health").json()["in_progress"]:
        time.sleep(0.01)


def test_sigterm_finishes_the_running_request_then_exits_with_0(tmp_path, wav):
    with started(tmp_path) as (process, url):
        answers = []
        file = {"file": wav(60)}
        request = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/audio/transcriptions", files=file, timeout=60))
        )
        request.start()
        wait_for_a_request(url)
        process.send_signal(signal.SIGTERM)
        request.join()
        assert answers[0].status_code == 200 and answers[0].json()["text"]
        out, err = process.communicate(timeout=20)
        assert out == "stopped\n" and process.returncode == 0
        time_, lines = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4}", err.splitlines()
        assert all(re.fullmatch(rf"{time_} GET /health 200 in \d+\.\d\d s", line) for line in lines[:-1])
        last = rf"{time_} POST /v1/audio/transcriptions 200, 60\.0 s of audio in \d+\.\d\d s"
        assert len(lines) > 1 and re.fullmatch(last, lines[-1])


def test_a_second_signal_stops_at_once_without_a_traceback(tmp_path):
    with started(tmp_path, "--quiet") as (process, url):  # which leaves standard error to errors
        with stalled_upload(httpx.URL(url).port):
            wait_for_a_request(url)
            process.send_signal(signal.SIGHUP)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=20) == ("", "interrupted\n")
        assert process.returncode == 128 + signal.SIGTERM
