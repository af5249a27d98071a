"""The dataset: normalised frames, deltas, texts and skipped utterances."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_corpora import RATE, make_archive, make_manifest, make_speech, save, text_array, write_audio

from las_fast.config import DataConfig, FeatureConfig
from las_fast.data.corpus import Utterance
from las_fast.data.dataset import _TextCheck, load_dataset
from las_fast.data.features import compute_features
from las_fast.data.layouts import open_corpus
from las_fast.data.normalisation import Statistics, _safe_std, normalise
from las_fast.data.overlap import count_overlap
from las_fast.errors import InputError
from las_fast.text import Vocabulary, training_remedy


@pytest.fixture
def archive(tmp_path):
    return make_archive(tmp_path / "data", "F23", utterances=6)


def load(root, split, *, need_text=True, statistics=None, deltas=0, normalisation="utterance", size=28, **options):
    corpus = open_corpus(root)
    features = FeatureConfig(size=size, deltas=deltas, normalisation=normalisation)
    return load_dataset(
        corpus,
        (split,),
        features=features,
        data=DataConfig(**options),
        statistics=statistics,
        need_text=need_text,
        progress=False,
    )


def test_frames_are_normalised_per_utterance_and_coefficient(archive):
    dataset = load(archive, "dev")
    for i in range(len(dataset)):
        x = dataset[i]
        assert x.dtype == torch.float32 and x.shape == (dataset.frame_counts[i], 28)
        torch.testing.assert_close(x.mean(0), torch.zeros(28), atol=1e-5, rtol=0)
        torch.testing.assert_close(x.std(0, correction=0), torch.ones(28), atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [0.0, 1e-3, -37.123, 1e5])
def test_a_constant_coefficient_becomes_zero(value):
    frames = torch.randn(200, 3)
    frames[:, 1] = value
    out = normalise(frames, FeatureConfig(size=3))
    assert torch.isfinite(out).all()
    assert (out[:, 1] == 0).all()
    assert (normalise(frames[:1], FeatureConfig(size=3)) == 0).all()


def test_small_coefficients_are_not_treated_as_constant():
    frames = torch.randn(500, 2) * 1e-3
    torch.testing.assert_close(normalise(frames, FeatureConfig(size=2)).std(0, correction=0), torch.ones(2))


@pytest.mark.parametrize(
    ("mean", "std", "constant"),
    [(0.0, 3e-7, True), (0.0, 1.7e-6, False), (1e3, 5e-4, True), (1e3, 5e-3, False), (-1e3, 5e-4, True)],
)
def test_deviations_of_a_millionth_are_treated_as_rounding(mean, std, constant):
    actual = _safe_std(torch.tensor([std]), torch.tensor([mean]))
    assert actual.item() == pytest.approx(np.inf if constant else std)


def checked(text, *, normalise=False, needed=True, transcript=None):
    check = _TextCheck(Vocabulary(), normalise, needed, training_remedy)
    utterance = Utterance("x", Path("x.wav"), transcript)
    return check(utterance, text), check.text(text)


@pytest.mark.parametrize(
    ("text", "options", "problem", "used"),
    [
        ("GOOD DAY", {}, "", "GOOD DAY"),
        ("GOOD DAY", {"normalise": True}, "", "GOOD DAY"),
        ("Good, day!", {"normalise": True}, "", "GOOD DAY"),
        ("Good, A!", {}, "x.wav: transcript 'Good, A!' has characters outside the vocabulary: '!' ','", "Good, A!"),
        ("DAY 4", {}, "x.wav: transcript 'DAY 4' has characters outside the vocabulary: '4'; write d", "DAY 4"),
        ("Day 4", {"normalise": True}, "x.wav: transcript 'Day 4' contains digits", "DAY"),
        ("Day 4", {"normalise": True, "needed": False}, "", "DAY 4"),
        ("Day 4", {"needed": False}, "", "Day 4"),
        ("HH AH0", {}, "x.wav: transcript 'HH AH0' contains phonemes", "HH AH0"),
        (None, {}, "x.wav has no transcript; add it or remove the recording", None),
        (None, {"normalise": True}, "x.wav has no transcript", None),
        (None, {"needed": False}, "", None),
        ("", {}, "x.wav has an empty transcript", ""),
        (" ", {"transcript": Path("x.txt")}, "x.txt has an empty transcript", " "),
        (" ", {"needed": False}, "", None),
        ("!", {"normalise": True}, "x.wav has an empty transcript", ""),
        ("!", {"normalise": True, "needed": False}, "", None),
        ("é", {"transcript": Path("x.txt")}, "x.txt: transcript 'é' has characters", "é"),
    ],
)
def test_transcripts_are_checked_and_normalised(text, options, problem, used):
    actual, kept = checked(text, **options)
    assert actual.startswith(problem) and bool(actual) == bool(problem) and kept == used


def test_global_statistics_come_from_training_and_apply_to_other_splits(archive):
    train = load(archive, "train", normalisation="global")
    raw = torch.cat([load(archive, "train", normalisation="none")[i] for i in range(len(train))])
    torch.testing.assert_close(train.statistics.mean, raw.mean(0))
    torch.testing.assert_close(train.statistics.std, raw.std(0, correction=0))
    dev = load(archive, "dev", normalisation="global", statistics=train.statistics)
    assert dev.statistics is train.statistics
    torch.testing.assert_close(dev[0], (dev.raw(0) - raw.mean(0)) / raw.std(0, correction=0))


def test_global_normalisation_without_statistics_is_refused():
    with pytest.raises(InputError, match="statistics"):
        normalise(torch.ones(2, 3), FeatureConfig(size=3, normalisation="global"))
    constant = Statistics(torch.ones(3), torch.full((3,), torch.inf))
    assert (normalise(torch.ones(2, 3), FeatureConfig(size=3, normalisation="global"), constant) == 0).all()


def test_deltas_are_appended_after_normalisation(archive):
    plain, with_deltas = load(archive, "dev"), load(archive, "dev", deltas=2)
    assert with_deltas[0].shape[1] == with_deltas.features.input_size == 84
    assert (with_deltas.feature_size, with_deltas.blocks) == (28, 3)
    assert torch.equal(with_deltas[0][:, :28], plain[0])


def test_a_wrong_frame_size_names_the_setting(archive):
    with pytest.raises(InputError, match="has 28 features per frame, but the settings say 80; give --features.size 28"):
        load(archive, "dev", size=80, on_bad="skip")


def test_several_splits_are_concatenated_in_order(archive):
    both = load(archive, "dev+train")
    assert len(both) == 18
    assert both.ids == sum((load(archive, s).ids for s in ("dev", "train-clean-100", "train-clean-360")), [])
    assert both.positions.tolist() == list(range(18))
    assert torch.equal(both[7], load(archive, "train")[1])


def test_unknown_characters_are_listed_mapped_or_skipped(archive):
    path = open_corpus(archive).utterances("dev-clean")[0].transcript
    save(path, text_array("Café, 1", True))
    with pytest.raises(
        InputError, match="',' '1' 'a' 'f' 'é'; write digits .* others with --data.normalise-text True, or give"
    ):
        load(archive, "dev")
    assert len(load(archive, "dev", on_bad="skip")) == 5
    assert load(archive, "dev", need_text=False).texts[0] == "Café, 1"
    save(path, text_array("Café, so", True))
    assert load(archive, "dev", normalise_text=True).texts[0] == "CAFE SO"


@pytest.mark.parametrize("text", ["A 123 B", "42"])
def test_digits_are_not_dropped_silently(archive, text):
    path = open_corpus(archive).utterances("dev-clean")[0].transcript
    save(path, text_array(text, True))
    with pytest.raises(InputError, match="contains digits.*spell them out") as error:
        load(archive, "dev", normalise_text=True)
    assert str(path) in str(error.value)
    assert len(load(archive, "dev", normalise_text=True, on_bad="skip")) == 5
    assert load(archive, "dev", normalise_text=True, need_text=False).texts[0] == text  # scored unchanged


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_transcript_is_refused_in_training_only(archive, text):
    path = open_corpus(archive).utterances("dev-clean")[3].transcript
    save(path, text_array(text, True))
    with pytest.raises(InputError, match="empty transcript") as error:
        load(archive, "dev")
    assert str(path) in str(error.value)
    assert len(load(archive, "dev", on_bad="skip").skipped) == 1
    for normalise_text in (False, True):
        texts = load(archive, "dev", need_text=False, normalise_text=normalise_text).texts
        assert [i for i, text in enumerate(texts) if text is None] == [3]


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_transcript_in_a_manifest_is_none(tmp_path, blank):
    manifest = make_manifest(tmp_path)
    rows = manifest.read_text().splitlines()
    rows[1] = "\t".join([*rows[1].split("\t")[:-1], blank])
    manifest.write_text("\n".join(rows))
    texts = load(manifest, "train", size=80, need_text=False).texts
    assert texts[0] is None and all(texts[1:])
    with pytest.raises(InputError, match=r"train-0\.wav has no transcript"):
        load(manifest, "train", size=80)


def test_recordings_in_two_datasets_are_counted(tmp_path):
    manifest = make_manifest(tmp_path)
    train, dev = load(manifest, "train", size=80), load(manifest, "dev", size=80)
    assert count_overlap(train, dev) == (0, 0)
    assert count_overlap(train, train) == (4, 4)
    manifest.write_text(manifest.read_text() + "again\taudio/train-1.wav\t0.2\ts\tmade\tdev\tAGAIN\n")
    assert count_overlap(train, load(manifest, "dev", size=80)) == (1, 1)


def test_equal_ids_are_refused_or_the_later_is_left_out(tmp_path):
    manifest = make_manifest(tmp_path)
    manifest.write_text(manifest.read_text() + "train-0\taudio/dev-0.wav\t1\ts\tmade\ttrain\tAGAIN\n")
    both = rf"\({tmp_path}/audio/train-0.wav, {tmp_path}/audio/dev-0.wav\); make ids distinct"
    with pytest.raises(InputError, match=rf"the id 'train-0' occurs twice {both}"):
        load(manifest, "train", size=80)
    dataset = load(manifest, "train", size=80, on_bad="skip")
    assert len(dataset) == 4 and dataset.texts[0] != "AGAIN"
    assert [name for name, _ in dataset.skipped] == ["train-0"]


def test_long_training_utterances_are_left_out_and_counted(archive):
    limit = float(np.median(load(archive, "train").seconds))
    short = load(archive, "train", max_seconds=limit)
    assert (short.seconds <= limit).all() and 0 < len(short) < 12
    assert len(short) + len(short.skipped) == 12
    assert "max_seconds" in short.skipped[0][1]
    assert len(load(archive, "train", max_seconds=limit, need_text=False)) == 12


def test_utterances_of_exactly_the_longest_time_stay(archive):
    assert len(load(archive, "train", max_seconds=float(load(archive, "train").seconds.max()))) == 12


def test_no_split_is_an_error(archive):
    corpus = open_corpus(archive)
    with pytest.raises(InputError, match="expected at least one split; it has dev-clean"):
        load_dataset(corpus, (), features=FeatureConfig(size=28), data=DataConfig(), need_text=True, progress=False)


def test_a_few_skipped_utterances_are_all_listed(archive, capsys):
    open_corpus(archive).utterances("dev-clean")[0].transcript.unlink()
    assert len(load(archive, "dev", on_bad="skip")) == 5
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "dev-clean: left out 1 of 6 utterances" and len(lines) == 2


def test_utterances_are_counted_before_hours_are_drawn(archive, capsys):
    open_corpus(archive).utterances("dev-clean")[0].transcript.unlink()
    assert len(load(archive, "dev", on_bad="skip", hours=1e-4)) < 5
    assert capsys.readouterr().err.startswith("dev-clean: left out 1 of 6 utterances")


def test_an_id_skipped_in_several_splits_is_listed_with_its_split(archive):
    good = open_corpus(archive).utterances("train-clean-100")[0]
    for path in (good.path, good.transcript):
        twin = Path(str(path).replace("train-clean-100", "train-clean-360"))
        twin.write_bytes(b"" if path == good.path else path.read_bytes())
    dataset = load(archive, "train", on_bad="skip")
    assert dataset.ids[0] == f"train-clean-100/{good.id}"
    assert [name for name, _ in dataset.skipped] == [f"train-clean-360/{good.id}"]


def test_fewer_hours_draw_a_subset_of_more_hours(archive):
    whole = load(archive, "train")
    hours = whole.seconds.sum() / 3600
    few, more = (load(archive, "train", hours=share * hours) for share in (0.4, 0.7))
    assert 0 < len(few) < len(more) < len(whole) and set(few.ids) < set(more.ids)
    assert 0.2 < few.seconds.sum() / whole.seconds.sum() <= 0.4
    i, j = 1, whole.ids.index(few.ids[1])
    assert few.texts[i] == whole.texts[j] and few.paths[i] == whole.paths[j] and torch.equal(few[i], whole[j])
    assert load(archive, "train", hours=hours).ids == whole.ids
    assert len(load(archive, "train", hours=1e-9)) == 1
    assert len(load(archive, "train", hours=1e-9, need_text=False)) == 12
    with pytest.raises(InputError, match=r"data.hours is 5, but train-clean-100\+train-clean-360 has 0\.\d+; lower"):
        load(archive, "train", hours=5)


def test_no_usable_utterance_is_an_error_with_the_first_reason(archive):
    with pytest.raises(InputError, match="no utterance of dev-clean is usable; the first reason"):
        load(archive, "dev", max_seconds=0.01)
    for path in (archive / "dev-clean").rglob("*.npy"):
        path.unlink()
    with pytest.raises(InputError, match="'dev-clean' has no recordings"):
        load(archive, "dev")


def test_seconds_are_durations_of_the_audio(tmp_path):
    dataset = load(make_manifest(tmp_path), "train", size=80)
    assert (np.abs(dataset.seconds - (dataset.frame_counts - 1) * 0.01 - 0.025) < 0.0101).all()


def test_a_dataset_can_be_sent_to_a_worker(archive):
    dataset = load(archive, "dev", deltas=1)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[2], dataset[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [("a" * 50, "has characters outside"), ("1" * 50, "contains digits"), ("AA0 " * 20, "contains phonemes")],
)
def test_errors_quote_the_first_forty_characters_of_a_transcript(tmp_path, text, message):
    (tmp_path / "m.tsv").write_text(f"path\ttext\nx.wav\t{text}\n")
    with pytest.raises(InputError, match=f"x.wav: transcript '{text[:40]}' {message}"):
        load(tmp_path, "train", size=80, normalise_text="1" in text)


def test_a_bad_transcript_is_reported_before_a_long_recording(archive):
    path = open_corpus(archive).utterances("dev-clean")[0].transcript
    save(path, text_array("é", True))
    with pytest.raises(InputError, match="is usable; the first reason: .*outside the vocabulary"):
        load(archive, "dev", on_bad="skip", max_seconds=0.01)


def test_file_names_that_are_not_utf8_are_reported(archive, capsys):
    name = os.fsencode(archive / "dev-clean" / "mfcc") + b"/mod\xe0.npy"
    with open(name, "wb") as file:
        file.write(b"no array")
    assert len(load(archive, "dev", on_bad="skip", need_text=False)) == 6
    assert "left out 1 of 7 utterances" in capsys.readouterr().err


def test_hours_are_filled_to_the_last_second(archive):
    for u in open_corpus(archive).utterances("dev-clean"):
        save(u.path, np.random.default_rng(0).normal(size=(25, 28)).astype(np.float32))
    for count in range(1, 7):
        assert len(load(archive, "dev", hours=0.25 * count / 3600)) == count
    with pytest.raises(InputError, match=r"data.hours is 0.000486\d*, but dev-clean has 0.000417; lower it"):
        load(archive, "dev", hours=1.75 / 3600)


def test_many_skipped_utterances_are_counted_and_some_are_listed(tmp_path, capsys):
    archive = make_archive(tmp_path, "S23", utterances=15)
    for u in open_corpus(archive).utterances("dev-clean")[:12]:
        u.transcript.unlink()
    assert len(load(archive, "dev", size=27, on_bad="skip")) == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "dev-clean: left out 12 of 15 utterances"
    assert lines[-1] == "  and 2 more" and len(lines) == 12


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ((0.0, 4.0), (4.0, 8.0), 0),  # adjacent
        ((0.0, 4.0), (3.8, 8.0), 0),  # overlap of less than a quarter of a second
        ((0.0, 4.0), (3.7, 8.0), 1),
        ((4.0, 8.0), (0.0, 4.2), 0),
        ((4.0, 8.0), (0.0, 4.3), 1),
        ((0.0, 0.4), (0.35, 0.75), 0),  # short parts: overlap of less than a quarter of their length
        ((0.0, 0.4), (0.2, 0.6), 1),
        ((2.0, 3.0), (0.0, 9.0), 1),
        ((0.0, 9.0), (2.0, 3.0), 1),
        ((4.0, 8.0), (0.0, 4.25), 0),  # exactly a quarter of a second
        ((0.0, 4.0), (3.75, 8.0), 0),
        ((0.0, 0.4), (0.31, 0.71), 0),  # a quarter of its length is 0.1 s
        ((0.0, 0.4), (0.28, 0.68), 1),
    ],
)
def test_parts_count_as_overlapping_beyond_the_tolerance(tmp_path, first, second, shared):
    paths = [tmp_path / "a.wav", tmp_path / "b.wav"]
    ours = SimpleNamespace(paths=[paths[0], paths[1]], spans=[first, (0.0, 1.0)])
    theirs = SimpleNamespace(paths=[paths[0], tmp_path / "c.wav"], spans=[second, (0.0, 1.0)])
    assert count_overlap(ours, theirs) == (shared, 1)


def test_overlap_does_not_depend_on_the_order_or_length_of_parts(tmp_path):
    path = tmp_path / "a.wav"
    for spans in ([(5.0, 8.0), (0.0, 4.0)], [(0.0, 9.0), (1.0, 2.0)]):
        ours = SimpleNamespace(paths=[path, path], spans=spans)
        theirs = [SimpleNamespace(paths=[path], spans=[span]) for span in ((3, 4), (6, 7), (9, 10))]
        assert [count_overlap(ours, other)[0] for other in theirs] == [1, 1, 0]


def test_frames_map_back_to_a_recording_whose_silence_was_trimmed(tmp_path):
    quiet = np.zeros(4 * RATE, np.float32)
    speech = [make_speech(2.0, seed=seed) for seed in (1, 2)]
    (tmp_path / "clips").mkdir()
    write_audio(tmp_path / "clips" / "a.wav", np.concatenate([quiet, speech[0], quiet, speech[1], quiet]))
    write_audio(tmp_path / "clips" / "b.wav", speech[0])
    (tmp_path / "list.tsv").write_text("path\ttranscript\tsplit\nclips/a.wav\tA\tdev\nclips/b.wav\tB\tdev\n")
    dataset = load(tmp_path, "dev", size=28)
    whole = compute_features([speech[0]], FeatureConfig(size=28))[0]
    places = [dataset.recording_frame(0, frame) for frame in range(int(dataset.frame_counts[0]))]
    assert places == sorted(set(places)) and 340 < places[0] < 400 and 1150 < places[-1] < 1260
    # 4 s of silence were trimmed between 720 and 850
    assert not any(720 < place < 850 for place in places) and dataset.seconds[0] == 16.0
    assert [dataset.recording_frame(1, frame) for frame in (0, 7)] == [0, 7] and dataset.frame_counts[1] == len(whole)
    assert dataset.recording_frame(0, len(places) + 3) == places[-1] + 4  # past the end, as in padded batches
