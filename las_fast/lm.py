"""python -m las_fast.lm: a character n-gram model from text, for --lm of decode, transcribe and tune.

Texts are plain files with one sentence per line (.gz too), LibriSpeech's *.trans.txt, Kaldi's text, anything that
--data of the other commands takes (the transcripts of a split), or folders of transcripts as .npy. A model file
contains counts. On loading, they become the dense table of log-probabilities that the search reads.

The model is interpolated modified Kneser-Ney (Chen and Goodman 1999, "An empirical study of smoothing techniques for
language modeling", section 3). With h' the context h without its oldest token, w the next token:

    p(w | h) = max(c(h w) - D(c(h w)), 0) / c(h .) + share(h) p(w | h')      share(h) = sum over w of D(c(h w)) / c(h .)
    p(w | h) = p(w | h')  if h never occurs;    the p of order 0 is uniform over <eos> and the characters
    D(1) = 1 - 2 Y n2 / n1,  D(2) = 2 - 3 Y n3 / n2,  D(3 and more) = 3 - 4 Y n4 / n3,  Y = n1 / (n1 + 2 n2)

At the highest order, c counts occurrences in the text; at lower orders, the distinct tokens before the n-gram. n_i is
the number of n-grams of an order with count i. A sentence begins with order-1 times <sos> and ends with <eos>.
"""

from __future__ import annotations

import argparse
import itertools
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from las_fast.cli import run
from las_fast.errors import InputError
from las_fast.files import prepare_output_file
from las_fast.options import Parser, as_file, as_path
from las_fast.progress import track
from las_fast.search.ngram import (
    DEFAULT_ORDER,
    SENTENCES_PER_PASS,
    Counts,
    LanguageModel,
    check_order,
    count_ngrams,
    is_lm,
    merge_counts,
    perplexity,
    save_lm,
)
from las_fast.text import CHARACTERS, Vocabulary, has_lost_digits, normalise_text

HELD_OUT_ONE_IN = 20  # one sentence in 20 is held out to measure the perplexity


# ------------------------------------------------------------------------------------------------------------- counting


def train(sentences: Iterable[str], *, order: int = DEFAULT_ORDER, characters: str = CHARACTERS) -> LanguageModel:
    """Train a model on sentences that contain only these characters; without sentences it is uniform.

    Raises InputError for an order that is out of range or too large for this machine.
    """
    check_order(order, len(Vocabulary(characters)))
    texts = list(sentences)
    return LanguageModel(order, characters, *count_ngrams(texts, characters, order), sentences=len(texts))


# ---------------------------------------------------------------------------------------------------------------- texts


def read_texts(source: Path, split: str = "") -> Iterator[str]:
    """Yield the unmodified sentences of a file or folder; the module docstring lists the layouts.

    split: of an archive, a LibriSpeech folder or a manifest; empty: all of its training splits.
    """
    from las_fast.data import folders, hw4p2, kaldi, librispeech, plain_text, tables

    if source.is_dir() and (arrays := folders.list_files(source, {".npy"})):
        yield from map(hw4p2.read_transcript, arrays)
    elif kaldi.is_text(source):
        yield from (text for _, _, text in kaldi.read_table(source))
    elif source.is_dir() or source.suffix.lower() in tables.SUFFIXES:
        yield from _read_corpus(source, split)
    elif source.name.lower().endswith(".trans.txt"):
        yield from (text for _, text in librispeech.read_transcripts(source))
    else:
        plain_text.check_signature(source)
        yield from plain_text.sentences(source, folders.read_lines(source))


def _read_corpus(root: Path, split: str) -> Iterator[str]:
    from las_fast.data.hw4p2 import read_transcript
    from las_fast.data.layouts import open_corpus

    corpus = open_corpus(root)
    for name in corpus.resolve(split or "train"):
        for utterance in corpus.utterances(name):
            text = utterance.transcript
            if text is not None:
                yield read_transcript(text) if isinstance(text, Path) else text


class Sentences:
    """The sentences of several sources, mapped onto the characters; counts those kept and those left out, and why."""

    def __init__(self, sources: list[Path], characters: str, split: str):
        self.sources, self.characters, self.split = sources, characters, split
        self.kept = self.letters = self.with_digits = self.unmapped = 0

    def __iter__(self) -> Iterator[str]:
        allowed = set(self.characters)
        texts = itertools.chain.from_iterable(read_texts(source, self.split) for source in self.sources)
        for text in track(texts, "counting", "sentences"):
            text = text.strip()
            if not text:
                continue
            if has_lost_digits(text, self.characters):  # their spoken form is unknown
                self.with_digits += 1
                continue
            if not allowed.issuperset(text):
                text = normalise_text(text, self.characters)
            if not text:
                self.unmapped += 1
                continue
            self.kept, self.letters = self.kept + 1, self.letters + len(text)
            yield text

    def check_kept(self) -> None:
        """Raise InputError if no sentence was kept."""
        if self.kept:
            return
        sources, digits, unmapped = ", ".join(map(str, self.sources)), self.with_digits, self.unmapped
        if not digits + unmapped:
            raise InputError(f"there is no sentence in {sources}; give text with one sentence per line")
        if not unmapped:
            raise InputError(f"all {digits} sentences of {sources} contain digits; write them as words")
        also = f"{digits} contain digits, which must be written as words, and " if digits else ""
        raise InputError(
            f"no sentence of {sources} can be used: {also}{unmapped} have none of the characters {self.characters!r}; "
            "give other text, or --characters"
        )


def count_held_out(sentences: Iterable[str], characters: str, order: int) -> tuple[Counts, Counts]:
    """Count the n-grams of the training sentences and of the held-out sentences.

    A hash of the text decides which are held out, so the choice is reproducible and the same for repeated sentences.
    """
    kept: Counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    held_out = kept
    sentences = iter(sentences)
    while batch := list(itertools.islice(sentences, SENTENCES_PER_PASS)):
        held = [zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0 for text in batch]
        kept_texts, held_texts = (list(itertools.compress(batch, (h == part for h in held))) for part in (False, True))
        kept = merge_counts(kept, count_ngrams(kept_texts, characters, order))
        held_out = merge_counts(held_out, count_ngrams(held_texts, characters, order))
    return kept, held_out


# -------------------------------------------------------------------------------------------------------------- command


def parser() -> Parser:
    parser = Parser(
        prog="python -m las_fast.lm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+", type=as_path, metavar="TEXT", help="files or folders of text, see above")
    parser.add_argument("--out", required=True, type=as_file, metavar="LM.safetensors", help="model file to write")
    parser.add_argument(
        "--order", type=int, default=DEFAULT_ORDER, help=f"length of the n-grams (default: {DEFAULT_ORDER})"
    )
    parser.add_argument("--characters", default=CHARACTERS, help="characters of the checkpoint (default: A-Z ' space)")
    parser.add_argument("--split", default="", help="split of each corpus (default: all of its training splits)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    options = parser().parse_args(argv)
    V = len(Vocabulary(options.characters))
    check_order(options.order, V)
    kind: dict[str, Any] = {"what": "a language model", "suffixes": (".safetensors",), "may_replace": is_lm}
    prepare_output_file(options.out, "--out", inputs=options.texts, **kind)
    sentences = Sentences(options.texts, options.characters, options.split)
    kept, held_out = count_held_out(sentences, options.characters, options.order)
    sentences.check_kept()
    lines = [("text", f"{sentences.kept} sentences, {sentences.letters} characters")]
    if sentences.with_digits:
        lines.append(("left out", f"{sentences.with_digits} sentences with digits; write them as words"))
    if len(kept[0]) and len(held_out[0]):
        value = perplexity(LanguageModel(options.order, options.characters, *kept).ngram_table(), held_out)
        without = f"1 sentence in {HELD_OUT_ONE_IN}, for a model trained without them"
        lines.append(("perplexity", f"{value:.3f} per character on {without}"))
    counts = merge_counts(kept, held_out)
    model = LanguageModel(options.order, options.characters, *counts, sentences=sentences.kept)
    save_lm(options.out, model)
    size = 4 * V**options.order / 1e6
    lines += [
        ("order", f"{options.order}: {len(model.ngrams)} n-grams, a table of {size:.1f} MB when decoding"),
        ("written", f"{options.out} ({options.out.stat().st_size / 1e6:.2f} MB)"),
    ]
    print("\n".join(f"{name:<12}{value}" for name, value in lines))


if __name__ == "__main__":
    run(main)
