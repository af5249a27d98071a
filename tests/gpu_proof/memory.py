"""Global and shared memory of the executor: bounds checks, address translation and race detection.

Every tensor parameter gets an address range far from the others', so an access out of bounds never hits another tensor.
Each word of shared memory records which warps read and wrote it since the CTA's last barrier. An access that conflicts
with another warp's, where one of the two writes, raises BarrierRace.
"""

import contextlib
import ctypes
from dataclasses import dataclass

import numpy as np

from gpu_proof.errors import BarrierRace, OutOfBounds
from gpu_proof.formats import COPY_DTYPES

LANES = 32
REGION = 1 << 40  # bytes of address range per buffer
UNTOUCHED = 0  # mark of a word of shared memory not accessed since the barrier; a warp's mark is its number + 1
ATOMIC, MANY_WARPS = 62, 63  # marks of atomics, and of several warps
NO_THREAD, MANY_THREADS = -1, -2  # marks of an element of global memory, in place of a thread's number
IN_FLIGHT = 128  # mark of a word that a cp.async has yet to write; barriers keep it


@dataclass(frozen=True, slots=True)
class GlobalAccess:
    """The bytes that an instruction's threads access in one buffer."""

    threads: np.ndarray  # numbers of the active threads
    buffer: int
    offsets: np.ndarray  # per thread, in bytes
    index: np.ndarray  # the offsets in units of the access size
    low: int  # first byte accessed
    high: int  # one past the last byte
    requests: int
    sectors: int


@dataclass(frozen=True, slots=True)
class SharedAccess:
    """The bytes that an instruction's threads access in shared memory."""

    threads: np.ndarray
    offsets: np.ndarray  # per thread, in bytes from the start of its CTA's memory
    index: np.ndarray  # in the memory of the whole batch, in units of the access size
    words: np.ndarray  # the words accessed, without duplicates
    owners: np.ndarray  # mark of the warp that accesses each word, MANY_WARPS for more than one
    many_warps: np.ndarray  # bool per word
    requests: int = 0
    wavefronts: int = 0


def memoize(compute, limit=32):
    """Cache `compute(where)` by the contents of `key` and `where`: loops and launches repeat the same addresses.

    Returns a function (key, where). Comparing the bytes with every cached key is faster than hashing them once.
    """
    cached = []  # (key, where, result), arrays as bytes

    def look_up(key, where):
        key, mask = key.tobytes(), where if where is True else where.tobytes()
        for cached_key, cached_mask, result in cached:
            if cached_key == key and cached_mask == mask:
                return result
        if len(cached) >= limit:
            cached.clear()
        result = compute(where)
        cached.append((key, mask, result))
        return result

    return look_up


def typed_views(data):
    """Views of aligned bytes, one per access size: {size: array}."""
    return {size: data[: data.size // size * size].view(dtype) for size, dtype in COPY_DTYPES.items()}


class Buffer:
    """The bytes that a kernel may access through one parameter. Offsets count from a 32-byte boundary."""

    def __init__(self, name, pointer, first, end, grain=1):
        """Allow bytes `first` to `end` of the memory that starts at `pointer`; `grain` is the size of an element."""
        lead = pointer % 32
        self.name, self.first, self.end, self.grain = name, first + lead, end + lead, grain
        size = -(-self.end // 16) * 16  # rounded up within the page; `check` refuses accesses beyond `end`
        memory = (ctypes.c_uint8 * size).from_address(pointer - lead) if end else b""
        self.views = typed_views(np.frombuffer(memory, np.uint8))

    @classmethod
    def of(cls, name, tensor):
        """Allow the bytes of a tensor, or all of its storage if it is not contiguous."""
        storage = tensor.untyped_storage()
        first, end = 0, storage.nbytes()
        if tensor.is_contiguous():
            first = tensor.storage_offset() * tensor.element_size()
            end = first + tensor.numel() * tensor.element_size()
        return cls(name, storage.data_ptr(), first, end, min(8, tensor.element_size()))

    def check(self, access, size, instruction):
        """Raise OutOfBounds for accesses of `size` bytes outside the buffer."""
        if self.first <= access.low and access.high <= self.end:
            return
        outside = access.offsets[(access.offsets < self.first) | (access.offsets + size > self.end)]
        raise OutOfBounds(
            f"{instruction}: {outside.size} threads are outside {self.name}, the first at byte "
            f"{outside[0] - self.first} of its {self.end - self.first}"
        )


class GlobalMarks:
    """Records which thread last read and wrote each element of a launch's tensors, and when, to detect races.

    Threads are numbered from 0 within a batch. Only threads of one CTA are compared: the sanitizer detects races
    between programs.
    """

    def __init__(self, warps, ctas):
        self.warps, self.ctas = warps, ctas  # per thread
        self.clock = 1
        self.barrier = np.zeros(warps.size, np.int64)  # time of each thread's last CTA barrier
        self.warp_barrier = np.zeros(warps.size, np.int64)  # time of its last warp barrier
        self._elements = {}  # buffer number -> (reader, read_at, writer, written_at), arrays over its elements

    def reset(self):
        self._elements.clear()

    def record_barrier(self, threads=True):
        """Record a CTA barrier for the threads in a mask, or for all."""
        self.clock += 1
        self.barrier[threads] = self.clock

    def record_warp_barrier(self, threads=True):
        """Record a warp barrier for the threads in a mask, or for all."""
        self.clock += 1
        self.warp_barrier[threads] = self.clock

    def check_read(self, access, buffer, width, instruction):
        """Record a read; raise BarrierRace if another thread wrote an element since the last barrier."""
        elements, threads = _elements(access, width, buffer.grain)
        reader, read_at, writer, written_at = self._marks_of(access.buffer, buffer)
        if self._conflicts(writer[elements], written_at[elements], threads).any():
            raise BarrierRace(f"{instruction}: reads {buffer.name} where another thread wrote, without a barrier")
        shared = self._conflicts(reader[elements], read_at[elements], threads)
        reader[elements], read_at[elements] = np.where(shared, MANY_THREADS, threads), self.clock
        # several threads of this access may read one element: only the last of them is recorded above
        alone = reader[elements] == threads
        reader[elements[~alone]] = MANY_THREADS

    @contextlib.contextmanager
    def race_checked_write(self, access, buffer, width, instruction):
        """Around a write: raise BarrierRace if it changes an element that another thread accessed since the barrier."""
        elements, threads = _elements(access, width, buffer.grain)
        reader, read_at, writer, written_at = self._marks_of(access.buffer, buffer)
        contested = self._conflicts(reader[elements], read_at[elements], threads)
        contested |= self._conflicts(writer[elements], written_at[elements], threads)
        view, contested = buffer.views[buffer.grain], elements[contested]
        before = view[contested] if contested.size else None
        yield
        if contested.size and (view[contested] != before).any():
            raise BarrierRace(f"{instruction}: changes {buffer.name} where another thread used it, without a barrier")
        writer[elements], written_at[elements] = threads, self.clock

    def _marks_of(self, number, buffer):
        if number not in self._elements:
            count = -(-buffer.end // buffer.grain) + 1
            self._elements[number] = tuple(np.full(count, x, np.int64) for x in (NO_THREAD, 0, NO_THREAD, 0))
        return self._elements[number]

    def _conflicts(self, before, when, threads):
        """Which threads access an element that another thread of their CTA accessed since their last barrier."""
        other = (before != NO_THREAD) & (before != threads) & (when >= self.barrier[threads])
        if not other.any():
            return other
        one, many = np.maximum(before, 0), before == MANY_THREADS
        same_cta = many | (self.ctas[one] == self.ctas[threads])
        ordered_in_warp = ~many & (self.warps[one] == self.warps[threads]) & (when < self.warp_barrier[threads])
        return other & same_cta & ~ordered_in_warp


def _elements(access, width, grain):
    """The elements of `grain` bytes in an access of `width` bytes per thread, and the thread of each element."""
    count = max(1, width // grain)
    first = access.offsets // grain
    if count == 1:
        return first, access.threads
    return (first[:, None] + np.arange(count)).ravel(), access.threads.repeat(count)


def region(number):
    """The address of buffer `number`: the middle of its region, so that negative offsets stay inside too."""
    return (number + 1) * REGION + REGION // 2


class SharedMemory:
    """Shared memory of a batch of CTAs, with marks of the warps that used each word since the last barrier."""

    def __init__(self, size, ctas, granule):
        self.size, self.granule = size, granule
        self.stride = -(-size // 128) * 128 + 128
        self.data = np.empty(self.stride * ctas, np.uint8)
        self.views = typed_views(self.data)
        self.words = self.views[granule]
        self.written = np.empty(self.words.size, np.uint8)
        self.read = np.empty(self.words.size, np.uint8)
        self._by_cta = [marks.reshape(ctas, -1) for marks in (self.written, self.read)]
        self._marked = True  # whether a word may have a mark: False after a barrier of the whole batch

    def reset(self):
        self.data.fill(0xFF)  # poison: NaN in every format
        self.written.fill(UNTOUCHED)
        self.read.fill(UNTOUCHED)

    def record_barrier(self, ctas=True):
        """Clear the marks of some CTAs, or of all. Marks of copies in flight stay."""
        if ctas is not True:
            for marks in self._by_cta:
                marks[ctas] &= IN_FLIGHT
        elif self._marked:
            self.written &= IN_FLIGHT
            self.read.fill(UNTOUCHED)
            self._marked = False

    def check_read(self, access, instruction):
        """Record a read; raise BarrierRace if another warp wrote a word or a cp.async has yet to write it."""
        written = self.written[access.words]
        if np.count_nonzero(written) and _by_other_warps(written, access).any():
            if (written >= IN_FLIGHT).any():
                raise BarrierRace(f"{instruction}: reads a word that a cp.async has yet to write")
            raise BarrierRace(f"{instruction}: reads memory that another warp wrote, without a barrier")
        before = self.read[access.words]
        marks = access.owners
        if np.count_nonzero(before):
            marks = np.where((before == UNTOUCHED) | (before == marks), marks, MANY_WARPS)
        self.read[access.words] = marks
        self._marked = True

    def check_write(self, access, instruction):
        """Raise BarrierRace if another warp read one of the words; return which words another warp wrote."""
        read = self.read[access.words]
        if np.count_nonzero(read) and _by_other_warps(read, access).any():
            raise BarrierRace(f"{instruction}: overwrites shared memory that another warp read, without a barrier")
        written = self.written[access.words]
        if (written >= IN_FLIGHT).any():
            raise BarrierRace(f"{instruction}: overwrites shared memory that a cp.async has yet to write")
        return (written != UNTOUCHED) & (written != access.owners)

    def mark_written(self, words, mark):
        self.written[words] = mark
        self._marked = True


def _by_other_warps(marks, access):
    """Which words of an access carry a mark of another warp than the one that accesses them now."""
    return (marks != UNTOUCHED) & ((marks != access.owners) | access.many_warps)


def touched_words(flat, warps, size, granule):
    """The distinct words of `granule` bytes in accesses of `size` bytes: (words, marks, accessed by many warps)."""
    count = max(1, size // granule)
    words, first, inverse = np.unique(
        (flat[:, None] // granule + np.arange(count)).ravel(), return_index=True, return_inverse=True
    )
    owners = (warps + 1).astype(np.uint8).repeat(count)
    many_warps = np.zeros(words.size, bool)
    many_warps[inverse[owners != owners[first][inverse]]] = True
    return words, np.where(many_warps, np.uint8(MANY_WARPS), owners[first]), many_warps


def wavefronts(words, warps, lanes, size):
    """Passes through the 32 banks: the largest number of distinct words in one bank, summed over groups of threads."""
    per_thread = max(1, size // 4)
    # a group is a warp, half a warp for 8-byte accesses, or a quarter for 16-byte accesses
    group = warps * per_thread + lanes // (LANES // per_thread)
    words = (words[:, None] + np.arange(per_thread)).ravel()
    group = np.unique(group, return_inverse=True)[1].repeat(per_thread)
    span = int(words.max()) + 1
    distinct = np.unique(group * span + words)
    group, bank = distinct // span, distinct % span % 32
    return int(np.bincount(group * 32 + bank, minlength=(int(group.max()) + 1) * 32).reshape(-1, 32).max(1).sum())
