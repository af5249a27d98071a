import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import digests, ops_called, threads

from las_fast.checkpoint import load_model
from las_fast.config import DecodingConfig, ListenerConfig, ModelConfig, SpellerConfig
from las_fast.data.batch import make_loader
from las_fast.data.batch_plan import sorted_batches
from las_fast.data.dataset import load_dataset
from las_fast.data.layouts import open_corpus
from las_fast.errors import InputError
from las_fast.model.attention import Memory
from las_fast.model.las import LAS
from las_fast.ops import (
    SpellerWeights,
    beam_backtrack,
    ctc_log_probabilities,
    padding_mask,
    speller_pack,
    speller_search,
    table_model,
)
from las_fast.ops.speller import linear_int8, step
from las_fast.ops.speller_search import Options as SearchOptions
from las_fast.ops.speller_search import _begin
from las_fast.search.beam import beam_search, packed_weights

SOS, EOS, NAN = 1, 2, torch.nan
CHECKPOINT = Path(__file__).parents[1] / "an4-small.safetensors"
SIZES = [  # V, M, H of each cell, D, E, T, B, K
    (3, 1, (1,), 1, 1, 1, 1, 1),
    (4, 1, (1, 1, 1), 1, 1, 1, 2, 3),
    (7, 5, (6,), 4, 3, 9, 3, 4),
    (31, 20, (40,), 8, 9, 50, 6, 1),
    (31, 33, (32, 31), 33, 17, 40, 5, 8),
    (32, 31, (33, 16), 15, 32, 32, 3, 11),
    (33, 32, (8, 24, 17), 32, 33, 33, 4, 13),
    (67, 64, (65, 64, 63), 31, 65, 65, 3, 64),
]
ALL_OPTIONS = {"length_penalty": 0.7, "eos_threshold": 1.1, "coverage_weight": 0.2, "ngram_weight": 0.4, "minimum": 3}
ALL_OPTIONS |= {"ctc_weight": 0.3, "beam_threshold": 3.0}
OPTIONS = {
    "plain": {},
    "length penalty": {"length_penalty": 1.0},
    "eos threshold": {"eos_threshold": 1.5},
    "minimum": {"minimum": 4},
    "coverage": {"coverage_weight": 0.3},
    "n-gram": {"ngram_weight": 0.5},
    "ctc": {"ctc_weight": 0.4},
    "ctc alone": {"ctc_weight": 1.0},
    "beam threshold": {"beam_threshold": 1.0, "length_penalty": 1.0},
    "every option": ALL_OPTIONS,
}
on_each_size = pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)).replace(" ", ""))
on_each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])


# (changed arguments, message) and (index, value, message), for random_weights(7, 5, (6,), 4, 3) and its memory
WRONG_MEMORY = [
    ({"keys": torch.ones(3, 9)}, r"keys must be \(B, T, size\) float32; got \(3, 9\)"),
    ({"keys": torch.ones(3, 9, 5)}, r"keys must be \(B, T, D\) with D=4 like query; got \(3, 9, 5\)"),
    ({"values": torch.ones(3, 8, 3)}, r"values must be \(B, T, E\) with B=3, T=9, E=3; got \(3, 8, 3\)"),
    ({"values": torch.ones(3, 9, 3).double()}, "values must be .* float32; got .* torch.float64"),
    ({"lengths": torch.ones(3)}, r"lengths must be \(3,\) int64; got \(3,\) torch.float32"),
]
WRONG_MEMORY_OF_REGISTERED_OP = [
    (0, [torch.ones(7, 5)], "weights must be 6 tensors and 2 per cell; got 1"),
    (1, torch.ones(3, 9), r"keys must be \(B, T, D\) float32; got \[3, 9\] Float"),
    (1, torch.ones(3, 9, 5), r"weights: query must be \[5, 6\]; got \[4, 6\]"),
    (2, torch.ones(3, 8, 3), r"values must be \(B, T, E\) float32 with B=3, T=9 like keys; got \[3, 8, 3\]"),
    (3, torch.ones(3), r"lengths must be \(3,\) int64; got \[3\] Float"),
]


def random_weights(V, M, H, D, E, seed=0, scale=2.0) -> SpellerWeights:
    """Random weights whose outputs are about `scale`, except that <pad> and <sos> are never chosen."""
    generator = torch.Generator().manual_seed(seed)

    def layer(outputs, inputs):
        return scale * torch.randn(outputs, inputs, generator=generator) / inputs**0.5

    below, gates = M + E, []
    for size in H:
        gates.append(layer(4 * size, below + size))
        below = size
    bias = layer(V, 1)[:, 0]
    bias[[0, SOS]] = -1e4
    query, project = layer(D, below), layer(M, below + E)
    biases = [layer(n, 1)[:, 0] for n in (D, M, *(4 * size for size in H))]
    return SpellerWeights(layer(V, M), query, biases[0], project, biases[1], bias, tuple(gates), tuple(biases[2:]))


def random_memory(B, T, D, E, seed=1):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([T, max(T - 1, 0), T // 2, 1, 0, T // 3][:B], dtype=torch.int64)
    return torch.randn(B, T, D, generator=generator), torch.randn(B, T, E, generator=generator), lengths


def random_ctc_log_probs(B, T, V, seed=2):
    """Log-probabilities of a CTC head with twice as many frames as the memory has."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([2 * T, 2 * T - 1, T, 20, 9, T // 2][:B], dtype=torch.int64)
    forbidden = [v for v in (SOS, EOS) if v < V]
    return ctc_log_probabilities(2 * torch.randn(B, 2 * T, V, generator=generator), lengths.clamp(max=2 * T), forbidden)


def some_limits(B):
    return torch.tensor([9, 1, 12, 4, 7, 2][:B], dtype=torch.int64)


def search(weights, memory, *, backend="cpp", minimum=0, ngram_weight=0.0, **options):
    """Call speller_search with limits, a language model and CTC log-probabilities of matching sizes."""
    B, V = memory[2].shape[0], weights.bias.shape[0]
    maximum = options.pop("maximum", some_limits(B))
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(5)).log_softmax(-1)
    ngram = table_model(table, SOS) if ngram_weight else None
    if options.get("ctc_weight") and "ctc_log_probs" not in options:
        options["ctc_log_probs"] = random_ctc_log_probs(B, memory[0].shape[1], V)
    return speller_search(
        weights, *memory, sos=SOS, eos=EOS, backend=backend, ngram=ngram, ngram_weight=ngram_weight,
        minimum=torch.full((B,), minimum).clamp(max=maximum) if minimum else None, maximum=maximum, **options,
    )  # fmt: skip


def hypotheses(steps):
    """For each utterance, (tokens, score, token scores, attended frames) of each hypothesis that exists."""
    actual, B, K = beam_backtrack(*steps, eos=EOS), *steps.tokens.shape[1:]
    utterances = []
    for b in range(B):
        # the other hypotheses contain <pad> or <sos>, or do not exist
        real = [k for k in range(K) if steps.scores[-1, b, k] > -1e3]
        n = {k: int(actual.lengths[b, k]) for k in real}
        utterances.append(
            [
                (actual.tokens[b, k, : n[k]].tolist(), float(steps.scores[-1, b, k]),
                 actual.token_scores[b, k, : n[k] + 1].tolist(), actual.attended_frames[b, k, : n[k]].tolist())
                for k in real
            ]
        )  # fmt: skip
    return utterances


def assert_same(actual, expected, tolerance=1e-4):
    for utterance, expected_utterance in zip(hypotheses(actual), hypotheses(expected), strict=True):
        assert [h[0] for h in utterance] == [h[0] for h in expected_utterance]
        assert [h[3] for h in utterance] == [h[3] for h in expected_utterance]
        for a, b in zip(utterance, expected_utterance, strict=True):
            assert a[1] == pytest.approx(b[1], abs=tolerance) and a[2] == pytest.approx(b[2], abs=tolerance)


def assert_equals_the_reference(sizes, options):
    V, M, H, D, E, T, B, K = sizes
    weights, memory = random_weights(V, M, H, D, E), random_memory(B, T, D, E)
    expected = search(weights, memory, beam=K, backend="reference", **options)
    assert_same(search(weights, memory, beam=K, **options), expected)


@on_each_size
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_hypotheses_scores_and_attended_frames_equal_the_reference(cpp, sizes, options):
    assert_equals_the_reference(sizes, options)


def test_ctc_log_probs_with_weight_zero_do_not_change_the_search(cpp):
    weights, memory = random_weights(7, 5, (6,), 4, 3), random_memory(4, 9, 4, 3)
    for backend in (cpp, "reference"):
        actual = search(
            weights, memory, beam=3, backend=backend, ctc_log_probs=random_ctc_log_probs(4, 9, 7), ctc_weight=0.0
        )
        expected = search(weights, memory, beam=3, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_the_reference_calls_only_torch_ops(cpp):
    weights, memory = random_weights(7, 5, (6,), 4, 3), random_memory(4, 9, 4, 3)
    called = ops_called(lambda: search(weights, memory, beam=3, backend="reference", **ALL_OPTIONS))
    assert called and not [name for name in called if name.startswith("las_fast::")]


def test_each_utterance_has_its_own_minimum_length(cpp):
    weights, memory = random_weights(7, 5, (6,), 4, 3), random_memory(4, 9, 4, 3)
    weights.bias[EOS] += 4.0  # ends as soon as the minimum allows
    minimum, maximum = torch.tensor([5, 0, 3, 7]), torch.full((4,), 9)
    shared = {"sos": SOS, "eos": EOS, "beam": 3, "maximum": maximum}
    actual, expected = (
        speller_search(weights, *memory, minimum=minimum, backend=backend, **shared) for backend in (cpp, "reference")
    )
    assert_same(actual, expected)
    shortest = [min(len(h[0]) for h in utterance) for utterance in hypotheses(actual)]
    assert shortest == minimum.tolist()


def test_the_coverage_of_a_frame_is_clamped_to_1(cpp):
    weights, memory = random_weights(7, 5, (6,), 4, 3), random_memory(4, 9, 4, 3)
    memory = (memory[0][:, :3], memory[1][:, :3], torch.tensor([3, 2, 1, 3]))
    options = {"beam": 4, "coverage_weight": 3.0, "maximum": torch.full((4,), 12), "minimum": 6}
    expected = search(weights, memory, backend="reference", **options)
    actual = search(weights, memory, **options)
    assert_same(actual, expected)


def one_cell(gates, bias, values, factor=1.0):
    """Weights of a speller with one cell, and a memory of one frame.

    gates: (4 * H, 3 + E + H) weights of embedding, context and state. The first number of an embedding is 1 for <sos>
    and 0 for other tokens. factor: scale of the cell's output in the projection.
    """
    H, E = gates.shape[0] // 4, values.shape[0]
    generator = torch.Generator().manual_seed(3)
    embedding = torch.randn(5, 3, generator=generator)
    embedding[:, 0] = 0.0
    embedding[SOS, 0] = 1.0
    project = torch.cat((factor * torch.ones(3, H), torch.zeros(3, E)), 1)
    token_bias = torch.tensor([-1e4, -1e4, 0.3, -0.2, 0.1])  # so that no two hypotheses have equal scores
    weights = SpellerWeights(
        embedding, torch.zeros(2, H), torch.zeros(2), project, torch.zeros(3), token_bias, (gates,), (bias,)
    )
    return weights, (torch.zeros(1, 1, 2), values.view(1, 1, E), torch.tensor([1]))


INPUT, FORGET, CANDIDATE, OUTPUT = range(4)


@pytest.mark.parametrize("size", [13.0, 21.0, 30.0])
@pytest.mark.parametrize("gate", [INPUT, FORGET, OUTPUT])
def test_a_nearly_closed_gate_still_passes_its_fraction(cpp, gate, size):
    """The state is scaled up until it matters, so clamping the gate at a smaller size would change the scores."""
    gates, bias = torch.zeros(4, 3 + 1 + 1), torch.tensor([0.0, 0.0, 1.0, 0.0])
    bias[gate] = -size
    if gate == FORGET:  # open the input gate at the first step only, and the output gate after it only
        bias[INPUT], gates[INPUT, 0], gates[OUTPUT, 0] = -80.0, 80.0, -80.0
    weights, memory = one_cell(gates, bias, torch.zeros(1), factor=math.exp(size))
    options = {"beam": 4, "maximum": torch.tensor([3]), "minimum": 2}
    actual = search(weights, memory, **options)
    expected = search(weights, memory, backend="reference", **options)
    assert_same(actual, expected)
    bias[gate] -= 100.0
    closed = search(weights, memory, **options)
    assert float((closed.scores[1] - actual.scores[1]).abs().max()) > 0.03


@pytest.mark.parametrize("part", ["rows", "columns"])
def test_int8_matmuls_are_rescaled(cpp, part):
    """64 equal numbers quantise exactly, so their product, 96, is exact; the bias cancels all but 0.2 of it."""
    size = 64
    gates, bias, values = torch.zeros(4, 3 + size + 1), torch.full((4,), -96.0), torch.ones(size)
    gates[:, 3:-1] = 1.5
    bias[CANDIDATE], bias[OUTPUT], gates[OUTPUT] = -95.8, 0.0, 0.0
    weights, memory = one_cell(gates, bias, values if part == "rows" else 4.0 * values, factor=4.0)
    if part == "columns":
        gates[:, 3:-1] /= 4.0
    options = {"beam": 4, "maximum": torch.tensor([3]), "minimum": 2}
    actual = search(weights, memory, precision="int8", **options)
    expected = search(weights, memory, backend="reference", **options)
    assert_same(actual, expected, tolerance=2e-3)


@pytest.mark.parametrize("scale", [10.0, 200.0, 1e4])
def test_saturated_gates_equal_the_reference(cpp, scale):
    weights, memory = random_weights(7, 5, (6,), 4, 3), random_memory(3, 9, 4, 3)
    weights = weights._replace(gates=tuple(scale * gates for gates in weights.gates))
    expected = search(weights, memory, beam=4, backend="reference")
    assert_same(search(weights, memory, beam=4), expected)


def las(lstm_sizes=(24, 20), seed=3) -> LAS:
    torch.manual_seed(seed)
    speller = SpellerConfig(key_size=16, value_size=8, embedding_size=12, lstm_sizes=lstm_sizes)
    model = LAS(ModelConfig(ListenerConfig((8,), (3,), (2,), 8, 1), speller), input_size=4, vocabulary_size=31).eval()
    with torch.no_grad():
        for parameter in model.speller.parameters():
            parameter *= 3  # the outputs of an untrained speller are nearly uniform
    return model


def encode(model, lengths=(200, 90, 7, 1)):
    with torch.inference_mode():
        return model.listen(torch.randn(len(lengths), 200, 4, generator=torch.Generator().manual_seed(4)),
                            torch.tensor(lengths))  # fmt: skip


@pytest.mark.parametrize("lstm_sizes", [(20,), (24, 20), (8, 16, 20)])
def test_the_reference_equals_the_search_step_by_step(lstm_sizes):
    model = las(lstm_sizes)
    memory = encode(model)
    config = DecodingConfig(beam=5, beam_threshold=1.0, maximum_share=0.2, coverage_weight=0.1, eos_threshold=0.9)
    stepwise = beam_search(model, memory, config, nbest=5, backend="reference")
    steps = speller_search(
        model.speller.weights(), *memory[:3], beam=5, sos=SOS, eos=EOS, length_penalty=1.0, eos_threshold=0.9,
        coverage_weight=0.1, maximum=(memory.lengths * model.time_reduction * 0.2).long() + 10, beam_threshold=1.0,
        backend="reference",
    )  # fmt: skip
    for utterance, expected_utterance in zip(hypotheses(steps), stepwise, strict=True):
        assert [h[0] for h in utterance] == [h.text_tokens for h in expected_utterance]
        assert [h[3] for h in utterance] == [h.attended_frames for h in expected_utterance]
        assert [h[1] for h in utterance] == pytest.approx([h.score for h in expected_utterance], abs=1e-5)


@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_the_search_of_a_las_on_a_cpu_is_one_op(cpp, backend):
    model = las()
    memory = encode(model)
    called = ops_called(lambda: beam_search(model, memory, DecodingConfig(beam=3), backend=backend))
    assert called.count("las_fast::speller_search_cpp") == 1
    assert not {"las_fast::beam_topk_cpp", "las_fast::masked_attention_cpp", "aten::addmm"} & set(called)


def test_other_models_and_precisions_go_step_by_step(cpp):
    class Other(LAS):
        pass

    model, other = las(), las()
    other.__class__ = Other
    memory, config = encode(model), DecodingConfig(beam=3)
    expected = beam_search(other, memory, config)
    with torch.autocast("cpu", torch.bfloat16):
        assert "las_fast::speller_search_cpp" not in ops_called(lambda: beam_search(model, memory, config))
    for run in (
        lambda: beam_search(other, memory, config),
        lambda: beam_search(model, memory, config, backend="reference"),
        lambda: beam_search(model, memory, config, capture=False),
    ):
        assert "las_fast::speller_search_cpp" not in ops_called(run)
        assert [h[0].text_tokens for h in run()] == [h[0].text_tokens for h in expected]
    for precision, needs in (("bf16", "a LAS, and not"), ("int8", r"a LAS \(no subclass of it\) on a CPU")):
        with pytest.raises(InputError, match=f"decoding.precision {precision} needs {needs}"):
            beam_search(other, memory, replace(config, precision=precision))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_search_in_lower_precision_equals_the_op(cpp, precision):
    model = las()
    memory, config = encode(model), DecodingConfig(beam=4, beam_threshold=1.0, precision=precision)
    steps = speller_search(
        model.speller.weights(), *memory[:3], beam=4, sos=SOS, eos=EOS, length_penalty=1.0, precision=precision,
        maximum=(memory.lengths * model.time_reduction * 0.3).long() + 10, beam_threshold=1.0,
    )  # fmt: skip
    for utterance, expected_utterance in zip(
        hypotheses(steps), beam_search(model, memory, config, nbest=4), strict=True
    ):
        assert [h[:2] for h in utterance] == [(h.text_tokens, h.score) for h in expected_utterance]


@on_each_precision
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "every option"])
def test_an_utterance_has_the_same_bits_alone_and_in_any_batch(cpp, precision, options):
    weights, memory = random_weights(31, 33, (32, 31), 33, 17), random_memory(6, 40, 33, 17)
    limits = some_limits(6)
    batched = search(weights, memory, beam=5, precision=precision, **options)
    for b, n in enumerate(memory[2].tolist()):
        alone = (*(x[b : b + 1, : n + 3] for x in memory[:2]), memory[2][b : b + 1])
        ctc = {"ctc_log_probs": random_ctc_log_probs(6, 40, 31)[b : b + 1]} if "ctc_weight" in options else {}
        one = search(weights, alone, beam=5, precision=precision, maximum=limits[b : b + 1], **options, **ctc)
        steps = len(one.tokens)
        assert (batched.tokens[steps:, b][batched.scores[steps:, b].isfinite()] == EOS).all()
        assert (batched.attended_frames[steps:, b] == 0).all() and (batched.parents[steps:, b] == torch.arange(5)).all()
        for a, expected in zip(one, batched, strict=True):
            assert torch.equal(a[:, 0], expected[:steps, b])


@on_each_precision
def test_a_batch_larger_than_the_workers_equals_its_parts(cpp, precision):
    weights, memory = random_weights(7, 5, (6,), 4, 3), random_memory(6, 9, 4, 3)
    repeated = tuple(x.repeat(10, *[1] * (x.ndim - 1)) for x in memory)
    actual = search(weights, repeated, beam=13, precision=precision, maximum=some_limits(6).repeat(10))
    expected = search(weights, memory, beam=13, precision=precision)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b.repeat(1, 10, 1))


@on_each_precision
@pytest.mark.parametrize("B", [1, 2, 5])
def test_two_threads_give_the_same_bits(cpp, precision, B):
    weights, memory = random_weights(31, 33, (32, 31), 33, 17), random_memory(B, 40, 33, 17)
    expected = search(weights, memory, beam=7, precision=precision, **ALL_OPTIONS)
    with threads(2):
        actual = search(weights, memory, beam=7, precision=precision, **ALL_OPTIONS)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@on_each_precision
def test_padding_full_of_nan_does_not_matter(cpp, precision):
    weights, memory = random_weights(7, 5, (6,), 4, 3), random_memory(5, 9, 4, 3)
    dirty = [x.masked_fill(padding_mask(memory[2], 9)[..., None], NAN) for x in memory[:2]]
    actual = search(weights, (*dirty, memory[2]), beam=4, precision=precision)
    for a, b in zip(actual, search(weights, memory, beam=4, precision=precision), strict=True):
        assert torch.equal(a, b)


@on_each_precision
@pytest.mark.parametrize("sizes", [(31, (33, 20)), (1, (63,)), (63, (65, 63))], ids=str)
@pytest.mark.parametrize("bad", [NAN, torch.inf, 1e38])
def test_a_nan_utterance_changes_no_other(cpp, precision, sizes, bad):
    E, H = sizes
    weights, (keys, values, lengths) = random_weights(31, 33, H, 16, E), random_memory(4, 40, 16, E)
    lengths = torch.full_like(lengths, 40)
    expected = search(weights, (keys, values, lengths), beam=5, precision=precision)
    values[3] = bad
    for a, b in zip(search(weights, (keys, values, lengths), beam=5, precision=precision), expected, strict=True):
        steps = min(len(a), len(b))
        assert torch.equal(a[:steps, :3], b[:steps, :3])


@on_each_precision
def test_the_search_takes_no_more_steps_than_the_longest_maximum(cpp, precision):
    weights, memory = random_weights(7, 5, (6,), 4, 3), random_memory(3, 9, 4, 3)
    for longest in (1, 5):
        steps = search(weights, memory, beam=4, precision=precision, maximum=torch.tensor([1, longest, 1]))
        assert len(steps.tokens) <= longest + 1 and (steps.tokens[-1][steps.scores[-1].isfinite()] == EOS).all()


def live_beams(steps):
    """Whether each beam of each step goes on, (L, B, K), and whether each is dropped or does not exist."""
    finished, rows = torch.zeros_like(steps.tokens[0], dtype=torch.bool), []
    for tokens, parents in zip(steps.tokens, steps.parents, strict=True):
        finished = finished.gather(1, parents) | (tokens == EOS)
        rows.append(~finished)
    missing = steps.scores.isneginf()
    return torch.stack(rows) & ~missing, missing


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_the_beams_that_a_threshold_drops_are_those_of_the_reference(cpp, threshold):
    weights, memory = random_weights(31, 33, (32, 31), 33, 17), random_memory(5, 40, 33, 17)
    options = {"beam": 8, "length_penalty": 1.0, "maximum": torch.full((5,), 20)}
    actual, expected = (
        search(weights, memory, backend=backend, beam_threshold=threshold, **options) for backend in (cpp, "reference")
    )
    live, missing = live_beams(actual)
    assert len(actual.tokens) == len(expected.tokens) and torch.equal(missing, live_beams(expected)[1])
    assert live.any() and (missing & (torch.arange(len(missing)) > 1)[:, None, None]).any()


def test_the_search_ends_when_a_finished_beam_is_far_above_the_others(cpp):
    weights, memory = random_weights(7, 5, (6,), 4, 3), random_memory(4, 9, 4, 3)
    weights.bias[EOS] += 3.0  # often the best first token, so the other beams are soon far below
    options = {"beam": 4, "maximum": torch.full((4,), 40)}
    for backend in (cpp, "reference"):
        exact = search(weights, memory, backend=backend, **options)
        pruned = search(weights, memory, backend=backend, beam_threshold=0.0, **options)
        assert len(pruned.tokens) < len(exact.tokens)
        best, exact_best = ([utterance[0] for utterance in hypotheses(steps)] for steps in (pruned, exact))
        assert [h[:2] for h in best] == [h[:2] for h in exact_best]


def test_nan_outputs_give_no_hypothesis(cpp):
    model = las()
    memory = encode(model)
    expected = beam_search(model, memory, DecodingConfig(beam=3))
    keys = memory.keys.masked_fill((torch.arange(4) == 1)[:, None, None], NAN)
    actual = beam_search(model, memory._replace(keys=keys), DecodingConfig(beam=3))
    assert actual[1][0].text_tokens == [] and actual[1][0].score == -torch.inf
    assert [actual[b] == expected[b] for b in range(4)] == [True, False, True, True]


def test_updated_weights_are_used(cpp):
    model = las()
    memory, config = encode(model), DecodingConfig(beam=3)
    before = beam_search(model, memory, config)
    model.speller.cells[0].gates.weight.data *= -1
    after = beam_search(model, memory, config)
    assert after != before
    stepwise = beam_search(model, memory, config, capture=False)
    assert [h[0].text_tokens for h in after] == [h[0].text_tokens for h in stepwise]


CPU = torch.device("cpu")


@on_each_precision
@on_each_size
def test_packed_weights_give_the_same_result(cpp, precision, sizes):
    V, M, H, D, E, T, B, K = sizes
    weights, memory = random_weights(V, M, H, D, E), random_memory(B, T, D, E)
    packed = speller_pack(weights, CPU, precision=precision)
    expected = search(weights, memory, beam=K, precision=precision)
    for _ in range(2):  # the first search must not modify them
        for a, b in zip(search(weights, memory, beam=K, precision=precision, packed=packed), expected, strict=True):
            assert torch.equal(a, b)


@on_each_precision
def test_the_search_reads_the_packed_weights(cpp, precision):
    weights, other = (random_weights(31, 33, (32, 31), 33, 17, seed) for seed in (0, 9))
    memory = random_memory(5, 40, 33, 17)
    mixed = other._replace(**{x: getattr(weights, x) for x in ("query_bias", "project_bias", "bias", "gate_biases")})
    packed = speller_pack(mixed, CPU, precision=precision)
    embedded = weights._replace(embedding=other.embedding)  # the embedding table is not packed
    actual = search(embedded, memory, beam=5, precision=precision, packed=packed)
    for a, b in zip(actual, search(mixed, memory, beam=5, precision=precision), strict=True):
        assert torch.equal(a, b)


def test_a_las_packs_weights_only_for_the_native_search(cpp):
    model = las()
    memory, config = encode(model), DecodingConfig(beam=4)
    packed = packed_weights(model, config, "cpu")
    searched = []
    called = ops_called(lambda: searched.append(beam_search(model, memory, config, packed=packed)))
    assert "las_fast::speller_search_cpp" in called and searched == [beam_search(model, memory, config)]
    other = packed_weights(las(seed=5), config, "cpu")
    assert beam_search(model, memory, config, packed=other) != searched[0]  # the search reads the packed weights
    assert packed_weights(model, config, "cpu", backend="reference") is None
    assert packed_weights(model.double(), config, "cpu") is None
    assert speller_pack(random_weights(7, 5, (6,), 4, 3), CPU, backend="reference") is None


@on_each_precision
def test_packed_weights_of_other_sizes_or_precisions_are_refused(cpp, precision):
    weights, memory = random_weights(7, 5, (6,), 4, 3), random_memory(3, 9, 4, 3)
    packed = speller_pack(weights, CPU, precision=precision)
    other = "fp32" if precision == "int8" else "int8"
    message = "packed must come from speller_pack, for weights of these sizes in this precision"
    wrong = (speller_pack(weights, CPU, precision=other), packed[1:], packed.char(), packed.repeat(2)[::2])
    for wrong_packed in wrong:
        with pytest.raises(RuntimeError, match=message):
            search(weights, memory, beam=4, precision=precision, packed=wrong_packed)
    reordered = random_weights(7, 32, (16, 8, 24), 32, 3), random_weights(7, 32, (16, 24, 8), 32, 3)
    other_order = reordered[0]._replace(query=torch.ones(32, 24))
    packed = speller_pack(reordered[1], CPU, precision=precision)
    with pytest.raises(RuntimeError, match=message):
        search(other_order, random_memory(3, 9, 32, 3), beam=4, precision=precision, packed=packed)
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, int8; got 'fp16'"):
        speller_pack(weights, CPU, precision="fp16")
    with pytest.raises(RuntimeError, match=r"weights: project must be \[5, 9\]; got \[4, 9\]"):
        speller_pack(weights._replace(project=torch.ones(4, 9)), CPU)
    with pytest.raises(RuntimeError, match="D and E at least 1; got"):
        speller_pack(weights._replace(project=torch.ones(5, 4)), CPU, precision=precision)
    with pytest.raises(RuntimeError, match=r"query must be \(D, H\) and project \(M, H \+ E\); got \[4\] and"):
        speller_pack(weights._replace(query=torch.ones(4)), CPU)


TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


def next_token_log_probs(weights, memory, tokens, dtype, int8=False):
    """(B, U + 1, V) log-probabilities of the next token after each prefix of tokens (B, U), by the plain formulas."""
    cast = [x.to(dtype) for x in weights.flat()]
    cast = SpellerWeights.from_flat(cast)
    keys, values = (x.to(dtype) for x in memory[:2])
    options = SearchOptions(1, SOS, EOS, None, some_limits(len(keys)), 0.0, 0.0, 0.0, None, 0.0)
    beams, state = _begin(cast, keys, values, options)
    actual = []
    for previous in (beams.tokens, *tokens.T[..., None]):
        logits, _, _, state = step(cast, keys, values, memory[2], previous, state, int8=int8)
        actual.append(logits[:, 0].double().log_softmax(-1))
    return torch.stack(actual, 1)


def check_log_probabilities(sizes, precision):
    V, M, H, D, E, T, B, _ = sizes
    weights, memory = random_weights(V, M, H, D, E), random_memory(B, T, D, E)
    steps = search(weights, memory, beam=V, maximum=torch.full((B,), 9), precision=precision)
    none = torch.empty(B, 0, dtype=torch.int64)
    exact = next_token_log_probs(weights, memory, none, torch.float64)[:, 0]
    baseline = next_token_log_probs(weights, memory, none, TYPES[precision], int8=precision == "int8")[:, 0]
    actual = torch.empty_like(exact).scatter_(1, steps.tokens[0], steps.scores[0].double())
    assert torch.equal(steps.tokens[0].sort().values, torch.arange(V).expand(B, V))
    error, baseline_error = ((x - exact)[:, EOS:].square().mean().sqrt() for x in (actual, baseline))
    assert error <= 2 * baseline_error + 1e-6


@on_each_precision
@pytest.mark.parametrize("sizes", [x for x in SIZES if x[0] > 4], ids=lambda x: "x".join(map(str, x)).replace(" ", ""))
def test_log_probabilities_err_at_most_twice_as_much_as_the_plain_formula(cpp, sizes, precision):
    check_log_probabilities(sizes, precision)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_inputs_of_more_than_640_bytes_count_whole(cpp, precision):
    """AMX takes bf16 inputs in parts of 640 bytes, and int8 inputs whole."""
    check_log_probabilities((7, 5, (6,), 4, 700, 9, 3, 4), precision)


@on_each_precision
@pytest.mark.parametrize("sizes", [x for x in SIZES if x[0] > 4], ids=lambda x: "x".join(map(str, x)).replace(" ", ""))
def test_later_tokens_err_at_most_twice_as_much_as_the_plain_formula(cpp, sizes, precision):
    V, M, H, D, E, T, B, _ = sizes
    weights, memory = random_weights(V, M, H, D, E), random_memory(B, T, D, E)
    limit = torch.full((B,), 12)
    steps = search(weights, memory, beam=1, maximum=limit, minimum=12, precision=precision)
    tokens, scores = steps.tokens[:, :, 0].T, steps.scores[:, :, 0].T.double()
    token_log_probs = scores.diff(dim=1, prepend=torch.zeros(B, 1).double())
    exact, baseline, coarse = (
        next_token_log_probs(weights, memory, tokens[:, :-1], dtype, int8).gather(2, tokens[..., None])[..., 0]
        for dtype, int8 in ((torch.float64, False), (TYPES[precision], precision == "int8"), (torch.bfloat16, True))
    )
    error, baseline_error = ((x - exact).square().mean().sqrt() for x in (token_log_probs, baseline))
    assert error <= 2 * baseline_error + 2e-6
    if precision != "int8":
        assert error < (coarse - exact).square().mean().sqrt()
    else:
        assert not torch.equal(steps.scores, search(weights, memory, beam=1, maximum=limit, minimum=12,
                                                    precision="bf16").scores)  # fmt: skip


@pytest.mark.parametrize("factor", [0.0, 1e-38, 1e-20, 1e20])
def test_int8_supports_weights_of_any_magnitude(cpp, factor):
    weights, memory = random_weights(31, 33, (32, 31), 33, 17), random_memory(5, 40, 33, 17)
    gates = [gate.clone() for gate in weights.gates]
    gates[0][:, 33:] *= factor  # the weights of context and state
    gates[1][3:7] *= factor
    gates[1][:, 5] *= factor
    weights = weights._replace(gates=tuple(gates))
    actual = search(weights, memory, beam=4, precision="int8")
    expected = search(weights, memory, beam=4, precision="int8", backend="reference")
    torch.testing.assert_close(actual.scores[0], expected.scores[0], atol=0.1, rtol=0.02)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_propagate_in_int8(cpp, value):
    weights, memory = random_weights(31, 33, (32, 31), 33, 17), random_memory(2, 40, 33, 17)
    weights.gates[1][5, 3] = value
    steps = search(weights, memory, beam=4, precision="int8")
    assert not steps.scores.isfinite().any()


def test_int8_matmuls_equal_matmuls_of_the_rounded_numbers():
    x, weights = torch.randn(5, 3, 9), torch.randn(4, 9)
    x[0, 0], weights[1] = 0.0, 0.0
    actual = linear_int8(x, weights)
    steps = [y.abs().amax(-1, keepdim=True) / 127 for y in (x, weights)]
    rounded = [torch.where(step > 0, (y / step).round() * step, y) for y, step in zip((x, weights), steps, strict=True)]
    torch.testing.assert_close(actual, rounded[0] @ rounded[1].T)
    torch.testing.assert_close(actual, x @ weights.T, atol=0.1, rtol=0)
    assert not torch.equal(actual, x @ weights.T)


@pytest.fixture(scope="module")
def an4():
    """(model, decoding settings, memories of all development utterances) of a trained model."""
    path = Path(__file__).resolve().parents[2] / ".." / "shared" / "an4" / "hw4p2_student_data"
    if not path.is_dir():
        pytest.skip("../shared/an4 is absent")
    loaded = load_model(CHECKPOINT)
    options = {"features": loaded.config.features, "data": loaded.config.data, "statistics": None, "need_text": False}
    dev = load_dataset(open_corpus(path), ("dev",), **options)
    batches = sorted_batches(dev.frame_counts, frames_per_batch=10000, utterances_per_batch=64)
    loader = make_loader(dev, batches, loaded.vocabulary, augment=None, seed=0, epoch=0, workers=0)
    with torch.inference_mode():
        memories = [loaded.model.listen(batch.features, batch.feature_lengths) for batch in loader]
    assert sum(len(memory.lengths) for memory in memories) == 104
    return loaded.model, loaded.config.decoding, memories


@pytest.mark.parametrize(("beam", "ctc_weight"), [(1, 0.0), (4, 0.0), (8, 0.0), (1, 0.5), (8, 0.3)])
def test_the_native_search_decodes_real_speech_as_the_search_by_steps_does(cpp, an4, beam, ctc_weight):
    model, config, memories = an4
    for memory in memories:
        actual, expected = (
            beam_search(model, memory, replace(config, beam=beam, ctc_weight=ctc_weight), nbest=beam, capture=capture)
            for capture in (None, False)
        )
        for actual_utterance, expected_utterance in zip(actual, expected, strict=True):
            assert [(h.text_tokens, h.attended_frames, h.finished) for h in actual_utterance] == [
                (h.text_tokens, h.attended_frames, h.finished) for h in expected_utterance
            ]
            assert [h.score for h in actual_utterance] == pytest.approx([h.score for h in expected_utterance], abs=1e-4)


@on_each_precision
def test_real_speech_has_the_same_bits_alone_and_in_a_batch(cpp, an4, precision):
    model, config, memories = an4
    config, batch = replace(config, precision=precision), memories[-1]
    expected = beam_search(model, batch, config, nbest=8)
    for b in range(0, len(batch.lengths), 7):
        alone = Memory(*(x[b : b + 1] for x in batch[:4]))
        assert beam_search(model, alone, config, nbest=8) == expected[b : b + 1]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_low_precision_changes_at_most_5_of_104_utterances(cpp, an4, precision):
    model, config, memories = an4
    pairs = [
        (a[0].text_tokens, b[0].text_tokens)
        for memory in memories
        for a, b in zip(
            *(beam_search(model, memory, replace(config, precision=x)) for x in ("fp32", precision)), strict=True
        )
    ]
    assert sum(a != b for a, b in pairs) <= 5


@on_each_precision
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "every option"])
def test_the_registered_op_passes_opcheck(cpp, precision, options):
    weights, memory = random_weights(7, 5, (6, 3), 4, 3), random_memory(3, 9, 4, 3)
    model = table_model(torch.zeros(7, 7), SOS)
    ngram = (model.rows, model.arcs, model.order, model.start) if options else (None, None, 0, 0)
    frames = random_ctc_log_probs(3, 9, 7) if options else None
    arguments = (4, SOS, EOS, some_limits(3) if options else None, some_limits(3) + 3, 1.0, 0.5, 0.1, *ngram, 0.5)
    arguments += (frames, 0.3, 2.0 if options else torch.inf)
    torch.library.opcheck(torch.ops.las_fast.speller_pack_cpp.default, (weights.flat(), precision))
    for packed in (None, speller_pack(weights, CPU, precision=precision)):
        torch.library.opcheck(
            torch.ops.las_fast.speller_search_cpp.default,
            (weights.flat(), *memory, *arguments, precision, packed),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *WRONG_MEMORY,
        ({"maximum": torch.ones(2).long()}, r"maximum must be \(3,\) int64; got \(2,\)"),
        ({"precision": "fp16"}, "precision must be one of fp32, bf16, int8; got 'fp16'"),
        ({"beam": 0}, "beam must be at least 1; got 0"),
        ({"beam_threshold": -1.0}, "beam_threshold must be 0 or more, or infinity for none; got -1.0"),
        ({"ctc_weight": 1.5}, "ctc_weight must be from 0 to 1; got 1.5"),
        ({"ctc_weight": float("nan")}, "ctc_weight must be from 0 to 1; got nan"),
        ({"eos": 7}, "eos must be a token from 0 to 6; got 7"),
        ({"sos": -1}, "sos must be a token from 0 to 6; got -1"),
        ({"ctc_log_probs": torch.ones(3, 9, 6)}, r"ctc_log_probs must be \(B, T', V\) .* B=3, V=7; got \(3, 9, 6\)"),
        ({"ngram": table_model(torch.ones(6, 6), SOS)}, "ngram must be a model of 7 tokens; got one of 6"),
    ],
)
def test_arguments_that_disagree_are_named(change, message):
    keys, values, lengths = random_memory(3, 9, 4, 3)
    arguments = {"keys": keys, "values": values, "lengths": lengths, "maximum": some_limits(3)}
    arguments |= {"beam": 4, "sos": SOS, "eos": EOS} | change
    with pytest.raises(ValueError, match=message):
        speller_search(random_weights(7, 5, (6,), 4, 3), **arguments)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        *WRONG_MEMORY_OF_REGISTERED_OP,
        (4, 0, "beam must be at least 1; got 0"),
        (6, 7, "eos must be a token from 0 to 6; got 7"),
        (8, torch.ones(2).long(), r"maximum must be \(3,\) int64; got \[2\] Long"),
        (17, torch.ones(3, 9, 6), r"ctc_log_probs must be \(B, T', V\) float32 with B=3, V=7; got \[3, 9, 6\] Float"),
        (20, "fp16", "precision must be fp32, bf16 or int8; got fp16"),
        (12, None, "ngram_rows and ngram_arcs must be given together"),
        (12, torch.ones(7, 4), r"rows of the n-gram model must be \(N, 4\) int32; got \[7, 4\] Float"),
        (12, torch.ones(7, 3).int(), r"rows of the n-gram model must be \(N, 4\) int32; got \[7, 3\] Int"),
        (13, torch.ones(7, 3).int(), r"arcs of the n-gram model must be \(N, 2\) int32; got \[7, 3\] Int"),
        (14, 0, "the n-gram model must have at least 1 token and order 1; got 7 and 0"),
        (15, -1, "ngram_start must be from 0 to 6; got -1"),
        (15, 7, "ngram_start must be from 0 to 6; got 7"),
    ],
)
def test_the_registered_op_checks_its_arguments(cpp, place, value, message):
    weights, memory = random_weights(7, 5, (6,), 4, 3), random_memory(3, 9, 4, 3)
    arguments = [weights.flat(), *memory, 4, SOS, EOS, None, some_limits(3), 0.0, 0.0, 0.0]
    model = table_model(torch.zeros(7, 7), SOS)
    arguments += [model.rows, model.arcs, model.order, model.start, 0.1, None, 0.0, torch.inf, "fp32", None]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.las_fast.speller_search_cpp(*arguments)


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, r"\(4 \* H,\); got \[0\]"), (3, r"\(4 \* H,\); got \[3\]"), (25, r"\[24\]; got \[25\]")],
)
def test_gate_biases_have_four_values_per_unit(cpp, count, said):
    weights = random_weights(7, 5, (6,), 4, 3).flat()
    weights[7] = torch.ones(count)
    with pytest.raises(RuntimeError, match=f"weights: gate_biases must be {said}"):
        torch.ops.las_fast.speller_pack_cpp(weights, "fp32")


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_weight_of_another_dtype_is_named_by_its_place(cpp, place):
    weights = random_weights(7, 5, (6,), 4, 3).flat()
    weights[place] = weights[place].double()
    with pytest.raises(RuntimeError, match=rf"weights\[{place}\] must be float32; got Double"):
        torch.ops.las_fast.speller_pack_cpp(weights, "fp32")


@pytest.mark.parametrize("shape", [(0, 5), (7, 0), (7,), (7, 5, 1)])
def test_an_embedding_has_tokens_and_values(cpp, shape):
    weights = random_weights(7, 5, (6,), 4, 3).flat()
    weights[0] = torch.ones(shape)
    got = ", ".join(map(str, shape))
    with pytest.raises(RuntimeError, match=rf"weights: embedding must be \(V, M\); got \[{got}\]"):
        torch.ops.las_fast.speller_pack_cpp(weights, "fp32")


@pytest.mark.parametrize(("V", "sos", "eos"), [(7, 0, 6), (7, 6, 0), (2, 1, 0)])
def test_any_token_can_be_sos_or_eos(cpp, V, sos, eos):
    weights, memory = random_weights(V, 5, (6,), 4, 3), random_memory(4, 9, 4, 3)
    weights.bias.zero_()
    table = torch.randn(V**2, V, generator=torch.Generator().manual_seed(5)).log_softmax(-1)
    options = {"beam": 1, "sos": sos, "eos": eos, "ngram": table_model(table, sos), "ngram_weight": 0.7}
    actual, expected = (
        speller_search(weights, *memory, maximum=some_limits(4), backend=backend, **options)
        for backend in (cpp, "reference")
    )
    assert torch.equal(actual.tokens, expected.tokens)
    torch.testing.assert_close(actual.scores, expected.scores)


def test_an_empty_batch_gives_empty_results(cpp):
    memory = tuple(x[:0] for x in random_memory(3, 9, 4, 3))
    assert search(random_weights(7, 5, (6,), 4, 3), memory, beam=4).tokens.shape == (1, 0, 4)


def check_and_digest() -> str:
    for sizes in SIZES:
        assert_equals_the_reference(sizes, ALL_OPTIONS)
        for precision in ("bf16", "int8"):
            test_log_probabilities_err_at_most_twice_as_much_as_the_plain_formula("cpp", (*sizes[:7], 0), precision)
            if sizes[0] > 4:
                test_later_tokens_err_at_most_twice_as_much_as_the_plain_formula("cpp", sizes, precision)
    steps = search(random_weights(31, 33, (32, 31), 33, 17), random_memory(5, 40, 33, 17), beam=5)
    return hashlib.sha256(steps.scores.numpy().tobytes()).hexdigest()


def test_results_hold_with_vectors_of_older_processors(cpp):
    actual = digests(check_and_digest)
    widths = {"AVX512": 3, "AVX2": 2}.get(torch.backends.cpu.get_cpu_capability(), 1)
    assert len(actual) in (widths, widths - 1), "vectors with fused multiply-add round differently from those without"
