"""Benchmark speller_search, a whole beam search as one op, against the same search step by step on the C++ ops.

Every utterance takes the same number of steps: <eos> is forbidden before the last step and forced there.
"""

import pytest
import torch

from las_fast.config import DecodingConfig, ListenerConfig, ModelConfig, SpellerConfig
from las_fast.model.attention import Memory
from las_fast.model.las import LAS
from las_fast.ops import backends, beam_backtrack, padding_mask, speller_search
from las_fast.search.beam import beam_search
from las_fast.text import EOS, SOS

STEPS = 32
SHAPES = {  # B, K, T, V, H, D; H is the size of both cells, the embedding and the values
    "16 utterances": (16, 8, 200, 31, 512, 256),
    "one utterance": (1, 8, 200, 31, 512, 256),
    "greedy": (16, 1, 200, 31, 512, 256),
    "word pieces": (16, 8, 200, 5000, 512, 256),
    "small model": (16, 8, 100, 31, 96, 64),
}
PATHS = {"reference": "fp32", "step by step": "fp32", "cpp": "fp32", "cpp bf16": "bf16", "cpp int8": "int8"}


def make(B, K, T, V, H, D) -> tuple[LAS, Memory]:
    torch.manual_seed(0)
    config = ModelConfig(ListenerConfig((8,), (3,), (1,), 8, 0), SpellerConfig(D, H, H, (H, H)))
    model = LAS(config, input_size=8, vocabulary_size=V).eval()
    lengths = torch.full((B,), T)
    return model, Memory(torch.randn(B, T, D), torch.randn(B, T, H), lengths, padding_mask(lengths, T))


def search(path, model, memory, K) -> tuple[list, torch.Tensor]:
    """Return the best tokens of each utterance and their scores (B,)."""
    if path == "step by step":
        limits = {"minimum_share": 1.0, "maximum_share": 0.0, "maximum_extra": STEPS - 1}
        config = DecodingConfig(beam=K, beam_threshold=0.0, length_penalty=0.0, **limits)
        hypotheses = beam_search(model, memory, config, backend="cpp", capture=False)
        return [h[0].text_tokens for h in hypotheses], torch.tensor([h[0].score for h in hypotheses])
    limit = torch.full_like(memory.lengths, STEPS - 1)
    steps = speller_search(
        model.speller.weights(), *memory[:3], beam=K, sos=SOS, eos=EOS, minimum=limit, maximum=limit,
        precision=PATHS[path], backend=path.split()[0],
    )  # fmt: skip
    return beam_backtrack(*steps, eos=EOS).tokens[:, 0, : STEPS - 1].tolist(), steps.scores[-1, :, 0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_speller_search(measure, shape, path):
    if reason := backends.unavailable("speller_search", "reference" if path == "reference" else "cpp"):
        pytest.skip(reason)
    sizes = SHAPES[shape]
    model, memory = make(*sizes)
    with torch.inference_mode():
        tokens, scores = search(path, model, memory, sizes[1])
        expected = search("reference", model, memory, sizes[1])
    torch.testing.assert_close(scores, expected[1], rtol=1e-5 if PATHS[path] == "fp32" else 1e-2, atol=0.0)
    assert tokens == expected[0] or PATHS[path] != "fp32"
    measure(
        lambda: search(path, model, memory, sizes[1]),
        op="speller_search",
        backend=path,
        shape=" ".join(f"{letter}{size}" for letter, size in zip("BKTVHD", sizes, strict=True)) + f" L{STEPS}",
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[PATHS[path]],
    )
