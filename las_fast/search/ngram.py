"""Character n-gram models and their files.

A file is in safetensors. Format 2, which save_lm writes, holds the n-grams of all orders as a trie, order by order,
each order ascending. With N n-grams and M contexts of orders 2 and above:

    tokens      (N,)        4 * token + 2 * (whether longer n-grams continue it) + (whether it is the last of its
                            context), in the smallest unsigned integers that fit
    log_probs   (N,) uint8  log-probability = minimum + step * code
    backoffs    (M,) uint8  back-off weights of the contexts, in the order of their n-grams, as log_probs
    sizes       (order,) int64  n-grams of each order
    scales      (order, 4) float32  minimum and step of log_probs, minimum and step of backoffs

Format 1 holds the counts of the n-grams of the highest order, of sentences that begin with order-1 times <sos>. They
are estimated when they are loaded.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from las_fast.config import DecodingConfig
from las_fast.errors import InputError
from las_fast.files import expand, safetensors_format, safetensors_metadata, unreadable, utf8_path
from las_fast.search.automaton import build_automaton
from las_fast.search.kneser_ney import (
    FORBIDDEN_LOG_PROB,
    Level,
    counts_of_all_orders,
    estimate,
    find,
    max_order,
    starts,
)
from las_fast.text import PAD, SOS, Vocabulary

if TYPE_CHECKING:  # importing torch would slow down --help
    import torch

    from las_fast.checkpoint import Loaded
    from las_fast.ops import NgramModel

FORMAT = "las_fast lm 2"
COUNTS_FORMAT = "las_fast lm 1"
SMOOTHING = "interpolated modified Kneser-Ney"
DEFAULT_ORDER = 5  # held-out perplexity on English for orders 3 to 6: 6.7, 4.9, 4.1, 3.8
DEFAULT_WEIGHT = 0.1  # decoding.ngram_weight with --lm if the settings have none; the best of a few on AN4's dev split
LARGEST_CODE = 255
DTYPES = {"U8", "U16", "U32", "I32", "I64", "F32"}  # of the tensors of both formats; numpy lacks some of safetensors
ROUNDING = 1e-3  # a log-probability of 0 may be read as a number between 0 and this
MAX_SUBTRACTED = 1.0  # weight of the subtracted log-probabilities


@dataclass(frozen=True)
class LanguageModel:
    """A back-off model of the characters of a text."""

    order: int
    characters: str
    levels: tuple[Level, ...]  # of orders 1 to `order`
    sentences: int = 0
    subtracted: float = 0.0  # weight with which the log-probabilities of the transcripts were subtracted

    @property
    def ngrams(self) -> int:
        """The number of n-grams of all orders."""
        return sum(len(level.ngrams) for level in self.levels)

    def automaton(self) -> NgramModel:
        """Return the model as the search follows it, on the CPU."""
        return build_automaton(self.levels, len(Vocabulary(self.characters)))


# ---------------------------------------------------------------------------------------------------------------- files


def save_lm(path: Path, model: LanguageModel) -> None:
    """Write a model to one safetensors file, atomically. Log-probabilities and back-off weights are quantised.

    Raises InputError if the file cannot be written, or if the model was read from a file of format 1.
    """
    from safetensors.numpy import save, save_file

    from las_fast import __version__
    from las_fast.files import write_tensors

    tensors = _pack(model.levels, len(Vocabulary(model.characters)))
    metadata = {
        "format": FORMAT,
        "order": str(model.order),
        "characters": model.characters,
        "smoothing": SMOOTHING,
        "sentences": str(model.sentences),
        "las_fast": __version__,
    }
    if model.subtracted:
        metadata["subtracted"] = repr(model.subtracted)
    write_tensors(path, lambda name: save_file(tensors, name, metadata), lambda: save(tensors, metadata))


def _pack(levels: tuple[Level, ...], V: int) -> dict[str, np.ndarray]:
    nodes, log_probs, backoffs, scales = [], [], [np.zeros(0, np.uint8)], []
    for k, level in enumerate(levels, 1):
        nodes.append(_nodes(level.ngrams, levels[k].contexts if k < len(levels) else np.zeros(0, np.int64), V))
        codes, scale = _quantise(level.log_probs, level.log_probs > FORBIDDEN_LOG_PROB)
        backoff_codes, backoff_scale = _quantise(level.backoffs, np.ones(len(level.backoffs), bool))
        log_probs.append(codes)
        backoffs += [backoff_codes] if k > 1 else []
        scales.append(scale + backoff_scale)
    return {
        "tokens": np.concatenate(nodes),
        "log_probs": np.concatenate(log_probs),
        "backoffs": np.concatenate(backoffs),
        "sizes": np.array([len(level.ngrams) for level in levels], np.int64),
        "scales": np.array(scales, np.float32),
    }


def _nodes(ngrams: np.ndarray, continued: np.ndarray, V: int) -> np.ndarray:
    """Return the nodes (N,) of the n-grams of one order, of which longer ones continue some."""
    is_ngram, index = find(ngrams, continued)
    if not is_ngram.all():
        raise InputError(f"a model read from a file of {COUNTS_FORMAT!r} cannot be saved; train it again from its text")
    nodes = ngrams % V * 4
    nodes[index] += 2
    nodes[starts(ngrams // V)[1:] - 1] += 1
    nodes[-1:] += 1
    return nodes.astype(np.min_scalar_type(4 * V - 1))


def _quantise(values: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Return codes (N,) uint8, and the minimum and the step of the values where `used`; other codes are arbitrary."""
    if not used.any():
        return np.zeros(len(values), np.uint8), (0.0, 0.0)
    low, high = float(values[used].min()), float(values[used].max())
    step = (high - low) / LARGEST_CODE
    codes = np.rint((values - low) / (step or 1.0))
    return np.clip(codes, 0, LARGEST_CODE).astype(np.uint8), (low, step)


def load_lm(path: Path) -> LanguageModel:
    """Read a language model. Raises InputError if the file is missing, damaged or not a language model."""
    from safetensors import SafetensorError, safe_open

    from las_fast.data import plain_text

    try:
        path.open("rb").close()  # safe_open's errors do not say what is wrong
        with utf8_path(path) as name, safe_open(name, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in READERS:
                raise InputError(f"{path} is not a language model of las_fast; make one with python -m las_fast.lm")
            order, characters = int(metadata["order"]), metadata["characters"]
            sentences, subtracted = int(metadata["sentences"]), float(metadata.get("subtracted", 0))
            _require(characters and len(set(characters)) == len(characters))
            _require(0 <= subtracted <= MAX_SUBTRACTED)
            highest = -FORBIDDEN_LOG_PROB if subtracted else ROUNDING
            levels = READERS[metadata["format"]](partial(_tensor, file), order, len(Vocabulary(characters)), highest)
    except _DamagedError:
        raise InputError(f"{path} is damaged: its numbers are inconsistent; make it or copy it again") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise unreadable(path, error) from None
        if plain_text.is_arpa_or_kenlm(path):
            problem = f"{path} is an n-gram model of another program, which las_fast cannot read"
            raise InputError(f"{problem}; train one on its text with python -m las_fast.lm") from None
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise InputError(f"{path} is not a readable language model ({reason}); make it or copy it again") from None
    return LanguageModel(order, characters, levels, sentences, subtracted)


def is_lm(path: Path) -> bool:
    """Return whether a file is a language model, from its header."""
    return safetensors_format(path) in READERS


class _DamagedError(Exception):
    """The numbers of a file contradict each other, or cannot be those of a model."""


Tensors = Callable[[str], np.ndarray]


def _require(condition: object) -> None:
    if not condition:
        raise _DamagedError


def _tensor(file: Any, name: str) -> np.ndarray:
    _require(file.get_slice(name).get_dtype() in DTYPES)
    return file.get_tensor(name)


def _read_counts(tensor: Tensors, order: int, V: int, highest: float) -> tuple[Level, ...]:
    """Read format 1 and estimate its model."""
    ngrams, counts = (tensor(name).astype(np.int64) for name in ("ngrams", "counts"))
    _require(1 <= order <= max_order(V) and ngrams.ndim == 1 and ngrams.shape == counts.shape and (counts >= 1).all())
    _require(not len(ngrams) or (ngrams[0] >= 0 and int(ngrams[-1]) < V**order and (np.diff(ngrams) > 0).all()))
    _require((ngrams % V > SOS).all())  # nothing predicts <pad> or <sos>
    return estimate(counts_of_all_orders(ngrams, counts, V, order), V)


def _read_trie(tensor: Tensors, order: int, V: int, highest: float) -> tuple[Level, ...]:
    """Read format 2, whose log-probabilities and back-off weights must be below `highest`."""
    nodes, log_probs, backoffs, sizes, scales = map(tensor, ("tokens", "log_probs", "backoffs", "sizes", "scales"))
    _require(1 <= order <= max_order(V) and sizes.shape == (order,) and scales.shape == (order, 4))
    _require(sizes.dtype == np.int64 and scales.dtype == np.float32 and nodes.dtype.kind == "u")
    _require((sizes >= 0).all() and nodes.shape == log_probs.shape == (sum(sizes.tolist()),))
    _require(log_probs.dtype == backoffs.dtype == np.uint8 and backoffs.shape == (np.count_nonzero(nodes & 2),))
    levels: list[Level] = []
    contexts, end = np.zeros(1, np.int64), 0
    for k, (size, scale) in enumerate(zip(sizes.tolist(), scales, strict=True), 1):
        begin, end = end, end + size
        ngrams = _ngrams_of_nodes(nodes[begin:end].astype(np.int64), contexts, V, first=0 if k == 1 else SOS + 1)
        values, weights = _dequantise(log_probs[begin:end], *scale[:2], highest=highest), np.zeros(1, np.float32)
        if k == 1:
            _require(np.array_equal(ngrams, np.arange(V)))
            values[[PAD, SOS]] = FORBIDDEN_LOG_PROB
        else:
            _require(find(levels[-1].ngrams, ngrams % V ** (k - 1))[0].all())
            weights = _dequantise(backoffs[: len(contexts)], *scale[2:], highest=highest)
            backoffs = backoffs[len(contexts) :]
        levels.append(Level(ngrams, values, contexts, weights))
        contexts = ngrams[nodes[begin:end] & 2 != 0]
    _require(not len(contexts))
    return tuple(levels)


def _dequantise(codes: np.ndarray, low: np.float32, step: np.float32, *, highest: float) -> np.ndarray:
    """Return log-probabilities or back-off weights, which must be below `highest`."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = low + step * codes.astype(np.float32)
    _require(((values > FORBIDDEN_LOG_PROB) & (values < highest)).all())
    return values


def _ngrams_of_nodes(nodes: np.ndarray, contexts: np.ndarray, V: int, *, first: int) -> np.ndarray:
    """Return the n-grams of the nodes of one order; each context has one run of nodes, and no token is below first."""
    last, tokens = nodes & 1, nodes >> 2
    _require(int(last.sum()) == len(contexts) and (not len(nodes) or last[-1]))
    _require(((tokens >= first) & (tokens < V)).all())
    ngrams = contexts[np.cumsum(last) - last] * V + tokens
    _require((np.diff(ngrams) > 0).all())
    return ngrams


READERS = {COUNTS_FORMAT: _read_counts, FORMAT: _read_trie}


def with_default_weight(loaded: Loaded, lm: str | os.PathLike[str] | None) -> DecodingConfig:
    """Return a checkpoint's settings of the search, with ngram_weight for the language model of --lm.

    It is DEFAULT_WEIGHT if the checkpoint has no weight, or one for a difference of two models (--subtract), which is
    much too high if `lm` is not one.
    """
    decoding = loaded.config.decoding
    if lm is None or (decoding.ngram_weight and not _differ_in_kind(loaded.path, os.fspath(lm))):
        return decoding
    return replace(decoding, ngram_weight=DEFAULT_WEIGHT)


def _differ_in_kind(checkpoint: Path, lm: str) -> bool:
    """Return whether the language model of a checkpoint is a difference of two models, and `lm` is not."""
    with contextlib.suppress(InputError, ValueError, TypeError):  # load_ngram_model reports missing and damaged files
        paths = find_lm(None, checkpoint), find_lm(lm, checkpoint)
        own, given = (float(safetensors_metadata(path).get("subtracted", 0)) if path else 0.0 for path in paths)
        return own > 0 and given == 0
    return False


def load_ngram_model(
    lm: str | None, decoding: DecodingConfig, loaded: Loaded, device: torch.device | str, option: str = "--lm "
) -> NgramModel | None:
    """Load the language model `lm`, or by default the checkpoint's, for the search; None if ngram_weight is 0.

    Args:
        lm:       file or name, see find_lm.
        decoding: settings; only ngram_weight is read.
        loaded:   the checkpoint.
        device:   of the search.
        option:   text before the name in errors.

    Raises:
        InputError: a weight without a model, a model without a weight, or a model with other characters.
    """
    if not decoding.ngram_weight:
        if lm is not None:
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
    return model.automaton().to(device)


def lm_path_for(checkpoint: Path) -> Path:
    """Return the path of a checkpoint's language model: NAME.lm.safetensors next to NAME.safetensors."""
    return checkpoint.with_suffix(".lm.safetensors")


def find_lm(lm: str | None, checkpoint: Path, option: str = "--lm ") -> Path | None:
    """Return the file of a language model: `lm` is a path or the name of a released model; None: the checkpoint's.

    Returns None if lm is None and the checkpoint has no language model. `option` is the text before the name in errors.
    Raises InputError for an empty or unknown name.
    """
    from las_fast.checkpoint import RELEASED, current_name

    if lm is None:
        path = lm_path_for(checkpoint)
        return path if os.path.isfile(path) else None
    if not lm:
        raise InputError(f"{option.rstrip(' =')} is empty; give a file or the name of a released model")
    if (path := expand(lm)).is_file():
        return path
    released = {path.name.removesuffix(".lm.safetensors"): path for path in RELEASED.glob("*.lm.safetensors")}
    if (name := current_name(lm)) not in released:
        known = f", nor one of the released models: {', '.join(sorted(released))}" if released else ""
        raise InputError(f"{option}{lm} is not a file{known}; make one with python -m las_fast.lm")
    return released[name]
