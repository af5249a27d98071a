"""Compare with ESPnet's beam searches: an LSTM decoder with dot-product attention, at the same sizes and steps.

Its weights are random, so only the times are compared. ESPnet1 searches a batch. ESPnet2 has no batched
search for its RNN decoder: it processes one utterance at a time, and one hypothesis at a time within it. Two
utterances are enough to measure it.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from benchmarks.search_paths import Shape, compare_searches

INSTALL = (
    "its dependencies conflict with those of las_fast; in a separate environment, run "
    "pip install --no-deps espnet==202511 typeguard==2.13.3 humanfriendly packaging scipy"
)
FORBIDDEN_LOGIT = -1e9
UNBATCHED_UTTERANCES = 2  # for the search without batches


def espnet1_search(shape: Shape):
    """Return a function that searches random encoder outputs."""
    from espnet.nets.pytorch_backend.rnn.attentions import initial_att
    from espnet.nets.pytorch_backend.rnn.decoders import Decoder

    torch.manual_seed(0)
    attention = torch.nn.ModuleList([initial_att("dot", shape.H, shape.H, 1, 256, 0, 0, 0)])
    letters, eos = [str(i) for i in range(shape.V)], shape.V - 1
    decoder = Decoder(shape.H, shape.V, "lstm", 2, shape.H, eos, eos, attention, verbose=0, char_list=letters).eval()
    forbid_eos(decoder.output, eos)
    encoded, lengths = torch.randn(shape.B, shape.T, shape.H), torch.full((shape.B,), shape.T)
    settings = SimpleNamespace(
        beam_size=shape.K, penalty=0.0, ctc_weight=0.0, maxlenratio=shape.steps / shape.T, minlenratio=0.0,
        lm_weight=0.0, nbest=shape.K, ctc_window_margin=0,
    )  # fmt: skip

    @torch.inference_mode()
    def run():
        return decoder.recognize_beam_batch(encoded.clone(), lengths, None, settings, letters, None)

    hypotheses = run()
    assert len(hypotheses) == shape.B and len(hypotheses[0][0]["yseq"]) >= shape.steps
    return run


def espnet2_search(shape: Shape):
    """Return a function that searches random encoder outputs."""
    from espnet.nets.beam_search import BeamSearch
    from espnet2.asr.decoder.rnn_decoder import RNNDecoder

    torch.manual_seed(0)
    eos = shape.V - 1
    decoder = RNNDecoder(shape.V, shape.H, "lstm", 2, shape.H, att_conf={"atype": "dot", "adim": 256}).eval()
    forbid_eos(decoder.output, eos)
    searcher = BeamSearch({"decoder": decoder}, {"decoder": 1.0}, shape.K, shape.V, eos, eos).eval()
    encoded = torch.randn(UNBATCHED_UTTERANCES, shape.T, shape.H)

    @torch.inference_mode()
    def run():
        return [searcher(utterance, maxlenratio=-shape.steps) for utterance in encoded]

    assert len(run()[0][0].yseq) >= shape.steps
    return run


@torch.no_grad()
def forbid_eos(output: torch.nn.Linear, eos: int) -> None:
    """Make every hypothesis continue to the last step."""
    output.bias[eos] = FORBIDDEN_LOGIT


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_espnet1(compare, installed):
    espnet = installed("espnet", INSTALL)
    shape = Shape()
    others = {f"ESPnet1 {espnet.__version__} dot": espnet1_search(shape)}
    compare_searches(
        compare, shape, "plain", "plain bf16", "las_fast cpp", "las_fast bf16", "las_fast int8",
        others=others, file="peers", what="beam search and ESPnet1's", rounds=3,
    )  # fmt: skip


def test_espnet2(compare, installed):
    espnet = installed("espnet", INSTALL)
    shape = Shape(B=UNBATCHED_UTTERANCES)
    others = {f"ESPnet2 {espnet.__version__} dot": espnet2_search(shape)}
    compare_searches(
        compare, shape, "plain", "plain bf16", "las_fast cpp", "las_fast bf16", "las_fast int8",
        others=others, file="peers", what="beam search of few and ESPnet2's", rounds=3,
    )  # fmt: skip
