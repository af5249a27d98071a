"""cp.async: asynchronous copies from global to shared memory. The data arrives when the thread waits for its group.

Until then, accessing the destination is a race.
"""

import functools
from dataclasses import dataclass

import numpy as np

from gpu_proof.errors import BarrierRace
from gpu_proof.formats import COPY_DTYPES
from gpu_proof.instructions.accesses import ACCESS
from gpu_proof.instructions.decoding import decodes
from gpu_proof.memory import IN_FLIGHT, SharedAccess
from gpu_proof.ptx import Immediate


@dataclass(frozen=True)
class Transfer:
    """The data of a cp.async in flight."""

    destination: SharedAccess
    data: np.ndarray  # (threads, bytes)
    groups: np.ndarray  # number of each thread's group, from 0

    @property
    def size(self):
        return self.data.shape[1]

    def subset(self, machine, chosen):
        """The transfer of the chosen threads only."""
        threads, offsets = self.destination.threads[chosen], self.destination.offsets[chosen]
        destination = machine.uncounted_shared_access(threads, offsets, self.size)
        return Transfer(destination, self.data[chosen], self.groups[chosen])

    def complete(self, machine):
        """Write the data to shared memory."""
        machine.shared.views[self.size][self.destination.index] = self.data.view(COPY_DTYPES[self.size])[:, 0]
        if machine.races:
            machine.shared.mark_written(self.destination.words, self.destination.owners)


@decodes("cp", modifiers=f"async shared global commit_group wait_group wait_all {ACCESS}")
def _cp(machine, instruction):
    if "commit_group" in instruction:

        def commit(where):
            np.add(machine.commits, 1, out=machine.commits, where=where)

        return commit
    if "wait_group" in instruction:
        return functools.partial(_wait, machine, instruction.operands[0].value)
    if "wait_all" in instruction:
        return functools.partial(_wait, machine, None)
    return _copy(machine, instruction)


def _copy(machine, instruction):
    """Read global memory at once; write shared memory when the thread waits for the group."""
    target, source, size = instruction.operands[:3]
    size = size.value
    sizes = instruction.operands[3] if len(instruction.operands) > 3 else Immediate(size)
    read_sizes = np.broadcast_to(machine.source(sizes, "u32"), machine.threads)  # bytes; the rest becomes zero
    resolve_shared = machine.memoized_access(
        target, lambda a, where: machine.shared_access(a, where, size, instruction)
    )
    resolve_global = machine.memoized_access(
        source, lambda a, where: machine.global_access(a, where, size, instruction)
    )

    def step(where):
        destination = resolve_shared(where)
        machine.count_shared(destination)
        data = np.zeros((machine.threads, size), np.uint8)
        reading = (read_sizes > 0) & where
        if reading.any():
            for access in resolve_global(True if reading.all() else reading):
                buffer = machine.checked_buffer(access, size, instruction)
                view = buffer.views[size]
                machine.count_load(access, size)
                if machine.races:
                    machine.marks.check_read(access, buffer, size, instruction)
                data.view(COPY_DTYPES[size])[access.threads, 0] = view[access.index]
        if (read_sizes < size).any():
            data[np.arange(size) >= read_sizes[:, None]] = 0
        if machine.races:
            if machine.shared.check_write(destination, instruction).any():
                raise BarrierRace(f"{instruction}: overwrites memory that another warp wrote, without a barrier")
            machine.shared.mark_written(destination.words, IN_FLIGHT)
        groups = machine.commits[destination.threads]
        # take is ten times as fast as indexing rows
        machine.transfers.append(Transfer(destination, data.take(destination.threads, axis=0), groups))

    return step


def _wait(machine, allowed, where):
    """Complete all but the last `allowed` committed groups of each active thread; None: complete every copy."""
    remaining = []
    for transfer in machine.transfers:
        threads = transfer.destination.threads
        due = np.ones(threads.size, bool) if allowed is None else transfer.groups < machine.commits[threads] - allowed
        if where is not True:
            due &= where[threads]
        if due.all():
            transfer.complete(machine)
        elif due.any():
            transfer.subset(machine, due).complete(machine)
            remaining.append(transfer.subset(machine, ~due))
        else:
            remaining.append(transfer)
    machine.transfers[:] = remaining
