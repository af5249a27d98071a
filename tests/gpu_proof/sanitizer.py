"""Check and count every memory access of interpreted Triton kernels.

Each tensor argument of a launch gets a virtual address far from all others, which is translated back at each access. So
a pointer can be traced to the argument that it was computed from, even out of bounds, and even if two arguments share
memory. For an argument on the meta device, which may be larger than memory, only bounds are checked: its stores are
dropped, and its loads return `other`, or poison without one.

Used only in a process that interprets (see process.py).
"""

import contextlib
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.jit import mangle_type

SECTOR = 32  # bytes of the smallest transfer of a GPU's memory
SPACING = 40  # bits of the virtual address range of one argument
NO_PROGRAM, MANY_PROGRAMS = 0, -1  # in the marks of a grain; otherwise a program's number + 1


class OutOfBounds(AssertionError):
    """An active lane accessed bytes outside the elements of the argument that its pointer was computed from."""


class ProgramRace(AssertionError):
    """The result of a launch depends on the order of its programs, or of the lanes of one store."""


@dataclass
class BytesMoved:
    """Bytes that one launch loaded from, or stored to, one argument."""

    requested: int = 0  # summed over the lanes of all accesses
    unique: int = 0  # each byte counted once
    sectors: int = 0  # distinct 32-byte sectors accessed


@dataclass
class Traffic:
    """Memory traffic of one launch on one argument. Atomic operations count as load and store."""

    loaded: BytesMoved = field(default_factory=BytesMoved)
    stored: BytesMoved = field(default_factory=BytesMoved)


@dataclass
class LaunchTraffic:
    """Memory traffic of one launch, by the name of the kernel's argument."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Traffic]

    @property
    def requested(self):
        """Bytes requested by all lanes of all accesses."""
        return sum(traffic.loaded.requested + traffic.stored.requested for traffic in self.arguments.values())


@contextlib.contextmanager
def sanitized(checks=True, races=True, last_program_only=False):
    """Check and count each interpreted launch inside the block.

    Args:
        checks: False only counts, for launches too large to check.
        races:  False skips the check that programs do not overlap, which needs 8 bytes per element.
        last_program_only: run only the last program of each launch, for grids too large to run.

    Yields:
        a list that gets a LaunchTraffic after each launch.

    Raises:
        OutOfBounds, ProgramRace: in place of triton's InterpreterError, when they are its cause.
    """
    sanitizer = _Sanitizer(checks, checks and races, last_program_only)
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in sanitizer.hooks():
            stack.enter_context(mock.patch.object(owner, name, replacement))
        try:
            yield sanitizer.launches
        except InterpreterError as error:
            raise _cause(error) from None


def _cause(error):
    """The OutOfBounds or ProgramRace behind an InterpreterError, or else the error itself."""
    cause = error
    while cause is not None and not isinstance(cause, (OutOfBounds, ProgramRace)):
        cause = cause.__cause__
    return cause or error


class _Sanitizer:
    def __init__(self, checks, races, last_program_only):
        self.checks = checks
        self.races = races
        self.last_program_only = last_program_only
        self.launches = []
        # state of the current launch:
        self.kernel, self.grid = "", ()
        self.names = {}  # id of a tensor -> the kernel's name for it
        self.arguments = []  # in the order of their virtual addresses
        self.storages = {}  # address -> _Storage

    def hooks(self):
        """(object, attribute, replacement) for each function of the interpreter to patch."""
        builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
        launch, to_host, convert = executor.__call__, executor._init_args_hst, interpreter._implicit_cvt
        load, store = builder.create_masked_load, builder.create_masked_store
        update, swap = builder.create_atomic_rmw, builder.create_atomic_cas
        set_program = builder.set_grid_idx

        def call_launch(executor, *args, **kwargs):
            self.kernel, self.grid = executor.fn.__name__, executor.grid
            self.names, self.arguments, self.storages = {}, [], {}
            if self.last_program_only:
                executor.grid = (1,)
            launch(executor, *args, **kwargs)
            traffic = {argument.name: argument.traffic() for argument in self.arguments}
            self.launches.append(LaunchTraffic(self.kernel, tuple(builder.grid_dim), traffic))

        def set_last_program(*_):
            builder.set_grid_dim(*self.grid, *(1,) * (3 - len(self.grid)))
            set_program(*(n - 1 for n in builder.grid_dim))

        def take_to_host(executor, args, kwargs):
            if not any(isinstance(arg, torch.Tensor) and arg.is_meta for arg in [*args, *kwargs.values()]):
                args, kwargs = to_host(executor, args, kwargs)
            for name, value in [*zip(executor.arg_names, args, strict=False), *kwargs.items()]:
                self.names[id(value)] = name
                if isinstance(value, tuple):
                    self.names.update({id(inner): f"{name}[{i}]" for i, inner in enumerate(value)})
            return args, kwargs

        def convert_argument(arg):
            return self.pointer(arg) if isinstance(arg, torch.Tensor) else convert(arg)

        def masked_load(ptrs, mask, other, *rest):
            mask = _mask(mask, ptrs)
            # for a single lane the interpreter drops `other=0`, so None does not mean that none was given
            if other is None and mask.data.size > 1 and not mask.data.all():
                other = _unspecified(ptrs)
            ptrs, mask = self.access("load", ptrs, mask.data)
            return load(ptrs, mask, other, *rest)

        def masked_store(ptrs, value, mask, *rest):
            mask = _mask(mask, ptrs)
            if self.races:
                self.check_lanes_agree(ptrs.data, value.data, mask.data)
            ptrs, mask = self.access("store", ptrs, mask.data)
            return store(ptrs, value, mask, *rest)

        def atomic_update(operation, ptrs, value, mask, *rest):
            ptrs, mask = self.access("atomic", ptrs, _mask(mask, ptrs).data)
            return update(operation, ptrs, value, mask, *rest)

        def atomic_swap(ptrs, *rest):
            ptrs, _ = self.access("atomic", ptrs, np.ones(ptrs.data.shape, bool))
            return swap(ptrs, *rest)

        return [
            *([(builder, "set_grid_idx", set_last_program)] if self.last_program_only else []),
            (executor, "__call__", call_launch),
            (executor, "_init_args_hst", take_to_host),
            (interpreter, "_implicit_cvt", convert_argument),
            (builder, "create_masked_load", masked_load),
            (builder, "create_masked_store", masked_store),
            (builder, "create_atomic_rmw", atomic_update),
            (builder, "create_atomic_cas", atomic_swap),
        ]

    def pointer(self, tensor):
        """The tl.tensor that the interpreter passes to a kernel for a tensor, with a virtual address."""
        storage = None
        if not tensor.is_meta:
            memory = tensor.untyped_storage()
            storage = self.storages.setdefault(memory.data_ptr(), _Storage(memory.data_ptr(), memory.nbytes()))
            storage.grain = min(storage.grain, tensor.element_size())
        number = len(self.arguments)
        argument = _Argument(self.names.get(id(tensor), f"argument {number}"), tensor, number, storage)
        self.arguments.append(argument)
        kind = tl.str_to_ty(mangle_type(tensor), None)
        handle = interpreter.TensorHandle(np.array([argument.address], dtype=np.uint64), kind)
        return tl.tensor(handle, kind)

    def access(self, kind, ptrs, mask):
        """Check and count a "load", "store" or "atomic" of the lanes in the mask.

        Returns:
            handles of the real pointers, and of the mask without lanes of meta tensors.
        """
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)  # bytes
        active = ptrs.data[mask]
        real = ptrs.data
        for argument in self.owners(active):
            offsets = (active[argument.owns(active)] - np.uint64(argument.address)).view(np.int64)
            if self.checks:
                self.check_bounds(kind, argument, offsets, size)
            if argument.storage is None:
                mask = mask & ~argument.owns(ptrs.data)
                continue
            grains = argument.grains(offsets, size)
            if self.races and kind != "atomic":
                self.check_overlaps(kind, argument, grains)
            argument.count(kind, offsets.size * size, grains)
            real = np.where(argument.owns(real), real + argument.to_real, real)
        return interpreter.TensorHandle(real, ptrs.dtype), interpreter.TensorHandle(mask, tl.int1)

    def owners(self, addresses):
        """The arguments that the addresses were computed from, nearly always one."""
        if not addresses.size:
            return []
        first, last = int(addresses.min()) >> SPACING, int(addresses.max()) >> SPACING
        numbers = [first] if first == last else np.unique(addresses >> np.uint64(SPACING)).tolist()
        if not all(1 <= number <= len(self.arguments) for number in numbers):
            raise OutOfBounds(f"{self.where()}: an address that was not computed from any argument")
        return [self.arguments[number - 1] for number in numbers]

    def check_bounds(self, kind, argument, offsets, size):
        inside = argument.holds(offsets, size)
        if not inside.all():
            raise OutOfBounds(
                f"{self.where()}: {kind} of {(~inside).sum()} of {inside.size} lanes outside {argument}; "
                f"the first is {offsets[~inside][0]} bytes from its first element"
            )

    def check_overlaps(self, kind, argument, grains):
        x, y, z = interpreter.interpreter_builder.grid_idx
        _, ny, nz = interpreter.interpreter_builder.grid_dim
        other = argument.storage.record(kind, grains, 1 + (x * ny + y) * nz + z)
        if other == NO_PROGRAM:
            return
        x, y, z = (other - 1) // nz // ny, (other - 1) // nz % ny, (other - 1) % nz
        programs = "several programs" if other == MANY_PROGRAMS else f"program {(x, y, z)}"
        raise ProgramRace(f"{self.where()}: {kind} of an element that {programs} accessed in {argument}")

    def check_lanes_agree(self, addresses, values, mask):
        addresses = addresses[mask]
        values = np.broadcast_to(values, mask.shape)[mask]
        _, first, inverse = np.unique(addresses, return_index=True, return_inverse=True)
        if first.size == addresses.size:
            return
        different = values.view(f"u{values.itemsize}") != values[first][inverse].view(f"u{values.itemsize}")
        if different.any():
            raise ProgramRace(f"{self.where()}: {different.sum()} lanes of one store write different values")

    def where(self):
        return f"{self.kernel}, program {tuple(interpreter.interpreter_builder.grid_idx)}"


class _Storage:
    """Memory behind one or more arguments, divided into grains the size of their smallest element."""

    def __init__(self, start, size):
        self.start = start  # address
        self.size = size  # bytes
        self.grain = 8  # bytes
        self.reader = self.writer = None

    def zeros(self, dtype):
        """A zero per grain."""
        return np.zeros(-(-self.size // self.grain), dtype)

    def record(self, kind, grains, program):
        """Record that a program loads or stores grains. Returns the program that it races with, or NO_PROGRAM."""
        if self.reader is None:
            self.reader, self.writer = self.zeros(np.int32), self.zeros(np.int32)
        for marks in [self.writer] if kind == "load" else [self.writer, self.reader]:
            before = marks[grains]
            others = before[(before != NO_PROGRAM) & (before != program)]
            if others.size:
                return int(others[0])
        if kind == "store":
            self.writer[grains] = program
        else:
            before = self.reader[grains]
            self.reader[grains] = np.where((before == NO_PROGRAM) | (before == program), program, MANY_PROGRAMS)
        return NO_PROGRAM


class _Argument:
    """A tensor argument of a launch: its virtual address, the bytes of its elements, and its traffic."""

    def __init__(self, name, tensor, number, storage):
        self.name = name
        self.tensor = tensor
        self.storage = storage  # None for a tensor on the meta device
        self.owner = number + 1
        start = 0 if storage is None else tensor.data_ptr()
        # the middle of its range, so that offsets may be negative, with the alignment of the real address
        self.address = (self.owner << SPACING) + (1 << (SPACING - 1)) + start % 4096
        self.to_real = np.uint64((start - self.address) % 2**64)
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        self.span = 1 + sum((n - 1) * stride for n, stride in steps) if tensor.numel() else 0  # elements, gaps included
        self.occupied = None if _is_dense(tensor) else _occupied(tensor, self.span)
        self._requested = {"load": 0, "store": 0}
        self._accessed = {}  # "load" or "store" -> bool per grain of the storage

    def __str__(self):
        shape, strides = tuple(self.tensor.shape), self.tensor.stride()
        return f"{self.name} ({self.tensor.dtype}, shape {shape}, strides {strides})"

    def owns(self, addresses):
        """Which addresses were computed from this argument."""
        return addresses >> np.uint64(SPACING) == self.owner

    def holds(self, offsets, size):
        """Which accesses of `size` bytes, at offsets from the first element, stay inside elements."""
        element = self.tensor.element_size()
        inside = (offsets >= 0) & (offsets + size <= self.span * element)
        if self.occupied is not None:
            for byte in (*range(0, size, element), size - 1):
                inside[inside] = self.occupied[(offsets[inside] + byte) // element]
        return inside

    def grains(self, offsets, size):
        """The grains of the storage that accesses of `size` bytes at these offsets cover."""
        first = (offsets + (self.tensor.data_ptr() - self.storage.start)) // self.storage.grain
        parts = size // self.storage.grain
        return first if parts <= 1 else (first[:, None] + np.arange(parts)).reshape(-1)

    def count(self, kind, size, grains):
        for direction in ("load", "store") if kind == "atomic" else (kind,):
            self._requested[direction] += size
            if direction not in self._accessed:
                self._accessed[direction] = self.storage.zeros(bool)
            self._accessed[direction][grains] = True

    def traffic(self):
        return Traffic(loaded=self._bytes_moved("load"), stored=self._bytes_moved("store"))

    def _bytes_moved(self, direction):
        if direction not in self._accessed:
            return BytesMoved()
        grain, accessed = self.storage.grain, self._accessed[direction]
        sectors = np.pad(accessed, (0, -accessed.size % (SECTOR // grain))).reshape(-1, SECTOR // grain)
        unique = int(np.count_nonzero(accessed)) * grain
        return BytesMoved(self._requested[direction], unique, int(np.count_nonzero(sectors.any(1))))


def _is_dense(tensor):
    """Whether a tensor has no gaps between elements, in any order of dimensions."""
    outermost_first = sorted(range(tensor.ndim), key=lambda i: -tensor.stride(i))
    return tensor.permute(outermost_first).is_contiguous()


def _occupied(tensor, span):
    """Bool per element from a tensor's first to its last: whether it belongs to the tensor or is a gap."""
    occupied = torch.zeros(span, dtype=torch.bool)
    occupied.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return occupied.numpy()


def _mask(mask, ptrs):
    """A mask as a handle of bools in the shape of the pointers. Block pointers pass it as a plain array."""
    lanes = mask if isinstance(mask, np.ndarray) else mask.data
    return interpreter.TensorHandle(np.broadcast_to(lanes, ptrs.data.shape).astype(bool), tl.int1)


def _unspecified(ptrs):
    """The value of masked-off lanes after a load without `other`: undefined on a GPU, poison here."""
    element = ptrs.get_element_ty()
    dtype = interpreter._get_np_dtype(element)
    if element == tl.bfloat16:
        value = 0x7FC0  # the bits of NaN
    elif dtype.kind == "f":
        value = np.nan
    else:
        value = True if dtype.kind == "b" else np.iinfo(dtype).min or np.iinfo(dtype).max  # as an index out of bounds
    return interpreter.TensorHandle(np.full(ptrs.data.shape, value, dtype), element)
