"""The registry of decoders by instruction name, and helpers that the decoders share.

A decoder takes the machine and an instruction. It returns the step, a function of the mask of active threads (True when
all are), or None for an instruction without effect.
"""

import functools

import numpy as np

from gpu_proof.errors import MachineError
from gpu_proof.formats import DTYPES, flush_subnormals

DECODERS = {}  # instruction name -> (decoder, supported modifiers)


def decodes(*names, modifiers=""):
    """Register a decoder for the named instructions.

    modifiers: supported besides types. "types" allows more than one type, and "anything" every modifier.
    """

    def register(decoder):
        DECODERS.update(dict.fromkeys(names, (decoder, frozenset(modifiers.split()))))
        return decoder

    return register


def decoder_of(instruction):
    """The decoder of an instruction. Raises NotImplementedError for an unknown instruction or modifier."""
    decoder, supported = DECODERS.get(instruction.name, (None, frozenset()))
    unknown = set(instruction.modifiers) - supported - DTYPES.keys() if "anything" not in supported else ()
    types = [modifier for modifier in instruction.modifiers if modifier in DTYPES]
    if decoder is None or unknown or (len(types) > 1 and "types" not in supported):
        raise NotImplementedError(f"{instruction} is not modelled")
    return decoder


def elementwise(target, compute, sources):
    """A step that writes compute(*sources) to the target."""
    if isinstance(compute, np.ufunc):
        return functools.partial(compute, *sources, out=target, casting="unsafe", dtype=target.dtype)

    def step(where):
        np.copyto(target, compute(*sources), where=where, casting="unsafe")

    return step


def result_modifiers(instruction):
    """A function that applies .ftz, .sat and .relu to a result."""
    functions = []
    if "ftz" in instruction:
        functions.append(flush_subnormals)
    if "sat" in instruction:
        functions.append(lambda values: np.where(np.isnan(values), 0, np.clip(values, 0, 1)).astype(values.dtype))
    if "relu" in instruction:
        functions.append(lambda values: np.fmax(values, 0).astype(values.dtype))

    def apply(values):
        for function in functions:
            values = function(values)
        return values

    return apply


@decodes("fence", "membar", "prefetch", "createpolicy", "applypriority", "nanosleep", modifiers="anything")
def _nothing(machine, instruction):
    return None


@decodes("trap")
def _trap(machine, instruction):
    def step(where):
        raise MachineError(f"{instruction}: the kernel executed a trap")

    return step
