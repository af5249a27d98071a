"""The register of decoders by instruction name, and what decoders of several kinds share.

A decoder takes the machine and an instruction and returns its step, a function of the mask of threads that take part
(True when all do), or None where there is nothing to do.
"""

import functools

import numpy as np

from gpu_proof.errors import MachineError
from gpu_proof.formats import DTYPES, flushed

DECODERS = {}  # instruction name -> (function (machine, instruction) that returns its step, the modifiers it heeds)


def decodes(*names, modifiers=""):
    """Register a decoder for these instructions. Modifiers other than types and those named are not modelled.

    An instruction may name one type; those with "types" among their modifiers may name several.
    """

    def register(decoder):
        DECODERS.update(dict.fromkeys(names, (decoder, frozenset(modifiers.split()))))
        return decoder

    return register


def decoder_of(instruction):
    """The decoder of an instruction. Raises NotImplementedError for what it does not know."""
    decoder, heeded = DECODERS.get(instruction.name, (None, frozenset()))
    unknown = set(instruction.modifiers) - heeded - DTYPES.keys() if "anything" not in heeded else ()
    types = [modifier for modifier in instruction.modifiers if modifier in DTYPES]
    if decoder is None or unknown or (len(types) > 1 and "types" not in heeded):
        raise NotImplementedError(f"{instruction} is not modelled")
    return decoder


def computed(target, compute, sources):
    """A step that writes compute(*sources)."""
    if isinstance(compute, np.ufunc):
        return functools.partial(compute, *sources, out=target, casting="unsafe", dtype=target.dtype)

    def step(where):
        np.copyto(target, compute(*sources), where=where, casting="unsafe")

    return step


def finishing(instruction):
    """What .ftz, .sat and .relu do to a result."""
    steps = []
    if "ftz" in instruction:
        steps.append(flushed)
    if "sat" in instruction:
        steps.append(lambda values: np.where(np.isnan(values), 0, np.clip(values, 0, 1)).astype(values.dtype))
    if "relu" in instruction:
        steps.append(lambda values: np.fmax(values, 0).astype(values.dtype))

    def finish(values):
        for step in steps:
            values = step(values)
        return values

    return finish


@decodes("fence", "membar", "prefetch", "createpolicy", "applypriority", "nanosleep", modifiers="anything")
def _nothing(machine, instruction):
    return None


@decodes("trap")
def _trap(machine, instruction):
    def step(where):
        raise MachineError(f"{instruction}: the kernel stopped itself")

    return step
