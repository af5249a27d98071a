"""What a mutant is, what is said of it, and what a language must bring to have its mutants judged."""

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

# noticed: a test failed. slow: a test ran into its time limit, which counts as noticed too. survived: all tests passed.
# not run: no test executes the line. invalid: the edit does not compile, so it counts nowhere.
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
    nth: int = 0  # of the mutants that are equal in file, function, rule, before and after

    @property
    def key(self) -> tuple[str, str, str, str, str, int]:
        """What names the mutant, whatever else moves in the file."""
        return (self.file, self.function, self.rule, self.before, self.after, self.nth)

    @property
    def id(self) -> str:
        return hashlib.sha1(repr(self.key).encode()).hexdigest()[:10]

    @property
    def end(self) -> int:
        return self.start + len(self.before)

    def apply(self, source: str) -> str:
        """Return the file's text with the fault in it."""
        if source[self.start : self.end] != self.before:
            raise ValueError(f"{self.file}:{self.line}: the file is not what the mutant was made from")
        return source[: self.start] + self.after + source[self.end :]

    def __str__(self) -> str:
        return f"{self.id} {self.file}:{self.line} {self.rule}: {short(self.before)} -> {short(self.after)}"


@dataclass(frozen=True)
class Verdict:
    outcome: Outcome
    by: str = ""  # the test that noticed it
    seconds: float = 0.0


class Target(Protocol):
    """A language, or a folder, whose mutants are made and judged in one way.

    It is made as Target(budget=SECONDS): about as long as the tests of one mutant may take in all.
    """

    name: str  # the folder in the report, e.g. "las_fast"

    def mutants(self, paths: Sequence[Path]) -> list[Mutant]:
        """Return every mutant of the files and folders in `paths` that this target knows; others are not its own."""

    def prepare(self, mutants: Sequence[Mutant], jobs: int) -> None:
        """Do once what judging these needs, e.g. record coverage or build the library with all faults in it."""

    def judge(self, mutant: Mutant) -> Verdict:
        """Run the tests that could notice the mutant. Called from `jobs` threads at once, so state must be guarded."""

    def close(self) -> None:
        """End what prepare started."""


def sources(paths: Sequence[Path], folder: str, pattern: str, root: Path = ROOT) -> list[Path]:
    """Return the files of root/folder that match pattern and lie in one of `paths`."""
    wanted = [Path(path).resolve() for path in paths]
    found = sorted((root / folder).rglob(pattern))
    return [path for path in found if any(path == p or p in path.parents for p in wanted)]


def numbered(mutants: Sequence[Mutant]) -> list[Mutant]:
    """Return the mutants with `nth` set, so that all keys differ."""
    seen: dict[tuple, int] = {}
    result = []
    for mutant in mutants:
        nth = seen[mutant.key] = seen.get(mutant.key, -1) + 1
        result.append(dataclasses.replace(mutant, nth=nth))
    return result


def short(text: str, most: int = 60) -> str:
    """Return text on one line, cut in the middle where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most // 2 - 2]} ... {text[-most // 2 + 3 :]}"


def judged(*paths: Path) -> dict[tuple, str]:
    """Return {(file, function, before, after): reason} of the survivors that were read and found harmless.

    A file (JUDGED, where no path is given) is a list of mappings with these five keys; a row without before and after
    holds for all of the function. White space in before and after does not count. The first word of a
    reason says what kind it is:
        equivalent  nobody can see the difference
        GPU         the line runs on a GPU alone, and `make gpu-check` must notice it
        accepted    the difference can be seen, and no test is worth it
    """
    texts = [path.read_text(encoding="utf-8") for path in paths or JUDGED if path.exists()]
    rows = [row for text in texts for row in yaml.safe_load(text) or []]
    return {judged_key(r["file"], r["function"], r.get("before", "*"), r.get("after", "*")): r["reason"] for r in rows}


def judged_key(file: str, function: str, before: str, after: str) -> tuple[str, str, str, str]:
    return (file, function, " ".join(before.split()), " ".join(after.split()))


def reason_of(reasons: dict[tuple, str], file: str, function: str, before: str, after: str) -> str:
    """Return why a survivor is harmless, "" where it was not judged."""
    own = reasons.get(judged_key(file, function, before, after))
    return own or reasons.get(judged_key(file, function, "*", "*"), "")


# By folder: the module and class that judge it. Imported only when one of its files is asked for.
TARGETS = {
    "las_fast": "tests.mutants.python:PythonTarget",
    "csrc": "tests.mutants.cpp:CppTarget",
    "kernels": "tests.mutants.triton:TritonTarget",
}
