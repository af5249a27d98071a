"""Benchmark ctc_prefix, one step of CTC prefix scoring in mid-search, against the usual recursion."""

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
    """Return the arguments of the fourth step of a search."""
    generator = torch.Generator().manual_seed(0)
    ctc_log_probs = ctc_log_probabilities(2 * torch.randn(B, T, V, generator=generator), torch.full((B,), T))
    state, tokens = ctc_start(ctc_log_probs, K, eos=EOS), torch.full((B, K), EOS)
    for _ in range(3):
        parents, chosen = (torch.randint(low, n, (B, K), generator=generator) for low, n in ((0, K), (3, V)))
        step = ctc_log_probs, state, tokens, parents, chosen
        state, tokens = ctc_prefix(*step, eos=EOS, backend="reference"), chosen
    return step


def usual(ctc_log_probs, state, tokens, parents, chosen):
    """Score every continuation with two log-probabilities per frame, as most toolkits do; return the chosen ones."""
    B, K, V = state.next_log_probs.shape
    last = tokens.gather(1, parents)
    T = ctc_log_probs.shape[1]
    before = state.forward_log_probs.gather(1, parents[..., None].expand(-1, -1, T + 1))
    ended = torch.nn.functional.pad(before[..., :-1] + ctc_log_probs[:, None, :, 0], (1, 0), value=-torch.inf)
    is_last = torch.arange(V) == last[..., None]
    with_label = with_blank = prefix = ctc_log_probs.new_full((B, K, V), -torch.inf)
    chosen_forward = [with_blank[..., 0]]
    for t in range(T):
        begun = torch.where(is_last, ended[..., t, None], before[..., t, None])
        label, blank = ctc_log_probs[:, None, t], ctc_log_probs[:, None, t, :1]
        prefix = torch.logaddexp(prefix, begun + label)
        total = torch.logaddexp(with_label, with_blank)
        with_label, with_blank = torch.logaddexp(with_label, begun) + label, total + blank
        chosen_forward.append(torch.logaddexp(with_label, with_blank).gather(2, chosen[..., None])[..., 0])
    return torch.stack(chosen_forward, -1), prefix.gather(2, chosen[..., None])[..., 0]


@pytest.mark.parametrize("path", ["reference", "cpp", "usual"])
@pytest.mark.parametrize("name", SHAPES)
def test_ctc_prefix(measure, name, path):
    if path in backends.BACKENDS and (reason := backends.unavailable("ctc_prefix", path)):
        pytest.skip(reason)
    inputs = make(*SHAPES[name])

    def run(backend=path):
        return usual(*inputs) if backend == "usual" else ctc_prefix(*inputs, eos=EOS, backend=backend)

    for actual, expected in zip(run(), CtcState(*run("reference")), strict=False):
        torch.testing.assert_close(actual, expected, atol=5e-5, rtol=2e-6)
    shape = " ".join(f"{letter}{size}" for letter, size in zip("BKTV", SHAPES[name], strict=True))
    measure(run, op="ctc_prefix", backend=path, shape=shape, dtype=torch.float32)
