"""python -m las_fast.lm: a character n-gram model from text, for --lm of decode, transcribe, serve, tune.

Texts are plain files with one sentence per line (.gz too), LibriSpeech's *.trans.txt, Kaldi's text, anything that
--data of the other commands takes (the transcripts of a split), or folders of transcripts as .npy.

The model is interpolated modified Kneser-Ney (Chen and Goodman 1999, "An empirical study of smoothing techniques for
language modeling", section 3). With h' the context h without its oldest token, w the next token:

    p(w | h) = max(c(h w) - D(c(h w)), 0) / c(h .) + share(h) p(w | h')      share(h) = sum over w of D(c(h w)) / c(h .)
    p(w | h) = p(w | h')  if h never occurs;    the p of order 0 is uniform over <eos> and the characters
    D(1) = 1 - 2 Y n2 / n1,  D(2) = 2 - 3 Y n3 / n2,  D(3 and more) = 3 - 4 Y n4 / n3,  Y = n1 / (n1 + 2 n2)

A sentence begins with <sos> and ends with <eos>. At the highest order, and for n-grams that begin with <sos>, c counts
occurrences in the text; at lower orders, the distinct tokens before the n-gram. n_i is the number of n-grams of an
order with count i.

--prune N leaves out n-grams of 4 and more tokens that occur fewer than N times. Their probability goes to shorter ones.
--weights counts each text several times. --exclude leaves out every sentence that overlaps with a text for tuning
or testing: one that occurs in that text, or shares six consecutive words with one of its sentences.

--subtract names the transcripts that the recogniser was trained on: it has learned their language, so the search should
not count it again. The file then holds log p(w | h) - weight * log q(w | h), with q a model of the transcripts (density
ratio, McDermott et al. 2019). The best decoding.ngram_weight is higher. The perplexity printed is p's.
"""

from __future__ import annotations

import argparse
import itertools
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from las_fast.arguments import as_file, as_path
from las_fast.cli import run
from las_fast.data.overlap import COMMON_WORDS, Excluded
from las_fast.data.texts import map_text, read_excluded, read_texts
from las_fast.errors import InputError
from las_fast.files import prepare_output_file
from las_fast.options import Parser
from las_fast.progress import track
from las_fast.search.density_ratio import subtract
from las_fast.search.kneser_ney import (
    PRUNED_FROM,
    Counts,
    check_order,
    count_ngrams,
    count_weighted,
    encode_sentences,
    estimate,
    merge_counts,
    perplexity,
)
from las_fast.search.ngram import DEFAULT_ORDER, MAX_SUBTRACTED, LanguageModel, is_lm, save_lm
from las_fast.text import CHARACTERS, SOS, Vocabulary

HELD_OUT_ONE_IN = 20  # one sentence in 20 is held out to measure the perplexity
SENTENCES_PER_PASS = 20000  # encoded at once
SUBTRACTED = 0.5  # default weight of the model of --subtract
MAX_WEIGHT = 1_000_000  # so that counts stay far below 64 bits
Tokens = dict[int, list[np.ndarray]]  # encoded sentences by weight


# ------------------------------------------------------------------------------------------------------------- training


def train(
    sentences: Iterable[str], *, order: int = DEFAULT_ORDER, characters: str = CHARACTERS, prune: int = 1
) -> LanguageModel:
    """Train a model on sentences that contain only these characters; without sentences it is uniform.

    Raises InputError for an order that is out of range, or characters that are not in the vocabulary.
    """
    V = len(Vocabulary(characters))
    check_order(order, V)
    texts = list(sentences)
    counts = count_weighted([(encode_sentences(texts, characters), 1)], V, order)
    return LanguageModel(order, characters, estimate(counts, V, prune=prune), sentences=len(texts))


# ---------------------------------------------------------------------------------------------------------------- texts


class Sentences:
    """The sentences of several sources, mapped onto the characters, and the weights of their sources.

    Sentences that contain digits, have none of the characters or overlap with `excluded` are left out, and counted.
    """

    def __init__(self, sources: list[Path], characters: str, split: str | None, weights: list[int] | None = None,
                 excluded: Excluded | None = None):  # fmt: skip
        self.sources, self.characters, self.split = sources, characters, split
        self.weights, self.excluded = weights or [1] * len(sources), excluded
        self.kept = self.letters = self.with_digits = self.unmapped = self.overlapping = 0

    def __iter__(self) -> Iterator[tuple[str, int]]:
        pairs = zip(self.sources, self.weights, strict=True)
        texts = ((text, weight) for source, weight in pairs for text in read_texts(source, self.split))
        for text, weight in track(texts, "counting", "sentences"):
            if not text.strip():
                continue
            mapped = map_text(text, self.characters)
            if mapped is None:
                self.with_digits += 1
            elif not mapped:
                self.unmapped += 1
            elif self.excluded and self.excluded.overlaps(mapped):
                self.overlapping += 1
            else:
                self.kept, self.letters = self.kept + 1, self.letters + len(mapped)
                yield mapped, weight

    def check_kept(self) -> None:
        """Raise InputError if no sentence was kept."""
        if self.kept:
            return
        sources, digits, unmapped = ", ".join(map(str, self.sources)), self.with_digits, self.unmapped
        if not (digits or unmapped or self.overlapping):
            raise InputError(f"there is no sentence in {sources}; give text with one sentence per line")
        if not (unmapped or self.overlapping):
            raise InputError(f"all {digits} sentences of {sources} contain digits; write them as words")
        reasons = [f"{digits} contain digits, which must be written as words"] if digits else []
        reasons += [f"{unmapped} have none of the characters {self.characters!r}"] if unmapped else []
        reasons += [f"{self.overlapping} overlap with the texts of --exclude"] if self.overlapping else []
        advice = "give other text, or --characters" if unmapped else "give other text"
        raise InputError(f"no sentence of {sources} can be used: {', and '.join(reasons)}; {advice}")


def encode_held_out(sentences: Iterable[tuple[str, int]], characters: str) -> tuple[Tokens, Tokens]:
    """Encode the training sentences and the held-out sentences.

    A hash of the text decides which are held out, so the choice is reproducible and the same for repeated sentences.
    """
    kept: Tokens = {}
    held_out: Tokens = {}
    sentences = iter(sentences)
    while batch := list(itertools.islice(sentences, SENTENCES_PER_PASS)):
        groups: dict[tuple[bool, int], list[str]] = {}
        for text, weight in batch:
            held = zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0
            groups.setdefault((held, weight), []).append(text)
        for (held, weight), texts in groups.items():
            (held_out if held else kept).setdefault(weight, []).append(encode_sentences(texts, characters))
    return kept, held_out


def count(tokens: Tokens, V: int, order: int) -> list[Counts]:
    """Count the n-grams of orders 1 to `order`."""
    return count_weighted(((np.concatenate(parts), weight) for weight, parts in tokens.items()), V, order)


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
    parser.add_argument(
        "--prune", type=int, default=1, metavar="N",
        help="leave out n-grams of 4 and more tokens that occur fewer than N times (default: 1, none)",
    )  # fmt: skip
    parser.add_argument("--weights", type=int, nargs="+", metavar="W", help="times to count each TEXT (default: 1)")
    parser.add_argument(
        "--exclude", type=as_path, nargs="+", default=[], metavar="TEXT",
        help=f"leave out sentences of these texts, and those with {COMMON_WORDS} words in a row in common with them",
    )  # fmt: skip
    parser.add_argument(
        "--exclude-split", help="split of each corpus of --exclude (default: the one that its path names, or dev)"
    )
    parser.add_argument(
        "--subtract", type=as_path, nargs="+", default=[], metavar="TEXT",
        help="subtract a model of these texts: the transcripts that the recogniser was trained on",
    )  # fmt: skip
    parser.add_argument(
        "--subtract-weight", type=float, metavar="W", help=f"weight of the subtracted model (default: {SUBTRACTED})"
    )
    parser.add_argument("--characters", default=CHARACTERS, help="characters of the checkpoint (default: A-Z ' space)")
    parser.add_argument(
        "--split", help="split of each corpus (default: the one that its path names, or all of its training splits)"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    options = parser().parse_args(argv)
    V = len(Vocabulary(options.characters))
    check_options(options, V)
    excluded = read_excluded(options.exclude, options.exclude_split, options.characters)
    transcripts = encode_transcripts(options, excluded)
    sentences = Sentences(options.texts, options.characters, options.split, options.weights, excluded)
    kept, held_out = encode_held_out(sentences, options.characters)
    sentences.check_kept()
    counts = count(kept, V, options.order)
    lines = describe_text(sentences)
    if kept and held_out:
        tokens = np.concatenate([part for parts in held_out.values() for part in parts])
        value = perplexity(estimate(counts, V, prune=options.prune), tokens, V)
        without = f"1 sentence in {HELD_OUT_ONE_IN}, for a model trained without them"
        lines.append(("perplexity", f"{value:.3f} per character on {without}"))
    counts = list(itertools.starmap(merge_counts, zip(counts, count(held_out, V, options.order), strict=True)))
    model = LanguageModel(options.order, options.characters, estimate(counts, V, prune=options.prune), sentences.kept)
    if transcripts is not None:
        model, described = subtract_transcripts(model, transcripts, options.subtract_weight)
        lines.append(("subtracted", described))
    save_lm(options.out, model)
    size = options.out.stat().st_size / 1e6
    lines += [("order", describe_order(model)), ("written", f"{options.out} ({size:.2f} MB)")]
    print("\n".join(f"{name:<12}{value}" for name, value in lines))


def encode_transcripts(options: argparse.Namespace, excluded: Excluded | None) -> np.ndarray | None:
    """Return the encoded sentences of --subtract; None if there are none."""
    if not options.subtract:
        return None
    sentences = Sentences(options.subtract, options.characters, options.split, excluded=excluded)
    tokens = encode_sentences([text for text, _ in sentences], options.characters)
    sentences.check_kept()
    return tokens


def subtract_transcripts(model: LanguageModel, tokens: np.ndarray, weight: float) -> tuple[LanguageModel, str]:
    """Subtract a model of encoded transcripts; return the scores, and a description of what was subtracted."""
    V, order = len(Vocabulary(model.characters)), min(DEFAULT_ORDER, model.order)
    levels = subtract(model.levels, estimate(count_ngrams(tokens, V, order), V), weight, V)
    described = f"{weight:g} times a model of order {order} of {np.count_nonzero(tokens == SOS)} sentences"
    return replace(model, levels=levels, subtracted=weight), described


def check_options(options: argparse.Namespace, V: int) -> None:
    """Raise InputError for options that are out of range or contradict each other; prepare the output file."""
    check_order(options.order, V)
    if options.prune < 1:
        raise InputError(f"--prune must be at least 1; got {options.prune}")
    if options.prune > 1 and options.order < PRUNED_FROM:
        raise InputError(
            f"--prune {options.prune} has no effect on a model of order {options.order}: only n-grams of {PRUNED_FROM} "
            "and more characters are left out; drop it, or give a higher --order"
        )
    if options.weights and len(options.weights) != len(options.texts):
        raise InputError(f"--weights must be one number per TEXT, {len(options.texts)}; got {len(options.weights)}")
    if wrong := [weight for weight in options.weights or [] if not 1 <= weight <= MAX_WEIGHT]:
        advice = "; leave the text out instead" if wrong[0] < 1 else ""
        raise InputError(f"--weights must be from 1 to {MAX_WEIGHT}; got {wrong[0]}{advice}")
    check_subtract_weight(options)
    kind: dict[str, Any] = {"what": "a language model", "suffixes": (".safetensors",), "may_replace": is_lm}
    prepare_output_file(options.out, "--out", inputs=[*options.texts, *options.exclude, *options.subtract], **kind)


def check_subtract_weight(options: argparse.Namespace) -> None:
    """Raise InputError if the weight is out of range, or there is no --subtract; set the default."""
    if options.subtract_weight is None:
        options.subtract_weight = SUBTRACTED
    elif not options.subtract:
        raise InputError("--subtract-weight has no effect without --subtract; give the transcripts, or leave it out")
    if not 0 < options.subtract_weight <= MAX_SUBTRACTED:
        raise InputError(
            f"--subtract-weight must be above 0 and at most {MAX_SUBTRACTED:g}; got {options.subtract_weight:g}"
        )


def describe_text(sentences: Sentences) -> list[tuple[str, str]]:
    """Return the printed lines about the text."""
    lines = [("text", f"{sentences.kept} sentences, {sentences.letters} characters")]
    if sentences.with_digits:
        lines.append(("left out", f"{sentences.with_digits} sentences with digits; write them as words"))
    if sentences.overlapping:
        lines.append(("left out", f"{sentences.overlapping} sentences that overlap with the texts of --exclude"))
    return lines


def describe_order(model: LanguageModel) -> str:
    """Return the printed order, the number of n-grams, and how long they are if none is as long as the order."""
    longest = max(k for k, level in enumerate(model.levels, 1) if len(level.ngrams))
    return f"{model.order}: {model.ngrams} n-grams" + (f" of up to {longest} tokens" if longest < model.order else "")


if __name__ == "__main__":
    run(main)
