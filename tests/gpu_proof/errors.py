"""Errors of the PTX executor: the machine code did something that is undefined on a GPU."""


class MachineError(AssertionError):
    """The machine code did something that is undefined on a GPU."""


class OutOfBounds(MachineError):
    """An access outside every tensor, or outside shared memory."""


class Misaligned(MachineError):
    """An access whose address is not a multiple of its size."""


class BarrierRace(MachineError):
    """Two warps (shared memory) or two threads (global memory) touched one place, one writing, without a barrier."""


class BrokenConvergence(MachineError):
    """Threads diverged where they must not: part of a warp at a .sync instruction, part of a CTA at a barrier."""


class Runaway(MachineError):
    """A batch ran for longer than allowed."""
