"""tests.mutants for C++ and Triton: the edits, and many faults in one build."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.base import ROOT
from tests.mutants.cpp import refused_by
from tests.mutants.cpp_rules import constants, cpp_mutants, schema
from tests.mutants.server import _has_message
from tests.mutants.triton import TritonTarget, in_a_kernel

HOOK = ROOT / "tests" / "mutants" / "cpp_hook.h"
TOY = """
constexpr int MOST = 2 + 3;

template <int W>
int twice(int x) {
  return x * W;
}

extern "C" int toy(int a, int b) {
  int found[MOST] = {};
  if (a < b && !found[0]) {
    ++found[1];
    found[2] = twice<4>(a) - b;
  }
  std::fill(found, found + 1, 7);
  las::prefetch(found + 3);
  return found[1] * 100 + found[2] + std::min(a, b);
}
"""


def edits(source):
    return {(m.rule, m.before, m.after) for m in cpp_mutants(source, "csrc/toy.cpp")}


@pytest.mark.parametrize(
    "expected",
    [
        ("comparison", "a < b", "a <= b"),
        ("arithmetic", "x * W", "x / W"),
        ("logic", "a < b && !found[0]", "a < b || !found[0]"),
        ("operand", "a < b && !found[0]", "a < b"),
        ("not", "!found[0]", "found[0]"),
        ("condition", "a < b && !found[0]", "false"),
        ("constant", "100", "200"),
        ("constant", "7", "8"),
        ("swap", "std::min(a, b)", "std::max(a, b)"),
        ("update", "++found[1]", "--found[1]"),
        ("deletion", "++found[1];", ";"),
        ("deletion", "std::fill(found, found + 1, 7);", ";"),
    ],
    ids=str,
)
def test_every_rule_edits_cpp(expected):
    assert expected in edits(TOY)


def test_constant_expressions_and_edits_without_effect_are_left_out():
    touched = {before for _, before, _ in edits(TOY)}
    assert not {"4", "2 + 3", "found + 3", "las::prefetch(found + 3);"} & touched
    assert constants(TOY, "csrc/toy.cpp") >= 3
    grain = "void f() { at::parallel_for(0, n, 5 * m, [&](int a, int b) { g(a - b); }); }"
    assert {before for _, before, _ in edits(grain)} >= {"0", "a - b"}
    assert "5 * m" not in {before for _, before, _ in edits(grain)}


def test_addresses_are_left_alone_where_only_prefetching_uses_them():
    source = """
        void f(const float* from, int later, int n) {
          const float* next = from + 3 * later;
          const float* used = from + 5 * later;
          const int index = later - 7;
          const float* other = from + index;
          for (int i = 0; i < 16; i += 8) las::prefetch(next + i);
          for (int i = 0; i < 32; i += 4) g(used + i);
          las::prefetch(used);
          las::prefetch(other);
          las::prefetch(table[later - 9]);
          h(n - 6, table[index]);
        }
    """
    touched = {before for _, before, _ in edits(source)}
    assert not {"3", "16", "8", "from + index", "from + 3 * later", "later - 9"} & touched
    assert {"5", "7", "32", "4", "6", "n - 6"} <= touched


def test_what_is_looked_up_to_prefetch_is_left_alone():
    source = """
        void f(const int* table, int now) {
          const int ahead = index(now - 2);
          const float* next = rows(table[ahead]) + 3;
          const int both = index(now - 5);
          las::prefetch(next);
          las::prefetch(rows(both));
          g(rows(both));
          if (now > 7) madvise(next, 8);
          if (now > 9) h(now);
          asm("" : "+r"(now));
          asm("nop" : "+r"(now));
        }
    """
    touched = {before for _, before, _ in edits(source)}
    assert not {"2", "now - 2", "3", "now > 7", 'asm("" : "+r"(now));'} & touched
    assert {"5", "now - 5", "now > 9", 'asm("nop" : "+r"(now));'} <= touched


def test_functions_and_numbers_that_only_share_out_the_work_are_left_alone():
    source = """
        int grain(int n) { return 100 / n; }
        int size(int n) { return 200 / n; }
        void f(int n) {
          const int least = n + 3, rows = n + 5;
          at::parallel_for(0, rows, std::max(1, grain(least)), [&](int a, int b) { g(a, size(n)); });
          at::parallel_for(0, n, size(n), [&](int a, int b) { g(a, rows); });
        }
    """
    touched = {before for _, before, _ in edits(source)}
    assert not {"100", "100 / n", "1", "grain(least)"} & touched
    assert {"200", "200 / n", "n + 5"} <= touched


def test_the_message_of_a_check_is_left_alone():
    source = 'void f() { TORCH_CHECK(v >= 3, "v must be at least ", 4 - 1, "; got ", v + 5); }'
    assert {before for rule, before, _ in edits(source) if rule != "deletion"} == {"v >= 3", "3"}


def test_globals_and_questions_about_the_processor_are_left_alone():
    source = """
        namespace las {
        inline int lanes() { return __builtin_cpu_supports("avx2") ? 8 : 4; }
        int most = lanes() + 3;
        static Definition definition = {"x", -5};
        int f() { int least = lanes() + 6; return least; }
        }
        #if defined(__x86_64__)
        int g() { return f() + 9; }
        #else
        int g() { return f() + 10; }
        #endif
    """
    assert {before for _, before, _ in edits(source)} == {"lanes() + 6", "6", "f() + 9", "9"}


def test_of_two_equal_numbers_either_is_chosen():
    def comparisons(expression):
        return {after for rule, _, after in edits(f"int f() {{ return {expression}; }}") if rule == "comparison"}

    assert comparisons("a > b ? a : b") == comparisons("a < b ? a : b") == set()
    assert comparisons("a > b ? broadcast<W>(b) : a") == set() and comparisons("a > b ? broadcast<W>(c) : a") != set()
    assert comparisons("a > b ? a : c") == {"a >= b"} and comparisons("a == b ? a : b") == {"a != b"}


def test_a_schema_keeps_line_numbers():
    mutants = cpp_mutants(TOY, "csrc/toy.cpp")
    woven = schema(TOY, list(enumerate(mutants))).splitlines()
    assert len(woven) == len(TOY.splitlines())
    for number, mutant in enumerate(mutants):
        assert f"LAS_MUTANT({number})" in woven[mutant.line - 1]


def test_one_build_holds_all_faults_and_enables_one(tmp_path):
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip("there is no C++ compiler")
    start = "#include <algorithm>\nnamespace las { inline void prefetch(const int*) {} }\n"
    start += 'extern "C" int is_zero(const int* p) { return !p || *p == 0; }\n'
    mutants = cpp_mutants(start + TOY, "csrc/toy.cpp")
    hook = f'extern "C" {{ int las_mutant = -1; unsigned char las_reached[{len(mutants)}]; }}\n'
    source, library = tmp_path / "toy.cpp", tmp_path / "toy.so"
    source.write_text(hook + schema(start + TOY, list(enumerate(mutants))))
    argv = [compiler, "-std=c++20", "-shared", "-fPIC", "-w", "-include", str(HOOK), str(source), "-o", str(library)]
    subprocess.run(argv, check=True)
    toy = ctypes.CDLL(str(library))
    on = ctypes.c_int.in_dll(toy, "las_mutant")
    reached = (ctypes.c_ubyte * len(mutants)).in_dll(toy, "las_reached")
    assert toy.toy(3, 4) == 100 + 8 + 3 and toy.toy(4, 3) == 3
    numbers = {(mutant.rule, mutant.before, mutant.after): number for number, mutant in enumerate(mutants)}
    for edit, results in (
        (("comparison", "a < b", "a <= b"), (111, 3, 112)),
        (("deletion", "++found[1];", ";"), (11, 3, 3)),
        (("swap", "std::min(a, b)", "std::max(a, b)"), (112, 4, 3)),
        (("constant", "7", "8"), (111, 3, 3)),  # executed, but without effect on the result
    ):
        on.value = numbers[edit]
        assert (toy.toy(3, 4), toy.toy(4, 3), toy.toy(3, 3)) == results
        assert reached[numbers[edit]]
    zero = ctypes.byref(ctypes.c_int(0))
    for edit, is_zero in ((("operand", "!p || *p == 0", "!p"), False), (("not", "!p", "p"), True)):
        on.value = numbers[edit]
        assert toy.is_zero(zero) == is_zero


def test_faults_that_do_not_compile_are_found_by_the_lines_of_the_messages():
    mutants = cpp_mutants(TOY, "csrc/toy.cpp")
    line = next(m.line for m in mutants if m.before == "x * W")
    named = refused_by(f"/build/sources/toy.cpp:{line}:10: error: no match for 'operator/'", mutants)
    assert {m.line for m in named} == {line}
    broken = f"/build/sources/toy.cpp:{line}:25: internal compiler error: in do_store_flag, at expr.cc:12639"
    assert refused_by(broken, mutants) == named
    led = f"/usr/x.h:3:1: error: wrong\n/build/sources/toy.cpp:{line}:10:   required from here"
    assert refused_by(led, mutants) == named
    with pytest.raises(SystemExit, match="no mutant is to blame"):
        refused_by("/build/sources/toy.cpp:1:1: error: wrong", mutants)


def test_kernels_are_edited_except_for_tile_sizes():
    mutants = TritonTarget().mutants([Path("kernels")])
    assert {Path(m.file).name for m in mutants} == {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert not any("half" in m.before and "ieee" in m.before for m in mutants)
    constants = {m.before for m in mutants if m.function == "" and m.file == "kernels/beam_topk.py"}
    assert "-9223372036854775808" in constants and not {"8192", "1024"} & constants


def test_budgets_judge_edits_of_launchers_but_not_of_kernels():
    mutants = TritonTarget().mutants([Path("kernels/beam_topk.py")])
    assert {m.function for m in mutants if not in_a_kernel(m)} == {"", "beam_topk"}
    assert {"topk_kernel", "_keys"} <= {m.function for m in mutants if in_a_kernel(m)}


def test_a_fault_in_a_kernel_is_detected():
    target = TritonTarget()
    mutants = target.mutants([Path("kernels/beam_gather.py")])
    wrong = next(m for m in mutants if m.before == "row // K * K + parent")
    assert target.judge(wrong).outcome == "noticed"


@pytest.mark.parametrize(("code", "in_time"), [("import time; time.sleep(1)", True), ("while True: pass", False)])
def test_a_test_that_waits_for_a_busy_processor_is_not_called_slow(code, in_time):
    reader, writer = os.pipe()
    code += f"\nimport os; os.write({writer}, b'x')"
    process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[writer])
    try:
        assert _has_message(reader, process.pid, 0.3) == in_time
    finally:
        process.kill()
        process.wait()
        os.close(reader), os.close(writer)
