"""The CTC loss of a training batch and its gradient, and where CTC hears each token, beside torch's ctc_loss."""

import pytest
import torch

from las_fast.ops import backends, ctc_loss, ctc_places

SHAPES = {  # B, T, V, S, about 13 characters a second; and how far two float32 sums of so many may lie apart
    "batch": ((9, 158, 31, 73), 1e-3),
    "large batch": ((31, 312, 31, 150), 5e-3),
    "one utterance": ((1, 158, 31, 73), 1e-3),
    "long": ((1, 3000, 31, 1400), 5e-2),
    "word pieces": ((9, 158, 1000, 20), 1e-3),
}


def made(B, T, V, S):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(B, T, V, generator=generator)
    lengths = torch.randint(4 * T // 5, T + 1, (B,), generator=generator)
    tokens = torch.randint(1, V, (B, S), generator=generator)
    return logits, lengths, tokens, torch.randint(4 * S // 5, S + 1, (B,), generator=generator)


@pytest.mark.parametrize("path", ["reference", "cpp"])
@pytest.mark.parametrize("what", ["ctc_loss", "ctc_places"])
@pytest.mark.parametrize("name", SHAPES)
def test_ctc_loss(measure, name, what, path):
    if reason := backends.unavailable("ctc_loss", path):
        pytest.skip(reason)
    sizes, close = SHAPES[name]
    logits, *rest = made(*sizes)

    def run(backend=path):
        with torch.inference_mode(False), torch.enable_grad():
            if what == "ctc_places":
                return [ctc_places(logits, *rest, backend=backend)]
            leaf = logits.detach().requires_grad_()
            losses = ctc_loss(leaf, *rest, backend=backend)
            return [losses.detach(), *torch.autograd.grad(losses.sum(), leaf)]

    for x, y in zip(run(), run("reference"), strict=True):
        torch.testing.assert_close(x, y, atol=close, rtol=1e-5)
    shape = " ".join(f"{letter}{size}" for letter, size in zip("BTVS", sizes, strict=True))
    measure(run, op=what, backend=path, shape=shape, dtype=torch.float32)
