"""Tests of the workers, the interpreter's poison and the sanitizer: each detects its kind of fault."""

import concurrent.futures
import ctypes
import os
import pickle
import threading
import time
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from gpu_proof import mutants
from gpu_proof.__main__ import table as coverage
from gpu_proof.interpreter import poisoned
from gpu_proof.process import WorkerDied, compiled, interpreted
from gpu_proof.sanitizer import OutOfBounds, ProgramRace, sanitized

# Functions for the workers


@triton.jit
def copy_kernel(source, target, n, BLOCK: tl.constexpr, SHIFT: tl.constexpr, STEP: tl.constexpr):
    """Program p copies n elements at p * STEP and stores them SHIFT elements further."""
    i = tl.arange(0, BLOCK)
    start = tl.program_id(0) * STEP
    x = tl.load(source + start + i, mask=i < n, other=0)
    tl.store(target + start + i + SHIFT, x, mask=i < n)


@triton.jit
def unspecified_kernel(source, target, n, BLOCK: tl.constexpr):
    """Store the masked-off lanes of a load without `other`."""
    i = tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i, mask=i < n))


@triton.jit
def neighbour_kernel(data, BLOCK: tl.constexpr):
    """Each program reads elements that the next one writes."""
    i = tl.arange(0, BLOCK)
    start = tl.program_id(0) * BLOCK
    x = tl.load(data + start + BLOCK + i)
    tl.store(data + start + i, x)


@triton.jit
def colliding_kernel(target, BLOCK: tl.constexpr):
    """Two lanes of the store write to each address."""
    i = tl.arange(0, BLOCK)
    tl.store(target + i // 2, i)


@triton.jit
def atomic_kernel(target, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(target + i, 1.0)


def copy(source, target, n=8, programs=1, shift=0, step=8, races=True):
    with sanitized(races=races) as launches:
        copy_kernel[(programs,)](source, target, n, BLOCK=16, SHIFT=shift, STEP=step)
    return target, launches[0].arguments


def copy_column(n):
    """Copy n elements from the first two columns of a matrix of three."""
    return copy(torch.zeros(5, 3)[:, :2], torch.zeros(16), n)


def copy_between_halves(shift):
    """Copy from the first half of a tensor to its second half."""
    data = torch.arange(16.0)
    copy(data[:8], data[8:], 8, shift=shift)
    return data


def collide():
    with sanitized():
        colliding_kernel[(1,)](torch.zeros(16, dtype=torch.int32), BLOCK=16)


def read_neighbour():
    with sanitized():
        neighbour_kernel[(2,)](torch.zeros(64), BLOCK=16)


def add_from_every_program(size):
    target = torch.zeros(size)
    with sanitized() as launches:
        atomic_kernel[(3,)](target, BLOCK=16)
    return target, launches[0].arguments["target"]


def load_without_other(dtype):
    target = torch.zeros(16, dtype=dtype)
    with sanitized():
        unspecified_kernel[(1,)](torch.ones(16, dtype=dtype), target, 9, BLOCK=16)
    return target


def outputs_written_up_to(n, dtype):
    with poisoned():
        target = torch.empty(16, dtype=dtype)
        like = torch.empty_like(target).view(torch.uint8), target.new_empty(3).view(torch.uint8)
    copy_kernel[(1,)](torch.zeros(16, dtype=dtype), target, n, BLOCK=16, SHIFT=0, STEP=0)
    return target.view(torch.uint8) if dtype == torch.bool else target, like


def copy_within_32_bits(programs, step):
    """Run the last of many programs on tensors larger than memory, with 32-bit offsets."""
    source, target = (torch.empty(programs * step + 8, device="meta") for _ in range(2))
    with sanitized(last_program_only=True) as launches:
        copy_kernel[(programs,)](source, target, 8, BLOCK=16, SHIFT=0, STEP=step)
    return launches[0]


def is_interpreted():
    return type(copy_kernel).__name__ == "InterpretedFunction", os.environ.get("TRITON_INTERPRET")


def fail():
    raise KeyError("what went wrong")


def process_after(seconds):
    time.sleep(seconds)
    return os.getpid()


def crash():
    ctypes.string_at(0)


# Workers


def test_interpreting_and_compiling_workers_decorate_kernels_differently():
    assert interpreted(is_interpreted) == (True, "1")
    assert compiled(is_interpreted) == (False, None)


def test_starting_a_worker_leaves_the_environment_unchanged():
    before = dict(os.environ)
    interpreted(is_interpreted)
    assert dict(os.environ) == before


def test_an_exception_comes_back_with_its_type_and_the_workers_traceback():
    with pytest.raises(KeyError, match="what went wrong") as caught:
        interpreted(fail)
    assert "in fail" in caught.value.__notes__[0]


def test_a_crash_fails_its_call_and_not_the_next_one():
    with pytest.raises(WorkerDied, match=r"test_tools.crash: the worker ended with exit code -\d+"):
        interpreted(crash)
    assert interpreted(is_interpreted) == (True, "1")


def test_a_call_past_its_time_limit_is_killed():
    with pytest.raises(WorkerDied, match="time.sleep: the worker ended with exit code -9"):
        compiled(time.sleep, 60.0, limit=0.2)


def test_a_result_that_cannot_be_pickled_is_an_error():
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError), match="pickle"):
        compiled(threading.Lock)


def test_concurrent_calls_run_in_separate_workers():
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        processes = [call.result() for call in [pool.submit(compiled, process_after, 0.2) for _ in range(2)]]
    assert len({os.getpid(), *processes}) == 3


# Interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool])
def test_an_unwritten_output_is_detected(dtype):
    target, _ = interpreted(outputs_written_up_to, 15, dtype)
    assert (target[:15] == 0).all()
    assert target[15].isnan() if dtype.is_floating_point else target[15] not in (0, 1)


def test_every_way_to_allocate_is_poisoned():
    _, like = interpreted(outputs_written_up_to, 15, torch.int8)
    assert all((x == 128).all() for x in like)


# Sanitizer


def test_a_copy_within_bounds_passes_and_copies():
    target, _ = interpreted(copy, torch.arange(16.0), torch.zeros(16), 8, 2)
    assert target.tolist() == list(range(16))


@pytest.mark.parametrize(
    ("shift", "lanes", "bytes_away"), [(1, 1, 32), (5, 5, 32), (-1, 1, -4), (2**20, 8, 2**22), (-(2**20), 8, -(2**22))]
)
def test_stores_out_of_bounds_are_detected(shift, lanes, bytes_away):
    message = rf"copy_kernel, program \(0, 0, 0\): store of {lanes} of 8 lanes outside target .* {bytes_away} bytes"
    with pytest.raises(OutOfBounds, match=message):
        interpreted(copy, torch.zeros(8), torch.zeros(8), 8, 1, shift)


def test_a_load_out_of_bounds_is_detected():
    with pytest.raises(OutOfBounds, match="load of 1 of 9 lanes outside source"):
        interpreted(copy, torch.zeros(8), torch.zeros(16), 9)


def test_the_gaps_of_a_strided_argument_are_out_of_bounds():
    interpreted(copy_column, 2)
    with pytest.raises(OutOfBounds, match=r"load of 1 of 3 lanes outside source .* strides \(3, 1\)"):
        interpreted(copy_column, 3)


def test_any_access_to_an_empty_argument_is_out_of_bounds():
    with pytest.raises(OutOfBounds, match="load of 1 of 1 lanes outside source"):
        interpreted(copy, torch.zeros(0), torch.zeros(16), 1)


def test_memory_that_belongs_to_another_argument_is_out_of_bounds():
    assert interpreted(copy_between_halves, 0)[8:].tolist() == list(range(8))
    with pytest.raises(OutOfBounds, match="store of 8 of 8 lanes outside target"):
        interpreted(copy_between_halves, -8)


def test_two_programs_that_write_one_element_are_detected():
    with pytest.raises(ProgramRace, match=r"program \(1, 0, 0\): store of an element that .*\(0, 0, 0\) accessed"):
        interpreted(copy, torch.zeros(16), torch.zeros(16), 8, 2, 0, 7)


def test_a_program_that_reads_what_another_writes_is_detected():
    with pytest.raises(ProgramRace, match=r"program \(1, 0, 0\): store of .*\(0, 0, 0\) accessed in data"):
        interpreted(read_neighbour)


def test_lanes_that_store_different_values_to_one_address_are_detected():
    with pytest.raises(ProgramRace, match="8 lanes of one store write different values"):
        interpreted(collide)


def test_atomics_are_checked_and_counted_but_do_not_race():
    target, traffic = interpreted(add_from_every_program, 16)
    assert (target == 3).all()
    assert (traffic.stored.requested, traffic.stored.unique, traffic.stored.sectors) == (192, 64, 2)
    with pytest.raises(OutOfBounds, match="atomic of 1 of 16 lanes outside target"):
        interpreted(add_from_every_program, 15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_a_masked_load_without_other_returns_poison(dtype):
    values = interpreted(load_without_other, dtype)
    assert (values[:9] == 1).all()
    assert values[9:].isnan().all() if dtype.is_floating_point else (values[9:] == -(2**31)).all()


def test_a_meta_tensor_is_checked_for_bounds_only():
    launch = interpreted(copy_within_32_bits, 2**30, 1)
    assert launch.grid == (2**30, 1, 1)
    assert launch.arguments["source"].loaded.requested == 0
    with pytest.raises(OutOfBounds, match=r"program \(1073741823, 0, 0\): load of 8 of 8 lanes outside source"):
        interpreted(copy_within_32_bits, 2**30, 3)


def test_bytes_are_counted_by_argument():
    _, traffic = interpreted(copy, torch.zeros(16, dtype=torch.float16), torch.zeros(32, dtype=torch.float16), 8, 1)
    moved = traffic["source"].loaded, traffic["target"].stored
    assert [(x.requested, x.unique) for x in moved] == [(16, 16), (16, 16)]
    assert traffic["source"].stored.requested == traffic["target"].loaded.requested == 0


def test_a_byte_that_three_programs_load_is_requested_three_times():
    _, traffic = interpreted(copy, torch.zeros(16), torch.zeros(16), 4, 3, 0, 0, False)
    loaded = traffic["source"].loaded
    assert (loaded.requested, loaded.unique, loaded.sectors) == (48, 16, 1)


def test_a_sector_counts_once_any_of_its_elements_is_accessed():
    _, traffic = interpreted(copy, torch.zeros(64), torch.zeros(64), 1, 3, 0, 8)
    assert (traffic["source"].loaded.unique, traffic["source"].loaded.sectors) == (12, 3)


# Faults


GATHERED = mutants.SourceMutant("beam_gather", "some-fault", "old", "new")


@pytest.fixture
def judge(monkeypatch):
    """A function (row of the table, what is detected) -> (verdict, runs): judges a fault with pretended rungs.

    Row: a Verdict or None. Detected: {(rung, case or None for all): Verdict}.
    """

    def judge(row, detected, mutant=GATHERED):
        runs = []

        def rung_of(number):
            return lambda function, fault, only: runs.append((number, only)) or detected.get((number, only), passed)

        passed = mutants.NOT_DETECTED
        monkeypatch.setattr(mutants, "detections", lambda: {str(mutant): row} if row else {})
        monkeypatch.setattr(mutants, "JUDGES", {n: (rung_of(max(n, 2)), None) for n in (1, 2, 3, 4)})
        return mutant.judge(), runs

    return judge


FOUND = mutants.Verdict(1, "primes", "it is wrong")


def test_a_fault_is_run_only_on_the_case_of_the_table_if_that_detects_it(judge):
    assert judge(mutants.Verdict(1, "primes"), {(2, "primes"): FOUND}) == (FOUND, [(2, "primes")])


@pytest.mark.parametrize(
    "row", [None, mutants.Verdict(2, "gone"), mutants.Verdict(4, "one-row"), mutants.Verdict(3, "float")]
)
def test_a_row_that_no_longer_holds_changes_no_verdict(row, judge):
    """Rung 3 never judges a fault of this kind, so a row that names it is not tried."""
    tried = [(row.rung, row.case)] if row and row.rung != 3 else []
    every = {(3, None): FOUND, (3, "float"): FOUND}
    assert judge(row, every) == (mutants.NOT_DETECTED, [*tried, (2, None), (4, None)])
    assert judge(row, every | {(4, None): FOUND}) == (FOUND, [*tried, (2, None), (4, None)])


def test_the_unchanged_kernels_pass_through_all_cases_of_all_rungs(judge):
    control = mutants.SourceMutant("beam_gather", "unchanged")
    assert judge(None, {}, control) == (mutants.NOT_DETECTED, [(2, None), (3, None), (4, None)])


def test_a_barrier_left_out_is_executed_first(judge):
    fault = mutants.SourceMutant("ctc_loss", "no-barrier", "tl.debug_barrier()", "pass")
    assert judge(None, {}, fault)[1] == [(4, None), (2, None)]


def test_only_the_named_case_is_run():
    assert [case.name for case in mutants.cases_of("beam_gather", "huge", huge=True)] == ["huge"]
    assert mutants.cases_of("beam_gather", "huge") == mutants.cases_of("beam_gather", "gone", huge=True) == []


# The README's table


def test_the_readme_has_the_current_table_of_coverage():
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    for line in coverage():
        assert line in readme
