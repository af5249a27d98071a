"""Benchmark reading recordings and computing log-mel and MFCC features.

The baselines are soundfile, and the feature formula in plain PyTorch: frame, window, FFT, filter, logarithm.
"""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch

from benchmarks.synthetic_speech import FORMATS, RATE, frame_counts, write_recordings
from las_fast.config import FeatureConfig
from las_fast.data.audio import load_audio
from las_fast.data.features import FLOOR, PREEMPHASIS, _fft_size, _tables, compute_features, frame_sizes

COUNT = 24
CONFIGS = {
    "logmel 80": FeatureConfig(kind="logmel", size=80),
    "mfcc 28": FeatureConfig(kind="mfcc", size=28, mel_bins=40),
}


@pytest.fixture(scope="module", params=FORMATS)
def files(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, write_recordings(folder, request.param, frame_counts(COUNT))


def plain_features(wave: torch.Tensor, config: FeatureConfig) -> torch.Tensor:
    """Return the features (T, F) of one recording, by the formula."""
    window, shift = frame_sizes(config)
    taper, _, filters, transform = _tables(config)
    frames = (wave * 32768.0).unfold(0, window, shift)
    frames = frames - frames.mean(1, keepdim=True)
    previous = torch.nn.functional.pad(frames, (1, 0), mode="replicate")[:, :-1]
    frames = (frames - PREEMPHASIS * previous) * taper[:window]
    power = torch.fft.rfft(frames, _fft_size(window)).abs().square()
    logs = (power @ filters).clamp(min=FLOOR).log()
    return logs if transform is None else logs @ transform


def test_reading(compare, files):
    suffix, paths = files
    seconds = sum(soundfile.info(path).frames for path in paths) / RATE
    for path in paths:
        np.testing.assert_allclose(
            load_audio(path, RATE, strict=True), soundfile.read(path, dtype="float32")[0], atol=1e-6
        )
    functions = {
        "soundfile": lambda: [soundfile.read(path, dtype="float32") for path in paths],
        "las_fast": lambda: [load_audio(path, RATE, strict=True) for path in paths],
    }
    compare_features(compare, functions, f"reading {suffix}", seconds, "soundfile")


@pytest.mark.parametrize("name", CONFIGS)
def test_features(compare, tmp_path, name):
    config = CONFIGS[name]
    paths = write_recordings(tmp_path, "wav", frame_counts(COUNT))
    waves = [torch.from_numpy(load_audio(path, RATE)) for path in paths]
    functions = {
        "plain": lambda: [plain_features(wave, config) for wave in waves],
        "las_fast": lambda: compute_features(waves, config),
    }
    for actual, expected in zip(*(run() for run in functions.values()), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-2, rtol=1e-3)
    compare_features(compare, functions, f"features {name}", sum(map(len, waves)) / RATE, "plain")


def compare_features(compare, functions: dict, what: str, seconds: float, baseline: str) -> None:
    compare(
        "features",
        functions,
        what=what,
        shape=f"{COUNT} recordings of {seconds:.0f} s in all",
        dtypes=dict.fromkeys(functions, "float32"),
        baseline=baseline,
        rounds=7,
        per=seconds * 1e-3,
        unit="ms/s of audio",
    )
