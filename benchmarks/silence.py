"""What silence around each utterance of a split does to a checkpoint's scores.

    python -m benchmarks.silence --checkpoint RUN|NAME --data MANIFEST [--split dev] [--untrimmed] [--record]

Every recording is decoded as it is, and with SECONDS of digital zeros, or of white noise of some dB of full scale,
before and after it, greedily and as the checkpoint's own settings say.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from benchmarks import record
from las_fast.checkpoint import Loaded, load_model
from las_fast.cli import run
from las_fast.config import DecodingConfig
from las_fast.data.audio import load_audio
from las_fast.data.corpus import Utterance
from las_fast.data.dataset import normalise, open_corpus
from las_fast.data.features import add_deltas, speech_features
from las_fast.output.metrics import score
from las_fast.progress import track
from las_fast.recogniser import Utterances
from las_fast.search.dataset import decode_dataset
from las_fast.search.ngram import language_table

FILE = record.RESULTS / "silence.csv"
COLUMNS = (*record.WHERE, "checkpoint", "split", "part", "seconds", "db", "trimmed", "way", "utterances", "cer")
AROUND = ((0, None), (0.5, None), (1, None), (4, None), (1, -74), (4, -74), (1, -54), (4, -54))  # seconds, dB or zeros


def surrounded(samples: np.ndarray, rate: int, seconds: float, db: float | None, seed: int) -> np.ndarray:
    """Return samples (N,) float32 with silence before and after: zeros, or white noise of db of full scale."""
    count = int(seconds * rate)
    level = 0.0 if db is None else 10 ** (db / 20)
    silence = (level * np.random.default_rng(seed).standard_normal((2, count))).astype(np.float32)
    return np.concatenate([silence[0], samples, silence[1]])


def hear(
    loaded: Loaded, utterances: list[Utterance], seconds: float, db: float | None
) -> Iterator[tuple[torch.Tensor, float]]:
    """Yield the features and the seconds of each utterance with silence around it, as decoding makes them."""
    config = loaded.config.features
    for seed, utterance in enumerate(track(utterances, f"{seconds} s of {db} dB", "utterances")):
        samples = surrounded(load_audio(utterance.path, config.sample_rate), config.sample_rate, seconds, db, seed)
        ((frames, _),) = speech_features([samples], config)
        features = add_deltas(normalise(frames, config, loaded.statistics), config.deltas)
        yield features, len(samples) / config.sample_rate


def decode(loaded: Loaded, data: Utterances, decoding: DecodingConfig) -> list[str]:
    ngram = language_table(None, decoding, loaded, "cpu")
    found = decode_dataset(loaded.model, data, loaded.vocabulary, decoding, ngram=ngram, device="cpu")
    return [loaded.vocabulary.decode(best.text_tokens) for best, *_ in found]


def ways(own: DecodingConfig) -> dict[str, DecodingConfig]:
    return {"greedy": replace(own, beam=1, ctc_weight=0.0, ngram_weight=0.0, length_reward=0.0), "own settings": own}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.silence", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--every", type=int, default=1, help="take one utterance in so many (default: all)")
    parser.add_argument("--untrimmed", action="store_true", help="with features.trim_silence off")
    parser.add_argument("--record", action="store_true", help="append the rows to benchmarks/results/silence.csv")
    options = parser.parse_args(argv)
    loaded = load_model(options.checkpoint)
    corpus = open_corpus(options.data)
    utterances = [u for name in corpus.resolve(options.split) for u in corpus.utterances(name)][:: options.every]
    features = replace(loaded.config.features, trim_silence=not options.untrimmed)
    loaded = loaded._replace(config=replace(loaded.config, features=features))
    for seconds, db in AROUND:
        with torch.inference_mode():
            measure(loaded, utterances, options, seconds, db)


def measure(loaded: Loaded, utterances: list[Utterance], options, seconds: float, db: float | None) -> None:
    """Print and record the rows of one kind of silence."""
    features, lengths = zip(*hear(loaded, utterances, seconds, db), strict=True)
    data = Utterances(list(features), [u.id for u in utterances], lengths)
    sources = sorted({u.path.parts[-3] for u in utterances})
    for way, decoding in ways(loaded.config.decoding).items():
        texts = decode(loaded, data, decoding)
        for part in ("all", *sources):
            rows = [i for i, u in enumerate(utterances) if part in ("all", u.path.parts[-3])]
            cer = score([utterances[i].transcript for i in rows], [texts[i] for i in rows]).cer
            silence = (seconds, "zeros" if db is None else db, "no" if options.untrimmed else "yes")
            print(f"{seconds} s of {silence[1]}, trimmed: {silence[2]}, {way}, {part}: CER {cer:.2f}%")
            row = (options.checkpoint, options.split, part, *silence, way, len(rows), f"{cer:.2f}")
            if options.record:
                record.append(FILE, COLUMNS, [(*record.where(), *row)])


if __name__ == "__main__":
    run(main)
