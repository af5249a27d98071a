"""The Python API: a trained model that transcribes recordings and decodes features. The commands use it too.

model = las_fast.load("english")
print(model.transcribe("talk.mp3").text)
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, TypedDict, TypeGuard, TypeVar, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from las_fast.checkpoint import Loaded, load_model
from las_fast.config import MAX_BEAM, PRECISIONS, DecodingConfig, Precision, check_decoding
from las_fast.data.audio import name_of
from las_fast.data.features import seconds_of
from las_fast.data.samples import is_array, to_numpy
from las_fast.data.vad import check_vad
from las_fast.errors import InputError, show, type_name
from las_fast.files import file_identity
from las_fast.ops import NgramModel
from las_fast.output.transcripts import MIN_SPEECH_SCORE, POOL_SECONDS, Hypothesis, Transcript, noise_warning
from las_fast.search import beam, dataset
from las_fast.search.confidence import Calibration, load_calibration
from las_fast.search.dataset import Utterances
from las_fast.search.ngram import find_lm, load_ngram_model, with_default_weight
from las_fast.search.words import WordFinder
from las_fast.system import choose_device
from las_fast.transcription import Transcription, to_audio

if TYPE_CHECKING:
    from las_fast.data.dataset import SpeechDataset

StrPath = str | os.PathLike[str]
Array = np.ndarray | Tensor
LanguageModel = StrPath | Literal[False] | None
Item = TypeVar("Item")  # a recording


class DecodingOptions(TypedDict, total=False):
    """Options of Recogniser.transcribe that replace decoding settings of the checkpoint."""

    beam: int | None
    beam_threshold: float | None
    speeds: float | Sequence[float] | None
    warps: float | Sequence[float] | None
    view_threshold: float | None
    precision: Precision | None
    lm: LanguageModel


class TranscribeOptions(DecodingOptions, total=False):
    """Options of Recogniser.transcribe, which documents them."""

    nbest: int
    min_speech_score: float
    vad: str


class TranscribeAllOptions(TranscribeOptions, total=False):
    """Options of Recogniser.transcribe_all, which documents them."""

    skip_bad: bool
    pool_seconds: float
    warn: Callable[[str], None]
    on_audio: Callable[[float], None]


def load(checkpoint: StrPath, *, device: str | torch.device = "auto") -> Recogniser:
    """Load a trained model.

    Args:
        checkpoint: name of a released model ("english", "an4"), run folder, or checkpoint file.
        device:     "cpu", "cuda", "cuda:1", or "auto": CUDA if available, else the CPU.

    Raises:
        InputError: the model or the device does not exist, or the file is damaged.
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise InputError(f"a checkpoint is the name of a released model or a path; got {type_name(checkpoint)}")
    chosen = choose_device(str(device), "device=")
    return Recogniser(load_model(os.fspath(checkpoint), chosen), chosen)


class SearchSetup(NamedTuple):
    """The arguments of las_fast.search.beam.beam_search that do not depend on the utterances."""

    config: DecodingConfig
    ngram: NgramModel | None
    packed: Tensor | None  # weights in the layout of the C++ search


class Recogniser:
    """A trained model that transcribes recordings and decodes features; `las_fast.load` makes one.

    It is thread-safe. The first call caches the n-gram model and a copy of the weights for the C++ search; the weights
    must not change afterwards.

    Args:
        loaded:    the network, its settings and its vocabulary.
        device:    of the network.
        lm_option: text before the name of a language model in errors, such as "--lm ".
    """

    def __init__(self, loaded: Loaded, device: torch.device, *, lm_option: str = "lm="):
        self.loaded, self.device, self._lm_option = loaded, device, lm_option
        self._lock = threading.Lock()
        self._ngram_cache: tuple[Any, NgramModel | None, DecodingConfig] | None = None  # key, model, settings
        self._packed: dict[str, Tensor | None] = {}  # precision -> weights for the C++ search
        self._calibration: Calibration | None = None  # of word times and confidences

    def __repr__(self) -> str:
        return f"<las_fast.Recogniser {show(self.loaded.name)} on {self.device}>"

    def transcribe(
        self,
        recording: StrPath | BinaryIO | Array,
        sample_rate: int | None = None,
        *,
        beam: int | None = None,
        beam_threshold: float | None = None,
        speeds: float | Sequence[float] | None = None,
        warps: float | Sequence[float] | None = None,
        view_threshold: float | None = None,
        precision: Precision | None = None,
        lm: LanguageModel = None,
        nbest: int = 1,
        min_speech_score: float = MIN_SPEECH_SCORE,
        vad: str = "energy",
    ) -> Transcript:
        """Transcribe a recording of any length, cut at pauses into segments of speech.

        Problems that make recognition worse (telephone band, clipping, a missing end) are reported as UserWarning, and
        so are segments left out as noise.

        Args:
            recording:        path ("-" is standard input); binary file object, read from its current position; or array
                              or tensor of samples, (N,) or (N, channels), float from -1 to 1, int16 or int32.
            sample_rate:      of an array, in Hz; must be omitted otherwise.
            beam:             beam width, 1 is greedy; by default that of the checkpoint's settings.
            beam_threshold:   hypotheses more than this many nats below the best one are dropped; 0: none is; by default
                              that of the checkpoint's settings.
            speeds, warps:    each segment is decoded at these speeds (0.5 to 2; 2: twice as fast), in this order, with
                              the factor on its frequencies (0.5 to 1.5) at the same position, and the text with the
                              highest score is kept; a single speed or warp applies to all. By default those of the
                              checkpoint's settings. speeds=1, warps=1: decode once.
            view_threshold:   a segment whose score is at least -view_threshold nats per token is not decoded at further
                              speeds and warps; 0: every segment is decoded at every speed; by default that of the
                              checkpoint's settings.
            precision:        of matmuls: "fp32", "bf16" or, on a CPU, "int8"; "auto" is "fp32"; by default that of the
                              checkpoint's settings.
            lm:               file of a language model, or name of a released one; its weight is that of the settings,
                              but 0.1 if they have none, or if the checkpoint's own language model was made with
                              --subtract and this one was not. None: the checkpoint's language model, if its settings
                              have a weight; False: none.
            nbest:            maximum hypotheses returned per segment, at most the beam; fewer if the search has dropped
                              the others.
            min_speech_score: segments with a lower speech score are left out as noise; -inf keeps all. Without a CTC
                              head it has no effect.
            vad:              how speech and pauses are found: by "energy", or with the package silero-vad by "silero",
                              which tells speech from music and changing noise.

        Raises:
            InputError: the recording or an option is invalid, or a segment does not fit in memory.
        """
        audio = to_audio(recording, sample_rate)
        messages: list[str] = []
        options = TranscribeOptions(
            beam=beam,
            beam_threshold=beam_threshold,
            speeds=speeds,
            warps=warps,
            view_threshold=view_threshold,
            precision=precision,
            lm=lm,
            nbest=nbest,
            min_speech_score=min_speech_score,
            vad=vad,
        )
        ((_, transcript),) = self.transcribe_all([audio], **options, warn=messages.append)
        if transcript.noise:
            messages.append(noise_warning(name_of(audio), transcript, "min_speech_score"))
        for message in messages:
            warnings.warn(message, stacklevel=2)
        return transcript

    def transcribe_all(
        self,
        recordings: Iterable[Item],
        sample_rate: int | None = None,
        **options: Unpack[TranscribeAllOptions],
    ) -> Iterator[tuple[Item, Transcript]]:
        """Transcribe many recordings; yield each one with its transcript, in order, as soon as it is decoded.

        Segments of several recordings are decoded in one batch, which is faster than calling `transcribe` for each.

        Args:
            recordings:   each as in `transcribe`, which also has beam, beam_threshold, speeds, warps,
                          view_threshold, precision, lm, nbest, min_speech_score and vad.
            sample_rate:  of the arrays, in Hz. With it, all recordings are arrays; without it, paths or file objects.
            skip_bad:     leave out recordings that cannot be read, with a warning, instead of raising; default False.
            pool_seconds: seconds of speech decoded together; default 600.
            warn:         called with a message for each problem of a recording; default warnings.warn.
            on_audio:     called with the seconds of audio done since its last call, for progress bars.

        Raises:
            InputError: an option or a recording is invalid, or a segment does not fit in memory. Earlier recordings
                have been yielded by then.
        """
        is_single = isinstance(recordings, (str, os.PathLike)) or is_array(recordings) or hasattr(recordings, "read")
        if is_single or not isinstance(recordings, Iterable):
            raise InputError(
                f"recordings must be a list of paths, files or arrays; got {type_name(recordings)}; for a single "
                "recording, call transcribe"
            )
        return self.transcription(**options).run(recordings, sample_rate)

    @overload
    def decode(
        self,
        features: Array,
        *,
        nbest: int = 1,
        **options: Unpack[DecodingOptions],
    ) -> list[Hypothesis]: ...

    @overload
    def decode(
        self,
        features: Sequence[Array],
        *,
        nbest: int = 1,
        **options: Unpack[DecodingOptions],
    ) -> list[list[Hypothesis]]: ...

    def decode(
        self,
        features: Array | Sequence[Array],
        *,
        nbest: int = 1,
        **options: Unpack[DecodingOptions],
    ) -> list[Hypothesis] | list[list[Hypothesis]]:
        """Decode the features of an utterance, or of a list of utterances in batches.

        Args:
            features: array or tensor (T, F) of feature frames before normalisation and deltas, F as in training; or a
                      list of them.
            nbest:    maximum hypotheses returned per utterance, as in `transcribe`.
            options:  beam, beam_threshold, speeds, warps, view_threshold, precision and lm, as in `transcribe`.

        Returns:
            Hypotheses, best first; for a list of utterances, a list of these.

        Raises:
            InputError: the features or an option are invalid, or an utterance does not fit in memory.
        """
        setup = self._setup_of(options, nbest)
        if not isinstance(features, (list, tuple)):
            return self._decode(self._utterances({"features": features}), setup, nbest)[0]
        by_name = {f"features[{i}]": x for i, x in enumerate(features)}
        return self._decode(self._utterances(by_name), setup, nbest) if by_name else []

    def _setup_of(self, options: DecodingOptions, nbest: int) -> SearchSetup:
        """Return the search setup for these options.

        Raises:
            InputError: an option is invalid, or the language model or the calibration cannot be read.
        """
        setup = self.search_setup(self.settings(**options), options.get("lm"))
        check_nbest(nbest, setup.config.beam)
        self._word_finder(setup.config)  # reads the calibration, which may be damaged
        return setup

    def _decode(self, data: Utterances, setup: SearchSetup, nbest: int) -> list[list[Hypothesis]]:
        results = self.decode_dataset(data, setup, nbest=nbest, speech_scores=True, words=True, progress=False)
        return [[self.hypothesis(result) for result in nbest_results] for nbest_results in results]

    def _utterances(self, features: dict[str, Any]) -> Utterances:
        frames = [self._frames(array, name) for name, array in features.items()]
        config = self.loaded.config.features
        seconds = [seconds_of(len(x), config) for x in frames]
        return Utterances(frames, list(features), seconds, config, self.loaded.statistics)

    def _frames(self, array: Any, name: str) -> Tensor:
        """Return features (T, F) in float32; raise InputError, which starts with `name`, if they are invalid."""
        config = self.loaded.config.features
        if not is_array(array):
            raise InputError(f"{name} must be an array of shape (T, {config.size}); got {type_name(array)}")
        array = to_numpy(array)
        if array.dtype.kind not in "fiu":
            raise InputError(f"{name} must contain numbers; got an array of {array.dtype}")
        if array.ndim != 2 or array.shape[1] != config.size or not len(array):
            advice = "; transpose it" if array.ndim == 2 and array.shape[0] == config.size else ""
            raise InputError(f"{name} must have shape (T, {config.size}), as in training; got {array.shape}{advice}")
        with np.errstate(over="ignore"):
            frames = torch.tensor(np.ascontiguousarray(array, np.float32))
        if not frames.isfinite().all():
            raise InputError(f"{name} contains NaN or infinite values; compute it again")
        return frames

    # Used by the commands.

    def transcription(
        self,
        *,
        nbest: int = 1,
        min_speech_score: float = MIN_SPEECH_SCORE,
        vad: str = "energy",
        skip_bad: bool = False,
        pool_seconds: float = POOL_SECONDS,
        warn: Callable[[str], None] = warnings.warn,
        on_audio: Callable[[float], None] = lambda seconds: None,
        **options: Unpack[DecodingOptions],
    ) -> Transcription:
        """Prepare a call of `transcribe_all`, with the same options and errors."""
        check_number("min_speech_score", min_speech_score)
        check_number("pool_seconds", pool_seconds, minimum=0)
        if warning := self.features_warning():
            warn(warning)
        check_vad(vad)
        setup = self._setup_of(options, nbest)
        return Transcription(
            features=self.loaded.config.features,
            statistics=self.loaded.statistics,
            decode=lambda data: self._decode(data, setup, nbest),
            min_speech_score=min_speech_score,
            vad=vad,
            skip_bad=skip_bad,
            pool_seconds=pool_seconds,
            warn=warn,
            on_audio=on_audio,
        )

    def features_warning(self) -> str | None:
        """Return a warning if the model was trained on features that las_fast has not computed, else None."""
        data = self.loaded.info.get("data") or {}
        if data.get("kind") != "features":
            return None
        return (
            f"checkpoint {self.loaded.path} was trained on the features of {data.get('name')}; "
            "those that las_fast computes from audio may differ"
        )

    def settings(
        self,
        *,
        beam: int | None = None,
        beam_threshold: float | None = None,
        speeds: float | Sequence[float] | None = None,
        warps: float | Sequence[float] | None = None,
        view_threshold: float | None = None,
        precision: Precision | None = None,
        lm: LanguageModel = None,
    ) -> DecodingConfig:
        """Return the decoding settings of the checkpoint, with those replaced that are given.

        The arguments are those of `transcribe`.

        Raises:
            InputError: an argument is invalid.
        """
        if beam is not None and (isinstance(beam, bool) or not isinstance(beam, (int, np.integer))):
            raise InputError(f"beam must be a whole number; got {beam!r}")
        for name, threshold in (("beam_threshold", beam_threshold), ("view_threshold", view_threshold)):
            if threshold is not None:
                check_number(name, threshold, minimum=0)
        if precision is not None and precision not in PRECISIONS:
            raise InputError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}; got {precision!r}")
        if lm is not None and lm is not False and not isinstance(lm, (str, os.PathLike)):
            raise InputError(f"lm must be a path, the name of a released model, None or False; got {type_name(lm)}")
        decoding = self.loaded.config.decoding
        decoding = replace(decoding, ngram_weight=0.0) if lm is False else with_default_weight(self.loaded, lm)
        if beam is not None:
            decoding = replace(decoding, beam=int(beam))
        if beam_threshold is not None:
            decoding = replace(decoding, beam_threshold=float(beam_threshold))
        if speeds is not None:
            decoding = replace(decoding, speeds=as_numbers("speeds", speeds))
        if warps is not None:
            decoding = replace(decoding, warps=as_numbers("warps", warps))
        if view_threshold is not None:
            decoding = replace(decoding, view_threshold=float(view_threshold))
        if precision is not None:
            decoding = replace(decoding, precision=precision)
        return check_decoding(self.loaded.config, decoding)

    def search_setup(self, decoding: DecodingConfig, lm: LanguageModel = None) -> SearchSetup:
        """Prepare searches with these settings; for lm see `transcribe`.

        Raises:
            InputError: the language model is missing, damaged, or of another vocabulary.
        """
        with self._lock:
            if decoding.precision not in self._packed:
                packed = beam.packed_weights(self.loaded.model, decoding, self.device)
                self._packed[decoding.precision] = packed
            ngram, rewarded = self._ngram_model(decoding, None if lm is None or lm is False else os.fspath(lm))
            weight, reward = rewarded.ngram_weight, rewarded.length_reward
            config = replace(decoding, ngram_weight=weight, length_reward=reward)
            return SearchSetup(config, ngram, self._packed[decoding.precision])

    def _ngram_model(self, decoding: DecodingConfig, lm: str | None) -> tuple[NgramModel | None, DecodingConfig]:
        """Return the results of fold_length_reward, from the cache if file and weights are those of the last call."""

        def make() -> tuple[NgramModel | None, DecodingConfig]:
            model = load_ngram_model(lm, decoding, self.loaded, self.device, self._lm_option)
            return beam.fold_length_reward(model, decoding, len(self.loaded.vocabulary), self.device)

        path = find_lm(lm, self.loaded.path, self._lm_option) if decoding.ngram_weight else None
        if path is None and not decoding.length_reward:
            return make()
        key = (path and file_identity(os.stat(path)), decoding.ngram_weight, decoding.length_reward)
        if self._ngram_cache is None or self._ngram_cache[0] != key:
            self._ngram_cache = None  # frees its memory before the next model is allocated
            ngram, rewarded = make()
            self._ngram_cache = key, ngram, rewarded
        return self._ngram_cache[1:]

    def decode_dataset(
        self,
        data: SpeechDataset | Utterances,
        setup: SearchSetup,
        *,
        nbest: int = 1,
        speech_scores: bool = False,
        words: bool = False,
        progress: bool = True,
    ) -> list[list[beam.TokenHypothesis]]:
        """Decode a dataset; see las_fast.search.dataset.decode_dataset.

        words: whether hypotheses have words.
        """
        config, ngram, packed = setup
        return dataset.decode_dataset(
            self.loaded.model,
            data,
            self.loaded.vocabulary,
            config,
            nbest=nbest,
            ngram=ngram,
            packed=packed,
            speech_scores=speech_scores,
            words=self._word_finder(config) if words else None,
            progress=progress,
            device=self.device,
        )

    def _word_finder(self, config: DecodingConfig) -> WordFinder:
        with self._lock:
            if self._calibration is None:
                self._calibration = load_calibration(self.loaded.path)
        shift = float(seconds_of(1, self.loaded.config.features))
        model, vocabulary = self.loaded.model, self.loaded.vocabulary
        return WordFinder(model, vocabulary, self._calibration, frame_shift=shift, greedy=config.beam == 1)

    def hypothesis(self, result: beam.TokenHypothesis) -> Hypothesis:
        """Convert a hypothesis of the search, which has tokens, to one that has text."""
        text = self.loaded.vocabulary.decode(result.text_tokens)
        mean_score = result.score / (len(result.text_tokens) + 1)
        return Hypothesis(text, result.score, mean_score, result.speech_score, result.words)


def check_number(name: str, value: object, *, minimum: float = -math.inf) -> None:
    """Raise InputError if an option is not a number, of NumPy or of Python, that is at least `minimum`."""
    if not is_number(value) or not float(value) >= minimum:
        limit = f" of at least {minimum:g}" if math.isfinite(minimum) else ""
        raise InputError(f"{name} must be a number{limit}; got {value!r}")


def as_numbers(name: str, values: object) -> tuple[float, ...]:
    """Return a number, or a list, tuple or vector of numbers, as a tuple; raise InputError if it is something else."""
    numbers = to_numpy(values).tolist() if is_array(values) else values
    numbers = [numbers] if isinstance(numbers, Real) else numbers
    if not isinstance(numbers, (list, tuple)) or not all(map(is_number, numbers)):
        raise InputError(f"{name} must be a number or a list of numbers; got {values!r}")
    return tuple(map(float, numbers))


def is_number(value: object) -> TypeGuard[Real]:
    """Return whether a value is a number, of NumPy or of Python, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_nbest(nbest: int, beam: int) -> None:
    """Raise InputError if nbest is not a whole number from 1 to the beam width."""
    if isinstance(nbest, bool) or not isinstance(nbest, (int, np.integer)) or nbest < 1:
        raise InputError(f"nbest must be a whole number of at least 1; got {nbest!r}")
    if nbest > MAX_BEAM:
        raise InputError(f"nbest must be at most {MAX_BEAM}, the largest beam; got {nbest}")
    if nbest > beam:
        raise InputError(f"nbest={nbest} needs a beam of at least {nbest}; give beam={nbest}")
