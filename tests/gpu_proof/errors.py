"""Errors of the PTX executor: the machine code did something that is undefined on a GPU."""


class MachineError(AssertionError):
    """The machine code did something that is undefined on a GPU."""


class OutOfBounds(MachineError):
    """An access outside every tensor, or outside shared memory."""


class Misaligned(MachineError):
    """An access whose address is not a multiple of its size."""


class BarrierRace(MachineError):
    """Two warps (shared memory) or two threads (global memory) used one address without a barrier, and one wrote."""


class IllegalDivergence(MachineError):
    """Only part of a warp reached a .sync instruction, or only part of a CTA a barrier."""


class EndlessLoop(MachineError):
    """A batch ran more basic blocks than allowed."""
