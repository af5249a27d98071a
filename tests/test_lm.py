"""Character language models: the formulas against a plain implementation, files, and decoding with a model."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from automata import PlainAutomaton
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_checkpoints import MODEL, make_checkpoint
from tiny_corpora import EDITIONS, make_archive, make_librispeech, make_manifest, make_speech, write_audio
from toy_model import ToyModel, config, memory

from las_fast import __version__, checkpoint, decode, lm, transcribe, tune
from las_fast.checkpoint import find_checkpoint
from las_fast.cli import run
from las_fast.config import Config, DataConfig, DecodingConfig
from las_fast.data.batch import make_loader
from las_fast.data.batch_plan import sorted_batches
from las_fast.data.dataset import load_dataset
from las_fast.data.layouts import open_corpus
from las_fast.data.overlap import Excluded
from las_fast.data.texts import read_excluded, read_texts
from las_fast.errors import InputError
from las_fast.lm import train
from las_fast.ops import backends, ngram_scores
from las_fast.search import kneser_ney, ngram
from las_fast.search.beam import beam_search, greedy_search
from las_fast.search.kneser_ney import DEFAULT_DISCOUNTS, FORBIDDEN_LOG_PROB, encode_sentences, perplexity
from las_fast.search.ngram import load_lm, save_lm
from las_fast.text import EOS, PAD, SOS, Vocabulary
from las_fast.training.validate import validate

HERE = [name for name in ("reference", "cpp") if not any(backends.unavailable(op, name) for op in backends.IMPLEMENTED)]
AB = "AB "
V = len(Vocabulary(AB))
TEXT = ["ABBA", "AB AB", "BAAB B", "A", "BABBAABB AB", "BB", "AB BA AB AAB"]


def ngrams_of(sentences, characters, k):
    for text in sentences:
        tokens = [SOS, *Vocabulary(characters).encode(text), EOS]
        for end in range(max(k, 2), len(tokens) + 1):
            yield tuple(tokens[end - k : end])


def brute_force(sentences, characters, order, prune=1):
    """p(token, context) of interpolated modified Kneser-Ney, by dictionaries and recursion."""
    times = {k: Counter(ngrams_of(sentences, characters, k)) for k in range(1, order + 1)}
    counts = {order: times[order]}
    for k in range(1, order):
        before = Counter(ngram[1:] for ngram in times[k + 1])
        counts[k] = {ngram: before.get(ngram, n) for ngram, n in times[k].items()}

    def discount(k, count):
        n = Counter(counts[k].values())
        if all(n[i] for i in (1, 2, 3, 4)):
            y = n[1] / (n[1] + 2 * n[2])
            actual = [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)]
            if min(actual) > 0:
                return actual[min(count, 3) - 1]
        return DEFAULT_DISCOUNTS[min(count, 3) - 1]

    def p(token, context, k=order):
        if k == 0:
            return 0.0 if token in (PAD, SOS) else 1 / (len(characters) + 1)
        shorter = p(token, context, k - 1)
        if len(context) < k - 1:  # the sentence begins here
            return shorter
        context = context[len(context) - k + 1 :]
        followers = {g[-1]: c for g, c in counts[k].items() if g[:-1] == context}
        if not followers:
            return shorter
        kept = {t for t in followers if k < 4 or times[k][(*context, t)] >= prune}
        total = sum(followers.values())
        share = sum(discount(k, c) if t in kept else c for t, c in followers.items()) / total
        return (followers[token] - discount(k, followers[token]) if token in kept else 0.0) / total + share * shorter

    return p


def contexts_of(sentences, characters, longest):
    """All contexts of up to `longest` tokens that begin a sentence or are inside one, and some that never occur."""
    seen = {g[:-1] for k in range(1, longest + 2) for g in ngrams_of(sentences, characters, k)}
    return sorted(seen | set(itertools.product(range(EOS, len(characters) + 3), repeat=min(longest, 2))))


def probabilities(automaton, context):
    """The probabilities of all tokens after a context."""
    begins = context[:1] == (SOS,)
    state = automaton.after(context[1:], automaton.start) if begins else automaton.after(context)
    return np.exp(automaton.log_probs(state).astype(np.float64))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("copies", "prune"), [(1, 1), (40, 1), (40, 3)])
def test_probabilities_equal_a_brute_force_model(order, copies, prune):
    generator = np.random.default_rng(order)
    more = ["".join(generator.choice(list(AB), generator.integers(1, 9))).strip() or "A" for _ in range(copies)]
    automaton = PlainAutomaton(train(TEXT + more, order=order, characters=AB, prune=prune).automaton())
    p = brute_force(TEXT + more, AB, order, prune)
    for context in contexts_of(TEXT + more, AB, order - 1):
        if len(context) == order - 1 or context[:1] == (SOS,):
            expected = [p(token, context) for token in range(V)]
            assert probabilities(automaton, context) == pytest.approx(expected, abs=1e-6), context


def test_pruning_leaves_out_long_ngrams_only():
    whole, pruned = (train(["ABAB"] * 2 + ["BBAA"], order=5, characters=AB, prune=n) for n in (1, 2))
    sizes = [[len(level.ngrams) for level in model.levels] for model in (whole, pruned)]
    assert sizes[0][:3] == sizes[1][:3] and sizes[1][3:] == [3, 2] and all(n > 3 for n in sizes[0][3:])


def test_discounts_follow_the_formulas_or_fall_back_to_defaults():
    counts = np.repeat([1, 2, 3, 4, 9], [8, 4, 2, 1, 3])
    y = 8 / 16
    formulas = [0, 1 - 2 * y * 4 / 8, 2 - 3 * y * 2 / 4, 3 - 4 * y * 1 / 2]
    assert kneser_ney._discounts(counts) == pytest.approx(formulas)
    assert kneser_ney._discounts(counts[counts != 4]).tolist() == [0, *DEFAULT_DISCOUNTS]
    negative = np.repeat([1, 2, 3, 4], [1, 1, 5, 1])  # the formula of one discount gives a negative number
    assert kneser_ney._discounts(negative).tolist() == [0, *DEFAULT_DISCOUNTS]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("sentences", [TEXT, ["A"], []])
def test_every_row_is_a_distribution_without_sos_and_pad(order, sentences):
    automaton = PlainAutomaton(train(sentences, order=order, characters=AB).automaton())
    for state in range(len(automaton.arcs)):
        row = automaton.log_probs(state)
        assert np.exp(row.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
        assert (row[[PAD, SOS]] <= FORBIDDEN_LOG_PROB).all() and math.exp(FORBIDDEN_LOG_PROB) == 0.0
        assert (row[EOS:] > FORBIDDEN_LOG_PROB).all() and np.isfinite(row).all()


def test_a_model_without_text_is_uniform():
    automaton = PlainAutomaton(train([], order=3, characters=AB).automaton())
    for context in ((), (SOS,), (3, 4)):
        assert probabilities(automaton, context)[EOS:] == pytest.approx(np.full(V - 2, 1 / (V - 2)))


def test_an_unseen_context_backs_off_to_a_shorter_one():
    automaton = PlainAutomaton(train(["AAAA", "AB"], order=3, characters=AB).automaton())
    a, b = Vocabulary(AB).encode("AB")
    p = brute_force(["AAAA", "AB"], AB, 3)
    assert probabilities(automaton, (b, a)) == pytest.approx([p(t, (a,), 2) for t in range(V)], abs=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_sentences_start_in_the_start_state(order):
    automaton = PlainAutomaton(train(["BA"] * 50, order=order, characters=AB).automaton())
    first = probabilities(automaton, (SOS,))
    assert order == 1 or first[Vocabulary(AB).encode("B")[0]] > 0.9


@pytest.mark.parametrize("sentences", [["A"], [""], ["A", "AB", "BB"]])
def test_a_text_may_be_shorter_than_the_order(tmp_path, sentences):
    model, p = train(sentences, order=12, characters=AB), brute_force(sentences, AB, 12)
    save_lm(tmp_path / "m.safetensors", model)
    assert [len(level.ngrams) for level in load_lm(tmp_path / "m.safetensors").levels][4:] == [0] * 8
    automaton = PlainAutomaton(model.automaton())
    for context in contexts_of(sentences, AB, 11):
        if context[:1] == (SOS,):
            expected = [p(token, context) for token in range(V)]
            assert probabilities(automaton, context) == pytest.approx(expected, abs=1e-6), context
    logs = [math.log(p(t[i], tuple(t[:i]))) for t in ([SOS, 3, EOS], [SOS, EOS]) for i in range(1, len(t))]
    tokens = encode_sentences(["A", ""], AB)
    assert perplexity(model.levels, tokens, V) == pytest.approx(math.exp(-sum(logs) / 3), rel=1e-5)
    assert perplexity(model.levels, tokens[:3], V) == pytest.approx(math.exp(-sum(logs[:2]) / 2), rel=1e-5)


def test_perplexity_counts_characters_and_eos():
    model, p = train(TEXT, order=3, characters=AB), brute_force(TEXT, AB, 3)
    for texts, count in ((["ABA", "B"], 6), (["ABA", "B", "B", "B"], 10)):
        tokens = [[SOS, *Vocabulary(AB).encode(text), EOS] for text in texts]
        logs = [math.log(p(t[i], tuple(t[max(0, i - 2) : i]))) for t in tokens for i in range(1, len(t))]
        assert len(logs) == count
        actual = perplexity(model.levels, encode_sentences(texts, AB), V)
        assert actual == pytest.approx(math.exp(-sum(logs) / count), rel=1e-5)


def test_sentences_are_encoded_between_sos_and_eos():
    for characters, dtype in (
        (AB, np.uint8),
        ("".join(map(chr, range(400, 653))), np.uint8),
        ("".join(map(chr, range(400, 654))), np.int32),
        ("Z\U0001f600A", np.uint8),
    ):
        vocabulary, texts = Vocabulary(characters), [characters[::-1], "", characters[:1]]
        tokens = encode_sentences(texts, characters)
        assert tokens.tolist() == [t for text in texts for t in (SOS, *vocabulary.encode(text), EOS)]
        assert tokens.dtype == dtype
    assert encode_sentences([], AB).tolist() == []
    with pytest.raises(InputError, match="transcript 'AXB' has characters outside the vocabulary: 'X'"):
        train(["AB", "AXB"], characters=AB)


def same_counts(a, b):
    return all(np.array_equal(x, y) for pair in zip(a, b, strict=True) for x, y in zip(*pair, strict=True))


def test_counting_in_parts_and_with_weights_gives_the_same_counts(monkeypatch):
    once, thrice = encode_sentences(TEXT, AB), encode_sentences(TEXT[:3] * 3, AB)
    whole = kneser_ney.count_ngrams(np.concatenate((once, thrice)), V, 4)
    assert same_counts(kneser_ney.count_weighted([(once, 1), (encode_sentences(TEXT[:3], AB), 3)], V, 4), whole)
    monkeypatch.setattr(lm, "SENTENCES_PER_PASS", 2)
    parts = lm.encode_held_out([(text, 1) for text in TEXT * 3], AB)
    counts = [kneser_ney.merge_counts(*pair) for pair in zip(*(lm.count(part, V, 4) for part in parts), strict=True)]
    assert same_counts(counts, kneser_ney.count_ngrams(encode_sentences(TEXT * 3, AB), V, 4))
    assert [len(ngrams) for ngrams, _ in kneser_ney.count_weighted([], V, 3)] == [0, 0, 0]


def test_holding_out_a_sentence_depends_only_on_its_text():
    texts = ["".join(letters) for letters in itertools.product("AB", repeat=6)] * 3
    held, fewer = (lm.encode_held_out([(text, 1) for text in some], AB)[1][1] for some in (texts, sorted(set(texts))))
    distinct = [t for t in set(texts) if lm.zlib.crc32(t.encode()) % lm.HELD_OUT_ONE_IN == 0]
    ngrams = [lm.count({1: part}, V, 5)[-1][0].tolist() for part in (held, fewer, [encode_sentences(distinct, AB)])]
    assert distinct and ngrams[0] == ngrams[1] == ngrams[2]


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("sentences", [TEXT, []])
def test_a_saved_model_loads_with_quantised_numbers(tmp_path, order, sentences):
    model = train(sentences, order=order, characters=AB)
    save_lm(tmp_path / "m.safetensors", model)
    back = load_lm(tmp_path / "m.safetensors")
    assert (back.order, back.characters, back.sentences) == (order, AB, len(sentences))
    for ours, theirs in zip(back.levels, model.levels, strict=True):
        assert np.array_equal(ours.ngrams, theirs.ngrams) and np.array_equal(ours.contexts, theirs.contexts)
        for name in ("log_probs", "backoffs"):
            saved, exact = getattr(ours, name), getattr(theirs, name)
            possible = exact[exact > FORBIDDEN_LOG_PROB]
            step = np.ptp(possible) / 255 if len(possible) else 0
            assert saved.dtype == np.float32 and np.abs(saved - exact).max(initial=0) <= step / 2 + 1e-5
    assert (back.levels[0].log_probs[[PAD, SOS]] == FORBIDDEN_LOG_PROB).all()
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_saved_model_is_small_and_says_what_it_is(tmp_path):
    texts = ["".join(np.random.default_rng(i).choice(list(lm.CHARACTERS), 30)) for i in range(300)]
    model = train(texts, order=6)
    save_lm(tmp_path / "m.safetensors", model)
    contexts = sum(len(level.contexts) for level in model.levels[1:])
    assert (tmp_path / "m.safetensors").stat().st_size < 2 * model.ngrams + contexts + 1000
    with safe_open(tmp_path / "m.safetensors", framework="np") as file:
        assert file.metadata() == {
            "format": "las_fast lm 2", "order": "6", "characters": lm.CHARACTERS, "smoothing": ngram.SMOOTHING,
            "sentences": "300", "las_fast": __version__,
        }  # fmt: skip


@pytest.mark.parametrize(("size", "dtype"), [(61, np.uint8), (62, np.uint16), (20000, np.uint32)])
def test_any_number_of_characters_can_be_saved(tmp_path, size, dtype):
    characters = "".join(chr(code) for code in range(0x4E00, 0x4E00 + size))
    model = train([characters[:9], characters[-9:]], order=3, characters=characters)
    save_lm(tmp_path / "m.safetensors", model)
    with safe_open(tmp_path / "m.safetensors", framework="np") as file:
        assert file.get_tensor("tokens").dtype == dtype
    assert [x.ngrams.tolist() for x in load_lm(tmp_path / "m.safetensors").levels] == [
        x.ngrams.tolist() for x in model.levels
    ]


def save_counts(path, sentences, characters, order, /, **changes):
    """Write format 1, whose sentences begin with order-1 times <sos>."""
    size, counts = len(Vocabulary(characters)), Counter()
    for text in sentences:
        tokens = [SOS] * (order - 1) + Vocabulary(characters).encode(text) + [EOS]
        for end in range(order, len(tokens) + 1):
            counts[sum(token * size**i for i, token in enumerate(reversed(tokens[end - order : end])))] += 1
    ngrams, times = np.array(sorted(counts), np.int64), np.array([counts[n] for n in sorted(counts)], np.int32)
    metadata = {"format": ngram.COUNTS_FORMAT, "order": str(order), "characters": characters, "sentences": "7"}
    save_file({"ngrams": ngrams, "counts": times}, path, metadata | changes)
    return ngrams, times


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_file_of_counts_loads_as_the_model_that_it_always_was(tmp_path, order):
    """The formulas on n-grams of which those of a sentence's start begin with several <sos>."""
    save_counts(tmp_path / "m.safetensors", TEXT * 3, AB, order)
    model = load_lm(tmp_path / "m.safetensors")
    assert (model.order, model.characters, model.sentences) == (order, AB, 7)
    ends = [[SOS] * (order - 1) + Vocabulary(AB).encode(text) + [EOS] for text in TEXT * 3]
    counts = {order: Counter(tuple(t[i - order : i]) for t in ends for i in range(order, len(t) + 1))}
    for k in range(order - 1, 0, -1):
        counts[k] = Counter(g[1:] for g in {g[-k - 1 :] for g in counts[order]})

    def p(token, context, k):
        if k == 0:
            return 0.0 if token in (PAD, SOS) else 1 / (V - 2)
        discounts = [0, *kneser_ney._discounts(np.array(list(counts[k].values())))[1:]]
        followers = {g[-1]: c for g, c in counts[k].items() if g[:-1] == context}
        if not followers:
            return p(token, context[1:], k - 1)
        total, times = sum(followers.values()), followers.get(token, 0)
        share = sum(discounts[min(c, 3)] for c in followers.values()) / total
        return (times - discounts[min(times, 3)]) / total + share * p(token, context[1:], k - 1)

    automaton = PlainAutomaton(model.automaton())
    for length in range(order):
        for tokens in itertools.product(range(EOS, V), repeat=length):
            state = automaton.after(tokens, automaton.start if length < order - 1 else 0)
            expected = [p(t, (*[SOS] * (order - 1 - length), *tokens), order) for t in range(V)]
            actual = np.exp(automaton.log_probs(state).astype(np.float64))
            assert actual == pytest.approx(expected, abs=1e-6), tokens


def test_a_safetensors_file_without_metadata_is_refused_as_language_model(tmp_path):
    save_file({"tokens": np.array([EOS])}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="not a language model of las_fast"):
        load_lm(tmp_path / "m.safetensors")


def weight_of(lm, weight, checkpoint="none.safetensors"):
    loaded = SimpleNamespace(path=Path(checkpoint), config=Config(decoding=DecodingConfig(ngram_weight=weight)))
    return ngram.with_default_weight(loaded, lm).ngram_weight


def test_a_named_language_model_gets_the_default_weight_unless_one_is_set():
    assert ngram.DEFAULT_WEIGHT == weight_of("x", 0.0) > 0
    assert weight_of("x", 0.3) == weight_of(None, 0.3) == 0.3 and weight_of(None, 0.0) == 0


def test_the_weight_of_a_difference_of_two_models_is_not_used_for_a_plain_one(tmp_path):
    plain = train(TEXT, order=2, characters=AB)
    for name, subtracted in (("own.lm", 0.5), ("other", 0.3), ("plain", 0.0)):
        save_lm(tmp_path / f"{name}.safetensors", replace(plain, subtracted=subtracted))
    expected = {None: 0.5, "own.lm": 0.5, "other": 0.5, "plain": ngram.DEFAULT_WEIGHT, "gone": 0.5}
    for name, weight in expected.items():
        lm = None if name is None else tmp_path / f"{name}.safetensors"
        assert weight_of(lm, 0.5, tmp_path / "own.safetensors") == weight
        assert weight_of(lm, 0.5, tmp_path / "without.safetensors") == 0.5
    assert weight_of("english", 0.5, find_checkpoint("english")) == 0.5


COUNTS_DAMAGE = [
    lambda n, c: (n, c[:-1]),
    lambda n, c: (n, c * 0),
    lambda n, c: (n[::-1].copy(), c),
    lambda n, c: (n + V**3, c),
    lambda n, c: (n // V * V, c),
    lambda n, c: (np.append(n[:-1], V**3 + EOS), c),
    lambda n, c: (np.append(-1, n[1:]), c),
    lambda n, c: (n, np.append(0, c[1:])),
    lambda n, c: (n[[1, 0, *range(2, len(n))]], c),
    lambda n, c: (n[[0, 0, *range(2, len(n))]], c),
    lambda n, c: (np.append(n[0] // V * V + PAD, n[1:]), c),
    lambda n, c: (np.append(n[0] // V * V + SOS, n[1:]), c),
    lambda n, c: (n[:, None], c[:, None]),
]


@pytest.mark.parametrize("change", COUNTS_DAMAGE)
def test_a_file_of_inconsistent_counts_is_refused_as_damaged(tmp_path, change):
    path = tmp_path / "m.safetensors"
    ngrams, counts = change(*save_counts(path, TEXT, AB, 3))
    load_lm(path)
    metadata = {"format": ngram.COUNTS_FORMAT, "order": "3", "characters": AB, "sentences": "7"}
    save_file({"ngrams": ngrams, "counts": counts}, path, metadata)
    with pytest.raises(InputError, match="m.safetensors is damaged"):
        load_lm(path)


def changed(tensors, name, index, value):
    tensors[name][index] = value


TRIE_DAMAGE = {
    "fewer sizes": lambda t: t.update(sizes=t["sizes"][:-1]),
    "negative size": lambda t: t["sizes"].__setitem__(slice(1, None), t["sizes"][1:] + [-100, 100]),
    "sizes of other n-grams": lambda t: t["sizes"].__setitem__(slice(1, None), t["sizes"][1:] + [-1, 1]),
    "fewer log-probabilities": lambda t: t.update(log_probs=t["log_probs"][:-1]),
    "fewer back-offs": lambda t: t.update(backoffs=t["backoffs"][:-1]),
    "more back-offs": lambda t: t.update(backoffs=np.append(t["backoffs"], np.uint8(0))),
    "signed tokens": lambda t: t.update(tokens=t["tokens"].astype(np.int16)),
    "log-probabilities of 16 bits": lambda t: t.update(log_probs=t["log_probs"].astype(np.uint16)),
    "back-offs as floats": lambda t: t.update(backoffs=t["backoffs"].astype(np.float32)),
    "sizes whose sum exceeds 64 bits": lambda t: changed(t, "sizes", slice(1, None), 2**62 + t["sizes"][1:] // 2),
    "sizes as floats": lambda t: t.update(sizes=t["sizes"].astype(np.float32)),
    "scales as integers": lambda t: t.update(scales=t["scales"].astype(np.int32)),
    "scales that are not finite": lambda t: changed(t, "scales", (1, 0), np.nan),
    "log-probabilities that are infinite": lambda t: changed(t, "scales", (1, slice(None)), -np.inf),
    "log-probabilities that overflow": lambda t: changed(t, "scales", (1, slice(None)), -3e38),
    "log-probabilities below those of forbidden tokens": lambda t: changed(t, "scales", (2, 0), -1e5),
    "positive log-probabilities": lambda t: changed(t, "scales", (2, 0), 0.01),
    "positive back-offs": lambda t: changed(t, "scales", (2, 2), 0.01),
    "fewer scales": lambda t: t.update(scales=t["scales"][:, :3]),
    "a missing unigram": lambda t: changed(t, "tokens", 2, 4 * 3),
    "a token beyond the vocabulary": lambda t: changed(t, "tokens", V + 3, 4 * V + 1),
    "<sos> after a context": lambda t: changed(t, "tokens", V, 4 * SOS + t["tokens"][V] % 4),
    "tokens that do not ascend": lambda t: changed(t, "tokens", V + 5, t["tokens"][V + 4] | 1),
    "a context without n-grams": lambda t: changed(t, "tokens", PAD, 4 * PAD + 2),
    "a last n-gram that is not last": lambda t: changed(t, "tokens", -1, t["tokens"][-1] & ~np.uint8(1)),
    "an n-gram after the last run": lambda t: t["tokens"].__setitem__([-4, -1], t["tokens"][[-4, -1]] ^ 1),
    "longer n-grams than the order": lambda t: changed(t, "tokens", -1, t["tokens"][-1] | 2),
    "an n-gram without its shorter one": lambda t: changed(t, "tokens", -1, 4 * 3 + 1),
}


BIGRAM_DAMAGE = {
    "<sos> after a context": lambda t: changed(t, "tokens", V, 4 * SOS + 1),
    "<pad> after a context": lambda t: changed(t, "tokens", V, 4 * PAD + 1),
    "a token beyond the vocabulary": lambda t: changed(t, "tokens", -1, 4 * V + 1),
    "unigrams without <pad>": lambda t: t.update(
        tokens=t["tokens"][1:], log_probs=t["log_probs"][1:], sizes=t["sizes"] - [1, 0]
    ),
    "longer n-grams than the order": lambda t: t.update(
        tokens=np.append(t["tokens"][:-1], t["tokens"][-1] | 2), backoffs=np.append(t["backoffs"], np.uint8(0))
    ),
}
DAMAGE = [(3, change) for change in TRIE_DAMAGE.values()] + [(2, change) for change in BIGRAM_DAMAGE.values()]


@pytest.mark.parametrize(("order", "change"), DAMAGE, ids=[*TRIE_DAMAGE, *BIGRAM_DAMAGE])
def test_a_file_with_inconsistent_numbers_is_refused_as_damaged(tmp_path, recwarn, order, change):
    path = tmp_path / "m.safetensors"
    save_lm(path, train(["AB", "AAB"], order=order, characters=AB))  # of order 2: <sos>A, AA, AB, B<eos>
    with safe_open(path, framework="np") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key).copy() for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata)
    load_lm(path)
    change(tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(InputError, match="m.safetensors is damaged"):
        load_lm(path)
    assert not recwarn.list


def test_a_flipped_bit_is_an_error_or_leaves_a_model_that_can_be_searched(tmp_path, recwarn):
    path = tmp_path / "m.safetensors"
    save_lm(path, train(TEXT, order=4, characters=AB))
    good, refused = path.read_bytes(), 0
    for bit in range(0, 8 * len(good), 29):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            model = load_lm(path).automaton()
        except InputError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            log_probs = ngram_scores(model, torch.arange(len(model.rows))[:, None]).log_probs
            assert torch.isfinite(log_probs).all() and (log_probs < 0.01).all()
    assert refused > 100 and not recwarn.list


def test_a_file_with_tensors_of_other_types_is_damaged(tmp_path):
    path = tmp_path / "m.safetensors"
    for model in ("counts", "trie"):
        if model == "trie":
            save_lm(path, train(TEXT, order=4, characters=AB))
        else:
            save_counts(path, TEXT, AB, 4)
        good = path.read_bytes()
        for integers, other in (
            (b'"U8"', b'"F8_E4M3"'),
            (b'"I64"', b'"F64"'),
            (b'"I64"', b'"U64"'),
            (b'"I32"', b'"F32"'),
        ):
            header = good[8 : 8 + int.from_bytes(good[:8], "little")]
            changed = header.replace(integers, other)
            path.write_bytes(len(changed).to_bytes(8, "little") + changed + good[8 + len(header) :])
            if changed != header:
                with pytest.raises(InputError, match="m.safetensors is damaged"):
                    load_lm(path)


def test_a_file_with_repeated_characters_is_damaged(tmp_path):
    path = tmp_path / "m.safetensors"
    for characters in ("AA ", ""):
        save_counts(path, ["A"], AB, 2, characters=characters)
        with pytest.raises(InputError, match="m.safetensors is damaged"):
            load_lm(path)


def test_a_model_from_a_file_of_counts_is_not_saved(tmp_path):
    save_counts(tmp_path / "old.safetensors", TEXT, AB, 3)
    with pytest.raises(InputError, match="read from a file of 'las_fast lm 1' cannot be saved; train it again"):
        save_lm(tmp_path / "new.safetensors", load_lm(tmp_path / "old.safetensors"))
    assert not (tmp_path / "new.safetensors").exists()


def test_a_file_with_an_order_that_no_model_has_is_damaged(tmp_path):
    path = tmp_path / "m.safetensors"
    for order, fits in (("12", True), ("13", False), ("0", False)):
        ngrams, counts = save_counts(path, TEXT, AB, 12)
        metadata = {"format": ngram.COUNTS_FORMAT, "order": order, "characters": AB, "sentences": "7"}
        save_file({"ngrams": ngrams.astype(np.int64), "counts": counts}, path, metadata)
        if fits:
            assert load_lm(path).order == 12
        else:
            with pytest.raises(InputError, match="m.safetensors is damaged"):
                load_lm(path)


def test_a_trie_of_a_higher_order_than_any_model_is_damaged(tmp_path):
    path = tmp_path / "m.safetensors"
    save_lm(path, train(["AB"], order=12, characters=AB))
    with safe_open(path, framework="np") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors |= {"sizes": np.append(tensors["sizes"], 0), "scales": np.pad(tensors["scales"], ((0, 1), (0, 0)))}
    save_file(tensors, path, metadata | {"order": "13"})
    with pytest.raises(InputError, match="m.safetensors is damaged"):
        load_lm(path)


def test_a_file_whose_ngrams_exceed_64_bits_is_damaged(tmp_path):
    path, characters = tmp_path / "m.safetensors", "".join(chr(code) for code in range(400, 460))
    save_counts(path, [characters[:3]], characters, 10)
    assert load_lm(path).order == 10
    ngrams, counts = save_counts(path, [characters[:3]], characters, 3)
    metadata = {"format": ngram.COUNTS_FORMAT, "order": "11", "characters": characters, "sentences": "7"}
    save_file({"ngrams": ngrams, "counts": counts}, path, metadata)
    with pytest.raises(InputError, match="m.safetensors is damaged"):
        load_lm(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[: len(b) // 2], "not a readable language model"),
        (lambda b: b[: len(b) - 5], "not a readable language model"),
        (lambda b: b"", "not a readable language model"),
        (lambda b: b"text", "not a readable language model"),
        (lambda b: b.replace(b'"order":"3"', b'"order":"x"'), "not a readable language model"),
        (lambda b: b.replace(b'"order":"3"', b'"order":"0"'), "is damaged"),
        (lambda b: b.replace(b'"order":', b'"orfer":'), "not a readable language model .it has no 'order'."),
        (lambda b: b.replace(b"las_fast lm 2", b"las_fast lm 9"), "not a language model of las_fast"),
    ],
)
def test_a_bad_file_is_a_one_sentence_error(tmp_path, damage, message):
    path = tmp_path / "m.safetensors"
    save_lm(path, train(TEXT, order=3, characters=AB))
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    with pytest.raises(InputError, match=message):
        load_lm(path)


def test_a_file_without_read_permission_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    save_lm(tmp_path / "m.safetensors", train(TEXT, order=2, characters=AB))
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"m.safetensors cannot be read \(Permission denied\); check its permissions"):
        load_lm(tmp_path / "m.safetensors")


def test_a_checkpoint_as_language_model_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="not a language model of las_fast"):
        load_lm(make_checkpoint(tmp_path))
    with pytest.raises(InputError, match=r"gone.safetensors cannot be read \(No such file"):
        load_lm(tmp_path / "gone.safetensors")


def test_orders_range_from_1_to_12_and_numbers_of_63_bits():
    for order, size in ((1, 4), (12, 31), (2, 3_000_000_000)):
        kneser_ney.check_order(order, size)
    for order in (0, 13):
        with pytest.raises(InputError, match=f"--order must be from 1 to 12; got {order}"):
            kneser_ney.check_order(order, 4)
    with pytest.raises(InputError, match="order 8 over 300 tokens exceed 64 bits; train with --order 7 or less"):
        kneser_ney.check_order(8, 300)
    with pytest.raises(InputError, match="order 12 over 300 tokens exceed 64 bits; train with --order 7 or less"):
        kneser_ney.check_order(12, 300)
    with pytest.raises(InputError, match="--order must be from 1 to 12; got 0"):
        train([], order=0)


# ---------------------------------------------------------------------------------------------------------------- texts


def test_every_kind_of_text_is_read(tmp_path):
    (tmp_path / "plain.txt").write_text("one line\n\nanother\n")
    with gzip.open(tmp_path / "more.txt.gz", "wt") as file:
        file.write("zipped\n")
    (tmp_path / "1.trans.txt").write_text("1-0 HELLO THERE\n1-1 YES\n")
    manifest = make_manifest(tmp_path / "manifest")
    rows = list(csv.DictReader(manifest.open(), delimiter="\t"))
    expected = {split: [row["transcript"] for row in rows if row["split"] == split] for split in ("train", "dev")}
    assert list(read_texts(tmp_path / "plain.txt")) == ["one line", "", "another"]
    assert list(read_texts(tmp_path / "more.txt.gz")) == ["zipped"]
    assert list(read_texts(tmp_path / "1.trans.txt")) == ["HELLO THERE", "YES"]
    assert list(read_texts(manifest)) == expected["train"] and list(read_texts(manifest, "dev")) == expected["dev"]
    assert list(read_texts(make_manifest(tmp_path / "json", suffix=".jsonl"))) == expected["train"]
    speech = list(read_texts(make_librispeech(tmp_path / "speech")))
    assert len(speech) == 12 and all(text.startswith("A") for text in speech)  # two splits with two speakers each


def test_texts_and_excluded_texts_are_those_of_the_split_that_a_path_names(tmp_path):
    splits = ("train-clean-100", "dev-clean", "test-clean")
    root = make_librispeech(tmp_path, utterances=1, splits=splits) / "LibriSpeech"
    texts = {split: list(read_texts(root / split)) for split in splits}
    assert list(read_texts(root)) == texts["train-clean-100"] and len(set(map(tuple, texts.values()))) == 3
    for path, split in ((root, "dev-clean"), (root / "dev-clean", "dev-clean"), (root / "test-clean", "test-clean")):
        assert read_excluded([path], None, lm.CHARACTERS).sentences == Excluded(texts[split], lm.CHARACTERS).sentences
    with pytest.raises(InputError, match="/test-clean is the split test-clean, but 'dev' is asked for"):
        read_excluded([root / "test-clean"], "dev", lm.CHARACTERS)


def test_text_suffixes_may_be_in_upper_case(tmp_path):
    (tmp_path / "1.TRANS.TXT").write_text("1-0 HELLO THERE\n")
    assert list(read_texts(tmp_path / "1.TRANS.TXT")) == ["HELLO THERE"]
    manifest = make_manifest(tmp_path)
    expected = list(read_texts(manifest))
    assert list(read_texts(manifest.rename(tmp_path / "MANIFEST.TSV"))) == expected


def test_options_have_their_types_and_defaults(capsys):
    plain = lm.parser().parse_args(["a", "b", "--out", "c.safetensors"])
    assert (plain.texts, plain.out) == ([Path("a"), Path("b")], Path("c.safetensors"))
    assert (plain.order, plain.characters, plain.split, plain.prune, plain.weights) == (5, lm.CHARACTERS, None, 1, None)
    assert (plain.exclude, plain.exclude_split) == ([], None)
    for argv, message in (
        (["a"], "--out must be given"),
        (["--out", "c.safetensors"], "TEXT must be given"),
        (["a", "--out", "c/"], "c/ is a folder; give the name of a file to write"),
        (["a", "--out", "c.safetensors", "--order", "x"], "--order must be a whole number; got 'x'"),
    ):
        with pytest.raises(SystemExit):
            lm.parser().parse_args(argv)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("edition", EDITIONS)
def test_the_transcripts_of_every_edition_are_read(edition, tmp_path):
    texts = list(read_texts(make_archive(tmp_path, edition, utterances=3)))
    assert texts and all(text.startswith("A") and "<" not in text for text in texts)


def test_a_folder_of_transcripts_is_read(tmp_path):
    archive = make_archive(tmp_path, "F24")
    assert list(read_texts(archive / "text-for-LM")) == ["SOME TEXT"]


def make(tmp_path, *argv, out="lm.safetensors", text="ONE\n"):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    lm.main([str(tmp_path / "text.txt"), "--out", str(tmp_path / out), *argv])
    return load_lm(tmp_path / out)


def equal_models(a, b):
    """Whether two models have the same n-grams and, up to quantisation, the same numbers."""
    pairs = list(zip(a.levels, b.levels, strict=True))
    same = all(np.array_equal(x.ngrams, y.ngrams) and np.array_equal(x.contexts, y.contexts) for x, y in pairs)
    return same and all(np.allclose(x.log_probs, y.log_probs, atol=0.05) for x, y in pairs)


def test_text_is_mapped_onto_the_characters_and_digits_are_left_out(tmp_path, capsys):
    model = make(tmp_path, "--order", "2", text="Caf\u00e9,  au lait!\nat 7 o'clock\n?\n\nB\n")
    assert equal_models(model, train(["CAFE AU LAIT", "B"], order=2))
    out = capsys.readouterr().out
    assert "2 sentences, 13 characters" in out and "1 sentences with digits" in out and "perplexity" not in out
    lower = make(tmp_path, "--order", "2", "--characters", "abc", text="Cab\n")
    assert equal_models(lower, train(["cab"], order=2, characters="abc"))


def test_the_command_prints_perplexity_order_and_size(tmp_path, capsys):
    text = [f"{a}{b} {c}" for a in "ABCDE" for b in "EFGH" for c in "IJKL"]
    held = [t for t in text if lm.zlib.crc32(t.encode()) % lm.HELD_OUT_ONE_IN == 0]
    assert 0 < len(held) < len(text)
    for order, prune in ((3, 1), (4, 2)):
        model = make(tmp_path, "--order", str(order), "--prune", str(prune), text="\n".join(text))
        rest = train([t for t in text if t not in held], order=order, prune=prune)
        expected = perplexity(rest.levels, encode_sentences(held, lm.CHARACTERS), len(Vocabulary()))
        message = capsys.readouterr().out
        assert f"text        {len(text)} sentences, {sum(map(len, text))} characters" in message
        assert f"perplexity  {expected:.3f} per character" in message and "left out" not in message
        assert f"order       {order}: {model.ngrams} n-grams\n" in message
        size = (tmp_path / "lm.safetensors").stat().st_size / 1e6
        assert f"lm.safetensors ({size:.2f} MB)" in message
        assert equal_models(model, train(text, order=order, prune=prune))


def test_the_command_says_how_long_the_ngrams_are_if_shorter_than_the_order(tmp_path, capsys):
    model = make(tmp_path, "--order", "6", "--prune", "9" * 30, text="ONE\nTWO\n")
    assert f"order       6: {model.ngrams} n-grams of up to 3 tokens\n" in capsys.readouterr().out
    assert [len(level.ngrams) for level in model.levels] == [31, 8, 6, 0, 0, 0]
    weighted = make(tmp_path, "--order", "6", "--weights", "1000000", text="ONE\nTWO\n")
    assert f"order       6: {weighted.ngrams} n-grams of up to 5 tokens\n" in capsys.readouterr().out
    assert [len(level.ngrams) for level in weighted.levels] == [31, 8, 6, 4, 2, 0]


def test_texts_count_as_often_as_their_weights_say(tmp_path):
    for name, text in (("a", "AB AB\nBA\n"), ("b", "BBA\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    out = tmp_path / "lm.safetensors"
    texts = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    lm.main([*texts, "--out", str(out), "--order", "3", "--weights", "1", "5"])
    assert equal_models(load_lm(out), train(["AB AB", "BA", *["BBA"] * 5], order=3))
    assert not equal_models(load_lm(out), train(["AB AB", "BA", "BBA"], order=3))


def test_sentences_that_overlap_with_excluded_texts_are_left_out(tmp_path, capsys):
    dev = "one two three four five six seven\nso it is\nin 1997 a b c d e f\n"
    (tmp_path / "dev.txt").write_text(dev)
    kept = ["ONE TWO THREE FOUR FIVE SEVEN SIX", "SO IT IS NOT", "IT IS", "TWO THREE FOUR FIVE SIX"]
    left_out = ["well two three four five six seven", "So  it is!", "one two three four five six, too", "a b c d e f"]
    model = make(tmp_path, "--order", "3", "--exclude", str(tmp_path / "dev.txt"), text="\n".join(kept + left_out))
    assert equal_models(model, train(kept, order=3)) and model.sentences == len(kept)
    assert "left out    4 sentences that overlap with the texts of --exclude" in capsys.readouterr().out


def test_an_excluded_text_without_a_sentence_is_an_error(tmp_path):
    (tmp_path / "dev.txt").write_text("?\n")
    with pytest.raises(InputError, match="there is no sentence in .*dev.txt; give --exclude texts with one sentence"):
        make(tmp_path, "--exclude", str(tmp_path / "dev.txt"))


def test_the_texts_are_not_overwritten(tmp_path):
    path = tmp_path / "x.safetensors"
    path.touch()
    for argv in ([str(path)], [os.devnull, "--exclude", str(path)]):
        with pytest.raises(InputError, match="x.safetensors is an input of this command"):
            lm.main([*argv, "--out", str(path)])


def test_the_excluded_split_of_a_corpus_is_dev(tmp_path):
    manifest = make_manifest(tmp_path / "data")
    out = tmp_path / "lm.safetensors"
    known, dev = (list(read_texts(manifest, split)) for split in ("train", "dev"))
    manifest.write_text(manifest.read_text().replace(f"\t{dev[0]}\n", f"\t{known[0]}\n"))
    message = "can be used: [0-9]+ overlap with the texts of --exclude; give other text$"
    with pytest.raises(InputError, match=message):
        lm.main([str(manifest), "--split", "dev", "--out", str(out), "--exclude", str(manifest)])
    lm.main(
        [str(manifest), "--split", "dev", "--out", str(out), "--exclude", str(manifest), "--exclude-split", "train"]
    )
    assert load_lm(out).sentences == len(dev) - 1
    for name in ("--split", "--exclude-split"):
        with pytest.raises(InputError, match=rf"has no split 'gone'; it has train, dev; give one of these \({name}\)"):
            lm.main([str(manifest), "--out", str(out), "--exclude", str(manifest), name, "gone"])


@pytest.mark.parametrize(
    ("argv", "text", "message"),
    [
        ([], "", "there is no sentence in"),
        ([], " \n\n", "there is no sentence in"),
        ([], "123\n\nAT 7\n", "text.txt contain digits; write them as words\n"),
        ([], "?\nAT 7\n!\n", "used: 1 contain digits, which must be written as words, and 2 have none of the ch"),
        (
            ["--characters", "ab"],
            "XYZ\n",
            "text.txt can be used: 1 have none of the characters 'ab'; give other text, or --ch",
        ),
        (["--order", "0"], "A", "--order must be from 1 to 12"),
        (["--order", "12", "--characters", lm.CHARACTERS + "012345678"], "A", "order 12 over 40 tokens exceed 64 bits"),
        (["--prune", "0"], "A", "--prune must be at least 1; got 0"),
        (["--prune", "2", "--order", "3"], "A", "--prune 2 has no effect on a model of order 3: only n-grams of 4"),
        (["--weights", "1", "2"], "A", "--weights must be one number per TEXT, 1; got 2"),
        (["--weights", "0"], "A", "--weights must be from 1 to 1000000; got 0; leave the text out instead"),
        (["--weights", "1000001"], "A", "--weights must be from 1 to 1000000; got 1000001\n"),
        (["--exclude", "gone.txt"], "A", "gone.txt"),
        (["--exclude", os.devnull], "A", f"there is no sentence in {os.devnull}; give --exclude texts with one"),
        (["--characters", "AA"], "A", "each given once"),
        (["--out", "."], "A", "--out . is a folder"),
    ],
)
def test_bad_input_is_a_one_sentence_error(tmp_path, capsys, argv, text, message):
    with pytest.raises(SystemExit) as end:
        run(lambda _: make(tmp_path, *argv, text=text))
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_text_whose_every_sentence_has_digits_is_not_called_empty(tmp_path):
    with pytest.raises(InputError, match="^all 2 sentences of .*text.txt contain digits; write them as words$"):
        make(tmp_path, text="123\n\nAT 7\n")
    assert not (tmp_path / "lm.safetensors").exists()


def test_files_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "noise.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "noise.gz").write_bytes(b"no gzip")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"some text" * 99)[:-20])
    for name, message in (
        ("noise.txt", "is not UTF-8"),
        ("noise.gz", "be read"),
        ("cut.gz", "be read"),
        ("no.txt", "No"),
    ):
        with pytest.raises(InputError, match=f"{name}.*{message}"):
            list(read_texts(tmp_path / name))
    with pytest.raises(InputError, match="has no split 'test'"):
        list(read_texts(make_manifest(tmp_path / "data"), "test"))


# ------------------------------------------------------------------------------------------------------------- decoding


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with recordings, a checkpoint for them, and a language model."""
    folder = tmp_path_factory.mktemp("lm")
    make_manifest(folder / "data", utterances=6)
    make_checkpoint(folder, 20, mel_bins=23)
    lm.main([str(folder / "data"), "--out", str(folder / "lm.safetensors"), "--order", "3"])
    return folder


def argv(workspace, *more):
    checkpoint, data = workspace / "untrained-20.safetensors", workspace / "data"
    return ["--checkpoint", str(checkpoint), "--data", str(data), "--split", "dev", "--device", "cpu", *more]


def decoded(workspace, tmp_path, *more):
    out = ["--out", str(tmp_path / "out.csv"), "--jsonl", str(tmp_path / "rows.jsonl"), "--beam", "4"]
    decode.main(argv(workspace, *out, *more))
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


def listened(workspace):
    loaded = checkpoint.load_model(workspace / "untrained-20.safetensors")
    options = {"features": loaded.config.features, "data": loaded.config.data, "statistics": None}
    return loaded, load_dataset(open_corpus(workspace / "data"), ("dev",), **options, need_text=True)


def searched(workspace, decoding, *, ngram=None, backend="auto", nbest=1):
    loaded, data = listened(workspace)
    batches = sorted_batches(data.frame_counts, frames_per_batch=30000, utterances_per_batch=128)
    (batch,) = make_loader(data, batches, loaded.vocabulary, augment=None, seed=0, epoch=0, workers=0)
    with torch.inference_mode():
        encoded = loaded.model.listen(batch.features, batch.feature_lengths)
    decoding = replace(loaded.config.decoding, **decoding)
    return beam_search(loaded.model, encoded, decoding, ngram=ngram, backend=backend, nbest=nbest)


def model_of(workspace):
    return load_lm(workspace / "lm.safetensors").automaton()


@pytest.mark.skipif("cpp" not in HERE, reason=f"no C++ ops: {backends.EXTENSION_PROBLEM}")
@pytest.mark.parametrize("weight", [0.0, 0.6])
@pytest.mark.parametrize("beam", [1, 4])
def test_reference_and_cpp_agree_with_a_language_model_and_a_reward(workspace, beam, weight):
    decoding = {"beam": beam, "ngram_weight": weight, "length_reward": 0.4}
    options = {"ngram": model_of(workspace), "nbest": beam}
    actual = [searched(workspace, decoding, backend=name, **options) for name in ("reference", "cpp")]
    assert actual[0] != searched(workspace, {"beam": beam}, nbest=beam)
    for ours, theirs in zip(*(itertools.chain(*each) for each in actual), strict=True):
        assert ours.text_tokens == theirs.text_tokens and ours.score == pytest.approx(theirs.score, abs=1e-3)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_length_reward_is_added_per_character_and_not_for_eos(weight, backend):
    """A beam that holds every possible text finds the same texts, with scores that differ by the reward."""
    many = memory([1, 5], [4, 3])
    ngram = train(["A", "AB", "BB"], order=3, characters="AB").automaton()
    options = {"ngram": ngram if weight else None, "nbest": 64, "backend": backend}
    plain = beam_search(ToyModel(), many, config(beam=64, ngram_weight=weight), **options)
    rewarded = beam_search(ToyModel(), many, config(beam=64, ngram_weight=weight, length_reward=0.7), **options)
    for before, after in zip(plain, rewarded, strict=True):
        scores = {tuple(h.text_tokens): h.score for h in before}
        assert len(scores) == len(after) > 10 and after[0].score > before[0].score
        for h in after:
            assert h.score == pytest.approx(scores[tuple(h.text_tokens)] + 0.7 * len(h.text_tokens), abs=1e-4)
        assert len(after[0].text_tokens) >= len(before[0].text_tokens)


def test_a_negative_reward_shortens_texts_and_a_positive_one_lengthens_them():
    many = memory(list(range(8)), [9] * 8)
    actual = [beam_search(ToyModel(eos=2.0), many, config(length_reward=reward)) for reward in (-2.0, 0.0, 2.0)]
    lengths = [sum(len(best.text_tokens) for (best,) in each) for each in actual]
    assert lengths[0] < lengths[1] < lengths[2]


@pytest.mark.parametrize("backend", HERE)
def test_a_beam_of_one_takes_the_best_sum_at_each_step(backend):
    model, weight = ToyModel(eos=1.0), 0.8
    ngram = train(["ABAB", "B"], order=2, characters="AB").automaton()
    automaton = PlainAutomaton(ngram)
    finished = 0
    for seed in range(6):
        one = memory([seed], [12])
        state, token, text, total, context = model.start(one, 1), SOS, [], 0.0, ngram.start
        while token != EOS and len(text) < 12:
            logits, _, state = model.step(torch.tensor([[token]]), state, one)
            step = logits.log_softmax(-1)[0, 0] + weight * torch.from_numpy(automaton.log_probs(context))
            token, total = int(step.argmax()), total + float(step.max())
            context = automaton.after([token], context)
            text += [token] if token != EOS else []
        ((actual,),) = beam_search(model, one, config(beam=1, ngram_weight=weight), ngram=ngram, backend=backend)
        assert actual.text_tokens == text and actual.finished == (token == EOS)
        if actual.finished:  # otherwise eos was forced
            finished += 1
            assert actual.score == pytest.approx(total, abs=1e-4)
    assert finished > 0


def test_a_heavily_weighted_language_model_determines_the_text(workspace, tmp_path):
    lm.main([str(make_text(tmp_path, "HELLO\n" * 99)), "--out", str(tmp_path / "hello.safetensors"), "--order", "4"])
    settings = ["--decoding.ngram-weight", "9", "--decoding.maximum-extra", "20", "--decoding.length-penalty", "0"]
    rows = decoded(workspace, tmp_path, "--lm", str(tmp_path / "hello.safetensors"), *settings)
    assert {row["text"] for row in rows} == {"HELLO"}


def make_text(folder, text):
    path = folder / "text.txt"
    path.write_text(text)
    return path


def test_a_language_model_comes_with_a_weight_that_can_be_changed(workspace, tmp_path):
    file = ["--lm", str(workspace / "lm.safetensors")]
    usual = decoded(workspace, tmp_path, *file)
    expected = searched(workspace, {"beam": 4, "ngram_weight": ngram.DEFAULT_WEIGHT}, ngram=model_of(workspace))
    assert sorted(row["score"] for row in usual) == pytest.approx(sorted(h[0].score for h in expected), abs=1e-3)
    assert decoded(workspace, tmp_path, *file, "--decoding.ngram-weight", str(ngram.DEFAULT_WEIGHT)) == usual
    assert (
        decoded(workspace, tmp_path, *file, "--decoding.ngram-weight", "0.9") != usual != decoded(workspace, tmp_path)
    )


def fails(capsys, command):
    with pytest.raises(SystemExit) as end:
        run(lambda _: command())
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_weight_without_a_model_and_a_model_without_a_weight_are_errors(workspace, tmp_path, capsys):
    weight = ["--decoding.ngram-weight", "0.3"]
    message = fails(capsys, lambda: decoded(workspace, tmp_path, *weight))
    assert "ngram_weight is 0.3 and there is no language model; give --lm FILE" in message
    assert "untrained-20.lm.safetensors" in message
    none = ["--lm", str(workspace / "lm.safetensors"), "--decoding.ngram-weight", "0"]
    assert "has no effect while decoding.ngram_weight is 0" in fails(
        capsys, lambda: decoded(workspace, tmp_path, *none)
    )
    assert "--lm gone is not a file" in fails(capsys, lambda: decoded(workspace, tmp_path, "--lm", "gone"))
    save_lm(tmp_path / "other.safetensors", train(TEXT, order=2, characters=AB))
    message = fails(capsys, lambda: decoded(workspace, tmp_path, "--lm", str(tmp_path / "other.safetensors")))
    assert "has the characters 'AB '" in message and "--characters" in message
    assert not (tmp_path / "out.csv").exists()


def test_the_language_model_beside_a_checkpoint_is_used_if_its_settings_have_a_weight(workspace, tmp_path, monkeypatch):
    loaded = checkpoint.load_model(workspace / "untrained-20.safetensors")
    weighted = replace(loaded.config, decoding=replace(loaded.config.decoding, ngram_weight=0.7))
    checkpoint.save_model(tmp_path / "NAME.safetensors", loaded.model.state_dict(), weighted, None, {})
    (tmp_path / "NAME.lm.safetensors").write_bytes((workspace / "lm.safetensors").read_bytes())
    monkeypatch.setattr(checkpoint, "RELEASED", tmp_path)
    assert checkpoint.released_models() == ["NAME"] and checkpoint.default_model() == tmp_path / "NAME.safetensors"
    with pytest.raises(InputError, match="released models: NAME$"):
        checkpoint.find_checkpoint("OTHER")
    explicit = ["--lm", str(workspace / "lm.safetensors"), "--decoding.ngram-weight", "0.7"]
    expected = decoded(workspace, tmp_path, *explicit)
    plain = decoded(workspace, tmp_path)
    assert decoded(workspace, tmp_path, "--checkpoint", "NAME") == expected != plain
    assert decoded(workspace, tmp_path, "--lm", "NAME", "--decoding.ngram-weight", "0.7") == expected
    assert decoded(workspace, tmp_path, "--checkpoint", "NAME", "--decoding.ngram-weight", "0") == plain
    with pytest.raises(InputError, match="--lm OTHER is not a file, nor one of the released models: NAME"):
        ngram.find_lm("OTHER", Path("x.safetensors"))


def test_without_released_language_models_the_error_names_none(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "RELEASED", tmp_path)
    with pytest.raises(InputError, match="^--lm gone is not a file; make one with python -m las_fast.lm$"):
        ngram.find_lm("gone", tmp_path / "x.safetensors")
    assert ngram.find_lm(None, tmp_path / "x.safetensors") is None


def test_transcribe_takes_a_language_model(workspace, tmp_path, capsys):
    lm.main([str(make_text(tmp_path, "HELLO\n" * 99)), "--out", str(tmp_path / "hello.safetensors"), "--order", "4"])
    capsys.readouterr()
    audio = write_audio(tmp_path / "said.wav", make_speech(0.9))
    model = ["--checkpoint", str(workspace / "untrained-20.safetensors"), "--device", "cpu"]
    arguments = [str(audio), *model, "--format", "json"]
    scores = []
    for more in ([], ["--lm", str(tmp_path / "hello.safetensors")]):
        transcribe.main([*arguments, *more])
        scores.append(json.loads(capsys.readouterr().out)["segments"][0]["score"])
    assert scores[0] != scores[1]
    assert "--lm gone is not a file" in fails(capsys, lambda: transcribe.main([*arguments, "--lm", "gone"]))


def test_validation_in_training_uses_only_attention(workspace, tmp_path):
    loaded, data = listened(workspace)
    cpu, actual = torch.device("cpu"), []
    for decoding in ({}, {"ngram_weight": 0.5, "length_reward": -9.0}, {"ctc_weight": 1.0}):  # no CTC head
        settings = replace(loaded.config, decoding=replace(loaded.config.decoding, **decoding))
        actual.append(validate(loaded.model, data, loaded.vocabulary, settings, cpu, tmp_path, 1.0).hypotheses)
    assert actual[0] == actual[1] == actual[2] and len(actual[0]) == 6
    with pytest.raises(InputError, match="needs an n-gram model"):
        greedy_search(ToyModel(), memory([1], [4]), config(ngram_weight=0.5))


# --------------------------------------------------------------------------------------------------------------- tuning


def test_tuning_ranks_the_grid_as_decoding_scores_it(workspace, tmp_path, capsys):
    file = ["--lm", str(workspace / "lm.safetensors")]
    values = ["--ngram-weight", "0", "0.5", "--length-reward", "0", "0.3", "--beam", "4"]
    tune.main(argv(workspace, *file, *values, "--out", str(tmp_path / "grid.csv")))
    out = capsys.readouterr().out
    header, *rows = list(csv.reader((tmp_path / "grid.csv").open()))
    assert header == ["beam", "ngram_weight", "length_reward", "cer", "wer", "ld"] and len(rows) == 4
    assert [float(row[3]) for row in rows] == sorted(float(row[3]) for row in rows)
    assert {tuple(row[1:3]) for row in rows} == set(itertools.product(("0", "0.5"), ("0", "0.3")))
    for _, weight, reward, cer, _, ld in rows:
        more = [*file, "--decoding.ngram-weight", weight] if float(weight) else []
        decoded(workspace, tmp_path, *more, "--decoding.length-reward", reward)
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["cer"] == pytest.approx(float(cer), abs=1e-3)
        assert result["ld"] == pytest.approx(float(ld), abs=1e-3)
    best = f"--decoding.beam 4 --decoding.ngram-weight {rows[0][1]} --decoding.length-reward {rows[0][2]}"
    assert out.splitlines()[-1].startswith(f"best: {best}")


def test_tuning_can_vary_the_ctc_weight(tmp_path, capsys):
    make_manifest(tmp_path / "data", utterances=3)
    training_data = DataConfig(max_seconds=0.1, hours=9.0)
    sections = {"model": replace(MODEL, ctc_layer=0), "data": training_data}
    make_checkpoint(tmp_path, 20, mel_bins=23, sections=sections)
    tune.main(argv(tmp_path, "--ctc-weight", "0", "0.4", "--out", str(tmp_path / "grid.csv")))
    capsys.readouterr()
    cers = {row[0]: float(row[1]) for row in list(csv.reader((tmp_path / "grid.csv").open()))[1:]}
    assert cers.keys() == {"0", "0.4"} and cers["0"] != cers["0.4"]
    for weight, cer in cers.items():
        decoded(tmp_path, tmp_path, "--beam", "8", "--decoding.ctc-weight", weight)
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["cer"] == pytest.approx(cer, abs=1e-3)


def test_tuning_needs_values_to_try(workspace, capsys):
    assert "there is nothing to tune" in fails(capsys, lambda: tune.main(argv(workspace)))
    assert "beam must be at least 1" in fails(capsys, lambda: tune.main(argv(workspace, "--beam", "0")))
    message = fails(capsys, lambda: tune.main(argv(workspace, "--ctc-weight", "0.3")))
    assert "decoding.ctc_weight needs a model with a CTC head" in message
    message = fails(capsys, lambda: tune.main(argv(workspace, "--ngram-weight", "0.1")))
    assert "there is no language model; give --lm FILE" in message
