"""The command las_fast.attention: the picture of one recording, its axes, and errors."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.axes import Axes
from tiny_checkpoints import make_checkpoint
from tiny_corpora import make_archive, make_kaldi, make_speech

from las_fast import Recogniser, attention, load
from las_fast.config import FeatureConfig
from las_fast.data.features import compute_features
from las_fast.data.layouts import open_corpus
from las_fast.data.normalisation import model_input
from las_fast.errors import InputError
from las_fast.output import figures
from las_fast.text import EOS, Vocabulary


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    make_checkpoint(folder, 20, mel_bins=23, trim_silence=True)
    speech = make_speech(1.0)
    soundfile.write(folder / "plain.wav", speech, 16000)
    silence = np.zeros(16000 * 4, np.float32)
    soundfile.write(folder / "silent-start.wav", np.concatenate([silence, speech]), 16000)
    soundfile.write(folder / "long.wav", make_speech(31.0), 16000)
    return folder


@pytest.fixture(scope="module")
def model(workspace):
    return load(workspace / "untrained-20.safetensors", device="cpu")


def draw(workspace, *words, name="plain.wav"):
    checkpoint = ["--checkpoint", str(workspace / "untrained-20.safetensors"), "--device", "cpu"]
    attention.main([*checkpoint, str(workspace / name), *map(str, words)])


def test_one_command_writes_the_picture_and_prints_the_text(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(workspace, "--text", "A B")
    assert capsys.readouterr().out.splitlines() == ["A B", "written     plain.attention.png"]
    assert (tmp_path / "plain.attention.png").read_bytes().startswith(b"\x89PNG")


def test_a_given_text_may_be_written_in_any_case(model):
    tokens = model.loaded.vocabulary.encode("HELLO WORLD")
    assert attention.encode("hello World", model.loaded.vocabulary) == tokens
    assert attention.encode("aB", Vocabulary("abAB")) == Vocabulary("abAB").encode("aB")


def test_without_a_checkpoint_the_released_model_is_drawn(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("las_fast.checkpoint.default_model", lambda: str(workspace / "untrained-20.safetensors"))
    attention.main([str(workspace / "plain.wav"), "--device", "cpu", "--text", "A B"])
    assert capsys.readouterr().out.splitlines() == ["A B", "written     plain.attention.png"]


def test_weights_are_those_of_the_speller_with_teacher_forcing(workspace, model):
    picture = attention.make_picture(model, workspace / "plain.wav", 0.0, None, text="A B")
    assert picture.text == "A B" and picture.start == 0.0 and picture.frame_shift == pytest.approx(0.01)
    samples, _ = soundfile.read(workspace / "plain.wav", dtype="float32")
    (features,) = compute_features([samples], model.loaded.config.features)
    inputs = model_input(features, model.loaded.config.features)[None]
    tokens = [*model.loaded.vocabulary.encode("A B"), EOS]
    with torch.inference_mode():
        memory = model.loaded.model.listen(inputs, torch.tensor([inputs.shape[1]]))
        _, weights = model.loaded.model.speller(memory, torch.tensor([tokens]))
    reduction = model.loaded.model.time_reduction
    frames = len(features) // reduction * reduction
    expected = weights[0].repeat_interleave(reduction, 1)[:, :frames]
    assert picture.weights.shape == (4, len(features)) and reduction > 1
    assert np.allclose(picture.weights[:, :frames], expected, atol=1e-5)
    mel = FeatureConfig(kind="logmel", size=23, mel_bins=23)
    assert np.array_equal(picture.spectrogram, compute_features([samples], mel)[0].numpy())


def test_trimmed_silence_keeps_its_place_and_has_no_weights(workspace, model):
    picture = attention.make_picture(model, workspace / "silent-start.wav", 0.0, None, text="A")
    known = np.isfinite(picture.weights).all(0)
    assert picture.weights.shape[1] == len(picture.spectrogram) == pytest.approx(498, abs=1)
    assert not known[:300].any() and known[410:480].all(), "the speech starts at 4 s"


def test_a_part_of_a_recording_keeps_its_times(workspace, model):
    whole = attention.make_picture(model, workspace / "plain.wav", 0.0, None, text="A")
    part = attention.make_picture(model, workspace / "plain.wav", 0.25, 0.75, text="A")
    assert part.start == 0.25 and part.weights.shape[1] == pytest.approx(50, abs=3)
    count = part.weights.shape[1]
    assert np.allclose(part.spectrogram[:count], whole.spectrogram[25 : 25 + count], atol=1e-2)


def test_without_a_text_the_best_hypothesis_is_spelled(workspace, model):
    picture = attention.make_picture(model, workspace / "plain.wav", 0.0, None, beam=2)
    samples, _ = soundfile.read(workspace / "plain.wav", dtype="float32")
    (features,) = compute_features([samples], model.loaded.config.features)
    assert picture.text == model.decode(features, beam=2)[0].text and len(picture.weights) == len(picture.text) + 1


def test_both_axes_are_in_seconds_and_the_colours_from_0_to_1(tmp_path, monkeypatch):
    seen = []
    imshow = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, *a, **options: seen.append(options) or imshow(self, *a, **options))
    weights = np.full((4, 50), 0.1, np.float32)
    weights[:, 10:20] = np.nan
    figures.utterance_picture(
        tmp_path / "a.png", weights=weights, spectrogram=np.random.rand(50, 23), text="A B", title="$x$",
        frame_shift=0.02, start=2.0, sample_rate=16000,
    )  # fmt: skip
    upper, lower = seen
    assert upper["extent"] == pytest.approx((2.0, 3.0, -0.5, 22.5)) and lower["extent"] == pytest.approx(
        (2, 3, 3.5, -0.5)
    )
    assert (lower["vmin"], lower["vmax"]) == (0, 1)
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_words_stand_where_the_model_attends_to_them():
    weights = np.zeros((6, 10), np.float32)
    weights[0, 1] = weights[1, 3] = 1.0  # AB
    weights[3, 8] = weights[4, 8] = 0.5  # CD; rows need not sum to 1
    weights[:, 0] = np.nan
    assert figures.attended_times(weights, "AB CD", 0.1, 5.0) == [
        ("AB", pytest.approx(5.25)), ("CD", pytest.approx(5.85))
    ]  # fmt: skip
    assert figures.attended_times(weights, "", 0.1, 5.0) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start", "-1"], "--start must be at least 0 seconds; got -1"),
        (["--start", "nan"], "--start must be at least 0 seconds; got nan"),
        (["--start", "2", "--end", "2"], "--end must be later than --start 2; got 2"),
        (["--end", "40"], "a picture shows at most 30 s; --start 0 --end 40 are 40 s"),
        (["--out", "x.html"], "the output is a picture; give a name that ends in .png"),
        (["--beam", "0"], "--beam must be from 1 to 1000; got 0"),
        (["--beam-threshold", "inf"], "--beam-threshold must be a finite number of at least 0; got inf"),
        (["--text", "A1"], "--text has characters that the model does not know: '1'"),
        (["--text", "A", "--beam", "2"], "--beam and --beam-threshold are for the search for a text"),
        (["--text", "A", "--beam-threshold", "2"], "but --text gives one; leave one of them out$"),
    ],
)
def test_bad_options_are_one_sentence(workspace, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        draw(workspace, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_long_recording_needs_a_part(workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"at most 30 s, but .*long.wav has 31.0 s; give a part, such as --start 0 --end 10"
    ):
        draw(workspace, name="long.wav")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """An archive of features, and a model for them."""
    folder = tmp_path_factory.mktemp("archive")
    root = make_archive(folder, "F23")
    info = {"data": {"kind": "features", "name": "HW4P2 F23"}}
    return root, make_checkpoint(folder, 28, info=info)


def draw_utterance(archive, *words):
    root, checkpoint = archive
    attention.main(["--checkpoint", str(checkpoint), "--device", "cpu", "--data", str(root), *map(str, words)])


@pytest.fixture
def drawn(monkeypatch):
    """The options with which pictures are drawn."""
    drawn = []
    real = figures.utterance_picture
    monkeypatch.setattr(figures, "utterance_picture", lambda path, **o: drawn.append(o) or real(path, **o))
    return drawn


def test_an_utterance_of_an_archive_is_drawn_with_its_normalised_features(
    archive, drawn, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    found = open_corpus(archive[0]).utterances("dev-clean")[1]
    draw_utterance(archive, "--utterance", found.id, "--text", "A B")
    assert capsys.readouterr().out.splitlines() == ["A B", f"written     {found.id}.attention.png"]
    assert (tmp_path / f"{found.id}.attention.png").read_bytes().startswith(b"\x89PNG")
    frames = torch.from_numpy(np.load(found.path))
    model = load(archive[1], device="cpu")
    tokens, weights = attention.attend(model, frames, text="A B")
    assert model.loaded.vocabulary.decode(tokens) == "A B"
    expected = np.repeat(weights, model.loaded.model.time_reduction, axis=1)[:, : len(frames)]
    ((options),) = drawn
    count = expected.shape[1]
    assert np.allclose(options["weights"][:, :count], expected) and options["weights"].shape == (4, len(frames))
    assert np.allclose(options["spectrogram"].mean(0), 0, atol=1e-5) and options["spectrogram"].shape == frames.shape
    assert options["sample_rate"] is None and options["frame_shift"] == 0.01 and options["start"] == 0


def test_the_beam_and_its_threshold_reach_the_search_of_both_kinds_of_pictures(
    workspace, archive, drawn, tmp_path, monkeypatch
):
    used = []
    real = Recogniser.search_setup
    monkeypatch.setattr(Recogniser, "search_setup", lambda model, config: used.append(config) or real(model, config))
    monkeypatch.chdir(tmp_path)
    draw(workspace, "--beam", "2", "--beam-threshold", "0.5")
    found = open_corpus(archive[0]).utterances("dev-clean")[1]
    draw_utterance(archive, "--utterance", found.id, "--beam", "3", "--beam-threshold", "0")
    assert [(config.beam, config.beam_threshold) for config in used] == [(2, 0.5), (3, 0.0)]


def test_a_part_of_an_archives_utterance_is_cut_by_its_frames(archive, drawn, tmp_path):
    found = open_corpus(archive[0]).utterances("dev-clean")[0]
    draw_utterance(archive, "--utterance", found.id, "--start", 0.05, "--end", 0.17, "--out", tmp_path / "x.png")
    assert drawn[0]["weights"].shape[1] == 12 and drawn[0]["start"] == pytest.approx(0.05)


def test_an_utterance_of_recordings_is_drawn_as_its_part_of_the_recording(workspace, drawn, tmp_path):
    soundfile.write(tmp_path / "talk.wav", make_speech(3.0), 16000)
    manifest = tmp_path / "manifest.tsv"
    manifest.write_text("path\tsplit\ttext\toffset\tduration\tid\ntalk.wav\tdev\tA\t1.0\t1.5\tmiddle\n")
    archive = manifest, workspace / "untrained-20.safetensors"
    draw_utterance(archive, "--utterance", "middle", "--start", 0.5, "--out", tmp_path / "x.png")
    (options,) = drawn
    assert options["start"] == 1.5 and options["weights"].shape[1] == pytest.approx(98, abs=3)
    assert options["sample_rate"] == 16000
    with pytest.raises(InputError, match=r"^--start 2 is not before the end of middle, 1.5 s$"):
        draw_utterance(archive, "--utterance", "middle", "--start", 2, "--out", tmp_path / "y.png")


@pytest.mark.parametrize(("end", "count"), [(0.004, 1), (0.016, 2)])
def test_a_part_of_an_archives_utterance_has_at_least_one_frame(archive, end, count):
    model, corpus = load(archive[1], device="cpu"), open_corpus(archive[0])
    options = SimpleNamespace(start=0.0, end=end, text="A", beam=None, beam_threshold=None)
    picture = attention.picture_of_features(model, corpus, corpus.utterances("dev-clean")[0], options)
    assert picture.spectrogram.shape[0] == picture.weights.shape[1] == count


def test_an_utterance_with_a_known_problem_is_refused_with_it(workspace, tmp_path):
    data = make_kaldi(tmp_path, splits=("dev",), recordings=1)
    (data / "dev" / "wav.scp").write_text("dev0 sph2pipe -f wav dev0.sph |\n")
    archive = data, workspace / "untrained-20.safetensors"
    with pytest.raises(InputError, match=r"wav.scp line 1: dev0 is a command \(sph2pipe"):
        draw_utterance(archive, "--utterance", "dev0-0", "--out", tmp_path / "x.png")


def test_an_utterance_whose_recording_is_named_dash_is_not_standard_input(workspace, drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-").write_bytes((workspace / "plain.wav").read_bytes())
    (tmp_path / "m.tsv").write_text("path\tsplit\tid\n-\tdev\tdash\n")
    draw_utterance(("m.tsv", workspace / "untrained-20.safetensors"), "--utterance", "dash", "--text", "A")
    assert len(drawn) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--utterance", "dev-clean-9"], "has no utterance dev-clean-9 in dev-clean, .*; give an id of these, such as"),
        (["--utterance", "x", "--split", "other"], "has no split 'other'"),
        (["--utterance", "ID", "--start", "9"], "--start 9 is not before the end of ID, 0.[0-9] s$"),
        (["talk.wav", "--utterance", "ID"], "but the recording talk.wav is given too; give one of them"),
        ([], "give a recording, or an utterance of an archive by --data ROOT --utterance ID"),
    ],
)
def test_an_utterance_that_cannot_be_drawn_is_one_sentence(archive, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    name = open_corpus(archive[0]).utterances("dev-clean")[0].id
    with pytest.raises(InputError, match=message.replace("ID,", f"{name},")):
        draw_utterance(archive, *(name if word == "ID" else word for word in words))
    assert list(tmp_path.iterdir()) == []


def test_an_id_of_two_splits_needs_the_split(archive):
    corpus = open_corpus(archive[0])
    first, second = corpus.splits[0], corpus.splits[1]
    utterances = corpus.utterances(first)
    both = replace(corpus, listings={**corpus.listings, second: lambda: utterances})
    name = utterances[0].id
    with pytest.raises(InputError, match=f"the splits {first} and {second} each have an utterance {name}; give one by"):
        attention.find_utterance(both, name, None)
    assert attention.find_utterance(both, name, second) is utterances[0]


def test_a_model_for_recordings_does_not_take_features(archive, tmp_path):
    checkpoint = make_checkpoint(tmp_path, 28, info={"data": {"kind": "audio", "name": "LibriSpeech"}})
    name = open_corpus(archive[0]).utterances("dev-clean")[0].id
    with pytest.raises(InputError, match="HW4P2 F23 has precomputed frames; give data of the same kind$"):
        draw_utterance((archive[0], checkpoint), "--utterance", name, "--out", tmp_path / "x.png")


def test_a_damaged_feature_file_is_named(archive, tmp_path):
    root = make_archive(tmp_path, "F23")
    found = open_corpus(root).utterances("dev-clean")[0]
    found.path.write_bytes(b"not an array")
    with pytest.raises(InputError, match="is not a feature file"):
        draw_utterance((root, archive[1]), "--utterance", found.id, "--out", tmp_path / "x.png")


def test_an_unrelated_file_is_not_replaced(workspace, tmp_path):
    (tmp_path / "x.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists and is not a picture"):
        draw(workspace, "--out", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == b"mine"
