"""Recordings of many clients are decoded together, with the texts of each alone; one that fails, fails alone."""

from __future__ import annotations

import io
import queue
import threading
import time
import warnings

import numpy as np
import pytest
from fakes import raising
from recordings import encoded
from rounding import assert_equal_up_to_rounding

from las_fast.errors import InputError
from las_fast.output.transcripts import Segment, Transcript
from las_fast.serve.batcher import Batcher, Job, TooLong


class Client:
    """A job and the events that it gets; `log` gets each event of several clients, with its client."""

    def __init__(self, file: bytes, log: list | None = None):
        self.events: queue.SimpleQueue = queue.SimpleQueue()
        self.log = [] if log is None else log
        self.job = Job(io.BytesIO(file), self.put)

    def put(self, event) -> None:
        self.log.append((self, event))
        self.events.put(event)

    def wait(self) -> tuple[list[Segment], Transcript | Exception]:
        """Return the segments, and the last event."""
        segments = []
        while isinstance(event := self.events.get(timeout=20), Segment):
            segments.append(event)
        return segments, event


def count_read(batcher):
    """Return how many recordings are read to their end and wait for the model."""
    with batcher._ready.changed:
        return sum(isinstance(entry, tuple) and entry[1] is None for entry in batcher._ready.entries)


@pytest.fixture
def together(model):
    """A function that submits recordings at once to a new batcher; it returns the clients and the batcher."""
    batchers = []

    def submit(*files, max_seconds=100.0, patch=lambda batcher: None, **options):
        batcher = Batcher(model, max_seconds=max_seconds, **options)
        batchers.append(batcher)
        patch(batcher)
        go_on = queue.SimpleQueue()
        batcher.call(lambda model: go_on.get(timeout=20))
        log = []
        clients = [Client(file, log) for file in files]
        for client in clients:
            batcher.submit(client.job)
        while "batch_seconds" not in options and count_read(batcher) < len(files):
            time.sleep(0.01)
        go_on.put(None)
        return clients, batcher

    yield submit
    for batcher in batchers:
        batcher.close()


def alone(model, file):
    """Return the transcript of a file that is not batched with others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.transcribe(io.BytesIO(file))


def test_waiting_recordings_are_decoded_in_one_batch_with_the_texts_of_each_alone(together, model, wav):
    files = [wav(seconds, seed) for seed, seconds in enumerate((0.6, 1.5, 1.0, 0.8))]
    clients, batcher = together(*files)
    assert_equal_up_to_rounding([client.wait()[1] for client in clients], [alone(model, file) for file in files])
    assert (batcher.totals.batches, batcher.totals.segments) == (1, 4)
    assert batcher.totals.audio_seconds == pytest.approx(3.9)


def test_a_recording_that_cannot_be_read_fails_alone(together, model, wav):
    clients, batcher = together(wav(), b"not audio", wav(1.0), b"")
    results = [client.wait()[1] for client in clients]
    assert [type(result) for result in results] == [Transcript, InputError, Transcript, InputError]
    assert_equal_up_to_rounding(results[2], alone(model, wav(1.0)))
    assert batcher.totals.batches == 1


def test_a_recording_that_cannot_be_decoded_fails_alone(together, model, wav):
    def patch(batcher):
        decode = batcher._shared.decode

        def failing(data):
            if any(1.4 < seconds < 1.6 for seconds in data.seconds):
                raise RuntimeError("a bug")
            return decode(data)

        batcher._shared.decode = failing

    clients, _ = together(wav(), wav(1.5), wav(1.0), patch=patch)
    results = [client.wait()[1] for client in clients]
    assert str(results[1]) == "a bug"
    assert_equal_up_to_rounding([results[0], results[2]], [alone(model, wav()), alone(model, wav(1.0))])


def test_a_long_recording_does_not_delay_a_short_one(together, wav):
    (long, short), _ = together(wav(70), wav(), batch_seconds=0)
    _, transcript = short.wait()
    long.wait()
    rest = long.log[long.log.index((short, transcript)) + 1 :]
    assert len(rest) > 2 and all(client is long for client, _ in rest)


def test_a_long_silence_does_not_delay_a_short_recording(together, wav):
    silence = encoded(np.zeros(600 * 16000, np.float32), format="WAV")
    (long, short), _ = together(silence, wav(), max_seconds=700)
    assert long.wait()[1] == Transcript("", (), (), 600.0) and short.wait()[1].text
    assert [client for client, event in long.log if isinstance(event, Transcript)] == [short, long]


def test_segments_are_those_of_the_transcript_in_order(together, model, wav):
    (client,), _ = together(wav(45), batch_seconds=0)
    segments, transcript = client.wait()
    assert len(segments) > 2 and tuple(segments) == transcript.segments
    assert_equal_up_to_rounding(transcript, alone(model, wav(45)))


def test_a_recording_that_is_too_long_fails(together, wav):
    (client,), _ = together(wav(3.0), max_seconds=2.0)
    assert isinstance(client.wait()[1], TooLong)


def test_a_recording_without_speech_has_an_empty_text(together):
    (client,), _ = together(encoded([0.0] * 16000, format="WAV"))
    assert client.wait()[1] == Transcript("", (), (), 1.0)


def test_a_cancelled_recording_is_dropped(together, wav):
    cancelled = Client(wav(70))
    cancelled.job.cancel()
    _, batcher = together()
    batcher.submit(cancelled.job)
    kept = Client(wav())
    batcher.submit(kept.job)
    assert isinstance(kept.wait()[1], Transcript)
    assert cancelled.events.empty() and batcher.totals.segments == 1


def test_closing_finishes_the_waiting_recordings(together, wav):
    clients, batcher = together(wav(25), wav(), batch_seconds=0)
    batcher.close()
    assert not batcher.is_alive
    assert all(isinstance(client.wait()[1], Transcript) for client in clients)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("method", ["_read", "_decode"])
def test_closing_does_not_wait_for_a_thread_that_a_bug_has_ended(model, wav, method):
    batcher = Batcher(model, max_seconds=100.0, batch_seconds=0)
    setattr(batcher, method, raising(BaseException("a bug")))
    batcher.submit(Client(wav(70)).job)
    while batcher.is_alive:
        time.sleep(0.01)
    closing = threading.Thread(target=batcher.close, daemon=True)
    closing.start()
    closing.join(1)
    assert not closing.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_called_function_that_ends_early_does_not_leave_its_caller_waiting(together):
    _, batcher = together()
    with pytest.raises(SystemExit):
        batcher.call(raising(SystemExit())).result(20)
    assert batcher.is_alive


def test_the_error_of_a_called_function_is_in_its_future(together):
    _, batcher = together()
    with pytest.raises(ZeroDivisionError):
        batcher.call(lambda model: 1 // 0).result(20)
    assert batcher.is_alive
