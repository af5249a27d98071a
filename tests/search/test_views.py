"""Decoding an utterance at several speeds and with a warped frequency axis."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoints import make_checkpoint
from tiny_corpora import make_manifest, make_speech, write_audio
from toy_model import ToyModel

import las_fast
from las_fast import decode, transcribe, tune
from las_fast.checkpoint import load_model, save_model
from las_fast.config import Config, DecodingConfig, FeatureConfig, ListenerConfig, ModelConfig, SpellerConfig, check
from las_fast.data.augment import change_speed, frame_counts_at_speed
from las_fast.data.normalisation import model_input
from las_fast.data.warp import warp_frequencies
from las_fast.errors import InputError
from las_fast.model.las import LAS
from las_fast.output.transcripts import Word
from las_fast.search import dataset as dataset_module
from las_fast.search.beam import TokenHypothesis
from las_fast.search.confidence import load_calibration
from las_fast.search.dataset import Utterances, decode_dataset
from las_fast.search.grid import Found, best_text, decode_grid
from las_fast.search.views import PLAIN, View, is_sure, keep_better, viewed, views_of
from las_fast.search.words import MIN_WORD, WordFinder
from las_fast.text import EOS, Vocabulary

CONFIG = FeatureConfig(kind="mfcc", size=20, mel_bins=23, deltas=1)


def hypothesis(score, frames=(0, 5, 9), words=()):
    return TokenHypothesis([4] * len(frames), score, score, list(frames), [0.0] * len(frames), True, None, tuple(words))


def test_an_utterance_is_decoded_at_every_speed_with_its_warp_once():
    settings = DecodingConfig(speeds=(1.0, 0.8, 1.0, 1.0), warps=(1.0, 1.1, 1.1, 1.0))
    assert views_of(settings) == [PLAIN, View(0.8, 1.1), View(1.0, 1.1)]
    assert views_of(settings.attention_only()) == views_of(DecodingConfig()) == [PLAIN]


def test_a_single_speed_or_warp_is_for_all():
    assert views_of(DecodingConfig(speeds=(1.0, 0.8), warps=(1.1,))) == [View(1.0, 1.1), View(0.8, 1.1)]
    assert views_of(DecodingConfig(speeds=(0.9,), warps=(1.0, 1.1))) == [View(0.9, 1.0), View(0.9, 1.1)]


def test_a_view_changes_the_raw_frames_before_they_are_normalised():
    raw = [torch.randn(n, 20) for n in (50, 3, 1)]
    data = Utterances(raw, list("abc"), [0.5, 0.03, 0.01], CONFIG)
    assert viewed(data, PLAIN) is data
    for view in (View(0.8, 1.1), View(1.0, 0.9), View(1.6, 1.0)):
        seen = viewed(data, view)
        assert (len(seen), seen.ids, seen.seconds.tolist()) == (3, data.ids, data.seconds.tolist())
        for i, frames in enumerate(raw):
            expected = model_input(change_speed(warp_frequencies(frames, view.warp, CONFIG), view.speed), CONFIG)
            torch.testing.assert_close(seen[i], expected, atol=1e-4, rtol=1e-4)
            assert len(seen[i]) == seen.frame_counts[i] == max(1, round(len(frames) / view.speed))


def test_the_higher_score_is_kept_and_of_equal_ones_the_first():
    first, equal, better = [hypothesis(-2.0)], [hypothesis(-2.0, (1,))], [hypothesis(-1.0), hypothesis(-3.0)]
    impossible = [hypothesis(-math.inf)]
    same = {"frames": 40, "view_frames": 40, "reduction": 2}
    assert keep_better([], first, **same) is first
    assert keep_better(first, equal, **same) is first
    assert keep_better(first, better, **same) is better
    assert keep_better(better, first, **same) is better
    assert keep_better(impossible, first, **same) is first and keep_better(first, impossible, **same) is first


@pytest.mark.parametrize("reduction", [1, 4])
@pytest.mark.parametrize("frames", [1, 2, 3, 40, 103])
@pytest.mark.parametrize("speed", [0.5, 0.8, 0.9, 1.1, 1.7, 2.0])
def test_frames_and_times_are_those_of_the_utterance_at_its_own_speed(speed, frames, reduction):
    view_frames = int(frame_counts_at_speed(frames, speed))
    attended = range(-(-view_frames // reduction))
    word = Word("AB", 0.0, 0.01 * view_frames, 0.7)  # all of the view
    sizes = {"frames": frames, "view_frames": view_frames, "reduction": reduction}
    (kept,) = keep_better([], [hypothesis(-1.0, attended, [word])], **sizes)
    last = -(-frames // reduction) - 1
    for frame, actual in zip(attended, kept.attended_frames, strict=True):
        centre = (frame + 0.5) * frames / view_frames  # in encoder frames of the utterance
        assert actual <= centre < actual + 1 or actual == last < centre
    (moved,) = kept.words
    assert (moved.text, moved.start, moved.confidence) == ("AB", 0.0, 0.7)
    assert moved.end == pytest.approx(0.01 * frames)


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_the_shortest_utterances_can_be_decoded_in_every_view(frames):
    torch.manual_seed(1)
    config = ModelConfig(ListenerConfig((8,), (3,), (2,), 8, 1), SpellerConfig(8, 8, 8, (8, 8)), ctc_layer=1)
    vocabulary = Vocabulary("AB ")
    model = LAS(config, input_size=40, vocabulary_size=len(vocabulary)).eval()
    data = Utterances([torch.randn(frames, 20)], ["a"], [frames / 100], CONFIG)
    views = {"speeds": (2.0, 0.5, 1.0, 2.0, 0.5), "warps": (0.9, 1.1, 1.0, 1.1, 0.9)}
    settings = DecodingConfig(beam=3, ctc_weight=0.3, **views)
    words = WordFinder(model, vocabulary, load_calibration(Path("none.safetensors")), frame_shift=0.01)
    ((best, *_),) = decode_dataset(model, data, vocabulary, settings, words=words, progress=False, device="cpu")
    assert all(0 <= frame <= (frames - 1) // model.time_reduction for frame in best.attended_frames)
    assert all(0 <= word.start < word.end <= frames / 100 + MIN_WORD for word in best.words)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    make_manifest(folder / "data")
    decoding = DecodingConfig(beam=3, minimum_share=0.1, speeds=(1.0, 1.0, 0.8, 0.8), warps=(1.0, 1.1, 1.0, 1.1))
    path = make_checkpoint(folder, 20, sections={"decoding": decoding}, mel_bins=23)
    loaded = load_model(path)
    weights = loaded.model.state_dict()
    weights["speller.bias"][EOS] += 2.5  # texts end
    save_model(path, weights, loaded.config, loaded.statistics, loaded.info)
    return folder


def decode_to(folder, name, *options):
    jsonl = folder / f"{name}.jsonl"
    files = ["--out", str(folder / f"{name}.csv"), "--jsonl", str(jsonl), "--nbest", "3"]
    checkpoint = ["--checkpoint", str(folder / "untrained-20.safetensors"), "--device", "cpu"]
    decode.main([*checkpoint, "--data", str(folder / "data"), "--split", "dev", *files, *options])
    return [json.loads(line) for line in jsonl.read_text().splitlines()]


SINGLE = [("1", "1"), ("1", "1.1"), ("0.8", "1"), ("0.8", "1.1")]


def test_decoding_keeps_the_best_of_all_views(workspace, capsys):
    every = decode_to(workspace, "every")
    single = [
        decode_to(workspace, "single", "--decoding.speeds", speed, "--decoding.warps", warp) for speed, warp in SINGLE
    ]
    for i, row in enumerate(every):
        best = max((rows[i] for rows in single), key=lambda one: one["score"])
        assert row == best
    chosen = {max(range(4), key=lambda k: single[k][i]["score"]) for i in range(len(every))}
    assert len(chosen) > 1  # so several views won
    assert decode_to(workspace, "short", "--speeds", SINGLE[0][0], "--warps", SINGLE[0][1]) == single[0]
    one_by_one = decode_to(workspace, "alone", "--decoding.frames-per-batch", "1")
    assert [row["text"] for row in one_by_one] == [row["text"] for row in every]


class ByTable:
    """Replaces las_fast.search.dataset._decode_batch: hypotheses with the costs per token that a table has."""

    costs = {
        View(1.0, 1.0): (0.4, 0.6, 0.9, 0.7),
        View(0.8, 1.0): (0.1, 0.5, 1.0, 0.8),
        View(1.0, 1.1): (0, 0, 0.2, 0.65),
    }

    def __init__(self, most: int = 99):
        self.most, self.decoded = most, {view: [] for view in self.costs}

    def __call__(self, batch, view, **options):
        indices = batch.indices.tolist()
        if len(indices) > self.most:
            raise MemoryError
        self.decoded[view] += indices
        return [[hypothesis(-4 * self.costs[view][i])] for i in indices]


@pytest.mark.parametrize("most", [1, 2, 99])
@pytest.mark.parametrize(
    ("threshold", "second", "third", "costs", "done"),
    [
        (0.5, [1, 2, 3], [2, 3], (0.4, 0.5, 0.2, 0.65), [3 + 1 + 1 + 1, 2 + 1 + 1, 1 + 1]),
        (0.95, [], [], (0.4, 0.6, 0.9, 0.7), [3 * 4]),
        (0.05, [0, 1, 2, 3], [0, 1, 2, 3], (0, 0, 0.2, 0.65), [4, 4, 4]),
        (0.0, [0, 1, 2, 3], [0, 1, 2, 3], (0, 0, 0.2, 0.65), [4, 4, 4]),
    ],
)
def test_an_utterance_with_a_likely_text_is_not_decoded_in_further_views(
    monkeypatch, most, threshold, second, third, costs, done
):
    seen = []
    by_table = ByTable(most)
    monkeypatch.setattr(dataset_module, "_decode_batch", by_table)
    monkeypatch.setattr(dataset_module.ProgressBar, "update", lambda self, seconds: seen.append(seconds))
    data = Utterances([torch.randn(9, 20)] * 4, list("abcd"), [1.0] * 4, CONFIG)
    settings = DecodingConfig(speeds=(1.0, 0.8, 1.0), warps=(1.0, 1.0, 1.1), view_threshold=threshold)
    results = decode_dataset(ToyModel(), data, Vocabulary(), settings, device="cpu")
    assert [sorted(indices) for indices in by_table.decoded.values()] == [[0, 1, 2, 3], second, third]
    assert [-best.score / 4 for best, *_ in results] == pytest.approx(costs)
    assert sum(seen) == pytest.approx(4)
    if most == 99:
        assert seen == pytest.approx([n / 3 for n in done])


def test_the_views_end_at_the_first_text_that_is_likely_enough():
    config = DecodingConfig(view_threshold=0.5)
    assert is_sure(hypothesis(-2.0), config)  # three tokens and <eos>
    assert not is_sure(hypothesis(-2.01), config) and not is_sure(hypothesis(-math.inf), config)
    assert not is_sure(replace(hypothesis(-1.0), finished=False), config)
    assert not is_sure(hypothesis(0.0), DecodingConfig())
    texts = [Found("A", -3.0, False), Found("B", -2.0, True), Found("C", -1.0, False)]
    assert best_text(texts) == "B" and best_text(texts[::2]) == "C"
    assert best_text([Found("A", -1.0, False), Found("B", -1.0, True)]) == "A"


def test_a_grid_and_tuning_decode_as_decode_does(workspace, capsys):
    model = las_fast.load(workspace / "untrained-20.safetensors", device="cpu")
    torch.manual_seed(1)
    raw = [torch.randn(n, 20) for n in (50, 31, 90, 64)]
    data = Utterances(raw, list("abcd"), [len(x) / 100 for x in raw], model.loaded.config.features)
    plain = model.decode_dataset(data, model.search_setup(model.settings(speeds=(1,), warps=(1,))), progress=False)
    costs = sorted(-best.score / (len(best.text_tokens) + 1) for best, *_ in plain)
    threshold = (costs[1] + costs[2]) / 2
    settings = [
        model.settings(),
        model.settings(view_threshold=threshold),
        model.settings(speeds=(0.8, 1.0), warps=(1.0,), view_threshold=threshold),
        model.settings(speeds=(0.8, 1.0), warps=(1.0,)),
    ]
    texts = decode_grid(model.loaded, data, settings, None, "cpu")
    for point, actual in zip(settings, texts, strict=True):
        results = model.decode_dataset(data, model.search_setup(point), progress=False)
        assert actual == [model.loaded.vocabulary.decode(best.text_tokens) for best, *_ in results]
    assert texts[2] != texts[3]  # so the threshold has changed a text
    out = workspace / "table.csv"
    checkpoint = ["--checkpoint", str(workspace / "untrained-20.safetensors"), "--device", "cpu"]
    tune.main([*checkpoint, "--data", str(workspace / "data"), "--length-penalty", "1", "--out", str(out)])
    (row,) = csv.DictReader(out.open())
    capsys.readouterr()
    decode_to(workspace, "again")
    assert float(row["cer"]) == pytest.approx(json.loads(capsys.readouterr().out.splitlines()[-1])["cer"], abs=1e-3)


def test_a_threshold_of_0_replaces_that_of_the_checkpoint(tmp_path):
    path = make_checkpoint(tmp_path, 20, mel_bins=23, sections={"decoding": DecodingConfig(view_threshold=0.5)})
    model = las_fast.load(path, device="cpu")
    assert (model.settings().view_threshold, model.settings(view_threshold=0).view_threshold) == (0.5, 0)


def test_recordings_are_transcribed_and_features_decoded_in_every_view(workspace, capsys):
    model = las_fast.load(workspace / "untrained-20.safetensors", device="cpu")
    path = workspace / "speech.wav"
    write_audio(path, make_speech(2.0))
    several = model.transcribe(path)
    single = {
        one: model.transcribe(path, speeds=[float(one[0])], warps=np.array([one[1]], np.float64)) for one in SINGLE
    }
    scores = {one: transcript.segments[0].score for one, transcript in single.items()}
    assert several.segments[0].score == max(scores.values()) and len(set(scores.values())) > 1
    words = several.segments[0].words
    assert words and all(0 <= word.start <= word.end <= several.duration for word in words)
    command = [str(path), "--checkpoint", str(workspace / "untrained-20.safetensors"), "--device", "cpu"]
    transcribe.main(command)
    assert capsys.readouterr().out.strip() == several.text
    worst = min(scores, key=scores.__getitem__)
    assert single[worst].text != several.text
    transcribe.main([*command, "--speeds", worst[0], "--warps", worst[1]])
    assert capsys.readouterr().out.strip() == single[worst].text
    frames = np.random.default_rng(0).standard_normal((80, 20))
    every, plain = model.decode(frames), model.decode(frames, speeds=(1,), warps=(1,))
    assert every[0].score >= plain[0].score
    assert model.decode([frames])[0][0].score == every[0].score
    sure = {"view_threshold": -plain[0].score / (len(plain[0].text) + 1) + 1e-6}
    assert model.decode(frames, **sure)[0].score == plain[0].score < every[0].score


@pytest.mark.parametrize(
    ("decoding", "features", "message"),
    [
        (DecodingConfig(speeds=()), {}, "decoding.speeds and decoding.warps need a value each; 1 means unchanged"),
        (DecodingConfig(warps=()), {}, "decoding.speeds and decoding.warps need a value each; 1 means unchanged"),
        (
            DecodingConfig(speeds=(1.0, 0.8), warps=(1.0, 1.1, 1.2)),
            {},
            "decoding.speeds has 2 values and decoding.warps 3; give as many of both, or a single one of either",
        ),
        (DecodingConfig(view_threshold=-0.1), {}, "decoding.view_threshold must be at least 0; got -0.1"),
        (DecodingConfig(speeds=(0.4,)), {}, "decoding.speeds must be at least 0.5; got 0.4"),
        (DecodingConfig(warps=(1.0, 1.6)), {}, "decoding.warps must be at most 1.5; got 1.6"),
        (
            DecodingConfig(warps=(1.1,)),
            {"kind": "mfcc", "size": 40, "mel_bins": 23},
            r"decoding.warps need features.mel_bins \(23\) of at least features.size \(40\); give the number of",
        ),
    ],
)
def test_views_that_cannot_be_made_are_refused(decoding, features, message):
    with pytest.raises(InputError, match=message):
        check(Config(decoding=decoding, features=FeatureConfig(**features)))
