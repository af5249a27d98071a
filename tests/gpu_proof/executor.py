"""Execute parsed PTX on the CPU: every thread of a batch of CTAs in lockstep, one numpy operation per instruction.

It checks the bounds of every access, detects barrier races, and counts instructions.

- Each instruction is decoded once into a step: a function of the mask of active threads (True when all are).
- After a divergent branch, the threads at the lowest block run first, so that the others wait where they reconverge.
- Every tensor parameter has its own address range, far from the others: an access out of bounds never hits another.
- Each word of shared memory records the warps that read and wrote it since the last barrier of the CTA. A write by
  another warp without a barrier is a race; accesses within one warp are ordered. Each element of global memory records
  the thread: a write by another thread without a barrier is a race, even within a warp.
- cp.async data arrives when the thread waits for its group; until then, accessing the destination is a race.

This module runs blocks, branches and launches; machine.py holds the state, and instructions/ decodes the steps.

Not modelled: wgmma, tcgen05, TMA, mbarriers, clusters, fp8, races between CTAs. Fused multiply-adds round twice
(to float64 first), mma sums exactly and rounds once, .approx is exact unless `approx_ulps` perturbs it.
"""

import functools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from gpu_proof.errors import BarrierRace, EndlessLoop, IllegalDivergence, MachineError, Misaligned, OutOfBounds
from gpu_proof.formats import DTYPES, UNSIGNED
from gpu_proof.instructions import decoder_of
from gpu_proof.machine import Counts, Machine
from gpu_proof.memory import LANES, Buffer, region
from gpu_proof.ptx import Register

__all__ = [
    "BarrierRace",
    "IllegalDivergence",
    "Counts",
    "MachineError",
    "Misaligned",
    "OutOfBounds",
    "Program",
    "EndlessLoop",
]

THREADS_PER_BATCH = 2048  # amortises numpy calls while the registers still fit into the cache


@dataclass
class Block:
    """A basic block: decoded steps and the instruction that ends them."""

    steps: list
    opcodes: Counter
    terminator: str = ""  # "bra" or "ret"; empty where the next block simply follows
    predicate: Register | None = None
    target: int = 0


def _blocks(machine):
    """Split the kernel into basic blocks and decode them for the machine."""
    kernel = machine.kernel
    targets = {i.operands[0].name: kernel.labels[i.operands[0].name] for i in kernel.instructions if i.name == "bra"}
    starts = {0, *targets.values()}
    starts |= {place + 1 for place, i in enumerate(kernel.instructions) if i.name in ("bra", "ret", "exit")}
    starts = sorted(start for start in starts if start < len(kernel.instructions))
    number = {start: position for position, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(kernel.instructions)], strict=True):
        instructions = kernel.instructions[start:end]
        block = Block([], Counter(i.opcode for i in instructions))
        last = instructions[-1]
        if last.name in ("bra", "ret", "exit"):
            block.terminator, block.predicate = "bra" if last.name == "bra" else "ret", last.predicate
            if last.name == "bra":
                block.target = number[targets[last.operands[0].name]]
            instructions = instructions[:-1]
        block.steps = [step for i in instructions if (step := _decode_step(machine, i)) is not None]
        blocks.append(block)
    return blocks


def _decode_step(machine, instruction):
    """The step of an instruction, guarded by its predicate; None for an instruction without effect."""
    step = decoder_of(instruction)(machine, instruction)
    if step is None or instruction.predicate is None:
        return step
    holds = machine.source(Register(instruction.predicate.name), "pred")

    def guarded(where):
        active = ~holds if instruction.predicate.negated else holds
        active = active & where  # a copy: the step may overwrite the predicate
        if active.all():
            step(where=True)
        elif active.any():
            step(where=active)

    return guarded


class Program:
    """A kernel ready to run, for any grid.

    Args:
        kernel: from `ptx.parse`.
        shared_bytes: dynamic shared memory per CTA.
        races: detect barrier races.
        approx_ulps: perturb .approx results by up to this many units in the last place.
        max_blocks: basic blocks that a batch may run before EndlessLoop is raised.
    """

    def __init__(self, kernel, shared_bytes, *, races=True, approx_ulps=0, max_blocks=100_000):
        self.kernel, self.max_blocks = kernel, max_blocks

        @functools.cache
        def machine_for(ctas):
            machine = Machine(kernel, ctas, shared_bytes, races, approx_ulps)
            return machine, _blocks(machine)

        self._machine_for = machine_for

    def run(self, grid, arguments, names=None):
        """Run a launch. Tensors among the arguments are changed in place.

        Args:
            grid: CTAs along x, y and z.
            arguments: tensors, integers and floats in the order of the kernel's parameters; missing ones are 0.
            names: names of the arguments for errors.

        Returns:
            Counts of the whole launch.

        Raises:
            MachineError: the code did something that is undefined on a GPU.
        """
        counts = Counts()
        values, buffers = _parameter_values(self.kernel, arguments, names)
        cta_ids = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        ctas_per_batch = max(1, THREADS_PER_BATCH // self.kernel.threads)
        with np.errstate(all="ignore"):
            for start in range(0, len(cta_ids), ctas_per_batch):
                batch = cta_ids[start : start + ctas_per_batch]
                machine, blocks = self._machine_for(len(batch))
                machine.buffers, machine.counts = buffers | machine.constants, counts
                self._start(machine, grid, batch, values)
                self._run_batch(machine, blocks)
        return counts

    @staticmethod
    def _start(machine, grid, cta_ids, values):
        for name, value in values.items():
            machine.parameters[name][0] = value
        machine.cta_ids[:] = np.array(cta_ids, np.uint32).T.repeat(machine.kernel.threads, axis=1)
        machine.grid_size[:, 0] = grid
        for file in machine.files.values():
            file.view(np.uint8).fill(0 if file.dtype == bool else 0xFF)
        machine.shared.reset()
        machine.marks.reset()
        machine.live[:] = True
        machine.transfers.clear()
        machine.commits[:] = 0

    def _run_batch(self, machine, blocks):
        runs = np.zeros(len(blocks), np.int64)  # warps that ran each block
        all_warps = machine.threads // LANES
        waiting = {}  # block number -> mask of the threads that wait there
        position, active = 0, True
        for _ in range(self.max_blocks):
            block = blocks[position]
            runs[position] += all_warps if active is True else np.count_nonzero(active.reshape(-1, LANES).any(1))
            for step in block.steps:
                step(where=active)
            position, active = _next(machine, block, position, active, waiting)
            if active is None:
                break
        else:
            raise EndlessLoop(f"{self.kernel.name} ran more than {self.max_blocks} basic blocks")
        _count_blocks(machine, blocks, runs)


def _next(machine, block, position, active, waiting):
    """The next block and its active threads, (0, None) when all are done. Updates `waiting`."""
    taken, stay = False, active
    if block.terminator:
        taken, stay = _split_threads(machine, block.predicate, active)
    if not waiting and block.terminator != "ret":  # all threads are together, and mostly stay so
        if taken is False:
            return position + 1, stay
        if stay is False:
            return block.target, taken
    if taken is not False:
        if block.terminator == "ret":
            machine.live &= False if taken is True else ~taken
        else:
            _join(waiting, block.target, taken)
    if stay is not False:
        _join(waiting, position + 1, stay)
    if not waiting:
        return 0, None
    position = min(waiting)
    active = waiting.pop(position)
    return position, True if active is not True and active.all() else active


def _split_threads(machine, predicate, active):
    """Masks of the threads that take the branch and of those that do not; False for no thread."""
    if predicate is None:
        return active, False
    holds = machine.source(Register(predicate.name), "pred")
    taken = (~holds if predicate.negated else holds) & active
    number = np.count_nonzero(taken)
    if not number:
        return False, active
    if number == (machine.threads if active is True else np.count_nonzero(active)):
        return active, False
    return taken, ~taken if active is True else active & ~taken


def _join(waiting, position, threads):
    waiting[position] = waiting[position] | threads if position in waiting else threads


def _count_blocks(machine, blocks, runs):
    counts = machine.counts
    for block, warps in zip(blocks, runs.tolist(), strict=True):
        if not warps:
            continue
        for opcode, number in block.opcodes.items():
            counts.opcodes[opcode] += number * warps
            counts.warp_instructions += number * warps
            if opcode.startswith("mma."):
                counts.mma += number * warps
            if opcode.startswith(("bar.sync", "barrier.")):
                counts.barriers += number * warps // machine.warps_per_cta


def _parameter_values(kernel, arguments, names):
    """The bits of each parameter by name, and the Buffer of each tensor by parameter number."""
    values, buffers = {}, {}
    for number, parameter in enumerate(kernel.parameters):
        value = arguments[number] if number < len(arguments) else 0
        if isinstance(value, torch.Tensor):
            buffers[number] = Buffer.of(names[number] if names else parameter.name, value)
            storage = value.untyped_storage().data_ptr()
            value = region(number) + storage % 32 + value.storage_offset() * value.element_size()
        dtype = DTYPES[parameter.type]
        if dtype.kind == "f":
            value = np.array(value, dtype).view(UNSIGNED[dtype.itemsize])
        values[parameter.name] = int(value) & (1 << 8 * dtype.itemsize) - 1
    return values, buffers
