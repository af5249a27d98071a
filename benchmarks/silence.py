"""Measure how silence around each utterance of a split changes a checkpoint's CER.

    python -m benchmarks.silence --checkpoint RUN|NAME --data MANIFEST [--split dev] [--untrimmed] [--record]

Every recording is decoded as it is, and with zeros or white noise before and after it (PADDING). Each is decoded
greedily and with the checkpoint's own settings.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from benchmarks.rows import CONTEXT, RESULTS, append_rows, context
from benchmarks.splits import add_every_option, add_split_options, utterances_of
from las_fast.checkpoint import Loaded, load_model
from las_fast.cli import run
from las_fast.config import DecodingConfig
from las_fast.data.audio import load_utterance
from las_fast.data.corpus import Utterance
from las_fast.data.features import speech_features
from las_fast.output.metrics import score
from las_fast.progress import track
from las_fast.search.dataset import Utterances, decode_dataset
from las_fast.search.ngram import load_ngram_model

FILE = RESULTS / "silence.csv"
COLUMNS = (*CONTEXT, "checkpoint", "split", "part", "seconds", "db", "trimmed", "way", "utterances", "cer")
# (seconds before and after, dBFS of white noise or None for digital zeros)
PADDING = ((0, None), (0.5, None), (1, None), (4, None), (1, -74), (4, -74), (1, -54), (4, -54))


def pad(samples: np.ndarray, rate: int, seconds: float, db: float | None, seed: int) -> np.ndarray:
    """Return samples (N,) float32 with `seconds` of zeros, or of white noise at `db` dBFS, before and after."""
    count = int(seconds * rate)
    level = 0.0 if db is None else 10 ** (db / 20)
    silence = (level * np.random.default_rng(seed).standard_normal((2, count))).astype(np.float32)
    return np.concatenate([silence[0], samples, silence[1]])


def padded_frames(
    loaded: Loaded, utterances: list[Utterance], seconds: float, db: float | None
) -> Iterator[tuple[torch.Tensor, float]]:
    """Yield the raw frames (T, F) and the duration in seconds of each utterance with silence around it."""
    config = loaded.config.features
    for seed, utterance in enumerate(track(utterances, f"{seconds} s of {db} dB", "utterances")):
        samples = pad(load_utterance(utterance, config.sample_rate), config.sample_rate, seconds, db, seed)
        ((frames, _),) = speech_features([samples], config)
        yield frames, len(samples) / config.sample_rate


def decode(loaded: Loaded, data: Utterances, decoding: DecodingConfig) -> list[str]:
    """Return the best text of each utterance."""
    ngram = load_ngram_model(None, decoding, loaded, "cpu")
    hypotheses = decode_dataset(loaded.model, data, loaded.vocabulary, decoding, ngram=ngram, device="cpu")
    return [loaded.vocabulary.decode(best.text_tokens) for best, *_ in hypotheses]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.silence", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_split_options(parser, FILE)
    add_every_option(parser)
    parser.add_argument("--untrimmed", action="store_true", help="turn features.trim_silence off")
    options = parser.parse_args(argv)
    loaded = load_model(options.checkpoint)
    utterances = utterances_of(options.data, options.split, options.every)
    features = replace(loaded.config.features, trim_silence=not options.untrimmed)
    loaded = loaded._replace(config=replace(loaded.config, features=features))
    for seconds, db in PADDING:
        with torch.inference_mode():
            measure(loaded, utterances, options, seconds, db)


def source(utterance: Utterance) -> str:
    """Return the name of the recording's grandparent folder, often the corpus."""
    return utterance.path.parent.parent.name


def measure(
    loaded: Loaded, utterances: list[Utterance], options: argparse.Namespace, seconds: float, db: float | None
) -> None:
    """Print the CER of each source with one kind of silence, and append it to FILE if --record is given."""
    frames, durations = zip(*padded_frames(loaded, utterances, seconds, db), strict=True)
    config = loaded.config.features
    data = Utterances(list(frames), [u.id for u in utterances], durations, config, loaded.statistics)
    sources = sorted(set(map(source, utterances)))
    own = loaded.config.decoding
    for way, decoding in (("greedy", own.greedy()), ("own settings", own)):
        texts = decode(loaded, data, decoding)
        for part in ("all", *sources):
            members = [i for i, u in enumerate(utterances) if part in ("all", source(u))]
            cer = score([utterances[i].transcript for i in members], [texts[i] for i in members]).cer
            silence = (seconds, "zeros" if db is None else db, "no" if options.untrimmed else "yes")
            print(f"{seconds} s of {silence[1]}, trimmed: {silence[2]}, {way}, {part}: CER {cer:.2f}%")
            row = (options.checkpoint, options.split, part, *silence, way, len(members), f"{cer:.2f}")
            if options.record:
                append_rows(FILE, COLUMNS, [(*context(), *row)])


if __name__ == "__main__":
    run(main)
