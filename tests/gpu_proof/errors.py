"""What the execution of machine code raises where the code does what a GPU does not define."""


class MachineError(AssertionError):
    """The machine code did what a GPU does not define."""


class OutOfBounds(MachineError):
    """An access outside every tensor, or outside shared memory."""


class Misaligned(MachineError):
    """An access whose address is no multiple of its size."""


class BarrierRace(MachineError):
    """Two warps touched a word of shared memory, or two threads a global element, one writing, no barrier between."""


class BrokenConvergence(MachineError):
    """Threads that must act together came apart: part of a warp at a .sync instruction, part of a CTA at a barrier."""


class Runaway(MachineError):
    """A batch ran for longer than allowed."""
