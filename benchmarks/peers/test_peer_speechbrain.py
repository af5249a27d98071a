"""Compare with SpeechBrain's beam search for an LSTM decoder with attention, at the same sizes and steps.

Its weights are random, so only the times are compared. SpeechBrain's decoder feeds the previous context to
the first cell and has no projection before its output. "location" is the attention of its LibriSpeech recipe,
"keyvalue" the dot product.
"""

from __future__ import annotations

import torch

from benchmarks.search_paths import Shape, compare_searches

INSTALL = "pip install 'las_fast[peers]', with the torchaudio that was built for your torch"
ATTENTIONS = {"keyvalue": {}, "location": {"channels": 10, "kernel_size": 100}}


def speechbrain_search(shape: Shape, kind: str):
    """Return a function that searches random encoder outputs."""
    from speechbrain.decoders.seq2seq import S2SRNNBeamSearcher
    from speechbrain.nnet.linear import Linear
    from speechbrain.nnet.RNN import AttentionalRNNDecoder

    torch.manual_seed(0)
    options = ATTENTIONS[kind]
    decoder = AttentionalRNNDecoder("lstm", kind, shape.H, 256, 2, enc_dim=shape.H, input_size=shape.H, **options)
    searcher = S2SRNNBeamSearcher(
        embedding=torch.nn.Embedding(shape.V, shape.H),
        decoder=decoder,
        linear=Linear(n_neurons=shape.V, input_size=shape.H),
        bos_index=0,
        eos_index=1,
        min_decode_ratio=shape.steps / shape.T,
        max_decode_ratio=shape.steps / shape.T,
        beam_size=shape.K,
        using_eos_threshold=False,
        length_normalization=True,
        return_topk=True,
        topk=shape.K,
    ).eval()
    encoded, share = torch.randn(shape.B, shape.T, shape.H), torch.ones(shape.B)

    @torch.inference_mode()
    def run():
        return searcher(encoded, share)

    tokens = run()[0]
    assert tokens.shape[:2] == (shape.B, shape.K) and shape.steps - 1 <= tokens.shape[2] <= shape.steps + 1
    return run


def test_speechbrain(compare, installed):
    version = installed("speechbrain", INSTALL).__version__
    shape = Shape()
    others = {f"SpeechBrain {version} {kind}": speechbrain_search(shape, kind) for kind in ATTENTIONS}
    compare_searches(
        compare, shape, "plain", "plain bf16", "las_fast cpp", "las_fast bf16", "las_fast int8",
        others=others, file="peers", what="beam search and SpeechBrain's", rounds=3,
    )  # fmt: skip
