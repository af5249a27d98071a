"""A character n-gram model: counts, smoothing, the file, and the table that the beam search looks up.

The smoothing is interpolated modified Kneser-Ney; las_fast.lm gives the formulas.
"""

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

if TYPE_CHECKING:  # importing torch would slow down --help
    import torch

    from las_fast.checkpoint import Loaded

FORMAT = "las_fast lm 1"
SMOOTHING = "interpolated modified Kneser-Ney"
DEFAULT_ORDER = 5  # held-out perplexity on English for orders 3 to 6: 6.7, 4.9, 4.1, 3.8; order 6 needs a 3.5 GB table
MAX_ORDER = 12  # 31 ** 12 still fits in int64; 31 is the size of the default vocabulary
DEFAULT_WEIGHT = 0.1  # decoding.ngram_weight with --lm if the settings have none; the best of a few on AN4's dev split
FORBIDDEN_LOG_PROB = -1e4  # of <pad> and <sos>; exp gives 0. Not -inf: a weight of 0 times -inf is NaN
DEFAULT_DISCOUNTS = (0.5, 1.0, 1.5)  # where a text is too small, or an order too dense, for the formulas
SENTENCES_PER_PASS = 20000  # counted at once, to bound memory
Counts = tuple[np.ndarray, np.ndarray]  # (N,) int64 n-grams as numbers in base V, ascending; (N,) int64 counts


@dataclass(frozen=True)
class LanguageModel:
    """Counts of the n-grams of a text. An n-gram is a number in base V with its newest token as the last digit."""

    order: int
    characters: str
    ngrams: np.ndarray  # (N,) int64, ascending
    counts: np.ndarray  # (N,) int64, at least 1
    sentences: int = 0

    def ngram_table(self) -> np.ndarray:
        """Return (V ** (order-1), V) float32 log-probabilities, as las_fast.ops.Ngram takes them.

        <pad> and <sos> have FORBIDDEN_LOG_PROB.
        """
        V = len(Vocabulary(self.characters))
        check_order(self.order, V)
        p = np.full((1, V), 1 / (V - 2), np.float32)
        p[0, [PAD, SOS]] = 0.0
        for k in range(1, self.order + 1):
            p = _interpolate(p if k == 1 else np.tile(p, (V, 1)), *self._counts_of_order(k, V))
        np.log(p, out=p, where=p > 0)
        p[:, [PAD, SOS]] = FORBIDDEN_LOG_PROB
        return p

    def _counts_of_order(self, k: int, V: int) -> Counts:
        """Return the k-grams and their counts; below the highest order, the number of distinct tokens before each."""
        if k == self.order:
            return self.ngrams, self.counts
        longer = np.unique(self.ngrams % V ** (k + 1))
        return np.unique(longer % V**k, return_counts=True)


def _interpolate(lower: np.ndarray, ngrams: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Turn probabilities of order k-1, repeated for each context (V ** (k-1), V), into those of order k, in place."""
    size, V = lower.shape
    contexts = ngrams // V
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    total = np.bincount(contexts, counts, size)
    share = np.bincount(contexts, discounts, size) / np.maximum(total, 1)
    lower *= np.where(total > 0, share, 1.0)[:, None].astype(np.float32)
    lower.ravel()[ngrams] += ((counts - discounts) / total[contexts]).astype(np.float32)
    return lower


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Return the discounts of counts 0, 1, 2, and 3 or more."""
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        discounts = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if min(discounts) > 0:
            return np.array((0.0, *discounts))
    return np.array((0.0, *DEFAULT_DISCOUNTS))


def check_order(order: int, V: int) -> None:
    """Raise InputError if the order is out of range or its table over V tokens needs over half of the memory here."""
    if not 1 <= order <= MAX_ORDER:
        raise InputError(f"--order must be from 1 to {MAX_ORDER}; got {order}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = 4 * V**order
    if 2 * size > memory:
        fits = max((k for k in range(1, order) if 2 * 4 * V**k <= memory), default=1)
        raise InputError(
            f"order {order} over {V} tokens needs a table of {size / 2**30:.1f} GiB, and this machine has "
            f"{memory / 2**30:.1f} GiB of memory; train with --order {fits} or less"
        )


def count_ngrams(sentences: Iterable[str], characters: str, order: int) -> Counts:
    """Count the n-grams of sentences that contain only these characters."""
    counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    sentences = iter(sentences)
    while batch := list(itertools.islice(sentences, SENTENCES_PER_PASS)):
        counts = merge_counts(counts, np.unique(_encode_ngrams(batch, characters, order), return_counts=True))
    return counts


def _encode_ngrams(sentences: list[str], characters: str, order: int) -> np.ndarray:
    """Return the n-gram that ends at each character and each <eos>, in the order of the text."""
    vocabulary = Vocabulary(characters)
    start = [SOS] * (order - 1)
    tokens = np.array([t for text in sentences for t in (*start, *vocabulary.encode(text), EOS)], np.int64)
    ngrams = np.zeros_like(tokens)
    for back in range(order):
        ngrams[back:] += tokens[: len(tokens) - back] * len(vocabulary) ** back
    return ngrams[tokens != SOS]  # an n-gram that ends in <sos> may reach into the previous sentence


def merge_counts(a: Counts, b: Counts) -> Counts:
    """Add two counts."""
    ngrams, index = np.unique(np.concatenate((a[0], b[0])), return_inverse=True)
    return ngrams, np.bincount(index, np.concatenate((a[1], b[1])), len(ngrams)).astype(np.int64)


def perplexity(table: np.ndarray, counts: Counts) -> float:
    """Return exp of the mean negative log-probability of the counted n-grams: per character, with <eos> as one."""
    ngrams, occurrences = counts
    return float(np.exp(-(table.ravel()[ngrams].astype(np.float64) * occurrences).sum() / occurrences.sum()))


def save_lm(path: Path, model: LanguageModel) -> None:
    """Write a model to one safetensors file, atomically, in the smallest integers that fit."""
    from safetensors.numpy import save, save_file

    from las_fast import __version__
    from las_fast.files import write_tensors

    possible = len(Vocabulary(model.characters)) ** model.order
    max_count = int(model.counts.max(initial=0))
    tensors = {
        "ngrams": model.ngrams.astype(np.int32 if possible < 2**31 else np.int64),
        "counts": model.counts.astype(np.int32 if max_count < 2**31 else np.int64),
    }
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
    """Read a file that save_lm wrote. Raises InputError if it is missing, damaged or not a language model."""
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
        if plain_text.is_arpa_or_kenlm(path):
            problem = f"{path} is an n-gram model of another program, which las_fast cannot read"
            raise InputError(f"{problem}; train one on its text with python -m las_fast.lm") from None
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a readable language model ({reason}); make it or copy it again") from None
    if not _is_valid(model):
        raise InputError(f"{path} is damaged: its n-grams and counts are inconsistent; make it or copy it again")
    return model


def is_lm(path: Path) -> bool:
    """Return whether a file is a language model, from its header."""
    return safetensors_format(path) == FORMAT


def _is_valid(model: LanguageModel) -> bool:
    ngrams, counts, V = model.ngrams, model.counts, len(Vocabulary(model.characters))
    if not 1 <= model.order <= MAX_ORDER or ngrams.ndim != 1 or ngrams.shape != counts.shape or (counts < 1).any():
        return False
    last = ngrams % V  # the predicted token: never <pad> or <sos>
    in_range = not len(ngrams) or (ngrams[0] >= 0 and int(ngrams[-1]) < V**model.order)
    return bool(in_range and (np.diff(ngrams) > 0).all() and (last != PAD).all() and (last != SOS).all())


def with_default_weight(decoding: DecodingConfig, lm: str | os.PathLike[str] | None) -> DecodingConfig:
    """Return the settings; if --lm names a model and ngram_weight is 0, ngram_weight is set to DEFAULT_WEIGHT."""
    return replace(decoding, ngram_weight=DEFAULT_WEIGHT) if lm and not decoding.ngram_weight else decoding


def load_ngram_table(
    lm: str | None, decoding: DecodingConfig, loaded: Loaded, device: torch.device | str, option: str = "--lm "
) -> torch.Tensor | None:
    """Load the n-gram table of the language model `lm`, or by default of the checkpoint's; None if ngram_weight is 0.

    Args:
        lm:       file or name, see find_lm.
        decoding: settings; only ngram_weight is read.
        loaded:   the checkpoint.
        device:   of the table.
        option:   text before the name in errors.

    Raises:
        InputError: a weight without a model, a model without a weight, or a model with other characters.
    """
    import torch

    if not decoding.ngram_weight:
        if lm:
            raise InputError(f"{option}{lm} has no effect while decoding.ngram_weight is 0; leave one of them out")
        return None
    path = find_lm(lm, loaded.path, option)
    if path is None:
        raise InputError(
            f"decoding.ngram_weight is {decoding.ngram_weight:g} and there is no language model; give {option}FILE, "
            f"put one next to the checkpoint as {lm_path_for(loaded.path)}, or set the weight to 0"
        )
    model = load_lm(path)
    if model.characters != loaded.vocabulary.characters:
        raise InputError(
            f"{path} has the characters {model.characters!r}, but checkpoint {loaded.path} has "
            f"{loaded.vocabulary.characters!r}; train a language model with the checkpoint's --characters"
        )
    return torch.from_numpy(model.ngram_table()).to(device)


def lm_path_for(checkpoint: Path) -> Path:
    """Return the path of a checkpoint's language model: NAME.lm.safetensors next to NAME.safetensors."""
    return checkpoint.with_suffix(".lm.safetensors")


def find_lm(lm: str | None, checkpoint: Path, option: str = "--lm ") -> Path | None:
    """Return the file of a language model: `lm` is a path or the name of a released model; None: the checkpoint's.

    Returns None if lm is None and the checkpoint has no language model. `option` is the text before the name in errors.
    Raises InputError for an unknown name.
    """
    from las_fast.checkpoint import RELEASED

    if lm is None:
        path = lm_path_for(checkpoint)
        return path if os.path.isfile(path) else None
    if Path(lm).is_file():
        return Path(lm)
    released = {path.name.removesuffix(".lm.safetensors"): path for path in RELEASED.glob("*.lm.safetensors")}
    if lm not in released:
        known = f", nor one of the released models: {', '.join(sorted(released))}" if released else ""
        raise InputError(f"{option}{lm} is not a file{known}; make one with python -m las_fast.lm")
    return released[lm]
