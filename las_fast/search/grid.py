"""Decode a dataset with several settings of the search, encoding each batch once per view."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from las_fast.config import DecodingConfig
from las_fast.data.batch import Batch
from las_fast.progress import ProgressBar
from las_fast.search.beam import beam_search, fold_length_reward, packed_weights
from las_fast.search.cuda_graph import MAX_GRAPHS
from las_fast.search.dataset import check_finite, decode_batches, listen
from las_fast.search.views import View, is_sure, views_of

if TYPE_CHECKING:
    from las_fast.checkpoint import Loaded
    from las_fast.data.dataset import SpeechDataset


def decode_grid(
    loaded: Loaded, dataset: SpeechDataset, settings: list[DecodingConfig], ngram, device, backend: str = "auto"
) -> list[list[str]]:
    """Decode a dataset with each of the settings, which all have the same precision.

    All views are searched: decoding.view_threshold gives the texts that it gives in decoding, but saves no time. For
    ngram see load_ngram_model, for backend see beam_search.

    Returns:
        A list of texts, one per utterance, for each of the settings.

    Raises:
        InputError: one utterance alone does not fit in memory, or the model's outputs are not finite.
    """
    found: list[list[dict[View, Found]]] = [[{} for _ in range(len(dataset))] for _ in settings]
    views = [views_of(point) for point in settings]
    shared: dict[str, str] = {}  # many settings give the same text
    packed = packed_weights(loaded.model, settings[0], device, backend)
    # The cache of graphs is keyed by the n-gram model. The length reward is folded in once per point, so that all
    # batches of a point share a model and its graphs. More points than MAX_GRAPHS would evict each other's graphs, and
    # therefore have none.
    fit_in_cache = len(settings) <= MAX_GRAPHS
    capture = False if not fit_in_cache and torch.device(device).type == "cuda" else None
    V = len(loaded.vocabulary)
    plain = [point.one_view() for point in settings]
    points = _folded(ngram, plain, V, device) if fit_in_cache else [(ngram, point) for point in plain]

    def decode(batch: Batch, view: View, bar: ProgressBar) -> None:
        memory = listen(loaded.model, batch.to(device), settings[0])
        for k, (model, point) in enumerate(points):
            if view not in views[k]:
                continue
            hypotheses = beam_search(
                loaded.model, memory, point, ngram=model, packed=packed, backend=backend, capture=capture
            )
            for i, (best, *_) in zip(batch.indices.tolist(), hypotheses, strict=True):
                text = loaded.vocabulary.decode(best.text_tokens)
                found[k][i][view] = Found(shared.setdefault(text, text), best.score, is_sure(best, settings[k]))
                if len(found[k][i]) == len(views[k]):
                    check_finite(max(one.score for one in found[k][i].values()), dataset.ids[i])
            bar.update(len(batch.indices))  # those of a batch that is halved count twice

    with ProgressBar(len(dataset) * sum(map(len, views)), "tuning", "utterances") as bar:
        all_views = dict.fromkeys(itertools.chain.from_iterable(views))
        decode_now = partial(decode, bar=bar)
        for _ in decode_batches(decode_now, dataset, all_views, loaded.vocabulary, settings[0], device=device):
            pass
    return [
        [best_text(one[view] for view in in_order) for one in of_point]
        for in_order, of_point in zip(views, found, strict=True)
    ]


class Found(NamedTuple):
    """The best text of an utterance in one view."""

    text: str
    score: float
    is_sure: bool  # see las_fast.search.views


def best_text(found: Iterable[Found]) -> str:
    """Return the text with the highest score, of the first ones up to one that is sure; of equal ones, the first."""
    best = None
    for one in found:
        if best is None or one.score > best.score:
            best = one
        if best.is_sure:
            break
    return best.text if best else ""


def _folded(ngram, settings: list[DecodingConfig], V: int, device) -> list[tuple[Any, DecodingConfig]]:
    """Return what fold_length_reward returns for each setting; settings of equal weights share a language model."""
    models: dict[tuple[float, float], Any] = {}
    points = []
    for point in settings:
        weights = point.ngram_weight, point.length_reward
        if weights not in models:
            models[weights] = fold_length_reward(ngram, point, V, device)
        model, folded = models[weights]
        points.append((model, replace(point, ngram_weight=folded.ngram_weight, length_reward=folded.length_reward)))
    return points
