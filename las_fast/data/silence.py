"""Where speech is in log-mel frames, and frames without the silence around and inside it.

Silence spoils recognition through normalisation: four seconds of digital zeros around an utterance set its mean and
deviation, and the CER of the released English model rises from 23 to 63%. So where silence takes much of a recording,
or is far quieter than any room, the frames far from speech are left out before the recording is normalised, and what is
quieter than speech is raised to the level of its quietest frames. Ordinary silence stays: models are trained with it.

A frame's energy is that of its filters between 150 and 4000 Hz, where voices are loudest and white noise is not. The
noise floor follows the quiet moments of the three seconds before and after, and the speech level is the 95th percentile
of the frames that rise above the floor. A frame is speech when it rises above the floor and is not far below the speech
level. Where no frame rises above the floor, as in noise, hum or a tone, there is no speech.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from las_fast.config import FeatureConfig
from las_fast.data.features import filter_centres, frame_sizes

BAND = (150.0, 4000.0)  # Hz
SMOOTH = 0.05  # seconds over which an energy is averaged
QUIET_SHARE, FLOOR_SHARE = 0.2, 0.4  # percentile of the energies in a block, and of the blocks that make the floor
BLOCK, AROUND = 0.25, 3.0  # seconds of a block, and of blocks before and after that count
LEVEL_SHARE = 0.95  # percentile of the speech level
RISE, DEPTH = 4.0, 50.0  # dB that speech rises above the floor, and may lie below its level
SHORTEST = 0.05  # seconds of frames above the floor that make speech
MARGIN = 0.5  # seconds kept before and after speech
USUAL_SHARE = 0.4  # of a recording that may be far from speech without being left out
USUAL_DEPTH = 70.0  # dB that silence lies below the speech level, at most, in a recording of 16 bits without zeros
DECIBEL = 10 / math.log(10)  # of natural log energies


def find_speech(energy: Tensor, config: FeatureConfig) -> Tensor:
    """Return which frames are speech, (T,) bool, given their band_energy (T,) in dB.

    No frame is speech if none rises above the noise floor. config gives sample_rate and shift_ms.
    """
    rising = energy > noise_floor(energy, config) + RISE
    if int(rising.sum()) < frames_in(SHORTEST, config):
        return torch.zeros_like(rising)
    return rising & (energy > torch.quantile(energy[rising], LEVEL_SHARE) - DEPTH)


def noise_floor(energy: Tensor, config: FeatureConfig) -> Tensor:
    """Return the noise floor at each frame, (T,) in dB, of energies (T,) in dB."""
    size = min(frames_in(BLOCK, config), len(energy))
    count = -(-len(energy) // size)
    padded = F.pad(energy[None, None], (0, count * size - len(energy)), mode="replicate")
    quiet = torch.quantile(padded.view(count, size), QUIET_SHARE, dim=1)
    reach = min(round(AROUND / BLOCK), count - 1)
    around = F.pad(quiet[None, None], (reach, reach), mode="replicate")[0, 0].unfold(0, 2 * reach + 1, 1)
    return torch.quantile(around, FLOOR_SHARE, dim=1).repeat_interleave(size)[: len(energy)]


def band_energy(logmel: Tensor, config: FeatureConfig) -> Tensor:
    """Return the smoothed energy of log-mel frames (T, bins) within BAND, (T,) float32 in dB.

    logmel must not be normalised.
    """
    centres = filter_centres(logmel.shape[1], config.sample_rate)
    inside = (centres >= BAND[0]) & (centres <= BAND[1])
    energy = torch.logsumexp(logmel[:, inside] if inside.any() else logmel, dim=1) * DECIBEL
    return _pool(F.avg_pool1d, energy, frames_in(SMOOTH / 2, config), count_include_pad=False)


def near(speech: Tensor, config: FeatureConfig, seconds: float = MARGIN) -> Tensor:
    """Return which frames are speech or at most `seconds` from it, (T,) bool."""
    return _pool(F.max_pool1d, speech.float(), frames_in(seconds, config)) > 0


def level_silence(logmel: Tensor, speech: Tensor) -> Tensor:
    """Raise each filter of all frames to its least value within speech, so that silence has one level."""
    return torch.maximum(logmel, logmel[speech].amin(0)) if speech.any() else logmel


def spans(mask: Tensor) -> list[tuple[int, int]]:
    """Return the (start, end) of each run of True in a mask (T,)."""
    edges = torch.diff(F.pad(mask.int(), (1, 1))).nonzero()[:, 0].tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def without_silence(logmel: Tensor, config: FeatureConfig) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the frames (T', bins) near speech, and the (start, end) frames that they are in logmel (T, bins).

    All frames are returned as they are where silence is usual, or where there is no speech.
    """
    energy = band_energy(logmel, config)
    speech = find_speech(energy, config)
    kept = near(speech, config)
    if not speech.any() or is_usual(energy, speech, kept, config):
        return logmel, [(0, len(logmel))]
    return level_silence(logmel, speech)[kept], spans(kept)


def is_usual(energy: Tensor, speech: Tensor, kept: Tensor, config: FeatureConfig) -> bool:
    """Return whether silence is like that in training data: not much, and not digital zeros.

    Args:
        energy: (T,) band_energy of the frames, in dB.
        speech: (T,) bool, which of them are speech; at least one.
        kept:   (T,) bool, which of them are near speech.
    """
    if float(kept.float().mean()) < 1 - USUAL_SHARE:
        return False
    depth = torch.quantile(energy[speech], LEVEL_SHARE) - energy
    return int((depth > USUAL_DEPTH).sum()) < frames_in(SHORTEST, config)


def frames_in(seconds: float, config: FeatureConfig) -> int:
    """Return the number of frames in some seconds, at least 1."""
    return max(1, round(seconds * config.sample_rate / frame_sizes(config)[1]))


def _pool(pool, values: Tensor, reach: int, **options) -> Tensor:
    """Pool values (T,) over `reach` frames to either side."""
    return pool(values[None, None], 2 * reach + 1, 1, reach, **options)[0, 0]
