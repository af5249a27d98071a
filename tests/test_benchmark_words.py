"""benchmarks.words: known word starts, the alignment of words, and the measures of confidences."""

from __future__ import annotations

import gzip
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from tiny_corpora import make_speech

from benchmarks.words import confidence as module
from benchmarks.words import fitting
from benchmarks.words.__main__ import main
from benchmarks.words.alignment import count_disorder, matches, right_words
from benchmarks.words.fitting import fit
from benchmarks.words.quality import area_under_roc, expected_calibration_error, perfect_calibration_error
from benchmarks.words.recordings import cut_to_speech, join, joined_recordings, synthetic_recordings
from las_fast.checkpoint import load_model
from las_fast.config import FeatureConfig
from las_fast.data.corpus import Utterance
from las_fast.errors import InputError
from las_fast.output.transcripts import Word
from las_fast.recogniser import Recogniser
from las_fast.search.confidence import Calibration, LogisticRegression, load_calibration

CONFIG = FeatureConfig(size=80)


def test_equal_words_are_paired_by_the_levenshtein_alignment():
    assert matches(list("ABCD"), list("AXCCD")) in ([(0, 0), (2, 2), (3, 4)], [(0, 0), (2, 3), (3, 4)])
    assert matches([], ["A"]) == matches(["A"], []) == []


def test_the_calibration_error_is_the_mean_difference_in_ten_bins():
    confidence, right = np.array([0.05, 0.05, 0.95, 0.95, 1.0]), np.array([0, 1, 1, 1, 0])
    assert expected_calibration_error(confidence, right) == pytest.approx((abs(0.1 - 1) + abs(2.9 - 2)) / 5)


def test_the_area_under_the_roc_counts_pairs_by_brute_force():
    rng = np.random.default_rng(0)
    confidence, right = rng.integers(0, 6, 40) / 5, rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in confidence[right] for b in confidence[~right]]
    assert area_under_roc(confidence, right) == pytest.approx(np.mean(pairs))
    assert np.isnan(area_under_roc(confidence, np.ones(40, bool)))


def test_a_fit_finds_the_weights_that_made_the_data_and_a_strong_prior_keeps_its_own():
    rng = np.random.default_rng(0)
    features = {"end": rng.normal(1, 2, 20000), "ctc": rng.normal(-3, 0.5, 20000), "letters": np.ones(20000)}
    truth = LogisticRegression(0.5, {"end": 1.0, "ctc": -2.0}, {"end": 1.0, "ctc": -3.0})
    right = rng.random(20000) < truth(features)
    found = fit(features, right)
    assert found.weights == pytest.approx(truth.weights, abs=0.1) and found.bias == pytest.approx(0.5, abs=0.05)
    assert found.means == pytest.approx(truth.means, abs=0.05)
    kept = fit(features, right, LogisticRegression(9.0, {"end": 0.25, "ctc": 0.5}, {}), 1e9)
    assert kept.weights == pytest.approx({"end": 0.25, "ctc": 0.5}, abs=1e-3)


def words_of(prior, factor, bias, count, seed=0):
    """Features of words, and which are right if the logit is `factor` times the prior's plus `bias`."""
    rng = np.random.default_rng(seed)
    features = {"end": rng.normal(1, 2, count), "ctc": rng.normal(-3, 0.5, count)}
    logit = factor * (prior.bias + 0.8 * (features["end"] - 1) - (features["ctc"] + 3)) + bias
    return features, rng.random(count) < 1 / (1 + np.exp(-logit))


PRIOR = LogisticRegression(0.5, {"end": 0.8, "ctc": -1.0, "known": 2.0}, {"end": 1.0, "ctc": -3.0, "known": 0.9})


def test_a_scale_and_a_bias_are_found_and_weights_without_a_feature_are_dropped():
    features, right = words_of(PRIOR, factor=0.5, bias=1.5, count=50_000)
    found = fitting.fit_scale(features, right, PRIOR)
    assert found.weights == pytest.approx({"end": 0.4, "ctc": -0.5}, abs=0.02)
    assert found.bias == pytest.approx(0.5 * 0.5 + 1.5, abs=0.05)
    assert found.means == {"end": 1.0, "ctc": -3.0}


def test_few_wrong_words_change_only_the_bias_and_scale_of_a_prior():
    features, right = words_of(PRIOR, factor=1.0, bias=2.0, count=2000)
    rare = np.flatnonzero(~right)
    few, many = (np.sort(np.append(rare[:n], np.flatnonzero(right))) for n in (19, 20))  # two weights
    for rows, is_scaled in ((few, True), (many, False)):
        part = {name: x[rows] for name, x in features.items()}
        weights = fitting.fit_sparingly(part, right[rows], PRIOR).weights
        assert (weights["end"] / weights["ctc"] == pytest.approx(-0.8, abs=1e-3)) == is_scaled
    assert fitting.fit_sparingly(part, right[rows], None) == fit(part, right[rows], None, 3.0)


def test_each_word_is_judged_by_a_fit_to_other_utterances(monkeypatch):
    utterance = np.repeat(np.arange(0, 24, 2), 3)
    seen = []

    def fake(features, right, prior):
        seen.append(set(features["utterance"].tolist()))
        return lambda inside: np.array([u in seen[-1] for u in inside["utterance"]])

    monkeypatch.setattr(fitting, "fit_sparingly", fake)
    values = fitting.cross_validated({"utterance": utterance}, utterance > 5, utterance, None, seed=1)
    assert not values.any() and len(seen) == 5
    assert sorted(len(part) for part in seen) == [9, 9, 10, 10, 10]


def test_perfect_confidences_of_few_words_have_an_error_too():
    assert perfect_calibration_error(np.array([0.0, 1.0, 1.0])) == (0, 0)
    few, many = (perfect_calibration_error(np.full(count, 0.95)) for count in (100, 10_000))
    assert few[0] == pytest.approx(np.sqrt(2 / np.pi * 0.95 * 0.05 / 100), rel=0.1)  # mean of |x| of a normal
    assert few[0] < few[1] < 4 * few[0] and many[0] == pytest.approx(few[0] / 10, rel=0.1)


def test_words_are_out_of_order_if_they_overlap_or_leave_the_recording():
    a, b, c = Word("A", 0.0, 0.5, 1.0), Word("B", 0.5, 1.0, 1.0), Word("C", 0.9, 1.2, 1.0)
    assert count_disorder([a, b], 1.0) == 0
    assert count_disorder([a, b, c], 2.0) == 1 and count_disorder([a, c], 1.1) == 1


def test_an_utterance_is_cut_to_its_speech_without_the_breath_before():
    noise = np.random.default_rng(0).standard_normal(11200)
    quiet, breath = 1e-4 * noise[:8000], 0.01 * noise[8000:]
    speech = make_speech(1.0)
    speech = speech * (0.3 / speech.std())
    samples = np.concatenate([quiet, breath, quiet, speech, quiet]).astype(np.float32)
    cut = cut_to_speech(samples, CONFIG)
    first = next(i for i in range(len(samples) - 400) if np.array_equal(samples[i : i + 400], cut[:400]))
    assert abs(first - 19200) < 800 and abs(len(cut) - len(speech)) < 1600


def test_a_silent_utterance_is_left_out(tmp_path):
    paths = [tmp_path / f"{name}.wav" for name in ("silent", "loud")]
    for path, samples in zip(paths, (np.zeros(16000), make_speech(1.0)), strict=True):
        soundfile.write(path, samples, 16000)
    utterances = [Utterance(path.stem, path, "SOME WORDS") for path in paths]
    (recording,) = joined_recordings(utterances, "pauses", (0.3, 0.3), CONFIG)
    assert recording.words == [("SOME", pytest.approx(0.3)), ("WORDS", None)] and recording.kind == "pauses other"
    assert len(cut_to_speech(np.zeros(16000, np.float32), CONFIG)) == 0


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--out", "a.csv"], "the output is a calibration; give a name that ends in .json"),
        (["--out", "a.words.json", "--prior", "an5"], "checkpoint an5 is neither"),
        (["--out", "a.words.json", "--prior", "mine"], "--prior .*mine.* has no calibration: .*best.words.json"),
    ],
)
def test_wrong_options_of_fit_are_an_error_before_the_work(tmp_path, monkeypatch, argv, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "best.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=sentence):
        main(["fit", "--checkpoint", "nowhere", "--data", "nowhere", *argv])


@pytest.mark.parametrize("argv", [["times", "--prior", "x"], ["confidence", "--every", "2"], ["cross", "--out", "x"],
                                  ["fit", "--out", "x", "--record"], ["fit"]])  # fmt: skip
def test_options_without_effect_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        main([argv[0], "--checkpoint", "nowhere", "--data", "nowhere", *argv[1:]])
    err = capsys.readouterr().err
    assert "unrecognized arguments: --" in err or "required: --out" in err


def test_the_prior_is_that_of_the_named_checkpoint(tmp_path):
    weights = LogisticRegression(9.0, {"end": 0.25}, {"end": 0.5})
    (tmp_path / "best.safetensors").write_bytes(b"x")
    Calibration(weights, weights).save(tmp_path / "best.words.json")
    assert module.load_prior(str(tmp_path)).beam == weights
    assert module.load_prior("default") == load_calibration(tmp_path / "other.safetensors")


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
@pytest.mark.parametrize(
    ("characters", "known"),
    [
        ("ABCDEFGHIJKLMNOPQRSTUVWXYZ' ", {"IT'S", "A", "SAID"}),
        ("abcdefghijklmnopqrstuvwxyz ", {"it", "s", "a", "said"}),
    ],
)
def test_known_words_have_the_characters_of_the_checkpoint(tmp_path, suffix, characters, known):
    few, many = (tmp_path / f"{name}{suffix}" for name in ("few", "many"))
    for path, lines in ((few, ["It’s a"]), (many, ["“Said,” 3"] + ['"Said," she.'] * 39 + ["SAID"])):
        with (gzip.open if suffix == ".txt.gz" else open)(path, "wt", encoding="utf-8") as file:
            file.write("\n".join(lines))
    options = SimpleNamespace(text=[str(few)], large_text=[str(many)])
    assert module.known_words(options, characters) == known  # "she" occurs 39 times, and a line has a digit


def test_joined_speech_starts_where_it_says():
    pieces = [("one two", np.ones(1600) * np.tile([1, -1], 800)), ("THREE", np.tile([3.0, -3.0], 400))]
    recording = join("x", pieces, [0.5, 0.25], CONFIG)
    assert recording.words == [("ONE", 0.5), ("TWO", None), ("THREE", 0.5 + 0.1 + 0.25)]
    loud = np.flatnonzero(np.abs(recording.samples) > 0.03)
    assert loud[0] == 8000 and loud[loud > 9600][0] == round(0.85 * 16000)


def test_known_words_start_within_60_ms_in_synthetic_speech():
    model = Recogniser(load_model("english"), torch.device("cpu"))
    texts = ["THE GREEN HORSE SLEEPS UNDER THE TREE", "MY BROTHER FOUND THE OLD HOUSE", "WAIT FIVE MINUTES PLEASE",
             "THE BLACK DOG RUNS BY THE RIVER", "WE NEED BREAD AND WATER", "MY MOTHER LIKES THE BIRD"]  # fmt: skip
    recordings = list(synthetic_recordings(texts, CONFIG))
    errors = []
    for recording in recordings:
        words = model.transcribe(recording.samples, 16000).words
        assert count_disorder(words, len(recording.samples) / 16000) == 0
        errors += [abs(word.start - start) for start, word in right_words(recording.words, words)]
    assert len(errors) >= 8 and np.median(errors) <= 0.06


def test_the_confidences_of_a_split_are_those_of_the_held_out_half(monkeypatch, capsys):
    words = module.ScoredWords(np.array([0.9, 0.1, 0.6]), np.array([True, False, True]), np.array([1, 1, 0]), 0)
    monkeypatch.setattr(
        module, "load_model", lambda name: SimpleNamespace(config=SimpleNamespace(decoding=SimpleNamespace(beam=8)))
    )
    monkeypatch.setattr(module, "Recogniser", lambda loaded, device: SimpleNamespace(loaded=loaded))
    monkeypatch.setattr(module, "decode_words", lambda *_: words)
    module.measure_confidence(SimpleNamespace(checkpoint="x", split="dev", record=False))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("beam 8, held-out half: 2 words, 50.0% right, ECE 0.1000, AUC 1.0000;")
    assert lines[3].startswith("greedy, half of the fit: 1 words")
