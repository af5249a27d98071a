"""Measure the confidences of the words of a split, and fit them."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.splits import scored_split
from benchmarks.words.alignment import count_disorder, matches
from benchmarks.words.fitting import FOLDS, cross_validated, fit_sparingly
from benchmarks.words.quality import quality_of
from benchmarks.words.record import record
from las_fast.checkpoint import Loaded, find_checkpoint, load_model
from las_fast.data.texts import map_text, read_texts
from las_fast.errors import InputError
from las_fast.files import prepare_output_file
from las_fast.recogniser import Recogniser
from las_fast.search.confidence import DEFAULT, Calibration, calibration_path_for, is_calibration, read_calibration

MIN_OCCURRENCES = 40  # in --large-text, of a word that counts as known
PARTITIONS = 10  # of the cross-validation


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


def measure_by_folds(options: argparse.Namespace) -> None:
    """Print the quality of a fit to the split by cross-validation, and record it with --record."""
    loaded = load_model(options.checkpoint)
    prior = load_prior(options.prior) if options.prior else None
    known = known_words(options, loaded.vocabulary.characters)
    for name, beam in (("beam", None), ("greedy", 1)):
        features, words = collect_features(loaded, known, options, beam)
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


def fit_calibration(options: argparse.Namespace) -> None:
    """Fit the confidences on --part of the split, and write --out."""
    out = Path(options.out)
    prepare_output_file(out, "--out", what="a calibration", suffixes=(".json",), may_replace=is_calibration)
    prior = load_prior(options.prior) if options.prior else None
    loaded = load_model(options.checkpoint)
    known = known_words(options, loaded.vocabulary.characters)
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


def record_quality(
    options: argparse.Namespace, part: str, search: str, right: np.ndarray, disorder: int, quality: Iterable[float]
) -> None:
    """Append the row of a search and a part of the split with --record; quality is as from quality_of."""
    ece, auc, *perfect = (f"{value:.4f}" for value in quality)
    cells = (len(right), int(right.sum()), "", "", ece, auc, disorder, *perfect)
    record(options, "confidence", f"{options.split}, {part}", search, cells)


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
    results = model.decode_dataset(data, model.search_setup(model.settings(beam=beam)), words=True)
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


class Collector:
    """Takes the place of a LogisticRegression: collects the features of all words, and returns their indices."""

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


def known_words(options: argparse.Namespace, characters: str) -> frozenset[str]:
    """Return the words of --text, and those that occur at least MIN_OCCURRENCES times in a text of --large-text.

    characters: of the checkpoint; the texts are mapped onto them, as its transcripts are.
    """
    words = set()
    for sources, least in ((options.text, 1), (options.large_text, MIN_OCCURRENCES)):
        for source in sources:
            texts = (map_text(text, characters) or "" for text in read_texts(Path(source)))
            counts = Counter(word for text in texts for word in text.split())
            words |= {word for word, count in counts.items() if count >= least}
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
