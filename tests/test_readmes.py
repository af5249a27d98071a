"""The READMEs are correct: commands parse, files and links exist, and quoted output matches the programs."""

import argparse
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile

from las_fast import __version__, cli, config, decode, demo, export, options, train, transcribe
from las_fast.config import Config, load_config
from las_fast.tree import to_tree

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    page
    for pattern in ("*.md", "benchmarks/*.md", "las_fast/*/*.md", "tests/*/*.md")
    for page in ROOT.glob(pattern)
    if page.name != "CHANGELOG.md"  # mentions past versions
)
LINES = 200
TALK = ("4446-2275-0030", "4446-2275-0031", "4446-2275-0032")  # README's talk.flac: these, with pauses between
PAUSE = 1.5  # seconds
RUNNERS = ("python", ".venv/bin/python", "make", "bash", "las-fast")  # first words of commands that are checked
OTHERS = ("pip", "source", "podman", "npm", "tar", "cat", "git")  # first words of commands that are not checked


def name(page):
    return str(page.relative_to(ROOT))


def fences(text, *languages):
    """Contents of the fenced blocks in these languages."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for language, content in blocks if language in languages]


def commands(page):
    """The argv of each command on a page: in fences, in indented blocks, and in code spans."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in fences(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += [line for block in fences(text, "") for line in block.splitlines() if line.startswith(RUNNERS)]
    lines += [line[2:] for block in fences(text, "console") for line in block.splitlines() if line.startswith("$ ")]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"^ {4}(python -m .*)$", prose, re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    lines += [span for span in spans if len(span.split()) > 1 and span.split()[0] in (*RUNNERS, "PYTHONPATH=tests")]
    return [argv for line in lines if (argv := shlex.split(line, comments=True))]


COMMANDS = [(name(page), argv) for page in PAGES for argv in commands(page)]


class CommandParsed(Exception):
    """Raised once a command has parsed its options, before it does any work."""


@pytest.fixture
def stop_after_parsing(monkeypatch):
    """Make every parser raise CommandParsed after it has parsed valid options."""
    original = argparse.ArgumentParser.parse_known_args

    def parse(self, *arguments, **named):
        actual, rest = original(self, *arguments, **named)
        if rest:
            self.error(f"unknown: {rest}")
        raise CommandParsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)


def source_of(module):
    """The file of a module that python -m runs; modules of tests/gpu_proof need PYTHONPATH=tests."""
    parts = module.split(".")
    base = ROOT / "tests" if parts[0] == "gpu_proof" else ROOT
    actual = [base.joinpath(*parts).with_suffix(".py"), base.joinpath(*parts, "__main__.py")]
    return next((path for path in actual if path.is_file()), None)


def parse_settings(module, argv):
    """Parse a command that also takes settings."""
    if module == "las_fast.train":
        return train.parse(["tiny" if word in ("runs/mine/config.yaml", "PRESET") else word for word in argv])
    command = {"las_fast.decode": decode, "las_fast.export": export}[module]
    return options.parse_settings(
        command.parser(), argv, lambda _: config.DecodingSettings(), kind=config.DecodingSettings
    )


def check_pytest(argv):
    """Assert that the files of a pytest command exist, and that its options are -k or those of the benchmarks."""
    known = re.findall(r'addoption\(\s*"(--\w+)"', (ROOT / "benchmarks" / "conftest.py").read_text())
    argv = re.sub(r" -k \S+", "", " ".join(["", *argv])).split()
    for word in argv:
        assert word in known if word.startswith("-") else (ROOT / word.partition("::")[0]).exists(), word


@pytest.mark.parametrize(("page", "argv"), COMMANDS, ids=lambda value: value if isinstance(value, str) else None)
def test_every_command_of_every_readme_parses(page, argv, request):
    if argv[0] == "PYTHONPATH=tests":
        argv = argv[1:]
        assert argv[2].startswith("gpu_proof")
    assert argv[0] in RUNNERS + OTHERS, argv
    if argv[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert argv[1] in targets and len(argv) == 2
    elif argv[0] == "bash" or (argv[0].endswith("python") and argv[1] != "-m"):
        assert (ROOT / argv[1]).is_file(), argv
    elif argv[0].endswith("python"):
        check_module(argv[2], argv[3:], request)
    elif argv[0] == "las-fast":
        check_las_fast(argv[1:], request)


def check_las_fast(argv, request):
    """Assert that the command exists, and that its options parse; without options, it is only a name in a sentence."""
    module, _ = cli.COMMANDS[argv[0]]
    if argv[1:]:
        check_module(module.removesuffix(".__main__"), argv[1:], request)


def test_a_wrong_command_of_las_fast_is_noticed(request):
    for right in (["transcribe"], ["transcribe", "a.wav"], ["serve", "--port", "8001"]):
        check_las_fast(right, request)
    for wrong in (["transcrib"], ["transcribe", "--bem", "3"], ["serve", "--port", "x"]):
        with pytest.raises((KeyError, SystemExit)):
            check_las_fast(wrong, request)


def check_module(module, argv, request):
    if module == "pytest":
        return check_pytest(argv)
    if module == "las_fast" and argv == ["--version"]:
        return None
    source = source_of(module)
    assert source, f"there is no module {module}"
    if module in ("las_fast.train", "las_fast.decode", "las_fast.export"):
        return parse_settings(module, argv)
    if not re.search(r"\bParser\(|ArgumentParser\(", source.read_text()):
        assert not argv, f"{module} has no options"
        return None
    request.getfixturevalue("stop_after_parsing")
    entry = module if source.name != "__main__.py" else f"{module}.__main__"
    with pytest.raises(CommandParsed):
        importlib.import_module(entry).main(argv)


def test_commands_of_every_kind_are_found():
    texts = {" ".join(argv) for _, argv in COMMANDS}
    for beginning in ("python -m las_fast.train", "python -m las_fast.decode", "python -m las_fast.transcribe",
                      "python -m las_fast.tune", "python -m las_fast.lm", "python -m las_fast.export", "make bench",
                      ".venv/bin/python -m pytest benchmarks/", ".venv/bin/python -m pytest tests/gpu_proof/",
                      "PYTHONPATH=tests .venv/bin/python -m gpu_proof.roofline", "bash .ci/run"):  # fmt: skip
        assert any(text.startswith(beginning) for text in texts), beginning
    # a command on two lines
    assert any(text.endswith("--resume --training.epochs 90 --training.restarts 60") for text in texts)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_that_a_readme_names_exist(page):
    fields = list(options.field_names(to_tree(Config())))
    known = {*fields, *(".".join(field.split(".")[:2]) for field in fields)}  # settings that are lists of stages
    sections = "|".join(to_tree(Config()))
    actual = re.findall(rf"`(?:--)?((?:{sections})\.[a-z][a-z_-]*)[` ]", page.read_text(encoding="utf-8"))
    assert [setting for setting in actual if setting.replace("_", "-") not in known] == []


@cache
def anchors(page):
    return anchors_of(page.read_text(encoding="utf-8"))


def anchors_of(text):
    """The anchors of Markdown on GitHub: its headings in lower case, with hyphens."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_have_existing_targets(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists() and there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


def section(page, anchor):
    """The part of a Markdown file below the heading with this anchor; all of it without an anchor."""
    parts = re.split(r"^(#+ .*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if not anchor:
        return "".join(parts)
    (heading,) = (i for i in range(1, len(parts), 2) if anchors_of(parts[i]) == {anchor})
    return parts[heading + 1]


def test_every_linked_number_in_the_readme_is_in_the_linked_section():
    linked = re.findall(r"\[([^\]]*\d[^\]]*)\]\(([^)\s#]+\.md)(?:#([^)]*))?\)", README)
    linked = [(text, target, anchor) for text, target, anchor in linked if not text.startswith("`")]
    assert len(linked) >= 6
    for text, target, anchor in linked:
        lines = section(ROOT / target, anchor)
        assert all(re.search(rf"(?<![\d.]){re.escape(n)}(?!\d)", lines) for n in re.findall(r"[\d.]*\d", text)), text


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_readme_names_exist(page):
    spans = re.findall(r"`((?:las_fast|benchmarks|tests|csrc|kernels|\.ci)/[\w./-]*)`", page.read_text("utf-8"))
    spans = [span for span in spans if not re.search("NAME|LAYOUT", span)]  # glob patterns
    missing = [span for span in spans if not (ROOT / span).exists()]
    assert missing == []


def test_every_folder_readme_starts_with_its_question():
    for page in PAGES:
        if page.name == "README.md" and page.parent != ROOT:
            assert re.match(r"# .*\?\n\n", page.read_text("utf-8")), page


def test_every_page_is_reachable_from_the_readme():
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)\s]+)\)", README)}
    assert {page for page in PAGES if page.parent != ROOT} <= linked


def test_the_readme_is_short_and_of_this_version():
    assert len(README.splitlines()) <= LINES
    assert re.findall(r"# las_fast (\S+)", README) == [__version__]


def test_the_readmes_presets_and_sizes_are_correct():
    from las_fast.model.las import LAS
    from las_fast.text import Vocabulary

    config = load_config("english")
    model = LAS(config.model, input_size=config.features.input_size, vocabulary_size=len(Vocabulary()))
    million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert f"english, {million:.1f} M parameters" in README
    assert model.time_reduction == 4 and "(B, T/4, 512)" in README
    assert f"(B, K, {len(Vocabulary())})" in README


def test_every_op_is_in_the_readmes_table():
    from las_fast.ops.backends import IMPLEMENTED

    rows = dict(re.findall(r"^\| `(\w+)`: (.*)$", README, re.MULTILINE))
    assert list(rows) == list(IMPLEMENTED)
    for op, kinds in IMPLEMENTED.items():
        assert (f"kernels/{op}.py" in rows[op]) == ("triton" in kinds)
        assert (f"csrc/{op}.cpp" in rows[op]) == ("cpp" in kinds)


@pytest.fixture
def talk(shared, tmp_path, monkeypatch):
    """Make the README's talk.flac in an empty folder, and change to that folder."""
    folder = shared / "speech" / "audio" / "librispeech-test-clean" / "4446"
    sounds = [soundfile.read(folder / f"{one}.ogg", dtype="float32")[0] for one in TALK]
    pause = np.zeros(int(PAUSE * 16000), np.float32)
    monkeypatch.chdir(tmp_path)
    soundfile.write("talk.flac", np.concatenate([sounds[0], pause, sounds[1], pause, sounds[2]]), 16000)


def test_transcribe_prints_the_transcript_in_the_readme(talk, capsys):
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
def test_python_examples_print_the_quoted_output(page, python, printed, talk, shared, capsys):
    recording = re.search(r"transcribe\(\"(.*?)\"", python)[1]
    if recording != "talk.flac":
        (actual,) = (shared / "speech" / "audio").rglob(recording)
        Path(recording).write_bytes(actual.read_bytes())
    names = {}
    exec(python, names)
    assert capsys.readouterr().out == printed
    if page == "README.md":
        printed_lines = fences(README, "console")[0].splitlines()[1:]
        assert names["result"].text == " ".join(printed_lines)


def test_python_examples_are_found():
    assert [page for page, *_ in EXAMPLES] == ["README.md", "las_fast/search/README.md"]


def test_the_readme_quotes_the_end_of_the_demo(capsys):
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
