"""Recordings to samples: whatever people have, in one channel at one rate, in blocks of about a second.

`load_audio` returns a recording or a part of it; `open_recording` reads one of any length in bounded memory. Both run
the same code, so their samples are the same. All streams of a file are read (see las_fast.data.containers). What is not
read is reported: as a warning, or as an InputError where the whole recording is asked for.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from las_fast.data.containers import OGG_CODECS, Layout, Source, Stream, View, find_streams, foreign_format
from las_fast.data.samples import RATES, Samples
from las_fast.errors import InputError, show

TOLERANCE = 0.1  # seconds that may be missing at the end; recorders count their header as sound
BLOCK = 1 << 18  # numbers in a block at most, over all channels
LONGEST_DAMAGE = 60  # seconds of a FLAC stream that are replaced by zeros
LOUDEST = 1e6  # a sample; full scale is 1
Audio = str | os.PathLike[str] | BinaryIO | Samples  # a path, "-" for standard input, bytes or an array
READ_ERRORS = (soundfile.LibsndfileError, OSError, RuntimeError, ValueError, TypeError)
WHOLE_NUMBERS = 4.0  # samples above this may be whole numbers that somebody forgot to divide by their full scale
CANCELLED = 0.1  # energy of the mean of channels, relative to that of unrelated channels, below which they cancel
TOGETHER = 0.5  # and above which they do not
AUDIBLE = 1e-5  # root mean square, of full scale, below which channels are not compared
VERY_QUIET = 0.004  # peak of a recording
CLIPPED = 0.002  # share of samples that repeat their neighbour at the top of the scale
NARROW = 4e-6  # energy above 4.4 kHz, relative to that of speech below 3.4 kHz
NARROW_AT_FLOOR = 6.3e-5  # the same where there is no more than the rounding to 16 bits leaves
LONGEST = 1e12  # samples; libsndfile claims more where it does not know the length
LOOK = 4096  # samples per channel at each place where a file is searched for whole numbers


def load_audio(
    path: str | Path, sample_rate: int, *, start: float = 0.0, seconds: float | None = None, whole: bool = False
) -> np.ndarray:
    """Read a recording, or a part of it, as one channel.

    Args:
        path:        a file that libsndfile reads (wav, flac, ogg, mp3, ...), or "-" for standard input. Channels are
                     averaged; where they cancel each other out the loudest is taken.
        sample_rate: Hz; audio at another rate is resampled.
        start:       seconds from the beginning of the recording.
        seconds:     length of the part; None is all from start on.
        whole:       refuse a recording of which something is missing; otherwise what there is is returned.

    Returns:
        (N,) float32 samples from -1 to 1, N >= 1.

    Raises:
        InputError: the file is missing, is no audio, holds no samples or some that are no sound, is not whole, or ends
            more than 0.1 s before the part does.
    """
    with Recording(path, sample_rate, start=start, seconds=seconds, whole=whole, judge=False) as recording:
        return np.concatenate(list(recording))


def open_recording(path: Audio, sample_rate: int, *, start: float = 0.0, seconds: float | None = None) -> Recording:
    """Open a recording of any length for reading block by block; arguments and errors are those of load_audio.

    path may also be a binary file object, which is read from where it stands to its end, or Samples.
    """
    return Recording(path, sample_rate, start=start, seconds=seconds)


def name_of(recording: Audio) -> str:
    """Return what errors and warnings call a recording."""
    if isinstance(recording, Samples):
        return "the array"
    if isinstance(recording, (str, os.PathLike)):
        return "standard input" if os.fspath(recording) == "-" else show(recording)
    name = getattr(recording, "name", None)
    return show(name) if isinstance(name, str) and name else "the file object"


class Recording:
    """A recording that is iterated over once, in blocks (n,) float32 of about a second, n >= 1.

    warnings holds sentences on what is wrong with it, complete when the iteration has ended. The file is open from the
    start to the end of the iteration, or to `close`.
    """

    _descriptor: int | None = None  # of the open file

    def __init__(
        self,
        path: Audio,
        sample_rate: int,
        *,
        start: float = 0.0,
        seconds: float | None = None,
        whole: bool = False,
        judge: bool = True,
    ):
        self.path, self.sample_rate = path, sample_rate
        self.name = name_of(path)
        self.warnings: list[str] = []
        self._start, self._seconds, self._whole = start, seconds, whole
        self._judge = _Judge(sample_rate) if judge else None
        self._elapsed = 0.0  # seconds of the recording that were passed
        self._holes: list[str] = []
        self._cut: list[str] = []
        if not start >= 0 or not (seconds is None or seconds > 0) or start == float("inf"):
            raise InputError(f"a part of {self.name} must start at 0 s or later and last longer than 0 s; "
                             f"got {start} and {seconds} s")  # fmt: skip
        self._descriptor = _open(path, self.name, pipes=not whole)

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self):
        self.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._descriptor is None:
            raise ValueError("a recording is read once; open it again")
        try:
            count = 0
            for block in self._blocks(self._descriptor):
                if len(block):
                    count += len(block)
                    if self._judge:
                        self._judge.add(block)
                    yield block
            self._finish(count)
        finally:
            self.close()

    def _blocks(self, descriptor: int) -> Iterator[np.ndarray]:
        source = Source(descriptor)
        if not source.size:
            raise InputError(f"{self.name} is empty (0 bytes); remove it or record it again")
        layout = find_streams(source) if self._seconds is None and not self._start else _known_streams(source)
        self._holes += [f"{self.name} {sentence}" for sentence in layout.unread]
        for number, stream in enumerate(layout.streams):
            if self._wanted() <= 0:
                break
            yield from self._read_stream(source, stream, number, len(layout.streams))
        if source.error:
            self._holes.append(f"{self.name} cannot be read to its end ({source.error.strerror})")

    def _wanted(self) -> float:
        """Return the seconds still to read."""
        return float("inf") if self._seconds is None else self._start + self._seconds - self._elapsed

    def _read_stream(self, source: Source, stream: Stream, number: int, streams: int) -> Iterator[np.ndarray]:
        sound = self._decoder(source, stream, number, streams)
        if sound is not None:
            with sound:
                yield from self._decode(source, stream, sound, number, streams)

    def _decode(self, source: Source, stream: Stream, sound: _Sound, number: int, streams: int) -> Iterator[np.ndarray]:
        rate = sound.samplerate
        begin = self._elapsed
        skip = max(0, round((self._start - begin) * rate))
        last = None if self._seconds is None else round((self._start + self._seconds - begin) * rate)
        decoded = _Decoded(source, stream, sound, skip, last)
        mixer = _Mixer(sound.channels, rate, _integer_bits(sound))
        resampler = None if rate == self.sample_rate else soxr.ResampleStream(rate, self.sample_rate, 1, "float32")
        for block in decoded.blocks():
            block = mixer.scaled(block)
            _check_sound(self.name, block)
            if self._judge:
                self._judge.count_clipped(block)
            mono = mixer(block)
            yield resampler.resample_chunk(mono) if resampler else mono
        if resampler:
            yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        self._elapsed = begin + decoded.place / rate
        self._note(decoded, stream, rate, number, streams)
        told = [f"{self.name}: {sentence}" for sentence in mixer.sentences()]
        self.warnings += [sentence for sentence in told if sentence not in self.warnings]
        if self._judge and decoded.given:
            self._judge.lowest_rate = min(rate, self._judge.lowest_rate)

    def _decoder(self, source: Source, stream: Stream, number: int, streams: int) -> _Sound | None:
        try:
            sound = _Sound(source, stream.spans)
        except READ_ERRORS as error:
            reason = _refusal(source, stream, error)
            if streams == 1:
                raise InputError(f"{self.name} {reason}") from None
            self._holes.append(f"{self.name}: part {number + 1} of {streams} {reason}")
            return None
        low, high = RATES
        if not low <= sound.samplerate <= high:
            raise InputError(
                f"{self.name} has {sound.samplerate} samples per second by its header, not {low} to {high}; "
                "make it again"
            )
        return sound

    def _note(self, decoded: _Decoded, stream: Stream, rate: int, number: int, streams: int) -> None:
        """Note what a stream lacks, now that it was decoded."""
        have = decoded.place / rate
        of = f"part {number + 1} of {streams} of {self.name}" if streams > 1 else self.name
        if stream.hole:
            self._holes.append(f"{of} has a gap: {stream.hole}")
        if decoded.lost:
            self._holes.append(f"{of} is damaged: {decoded.lost / rate:.2f} s cannot be read ({decoded.error})")
        if decoded.stopped:
            return
        missing, empty = 0.0, False
        if stream.frames is not None:
            missing = (stream.frames - decoded.place - stream.padding) / rate
        elif stream.lacking:
            missing = have * stream.lacking / stream.length
            empty = not have
        elif stream.counted and decoded.sound.frames < LONGEST:
            missing = (decoded.sound.frames - decoded.place) / rate
        if decoded.error and (stream.frames is None or missing > TOLERANCE):
            total = f" of {have + missing:.2f} s" if stream.frames else ""
            self._cut.append(
                f"{of} is cut off or damaged: after {have:.2f} s{total} it cannot be read ({decoded.error})"
            )
        elif missing > TOLERANCE:
            whole = f"{have + missing:.2f} s that its header gives"
            self._cut.append(f"{of} is cut off: it holds {have:.2f} of the {whole}")
        elif empty:
            self._cut.append(f"{of} is cut off: none of the sound that its header gives is there")
        elif stream.cut:
            self._cut.append(f"{of} is cut off: it ends after {have:.2f} s without the mark of its end")

    def _finish(self, count: int) -> None:
        part = self._seconds is not None
        end = self._start + (self._seconds or 0)
        if (part and self._elapsed < end - TOLERANCE) or (self._start and not count):
            until = f" to {end:g}" if part else ""
            raise InputError(
                f"{self.name} lasts {self._elapsed:.2f} s; a part of it from {self._start:g}{until} s was asked for"
            )
        problems = self._holes + ([] if part else self._cut)
        if problems and (self._whole or not count):
            raise InputError(f"{problems[0]}; copy it again, repair it or remove it")
        if not count:
            raise InputError(f"{self.name} holds no samples; remove it or record it again")
        self.warnings += problems
        if self._judge:
            self.warnings += [f"{self.name} {sentence}" for sentence in self._judge.sentences()]


_layouts: dict[tuple, Layout] = {}  # of the files that parts were read from last


def _known_streams(source: Source) -> Layout:
    """Return find_streams(source), which is remembered: parts of a long recording are read one after another."""
    status = os.fstat(source.descriptor)
    key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if key not in _layouts:
        while len(_layouts) >= 8:
            del _layouts[next(iter(_layouts))]
        _layouts[key] = find_streams(source)
    return _layouts[key]


class _Sound(soundfile.SoundFile):
    """A stream as libsndfile decodes it, which soundfile must not wind back after every block."""

    def __init__(self, source: Source, spans: tuple):
        self.raised: BaseException | None = None
        if spans == ((0, source.size),):
            os.lseek(source.descriptor, 0, os.SEEK_SET)
            super().__init__(os.dup(source.descriptor))
            return
        with self._callbacks():
            super().__init__(View(source, spans))

    def seekable(self) -> bool:
        return False

    def read(self, *arguments, **options) -> np.ndarray:
        with self._callbacks():
            return super().read(*arguments, **options)

    @contextlib.contextmanager
    def _callbacks(self):
        """Raise here what was raised within a callback, as by Ctrl-C."""
        try:
            yield
        finally:
            if self.raised is not None:
                raise self.raised

    def _init_virtual_io(self, file: View):
        """Make callbacks as soundfile does, whose exceptions are kept; cffi would print and forget them."""
        ffi = soundfile._ffi

        def keep(kind, error, trace) -> None:
            self.raised = error

        def callback(name: str, function):
            return ffi.callback(f"sf_vio_{name}", function, onerror=keep)

        self._virtual_io = {
            "get_filelen": callback("get_filelen", lambda _: file.starts[-1]),
            "seek": callback("seek", lambda offset, whence, _: file.seek(offset, whence)),
            "read": callback("read", lambda buffer, count, _: file.readinto(ffi.buffer(buffer, count))),
            "tell": callback("tell", lambda _: file.tell()),
        }
        return ffi.new("SF_VIRTUAL_IO*", self._virtual_io)


class _Decoded:
    """The blocks (n, channels) float32 of a stream from sample `skip` to sample `last` (None: to its end).

    Damage within FLAC is replaced by zeros. After the iteration: place is the number of samples per channel that were
    passed, given whether any were given out, lost the number of those that were replaced, stopped whether it was `last`
    that ended it, error what the decoder said.
    """

    def __init__(self, source: Source, stream: Stream, sound: _Sound, skip: int, last: int | None):
        self.source, self.sound, self.stream, self.skip, self.last = source, sound, stream, skip, last
        self.place = self.lost = 0
        self.given, self.stopped, self.error = False, False, ""
        self.block = min(sound.samplerate, BLOCK // sound.channels)

    def blocks(self) -> Iterator[np.ndarray]:
        try:
            yield from self._blocks()
        finally:
            self.sound.close()

    def _blocks(self) -> Iterator[np.ndarray]:
        self._wind()
        failures = 0
        while failures < 3:
            if self.last is not None and self.place >= self.last:
                self.stopped = True
                return
            block, failed = self._next()
            if not len(block) and self.error and self.stream.resumable and self.stream.frames:
                block = self._over_damage()
            failures = failures + 1 if failed and not len(block) else 0
            first = min(len(block), max(0, self.skip - self.place))
            self.place += len(block)
            if first < len(block):
                self.given = True
                yield block[first:]
            if not failed and len(block) == 0:
                return

    def _wind(self) -> None:
        """Seek to the first sample, or before it where the decoder needs the past; to 0 if the length is unknown."""
        known = self.sound.frames < LONGEST
        before = round(self.stream.preroll * self.sound.samplerate)
        place = max(0, min(self.skip, self.sound.frames) - before) if known else 0
        with contextlib.suppress(*READ_ERRORS):
            self.place = self.sound.seek(place)

    def _next(self) -> tuple[np.ndarray, bool]:
        count = self.block if self.last is None else min(self.block, self.last - self.place)
        out = np.full((count, self.sound.channels), np.nan, np.float32)
        try:
            return self.sound.read(out=out), False
        except READ_ERRORS as error:  # what was decoded before it is in out
            self.error = _reason(error)
            return out[: len(out) - int(np.isnan(out[:, 0]).sum())], True

    def _over_damage(self) -> np.ndarray:
        """Return zeros up to where decoding goes on behind damage, or nothing where it does not."""
        frames = self.stream.frames or 0
        for length in (4096 << k for k in range(8)):
            if self.place + length >= frames or self.lost > LONGEST_DAMAGE * self.sound.samplerate:
                break
            with contextlib.suppress(*READ_ERRORS):
                again = _Sound(self.source, self.stream.spans)
                try:
                    again.seek(self.place + length)
                    self.lost += length
                    self.sound, again = again, self.sound
                    return np.zeros((length, self.sound.channels), np.float32)
                finally:
                    again.close()
        return np.zeros(0, np.float32)


def _check_sound(name: str, samples: np.ndarray) -> None:
    if not np.maximum(-samples.min(), samples.max()) <= LOUDEST:  # NaN is not
        raise InputError(f"{name} holds NaN, infinite or enormous samples, not numbers from -1 to 1; make it again")


def _integer_bits(sound: _Sound) -> int:
    """Return 16, 24 or 32 where floating-point samples are whole numbers of so many bits that nobody divided, else 0.

    Long files are looked at in 256 places.
    """
    if sound.subtype not in ("FLOAT", "DOUBLE"):
        return 0
    over, total, peak = 0, 0, 0.0
    with contextlib.suppress(*READ_ERRORS):
        for place in range(0, sound.frames, max(LOOK, sound.frames // 256)):
            sound.seek(place)
            block = np.abs(sound.read(LOOK))
            over += int((block > WHOLE_NUMBERS).sum())
            total += int(np.count_nonzero(block))
            peak = max(peak, float(block.max(initial=0)))
    if over <= 0.01 * total or peak < 25 * WHOLE_NUMBERS:
        return 0
    return next((bits for bits in (16, 24, 32) if peak <= 2 ** (bits + 1)), 0)


class _Mixer:
    """Turns blocks (n, channels) into (n,): the mean of the channels, or the loudest where they cancel each other out.

    Whether they cancel is judged block by block, below 2 kHz (lossy codecs lose the phase above) and on differences of
    neighbours, which offsets and hum do not fill. A decision stands until a block says otherwise.
    """

    def __init__(self, channels: int, rate: int, integer_bits: int):
        self.channels, self.bits = channels, integer_bits
        self.stride = max(1, rate // 4000)
        self.chosen: int | None = None
        self.cancelled = self.total = 0.0  # energies

    def sentences(self) -> list[str]:
        """Return what is to be said of the channels and the scale, when all blocks were mixed."""
        told = []
        if self.bits:
            full = 1 << self.bits - 1
            told.append(f"its samples are {self.bits}-bit numbers in floating point; they were divided by {full}")
        if self.cancelled > 0.01 * self.total:
            told.append("its channels cancel each other out (opposite phase); only the loudest is used there")
        return told

    def scaled(self, block: np.ndarray) -> np.ndarray:
        """Return a block with 1 as its full scale."""
        return block * np.float32(2.0 ** (1 - self.bits)) if self.bits else block

    def __call__(self, block: np.ndarray) -> np.ndarray:
        if self.channels == 1:
            return np.ascontiguousarray(block[:, 0])
        self._choose(block)
        return block.mean(axis=1) if self.chosen is None else block[:, self.chosen].copy()

    def _choose(self, block: np.ndarray) -> None:
        count = len(block) // self.stride
        low = block[: count * self.stride].reshape(count, self.stride, self.channels).mean(axis=1)
        slopes = np.diff(low, axis=0)
        energies = np.einsum("nc,nc->c", slopes, slopes)
        unrelated = energies.sum() / self.channels**2
        if unrelated <= count * AUDIBLE**2:
            return
        mean = slopes.mean(axis=1)
        share = float(np.dot(mean, mean)) / unrelated
        self.total += unrelated
        if share < CANCELLED:
            self.cancelled += unrelated
            if self.chosen is None or energies[self.chosen] < 0.1 * energies.max():
                self.chosen = int(np.argmax(energies > 0.9 * energies.max()))
        elif share > TOGETHER:
            self.chosen = None


class _Judge:
    """Measures the signal that is given out, for warnings on what makes recognition worse."""

    WINDOW = 512

    def __init__(self, sample_rate: int):
        self.sample_rate = sample_rate
        self.lowest_rate = sample_rate
        self.peak = 0.0
        self.samples = self.flat = 0
        self.low = self.high = self.floor = 0.0
        hertz = np.fft.rfftfreq(self.WINDOW, 1 / sample_rate)
        self.speech, self.above = (hertz > 300) & (hertz < 3400), (hertz > 4400) & (hertz < 7600)
        self.taper = np.hanning(self.WINDOW).astype(np.float32)
        self.rounding = 3 * self.above.sum() * float(np.square(self.taper).sum()) / 12 / 32768**2

    def add(self, block: np.ndarray) -> None:
        self.peak = max(self.peak, float(np.abs(block).max()))
        frames = block[: len(block) // self.WINDOW * self.WINDOW].reshape(-1, self.WINDOW)
        if self.sample_rate < 15_000 or not len(frames):
            return
        power = np.square(np.abs(np.fft.rfft(frames * self.taper)))
        self.low += float(power[:, self.speech].sum())
        self.high += float(power[:, self.above].sum())
        self.floor += len(frames) * self.rounding

    def count_clipped(self, block: np.ndarray) -> None:
        first, second, height = block[:-1, 0], block[1:, 0], np.abs(block[:, 0])
        self.samples += len(block)
        self.flat += int(((first == second) & (height[1:] > max(0.5, 0.97 * height.max()))).sum())

    def sentences(self) -> list[str]:
        found = []
        if self.lowest_rate < self.sample_rate:
            found.append(
                f"is sampled at {self.lowest_rate} Hz and the model was trained at {self.sample_rate} Hz; "
                "expect more errors"
            )
        elif self.high < (NARROW_AT_FLOOR if self.high < self.floor else NARROW) * self.low:
            found.append(
                "holds nothing above 4 kHz, as telephone speech sampled at 8000 Hz; the model was trained on a "
                f"band of {self.sample_rate // 2000} kHz; expect more errors"
            )
        if 0 < self.peak < VERY_QUIET:
            found.append(f"is very quiet: its loudest sample is {20 * np.log10(self.peak):.0f} dB of full scale")
        if self.flat > CLIPPED * self.samples:
            share = 100 * self.flat / self.samples
            found.append(f"is clipped: {share:.1f}% of its samples are at the top of the scale")
        return found


# ------------------------------------------------------------------------------------------------------ opening files


def _open(path: Audio, name: str, *, pipes: bool) -> int:
    """Return the descriptor of a regular file with these bytes: the file, or a copy of what is no regular file."""
    if isinstance(path, Samples):
        return _filled(path.write, name)
    if not isinstance(path, (str, os.PathLike)):
        return _filled(partial(_copy, path.read, name), name)
    if os.fspath(path) == "-":
        descriptor = _standard_input()
    else:
        _look(path, name, pipes=pipes)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except (OSError, ValueError) as error:
            raise InputError(f"{name} {_system_says(error)}") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return descriptor
        _check_kind(name, mode)
        copy = _spool(descriptor, name)
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return copy


def _look(path: str | os.PathLike[str], name: str, *, pipes: bool) -> None:
    """Raise InputError where opening cannot help, or would wait."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise InputError(f"{name} {_system_says(error)}") from None
    _check_kind(name, mode)
    if stat.S_ISSOCK(mode):
        raise InputError(f"{name} is a socket; give a wav, flac, ogg or mp3 file")
    if not stat.S_ISREG(mode) and not pipes:
        raise InputError(f"{name} is a pipe, which can be read only once; give a wav, flac, ogg or mp3 file")


KINDS = {stat.S_IFDIR: "folder", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}  # that hold no recording


def _check_kind(name: str, mode: int) -> None:
    if kind := KINDS.get(stat.S_IFMT(mode)):
        raise InputError(f"{name} is a {kind}; give a wav, flac, ogg or mp3 file")


def _standard_input() -> int:
    try:
        descriptor = os.dup(0)
    except OSError:
        raise InputError("standard input is closed; give a file, or send a recording through a pipe") from None
    if os.isatty(descriptor):
        os.close(descriptor)
        raise InputError("standard input is a terminal; give a file, or send a recording through a pipe")
    return descriptor


def _spool(descriptor: int, name: str) -> int:
    """Copy what a pipe or socket gives into a file without a name, and return its descriptor."""
    return _filled(partial(_copy, partial(os.read, descriptor), name), name)


def _copy(read: Callable[[int], bytes], name: str, descriptor: int) -> None:
    """Write what read gives to a file."""
    try:
        while data := read(1 << 20):
            while data:
                data = data[os.write(descriptor, data) :]
    except TypeError:
        raise InputError(f"{name} gives text and not bytes; open it with open(path, 'rb')") from None
    except ValueError as error:  # it is closed, or open for writing
        reason = str(error).rstrip(".")
        raise InputError(f"{name} cannot be read ({reason}); open it again with open(path, 'rb')") from None


def _filled(write: Callable[[int], None], name: str) -> int:
    """Return the descriptor of a new file without a name that holds what write(descriptor) puts there."""
    copy = _temporary()
    try:
        write(copy)
    except (OSError, soundfile.LibsndfileError) as error:
        os.close(copy)
        raise InputError(
            f"{name} could not be copied to a temporary file ({getattr(error, 'strerror', None) or _reason(error)}); "
            "make room or set TMPDIR to a folder with room"
        ) from None
    except BaseException:
        os.close(copy)
        raise
    return copy


def _temporary() -> int:
    """Return the descriptor of a new file without a name: in the folder for temporary files, or in memory."""
    try:
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())
    except OSError:
        return os.memfd_create("recording")


# ----------------------------------------------------------------------------------------------------- what is wrong

NO_AUDIO = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself; run git lfs pull"),
    (b"<!doctype html", "a web page, perhaps an error page of a download; download it again"),
    (b"id3", "a tag with no sound that is known behind it; copy it again"),
    (b"<html", "a web page, perhaps an error page of a download; download it again"),
    (b"pk\x03\x04", "a zip archive; unpack it"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"rar!", "a rar archive; unpack it"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
)


def _refusal(source: Source, stream: Stream, error: Exception) -> str:
    """Say why the bytes of a file could not be opened as audio, and what to do."""
    if source.error:
        return f"cannot be read ({source.error.strerror})"
    head = source.read(0, 64)
    ogg = any(magic in source.read(0, 8192) for magic in OGG_CODECS)
    if not ogg and (what := foreign_format(source)):
        return f"is {what}, which cannot be read; convert it: ffmpeg -i FILE -vn -ac 1 -ar 16000 FILE.wav"
    for magic, what in NO_AUDIO:
        if head.lower().startswith(magic):
            return f"is {what}"
    if stream.headless or stream.cut:
        return "is cut off or damaged within its header, before any sound; copy it again"
    if not any(head):
        return "begins with nothing but zeros, as after a crash or a broken copy; copy it again"
    if ogg and head[:4] == b"OggS":
        return f"cannot be read as audio ({_reason(error)}): its first pages are damaged; copy it again"
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"FORM", b"caff", b"fLaC", b"NIST"):
        return (
            f"cannot be read as audio ({_reason(error)}): its header is damaged, or its coding is not known; "
            "convert it: ffmpeg -i FILE -ac 1 -ar 16000 FILE.wav"
        )
    return f"cannot be read as audio ({_reason(error)}); give a wav, flac, ogg or mp3 file"


def _reason(error: Exception) -> str:
    if isinstance(error, soundfile.LibsndfileError):
        said = error.error_string.removeprefix("Error : ").rstrip(".")
        return "no frame can be decoded" if said.startswith("File does not exist") else said  # what mpg123 fails with
    return str(error).split(": ", 1)[-1].rstrip(".") or type(error).__name__


def _system_says(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    return f"cannot be opened ({getattr(error, 'strerror', None) or error})"
