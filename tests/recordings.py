"""Make, encode, write and read recordings for tests."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile
from layouts import chunk
from tiny_corpora import RATE, make_waveform

from las_fast.data.audio import load_audio, open_recording
from las_fast.errors import InputError

VORBIS = {"format": "OGG", "subtype": "VORBIS"}
OPUS = {"format": "OGG", "subtype": "OPUS"}
FLAC, MP3 = {"format": "FLAC"}, {"format": "MP3"}
WAV = {"format": "WAV"}


def waveform(seconds: float = 0.7, seed: int = 0) -> np.ndarray:
    return make_waveform(np.random.default_rng(seed), seconds)


def encoded(samples: np.ndarray, rate: int = RATE, **options) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **options)
    return buffer.getvalue()


def put(folder, data: bytes, name: str = "x.audio"):
    path = folder / name
    path.write_bytes(data)
    return path


def read(path, **options) -> tuple[np.ndarray, list[str]]:
    recording = open_recording(path, RATE, **options)
    blocks = list(recording)
    return np.concatenate(blocks), recording.warnings


def refusal(path, **options) -> str:
    with pytest.raises(InputError) as error:
        load_audio(path, RATE, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


FORMAT = chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16))


def pcm(seconds: float = 2.0) -> bytes:
    return (waveform(seconds) * 32767).astype("<i2").tobytes()


def stereo_file(folder, *channels: np.ndarray, rate: int = RATE, **options):
    return put(folder, encoded(np.stack(channels, 1), rate, **(options or WAV)))
