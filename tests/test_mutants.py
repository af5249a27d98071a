"""tests.mutants: its edits, its verdicts, and that it leaves the working tree unchanged."""

import ast
import json
import subprocess
import sys
import textwrap
import time

import pytest
import yaml

from tests.mutants import __main__ as command
from tests.mutants import tests_of
from tests.mutants.base import JUDGED, ROOT, Mutant, judged, judged_key, reason_of
from tests.mutants.python import PythonTarget
from tests.mutants.recorder import cpu_seconds
from tests.mutants.rules import python_mutants

TOY = '''
"""A toy: 1 + 1."""
import sys

LIMIT = 10


class Gate:
    """Opens: 3 < 4."""

    def opens(self, age: int = 18) -> bool:
        if age > LIMIT:
            raise ValueError(f"{age + 1} is over {LIMIT - 1}")
        label = f"{age:>3}"
        return age >= 7 and bool(label)


def total(values):
    found = 0
    for value in values:
        found += value
    return max(found, found)


def unused(x):
    return x + 1


if __name__ == "__main__":
    sys.exit(total([1, 2]))
'''


def rules(source):
    """{rule: edited sources} of a source, without brackets around expressions."""
    return {(m.rule, m.before, m.after[1:-1] if m.after[0] == "(" else m.after) for m in python_mutants(source, "x.py")}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a = b < c", ("comparison", "b < c", "b <= c")),
        ("a = b * (c - d)", ("arithmetic", "c - d", "c + d")),
        ("a = b * (c + d)", ("arithmetic", "b * (c + d)", "b / (c + d)")),
        ("a = 7", ("constant", "7", "8")),
        ("a = 7", ("constant", "7", "6")),
        ("a = True", ("constant", "True", "False")),
        ("def f(a=0): g(a)", ("default", "0", "1")),
        ("a = b or c", ("operand", "b or c", "b")),
        ("a = b or c", ("logic", "b or c", "b and c")),
        ("a = not b", ("not", "not b", "b")),
        ("if a: b()", ("condition", "a", "False")),
        ("a = b if c else d", ("condition", "c", "True")),
        ("f(a, b=1)", ("keyword", "f(a, b=1)", "f(a)")),
        ("a.b = c", ("deletion", "a.b = c", "pass")),
        ("f(a)", ("deletion", "f(a)", "pass")),
        ("a = b[c:]", ("slice", "c", "c + 1")),
        ("def f(): return a", ("return", "return a", "return None")),
        ("a = min(b, c)", ("swap", "min(b, c)", "max(b, c)")),
        ("a = f(g(b))", ("unwrap", "f(g(b))", "g(b)")),
        ("a = [b, c]", ("element", "[b, c]", "[c]")),
        ('a = f"{b // 2}s"', ("constant", 'f"{b // 2}s"', "f'{b // 3}s'")),
    ],
)
def test_each_rule_makes_its_edit(source, expected):
    assert expected in rules(source)


def test_edits_without_effect_are_left_out():
    assert {after for rule, _, after in rules("def f(): return False")} == {"True"}
    assert ("return", "return 0", "return None") in rules("def f(): return 0")
    edits = rules("a = np.load(b, allow_pickle=False)")
    assert edits == {("constant", "False", "True")}
    assert ("keyword", "np.load(b, allow_pickle=True)", "np.load(b)") in rules("a = np.load(b, allow_pickle=True)")


def test_texts_messages_annotations_and_main_blocks_are_not_edited():
    source = textwrap.dedent(TOY)
    touched = {source[m.start : m.end] for m in python_mutants(source, "x.py")}
    assert not {'"""A toy: 1 + 1."""', "18 is", "sys.exit(total([1, 2]))", "age + 1", "int"} & touched
    assert {"18", "10", "age > LIMIT", "found += value"} <= touched


def test_every_mutant_differs_compiles_and_has_an_id_that_moves_with_the_text():
    source = textwrap.dedent(TOY)
    mutants = python_mutants(source, "x.py")
    for mutant in mutants:
        assert ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source)), mutant
    below = python_mutants("import os\n\n\n" + source, "x.py")
    assert [m.id for m in below] == [m.id for m in mutants] and len({m.id for m in mutants}) == len(mutants)
    assert below[0].line == mutants[0].line + 3
    with pytest.raises(ValueError, match="the file has changed since the mutant was made"):
        mutants[-1].apply("other")


def test_positions_count_characters_where_the_text_is_not_ascii():
    source = 'a = "é" if b else c\nd = 5 - 2\n'
    assert {m.apply(source).splitlines()[1] for m in python_mutants(source, "x.py") if m.rule == "arithmetic"} == {
        "d = 5 + 2"
    }


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The verdicts on all mutants of a repository with one module and its test."""
    root = tmp_path_factory.mktemp("toy")
    files = {
        "pytest.ini": "[pytest]\npythonpath = .\n",
        "box/__init__.py": "",
        "box/gate.py": textwrap.dedent(TOY).lstrip(),
        "tests/test_gate.py": """
            from box import gate

            def test_a_gate_opens_for_those_of_age():
                assert gate.Gate().opens(age=7) and not gate.Gate().opens(6)

            def test_a_total_is_a_sum():
                assert gate.total([1, 2, 4]) == 7
            """,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))
    target = PythonTarget(root=root, name="box", build=root / "build", imports=())
    before = {path: path.read_bytes() for path in root.rglob("*.*") if "build" not in path.parts}
    mutants = target.mutants([root / "box"])
    try:
        target.prepare(mutants, jobs=1)
        verdicts = {(m.function, m.rule, m.before, m.after): target.judge(m) for m in mutants}
    finally:
        target.close()
    assert all(path.read_bytes() == content for path, content in before.items()), "the tree is never edited"
    return verdicts


def test_a_known_fault_is_detected_by_the_expected_test(toy):
    verdict = toy["Gate.opens", "comparison", "age >= 7", "(age > 7)"]
    assert (verdict.outcome, verdict.by.split("::")[1]) == ("noticed", "test_a_gate_opens_for_those_of_age")
    assert toy["total", "arithmetic", "found += value", "found -= value"].outcome == "noticed"


def test_a_constant_is_judged_by_a_fresh_import(toy):
    assert toy["", "constant", "10", "11"].outcome == "survived"
    assert toy["Gate.opens", "default", "18", "19"].outcome == "survived"
    assert toy["total", "constant", "0", "1"].outcome == "noticed"


def test_an_equivalent_mutant_survives_and_an_unexecuted_line_is_not_run(toy):
    assert toy["total", "swap", "max(found, found)", "min(found, found)"].outcome == "survived"
    assert toy["unused", "arithmetic", "x + 1", "x - 1"].outcome == "not run"


BURN = "import time\nwhile time.process_time() < 0.3: pass"


def test_cpu_seconds_count_child_processes_and_leave_out_waiting():
    began = cpu_seconds()
    time.sleep(0.5)
    assert cpu_seconds() - began < 0.2
    subprocess.run([sys.executable, "-c", BURN], check=True)
    assert 0.3 <= cpu_seconds() - began < 2


def test_a_record_holds_the_cpu_seconds_of_tests_and_of_their_shared_fixtures(tmp_path):
    files = {
        "box/__init__.py": "",
        "tests/test_box.py": f"""
            import subprocess, sys, time
            import pytest

            def burn():
                subprocess.run([sys.executable, "-c", {BURN!r}], check=True)

            @pytest.fixture(scope="module")
            def slow():
                burn()

            def test_waits(): time.sleep(0.5)
            def test_burns(): burn()
            def test_shares(slow): pass
            """,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    tests = tests_of.Tests(tmp_path, "box", tmp_path / "build")
    tests.record()
    seconds = {name.split("::")[1]: value for name, value in tests.seconds.items()}
    assert seconds["test_waits"] < 0.25 < 0.3 <= seconds["test_burns"] < 2
    assert seconds["test_shares"] < 0.25 and tests.cost("tests/test_box.py::test_shares") >= 0.3
    waits, burns, shares = (f"tests/test_box.py::test_{name}" for name in ("waits", "burns", "shares"))
    assert tests.within([waits, shares, burns], budget=0.55) == [waits, shares]


def row(n, outcome, **fields):
    plain = {"id": f"id{n}", "source": "s", "file": "las_fast/x.py", "line": n, "function": "f", "rule": "constant"}
    return (
        plain | {"before": "1", "after": "2", "start": 0, "nth": 0, "outcome": outcome, "by": "", "seconds": 0} | fields
    )


def test_the_report_counts_by_file_and_folder_and_lists_unexplained_survivors(tmp_path, monkeypatch):
    path = tmp_path / "judged.yaml"
    path.write_text("- {file: las_fast/x.py, function: g, reason: 'equivalent: a toy'}\n")
    monkeypatch.setattr(command, "judged", lambda: judged(path))
    rows = [row(1, "noticed"), row(2, "slow"), row(3, "survived", before="a  <\n b"), row(4, "invalid"),
            row(5, "survived", function="g"), row(6, "noticed", file="las_fast/y.py")]  # fmt: skip
    message = list(command.report(rows))
    counts = [" ".join(line.split()[:4]) for line in message[1:4]]
    assert counts == ["las_fast/ (all) 5 60.0%", "las_fast/x.py 4 50.0% 0", "las_fast/y.py 1 100.0% 0"]
    assert message[1].split()[-1] == "75.0%"
    assert [line for line in message if "survived [" in line] == ["las_fast/x.py:3 in f: constant, survived [id3]"]


def test_an_explanation_matches_the_text_at_any_line_and_layout():
    reasons = {("x.py", "f", "a < b", "a <= b"): "equivalent: never equal", ("x.py", "g", "*", "*"): "GPU: all of it"}
    assert reason_of(reasons, "x.py", "f", "a  <\n  b", "a <= b") == "equivalent: never equal"
    assert reason_of(reasons, "x.py", "f", "a < c", "a <= b") == ""
    assert reason_of(reasons, "x.py", "g", "a", "b") == "GPU: all of it"


def test_only_the_tests_that_are_asked_for_judge():
    def files(*words):
        (target,) = command.targets_of(command.parser().parse_args([str(ROOT / "las_fast/lm.py"), *words]))
        return [str(path) for path in target.tests.files]

    every = files()
    assert files("--tests", str(ROOT / "tests/search"), str(ROOT / "tests/test_lm.py")) == [
        path for path in every if path.startswith("tests/search/") or path == "tests/test_lm.py"
    ]
    with pytest.raises(SystemExit, match="no tests that judge las_fast in tests/test_x.py"):
        files("--tests", "tests/test_x.py")
    for folder in ("csrc", "kernels"):
        with pytest.raises(SystemExit, match=f"{folder} is judged by tests/.*; leave --tests out"):
            command.targets_of(command.parser().parse_args([str(ROOT / folder), "--tests", "tests/ops"]))


@pytest.mark.parametrize("path", JUDGED, ids=lambda path: path.name)
def test_every_judgement_is_of_a_mutant_that_exists_and_is_written_once(path):
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = set()
    options = command.parser().parse_args([str(ROOT / file) for file in {row["file"] for row in rows}])
    for target in command.targets_of(options):
        for m in target.mutants(options.paths):
            known |= {judged_key(m.file, m.function, m.before, m.after), judged_key(m.file, m.function, "*", "*")}
    keys = [judged_key(r["file"], r["function"], r.get("before", "*"), r.get("after", "*")) for r in rows]
    assert [key for key in keys if key not in known] == [], "give these rows the code as it is now, or delete them"
    assert [key for key in set(keys) if keys.count(key) > 1] == [], "delete all but one row of each"
    assert {row["reason"].split()[0] for row in rows} <= {"equivalent:", "GPU:", "accepted:"}


class Fake:
    """A target where every third mutant survives."""

    def __init__(self):
        self.judged = []

    def prepare(self, mutants, jobs):
        pass

    def judge(self, mutant):
        from tests.mutants.base import Verdict

        self.judged.append(mutant.line)
        return Verdict("survived" if mutant.line % 3 == 0 else "noticed")

    def close(self):
        pass


def test_mutants_in_the_results_are_not_judged_again(tmp_path):
    mutants = [Mutant("pyproject.toml", n, "", "constant", "1", "2", 0, nth=n) for n in range(1, 7)]
    out = ["--out", str(tmp_path / "results.jsonl")]
    for words, expected in ((out, [1, 2, 3, 4, 5, 6]), (out, []), ([*out, "--again"], [3, 6])):
        target = Fake()
        command.judge_all([(target, m) for m in mutants], command.parser().parse_args(words))
        assert sorted(target.judged) == expected
    assert len(command.read(tmp_path / "results.jsonl")) == 6
    rows = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert {row["line"] for row in rows if row["outcome"] == "survived"} == {3, 6}


def test_a_sample_is_repeatable_and_spread_over_the_files():
    mutants = [(None, Mutant(f"{f}.py", n, "", "constant", "1", "2", 0, nth=n)) for f, size in (("a", 80), ("b", 20))
               for n in range(size)]  # fmt: skip
    chosen = command.stratified(mutants, 10, seed=3)
    assert chosen == command.stratified(mutants, 10, seed=3) != command.stratified(mutants, 10, seed=4)
    counts = [sum(m.file == f"{f}.py" for _, m in chosen) for f in "ab"]
    assert sum(counts) == 10 and 6 <= counts[0] <= 9


def test_in_a_sample_smaller_than_the_number_of_files_every_mutant_is_equally_likely():
    sizes = {f"{name}.py": size for name, size in zip("abcdefgh", (1, 1, 1, 1, 1, 1, 1, 9), strict=True)}
    mutants = [(None, Mutant(file, n, "", "constant", "1", "2", 0, nth=n)) for file, size in sizes.items()
               for n in range(size)]  # fmt: skip
    drawn = [m.file for seed in range(200) for _, m in command.stratified(mutants, 2, seed)]
    counts = [drawn.count(file) for file in sizes]
    assert all(10 <= count <= 45 for count in counts[:7])  # 1 of 16 mutants: 25 expected
    assert 190 <= counts[7] <= 260  # 9 of 16: 225 expected
