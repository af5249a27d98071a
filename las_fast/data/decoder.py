"""Decode one stream of a recording with libsndfile, block by block; resume after damage if the codec allows it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from las_fast.data.containers import FileView, Source, Stream

if TYPE_CHECKING:
    from las_fast.data.media import MediaStream

BLOCK = 1 << 18  # samples per block at most, over all channels
MAX_DAMAGE = 60  # seconds of a FLAC stream that are replaced by zeros
MAX_FAILURES = 3  # consecutive reads that fail without samples
UNKNOWN_COUNT = 1e12  # samples; libsndfile reports more where it does not know the length
READ_ERRORS = (soundfile.LibsndfileError, OSError, RuntimeError, ValueError, TypeError)


class SoundStream(soundfile.SoundFile):
    """A stream opened with libsndfile. It reports as not seekable, so that soundfile never seeks after a read."""

    def __init__(self, source: Source, spans: tuple):
        self.raised: BaseException | None = None
        if spans == ((0, source.size),):
            os.lseek(source.descriptor, 0, os.SEEK_SET)
            super().__init__(os.dup(source.descriptor))
            return
        with self._callbacks():
            super().__init__(FileView(source, spans))

    def seekable(self) -> bool:
        return False

    def read(self, *arguments, **options) -> np.ndarray:
        with self._callbacks():
            return super().read(*arguments, **options)

    @contextlib.contextmanager
    def _callbacks(self):
        """Raise the exception of a callback after the C call returns, for example that of Ctrl-C."""
        try:
            yield
        finally:
            if self.raised is not None:
                raise self.raised

    def _init_virtual_io(self, file: FileView):
        """Make soundfile's callbacks, and keep their exceptions, which cffi would print and drop."""
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


class AudioDecoder:
    """The blocks (n, channels) float32 of a stream, from sample `skip` to sample `stop` (None: to the end).

    Damage within a FLAC stream of known length is replaced by zeros, up to MAX_DAMAGE. The attributes are
    final after the iteration:
        position: samples per channel decoded or skipped so far.
        yielded:  whether any block was yielded.
        lost:     samples per channel replaced by zeros.
        stopped:  whether the iteration ended at `stop`.
        error:    the decoder's last error, or "".
    """

    def __init__(self, source: Source, stream: Stream, sound: SoundStream | MediaStream, skip: int, stop: int | None):
        self.source, self.sound, self.stream, self.skip, self.stop = source, sound, stream, skip, stop
        self.position = self.lost = 0
        self.yielded, self.stopped, self.error = False, False, ""
        self.block = min(sound.samplerate, BLOCK // sound.channels)

    def blocks(self) -> Iterator[np.ndarray]:
        try:
            yield from self._blocks()
        finally:
            self.sound.close()

    def _blocks(self) -> Iterator[np.ndarray]:
        self._seek()
        failures = 0
        while failures < MAX_FAILURES:
            if self.stop is not None and self.position >= self.stop:
                self.stopped = True
                return
            block, failed = self._next()
            if not len(block) and self.error and self.stream.resumable and self.stream.sample_count:
                block = self._skip_damage()
            failures = failures + 1 if failed and not len(block) else 0
            first = min(len(block), max(0, self.skip - self.position))
            self.position += len(block)
            if first < len(block):
                self.yielded = True
                yield block[first:]
            if not failed and len(block) == 0:
                return

    def _seek(self) -> None:
        """Seek to sample `skip` minus the preroll, or to 0 if the length is unknown."""
        known = self.sound.frames < UNKNOWN_COUNT
        preroll = round(self.stream.preroll * self.sound.samplerate)
        position = max(0, min(self.skip, self.sound.frames) - preroll) if known else 0
        with contextlib.suppress(*READ_ERRORS):
            self.position = self.sound.seek(position)

    def _next(self) -> tuple[np.ndarray, bool]:
        """Return the next block, and whether the decoder failed after it."""
        count = self.block if self.stop is None else min(self.block, self.stop - self.position)
        out = np.full((count, self.sound.channels), np.nan, np.float32)
        try:
            return self.sound.read(out=out), False
        except READ_ERRORS as error:  # out has the samples decoded before the error
            self.error = decoder_message(error)
            return out[: len(out) - int(np.isnan(out[:, 0]).sum())], True

    def _skip_damage(self) -> np.ndarray:
        """Return zeros up to the position where decoding works again; an empty block if there is none."""
        frames = self.stream.sample_count or 0
        for length in (4096 << k for k in range(8)):
            if self.position + length >= frames or self.lost + length > MAX_DAMAGE * self.sound.samplerate:
                break
            with contextlib.suppress(*READ_ERRORS):
                reopened = SoundStream(self.source, self.stream.spans)
                try:
                    reopened.seek(self.position + length)
                    self.lost += length
                    self.sound, reopened = reopened, self.sound
                    return np.zeros((length, self.sound.channels), np.float32)
                finally:
                    reopened.close()
        return np.zeros(0, np.float32)


def decoder_message(error: Exception) -> str:
    """Return the message of a decoder's error without its prefix and full stop."""
    if isinstance(error, soundfile.LibsndfileError):
        message = error.error_string.removeprefix("Error : ").rstrip(".")
        # libsndfile reports a failure in mpg123 as a missing file
        return "no frame can be decoded" if message.startswith("File does not exist") else message
    return str(error).split(": ", 1)[-1].rstrip(".") or type(error).__name__
