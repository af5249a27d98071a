from dataclasses import replace

import numpy as np
import pytest
import torch
from automata import PlainAutomaton, random_model
from calls import call, compile_and_count, ops_called, threads

from las_fast.ops import NgramModel, backends, ngram_scores, ngram_start, table_model

# (V, order): vocabularies below, at and above the 32 tokens of a mask, and of several masks
SIZES = [(4, 1), (4, 3), (31, 2), (31, 6), (31, 12), (32, 3), (33, 3), (64, 2), (65, 3), (257, 3)]


def inputs(model, B=3, K=4, seed=0):
    """States, parents and tokens."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randint(0, len(model.rows), (B, K), generator=generator)
    parents = torch.randint(0, K, (B, K), generator=generator)
    return states, parents, torch.randint(0, model.vocabulary_size, (B, K), generator=generator)


def scores(model, states, parents=None, tokens=None, *, backend):
    device = backends.DEVICES.get(backend, "cpu")
    return call(ngram_scores, model.to(device), states, parents=parents, tokens=tokens, backend=backend)


def same_bits(a, b):
    return torch.equal(a.states, b.states) and torch.equal(a.log_probs.view(torch.int32), b.log_probs.view(torch.int32))


@pytest.mark.parametrize(("V", "order"), SIZES)
def test_states_and_log_probs_follow_the_definition_to_the_bit(backend, V, order):
    model = random_model(V, order)
    plain, (states, parents, tokens) = PlainAutomaton(model), inputs(model)
    actual = scores(model, states, parents, tokens, backend=backend)
    for b in range(3):
        for k in range(4):
            state = plain.after([int(tokens[b, k])], int(states[b, parents[b, k]]))
            assert int(actual.states[b, k]) == state
            expected = plain.log_probs(state)
            assert actual.log_probs[b, k].numpy().view(np.int32).tolist() == expected.view(np.int32).tolist()


@pytest.mark.parametrize(("V", "order"), SIZES)
@pytest.mark.parametrize(("B", "K"), [(1, 1), (2, 5), (7, 13)])
def test_every_backend_equals_the_reference_to_the_bit(backend, V, order, B, K):
    model = random_model(V, order, seed=1, sentences=60, prune=2)
    for seed in range(3):
        step = inputs(model, B, K, seed)
        assert same_bits(scores(model, *step, backend=backend), scores(model, *step, backend="reference"))


def test_without_tokens_the_states_stay(backend):
    model = random_model(31, 4)
    states, parents, tokens = inputs(model)
    actual = scores(model, states, backend=backend)
    assert torch.equal(actual.states, states)
    moved = scores(model, states, parents, tokens, backend=backend)
    assert same_bits(scores(model, moved.states, backend=backend), moved)


def test_a_search_begins_in_the_start_state(backend):
    model = random_model(12, 3)
    device = backends.DEVICES.get(backend, "cpu")
    first = ngram_start(model.to(device), 2, 3, backend=backend)
    assert model.start > 0 and first.states.tolist() == [[model.start] * 3] * 2
    assert first.log_probs.shape == (2, 3, 12)
    expected = torch.from_numpy(PlainAutomaton(model).log_probs(model.start))
    assert torch.equal(first.log_probs.cpu(), expected.expand(2, 3, 12))


@pytest.mark.parametrize(("V", "order"), [(1, 1), (2, 1), (5, 3), (31, 2), (40, 2)])
def test_a_table_is_a_model_whose_states_are_the_last_tokens(backend, V, order):
    table = torch.randn(V ** (order - 1), V, generator=torch.Generator().manual_seed(2))
    model = table_model(table, min(1, V - 1))
    assert (model.order, model.vocabulary_size) == (order, V)
    assert model.start == sum(min(1, V - 1) * V**i for i in range(order - 1))
    states, parents, tokens = inputs(model)
    actual = scores(model, states, parents, tokens, backend=backend)
    expected = (states.gather(1, parents) * V + tokens) % len(table)
    assert torch.equal(actual.states, expected) and torch.equal(actual.log_probs, table[expected])


@pytest.mark.parametrize("table", [torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(3, 3).double()])
def test_a_table_with_other_rows_is_refused(table):
    with pytest.raises(ValueError, match=r"a table must be \(\d \*\* n, \d\) float32; got"):
        table_model(table, 0)


@pytest.mark.parametrize(("V", "token"), [(31, 2), (33, 32), (70, 2), (70, 40)])
def test_a_value_is_added_to_all_tokens_but_one(V, token):
    model = random_model(V, 3)
    every_state = torch.arange(len(model.rows))[:, None]
    before = scores(model, every_state, backend="reference").log_probs
    after = scores(model.add_to_all_but(token, 0.75), every_state, backend="reference").log_probs
    expected = before + 0.75
    expected[..., token] = before[..., token]
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=2e-6)
    assert torch.equal(after[..., token], before[..., token])
    assert torch.equal(scores(model, every_state, backend="reference").log_probs, before), "the model is unchanged"


def test_inputs_need_not_be_contiguous(backend):
    model = random_model(31, 4)
    step = inputs(model, 5, 5)
    strided = [x.t().contiguous().t() for x in step]
    spread = replace(model, rows=torch.stack((model.rows, model.rows), 1)[:, 0], arcs=model.arcs.t().contiguous().t())
    assert not strided[0].is_contiguous() and not spread.rows.is_contiguous() and not spread.arcs.is_contiguous()
    assert same_bits(scores(spread, *strided, backend=backend), scores(model, *step, backend="reference"))


@pytest.mark.parametrize(("B", "K"), [(0, 3), (2, 0)])
def test_an_empty_batch_has_empty_results(backend, B, K):
    empty = torch.zeros(B, K, dtype=torch.int64)
    actual = scores(random_model(9, 2), empty, empty, empty, backend=backend)
    assert actual.states.shape == (B, K) and actual.log_probs.shape == (B, K, 9)


def test_the_fast_backend_is_one_op(cpp):
    model = random_model(31, 3)
    states, parents, tokens = inputs(model)
    names = ops_called(lambda: ngram_scores(model, states, parents=parents, tokens=tokens))
    assert names == ["las_fast::ngram_scores_cpp"]


def test_the_first_scores_are_of_the_backend_that_is_named():
    names = ops_called(lambda: ngram_start(random_model(9, 2), 1, 2, backend="reference"))
    assert names and "las_fast::ngram_scores_cpp" not in names


def test_the_registered_op_passes_opcheck(cpp):
    model = random_model(9, 3)
    states, parents, tokens = inputs(model)
    for step in ((None, None), (parents, tokens)):
        arguments = (model.rows, model.arcs, 9, 3, states, *step)
        torch.library.opcheck(torch.ops.las_fast.ngram_scores_cpp.default, arguments)


def test_any_number_of_threads_gives_the_same_bits(cpp):
    model = random_model(31, 5)
    step = inputs(model, 64, 16)
    with threads(1):
        alone = scores(model, *step, backend=cpp)
    with threads(3):
        assert same_bits(scores(model, *step, backend=cpp), alone)


def test_it_compiles_without_a_graph_break(cpp):
    model = random_model(31, 3)
    step = inputs(model)
    function, graphs = compile_and_count(
        lambda rows, arcs, s, p, t: ngram_scores(replace(model, rows=rows, arcs=arcs), s, parents=p, tokens=t)
    )
    actual = function(model.rows, model.arcs, *step)
    assert len(graphs) == 1 and same_bits(actual, scores(model, *step, backend="reference"))


def test_wrong_arguments_are_errors():
    model = random_model(31, 2)
    states, parents, tokens = inputs(model)
    good = {"parents": parents, "tokens": tokens}
    for changes, message in (
        ({"states": states.int()}, r"states must be \(B, K\) int64; got \(3, 4\) torch.int32"),
        ({"states": states[0]}, r"states must be \(B, K\) int64; got \(4,\)"),
        ({"parents": None}, "parents and tokens must be given together"),
        ({"parents": parents[:2]}, r"parents must be \(3, 4\) int64 like states; got \(2, 4\)"),
        ({"tokens": tokens.int()}, r"tokens must be \(3, 4\) int64 like states; got \(3, 4\) torch.int32"),
        ({"tokens": tokens.to("meta")}, "tokens must be on cpu like states; got meta"),
        ({"model": replace(model, rows=model.rows.long())}, r"model.rows must be \(N, 4\) int32; got .* torch.int64"),
        ({"model": replace(model, vocabulary_size=33)}, r"model.rows must be \(N, 6\) int32; got"),
        ({"model": replace(model, arcs=model.arcs[:0])}, r"model.arcs must be \(N, 2\) int32; got \(0, 2\)"),
        ({"model": model.to("meta")}, "model.rows must be on cpu like states; got meta"),
    ):
        arguments = {"model": model, "states": states, **good, **changes}
        with pytest.raises(ValueError, match=message):
            ngram_scores(arguments.pop("model"), arguments.pop("states"), **arguments)


@pytest.mark.parametrize("name", ["states", "parents", "tokens"])
@pytest.mark.parametrize("value", [-1, 10**9])
def test_values_out_of_range_are_errors_in_cpp(cpp, name, value):
    model = random_model(31, 2)
    arguments = dict(zip(("states", "parents", "tokens"), inputs(model), strict=True))
    arguments[name][1, 2] = value
    with pytest.raises(RuntimeError, match=f"{name} must be from 0 to .*; got {value}"):
        ngram_scores(model, arguments.pop("states"), **arguments, backend=cpp)


def test_a_model_moves_as_a_whole():
    model = random_model(31, 2)
    moved = model.to("meta")
    assert isinstance(moved, NgramModel) and moved.rows.is_meta and moved.arcs.is_meta
    assert (moved.order, moved.start, moved.vocabulary_size) == (model.order, model.start, 31)
