"""python -m las_fast.lm: a character n-gram model from text, for --lm of decode, transcribe and tune.

Texts are plain files with a sentence a line (.gz too), LibriSpeech's *.trans.txt, Kaldi's text, whatever --data of the
other commands takes (the transcripts of a split), or folders of transcripts as .npy. A file holds counts; the dense
table of log-probabilities that the search looks up is made of them when it is read.

The model is interpolated modified Kneser-Ney (Chen and Goodman 1999, "An empirical study of smoothing techniques for
language modeling", section 3). With h' the context h without its oldest token, w the next token:

    p(w | h) = max(c(h w) - D(c(h w)), 0) / c(h .) + share(h) p(w | h')      share(h) = sum over w of D(c(h w)) / c(h .)
    p(w | h) = p(w | h')  where h was never seen;    the last p is uniform over <eos> and the characters
    D(1) = 1 - 2 Y n2 / n1,  D(2) = 2 - 3 Y n3 / n2,  D(3 and more) = 3 - 4 Y n4 / n3,  Y = n1 / (n1 + 2 n2)

c counts in the text at the highest order, and below it the distinct tokens that come before; n_i is how many n-grams
of an order have the count i. Before a sentence comes <sos> order-1 times, after it <eos>.
"""

from __future__ import annotations

import argparse
import itertools
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from las_fast.cli import run
from las_fast.errors import InputError
from las_fast.files import prepare_output_file
from las_fast.options import Parser, as_file, as_path
from las_fast.progress import track
from las_fast.search.ngram import (
    ORDER,
    SENTENCES,
    Counts,
    LanguageModel,
    check_order,
    count,
    is_lm,
    merge,
    perplexity,
    save_lm,
)
from las_fast.text import CHARACTERS, Vocabulary, has_lost_digits, normalise_text

if TYPE_CHECKING:  # these import torch, which --help need not wait for
    pass

HELD_OUT = 20  # one sentence in as many measures the perplexity


# ------------------------------------------------------------------------------------------------------------- counting


def train(sentences: Iterable[str], *, order: int = ORDER, characters: str = CHARACTERS) -> LanguageModel:
    """Return the model of sentences that hold only these characters; an empty text gives a uniform one."""
    check_order(order, len(Vocabulary(characters)))
    texts = list(sentences)
    return LanguageModel(order, characters, *count(texts, characters, order), sentences=len(texts))


# ---------------------------------------------------------------------------------------------------------------- texts


def read_texts(source: Path, split: str = "") -> Iterator[str]:
    """Yield the sentences of a source as they are written there; see the module.

    split: of an archive, a LibriSpeech folder or a manifest; empty: every training split it has.
    """
    from las_fast.data import folders, hw4p2, kaldi, librispeech, manifest, plain_text

    if source.is_dir() and (arrays := folders.files(source, {".npy"})):
        yield from map(hw4p2.read_transcript, arrays)
    elif kaldi.is_text(source):
        yield from (text for _, _, text in kaldi.read_table(source))
    elif source.is_dir() or source.suffix.lower() in manifest.SUFFIXES:
        yield from _read_corpus(source, split)
    elif source.name.lower().endswith(".trans.txt"):
        yield from (text for _, text in librispeech.read_transcripts(source))
    else:
        plain_text.check_beginning(source)
        yield from plain_text.sentences(source, folders.read_lines(source))


def _read_corpus(root: Path, split: str) -> Iterator[str]:
    from las_fast.data.dataset import open_corpus
    from las_fast.data.hw4p2 import read_transcript

    corpus = open_corpus(root)
    for name in corpus.resolve(split or "train"):
        for utterance in corpus.utterances(name):
            text = utterance.transcript
            if text is not None:
                yield read_transcript(text) if isinstance(text, Path) else text


class Sentences:
    """The sentences of several sources on the characters; counts what came and what was left out for its digits."""

    def __init__(self, sources: list[Path], characters: str, split: str):
        self.sources, self.characters, self.split = sources, characters, split
        self.kept = self.letters = self.with_digits = 0

    def __iter__(self) -> Iterator[str]:
        allowed = set(self.characters)
        texts = itertools.chain.from_iterable(read_texts(source, self.split) for source in self.sources)
        for text in track(texts, "counting", "sentences"):
            text = text.strip()
            if has_lost_digits(text, self.characters):  # how they are read aloud is not known
                self.with_digits += 1
                continue
            if not allowed.issuperset(text):
                text = normalise_text(text, self.characters)
            if text:
                self.kept, self.letters = self.kept + 1, self.letters + len(text)
                yield text


def count_apart(sentences: Iterable[str], characters: str, order: int) -> tuple[Counts, Counts]:
    """Return the n-grams of most sentences, and of those held out: always the same, and each repetition with them."""
    kept: Counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    apart = kept
    sentences = iter(sentences)
    while some := list(itertools.islice(sentences, SENTENCES)):
        held = [zlib.crc32(text.encode()) % HELD_OUT == 0 for text in some]
        most, few = (list(itertools.compress(some, (h == part for h in held))) for part in (False, True))
        kept = merge(kept, count(most, characters, order))
        apart = merge(apart, count(few, characters, order))
    return kept, apart


# ---------------------------------------------------------------------------------------------------------------- files


# ------------------------------------------------------------------------------------------------------- for decoding


# -------------------------------------------------------------------------------------------------------------- command


def parser() -> Parser:
    own = Parser(
        prog="python -m las_fast.lm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own.add_argument("texts", nargs="+", type=as_path, metavar="TEXT", help="files or folders with text, see above")
    own.add_argument("--out", required=True, type=as_file, metavar="LM.safetensors", help="the model")
    own.add_argument("--order", type=int, default=ORDER, help=f"of the n-grams (default: {ORDER})")
    own.add_argument("--characters", default=CHARACTERS, help="those of the checkpoint (default: A-Z ' space)")
    own.add_argument("--split", default="", help="of archives, folders and manifests (default: all for training)")
    return own


def main(argv: list[str] | None = None) -> None:
    """Train; see --help."""
    options = parser().parse_args(argv)
    V = len(Vocabulary(options.characters))
    check_order(options.order, V)
    kind: dict[str, Any] = {"what": "a language model", "suffixes": (".safetensors",), "may_replace": is_lm}
    prepare_output_file(options.out, "--out", inputs=options.texts, **kind)
    sentences = Sentences(options.texts, options.characters, options.split)
    most, held = count_apart(sentences, options.characters, options.order)
    if not sentences.kept:
        raise InputError(f"there is no sentence in {', '.join(map(str, options.texts))}; give text, a sentence a line")
    lines = [("text", f"{sentences.kept} sentences, {sentences.letters} characters")]
    if sentences.with_digits:
        lines.append(("left out", f"{sentences.with_digits} sentences with digits; write them as words"))
    if len(most[0]) and len(held[0]):
        found = perplexity(LanguageModel(options.order, options.characters, *most).table(), held)
        lines.append(("perplexity", f"{found:.3f} a character on one sentence in {HELD_OUT}, by a model of the others"))
    model = LanguageModel(options.order, options.characters, *merge(most, held), sentences=sentences.kept)
    save_lm(options.out, model)
    size = 4 * V**options.order / 1e6
    lines += [
        ("order", f"{options.order}: {len(model.ngrams)} n-grams, a table of {size:.1f} MB when decoding"),
        ("written", f"{options.out} ({options.out.stat().st_size / 1e6:.2f} MB)"),
    ]
    print("\n".join(f"{name:<12}{value}" for name, value in lines))


if __name__ == "__main__":
    run(main)
