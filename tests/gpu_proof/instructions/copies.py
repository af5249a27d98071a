"""Asynchronous copies from global to shared memory: the data arrives when the thread waits for its group.

Until then, touching its place is a race.
"""

import functools
from dataclasses import dataclass

import numpy as np

from gpu_proof.errors import BarrierRace
from gpu_proof.formats import COPIED
from gpu_proof.instructions.accesses import ACCESS
from gpu_proof.instructions.decoding import decodes
from gpu_proof.memory import IN_FLIGHT, SharedAccess
from gpu_proof.ptx import Immediate


@dataclass(frozen=True)
class Transfer:
    """The data of a cp.async on its way."""

    place: SharedAccess
    data: np.ndarray  # (threads, bytes)
    groups: np.ndarray  # of each thread, counted from 0

    @property
    def size(self):
        return self.data.shape[1]

    def part(self, machine, chosen):
        """The transfer of some of its threads."""
        place = machine.shared_place(self.place.threads[chosen], self.place.offsets[chosen], self.size)
        return Transfer(place, self.data[chosen], self.groups[chosen])

    def land(self, machine):
        machine.shared.views[self.size][self.place.index] = self.data.view(COPIED[self.size])[:, 0]
        if machine.races:
            machine.shared.mark_written(self.place.words, self.place.owners)


@decodes("cp", modifiers=f"async shared global commit_group wait_group wait_all {ACCESS}")
def _cp(machine, instruction):
    if "commit_group" in instruction:

        def commit(where):
            np.add(machine.commits, 1, out=machine.commits, where=where)

        return commit
    if "wait_group" in instruction:
        return functools.partial(_land, machine, instruction.operands[0].value)
    if "wait_all" in instruction:
        return functools.partial(_land, machine, None)
    return _copy(machine, instruction)


def _copy(machine, instruction):
    """Read global memory now; the data is written when its group is waited for."""
    to, of, size = instruction.operands[:3]
    size = size.value
    sizes = instruction.operands[3] if len(instruction.operands) > 3 else Immediate(size)
    kept = np.broadcast_to(machine.source(sizes, "u32"), machine.threads)  # bytes to read; the rest is zero
    find_shared = machine.finder(to, lambda a, where: machine.shared_access(a, where, size, instruction))
    find_global = machine.finder(of, lambda a, where: machine.global_access(a, where, size, instruction))

    def step(where):
        place = find_shared(where)
        machine.count_shared(place)
        data = np.zeros((machine.threads, size), np.uint8)
        reading = (kept > 0) & where
        if reading.any():
            for access in find_global(True if reading.all() else reading):
                buffer = machine.reached(access, size, instruction)
                view = buffer.views[size]
                machine.count_load(access, size)
                if machine.races:
                    machine.marks.check_read(access, buffer, size, instruction)
                data.view(COPIED[size])[access.threads, 0] = view[access.index]
        if (kept < size).any():
            data[np.arange(size) >= kept[:, None]] = 0
        if machine.races:
            if machine.shared.overwritten(place, instruction).any():
                raise BarrierRace(f"{instruction}: overwrites what another warp wrote; no barrier between")
            machine.shared.mark_written(place.words, IN_FLIGHT)
        groups = machine.commits[place.threads]
        # take is ten times as fast as an index of rows
        machine.transfers.append(Transfer(place, data.take(place.threads, axis=0), groups))

    return step


def _land(machine, allowed, where):
    """Write the data of all but the last `allowed` committed groups of each waiting thread; None: of every copy."""
    remaining = []
    for transfer in machine.transfers:
        threads = transfer.place.threads
        due = np.ones(threads.size, bool) if allowed is None else transfer.groups < machine.commits[threads] - allowed
        if where is not True:
            due &= where[threads]
        if due.all():
            transfer.land(machine)
        elif due.any():
            transfer.part(machine, due).land(machine)
            remaining.append(transfer.part(machine, ~due))
        else:
            remaining.append(transfer)
    machine.transfers[:] = remaining
