"""Noise and lengths like those of read speech, for benchmarks that need no words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from las_fast import checkpoint
from las_fast.config import load_config

RATE = 16000  # Hz
LETTERS_PER_FRAME = 0.116  # of a feature frame: 11.6 characters per second
FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "OPUS")}


def frame_counts(count: int, seed: int = 0) -> np.ndarray:
    """Return `count` lengths in feature frames of 10 ms, (count,) int64: median 4.3 s, from 1 to 17 s."""
    generator = np.random.default_rng(seed)
    return np.clip(generator.lognormal(np.log(430), 0.55, count), 100, 1700).astype(np.int64)


def audiobook_frame_counts(count: int) -> np.ndarray:
    """Return `count` lengths in feature frames, (count,) int64, roughly like LibriSpeech: mean 11 s, mode 15 s."""
    return np.random.default_rng(0).triangular(140, 1500, 1650, count).astype(np.int64)


def write_recordings(folder: Path, suffix: str, frame_counts: Sequence[int]) -> list[Path]:
    """Write noise with the spectrum and syllable rate of speech, one recording per frame count; return the paths."""
    import soundfile

    generator = np.random.default_rng(1)
    paths = []
    for i, count in enumerate(frame_counts):
        samples = int(count) * RATE // 100 + 240  # windows of 400 every 160
        noise = np.convolve(generator.normal(size=samples), np.exp(-np.arange(64) / 8), "same")
        syllables = 0.55 + 0.45 * np.sin(2 * np.pi * 4 * np.arange(samples) / RATE)
        wave = 0.1 * noise * syllables / noise.std()
        paths.append(folder / f"{i:04}.{suffix}")
        kind, subtype = FORMATS[suffix]
        soundfile.write(paths[-1], wave.astype(np.float32), RATE, format=kind, subtype=subtype)
    return paths


def write_manifest(folder: Path, suffix: str, frame_counts: Sequence[int]) -> Path:
    """Write recordings and a manifest with all of them in split dev; return the path of the manifest."""
    (folder / "audio").mkdir(parents=True)
    paths = write_recordings(folder / "audio", suffix, frame_counts)
    lines = ["id\tpath\tsplit\ttranscript", *(f"{p.stem}\taudio/{p.name}\tdev\tMADE UP" for p in paths)]
    manifest = folder / "manifest.tsv"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


def write_untrained_checkpoint(path: Path) -> Path:
    """Write an untrained checkpoint of preset speech13h; return its path.

    The limits on lengths give its hypotheses the usual number of characters per second.
    """
    config = load_config("speech13h")
    share = {"minimum_share": LETTERS_PER_FRAME, "maximum_share": LETTERS_PER_FRAME, "maximum_extra": 0}
    config = dataclasses.replace(config, decoding=dataclasses.replace(config.decoding, **share))
    torch.manual_seed(0)
    checkpoint.save_model(path, checkpoint.build_model(config).state_dict(), config, None, {})
    return path
