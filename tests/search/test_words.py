"""Words of hypotheses: their times are in order and inside the audio, and their confidences follow the formula."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from las_fast.config import DecodingConfig, FeatureConfig, ListenerConfig, ModelConfig, SpellerConfig
from las_fast.errors import InputError
from las_fast.model.attention import Memory
from las_fast.model.las import LAS
from las_fast.output.transcripts import Word
from las_fast.search.beam import TokenHypothesis, beam_search
from las_fast.search.confidence import (
    FEATURES,
    Calibration,
    LogisticRegression,
    calibration_path_for,
    load_calibration,
    word_features,
)
from las_fast.search.dataset import Utterances, decode_dataset
from las_fast.search.words import MIN_GAP, Votes, WordFinder, shift_words, token_evidence, word_times
from las_fast.text import Vocabulary

VOCABULARY = Vocabulary()
PLAIN = LogisticRegression(0.5, {"probability": 2.0, "ctc": 1.0}, {"probability": 0.25, "ctc": -1.0})
CALIBRATION = Calibration(PLAIN, replace(PLAIN, bias=-0.5))


def hypothesis(text: str, score: float = -1.0, frames=None, scores=None) -> TokenHypothesis:
    tokens = VOCABULARY.encode(text)
    scores = [-0.1] * len(tokens) if scores is None else scores
    frames = list(range(len(tokens))) if frames is None else frames
    return TokenHypothesis(tokens, score, score, frames, scores, True)


def make_model(*, ctc_layer: int = 1, pyramids: int = 1) -> LAS:
    torch.manual_seed(3)
    listener = ListenerConfig((8,), (3,), (2,), 8, pyramids)
    config = ModelConfig(listener, SpellerConfig(8, 8, 8, (8, 8)), ctc_layer=ctc_layer)
    return LAS(config, input_size=4, vocabulary_size=len(VOCABULARY)).eval()


def make_data() -> Utterances:
    features = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (60, 33, 48)]
    plain = FeatureConfig(size=4, mel_bins=4, normalisation="none")
    return Utterances(features, list("abc"), [len(x) / 100 for x in features], plain)


def finder(model, calibration=CALIBRATION, **options) -> WordFinder:
    return WordFinder(model, VOCABULARY, calibration, frame_shift=0.01, **options)


# --------------------------------------------------------------------------------------------------------------- times


def posterior_means(log_probs: torch.Tensor, tokens: list[int]) -> list[float]:
    """The mean frame of each token over all paths that spell the tokens, which must be distinct."""
    T, V = log_probs.shape
    total, sums, counts = 0.0, [0.0] * len(tokens), [0.0] * len(tokens)
    for path in itertools.product(range(V), repeat=T):
        if [k for k, _ in itertools.groupby(path) if k] != tokens:
            continue
        p = math.exp(sum(float(log_probs[t, k]) for t, k in enumerate(path)))
        total += p
        for u, token in enumerate(tokens):
            counts[u] += p * path.count(token)
            sums[u] += p * sum(t for t, k in enumerate(path) if k == token)
    assert total > 0
    return [s / n for s, n in zip(sums, counts, strict=True)]


def test_the_time_of_a_token_is_its_mean_frame_over_all_paths_by_brute_force():
    logits = 2 * torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(1))
    texts, lengths = [[3, 4], [4, 3, 1], []], [5, 4, 5]
    memory = Memory(None, None, None, None, logits, torch.tensor(lengths))
    actual = token_evidence(memory, texts)
    for evidence, text, T, rows in zip(actual, texts, lengths, logits, strict=True):
        log_probs = rows[:T].log_softmax(-1)
        times = posterior_means(log_probs, text)
        assert evidence.times == pytest.approx(times, abs=1e-4)
        for time, token, log_prob in zip(times, text, evidence.log_probs, strict=True):
            near = [t for t in range(T) if abs(t - round(time)) <= 1]
            assert log_prob == pytest.approx(max(float(log_probs[t, token]) for t in near), abs=1e-5)


def test_a_text_longer_than_the_ctc_frames_and_a_model_without_ctc_have_no_evidence():
    logits = torch.randn(2, 3, 5)
    memory = Memory(None, None, None, None, logits, torch.tensor([2, 3]))
    long, short = token_evidence(memory, [[3, 4, 3], [3, 4, 3]])
    assert long is None and len(short.times) == 3
    assert token_evidence(Memory(None, None, None, None), [[3], []]) == [None, None]


def test_words_start_near_their_first_character_and_later_after_a_pause():
    calibration = replace(CALIBRATION, start=-0.02, start_after_pause=0.03, end=0.05)
    #        A    B    ' '   C   ' '  D
    times = [0.5, 0.6, 0.64, 0.8, 1.5, 1.6]  # the space before D comes 0.7 s after C: a pause
    starts, ends = word_times(np.array(times), [(0, 2), (3, 4), (5, 6)], 1.62, calibration)
    assert starts == pytest.approx([0.53, 0.78, 1.61])  # the last would be 1.63, past the end
    assert ends == pytest.approx([0.65, 0.85, 1.62])


def in_order(starts, ends, limit) -> bool:
    after = [*starts[1:], limit]
    return starts[0] >= 0 and all(a < b <= c + 1e-12 for a, b, c in zip(starts, ends, after, strict=True))


def test_words_are_in_order_and_inside_the_audio_whatever_the_token_times():
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 9))
        times = rng.uniform(-1, 4, 2 * count)
        limit = float(rng.choice([0.01, 0.5, 3.0]))
        starts, ends = word_times(times, [(2 * i, 2 * i + 1) for i in range(count)], limit, CALIBRATION)
        assert in_order(starts, ends, limit), (times, limit)
        assert np.diff(starts).min(initial=1) >= min(MIN_GAP, limit / (count + 1)) - 1e-9


def test_words_move_with_their_segment_and_stay_inside_it():
    words = [Word("A", 0.0, 0.2, 0.5), Word("B", 0.3, 0.5, 0.6), Word("C", 0.9, 1.2, 0.7)]
    assert shift_words([], 3.0, 3.0, 4.0) == ()
    actual = shift_words(words, 3.0, 3.1, 4.0)
    assert [(w.text, w.confidence) for w in actual] == [("A", 0.5), ("B", 0.6), ("C", 0.7)]
    assert [w.start for w in actual] == pytest.approx([3.1, 3.3, 3.9])
    assert [w.end for w in actual] == pytest.approx([3.2, 3.5, 4.0])


def test_without_a_ctc_head_times_come_from_the_attended_frames_made_monotone():
    model = make_model(ctc_layer=-1)
    one = hypothesis("AB C", frames=[2, 9, 5, 12])
    ((found,),) = finder(model)([[one]], Memory(None, None, torch.tensor([20]), None), [80], 1)
    first, second = found.words
    reduction = model.time_reduction
    assert first.start == pytest.approx(2 * reduction * 0.01 + CALIBRATION.start_after_pause)
    assert first.end == pytest.approx(9 * reduction * 0.01 + CALIBRATION.end)
    assert second.start == pytest.approx(12 * reduction * 0.01 + CALIBRATION.start)


@pytest.mark.parametrize(("ctc_layer", "pyramids", "reduction"), [(0, 2, 2), (1, 2, 4), (2, 2, 8), (0, 0, 2)])
def test_ctc_frames_are_as_long_as_those_of_the_heads_layer(ctc_layer, pyramids, reduction):
    model = make_model(ctc_layer=ctc_layer, pyramids=pyramids)
    with torch.inference_mode():
        memory = model.listen(torch.randn(1, 64, 4), torch.tensor([64]))
    assert model.ctc_time_reduction == reduction == 64 // int(memory.ctc_lengths[0])


# ---------------------------------------------------------------------------------------------------------- confidence


def test_hypotheses_vote_on_words_at_the_same_place():
    log = math.log
    texts = [("A B A", log(0.5), [0, 1, 2, 3, 30]), ("A C A", log(0.25), [0, 1, 2, 3, 30]), ("A", log(0.25), [29])]
    hypotheses = [hypothesis(text, score, frames) for text, score, frames in texts]
    votes = Votes([text for text, *_ in texts], hypotheses)
    assert votes.texts[0] == ["A", "B", "A"] and votes.spans[0] == [(0, 1), (2, 3), (4, 5)]
    assert votes.shares(0, 5) == pytest.approx([0.75, 0.5, 1.0])
    assert votes.shares(2, 5) == pytest.approx([1.0])
    assert votes.shares(0, 1) == pytest.approx([0.75, 0.5, 0.75])


def test_hypotheses_of_very_low_scores_keep_their_probabilities():
    votes = Votes(["A", "B"], [hypothesis("A", -5000.0), hypothesis("B", -5001.0)])
    assert votes.probabilities == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])


def test_features_of_a_word_by_hand():
    scores = np.array([-1.0, -3.0, -0.5, -2.0, -0.25])  # AB, space, C, <eos>
    actual = word_features([(0, 2), (3, 4)], scores, np.array([-1.0, -20.0, 0.0, -0.5]), np.array([1.0, 0.5]))
    expected = {
        "mean_score": [-2.0, -2.0], "min_score": [-3.0, -2.0], "probability": [math.exp(-2)] * 2,
        "end": [math.exp(-0.5), math.exp(-0.25)], "complete": [math.exp(-2.5), math.exp(-2.25)], "ctc": [-4.5, -0.5],
        "share": [1.0, 0.5], "letters": [math.log(2), 0.0], "hypothesis": [-1.35] * 2, "before": [-1.35, -2.0],
        "after": [-2.0, -1.35],
    }  # fmt: skip
    assert actual.keys() == expected.keys() and {*expected, "known"} == FEATURES.keys()
    for name, values in expected.items():
        assert actual[name] == pytest.approx(values), name


def test_a_confidence_is_a_logistic_function_and_missing_features_take_their_mean():
    features = {"probability": np.array([0.25, 1.0]), "letters": np.array([9.0, 9.0])}
    assert PLAIN(features) == pytest.approx([1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-2.0))])
    with_ctc = PLAIN(features | {"ctc": np.array([-1.0, -3.0])})
    assert with_ctc == pytest.approx([1 / (1 + math.exp(-0.5)), 0.5])


def test_known_words_are_more_likely_right_and_greedy_search_has_weights_of_its_own():
    weights = LogisticRegression(0.0, {"known": 2.0}, {"known": 0.5})
    calibration = Calibration(weights, replace(weights, bias=-1.0), frozenset({"AB"}))
    memory, model = Memory(None, None, torch.tensor([20]), None), make_model(ctc_layer=-1)
    for greedy, bias in ((False, 0.0), (True, -1.0)):
        ((found,),) = finder(model, calibration, greedy=greedy)([[hypothesis("AB C")]], memory, [80], 1)
        expected = [1 / (1 + math.exp(-bias - x)) for x in (1.0, -1.0)]
        assert [word.confidence for word in found.words] == pytest.approx(expected)


def test_a_calibration_is_read_as_it_was_saved(tmp_path):
    calibration = replace(CALIBRATION, known=frozenset({"L'ÉTÉ", "B"}), start=-0.25)
    calibration.save(calibration_path_for(tmp_path / "best.safetensors"))
    assert load_calibration(tmp_path / "best.safetensors") == calibration


def test_a_checkpoint_without_a_calibration_gets_the_default(tmp_path):
    default = load_calibration(tmp_path / "best.safetensors")
    assert not default.known and {"probability", "end"} <= default.beam.weights.keys() <= FEATURES.keys()
    assert "share" not in default.greedy.weights


END = {"end": 1.0}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"}, {"beam": {"bias": 1}}, {"known": 3}, {"end": "late"}, {"end": math.nan}, {"x": 1},
        {"beam": {"bias": 1, "weights": END, "means": {}}}, {"greedy": {"bias": "x", "weights": END, "means": END}},
        {"beam": {"bias": 1, "weights": {"end": math.inf}, "means": END}},
        {"beam": {"bias": 1, "weights": [], "means": {}}}, {"beam": {"bias": 10**400, "weights": END, "means": END}},
    ],
)  # fmt: skip
def test_a_damaged_calibration_is_refused(tmp_path, change):
    path = tmp_path / "best.words.json"
    CALIBRATION.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="is not a calibration of word confidences; copy it again or delete it"):
        load_calibration(tmp_path / "best.safetensors")


# ------------------------------------------------------------------------------------------------------------ decoding


def test_every_hypothesis_has_the_words_of_its_text_in_order():
    model, data = make_model(), make_data()
    config = DecodingConfig(beam=4, ctc_weight=0.3, maximum_share=0.5)
    options = {"progress": False, "device": "cpu", "nbest": 3}
    plain = decode_dataset(model, data, VOCABULARY, config, **options)
    found = decode_dataset(model, data, VOCABULARY, config, **options, words=finder(model))
    assert [[replace(h, words=()) for h in row] for row in found] == plain
    for row, seconds in zip(found, data.seconds, strict=True):
        for one in row:
            text = VOCABULARY.decode(one.text_tokens)
            assert [word.text for word in one.words] == text.split() and text
            assert in_order([w.start for w in one.words], [w.end for w in one.words], seconds)
            assert all(0 < word.confidence < 1 for word in one.words)


def test_words_are_the_same_alone_and_in_a_batch():
    model, data = make_model(), make_data()
    config = DecodingConfig(beam=3, ctc_weight=0.3, maximum_share=0.5)
    together = decode_dataset(model, data, VOCABULARY, config, progress=False, device="cpu", words=finder(model))
    for features, (best, *_) in zip(data.frames, together, strict=True):
        with torch.inference_mode():
            memory = model.listen(features[None], torch.tensor([len(features)]))
        hypotheses = beam_search(model, memory, config, nbest=3)
        ((alone,),) = finder(model)(hypotheses, memory, [len(features)], 1)
        assert len(alone.words) == len(best.words) > 0
        for a, b in zip(alone.words, best.words, strict=True):
            assert a.text == b.text
            assert (a.start, a.end, a.confidence) == pytest.approx((b.start, b.end, b.confidence), abs=1e-4)


def test_an_empty_text_and_blanks_have_no_words():
    model = make_model(ctc_layer=-1)
    memory = Memory(None, None, torch.tensor([20, 20]), None)
    found = finder(model)([[hypothesis("")], [hypothesis("  ")]], memory, [80, 80], 1)
    assert [row[0].words for row in found] == [(), ()]
    failed = TokenHypothesis([], -math.inf, -math.inf, [], [], False)  # of a model that diverged
    assert finder(model)([[failed]], memory, [80], 1)[0][0].words == ()
