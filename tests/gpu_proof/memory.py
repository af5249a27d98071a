"""The memories that machine code reaches: where an access goes, the launch's tensors, shared memory and who touched it.

Every tensor parameter gets a region of addresses far from the others', so a stray access never lands in a neighbour. A
word of shared memory is marked by who writes and who reads it, until the CTA's next barrier; whoever meets another
warp's mark, one of the two writing, raises BarrierRace.
"""

import contextlib
import ctypes
from dataclasses import dataclass

import numpy as np

from gpu_proof.errors import BarrierRace, OutOfBounds
from gpu_proof.formats import COPIED

LANES = 32
REGION = 1 << 40  # addresses kept apart for each buffer
SETTLED = 0  # mark of a word of shared memory that no one touched since the barrier; a warp's is its number and 1
ATOMIC, SEVERAL = 62, 63  # marks of atomics and of more than one warp
NO_ONE, MANY = -1, -2  # marks of an element of global memory that no thread read, and that several did
IN_FLIGHT = 128  # mark of what a cp.async has yet to write; stays at barriers


@dataclass(frozen=True, slots=True)
class GlobalAccess:
    """Where an instruction's threads go in one buffer."""

    threads: np.ndarray  # that take part
    buffer: int
    offsets: np.ndarray  # of each thread, in bytes
    index: np.ndarray  # the same in units of the access
    low: int  # first byte touched
    high: int  # one past the last
    requests: int
    sectors: int


@dataclass(frozen=True, slots=True)
class SharedAccess:
    """Where an instruction's threads go in shared memory."""

    threads: np.ndarray
    offsets: np.ndarray  # of each thread in its CTA's memory, in bytes
    index: np.ndarray  # in the memory of the batch, in units of the access
    words: np.ndarray  # that are touched, each once
    owners: np.ndarray  # the mark of the warp that touches each word, SEVERAL for more than one
    several: np.ndarray  # whether there is more than one
    requests: int = 0
    wavefronts: int = 0


def remembered(compute, limit=32):
    """Cache `compute(where)` by what `key` and `where` hold: the same addresses come again in loops and launches.

    Returns a function (key, where). Comparing the bytes with each known key is faster than hashing them once.
    """
    known = []  # (key, where, result), arrays as bytes

    def look_up(key, where):
        key, mask = key.tobytes(), where if where is True else where.tobytes()
        for its_key, its_mask, result in known:
            if its_key == key and its_mask == mask:
                return result
        if len(known) >= limit:
            known.clear()
        result = compute(where)
        known.append((key, mask, result))
        return result

    return look_up


def typed_views(data):
    """Views of aligned bytes for every access size."""
    return {size: data[: data.size // size * size].view(dtype) for size, dtype in COPIED.items()}


class Buffer:
    """The bytes that a kernel may access through one parameter; offsets count from a boundary of 32 bytes."""

    def __init__(self, name, pointer, first, end, grain=1):
        """Allow bytes `first` to `end` of the memory that starts at `pointer`; `grain` is the size of an element."""
        lead = pointer % 32
        self.name, self.first, self.end, self.grain = name, first + lead, end + lead, grain
        size = -(-self.end // 16) * 16  # to a boundary: the same page, and no one reads beyond `end`
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
    """Which threads read and wrote each element of a launch's tensors, and whether a barrier came between.

    Threads are numbered from 0 within a batch. Only threads of one CTA are compared: the sanitizer detects races
    between programs.
    """

    def __init__(self, warps, ctas):
        self.warps, self.ctas = warps, ctas  # of each thread
        self.clock = 1
        self.barrier = np.zeros(warps.size, np.int64)  # when each thread last met those of its CTA
        self.warp_barrier = np.zeros(warps.size, np.int64)  # or those of its warp
        self._elements = {}  # buffer -> (reader, when, writer, when) of each element

    def reset(self):
        self._elements.clear()

    def settle(self, threads=True):
        """Record that the threads in a mask, or all, have met at a barrier of their CTA."""
        self.clock += 1
        self.barrier[threads] = self.clock

    def settle_warps(self, threads=True):
        self.clock += 1
        self.warp_barrier[threads] = self.clock

    def check_read(self, access, buffer, width, instruction):
        """Raise BarrierRace where a thread reads what another one wrote since their last barrier; note the read."""
        elements, threads = _elements(access, width, buffer.grain)
        reader, read_at, writer, written_at = self._of(access.buffer, buffer)
        if self._strangers(writer[elements], written_at[elements], threads).any():
            raise BarrierRace(f"{instruction}: reads in {buffer.name} what another thread wrote; no barrier between")
        again = self._strangers(reader[elements], read_at[elements], threads)
        reader[elements], read_at[elements] = np.where(again, MANY, threads), self.clock
        alone = reader[elements] == threads
        reader[elements[~alone]] = MANY

    @contextlib.contextmanager
    def writing(self, access, buffer, width, instruction):
        """Around a write: raises BarrierRace where it changes what another thread read or wrote since the barrier."""
        elements, threads = _elements(access, width, buffer.grain)
        reader, read_at, writer, written_at = self._of(access.buffer, buffer)
        contested = self._strangers(reader[elements], read_at[elements], threads)
        contested |= self._strangers(writer[elements], written_at[elements], threads)
        view, places = buffer.views[buffer.grain], elements[contested]
        before = view[places] if places.size else None
        yield
        if places.size and (view[places] != before).any():
            raise BarrierRace(f"{instruction}: changes in {buffer.name} what another thread used; no barrier between")
        writer[elements], written_at[elements] = threads, self.clock

    def _of(self, number, buffer):
        if number not in self._elements:
            count = -(-buffer.end // buffer.grain) + 1
            self._elements[number] = tuple(np.full(count, x, np.int64) for x in (NO_ONE, 0, NO_ONE, 0))
        return self._elements[number]

    def _strangers(self, before, when, threads):
        """Which of the threads meet the mark of another one of their CTA that was made since they met."""
        found = (before != NO_ONE) & (before != threads) & (when >= self.barrier[threads])
        if not found.any():
            return found
        named = np.maximum(before, 0)
        ours = (before == MANY) | (self.ctas[named] == self.ctas[threads])
        near = (before != MANY) & (self.warps[named] == self.warps[threads]) & (when < self.warp_barrier[threads])
        return found & ours & ~near


def _elements(access, width, grain):
    """The elements of `grain` bytes in an access of `width` bytes a thread, and the thread of each."""
    count = max(1, width // grain)
    first = access.offsets // grain
    if count == 1:
        return first, access.threads
    return (first[:, None] + np.arange(count)).ravel(), access.threads.repeat(count)


def region(number):
    """The address of buffer `number`: in the middle of its region, so that an offset of either sign stays there."""
    return (number + 1) * REGION + REGION // 2


class SharedMemory:
    """Shared memory of a batch of CTAs, side by side, with marks of who touched each word since the last barrier."""

    def __init__(self, size, ctas, granule):
        self.size, self.granule = size, granule
        self.stride = -(-size // 128) * 128 + 128
        self.data = np.empty(self.stride * ctas, np.uint8)
        self.views = typed_views(self.data)
        self.words = self.views[granule]
        self.written = np.empty(self.words.size, np.uint8)
        self.read = np.empty(self.words.size, np.uint8)
        self._by_cta = [marks.reshape(ctas, -1) for marks in (self.written, self.read)]
        self._marked = True  # somewhere since the last barrier of the whole batch

    def reset(self):
        self.data.fill(0xFF)  # poison: NaN in every format
        self.written.fill(SETTLED)
        self.read.fill(SETTLED)

    def settle(self, ctas=True):
        """Forget who touched what, in some CTAs or in all; copies in flight stay so."""
        if ctas is not True:
            for marks in self._by_cta:
                marks[ctas] &= IN_FLIGHT
        elif self._marked:
            self.written &= IN_FLIGHT
            self.read.fill(SETTLED)
            self._marked = False

    def check_read(self, access, instruction):
        """Raise BarrierRace if another warp wrote, or an asynchronous copy will write, what is read; note the read."""
        written = self.written[access.words]
        if np.count_nonzero(written) and ((written != SETTLED) & ((written != access.owners) | access.several)).any():
            if (written >= IN_FLIGHT).any():
                raise BarrierRace(f"{instruction}: reads what a cp.async has yet to write; it was not waited for")
            raise BarrierRace(f"{instruction}: reads what another warp wrote; no barrier between")
        before = self.read[access.words]
        marks = access.owners
        if np.count_nonzero(before):
            marks = np.where((before == SETTLED) | (before == marks), marks, SEVERAL)
        self.read[access.words] = marks
        self._marked = True

    def overwritten(self, access, instruction):
        """Raise BarrierRace if another warp read what is written; returns which words another warp wrote as well."""
        read = self.read[access.words]
        if np.count_nonzero(read) and ((read != SETTLED) & ((read != access.owners) | access.several)).any():
            raise BarrierRace(f"{instruction}: overwrites shared memory that another warp read; no barrier between")
        written = self.written[access.words]
        if (written >= IN_FLIGHT).any():
            raise BarrierRace(f"{instruction}: overwrites shared memory that a cp.async has yet to write")
        return (written != SETTLED) & (written != access.owners)

    def mark_written(self, words, mark):
        self.written[words] = mark
        self._marked = True


def touched_words(flat, warps, size, granule):
    """The words of `granule` bytes in accesses of `size` bytes, each once, with its mark, and where it has several."""
    count = max(1, size // granule)
    words, first, inverse = np.unique(
        (flat[:, None] // granule + np.arange(count)).ravel(), return_index=True, return_inverse=True
    )
    owners = (warps + 1).astype(np.uint8).repeat(count)
    several = np.zeros(words.size, bool)
    several[inverse[owners != owners[first][inverse]]] = True
    return words, np.where(several, np.uint8(SEVERAL), owners[first]), several


def wavefronts(words, warps, lanes, size):
    """Passes through the 32 banks: the most distinct words in one bank, for each group of threads that go together."""
    per_thread = max(1, size // 4)
    group = warps * per_thread + lanes // (LANES // per_thread)  # 8-byte accesses go by half warps, 16 by quarters
    words = (words[:, None] + np.arange(per_thread)).ravel()
    group = np.unique(group, return_inverse=True)[1].repeat(per_thread)
    span = int(words.max()) + 1
    distinct = np.unique(group * span + words)
    group, bank = distinct // span, distinct % span % 32
    return int(np.bincount(group * 32 + bank, minlength=(int(group.max()) + 1) * 32).reshape(-1, 32).max(1).sum())
