"""Character language models: the formulas against a plain implementation, files, and decoding with a model."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_checkpoints import MODEL, make_checkpoint
from tiny_corpora import EDITIONS, make_archive, make_librispeech, make_manifest, make_speech, write_audio
from toy_model import ToyModel, config, memory

from las_fast import __version__, checkpoint, decode, lm, transcribe, tune
from las_fast.cli import run
from las_fast.config import DataConfig, DecodingConfig
from las_fast.data.batching import make_loader, sorted_batches
from las_fast.data.dataset import load_dataset
from las_fast.data.layouts import open_corpus
from las_fast.errors import InputError
from las_fast.lm import read_texts, train
from las_fast.ops import backends
from las_fast.ops.speller_search import first_ngram_state
from las_fast.search import ngram
from las_fast.search.beam import beam_search, greedy_search
from las_fast.search.ngram import DEFAULT_DISCOUNTS, FORBIDDEN_LOG_PROB, load_lm, perplexity, save_lm
from las_fast.text import EOS, PAD, SOS, Vocabulary
from las_fast.training.validate import validate

HERE = [name for name in ("reference", "cpp") if not any(backends.unavailable(op, name) for op in backends.IMPLEMENTED)]
AB = "AB "
V = len(Vocabulary(AB))
TEXT = ["ABBA", "AB AB", "BAAB B", "A", "BABBAABB AB", "BB", "AB BA AB AAB"]


def windows(sentences, characters, order):
    for text in sentences:
        tokens = [SOS] * (order - 1) + Vocabulary(characters).encode(text) + [EOS]
        for end in range(order, len(tokens) + 1):
            yield tuple(tokens[end - order : end])


def brute_force(sentences, characters, order):
    """p(token, context) of interpolated modified Kneser-Ney, by dictionaries and recursion."""
    counts = {order: Counter(windows(sentences, characters, order))}
    for k in range(order - 1, 0, -1):
        seen = {ngram[-k - 1 :] for ngram in counts[order]}
        counts[k] = Counter(ngram[1:] for ngram in seen)

    def discount(k, times):
        n = Counter(counts[k].values())
        if all(n[i] for i in (1, 2, 3, 4)):
            y = n[1] / (n[1] + 2 * n[2])
            actual = [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)]
            if min(actual) > 0:
                return actual[min(times, 3) - 1]
        return DEFAULT_DISCOUNTS[min(times, 3) - 1]

    def p(token, context, k=order):
        if k == 0:
            return 0.0 if token in (PAD, SOS) else 1 / (len(characters) + 1)
        shorter = p(token, context[1:], k - 1)
        followers = {g[-1]: c for g, c in counts[k].items() if g[:-1] == context}
        if not followers:
            return shorter
        total, times = sum(followers.values()), followers.get(token, 0)
        share = sum(discount(k, c) for c in followers.values()) / total
        return (times - discount(k, times) if times else 0.0) / total + share * shorter

    return p


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("copies", [1, 40])
def test_probabilities_equal_a_brute_force_model(order, copies):
    generator = np.random.default_rng(order)
    more = ["".join(generator.choice(list(AB), generator.integers(1, 9))).strip() or "A" for _ in range(copies)]
    table, p = train(TEXT + more, order=order, characters=AB).ngram_table(), brute_force(TEXT + more, AB, order)
    assert table.shape == (V ** (order - 1), V) and table.dtype == np.float32
    for state, context in enumerate(itertools.product(range(V), repeat=order - 1)):
        expected = [p(token, context) for token in range(V)]
        assert np.exp(table[state]) == pytest.approx(expected, abs=1e-6), context


def test_discounts_follow_the_formulas_or_fall_back_to_defaults():
    counts = np.repeat([1, 2, 3, 4, 9], [8, 4, 2, 1, 3])
    y = 8 / 16
    formulas = [0, 1 - 2 * y * 4 / 8, 2 - 3 * y * 2 / 4, 3 - 4 * y * 1 / 2]
    assert ngram._discounts(counts) == pytest.approx(formulas)
    assert ngram._discounts(counts[counts != 4]).tolist() == [0, *DEFAULT_DISCOUNTS]
    negative = np.repeat([1, 2, 3, 4], [1, 1, 5, 1])  # the formula of one discount gives a negative number
    assert ngram._discounts(negative).tolist() == [0, *DEFAULT_DISCOUNTS]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("sentences", [TEXT, ["A"], []])
def test_every_row_is_a_distribution_without_sos_and_pad(order, sentences):
    table = train(sentences, order=order, characters=AB).ngram_table()
    assert np.exp(table.astype(np.float64)).sum(1) == pytest.approx(np.ones(len(table)), abs=1e-5)
    assert (table[:, [PAD, SOS]] == FORBIDDEN_LOG_PROB).all() and math.exp(FORBIDDEN_LOG_PROB) == 0.0
    assert (table[:, EOS:] > FORBIDDEN_LOG_PROB).all() and np.isfinite(table).all()


def test_a_model_without_text_is_uniform():
    table = train([], order=3, characters=AB).ngram_table()
    assert np.exp(table[:, EOS:]) == pytest.approx(np.full((V * V, V - 2), 1 / (V - 2)))


def test_an_unseen_context_backs_off_to_a_shorter_one():
    table = train(["AAAA", "AB"], order=3, characters=AB).ngram_table()
    a, b = Vocabulary(AB).encode("AB")
    below = brute_force(["AAAA", "AB"], AB, 3)
    assert np.exp(table[b * V + a]) == pytest.approx([below(t, (a,), 2) for t in range(V)], abs=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_sentences_start_in_the_same_state_as_the_search(order):
    table = train(["BA"] * 50, order=order, characters=AB).ngram_table()
    first = np.exp(table[first_ngram_state(torch.from_numpy(table), SOS)])
    assert order == 1 or first[Vocabulary(AB).encode("B")[0]] > 0.9


def test_perplexity_counts_characters_and_eos():
    model, p = train(TEXT, order=3, characters=AB), brute_force(TEXT, AB, 3)
    for text, count in ((["ABA", "B"], 6), (["ABA", "B", "B", "B"], 10)):
        logs = [math.log(p(g[-1], g[:-1])) for g in windows(text, AB, 3)]
        assert len(logs) == count
        actual = perplexity(model.ngram_table(), ngram.count_ngrams(text, AB, 3))
        assert actual == pytest.approx(math.exp(-sum(logs) / count), rel=1e-5)


def test_counting_in_parts_gives_the_same_model(monkeypatch):
    whole = train(TEXT, order=3, characters=AB)
    monkeypatch.setattr(ngram, "SENTENCES_PER_PASS", 2)
    parts = train(TEXT, order=3, characters=AB)
    assert parts.ngrams.tolist() == whole.ngrams.tolist() and parts.counts.tolist() == whole.counts.tolist()
    both = ngram.merge_counts(*lm.count_held_out(TEXT * 30, AB, 3))
    assert [x.tolist() for x in both] == [whole.ngrams.tolist(), (whole.counts * 30).tolist()]


def test_holding_out_a_sentence_depends_only_on_its_text():
    texts = [a + b + c for a in AB[:2] * 20 for b in "ABBABBAAB" for c in "AB"]
    held = lm.count_held_out(texts, AB, 12)[1][0]
    fewer = lm.count_held_out(sorted(set(texts)), AB, 12)[1][0]
    distinct = [t for t in set(texts) if lm.zlib.crc32(t.encode()) % lm.HELD_OUT_ONE_IN == 0]
    assert held.tolist() == fewer.tolist() == ngram.count_ngrams(distinct, AB, 12)[0].tolist()


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("order", [1, 4])
def test_a_saved_model_loads_unchanged(tmp_path, order):
    model = train(TEXT, order=order, characters=AB)
    save_lm(tmp_path / "m.safetensors", model)
    back = load_lm(tmp_path / "m.safetensors")
    assert (back.order, back.characters, back.sentences) == (order, AB, len(TEXT))
    assert np.array_equal(back.ngram_table(), model.ngram_table())
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_file_has_metadata_and_the_smallest_integers_that_fit(tmp_path):
    path = tmp_path / "m.safetensors"

    def saved(model):
        save_lm(path, model)
        with safe_open(path, framework="np") as file:
            return file.metadata(), [str(file.get_tensor(name).dtype) for name in ("ngrams", "counts")]

    model = train(TEXT, order=3, characters=AB)
    tokens = sum(len(text) + 1 for text in TEXT)
    assert saved(model) == (
        {"format": "las_fast lm 1", "order": "3", "characters": AB, "smoothing": ngram.SMOOTHING,
         "sentences": str(len(TEXT)), "tokens": str(tokens), "las_fast": __version__},
        ["int32", "int32"],
    )  # fmt: skip
    for order, count, dtypes in ((6, 2**31 - 1, ["int32", "int32"]), (7, 2**31, ["int64", "int64"])):
        counts = np.array([1, count])
        assert saved(ngram.LanguageModel(order, lm.CHARACTERS, np.array([EOS, 5]), counts))[1] == dtypes
    letters = lm.CHARACTERS + "12"
    assert 2**30 < len(Vocabulary(letters)) ** 6 < 2**31
    assert saved(ngram.LanguageModel(6, letters, np.array([EOS]), np.array([1])))[1] == ["int32", "int32"]


def test_numbers_beyond_32_bits_load_unchanged(tmp_path):
    order, tokens = 7, len(Vocabulary(lm.CHARACTERS))  # n-grams up to 2e10
    ngrams = np.array([EOS, tokens**6 + EOS, tokens**7 - 1])
    for counts in (np.array([1, 2, 3]), np.array([1, 2**31, 2**40])):
        save_lm(tmp_path / "m.safetensors", ngram.LanguageModel(order, lm.CHARACTERS, ngrams, counts, sentences=5))
        back = load_lm(tmp_path / "m.safetensors")
        assert np.array_equal(back.ngrams, ngrams) and np.array_equal(back.counts, counts)


def test_a_safetensors_file_without_metadata_is_refused_as_language_model(tmp_path):
    save_file({"ngrams": np.array([EOS]), "counts": np.array([1])}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="not a language model of las_fast"):
        load_lm(tmp_path / "m.safetensors")


def test_a_named_language_model_gets_the_default_weight_unless_one_is_set():
    plain, set_ = DecodingConfig(), DecodingConfig(ngram_weight=0.3)
    assert ngram.DEFAULT_WEIGHT > 0
    assert ngram.with_default_weight(plain, "x") == replace(plain, ngram_weight=ngram.DEFAULT_WEIGHT)
    assert ngram.with_default_weight(set_, "x") == set_ and ngram.with_default_weight(plain, None) == plain


def damaged(model, **changes):
    tensors = {"ngrams": model.ngrams, "counts": model.counts}
    return {name: changes.get(name, value) for name, value in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: damaged(m, counts=m.counts[:-1]),
        lambda m: damaged(m, counts=m.counts * 0),
        lambda m: damaged(m, ngrams=m.ngrams[::-1].copy()),
        lambda m: damaged(m, ngrams=m.ngrams + V**3),
        lambda m: damaged(m, ngrams=m.ngrams // V * V),
        lambda m: damaged(m, ngrams=np.append(m.ngrams[:-1], V**3 + EOS)),
        lambda m: damaged(m, ngrams=np.append(-1, m.ngrams[1:])),
        lambda m: damaged(m, counts=np.append(0, m.counts[1:])),
        lambda m: damaged(m, ngrams=m.ngrams[[1, 0, *range(2, len(m.ngrams))]]),
        lambda m: damaged(m, ngrams=m.ngrams[[0, 0, *range(2, len(m.ngrams))]]),
        lambda m: damaged(m, ngrams=np.append(m.ngrams[0] // V * V + PAD, m.ngrams[1:])),
        lambda m: damaged(m, ngrams=np.append(m.ngrams[0] // V * V + SOS, m.ngrams[1:])),
        lambda m: damaged(m, ngrams=m.ngrams[:, None], counts=m.counts[:, None]),
    ],
)
def test_a_file_with_inconsistent_numbers_is_refused_as_damaged(tmp_path, change):
    model, path = train(TEXT, order=3, characters=AB), tmp_path / "m.safetensors"
    metadata = {"format": ngram.FORMAT, "order": "3", "characters": AB, "sentences": "7"}
    save_file(damaged(model), path, metadata)
    load_lm(path)
    save_file(change(model), path, metadata)
    with pytest.raises(InputError, match="m.safetensors is damaged"):
        load_lm(path)


def test_a_file_with_an_order_that_no_model_has_is_damaged(tmp_path):
    model, path = train(TEXT, order=3, characters=AB), tmp_path / "m.safetensors"
    for order, fits in (("12", True), ("13", False), ("0", False)):
        metadata = {"format": ngram.FORMAT, "order": order, "characters": AB, "sentences": "7"}
        save_file(damaged(model), path, metadata)
        if fits:
            assert load_lm(path).order == 12
        else:
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
        (lambda b: b.replace(b"las_fast lm 1", b"las_fast lm 9"), "not a language model of las_fast"),
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


def test_a_checkpoint_as_language_model_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="not a language model of las_fast"):
        load_lm(make_checkpoint(tmp_path))
    with pytest.raises(InputError, match="gone.safetensors is not a readable"):
        load_lm(tmp_path / "gone.safetensors")


def test_an_order_too_large_for_the_machine_is_an_error_with_a_smaller_order():
    with pytest.raises(InputError, match=r"order 12 over 31 tokens needs a table of [0-9.]+ GiB, .* --order") as caught:
        train([], order=12)
    ngram.check_order(int(str(caught.value).split("--order ")[1].split()[0]), 31)
    with pytest.raises(InputError, match="--order must be from 1 to 12; got 0"):
        train([], order=0)


def test_orders_range_from_1_to_12_and_a_table_may_take_half_the_memory(monkeypatch):
    for order in (1, 12):
        ngram.check_order(order, 4)
    for order in (0, 13):
        with pytest.raises(InputError, match=f"--order must be from 1 to 12; got {order}"):
            ngram.check_order(order, 4)
    pages = 8 * 4**5 // 16  # of 16 bytes: twice a table of order 5
    monkeypatch.setattr(ngram.os, "sysconf", {"SC_PAGE_SIZE": 16, "SC_PHYS_PAGES": pages}.get)
    ngram.check_order(5, 4)
    monkeypatch.setattr(ngram.os, "sysconf", {"SC_PAGE_SIZE": 16, "SC_PHYS_PAGES": pages - 1}.get)
    with pytest.raises(InputError, match="order 5 over 4 tokens needs a table of 0.0 GiB, .* --order 4 or less"):
        ngram.check_order(5, 4)
    with pytest.raises(InputError, match="order 12 over 31 tokens needs a table of .* --order 2 or less"):
        ngram.check_order(12, 31)
    monkeypatch.setattr(ngram.os, "sysconf", {"SC_PAGE_SIZE": 16, "SC_PHYS_PAGES": 6}.get)
    with pytest.raises(InputError, match="--order 1 or less"):  # though that is too large, too
        ngram.check_order(3, 31)


def test_a_table_too_large_for_the_machine_is_refused_before_it_is_made():
    model = ngram.LanguageModel(12, lm.CHARACTERS, np.zeros(0, np.int64), np.zeros(0, np.int64))
    with pytest.raises(InputError, match="order 12 over .* tokens needs a table of"):
        model.ngram_table()


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


def test_text_suffixes_may_be_in_upper_case(tmp_path):
    (tmp_path / "1.TRANS.TXT").write_text("1-0 HELLO THERE\n")
    assert list(read_texts(tmp_path / "1.TRANS.TXT")) == ["HELLO THERE"]
    manifest = make_manifest(tmp_path)
    expected = list(read_texts(manifest))
    assert list(read_texts(manifest.rename(tmp_path / "MANIFEST.TSV"))) == expected


def test_options_have_their_types_and_defaults(capsys):
    plain = lm.parser().parse_args(["a", "b", "--out", "c.safetensors"])
    assert (plain.texts, plain.out) == ([Path("a"), Path("b")], Path("c.safetensors"))
    assert (plain.order, plain.characters, plain.split) == (5, lm.CHARACTERS, "")
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


def test_text_is_mapped_onto_the_characters_and_digits_are_left_out(tmp_path, capsys):
    model = make(tmp_path, "--order", "2", text="Caf\u00e9,  au lait!\nat 7 o'clock\n?\n\nB\n")
    expected = train(["CAFE AU LAIT", "B"], order=2)
    assert model.ngrams.tolist() == expected.ngrams.tolist() and model.counts.tolist() == expected.counts.tolist()
    out = capsys.readouterr().out
    assert "2 sentences, 13 characters" in out and "1 sentences with digits" in out and "perplexity" not in out
    lower = make(tmp_path, "--order", "2", "--characters", "abc", text="Cab\n")
    assert lower.ngrams.tolist() == train(["cab"], order=2, characters="abc").ngrams.tolist()


def test_the_command_prints_perplexity_order_and_size(tmp_path, capsys):
    text = [f"{a}{b} {c}" for a in "ABCDE" for b in "EFGH" for c in "IJKL"]
    make(tmp_path, "--order", "3", text="\n".join(text))
    message = capsys.readouterr().out
    held = [t for t in text if lm.zlib.crc32(t.encode()) % lm.HELD_OUT_ONE_IN == 0]
    rest = train([t for t in text if t not in held], order=3)
    assert 0 < len(held) < len(text)
    expected = perplexity(rest.ngram_table(), ngram.count_ngrams(held, lm.CHARACTERS, 3))
    assert f"perplexity  {expected:.3f} per character" in message
    assert "left out" not in message
    assert "order       3: " in message and "a table of 0.1 MB" in message and "lm.safetensors (0.0" in message
    make(tmp_path, "--order", "4", text="\n".join(text))
    size = (tmp_path / "lm.safetensors").stat().st_size / 1e6
    message = capsys.readouterr().out
    table = 4 * len(Vocabulary(lm.CHARACTERS)) ** 4 / 1e6
    assert f"a table of {table:.1f} MB when decoding" in message and f"lm.safetensors ({size:.2f} MB)" in message
    letters = sum(map(len, text))
    assert f"text        {len(text)} sentences, {letters} characters" in message
    model = load_lm(tmp_path / "lm.safetensors")
    assert f"order       4: {len(model.ngrams)} n-grams" in message


@pytest.mark.parametrize(
    ("argv", "text", "message"),
    [
        ([], "", "there is no sentence in"),
        ([], " \n\n", "there is no sentence in"),
        ([], "123\n\nAT 7\n", "text.txt contain digits; write them as words\n"),
        ([], "?\nAT 7\n!\n", "used: 1 contain digits, which must be written as words, and 2 have none of the ch"),
        (["--characters", "ab"], "XYZ\n", "text.txt can be used: 1 have none of the characters 'ab'; give other"),
        (["--order", "0"], "A", "--order must be from 1 to 12"),
        (["--order", "11"], "A", "order 11 over 31 tokens needs a table of"),
        (["--characters", "AA"], "A", "distinct characters"),
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


def table(workspace):
    return torch.from_numpy(load_lm(workspace / "lm.safetensors").ngram_table())


@pytest.mark.skipif("cpp" not in HERE, reason=f"no C++ ops: {backends.EXTENSION_PROBLEM}")
@pytest.mark.parametrize("weight", [0.0, 0.6])
@pytest.mark.parametrize("beam", [1, 4])
def test_reference_and_cpp_agree_with_a_language_model_and_a_reward(workspace, beam, weight):
    decoding = {"beam": beam, "ngram_weight": weight, "length_reward": 0.4}
    actual = [
        searched(workspace, decoding, ngram=table(workspace), backend=name, nbest=beam) for name in ("reference", "cpp")
    ]
    assert actual[0] != searched(workspace, {"beam": beam}, nbest=beam)
    for ours, theirs in zip(*(itertools.chain(*each) for each in actual), strict=True):
        assert ours.text_tokens == theirs.text_tokens and ours.score == pytest.approx(theirs.score, abs=1e-3)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_length_reward_is_added_per_character_and_not_for_eos(weight, backend):
    """A beam that holds every possible text finds the same texts, with scores that differ by the reward."""
    many = memory([1, 5], [4, 3])
    ngram = torch.from_numpy(train(["A", "AB", "BB"], order=3, characters="AB").ngram_table())
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
    ngram = torch.from_numpy(train(["ABAB", "B"], order=2, characters="AB").ngram_table())
    finished = 0
    for seed in range(6):
        one = memory([seed], [12])
        state, token, text, total = model.start(one, 1), SOS, [], 0.0
        while token != EOS and len(text) < 12:
            logits, _, state = model.step(torch.tensor([[token]]), state, one)
            step = logits.log_softmax(-1)[0, 0] + weight * ngram[token]
            token, total = int(step.argmax()), total + float(step.max())
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
    expected = searched(workspace, {"beam": 4, "ngram_weight": ngram.DEFAULT_WEIGHT}, ngram=table(workspace))
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
    assert checkpoint.released_models() == ["NAME"] and transcribe.released_model() == "NAME"
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
