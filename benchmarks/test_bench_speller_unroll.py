"""The decoder pass of a training step, forward and backward, from the listener's output on.

Sizes are those of preset speech13h on the batch of test_bench_train.py. Paths: the loop of plain.py, and the op's
backends in Speller.forward.
"""

import pytest
import torch

from benchmarks.plain import Plain
from benchmarks.test_bench_train import dtype_of, preset
from las_fast import checkpoint
from las_fast.model.las import LAS
from las_fast.ops import backends

B, U, T = 31, 73, 79
PATHS = {  # backend, None: the plain loop; precision
    "plain": (None, "fp32"),
    "plain bf16": (None, "bf16"),
    "reference": ("reference", "fp32"),
    "fused": ("fused", "fp32"),
    "fused bf16": ("fused", "bf16"),
    "cpp": ("cpp", "fp32"),
    "cpp bf16": ("cpp", "bf16"),
}
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}  # relative, of logits and of the gradient of the listener's output


def decoder(model: LAS, backend: str | None):
    """Return the module to train, and what takes (listened, lengths, tokens) to logits and attention weights."""
    if backend is None:
        plain = Plain(model)
        return plain, plain.spell
    speller = model.speller
    return speller, lambda x, lengths, tokens: speller(speller.attention.remember(x, lengths), tokens, backend=backend)


def make_pass(path: str, model: LAS, training: bool):
    """Return a function that takes one pass forward and backward and returns logits and the gradient of its input."""
    backend, precision = PATHS[path]
    module, spell = decoder(model, backend)
    module.train(training)
    generator = torch.Generator().manual_seed(0)
    size = model.speller.attention.key.in_features
    listened = torch.randn(B, T, size, generator=generator).requires_grad_()
    tokens = torch.randint(3, 31, (B, U), generator=generator)
    lengths = torch.linspace(5 * T // 6, T, B).long()
    factors = torch.randn(B, U, 31, generator=generator), torch.randn(B, U, T, generator=generator)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        module.zero_grad(set_to_none=True)
        listened.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found = spell(listened, lengths, tokens)
        sum((x * factor).sum() for x, factor in zip(found, factors, strict=True)).backward()
        return found[0].detach(), listened.grad

    return run


def test_speller_unroll(compare):
    if reason := backends.unavailable("speller_unroll", "cpp"):
        pytest.skip(reason)
    torch.manual_seed(0)
    model = checkpoint.build_model(preset())
    expected = make_pass("plain", model, training=False)()
    for path, (_, precision) in PATHS.items():
        for a, b in zip(make_pass(path, model, training=False)(), expected, strict=True):
            assert (a - b).norm() <= TOLERANCES[precision] * b.norm(), path
    compare(
        "train",
        {path: make_pass(path, model, training=True) for path in PATHS},
        what="decoder pass of a training step",
        shape=f"B{B} U{U} T{T}",
        dtypes={path: dtype_of(path) for path in PATHS},
        baseline="plain",
        per=1e-3,
        unit="ms",
    )
