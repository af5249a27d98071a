"""Cut a recording into segments of speech, block by block, in bounded memory.

Models are trained on single utterances. Therefore a recording is cut at its quietest points into chunks of at most 20
seconds, and each chunk is cut at pauses of a second or more into segments, with half a second of silence around them.
The caller normalises each segment separately. A short recording without such pauses has the same frames as in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from las_fast.config import FeatureConfig
from las_fast.data.features import cepstra, compute_features, frame_sizes, logmel_config, seconds_of
from las_fast.data.silence import (
    band_energy,
    frames_in,
    has_usual_silence,
    level_silence,
    near_speech,
    true_runs,
)
from las_fast.data.vad import Detector, EnergyDetector, make_detector

MAX_CHUNK = 20.0  # seconds
QUIET_SPAN = 0.2  # seconds over which energy is summed to find the quietest point
MIN_SPEECH = 0.1  # seconds of speech; segments with less are dropped
EDGE = 0.1  # seconds that the times of a segment include before and after its speech


@dataclass(frozen=True)
class Speech:
    """A segment of speech in a recording; times in seconds."""

    start: float
    end: float
    frames: Tensor  # (T, F), before normalisation and deltas
    offset: float = 0.0  # time of the first frame, which may be in the silence before the speech


NO_SPEECH = Speech(0.0, 0.0, torch.empty(0))  # stands for a chunk without speech


def segments(
    blocks: Iterable[np.ndarray],
    config: FeatureConfig,
    *,
    vad: str = "energy",
    mark_silence: bool = False,
) -> Iterator[Speech]:
    """Yield the segments of a recording; nothing if it has no speech.

    Args:
        blocks:       (n,) float32 samples at config.sample_rate each; the segments do not depend on the block sizes.
        config:       features of the model.
        vad:          how speech is found, "energy" or "silero".
        mark_silence: whether to yield NO_SPEECH after each chunk without speech, so that the caller can pause there.

    Raises:
        InputError: vad is unknown, or the packages for it are missing.
    """
    detector = make_detector(vad, config)
    for first, chunk in chunks(log_mel(detector.watch(blocks), logmel_config(config)), config, detector):
        begin, last = (seconds_of(first + frame, config) for frame in (0, len(chunk)))
        has_speech = False
        for speech, first_frame, frames in _parts(chunk, detector.speech(first, chunk), config):
            has_speech = True
            start, end = (seconds_of(first + frame, config) for frame in speech)
            offset = float(seconds_of(first + first_frame, config))
            own = cepstra(frames, config).clone()  # a view would keep the memory of the whole chunk
            yield Speech(max(begin, start - EDGE), min(end + EDGE, last), own, offset)
        if mark_silence and not has_speech:
            yield NO_SPEECH


def log_mel(blocks: Iterable[np.ndarray], config: FeatureConfig) -> Iterator[Tensor]:
    """Yield feature frames (T, bins) float32, those of about MAX_CHUNK seconds at a time.

    Joined, they are what compute_features returns for the joined blocks.
    """
    window, shift = frame_sizes(config)
    enough = window + round(MAX_CHUNK * config.sample_rate)
    pending: list[np.ndarray] = []
    count, begun = 0, False
    for block in blocks:
        pending.append(block)
        count += len(block)
        if count >= enough:
            samples = np.concatenate(pending)
            frames = 1 + (count - window) // shift
            yield compute_features([samples[: (frames - 1) * shift + window]], config)[0]
            pending, begun = [samples[frames * shift :]], True
            count = len(pending[0])
    if count >= window or (count and not begun):
        yield compute_features([np.concatenate(pending)], config)[0]


def chunks(
    frames: Iterable[Tensor], config: FeatureConfig, detector: Detector | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Cut the frames of a recording into chunks of at most MAX_CHUNK seconds; yield (first frame, frames) of each.

    Each cut is at the quietest point of the second half of the chunk, by default that with the lowest energy.
    """
    detector = detector or EnergyDetector(config)
    longest, span = frames_in(MAX_CHUNK, config), frames_in(QUIET_SPAN, config)
    pending, first = torch.empty(0, dtype=torch.float32), 0
    for new in chain(frames, [None]):  # None: the end
        enough = longest + 1 if new is None else longest + span
        pending = pending if new is None else torch.cat([pending, new])
        while len(pending) >= enough:
            last = min(longest, len(pending) - span)  # leave at least `span` frames
            begin = longest // 2 - span // 2
            loudness = detector.loudness(first + begin, pending[begin : last + span])
            cut = longest // 2 + _quietest(loudness, span, last - longest // 2)
            yield first, pending[:cut]
            pending, first = pending[cut:], first + cut
    if len(pending):
        yield first, pending


def _quietest(loudness: Tensor, span: int, last: int) -> int:
    """Return the start, at most `last`, of the `span` frames with the least sum of loudness."""
    total = F.pad(loudness.cumsum(0), (1, 0))
    sums = total[span:] - total[:-span]
    return int(sums[: last + 1].argmin())


def _parts(chunk: Tensor, speech: Tensor, config: FeatureConfig) -> Iterator[tuple[tuple[int, int], int, Tensor]]:
    """Yield ((start, end) of the speech, first frame, frames with the silence around it) of each segment of a chunk.

    speech: (T,) bool mask of the chunk's frames.
    """
    if not speech.any():
        return
    kept = near_speech(speech, config)
    usual = not config.trim_silence or has_usual_silence(band_energy(chunk, config), speech, kept, config)
    runs = true_runs(kept)
    if usual and len(runs) == 1:
        runs = [(0, len(chunk))]
    frames = chunk if usual else level_silence(chunk, speech)
    for start, end in runs:
        indices = speech[start:end].nonzero()[:, 0]
        if len(indices) >= frames_in(MIN_SPEECH, config):
            yield (start + int(indices[0]), start + int(indices[-1]) + 1), start, frames[start:end]
