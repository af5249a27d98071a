"""What threads do together: barriers of a CTA, and shuffles, votes, reductions and matches within a warp."""

import numpy as np

from gpu_proof.errors import BrokenConvergence
from gpu_proof.formats import FLOATS
from gpu_proof.instructions.arithmetic import FLOAT_ARITHMETIC, INTEGER_ARITHMETIC
from gpu_proof.instructions.decoding import decodes
from gpu_proof.memory import LANES
from gpu_proof.ptx import Immediate, Pair, Register


@decodes("bar", "barrier", modifiers="sync warp aligned cta")
def _barrier(machine, instruction):
    if "warp" in instruction:  # shared memory takes the accesses of one warp as ordered anyway
        return lambda where: machine.marks.settle_warps(where)
    name, counted = instruction.operands[0], instruction.operands[1:]
    whole = not counted or (isinstance(counted[0], Immediate) and counted[0].value == machine.kernel.threads)
    if "sync" not in instruction or "cluster" in instruction or not isinstance(name, Immediate) or not whole:
        raise NotImplementedError(f"{instruction} is not modelled")

    def step(where):
        if where is True:
            machine.shared.settle()
            machine.marks.settle()
            return
        by_cta = (where | ~machine.live).reshape(machine.ctas, -1)
        some = where.reshape(machine.ctas, -1).any(1)
        if (some & ~by_cta.all(1)).any():
            raise BrokenConvergence(f"{instruction}: only part of a CTA arrives at the barrier")
        machine.shared.settle(some)
        machine.marks.settle(some.repeat(machine.kernel.threads))

    return step


@decodes("shfl", modifiers="sync bfly idx up down")
def _shuffle(machine, instruction):
    target, value, amount, limits = instruction.operands[:4]
    found = None
    if isinstance(target, Pair):
        target, found = target.first, machine.target(target.second, "pred")
    mode = next(m for m in instruction.modifiers if m in ("bfly", "idx", "up", "down"))
    values = np.broadcast_to(machine.source(value, "b32"), machine.threads)
    amounts, limits = (machine.source(operand, "u32").astype(np.int64) for operand in (amount, limits))
    into, together = machine.target(target, "b32"), machine.whole_warps(instruction)
    amount_row = machine.source(amount, "u32")
    fixed = None if isinstance(amount, Register) else _shuffle_source(machine.lane, mode, amounts, limits)

    def step(where):
        together(where)
        lanes, inside = fixed or _shuffle_source(machine.lane, mode, amount_row.astype(np.int64), limits)
        np.copyto(into, values[machine.thread - machine.lane + lanes], where=where)
        if found is not None:
            np.copyto(found, inside, where=where)

    return step


def _shuffle_source(lane, mode, amount, limits):
    """The lane that each lane reads, itself where that is out of range, and whether it is in range."""
    amount, segment, clamp = amount & 31, limits >> 8 & 31, limits & 31
    first, last = lane & segment, (lane & segment) | (clamp & ~segment)
    if mode == "up":
        source = lane - amount
        inside = source >= last
    else:
        source = {"down": lane + amount, "bfly": lane ^ amount, "idx": first | (amount & ~segment)}[mode]
        inside = source <= last
    return np.where(inside, source, lane), inside


def _by_warp(machine, values, where, missing):
    """Values as (warps, lanes), `missing` where a thread takes no part."""
    values = np.broadcast_to(values, machine.threads)
    return (values if where is True else np.where(where, values, missing)).reshape(-1, LANES)


@decodes("vote", modifiers="sync any all uni ballot")
def _vote(machine, instruction):
    mode = next(m for m in instruction.modifiers if m in ("any", "all", "uni", "ballot"))
    source = instruction.operands[1]
    holds, together = machine.source(Register(source.name), "pred"), machine.whole_warps(instruction)
    into = machine.target(instruction.operands[0], "b32" if mode == "ballot" else "pred")
    weights = np.uint32(1) << np.arange(LANES, dtype=np.uint32)

    def step(where):
        together(where)
        values = ~holds if source.negated else holds
        yes, no = _by_warp(machine, values, where, False), _by_warp(machine, ~values, where, False)
        if mode == "ballot":
            result = (yes * weights).sum(1, dtype=np.uint32)
        elif mode == "uni":
            result = ~(yes.any(1) & no.any(1))
        else:
            result = yes.any(1) if mode == "any" else ~no.any(1)
        np.copyto(into, result.repeat(LANES), where=where)

    return step


@decodes("activemask")
def _activemask(machine, instruction):
    into = machine.target(instruction.operands[0], "b32")
    weights = np.uint32(1) << np.arange(LANES, dtype=np.uint32)

    def step(where):
        masks = (_by_warp(machine, np.array([True]), where, False) * weights).sum(1, dtype=np.uint32)
        np.copyto(into, masks.repeat(LANES), where=where)

    return step


@decodes("redux", modifiers="sync add min max and or xor NaN")
def _redux(machine, instruction):
    """Reduce over a warp; with f32 (Blackwell), .NaN passes NaN on and the plain form skips it."""
    type, name = instruction.type, next(m for m in instruction.modifiers if m != "sync")
    values, together = machine.source(instruction.operands[1], type), machine.whole_warps(instruction)
    into = machine.target(instruction.operands[0], type)
    functions = {"add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    functions |= FLOAT_ARITHMETIC if type in FLOATS and "NaN" not in instruction else INTEGER_ARITHMETIC
    if "abs" in instruction:
        raise NotImplementedError(f"{instruction} is not modelled")

    def step(where):
        together(where)  # so that a warp takes part in full, and the values of the others are not written
        np.copyto(into, functions[name].reduce(values.reshape(-1, LANES), axis=1).repeat(LANES), where=where)

    return step


@decodes("match", modifiers="any sync")
def _match(machine, instruction):
    if "any" not in instruction:
        raise NotImplementedError(f"{instruction} is not modelled")
    values, together = machine.source(instruction.operands[1], instruction.type), machine.whole_warps(instruction)
    into = machine.target(instruction.operands[0], "b32")
    weights = np.uint32(1) << np.arange(LANES, dtype=np.uint32)

    def step(where):
        together(where)
        by_warp = values.reshape(-1, LANES)
        same = by_warp[:, :, None] == by_warp[:, None, :]
        np.copyto(into, (same * weights).sum(2, dtype=np.uint32).ravel(), where=where)

    return step
