"""Loads, stores and atomics in global, shared and local memory.

Each step resolves its addresses, checks bounds, counts the access, checks for races with other warps (shared memory) or
threads (global memory) since the last barrier, and only then moves data. The generic address space is not modelled.
"""

import contextlib

import numpy as np

from gpu_proof.errors import BarrierRace, OutOfBounds
from gpu_proof.formats import DTYPES, UNSIGNED
from gpu_proof.instructions.decoding import decodes
from gpu_proof.memory import ATOMIC, MANY_WARPS, UNTOUCHED
from gpu_proof.ptx import Vector

# scopes, memory orders and cache hints: no effect here, where every access is visible to all threads at once
ACCESS = "cta gpu sys volatile relaxed acquire release acq_rel ca cg cs lu cv wb wt L1 L2 cache_hint 64B 128B 256B "
ACCESS += "evict_first evict_last evict_normal evict_unchanged no_allocate"


@decodes("ld", "ldu", modifiers=f"param global shared local nc v2 v4 v8 {ACCESS}")
def _load(machine, instruction):
    type = instruction.type
    target, address = instruction.operands[:2]
    targets = target.items if isinstance(target, Vector) else (target,)
    into = [machine.target(operand, type) for operand in targets]
    if "param" in instruction:
        return _load_parameter(machine, address, into[0], type)
    size, dtype = DTYPES[type].itemsize, DTYPES[type]
    if "global" in instruction:
        return _load_global(machine, instruction, address, into, size, dtype)
    if "shared" in instruction:
        return _load_shared(machine, instruction, address, into, size, dtype)
    if "local" in instruction:
        return _local(machine, instruction, address, into, size, dtype, loads=True)
    raise NotImplementedError(f"{instruction}: the generic address space is not modelled")


def _load_parameter(machine, address, into, type):
    values = machine.parameters[address.base.name].view(DTYPES[type])[:1]
    return lambda where: np.copyto(into, values, where=where)


def _load_global(machine, instruction, address, into, size, dtype):
    width, count = size * len(into), len(into)
    resolve = machine.memoized_access(address, lambda a, where: machine.global_access(a, where, width, instruction))

    def step(where):
        for access in resolve(where):
            buffer = machine.checked_buffer(access, width, instruction)
            view = buffer.views[size]
            machine.count_load(access, width)
            if machine.races:
                machine.marks.check_read(access, buffer, width, instruction)
            index = access.index * count
            for i, register in enumerate(into):
                register[access.threads] = view[index + i].view(dtype)

    return step


def _load_shared(machine, instruction, address, into, size, dtype):
    width, count = size * len(into), len(into)
    shared = machine.shared
    view = shared.views[size].view(dtype)

    def locate(addresses, where):
        access = machine.shared_access(addresses, where, width, instruction)
        return access, [access.index * count + i for i in range(count)]

    resolve = machine.memoized_access(address, locate)

    def step(where):
        access, indices = resolve(where)
        machine.count_shared(access)
        if machine.races:
            shared.check_read(access, instruction)
        for register, index in zip(into, indices, strict=True):
            if where is True:
                register[:] = view[index]
            else:
                register[access.threads] = view[index]

    return step


def _local(machine, instruction, address, registers, size, dtype, loads):
    """A load or store of local memory, which is private to each thread: only bounds are checked."""
    (_, addresses), view = machine.address(address), machine.local[size].view(dtype)
    stride = machine.local_stride

    def step(where):
        threads = machine.active(where)
        offsets = addresses()[threads]
        if offsets.min() < 0 or offsets.max() + size * len(registers) > stride:
            raise OutOfBounds(f"{instruction}: outside the thread's {stride} bytes of local memory")
        index = (threads * stride + offsets) // size
        for i, register in enumerate(registers):
            if loads:
                register[threads] = view[index + i]
            else:
                view[index + i] = np.broadcast_to(register, machine.threads)[threads]

    return step


@decodes("st", modifiers=f"global shared local v2 v4 v8 {ACCESS}")
def _store(machine, instruction):
    address, source = instruction.operands[:2]
    type = instruction.type
    sources = source.items if isinstance(source, Vector) else (source,)
    values = [np.broadcast_to(machine.source(operand, type), machine.threads) for operand in sources]
    size, dtype = DTYPES[type].itemsize, DTYPES[type]
    if "local" in instruction:
        return _local(machine, instruction, address, values, size, dtype, loads=False)
    width, count = size * len(values), len(values)
    if "shared" in instruction:
        return _store_shared(machine, instruction, address, values, size)
    if "global" not in instruction:
        raise NotImplementedError(f"{instruction}: the generic address space is not modelled")
    resolve = machine.memoized_access(address, lambda a, where: machine.global_access(a, where, width, instruction))

    def step(where):
        for access in resolve(where):
            buffer = machine.checked_buffer(access, width, instruction)
            view = buffer.views[size].view(dtype)
            machine.count_store(access, width)
            index = access.index * count
            checked = machine.marks.race_checked_write(access, buffer, width, instruction)
            with checked if machine.races else contextlib.nullcontext():
                for i, register in enumerate(values):
                    view[index + i] = register[access.threads]

    return step


def _store_shared(machine, instruction, address, values, size):
    width, count = size * len(values), len(values)
    values = [value.view(UNSIGNED[size]) for value in values]
    view = machine.shared.views[size]
    resolve = machine.memoized_access(address, lambda a, where: machine.shared_access(a, where, width, instruction))

    def step(where):
        access = resolve(where)
        machine.count_shared(access)
        pieces = [(access.index * count + i, value[access.threads]) for i, value in enumerate(values)]
        with race_checked_write(machine, access, instruction):
            for index, data in pieces:
                view[index] = data
        if access.many_warps.any():
            for index, data in pieces:
                if (view[index] != data).any() and _warps_disagree(machine.warp[access.threads], index, data):
                    raise BarrierRace(f"{instruction}: warps write different values to one address")

    return step


def _warps_disagree(warps, index, values):
    """Whether several warps write one element and do not all write the same set of values.

    Warps that hold copies of the same data all store it. Lanes of one warp may differ by a rounding (a sum over lanes
    with fused multiply-adds depends on the lane), and PTX does not define which lane's value remains.
    """
    warp_writes = np.unique(np.stack([index, warps, values.astype(np.int64)]), axis=1)
    element_values, copies = np.unique(warp_writes[[0, 2]], axis=1, return_counts=True)
    _, writers = np.unique(np.unique(warp_writes[:2], axis=1)[0], return_counts=True)
    return (copies != writers[np.unique(element_values[0], return_inverse=True)[1]]).any()


@contextlib.contextmanager
def race_checked_write(machine, access, instruction):
    """Around a write to shared memory: raise BarrierRace if another warp accessed a word since the last barrier.

    Writing the value that is already there is no race: in Triton's code, warps that hold the same value each store it.
    """
    if not machine.races:
        yield
        return
    shared = machine.shared
    contested = shared.check_write(access, instruction)
    words = access.words[contested]
    before = shared.words[words]
    yield
    if (shared.words[words] != before).any():
        raise BarrierRace(f"{instruction}: overwrites memory that another warp wrote, without a barrier")
    shared.mark_written(access.words, access.owners)
    shared.mark_written(words, MANY_WARPS)


ATOMICS = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
}


@decodes("atom", "red", modifiers=f"global shared add min max and or xor exch cas noftz {ACCESS}")
def _atomic(machine, instruction):
    """Atomics, executed one thread after the other."""
    operands, returns = list(instruction.operands), instruction.name == "atom"
    type, name = instruction.type, next(m for m in instruction.modifiers if m in (*ATOMICS, "cas"))
    if type not in DTYPES or type in ("bf16", "f16x2", "bf16x2") or any(m in instruction for m in ("v2", "v4", "v8")):
        raise NotImplementedError(f"{instruction} is not modelled")
    into = machine.target(operands.pop(0), type) if returns else None
    resolve = _atomic_access(machine, instruction, operands.pop(0), DTYPES[type])
    operands = operands[: 2 if name == "cas" else 1]
    values = [np.broadcast_to(machine.source(operand, type), machine.threads) for operand in operands]

    def step(where):
        for view, threads, index in resolve(where):
            for thread, i in zip(threads.tolist(), index.tolist(), strict=True):
                old, new = view[i], values[-1][thread]
                if name == "cas":
                    view[i] = new if old == values[0][thread] else old
                else:
                    view[i] = ATOMICS[name](old, new)
                if returns:
                    into[thread] = old

    return step


def _atomic_access(machine, instruction, address, dtype):
    """A function (where) that yields (view, threads, index) of an atomic and counts it as a load and a store."""
    size, shared = dtype.itemsize, machine.shared
    in_shared = machine.memoized_access(address, lambda a, where: machine.shared_access(a, where, size, instruction))
    in_global = machine.memoized_access(address, lambda a, where: machine.global_access(a, where, size, instruction))

    def resolve_shared(where):
        access = in_shared(where)
        machine.count_shared(access)
        if machine.races:
            touched = np.maximum(shared.written[access.words], shared.read[access.words])
            if ((touched != UNTOUCHED) & (touched != ATOMIC) & (touched != access.owners)).any():
                raise BarrierRace(f"{instruction}: conflicts with another warp's access, without a barrier")
            shared.mark_written(access.words, ATOMIC)
        yield shared.views[size].view(dtype), access.threads, access.index

    def resolve_global(where):
        for access in in_global(where):
            machine.count_load(access, size)
            machine.count_store(access, size)
            buffer = machine.checked_buffer(access, size, instruction)
            yield buffer.views[size].view(dtype), access.threads, access.index

    return resolve_shared if "shared" in instruction else resolve_global
