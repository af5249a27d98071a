"""Attention of one decoder step: the reference and torch's fused attention, which returns no weights."""

import pytest
import torch
from torch.nn import functional as F

from las_fast.ops import masked_attention, padding_mask

SHAPES = {"search": (16, 8, 200, 256, 256), "training": (32, 1, 200, 256, 256), "one utterance": (1, 8, 400, 256, 256)}


def make(name, dtype):
    B, K, T, D, E = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in ((B, K, D), (B, T, D), (B, T, E))]
    return *tensors, torch.linspace(T // 2, T, B).long()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("path", ["reference", "torch sdpa"])
@pytest.mark.parametrize("name", SHAPES)
def test_masked_attention(measure, name, path, dtype):
    query, keys, values, lengths = make(name, dtype)
    padding = padding_mask(lengths, keys.shape[1])
    valid = ~padding[:, None]
    paths = {
        "reference": lambda: masked_attention(
            query, keys, values, lengths, padding=padding, weights=False, backend="reference"
        )[0],
        "torch sdpa": lambda: F.scaled_dot_product_attention(query, keys, values, attn_mask=valid),
    }
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(paths[path](), paths["reference"](), atol=tolerance, rtol=tolerance)
    shape = " ".join(f"{letter}{size}" for letter, size in zip("BKTDE", SHAPES[name], strict=True))
    measure(paths[path], op="masked_attention", backend=path, shape=shape, dtype=dtype)
