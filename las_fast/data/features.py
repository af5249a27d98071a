"""Compute log-mel or MFCC frames of waveforms with torch.stft, as Kaldi defines them.

There is a frame of window_ms of samples (scaled to 16-bit range) every shift_ms; windows are never partial. The mean of
a frame is subtracted; it is pre-emphasised (0.97), multiplied by Kaldi's "povey" window and zero-padded to a power of
two. The filters are triangles on the mel scale 1127 ln(1 + f / 700) from 20 Hz to half the sample rate, over the power
spectrum. Log-mel is the natural logarithm of their energies; MFCC is its orthonormal DCT-II, liftered (by
default with 22, as in Kaldi).

The steps before the power spectrum are linear, so one stft computes them for all frames. With e the pre-emphasised
signal and w the window,
    window(preemphasis(frame - mean)) = w * e - (1 - 0.97) * mean * w
(the first sample of a frame would differ, but the window is 0 there), so the spectrum of a frame is the stft of e minus
0.03 * mean * FFT(w).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from las_fast.config import FeatureConfig
from las_fast.errors import InputError

PREEMPHASIS = 0.97
LOW_HZ = 20.0
FLOOR = torch.finfo(torch.float32).eps  # Kaldi's minimum of a filter's energy
BLOCK_FRAMES = 256  # frames per stft, so that the spectrum fits into the CPU cache


def compute_features(
    waveforms: torch.Tensor | Sequence[torch.Tensor | np.ndarray], config: FeatureConfig
) -> list[torch.Tensor]:
    """Compute the frames of each waveform, independently of the others.

    Args:
        waveforms: (B, N) float32, or a list of B one-dimensional tensors or arrays, samples from -1 to 1 at
                   config.sample_rate. A waveform shorter than a window is zero-padded to one frame.
        config:    kind, size, mel_bins, lifter, sample_rate, window_ms and shift_ms are used.

    Returns:
        B tensors (T, config.size) float32 with T = 1 + (N - window) // shift.

    Raises:
        InputError: a waveform has no samples or several channels, or the settings do not fit together.
    """
    window, shift = frame_sizes(config)
    check_settings(config)
    signals = [torch.as_tensor(w, dtype=torch.float32) for w in waveforms]
    for signal in signals:
        if signal.ndim != 1 or not len(signal):
            shape = tuple(signal.shape)
            raise InputError(f"a waveform must have at least one sample in one channel; got shape {shape}")
    if not signals:
        return []
    pad = torch.nn.functional.pad
    signals = [pad(signal, (0, window - len(signal))) if len(signal) < window else signal for signal in signals]
    counts = [1 + (len(signal) - window) // shift for signal in signals]
    # Concatenate all signals, each starting at a multiple of the shift, so that one stft serves all without padding to
    # the longest. Frames that cross from one signal to the next are dropped.
    slots = [count - 1 + -(-_fft_size(window) // shift) for count in counts]
    stream = torch.zeros(sum(slots) * shift, dtype=torch.float32)
    starts = np.cumsum([0, *slots[:-1]]).tolist()
    for signal, start, count in zip(signals, starts, counts, strict=True):
        kept = signal[: (count - 1) * shift + window]
        stream[start * shift : start * shift + len(kept)] = _preemphasised(kept)
    frames = _frames(stream, signals, starts, counts, config)
    return [frames[start : start + count].clone() for start, count in zip(starts, counts, strict=True)]


def speech_features(
    waveforms: torch.Tensor | Sequence[torch.Tensor | np.ndarray], config: FeatureConfig
) -> list[tuple[torch.Tensor, list[tuple[int, int]]]]:
    """Compute the frames for training and decoding; with config.trim_silence, only those near speech.

    Args, Raises: as compute_features.

    Returns:
        For each waveform its frames (T, config.size) float32, and the (start, end) of their runs within the frames that
        compute_features returns.
    """
    from las_fast.data.silence import trim_silence

    if not config.trim_silence:
        return [(frames, [(0, len(frames))]) for frames in compute_features(waveforms, config)]
    check_settings(config)
    trimmed = [trim_silence(frames, config) for frames in compute_features(waveforms, logmel_config(config))]
    return [(cepstra(frames, config), spans) for frames, spans in trimmed]


def logmel_config(config: FeatureConfig) -> FeatureConfig:
    """Return the config of the log-mel frames from which the features of `config` are computed."""
    return config if config.kind == "logmel" else replace(config, kind="logmel", size=config.mel_bins)


def cepstra(logmel: torch.Tensor, config: FeatureConfig) -> torch.Tensor:
    """Convert log-mel frames (T, bins) to config.kind: unchanged, or MFCC (T, config.size)."""
    return logmel if config.kind == "logmel" else logmel @ cepstrum_matrix(config).float()


def add_deltas(features: torch.Tensor, order: int) -> torch.Tensor:
    """Append deltas up to an order of 0, 1 or 2 to features (T, F); returns (T, F * (1 + order)).

    A delta is the regression slope over two frames on either side, sum n (x[t+n] - x[t-n]) / 10, with edge frames
    repeated.
    """
    blocks = [features]
    for _ in range(order):
        x = torch.cat([blocks[-1][:1].expand(2, -1), blocks[-1], blocks[-1][-1:].expand(2, -1)])
        blocks.append((x[3:-1] - x[1:-3] + 2 * (x[4:] - x[:-4])) / 10)
    return torch.cat(blocks, dim=1) if order else features


def frame_sizes(config: FeatureConfig) -> tuple[int, int]:
    """Return (window, shift) in samples."""
    return round(config.sample_rate * config.window_ms / 1000), round(config.sample_rate * config.shift_ms / 1000)


def seconds_of(frames, config: FeatureConfig):
    """Return the duration in seconds of a number of frames; `frames` may be an array of numbers.

    The shift is a whole number of samples, which may differ from shift_ms: at 22050 Hz, 10 ms are 220 samples.
    """
    return frames * frame_sizes(config)[1] / config.sample_rate


def check_settings(config: FeatureConfig) -> None:
    """Raise InputError if frames cannot be computed with these settings."""
    window, shift = frame_sizes(config)
    if window < 2 or shift < 1:
        raise InputError(
            f"features.window_ms {config.window_ms} and shift_ms {config.shift_ms} at {config.sample_rate} Hz make "
            f"a window of {window} and a shift of {shift} samples; give at least 2 and 1"
        )
    if shift > window:
        raise InputError(
            f"features.shift_ms {config.shift_ms:g} must be at most window_ms {config.window_ms:g}, or samples between "
            "the frames are lost; lower shift_ms or raise window_ms"
        )
    if config.kind == "mfcc" and config.size > config.mel_bins:
        raise InputError(
            f"features.size {config.size} must be at most features.mel_bins {config.mel_bins} for MFCC; "
            "lower the size or raise mel_bins"
        )


def _preemphasised(signal: torch.Tensor) -> torch.Tensor:
    out = signal * 32768.0
    out[1:] -= (PREEMPHASIS * 32768.0) * signal[:-1]
    return out


def _frames(stream, signals, starts, counts, config: FeatureConfig) -> torch.Tensor:
    """Compute the frames (total, size) of a stream of pre-emphasised signals, block by block."""
    window, shift = frame_sizes(config)
    size = _fft_size(window)
    taper, spectrum_of_taper, filters, transform = _tables(config)
    means = torch.zeros(len(stream) // shift, dtype=torch.float32)
    for signal, start, count in zip(signals, starts, counts, strict=True):
        means[start : start + count] = signal.unfold(0, window, shift).mean(1) * 32768.0
    total = (len(stream) - size) // shift + 1
    out = torch.empty(total, config.size, dtype=torch.float32)
    for first in range(0, total, BLOCK_FRAMES):
        count = min(BLOCK_FRAMES, total - first)
        block = stream[first * shift : (first + count - 1) * shift + size]
        spectrum = torch.stft(block, size, shift, size, taper, center=False, return_complex=True).T  # (count, bins)
        mean = means[first : first + count, None]
        real = torch.addcmul(spectrum.real, mean, spectrum_of_taper.real, value=PREEMPHASIS - 1)
        imaginary = torch.addcmul(spectrum.imag, mean, spectrum_of_taper.imag, value=PREEMPHASIS - 1)
        power = real.square_().addcmul_(imaginary, imaginary)
        logs = (power @ filters).clamp_(min=FLOOR).log_()
        out[first : first + count] = logs if transform is None else logs @ transform
    return out


def _fft_size(window: int) -> int:
    return 1 << (window - 1).bit_length()


@lru_cache(maxsize=8)
def _tables(config: FeatureConfig):
    """Return the padded window, its spectrum, the filters (fft bins, mel) and the MFCC matrix (mel, size) or None."""
    window, _ = frame_sizes(config)
    size = _fft_size(window)
    n = torch.arange(window, dtype=torch.float64)
    taper = torch.zeros(size, dtype=torch.float64)
    taper[:window] = (0.5 - 0.5 * torch.cos(2 * math.pi * n / (window - 1))).pow(0.85)
    bins = config.size if config.kind == "logmel" else config.mel_bins
    transform = cepstrum_matrix(config).float() if config.kind == "mfcc" else None
    spectrum = torch.fft.rfft(taper).to(torch.complex64)
    return taper.float(), spectrum, _mel_filters(bins, size, config.sample_rate).float(), transform


def filter_centres(count: int, sample_rate: int) -> torch.Tensor:
    """Return the centre frequencies of `count` mel filters in Hz, (count,) float64."""
    return 700.0 * torch.expm1(_filter_edges(count, sample_rate)[1:-1] / 1127.0)


def _filter_edges(count: int, sample_rate: int) -> torch.Tensor:
    """Return the edges of `count` mel filters in mel, (count + 2,); the inner ones are also centres."""
    low, high = _mel(LOW_HZ).item(), _mel(sample_rate / 2).item()
    return torch.linspace(low, high, count + 2, dtype=torch.float64)


def _mel(hertz) -> torch.Tensor:
    return 1127.0 * torch.log1p(torch.as_tensor(hertz, dtype=torch.float64) / 700.0)


def _mel_filters(count: int, fft_size: int, sample_rate: int) -> torch.Tensor:
    """Return triangles of height 1, evenly spaced in mel, (fft_size // 2 + 1, count); the Nyquist bin is 0."""
    edges = _filter_edges(count, sample_rate)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    x = _mel(torch.arange(fft_size // 2 + 1, dtype=torch.float64) * (sample_rate / fft_size))[:, None]
    filters = torch.minimum((x - left) / (centre - left), (right - x) / (right - centre)).clamp_(min=0)
    filters[-1] = 0
    return filters


def cepstrum_matrix(config: FeatureConfig) -> torch.Tensor:
    """Return the orthonormal DCT-II times the lifter, (mel_bins, size) float64."""
    bins, count, lifter = config.mel_bins, config.size, config.lifter
    k = torch.arange(count, dtype=torch.float64)
    n = torch.arange(bins, dtype=torch.float64)[:, None]
    dct = math.sqrt(2.0 / bins) * torch.cos(math.pi / bins * (n + 0.5) * k)
    dct[:, 0] = math.sqrt(1.0 / bins)
    return dct * (1 + lifter / 2 * torch.sin(math.pi * k / lifter)) if lifter else dct
