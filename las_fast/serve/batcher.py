"""Decode the recordings of many clients together on one model.

One thread reads segments of speech from the recordings in turn. Another thread owns the model: it decodes waiting
segments, about batch_seconds of speech, in one batch, hands each of them to its client, and starts again. Therefore a
long recording does not delay short ones, and a recording that cannot be read fails alone.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Unpack

from las_fast.data.segments import NO_SPEECH, Speech
from las_fast.errors import InputError
from las_fast.output.transcripts import Segment, Transcript
from las_fast.recogniser import Recogniser, TranscribeOptions
from las_fast.serve.limits import BATCH_SECONDS
from las_fast.transcription import RecordingState

Event = Segment | Transcript | Exception  # each segment once it is decoded, then the transcript or an error


class TooLong(InputError):
    """The recording is longer than the service accepts."""


class Cancelled(InputError):
    """The client has gone."""


@dataclass(frozen=True)
class Upload:
    """A binary file object with the name that errors and warnings use."""

    file: BinaryIO
    name: str = "the file"

    def read(self, count: int = -1) -> bytes:
        return self.file.read(count)


@dataclass(eq=False)
class Job:
    """A recording to transcribe.

    A thread of the batcher calls on_event; the last event is a Transcript or an Exception. Any thread may call
    `cancel`. A few more events may follow it, and then the batcher drops the recording.
    """

    recording: BinaryIO
    on_event: Callable[[Event], None]
    is_cancelled: bool = False
    state: RecordingState = field(init=False)
    speech: Iterator[Speech] = field(init=False)
    emitted: int = 0  # segments that on_event got

    def __post_init__(self):
        self.state = RecordingState(Upload(self.recording))

    def cancel(self) -> None:
        self.is_cancelled = True


@dataclass
class Totals:
    """Totals since the batcher was started."""

    batches: int = 0  # decoded
    segments: int = 0  # segments decoded
    audio_seconds: float = 0.0  # seconds of audio read
    speech_seconds: float = 0.0  # seconds of speech decoded
    busy_seconds: float = 0.0  # seconds spent decoding


Entry = tuple[Job, Speech | None]  # a segment of a recording; None after its last one
Task = Callable[[], None]


class _Ready:
    """A thread-safe queue of segments to decode and of other tasks for the thread of the model.

    Args:
        limit: seconds of speech; `put` waits while the queue has more, unless it is closed.
    """

    def __init__(self, limit: float):
        self.limit, self.seconds = limit, 0.0
        self.entries: deque[Entry | Task | None] = deque()
        self.is_closed = False  # nobody takes entries any more
        self.changed = threading.Condition()

    def put(self, entry: Entry | Task | None) -> None:
        """Append a segment or a task, or None for the end."""
        seconds = _seconds(entry)
        with self.changed:
            if seconds:
                self.changed.wait_for(lambda: self.is_closed or not self.seconds or self.seconds <= self.limit)
            self.entries.append(entry)
            self.seconds += seconds
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()

    def take(self, seconds: float) -> list[Entry] | Task | None:
        """Wait for the first entry, and return what is next.

        That is a task, or None at the end, or segments: at least one, then more until they have `seconds` of speech or
        a task or the end follows.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.entries)
            taken: list[Entry] = []
            total = 0.0
            while self.entries and (not taken or total < seconds or not _seconds(self.entries[0])):
                entry = self.entries[0]
                if not isinstance(entry, tuple):
                    if not taken:
                        return self._pop_other()
                    break
                self.entries.popleft()
                taken.append(entry)
                total += _seconds(entry)
            self.seconds = max(0.0, self.seconds - total) if self.entries else 0.0
            self.changed.notify_all()
            return taken

    def _pop_other(self) -> Task | None:
        entry = self.entries.popleft()
        assert not isinstance(entry, tuple)
        return entry


def _seconds(entry: Entry | Task | None) -> float:
    speech = entry[1] if isinstance(entry, tuple) else None
    return speech.end - speech.start if speech else 0.0


class Batcher:
    """Two threads that transcribe jobs, started by the constructor and ended by `close`.

    Args:
        model:         the model; no other thread should use it while the batcher is open.
        max_seconds:   seconds of a recording; longer ones fail with TooLong.
        batch_seconds: seconds of speech decoded in one batch; 0 decodes one segment at a time.
        options:       those of Recogniser.transcribe.

    Raises:
        InputError: an option is invalid.
    """

    def __init__(
        self,
        model: Recogniser,
        *,
        max_seconds: float,
        batch_seconds: float = BATCH_SECONDS,
        **options: Unpack[TranscribeOptions],
    ) -> None:
        self.model, self.max_seconds, self.batch_seconds = model, max_seconds, batch_seconds
        self.totals = Totals()
        self._shared = model.transcription(**options, warn=lambda message: None)
        self._incoming: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._active: deque[Job] = deque()  # recordings with segments left to read; the first is next
        self._is_closing = False
        self._ready = _Ready(2 * batch_seconds)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._run_reader, self._run_model)]
        for thread in self._threads:
            thread.start()

    @property
    def vad(self) -> str:
        return self._shared.vad

    @property
    def is_alive(self) -> bool:
        """Whether both threads are running; a bug may end one."""
        return all(thread.is_alive() for thread in self._threads)

    def submit(self, job: Job) -> None:
        """Queue a recording."""
        self._incoming.put(job)

    def call(self, function: Callable[[Recogniser], Any]) -> Future:
        """Call function(model) between two batches, in the thread that owns the model; return its future result."""
        future: Future = Future()

        def task() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self.model))
            except BaseException as error:  # whatever it is, the caller waits for it
                future.set_exception(error)

        self._ready.put(task)
        return future

    def close(self) -> None:
        """Finish all jobs, and end the threads."""
        self._incoming.put(None)
        for thread in self._threads:
            thread.join()

    def _run_reader(self) -> None:
        try:
            while self._admit() and not self._ready.is_closed:
                job = self._active.popleft()
                speech = self._read(job)
                if speech is not None:
                    self._active.append(job)
                if speech is not NO_SPEECH:
                    self._ready.put((job, speech))
        finally:  # after a bug too: the other thread must not wait for ever
            self._ready.put(None)

    def _run_model(self) -> None:
        try:
            self._decode_batches()
        finally:  # as above
            self._ready.close()
            self._incoming.put(None)

    def _decode_batches(self) -> None:
        while (taken := self._ready.take(self.batch_seconds)) is not None:
            if callable(taken):
                taken()
                continue
            pool = [(job, speech) for job, speech in taken if speech is not None and not job.is_cancelled]
            if pool:
                began = time.monotonic()
                self._decode(pool)
                self._count(pool, time.monotonic() - began)
            for job in (job for job, speech in taken if speech is None):
                if not job.is_cancelled:
                    job.on_event(job.state.error or job.state.transcript())

    def _count(self, pool: list[tuple[Job, Speech]], seconds: float) -> None:
        self.totals.batches += 1
        self.totals.segments += len(pool)
        self.totals.speech_seconds += sum(speech.end - speech.start for _, speech in pool)
        self.totals.busy_seconds += seconds

    def _admit(self) -> bool:
        """Start the recordings that have arrived. Wait for one if none is active; return False at the end."""
        while True:
            try:
                arrived = self._incoming.get(block=not self._active and not self._is_closing)
            except queue.Empty:
                return bool(self._active)
            if arrived is None:
                self._is_closing = True
            else:
                self._start(arrived)

    def _start(self, job: Job) -> None:
        """Prepare the segments of a recording; nothing is read before the first `_read`."""
        seconds = 0.0

        def on_block(block: float) -> None:
            nonlocal seconds
            seconds += block
            self.totals.audio_seconds += block
            if job.is_cancelled:
                raise Cancelled("the client has gone")
            if seconds > self.max_seconds:
                raise TooLong(f"the file is longer than {self.max_seconds:g} seconds; send it in parts")

        reader = replace(self._shared, on_block=on_block, mark_silence=True, pool=[], pending=deque())
        job.speech = reader.read(job.state, None)
        self._active.append(job)

    def _read(self, job: Job) -> Speech | None:
        """Return the next segment of a recording, or NO_SPEECH after a while without speech.

        Return None if it has no more, cannot be read, or its client has gone.
        """
        try:
            if not job.is_cancelled:
                return next(job.speech, None)
            job.speech.close()  # type: ignore[attr-defined]  # a generator
        except Exception as error:  # one recording must not end the thread
            self._fail(job, error)
        return None

    def _decode(self, pool: list[tuple[Job, Speech]]) -> None:
        """Decode the segments together. If that fails, decode each recording alone, so that only bad ones fail."""
        jobs = list(dict.fromkeys(job for job, _ in pool))
        try:
            self._decode_together(pool)
            return
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
        for job in jobs:  # outside `except`: a new error must not count as one raised while handling this one
            self._decode([(one, speech) for one, speech in pool if one is job])

    def _decode_together(self, pool: list[tuple[Job, Speech]]) -> None:
        for job, speech in pool:
            self._shared.add(job.state, speech)
        try:
            self._shared.decode_pool()
        except Exception:
            for job, _ in pool:
                job.state.undecoded = 0
            raise
        for job in dict.fromkeys(job for job, _ in pool):
            self._emit(job)

    def _emit(self, job: Job) -> None:
        """Hand the new segments of a recording to its client."""
        segments = job.state.segments
        while job.emitted < len(segments) and not job.is_cancelled:
            job.emitted += 1
            job.on_event(segments[job.emitted - 1])

    def _fail(self, job: Job, error: Exception) -> None:
        job.cancel()
        job.on_event(error)
