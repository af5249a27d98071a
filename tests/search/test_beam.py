"""Beam and greedy search on a toy model, against brute force and plain searches; decoding of datasets."""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from an4_small import load_an4_small
from rounding import assert_equal_up_to_rounding
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_model import ToyMemory, ToyModel, V, all_texts, config, log_probability, memory

from las_fast import search
from las_fast.config import ListenerConfig, ModelConfig, SpellerConfig, load_config, presets
from las_fast.data.batch import Batch, make_loader
from las_fast.data.batch_plan import sorted_batches
from las_fast.errors import InputError
from las_fast.model.attention import Memory
from las_fast.model.las import LAS
from las_fast.ops import backends, table_model
from las_fast.ops.speller_search import COVERAGE_FLOOR
from las_fast.search import beam, cuda_graph, steps
from las_fast.search import dataset as dataset_module
from las_fast.search.beam import TokenHypothesis, beam_search, greedy_search, length_limits, packed_weights
from las_fast.search.dataset import decode_dataset, speech_scores
from las_fast.text import EOS, SOS, Vocabulary

BACKENDS = [x for x in ("reference", "cpp") if not any(backends.unavailable(op, x) for op in backends.IMPLEMENTED)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_equals_brute_force(seed, backend):
    single = memory([seed], [4])
    expected = all_texts(ToyModel(), single, 4, 0.0)[:5]
    actual = beam_search(ToyModel(), single, config(beam=64), nbest=5, backend=backend)[0]
    assert [tuple(h.text_tokens) for h in actual] == [text for _, _, text in expected]
    assert [h.score for h in actual] == pytest.approx([score for _, score, _ in expected], abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_length_normalisation_ranks_by_score_per_token(backend):
    one = memory([3], [4])
    expected = all_texts(ToyModel(), one, 4, 1.0)[:5]
    actual = beam_search(ToyModel(), one, config(beam=64, length_penalty=1.0), nbest=5, backend=backend)[0]
    assert [tuple(h.text_tokens) for h in actual] == [text for _, _, text in expected]
    assert [h.normalised for h in actual] == pytest.approx([rank for rank, _, _ in expected], abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_coverage_favours_texts_that_attend_to_every_frame(backend):
    one, model, weight = memory([2], [4]), ToyModel(), 0.5
    expected = []
    for rank, score, text in all_texts(model, one, 4, 1.0):
        state, seen = model.start(one, 1), torch.zeros(4)
        for before in (SOS, *text):
            _, attended, state = model.step(torch.tensor([[before]]), state, one, weights=True)
            seen += attended.weights[0, 0]
        covered = sum(math.log(min(max(float(share), COVERAGE_FLOOR), 1.0)) for share in seen)
        expected.append((rank + weight * covered / 4, score, text))
    assert sorted(expected, reverse=True) != expected, "coverage must change the order"
    expected = sorted(expected, reverse=True)[:8]
    wide = config(beam=64, length_penalty=1.0, coverage_weight=weight)
    for many in (one, memory([2, 3], [4, 9])):  # alone, and padded
        actual = beam_search(model, many, wide, nbest=8, backend=backend)[0]
        assert [tuple(h.text_tokens) for h in actual] == [text for _, _, text in expected]
        assert [h.score for h in actual] == pytest.approx([score for _, score, _ in expected], abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_an_ngram_model_adds_its_weighted_log_probabilities(order, backend):
    one, model = memory([1], [4]), ToyModel()
    table = torch.randn(V ** (order - 1), V, generator=torch.Generator().manual_seed(order)).log_softmax(-1)
    expected = []
    for _, score, text in all_texts(model, one, 4, 0.0):
        history = [SOS] * (order - 1)
        for token in (*text, EOS):
            state = sum(v * V**i for i, v in enumerate(reversed(history)))
            score += 0.5 * float(table[state, token])
            history = [*history, token][1:] if history else history
        expected.append((score, text))
    expected = sorted(expected, reverse=True)[:5]
    settings = config(beam=64, ngram_weight=0.5)
    actual = beam_search(model, one, settings, nbest=5, ngram=table_model(table, SOS), backend=backend)[0]
    assert [tuple(h.text_tokens) for h in actual] == [text for _, text in expected]
    assert [h.score for h in actual] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_the_search_is_imported_by_name_from_its_package():
    assert search.decode_dataset is decode_dataset and search.beam_search is beam_search
    assert search.greedy_search is greedy_search and search.TokenHypothesis is TokenHypothesis
    with pytest.raises(AttributeError, match="module 'las_fast.search' has no attribute 'beam_serach'"):
        search.beam_serach  # noqa: B018


def test_an_ngram_weight_without_an_ngram_model_is_an_error():
    with pytest.raises(InputError, match="decoding.ngram_weight needs an n-gram model"):
        beam_search(ToyModel(), memory([1], [4]), config(ngram_weight=0.5))


def with_ctc_head(vocabulary: int = V, strides: int = 1, scale: float = 2.0) -> LAS:
    """An untrained LAS with a CTC head and scaled-up weights, so that its outputs are far from uniform."""
    torch.manual_seed(5)
    speller = SpellerConfig(key_size=8, value_size=8, embedding_size=8, lstm_sizes=(12, 8))
    listener = ListenerConfig((8,), (3,), (strides,), 8, 1)
    model = LAS(ModelConfig(listener, speller, ctc_layer=0), input_size=4, vocabulary_size=vocabulary).eval()
    with torch.no_grad():
        for parameter in (*model.speller.parameters(), *model.ctc.parameters()):
            parameter *= scale
    return model


def encode(model: LAS, lengths: list[int], seed: int = 0):
    features = torch.randn(len(lengths), max(lengths), 4, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return model.listen(features, torch.tensor(lengths))


def ctc_texts(log_probs: Tensor) -> dict[tuple, float]:
    """{text: log-probability} under CTC log-probabilities (T, V), summed over all paths."""
    totals: dict[tuple, float] = {}
    tokens = [v for v in range(log_probs.shape[1]) if v not in (SOS, EOS)]
    for path in itertools.product(tokens, repeat=len(log_probs)):
        text = tuple(v for v, _ in itertools.groupby(path) if v)
        totals[text] = totals.get(text, 0.0) + math.exp(sum(float(log_probs[t, v]) for t, v in enumerate(path)))
    return {text: math.log(p) for text, p in totals.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_of_speller_and_ctc_by_brute_force(seed, weight, backend):
    model = with_ctc_head()
    encoded = encode(model, [5, 3], seed)
    settings = config(beam=64, ctc_weight=weight)
    many = beam_search(model, encoded, settings, nbest=5, backend=backend)
    for b, frames in enumerate([5, 3]):
        logits = encoded.ctc_logits[b, :frames].index_fill(1, torch.tensor([SOS, EOS]), -math.inf)
        expected = []
        for text, score in ctc_texts(logits.log_softmax(-1)).items():
            one = type(encoded)(*(x[b : b + 1] for x in encoded))
            with torch.inference_mode():
                attended = sum(log_probability(model, one, (*text, EOS)))
            expected.append(((1 - weight) * attended + weight * score, text))
        expected = sorted(expected, reverse=True)[:5]
        assert [tuple(h.text_tokens) for h in many[b]] == [text for _, text in expected]
        assert [h.score for h in many[b]] == pytest.approx([score for score, _ in expected], abs=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_all_searches_agree_with_ctc(weight):
    model = with_ctc_head(31, strides=2)
    encoded = encode(model, [150, 90, 31, 1])
    settings = config(beam=6, ctc_weight=weight, length_penalty=0.7, maximum_share=0.2, maximum_extra=3)
    paths = [{"backend": "reference"}]
    if "cpp" in BACKENDS:
        paths += [{"backend": "cpp"}, {"backend": "cpp", "capture": False}]
    first, *others = (beam_search(model, encoded, settings, nbest=6, **path) for path in paths)
    for actual in others:
        for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*first), strict=True):
            assert (ours.text_tokens, ours.attended_frames) == (theirs.text_tokens, theirs.attended_frames)
            assert ours.finished == theirs.finished and ours.score == pytest.approx(theirs.score, rel=1e-5)


@pytest.mark.parametrize("capture", [None, False])
def test_at_weight_0_the_ctc_head_has_no_effect(capture):
    model = with_ctc_head(31)
    encoded = encode(model, [60, 41])
    bare = encoded._replace(ctc_logits=None, ctc_lengths=None)
    actual, expected = (beam_search(model, x, config(), nbest=4, capture=capture) for x in (encoded, bare))
    assert actual == expected


def test_with_ctc_an_utterance_gets_the_same_result_alone_and_in_a_batch():
    model = with_ctc_head(31, strides=2)
    encoded = encode(model, [120, 77, 9])
    settings = config(ctc_weight=0.4, maximum_share=0.2)
    batched = beam_search(model, encoded, settings, nbest=4)
    for b, expected in enumerate(batched):
        alone = type(encoded)(*(x[b : b + 1] for x in encoded))
        assert beam_search(model, alone, settings, nbest=4) == [expected]


def test_a_ctc_weight_without_a_ctc_head_is_an_error():
    with pytest.raises(InputError, match="decoding.ctc_weight needs a model with a CTC head"):
        beam_search(ToyModel(), memory([1], [4]), config(ctc_weight=0.5))


def plain_beam(
    model: ToyModel, one: ToyMemory, beam: int, longest: int, penalty: float, threshold: float = math.inf
) -> list[tuple[float, tuple]]:
    """Beam search over Python lists, the reference for beams that prune."""
    alive = [(0.0, ())]
    for step in range(longest + 1):
        grown = []
        for score, text in alive:
            if text and text[-1] == EOS:
                grown.append((score, text))
                continue
            for token in (EOS,) if step == longest else (EOS, *range(3, model.vocabulary)):
                grown.append((score + log_probability(model, one, (*text, token))[-1], (*text, token)))
        alive = sorted(grown, key=lambda c: c[0] / len(c[1]) ** penalty, reverse=True)[:beam]
        (best, text), *_ = alive
        lowest = {n: best / len(text) ** penalty * n**penalty - threshold for n in range(1, step + 2)}
        alive = [(score, text) for score, text in alive if text[-1] == EOS or score >= lowest[len(text)]]
    return alive


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beam", [1, 2, 3, 8])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_pruning_beam_equals_beam_search_over_lists(beam, penalty, backend):
    for seed in range(6):
        one = memory([seed], [7])
        expected = plain_beam(ToyModel(8), one, beam, 7, penalty)
        settings = config(beam=beam, length_penalty=penalty)
        actual = beam_search(ToyModel(8), one, settings, nbest=beam, backend=backend)[0]
        assert [(*h.text_tokens, EOS) for h in actual] == [text for _, text in expected]
        assert [h.score for h in actual] == pytest.approx([score for score, _ in expected], abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold", [0.1, 0.5, 1.5])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_thresholded_beam_equals_beam_search_over_lists(threshold, penalty, backend):
    counts = set()
    for seed in range(6):
        one = memory([seed], [7])
        expected = plain_beam(ToyModel(8), one, 8, 7, penalty, threshold)
        settings = config(beam=8, length_penalty=penalty, beam_threshold=threshold)
        actual = beam_search(ToyModel(8), one, settings, nbest=8, backend=backend)[0]
        assert [(*h.text_tokens, EOS) for h in actual] == [text for _, text in expected]
        assert [h.score for h in actual] == pytest.approx([score for score, _ in expected], abs=1e-4)
        counts.add(len(actual))
    assert min(counts) < 8  # fewer than the beam have survived


def test_an_utterance_gets_the_same_result_alone_and_in_a_batch():
    seeds, lengths = [3, 1, 4, 1, 5], [9, 2, 25, 14, 1]
    batched = beam_search(ToyModel(9), memory(seeds, lengths), config(), nbest=4)
    for seed, length, actual in zip(seeds, lengths, batched, strict=True):
        assert beam_search(ToyModel(9), memory([seed], [length]), config(), nbest=4)[0] == actual
    assert beam_search(ToyModel(9), memory(seeds, lengths, frames=40), config(), nbest=4) == batched


def test_a_beam_of_one_is_greedy():
    many = memory([1, 2, 3], [12, 5, 8])
    for seed, length, actual in zip([1, 2, 3], [12, 5, 8], greedy_search(ToyModel(9), many, config()), strict=True):
        ((score, text),) = plain_beam(ToyModel(9), memory([seed], [length]), 1, length, 0.0)
        assert (*actual[0].text_tokens, EOS) == text and len(actual) == 1
        assert actual[0].score == pytest.approx(score, abs=1e-4)
    assert beam_search(ToyModel(9), many, config(beam=1)) == greedy_search(ToyModel(9), many, config())


def test_token_scores_and_attended_frames_belong_to_the_tokens():
    one = memory([2], [11])
    for actual in beam_search(ToyModel(7), one, config(), nbest=4)[0]:
        each = log_probability(ToyModel(7), one, (*actual.text_tokens, EOS))
        assert actual.token_scores == pytest.approx(each[:-1], abs=1e-4)
        assert actual.score == pytest.approx(sum(each), abs=1e-4)
        state, before, frames = ToyModel(7).start(one, 1), SOS, []
        for token in actual.text_tokens:
            _, attended, state = ToyModel(7).step(torch.tensor([[before]]), state, one)
            frames.append(int(attended.peaks))
            before = token
        assert actual.attended_frames == frames


def test_hypotheses_come_best_first():
    for actual in beam_search(ToyModel(9), memory([1, 2], [9, 9]), config(length_penalty=0.7, beam=6), nbest=6):
        ranks = [h.normalised for h in actual]
        assert ranks == sorted(ranks, reverse=True) and len(actual) == 6


def test_the_search_stops_when_all_beams_have_finished():
    model = ToyModel(eos=50.0)
    actual = beam_search(model, memory([1, 2], [100, 100]), config(beam=1))
    assert model.steps == steps.STEPS_PER_CHUNK and actual[0][0].text_tokens == [] and actual[0][0].finished


@pytest.mark.parametrize("count", [1, 5, 70])
def test_the_number_of_steps_in_a_chunk_does_not_change_the_result(count, monkeypatch):
    settings = config(length_penalty=1.0, coverage_weight=0.1)
    many = memory([3, 1, 4], [9, 25, 14])
    expected = beam_search(ToyModel(9), many, settings, nbest=4)
    monkeypatch.setattr(steps, "STEPS_PER_CHUNK", count)
    assert beam_search(ToyModel(9), many, settings, nbest=4) == expected


@pytest.mark.parametrize(("in_flight", "expected"), [(1, "+0 ?0 +1 ?1 +2 ?2"), (2, "+0 +1 ?0 +2 ?1 +3 ?2")])
def test_a_flag_is_read_only_after_the_next_chunks_are_enqueued(in_flight, expected, monkeypatch):
    log = []

    class Flag:
        def __init__(self, flag):
            self.number = flag

        def read(self):
            log.append(f"?{self.number}")
            return self.number == 2

    def chunks():
        for i in itertools.count():
            log.append(f"+{i}")
            yield steps.Steps(*[torch.full((1, 1, 1), i)] * 4), i

    monkeypatch.setattr(steps, "PendingFlag", Flag)
    taken = steps.run_chunks(chunks(), 99, in_flight)
    assert " ".join(log) == expected
    assert taken.tokens.flatten().tolist() == list(range(2 + in_flight))
    assert len(steps.run_chunks(chunks(), 2, in_flight).tokens) == 2


@pytest.mark.parametrize(
    ("frames", "fields", "expected"),
    [
        (7, {}, 8),
        (7, {"maximum_extra": 3}, 11),
        (7, {"maximum_share": 0.0}, 2),
        (100, {"maximum_share": 0.29}, 30),  # 28.999999999999996 in float64, but 29 in float32
    ],
)
def test_the_search_takes_as_many_steps_as_the_longest_text_and_eos(frames, fields, expected, monkeypatch):
    monkeypatch.setattr(steps, "STEPS_PER_CHUNK", 1)
    model = ToyModel(eos=-40.0)
    ((actual,),) = beam_search(model, memory([1], [frames]), config(beam=1, **fields))
    assert model.steps == expected and len(actual.text_tokens) == expected - 1 and not actual.finished


def test_a_chunk_has_sixteen_steps_and_only_needed_chunks_run():
    for frames, expected in ((15, 16), (16, 32), (31, 32), (32, 48)):
        model = ToyModel(eos=-40.0)
        beam_search(model, memory([1], [frames]), config(beam=1))
        assert model.steps == expected


@pytest.mark.parametrize("fields", [{}, {"coverage_weight": 0.1}, {"ctc_weight": 0.4}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_op_of_a_search_runs_on_the_requested_backend(fields, backend, monkeypatch):
    calls = []

    def recorded(name, op):
        def call(*arguments, **options):
            calls.append((name, options.get("backend")))
            return op(*arguments, **options)

        return call

    model = with_ctc_head()
    owners = {name: steps for name in ("beam_topk", "beam_gather", "ctc_prefix")} | {"beam_backtrack": beam}
    for name, owner in owners.items():
        monkeypatch.setattr(owner, name, recorded(name, getattr(owner, name)))
    for owner, name in ((type(model), "step"), (type(model.start(encode(model, [5]), 1)), "gather")):
        monkeypatch.setattr(owner, name, recorded(name, getattr(owner, name)))
    beam_search(model, encode(model, [5, 3]), config(**fields), backend=backend, capture=False)
    names = {"step", "gather", "beam_topk", "beam_backtrack"}
    names |= {"ctc_prefix"} if "ctc_weight" in fields else set()
    names |= {"beam_gather"} if "coverage_weight" in fields else set()
    assert {name for name, _ in calls} == names and {used_backend for _, used_backend in calls} == {backend}


def test_attention_weights_are_requested_only_for_coverage(monkeypatch):
    class RecordWeights(ToyModel):
        def step(self, tokens, state, memory, *, weights=False, backend="auto"):
            calls.add(weights)
            return super().step(tokens, state, memory, weights=weights, backend=backend)

    for weight, expected in ((0.0, {False}), (0.1, {True})):
        calls: set[bool] = set()
        beam_search(RecordWeights(), memory([1], [4]), config(coverage_weight=weight))
        assert calls == expected


def test_the_inputs_of_a_chunk_have_no_ctc_logits():
    """Steps read only the log-probabilities; a CUDA graph would copy the logits for nothing."""
    model = with_ctc_head()
    search, encoded = steps.Search(model, config(ctc_weight=0.3), None, "auto"), encode(model, [5, 3])
    inputs, _ = steps.begin(search, encoded, length_limits(encoded.lengths, search.config))
    assert inputs.memory.ctc_logits is None and inputs.memory.ctc_lengths is None
    assert inputs.ctc_log_probs.shape == (2, 5, V)


@pytest.mark.parametrize(
    ("precision", "needs"), [("bf16", "a LAS, and not a subclass"), ("int8", r"a LAS \(no subclass of it\) on a CPU")]
)
def test_a_model_that_cannot_be_searched_in_low_precision_is_refused(precision, needs):
    with pytest.raises(InputError, match=f"decoding.precision {precision} needs {needs}"):
        beam_search(ToyModel(), memory([1], [4]), config(precision=precision))
    actual = beam_search(ToyModel(), memory([1], [4]), config(precision="fp32"))
    assert actual == beam_search(ToyModel(), memory([1], [4]), config())


def test_int8_is_refused_before_the_search_where_there_is_no_search_for_it():
    with pytest.raises(InputError, match=r"decoding.precision int8 needs a LAS .* on a CPU, and the C\+\+ extension"):
        packed_weights(ToyModel(), config(precision="int8"), "cpu")
    assert packed_weights(ToyModel(), config(precision="bf16"), "cpu") is None


def test_the_length_reward_counts_every_token_except_eos():
    one, model = memory([1], [4]), ToyModel()
    table = torch.randn(1, V, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    for weight in (0.0, 0.5):
        expected = []
        for _, score, text in all_texts(model, one, 4, 0.0):
            known = sum(float(table[0, token]) for token in (*text, EOS))
            expected.append((score + weight * known + 0.7 * len(text), text))
        expected = sorted(expected, reverse=True)[:5]
        settings = config(beam=64, ngram_weight=weight, length_reward=0.7)
        actual = beam_search(model, one, settings, nbest=5, ngram=table_model(table, SOS))[0]
        assert [tuple(h.text_tokens) for h in actual] == [text for _, text in expected]
        assert [h.score for h in actual] == pytest.approx([score for score, _ in expected], abs=1e-4)


@pytest.fixture
def capturable(monkeypatch):
    """A function that says whether a search of a memory on "cuda" can be captured where Triton is available."""
    monkeypatch.setattr(backends, "_triton_problem", lambda: None)

    def capturable(backend="auto", device="cuda", vocabulary=V, key_size=8, value_size=8, **fields):
        keys, values = (torch.empty(1, 1, size, device="meta") for size in (key_size, value_size))
        lengths = SimpleNamespace(device=torch.device(device))
        search = steps.Search(SimpleNamespace(vocabulary_size=vocabulary), config(**fields), None, backend)
        return cuda_graph.can_capture(search, Memory(keys, values, lengths, None))

    return capturable


def test_a_search_can_be_captured_on_cuda_if_all_its_ops_are_triton(monkeypatch, capturable):
    assert capturable() and capturable("triton") and capturable(ctc_weight=0.3)
    assert capturable(device="cpu") is capturable("reference") is False
    for op in ("masked_attention", "beam_topk", "beam_gather", "ctc_prefix"):
        with monkeypatch.context() as without:
            without.setitem(backends.IMPLEMENTED, op, {"reference": None})
            assert capturable(ctc_weight=0.3) is False
            assert capturable() is (op == "ctc_prefix")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    assert capturable() is False


def test_a_search_too_large_for_a_triton_op_is_not_captured(capturable):
    assert capturable(beam=128, key_size=512, value_size=512)
    assert capturable(beam=129) is capturable(beam=2, vocabulary=2**30) is False
    assert capturable(key_size=513) is capturable(value_size=513) is False
    with pytest.raises(RuntimeError, match="takes at most 128 beams"):
        capturable("triton", beam=129)


def test_a_las_is_searched_natively_and_other_models_by_steps_or_graph(monkeypatch):
    las, searched = with_ctc_head(), memory([1], [4])
    native = beam.search_natively if "cpp" in BACKENDS else beam.search_by_steps

    def chosen(model, backend="auto", capture=None):
        return beam.choose_search(steps.Search(model, config(), None, backend), searched, capture=capture)

    assert chosen(las) is native
    assert chosen(las, capture=False) is chosen(las, "reference") is chosen(ToyModel()) is beam.search_by_steps
    assert chosen(las, capture=True) is chosen(ToyModel(), capture=True) is beam.search_by_graph
    monkeypatch.setattr(beam, "can_capture", lambda search, memory: True)
    assert chosen(las) is native
    assert chosen(las, "reference") is chosen(ToyModel()) is beam.search_by_graph
    assert chosen(ToyModel(), capture=False) is beam.search_by_steps


def test_on_cuda_short_texts_are_searched_in_short_chunks(monkeypatch):
    def sizes(frames, is_cuda=True):
        encoded = SimpleNamespace(lengths=SimpleNamespace(is_cuda=is_cuda), padding=torch.empty(1, frames))
        search = steps.Search(ToyModel(), config(maximum_extra=0), None, "auto")
        return steps.steps_per_chunk(search, encoded), steps.max_chunks(search, encoded)

    assert sizes(255) == (8, 32) and sizes(248) == (8, 32) and sizes(247) == (8, 31)
    assert sizes(256) == (16, 17) and sizes(255, is_cuda=False) == (16, 16)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(steps, "PendingFlag", lambda flag: SimpleNamespace(read=lambda: bool(flag)))
    model = ToyModel(eos=50.0)
    search, encoded = steps.Search(model, config(), None, "reference"), memory([1, 2], [100, 100])
    steps.search_by_steps(search, encoded, length_limits(encoded.lengths, search.config))
    assert model.steps == 16, "of a text that ends at once, two chunks are in flight"


def test_on_cuda_a_chunk_runs_while_the_host_reads_the_flag_of_the_previous_one():
    for is_cuda, expected in ((True, 2), (False, 1)):
        assert steps.chunks_in_flight(SimpleNamespace(lengths=SimpleNamespace(is_cuda=is_cuda))) == expected
    assert isinstance(beam._device_context(torch.device("cuda", 0)), torch.cuda.device)
    with beam._device_context(torch.device("cpu")):
        pass


def test_reading_a_flag_on_cuda_waits_for_its_copy(monkeypatch):
    log, empty = [], torch.empty

    class OnCuda(Tensor):
        is_cuda = True

    class Event:
        def record(self, stream):
            log.append(f"record on {stream}")

        def synchronize(self):
            log.append("wait")

    def without_pins(*sizes, pin_memory, **options):
        log.append(f"pinned {pin_memory}")
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", without_pins)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    for value in (True, False):
        log.clear()
        flag = steps.PendingFlag(torch.tensor(value).as_subclass(OnCuda))
        assert log == ["pinned True", "record on the stream of cpu"] and flag.read() is value and log[2:] == ["wait"]
        log.clear()
        assert steps.PendingFlag(torch.tensor(value)).read() is value and log == ["pinned False"]


def test_a_finished_hypothesis_keeps_its_score_while_others_continue():
    short, long = memory([5], [40]), memory([5, 6], [40, 40])
    model = ToyModel(eos=3.0)
    assert beam_search(model, short, config(), nbest=4)[0] == beam_search(model, long, config(), nbest=4)[0]
    best = beam_search(model, short, config())[0][0]
    assert best.score == pytest.approx(sum(log_probability(model, short, (*best.text_tokens, EOS))), abs=1e-4)


def test_at_the_maximum_length_hypotheses_are_returned_as_unfinished():
    actual = beam_search(ToyModel(eos=-40.0), memory([1, 2], [6, 3]), config(maximum_extra=1), nbest=2)
    assert [[len(h.text_tokens) for h in hypotheses] for hypotheses in actual] == [[7, 7], [4, 4]]
    assert not any(h.finished for hypotheses in actual for h in hypotheses)


def test_no_text_is_shorter_than_the_minimum():
    actual = beam_search(ToyModel(eos=20.0), memory([1, 2], [8, 4]), config(minimum_share=0.5), nbest=4)
    assert [[len(h.text_tokens) for h in hypotheses] for hypotheses in actual] == [[4] * 4, [2] * 4]


def test_lengths_are_limited_by_feature_frames():
    limits = length_limits(torch.tensor([0, 1, 10]), config(minimum_share=0.35, maximum_share=0.5))
    assert limits.maximum.tolist() == [1, 1, 5] and limits.minimum.tolist() == [0, 0, 3]


def test_an_encoder_frame_counts_as_time_reduction_feature_frames():
    model = ToyModel(eos=-40.0)
    model.time_reduction = 8
    settings = config(maximum_share=0.25, maximum_extra=1)
    assert [len(h[0].text_tokens) for h in beam_search(model, memory([1, 2], [5, 2]), settings)] == [11, 5]


def test_time_reduction_is_the_product_of_the_listeners_strides():
    listener = ListenerConfig((8, 8), (3, 3), (3, 1), 8, 2)
    speller = SpellerConfig(key_size=8, value_size=8, embedding_size=8, lstm_sizes=(8,))
    model = LAS(ModelConfig(listener, speller), input_size=4, vocabulary_size=9).eval()
    lengths = torch.arange(1, 40)
    with torch.inference_mode():
        encoded = model.listen(torch.randn(39, 39, 4), lengths).lengths
    assert model.time_reduction == 12
    assert encoded.tolist() == [math.ceil(n / 12) for n in range(1, 40)]


def allowed_characters(name: str, seconds: Tensor) -> Tensor:
    """The maximum number of characters that a preset allows for recordings of (N,) seconds."""
    preset = load_config(name)
    window, shift, reduction = preset.features.window_ms, preset.features.shift_ms, preset.model.listener.time_reduction
    frames = 1 + ((1000 * seconds - window) / shift).long()
    return length_limits(-(-frames // reduction) * reduction, preset.decoding).maximum


@pytest.mark.parametrize("name", presets())
def test_every_preset_can_spell_fast_speech(name):
    seconds = torch.arange(1, 400) / 10
    assert (allowed_characters(name, seconds) >= 25 * seconds).all()


@pytest.mark.parametrize("name", presets())
def test_no_presets_maximum_length_is_below_a_shared_transcript(name, shared):
    with (shared / "speech" / "manifest.tsv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    seconds = torch.tensor([float(row["seconds"]) for row in rows])
    characters = torch.tensor([len(row["transcript"]) for row in rows])
    assert (allowed_characters(name, seconds) >= characters).all()


def test_a_beam_wider_than_the_number_of_texts_lists_each_text_once():
    actual = beam_search(ToyModel(), memory([1], [1]), config(beam=12, maximum_extra=0), nbest=12)[0]
    assert sorted(tuple(h.text_tokens) for h in actual) == [(), (3,), (4,)]
    assert all(math.isfinite(h.score) and math.isfinite(h.normalised) for h in actual)


def test_equal_scores_keep_the_lower_token():
    actual = beam_search(ToyModel(ties=True), memory([1], [3]), config(beam=2, minimum_share=1.0), nbest=2)[0]
    assert [h.text_tokens for h in actual] == [[3, 3, 3], [3, 3, 4]]


def test_the_eos_threshold_delays_eos():
    many = memory(list(range(8)), [12] * 8)
    free = greedy_search(ToyModel(eos=1.0), many, config())
    delayed = greedy_search(ToyModel(eos=1.0), many, config(eos_threshold=0.05))
    assert sum(len(h[0].text_tokens) for h in delayed) > sum(len(h[0].text_tokens) for h in free)


def test_nan_outputs_give_an_empty_hypothesis():
    class Diverged(ToyModel):
        def step(self, tokens, state, memory, **options):
            logits, attended, state = super().step(tokens, state, memory, **options)
            return logits.masked_fill(memory.seeds[:, None, None] == 1, torch.nan), attended, state

    actual = beam_search(Diverged(), memory([1, 2], [5, 5]), config())
    assert actual[0] == [TokenHypothesis([], -math.inf, -math.inf, [], [], finished=False)]
    assert actual[1] == beam_search(ToyModel(), memory([2], [5]), config())[0]


aten = torch.ops.aten
SYNCHRONISING = (aten.item, aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.equal)


class RecordOps(TorchDispatchMode):
    """Records the ops, those that make the host wait for the device, and the size of the largest result."""

    def __init__(self):
        super().__init__()
        self.seen, self.waits, self.largest = set(), [], 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.seen.add(function.overloadpacket)
        if function.overloadpacket in SYNCHRONISING:
            self.waits.append(function)
        result = function(*arguments, **(named or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def random_steps(L=9, B=4, K=6) -> steps.Steps:
    """Back-pointers of random hypotheses: of each utterance, some beams are impossible, and not only the last."""
    generator = torch.Generator().manual_seed(0)
    tokens, parents, attended = (torch.randint(0, high, (L, B, K), generator=generator) for high in (30, K, 7))
    scores = -torch.rand(L, B, K, generator=generator).cumsum(0)
    scores[-1, 0, 3:] = scores[-1, 1, 1] = scores[-1, 3] = -torch.inf
    return steps.Steps(tokens, parents, scores, attended)


def test_a_device_sends_the_host_only_the_best_hypotheses(monkeypatch):
    searched, limits = random_steps(), steps.TokenLimits(torch.zeros(4, dtype=torch.int64), torch.full((4,), 5))
    every = beam.backtrack(searched, limits, config(), 6, "auto")
    assert len({len(hypotheses) for hypotheses in every}) > 1
    sent, in_one_copy = [], beam.in_one_copy
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(beam, "in_one_copy", lambda columns: sent.append([*columns]) or in_one_copy(columns))
    for nbest in (1, 2, 5, 6):
        actual = beam.backtrack(searched, limits, config(), nbest, "reference")
        assert actual == [hypotheses[:nbest] for hypotheses in every]
        assert [tuple(x.shape) for x in sent.pop()] == [(4, nbest)] * 4 + [(4, nbest, 9)] * 3


def test_columns_are_copied_to_the_host_at_once_and_unchanged(monkeypatch):
    columns = [torch.tensor([[True, False]]), torch.tensor([[-math.inf, 0.1]]), torch.tensor([[2**31 - 1, -3]])]
    columns += [torch.arange(6).view(1, 2, 3), torch.randn(1, 2, 3), torch.empty(1, 2, 0)]
    copies, cpu = [], Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda x: copies.append(x.shape) or cpu(x))
    assert [x.tolist() for x in beam.in_one_copy(columns)] == [x.tolist() for x in columns]
    assert copies == [(1, 2, 9)]


def test_the_search_does_not_read_numbers_from_the_device():
    model = ToyModel(eos=-40.0)  # never emits eos by itself
    with RecordOps() as record:
        beam_search(model, memory([1, 2], [70, 50]), config())
    assert model.steps == 80 and record.waits == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_are_never_repeated_over_the_beam(backend):
    speller = SpellerConfig(key_size=32, value_size=16, embedding_size=8, lstm_sizes=(8,))
    model = LAS(ModelConfig(ListenerConfig((8,), (3,), (1,), 8, 1), speller), input_size=4, vocabulary_size=9).eval()
    with torch.inference_mode():
        listened = model.listen(torch.randn(2, 200, 4), torch.tensor([200, 150]))
    with RecordOps() as record:
        beam_search(model, listened, config(beam=16, maximum_share=0.1), backend=backend, capture=False)
    attention = aten.bmm if backend == "reference" else torch.ops.las_fast.masked_attention_cpp
    assert attention in record.seen  # not a search in one op, whose tensors cannot be recorded
    assert record.largest < 2 * listened.keys.numel()


# ----------------------------------------------------------------------------------------------------- whole datasets


@dataclass
class FakeDataset:
    frame_counts: np.ndarray
    texts: list

    def __post_init__(self):
        self.ids = [f"u{i}" for i in range(len(self.frame_counts))]
        self.seconds = self.frame_counts / 100

    def __len__(self):
        return len(self.frame_counts)

    def __getitem__(self, i: int) -> Tensor:
        return torch.full((int(self.frame_counts[i]), 1), float(i))


class ListeningModel(ToyModel):
    """Reads the number of the utterance from its features; fails for more than `max_frames` padded frames."""

    def __init__(self, max_frames: int = 10**9, error: type[BaseException] = MemoryError, message: str = ""):
        super().__init__(8)
        self.max_frames, self.error, self.message, self.batches = max_frames, error, message, []

    def listen(self, features: Tensor, feature_lengths: Tensor) -> ToyMemory:
        if features.shape[0] * features.shape[1] > self.max_frames:
            raise self.error(self.message)
        self.batches.append(features.shape[:2])
        return ToyMemory(features[:, 0, 0].long(), (feature_lengths + 1) // 2, (features.shape[1] + 1) // 2)


def decode(model, dataset: FakeDataset, frames_per_batch: int = 100):
    settings = config(frames_per_batch=frames_per_batch)
    return decode_dataset(model, dataset, Vocabulary(), settings, progress=False, device="cpu")


def test_hypotheses_come_in_the_order_of_the_dataset():
    dataset = FakeDataset(np.array([7, 30, 5, 18, 11]), [None] * 5)
    model = ListeningModel()
    actual = decode(model, dataset, 40)
    assert len(model.batches) > 1
    for i, frames in enumerate(dataset.frame_counts):
        one = ToyMemory(torch.tensor([i]), torch.tensor([(frames + 1) // 2]), (frames + 1) // 2)
        assert actual[i] == beam_search(ToyModel(8), one, config())[0]


def test_weights_are_packed_once_for_all_batches(monkeypatch):
    if reason := backends.unavailable("speller_search", "cpp"):
        pytest.skip(reason)
    settings = ModelConfig(ListenerConfig((8,), (3,), (2,), 8, 1), SpellerConfig(8, 8, 8, (8, 8)))
    model, other = (LAS(settings, input_size=1, vocabulary_size=len(Vocabulary())).eval() for _ in range(2))
    dataset = FakeDataset(np.array([30, 12, 25, 9]), [None] * 4)
    expected = decode(model, dataset, 40)
    packed, calls = packed_weights(other, config(), "cpu"), []
    monkeypatch.setattr(dataset_module, "packed_weights", lambda *arguments: calls.append(arguments) or packed)
    actual = decode(model, dataset, 40)
    assert len(calls) == 1 and all(a != b for a, b in zip(actual, expected, strict=True))


def test_a_batch_holds_at_most_its_frames_and_128_utterances_and_the_longest_come_first():
    def sizes(frames, frames_per_batch):
        dataset = FakeDataset(np.array(frames), ["?"] * len(frames))
        batches = dataset_module.batches_to_decode(dataset, Vocabulary(), config(frames_per_batch=frames_per_batch))
        return [tuple(batch.features.shape[:2]) for batch in batches]

    assert sizes([1] * 257, 10_000) == [(128, 1), (128, 1), (1, 1)]
    assert sizes([3, 9, 5, 4, 9], 18) == [(2, 9), (3, 5)]


class RandomFeatures(FakeDataset):
    def __getitem__(self, i: int) -> Tensor:
        return torch.randn(int(self.frame_counts[i]), 4, generator=torch.Generator().manual_seed(i))


def test_a_dataset_is_decoded_like_its_utterances_one_by_one():
    model, dataset = with_ctc_head(len(Vocabulary())), RandomFeatures(np.array([30, 12, 25]), [None] * 3)
    table = table_model(torch.randn(31, 31, generator=torch.Generator().manual_seed(1)).log_softmax(-1), SOS)
    settings = config(beam=3, ngram_weight=0.5, length_reward=0.2, maximum_share=0.3)
    options = {"progress": False, "device": "cpu"}
    actual = decode_dataset(model, dataset, Vocabulary(), settings, nbest=2, ngram=table, speech_scores=True, **options)
    plain = decode_dataset(model, dataset, Vocabulary(), settings, ngram=table, **options)
    for i, frames in enumerate([30, 12, 25]):
        with torch.inference_mode():
            encoded = model.listen(dataset[i][None], torch.tensor([frames]))
        ((first, second),) = beam_search(model, encoded, settings, nbest=2, ngram=table)
        (score,) = speech_scores(encoded, [first.text_tokens])
        assert_equal_up_to_rounding(actual[i], [replace(first, speech_score=score), second])
        assert_equal_up_to_rounding(plain[i], [first])


def test_progress_counts_seconds_of_decoded_audio(monkeypatch):
    counted, made = [], []

    class Counting:
        def __init__(self, *arguments, **options):
            made.append((arguments, options))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n):
            counted.append(n)

    monkeypatch.setattr(dataset_module, "ProgressBar", Counting)
    dataset = FakeDataset(np.array([7, 30, 5, 18, 11]), [None] * 5)
    decode(ListeningModel(), dataset, 40)
    decode_dataset(ListeningModel(), dataset, Vocabulary(), config(frames_per_batch=999), device="cpu")
    assert made == [((pytest.approx(0.71), "decoding", "s of audio"), {"show": show}) for show in (False, True)]
    assert counted == pytest.approx([0.30, 0.29, 0.12, 0.71])


def test_a_batch_size_that_did_not_fit_is_not_retried():
    tried = []

    class RecordingModel(ListeningModel):
        def listen(self, features: Tensor, feature_lengths: Tensor) -> ToyMemory:
            tried.append(features.shape[0] * features.shape[1])
            return super().listen(features, feature_lengths)

    decode(RecordingModel(10), FakeDataset(np.array([8] * 4 + [4] * 6), [None] * 10), 32)
    assert tried == [32, 16, 8, 8, 8, 8, 12, 8, 4, 8, 4]


def test_on_out_of_memory_graphs_and_caches_are_freed(monkeypatch):
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("cache"))
    monkeypatch.setattr(dataset_module, "clear_graphs", lambda: freed.append("graphs"))
    decode(ListeningModel(21), FakeDataset(np.array([9, 10, 8]), [None] * 3))
    assert freed == ["graphs", "cache"]


def score_texts(rows: list[list[int]], lengths: list[int], logits: Tensor) -> list[float | None]:
    memory = Memory(None, None, None, None, logits, torch.tensor(lengths))
    return speech_scores(memory, rows)


def test_a_speech_score_is_the_ratio_to_silence_per_token_by_brute_force():
    texts, lengths = [[3, 4], [3, 3], [3, 3], [], [4, 3, 4], [3]], [4, 3, 2, 4, 3, 1]
    logits = 3 * torch.randn(6, 4, V, generator=torch.Generator().manual_seed(3))
    actual = score_texts(texts, lengths, logits)
    for text, frames, rows, score in zip(texts, lengths, logits, actual, strict=True):
        rows = rows[:frames].log_softmax(-1)
        if not text:
            assert score is None
        elif (exact := ctc_texts(rows).get(tuple(text))) is None:
            assert score == -math.inf
        else:
            assert score == pytest.approx((exact - float(rows[:, 0].sum())) / len(text), abs=1e-4)
    assert [score for score in actual if score is not None and not math.isfinite(score)] == [-math.inf]


def test_speech_scores_are_computed_in_float32():
    logits = (3 * torch.randn(1, 60, V, generator=torch.Generator().manual_seed(3))).bfloat16()
    assert score_texts([[3, 4]], [60], logits) == pytest.approx(score_texts([[3, 4]], [60], logits.float()), abs=1e-4)


def test_empty_texts_have_no_speech_score_anywhere_in_a_batch():
    logits = torch.randn(2, 4, V, generator=torch.Generator().manual_seed(3))
    assert score_texts([[], []], [4, 3], logits) == [None, None]
    assert score_texts([[], [3]], [4, 3], logits)[1] == pytest.approx(score_texts([[3]], [3], logits[1:])[0], abs=1e-5)


def test_without_a_ctc_head_there_are_no_speech_scores():
    assert speech_scores(Memory(None, None, None, None), [[3], []]) == [None, None]


def test_transcripts_outside_the_vocabulary_do_not_matter_for_decoding():
    dataset = FakeDataset(np.array([6, 4]), ["HÉ?", "ok"])
    assert decode(ListeningModel(), dataset) == decode(
        ListeningModel(), FakeDataset(dataset.frame_counts, [None, None])
    )


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.bfloat16)]
)
def test_the_listener_computes_in_the_decoding_precision_and_returns_float32(precision, dtype):
    settings = ModelConfig(ListenerConfig((8,), (3,), (2,), 8, 1), SpellerConfig(8, 8, 8, (8, 8)))
    model = LAS(settings, input_size=4, vocabulary_size=V).eval()
    seen = []
    model.listener.layers[0].register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    batch = Batch(torch.randn(2, 20, 4), torch.tensor([20, 7]), None, None, torch.arange(2))
    actual = dataset_module.listen(model, batch, config(precision=precision))
    assert seen == [dtype] and actual.keys.dtype == actual.values.dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError, ""),
        (torch.OutOfMemoryError, "CUDA out of memory"),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_and_decoded_completely(error, message):
    dataset = FakeDataset(np.array([9, 10, 8, 7, 10, 3, 2]), [None] * 7)
    model = ListeningModel(21, error, message)
    assert decode(model, dataset) == decode(ListeningModel(), dataset)
    assert all(rows * frames <= 21 for rows, frames in model.batches)


class DatasetWithViews(FakeDataset):
    def raw(self, i: int) -> Tensor:
        return self[i]

    def prepare(self, raw: Tensor) -> Tensor:
        return raw


@pytest.mark.parametrize(
    ("speeds", "frames", "max_rows", "tried"),
    [
        ((1.0, 0.9), [6, 6, 6, 6], 2, [(4, 6), (2, 6), (2, 6), (2, 7), (2, 7)]),  # not (4, 7)
        ((1.0, 0.25), [5, 5], 1, [(2, 5), (1, 5), (1, 5), (1, 20), (1, 20)]),  # one utterance is always tried
    ],
)
def test_a_size_that_did_not_fit_is_not_tried_again_in_the_next_view(speeds, frames, max_rows, tried):
    sizes = []

    class SmallModel(ListeningModel):
        def listen(self, features: Tensor, feature_lengths: Tensor) -> ToyMemory:
            sizes.append(tuple(features.shape[:2]))
            if features.shape[0] > max_rows:
                raise MemoryError
            return super().listen(features, feature_lengths)

    dataset, settings = DatasetWithViews(np.array(frames), [None] * len(frames)), config(speeds=speeds)
    actual = decode_dataset(SmallModel(), dataset, Vocabulary(), settings, progress=False, device="cpu")
    assert sizes == tried
    assert actual == decode_dataset(ListeningModel(), dataset, Vocabulary(), settings, progress=False, device="cpu")


class CapturedInHalves(cuda_graph.CudaGraph):
    """Runs the captured function again; above 2 utterances, memory runs out and the end of the capture fails too."""

    def capture(self, function):
        self.function, self.results = function, function()
        if self.results[0].tokens.shape[1] > 2:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        return self.results

    def replay(self):
        chunk, ended = self.function()
        for old, new in zip((*self.results[0], self.results[1]), (*chunk, ended), strict=True):
            old.copy_(new)


def test_a_batch_that_does_not_fit_while_it_is_captured_is_halved(monkeypatch):
    dataset = FakeDataset(np.array([9, 10, 8, 7, 10]), [None] * 5)
    expected = decode(ListeningModel(), dataset)
    monkeypatch.setattr(beam, "can_capture", lambda search, memory: True)
    monkeypatch.setattr(cuda_graph, "CudaGraph", CapturedInHalves)
    searched = ListeningModel()
    assert decode(searched, dataset) == expected
    assert max(rows for rows, _ in searched.batches[1:]) <= 3 and searched.batches[0][0] == 5


def test_halves_are_no_longer_than_their_longest_utterance():
    seen = []

    class RecordingModel(ListeningModel):
        def listen(self, features: Tensor, feature_lengths: Tensor) -> ToyMemory:
            seen.append((features.shape[1], int(feature_lengths.max())))
            return super().listen(features, feature_lengths)

    decode(RecordingModel(21), FakeDataset(np.array([9, 10, 8, 7, 10, 3, 2]), [None] * 7))
    assert len({length for length, _ in seen}) > 1 and all(length == longest for length, longest in seen)


def test_an_utterance_that_does_not_fit_alone_is_named():
    with pytest.raises(InputError, match=r"utterance u1 .* alone does not fit in memory; lower the beam"):
        decode(ListeningModel(15), FakeDataset(np.array([4, 20]), [None, None]))


def test_other_errors_are_not_treated_as_out_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        decode(ListeningModel(0, RuntimeError, "shapes disagree"), FakeDataset(np.array([4]), [None]))


def test_a_diverged_model_is_an_error():
    class Diverged(ListeningModel):
        def step(self, tokens, state, memory, **options):
            logits, attended, state = super().step(tokens, state, memory, **options)
            return logits * torch.nan, attended, state

    with pytest.raises(InputError, match="NaN or infinite"):
        decode(Diverged(), FakeDataset(np.array([4]), [None]))


@pytest.mark.skipif("cpp" not in BACKENDS, reason=f"no C++ ops: {backends.EXTENSION_PROBLEM}")
def test_a_trained_model_gives_the_same_texts_on_reference_and_cpp(shared):
    archive = shared / "an4" / "hw4p2_student_data"
    if not archive.is_dir():
        pytest.skip("../shared/an4 is absent")
    loaded, dev = load_an4_small(archive)
    assert len(dev) == 104
    batches = sorted_batches(dev.frame_counts, frames_per_batch=30000, utterances_per_batch=128)
    settings = replace(loaded.config.decoding, beam=4)
    for batch in make_loader(dev, batches, loaded.vocabulary, augment=None, seed=0, epoch=0, workers=0):
        with torch.inference_mode():
            encoded = loaded.model.listen(batch.features, batch.feature_lengths)
        actual = [beam_search(loaded.model, encoded, settings, nbest=4, backend=name) for name in ("reference", "cpp")]
        for ours, theirs in zip(*(itertools.chain(*hypotheses) for hypotheses in actual), strict=True):
            assert ours.text_tokens == theirs.text_tokens
            assert ours.score == pytest.approx(theirs.score, abs=1e-4)
