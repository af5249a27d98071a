"""Cut a recording into segments of speech, block by block, in bounded memory.

A model learns from single utterances. So a recording is cut at its quietest places into chunks of at most 20 seconds,
each chunk at its pauses of a second or more into segments with half a second of silence around them, and each segment
is normalised by itself. A short recording without such pauses has the frames that training and decoding use.
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
from las_fast.data.dataset import Statistics, normalise
from las_fast.data.features import add_deltas, cepstra, compute_features, frame_sizes, logmel_config, seconds_of
from las_fast.data.silence import DECIBEL, band_energy, find_speech, frames_in, is_usual, level_silence, near, spans

LONGEST = 20.0  # seconds of a chunk
QUIET_SPAN = 0.2  # seconds over which energy is averaged to find a place to cut
SHORTEST = 0.1  # seconds of speech in a segment
EDGE = 0.1  # seconds added before and after speech in the times of a segment


@dataclass(frozen=True)
class Speech:
    """A segment: its times in seconds, and its features (T, input_size) as the model takes them."""

    start: float
    end: float
    features: Tensor


def segments(
    blocks: Iterable[np.ndarray], config: FeatureConfig, statistics: Statistics | None = None
) -> Iterator[Speech]:
    """Yield the segments of a recording that comes in blocks (n,) float32 at config.sample_rate.

    Segments do not depend on where the blocks end. statistics are those of the training data, for normalisation
    "global". A recording without speech yields nothing.
    """
    for first, chunk in chunks(log_mel(blocks, logmel_config(config)), config):
        begin, last = (seconds_of(first + frame, config) for frame in (0, len(chunk)))
        for speech, frames in _parts(chunk, config):
            features = add_deltas(normalise(cepstra(frames, config), config, statistics), config.deltas)
            start, end = (seconds_of(first + frame, config) for frame in speech)
            yield Speech(max(begin, start - EDGE), min(end + EDGE, last), features)


def log_mel(blocks: Iterable[np.ndarray], config: FeatureConfig) -> Iterator[Tensor]:
    """Yield the frames of a recording, (T, bins) float32 some seconds at a time, as compute_features gives them."""
    window, shift = frame_sizes(config)
    enough = window + round(LONGEST * config.sample_rate)
    held: list[np.ndarray] = []
    count, begun = 0, False
    for block in blocks:
        held.append(block)
        count += len(block)
        if count >= enough:
            samples = np.concatenate(held)
            frames = 1 + (count - window) // shift
            yield compute_features([samples[: (frames - 1) * shift + window]], config)[0]
            held, begun = [samples[frames * shift :]], True
            count = len(held[0])
    if count >= window or (count and not begun):
        yield compute_features([np.concatenate(held)], config)[0]


def chunks(frames: Iterable[Tensor], config: FeatureConfig) -> Iterator[tuple[int, Tensor]]:
    """Yield (first frame, frames) of consecutive chunks of at most LONGEST seconds, which hold all of the frames.

    A cut is made where the recording is quietest in the second half of what a chunk may hold.
    """
    most, span = frames_in(LONGEST, config), frames_in(QUIET_SPAN, config)
    held, first = torch.empty(0), 0
    for more in chain(frames, [None]):  # None: no more will come
        enough = most + 1 if more is None else most + span
        held = held if more is None else torch.cat([held, more])
        while len(held) >= enough:
            cut = _quietest(held, most // 2, min(most, len(held) - span), span, config)  # leave no crumb at the end
            yield first, held[:cut]
            held, first = held[cut:], first + cut
    if len(held):
        yield first, held


def _quietest(frames: Tensor, first: int, last: int, span: int, config: FeatureConfig) -> int:
    """Return the frame from first to last around which `span` frames hold the least energy."""
    energy = torch.exp(band_energy(frames[first - span // 2 : last + span], config).double() / DECIBEL)
    total = F.pad(energy.cumsum(0), (1, 0))
    sums = total[span:] - total[:-span]
    return first + int(sums[: last - first + 1].argmin())


def _parts(chunk: Tensor, config: FeatureConfig) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Yield ((first, last + 1) frame of speech, frames to hear) of each segment of a chunk of log-mel frames."""
    energy = band_energy(chunk, config)
    speech = find_speech(energy, config)
    if not speech.any():
        return
    kept = near(speech, config)
    usual = not config.trim_silence or is_usual(energy, speech, kept, config)
    found = spans(kept)
    if usual and len(found) == 1:
        found = [(0, len(chunk))]
    level = chunk if usual else level_silence(chunk, speech)
    for start, end in found:
        places = speech[start:end].nonzero()[:, 0]
        if len(places) >= frames_in(SHORTEST, config):
            yield (start + int(places[0]), start + int(places[-1]) + 1), level[start:end]
