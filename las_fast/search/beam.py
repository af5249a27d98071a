"""Beam search: from encoder memory to hypotheses.

beam_search checks its arguments, chooses one of three searches with the same result (native, cuda_graph, steps), and
follows the back-pointers of the best beams.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from las_fast.config import NEEDS_CTC_HEAD, DecodingConfig
from las_fast.errors import InputError
from las_fast.model.las import LAS
from las_fast.ops import NgramModel, Steps, beam_backtrack, speller_pack, table_model
from las_fast.output.transcripts import Word
from las_fast.search.cuda_graph import can_capture, search_by_graph
from las_fast.search.native import is_native, native_precision, search_natively
from las_fast.search.steps import Search, TokenLimits, search_by_steps
from las_fast.text import EOS, PAD, SOS


@dataclass(frozen=True)
class TokenHypothesis:
    """One candidate text of an utterance."""

    text_tokens: list[int]  # without <sos> and <eos>
    score: float  # sum of the token scores, <eos> included; see beam_search
    normalised: float  # score / tokens ** length_penalty, <eos> counted; the rank is this plus the coverage term
    attended_frames: list[int]  # the encoder frame that each token attended to most
    token_scores: list[float]  # the score of each token in text_tokens
    finished: bool  # False at the maximum length, where <eos> is forced
    speech_score: float | None = None  # see las_fast.search.dataset.speech_scores; None if it was not requested
    words: tuple[Word, ...] = ()  # see las_fast.search.words; empty if they were not requested


def greedy_search(model, memory, config: DecodingConfig) -> list[list[TokenHypothesis]]:
    """Take the most probable token at each step; a list of one hypothesis per utterance. See beam_search."""
    return beam_search(model, memory, dataclasses.replace(config, beam=1))


@torch.inference_mode()
def beam_search(
    model,
    memory,
    config: DecodingConfig,
    *,
    nbest: int = 1,
    ngram: NgramModel | None = None,
    packed: Tensor | None = None,
    backend: str = "auto",
    capture: bool | None = None,
) -> list[list[TokenHypothesis]]:
    """Search each utterance with a beam of config.beam hypotheses.

    The hypotheses of an utterance do not depend on the rest of its batch. At the maximum length <eos> is forced. The
    score of a token is (natural logarithms; no length_reward for <eos>)

        log p_model(token) + ngram_weight * log p_ngram(token) + length_reward

    With config.ctc_weight, log p_model is the weighted mean of attention and CTC; see ops.beam_topk.

    Args:
        model:   has start, step, time_reduction and vocabulary_size as las_fast.model.las.LAS; its state has gather as
            SpellerState.
        memory:  from model.listen; lengths (B,) int64 encoder frames. config.ctc_weight also needs ctc_logits
            (B, T', V), whose blank is <pad>, and ctc_lengths (B,).
        config:  beam, length limits, penalties and weights.
        nbest:   maximum hypotheses to return per utterance. There are at most config.beam, and fewer if
            config.beam_threshold has dropped some.
        ngram:   n-gram model, on the device; its weight is config.ngram_weight.
        packed:  from packed_weights, for this config and backend, with the model's weights unchanged since; None: the
            C++ search packs them itself.
        backend: passed to the ops.
        capture: True: replay CUDA graphs. False: run op by op. None: choose the fastest: one C++ op for a LAS on a CPU,
            CUDA graphs on CUDA with the Triton ops, otherwise op by op.

    Returns:
        Up to nbest hypotheses per utterance, best first. If the model's outputs are NaN, the only hypothesis of the
        utterance is empty with score -inf.

    Raises:
        InputError: config.ngram_weight without an n-gram model, config.ctc_weight without a CTC head, precision int8
            where the C++ search is not used, or bf16 for a model that is not a LAS.
    """
    ngram, config = fold_length_reward(ngram, config, model.vocabulary_size, memory.lengths.device)
    if config.ctc_weight and getattr(memory, "ctc_logits", None) is None:
        raise InputError(f"decoding.ctc_weight {NEEDS_CTC_HEAD}")
    limits = length_limits(memory.lengths * model.time_reduction, config)
    search = Search(model, config, ngram if config.ngram_weight else None, backend, packed)
    with _device_context(memory.lengths.device):
        run = choose_search(search, memory, capture=capture)
        return backtrack(run(search, memory, limits), limits, config, nbest, backend)


@torch.inference_mode()
def packed_weights(model, config: DecodingConfig, device: str | torch.device, backend: str = "auto") -> Tensor | None:
    """Pack the weights for the C++ search, to share between batches; None if that search is not used.

    The copy does not track later weight updates. Raises InputError for precision int8 if that search is not used.
    """
    if not is_native(model, backend, torch.device(device)):
        _refuse_int8(config)
        return None
    return speller_pack(model.speller.weights(), device, precision=native_precision(config))


def fold_length_reward(
    ngram: NgramModel | None, config: DecodingConfig, V: int, device
) -> tuple[NgramModel | None, DecodingConfig]:
    """Fold config.length_reward into the n-gram model; return the model and the settings to use with it.

    weight * (log-probability + length_reward / weight) adds the reward to every token but <eos>. Without an n-gram
    model, the result is a model of order 1 that holds only the reward. beam_search does this itself, but doing it once
    is cheaper when many batches are searched. Raises InputError for config.ngram_weight without an n-gram model.
    """
    if config.ngram_weight and ngram is None:
        raise InputError("decoding.ngram_weight needs an n-gram model, but there is none; pass ngram, or set it to 0")
    if not config.length_reward:
        return ngram, config
    if ngram is None or not config.ngram_weight:
        ngram = table_model(torch.zeros(1, V, device=device), SOS)
        config = dataclasses.replace(config, ngram_weight=1.0)
    ngram = ngram.add_to_all_but(EOS, config.length_reward / config.ngram_weight)
    return ngram, dataclasses.replace(config, length_reward=0.0)


def length_limits(lengths: Tensor, config: DecodingConfig) -> TokenLimits:
    """Return the limits for utterances of (B,) int64 feature frames; maximum >= 1 and maximum >= minimum."""
    maximum = (lengths * config.maximum_share).long().add(config.maximum_extra).clamp(min=1)
    return TokenLimits(torch.minimum((lengths * config.minimum_share).long(), maximum), maximum)


def _device_context(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a CUDA device the current device, for events, streams and Triton."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _refuse_int8(config: DecodingConfig) -> None:
    if config.precision == "int8":
        raise InputError(
            "decoding.precision int8 needs a LAS (no subclass of it) on a CPU, and the C++ extension; set it to auto"
        )


def choose_search(
    search: Search, memory, *, capture: bool | None = None
) -> Callable[[Search, Any, TokenLimits], Steps]:
    """Return the function that runs the search: search_natively, search_by_graph or search_by_steps.

    memory and capture are as in beam_search. Raises InputError for a precision that the search does not support.
    """
    if capture is None and is_native(search.model, search.backend, memory.lengths.device):
        return search_natively
    _refuse_int8(search.config)
    if search.config.precision == "bf16" and type(search.model) is not LAS:  # a subclass may override step
        raise InputError("decoding.precision bf16 needs a LAS, and not a subclass of it; set it to auto")
    if capture is None:
        capture = can_capture(search, memory)
    return search_by_graph if capture else search_by_steps


def backtrack(
    steps: Steps, limits: TokenLimits, config: DecodingConfig, nbest: int, backend: str
) -> list[list[TokenHypothesis]]:
    """Follow the back-pointers, copy the nbest hypotheses of each utterance to the host, and return them."""
    tokens, lengths, token_scores, attended = beam_backtrack(*steps, eos=EOS, backend=backend)
    scores = steps.scores[-1]
    normalised = scores / (lengths + 1).float() ** config.length_penalty
    finished = lengths < limits.maximum[:, None]
    columns = [scores, normalised, finished, lengths, tokens, token_scores, attended]
    if scores.is_cuda:
        columns = in_one_copy(best_beams(columns, nbest))
    lists = [x.tolist() if x.dim() == 2 else x.numpy() for x in columns]  # numpy: only rows that are returned are read
    return [_hypotheses(nbest, *utterance) for utterance in zip(*lists, strict=True)]


def best_beams(columns: list[Tensor], nbest: int) -> list[Tensor]:
    """Return the columns of backtrack for the first nbest beams of each utterance whose text is possible."""
    scores, tokens = columns[0], columns[4]
    possible = scores.isfinite() & ~((tokens == PAD) | (tokens == SOS)).any(-1)
    best = possible.byte().sort(stable=True, dim=-1, descending=True).indices[:, :nbest]
    return [x.take_along_dim(best if x.dim() == 2 else best[..., None], 1) for x in columns]


def in_one_copy(columns: list[Tensor]) -> list[Tensor]:
    """Copy (B, N) and (B, N, L) tensors to the host at once: separate copies would each wait for the device.

    Returns tensors of the same values and shapes: float32, or int32 for integers and bools, which must fit.
    """
    bits = [x.view(torch.int32) if x.is_floating_point() else x.int() for x in columns]
    rows = [x if x.dim() == 3 else x[..., None] for x in bits]
    copied = torch.cat(rows, -1).cpu().split([x.shape[-1] for x in rows], -1)
    copied = [new.view(x.dtype) if x.is_floating_point() else new for new, x in zip(copied, columns, strict=True)]
    return [new.reshape(x.shape) for new, x in zip(copied, columns, strict=True)]


def _hypotheses(nbest: int, *columns: list | np.ndarray) -> list[TokenHypothesis]:
    """Return the best hypotheses of one utterance, from the columns of its beams, best first (see backtrack)."""
    hypotheses: list[TokenHypothesis] = []
    for score, normalised, finished, n, tokens, token_scores, attended in zip(*columns, strict=True):
        text = tokens[:n].tolist()
        # With fewer possible texts than beams, the rest are impossible: score -inf, or <pad> or <sos> in the text.
        if math.isfinite(score) and not {PAD, SOS} & set(text):
            attended_frames, scores = attended[:n].tolist(), token_scores[:n].tolist()
            hypotheses.append(TokenHypothesis(text, score, normalised, attended_frames, scores, bool(finished)))
        if len(hypotheses) == nbest:
            break
    return hypotheses[:nbest] or [TokenHypothesis([], -math.inf, -math.inf, [], [], False)]
