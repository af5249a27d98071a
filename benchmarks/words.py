"""Measure word times and confidences, and fit the confidences of a checkpoint.

    python -m benchmarks.words times --checkpoint speech13h --data SPEECH [--record]
    python -m benchmarks.words confidence --checkpoint NAME --data ROOT [--record]
    python -m benchmarks.words fit --checkpoint NAME --data ROOT --out NAME.words.json [--text SOURCE...] [--prior FILE]

`times` compares the starts of words that are recognised right with known ones, in recordings made for it:

- synthetic: sentences spoken by eSpeak NG, which reports where each word starts. A quarter of the words, and the first,
  follow a pause of 0.15 to 0.5 s that is put in.
- pauses, joined: eight utterances of the split one after the other, with pauses of 0.3 to 1.5 s between them, or of 0
  to 0.4 s. Each is cut to its speech first, so the start of its first word is known. Speech begins where the energy
  first comes within 25 dB of the utterance's level, in a stretch that comes within 10 dB; this leaves out breaths.

`confidence` judges the confidences of every second utterance of the split; `fit` fits them on the others. A word is
right if the Levenshtein alignment of the words pairs it with an equal one.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from Levenshtein import opcodes

from benchmarks.rows import CONTEXT, RESULTS, append_rows, context
from las_fast.checkpoint import load_model
from las_fast.cli import run
from las_fast.config import FeatureConfig
from las_fast.data.audio import load_audio
from las_fast.data.dataset import load_dataset
from las_fast.data.espeak import Synthesiser
from las_fast.data.features import compute_features, frame_sizes, logmel_config
from las_fast.data.layouts import open_corpus
from las_fast.data.silence import band_energy, true_runs
from las_fast.data.spoken import plan
from las_fast.lm import read_texts
from las_fast.output.transcripts import Word
from las_fast.recogniser import Recogniser
from las_fast.search.confidence import Calibration, Weights, load_calibration

FILE = RESULTS / "words.csv"
COLUMNS = (*CONTEXT, "checkpoint", "measure", "data", "search", "words", "right", "median_ms", "p90_ms", "ece", "auc",
           "out_of_order")  # fmt: skip
LEVEL, NOISE = 0.05, 0.001  # standard deviation of speech and of the noise under a whole recording
DEPTH, PEAK = 25.0, 10.0  # dB below the level of an utterance; see the docstring
SOURCES = ("librispeech", "commonvoice", "speechocean")  # parts of the split's paths; recordings hold one each
JOINED = 8  # utterances of a recording
COMMON = 40  # occurrences in --large-text that make a word known
BINS = 10  # of the expected calibration error
PRIOR_STRENGTH = 10.0  # of the prior on standardised weights, in words' worth of information


# --------------------------------------------------------------------------------------------------------------- times


@dataclass
class Recording:
    """Samples at 16 kHz, and the words in them with the seconds at which they start, None where that is not known."""

    kind: str
    samples: np.ndarray
    words: list[tuple[str, float | None]]


class Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int), ("identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
        ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("id", ctypes.c_char * 8),
    ]  # fmt: skip


class TimedSynthesiser(Synthesiser):
    """A synthesiser that notes where each word starts."""

    LAST, WORD = 0, 1  # types of events

    def _collect(self, wave, count, events):
        event = ctypes.cast(events, ctypes.POINTER(Event))
        i = 0
        while event[i].type != self.LAST:
            if event[i].type == self.WORD:
                self.found.append((event[i].text_position - 1, event[i].length, event[i].sample))
            i += 1
        return super()._collect(wave, count, events)

    def speak_words(self, text: str, voice: str, **options) -> tuple[np.ndarray, list[tuple[str, int]]]:
        """Return the samples, and the words with the samples at which they start; for options see speak."""
        self.found: list[tuple[int, int, int]] = []
        wave = self.speak(text, voice, **options)
        return wave, [(text[first : first + length], sample) for first, length, sample in self.found]


def synthetic_recordings(texts: Sequence[str], config: FeatureConfig) -> Iterator[Recording]:
    """Speak each text in a voice of the spoken corpus, with pauses before some words."""
    import soxr

    rng = np.random.default_rng(0)
    voices = [utterance.voice for utterance in plan(train=1, dev=40, test=40, seed=1)]
    synthesiser = TimedSynthesiser()
    for i, text in enumerate(texts):
        rate = int(rng.integers(120, 170))
        wave, found = synthesiser.speak_words(text, voices[i % len(voices)], rate=rate, pitch=50, pitch_range=50)
        scale = config.sample_rate / synthesiser.sample_rate
        wave = soxr.resample(wave, synthesiser.sample_rate, config.sample_rate)
        cuts = [round(sample * scale) for _, sample in found] + [len(wave)]
        pieces = [(word, wave[a:b]) for (word, _), a, b in zip(found, cuts, cuts[1:], strict=False)]
        pauses = [rng.uniform(0.15, 0.5) if not n or rng.random() < 0.25 else 0.0 for n in range(len(pieces))]
        yield join("synthetic", pieces, pauses, config)
    synthesiser.close()


def joined_recordings(utterances, kind: str, pauses: Sequence[float], config: FeatureConfig) -> Iterator[Recording]:
    """Join utterances of each source, JOINED at a time; `pauses` are the limits of the pause before each."""
    rng = np.random.default_rng(0)
    for source in SOURCES:
        members = [u for u in utterances if source in str(u.path)]
        for first in range(0, len(members), JOINED):
            part = members[first : first + JOINED]
            pieces = [(u.transcript, cut_to_speech(load_audio(u.path, config.sample_rate), config)) for u in part]
            yield join(f"{kind} {source}", pieces, rng.uniform(*pauses, len(part)).tolist(), config)


def cut_to_speech(samples: np.ndarray, config: FeatureConfig) -> np.ndarray:
    """Cut an utterance to its speech, without breaths before and after; see the docstring of the module."""
    energy = band_energy(compute_features([samples], logmel_config(config))[0], config)
    energy = energy - torch.quantile(energy, 0.95)
    runs = [(a, b) for a, b in true_runs(energy > -DEPTH) if float(energy[a:b].max()) > -PEAK]
    window, shift = frame_sizes(config)
    return samples[runs[0][0] * shift + window // 2 : runs[-1][1] * shift + window // 2]


def join(kind: str, pieces: list[tuple[str, np.ndarray]], pauses: Sequence[float], config: FeatureConfig) -> Recording:
    """Join pieces of speech, each a text and its samples, with a pause before each and noise under all."""
    parts, words, count = [], [], 0
    for (text, samples), pause in zip(pieces, pauses, strict=True):
        silence = np.zeros(int(pause * config.sample_rate))
        parts += [silence, samples * (LEVEL / samples.std())]
        count += len(silence)
        first, *others = text.upper().split()
        words += [(first, count / config.sample_rate), *((word, None) for word in others)]
        count += len(samples)
    samples = np.concatenate([*parts, np.zeros(config.sample_rate // 4)])
    samples = samples + NOISE * np.random.default_rng(0).standard_normal(len(samples))
    return Recording(kind, samples.astype(np.float32), words)


def measure_times(options: argparse.Namespace) -> None:
    model = Recogniser(load_model(options.checkpoint), torch.device("cpu"))
    config = model.loaded.config.features
    corpus = open_corpus(options.data)
    utterances = [u for name in corpus.resolve(options.split) for u in corpus.utterances(name)][:: options.every]
    sentences = [u.text for u in plan(train=1, dev=40, test=40, seed=1) if not u.split.startswith("train")]
    sentences += [u.transcript for u in utterances if len(u.transcript) < 120][:: max(1, len(utterances) // 80)]
    recordings = [
        *synthetic_recordings(sentences, config),
        *joined_recordings(utterances, "pauses", (0.3, 1.5), config),
        *joined_recordings(utterances, "joined", (0.0, 0.4), config),
    ]
    errors: dict[str, list[float]] = {}
    known, disorder = Counter(), Counter()
    found = model.transcribe_all([r.samples for r in recordings], config.sample_rate, warn=lambda message: None)
    for recording, (_, transcript) in zip(recordings, found, strict=True):
        kinds = {recording.kind, recording.kind.split()[0]}
        pairs = right_words(recording.words, transcript.words)
        for kind in sorted(kinds):
            known[kind] += sum(start is not None for _, start in recording.words)
            disorder[kind] += count_disorder(transcript.words, len(recording.samples) / config.sample_rate)
            errors.setdefault(kind, []).extend(word.start - start for start, word in pairs)
    for kind, values in errors.items():
        median, p90 = (1000 * float(np.quantile(np.abs(values), q)) for q in (0.5, 0.9))
        print(f"{kind}: {len(values)} of {known[kind]} words right, error of their starts: median {median:.0f} ms, "
              f"90% within {p90:.0f} ms, {1000 * np.median(values):+.0f} ms on the whole; "
              f"out of order: {disorder[kind]}")  # fmt: skip
        cells = (known[kind], len(values), f"{median:.0f}", f"{p90:.0f}", "", "", disorder[kind])
        record(options, "starts", kind, f"beam {model.loaded.config.decoding.beam}", cells)


def right_words(words: list[tuple[str, float | None]], found: Sequence[Word]) -> list[tuple[float, Word]]:
    """Return the start of each word that is known and recognised right, and the word that was found."""
    pairs = matches([word for word, _ in words], [word.text for word in found])
    return [(start, found[j]) for i, j in pairs if (start := words[i][1]) is not None]


def matches(reference: list[str], found: list[str]) -> list[tuple[int, int]]:
    """Return the indices of the equal words that the Levenshtein alignment pairs."""
    ids: dict[str, int] = {}
    texts = ["".join(chr(0x100 + ids.setdefault(word, len(ids))) for word in words) for words in (reference, found)]
    blocks = [(i, j, end - i) for kind, i, end, j, _ in opcodes(*texts) if kind == "equal"]
    return [(i + n, j + n) for i, j, count in blocks for n in range(count)]


def count_disorder(words: Sequence[Word], seconds: float) -> int:
    """Return how many words do not lie inside the recording, after the word before."""
    previous = 0.0
    wrong = 0
    for word in words:
        wrong += not previous <= word.start < word.end <= seconds + 1e-6
        previous = word.end
    return wrong


# ---------------------------------------------------------------------------------------------------------- confidence


class Collector:
    """Stands in for Weights: keeps the features of all words, and numbers the words instead of judging them."""

    def __init__(self) -> None:
        self.parts: list[dict[str, np.ndarray]] = []
        self.count = 0

    def __call__(self, features: dict[str, np.ndarray]) -> np.ndarray:
        self.parts.append(features)
        size = len(features["share"])
        self.count += size
        return np.arange(self.count - size, self.count, dtype=float)

    def features(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate([part[name] for part in self.parts]) for name in self.parts[0]}


@dataclass
class Judged:
    """The best words of a split."""

    values: np.ndarray  # (N,) confidence, or the number of a Collector
    right: np.ndarray  # (N,) bool
    utterance: np.ndarray  # (N,)
    disorder: int


def decode_words(model: Recogniser, options: argparse.Namespace, beam: int | None) -> Judged:
    """Decode the split and compare the words of the best hypotheses with the references."""
    loaded = model.loaded
    corpus = open_corpus(options.data)
    data = load_dataset(corpus, corpus.resolve(options.split), features=loaded.config.features,
                        data=loaded.config.data, statistics=loaded.statistics, need_text=True)  # fmt: skip
    results = model.decode_dataset(data, model.decoder(model.settings(beam=beam)), words=True)
    values, right, utterance, disorder = [], [], [], 0
    for i, (best, *_) in enumerate(results):
        paired = {j for _, j in matches((data.texts[i] or "").split(), [word.text for word in best.words])}
        values += [word.confidence for word in best.words]
        right += [j in paired for j in range(len(best.words))]
        utterance += [i] * len(best.words)
        disorder += count_disorder(best.words, float(data.seconds[i]))
    return Judged(np.array(values), np.array(right), np.array(utterance), disorder)


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the mean over words of |confidence - share of right words| in their bin, of BINS equal bins."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    differences = np.bincount(bins, confidence - right, minlength=BINS)
    return float(np.abs(differences).sum() / len(confidence))


def area_under_roc(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the probability that a right word has a higher confidence than a wrong one; ties count half."""
    _, ranks, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2  # rank from 1, equal values share their mean
    positive = int(right.sum())
    return float((middle[ranks][right].sum() - positive * (positive + 1) / 2) / (positive * (len(right) - positive)))


def measure_confidence(options: argparse.Namespace) -> None:
    model = Recogniser(load_model(options.checkpoint), torch.device("cpu"))
    for beam in (None, 1):
        judged = decode_words(model, options, beam)
        search = "greedy" if beam == 1 else f"beam {model.loaded.config.decoding.beam}"
        held_out = judged.utterance % 2 == 1
        for part, rows in (("held-out half", held_out), ("half of the fit", ~held_out)):
            values, right = judged.values[rows], judged.right[rows]
            ece, auc = expected_calibration_error(values, right), area_under_roc(values, right)
            print(f"{search}, {part}: {len(values)} words, {right.mean():.1%} right, ECE {ece:.4f}, AUC {auc:.4f}; "
                  f"out of order in all: {judged.disorder}")  # fmt: skip
            cells = (len(values), int(right.sum()), "", "", f"{ece:.4f}", f"{auc:.4f}", judged.disorder)
            record(options, "confidence", f"{options.split}, {part}", search, cells)


def fit(
    features: dict[str, np.ndarray], right: np.ndarray, prior: Weights | None = None, strength: float = 3.0
) -> Weights:
    """Fit a logistic regression by Newton's method, with a Gaussian prior on the standardised weights.

    Args:
        features: (N,) each.
        right:    (N,) bool.
        prior:    the mean of the prior; default: 0.
        strength: of the prior.
    """
    names = [name for name, x in features.items() if x.std() > 1e-9]
    columns = np.stack([features[name] for name in names], 1)
    means, scales = columns.mean(0), columns.std(0)
    x = np.concatenate([np.ones((len(right), 1)), (columns - means) / scales], 1)
    prior_weights = {} if prior is None else prior.weights
    centre = np.append(0.0, [prior_weights.get(name, 0.0) for name in names] * scales)
    precision = np.append(0.0, np.full(len(names), strength))
    w = np.zeros_like(centre)
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (p - right) + precision * (w - centre)
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + np.diag(precision), gradient)
        w = w - step / max(1.0, np.abs(step).max())
        if np.abs(step).max() < 1e-9:
            break
    weights = {name: round(float(v), 5) for name, v in zip(names, w[1:] / scales, strict=True)}
    return Weights(round(float(w[0]), 5), weights, {n: round(float(m), 5) for n, m in zip(names, means, strict=True)})


def known_words(options: argparse.Namespace) -> frozenset[str]:
    """Return the words of --text, and those that --large-text has at least COMMON times."""
    words = {word for source in options.text for text in read_texts(Path(source)) for word in text.upper().split()}
    for path in options.large_text:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            counts = Counter(word for line in file for word in line.split())
        words |= {word for word, count in counts.items() if count >= COMMON}
    return frozenset(words)


def fit_calibration(options: argparse.Namespace) -> None:
    loaded = load_model(options.checkpoint)
    prior = load_calibration(Path(options.prior)) if options.prior else None
    weights = {}
    for search, beam in (("beam", None), ("greedy", 1)):
        collector = Collector()
        model = Recogniser(loaded, torch.device("cpu"))
        model._calibration = Calibration(collector, collector, known_words(options))  # type: ignore[arg-type]
        judged = decode_words(model, options, beam)
        rows = judged.utterance % 2 == 0
        order = judged.values.astype(int)[rows]
        features = {name: x[order] for name, x in collector.features().items()}
        start = getattr(prior, search) if prior else None
        weights[search] = fit(features, judged.right[rows], start, PRIOR_STRENGTH if prior else 3.0)
    calibration = Calibration(**weights, known=known_words(options))
    if prior:
        calibration = replace(calibration, start=prior.start, start_after_pause=prior.start_after_pause, end=prior.end)
    calibration.save(Path(options.out))
    print(f"written {options.out}: {len(calibration.known)} known words")


# ------------------------------------------------------------------------------------------------------------- command


def record(options: argparse.Namespace, measure: str, data: str, search: str, cells: tuple) -> None:
    if options.record:
        append_rows(FILE, COLUMNS, [(*context(), options.checkpoint, measure, data, search, *cells)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.words", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("command", choices=("times", "confidence", "fit"))
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint file or released name")
    parser.add_argument("--data", required=True, help="corpus with the split")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="times: use every N-th utterance")
    parser.add_argument("--out", metavar="FILE", help="fit: calibration to write")
    parser.add_argument("--prior", metavar="FILE", help="fit: checkpoint whose weights are the prior")
    parser.add_argument("--text", nargs="*", default=[], metavar="SOURCE", help="fit: texts whose words are known")
    parser.add_argument(
        "--large-text", nargs="*", default=[], metavar="FILE.gz", help="fit: texts whose common words are known"
    )
    parser.add_argument("--record", action="store_true", help="append the rows to benchmarks/results/words.csv")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    commands = {"times": measure_times, "confidence": measure_confidence, "fit": fit_calibration}
    commands[options.command](options)


if __name__ == "__main__":
    run(main)
