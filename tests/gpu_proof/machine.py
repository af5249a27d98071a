"""The executor's state: registers and memories of a batch of CTAs, as one numpy row per register.

Decoders ask the machine for views of their operands once; steps then read and write those views.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from gpu_proof.errors import IllegalDivergence, Misaligned, OutOfBounds
from gpu_proof.formats import DTYPES, PACKED, bf16_to_f32, f32_to_bf16
from gpu_proof.memory import (
    LANES,
    REGION,
    Buffer,
    GlobalAccess,
    GlobalMarks,
    SharedAccess,
    SharedMemory,
    memoize,
    region,
    touched_words,
    typed_views,
    wavefronts,
)
from gpu_proof.ptx import Register, Symbol

FIRST_CONSTANT = 1 << 10  # number of the first buffer of module constants; parameters have lower numbers


@dataclass
class Counts:
    """Counts of a launch, summed over its warps. A request is one warp's access, a sector 32 bytes of global memory."""

    warp_instructions: int = 0
    mma: int = 0  # per warp
    barriers: int = 0  # per CTA
    global_load_requests: int = 0
    global_load_sectors: int = 0
    global_load_bytes: int = 0  # summed over threads
    global_store_requests: int = 0
    global_store_sectors: int = 0
    global_store_bytes: int = 0
    shared_requests: int = 0
    shared_wavefronts: int = 0  # passes through shared memory; bank conflicts add to them
    opcodes: Counter = field(default_factory=Counter)  # warp instructions per opcode


class Machine:
    """Registers and memories of a batch of CTAs, and the kernel's instructions decoded for them."""

    def __init__(self, kernel, ctas, shared_bytes, races, approx_ulps):
        self.kernel, self.ctas, self.races, self.approx_ulps = kernel, ctas, races, approx_ulps
        self.warps_per_cta = kernel.threads // LANES
        self.threads = count = ctas * kernel.threads
        self.thread = np.arange(count)
        self.lane = self.thread % LANES
        self.warp = self.thread // LANES
        self.cta = self.thread // kernel.threads
        self.marks = GlobalMarks(self.warp, self.cta)
        self.buffers, self.counts = {}, Counts()
        self._allocate_registers()
        self._place_variables(shared_bytes)
        self.parameters = {parameter.name: np.zeros(1, np.uint64) for parameter in kernel.parameters}
        self.carry = np.zeros(count, np.uint64)
        self.live = np.ones(count, bool)  # threads that have not returned
        self.scratch = np.empty(count, np.float64)  # scratch for the steps
        self.transfers, self.commits = [], np.zeros(count, np.int64)  # cp.async in flight; groups committed per thread

    def _allocate_registers(self):
        names = {}
        for prefix, (type, number) in self.kernel.registers.items():
            names |= {f"{prefix}{i}" if number else prefix: type for i in range(number or 1)}
        sizes = Counter(names.values())
        self.files = {type: np.empty((size, self.threads), DTYPES[type]) for type, size in sizes.items()}
        rows = Counter()
        self.registers = {}  # name -> (its file's type, row)
        for name, type in names.items():
            self.registers[name] = (type, rows[type])
            rows[type] += 1
        in_cta = (self.thread % self.kernel.threads).astype(np.uint32)
        zero, one = np.zeros(1, np.uint32), np.ones(1, np.uint32)
        self.cta_ids = np.zeros((3, self.threads), np.uint32)
        self.grid_size = np.ones((3, 1), np.uint32)
        self.special = {"%tid.x": in_cta, "%tid.y": zero, "%tid.z": zero, "%ntid.y": one, "%ntid.z": one}
        self.special |= {"%ntid.x": one * np.uint32(self.kernel.threads), "%laneid": self.lane.astype(np.uint32)}
        self.special |= {"%warpid": in_cta // np.uint32(LANES)}
        for axis, letter in enumerate("xyz"):
            self.special[f"%ctaid.{letter}"] = self.cta_ids[axis]
            self.special[f"%nctaid.{letter}"] = self.grid_size[axis]

    def _place_variables(self, shared_bytes):
        """Give every variable an address; the dynamic shared block comes after the static ones."""
        self.variables, self.constants, self.keep_alive = {}, {}, []
        offset = 0
        for name, size in sorted(self.kernel.shared.items(), key=lambda item: item[1] is None):
            self.variables[name] = offset
            offset += -(-(size or 0) // 16) * 16
        self.shared = SharedMemory(offset + shared_bytes, self.ctas, _granule(self.kernel))
        offset = 0
        for name, size in self.kernel.local.items():
            self.variables[name] = offset
            offset += -(-size // 16) * 16
        self.local_stride = offset
        self.local = typed_views(np.zeros(offset * self.threads, np.uint8))
        for number, (name, data) in enumerate(self.kernel.constants.items(), start=FIRST_CONSTANT):
            tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            self.constants[number] = Buffer.of(name, tensor)
            self.variables[name] = region(number) + tensor.data_ptr() % 32
            self.keep_alive.append(tensor)

    # Operands

    def source(self, operand, type):
        """An operand's values as the dtype of `type`: a view of its register, or a constant of one element."""
        dtype = DTYPES[type]
        if isinstance(operand, Register):
            if operand.negated:
                raise NotImplementedError(f"{operand} as an operand is not modelled")
            return self._view(self._row(operand.name), dtype)
        if isinstance(operand, Symbol):
            return np.array([self.variables[operand.name]], np.uint64).astype(dtype)
        if type == "pred":
            return np.array([operand.value != 0])
        return np.array([operand.value & (1 << 64) - 1], np.uint64).view(dtype)[:1]

    def _row(self, name):
        if name in self.special:
            return self.special[name]
        if name not in self.registers:
            raise NotImplementedError(f"the register {name} is not modelled")
        file, row = self.registers[name]
        return self.files[file][row]

    @staticmethod
    def _view(row, dtype):
        if row.dtype == dtype:
            return row
        if "b" in (dtype.kind, row.dtype.kind) or row.itemsize < dtype.itemsize:
            raise NotImplementedError(f"a register of {row.dtype} as {dtype} is not modelled")
        return row.view(dtype)[:: row.itemsize // dtype.itemsize]  # the low bytes

    def target(self, operand, type):
        """A writable view of the register that an operand names: the kind of `type`, at the register's own width."""
        if isinstance(operand, Symbol) or operand is None:  # "_" drops the result
            return np.empty(self.threads, DTYPES[type])
        row, dtype = self._row(operand.name), DTYPES[type]
        if row.itemsize == dtype.itemsize:
            return row.view(dtype)
        return row.view(np.dtype(f"{dtype.kind}{row.itemsize}"))

    def row_numbers(self, operands, file="b32"):
        """The rows of a list of registers in their register file."""
        rows = [self.registers[operand.name] for operand in operands]
        if any(type != file for type, _ in rows):
            raise NotImplementedError(f"expected registers of type {file}")
        return np.array([row for _, row in rows])

    def float_reader(self, operand, type):
        """A function () that returns an operand's values for arithmetic. Packed types have two columns."""
        view = _columns(self.source(operand, type), type)
        if type.startswith("bf16"):
            return lambda: bf16_to_f32(view)
        return (lambda: view.astype(np.float32)) if type.startswith("f16") else (lambda: view)

    def float_writer(self, operand, type):
        """A function (values, where) that rounds values to `type` and writes them to an operand."""
        view = _columns(self.target(operand, type), type)
        encode = f32_to_bf16 if type.startswith("bf16") else lambda values: values

        def put(values, where):
            mask = where[:, None] if type in PACKED and where is not True else where
            np.copyto(view, encode(values), where=mask, casting="unsafe")

        return put

    def address(self, operand):
        """The register row that a memory operand depends on, and a function () that returns the addresses as int64."""
        base, offset = operand.base, operand.offset
        if not isinstance(base, Register):
            value = self.source(base, "u64").astype(np.int64) + offset
            constant = np.broadcast_to(value, self.threads).copy()
            return value, lambda: constant
        row = self._row(base.name)
        if row.itemsize == 4:
            return row, lambda: row.astype(np.int64) + offset
        signed = row.view(np.int64)
        return row, (lambda: signed + offset) if offset else (lambda: signed)

    def memoized_access(self, operand, resolve):
        """A function (where) that returns resolve(addresses, where) for a memory operand, cached by both."""
        row, addresses = self.address(operand)
        look_up = memoize(lambda where: resolve(addresses(), where))
        return lambda where: look_up(row, where)

    # Convergence

    def warp_check(self, instruction):
        """A function (where) that raises IllegalDivergence if only part of a warp is active."""

        def check(where):
            if where is True:
                return
            missing = (where != where.reshape(-1, LANES).any(1).repeat(LANES)) & self.live
            if missing.any():
                raise IllegalDivergence(f"{instruction}: only part of a warp arrives")

        return check

    def active(self, where):
        """The numbers of the active threads."""
        return self.thread if where is True else np.flatnonzero(where)

    # Accesses

    def global_access(self, addresses, where, size, instruction):
        """Resolve addresses in global memory to a list of GlobalAccess, one per buffer."""
        threads = self.active(where)
        addresses = addresses[threads]
        if (addresses % size).any():
            raise Misaligned(f"{instruction}: an address is not a multiple of {size}")
        buffers = addresses // REGION - 1
        return [
            self._access_to(number, threads[buffers == number], addresses[buffers == number], size)
            for number in np.unique(buffers).tolist()
        ]

    def _access_to(self, number, threads, addresses, size):
        offsets = addresses - region(number)
        warps, sectors = self.warp[threads], offsets // 32 - offsets.min() // 32
        return GlobalAccess(
            threads=threads,
            buffer=number,
            offsets=offsets,
            index=offsets // size,
            low=int(offsets.min()),
            high=int(offsets.max()) + size,
            requests=np.unique(warps).size,
            sectors=np.unique(warps * (int(sectors.max()) + 1) + sectors).size,
        )

    def checked_buffer(self, access, size, instruction):
        """The buffer of an access. Raises OutOfBounds if the access is outside every tensor of this launch."""
        buffer = self.buffers.get(access.buffer)
        if buffer is None:
            raise OutOfBounds(f"{instruction}: {access.threads.size} threads use an address outside every tensor")
        buffer.check(access, size, instruction)
        return buffer

    def shared_access(self, addresses, where, size, instruction):
        """Resolve addresses in shared memory to a SharedAccess, with its bank conflicts counted."""
        threads = self.active(where)
        offsets = addresses[threads]
        if offsets.min() < 0 or offsets.max() + size > self.shared.size:
            raise OutOfBounds(f"{instruction}: outside the {self.shared.size} bytes of shared memory")
        if (offsets % size).any():
            raise Misaligned(f"{instruction}: an address in shared memory is not a multiple of {size}")
        access, warps = self.uncounted_shared_access(threads, offsets, size), self.warp[threads]
        passes = wavefronts((self.cta[threads] * self.shared.stride + offsets) // 4, warps, self.lane[threads], size)
        return replace(access, requests=np.unique(warps).size, wavefronts=passes)

    def uncounted_shared_access(self, threads, offsets, size):
        """A SharedAccess at offsets that have been checked, with its counts left at 0."""
        flat = self.cta[threads] * self.shared.stride + offsets
        in_cta = self.warp[threads] % self.warps_per_cta
        words, owners, many_warps = touched_words(flat, in_cta, size, self.shared.granule)
        return SharedAccess(threads, offsets, flat // size, words, owners, many_warps)

    def count_shared(self, access):
        self.counts.shared_requests += access.requests
        self.counts.shared_wavefronts += access.wavefronts

    def count_load(self, access, width):
        self.counts.global_load_requests += access.requests
        self.counts.global_load_sectors += access.sectors
        self.counts.global_load_bytes += access.threads.size * width

    def count_store(self, access, width):
        self.counts.global_store_requests += access.requests
        self.counts.global_store_sectors += access.sectors
        self.counts.global_store_bytes += access.threads.size * width


def _columns(view, type):
    """Packed numbers as two columns, the lower half first; other types unchanged."""
    return view.view(PACKED[type]).reshape(-1, 2) if type in PACKED else view


def _granule(kernel):
    """Bytes per mark of shared memory: the smallest size that the kernel loads or stores, at most 4."""
    sizes = [4]
    for instruction in kernel.instructions:
        if instruction.name in ("ld", "st") and "shared" in instruction:
            sizes.append(DTYPES[instruction.type].itemsize)
    return min(sizes)
