"""Test the command for a GPU machine without a GPU: small on a CPU, and with parts that fail or hang."""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import Levenshtein
import pytest
import torch
from pretend_cuda import pretend_cuda

from benchmarks.device import __main__ as device
from benchmarks.device import cases, checks, edit_distance, kernels, machine, parts, record, timing
from benchmarks.device.parts import PARTS, Options, Part
from benchmarks.device.record import FAIL, PASS, SKIPPED, DeviceLost, Record, format_table
from benchmarks.plain import Plain, Usual
from benchmarks.rows import read_rows
from las_fast.config import ListenerConfig, ModelConfig, SpellerConfig
from las_fast.errors import InputError
from las_fast.model.las import LAS
from las_fast.ops import backends

ROOT = Path(__file__).resolve().parents[1]
BLOCKED = ("soundfile", "soxr", "Levenshtein", "tyro", "matplotlib")


@pytest.fixture
def rows(tmp_path):
    """A record, and a function that reads the rows of its file."""
    return Record(tmp_path / "rows.csv", "part", commit="c", device="d"), lambda: read_rows(tmp_path / "rows.csv")


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """The process, rows and folder of `--device cpu --quick`, run where neither git nor an audio package exists."""
    folder = tmp_path_factory.mktemp("bare")
    for name in BLOCKED:
        (folder / f"{name}.py").write_text(f"raise ImportError('there is no {name} here')")
    command = [sys.executable, "-m", "benchmarks.device", "--out", folder / "out", "--device", "cpu", "--quick"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": str(folder)}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return process, read_rows(folder / "out" / "rows.csv"), folder / "out"


def test_every_part_runs_small_on_a_cpu_without_git_and_audio_packages(quick_run):
    process, recorded, out = quick_run
    log = (out / "log.txt").read_text()
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr + log[-3000:]
    assert list(dict.fromkeys(row["part"] for row in recorded)) == [part.name for part in PARTS]
    assert not [row for row in recorded if row["status"] == FAIL]
    assert {row["commit"] for row in recorded} == {"unknown"}


def test_only_measurements_that_need_cuda_are_skipped(quick_run):
    _, recorded, _ = quick_run
    skipped = [row for row in recorded if row["status"] == SKIPPED]
    assert skipped and {row["note"] for row in skipped} == {"needs CUDA"}
    assert {row["part"] for row in skipped} == {"machine", "training", "cases", "decoding"}


def test_the_command_times_every_path_that_a_cpu_has(quick_run):
    _, recorded, _ = quick_run
    timed = {(row["what"], row["path"]) for row in recorded if row["value"] and row["status"] == "measured"}
    for path in ("las_fast bf16", "las_fast", "plain bf16", "plain packed bf16", "usual"):
        assert ("training step", path) in timed
    for backend in timing.backends_for("speller_unroll", "cpu"):
        assert ("decoder", backend) in timed
    for path in ("las_fast reference", "plain", "usual"):
        assert ("beam search", path) in timed
    assert {"training of AN4: dev CER", "training of AN4: loss"} <= {what for what, _ in timed}


def test_the_table_is_printed_last_and_kept(quick_run):
    process, recorded, out = quick_run
    table = (out / "table.txt").read_text()
    assert table == format_table(recorded) + "\n" and process.stdout.endswith(table)
    assert table.splitlines()[-1] == record.summary(recorded)


# -------------------------------------------------------------------------------------------------- parts that go wrong


def script(*lines):
    return ["-c", "\n".join(lines)]


@pytest.fixture
def run_scripts(monkeypatch, tmp_path):
    """A function that runs the command with scripts in place of its parts; returns the rows and the exit status."""

    def run_scripts(*scripts, seconds=30.0, limit="60"):
        monkeypatch.setattr(device, "PARTS", tuple(Part(str(i), seconds) for i in range(len(scripts))))
        monkeypatch.setattr(device, "GRACE", 0.5)
        monkeypatch.setattr(device, "command_of", lambda name, options, end: scripts[int(name)])
        arguments = ["--out", str(tmp_path / "out"), "--device", "cpu", "--limit", limit]
        monkeypatch.setattr(device, "parse", lambda argv, parse=device.parse: only_numbers(parse(argv), scripts))
        with pytest.raises(SystemExit) as ended:
            device.main(arguments)
        return read_rows(tmp_path / "out" / "rows.csv"), ended.value.code

    return run_scripts


def only_numbers(arguments, scripts):
    arguments.only = [str(i) for i in range(len(scripts))]
    return arguments


def row_of(name, tmp_path):
    """Lines of a script that writes one row as part `name` without importing torch, which would take seconds."""
    values = {"part": name, "what": "it ran", "status": "measured"}
    header, row = ",".join(record.COLUMNS), ",".join(values.get(column, "") for column in record.COLUMNS)
    return [
        f"from pathlib import Path; path = Path({str(tmp_path / 'out' / 'rows.csv')!r})",
        f"before = path.read_text() if path.exists() else {header + chr(10)!r}",
        f"path.write_text(before + {row + chr(10)!r})",
    ]


def test_a_part_that_fails_does_not_stop_the_others(run_scripts, tmp_path, capsys):
    scripts = [script("print('why')", "raise SystemExit(3)"), script("import os", "os.abort()")]
    recorded, status = run_scripts(*scripts, script(*row_of("2", tmp_path)))
    assert status == 1
    assert [(row["part"], row["status"], row["note"]) for row in recorded] == [
        ("0", FAIL, "ended with exit status 3"),
        ("1", FAIL, "ended by signal SIGABRT"),
        ("2", "measured", ""),
    ]
    printed = capsys.readouterr().out
    assert "why" in printed and printed.strip().endswith("0 PASS, 2 FAIL, 1 measured, 0 skipped")


def test_a_part_is_stopped_at_its_limit_and_keeps_its_rows(run_scripts, tmp_path):
    began = time.monotonic()
    hangs = script(*row_of("0", tmp_path), "import time", "time.sleep(60)")
    recorded, status = run_scripts(hangs, seconds=3.0)
    assert status == 1 and time.monotonic() - began < 30
    assert [(row["what"], row["status"]) for row in recorded] == [("it ran", "measured"), ("the part itself", FAIL)]
    assert recorded[1]["note"] == "stopped at its limit of 3 s"


def test_processes_started_by_a_part_end_with_it(tmp_path):
    file = tmp_path / "pid"
    starts = "import subprocess, time; p = subprocess.Popen(['/bin/sleep', '60']); "
    starts += f"open({str(file)!r}, 'w').write(str(p.pid))"
    with (tmp_path / "log").open("w") as log:
        assert device.run_limited([sys.executable, "-c", f"{starts}; time.sleep(60)"], 1.0, log).startswith("stopped")
        assert not alive(int(file.read_text()))
        assert device.run_limited([sys.executable, "-c", starts], 20.0, log) == ""
    assert not alive(int(file.read_text()))


def alive(pid):
    """Whether a process still runs. A zombie has ended."""
    for _ in range(50):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.05)
    return True


def test_the_limit_covers_all_parts_together(run_scripts, tmp_path):
    hangs, other = script("import time", "time.sleep(60)"), script(*row_of("1", tmp_path))
    recorded, _ = run_scripts(hangs, other, limit="2")
    stopped, left_out = recorded
    assert re.fullmatch(r"stopped at its limit of \d s", stopped["note"])
    assert left_out["status"] == SKIPPED
    assert left_out["note"] == "not run: the time of --limit was used up; run it alone with --only"


def test_an_exception_in_a_part_is_a_row(monkeypatch, tmp_path):
    def fails(options, record):
        record.row("before", 1.0)
        raise RuntimeError("no such\nluck")

    monkeypatch.setattr(machine, "run", fails)
    parts.run_part("machine", Options(tmp_path, "cpu", False, "c", None), 10.0)
    recorded = read_rows(tmp_path / parts.ROWS)
    assert [(row["what"], row["status"]) for row in recorded] == [("before", "measured"), ("the part itself", FAIL)]
    assert recorded[1]["note"] == "RuntimeError: no such"


def test_without_a_gpu_it_ends_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="finds no CUDA device here; give --device cpu --quick"):
        device.main(["--out", str(tmp_path / "out")])


def test_wrong_options_are_refused_before_anything_runs(tmp_path):
    (tmp_path / "rows.csv").touch()
    with pytest.raises(InputError, match="already holds rows.csv of another run; give a new folder"):
        device.main(["--out", str(tmp_path), "--device", "cpu"])
    with pytest.raises(InputError, match="--data .*nowhere is not a folder"):
        device.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--data", str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="--limit must be more than 0 seconds; got 0"):
        device.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--limit", "0"])


# ----------------------------------------------------------------------------------------------------------------- rows


def test_a_row_is_in_the_file_as_soon_as_it_is_measured(rows):
    record, read = rows
    record.row("copy", 12.3456, "us", shape="B1", dtype=torch.float16, path="triton", bound=3.0, note="a\n b")
    (row,) = read()
    expected = {"commit": "c", "device": "d", "part": "part", "what": "copy", "shape": "B1", "dtype": "float16"}
    expected |= {"path": "triton", "value": "12.35", "unit": "us", "bound": "3.0", "status": "measured", "note": "a b"}
    assert expected.items() <= row.items()
    record.row("more")
    assert len(read()) == 2


@pytest.mark.parametrize(
    ("error", "status"), [(0.0, PASS), (1e-3, PASS), (1.1e-3, FAIL), (math.nan, FAIL), (math.inf, FAIL)]
)
def test_a_check_passes_up_to_its_tolerance(rows, error, status):
    record, read = rows
    record.check("x", error, 1e-3)
    assert read()[0]["status"] == status


def test_an_attempt_that_fails_is_a_row_and_the_next_one_runs(rows, capsys):
    record, read = rows
    for error in (ValueError("B must be 3"), torch.OutOfMemoryError("CUDA out of memory"), None):
        with record.attempt("x", path="p"):
            if error:
                raise error
            record.row("x", 1)
    assert [row["status"] for row in read()] == [FAIL, FAIL, "measured"]
    assert read()[0]["note"] == "ValueError: B must be 3" and "B must be 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "message",
    ["Triton Error [CUDA]: an illegal memory access was encountered", "CUDA error: device-side assert triggered"],
)
def test_a_part_ends_with_an_error_after_which_the_device_cannot_be_used(rows, message, capsys):
    record, read = rows
    lost = pytest.raises(DeviceLost, match="cannot be used")
    with lost, record.attempt("part"), record.attempt("first"):
        raise RuntimeError(message)
    for text in ("CUDA error: out of memory", "CUDA error: operation failed due to a previous error during capture"):
        with record.attempt("other"):
            raise RuntimeError(text)
    assert [(row["what"], row["status"]) for row in read()] == [("first", FAIL), ("other", FAIL), ("other", FAIL)]


def test_the_time_to_start_a_part_counts(monkeypatch, tmp_path):
    ends = []
    monkeypatch.setattr(parts, "run_part", lambda name, options, end: ends.append(end))
    options = Options(tmp_path, "cpu", True, "c", None)
    parts.main(parts.command_of("checks", options, 1234.5)[2:])
    assert ends == [1234.5]


def test_a_part_ends_with_the_process_that_started_it():
    part = "import time; from benchmarks.device.parts import end_with_parent; end_with_parent(); print(1, flush=True)"
    command = f"""
import os, subprocess, sys
part = subprocess.Popen([sys.executable, "-c", "{part}; time.sleep(60)"], stdout=subprocess.PIPE)
part.stdout.readline()
print(part.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    status, deadline = Path(f"/proc/{int(done.stdout)}/stat"), time.monotonic() + 30
    while status.exists() and ") Z " not in status.read_text():  # a zombie if nobody waits for it
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_measurement_that_needs_cuda_is_skipped_elsewhere(rows):
    record, read = rows
    with record.attempt("graph"):
        machine.graphed_us("cpu")
    assert [(row["status"], row["note"]) for row in read()] == [(SKIPPED, "needs CUDA")]


def test_items_left_out_for_lack_of_time_are_counted(tmp_path):
    record = Record(tmp_path / "rows.csv", "part", commit="c", device="d", end=time.monotonic() + 60)
    for item in record.while_time_remains([1, 2, 3], "numbers"):
        record.end = time.monotonic() + (0 if item == 1 else 60)
    (row,) = read_rows(tmp_path / "rows.csv")
    assert (row["what"], row["note"]) == ("numbers", "2 of 3 left out: no time remained")


def test_the_table_has_one_line_per_quantity_and_repeats_failures(rows):
    record, read = rows
    record.row("topk", 9.0, "us", shape="B1", path="reference", bound=1.0)
    record.row("topk", 2.0, "us", shape="B1", path="triton", bound=1.0)
    record.check("loss", 0.5, 0.1, path="cuda")
    assert format_table(read()).splitlines() == [
        "== part",
        "        topk B1: reference 9.0 us (bound 1.0), triton 2.0 us (bound 1.0)",
        "FAIL    loss: cuda 0.5 (at most 0.1)",
        "== failures",
        "part: FAIL    loss: cuda 0.5 (at most 0.1)",
        "0 PASS, 1 FAIL, 2 measured, 0 skipped",
    ]


# ---------------------------------------------------------------------------------------------------------------- tools


def test_the_plain_edit_distance_equals_that_of_the_package():
    generator = random.Random(0)
    for _ in range(200):
        a, b = ("".join(generator.choices("abc ", k=generator.randrange(9))) for _ in range(2))
        assert edit_distance.distance(a, b) == Levenshtein.distance(a, b)
        assert edit_distance.distance(a.split(), b.split()) == Levenshtein.distance(a.split(), b.split())


def fake_timer(run):
    run()
    return 2.0


def test_bandwidth_counts_reads_and_writes():
    assert machine.bandwidth(fake_timer, "cpu", size=1000) == 2 * 4000 / 2.0


def test_matmuls_count_two_operations_per_product_and_leave_the_precision_as_it_was():
    precisions = []
    timer = lambda run: precisions.append(torch.get_float32_matmul_precision()) or 2.0  # noqa: E731
    assert machine.matmul_tflops(timer, "cpu", 100, torch.float32, "high") == 2 * 100**3 / 2.0 / 1e6
    assert precisions == ["high"] and torch.get_float32_matmul_precision() == "highest"


def test_only_backends_that_take_the_dtype_are_timed(monkeypatch):
    monkeypatch.setattr(backends, "_triton_problem", lambda: None)
    assert timing.backends_for("beam_topk", "cuda", torch.float16) == ["reference", "triton"]
    assert timing.backends_for("beam_topk", "cpu", torch.float64) == ["reference"]
    assert "fused" in timing.backends_for("speller_unroll", "cuda")


def test_every_op_is_timed_on_every_backend_beside_its_bound(rows):
    record, read = rows
    for make in kernels.small_measurements("cpu"):
        kernels.time_op(make(), "cpu", fake_timer, 100.0, record)
    attention, *_ = recorded = read()
    assert {row["what"].partition(",")[0] for row in recorded} == {
        "masked_attention", "beam_topk", "beam_gather", "ctc_loss", "ctc_token_times", "ctc_prefix", "beam_backtrack",
        "ngram_scores",
    }  # fmt: skip
    paths = {row["path"] for row in recorded if row["what"].startswith("ctc_loss")}
    assert {"reference", kernels.TORCH_CTC} <= paths
    assert not [row for row in recorded if row["status"] == FAIL] and {row["value"] for row in recorded} == {"2.0"}
    assert float(attention["bound"]) == pytest.approx((2 * 2 * 3 * 8 + 2 * 2 * 20 * 8) * 4 / 100, rel=1e-3)


def test_passed_tests_are_counted_while_tests_run(tmp_path, rows, monkeypatch):
    record, read = rows
    monkeypatch.setattr(cases, "NOTE_SECONDS", 0.0)
    reporter = cases.Reporter(record)
    for outcome in ("passed", "passed", "skipped"):
        reporter.pytest_runtest_logreport(SimpleNamespace(failed=False, skipped=outcome == "skipped", when="call",
                                                          outcome=outcome))  # fmt: skip
    assert [row["value"] for row in read() if row["what"] == "tests that passed so far"] == ["0", "1", "2"]


def test_a_failing_test_is_recorded_before_the_next_one_runs(tmp_path, rows):
    record, read = rows
    file = tmp_path / "test_three.py"
    file.write_text("def test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): assert len(rows()) == 1\n")
    file.write_text(file.read_text() + f"def rows(): return open({str(record.path)!r}).read().splitlines()[1:]\n")
    code = "import sys; from pathlib import Path; from benchmarks.device import cases, parts, record\n"
    code += f"to = record.Record(Path({str(record.path)!r}), 'p', commit='c', device='d')\n"
    code += f"cases.run_tests(parts.Options(Path('.'), 'cpu', True, 'c', None), to, [{str(file)!r}, '--rootdir', '/'])"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert [(row["what"].rpartition("::")[2], row["value"], row["status"]) for row in read()] == [
        ("test_b", "", FAIL),
        ("tests that passed", "2", "measured"),
    ]
    assert read()[0]["note"] == "assert 1 == 2"


@pytest.mark.parametrize("part", ["machine", "training", "checks", "searching", "lstm", "decoding", "kernels"])
def test_the_code_for_cuda_runs_on_a_pretended_device(part, tmp_path, monkeypatch):
    """This shows no wrong result, but every wrong name, argument and shape in code that only CUDA reaches."""
    monkeypatch.setattr(timing, "FLUSH_BYTES", 8)
    few = {
        name: checks.CHECKS[name] for name in ("training step of an4", "decoder", "validation", "search, everything")
    }
    monkeypatch.setattr(checks, "CHECKS", few)
    with pretend_cuda():
        parts.run_part(part, Options(tmp_path, "cuda", True, "c", None), time.monotonic() + 120)
    recorded = read_rows(tmp_path / parts.ROWS)
    assert recorded and not [row for row in recorded if row["status"] == SKIPPED or row["device"] != "a pretended GPU"]
    assert not [row for row in recorded if row["status"] == FAIL], recorded


@pytest.mark.parametrize("kind", [Usual, Plain])
def test_a_baseline_makes_its_tensors_where_its_weights_are(kind):
    """Run on the device meta, whose tensors hold no numbers. Packed sequences are left out: they read the lengths."""
    sizes = ModelConfig(ListenerConfig((6,), (3,), (2,), 5, 1), SpellerConfig(8, 7, 6, (10, 8)), ctc_layer=1)
    baseline = kind(LAS(sizes, input_size=4, vocabulary_size=9)).to("meta")
    lengths, tokens = (torch.ones(shape, dtype=torch.int64, device="meta") for shape in ((3,), (3, 5)))
    logits, weights = baseline.spell(torch.randn(3, 15, 10, device="meta"), lengths, tokens)
    (logits.sum() + weights.sum()).backward()
    results = [logits, weights, *baseline.eval().search(torch.randn(3, 15, 10, device="meta"), lengths, 4, 6)]
    if kind is Plain:
        output = baseline(torch.randn(3, 30, 4, device="meta"), lengths, tokens)
        results += [x for x in output if x is not None]
    assert {str(x.device) for x in results} == {"meta"}


def test_a_profile_tells_kernels_from_copies_annotations_and_calls_of_the_host(monkeypatch):
    on_cuda, on_cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(key=key, device_type=where, count=count, self_device_time_total=us)
        for key, where, count, us in (
            ("backward_kernel", on_cuda, 3, 4000.0),
            ("Memcpy DtoH (Device -> Pageable)", on_cuda, 2, 9.0),
            ("Memset (Device)", on_cuda, 5, 9.0),
            ("Optimizer.step#AdamW.step", on_cuda, 1, 9999.0),
            ("cudaLaunchKernel", on_cpu, 2, 0.0),
            ("cuLaunchKernelEx", on_cpu, 1, 0.0),
            ("cudaGraphLaunch", on_cpu, 4, 0.0),
            ("cudaStreamSynchronize", on_cpu, 6, 0.0),
            ("aten::mm", on_cpu, 7, 0.0),
        )
    ]
    profiler = MagicMock()
    profiler.__enter__.return_value.key_averages.return_value = events
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert timing.profile(lambda: None, "cuda") == timing.Profile(
        kernels=3, busy_ms=4.0, launches=3, graph_launches=4, waits=6, copies_to_host=2,
        longest=[("backward_kernel", 3, 4.0)],
    )  # fmt: skip


def test_a_profile_counts_the_ops_of_a_call():
    x = torch.ones(8, 8)
    profile = timing.profile(lambda: torch.mm(x, x).neg(), "cpu")
    assert {"aten::mm", "aten::neg"} <= {name for name, _, _ in profile.longest}
    assert profile.launches == profile.graph_launches == profile.copies_to_host == 0
