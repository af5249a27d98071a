"""The errors of the starts of words."""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np
import torch

from benchmarks.splits import utterances_of
from benchmarks.words.alignment import count_disorder, right_words
from benchmarks.words.record import record
from benchmarks.words.recordings import make_recordings
from las_fast.checkpoint import load_model
from las_fast.recogniser import Recogniser


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
