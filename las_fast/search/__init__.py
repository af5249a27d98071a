"""From encoder memory to hypotheses: beam search, n-gram models, decoding of whole datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from las_fast.search.beam import TokenHypothesis, beam_search, greedy_search
    from las_fast.search.dataset import decode_dataset

__all__ = ["TokenHypothesis", "beam_search", "decode_dataset", "greedy_search"]


def __getattr__(name: str) -> Any:
    """Import the search at first use: it needs torch, and n-gram models do not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from las_fast.search import beam, dataset

    return getattr(dataset if name == "decode_dataset" else beam, name)
