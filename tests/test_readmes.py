"""The READMEs are true: commands parse, files and links exist, printed output is what the program prints."""

import argparse
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile

from las_fast import __version__, config, decode, demo, export, options, train, transcribe
from las_fast.config import Config, load_config, to_tree

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    page
    for pattern in ("*.md", "benchmarks/*.md", "las_fast/*/*.md", "tests/*/*.md")
    for page in ROOT.glob(pattern)
    if page.name != "CHANGELOG.md"  # which speaks of past versions
)
LINES = 200
TALK = ("4446-2275-0030", "4446-2275-0031", "4446-2275-0032")  # what README calls talk.flac: these, with pauses
PAUSE = 1.5  # seconds
RUNNERS = ("python", ".venv/bin/python", "make", "bash", "las-fast")  # the first word of a command that is checked
OTHERS = ("pip", "source")  # and of those that are not


def name(page):
    return str(page.relative_to(ROOT))


def fences(text, *languages):
    """Return the contents of the fenced blocks in these languages."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for language, content in blocks if language in languages]


def commands(page):
    """Return the words of each command of a page: in fences, indented by four, and in code spans."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in fences(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += [line for block in fences(text, "") for line in block.splitlines() if line.startswith(RUNNERS)]
    lines += [line[2:] for block in fences(text, "console") for line in block.splitlines() if line.startswith("$ ")]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"^ {4}(python -m .*)$", prose, re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    lines += [span for span in spans if len(span.split()) > 1 and span.split()[0] in (*RUNNERS, "PYTHONPATH=tests")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [(name(page), words) for page in PAGES for words in commands(page)]


class Parsed(Exception):
    """A command has understood its options and would begin its work."""


@pytest.fixture
def stops_when_parsed(monkeypatch):
    """Have every parser that is asked for a command's own options end the command when they are right."""
    original = argparse.ArgumentParser.parse_known_args

    def parse(self, *arguments, **named):
        found, rest = original(self, *arguments, **named)
        if rest:
            self.error(f"unknown: {rest}")
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)


def source_of(module):
    """Return the file of a module that python -m runs; modules of tests/gpu_proof want PYTHONPATH=tests."""
    parts = module.split(".")
    base = ROOT / "tests" if parts[0] == "gpu_proof" else ROOT
    found = [base.joinpath(*parts).with_suffix(".py"), base.joinpath(*parts, "__main__.py")]
    return next((path for path in found if path.is_file()), None)


def parse_settings(module, words):
    """Parse a command that also takes settings."""
    if module == "las_fast.train":
        return train.parse([word.replace("runs/mine/config.yaml", "tiny") for word in words])
    command = {"las_fast.decode": decode, "las_fast.export": export}[module]
    return options.parse_settings(
        command.parser(), words, lambda _: config.DecodingSettings(), kind=config.DecodingSettings
    )


def check_pytest(words):
    """Assert that pytest would find the files, and that its options are those of the benchmarks, or -k."""
    known = re.findall(r'addoption\("(--\w+)"', (ROOT / "benchmarks" / "conftest.py").read_text())
    words = re.sub(r" -k \S+", "", " ".join(["", *words])).split()
    for word in words:
        assert word in known if word.startswith("-") else (ROOT / word.partition("::")[0]).exists(), word


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else None)
def test_every_command_of_every_readme_parses(page, words, request):
    if words[0] == "PYTHONPATH=tests":
        words = words[1:]
        assert words[2].startswith("gpu_proof")
    assert words[0] in RUNNERS + OTHERS, words
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets and len(words) == 2
    elif words[0] == "bash" or (words[0].endswith("python") and words[1] != "-m"):
        assert (ROOT / words[1]).is_file(), words
    elif words[0].endswith("python"):
        check_module(words[2], words[3:], request)


def check_module(module, words, request):
    if module == "pytest":
        return check_pytest(words)
    if module == "las_fast" and words == ["--version"]:
        return None
    source = source_of(module)
    assert source, f"there is no module {module}"
    if module in ("las_fast.train", "las_fast.decode", "las_fast.export"):
        return parse_settings(module, words)
    if not re.search(r"\bParser\(|ArgumentParser\(", source.read_text()):
        assert not words, f"{module} has no options"
        return None
    request.getfixturevalue("stops_when_parsed")
    entry = module if source.name != "__main__.py" else f"{module}.__main__"
    with pytest.raises(Parsed):
        importlib.import_module(entry).main(words)


def test_commands_of_every_kind_are_found():
    texts = {" ".join(words) for _, words in COMMANDS}
    for beginning in ("python -m las_fast.train", "python -m las_fast.decode", "python -m las_fast.transcribe",
                      "python -m las_fast.tune", "python -m las_fast.lm", "python -m las_fast.export", "make bench",
                      ".venv/bin/python -m pytest benchmarks/", ".venv/bin/python -m pytest tests/gpu_proof/",
                      "PYTHONPATH=tests .venv/bin/python -m gpu_proof.roofline", "bash .ci/run"):  # fmt: skip
        assert any(text.startswith(beginning) for text in texts), beginning
    assert any(text.endswith("--resume --training.epochs 90 --training.restarts 60") for text in texts)  # of two lines


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_that_a_readme_names_exist(page):
    fields = list(options.field_names(to_tree(Config())))
    known = {*fields, *(".".join(field.split(".")[:2]) for field in fields)}  # a list of stages has a name, too
    sections = "|".join(to_tree(Config()))
    found = re.findall(rf"`(?:--)?((?:{sections})\.[a-z][a-z_-]*)[` ]", page.read_text(encoding="utf-8"))
    assert [setting for setting in found if setting.replace("_", "-") not in known] == []


@cache
def anchors(page):
    """Return the anchors that a web page of a Markdown file has: its headings in lower case, with hyphens."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists() and there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


def test_every_number_that_the_readme_links_stands_in_the_page_behind_the_link():
    linked = re.findall(r"\[([^\]]*\d[^\]]*)\]\(([^)\s#]+\.md)(?:#[^)]*)?\)", README)
    linked = [(text, target) for text, target in linked if not text.startswith("`")]
    assert len(linked) >= 6
    for text, target in linked:
        page = (ROOT / target).read_text(encoding="utf-8")
        assert all(re.search(rf"(?<![\d.]){re.escape(n)}(?!\d)", page) for n in re.findall(r"[\d.]*\d", text)), text


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_readme_names_exist(page):
    spans = re.findall(r"`((?:las_fast|benchmarks|tests|csrc|kernels|\.ci)/[\w./-]*)`", page.read_text("utf-8"))
    spans = [span for span in spans if not re.search("NAME|LAYOUT", span)]  # which stand for any
    missing = [span for span in spans if not (ROOT / span).exists()]
    assert missing == []


def test_every_folder_readme_opens_with_its_question():
    for page in PAGES:
        if page.name == "README.md" and page.parent != ROOT:
            assert re.match(r"# .*\?\n\n", page.read_text("utf-8")), page


def test_the_readme_leads_to_every_page():
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)\s]+)\)", README)}
    assert {page for page in PAGES if page.parent != ROOT} <= linked


def test_the_readme_is_short_and_of_this_version():
    assert len(README.splitlines()) <= LINES
    assert re.findall(r"las_fast (\d+\.\d+\.\d+)", README) == [__version__]


def test_presets_and_sizes_are_those_of_the_readme():
    from las_fast.model.las import LAS
    from las_fast.text import Vocabulary

    config = load_config("speech13h")
    model = LAS(config.model, input_size=config.features.input_size, vocabulary_size=len(Vocabulary()))
    million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert f"`speech13h`, {million:.1f} M parameters" in README
    assert model.time_reduction == 4 and "(B, T/4, 512)" in README
    assert f"(B, K, {len(Vocabulary())})" in README


def test_every_op_stands_in_the_readmes_table():
    from las_fast.ops.backends import IMPLEMENTED

    rows = dict(re.findall(r"^\| `(\w+)`: (.*)$", README, re.MULTILINE))
    assert list(rows) == list(IMPLEMENTED)
    for op, kinds in IMPLEMENTED.items():
        assert (f"kernels/{op}.py" in rows[op]) == ("triton" in kinds)
        assert (f"csrc/{op}.cpp" in rows[op]) == ("cpp" in kinds)


@pytest.fixture
def talk(shared, tmp_path, monkeypatch):
    """Make talk.flac of the README in an empty folder, and go there."""
    folder = shared / "speech" / "audio" / "librispeech-test-clean" / "4446"
    sounds = [soundfile.read(folder / f"{one}.ogg", dtype="float32")[0] for one in TALK]
    pause = np.zeros(int(PAUSE * 16000), np.float32)
    monkeypatch.chdir(tmp_path)
    soundfile.write("talk.flac", np.concatenate([sounds[0], pause, sounds[1], pause, sounds[2]]), 16000)


def test_the_transcript_in_the_readme_is_what_transcribe_prints(talk, capsys):
    (block,) = [block for block in fences(README, "console") if "las_fast.transcribe" in block]
    command, _, printed = block.partition("\n")
    transcribe.main(shlex.split(command)[4:])
    assert capsys.readouterr().out.strip() == printed.strip()


EXAMPLES = [
    (name(page), *example)
    for page in PAGES
    for example in re.findall(
        r"^```python\n(.*?)```\n\n```text\n(.*?)```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
]


@pytest.mark.parametrize(("page", "python", "printed"), EXAMPLES, ids=[page for page, *_ in EXAMPLES])
def test_python_prints_what_stands_below_it(page, python, printed, talk, shared, capsys):
    recording = re.search(r"transcribe\(\"(.*?)\"", python)[1]
    if recording != "talk.flac":
        (found,) = (shared / "speech" / "audio").rglob(recording)
        Path(recording).write_bytes(found.read_bytes())
    names = {}
    exec(python, names)
    assert capsys.readouterr().out == printed
    if page == "README.md":
        assert f"{names['result'].text}\n" in fences(README, "console")[0]


def test_python_examples_are_found():
    assert [page for page, *_ in EXAMPLES] == ["README.md", "las_fast/search/README.md"]


def test_the_readmes_demo_ends_as_the_demo_does(capsys):
    (block,) = [block for block in fences(README, "console") if "make demo" in block]
    printed = block.partition("\n")[2]
    numbers = r"test-clean, (\d+) .*CER ([\d.]+)%, WER ([\d.]+)%, LD ([\d.]+); decoded (\d+) times"
    utterances, *scores = re.search(numbers, printed).groups()
    result = {"utterances": int(utterances), **dict(zip(("cer", "wer", "ld", "rtfx"), map(float, scores), strict=True))}
    rows = re.findall(r"^(\S+)  reference   (.*)\n +hypothesis  (.*)$", printed, re.MULTILINE)
    assert rows
    demo.show(Path("runs/demo"), result, rows)
    shown = capsys.readouterr().out
    assert all(line in shown for line in printed.splitlines() if line != "...")
