"""Measure word times and confidences, and fit the confidences of a checkpoint.

    python -m benchmarks.words times --checkpoint english --data SPEECH [--record]
    python -m benchmarks.words confidence --checkpoint NAME --data ROOT [--record]
    python -m benchmarks.words cross --checkpoint NAME --data ROOT [--prior NAME] [--record]
    python -m benchmarks.words fit --checkpoint NAME --data ROOT --out NAME.words.json [--text SOURCE...] [--prior NAME]

`times` makes recordings in which the starts of words are known, and measures the error of the starts of the words that
are recognised right:

- synthetic: sentences spoken by eSpeak NG, which reports where each word starts. A pause of 0.15 to 0.5 s is inserted
  before the first word and before a quarter of the others.
- pauses, joined: eight utterances of the split one after the other, with pauses of 0.3 to 1.5 s between them, or of 0
  to 0.4 s. Each utterance is first cut to its speech, so the start of its first word is known. Speech is a stretch
  within 25 dB of the utterance's level that comes within 10 dB of it somewhere; breaths are quieter.

`confidence` measures the confidences of the words of the split, separately for its odd utterances and its even ones;
`fit` fits them on the even ones. Where the split is small, `cross` measures a fit by cross-validation: the utterances
are divided into FOLDS parts, and the words of each part are judged by a fit to the other parts, in PARTITIONS random
ways; then `fit --part all` uses all utterances. A word is right if the Levenshtein alignment of the words pairs it with
an equal word.

The calibration error of few words is above 0 even if the confidences are perfect. Therefore the error of perfect ones
is printed too: the mean over draws in which each word is right with a probability equal to its confidence.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from Levenshtein import opcodes

from benchmarks.rows import CONTEXT, RESULTS, append_rows, context
from benchmarks.splits import add_every_option, add_split_options, scored_split, utterances_of
from las_fast.checkpoint import Loaded, find_checkpoint, load_model
from las_fast.cli import run
from las_fast.config import FeatureConfig
from las_fast.data.audio import load_utterance
from las_fast.data.corpus import Utterance
from las_fast.data.espeak import Synthesiser
from las_fast.data.features import compute_features, frame_sizes, logmel_config
from las_fast.data.silence import band_energy, true_runs
from las_fast.data.spoken import plan
from las_fast.data.texts import read_texts
from las_fast.errors import InputError
from las_fast.files import prepare_output_file
from las_fast.output.transcripts import Word
from las_fast.recogniser import Recogniser
from las_fast.search.confidence import (
    DEFAULT,
    Calibration,
    Weights,
    calibration_path_for,
    is_calibration,
    read_calibration,
)

FILE = RESULTS / "words.csv"
COLUMNS = (*CONTEXT, "checkpoint", "measure", "data", "search", "words", "right", "median_ms", "p90_ms", "ece", "auc",
           "out_of_order", "ece_perfect", "ece_perfect_p95")  # fmt: skip
LEVEL, NOISE = 0.05, 0.001  # standard deviations of the speech and of the noise added to a recording
DEPTH, PEAK = 25.0, 10.0  # dB below the level of an utterance: limits of its speech and of the peak of a stretch
SOURCES = ("librispeech", "commonvoice", "speechocean")  # texts in paths; a joined recording has one source
JOINED = 8  # utterances of a recording
MIN_OCCURRENCES = 40  # in --large-text, of a word that counts as known
BINS = 10  # of the expected calibration error
MIN_RARE = 10  # wrong words (or right ones, if fewer) per weight; with less only a bias and a scale are fitted
FOLDS, PARTITIONS = 5, 10  # of the cross-validation
DRAWS = 2000  # of the simulation of perfect confidences
DEFAULT_STRENGTH, PRIOR_STRENGTH = 3.0, 10.0  # precision of the prior on standardised weights, without --prior and with


# --------------------------------------------------------------------------------------------------------------- times


@dataclass
class Recording:
    """A recording whose words are known."""

    kind: str  # "synthetic", "pauses SOURCE" or "joined SOURCE"
    samples: np.ndarray  # (N,) float32 at the sample rate of the model
    words: list[tuple[str, float | None]]  # (word, its start in seconds, or None if that is not known)


class Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int), ("identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
        ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("id", ctypes.c_char * 8),
    ]  # fmt: skip


class TimedSynthesiser(Synthesiser):
    """A synthesiser that records where each word starts."""

    LAST, WORD = 0, 1  # espeak_EVENT_TYPE

    def _collect(self, wave, count, events):
        event = ctypes.cast(events, ctypes.POINTER(Event))
        i = 0
        while event[i].type != self.LAST:
            if event[i].type == self.WORD:
                self.spoken.append((event[i].text_position - 1, event[i].length, event[i].sample))
            i += 1
        return super()._collect(wave, count, events)

    def speak_words(self, text: str, voice: str, **options) -> tuple[np.ndarray, list[tuple[str, int]]]:
        """Return the samples, and (word, sample at which it starts) of each word; for options see speak."""
        self.spoken: list[tuple[int, int, int]] = []
        wave = self.speak(text, voice, **options)
        return wave, [(text[first : first + length], sample) for first, length, sample in self.spoken]


def synthetic_recordings(texts: Sequence[str], config: FeatureConfig) -> Iterator[Recording]:
    """Speak each text in a voice of the spoken corpus, with pauses before some words."""
    import soxr

    rng = np.random.default_rng(0)
    voices = [utterance.voice for utterance in plan(train=1, dev=40, test=40, seed=1)]
    with TimedSynthesiser() as synthesiser:
        for i, text in enumerate(texts):
            rate = int(rng.integers(120, 170))
            wave, spoken = synthesiser.speak_words(text, voices[i % len(voices)], rate=rate, pitch=50, pitch_range=50)
            scale = config.sample_rate / synthesiser.sample_rate
            wave = soxr.resample(wave, synthesiser.sample_rate, config.sample_rate)
            cuts = [round(sample * scale) for _, sample in spoken] + [len(wave)]
            pieces = [(word, wave[a:b]) for (word, _), a, b in zip(spoken, cuts, cuts[1:], strict=False)]
            pauses = [rng.uniform(0.15, 0.5) if not n or rng.random() < 0.25 else 0.0 for n in range(len(pieces))]
            yield join("synthetic", pieces, pauses, config)


def joined_recordings(
    utterances: Sequence[Utterance], kind: str, pauses: tuple[float, float], config: FeatureConfig
) -> Iterator[Recording]:
    """Join utterances of each source, JOINED at a time.

    pauses: minimum and maximum seconds of the pause before each utterance.
    """
    rng = np.random.default_rng(0)
    sources = {u.id: next((name for name in SOURCES if name in str(u.path)), "other") for u in utterances}
    for source in (*SOURCES, "other"):
        members = [u for u in utterances if sources[u.id] == source]
        for first in range(0, len(members), JOINED):
            part = members[first : first + JOINED]
            cut = [(str(u.transcript), cut_to_speech(load_utterance(u, config.sample_rate), config)) for u in part]
            if pieces := [(text, samples) for text, samples in cut if len(samples)]:
                yield join(f"{kind} {source}", pieces, rng.uniform(*pauses, len(pieces)).tolist(), config)


def cut_to_speech(samples: np.ndarray, config: FeatureConfig) -> np.ndarray:
    """Cut samples (N,) to the speech in them, without breaths before and after; (0,) if there is no sound."""
    if not samples.std():
        return samples[:0]
    energy = band_energy(compute_features([samples], logmel_config(config))[0], config)
    energy = energy - torch.quantile(energy, 0.95)
    runs = [(a, b) for a, b in true_runs(energy > -DEPTH) if float(energy[a:b].max()) > -PEAK]
    window, shift = frame_sizes(config)
    return samples[runs[0][0] * shift + window // 2 : runs[-1][1] * shift + window // 2]


def join(kind: str, pieces: list[tuple[str, np.ndarray]], pauses: Sequence[float], config: FeatureConfig) -> Recording:
    """Join pieces of speech, each (text, samples), with a pause in seconds before each, and add noise."""
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


def make_recordings(utterances: Sequence[Utterance], config: FeatureConfig) -> list[Recording]:
    """Return the synthetic recordings and those of joined utterances."""
    sentences = [u.text for u in plan(train=1, dev=40, test=40, seed=1) if not u.split.startswith("train")]
    texts = [str(u.transcript) for u in utterances]
    sentences += [text for text in texts if len(text) < 120][:: max(1, len(texts) // 80)]
    return [
        *synthetic_recordings(sentences, config),
        *joined_recordings(utterances, "pauses", (0.3, 1.5), config),
        *joined_recordings(utterances, "joined", (0.0, 0.4), config),
    ]


def measure_times(options: argparse.Namespace) -> None:
    """Print the errors of the starts of words for each kind of recording, and record them with --record."""
    model = Recogniser(load_model(options.checkpoint), torch.device("cpu"))
    config = model.loaded.config.features
    recordings = make_recordings(utterances_of(options.data, options.split, options.every), config)
    errors: dict[str, list[float]] = {}
    known, disorder = Counter(), Counter()
    results = model.transcribe_all([r.samples for r in recordings], config.sample_rate, warn=lambda message: None)
    for recording, (_, transcript) in zip(recordings, results, strict=True):
        kinds = {recording.kind, recording.kind.split()[0]}
        pairs = right_words(recording.words, transcript.words)
        for kind in sorted(kinds):
            known[kind] += sum(start is not None for _, start in recording.words)
            disorder[kind] += count_disorder(transcript.words, len(recording.samples) / config.sample_rate)
            errors.setdefault(kind, []).extend(word.start - start for start, word in pairs)
    for kind, values in errors.items():
        if not values:
            print(f"{kind}: none of {known[kind]} words right")
            continue
        median, p90 = (1000 * float(np.quantile(np.abs(values), q)) for q in (0.5, 0.9))
        print(f"{kind}: {len(values)} of {known[kind]} words right, error of their starts: median {median:.0f} ms, "
              f"90% within {p90:.0f} ms, signed median {1000 * np.median(values):+.0f} ms; "
              f"out of order: {disorder[kind]}")  # fmt: skip
        cells = (known[kind], len(values), f"{median:.0f}", f"{p90:.0f}", "", "", disorder[kind], "", "")
        record(options, "starts", kind, f"beam {model.loaded.config.decoding.beam}", cells)


def right_words(words: list[tuple[str, float | None]], recognised: Sequence[Word]) -> list[tuple[float, Word]]:
    """Return (known start, recognised word) of each word that is recognised right and whose start is known."""
    pairs = matches([word for word, _ in words], [word.text for word in recognised])
    return [(start, recognised[j]) for i, j in pairs if (start := words[i][1]) is not None]


def matches(reference: list[str], hypothesis: list[str]) -> list[tuple[int, int]]:
    """Return the pairs of indices of equal words in the Levenshtein alignment."""
    ids: dict[str, int] = {}
    texts = [
        "".join(chr(0x100 + ids.setdefault(word, len(ids))) for word in words) for words in (reference, hypothesis)
    ]
    blocks = [(i, j, end - i) for kind, i, end, j, _ in opcodes(*texts) if kind == "equal"]
    return [(i + n, j + n) for i, j, count in blocks for n in range(count)]


def count_disorder(words: Sequence[Word], seconds: float) -> int:
    """Count the words that do not lie inside the recording or do not follow the word before."""
    previous, wrong = 0.0, 0
    for word in words:
        wrong += not previous <= word.start < word.end <= seconds + 1e-6
        previous = word.end
    return wrong


# ---------------------------------------------------------------------------------------------------------- confidence


class Collector:
    """Replaces Weights: collects the features of all words, and returns their indices instead of confidences."""

    def __init__(self) -> None:
        self.parts: list[dict[str, np.ndarray]] = []
        self.count = 0

    def __call__(self, features: dict[str, np.ndarray]) -> np.ndarray:
        self.parts.append(features)
        size = len(features["share"])
        self.count += size
        return np.arange(self.count - size, self.count, dtype=float)

    def features(self) -> dict[str, np.ndarray]:
        """Return the features of all words, (N,) each."""
        return {name: np.concatenate([part[name] for part in self.parts]) for name in self.parts[0]}


@dataclass
class ScoredWords:
    """The N words of the best hypotheses of a split."""

    values: np.ndarray  # (N,) confidences, or the indices from a Collector
    right: np.ndarray  # (N,) bool
    utterance: np.ndarray  # (N,) int index in the split
    disorder: int  # see count_disorder


def decode_words(model: Recogniser, options: argparse.Namespace, beam: int | None) -> ScoredWords:
    """Decode the split, and compare the words of the best hypotheses with the references.

    Raises:
        InputError: no hypothesis has a word, besides the errors of scored_split.
    """
    loaded = model.loaded
    data = scored_split(options, loaded)
    results = model.decode_dataset(data, model.decoder(model.settings(beam=beam)), words=True)
    values, right, utterance, disorder = [], [], [], 0
    for i, (best, *_) in enumerate(results):
        paired = {j for _, j in matches((data.texts[i] or "").split(), [word.text for word in best.words])}
        values += [word.confidence for word in best.words]
        right += [j in paired for j in range(len(best.words))]
        utterance += [i] * len(best.words)
        disorder += count_disorder(best.words, float(data.seconds[i]))
    if not values:
        raise InputError(f"the model recognises no word in --split {options.split}; give a trained checkpoint")
    return ScoredWords(np.array(values), np.array(right), np.array(utterance), disorder)


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the mean over words of |mean confidence - share of right words| in a word's bin, of BINS equal bins."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    differences = np.bincount(bins, confidence - right, minlength=BINS)
    return float(np.abs(differences).sum() / len(confidence))


def perfect_calibration_error(confidence: np.ndarray) -> tuple[float, float]:
    """Return the mean and the 95th percentile of the error if the confidences are the true probabilities."""
    rng = np.random.default_rng(0)
    size = len(confidence)
    errors = [expected_calibration_error(confidence, rng.random(size) < confidence) for _ in range(DRAWS)]
    return float(np.mean(errors)), float(np.quantile(errors, 0.95))


def area_under_roc(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the probability that a right word has a higher confidence than a wrong one; ties count half.

    It is NaN if all words are right, or all wrong.
    """
    _, ranks, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2  # rank from 1, equal values share their mean
    positive = int(right.sum())
    if positive in (0, len(right)):
        return float("nan")
    return float((middle[ranks][right].sum() - positive * (positive + 1) / 2) / (positive * (len(right) - positive)))


def measure_confidence(options: argparse.Namespace) -> None:
    """Print the quality of the confidences in both halves of the split, and record it with --record."""
    model = Recogniser(load_model(options.checkpoint), torch.device("cpu"))
    for beam in (None, 1):
        words = decode_words(model, options, beam)
        search = "greedy" if beam == 1 else f"beam {model.loaded.config.decoding.beam}"
        held_out = words.utterance % 2 == 1
        for part, rows in (("held-out half", held_out), ("half of the fit", ~held_out)):
            if not rows.any():
                continue  # one utterance has no second half
            right = words.right[rows]
            quality = quality_of(words.values[rows], right)
            ece, auc, perfect, p95 = quality
            print(f"{search}, {part}: {len(right)} words, {right.mean():.1%} right, ECE {ece:.4f}, AUC {auc:.4f}; "
                  f"ECE if perfect {perfect:.4f}, 95% below {p95:.4f}; "
                  f"out of order in all: {words.disorder}")  # fmt: skip
            record_quality(options, part, search, right, words.disorder, quality)


def quality_of(values: np.ndarray, right: np.ndarray) -> tuple[float, float, float, float]:
    """Return ECE and AUC of confidences (N,), and the mean and 95th percentile of the ECE of perfect ones."""
    return expected_calibration_error(values, right), area_under_roc(values, right), *perfect_calibration_error(values)


def record_quality(
    options: argparse.Namespace, part: str, search: str, right: np.ndarray, disorder: int, quality: Iterable[float]
) -> None:
    """Append the row of a search and a part of the split with --record; quality is as from quality_of."""
    ece, auc, *perfect = (f"{value:.4f}" for value in quality)
    cells = (len(right), int(right.sum()), "", "", ece, auc, disorder, *perfect)
    record(options, "confidence", f"{options.split}, {part}", search, cells)


def measure_by_folds(options: argparse.Namespace) -> None:
    """Print the quality of a fit to the split by cross-validation, and record it with --record."""
    loaded = load_model(options.checkpoint)
    prior = load_prior(options.prior) if options.prior else None
    for name, beam in (("beam", None), ("greedy", 1)):
        features, words = collect_features(loaded, known_words(options), options, beam)
        if len(np.unique(words.utterance)) < FOLDS:
            raise InputError(f"cross needs at least {FOLDS} utterances with words; give another --split")
        start, right = getattr(prior, name, None), words.right
        rows = []
        for seed in range(PARTITIONS):
            values = cross_validated(features, right, words.utterance, start, seed)
            rows.append(quality_of(values, right))
        (ece, auc, perfect, p95), eces = np.mean(rows, 0), [row[0] for row in rows]
        search = "greedy" if beam == 1 else f"beam {loaded.config.decoding.beam}"
        print(f"{search}, {FOLDS} folds: {len(right)} words, {(~right).sum()} wrong, ECE {ece:.4f} "
              f"({min(eces):.4f} to {max(eces):.4f} in {PARTITIONS} partitions), AUC {auc:.4f}; "
              f"ECE if perfect {perfect:.4f}, 95% below {p95:.4f}")  # fmt: skip
        record_quality(options, f"{FOLDS} folds", search, right, words.disorder, (ece, auc, perfect, p95))


def cross_validated(
    features: dict[str, np.ndarray], right: np.ndarray, utterance: np.ndarray, prior: Weights | None, seed: int
) -> np.ndarray:
    """Return the confidence of each word (N,) from a fit to the utterances of the other folds."""
    _, index = np.unique(utterance, return_inverse=True)
    fold = (np.random.default_rng(seed).permutation(index.max() + 1) % FOLDS)[index]
    values = np.empty(len(right))
    for k in range(FOLDS):
        inside = fold == k
        weights = fit_sparingly({name: x[~inside] for name, x in features.items()}, right[~inside], prior)
        values[inside] = weights({name: x[inside] for name, x in features.items()})
    return values


def fit_sparingly(features: dict[str, np.ndarray], right: np.ndarray, prior: Weights | None) -> Weights:
    """Fit all weights; with a prior and fewer than MIN_RARE rare words per weight, only its bias and scale."""
    rare = min(int(right.sum()), int((~right).sum()))
    if prior is not None and rare < MIN_RARE * len(features):
        return fit_scale(features, right, prior)
    return fit(features, right, prior, PRIOR_STRENGTH if prior else DEFAULT_STRENGTH)


def fit_scale(features: dict[str, np.ndarray], right: np.ndarray, prior: Weights) -> Weights:
    """Fit a bias and a factor of all weights of the prior (Platt scaling); it keeps its means."""
    confidence = prior(features)
    logits = np.log(confidence) - np.log1p(-confidence)
    fitted = fit({"logit": logits}, right, Weights(0.0, {"logit": 1.0}, {}), 1.0)
    factor = fitted.weights["logit"]
    weights = {name: round(factor * weight, 5) for name, weight in prior.weights.items() if name in features}
    bias = fitted.bias + factor * (prior.bias - fitted.means["logit"])
    return Weights(round(bias, 5), weights, {name: prior.means[name] for name in weights})


def fit(
    features: dict[str, np.ndarray], right: np.ndarray, prior: Weights | None = None, strength: float = DEFAULT_STRENGTH
) -> Weights:
    """Fit a logistic regression by Newton's method, with a Gaussian prior on the standardised weights.

    Args:
        features: (N,) each; constant ones are left out.
        right:    (N,) bool.
        prior:    mean of the prior; by default all weights are 0.
        strength: precision of the prior.
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
    """Return the words of --text, and those that occur at least MIN_OCCURRENCES times in a file of --large-text."""
    words = {word for source in options.text for text in read_texts(Path(source)) for word in text.upper().split()}
    for path in options.large_text:
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                counts = Counter(word for line in file for word in line.split())
        except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise InputError(f"--large-text {path} is not UTF-8 text in a whole gzip file ({error})") from None
        words |= {word for word, count in counts.items() if count >= MIN_OCCURRENCES}
    return frozenset(words)


def load_prior(name: str) -> Calibration:
    """Load the calibration of a checkpoint, or the default one for the name "default".

    Raises:
        InputError: there is no such checkpoint, or it has no calibration.
    """
    path = DEFAULT if name == "default" else calibration_path_for(find_checkpoint(name))
    if not path.is_file():
        raise InputError(f"--prior {name} has no calibration: {path} does not exist; give --prior default")
    return read_calibration(path)


def collect_features(
    loaded: Loaded, known: frozenset[str], options: argparse.Namespace, beam: int | None
) -> tuple[dict[str, np.ndarray], ScoredWords]:
    """Decode the split; return the features of its words, (N,) each, and the words."""
    collector = Collector()
    model = Recogniser(loaded, torch.device("cpu"))
    model._calibration = Calibration(collector, collector, known)  # type: ignore[arg-type]
    words = decode_words(model, options, beam)
    order = words.values.astype(int)
    return {name: x[order] for name, x in collector.features().items()}, words


def fit_calibration(options: argparse.Namespace) -> None:
    """Fit the confidences on --part of the split, and write --out."""
    if options.out is None:
        raise InputError("fit needs --out, the calibration to write, such as runs/mine/best.words.json")
    out = Path(options.out)
    prepare_output_file(out, "--out", what="a calibration", suffixes=(".json",), may_replace=is_calibration)
    prior = load_prior(options.prior) if options.prior else None
    known, loaded = known_words(options), load_model(options.checkpoint)
    weights = {}
    for search, beam in (("beam", None), ("greedy", 1)):
        features, words = collect_features(loaded, known, options, beam)
        rows = (words.utterance % 2 == 0) | (options.part == "all")
        features = {name: x[rows] for name, x in features.items()}
        weights[search] = fit_sparingly(features, words.right[rows], getattr(prior, search, None))
    calibration = Calibration(**weights, known=known)
    if prior:
        calibration = replace(calibration, start=prior.start, start_after_pause=prior.start_after_pause, end=prior.end)
    calibration.save(out)
    print(f"written {out}: {len(calibration.known)} known words")


# ------------------------------------------------------------------------------------------------------------- command


def record(options: argparse.Namespace, measure: str, data: str, search: str, cells: tuple) -> None:
    if options.record:
        append_rows(FILE, COLUMNS, [(*context(), options.checkpoint, measure, data, search, *cells)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.words", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("command", choices=("times", "confidence", "cross", "fit"))
    add_split_options(parser, FILE, on_bad=True)
    add_every_option(parser, only="times")
    add = parser.add_argument
    add("--out", metavar="FILE", help="fit: calibration to write")
    add("--part", choices=("half", "all"), default="half", help="fit: utterances to use (default: half, the even ones)")
    add("--prior", metavar="NAME",
        help='cross, fit: checkpoint whose calibration is the prior, or "default" (default: none)')  # fmt: skip
    add("--text", nargs="*", default=[], metavar="SOURCE", help="fit: texts whose words are known, as for las_fast.lm")
    add("--large-text", nargs="*", default=[], metavar="FILE.gz",
        help=f"fit: texts whose words are known if they occur at least {MIN_OCCURRENCES} times")  # fmt: skip
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    commands = {"times": measure_times, "confidence": measure_confidence, "cross": measure_by_folds,
                "fit": fit_calibration}  # fmt: skip
    commands[options.command](options)


if __name__ == "__main__":
    run(main)
