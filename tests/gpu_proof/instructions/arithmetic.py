"""Integer and floating-point arithmetic, with carries, and the elementary functions.

Floating-point results are rounded once by numpy; a fused multiply-add rounds to float64 first.
"""

import functools

import numpy as np

from gpu_proof.formats import DTYPES, FLOATS, WIDER, flush_subnormals, perturb
from gpu_proof.instructions.decoding import decodes, elementwise, result_modifiers


def float_step(machine, instruction, compute, sources):
    """A step of floating-point arithmetic: read, flush, compute, apply .sat and .relu, round.

    If the instruction names two types, as fma.rn.f32.f16 does, all sources but the last have the second.
    """
    type, *narrow = (modifier for modifier in instruction.modifiers if modifier in FLOATS)
    finish, flush = result_modifiers(instruction), "ftz" in instruction
    if isinstance(compute, np.ufunc) and compute.nin < len(sources):  # max of three sources
        compute = functools.partial(_fold, compute)
    plain = type in ("f32", "f64") and not narrow and not {"ftz", "sat", "relu"} & set(instruction.modifiers)
    if plain and isinstance(compute, np.ufunc):  # fast path: no conversions
        into = machine.target(instruction.operands[0], type)
        return elementwise(into, compute, [machine.source(source, type) for source in sources])
    types = [(narrow or [type])[0]] * (len(sources) - 1) + [type]
    reads = [machine.float_reader(source, type) for source, type in zip(sources, types, strict=True)]
    put = machine.float_writer(instruction.operands[0], type)

    def step(where):
        values = [flush_subnormals(read()) if flush else read() for read in reads]
        put(finish(compute(*values)), where)

    return step


def _fold(ufunc, *values):
    return functools.reduce(ufunc, values)


INTEGER_ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum}
FLOAT_ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax}


@decodes("add", "sub", "min", "max", modifiers="types rn ftz sat cc NaN xorsign abs")
def _arithmetic(machine, instruction):
    name, type, sources = instruction.name, instruction.type, instruction.operands[1:]
    if type in FLOATS:
        compute = FLOAT_ARITHMETIC[name]
        if name in ("min", "max") and "NaN" in instruction:
            compute = INTEGER_ARITHMETIC[name]  # numpy's minimum and maximum propagate NaN
        if "xorsign" in instruction:
            compute = functools.partial(_with_product_sign, compute)
        return float_step(machine, instruction, compute, sources)
    if "cc" in instruction:
        return _with_carry(machine, instruction, name)
    if "sat" in instruction:
        raise NotImplementedError(f"{instruction} is not modelled")
    return elementwise(
        machine.target(instruction.operands[0], type),
        INTEGER_ARITHMETIC[name],
        [machine.source(source, type) for source in sources],
    )


def _with_product_sign(compute, a, b):
    """The smaller or larger magnitude, with the sign of a * b."""
    return np.copysign(compute(np.abs(a), np.abs(b)), np.where(np.signbit(a) != np.signbit(b), -1, 1).astype(a.dtype))


@decodes("addc", "subc", "madc", modifiers="lo hi cc")
def _carry(machine, instruction):
    return _with_carry(machine, instruction, instruction.name)


def _with_carry(machine, instruction, name):
    """32-bit arithmetic that sets the carry flag (.cc) or adds it (addc, subc, madc)."""
    if DTYPES[instruction.type].itemsize != 4 or (instruction.type == "s32" and "hi" in instruction):
        raise NotImplementedError(f"{instruction} is not modelled")
    sources = [machine.source(operand, "u32") for operand in instruction.operands[1:]]
    into, word = machine.target(instruction.operands[0], "u32"), np.uint64(0xFFFFFFFF)

    def total():
        first, second, *added = (source.astype(np.uint64) for source in sources)
        if name.startswith("mad"):
            product = first * second
            return (product >> np.uint64(32) if "hi" in instruction else product & word) + added[0]
        return first + (word - second if name.startswith("sub") else second)

    def step(where):
        result = total()
        if name in ("addc", "madc"):
            result = result + machine.carry
        elif name.startswith("sub"):  # a - b is a + ~b + 1; the carry flag means "no borrow"
            result = result + (machine.carry if name == "subc" else np.uint64(1))
        np.copyto(into, result & word, where=where, casting="unsafe")
        if "cc" in instruction:
            np.copyto(machine.carry, result >> np.uint64(32), where=where)

    return step


@decodes("mul", "mad", modifiers="lo hi wide rn ftz sat cc")
def _multiply(machine, instruction):
    type, operands = instruction.type, instruction.operands
    if type in FLOATS:
        if instruction.name == "mad":
            return _fma(machine, instruction)
        return float_step(machine, instruction, np.multiply, operands[1:])
    if "cc" in instruction:
        return _with_carry(machine, instruction, "mad")
    first, second = (machine.source(operand, type) for operand in operands[1:3])
    result = WIDER[type] if "wide" in instruction else type
    into = machine.target(operands[0], result)
    added = machine.source(operands[3], result) if instruction.name == "mad" else None
    if "hi" in instruction:
        return elementwise(into, _high_product(type, added), [first, second])
    if added is None:
        return elementwise(into, np.multiply, [first, second])
    return _multiply_add(into, first, second, added)


def _multiply_add(into, first, second, added):
    scratch = np.empty(into.shape, into.dtype)

    def step(where):
        np.multiply(first, second, out=scratch, dtype=into.dtype, casting="unsafe")
        np.add(scratch, added, out=into, where=where)

    return step


def _high_product(type, added):
    """The upper half of a product, plus `added` if there is one."""
    bits = DTYPES[type].itemsize * 8

    def high(a, b):
        if bits <= 32:
            wide = np.int64 if type[0] == "s" else np.uint64
            result = a.astype(wide) * b.astype(wide) >> wide(bits)
        else:
            result = _high_64(a.view(np.uint64), b.view(np.uint64))
            if type[0] == "s":  # a negative number read as unsigned is 2**64 too large
                result = result.view(np.int64) - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)
        result = result.astype(DTYPES[type])
        return result if added is None else result + added

    return high


def _high_64(a, b):
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    other = a0 * b1 + (middle & low)
    return a1 * b1 + (middle >> half) + (other >> half)


@decodes("fma", modifiers="types rn ftz sat relu")
def _fma(machine, instruction):
    if instruction.modifiers == ("rn", "f32"):
        return _fma_f32(machine, instruction)

    def fused(a, b, c):
        wide = a.astype(np.float64) * b + c
        return wide if a.dtype == np.float64 else wide.astype(np.float32)

    return float_step(machine, instruction, fused, instruction.operands[1:])


def _fma_f32(machine, instruction):
    """fma.rn.f32, the most frequent kind: float_step without its readers and writers; the sum is formed in float64."""
    first, second, added = (machine.source(operand, "f32") for operand in instruction.operands[1:])
    into, wide = machine.target(instruction.operands[0], "f32"), machine.scratch

    def step(where):
        np.copyto(wide, first)
        np.multiply(wide, second, out=wide)
        np.add(wide, added, out=into, where=where, casting="unsafe")

    return step


@decodes("div", "rem", modifiers="rn full approx ftz")
def _divide(machine, instruction):
    type, sources = instruction.type, instruction.operands[1:]
    if type in FLOATS:
        if "full" in instruction or "approx" in instruction:
            return float_step(machine, instruction, _approximated(machine, np.divide), sources)
        return float_step(machine, instruction, np.divide, sources)

    def divide(a, b):
        ones = np.array(-1).astype(a.dtype)
        remainder = np.fmod(a, np.where(b == 0, ones, b))
        if instruction.name == "rem":
            return np.where(b == 0, a, remainder)
        return np.where(b == 0, ones, (a - remainder) // np.where(b == 0, ones, b))

    values = [machine.source(source, type) for source in sources]
    return elementwise(machine.target(instruction.operands[0], type), divide, values)


@decodes("neg", "abs", "not", "cnot", modifiers="ftz")
def _unary(machine, instruction):
    name, type, source = instruction.name, instruction.type, instruction.operands[1]
    if type in FLOATS:
        return float_step(machine, instruction, {"neg": np.negative, "abs": np.abs}[name], [source])
    values, into = machine.source(source, type), machine.target(instruction.operands[0], type)
    if name == "cnot":
        return elementwise(into, lambda x: x == 0, [values])
    if name == "not":
        return elementwise(into, np.logical_not if type == "pred" else np.invert, [values])
    return elementwise(into, {"neg": np.negative, "abs": np.abs}[name], [values])


@decodes("copysign")
def _copysign(machine, instruction):
    sign, magnitude = instruction.operands[1:]
    return float_step(machine, instruction, np.copysign, [magnitude, sign])


FUNCTIONS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}
# errors by the PTX manual: tanh.approx 2**-11 relative, sin and cos 2**-20.5 absolute, the others 1 or 2 ulps
ULP_FACTORS = {"tanh": 2048, "sin": 4, "cos": 4}


@decodes(*FUNCTIONS, modifiers="approx rn ftz")
def _function(machine, instruction):
    exact = FUNCTIONS[instruction.name]
    compute = _approximated(machine, exact, ULP_FACTORS.get(instruction.name, 1)) if "approx" in instruction else exact
    return float_step(machine, instruction, compute, instruction.operands[1:])


def _approximated(machine, exact, ulp_factor=1):
    """The function in float64, rounded to float32, then perturbed by machine.approx_ulps * ulp_factor."""
    ulps = machine.approx_ulps * ulp_factor

    def compute(*values):
        result = exact(*(value.astype(np.float64) for value in values)).astype(np.float32)
        return perturb(result, ulps) if ulps else result

    return compute
