"""Mutants, verdicts, the Target protocol of a language, and the recorded reasons of survivors."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import yaml

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "mutants"
JUDGED = [Path(__file__).with_name(name) for name in ("judged.yaml", "judged_native.yaml")]

# noticed: a test failed. slow: a test ran into its time limit, which counts as noticed. survived: all tests passed.
# not run: no test executes the line. invalid: the edit does not compile and is not counted.
Outcome = Literal["noticed", "slow", "survived", "not run", "invalid"]


@dataclass(frozen=True)
class Mutant:
    """One edit of one file: the text from `start` to `end` is replaced by `after`."""

    file: str  # relative to the root of the repository
    line: int  # of the edit, counted from 1
    function: str  # qualified name of the function or class around it; "" at the top of the file
    rule: str  # e.g. "comparison"
    before: str  # the text replaced
    after: str  # the text in its place
    start: int  # offset of `before` in the file, in characters
    nth: int = 0  # number among mutants that agree in file, function, rule, before and after

    @property
    def key(self) -> tuple[str, str, str, str, str, int]:
        """Identifies the mutant, independently of its line."""
        return (self.file, self.function, self.rule, self.before, self.after, self.nth)

    @property
    def id(self) -> str:
        return hashlib.sha1(repr(self.key).encode()).hexdigest()[:10]

    @property
    def end(self) -> int:
        return self.start + len(self.before)

    def apply(self, source: str) -> str:
        """The file's text with the fault."""
        if source[self.start : self.end] != self.before:
            raise ValueError(f"{self.file}:{self.line}: the file has changed since the mutant was made")
        return source[: self.start] + self.after + source[self.end :]

    def __str__(self) -> str:
        return f"{self.id} {self.file}:{self.line} {self.rule}: {short(self.before)} -> {short(self.after)}"


@dataclass(frozen=True)
class Verdict:
    outcome: Outcome
    by: str = ""  # the test that detected it
    seconds: float = 0.0  # wall time that judging it took


class Target(Protocol):
    """Makes and judges the mutants of one language or folder.

    Created as Target(budget=SECONDS), the total CPU time for the tests of one mutant.
    """

    name: str  # the folder in the report, e.g. "las_fast"

    def mutants(self, paths: Sequence[Path]) -> list[Mutant]:
        """Every mutant of this target's files in `paths`; other files are ignored."""

    def restrict(self, tests: Sequence[Path]) -> None:
        """Let only the tests in these files and folders judge. Raises SystemExit where that is not possible."""

    def prepare(self, mutants: Sequence[Mutant], jobs: int) -> None:
        """Prepare to judge these, e.g. record coverage or build the library with all faults."""

    def judge(self, mutant: Mutant) -> Verdict:
        """Run the tests that could detect the mutant. Must be thread-safe: called from `jobs` threads."""

    def close(self) -> None:
        """Stop what prepare() started."""


def sources(paths: Sequence[Path], folder: str, pattern: str, root: Path = ROOT) -> list[Path]:
    """The files of root/folder that match pattern and are in one of `paths`."""
    selected = [Path(path).resolve() for path in paths]
    matching = sorted((root / folder).rglob(pattern))
    return [path for path in matching if any(path == p or p in path.parents for p in selected)]


def numbered(mutants: Sequence[Mutant]) -> list[Mutant]:
    """Set `nth` of the mutants, so that all keys differ."""
    seen: dict[tuple, int] = {}
    result = []
    for mutant in mutants:
        nth = seen[mutant.key] = seen.get(mutant.key, -1) + 1
        result.append(dataclasses.replace(mutant, nth=nth))
    return result


def short(text: str, width: int = 60) -> str:
    """Text on one line, with the middle elided if it is longer than `width`."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width // 2 - 2]} ... {text[-width // 2 + 3 :]}"


def judged(*paths: Path) -> dict[tuple, str]:
    """Return {(file, function, before, after): reason} of survivors that were reviewed and are harmless.

    A file (default: JUDGED) is a list of mappings with these five keys. A row without before and after covers the whole
    function. White space in before and after is ignored. The first word of a reason is its kind:
        equivalent  the edit has no observable effect
        GPU         the line runs only on a GPU, where `make gpu-check` must detect the fault
        accepted    the effect is observable, but not worth a test
    """
    texts = [path.read_text(encoding="utf-8") for path in paths or JUDGED if path.exists()]
    rows = [row for text in texts for row in yaml.safe_load(text) or []]
    return {judged_key(r["file"], r["function"], r.get("before", "*"), r.get("after", "*")): r["reason"] for r in rows}


def judged_key(file: str, function: str, before: str, after: str) -> tuple[str, str, str, str]:
    return (file, function, " ".join(before.split()), " ".join(after.split()))


def reason_of(reasons: dict[tuple, str], file: str, function: str, before: str, after: str) -> str:
    """The recorded reason why a survivor is harmless, or ""."""
    exact = reasons.get(judged_key(file, function, before, after))
    return exact or reasons.get(judged_key(file, function, "*", "*"), "")


# folder -> "module:class" of its Target; imported only if one of its files is selected
TARGETS = {
    "las_fast": "tests.mutants.python:PythonTarget",
    "csrc": "tests.mutants.cpp:CppTarget",
    "kernels": "tests.mutants.triton:TritonTarget",
}
