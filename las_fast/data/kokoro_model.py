"""Speech synthesis with Kokoro-82M through onnxruntime, and speakers that blend its English voices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from las_fast.errors import InputError

STYLE_SIZE = 256  # floats of a style vector
MAX_PHONEMES = 510
MIN_VOICES = 3
ENGLISH = "[ab][fm]_*.bin"  # American or British, female or male: af_heart.bin
FETCH = "las_fast/data/README.md has the commands that fetch Kokoro"
LANGUAGE_SWITCH = re.compile(r"\([a-z]{2,5}\)")  # eSpeak NG marks foreign words so: (fr)


@dataclass(frozen=True)
class Speaker:
    """A blend of voices."""

    name: str
    blend: Mapping[str, float]  # voice -> weight; the weights sum to 1

    @property
    def language(self) -> str:
        """The eSpeak NG language of the voice with the largest weight."""
        voice = max(self.blend, key=lambda voice: self.blend[voice])
        return "en-us" if voice.startswith("a") else "en-gb"


def make_speakers(voices: list[str], count: int, seed: int) -> list[Speaker]:
    """Return `count` speakers, each of two or three random voices with random weights."""
    rng = np.random.default_rng([seed, 0])
    speakers = []
    for i in range(count):
        names = rng.choice(voices, size=rng.integers(2, 4), replace=False)
        weights = rng.dirichlet(np.ones(len(names)))
        speakers.append(Speaker(f"kokoro-{i:03d}", dict(zip(names.tolist(), weights.tolist(), strict=True))))
    return speakers


def read_voices(folder: Path) -> dict[str, np.ndarray]:
    """Read the English voices of a folder; return {name: (N, 256) float32}, where row n - 1 is for n phonemes.

    Raises:
        InputError: the folder has fewer than MIN_VOICES English voices, or a file is not a voice.
    """
    paths = sorted(folder.glob(ENGLISH))
    if len(paths) < MIN_VOICES:
        raise InputError(f"{folder} has {len(paths)} English voices ({ENGLISH}), not {MIN_VOICES} or more; {FETCH}")
    sizes = {path.stat().st_size for path in paths}
    if len(sizes) > 1 or not min(sizes) or min(sizes) % (4 * STYLE_SIZE):
        raise InputError(f"{folder} has voices of {', '.join(map(str, sorted(sizes)))} bytes, not all of the same "
                         f"multiple of {4 * STYLE_SIZE}; {FETCH}")  # fmt: skip
    return {path.stem: np.fromfile(path, "<f4").reshape(-1, STYLE_SIZE) for path in paths}


def load_packages():
    """Import onnxruntime and kokoro-onnx's Tokenizer, and return them; raise InputError if a package is missing."""
    try:
        import onnxruntime
        from kokoro_onnx.tokenizer import Tokenizer
    except ImportError as error:
        raise InputError(f"synthesis with Kokoro needs kokoro-onnx ({error}); install it with: "
                         "pip install kokoro-onnx") from None  # fmt: skip
    return onnxruntime, Tokenizer


class Kokoro:
    """The model, on one CPU thread. What it speaks does not depend on what it has spoken before.

    Args:
        model:  the ONNX file.
        voices: folder of the voices.

    Raises:
        InputError: a package or a file is missing or of another kind.
    """

    sample_rate = 24000

    def __init__(self, model: Path, voices: Path):
        onnxruntime, Tokenizer = load_packages()  # noqa: N806
        self._voices = read_voices(voices)
        if not model.is_file():
            raise InputError(f"{model} is not a file; {FETCH}, or give --model")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # classes of onnxruntime's own, without a common base
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{model} does not load as an ONNX model ({reason}); {FETCH}") from None
        names = {tensor.name for tensor in self._session.get_inputs()}
        if names != {"tokens", "style", "speed"}:
            raise InputError(f"{model} has the inputs {', '.join(sorted(names))}, not those of Kokoro: speed, style, "
                             f"tokens; {FETCH}")  # fmt: skip
        self._tokenizer = Tokenizer()

    def speak(self, text: str, speaker: Speaker, *, speed: float) -> np.ndarray:
        """Return the speech of a text, (N,) float32 samples at self.sample_rate.

        The result is empty if the text has no phoneme, or more than MAX_PHONEMES. speed: 0.5 to 2, with 1 as usual.
        """
        phonemes = LANGUAGE_SWITCH.sub("", self._tokenizer.phonemize(text, speaker.language))
        tokens = self._tokenizer.tokenize(phonemes, limit=None)
        if not 1 <= len(tokens) <= MAX_PHONEMES:
            return np.zeros(0, np.float32)
        row = min(len(tokens), len(next(iter(self._voices.values())))) - 1  # all voices have the same size
        style = sum(weight * self._voices[name][row] for name, weight in speaker.blend.items())
        inputs = {
            "tokens": np.array([[0, *tokens, 0]], np.int64),  # 0 pads both ends
            "style": np.asarray(style, np.float32)[None],
            "speed": np.array([speed], np.float32),
        }
        return np.asarray(self._session.run(None, inputs)[0], np.float32).ravel()
