"""One step of CTC prefix scores in the middle of a search, beside the recursion as it is usually written."""

import pytest
import torch

from las_fast.ops import CtcState, backends, ctc_log_probabilities, ctc_prefix, ctc_start

EOS = 2
SHAPES = {
    "batch": (16, 8, 200, 31),
    "one utterance": (1, 8, 200, 31),
    "long": (1, 8, 400, 31),
    "word pieces": (1, 8, 200, 1000),
}


def make(B, K, T, V):
    """Frames, and a step after three others."""
    generator = torch.Generator().manual_seed(0)
    frames = ctc_log_probabilities(2 * torch.randn(B, T, V, generator=generator), torch.full((B,), T))
    state, tokens = ctc_start(frames, K, eos=EOS), torch.full((B, K), EOS)
    for _ in range(3):
        parents, chosen = (torch.randint(low, n, (B, K), generator=generator) for low, n in ((0, K), (3, V)))
        before = frames, state, tokens, parents, chosen
        state, tokens = ctc_prefix(*before, eos=EOS, backend="reference"), chosen
    return before


def usual(frames, state, tokens, parents, chosen):
    """Two numbers a frame for each of all continuations, as in most toolkits; of which the chosen are kept."""
    B, K, V = state.gains.shape
    last = tokens.gather(1, parents)
    alphas = state.alphas.gather(1, parents[..., None].expand(-1, -1, state.alphas.shape[2]))
    ended = torch.nn.functional.pad(alphas[..., :-1] + frames[:, None, :, 0], (1, 0), value=-torch.inf)
    is_last = torch.arange(V) == last[..., None]
    newest = other = psi = frames.new_full((B, K, V), -torch.inf)
    kept = [other[..., 0]]
    for t in range(frames.shape[1]):
        begun = torch.where(is_last, ended[..., t, None], alphas[..., t, None])
        label = frames[:, None, t]
        psi = torch.logaddexp(psi, begun + label)
        newest, other = torch.logaddexp(newest, begun) + label, torch.logaddexp(newest, other) + frames[:, None, t, :1]
        kept.append(torch.logaddexp(newest, other).gather(2, chosen[..., None])[..., 0])
    return torch.stack(kept, -1), psi.gather(2, chosen[..., None])[..., 0]


@pytest.mark.parametrize("path", ["reference", "cpp", "usual"])
@pytest.mark.parametrize("name", SHAPES)
def test_ctc_prefix(measure, name, path):
    if path in backends.BACKENDS and (reason := backends.unavailable("ctc_prefix", path)):
        pytest.skip(reason)
    given = make(*SHAPES[name])

    def run(backend=path):
        return usual(*given) if backend == "usual" else ctc_prefix(*given, eos=EOS, backend=backend)

    for x, y in zip(run(), CtcState(*run("reference")), strict=False):
        torch.testing.assert_close(x, y, atol=5e-5, rtol=2e-6)
    shape = " ".join(f"{letter}{size}" for letter, size in zip("BKTV", SHAPES[name], strict=True))
    measure(run, op="ctc_prefix", backend=path, shape=shape, dtype=torch.float32)
