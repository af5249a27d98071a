"""ldmatrix, stmatrix and mma: matrix tiles spread over the lanes of a warp.

mma sums in float64, which is exact here, and rounds once.
"""

import functools

import numpy as np

from gpu_proof.formats import DTYPES, bf16_to_f32
from gpu_proof.instructions.accesses import race_checked_write
from gpu_proof.instructions.decoding import decodes
from gpu_proof.memory import LANES


def _matrix_rows(machine, instruction, address, count):
    """A function (where) that returns the access and the addresses of 8 rows of 16 bytes per matrix.

    Lane i of a warp gives the address of row i; lanes beyond 8 * count give none.
    """
    addressing = machine.lane < 8 * count

    def rows(addresses, where):
        access = machine.shared_access(addresses, addressing & where, 16, instruction)
        flat = np.zeros(machine.threads, np.int64)
        flat[access.threads] = machine.cta[access.threads] * machine.shared.stride + access.offsets
        return access, flat.reshape(-1, LANES)[:, : 8 * count].reshape(-1, count, 8)  # (warps, matrices, rows)

    return machine.memoized_access(address, rows)


@decodes("ldmatrix", modifiers="sync aligned m8n8 x1 x2 x4 trans shared cta")
def _ldmatrix(machine, instruction):
    count = next(int(m[1:]) for m in instruction.modifiers if m in ("x1", "x2", "x4"))
    _require_16_bit(instruction)
    registers = machine.row_numbers(instruction.operands[0].items)
    resolve = _matrix_rows(machine, instruction, instruction.operands[1], count)
    shared, file, check_warps = machine.shared, machine.files["b32"], machine.warp_check(instruction)
    gather = _gather_transposed if "trans" in instruction else _gather

    def step(where):
        check_warps(where)
        access, rows = resolve(where)
        machine.count_shared(access)
        if machine.races:
            shared.check_read(access, instruction)
        values = gather(shared, rows)
        file[registers] = values if where is True else np.where(where, values, file[registers])

    return step


def _require_16_bit(instruction):
    if "m8n8" not in instruction or instruction.type != "b16":
        raise NotImplementedError(f"{instruction} is not modelled")


_LANE = np.arange(LANES)


def _gather(shared, rows):
    """Lane l gets elements 2 * (l % 4) and 2 * (l % 4) + 1 of row l // 4."""
    index = rows[:, :, _LANE // 4] // 4 + _LANE % 4  # (warps, matrices, lanes)
    return shared.views[4][index].transpose(1, 0, 2).reshape(rows.shape[1], -1)


def _gather_transposed(shared, rows):
    """Lane l gets element l // 4 of row 2 * (l % 4) and of the next row."""
    low = shared.views[2][rows[:, :, _LANE % 4 * 2] // 2 + _LANE // 4].astype(np.uint32)
    high = shared.views[2][rows[:, :, _LANE % 4 * 2 + 1] // 2 + _LANE // 4].astype(np.uint32)
    return (low | high << np.uint32(16)).transpose(1, 0, 2).reshape(rows.shape[1], -1)


@decodes("stmatrix", modifiers="sync aligned m8n8 x1 x2 x4 trans shared cta")
def _stmatrix(machine, instruction):
    count = next(int(m[1:]) for m in instruction.modifiers if m in ("x1", "x2", "x4"))
    _require_16_bit(instruction)
    registers = machine.row_numbers(instruction.operands[1].items)
    resolve = _matrix_rows(machine, instruction, instruction.operands[0], count)
    file, halves, check_warps = machine.files["b32"], machine.shared.views[2], machine.warp_check(instruction)

    def step(where):
        check_warps(where)
        access, rows = resolve(where)
        machine.count_shared(access)
        values = file[registers].reshape(count, -1, LANES).transpose(1, 0, 2)  # (warps, matrices, lanes)
        if where is not True:
            chosen = where.reshape(-1, LANES).any(1)
            rows, values = rows[chosen], values[chosen]
        low, high = (values & np.uint32(0xFFFF)).astype(np.uint16), (values >> np.uint32(16)).astype(np.uint16)
        with race_checked_write(machine, access, instruction):
            if "trans" in instruction:
                halves[rows[:, :, _LANE % 4 * 2] // 2 + _LANE // 4] = low
                halves[rows[:, :, _LANE % 4 * 2 + 1] // 2 + _LANE // 4] = high
            else:
                index = rows[:, :, _LANE // 4] // 2 + _LANE % 4 * 2
                halves[index], halves[index + 1] = low, high

    return step


MMA_INPUTS = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4}  # elements per register


@decodes("mma", modifiers="types sync aligned row col satfinite m16n8k4 m16n8k8 m16n8k16 m16n8k32")
def _mma(machine, instruction):
    """D = A B + C for tiles of 16 rows and 8 columns, spread over the lanes of a warp."""
    shape = next(m for m in instruction.modifiers if m.startswith("m16n8k")) if "m16n8" in instruction.opcode else None
    type_d, type_a, type_b, type_c = instruction.modifiers[-4:]
    supported = type_a in MMA_INPUTS and type_a == type_b and type_d in ("f32", "s32") and type_c == type_d
    if shape is None or not supported:
        raise NotImplementedError(f"{instruction} is not modelled")
    depth, per_register = int(shape[6:]), MMA_INPUTS[type_a]
    d, a, b, c = (machine.row_numbers(operand.items) for operand in instruction.operands)
    index_a, index_b = _operand_indices(machine, depth, per_register)
    index_d = _result_indices(machine)
    words, check_warps = machine.files["b32"], machine.warp_check(instruction)
    results = words.view(DTYPES[type_d])
    unpack = functools.partial(_unpack_mma, type_a)

    def step(where):
        check_warps(where)
        left, right = unpack(words[a])[index_a], unpack(words[b])[index_b]  # (warps, 16, depth), (warps, depth, 8)
        product = np.matmul(left, right).reshape(-1)[index_d]
        total = product + results[c]
        total = (np.clip(total, -(2**31), 2**31 - 1) if "satfinite" in instruction else total).astype(results.dtype)
        results[d] = total if where is True else np.where(where, total, results[d])

    return step


def _unpack_mma(type, words):
    """Unpack the elements in registers to float64; tf32 is the upper 19 bits of a float32."""
    words = words.ravel()
    if type == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if type == "bf16":
        return bf16_to_f32(words.view(np.uint16)).astype(np.float64)
    return words.view({"f16": np.float16, "s8": np.int8, "u8": np.uint8}[type]).astype(np.float64)


def _operand_indices(machine, depth, per_register):
    """Indices of A[row, k] and B[k, column] among the unpacked elements of a register list, for each warp."""
    group = 4 * per_register  # columns held in one register by the four lanes of a row
    first_lane = (np.arange(machine.threads // LANES) * LANES)[:, None, None]
    k = np.arange(depth)

    def index(register, lane):
        return (register * machine.threads + first_lane + lane) * per_register + (k % per_register)[:, None].T

    row, column = np.arange(16)[:, None], np.arange(8)[:, None]
    lane = k % group // per_register
    index_a = index(row // 8 + 2 * (k // group), row % 8 * 4 + lane)
    index_b = index(k // group, column * 4 + lane)  # (warps, 8, depth)
    return index_a, index_b.transpose(0, 2, 1)


def _result_indices(machine):
    """For each register of D and each thread: its index in a flat (warps, 16, 8)."""
    register = np.arange(4)[:, None]
    row, column = machine.lane // 4 + 8 * (register // 2), machine.lane % 4 * 2 + register % 2
    return machine.warp * 128 + row * 8 + column
