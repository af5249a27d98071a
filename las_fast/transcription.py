"""Transcribe recordings: cut each at its pauses, decode segments of several together, return the recordings in order.

The public function is Recogniser.transcribe_all in las_fast/recogniser.py. las_fast.serve decodes the segments of
several clients together by RecordingState and Transcription.read, add and decode_pool.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from las_fast.config import FeatureConfig
from las_fast.data.audio import Audio, name_of, open_recording
from las_fast.data.normalisation import Statistics
from las_fast.data.samples import Samples, is_array, to_samples
from las_fast.data.segments import NO_SPEECH, Speech, segments
from las_fast.errors import BadRecording, InputError, type_name
from las_fast.output.transcripts import Hypothesis, Segment, Transcript, join_texts
from las_fast.search.dataset import Utterances
from las_fast.search.words import shift_words


@dataclass
class RecordingState:
    """A recording that is being transcribed."""

    recording: Any
    name: str = ""  # in errors and warnings; known once the recording is open
    segments: list[Segment] = field(default_factory=list)  # decoded
    noise: list[Segment] = field(default_factory=list)  # decoded, with a speech score below the limit
    undecoded: int = 0  # segments in the pool
    is_read: bool = False  # to its end
    duration: float = 0.0  # seconds; known once it is read
    error: InputError | None = None  # why it cannot be read
    warnings: list[str] = field(default_factory=list)  # problems that make recognition worse

    def transcript(self) -> Transcript:
        """Return the transcript of the segments decoded so far."""
        text = join_texts(self.segments).strip()
        path = os.fsdecode(self.recording) if isinstance(self.recording, (str, os.PathLike)) else None
        return Transcript(text, tuple(self.segments), tuple(self.noise), self.duration, path, tuple(self.warnings))


@dataclass
class Transcription:
    """One call of Recogniser.transcribe_all: its options, and the pool of segments to be decoded together."""

    features: FeatureConfig  # of the model
    statistics: Statistics | None  # for normalisation "global"
    decode: Callable[[Utterances], list[list[Hypothesis]]]  # hypotheses of each utterance, best first
    min_speech_score: float
    vad: str
    skip_bad: bool
    pool_seconds: float
    warn: Callable[[str], None]
    on_audio: Callable[[float], None]  # called with the seconds of audio that are done
    on_block: Callable[[float], None] = lambda seconds: None  # called with the seconds of each block as it is read
    mark_silence: bool = False  # whether `read` yields NO_SPEECH after each chunk without speech; not for `run`
    pool: list[tuple[RecordingState, Speech]] = field(default_factory=list)
    pooled_seconds: float = 0.0  # of speech in the pool
    undecoded_seconds: float = 0.0  # of audio read since the pool was last empty
    pending: deque[RecordingState] = field(default_factory=deque)  # recordings not yielded yet

    def run(self, recordings: Iterable[Any], sample_rate: int | None) -> Iterator[tuple[Any, Transcript]]:
        """Yield each recording with its transcript, in order; errors are those of Recogniser.transcribe_all."""
        for recording in recordings:
            state = RecordingState(recording)
            self.pending.append(state)
            for speech in self.read(state, sample_rate):
                self.add(state, speech)
                if self.pooled_seconds >= self.pool_seconds:
                    self.decode_pool()
                    yield from self._finished()
            if state.error is not None:
                self.pending.pop()
                self.decode_pool()
                yield from self._finished()
                if not self.skip_bad:
                    raise BadRecording(str(state.error)) from None
                self.warn(f"left out: {state.error}")
            yield from self._finished()
        self.decode_pool()
        yield from self._finished()

    def read(self, state: RecordingState, sample_rate: int | None) -> Iterator[Speech]:
        """Yield the segments of a recording, and warn about problems, such as no speech.

        It sets the name, duration and is_read of the state or, if the recording cannot be read, its error.
        """
        seconds, has_speech = 0.0, False

        def blocks() -> Iterator[np.ndarray]:
            nonlocal seconds
            for block in recording:
                yield block
                seconds += len(block) / self.features.sample_rate
                self.on_block(len(block) / self.features.sample_rate)
                self._count_audio(len(block) / self.features.sample_rate)

        try:
            with open_recording(to_audio(state.recording, sample_rate), self.features.sample_rate) as recording:
                state.name = recording.name
                options: dict[str, Any] = {"vad": self.vad, "mark_silence": self.mark_silence}
                for speech in segments(blocks(), self.features, **options):
                    has_speech = has_speech or speech is not NO_SPEECH
                    yield speech
        except InputError as error:
            state.error = error
            return
        state.warnings += recording.warnings
        if not has_speech:
            state.warnings.append(f"{state.name}: no speech was found in its {seconds:.2f} seconds")
        for message in state.warnings:
            self.warn(message)
        state.duration, state.is_read = seconds, True

    def add(self, state: RecordingState, speech: Speech) -> None:
        """Put a segment of the recording into the pool."""
        self.pool.append((state, speech))
        self.pooled_seconds += speech.end - speech.start
        state.undecoded += 1

    def decode_pool(self) -> None:
        """Decode the segments of the pool, and empty it; raise InputError if a segment does not fit in memory."""
        pool, self.pool, self.pooled_seconds = self.pool, [], 0.0
        if pool:
            self._decode_segments(pool)
        self._count_audio(0.0)

    def _count_audio(self, seconds: float) -> None:
        """Report the audio read so far as done, unless a part of it waits in the pool."""
        self.undecoded_seconds += seconds
        if not self.pool and self.undecoded_seconds:
            self.on_audio(self.undecoded_seconds)
            self.undecoded_seconds = 0.0

    def _decode_segments(self, pool: list[tuple[RecordingState, Speech]]) -> None:
        """Decode segments, and add the results to their recordings."""
        ids = [f"{state.name} from {speech.start:.0f} s" for state, speech in pool]
        frames, seconds = zip(*((s.frames, s.end - s.start) for _, s in pool), strict=True)
        data = Utterances(list(frames), ids, seconds, self.features, self.statistics)
        for (state, speech), nbest in zip(pool, self.decode(data), strict=True):
            state.undecoded -= 1
            segment = _segment(speech, nbest)
            is_noise = segment.speech_score is not None and segment.speech_score < self.min_speech_score
            (state.noise if is_noise else state.segments).append(segment)

    def _finished(self) -> Iterator[tuple[Any, Transcript]]:
        """Yield and remove the recordings at the front that are fully decoded."""
        while self.pending and self.pending[0].is_read and not self.pending[0].undecoded:
            done = self.pending.popleft()
            yield done.recording, done.transcript()


def _segment(speech: Speech, nbest: list[Hypothesis]) -> Segment:
    """Return a segment; the times of its words are moved into the recording and clamped to the segment."""
    shift = speech.offset, speech.start, speech.end
    nbest = [replace(hypothesis, words=shift_words(hypothesis.words, *shift)) for hypothesis in nbest]
    best = nbest[0]
    scores = best.score, best.mean_score, best.speech_score
    return Segment(speech.start, speech.end, best.text, *scores, tuple(nbest), best.words)


def to_audio(recording: Any, sample_rate: int | None) -> Audio:
    """Return an array as Samples, and other recordings unchanged; see las_fast.data.audio.open_recording.

    Raises:
        InputError: the recording has another type or an empty path, an array has no valid sample rate, or a file has
            one.
    """
    if is_array(recording):
        return to_samples(recording, sample_rate)
    if isinstance(recording, Samples):
        return recording
    if not isinstance(recording, (str, os.PathLike)) and not callable(getattr(recording, "read", None)):
        raise InputError(f"a recording is a path, a binary file object or an array; got {type_name(recording)}")
    if isinstance(recording, (str, os.PathLike)) and not os.fspath(recording):
        raise InputError("the path of the recording is empty; give one")
    if sample_rate is not None:
        raise InputError(f"sample_rate is for arrays, but {name_of(recording)} states its own rate; omit sample_rate")
    return recording
