"""Voice activity detection: which frames of a recording are speech, and where between words it is quietest.

"energy" uses the energy of frames; see las_fast.data.silence. "silero" uses the network of the package silero-vad
(extra `vad`), which tells speech from music and from noise that changes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soxr
import torch
from torch import Tensor

from las_fast.config import VADS, FeatureConfig
from las_fast.data.features import frame_sizes
from las_fast.data.silence import DECIBEL, band_energy, find_speech, true_runs
from las_fast.errors import InputError
from las_fast.system import is_installed

RATE = 16_000  # Hz
WINDOW, CONTEXT = 512, 64  # samples of a window; samples before it that the network takes too
STATE = (1, 1, 128)  # shape of the LSTM's hidden and cell states
# a run of windows with at least the second probability is speech if one of them has the first; silero-vad's values
SPEECH, STILL_SPEECH = 0.5, 0.35
BLOCK = 4.0  # seconds of audio per call of the network
MODEL = "silero_vad_16k_sequence.onnx"


class Detector(Protocol):
    """Finds the speech of one recording.

    The blocks of the recording must be read through `watch` before the frames computed from them are passed to the
    other methods. After `speech`, frames before its first one are forgotten.

    Frames are log-mel (T, bins), not normalised; `first` is the number of the first one.
    """

    def watch(self, blocks: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
        """Return blocks (n,) float32 with the same samples."""

    def loudness(self, first: int, frames: Tensor) -> Tensor:
        """Return amounts of sound (T,) float64; a recording is cut where their sum is least."""

    def speech(self, first: int, frames: Tensor) -> Tensor:
        """Return a mask (T,) bool of the frames that are speech."""


def make_detector(vad: str, config: FeatureConfig) -> Detector:
    """Return the detector of that name for one recording at config.sample_rate; raise InputError as check_vad does."""
    check_vad(vad)
    return SileroDetector(config) if vad == "silero" else EnergyDetector(config)


def check_vad(vad: str) -> None:
    """Raise InputError if there is no detector of that name, or if the packages that it needs are missing or old."""
    if vad not in VADS:
        raise InputError(f"vad must be {' or '.join(map(repr, VADS))}; got {vad!r}")
    if vad == "silero":
        load_network()


class EnergyDetector:
    """Finds speech by the energy of frames; see las_fast.data.silence."""

    def __init__(self, config: FeatureConfig):
        self.config = config

    def watch(self, blocks: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
        return blocks

    def loudness(self, first: int, frames: Tensor) -> Tensor:
        return torch.exp(band_energy(frames, self.config).double() / DECIBEL)

    def speech(self, first: int, frames: Tensor) -> Tensor:
        return find_speech(band_energy(frames, self.config), self.config)


class SileroDetector:
    """Finds speech with silero-vad, whose loudness is the probability of speech.

    The results do not depend on the sizes of the blocks.
    """

    def __init__(self, config: FeatureConfig):
        self.config, self.network = config, load_network()
        self.first, self.known = 0, np.empty(0, np.float32)  # number of the first known window; probabilities
        self.rest = np.zeros(CONTEXT, np.float32)  # the context of the next window, and its samples so far
        self.hidden, self.cell = np.zeros(STATE, np.float32), np.zeros(STATE, np.float32)

    def watch(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield blocks of BLOCK seconds, each one after the next has been read, because resampling lags a little."""
        resample = _resampler(self.config.sample_rate)
        held = np.empty(0, np.float32)
        for block in _equal_blocks(blocks, round(BLOCK * self.config.sample_rate)):
            self._listen(resample(block, False))
            if len(held):
                yield held
            held = block
        if len(held):
            self._listen(resample(held[:0], True))
            self._listen(np.zeros(-(len(self.rest) - CONTEXT) % WINDOW, np.float32))
            yield held

    def _listen(self, samples: np.ndarray) -> None:
        """Append the probabilities of the windows that samples (n,) at RATE complete."""
        self.rest = np.concatenate([self.rest, samples])
        count = (len(self.rest) - CONTEXT) // WINDOW
        if not count:
            return
        windows = np.lib.stride_tricks.sliding_window_view(self.rest, CONTEXT + WINDOW)[::WINDOW]
        inputs = {"input": np.ascontiguousarray(windows), "h": self.hidden, "c": self.cell}
        new, self.hidden, self.cell = self.network.run(["speech_probs", "hn", "cn"], inputs)
        self.known = np.concatenate([self.known, new.reshape(-1)])
        self.rest = self.rest[count * WINDOW :]

    def probabilities(self, first: int, count: int) -> Tensor:
        """Return the probability of speech (count,) float32 at the middle of each frame."""
        places = np.minimum(self._windows(first, count) - self.first, len(self.known) - 1)
        return torch.from_numpy(self.known[places])

    def _windows(self, first: int, count: int) -> np.ndarray:
        """Return the number of the window at the middle of each frame (count,)."""
        size, shift = frame_sizes(self.config)
        middles = np.arange(first, first + count) * shift + size / 2
        return (middles * (RATE / self.config.sample_rate / WINDOW)).astype(np.int64)

    def loudness(self, first: int, frames: Tensor) -> Tensor:
        return self.probabilities(first, len(frames)).double()

    def speech(self, first: int, frames: Tensor) -> Tensor:
        probabilities = self.probabilities(first, len(frames))
        speech = torch.zeros(len(frames), dtype=torch.bool)
        for start, end in true_runs(probabilities >= STILL_SPEECH):
            speech[start:end] = probabilities[start:end].max() >= SPEECH
        self._forget(first)
        return speech

    def _forget(self, first: int) -> None:
        """Forget the probabilities before a frame."""
        window = self._windows(first, 1)[0] - self.first
        self.known, self.first = self.known[window:], self.first + window


def _equal_blocks(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield the samples of blocks as blocks of `size`, the last of 1 to `size`; yield nothing if there are none."""
    pending = np.empty(0, np.float32)
    for block in blocks:
        pending = np.concatenate([pending, block])
        while len(pending) > size:
            yield pending[:size]
            pending = pending[size:]
    if len(pending):
        yield pending


def _resampler(rate: int) -> Callable[[np.ndarray, bool], np.ndarray]:
    """Return a function of samples and whether they are the last that converts a stream from `rate` to RATE."""
    if rate == RATE:
        return lambda samples, is_last: samples
    stream = soxr.ResampleStream(rate, RATE, 1, "float32")
    return stream.resample_chunk


@cache
def load_network() -> Any:
    """Return silero-vad's network for many windows per call, as an onnxruntime session; InputError if it is missing."""
    for name, package in (("silero_vad", "silero-vad"), ("onnxruntime", "onnxruntime")):
        if not is_installed(name):
            raise InputError(f"vad 'silero' needs the package {package}; run: pip install silero-vad onnxruntime")
    spec = importlib.util.find_spec("silero_vad")  # importing it would set torch's number of threads to 1
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "data" / MODEL
    if not path.is_file():
        raise InputError("this version of silero-vad is too old; run: pip install --upgrade 'silero-vad>=6.2.3'")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # its LSTM is too small for more
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
