"""The speller: teacher forcing, locked dropout, shared memory, gradients."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from las_fast.config import SpellerConfig
from las_fast.model.attention import Memory
from las_fast.model.speller import Speller, SpellerState
from las_fast.ops import padding_mask, speller_unroll
from las_fast.text import PAD, SOS

SMALL = SpellerConfig(key_size=7, value_size=5, embedding_size=6, lstm_sizes=(8, 9), dropout=0.0)


def make_memory(speller, lengths=(6, 3), seed=0):
    torch.manual_seed(seed)
    lengths = torch.tensor(lengths)
    return speller.attention.project_memory(torch.randn(len(lengths), int(lengths.max()), 10), lengths)


@pytest.fixture
def speller():
    torch.manual_seed(1)
    return Speller(SMALL, 10, 31)


def spell_step_by_step(speller, memory, tokens):
    state, before, logits, weights = speller.start(memory), torch.full((len(tokens), 1), SOS), [], []
    for u in range(tokens.shape[1]):
        step_logits, attended, state = speller.step(before, state, memory, weights=True)
        logits.append(step_logits)
        weights.append(attended.weights)
        before = tokens[:, u : u + 1]
    return torch.cat(logits, 1), torch.cat(weights, 1)


def test_training_pass_equals_the_plain_loop_in_value_and_every_gradient(speller):
    tokens = torch.randint(3, 31, (2, 5))
    results = []
    for spell in (speller, lambda memory, tokens: spell_step_by_step(speller, memory, tokens)):
        speller.zero_grad()
        leaf = make_memory(speller)
        keys, values = leaf.keys.detach().requires_grad_(), leaf.values.detach().requires_grad_()
        memory = Memory(keys, values, leaf.lengths, leaf.padding)
        logits, weights = spell(memory, tokens)
        torch.manual_seed(3)
        ((logits * torch.randn(logits.shape)).sum() + (weights * torch.randn(weights.shape)).sum() * 9).backward()
        gradients = {name: p.grad.clone() for name, p in speller.named_parameters() if p.grad is not None}
        results.append((logits, weights, keys.grad, values.grad, gradients))
    for ours, theirs in zip(*(r[:4] for r in results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert results[0][4].keys() == results[1][4].keys() >= {"cells.0.gates.weight", "attention.query.bias"}
    for name, gradient in results[1][4].items():
        torch.testing.assert_close(results[0][4][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("steps", [1, 20])
def test_weight_gradients_are_computed_once_and_not_once_per_step(speller, steps):
    logits, _ = speller(make_memory(speller), torch.randint(3, 31, (2, steps)), backend="fused")
    with torch.profiler.profile() as profile:
        logits.sum().backward()
    counts = {e.key: e.count for e in profile.key_averages()}
    assert counts["_LinearOffsetsBackward"] == 3  # two cells and the query
    assert counts["_AttentionOffsetsBackward"] == 1


def test_full_teacher_forcing_feeds_only_true_tokens(speller):
    memory, tokens = make_memory(speller), torch.randint(3, 31, (2, 5))
    torch.testing.assert_close(speller(memory, tokens, 1.0)[0], spell_step_by_step(speller, memory, tokens)[0])


def test_without_teacher_forcing_the_best_token_is_fed_back(speller):
    memory, tokens = make_memory(speller), torch.randint(3, 31, (2, 5))
    logits, _ = speller(memory, tokens, 0.0)
    predicted = logits.argmax(-1)
    expected = spell_step_by_step(speller, memory, torch.cat((predicted[:, :-1], tokens[:, -1:]), 1))[0]
    torch.testing.assert_close(logits, expected)


@pytest.fixture
def unrolled(monkeypatch):
    """The arguments of the last call of ops.speller_unroll."""
    seen = {}

    def record(weights, keys, values, lengths, tokens, sampled, masks, **options):
        seen.update(tokens=tokens, sampled=sampled, masks=masks)
        return speller_unroll(weights, keys, values, lengths, tokens, sampled, masks, **options)

    monkeypatch.setattr("las_fast.model.speller.speller_unroll", record)
    return seen


def test_sampling_is_decided_for_each_utterance_and_step(speller, unrolled):
    speller(make_memory(speller, lengths=[4] * 64), torch.full((64, 41), 3), 0.7)
    assert torch.equal(unrolled["tokens"], F.pad(torch.full((64, 40), 3), (1, 0), value=SOS))
    sampled = unrolled["sampled"][:, 1:]
    assert 0.25 < sampled.float().mean() < 0.35
    assert sampled.any(0).all() and sampled.any(1).all() and not sampled.all(0).any() and not sampled.all(1).any()


def test_sampling_changes_no_target_and_keeps_gradients():
    torch.manual_seed(0)
    speller = Speller(SMALL, 10, 31)
    tokens = torch.randint(3, 31, (2, 5))
    before = tokens.clone()
    speller(make_memory(speller), tokens, 0.5)[0].sum().backward()
    assert torch.equal(tokens, before)
    assert speller.embedding.weight.grad.isfinite().all()


def test_pad_and_sos_are_never_emitted(speller):
    logits, _ = speller(make_memory(speller), torch.randint(3, 31, (2, 5)))
    assert (logits.softmax(-1)[..., [PAD, SOS]] == 0).all()


def test_speller_dropout_is_the_same_at_every_token_and_differs_between_utterances(unrolled):
    torch.manual_seed(0)
    speller = Speller(SpellerConfig(lstm_sizes=(64, 32), dropout=0.5), 10, 31).train()
    speller(make_memory(speller, (6, 6)), torch.randint(3, 31, (2, 4)))
    masks = unrolled["masks"]  # one mask per utterance, shared by its tokens
    assert [mask.shape for mask in masks] == [(2, 64), (2, 32)]
    assert all(set(mask.unique().tolist()) == {0.0, 2.0} and not torch.equal(*mask) for mask in masks)
    speller.eval()(make_memory(speller, (6, 6)), torch.randint(3, 31, (2, 4)))
    assert unrolled["masks"] is None


def test_fused_cells_and_precomputed_constants_change_no_result(speller, monkeypatch):
    def fused_gates(gates, others, cell, bias, other_bias):  # the gate order of torch.lstm_cell
        i, f, g, o = (gates + others + bias + other_bias).chunk(4, -1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell, gates

    monkeypatch.setattr("las_fast.model.speller.fused_gates", fused_gates)
    memory = make_memory(speller)
    actual = []
    for fuses in (False, True):
        monkeypatch.setattr(Speller, "_uses_fused_kernel", staticmethod(lambda memory, fuses=fuses: fuses))
        state, steps = speller.start(memory, 3), []
        for u in range(4):
            logits, attended, state = speller.step(torch.arange(6).view(2, 3) + 3 * u, state, memory, weights=True)
            state = state.gather(torch.tensor([[0, 0, 2], [2, 1, 0]]))
            steps += [logits, attended.weights, *state.hidden, *state.cell, state.context]
        actual.append(steps)
    assert state.constants.token_gates.shape == (31, 32)
    for plain, fused in zip(*actual, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_a_step_returns_weights_only_on_request_and_always_their_peaks(speller):
    memory = make_memory(speller)
    before, state = torch.full((2, 3), SOS), speller.start(memory, 3)
    _, bare, _ = speller.step(before, state, memory)
    _, full, _ = speller.step(before, state, memory, weights=True)
    assert bare.weights is None and full.weights.shape == (2, 3, 6)
    assert torch.equal(bare.peaks, full.peaks) and torch.equal(full.peaks, full.weights.argmax(-1))


def test_gather_gives_each_hypothesis_its_parents_state():
    numbers, constants = torch.arange(6.0).view(2, 3, 1), object()
    state = SpellerState((numbers, numbers + 10), (numbers + 20, numbers + 30), numbers + 40, constants)
    gathered = state.gather(torch.tensor([[2, 2, 0], [1, 0, 1]]))
    assert (len(gathered.hidden), len(gathered.cell)) == (2, 2) and gathered.constants is constants
    for i, part in enumerate((*gathered.hidden, *gathered.cell, gathered.context)):
        assert part.flatten().tolist() == [10 * i + k for k in (2, 2, 0, 4, 3, 4)]


def test_every_op_of_the_speller_runs_on_the_requested_backend(speller):
    memory, tokens = make_memory(speller), torch.full((2, 1), SOS)
    state = speller.start(memory)
    for run in (
        lambda: speller.step(tokens, state, memory, backend="abacus"),
        lambda: state.gather(torch.zeros(2, 1, dtype=torch.int64), backend="abacus"),
        lambda: speller(memory, tokens, backend="abacus"),
    ):
        with pytest.raises(ValueError, match="backend must be one of .*; got 'abacus'"):
            run()


def test_the_initial_state_is_zeros_for_one_hypothesis_by_default(speller):
    memory = make_memory(speller)._replace(keys=torch.zeros(2, 6, 7, dtype=torch.float16))
    for beam, state in ((1, speller.start(memory)), (3, speller.start(memory, 3))):
        assert [x.shape for x in state.hidden] == [x.shape for x in state.cell] == [(2, beam, 8), (2, beam, 9)]
        assert state.context.shape == (2, beam, 5)
        assert {x.dtype for x in (*state.hidden, *state.cell)} == {torch.float32}
        assert not any(x.any() for x in (*state.hidden, *state.cell, state.context))


def test_initial_weights_follow_the_listener_and_initial_logits_have_about_unit_variance():
    torch.manual_seed(0)
    speller = Speller(SpellerConfig(embedding_size=64, value_size=32, lstm_sizes=(48, 40), key_size=16), 10, 31)
    for cell, inputs, size in zip(speller.cells, (96, 48), (48, 40), strict=True):
        weight_ih, weight_hh = cell.gates.weight.split((inputs, size), 1)
        bound = (6 / (inputs + size)) ** 0.5
        for gate in weight_ih.split(size):
            assert 0.95 * bound < gate.abs().max() <= bound
        for gate in weight_hh.split(size):
            torch.testing.assert_close(gate @ gate.T, torch.eye(size), atol=1e-5, rtol=0)
        assert cell.gates.bias.tolist() == [0.0] * size + [1.0] * size + [0.0] * (2 * size)
    assert float(speller.embedding.weight.detach().std()) == pytest.approx(1 / 8, rel=0.05)
    assert not speller.bias.any()


def test_steps_are_fused_on_cuda_without_gradients():
    for is_cuda in (True, False):
        memory = SimpleNamespace(keys=SimpleNamespace(is_cuda=is_cuda))
        assert Speller._uses_fused_kernel(memory) is False
        with torch.no_grad():
            assert Speller._uses_fused_kernel(memory) is is_cuda


def test_a_checkpoint_holds_no_buffer_of_the_speller(speller):
    assert {name for name in speller.state_dict() if "." not in name} == {"bias"}


def test_without_teacher_forcing_every_token_is_sampled_even_for_a_draw_of_0(speller, unrolled, monkeypatch):
    monkeypatch.setattr(torch, "rand", torch.zeros)  # the smallest random number
    speller(make_memory(speller), torch.full((2, 4), 3), 0.0)
    assert unrolled["sampled"].all()
    speller(make_memory(speller), torch.full((2, 4), 3))
    assert unrolled["sampled"] is None


def test_a_speller_in_training_without_dropout_has_no_masks(speller, unrolled):
    speller.train()(make_memory(speller), torch.full((2, 4), 3))
    assert unrolled["masks"] is None


def test_fused_steps_under_autocast_keep_states_in_float32(speller, monkeypatch):
    kinds = []

    def fused_gates(gates, others, cell, bias, zeros):
        kinds.extend(x.dtype for x in (gates, others, cell))
        hidden = torch.tanh(cell)
        return hidden, cell, None

    monkeypatch.setattr("las_fast.model.speller.fused_gates", fused_gates)
    monkeypatch.setattr(Speller, "_uses_fused_kernel", staticmethod(lambda memory: True))
    memory = make_memory(speller)
    with torch.autocast("cpu", torch.bfloat16):
        speller.step(torch.full((2, 1), SOS), speller.start(memory), memory)
    assert set(kinds) == {torch.float32}


def test_the_padding_mask_is_built_once_for_all_tokens(speller, monkeypatch):
    calls = []
    monkeypatch.setattr("las_fast.model.attention.padding_mask", lambda *a: calls.append(1) or padding_mask(*a))
    # sys.modules: the op has the name of its module and hides it from a dotted path
    for op in ("masked_attention", "speller_unroll"):
        module = sys.modules[f"las_fast.ops.{op}"]
        monkeypatch.setattr(module, "padding_mask", lambda *a: calls.append(1) or padding_mask(*a))
    memory = make_memory(speller)
    speller(memory, torch.randint(3, 31, (2, 9)), backend="fused")
    assert len(calls) == 2  # one for the memory, one for the training pass


def test_bfloat16_training_pass_keeps_states_in_float32(speller):
    with torch.autocast("cpu", torch.bfloat16):
        memory = make_memory(speller)
        logits, weights = speller(memory, torch.randint(3, 31, (2, 5)))
        _, _, state = speller.step(torch.full((2, 1), SOS), speller.start(memory), memory)
    assert {x.dtype for x in (*state.cell, *state.hidden, weights)} == {torch.float32}
    logits.float().sum().backward()
    assert speller.cells[0].gates.weight.grad.isfinite().all()
