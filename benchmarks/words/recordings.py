"""Recordings in which the starts of words are known."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from las_fast.config import FeatureConfig
from las_fast.data.audio import load_utterance
from las_fast.data.corpus import Utterance
from las_fast.data.espeak import Synthesiser
from las_fast.data.features import compute_features, frame_sizes, logmel_config
from las_fast.data.silence import band_energy, true_runs
from las_fast.data.spoken import plan

LEVEL, NOISE = 0.05, 0.001  # standard deviations of the speech and of the noise added to a recording
DEPTH, PEAK = 25.0, 10.0  # dB below the level of an utterance: limits of its speech and of the peak of a stretch
SOURCES = ("librispeech", "commonvoice", "speechocean")  # texts in paths; a joined recording has one source
JOINED = 8  # utterances of a recording


@dataclass
class Recording:
    """A recording whose words are known."""

    kind: str  # "synthetic", "pauses SOURCE" or "joined SOURCE"
    samples: np.ndarray  # (N,) float32 at the sample rate of the model
    words: list[tuple[str, float | None]]  # (word, its start in seconds, or None if that is not known)


class Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int), ("identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
        ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("id", ctypes.c_char * 8),
    ]  # fmt: skip


class TimedSynthesiser(Synthesiser):
    """A synthesiser that records where each word starts."""

    LAST, WORD = 0, 1  # espeak_EVENT_TYPE

    def _collect(self, wave, count, events):
        event = ctypes.cast(events, ctypes.POINTER(Event))
        i = 0
        while event[i].type != self.LAST:
            if event[i].type == self.WORD:
                self.spoken.append((event[i].text_position - 1, event[i].length, event[i].sample))
            i += 1
        return super()._collect(wave, count, events)

    def speak_words(self, text: str, voice: str, **options) -> tuple[np.ndarray, list[tuple[str, int]]]:
        """Return the samples, and (word, sample at which it starts) of each word; for options see speak."""
        self.spoken: list[tuple[int, int, int]] = []
        wave = self.speak(text, voice, **options)
        return wave, [(text[first : first + length], sample) for first, length, sample in self.spoken]


def make_recordings(utterances: Sequence[Utterance], config: FeatureConfig) -> list[Recording]:
    """Return the synthetic recordings and those of joined utterances."""
    sentences = [u.text for u in plan(train=1, dev=40, test=40, seed=1) if not u.split.startswith("train")]
    texts = [str(u.transcript) for u in utterances]
    sentences += [text for text in texts if len(text) < 120][:: max(1, len(texts) // 80)]
    return [
        *synthetic_recordings(sentences, config),
        *joined_recordings(utterances, "pauses", (0.3, 1.5), config),
        *joined_recordings(utterances, "joined", (0.0, 0.4), config),
    ]


def synthetic_recordings(texts: Sequence[str], config: FeatureConfig) -> Iterator[Recording]:
    """Speak each text in a voice of the spoken corpus, with pauses before some words."""
    import soxr

    rng = np.random.default_rng(0)
    voices = [utterance.voice for utterance in plan(train=1, dev=40, test=40, seed=1)]
    with TimedSynthesiser() as synthesiser:
        for i, text in enumerate(texts):
            rate = int(rng.integers(120, 170))
            wave, spoken = synthesiser.speak_words(text, voices[i % len(voices)], rate=rate, pitch=50, pitch_range=50)
            scale = config.sample_rate / synthesiser.sample_rate
            wave = soxr.resample(wave, synthesiser.sample_rate, config.sample_rate)
            cuts = [round(sample * scale) for _, sample in spoken] + [len(wave)]
            pieces = [(word, wave[a:b]) for (word, _), a, b in zip(spoken, cuts, cuts[1:], strict=False)]
            pauses = [rng.uniform(0.15, 0.5) if not n or rng.random() < 0.25 else 0.0 for n in range(len(pieces))]
            yield join("synthetic", pieces, pauses, config)


def joined_recordings(
    utterances: Sequence[Utterance], kind: str, pauses: tuple[float, float], config: FeatureConfig
) -> Iterator[Recording]:
    """Join utterances of each source, JOINED at a time.

    pauses: minimum and maximum seconds of the pause before each utterance.
    """
    rng = np.random.default_rng(0)
    sources = {u.id: next((name for name in SOURCES if name in str(u.path)), "other") for u in utterances}
    for source in (*SOURCES, "other"):
        members = [u for u in utterances if sources[u.id] == source]
        for first in range(0, len(members), JOINED):
            part = members[first : first + JOINED]
            cut = [(str(u.transcript), cut_to_speech(load_utterance(u, config.sample_rate), config)) for u in part]
            if pieces := [(text, samples) for text, samples in cut if len(samples)]:
                yield join(f"{kind} {source}", pieces, rng.uniform(*pauses, len(pieces)).tolist(), config)


def cut_to_speech(samples: np.ndarray, config: FeatureConfig) -> np.ndarray:
    """Cut samples (N,) to the speech in them, without breaths before and after; (0,) if there is no sound."""
    if not samples.std():
        return samples[:0]
    energy = band_energy(compute_features([samples], logmel_config(config))[0], config)
    energy = energy - torch.quantile(energy, 0.95)
    runs = [(a, b) for a, b in true_runs(energy > -DEPTH) if float(energy[a:b].max()) > -PEAK]
    window, shift = frame_sizes(config)
    return samples[runs[0][0] * shift + window // 2 : runs[-1][1] * shift + window // 2]


def join(kind: str, pieces: list[tuple[str, np.ndarray]], pauses: Sequence[float], config: FeatureConfig) -> Recording:
    """Join pieces of speech, each (text, samples), with a pause in seconds before each, and add noise."""
    parts, words, count = [], [], 0
    for (text, samples), pause in zip(pieces, pauses, strict=True):
        silence = np.zeros(int(pause * config.sample_rate))
        parts += [silence, samples * (LEVEL / samples.std())]
        count += len(silence)
        first, *others = text.upper().split()
        words += [(first, count / config.sample_rate), *((word, None) for word in others)]
        count += len(samples)
    samples = np.concatenate([*parts, np.zeros(config.sample_rate // 4)])
    samples = samples + NOISE * np.random.default_rng(0).standard_normal(len(samples))
    return Recording(kind, samples.astype(np.float32), words)
