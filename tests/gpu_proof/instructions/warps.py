"""Barriers of a CTA and of a warp; shuffles, votes, reductions and matches within a warp."""

import numpy as np

from gpu_proof.errors import IllegalDivergence
from gpu_proof.formats import FLOATS
from gpu_proof.instructions.arithmetic import FLOAT_ARITHMETIC, INTEGER_ARITHMETIC
from gpu_proof.instructions.decoding import decodes
from gpu_proof.memory import LANES
from gpu_proof.ptx import Immediate, Pair, Register


@decodes("bar", "barrier", modifiers="sync warp aligned cta")
def _barrier(machine, instruction):
    if "warp" in instruction:  # in shared memory, accesses of one warp count as ordered anyway
        return lambda where: machine.marks.record_warp_barrier(where)
    number, counts = instruction.operands[0], instruction.operands[1:]
    whole_cta = not counts or (isinstance(counts[0], Immediate) and counts[0].value == machine.kernel.threads)
    if "sync" not in instruction or "cluster" in instruction or not isinstance(number, Immediate) or not whole_cta:
        raise NotImplementedError(f"{instruction} is not modelled")

    def step(where):
        if where is True:
            machine.shared.record_barrier()
            machine.marks.record_barrier()
            return
        arrived = (where | ~machine.live).reshape(machine.ctas, -1)
        ctas = where.reshape(machine.ctas, -1).any(1)  # at the barrier
        if (ctas & ~arrived.all(1)).any():
            raise IllegalDivergence(f"{instruction}: only part of a CTA arrives at the barrier")
        machine.shared.record_barrier(ctas)
        machine.marks.record_barrier(ctas.repeat(machine.kernel.threads))

    return step


@decodes("shfl", modifiers="sync bfly idx up down")
def _shuffle(machine, instruction):
    target, value, amount, limits = instruction.operands[:4]
    in_range = None
    if isinstance(target, Pair):
        target, in_range = target.first, machine.target(target.second, "pred")
    mode = next(m for m in instruction.modifiers if m in ("bfly", "idx", "up", "down"))
    values = np.broadcast_to(machine.source(value, "b32"), machine.threads)
    amounts, limits = (machine.source(operand, "u32").astype(np.int64) for operand in (amount, limits))
    into, check_warps = machine.target(target, "b32"), machine.warp_check(instruction)
    amount_row = machine.source(amount, "u32")
    fixed = None if isinstance(amount, Register) else _shuffle_source(machine.lane, mode, amounts, limits)

    def step(where):
        check_warps(where)
        lanes, inside = fixed or _shuffle_source(machine.lane, mode, amount_row.astype(np.int64), limits)
        np.copyto(into, values[machine.thread - machine.lane + lanes], where=where)
        if in_range is not None:
            np.copyto(in_range, inside, where=where)

    return step


def _shuffle_source(lane, mode, amount, limits):
    """(lanes, in range): the lane that each lane reads; out of range it reads itself."""
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
    """Values as (warps, lanes), `missing` for inactive threads."""
    values = np.broadcast_to(values, machine.threads)
    return (values if where is True else np.where(where, values, missing)).reshape(-1, LANES)


@decodes("vote", modifiers="sync any all uni ballot")
def _vote(machine, instruction):
    mode = next(m for m in instruction.modifiers if m in ("any", "all", "uni", "ballot"))
    source = instruction.operands[1]
    holds, check_warps = machine.source(Register(source.name), "pred"), machine.warp_check(instruction)
    into = machine.target(instruction.operands[0], "b32" if mode == "ballot" else "pred")
    weights = np.uint32(1) << np.arange(LANES, dtype=np.uint32)

    def step(where):
        check_warps(where)
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
    """Reduce over a warp. With f32 (Blackwell), .NaN propagates NaN and the plain form ignores it."""
    type, name = instruction.type, next(m for m in instruction.modifiers if m != "sync")
    values, check_warps = machine.source(instruction.operands[1], type), machine.warp_check(instruction)
    into = machine.target(instruction.operands[0], type)
    functions = {"add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    functions |= FLOAT_ARITHMETIC if type in FLOATS and "NaN" not in instruction else INTEGER_ARITHMETIC
    if "abs" in instruction:
        raise NotImplementedError(f"{instruction} is not modelled")

    def step(where):
        check_warps(where)  # reduces inactive warps too, without writing them
        np.copyto(into, functions[name].reduce(values.reshape(-1, LANES), axis=1).repeat(LANES), where=where)

    return step


@decodes("match", modifiers="any sync")
def _match(machine, instruction):
    if "any" not in instruction:
        raise NotImplementedError(f"{instruction} is not modelled")
    values, check_warps = (
        machine.source(instruction.operands[1], instruction.type),
        machine.warp_check(instruction),
    )
    into = machine.target(instruction.operands[0], "b32")
    weights = np.uint32(1) << np.arange(LANES, dtype=np.uint32)

    def step(where):
        check_warps(where)
        by_warp = values.reshape(-1, LANES)
        same = by_warp[:, :, None] == by_warp[:, None, :]
        np.copyto(into, (same * weights).sum(2, dtype=np.uint32).ravel(), where=where)

    return step
