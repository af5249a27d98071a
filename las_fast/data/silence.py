"""Find speech in log-mel frames, and trim the silence around and inside it.

Silence harms recognition through normalisation: four seconds of digital zeros around an utterance dominate its mean and
standard deviation, and the CER of `speech13h` (version 0.3) rises from 23 to 63%. If a recording has much silence, or
silence far quieter than any room, the frames far from speech are dropped before normalisation, and the kept silence is
raised to the level of the quietest speech. Ordinary silence stays, because models are trained with it.

The energy of a frame is that of its filters between 150 and 4000 Hz, where voices are loudest and white noise is not.
The noise floor is a low percentile of the three seconds before and after. The speech level is the 95th percentile of
the frames above the floor. A frame is speech if it rises above the floor and is not far below the speech level. In
steady noise, hum or a tone no frame rises above the floor, so there is no speech.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from las_fast.config import FeatureConfig
from las_fast.data.features import filter_centres, frame_sizes

BAND = (150.0, 4000.0)  # Hz
SMOOTH = 0.05  # seconds over which energies are averaged
QUIET_QUANTILE, FLOOR_QUANTILE = 0.2, 0.4  # of the energies in a block; of the blocks around it
BLOCK, FLOOR_CONTEXT = 0.25, 3.0  # seconds of a block; seconds before and after it that count for its floor
LEVEL_QUANTILE = 0.95  # of the energies above the floor: the speech level
RISE, DEPTH = 4.0, 50.0  # dB: speech is at least RISE above the floor and at most DEPTH below the speech level
MIN_SPEECH = 0.05  # seconds of frames above the floor; with less there is no speech
MARGIN = 0.5  # seconds kept before and after speech
USUAL_SHARE = 0.4  # silence is usual if at most this share of a recording is far from speech
USUAL_DEPTH = 70.0  # dB below the speech level; 16-bit recordings reach more only with digital zeros
DECIBEL = 10 / math.log(10)  # dB per unit of natural log energy


def find_speech(energy: Tensor, config: FeatureConfig) -> Tensor:
    """Return a mask of the speech frames, (T,) bool, from their band_energy (T,) in dB.

    The mask is all False if too few frames rise above the noise floor. config gives sample_rate and shift_ms.
    """
    rising = energy > noise_floor(energy, config) + RISE
    if int(rising.sum()) < frames_in(MIN_SPEECH, config):
        return torch.zeros_like(rising)
    return rising & (energy > torch.quantile(energy[rising], LEVEL_QUANTILE) - DEPTH)


def noise_floor(energy: Tensor, config: FeatureConfig) -> Tensor:
    """Return the noise floor at each frame, (T,) in dB, from energies (T,) in dB."""
    size = min(frames_in(BLOCK, config), len(energy))
    count = -(-len(energy) // size)
    padded = F.pad(energy[None, None], (0, count * size - len(energy)), mode="replicate")
    quiet = torch.quantile(padded.view(count, size), QUIET_QUANTILE, dim=1)
    reach = min(round(FLOOR_CONTEXT / BLOCK), count - 1)
    around = F.pad(quiet[None, None], (reach, reach), mode="replicate")[0, 0].unfold(0, 2 * reach + 1, 1)
    return torch.quantile(around, FLOOR_QUANTILE, dim=1).repeat_interleave(size)[: len(energy)]


def band_energy(logmel: Tensor, config: FeatureConfig) -> Tensor:
    """Return the smoothed energy (T,) float32 in dB of log-mel frames (T, bins), within BAND.

    The frames must not be normalised.
    """
    centres = filter_centres(logmel.shape[1], config.sample_rate)
    inside = (centres >= BAND[0]) & (centres <= BAND[1])
    energy = torch.logsumexp(logmel[:, inside] if inside.any() else logmel, dim=1) * DECIBEL
    return _pool(F.avg_pool1d, energy, frames_in(SMOOTH / 2, config), count_include_pad=False)


def near_speech(speech: Tensor, config: FeatureConfig, seconds: float = MARGIN) -> Tensor:
    """Return a mask, (T,) bool, of the frames at most `seconds` from speech, given the mask of speech (T,)."""
    return _pool(F.max_pool1d, speech.float(), frames_in(seconds, config)) > 0


def level_silence(logmel: Tensor, speech: Tensor) -> Tensor:
    """Raise each filter of log-mel frames (T, bins) to at least its minimum within speech, so silence has one level."""
    return torch.maximum(logmel, logmel[speech].amin(0)) if speech.any() else logmel


def true_runs(mask: Tensor) -> list[tuple[int, int]]:
    """Return (start, end) of each run of True in a mask (T,)."""
    edges = torch.diff(F.pad(mask.int(), (1, 1))).nonzero()[:, 0].tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def trim_silence(logmel: Tensor, config: FeatureConfig) -> tuple[Tensor, list[tuple[int, int]]]:
    """Drop the log-mel frames far from speech; if the silence is usual or there is no speech, return them unchanged.

    Returns:
        frames: (N, bins) those of logmel (T, bins) that are kept.
        runs:   (start, end) of each run of them in logmel.
    """
    energy = band_energy(logmel, config)
    speech = find_speech(energy, config)
    kept = near_speech(speech, config)
    if not speech.any() or has_usual_silence(energy, speech, kept, config):
        return logmel, [(0, len(logmel))]
    return level_silence(logmel, speech)[kept], true_runs(kept)


def has_usual_silence(energy: Tensor, speech: Tensor, kept: Tensor, config: FeatureConfig) -> bool:
    """Return whether the silence is like that of training data: not much, and no digital zeros.

    Args:
        energy: (T,) band_energy in dB.
        speech: (T,) bool mask of speech; at least one frame.
        kept:   (T,) bool mask of the frames near speech.
    """
    if float(kept.float().mean()) < 1 - USUAL_SHARE:
        return False
    depth = torch.quantile(energy[speech], LEVEL_QUANTILE) - energy
    return int((depth > USUAL_DEPTH).sum()) < frames_in(MIN_SPEECH, config)


def frames_in(seconds: float, config: FeatureConfig) -> int:
    """Return the number of frames in `seconds`, at least 1."""
    return max(1, round(seconds * config.sample_rate / frame_sizes(config)[1]))


def _pool(pool, values: Tensor, reach: int, **options) -> Tensor:
    """Pool values (T,) over `reach` frames on either side."""
    return pool(values[None, None], 2 * reach + 1, 1, reach, **options)[0, 0]
