"""Benchmark ctc_loss with its gradient, and the alignment of tokens to frames, against torch's ctc_loss."""

import pytest
import torch

from las_fast import ops
from las_fast.ops import backends, ctc_loss

SHAPES = {  # (B, T, V, S) with about 13 characters per second
    "batch": (9, 158, 31, 73),
    "large batch": (31, 312, 31, 150),
    "long": (1, 3000, 31, 1400),
    "word pieces": (9, 158, 1000, 20),
}


def make(B, T, V, S):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(B, T, V, generator=generator)
    lengths = torch.randint(4 * T // 5, T + 1, (B,), generator=generator)
    tokens = torch.randint(1, V, (B, S), generator=generator)
    return logits, lengths, tokens, torch.randint(4 * S // 5, S + 1, (B,), generator=generator)


def loss_and_gradient(logits, *rest, backend):
    leaf = logits.detach().requires_grad_()
    losses = ctc_loss(leaf, *rest, backend=backend)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), leaf)]


def token_times(*inputs, backend):
    return [ops.ctc_token_times(*inputs, backend=backend)]


TASKS = {"ctc loss and gradient": loss_and_gradient, "ctc token times": token_times}


@pytest.mark.parametrize("what", TASKS)
@pytest.mark.parametrize("name", SHAPES)
def test_ctc_loss(compare, name, what):
    if reason := backends.unavailable("ctc_loss", "cpp"):
        pytest.skip(reason)
    sizes = SHAPES[name]
    inputs = make(*sizes)
    runs = {path: lambda path=path: TASKS[what](*inputs, backend=path) for path in ("reference", "cpp")}
    exact = TASKS[what](inputs[0].double(), *inputs[1:], backend="reference")
    for actual, expected in zip(runs["cpp"](), exact, strict=True):
        torch.testing.assert_close(actual, expected.float(), atol=1e-3, rtol=1e-5)
    compare(
        "ctc",
        runs,
        what=what,
        shape=" ".join(f"{letter}{size}" for letter, size in zip("BTVS", sizes, strict=True)),
        dtypes=dict.fromkeys(runs, "float32"),
        baseline="reference",
        rounds=15,
        per=1e-3,
        unit="ms",
    )
