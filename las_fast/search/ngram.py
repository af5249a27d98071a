"""A character n-gram model: counting, smoothing, its file, and its table for the beam search."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from las_fast.config import DecodingConfig
from las_fast.errors import InputError
from las_fast.files import safetensors_format, utf8_path
from las_fast.text import EOS, PAD, SOS, Vocabulary

if TYPE_CHECKING:  # these import torch, which --help need not wait for
    import torch

    from las_fast.checkpoint import Loaded

FORMAT = "las_fast lm 1"
SMOOTHING = "interpolated modified Kneser-Ney"
ORDER = 5  # perplexity on held-out English: 6.7 of order 3, 4.9, 4.1, and 3.8 of order 6, whose table is 3.5 GB
MOST = 12  # order whose n-grams of 31 tokens are int64
WEIGHT = 0.1  # decoding.ngram_weight where --lm is given and the settings have none; the best of a few on AN4's dev
NEVER = -1e4  # log-probability of <pad> and <sos>: its exponential is 0, and times a weight of 0 it is no NaN
USUAL = (0.5, 1.0, 1.5)  # discounts where a text is too small, or an order too dense, for the formulas
SENTENCES = 20000  # counted at once
Counts = tuple[np.ndarray, np.ndarray]  # (N,) int64 n-grams as digits to the base V, ascending; (N,) int64 counts


@dataclass(frozen=True)
class LanguageModel:
    """Counts of the n-grams of a text; an n-gram is a number to the base V, its newest token the last digit."""

    order: int
    characters: str
    ngrams: np.ndarray  # (N,) int64, ascending
    counts: np.ndarray  # (N,) int64, at least 1
    sentences: int = 0

    def table(self) -> np.ndarray:
        """Return (V ** (order-1), V) float32 log-probabilities, as las_fast.ops.Ngram takes them; NEVER for 0."""
        V = len(Vocabulary(self.characters))
        check_order(self.order, V)
        p = np.full((1, V), 1 / (V - 2), np.float32)
        p[0, [PAD, SOS]] = 0.0
        for k in range(1, self.order + 1):
            p = _interpolate(p if k == 1 else np.tile(p, (V, 1)), *self._seen(k, V))
        np.log(p, out=p, where=p > 0)
        p[:, [PAD, SOS]] = NEVER
        return p

    def _seen(self, k: int, V: int) -> Counts:
        """Return the k-grams and their counts; below the highest order, of the distinct tokens that come before."""
        if k == self.order:
            return self.ngrams, self.counts
        longer = np.unique(self.ngrams % V ** (k + 1))
        return np.unique(longer % V**k, return_counts=True)


def _interpolate(below: np.ndarray, ngrams: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the probabilities (V ** (k-1), V) of order k, in place of those of order k-1 for the same contexts."""
    size, V = below.shape
    contexts = ngrams // V
    removed = _discounts(counts)[np.minimum(counts, 3)]
    total = np.bincount(contexts, counts, size)
    share = np.bincount(contexts, removed, size) / np.maximum(total, 1)
    below *= np.where(total > 0, share, 1.0)[:, None].astype(np.float32)
    below.ravel()[ngrams] += ((counts - removed) / total[contexts]).astype(np.float32)
    return below


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Return what is taken off a count of 0, 1, 2, and 3 or more."""
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if min(found) > 0:
            return np.array((0.0, *found))
    return np.array((0.0, *USUAL))


def check_order(order: int, V: int) -> None:
    """Raise InputError where the table of that order over V tokens is no reasonable size on this machine."""
    if not 1 <= order <= MOST:
        raise InputError(f"--order must be from 1 to {MOST}; got {order}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = 4 * V**order
    if 2 * size > memory:
        raise InputError(
            f"order {order} over {V} tokens makes a table of {size / 2**30:.1f} GiB, and this machine has "
            f"{memory / 2**30:.1f} GiB of memory; train with --order {order - 1} or less"
        )


def count(sentences: Iterable[str], characters: str, order: int) -> Counts:
    """Return the n-grams of sentences, which hold only these characters."""
    found = np.zeros(0, np.int64), np.zeros(0, np.int64)
    sentences = iter(sentences)
    while some := list(itertools.islice(sentences, SENTENCES)):
        found = merge(found, np.unique(_windows(some, characters, order), return_counts=True))
    return found


def _windows(sentences: list[str], characters: str, order: int) -> np.ndarray:
    """Return the n-gram that ends at each character and <eos>, in the order of the text."""
    vocabulary = Vocabulary(characters)
    begin = [SOS] * (order - 1)
    tokens = np.array([t for text in sentences for t in (*begin, *vocabulary.encode(text), EOS)], np.int64)
    ngrams = np.zeros_like(tokens)
    for back in range(order):
        ngrams[back:] += tokens[: len(tokens) - back] * len(vocabulary) ** back
    return ngrams[tokens != SOS]  # these have the whole of their context in their own sentence


def merge(a: Counts, b: Counts) -> Counts:
    """Return the sums of two counts."""
    ngrams, places = np.unique(np.concatenate((a[0], b[0])), return_inverse=True)
    return ngrams, np.bincount(places, np.concatenate((a[1], b[1])), len(ngrams)).astype(np.int64)


def perplexity(table: np.ndarray, counts: Counts) -> float:
    """Return exp of the mean negative log-probability of the counted n-grams: per character, <eos> being one."""
    ngrams, times = counts
    return float(np.exp(-(table.ravel()[ngrams].astype(np.float64) * times).sum() / times.sum()))


def save_lm(path: Path, model: LanguageModel) -> None:
    """Write a model to one safetensors file, atomically."""
    from safetensors.numpy import save, save_file

    from las_fast import __version__
    from las_fast.files import write_tensors

    smallest = np.int32 if len(Vocabulary(model.characters)) ** model.order < 2**31 else np.int64
    most = int(model.counts.max(initial=0))
    counts = model.counts.astype(np.int32 if most < 2**31 else np.int64)
    tensors = {"ngrams": model.ngrams.astype(smallest), "counts": counts}
    metadata = {
        "format": FORMAT,
        "order": str(model.order),
        "characters": model.characters,
        "smoothing": SMOOTHING,
        "sentences": str(model.sentences),
        "tokens": str(int(model.counts.sum())),
        "las_fast": __version__,
    }
    write_tensors(path, lambda name: save_file(tensors, name, metadata), lambda: save(tensors, metadata))


def load_lm(path: Path) -> LanguageModel:
    """Read what save_lm wrote; raises InputError when it is missing, damaged or something else."""
    from safetensors import SafetensorError, safe_open

    from las_fast.data import plain_text

    try:
        with utf8_path(path) as name, safe_open(name, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(f"{path} is not a language model of las_fast; make one with python -m las_fast.lm")
            ngrams, counts = (file.get_tensor(name).astype(np.int64) for name in ("ngrams", "counts"))
        model = LanguageModel(
            int(metadata["order"]), metadata["characters"], ngrams, counts, int(metadata["sentences"])
        )
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if plain_text.is_other_model(path):
            what = f"{path} is an n-gram model of another program, which las_fast does not read"
            raise InputError(f"{what}; make one of its text with python -m las_fast.lm") from None
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a readable language model ({reason}); make it or copy it again") from None
    if not _is_sound(model):
        raise InputError(f"{path} is damaged: its n-grams and counts make no model; make it or copy it again")
    return model


def is_lm(path: Path) -> bool:
    """Return whether a file is a language model, by its head."""
    return safetensors_format(path) == FORMAT


def _is_sound(model: LanguageModel) -> bool:
    ngrams, counts, V = model.ngrams, model.counts, len(Vocabulary(model.characters))
    if not 1 <= model.order <= MOST or ngrams.ndim != 1 or ngrams.shape != counts.shape or (counts < 1).any():
        return False
    last = ngrams % V  # what is predicted, which <pad> and <sos> never are
    inside = not len(ngrams) or (ngrams[0] >= 0 and int(ngrams[-1]) < V**model.order)
    return bool(inside and (np.diff(ngrams) > 0).all() and (last != PAD).all() and (last != SOS).all())


def default_weight(decoding: DecodingConfig, lm: str | os.PathLike[str] | None) -> DecodingConfig:
    """Return the settings with a weight for the model that --lm names, where they have none."""
    return replace(decoding, ngram_weight=WEIGHT) if lm and not decoding.ngram_weight else decoding


def language_table(
    lm: str | None, decoding: DecodingConfig, loaded: Loaded, device: torch.device | str, option: str = "--lm "
) -> torch.Tensor | None:
    """Return the table of the model that lm names, or else that lies beside the checkpoint; None at weight 0.

    option stands before the name in errors.

    Raises:
        InputError: a weight without a model, a model without a weight, or one of other characters.
    """
    import torch

    if not decoding.ngram_weight:
        if lm:
            raise InputError(f"{option}{lm} has no effect where decoding.ngram_weight is 0; leave one of them out")
        return None
    path = find_lm(lm, loaded.path, option)
    if path is None:
        raise InputError(
            f"decoding.ngram_weight is {decoding.ngram_weight:g} and there is no language model; give {option}FILE, "
            f"put one beside the checkpoint as {beside(loaded.path)}, or set the weight to 0"
        )
    model = load_lm(path)
    if model.characters != loaded.vocabulary.characters:
        raise InputError(
            f"{path} is of the characters {model.characters!r}, checkpoint {loaded.path} writes "
            f"{loaded.vocabulary.characters!r}; train a language model with --characters like the checkpoint's"
        )
    return torch.from_numpy(model.table()).to(device)


def beside(checkpoint: Path) -> Path:
    """Return where the language model of a checkpoint lies: NAME.lm.safetensors beside NAME.safetensors."""
    return checkpoint.with_suffix(".lm.safetensors")


def find_lm(lm: str | None, checkpoint: Path, option: str = "--lm ") -> Path | None:
    """Return the file that lm names, a path or a released model's name; else the checkpoint's own or None."""
    from las_fast.checkpoint import RELEASED

    if lm is None:
        return beside(checkpoint) if os.path.isfile(beside(checkpoint)) else None
    if Path(lm).is_file():
        return Path(lm)
    released = {path.name.removesuffix(".lm.safetensors"): path for path in RELEASED.glob("*.lm.safetensors")}
    if lm not in released:
        known = f", nor one of the released: {', '.join(sorted(released))}" if released else ""
        raise InputError(f"{option}{lm} is not a file{known}; make one with python -m las_fast.lm")
    return released[lm]
