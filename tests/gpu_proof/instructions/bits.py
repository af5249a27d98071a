"""Bitwise logic, shifts, bit fields and bit counts."""

import numpy as np

from gpu_proof.formats import DTYPES
from gpu_proof.instructions.decoding import decodes, elementwise
from gpu_proof.ptx import Immediate


@decodes("and", "or", "xor")
def _bitwise(machine, instruction):
    compute = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[instruction.name]
    values = [machine.source(operand, instruction.type) for operand in instruction.operands[1:]]
    return elementwise(machine.target(instruction.operands[0], instruction.type), compute, values)


@decodes("lop3")
def _lop3(machine, instruction):
    """Any bitwise function of three operands; the fourth is its truth table."""
    a, b, c = (machine.source(operand, "b32") for operand in instruction.operands[1:4])
    table = instruction.operands[4].value

    def look_up(a, b, c):
        result = np.zeros(machine.threads, np.uint32)
        for case in range(8):
            if table >> case & 1:
                result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
        return result

    return elementwise(machine.target(instruction.operands[0], "b32"), look_up, [a, b, c])


@decodes("shl", "shr")
def _shift(machine, instruction):
    target, value, amount = instruction.operands
    type = instruction.type
    if instruction.name == "shl" or type[0] == "b":
        type = f"u{type[1:]}"
    values, into = machine.source(value, type), machine.target(target, type)
    bits, dtype = 8 * values.itemsize, values.dtype
    shift = np.left_shift if instruction.name == "shl" else np.right_shift
    if isinstance(amount, Immediate) and amount.value < bits and into.dtype == dtype:
        return elementwise(into, shift, [values, np.array([amount.value], dtype)])
    amounts = machine.source(amount, "u32")

    def shifted(values):
        result = shift(values, np.minimum(amounts, bits - 1).astype(dtype))
        return result if type[0] == "s" else np.where(amounts >= bits, 0, result)  # signed shifts are arithmetic

    return elementwise(into, shifted, [values])


@decodes("shf", modifiers="l r wrap clamp")
def _funnel_shift(machine, instruction):
    target, low, high, amount = instruction.operands
    sources = [machine.source(operand, "b32") for operand in (low, high, amount)]

    def shifted(low, high, amount):
        both = high.astype(np.uint64) << np.uint64(32) | low
        by = (amount & np.uint32(31) if "wrap" in instruction else np.minimum(amount, 32)).astype(np.uint64)
        return both << by >> np.uint64(32) if "l" in instruction else both >> by & np.uint64(0xFFFFFFFF)

    return elementwise(machine.target(target, "b32"), shifted, sources)


@decodes("bfe")
def _extract_bits(machine, instruction):
    target, value, position, length = instruction.operands
    values, bits = machine.source(value, instruction.type), 8 * DTYPES[instruction.type].itemsize
    _require_constant_field(instruction, position, length, bits)
    up, down = bits - position.value - length.value, bits - length.value
    up, down = np.array([up], values.dtype), np.array([down], values.dtype)
    # shift the field to the top, then down: signed types extend its sign
    return elementwise(machine.target(target, instruction.type), lambda x: x << up >> down, [values])


def _require_constant_field(instruction, position, length, bits):
    fixed = isinstance(position, Immediate) and isinstance(length, Immediate)
    if not fixed or length.value == 0 or position.value + length.value > bits:
        raise NotImplementedError(f"{instruction} with a variable, empty or overlong field is not modelled")


@decodes("bfi")
def _insert_bits(machine, instruction):
    target, inserted, base, position, length = instruction.operands
    type = f"u{instruction.type[1:]}"
    _require_constant_field(instruction, position, length, 8 * DTYPES[type].itemsize)
    mask = np.array([((1 << length.value) - 1) << position.value], DTYPES[type])
    start = np.array([position.value], DTYPES[type])
    sources = [machine.source(inserted, type), machine.source(base, type)]
    return elementwise(machine.target(target, type), lambda f, b: b & ~mask | f << start & mask, sources)


def _bits(values):
    """(numbers, bits) array of bits, lowest first."""
    return np.unpackbits(np.ascontiguousarray(values).view(np.uint8), bitorder="little").reshape(values.size, -1)


def _highest_bit(values):
    bits = _bits(values)[:, ::-1]
    return np.where(bits.any(1), bits.shape[1] - 1 - bits.argmax(1), -1)


BIT_COUNTS = {
    "popc": lambda x: _bits(x).sum(1),
    "clz": lambda x: 8 * x.itemsize - 1 - _highest_bit(x),
    "bfind": _highest_bit,
    "brev": lambda x: np.packbits(_bits(x)[:, ::-1], bitorder="little").view(x.dtype),
}


@decodes(*BIT_COUNTS)
def _count_bits(machine, instruction):
    name, type = instruction.name, instruction.type
    if name == "bfind" and type[0] == "s":
        raise NotImplementedError(f"{instruction} is not modelled")
    into = machine.target(instruction.operands[0], type if name == "brev" else "u32")
    return elementwise(into, BIT_COUNTS[name], [machine.source(instruction.operands[1], f"u{type[1:]}")])
