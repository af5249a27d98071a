"""Performance-critical ops. The reference defines each op; faster backends are fused PyTorch, C++ and Triton.

`python -m las_fast.ops` prints which backends are available here, and why the others are not.
"""

from las_fast.ops.beam_backtrack import Backtracked, beam_backtrack
from las_fast.ops.beam_gather import beam_gather
from las_fast.ops.beam_topk import BeamStep, Ctc, Ngram, beam_topk
from las_fast.ops.bilstm import bilstm
from las_fast.ops.ctc_loss import ctc_loss, ctc_token_times
from las_fast.ops.ctc_prefix import CtcState, ctc_log_probabilities, ctc_prefix, ctc_start
from las_fast.ops.masked_attention import masked_attention
from las_fast.ops.masks import padding_mask
from las_fast.ops.ngram_scores import NgramModel, NgramScores, ngram_scores, ngram_start, table_model
from las_fast.ops.speller import SpellerWeights
from las_fast.ops.speller_search import Steps, speller_pack, speller_search
from las_fast.ops.speller_unroll import speller_unroll

__all__ = [
    "Backtracked",
    "BeamStep",
    "Ctc",
    "CtcState",
    "Ngram",
    "NgramModel",
    "NgramScores",
    "SpellerWeights",
    "Steps",
    "beam_backtrack",
    "beam_gather",
    "beam_topk",
    "bilstm",
    "ctc_log_probabilities",
    "ctc_loss",
    "ctc_prefix",
    "ctc_start",
    "masked_attention",
    "ngram_scores",
    "ngram_start",
    "padding_mask",
    "speller_pack",
    "speller_search",
    "speller_unroll",
    "table_model",
    "ctc_token_times",
]
