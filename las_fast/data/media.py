"""Decode m4a, mp4, webm and other formats that libsndfile does not read; needs PyAV (extra `media`)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from las_fast.data.containers import Source, Stream, foreign_format
from las_fast.data.decoder import UNKNOWN_COUNT, SoundStream

INSTALL = "pip install av"
# FFmpeg's name of each format of magic.FOREIGN. It is given to FFmpeg, which would otherwise try all of its formats,
# among them playlists, which name other files.
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


def has_pyav() -> bool:
    return importlib.util.find_spec("av") is not None


def open_sound(source: Source, stream: Stream) -> SoundStream | MediaStream:
    """Open a stream with libsndfile, or with PyAV if only PyAV knows the format; raises one of READ_ERRORS."""
    demuxer = DEMUXERS.get(foreign_format(source))
    if demuxer and has_pyav():
        return MediaStream(source, demuxer)
    return SoundStream(source, stream.spans)


class MediaStream:
    """The first audio track of a file, with the interface of soundfile.SoundFile as far as Decoder needs it.

    Raises:
        RuntimeError: the file has no audio track, or FFmpeg cannot decode it.
    """

    subtype = "PCM_16"  # anything but FLOAT: samples are scaled to -1 to 1

    def __init__(self, source: Source, demuxer: str):
        self._source, self._demuxer = source, demuxer
        self._open()
        seconds = self._seconds()
        self.frames = int(2 * UNKNOWN_COUNT) if seconds is None else round(seconds * self.samplerate)

    def _seconds(self) -> float | None:
        """Return the duration that the file states for the track, or for its only track."""
        if self._track.duration is not None:
            return float(self._track.duration * (self._track.time_base or 0))
        alone = len(self._container.streams) == 1 and self._container.duration is not None
        return self._container.duration / 1e6 if alone else None  # microseconds

    def _open(self) -> None:
        import av

        file = os.fdopen(os.dup(self._source.descriptor), "rb")
        file.seek(0)
        try:
            self._container: Any = av.open(file, format=self._demuxer)
            if not self._container.streams.audio:
                raise RuntimeError("it has no audio track")
            self._track = self._container.streams.audio[0]
            context = self._track.codec_context
            self.samplerate, self.channels = context.sample_rate, context.layout.nb_channels
            if not self.samplerate:
                raise RuntimeError("no frame can be decoded")
            resampler = av.AudioResampler(format="flt", layout=context.layout, rate=self.samplerate)
        except av.FFmpegError as error:
            file.close()
            raise RuntimeError(error.strerror) from None
        except BaseException:
            file.close()
            raise
        self._file, self._blocks = file, self._decode(resampler)
        self._pending = np.zeros((0, self.channels), np.float32)
        self._position = 0

    def _decode(self, resampler: Any) -> Iterator[np.ndarray | RuntimeError]:
        """Yield the blocks (n, channels) of the track; an error instead of the block of a damaged packet."""
        import av

        for packet in self._container.demux(self._track):
            try:
                for frame in packet.decode():
                    for part in resampler.resample(frame):
                        yield part.to_ndarray().reshape(-1, self.channels)
            except av.FFmpegError as error:
                yield RuntimeError(error.strerror)
        for part in resampler.resample(None):
            yield part.to_ndarray().reshape(-1, self.channels)

    def read(self, frames: int = -1, *, out: np.ndarray | None = None) -> np.ndarray:
        """Fill `out` (n, channels), or a new array of n = frames, and return the part before the end of the track.

        Raises RuntimeError if a packet is damaged; `out` has the samples before it, and the next call goes on after it.
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
            self._pending = self._pending[len(taken) :]
        self._position += filled
        return out[:filled]

    def seek(self, position: int) -> int:
        """Decode up to a position, because packets do not say at which sample they begin; return the position."""
        if position < self._position:
            self.close()
            self._open()
        while self._position < position:
            count = min(position - self._position, self.samplerate)
            if not len(self.read(count)):
                break
        return self._position

    def close(self) -> None:
        self._container.close()
        self._file.close()

    def __enter__(self) -> MediaStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
