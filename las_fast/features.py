"""Audio files to log-mel or MFCC frames, on torch.stft, with Kaldi's definitions.

A frame holds window_ms of samples (scaled to 16-bit range) every shift_ms, whole windows only. Its mean is removed, it
is pre-emphasised (0.97), multiplied by Kaldi's "povey" window and padded with zeros to a power of two. Filters are
triangles on the mel scale 1127 ln(1 + f / 700) from 20 Hz to half the sample rate, over the power spectrum. Log-mel is
the natural logarithm of their energies; MFCC is its orthonormal DCT-II, liftered with 22.

One stft does all of that because these steps are linear. With e the whole signal pre-emphasised and w the window,
    window(preemphasis(frame - mean)) = w * e - (1 - 0.97) * mean * w
(the first sample of a frame would differ, but the window is 0 there), so the spectrum of a frame is the stft of e minus
0.03 * mean * FFT(w).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from las_fast.config import FeatureConfig
from las_fast.errors import InputError

PREEMPHASIS = 0.97
LOW_HZ = 20.0
LIFTER = 22.0
FLOOR = torch.finfo(torch.float32).eps  # Kaldi's floor of a filter's energy
BLOCK_FRAMES = 256  # frames in one stft: its spectrum stays in the processor's cache
OGG_PAGE = 27 + 255 + 255 * 255  # bytes at most
RATES = (1000, 768_000)  # Hz of a recording; others are a damaged header
LOUDEST = 1e6  # a sample; full scale is 1, or 32768 where somebody forgot to divide


def load_audio(path: str | Path, sample_rate: int, *, whole: bool = False) -> np.ndarray:
    """Read an audio file as one channel.

    Args:
        path:        any file that soundfile reads (wav, flac, ogg, mp3); channels are averaged.
        sample_rate: Hz; audio at another rate is resampled.
        whole:       refuse a wav or ogg file whose end is missing; other formats do not tell.

    Returns:
        (N,) float32 samples from -1 to 1, N >= 1.

    Raises:
        InputError: the file is missing, is no audio, holds no samples or some that are no sound, or is not whole.
    """
    try:
        samples, rate = soundfile.read(str(path), dtype="float32")
        if whole and not is_whole(path):
            raise InputError(f"{path} is cut off: its end is missing; copy it again or remove it")
    except (soundfile.LibsndfileError, OSError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise InputError(f"{path} {_problem(path, error)}; give a wav, flac, ogg or mp3 file") from None
    _check_sound(path, samples, rate)
    if samples.ndim == 2:
        samples = samples.mean(axis=1, dtype=np.float32)
    if rate != sample_rate and len(samples):
        samples = soxr.resample(samples, rate, sample_rate)
    if not len(samples):
        raise InputError(f"{path} holds no samples; remove it or record it again")
    return samples


def _check_sound(path: str | Path, samples: np.ndarray, rate: int) -> None:
    low, high = RATES
    if not low <= rate <= high:
        raise InputError(f"{path} has {rate} samples a second by its header, not {low} to {high}; make it again")
    if not np.maximum(-samples.min(initial=0), samples.max(initial=0)) <= LOUDEST:  # NaN is not
        raise InputError(f"{path} holds NaN, infinite or enormous samples, not numbers from -1 to 1; make it again")


def _problem(path: str | Path, error: Exception) -> str:
    """Say why a file could not be read: what the system says of it comes before what a library made of that."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return "does not exist"
    except (OSError, ValueError) as refusal:
        return f"cannot be opened ({getattr(refusal, 'strerror', None) or refusal})"
    if os.path.isdir(path):
        return "is a folder"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    reason = str(error).split(": ", 1)[-1].rstrip(".") or type(error).__name__
    return f"cannot be read as audio ({reason})"


def is_whole(path: str | Path) -> bool:
    """Return False for a wav shorter than its header says and an ogg without its last page; True for all others."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(12)
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            return _wav_is_whole(file, size)
        if head[:4] != b"OggS":
            return True
        file.seek(max(0, size - OGG_PAGE))
        tail = file.read()
    page = tail.rfind(b"OggS\0")
    header = tail[page : page + 27 + 255]
    last_of_stream = 4
    if page < 0 or len(header) < 27 or not header[5] & last_of_stream:
        return False
    segments = header[26]
    return len(tail) - page >= 27 + segments + sum(header[27 : 27 + segments])


def _wav_is_whole(file, size: int) -> bool:
    place = 12
    while place + 8 <= size:
        file.seek(place)
        name, length = struct.unpack("<4sI", file.read(8))
        if name == b"data":
            # A recorder that writes to a pipe cannot know the length and gives the largest
            return length >= 0x7FFF0000 or place + 8 + length <= size
        place += 8 + length + length % 2
    return False


def compute_features(
    waveforms: torch.Tensor | Sequence[torch.Tensor | np.ndarray], config: FeatureConfig
) -> list[torch.Tensor]:
    """Turn waveforms into frames; a waveform's frames do not depend on the others.

    Args:
        waveforms: (B, N) float32, or a list of B one-dimensional tensors or arrays, samples from -1 to 1 at
                   config.sample_rate. One shorter than a window is padded with zeros to one frame.
        config:    kind, size, mel_bins, sample_rate, window_ms and shift_ms are used.

    Returns:
        B tensors (T, config.size) float32 with T = 1 + (N - window) // shift.

    Raises:
        InputError: a waveform has no samples, or the settings make no sense together.
    """
    window, shift = frame_sizes(config)
    check_settings(config)
    signals = [torch.as_tensor(w, dtype=torch.float32) for w in waveforms]
    for signal in signals:
        if signal.ndim != 1 or not len(signal):
            shape = tuple(signal.shape)
            raise InputError(f"a waveform must hold at least one sample in one channel; got shape {shape}")
    if not signals:
        return []
    pad = torch.nn.functional.pad
    signals = [pad(signal, (0, window - len(signal))) if len(signal) < window else signal for signal in signals]
    counts = [1 + (len(signal) - window) // shift for signal in signals]
    # Every signal starts on a multiple of the shift in one long stream, so that one stft serves all without padding to
    # the longest; frames that reach over a border are dropped.
    slots = [count - 1 + -(-_fft_size(window) // shift) for count in counts]
    stream = torch.zeros(sum(slots) * shift)
    starts = np.cumsum([0, *slots[:-1]]).tolist()
    for signal, start, count in zip(signals, starts, counts, strict=True):
        kept = signal[: (count - 1) * shift + window]
        stream[start * shift : start * shift + len(kept)] = _preemphasised(kept)
    frames = _frames(stream, signals, starts, counts, config)
    return [frames[start : start + count].clone() for start, count in zip(starts, counts, strict=True)]


def add_deltas(features: torch.Tensor, order: int) -> torch.Tensor:
    """Append `order` (0, 1 or 2) rounds of slopes over time to features (T, F); returns (T, F * (1 + order)).

    The slope is the regression over two frames to either side, sum n (x[t+n] - x[t-n]) / 10; edge frames are repeated.
    """
    blocks = [features]
    for _ in range(order):
        x = torch.cat([blocks[-1][:1].expand(2, -1), blocks[-1], blocks[-1][-1:].expand(2, -1)])
        blocks.append((x[3:-1] - x[1:-3] + 2 * (x[4:] - x[:-4])) / 10)
    return torch.cat(blocks, dim=1) if order else features


def frame_sizes(config: FeatureConfig) -> tuple[int, int]:
    """Return window and shift in samples."""
    return round(config.sample_rate * config.window_ms / 1000), round(config.sample_rate * config.shift_ms / 1000)


def check_settings(config: FeatureConfig) -> None:
    """Raise InputError when frames cannot be computed with these settings."""
    window, shift = frame_sizes(config)
    if window < 2 or shift < 1:
        raise InputError(
            f"features.window_ms {config.window_ms} and shift_ms {config.shift_ms} at {config.sample_rate} Hz make "
            f"a window of {window} samples every {shift}; give at least 2 and 1"
        )
    if config.kind == "mfcc" and config.size > config.mel_bins:
        raise InputError(
            f"features.size {config.size} MFCC need at least as many mel filters; "
            f"features.mel_bins is {config.mel_bins}"
        )


def _preemphasised(signal: torch.Tensor) -> torch.Tensor:
    out = signal * 32768.0
    out[1:] -= (PREEMPHASIS * 32768.0) * signal[:-1]
    return out


def _frames(stream, signals, starts, counts, config: FeatureConfig) -> torch.Tensor:
    """Return the frames (slots, size) of a stream of pre-emphasised signals, block by block."""
    window, shift = frame_sizes(config)
    size = _fft_size(window)
    taper, spectrum_of_taper, filters, transform = _tables(config)
    means = torch.zeros(len(stream) // shift)
    for signal, start, count in zip(signals, starts, counts, strict=True):
        means[start : start + count] = signal.unfold(0, window, shift).mean(1) * 32768.0
    total = (len(stream) - size) // shift + 1
    out = torch.empty(total, config.size)
    for first in range(0, total, BLOCK_FRAMES):
        count = min(BLOCK_FRAMES, total - first)
        piece = stream[first * shift : (first + count - 1) * shift + size]
        spectrum = torch.stft(piece, size, shift, size, taper, center=False, return_complex=True).T  # (count, bins)
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
    """Return the padded window, its spectrum, the filters (bins, mel) and the MFCC matrix (mel, size) or None."""
    window, _ = frame_sizes(config)
    size = _fft_size(window)
    n = torch.arange(window, dtype=torch.float64)
    taper = torch.zeros(size, dtype=torch.float64)
    taper[:window] = (0.5 - 0.5 * torch.cos(2 * math.pi * n / (window - 1))).pow(0.85)
    bins = config.size if config.kind == "logmel" else config.mel_bins
    transform = _cepstrum(bins, config.size).float() if config.kind == "mfcc" else None
    spectrum = torch.fft.rfft(taper).to(torch.complex64)
    return taper.float(), spectrum, _mel_filters(bins, size, config.sample_rate).float(), transform


def _mel_filters(count: int, fft_size: int, sample_rate: int) -> torch.Tensor:
    """Return (fft_size // 2 + 1, count) triangles of height 1, evenly spaced in mel; the Nyquist bin is unused."""

    def mel(hertz):
        return 1127.0 * torch.log1p(torch.as_tensor(hertz, dtype=torch.float64) / 700.0)

    edges = torch.linspace(mel(LOW_HZ).item(), mel(sample_rate / 2).item(), count + 2, dtype=torch.float64)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    x = mel(torch.arange(fft_size // 2 + 1, dtype=torch.float64) * (sample_rate / fft_size))[:, None]
    filters = torch.minimum((x - left) / (centre - left), (right - x) / (right - centre)).clamp_(min=0)
    filters[-1] = 0
    return filters


def _cepstrum(bins: int, count: int) -> torch.Tensor:
    """Return (bins, count): orthonormal DCT-II times the lifter 1 + 11 sin(pi k / 22)."""
    k = torch.arange(count, dtype=torch.float64)
    n = torch.arange(bins, dtype=torch.float64)[:, None]
    dct = math.sqrt(2.0 / bins) * torch.cos(math.pi / bins * (n + 0.5) * k)
    dct[:, 0] = math.sqrt(1.0 / bins)
    return dct * (1 + LIFTER / 2 * torch.sin(math.pi * k / LIFTER))
