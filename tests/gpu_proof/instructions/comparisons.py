"""setp: comparisons that set predicates, ordered and unordered for NaN, and combined with another predicate."""

import functools

import numpy as np

from gpu_proof.formats import FLOATS, PACKED, flush_subnormals
from gpu_proof.instructions.decoding import decodes
from gpu_proof.ptx import Pair, Register

ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
OPPOSITE = {
    "equ": "ne",
    "ltu": "ge",
    "leu": "gt",
    "gtu": "le",
    "geu": "lt",
}  # unordered comparisons negate these


def comparison(name, floating):
    """The numpy function of a PTX comparison. Ordered ones are false for NaN, unordered ones (equ, ltu, ...) true."""
    if not floating:
        name = UNSIGNED_NAMES.get(name, name)
        return np.not_equal if name == "ne" else ORDERED[name]
    if name in ORDERED:
        return ORDERED[name]
    if name == "neu":
        return np.not_equal
    if name == "ne":
        return lambda a, b: np.less(a, b) | np.greater(a, b)
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    opposite = comparison(OPPOSITE[name], True)
    return lambda a, b: ~opposite(a, b)


@decodes("setp", modifiers="eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz")
def _setp(machine, instruction):
    type, targets = instruction.type, instruction.operands[0]
    if type in PACKED:
        raise NotImplementedError(f"{instruction} is not modelled")
    compare = comparison(instruction.modifiers[0], type in FLOATS)
    first, second = instruction.operands[1:3]
    if type in FLOATS:
        reads = [machine.float_reader(operand, type) for operand in (first, second)]
        if "ftz" in instruction:
            reads = [lambda read=read: flush_subnormals(read()) for read in reads]
    else:
        unsigned = instruction.modifiers[0] in UNSIGNED_NAMES
        arrays = [machine.source(operand, f"u{type[1:]}" if unsigned else type) for operand in (first, second)]
        reads = [lambda array=array: array for array in arrays]
    combining = next((m for m in instruction.modifiers[1:-1] if m in ("and", "or", "xor")), None)
    plain = isinstance(compare, np.ufunc) and type not in ("f16", "bf16") and "ftz" not in instruction
    if plain and not combining and not isinstance(targets, Pair):
        into = machine.target(targets, "pred")
        return functools.partial(compare, *(read() for read in reads), out=into)
    return _setp_combined(machine, instruction, compare, reads, combining)


def _setp_combined(machine, instruction, compare, reads, combining):
    targets = instruction.operands[0]
    into, other = (targets.first, targets.second) if isinstance(targets, Pair) else (targets, None)
    into = machine.target(into, "pred")
    other = machine.target(other, "pred") if other else None
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, None: lambda a, b: a}[combining]
    operand = instruction.operands[3] if combining else None
    extra = machine.source(Register(operand.name), "pred") if operand else None

    def step(where):
        result = compare(*(read() for read in reads))
        third = ~extra if operand and operand.negated else extra
        negative = combine(~result, third)
        np.copyto(into, combine(result, third), where=where)
        if other is not None:
            np.copyto(other, negative, where=where)

    return step
