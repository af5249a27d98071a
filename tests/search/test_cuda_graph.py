"""Graphed chunks on a CPU: a fake CUDA graph calls the captured function again at each replay."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from toy_model import ToyModel, config, memory

from las_fast.config import ListenerConfig, ModelConfig, SpellerConfig
from las_fast.data.batch_plan import sorted_batches
from las_fast.model.las import LAS
from las_fast.ops import table_model
from las_fast.search import cuda_graph
from las_fast.search.beam import beam_search
from las_fast.search.cuda_graph import bucket
from las_fast.text import EOS, SOS


class FakeCudaGraph:
    """Like a CUDA graph, it writes the results of each replay into the tensors of the capture."""

    made: list[FakeCudaGraph] = []

    def __init__(self):
        self.replays = 0
        self.made.append(self)

    def capture(self, function):
        self.function = function
        self.results = function()  # a capture computes nothing, so its results must not be used
        for result in tensors(self.results):
            result.fill_(True if result.dtype == torch.bool else 77)
        return self.results

    def replay(self):
        self.replays += 1
        for old, new in zip(tensors(self.results), tensors(self.function()), strict=True):
            old.copy_(new)


def tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """A list of the graphs that the test has captured."""
    cuda_graph.clear_graphs()
    monkeypatch.setattr(cuda_graph, "CudaGraph", FakeCudaGraph)
    monkeypatch.setattr(FakeCudaGraph, "made", [])
    yield FakeCudaGraph.made
    cuda_graph.clear_graphs()


@pytest.fixture
def model():
    torch.manual_seed(0)
    speller = SpellerConfig(key_size=7, value_size=5, embedding_size=6, lstm_sizes=(8, 9))
    sizes = ModelConfig(ListenerConfig((8,), (3,), (2,), 6, 2), speller, ctc_layer=1)
    return LAS(sizes, input_size=4, vocabulary_size=9).eval()


def encode(model, lengths):
    with torch.inference_mode():
        return model.listen(torch.randn(len(lengths), max(lengths), 4), torch.tensor(lengths))


def assert_same(actual, expected):
    for ours, theirs in zip(sum(actual, []), sum(expected, []), strict=True):
        assert ours.text_tokens == theirs.text_tokens and ours.attended_frames == theirs.attended_frames
        assert ours.finished == theirs.finished
        assert ours.score == pytest.approx(theirs.score, abs=1e-4)
        assert ours.token_scores == pytest.approx(theirs.token_scores, abs=1e-4)


SETTINGS = [
    {},
    {"beam": 1},
    {"length_penalty": 1.0, "minimum_share": 0.1, "eos_threshold": 0.05},
    {"coverage_weight": 0.1},
    {"ngram_weight": 0.4},
    {"ctc_weight": 0.4},
    {"precision": "bf16"},
]


@pytest.mark.parametrize("fields", SETTINGS, ids=lambda fields: "-".join(fields) or "plain")
def test_a_search_by_cuda_graph_equals_a_search_by_steps(fields, model, graphs):
    torch.manual_seed(1)
    bigrams = table_model(torch.randn(9, 9).log_softmax(-1), SOS)
    options = {"nbest": 4, "ngram": bigrams if "ngram_weight" in fields else None}
    searches = [
        (ToyModel(9), memory([3, 1, 4, 1, 5], [9, 2, 25, 14, 1])),
        (model, encode(model, [120, 40, 77])),
        (model, encode(model, [8])),
    ]
    # the fake model has no CTC head, and no weights to convert
    searches = searches["ctc_weight" in fields or "precision" in fields :]
    for searched, encoded in searches:
        expected = beam_search(searched, encoded, config(**fields), capture=False, **options)
        assert_same(beam_search(searched, encoded, config(**fields), capture=True, **options), expected)
    assert len(graphs) == len(searches) and all(graph.replays for graph in graphs)


def test_a_replayed_graph_has_no_state_from_the_previous_search(model, graphs):
    first, second, third = encode(model, [120, 90, 77]), encode(model, [101, 99, 15, 60]), encode(model, [30, 90, 9])
    expected = [beam_search(model, encoded, config(), nbest=4, capture=False) for encoded in (first, second, third)]
    for encoded, plain in zip((first, second, third, first), (*expected, expected[0]), strict=True):
        assert_same(beam_search(model, encoded, config(), nbest=4, capture=True), plain)
    assert len(graphs) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_reads_updated_weights_and_moved_weights_need_a_new_graph(precision, model, graphs):
    settings = config(precision=precision)

    def assert_captured_equals_steps(encoded):
        by_steps = beam_search(model, encoded, settings, capture=False)
        assert_same(beam_search(model, encoded, settings, capture=True), by_steps)

    encoded = encode(model, [120, 90])
    beam_search(model, encoded, settings, capture=True)
    with torch.no_grad():
        model.speller.project.weight.mul_(-2)
    assert_captured_equals_steps(encoded)
    assert len(graphs) == 1
    model.speller.project.weight = torch.nn.Parameter(model.speller.project.weight * -0.7)
    assert_captured_equals_steps(encoded)
    assert len(graphs) == 2


def test_other_settings_need_another_graph(graphs):
    searched, encoded = ToyModel(9), memory([1, 2], [9, 7])
    for fields in ({}, {"beam": 2}, {"length_penalty": 0.5}, {}):
        beam_search(searched, encoded, config(**fields), capture=True)
    beam_search(searched, encoded, config(), capture=True, backend="reference")
    assert len(graphs) == 4


def test_another_language_model_needs_another_graph(graphs):
    searched, encoded = ToyModel(9), memory([1, 2], [9, 7])
    tables = [torch.randn(9, 9, generator=torch.Generator().manual_seed(seed)).log_softmax(-1) for seed in (1, 2)]
    models = [table_model(table, SOS) for table in tables]
    options = {"nbest": 4, "capture": True}
    settings = config(ngram_weight=0.5)
    actual = [beam_search(searched, encoded, settings, ngram=bigrams, **options) for bigrams in (*models, *models)]
    assert len(graphs) == 2 and actual[:2] == actual[2:] and actual[0] != actual[1]


def test_another_matmul_precision_needs_another_graph(graphs):
    searched, encoded = ToyModel(9), memory([1, 2], [9, 7])
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            beam_search(searched, encoded, config(), capture=True)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(graphs) == 2


def test_the_least_recently_used_graph_is_dropped(graphs, monkeypatch):
    monkeypatch.setattr(cuda_graph, "MAX_GRAPHS", 4)
    searched = ToyModel(9)
    for size in (1, 2, 4, 8, 1, 16, 1):
        beam_search(searched, memory([1] * size, [9] * size), config(), capture=True)
    assert len(graphs) == 5


def test_only_the_last_few_graphs_are_kept(graphs, monkeypatch):
    monkeypatch.setattr(cuda_graph, "MAX_GRAPHS", 4)
    searched = ToyModel(9)
    sizes = [1, 2, 4, 8, 16]
    for size in (*sizes, 16, 8, 1):  # the smallest has been dropped by then
        beam_search(searched, memory([1] * size, [9] * size), config(), capture=True)
    assert len(graphs) == len(sizes) + 1 and len(cuda_graph._graphs[searched]) == cuda_graph.MAX_GRAPHS


def test_the_search_does_not_wait_for_utterances_added_as_padding(graphs):
    class EndsAtOnce(ToyModel):
        """Ends an utterance at once, unless its seed is 0 as in padding."""

        def step(self, tokens, state, memory, **options):
            logits, attended, state = super().step(tokens, state, memory, **options)
            logits[..., EOS] += torch.where(memory.seeds == 0, -50.0, 50.0)[:, None]
            return logits, attended, state

    beam_search(EndsAtOnce(), memory([1, 2, 3], [9, 9, 9]), config(beam=1, maximum_extra=50), capture=True)
    assert graphs[0].replays == 1


def test_graphs_are_freed_with_their_model_and_by_clear_graphs(monkeypatch, graphs):
    class FakeCudaGraphWithoutFunction(FakeCudaGraph):
        def capture(self, function):  # a CUDA graph does not hold the function
            return function()

        def replay(self):
            pass

    monkeypatch.setattr(cuda_graph, "CudaGraph", FakeCudaGraphWithoutFunction)
    searched = ToyModel(9)
    beam_search(searched, memory([1], [9]), config(), capture=True)
    graph, gone = weakref.ref(cuda_graph._graphs[searched].popitem()[1]), weakref.ref(searched)
    assert graph() is None
    beam_search(searched, memory([1], [9]), config(), capture=True)
    graph = weakref.ref(next(iter(cuda_graph._graphs[searched].values())))
    del searched
    gc.collect()
    assert gone() is None and graph() is None
    other = ToyModel(9)
    beam_search(other, memory([1], [9]), config(), capture=True)
    cuda_graph.clear_graphs()
    assert other not in cuda_graph._graphs


def test_on_a_cpu_nothing_is_captured_by_default(graphs):
    beam_search(ToyModel(9), memory([1], [9]), config())
    assert not graphs


def test_sizes_are_rounded_up_to_few_values():
    assert [bucket(batch, 1)[0] for batch in (1, 2, 3, 8, 9, 128)] == [1, 2, 4, 8, 16, 128]
    assert [bucket(1, frames)[1] for frames in (1, 64, 65, 640)] == [64, 64, 128, 640]


@pytest.mark.parametrize("time_reduction", [4, 8])
def test_all_sizes_of_a_sorted_test_set_keep_their_graphs(time_reduction):
    """Otherwise each pass over it captures all of them again. The lengths are like those of LibriSpeech's dev-clean."""
    seconds = np.random.default_rng(0).lognormal(np.log(6.0), 0.62, 2703).clip(1.4, 32.6)
    counts = (100 * seconds).astype(int)
    batches = sorted_batches(counts, frames_per_batch=30000, utterances_per_batch=128)
    sizes = {bucket(len(batch), -(-int(counts[batch].max()) // time_reduction)) for batch in batches}
    assert 8 < len(sizes) <= cuda_graph.MAX_GRAPHS


def test_padding_a_memory_does_not_change_results(model):
    encoded = encode(model, [120, 40, 77])
    padded = encoded.padded(4, 64)
    assert [tuple(x.shape) for x in padded[:4]] == [(4, 64, 7), (4, 64, 5), (4,), (4, 64)]
    assert padded.ctc_logits.shape == (4, 128, 9) and padded.ctc_lengths.tolist() == [30, 10, 20, 0]
    tokens = torch.full((4, 2), 3)
    with torch.inference_mode():
        logits, attended, after = model.step(tokens, model.start(padded, 2), padded, weights=True)
        expected, plain, _ = model.step(tokens[:3], model.start(encoded, 2), encoded, weights=True)
    torch.testing.assert_close(logits[:3], expected)
    torch.testing.assert_close(attended.weights[:3, :, : encoded.keys.shape[1]], plain.weights)
    assert padded.lengths[3] == 0 and padded.padding[3].all()
    assert (attended.weights[3] == 0).all() and (after.context[3] == 0).all()
