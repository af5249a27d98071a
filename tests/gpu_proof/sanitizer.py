"""Check and count every access to memory that interpreted Triton kernels make.

Each tensor argument of a launch gets a virtual address far from all others, which is translated back when memory is
accessed. So a pointer always belongs to the argument that it was computed from, however far it strays, even if two
arguments share memory. For an argument on the meta device, which may be larger than memory, only bounds are checked:
its stores are dropped, and its loads return the value of masked-off lanes.

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
NOBODY, SEVERAL = 0, -1  # beside program number + 1, in the notes of who touched what


class OutOfBounds(AssertionError):
    """An active lane accessed bytes outside the elements of the argument that it points into."""


class ProgramRace(AssertionError):
    """The result of a launch depends on the order of its programs, or of the lanes of one store."""


@dataclass
class Moved:
    """Bytes that one launch moved in one direction, for one argument."""

    requested: int = 0  # each lane of each access counted
    unique: int = 0  # each byte counted once
    sectors: int = 0  # distinct sectors touched, of 32 bytes each


@dataclass
class Traffic:
    """What one launch moved from and to one argument; atomic operations count as both."""

    loaded: Moved = field(default_factory=Moved)
    stored: Moved = field(default_factory=Moved)


@dataclass
class LaunchTraffic:
    """What one launch moved, by the name of the kernel's argument."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Traffic]

    @property
    def requested(self):
        """Bytes that all lanes of all accesses asked for."""
        return sum(traffic.loaded.requested + traffic.stored.requested for traffic in self.arguments.values())


@contextlib.contextmanager
def sanitized(checks=True, races=True, last_program_only=False):
    """Inside, each interpreted launch is checked and counted.

    Args:
        checks: False only counts: for launches that are too large to be checked and whose like was checked small.
        races:  False leaves out overlaps, which cost 8 bytes of notes an element.
        last_program_only: leaves out all other programs of each launch, for grids that are too large to be run.

    Yields:
        the list of LaunchTraffic, which grows by one with each launch that ends.

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
            raise _finding(error) from None


def _finding(error):
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
        # of the launch that runs now:
        self.kernel, self.grid = "", ()
        self.names = {}  # id of a tensor -> the kernel's name for it
        self.arguments = []  # in the order of their made-up addresses
        self.storages = {}  # address -> _Storage

    def hooks(self):
        """(object, attribute, what to put there) for everything in the interpreter that has to be watched."""
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
            # of a single lane the interpreter drops an `other` that is 0, so that it may have been named
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
        """What the interpreter passes to a kernel for a tensor, but with a made-up address."""
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
            handles of the pointers to real memory, and of the lanes that there is memory for.
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
        """The arguments from which the addresses were computed, nearly always one."""
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
                f"the first of them is {offsets[~inside][0]} bytes from its first element"
            )

    def check_overlaps(self, kind, argument, grains):
        x, y, z = interpreter.interpreter_builder.grid_idx
        _, ny, nz = interpreter.interpreter_builder.grid_dim
        other = argument.storage.note(kind, grains, 1 + (x * ny + y) * nz + z)
        if other == NOBODY:
            return
        x, y, z = (other - 1) // nz // ny, (other - 1) // nz % ny, (other - 1) % nz
        stranger = "several programs have" if other == SEVERAL else f"program {(x, y, z)} has"
        raise ProgramRace(f"{self.where()}: {kind} of what {stranger} touched in {argument}")

    def check_lanes_agree(self, addresses, values, mask):
        addresses = addresses[mask]
        values = np.broadcast_to(values, mask.shape)[mask]
        _, first, inverse = np.unique(addresses, return_index=True, return_inverse=True)
        if first.size == addresses.size:
            return
        different = values.view(f"u{values.itemsize}") != values[first][inverse].view(f"u{values.itemsize}")
        if different.any():
            raise ProgramRace(f"{self.where()}: {different.sum()} lanes of a store write another value to one place")

    def where(self):
        return f"{self.kernel}, program {tuple(interpreter.interpreter_builder.grid_idx)}"


class _Storage:
    """Memory behind one or more arguments, cut into grains as large as the smallest element of any of them."""

    def __init__(self, start, size):
        self.start = start  # address
        self.size = size  # bytes
        self.grain = 8  # bytes
        self.reader = self.writer = None

    def untouched(self, dtype):
        """Zeros, one for each grain."""
        return np.zeros(-(-self.size // self.grain), dtype)

    def note(self, kind, grains, program):
        """Note that a program loads or stores grains; returns whom that makes it race with, or NOBODY."""
        if self.reader is None:
            self.reader, self.writer = self.untouched(np.int32), self.untouched(np.int32)
        for before in [self.writer] if kind == "load" else [self.writer, self.reader]:
            found = before[grains]
            strangers = found[(found != NOBODY) & (found != program)]
            if strangers.size:
                return int(strangers[0])
        if kind == "store":
            self.writer[grains] = program
        else:
            found = self.reader[grains]
            self.reader[grains] = np.where((found == NOBODY) | (found == program), program, SEVERAL)
        return NOBODY


class _Argument:
    """A tensor argument of a launch: where it is, which bytes are its elements, what was moved."""

    def __init__(self, name, tensor, number, storage):
        self.name = name
        self.tensor = tensor
        self.storage = storage  # None of a tensor on the meta device
        self.owner = number + 1
        start = 0 if storage is None else tensor.data_ptr()
        # the middle of its share, so that offsets may be negative, and as aligned as the real address
        self.address = (self.owner << SPACING) + (1 << (SPACING - 1)) + start % 4096
        self.to_real = np.uint64((start - self.address) % 2**64)
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        self.span = 1 + sum((n - 1) * stride for n, stride in steps) if tensor.numel() else 0  # elements and gaps
        self.occupied = None if _is_dense(tensor) else _occupied(tensor, self.span)
        self._requested = {"load": 0, "store": 0}
        self._touched = {}  # "load" or "store" -> a bool for each grain of the storage

    def __str__(self):
        shape, strides = tuple(self.tensor.shape), self.tensor.stride()
        return f"{self.name} ({self.tensor.dtype}, shape {shape}, strides {strides})"

    def owns(self, addresses):
        """Which addresses were computed from this argument."""
        return addresses >> np.uint64(SPACING) == self.owner

    def holds(self, offsets, size):
        """Which accesses, of `size` bytes at offsets from the first element, touch nothing but elements."""
        element = self.tensor.element_size()
        inside = (offsets >= 0) & (offsets + size <= self.span * element)
        if self.occupied is not None:
            for byte in (*range(0, size, element), size - 1):
                inside[inside] = self.occupied[(offsets[inside] + byte) // element]
        return inside

    def grains(self, offsets, size):
        """The storage's grains that such accesses touch."""
        first = (offsets + (self.tensor.data_ptr() - self.storage.start)) // self.storage.grain
        parts = size // self.storage.grain
        return first if parts <= 1 else (first[:, None] + np.arange(parts)).reshape(-1)

    def count(self, kind, size, grains):
        for direction in ("load", "store") if kind == "atomic" else (kind,):
            self._requested[direction] += size
            if direction not in self._touched:
                self._touched[direction] = self.storage.untouched(bool)
            self._touched[direction][grains] = True

    def traffic(self):
        return Traffic(loaded=self._moved("load"), stored=self._moved("store"))

    def _moved(self, direction):
        if direction not in self._touched:
            return Moved()
        grain, touched = self.storage.grain, self._touched[direction]
        whole_sectors = np.pad(touched, (0, -touched.size % (SECTOR // grain))).reshape(-1, SECTOR // grain)
        unique = int(np.count_nonzero(touched)) * grain
        return Moved(self._requested[direction], unique, int(np.count_nonzero(whole_sectors.any(1))))


def _is_dense(tensor):
    """Whether a tensor's elements lie side by side, in whatever order."""
    outermost_first = sorted(range(tensor.ndim), key=lambda i: -tensor.stride(i))
    return tensor.permute(outermost_first).is_contiguous()


def _occupied(tensor, span):
    """A bool for each element from the first to the last of a tensor with gaps: whether it belongs to the tensor."""
    occupied = torch.zeros(span, dtype=torch.bool)
    occupied.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return occupied.numpy()


def _mask(mask, ptrs):
    """A mask as a handle of bools in the shape of the pointers; block pointers give it as a bare array."""
    lanes = mask if isinstance(mask, np.ndarray) else mask.data
    return interpreter.TensorHandle(np.broadcast_to(lanes, ptrs.data.shape).astype(bool), tl.int1)


def _unspecified(ptrs):
    """What lanes that are masked off hold after a load that names no `other`: on a GPU anything, here poison."""
    element = ptrs.get_element_ty()
    dtype = interpreter._get_np_dtype(element)
    if element == tl.bfloat16:
        value = 0x7FC0  # the bits of NaN
    elif dtype.kind == "f":
        value = np.nan
    else:
        value = True if dtype.kind == "b" else np.iinfo(dtype).max
    return interpreter.TensorHandle(np.full(ptrs.data.shape, value, dtype), element)
