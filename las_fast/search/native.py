"""The whole beam search of a LAS as one C++ op, on a CPU."""

from __future__ import annotations

import torch

from las_fast.config import DecodingConfig
from las_fast.model.las import LAS
from las_fast.ops import Steps, backends, speller_search
from las_fast.search.steps import Search, TokenLimits, beam_threshold, ctc_log_probs
from las_fast.text import EOS, SOS

# Of decoding; int8 only in the native search. With either, the listener runs in bfloat16.
LOW_PRECISIONS = ("bf16", "int8")


def is_native(model, backend: str, device: torch.device) -> bool:
    """Return whether the C++ op can run the whole search: for a plain LAS, without autocast, on a device with the op.

    A subclass of LAS may override step, which the op would not call.
    """
    if type(model) is not LAS or backend not in ("auto", "cpp") or torch.is_autocast_enabled("cpu"):
        return False
    return backends.choose("speller_search", "auto", device) == "cpp"


def native_precision(config: DecodingConfig) -> str:
    """Return the precision of the op's matmuls: "fp32", "bf16" or "int8"."""
    return config.precision if config.precision in LOW_PRECISIONS else "fp32"


def search_natively(search: Search, memory, limits: TokenLimits) -> Steps:
    """Run the search as one op; (L, B, K)."""
    config = search.config
    return speller_search(
        search.model.speller.weights(),
        *memory[:3],
        beam=config.beam,
        sos=SOS,
        eos=EOS,
        minimum=limits.minimum if config.minimum_share else None,
        maximum=limits.maximum,
        length_penalty=config.length_penalty,
        eos_threshold=config.eos_threshold,
        coverage_weight=config.coverage_weight,
        ngram=search.ngram,
        ngram_weight=config.ngram_weight,
        ctc_log_probs=ctc_log_probs(config, memory),
        ctc_weight=config.ctc_weight,
        beam_threshold=beam_threshold(config),
        precision=native_precision(config),
        packed=search.packed,
        backend="cpp",
    )
