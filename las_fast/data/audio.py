"""Read recordings of any common format as one channel at one sample rate, in blocks of about a second.

`load_audio` returns a recording or a part of it; `open_recording` reads one of any length in bounded memory. Both run
the same code, so their samples are equal. All streams of a file are read (las_fast.data.containers). Missing or damaged
audio is reported as a warning, or with strict as an InputError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soxr

from las_fast.data.channels import Mixer, check_samples, unscaled_integer_bits
from las_fast.data.containers import FileLayout, Source, Stream, find_streams
from las_fast.data.decoder import READ_ERRORS, UNKNOWN_COUNT, AudioDecoder, SoundStream
from las_fast.data.media import MediaStream, open_sound
from las_fast.data.opening import Audio, name_of, open_descriptor
from las_fast.data.quality import SignalQuality
from las_fast.data.refusals import refusal_reason
from las_fast.data.samples import RATES
from las_fast.errors import InputError
from las_fast.files import file_identity

if TYPE_CHECKING:
    from las_fast.data.corpus import Utterance

__all__ = ["Audio", "Recording", "load_audio", "load_utterance", "name_of", "open_recording"]

TOLERANCE = 0.1  # seconds that may be missing at the end: some recorders count the header as audio
Sound = SoundStream | MediaStream
MAX_LAYOUTS = 8  # files whose layout is cached


def load_audio(
    path: str | Path, sample_rate: int, *, start: float = 0.0, seconds: float | None = None, strict: bool = False
) -> np.ndarray:
    """Read a recording, or a part of it, as one channel.

    Args:
        path:        a file that libsndfile reads (wav, flac, ogg, mp3, ...) or, if PyAV is installed, FFmpeg (m4a, mp4,
                     webm, ...); or "-" for standard input. Channels are averaged; where they cancel each other out, the
                     loudest is taken.
        sample_rate: Hz; audio at another rate is resampled.
        start:       seconds from the beginning of the recording.
        seconds:     length of the part; None reads to the end.
        strict:      raise if audio is missing or damaged; otherwise return the rest.

    Returns:
        (N,) float32 samples from -1 to 1, N >= 1.

    Raises:
        InputError: the file is missing, is not audio, has no samples, or has NaN, infinite or huge samples; it ends
            more than 0.1 s before the part; or it has missing or damaged audio and strict is set.
    """
    with Recording(path, sample_rate, start=start, seconds=seconds, strict=strict, measure=False) as recording:
        return np.concatenate(list(recording))


def load_utterance(utterance: Utterance, sample_rate: int, *, strict: bool = False) -> np.ndarray:
    """Read the recording of an utterance, or the part of it that the utterance is; see load_audio."""
    if utterance.problem:
        raise InputError(utterance.problem)
    path = utterance.path.absolute()  # "-" would be standard input
    seconds = utterance.seconds if utterance.is_part else None
    return load_audio(path, sample_rate, start=utterance.start, seconds=seconds, strict=strict)


def open_recording(path: Audio, sample_rate: int, *, start: float = 0.0, seconds: float | None = None) -> Recording:
    """Open a recording of any length to read it block by block; arguments and errors are those of load_audio.

    path may also be Samples, or a binary file object, which is read from its current position to its end.
    """
    return Recording(path, sample_rate, start=start, seconds=seconds)


class Recording:
    """A recording that can be iterated over once, in blocks (n,) float32 of about a second, n >= 1.

    warnings lists its problems, one sentence each; the list is complete after the iteration. The file stays open until
    the iteration ends, or until `close`. measure adds warnings about the quality of the signal.
    """

    _descriptor: int | None = None  # of the open file

    def __init__(
        self,
        path: Audio,
        sample_rate: int,
        *,
        start: float,
        seconds: float | None,
        strict: bool = False,
        measure: bool = True,
    ):
        self.path, self.sample_rate = path, sample_rate
        self.name = name_of(path)
        self.warnings: list[str] = []
        self._start, self._seconds, self._strict = start, seconds, strict
        self._quality = SignalQuality(sample_rate) if measure else None
        self._elapsed = 0.0  # seconds of the recording decoded or skipped so far
        self._unread: list[str] = []  # sentences about audio that is not read; they end with advice
        self._damage: list[str] = []  # sentences about missing or damaged audio
        self._cut: list[str] = []  # sentences about streams that end early
        if not start >= 0 or not (seconds is None or seconds > 0) or start == float("inf"):
            raise InputError(f"a part of {self.name} must start at 0 s or later and last longer than 0 s; "
                             f"got {start} and {seconds} s")  # fmt: skip
        self._descriptor = open_descriptor(path, self.name, pipes=not strict)

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; later calls do nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self):
        self.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._descriptor is None:
            raise ValueError("a Recording can be iterated over only once; open the file again")
        try:
            count = 0
            for block in self._blocks(self._descriptor):
                if len(block):
                    count += len(block)
                    if self._quality:
                        self._quality.add(block)
                    yield block
            self._finish(count)
        finally:
            self.close()

    def _blocks(self, descriptor: int) -> Iterator[np.ndarray]:
        source = Source(descriptor)
        if not source.size:
            raise InputError(f"{self.name} is empty (0 bytes); remove it or record it again")
        layout = find_streams(source) if self._seconds is None and not self._start else _cached_layout(source)
        self._unread += [f"{self.name} {sentence}" for sentence in layout.unread]
        for number, stream in enumerate(layout.streams):
            if self._remaining() <= 0:
                break
            yield from self._read_stream(source, stream, number, len(layout.streams))
        if source.error:
            self._damage.append(f"{self.name} cannot be read to its end ({source.error.strerror})")

    def _remaining(self) -> float:
        """Return the seconds still to read."""
        return float("inf") if self._seconds is None else self._start + self._seconds - self._elapsed

    def _read_stream(self, source: Source, stream: Stream, number: int, stream_count: int) -> Iterator[np.ndarray]:
        sound = self._open_stream(source, stream, number, stream_count)
        if sound is not None:
            with sound:
                yield from self._decode(source, stream, sound, number, stream_count)

    def _decode(
        self, source: Source, stream: Stream, sound: Sound, number: int, stream_count: int
    ) -> Iterator[np.ndarray]:
        rate = sound.samplerate
        begin = self._elapsed
        skip = max(0, round((self._start - begin) * rate))
        stop = None if self._seconds is None else round((self._start + self._seconds - begin) * rate)
        decoder = AudioDecoder(source, stream, sound, skip, stop)
        mixer = Mixer(sound.channels, rate, self._integer_bits(source, sound, number))
        resampler = None if rate == self.sample_rate else soxr.ResampleStream(rate, self.sample_rate, 1, "float32")
        for block in decoder.blocks():
            block = mixer.scaled(block)
            check_samples(self.name, block)
            if self._quality:
                self._quality.count_clipped(block)
            mono = mixer(block)
            yield resampler.resample_chunk(mono) if resampler else mono
        if resampler:
            yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        self._elapsed = begin + decoder.position / rate
        self._note_missing(decoder, stream, rate, number, stream_count)
        warnings = [f"{self.name}: {warning}" for warning in mixer.warnings()]
        self.warnings += [warning for warning in warnings if warning not in self.warnings]
        if self._quality and decoder.yielded:
            self._quality.lowest_rate = min(rate, self._quality.lowest_rate)

    def _integer_bits(self, source: Source, sound: Sound, number: int) -> int:
        """Return unscaled_integer_bits of stream `number`; those of the last stream are kept for its other parts."""
        key = (*file_identity(os.fstat(source.descriptor)), number)
        bits = _known_integer_bits.get(key)
        if bits is None:
            bits = unscaled_integer_bits(sound)
            _known_integer_bits.clear()
            _known_integer_bits[key] = bits
        return bits

    def _open_stream(self, source: Source, stream: Stream, number: int, stream_count: int) -> Sound | None:
        """Open a stream; return None if it is bad but one of several.

        Raises:
            InputError: the only stream of a file cannot be opened, or a sample rate is out of range.
        """
        try:
            sound = open_sound(source, stream)
        except READ_ERRORS as error:
            reason = refusal_reason(source, stream, error)
            if stream_count == 1:
                raise InputError(f"{self.name} {reason}") from None
            self._damage.append(f"{self.name}: part {number + 1} of {stream_count} {reason}")
            return None
        low, high = RATES
        if not low <= sound.samplerate <= high:
            raise InputError(
                f"{self.name} has a sample rate of {sound.samplerate} Hz in its header; expected {low} to {high} Hz: "
                "export it again"
            )
        return sound

    def _note_missing(self, decoder: AudioDecoder, stream: Stream, rate: int, number: int, stream_count: int) -> None:
        """Note missing and damaged audio of a stream after it is decoded."""
        decoded = decoder.position / rate  # seconds
        name = f"part {number + 1} of {stream_count} of {self.name}" if stream_count > 1 else self.name
        if stream.gap:
            self._damage.append(f"{name} has a gap: {stream.gap}")
        if decoder.lost:
            self._damage.append(f"{name} is damaged: {decoder.lost / rate:.2f} s cannot be read ({decoder.error})")
        if decoder.stopped:
            return
        missing, empty = 0.0, False
        if stream.sample_count is not None:
            missing = (stream.sample_count - decoder.position - stream.padding) / rate
        elif stream.missing_bytes:
            missing = decoded * stream.missing_bytes / stream.length
            empty = not decoded
        elif stream.length_known and decoder.sound.frames < UNKNOWN_COUNT:
            missing = (decoder.sound.frames - decoder.position) / rate
        if decoder.error and (stream.sample_count is None or missing > TOLERANCE):
            total = f" of {decoded + missing:.2f} s" if stream.sample_count else ""
            self._cut.append(
                f"{name} is cut off or damaged: after {decoded:.2f} s{total} it cannot be read ({decoder.error})"
            )
        elif missing > TOLERANCE:
            total = f"{decoded + missing:.2f} s that its header states"
            self._cut.append(f"{name} is cut off: it has {decoded:.2f} of the {total}")
        elif empty:
            self._cut.append(f"{name} is cut off: its header announces audio, but none follows")
        elif stream.cut:
            self._cut.append(f"{name} is cut off: it ends after {decoded:.2f} s without an end-of-stream mark")

    def _finish(self, count: int) -> None:
        """Complete the warnings, or raise InputError; count is the number of samples yielded."""
        part = self._seconds is not None
        end = self._start + (self._seconds or 0)
        if (part and self._elapsed < end - TOLERANCE) or (self._start and not count):
            until = f" to {end:g}" if part else ""
            raise InputError(
                f"{self.name} lasts {self._elapsed:.2f} s, too short for a part from {self._start:g}{until} s; "
                "correct the times"
            )
        problems = self._damage + ([] if part else self._cut)
        if self._strict or not count:
            if self._unread:
                raise InputError(self._unread[0])
            if problems:
                raise InputError(f"{problems[0]}; copy it again, repair it or remove it")
        if not count:
            raise InputError(f"{self.name} has no samples; remove it or record it again")
        self.warnings += self._unread + problems
        if self._quality:
            self.warnings += [f"{self.name} {warning}" for warning in self._quality.warnings()]


_known_integer_bits: dict[tuple, int] = {}  # file identity and stream number -> bits, for one stream
_layouts: dict[tuple, FileLayout] = {}  # file identity -> layout, for the last files of which parts were read


def _cached_layout(source: Source) -> FileLayout:
    """Return find_streams(source), cached, because parts of a long recording are read one after another."""
    key = file_identity(os.fstat(source.descriptor))
    layout = _layouts.get(key)
    if layout is None:
        layout = find_streams(source)
        while len(_layouts) >= MAX_LAYOUTS:
            for oldest in [*_layouts][:1]:
                _layouts.pop(oldest, None)  # another thread may have removed it
        _layouts[key] = layout
    return layout
