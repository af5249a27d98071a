"""Made-up utterances as long as those of mixed read speech, for suites that need no words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

from las_fast import checkpoint
from las_fast.config import load_config

RATE = 16000
LETTERS_PER_FRAME = 0.116  # 11.6 characters a second
FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "OPUS")}


def frame_counts(count: int, seed: int = 0) -> np.ndarray:
    """Return feature frames (count,) int64: 4.3 s in the middle, 1 to 17 s."""
    generator = np.random.default_rng(seed)
    return np.clip(generator.lognormal(np.log(430), 0.55, count), 100, 1700).astype(np.int64)


def book_frame_counts(count: int) -> np.ndarray:
    """Return feature frames (count,) int64 about as LibriSpeech has them: 11 s in mean, most near 15."""
    return np.random.default_rng(0).triangular(140, 1500, 1650, count).astype(np.int64)


def recordings(folder: Path, suffix: str, frames: Sequence[int]) -> list[Path]:
    """Write noise of so many frames, about as speech in spectrum and syllables; return the files."""
    generator = np.random.default_rng(1)
    paths = []
    for i, count in enumerate(frames):
        samples = int(count) * RATE // 100 + 240
        noise = np.convolve(generator.normal(size=samples), np.exp(-np.arange(64) / 8), "same")
        syllables = 0.55 + 0.45 * np.sin(2 * np.pi * 4 * np.arange(samples) / RATE)
        wave = 0.1 * noise * syllables / noise.std()
        paths.append(folder / f"{i:04}.{suffix}")
        kind, subtype = FORMATS[suffix]
        soundfile.write(paths[-1], wave.astype(np.float32), RATE, format=kind, subtype=subtype)
    return paths


def manifest(folder: Path, suffix: str, frames: Sequence[int]) -> Path:
    """Write such recordings and a manifest of them; return the manifest."""
    (folder / "audio").mkdir(parents=True)
    lines = ["id\tpath\tsplit\ttranscript"]
    lines += [f"{p.stem}\taudio/{p.name}\tdev\tMADE UP" for p in recordings(folder / "audio", suffix, frames)]
    path = folder / "manifest.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def untrained(path: Path) -> Path:
    """Write an untrained checkpoint of preset speech13h that spells as many letters as speech has; return the file."""
    config = load_config("speech13h")
    share = {"minimum_share": LETTERS_PER_FRAME, "maximum_share": LETTERS_PER_FRAME, "maximum_extra": 0}
    config = dataclasses.replace(config, decoding=dataclasses.replace(config.decoding, **share))
    torch.manual_seed(0)
    checkpoint.save_model(path, checkpoint.build_model(config).state_dict(), config, None, {})
    return path
