"""The examples in las_fast/serve/README.md work against a running service."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from recordings import encoded
from tiny_corpora import make_speech

import las_fast.serve
from las_fast.serve import app, openai
from las_fast.serve.limits import MEGABYTE, Limits

PAGE = (Path(las_fast.serve.__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def talk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("talk.flac").write_bytes(encoded(make_speech(0.8), format="FLAC"))


def block(language, service):
    return re.search(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1].replace(
        "http://127.0.0.1:8000", service.url
    )


def test_the_python_example_prints_the_words(service, talk, capsys):
    exec(block("python", service), {})
    printed = re.findall(r"^ *[\d.]+ s  (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert printed and " ".join(printed) == service.service.model.transcribe("talk.flac").text


def test_the_curl_example_prints_subtitles(service, talk):
    _, url, *argv = shlex.split(block("bash", service))
    form = dict(argument.split("=", 1) for argument in argv if argument != "-F")
    assert form.pop("file") == "@talk.flac"
    response = service.client.post(url, data=form, files={"file": Path("talk.flac").read_bytes()})
    assert response.status_code == 200 and response.text.startswith("1\n00:00:00,")


def test_the_page_lists_every_address_format_limit_and_code(service):
    for route in service.service.application().routes:
        if route.path not in app.PAGE_FILES:
            assert route.path.replace("{name:path}", "NAME") in PAGE
    assert all(f"`{name}`" in PAGE for name in (*openai.FORMATS, *openai.GRANULARITIES, *openai.ALIASES))
    source = "".join(path.read_text() for path in Path(app.__file__).parent.glob("*.py"))
    codes = set(re.findall(r'code="(\w+)"', source))
    assert len(codes) > 8 and [code for code in codes if f"`{code}`" not in PAGE] == []
    plain = Limits()
    for option, value in {"max-seconds": plain.max_seconds, "timeout": plain.timeout, "queue": plain.queue,
                          "max-megabytes": plain.max_bytes / MEGABYTE}.items():  # fmt: skip
        assert re.search(rf"--{option}`[^|]*\({value:g}\b|`--{option}` requests \({value:g}\)", PAGE), option
    assert len(fields(Limits)) == 4
