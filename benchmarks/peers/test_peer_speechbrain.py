"""SpeechBrain's beam search for an attention LSTM decoder, at the same sizes and steps, with weights of its own.

SpeechBrain's decoder feeds the context before to the first cell and has no projection before its output; "location" is
the attention of its LibriSpeech recipe, "keyvalue" the dot product.
"""

from __future__ import annotations

import torch

from benchmarks.searches import Shape, timed

INSTALL = "pip install 'las_fast[peers]'; beside a CPU build of torch also: rm .../site-packages/torchaudio/lib/*.so"
KINDS = {"keyvalue": {}, "location": {"channels": 10, "kernel_size": 100}}


def speechbrain_search(shape: Shape, kind: str):
    """Return a function that searches made-up encoder outputs."""
    from speechbrain.decoders.seq2seq import S2SRNNBeamSearcher
    from speechbrain.nnet.linear import Linear
    from speechbrain.nnet.RNN import AttentionalRNNDecoder

    torch.manual_seed(0)
    decoder = AttentionalRNNDecoder("lstm", kind, shape.H, 256, 2, enc_dim=shape.H, input_size=shape.H, **KINDS[kind])
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
    others = {f"SpeechBrain {version} {kind}": speechbrain_search(shape, kind) for kind in KINDS}
    timed(
        compare, shape, "plain", "plain bf16", "las_fast cpp", "las_fast bf16", "las_fast int8",
        others=others, file="peers", what="beam search and SpeechBrain's", rounds=3,
    )  # fmt: skip
