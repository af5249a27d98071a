"""Density ratio: the scores are those of one model minus those of another, in memory, in files and in every backend."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from automata import PlainAutomaton

from las_fast import lm
from las_fast.errors import InputError
from las_fast.lm import train
from las_fast.ops import backends, ngram_scores, ngram_start
from las_fast.search.density_ratio import ngram_log_probs, subtract
from las_fast.search.kneser_ney import FORBIDDEN_LOG_PROB, Level, encode_sentences, token_log_probs
from las_fast.search.ngram import load_lm, save_lm
from las_fast.text import EOS, PAD, SOS, Vocabulary

AB = "AB "
V = len(Vocabulary(AB))
MUCH = ["ABBA", "AB AB", "BAAB B", "A", "BABBAABB AB", "BB", "AB BA AB AAB", "ABAB BABA", "AAAB"]
TRANSCRIPTS = ["BB AA", "ABBA", "BABBAABB", " A"]
TESTED = [*MUCH, *TRANSCRIPTS, "", "BBBBBBB", "A  A", "  "]
HERE = [name for name in ("reference", "cpp") if not backends.unavailable("ngram_scores", name)]


def random_texts(seed, count=40):
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(list(AB), int(generator.integers(9)))) for _ in range(count)]


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize(("order", "other"), [(5, 3), (3, 3), (2, 4), (1, 2), (4, 1)])
@pytest.mark.parametrize("prune", [1, 3])
def test_scores_are_log_p_minus_the_weighted_log_q(order, other, weight, prune):
    p, q = train(4 * MUCH, order=order, characters=AB, prune=prune), train(TRANSCRIPTS, order=other, characters=AB)
    scores = subtract(p.levels, q.levels, weight, V)
    tokens = encode_sentences([*TESTED, *random_texts(0)], AB)
    expected = token_log_probs(p.levels, tokens, V) - weight * token_log_probs(q.levels, tokens, V)
    np.testing.assert_allclose(token_log_probs(scores, tokens, V), expected, atol=1e-5)


def test_the_scores_of_a_model_minus_itself_are_zero():
    p = train(MUCH, order=4, characters=AB)
    for level in subtract(p.levels, p.levels, 1.0, V):
        values = level.log_probs[level.log_probs > FORBIDDEN_LOG_PROB]
        assert np.abs(values).max(initial=0) < 1e-6 and np.abs(level.backoffs).max(initial=0) < 1e-6


def test_pad_and_sos_stay_forbidden():
    levels = subtract(train(MUCH, order=3, characters=AB).levels, train([], order=2, characters=AB).levels, 1.0, V)
    assert (levels[0].log_probs[[PAD, SOS]] == FORBIDDEN_LOG_PROB).all()
    assert (levels[0].log_probs[EOS:] > FORBIDDEN_LOG_PROB).all()


def test_log_probs_of_unseen_ngrams_back_off():
    model = train(MUCH, order=4, characters=AB)
    every = np.arange(V**3)
    automaton = model.automaton()
    plain = PlainAutomaton(automaton)
    for ngram, value in zip(every.tolist(), ngram_log_probs(model.levels, every, 3, V), strict=True):
        context = (ngram // V**2, ngram // V % V)
        if min(*context, ngram % V) > SOS:
            assert value == pytest.approx(plain.log_probs(plain.after(context))[ngram % V], abs=1e-5)


@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_a_saved_difference_loads_with_its_weight_and_positive_scores(tmp_path, weight):
    p, q = train(MUCH, order=4, characters=AB), train(TRANSCRIPTS, order=3, characters=AB)
    model = replace(p, levels=subtract(p.levels, q.levels, weight, V), subtracted=weight)
    save_lm(tmp_path / "m.safetensors", model)
    back = load_lm(tmp_path / "m.safetensors")
    assert back.subtracted == weight and max(level.log_probs.max() for level in back.levels) > 0.1
    tokens = encode_sentences(TESTED, AB)
    expected = token_log_probs(model.levels, tokens, V)
    np.testing.assert_allclose(token_log_probs(back.levels, tokens, V), expected, atol=0.1)


def test_positive_log_probabilities_without_a_subtracted_model_are_damage(tmp_path):
    p, q = train(MUCH, order=4, characters=AB), train(TRANSCRIPTS, order=3, characters=AB)
    save_lm(tmp_path / "m.safetensors", replace(p, levels=subtract(p.levels, q.levels, 1.0, V)))
    with pytest.raises(InputError, match="is damaged"):
        load_lm(tmp_path / "m.safetensors")


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_that_no_model_has_is_damage(tmp_path, weight):
    save_lm(tmp_path / "m.safetensors", replace(train(MUCH, order=2, characters=AB), subtracted=weight))
    with pytest.raises(InputError, match="is damaged"):
        load_lm(tmp_path / "m.safetensors")


@pytest.mark.parametrize("backend", HERE)
def test_every_backend_follows_the_difference(backend):
    p, q = train(MUCH, order=4, characters=AB), train(TRANSCRIPTS, order=3, characters=AB)
    model = replace(p, levels=subtract(p.levels, q.levels, 0.7, V)).automaton()
    texts = [text for text in TESTED if len(text) >= 3]
    tokens = torch.tensor([[*Vocabulary(AB).encode(text[:3]), EOS] for text in texts])
    scores, same = ngram_start(model, len(texts), 1), torch.zeros(len(texts), 1, dtype=torch.int64)
    total = torch.zeros(len(texts))
    for taken in tokens.split(1, dim=1):
        total += scores.log_probs.gather(2, taken[..., None])[:, 0, 0]
        scores = ngram_scores(model, scores.states, parents=same, tokens=taken, backend=backend)
    encoded = encode_sentences([text[:3] for text in texts], AB)
    expected = token_log_probs(p.levels, encoded, V) - 0.7 * token_log_probs(q.levels, encoded, V)
    np.testing.assert_allclose(total.numpy(), expected.reshape(-1, 4).sum(1), atol=1e-4)


def make(tmp_path, *argv, transcripts="BB AA\nABBA\n"):
    (tmp_path / "much.txt").write_text("\n".join(MUCH), encoding="utf-8")
    (tmp_path / "transcripts.txt").write_text(transcripts, encoding="utf-8")
    texts = [str(tmp_path / "much.txt"), "--subtract", str(tmp_path / "transcripts.txt")]
    lm.main([*texts, "--out", str(tmp_path / "lm.safetensors"), "--characters", AB, *argv])
    return load_lm(tmp_path / "lm.safetensors")


def test_the_command_subtracts_a_model_of_the_transcripts(tmp_path, capsys):
    tokens = encode_sentences(TESTED, AB)
    for order, argv, weight in ((7, [], 0.5), (3, ["--subtract-weight", "0.8"], 0.8)):
        model = make(tmp_path, "--order", str(order), *argv)
        p, q = (train(t, order=n, characters=AB) for t, n in ((MUCH, order), (["BB AA", "ABBA"], min(order, 5))))
        expected = token_log_probs(p.levels, tokens, V) - weight * token_log_probs(q.levels, tokens, V)
        np.testing.assert_allclose(token_log_probs(model.levels, tokens, V), expected, atol=0.15)
        line = f"subtracted  {weight:g} times a model of order {min(order, 5)} of 2 sentences\n"
        assert model.subtracted == weight and line in capsys.readouterr().out


def test_excluded_sentences_are_left_out_of_the_transcripts_too(tmp_path):
    (tmp_path / "dev.txt").write_text("ABBA\n", encoding="utf-8")
    without = make(tmp_path, "--order", "3", "--exclude", str(tmp_path / "dev.txt"))
    q = train(["BB AA"], order=3, characters=AB)
    p = train([text for text in MUCH if text != "ABBA"], order=3, characters=AB)
    expected = subtract(p.levels, q.levels, 0.5, V)
    for ours, theirs in zip(without.levels, expected, strict=True):
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=0.02)


@pytest.mark.parametrize(
    ("argv", "transcripts", "message"),
    [
        (["--subtract-weight", "0"], "A", "--subtract-weight must be above 0 and at most 1; got 0"),
        (["--subtract-weight", "1.5"], "A", "--subtract-weight must be above 0 and at most 1; got 1.5"),
        (["--subtract-weight", "nan"], "A", "--subtract-weight must be above 0 and at most 1; got nan"),
        ([], "\n", r"there is no sentence in .*transcripts.txt"),
        ([], "7\n", r"all 1 sentences of .*transcripts.txt contain digits"),
        (["--out", "{}/transcripts.txt"], "A", "transcripts.txt"),
    ],
)
def test_bad_options_are_one_sentence_errors(tmp_path, argv, transcripts, message):
    with pytest.raises(InputError, match=message):
        make(tmp_path, *(text.format(tmp_path) for text in argv), transcripts=transcripts)
    assert not (tmp_path / "lm.safetensors").exists()


def test_a_weight_without_transcripts_is_an_error(tmp_path):
    (tmp_path / "much.txt").write_text("A\n", encoding="utf-8")
    with pytest.raises(InputError, match="^--subtract-weight has no effect without --subtract; give the transcripts"):
        lm.main([str(tmp_path / "much.txt"), "--out", str(tmp_path / "x.safetensors"), "--subtract-weight", "0.5"])
    assert not (tmp_path / "x.safetensors").exists()


def test_the_transcripts_are_read_before_the_text_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "encode_held_out", None)
    with pytest.raises(InputError, match="gone.txt"):
        make(tmp_path, "--subtract", str(tmp_path / "gone.txt"))


def test_levels_hold_what_their_docstring_says():
    p, q = train(MUCH, order=3, characters=AB), train(random_texts(1), order=4, characters=AB)
    levels = subtract(p.levels, q.levels, 0.5, V)
    for k, level in enumerate(levels, 1):
        assert isinstance(level, Level) and (level.log_probs.dtype, level.backoffs.dtype) == (np.float32, np.float32)
        assert (np.diff(level.ngrams) > 0).all() and (np.diff(level.contexts) > 0).all()
        if k > 1:
            assert np.array_equal(np.unique(level.ngrams // V), level.contexts)
            assert np.isin(level.contexts, levels[k - 2].ngrams).all()
            assert np.isin(level.ngrams % V ** (k - 1), levels[k - 2].ngrams).all()
