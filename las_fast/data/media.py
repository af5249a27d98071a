"""Decode m4a, mp4, webm and other formats that libsndfile does not read; needs PyAV (extra `media`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from las_fast.data.containers import Source, Stream, foreign_format
from las_fast.data.decoder import UNKNOWN_COUNT, SoundStream
from las_fast.system import is_installed

INSTALL = "pip install av"
# Names of foreign_format -> FFmpeg's demuxers. Without a name FFmpeg would try all demuxers, among them those of
# playlists, which open other files.
DEMUXERS = {
    "MPEG-4 (m4a, mp4, mov)": "mov",
    "Matroska (webm, mkv)": "matroska",
    "Windows Media (wma, asf)": "asf",
    "AMR": "amr",
    "AAC": "aac",
    "AC-3": "ac3",
    "AVI": "avi",
    "Flash video": "flv",
    "WavPack": "wv",
    "Monkey's Audio": "ape",
    "True Audio": "tta",
    "RealMedia": "rm",
    "DSD": "dsf",
    "MPEG video": "mpeg",
    "an MPEG transport stream": "mpegts",
}
RAW = frozenset(("aac", "ac3", "amr"))  # demuxers of files that state no duration; FFmpeg guesses it


def has_pyav() -> bool:
    return is_installed("av")


def open_sound(source: Source, stream: Stream) -> SoundStream | MediaStream:
    """Open a stream with libsndfile, or with PyAV if only PyAV knows the format; raise one of READ_ERRORS."""
    demuxer = DEMUXERS.get(foreign_format(source))
    if demuxer and has_pyav():
        return MediaStream(source, demuxer)
    return SoundStream(source, stream.spans)


class MediaStream:
    """The first audio track of a file with a known codec; it has the methods of SoundFile that AudioDecoder needs.

    Attributes:
        samplerate: in Hz.
        channels:   number of channels.
        frames:     samples per channel that the file states; more than UNKNOWN_COUNT if it states none.

    Raises:
        RuntimeError: the file has no such track, or FFmpeg cannot read the file.
    """

    subtype = "PCM_16"  # anything but FLOAT: samples are scaled to -1 to 1

    def __init__(self, source: Source, demuxer: str):
        self._source, self._demuxer = source, demuxer
        self._open()
        seconds = self._seconds()
        self.frames = int(2 * UNKNOWN_COUNT) if seconds is None else round(seconds * self.samplerate)

    def _seconds(self) -> float | None:
        """Return the duration that the file states for the track, or for the whole if there is no other; or None."""
        if self._demuxer in RAW:
            return None
        if self._track.duration is not None:
            return float(self._track.duration * (self._track.time_base or 0))
        alone = len(self._container.streams) == 1 and self._container.duration is not None
        return self._container.duration / 1e6 if alone else None  # microseconds

    def _open(self) -> None:
        """Open the file at its start; raise RuntimeError as the constructor does."""
        import av

        with contextlib.ExitStack() as stack:
            file = stack.enter_context(os.fdopen(os.dup(self._source.descriptor), "rb"))
            file.seek(0)
            try:
                self._container: Any = stack.enter_context(av.open(file, format=self._demuxer))
                self._find_track()
            except av.FFmpegError as error:
                raise RuntimeError(error.strerror) from None
            self._opened = stack.pop_all()
        self._blocks = self._decode()
        self._pending = np.zeros((0, self.channels), np.float32)
        self._position = 0

    def _find_track(self) -> None:
        """Choose the first audio track whose codec FFmpeg knows."""
        tracks = [track for track in self._container.streams.audio if track.codec_context is not None]
        if not tracks:
            unknown = self._container.streams.audio
            raise RuntimeError("the codec of its audio track is unknown" if unknown else "it has no audio track")
        self._track, context = tracks[0], tracks[0].codec_context
        self._layout = context.layout
        self.samplerate, self.channels = context.sample_rate, self._layout.nb_channels
        if not self.samplerate or not self.channels:
            raise RuntimeError("no frame can be decoded")

    def _decode(self) -> Iterator[np.ndarray | RuntimeError]:
        """Yield the blocks (n, channels) of the track; an error instead of the block of a damaged packet."""
        import av

        resampler, template = None, None
        for frame in self._frames():
            if isinstance(frame, RuntimeError):
                yield frame
                continue
            form = (frame.format.name, frame.layout.name, frame.sample_rate)
            if form != template:  # it may change within a track, but a resampler takes only one
                yield from self._convert(resampler, None)
                resampler = av.AudioResampler(format="flt", layout=self._layout, rate=self.samplerate)
                template = form
            yield from self._convert(resampler, frame)
        yield from self._convert(resampler, None)

    def _frames(self) -> Iterator[Any]:
        """Yield the frames of the track; a RuntimeError instead of those of a damaged packet."""
        import av

        packets = self._container.demux(self._track)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                yield from packet.decode()
            except IndexError:  # a track began that the file did not have when PyAV opened it
                packets = self._container.demux(self._track)
            except av.FFmpegError as error:
                yield RuntimeError(error.strerror)

    def _convert(self, resampler: Any, frame: Any) -> Iterator[np.ndarray | RuntimeError]:
        """Yield a frame as blocks (n, channels) float32, or the rest if it is None; an error if that fails."""
        import av

        try:
            for part in resampler.resample(frame) if resampler else ():
                yield part.to_ndarray().reshape(-1, self.channels)
        except av.FFmpegError as error:
            yield RuntimeError(error.strerror)

    def read(self, frames: int = -1, *, out: np.ndarray | None = None) -> np.ndarray:
        """Fill `out` (n, channels), or a new array of n = frames, and return the part before the end of the track.

        Raises:
            RuntimeError: a packet is damaged. `out` has the samples before it; the next call continues after it.
        """
        out = np.empty((frames, self.channels), np.float32) if out is None else out
        filled = 0
        while filled < len(out):
            if not len(self._pending):
                block = next(self._blocks, None)
                if block is None:
                    break
                if isinstance(block, RuntimeError):
                    raise block
                self._pending = block
            taken = self._pending[: len(out) - filled]
            out[filled : filled + len(taken)] = taken
            filled += len(taken)
            self._position += len(taken)
            self._pending = self._pending[len(taken) :]
        return out[:filled]

    def seek(self, position: int) -> int:
        """Decode up to a position, because not every container has exact ones; return the position.

        Damaged packets on the way are left out.
        """
        if position < self._position:
            self.close()
            self._open()
        while self._position < position:
            count = min(position - self._position, self.samplerate)
            with contextlib.suppress(RuntimeError):
                if not len(self.read(count)):
                    break
        return self._position

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> MediaStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
