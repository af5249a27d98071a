"""eSpeak NG as a speech synthesiser."""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path

import numpy as np

from las_fast.errors import InputError

ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc")


def load_espeak():
    try:
        import espeakng_loader
    except ImportError:
        raise InputError("the spoken corpus needs eSpeak NG; install it with: pip install espeakng-loader") from None
    return espeakng_loader


class Synthesiser:
    """eSpeak NG through ctypes; one a process, since the library keeps global state.

    A recording also depends a little on what the process said before it (phases of the oscillators live on).
    """

    RATE, PITCH, RANGE = 1, 3, 4  # espeak_PARAMETER
    CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    def __init__(self):
        loader = load_espeak()
        try:
            self._library = ctypes.CDLL(loader.get_library_path())
        except OSError as error:
            raise InputError(f"eSpeak NG does not load ({error}); reinstall it: pip install --force-reinstall "
                             "espeakng-loader") from None  # fmt: skip
        self._link = None
        self._data = self._short_path(Path(loader.get_data_path()))
        if not (self._data / "phontab").is_file():  # the library would end the process
            raise InputError(f"{self._data} holds no eSpeak NG data; reinstall espeakng-loader")
        synchronous = 2
        self.sample_rate = self._library.espeak_Initialize(synchronous, 0, str(self._data).encode(), 0)
        if self.sample_rate <= 0:
            raise InputError(f"{self._data}: eSpeak NG finds no usable data there; reinstall espeakng-loader")
        self._chunks: list[np.ndarray] = []
        self._callback = self.CALLBACK(self._collect)  # kept: the library holds a bare pointer to it
        self._library.espeak_SetSynthCallback(self._callback)
        # eSpeak NG would seed the noise of breathy voices with the time of day
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))

    def _short_path(self, data: Path) -> Path:
        """eSpeak NG cuts paths at 160 bytes: reach a deep installation through a link."""
        if len(str(data).encode()) < 120:
            return data
        self._link = tempfile.TemporaryDirectory(prefix="espeak")
        link = Path(self._link.name) / "data"
        link.symlink_to(data)
        return link

    def close(self) -> None:
        self._library.espeak_Terminate()
        if self._link is not None:
            self._link.cleanup()

    def _collect(self, wave, count, _events):
        if wave and count > 0:
            self._chunks.append(np.ctypeslib.as_array(wave, (count,)).copy())
        return 0

    def speak(self, text: str, voice: str, *, rate: int, pitch: int, pitch_range: int) -> np.ndarray:
        """Return text as float32 samples in -1..1 at self.sample_rate.

        Args:
            voice: accent+speaker.
            rate: words per minute, 80 to 450.
            pitch, pitch_range: 0 to 100, 50 is usual.
        """
        # an unknown variant would silently give the plain voice
        if not (self._data / "voices" / "!v" / voice.partition("+")[2]).is_file():
            raise InputError(f"{self._data} lacks the eSpeak NG voice {voice}; reinstall espeakng-loader")
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise InputError(f"{self._data} lacks the eSpeak NG voice {voice}; reinstall espeakng-loader")
        for parameter, value in ((self.RATE, rate), (self.PITCH, pitch), (self.RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        data = text.lower().encode()  # capitals such as US would be spelt out
        utf8 = 1
        self._library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, utf8, None, None)
        if not self._chunks:
            raise InputError(f"eSpeak NG said nothing for {text!r} in voice {voice}; reinstall espeakng-loader")
        return np.concatenate(self._chunks).astype(np.float32) / 32768
