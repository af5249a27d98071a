"""Benchmark speller_unroll: the decoder's forward and backward pass in a training step.

Model and batch sizes are those of preset speech13h in test_bench_train.py. Paths: the loop of plain.py, and the
backends of the op in Speller.forward.
"""

import pytest
import torch

from benchmarks.plain import Plain
from benchmarks.test_bench_train import preset
from benchmarks.training_paths import dtype_of
from las_fast import checkpoint
from las_fast.model.las import LAS
from las_fast.ops import backends

B, U, T = 31, 73, 79
PATHS = {  # backend (None: the loop of plain.py), precision
    "plain": (None, "fp32"),
    "plain bf16": (None, "bf16"),
    "reference": ("reference", "fp32"),
    "fused": ("fused", "fp32"),
    "fused bf16": ("fused", "bf16"),
    "cpp": ("cpp", "fp32"),
    "cpp bf16": ("cpp", "bf16"),
}
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}  # relative, of logits and of the gradient with respect to the encoder output


def decoder(model: LAS, backend: str | None):
    """Return the module and a function (listened, lengths, tokens) -> (logits, attention weights)."""
    if backend is None:
        plain = Plain(model)
        return plain, plain.spell
    speller = model.speller
    project = speller.attention.project_memory
    return speller, lambda x, lengths, tokens: speller(project(x, lengths), tokens, backend=backend)


def make_pass(path: str, model: LAS, training: bool):
    """Return a function that runs forward and backward, and returns the logits and the gradient of the input."""
    backend, precision = PATHS[path]
    module, spell = decoder(model, backend)
    module.train(training)
    generator = torch.Generator().manual_seed(0)
    size = model.speller.attention.key.in_features
    listened = torch.randn(B, T, size, generator=generator).requires_grad_()
    tokens = torch.randint(3, 31, (B, U), generator=generator)
    lengths = torch.linspace(5 * T // 6, T, B).long()
    cotangents = torch.randn(B, U, 31, generator=generator), torch.randn(B, U, T, generator=generator)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        module.zero_grad(set_to_none=True)
        listened.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            outputs = spell(listened, lengths, tokens)
        sum((x * cotangent).sum() for x, cotangent in zip(outputs, cotangents, strict=True)).backward()
        return outputs[0].detach(), listened.grad

    return run


def test_speller_unroll(compare):
    if reason := backends.unavailable("speller_unroll", "cpp"):
        pytest.skip(reason)
    torch.manual_seed(0)
    model = checkpoint.build_model(preset())
    expected = make_pass("plain", model, training=False)()
    for path, (_, precision) in PATHS.items():
        for x, y in zip(make_pass(path, model, training=False)(), expected, strict=True):
            assert (x - y).norm() <= TOLERANCES[precision] * y.norm(), path
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
