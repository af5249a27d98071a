"""Speech synthesis with eSpeak NG, through ctypes."""

from __future__ import annotations

import _ctypes
import ctypes
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np

from las_fast.errors import InputError

ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc")  # eSpeak NG names of English accents
MAX_PATH_BYTES = 120  # of the data folder: eSpeak NG cuts the paths of the files in it at 160 bytes


def load_espeak():
    """Import espeakng_loader, which has the paths of the library and its data; raise InputError if it is missing."""
    try:
        import espeakng_loader
    except ImportError:
        raise InputError("the spoken corpus needs eSpeak NG; install it with: pip install espeakng-loader") from None
    return espeakng_loader


class Synthesiser:
    """A freshly loaded eSpeak NG library; use it in a `with` block, or call `close`.

    The library keeps global state: random numbers, oscillator phases, settings of the last voice. Therefore only one
    Synthesiser can be open in a process, and `close` unloads the library. What a Synthesiser speaks depends on what it
    has spoken before, but not on Synthesisers closed earlier.

    Raises:
        InputError:   eSpeak NG or its data is missing or damaged.
        RuntimeError: another Synthesiser is open.
    """

    RATE, PITCH, RANGE = 1, 3, 4  # of the enum espeak_PARAMETER
    CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    _open: ClassVar[Synthesiser | None] = None  # the one that is open

    def __init__(self):
        if Synthesiser._open is not None:
            raise RuntimeError("another Synthesiser is open in this process; close it first")
        loader = load_espeak()
        try:
            self._library = ctypes.CDLL(loader.get_library_path())
        except OSError as error:
            raise InputError(f"eSpeak NG does not load ({error}); reinstall it: pip install --force-reinstall "
                             "espeakng-loader") from None  # fmt: skip
        Synthesiser._open, self._link = self, None
        try:
            self._initialise(Path(loader.get_data_path()))
        except BaseException:
            self.close()
            raise

    def _initialise(self, data: Path) -> None:
        self._data = self._short_path(data)
        if not (self._data / "phontab").is_file():  # the library would exit the process
            raise InputError(f"{self._data} has no eSpeak NG data; reinstall espeakng-loader")
        synchronous = 2
        self.sample_rate = self._library.espeak_Initialize(synchronous, 0, str(self._data).encode(), 0)
        if self.sample_rate <= 0:
            raise InputError(f"{self._data}: eSpeak NG cannot use the data there; reinstall espeakng-loader")
        self._chunks: list[np.ndarray] = []
        self._callback = self.CALLBACK(self._collect)  # keep a reference: the library holds a bare pointer
        self._library.espeak_SetSynthCallback(self._callback)
        # By default, the time of day seeds the noise of breathy voices.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))

    def _short_path(self, data: Path) -> Path:
        """Return the path of the data folder, or of a temporary link to it if the path has MAX_PATH_BYTES or more."""
        if len(str(data).encode()) < MAX_PATH_BYTES:
            return data
        self._link = tempfile.TemporaryDirectory(prefix="espeak")
        link = Path(self._link.name) / "data"
        link.symlink_to(data)
        return link

    def close(self) -> None:
        """Unload the library and remove the link; later calls do nothing."""
        if Synthesiser._open is not self:
            return
        Synthesiser._open = None
        self._library.espeak_Terminate()
        _ctypes.dlclose(self._library._handle)
        if self._link is not None:
            self._link.cleanup()

    def __enter__(self) -> Synthesiser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _collect(self, wave, count, _events):
        if wave and count > 0:
            self._chunks.append(np.ctypeslib.as_array(wave, (count,)).copy())
        return 0

    def speak(self, text: str, voice: str, *, rate: int, pitch: int, pitch_range: int) -> np.ndarray:
        """Return the speech of a text, (N,) float32 samples from -1 to 1 at self.sample_rate.

        Args:
            voice:              ACCENT+SPEAKER, such as en-us+m1.
            rate:               words per minute, 80 to 450.
            pitch, pitch_range: 0 to 100; eSpeak NG's default is 50.

        Raises:
            InputError: the voice is missing, or eSpeak NG produces no sound.
        """
        # eSpeak NG would silently replace an unknown speaker by its default voice.
        if not (self._data / "voices" / "!v" / voice.partition("+")[2]).is_file():
            raise InputError(f"{self._data} lacks the eSpeak NG voice {voice}; reinstall espeakng-loader")
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise InputError(f"{self._data} lacks the eSpeak NG voice {voice}; reinstall espeakng-loader")
        for parameter, value in ((self.RATE, rate), (self.PITCH, pitch), (self.RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        data = text.lower().encode()  # upper-case words such as US would be spelled out
        utf8 = 1
        self._library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, utf8, None, None)
        if not self._chunks:
            raise InputError(f"eSpeak NG produced no sound for {text!r} in voice {voice}; reinstall espeakng-loader")
        return np.concatenate(self._chunks).astype(np.float32) / 32768
