"""Compare language models: bits per character on the transcripts of a split, and the CER with each weight.

    python -m benchmarks.language_models --checkpoint RUN --data ROOT --lm FILE [FILE ...] --ngram-weight 0.2 0.3
        [--by source] [--record]

The other settings of the search are the checkpoint's. A weight of 0 is a search without a language model.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.rows import RESULTS, append_rows, context
from benchmarks.splits import add_split_options, parts, scored_split
from las_fast.checkpoint import Loaded, load_model
from las_fast.cli import run
from las_fast.config import DecodingConfig, check_decoding
from las_fast.data.dataset import SpeechDataset
from las_fast.data.layouts import open_corpus
from las_fast.ops import NgramModel, ngram_scores, ngram_start
from las_fast.output.metrics import score
from las_fast.search.grid import decode_grid
from las_fast.search.ngram import find_lm, load_lm, load_ngram_model
from las_fast.text import EOS, Vocabulary

FILE = RESULTS / "language_models.csv"
COLUMNS = ("date", "commit", "checkpoint", "data", "split", "lm", "order", "ngrams", "file_mb", "memory_mb", "bits",
           "ngram_weight", "part", "utterances", "cer")  # fmt: skip


def bits_per_character(model: NgramModel, texts: Sequence[str], vocabulary: Vocabulary) -> float:
    """Return the mean negative log2-probability of a character, <eos> counted as one."""
    tokens = [torch.tensor([*vocabulary.encode(text), EOS]) for text in texts]
    lengths = torch.tensor([len(x) for x in tokens])
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=EOS)
    scores, total = ngram_start(model, len(texts), 1), 0.0
    first_beam = torch.zeros(len(texts), 1, dtype=torch.int64)
    for i in range(padded.shape[1]):
        taken = padded[:, i : i + 1]
        log_probs = scores.log_probs.gather(2, taken[..., None])[:, 0, 0].double()
        total += float(log_probs[i < lengths].sum())
        scores = ngram_scores(model, scores.states, parents=first_beam, tokens=taken)
    return -total / int(lengths.sum()) / math.log(2)


def measure(
    loaded: Loaded, dataset: SpeechDataset, lm: str, settings: list[DecodingConfig], groups: dict[str, list[int]]
) -> Iterator[tuple]:
    """Yield a row per weight and part: the columns of COLUMNS from lm on."""
    path = find_lm(lm, loaded.path)
    assert path is not None
    heaviest = max(settings, key=lambda decoding: decoding.ngram_weight)
    model = load_ngram_model(lm, replace(heaviest, ngram_weight=heaviest.ngram_weight or 1.0), loaded, "cpu")
    assert model is not None
    stored = load_lm(path)
    memory = 4e-6 * (model.rows.numel() + model.arcs.numel())
    # a difference of two models has no probabilities
    bits = "" if stored.subtracted else round(bits_per_character(model, dataset.texts, loaded.vocabulary), 3)
    sizes = (round(path.stat().st_size / 1e6, 2), round(memory, 1), bits)
    described = (path.name.removesuffix(".lm.safetensors"), stored.order, stored.ngrams, *sizes)
    for decoding, texts in zip(settings, decode_grid(loaded, dataset, settings, model, "cpu"), strict=True):
        for part, members in groups.items():
            scores = score([dataset.texts[i] for i in members], [texts[i] for i in members])
            yield *described, decoding.ngram_weight, part, len(members), round(scores.cer, 2)


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language_models", description=__doc__.split("\n")[0])
    add_split_options(parser, FILE, on_bad=True)
    parser.add_argument("--lm", nargs="+", required=True, help="language models: files or released names")
    parser.add_argument("--ngram-weight", nargs="+", type=float, required=True, help="weights in the search")
    parser.add_argument("--by", default="", help="manifest column to divide the split by")
    options = parser.parse_args(argv)
    loaded = load_model(options.checkpoint)
    settings = [replace(loaded.config.decoding, ngram_weight=weight) for weight in options.ngram_weight]
    for decoding in settings:
        check_decoding(loaded.config, decoding)
    for lm in options.lm:
        find_lm(lm, loaded.path)  # ends before the work if there is none
    dataset = scored_split(options, loaded)
    corpus = open_corpus(options.data)
    groups = parts(dataset.ids, corpus.root, corpus.choose(options.split), options.by)
    labels = (*context()[:2], loaded.path.stem, Path(options.data).resolve().name, options.split)
    for lm in options.lm:
        rows = list(measure(loaded, dataset, lm, settings, groups))
        for name, order, ngrams, file_mb, _, bits, weight, part, _, cer in rows:
            size = f"order {order}, {ngrams} n-grams, {file_mb} MB{f', {bits} bits' if bits else ''}"
            print(f"{name} ({size}), {weight:g}, {part}: CER {cer}%")
        if options.record:
            append_rows(FILE, COLUMNS, [(*labels, *row) for row in rows])


if __name__ == "__main__":
    run(main)
