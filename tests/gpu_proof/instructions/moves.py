"""mov, cvt, selp and prmt: moves, conversions, selection of values and of bytes."""

import numpy as np

from gpu_proof.formats import DTYPES, FLOATS, UNSIGNED, f32_to_bf16, f32_to_tf32
from gpu_proof.instructions.decoding import decodes, elementwise, result_modifiers
from gpu_proof.ptx import Vector


@decodes("mov", "cvta", modifiers="to global shared local")
def _mov(machine, instruction):
    target, source = instruction.operands
    type = instruction.type
    if isinstance(target, Vector) or isinstance(source, Vector):
        return _mov_vector(machine, target, source, type)
    into, values = machine.target(target, type), machine.source(source, type)
    return lambda where: np.copyto(into, values, where=where)


def _mov_vector(machine, target, source, type):
    """Unpack a register into a vector of parts or pack one, low part first."""
    if isinstance(target, Vector):
        parts, whole = target.items, machine.source(source, type)
    else:
        parts, whole = source.items, machine.target(target, type)
    size = whole.itemsize // len(parts)
    pieces = whole.view(UNSIGNED[size]).reshape(-1, len(parts))
    kind = f"b{8 * size}"
    if isinstance(target, Vector):
        moves = [(machine.target(part, kind), pieces[:, i]) for i, part in enumerate(parts)]
    else:
        moves = [(pieces[:, i], machine.source(part, kind)) for i, part in enumerate(parts)]

    def step(where):
        for into, values in moves:
            np.copyto(into, values, where=where)

    return step


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@decodes("cvt", modifiers="types rn rz rm rp rna rni rzi rmi rpi ftz sat relu")
def _cvt(machine, instruction):
    to, source = instruction.modifiers[-2:]
    if to in ("f16x2", "bf16x2"):  # two float32 sources, the upper half first
        high, low = (machine.float_reader(operand, source) for operand in instruction.operands[1:3])
        put = machine.float_writer(instruction.operands[0], to)
        finish = result_modifiers(instruction)
        return lambda where: put(finish(np.stack(np.broadcast_arrays(low(), high()), -1)), where)
    if source not in FLOATS and to not in FLOATS:
        return _cvt_integers(machine, instruction, to, source)
    integers = machine.source(instruction.operands[1], source)
    read = machine.float_reader(instruction.operands[1], source) if source in FLOATS else lambda: integers
    rounding = next((ROUNDINGS[m] for m in instruction.modifiers if m in ROUNDINGS), None)
    if to in FLOATS or to == "tf32":
        return _cvt_to_float(machine, instruction, to, read, rounding)
    into, limits = machine.target(instruction.operands[0], to), np.iinfo(DTYPES[to])

    def step(where):
        values = rounding(read()).astype(np.float64)
        whole = np.where(np.isnan(values), 0, np.clip(values, float(limits.min), float(limits.max)))
        # float64 cannot represent the largest 64-bit integers
        whole = np.where(values >= float(limits.max), limits.max, whole.astype(DTYPES[to]))
        np.copyto(into, whole, where=where, casting="unsafe")

    return step


def _cvt_integers(machine, instruction, to, source):
    values, into = machine.source(instruction.operands[1], source), machine.target(instruction.operands[0], to)
    narrow = DTYPES[to]
    if "sat" in instruction:
        limits = np.iinfo(narrow)

        def convert(x):
            return np.clip(x.astype(object), limits.min, limits.max).astype(narrow)

        return elementwise(into, convert, [values])
    if into.dtype == narrow:
        return lambda where: np.copyto(into, values, where=where, casting="unsafe")
    return lambda where: np.copyto(into, values.astype(narrow), where=where, casting="unsafe")


def _cvt_to_float(machine, instruction, to, read, rounding):
    finish = result_modifiers(instruction)
    toward_zero = "rz" in instruction
    if to == "tf32":
        into = machine.target(instruction.operands[0], "f32")
        return lambda where: np.copyto(into, f32_to_tf32(read(), away="rna" in instruction), where=where)
    if to == "bf16" and toward_zero:
        into = machine.target(instruction.operands[0], to)
        return lambda where: np.copyto(into, f32_to_bf16(read(), toward_zero=True), where=where)
    if toward_zero or "rm" in instruction or "rp" in instruction:
        raise NotImplementedError(f"{instruction} is not modelled")
    put = machine.float_writer(instruction.operands[0], to)
    if rounding:
        return lambda where: put(finish(rounding(read())), where)
    return lambda where: put(finish(read()), where)


@decodes("selp")
def _selp(machine, instruction):
    target, yes, no, choice = instruction.operands
    type = instruction.type
    sources = [machine.source(choice, "pred"), machine.source(yes, type), machine.source(no, type)]
    return elementwise(machine.target(target, type), np.where, sources)


@decodes("prmt")
def _prmt(machine, instruction):
    if instruction.modifiers != ("b32",):
        raise NotImplementedError(f"{instruction} is not modelled")
    target, low, high, selector = instruction.operands
    sources = [machine.source(operand, "b32") for operand in (low, high, selector)]

    def permute(low, high, selector):
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        result = np.zeros(machine.threads, np.uint64)
        for i in range(4):
            choice = (selector >> np.uint32(4 * i) & np.uint32(0xF)).astype(np.uint64)
            byte = both >> ((choice & np.uint64(7)) * np.uint64(8)) & np.uint64(0xFF)
            signs = (byte >> np.uint64(7)) * np.uint64(0xFF)
            result |= np.where(choice & np.uint64(8), signs, byte) << np.uint64(8 * i)
        return result

    return elementwise(machine.target(target, "b32"), permute, sources)
