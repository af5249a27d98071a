"""Measure how silence around each utterance of a split changes a checkpoint's CER.

    python -m benchmarks.silence --checkpoint RUN|NAME --data MANIFEST [--split dev] [--untrimmed] [--record]

Every recording is decoded unchanged, and with digital zeros or white noise before and after it (PADDING), greedily and
with the checkpoint's own settings.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from benchmarks.rows import CONTEXT, RESULTS, append_rows, context
from las_fast.checkpoint import Loaded, load_model
from las_fast.cli import run
from las_fast.config import DecodingConfig
from las_fast.data.audio import load_audio
from las_fast.data.corpus import Utterance
from las_fast.data.features import add_deltas, speech_features
from las_fast.data.layouts import open_corpus
from las_fast.data.normalisation import normalise
from las_fast.output.metrics import score
from las_fast.progress import track
from las_fast.search.dataset import Utterances, decode_dataset
from las_fast.search.ngram import load_ngram_table

FILE = RESULTS / "silence.csv"
COLUMNS = (*CONTEXT, "checkpoint", "split", "part", "seconds", "db", "trimmed", "way", "utterances", "cer")
# (seconds, dBFS); None: digital zeros
PADDING = ((0, None), (0.5, None), (1, None), (4, None), (1, -74), (4, -74), (1, -54), (4, -54))


def pad(samples: np.ndarray, rate: int, seconds: float, db: float | None, seed: int) -> np.ndarray:
    """Return samples (N,) float32 with `seconds` of silence on either side: zeros, or white noise at `db` dBFS."""
    count = int(seconds * rate)
    level = 0.0 if db is None else 10 ** (db / 20)
    silence = (level * np.random.default_rng(seed).standard_normal((2, count))).astype(np.float32)
    return np.concatenate([silence[0], samples, silence[1]])


def padded_features(
    loaded: Loaded, utterances: list[Utterance], seconds: float, db: float | None
) -> Iterator[tuple[torch.Tensor, float]]:
    """Yield the features (T, F) and the duration in seconds of each utterance with silence around it."""
    config = loaded.config.features
    for seed, utterance in enumerate(track(utterances, f"{seconds} s of {db} dB", "utterances")):
        samples = pad(load_audio(utterance.path, config.sample_rate), config.sample_rate, seconds, db, seed)
        ((frames, _),) = speech_features([samples], config)
        features = add_deltas(normalise(frames, config, loaded.statistics), config.deltas)
        yield features, len(samples) / config.sample_rate


def decode(loaded: Loaded, data: Utterances, decoding: DecodingConfig) -> list[str]:
    """Return the best text of each utterance."""
    ngram_table = load_ngram_table(None, decoding, loaded, "cpu")
    hypotheses = decode_dataset(loaded.model, data, loaded.vocabulary, decoding, ngram=ngram_table, device="cpu")
    return [loaded.vocabulary.decode(best.text_tokens) for best, *_ in hypotheses]


def decodings(settings: DecodingConfig) -> dict[str, DecodingConfig]:
    greedy = replace(settings, beam=1, ctc_weight=0.0, ngram_weight=0.0, length_reward=0.0)
    return {"greedy": greedy, "own settings": settings}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.silence", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint file or released name")
    parser.add_argument("--data", required=True, help="manifest of the recordings")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="use every N-th utterance (default: 1)")
    parser.add_argument("--untrimmed", action="store_true", help="turn features.trim_silence off")
    parser.add_argument("--record", action="store_true", help="append the rows to benchmarks/results/silence.csv")
    options = parser.parse_args(argv)
    loaded = load_model(options.checkpoint)
    corpus = open_corpus(options.data)
    utterances = [u for name in corpus.resolve(options.split) for u in corpus.utterances(name)][:: options.every]
    features = replace(loaded.config.features, trim_silence=not options.untrimmed)
    loaded = loaded._replace(config=replace(loaded.config, features=features))
    for seconds, db in PADDING:
        with torch.inference_mode():
            measure(loaded, utterances, options, seconds, db)


def measure(loaded: Loaded, utterances: list[Utterance], options, seconds: float, db: float | None) -> None:
    """Print the CER with one kind of silence, and append it to FILE if --record is given."""
    features, durations = zip(*padded_features(loaded, utterances, seconds, db), strict=True)
    data = Utterances(list(features), [u.id for u in utterances], durations)
    sources = sorted({u.path.parts[-3] for u in utterances})
    for way, decoding in decodings(loaded.config.decoding).items():
        texts = decode(loaded, data, decoding)
        for part in ("all", *sources):
            members = [i for i, u in enumerate(utterances) if part in ("all", u.path.parts[-3])]
            cer = score([utterances[i].transcript for i in members], [texts[i] for i in members]).cer
            silence = (seconds, "zeros" if db is None else db, "no" if options.untrimmed else "yes")
            print(f"{seconds} s of {silence[1]}, trimmed: {silence[2]}, {way}, {part}: CER {cer:.2f}%")
            row = (options.checkpoint, options.split, part, *silence, way, len(members), f"{cer:.2f}")
            if options.record:
                append_rows(FILE, COLUMNS, [(*context(), *row)])


if __name__ == "__main__":
    run(main)
