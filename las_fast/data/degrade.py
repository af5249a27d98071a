"""Add silence, rooms, noise, babble and limited bands to raw log-mel frames, as if they had been recorded that way.

The feature cache has no waveforms, so the changes are made to the power in each mel filter. This is nearly what they
would be on the waveform, because the powers of independent sounds add:

- Silence at the ends is faint noise, or the level that las_fast.data.silence leaves when it trims silence.
- Noise is taken from the frames of a minute of white noise, so it fluctuates as the noise in a filter does. It is
  coloured by a smooth random spectrum, and its level varies slowly in some utterances.
- Babble is the sum of the powers of several other training utterances.
- A room adds a decaying tail to the power in each filter (Polack's model: the impulse response is exponentially
  decaying noise). The tail fluctuates as noise does.
- A limited band (telephone, old film) leaves in the other filters what leaks into them through the analysis window,
  and sometimes hiss.

What depends on the waveform itself (clipping, codecs) is not possible. A change of level is not needed: with
features.normalisation "utterance" it adds a constant to log-mel frames, which the normalisation removes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from las_fast.config import AugmentConfig, FeatureConfig
from las_fast.data.features import FLOOR, compute_features, filter_centres, frame_sizes
from las_fast.data.silence import band_energy, find_speech, frames_in
from las_fast.errors import InputError

KINDS = ("room", "noise", "babble", "band_limit")  # in the order of drawing; also the names of their settings
SETTINGS = ("silence", *KINDS)
FLAT_SHARE = 0.5  # share of the added silences that have one level; the others are faint noise
SILENCE_DB = (25.0, 75.0)  # level of the speech over that noise
BANK_SECONDS = 60  # of white noise
LOW_HZ = 20.0  # coloured noise has one level below this frequency
COLOURS = (0.0, 2.0)  # the power of noise falls as 1 / frequency ** colour: 0 is white, 1 pink, 2 brown
BUMPS, BUMP_DB = 8, 4.0  # points of the smooth random spectrum, and their standard deviation
VARYING_SHARE, VARYING_DB, VARYING_SECONDS = 0.3, 5.0, 0.5  # noise of varying level: share; deviation; per point
TALKERS, TALKER_DB = (3, 8), 3.0  # of babble: least and most; standard deviation of their levels
T60, DIRECT_DB = (0.2, 0.8), (-4.0, 8.0)  # seconds; level of the direct sound over the reverberation
T60_SLOPE = (0.4, 1.0)  # T60 at the highest filter as a share of that at the lowest
TELEPHONE, TELEPHONE_SHARE = (300.0, 3400.0), 0.3  # Hz; share of limited bands that are a telephone's
TAIL_END = 1e-7  # power of the tail relative to its start below which it is left out
LOW_EDGE, HIGH_EDGE = (60.0, 500.0), (2500.0, 7500.0)  # Hz, of the other limited bands
TINY = 1e-30  # a power that is not 0
HISS_SHARE = 0.5  # share of limited bands that get hiss
HISS_DB = (30.0, 80.0)  # level of the speech over the hiss


@dataclass(frozen=True)
class Bank:
    """Frames of white noise, and what is known of the filters."""

    powers: Tensor  # (N, F) mel powers of white noise over their mean
    white: Tensor  # (F,) mean mel power of white noise whose samples have power 1
    weights: Tensor  # (F,) power of the waveform per mel power
    leakage: Tensor  # (F, F) share of the power in filter i that the analysis window leaks into filter j; diagonal 0
    centres: np.ndarray  # (F,) Hz


def degrades(config: AugmentConfig) -> bool:
    """Return whether any of SETTINGS is on."""
    return any(getattr(config, name) > 0 for name in SETTINGS)


def check_logmel(config: AugmentConfig, features: FeatureConfig, kind: str) -> None:
    """Raise InputError if any of SETTINGS is on for features that are not log-mel of recordings.

    kind is that of the corpus: "audio" or "features".
    """
    if degrades(config) and (kind != "audio" or features.kind != "logmel"):
        names = " and ".join(f"augment.{name}" for name in SETTINGS if getattr(config, name) > 0)
        got = f"{features.kind} computed from recordings" if kind == "audio" else "an archive of features"
        raise InputError(
            f"{names}: frames must be log-mel, computed from recordings; got {got}; leave these settings at 0"
        )


@lru_cache(maxsize=2)
def noise_bank(config: FeatureConfig) -> Bank:
    """Make the bank for log-mel features; always the same for the same config."""
    generator = np.random.default_rng(0)
    noise = generator.standard_normal(BANK_SECONDS * config.sample_rate).astype(np.float32)
    powers = compute_features([noise], config)[0].exp()
    white = powers.mean(0)
    centres = filter_centres(config.size, config.sample_rate).numpy()
    edges = np.concatenate([[LOW_HZ], centres, [config.sample_rate / 2]])
    widths = (edges[2:] - edges[:-2]) / config.sample_rate  # share of the power of white noise in each filter
    weights = torch.from_numpy(widths).float() / white
    return Bank(powers / white, white, weights, _leakage(config, centres), centres)


def _leakage(config: FeatureConfig, centres: np.ndarray) -> Tensor:
    """Measure with a tone at the centre of each filter what share of its power reaches each other filter, (F, F)."""
    time = np.arange(4 * frame_sizes(config)[0]) / config.sample_rate
    tones = [np.sin(2 * np.pi * hertz * time).astype(np.float32) for hertz in centres]
    powers = torch.stack([frames.exp().mean(0) for frames in compute_features(tones, config)])
    return (powers / powers.diagonal()[:, None]).clamp(max=1).fill_diagonal_(0)  # a narrow filter may have no power


def wave_power(powers: Tensor, bank: Bank) -> float:
    """Estimate the mean power of the samples whose frames have the mel powers (T, F)."""
    return float(powers.mean(0) @ bank.weights)


@dataclass(frozen=True)
class Degrade:
    """Degrades utterances as config says; deterministic for a given generator state.

    Args:
        config:   settings; those of KINDS and the SNR are used.
        features: of the frames.
        other:    function that returns the raw log-mel frames (T, F) of an utterance, for babble.
        count:    number of utterances that `other` takes.

    Raises:
        InputError: the features are not log-mel.
    """

    config: AugmentConfig
    features: FeatureConfig
    other: Callable[[int], Tensor]
    count: int

    def __post_init__(self):
        check_logmel(self.config, self.features, "audio")
        noise_bank(self.features)  # here, so that the processes of a loader share it

    def draw(self, generator: np.random.Generator) -> tuple[str, ...]:
        """Draw the KINDS that an utterance gets, perhaps none."""
        drawn = generator.random(len(KINDS))
        return tuple(kind for kind, x in zip(KINDS, drawn, strict=True) if x < getattr(self.config, kind))

    def __call__(
        self,
        frames: Tensor,
        kinds: Collection[str],
        generator: np.random.Generator,
        *,
        silence: Sequence[int] = (0, 0),
    ) -> Tensor:
        """Degrade an utterance.

        Args:
            frames:    (T, F) raw log-mel frames, T >= 1.
            kinds:     the changes, of KINDS.
            generator: source of every random choice.
            silence:   frames of silence to add before and after.

        Returns:
            (silence[0] + T + silence[1], F) raw log-mel frames.
        """
        bank = noise_bank(self.features)
        speech = find_speech(band_energy(frames, self.features), self.features)
        powers = frames.exp()
        spoken = powers[speech] if speech.any() else powers
        level = wave_power(spoken, bank)
        if any(silence):
            powers = self._surround(powers, spoken.amin(0), level, silence, generator)
        count = len(powers)
        if "room" in kinds:
            t60, energy = draw_room(self.features.size, generator)
            shift = frame_sizes(self.features)[1] / self.features.sample_rate
            powers = add_room(powers, t60, energy, self._noise(count, generator), shift)
        if "noise" in kinds:
            noise = self._noise(count, generator) * bank.white * draw_colour(bank.centres, generator)
            powers = powers + self._at_snr(noise * self._swell(count, generator), level, generator)
        if "babble" in kinds:
            powers = powers + self._at_snr(self._babble(count, generator), level, generator)
        if "band_limit" in kinds:
            powers = limit_band(powers, *draw_band(generator), bank)
            if generator.random() < HISS_SHARE:
                powers = powers + self._white_noise(count, level, HISS_DB, generator)
        return powers.clamp(min=FLOOR).log()

    def _surround(
        self, powers: Tensor, quietest: Tensor, level: float, silence: Sequence[int], generator: np.random.Generator
    ) -> Tensor:
        """Add frames of silence before and after (T, F): faint noise, or all at the powers `quietest` (F,)."""
        if generator.random() < FLAT_SHARE:
            before, after = (quietest.expand(count, -1) for count in silence)
        else:
            before, after = self._white_noise(sum(silence), level, SILENCE_DB, generator).split(list(silence))
        return torch.cat([before, powers, after])

    def _white_noise(
        self, count: int, level: float, below: tuple[float, float], generator: np.random.Generator
    ) -> Tensor:
        """Return the mel powers (count, F) of white noise at a drawn number of dB below `level`."""
        gain = level * 10 ** (-generator.uniform(*below) / 10)
        return gain * noise_bank(self.features).white * self._noise(count, generator)

    def _noise(self, count: int, generator: np.random.Generator) -> Tensor:
        """Take frames of the bank from a random point on, (count, F) with mean 1."""
        powers = noise_bank(self.features).powers
        return _repeat_from(powers, int(generator.integers(len(powers))), count)

    def _at_snr(self, noise: Tensor, level: float, generator: np.random.Generator) -> Tensor:
        """Scale noise of mel powers (T, F) to a drawn SNR with speech of power `level`."""
        snr = generator.uniform(self.config.snr_low, self.config.snr_high)
        power = max(wave_power(noise, noise_bank(self.features)), TINY)
        return noise * (level / power * 10 ** (-snr / 10))

    def _swell(self, count: int, generator: np.random.Generator) -> Tensor | float:
        """Return the factors (count, 1) of a slowly varying level, or 1."""
        if generator.random() >= VARYING_SHARE:
            return 1.0
        size = frames_in(VARYING_SECONDS, self.features)
        points = generator.normal(0, VARYING_DB, count // size + 2)
        return _from_db(np.interp(np.arange(count) / size, np.arange(len(points)), points))[:, None]

    def _babble(self, count: int, generator: np.random.Generator) -> Tensor:
        """Return the mel powers (count, F) of several random utterances at once, at roughly equal levels."""
        total = torch.zeros(count, self.features.size)
        for _ in range(int(generator.integers(TALKERS[0], TALKERS[1] + 1))):
            powers = self.other(int(generator.integers(self.count))).exp()
            level = max(wave_power(powers, noise_bank(self.features)), TINY)
            gain = 10 ** (generator.normal(0, TALKER_DB) / 10) / level
            total += gain * _repeat_from(powers, int(generator.integers(len(powers))), count)
        return total


def draw_colour(centres: np.ndarray, generator: np.random.Generator) -> Tensor:
    """Draw the factor (F,) of a smooth spectrum of noise at the centres (F,) of the filters, in Hz."""
    exponent, bumps = generator.uniform(*COLOURS), generator.normal(0, BUMP_DB, BUMPS)
    smooth = np.interp(np.linspace(0, BUMPS - 1, len(centres)), np.arange(BUMPS), bumps)
    return _from_db(smooth - 10 * exponent * np.log10(np.maximum(centres, LOW_HZ) / 1000))


def draw_room(size: int, generator: np.random.Generator) -> tuple[Tensor, float]:
    """Draw T60 of each filter, (size,) seconds, and the energy of the reverberation over that of the direct sound."""
    slope = torch.linspace(1, generator.uniform(*T60_SLOPE), size)
    return generator.uniform(*T60) * slope, 10 ** (-generator.uniform(*DIRECT_DB) / 10)


def add_room(powers: Tensor, t60: Tensor, energy: float, fluctuation: Tensor, shift: float) -> Tensor:
    """Add reverberation to mel powers (T, F).

    Args:
        t60:         (F,) seconds in which the tail falls by 60 dB.
        energy:      of the tail over that of the direct sound.
        fluctuation: (T, F) factors with mean 1 on the tail.
        shift:       seconds from a frame to the next.
    """
    decay = 10 ** (-6 * shift / t60)  # per frame
    tail = powers.clone()
    step = 1
    while step < len(powers) and float(decay.max()) ** step > TAIL_END:
        # tail[t] is the sum of decay ** n * powers[t - n] over n < step
        tail[step:] += decay**step * tail[:-step].clone()
        step *= 2
    total = decay / (1 - decay) + 0.5  # of all weights; n = 0 counts half, as the tail begins within its frame
    return powers + (energy / total) * (tail - 0.5 * powers) * fluctuation


def draw_band(generator: np.random.Generator) -> tuple[float, float]:
    """Draw the lowest and the highest frequency of a limited band, Hz."""
    if generator.random() < TELEPHONE_SHARE:
        return TELEPHONE
    return generator.uniform(*LOW_EDGE), generator.uniform(*HIGH_EDGE)


def limit_band(powers: Tensor, low: float, high: float, bank: Bank) -> Tensor:
    """Remove from mel powers (T, F) what is below `low` and above `high` Hz, except for what leaks there."""
    places = np.arange(len(bank.centres))
    first, last = np.interp([low, high], bank.centres, places)
    inside = np.clip(places - first + 0.5, 0, 1) * np.clip(last - places + 0.5, 0, 1)
    gain = torch.from_numpy(inside).float()
    kept = powers * gain
    return kept + (1 - gain) * (kept @ bank.leakage)


def _repeat_from(frames: Tensor, start: int, count: int) -> Tensor:
    """Return `count` frames of (N, F) from `start` on; after the last one comes the first."""
    if start + count <= len(frames):
        return frames[start : start + count]
    return frames[(torch.arange(start, start + count)) % len(frames)]


def _from_db(levels: np.ndarray) -> Tensor:
    return torch.from_numpy(10 ** (levels / 10)).float()
